"""The web edition, `make book`: the README and the notebooks, as executed, as a site that asks nobody for anything.

Sphinx reads the repository itself, so that links between notebooks and to data files mean here what they mean there.
What Sphinx and myst-nb do not do stands below: formulas as MathML, an anchor for each cell, links inside outputs.
"""

import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

project = html_title = "Fine-tuning LLMs"
author, html_show_copyright = "", False
extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["README.md", "notebooks/*.ipynb"]
exclude_patterns = [".*", "book", "data", "ftlab", "tests"]  # not walked through

nb_execution_mode = "off"  # a notebook is shown with the outputs that were committed
nb_merge_streams = True
nb_render_markdown_format = "myst"  # the quizzes are Markdown outputs, with formulas
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]  # the fallback is shown
nb_ipywidgets_js = {}
nb_code_prompt_show, nb_code_prompt_hide = "Show the solution", "Hide the solution"
myst_enable_extensions = ["dollarmath"]

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_favicon = "static/favicon.svg"
html_css_files, html_js_files = ["course.css"], [("course.js", {"defer": "defer"})]
html_copy_source = html_show_sourcelink = False
html_use_index = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "github-dark"
copybutton_selector = ".cell_input pre, section > [class*=highlight-] pre"  # code, not outputs

ABOUT = """
*This is the web edition: each notebook as it was executed. Its sliders, exercises and flash cards come alive where it
runs: take the repository and `make lab`.*
"""
TOCTREE = "\n\n```{toctree}\n:hidden:\n:glob:\n\nnotebooks/*\n```\n"


def read(app, docname: str, source: list[str]) -> None:
    """The README leads to every notebook; what there is only while it runs is left out: widgets, links to runs/."""
    if docname == root_doc:
        title, rest = source[0].split("\n", 1)
        source[0] = f"{title}\n{ABOUT}{rest}{TOCTREE}"
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        cell["source"] = re.sub(r"\[([^]]+)\]\(runs/[^)]+\)", r"\1", "".join(cell["source"]))
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not _only_widget(output)]
    app.env.metadata[docname]["cells"] = [cell["id"] for cell in notebook["cells"]]
    source[0] = json.dumps(notebook)


def _only_widget(output: dict) -> bool:
    return set(output.get("data", ())) == {"application/vnd.jupyter.widget-view+json", "text/plain"}


def anchor(app, doctree: nodes.document) -> None:
    """Gives each cell its anchor in JupyterLab, #cell-id=..., figures a name, and HTML links to pages of this site."""
    docname, title = app.env.docname, ""
    cells = dict(enumerate(app.env.metadata[docname].get("cells", [])))
    for node in list(doctree.findall(nodes.Element)):
        cell = cells.pop((node.line or 0) // 10_000 - 1, None)  # myst-nb counts 10,000 lines for a cell
        if cell is not None:
            place = node.parent if isinstance(node, nodes.title) else node
            mark = nodes.raw("", f'<span class="cell-anchor" id="cell-id={cell}"></span>', format="html")
            place.parent.insert(place.parent.index(place), mark)
            app.env.domaindata["std"]["anonlabels"][f"{docname}#{cell}"] = docname, f"cell-id={cell}"
        if isinstance(node, nodes.title):
            title = node.astext()
        elif isinstance(node, nodes.image) and "://" in node["uri"]:  # a badge: nothing is asked of other servers
            node.replace_self(nodes.Text(node.get("alt", "")))
        elif isinstance(node, nodes.image):
            node.setdefault("alt", f"Figure: {title}")
        elif isinstance(node, nodes.raw):
            page = re.sub(r'href="([\w./-]+)\.ipynb(?=["#])', r'href="\1.html', node.astext())
            page = re.sub(r'<a [^>]*href="\.\./data/[^>]*>(.*?)</a>', r"\1", page)  # the site has no data files
            node.children, node.rawsource = [nodes.Text(page)], page


SPACING = [  # where TeX sets other spaces than a browser: around ln, before a sign, around a slash
    (r"(?<=</m[in]>)(?=<mi>(ln|log)</mi>)", '<mspace width="0.17em"></mspace>'),
    (r"<mi>(ln|log)</mi>(?!<mo)", r'\g<0><mspace width="0.17em"></mspace>'),
    (r"(?<=(?:&#x00028;|&#x0002C;|&#x0003D;)</mo>)<mo>&#x02212;", '<mo form="prefix">&#x02212;'),
    (r"<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">/</mo>'),
]


def math(self, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers draw themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    formula = convert(node.astext(), display=display)
    for pattern, spaced in SPACING:
        formula = re.sub(pattern, spaced, formula)
    self.body.append(f'<div class="formula">{formula}</div>' if display == "block" else formula)
    raise nodes.SkipNode


def home(app, exception: Exception | None) -> None:
    if not exception and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("source-read", read)
    app.connect("doctree-read", anchor)
    app.connect("build-finished", home)

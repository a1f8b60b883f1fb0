"""The web edition, `make book`: the notebooks, as executed, as a site that asks nobody for anything.

Sphinx reads the repository itself, so that links between notebooks and to data files mean here what they mean there.
What Sphinx and myst-nb do not do stands below: formulas as MathML, an anchor for each cell, links inside outputs, and
a fold over each output that the text asks to predict. The landing page is index.md with landing.py; the memory
calculator is memory.md with calculator.py and static/memory.js. The lab reports are experiments/*/report.md; reports.py
makes their list and published.md, what others measured.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.project import Project

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
sys.path[:0] = [str(BOOK), str(ROOT)]
import calculator  # noqa: E402
import landing  # noqa: E402
import reports  # noqa: E402

project = html_title = "Fine-tuning LLMs"
author, html_show_copyright = "", False
extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "index"
include_patterns = ["book/*.md", "notebooks/*.ipynb", "experiments/README.md", "experiments/*/report.md"]
exclude_patterns = [".*", "book/build", "data", "ftlab", "my", "tests", "runs"]  # not walked through

nb_execution_mode = "off"  # a notebook is shown with the outputs that were committed
nb_merge_streams = True
nb_render_markdown_format = "myst"  # the quizzes are Markdown outputs, with formulas
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]  # the fallback is shown
nb_ipywidgets_js = {}
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
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

# owner/name, as `make badges` writes it into the notebooks
_badges = re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+?)/blob/",
                     (ROOT / "notebooks" / "00_start_here.ipynb").read_text(encoding="utf-8"))  # fmt: skip
REPOSITORY = _badges[0] if _badges else ""
PYODIDE = ROOT / ".venv-book" / "pyodide"  # where fetch_pyodide.py leaves it, if it can

_path2doc = Project.path2doc
Project.path2doc = lambda self, file: (_path2doc(self, file) or "").removeprefix("book/") or None  # pages at the root


def read(app, docname: str, source: list[str]) -> None:
    """Pages get the parts that are made; notebooks lose what there is only while they run: widgets, links to runs/."""
    if docname == root_doc:
        return fill(source, landing.parts(ROOT, REPOSITORY, downloads(Path(app.outdir, "_static"))))
    if docname == "memory":
        return fill(source, {"calculator": calculator_page()})
    if docname == "published":
        return fill(source, {"published": reports.sources(ROOT)})
    if docname.startswith("experiments/"):
        fill(source, {"reports": reports.listed(ROOT)})
        source[0] = reports.linked(ROOT, docname, source[0], REPOSITORY)
        return None
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        cell["source"] = re.sub(r"\[([^]]+)\]\(runs/[^)]+\)", r"\1", "".join(cell["source"]))
        if cell["cell_type"] == "markdown":
            cell["source"] = reports.linked(ROOT, docname, cell["source"], REPOSITORY)
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"].setdefault("tags", []).append("hide-input")
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not _only_widget(output)]
    mark_predicted(notebook["cells"])
    first = notebook["cells"][0]
    first["source"] = re.sub(r"\[!\[.*?\]\(.*?\)\]\(.*?\)\n*", "", first["source"])  # badges: the buttons say it
    app.env.metadata[docname]["cells"] = [cell["id"] for cell in notebook["cells"]]
    source[0] = json.dumps(notebook)


def mark_predicted(cells: list[dict]) -> None:
    """Marks the code cells whose outputs the text above asks to predict: up to the next text, without exercises."""
    asked = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            asked = "**Predict" in cell["source"]
        elif asked and cell.get("outputs") and not re.search(r'^check\("', cell["source"], re.MULTILINE):
            cell["metadata"]["predicted"] = True


def fold_predicted(doctree: nodes.document) -> None:
    """Folds the outputs of the marked cells. The browser itself opens them, by mouse or keys, without a script."""
    opening = '<details class="happened"><summary>Show what happened</summary>'
    for cell in list(doctree.findall(nodes.container)):
        output = cell.children[-1] if cell.children else None
        if not cell.get("cell_metadata", {}).get("predicted") or output.get("nb_element") != "cell_code_output":
            continue
        cell.insert(len(cell.children) - 1, nodes.raw("", opening, format="html"))
        cell.append(nodes.raw("", "</details>", format="html"))


def fill(source: list[str], parts: dict[str, str]) -> None:
    for name, part in parts.items():
        source[0] = source[0].replace(f"<!-- {name} -->", part)


def downloads(folder: Path) -> dict[str, str]:
    """Address -> what it is, for the files that tools/deck.py makes of the interview cards, as far as it runs."""
    files = {
        "deck.txt": "All interview cards, for Anki on a phone",
        "cheat_sheet.html": "The cheat sheet: one page of A4",
    }
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "tools/deck.py", "--anki", folder / "deck.txt", "--sheet", folder / "cheat_sheet.html"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        print(f"Without the deck and the cheat sheet: {done.stderr.strip()}", file=sys.stderr)
    return {f"_static/{name}": what for name, what in files.items() if (folder / name).is_file()}


def calculator_page() -> str:
    """What the page's script starts from: the choices, the answer to the first ones, whether Pyodide is there."""
    given = {**json.loads(calculator.controls()), "report": json.loads(calculator.report(json.dumps(calculator.FIRST)))}
    given["runs"] = PYODIDE.is_dir()
    data = json.dumps(given).replace("<", "\\u003c")
    return (f'<div id="calculator"><p role="status">The calculator needs JavaScript.</p></div>\n'
            f'<script type="application/json" id="calculator-data">{data}</script>\n'
            f'<script defer src="_static/memory.js"></script>')  # fmt: skip


def _only_widget(output: dict) -> bool:
    return set(output.get("data", ())) == {"application/vnd.jupyter.widget-view+json", "text/plain"}


def anchor(app, doctree: nodes.document) -> None:
    """Gives each cell its anchor in JupyterLab, #cell-id=..., figures a name, and HTML links to pages of this site."""
    docname, title = app.env.docname, ""
    if docname.startswith("notebooks/"):
        heading = next(doctree.findall(nodes.title))
        heading.parent.insert(heading.parent.index(heading) + 1, nodes.raw("", buttons(docname), format="html"))
        fold_predicted(doctree)
    if docname.startswith(("experiments/", "published")):
        widths(doctree)
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
            page = re.sub(r'<a [^>]*?href="(\.\./(?:data|experiments)/[^"]*)"[^>]*>(.*?)</a>', to_file, page)
            node.children, node.rawsource = [nodes.Text(page)], page


def widths(doctree: nodes.document) -> None:
    """What a table's cells are: numbers are not broken, sentences get room, names of rows stay in sight."""
    for table in doctree.findall(nodes.table):
        names = [row.children[0] for row in table.findall(nodes.row)]
        stay = all(len(name.astext()) <= 30 for name in names)
        for entry in table.findall(nodes.entry):
            text = entry.astext()
            short = len(text) <= 16 or re.fullmatch(r"[-+\d.,() to]{1,32}", text)
            entry["classes"] += ["short"] * bool(short) + ["long"] * (len(text) > 60)
            entry["classes"] += ["name"] * (stay and entry in names)


def to_file(link: re.Match) -> str:
    """A link of an output to a file: to its page, or on GitHub, or only its words. Outputs stand in notebooks/."""
    place = reports.leads_to(ROOT, "notebooks/", link[1], REPOSITORY)
    if place is None:
        return link[2]  # the site has no data files
    if "://" not in place:
        place = re.sub(r"\.md(?=#|$)", ".html", place.replace("../book/", "../"))
    return f'<a href="{place}">{link[2]}</a>'


def buttons(docname: str) -> str:
    """The row under a notebook's title: links to it, if there is a repository. course.js adds a button."""
    if not REPOSITORY:
        return '<p class="buttons"></p>'
    colab = landing.colab(REPOSITORY, docname.removeprefix("notebooks/"))
    there = f"https://github.com/{REPOSITORY}/blob/main/{docname}.ipynb"
    links = f'<a class="button" href="{colab}">Open in Colab</a> <a class="button" href="{there}">On GitHub</a>'
    return f'<p class="buttons">{links}</p>'


SPACING = [  # where TeX sets other spaces than a browser: around ln, before a sign, around a slash
    (r"(?<=</m[in]>)(?=<mi>(ln|log)</mi>)", '<mspace width="0.17em"></mspace>'),
    (r"<mi>(ln|log)</mi>(?!<mo)", r'\g<0><mspace width="0.17em"></mspace>'),
    (r"(?<=(?:&#x00028;|&#x0002C;|&#x0003D;)</mo>)<mo>&#x02212;", '<mo form="prefix">&#x02212;'),
    (r"<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">/</mo>'),
]


def math(self, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers draw themselves."""
    block, tex = isinstance(node, nodes.math_block), node.astext()
    display, parts = ("block", [tex]) if block else ("inline", lines(tex))
    formula = " ".join(convert(part, display=display) for part in parts)
    for pattern, spaced in SPACING:
        formula = re.sub(pattern, spaced, formula)
    self.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def lines(tex: str) -> list[str]:
    """A long formula inside a sentence, cut before each = that stands in no braces: browsers do not break one."""
    if len(tex) < 40 or "\\left" in tex or "\\begin" in tex:
        return [tex]
    cuts = [at for at, sign in enumerate(tex) if sign == "=" and tex.count("{", 0, at) == tex.count("}", 0, at)]
    return [part for start, end in zip([0, *cuts], [*cuts, None], strict=True) if (part := tex[start:end].strip())]


def finish(app, exception: Exception | None) -> None:
    """Puts what the calculator runs beside its page: Pyodide, and a zip of ftlab.memory and its data."""
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    if PYODIDE.is_dir():
        shutil.copytree(PYODIDE, static / "pyodide", dirs_exist_ok=True)
    files = [ROOT / "ftlab" / "__init__.py", ROOT / "ftlab" / "paths.py", *ROOT.glob("ftlab/memory/*.py")]
    files += [file for folder in ("architectures", "gpus", "presets") for file in ROOT.glob(f"data/{folder}/*.json")]
    with zipfile.ZipFile(static / "memory.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for file in files:
            packed.write(file, file.relative_to(ROOT))
        packed.write(BOOK / "calculator.py", "calculator.py")


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("source-read", read)
    app.connect("doctree-read", anchor)
    app.connect("build-finished", finish)

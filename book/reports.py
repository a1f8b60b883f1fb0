"""The pages about measurements: the list of lab reports, what others measured, and their links.

A report is experiments/NAME/report.md as it stands; `page_of` says which files are pages here.
"""

import itertools
import posixpath
import re
from functools import cache
from html import escape
from pathlib import Path

import yaml

from tools import published

HEADING = re.compile(r"^# (.+)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FOLDERS = ("experiments/", "data/published/")
RUNS = "rlvr_runs"  # a table of public runs, which has a format of its own


def listed(root: Path) -> str:
    """Every lab report with its title and its question, as a list, and where the sidebar has it."""
    items = []
    for path in sorted(root.glob("experiments/*/report.md")):
        title, question = _beginning(path.read_text("utf-8"))
        items.append(f"- [{title}]({path.parent.name}/report.md)\\\n  {question}")
    if not items:
        return ""
    tree = "```{toctree}\n:hidden:\n:glob:\n\n*/report\n```"
    return "\n".join([*items, "", tree])


def _beginning(report: str) -> tuple[str, str]:
    """The title of a report, and the first paragraph below it, in one line."""
    title = HEADING.search(report)
    paragraphs = report[title.end() :].strip().split("\n\n")
    return title[1], " ".join(paragraphs[0].split())


# --- What others measured -------------------------------------------------------------------------


def sources(root: Path) -> str:
    """A section for each source of data/published, its figures beside the lines that say them."""
    folder = root / "data" / "published"
    known = published.sources(folder)
    sections = [_section(source) for source in known.values()]
    return "\n\n".join([_subjects(folder, known), *sections, _runs(folder / f"{RUNS}.yaml")])


def _subjects(folder: Path, known: dict) -> str:
    """README's table of subjects, the names of sources as links to their sections."""
    readme = folder / "README.md"
    rows = re.findall(r"^\|.*\|$", readme.read_text("utf-8"), re.M) if readme.is_file() else []
    heads = [i for i, row in enumerate(rows) if row.startswith("| subject | sources")]
    if not heads:
        return ""
    table = "\n".join(itertools.takewhile(lambda row: row != "| key | value |", rows[heads[0] :]))

    def link(name: re.Match) -> str:
        id = name[1].removesuffix(".yaml")
        return f"[{id}](#{anchor(id)})" if id in {*known, RUNS} else name[0]

    return re.sub(r"`([^`]+)`", link, table)


def anchor(name: str) -> str:
    """Where the page about what others measured has data/published/NAME.yaml."""
    return "source-" + re.sub(r"[^a-z0-9]+", "-", name.lower())


def _section(source: dict) -> str:
    told = "" if source["date"] == "undated" else f", {source['date']}"
    head = f"<{source['address']}>{told}. Opened on {source['opened']}: {_plain(source['how'])}."
    rows = [_figure(figure) for figure in source["figures"].values()]
    rows += [_derived(one) for one in source["derived"].values()]
    heads = ["model, card", "what was measured", "figure", "the line"]
    title = f"({anchor(source['id'])})=\n## {_plain(source['title'])}"
    return "\n\n".join([title, head, _table(heads, rows)])


def _figure(figure: dict) -> list[str]:
    model = ", ".join(_plain(figure[key]) for key in ("model", "card") if key in figure)
    where = f" ({_plain(figure['where'])})" if "where" in figure else ""
    read = "read from several cells: " if figure["kind"] == "read" else ""
    line = f"{read}{_verbatim(figure['quote'])}{where}"
    return [model, _plain(figure["subject"]), _plain(figure["figure"]), line]


def _derived(one: dict) -> list[str]:
    line = f"worked out: {_verbatim(one['sum'])}"
    return ["", _plain(one["subject"]), _plain(one["figure"]), line]


def _runs(file: Path) -> str:
    if not file.is_file():
        return ""
    rows = []
    for run in yaml.safe_load(file.read_text("utf-8")):
        asked = ", ".join(f"{run[key]} {key}" for key in ("answers", "steps") if run[key])
        cells = [run["model"], run["gained"], run["compute"], run["prompts"], asked, run["where"]]
        told = [_plain(cell) if cell is not None else "" for cell in cells]
        rows.append([f"[{_plain(run['run'])}](<{run['source']}>)", *told])
    heads = ["run", "model", "what it gained", "compute", "prompts", "answers, steps", "read in"]
    title = "## Public runs of reinforcement learning with verifiable rewards"
    return "\n\n".join([f"({anchor(RUNS)})=\n{title}", _table(heads, rows)])


def _plain(text: object) -> str:
    """Text as it is, whatever Markdown would make of it: bars, stars, dollars."""
    text = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[\\`*_|$\[\]{}~#]", lambda sign: f"&#{ord(sign[0])};", text)


def _verbatim(text: str) -> str:
    """Text as code, in more backticks than it has; a bar would end a table's cell."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Links to files -------------------------------------------------------------------------------


def page_of(root: Path, file: str) -> str | None:
    """The page of a file of the repository, as the file that the page is made of; None without."""
    if re.fullmatch(r"notebooks/[^/]+\.ipynb|experiments/(?:[^/]+/report|README)\.md", file):
        return file if (root / file).is_file() else None
    source = re.fullmatch(r"data/published/(?:README\.md|(.+)\.yaml)", file)
    if source and (source[1] == RUNS or source[1] is None or source[1] in _ids(root)):
        return f"book/published.md#{anchor(source[1])}" if source[1] else "book/published.md"
    return None


@cache
def _ids(root: Path) -> set[str]:
    return set(published.sources(root / "data" / "published"))


def leads_to(root: Path, docname: str, address: str, repository: str) -> str | None:
    """Where a page's link to a file of the repository leads: a page's file, GitHub, or nowhere."""
    path, _, part = address.partition("#")
    here = posixpath.dirname(docname)
    file = posixpath.normpath(posixpath.join(here, path))
    page = page_of(root, file)
    if page is None:
        return f"https://github.com/{repository}/blob/main/{file}" if repository else None
    page = posixpath.relpath(page, here)
    return f"{page}#{part}" if part and "#" not in page else page


def linked(root: Path, docname: str, text: str, repository: str) -> str:
    """A Markdown text whose links to files lead where they can; without a place the words stay.

    Of a notebook's links only those to FOLDERS: Sphinx makes downloads of its other files.
    """
    ours = docname.startswith("experiments/")

    def changed(found: re.Match) -> str:
        words, address = found.groups()
        elsewhere = re.match(r"[a-z]+:|#|<", address)
        if elsewhere or not (ours or address.removeprefix("../").startswith(FOLDERS)):
            return found[0]
        place = leads_to(root, docname, address, repository)
        return words if place is None else f"[{words}]({place})"

    return LINK.sub(changed, text)

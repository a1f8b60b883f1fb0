"""Makes the notebooks in notebooks/ ready to be read where nothing runs, and writes the repository's address into them.

    python tools/publish.py                    widgets leave their HTML, the title says when and with what it was
                                               checked, and how long it takes to read; `make notebooks` ends with it
    python tools/publish.py owner/name         and a Colab badge under the title, an install line in the first cell;
                                               README: a clone line, the badge of the tests, and beside each
                                               notebook where to open it on Colab and where to read it

The first code cell of each notebook installs the course where it runs on Colab, and does nothing elsewhere.
"""

import contextlib
import json
import re
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
README = NOTEBOOKS.parent / "README.md"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
VIEW = "application/vnd.jupyter.widget-view+json"
CELL = r"""# On Colab: installs the course, its model and its data, about 3 minutes, once a session. Elsewhere: nothing.
import os
import re
import sys

REPOSITORY = ""  # owner/name on GitHub; `make badges REPO=owner/name` writes it here
if "google.colab" in sys.modules:
    os.environ["GOMP_SPINCOUNT"] = "2000"
    where = REPOSITORY or input("Where is the course on GitHub? owner/name, as in the address you opened: ").strip()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise SystemExit("Not installed: push the course to GitHub, then run this cell again and type owner/name.")
    %pip install --quiet "ftlab[colab] @ git+https://github.com/{where}"
    !python -m ftlab.models && python -m ftlab.export
    !ln -sfn "$(python -c 'from ftlab.paths import DATA; print(DATA)')" ../data
    !ln -sfn "$(python -c 'from ftlab.paths import EXPERIMENTS as E; print(E)')" ../experiments"""


def install(repository: str) -> str:
    """CELL with the address of the course in it."""
    return CELL.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')


def address(notebook: dict, file: str, repository: str) -> dict:
    """The notebook with its badge and its install line for github.com/<repository>; run again, it replaces them.

    Raises ValueError if the repository is not owner/name, or the notebook has no title or no such cell.
    """
    _repository(repository)
    cells = {cell["id"]: cell for cell in notebook["cells"]}
    if "colab" not in cells or not "".join(notebook["cells"][0]["source"]).startswith("# "):
        raise ValueError(f"{file}: wanted a first cell that begins with '# ' and a cell with the id 'colab'")
    title, *rest = "".join(notebook["cells"][0]["source"]).split("\n")
    rest = "\n".join(line for line in rest if not line.startswith(BADGE)).lstrip("\n")
    badge = f"{BADGE}({_colab(repository, file)})"
    notebook["cells"][0]["source"] = f"{title}\n\n{badge}\n\n{rest}".splitlines(keepends=True)
    cells["colab"]["source"] = install(repository).splitlines(keepends=True)
    return notebook


def readme(text: str, repository: str) -> str:
    """README with the addresses of github.com/<repository>; run again, it replaces them."""
    owner, name = _repository(repository)
    site = f"https://{owner.lower()}.github.io/{name}/"
    tests = f"https://github.com/{repository}/actions/workflows/tests.yml"
    text = re.sub(r"^git clone .*\n", "", text, flags=re.MULTILINE)
    clone = f"git clone https://github.com/{repository} finetuning && cd finetuning\n"
    text = re.sub(r"(?<=```bash\n)(?=make lab)", clone, text, count=1)
    badge = f"[![tests]({tests}/badge.svg)]({tests}) [Read online]({site}) · [memory calculator]({site}memory.html)\n\n"
    text = re.sub(r"(\[!\[tests\].*\n\n)?(?=!\[GPU: not)", badge, text, count=1)

    def row(found: re.Match) -> str:
        colab, read = _colab(repository, f"{found[2]}.ipynb"), f"{site}notebooks/{found[2]}.html"
        return f"{found[1]} · [Colab]({colab}) · [read]({read}) |"

    return re.sub(r"^(\| \[\d\d [^]|]*\]\(notebooks/(\w+)\.ipynb\))[^|]*\|", row, text, flags=re.MULTILINE)


def _repository(name: str) -> list[str]:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"got {name!r}, wanted owner/name, as in github.com/owner/name")
    return name.split("/")


def _colab(repository: str, file: str) -> str:
    return f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{file}"


def still(notebook: dict) -> dict:
    """The notebook with the page of each widget in the place of its view, or with nothing where it has no page.

    Until its cell runs again JupyterLab can only say of a view "Error displaying widget: model not found". A line that
    counted while one waited (ftlab.answers) is empty in the end, and left out too.
    """
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if _stilled(output.get("data", {}))]
    return notebook


def reading_minutes(notebook: dict) -> int:
    """Minutes to read it, in fives: 180 words of prose a minute, and 4 seconds for a line of code that is in view."""
    words = lines = 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"!\[[^]]*\]\([^)]*\)|\]\([^)]*\)", "", source).split())
        elif not cell["metadata"].get("jupyter", {}).get("source_hidden"):
            lines += sum(bool(line.strip()) for line in source.splitlines())
    return max(5, 5 * round((words / 180 + lines * 4 / 60) / 5))


def checked(notebook: dict, file: str, today: date) -> dict:
    """The notebook whose title says the reading time, and "Checked on <today> with" the versions of what it names.

    A package that is not installed here (Axolotl has its own environment) keeps the version that stands there. Raises
    ValueError if the title lacks one of the two sentences.
    """
    title, minutes = "".join(notebook["cells"][0]["source"]), f"Reading time: {reading_minutes(notebook)} minutes"

    def newest(found: re.Match) -> str:
        with contextlib.suppress(PackageNotFoundError):
            return f"{found[1]} {version(found[1])}"
        return found[0]

    def now(found: re.Match) -> str:
        packages = re.sub(r"\b([a-z][\w-]*) \d[\d.]*", newest, found[1])
        return f"Checked on {today.day} {today:%B %Y} with {packages}."

    title, once = re.subn(r"Reading time: \d+ minutes", minutes, title)
    title, twice = re.subn(r"Checked [io]n [\w ]+? with (.+?)\.(?=\n|$)", now, title)
    if (once, twice) != (1, 1):
        raise ValueError(f'{file}: wanted "Reading time: 1 minutes" and "Checked on ... with trl 1." in the first cell')
    notebook["cells"][0]["source"] = title.splitlines(keepends=True)
    return notebook


def _stilled(data: dict) -> bool:
    """Takes a widget's view out of an output's data; whether something is left to be shown."""
    view = data.pop(VIEW, None)
    if set(data) == {"text/plain"} and not "".join(data["text/plain"]).strip():
        return False
    return view is None or set(data) > {"text/plain"}


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise SystemExit("usage: python tools/publish.py [owner/name]")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = still(json.loads(path.read_text(encoding="utf-8")))
        if arguments:
            notebook = address(notebook, path.name, arguments[0])
        else:
            notebook = checked(notebook, path.name, date.today())
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name)
    if arguments:
        README.write_text(readme(README.read_text(encoding="utf-8"), arguments[0]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

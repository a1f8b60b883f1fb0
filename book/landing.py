"""The parts of the landing page that the course knows already: read from its notebooks and results, as HTML."""

import json
import re
from html import escape
from pathlib import Path
from statistics import mean

WAYS = {  # arm of experiments/ask/records.jsonl -> what it is called here, and whether this course trained it
    "zero-shot": ("the model as it comes", False),
    "few-shot-8": ("8 examples in the prompt", False),
    "nearest": ("the query of the nearest training question", False),
    "live": ("trained on {rows} examples, a few minutes", True),
    "shipped": ("trained on 7,500 examples, two passes", True),
    "rules": ("rules, written by an expert", False),
}


def parts(root: Path, repository: str, downloads: dict[str, str]) -> dict[str, str]:
    """What stands in the place of each comment `<!-- name -->` of index.md. repository: owner/name, or nothing."""
    notebooks = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(root.glob("notebooks/*.ipynb"))}
    return {
        "start": start(repository),
        "before and after": before_and_after(notebooks["00_start_here"]),
        "scores": scores((root / "experiments" / "ask" / "records.jsonl").read_text("utf-8").splitlines()),
        "commands": commands(repository),
        "notebooks": cards(notebooks, (root / "README.md").read_text("utf-8")),
        "take along": take_along(repository, downloads),
    }


def text(cell: dict) -> str:
    return "".join(cell["source"])


def start(repository: str) -> str:
    """The buttons under the first sentence."""
    links = ['<a class="button first" href="notebooks/00_start_here.html">Read notebook 00</a>',
             '<a class="button" href="memory.html">Will it fit? Memory calculator</a>']  # fmt: skip
    if repository:
        links += [f'<a class="button" href="{colab(repository, "00_start_here")}">Open in Colab</a>',
                  f'<a class="button" href="https://github.com/{repository}">Repository</a>']  # fmt: skip
    return f'<p class="buttons">{" ".join(links)}</p>'


def colab(repository: str, notebook: str) -> str:
    return f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{notebook}.ipynb"


def before_and_after(notebook: dict) -> str:
    """The question of notebook 00, and what the model said to it before and after its training, as executed."""
    cells = {cell["id"]: cell for cell in notebook["cells"]}
    question = re.search(r'question = "(.+)"', text(cells["before"]))[1]
    trained = "".join(output.get("text", [""])[0] for output in cells["after"]["outputs"] if "text" in output)
    seconds, rows = re.match(r"(\d+) s of training on ([\d,]+) rows", trained).groups()
    titles = "Before", f"After {float(seconds) / 60:.0f} minutes of training on {rows} examples"
    asked = []
    for title, cell in zip(titles, (cells["before"], cells["after"]), strict=True):
        said = next("".join(output["data"]["text/html"]) for output in cell["outputs"] if "data" in output)
        said = re.sub(r"<code.*?</code>", lambda code: re.sub(r"\n+", "<br>", code[0]), said, flags=re.DOTALL)
        kind = "right" if "✓" in said else "wrong"
        asked.append(f'<div class="said {kind}"><p><b>{title}</b></p>{" ".join(said.split())}</div>')
    return f'<p class="question">“{escape(question)}”</p>\n<div class="before-after">{"".join(asked)}</div>'


def scores(lines: list[str]) -> str:
    """A bar for each way to answer: its share of right answers, the mean over its seeds."""
    runs = [json.loads(line) for line in lines]
    bars = []
    for arm, (name, ours) in WAYS.items():
        mine = [run for run in runs if run["arm"] == arm]
        share, name = f"{mean(run['mean'] for run in mine):.0%}", name.format(rows=mine[0]["rows"])
        bar = f'<span class="bar"><i style="width: {share}"></i></span><b>{share.replace("%", " %")}</b>'
        bars.append(f"<li{' class=ours' if ours else ''}><span>{name}</span>{bar}</li>")
    return f'<ul class="scores">{"".join(bars)}</ul>'


def commands(repository: str) -> str:
    folder = repository.rpartition("/")[2]
    clone = [f"git clone https://github.com/{repository} && cd {folder}"] if repository else []
    lines = [
        "make torch-cpu   # only without a GPU: torch for the CPU, a tenth of the bytes",
        "make lab         # sets up once, 3 to 4 minutes, and opens JupyterLab at your copy of notebook 00",
        "make test        # checks everything, every notebook included",
    ]
    return "\n".join(["```bash", *clone, *lines, "```"])


def cards(notebooks: dict[str, dict], readme: str) -> str:
    """A card for each notebook: its title, its question in one line, its minutes."""
    questions = dict(re.findall(r"^\| \[\d\d [^]]*\]\(notebooks/(\w+)\.ipynb\)[^|]*\|\s*([^|]+?)\s*\|", readme, re.M))
    items = []
    for name, notebook in notebooks.items():
        title = text(notebook["cells"][0])
        number, heading = re.match(r"# (\d\d) · (.+?)(?=:|, and|\n)", title).groups()
        question = questions.get(name) or re.search(r"\*\*(.+?[?.])", title)[1]
        about = re.search(r"\n(?:About \*\*)?([^*\n]*?(?:minutes?|seconds))\b", title)
        minutes = about[1] if about else ""
        words = f"<b>{number} · {escape(heading)}</b><span>{escape(question[:1].upper() + question[1:])}</span>"
        items.append(f'<li><a href="notebooks/{name}.html">{words}<small>{minutes}</small></a></li>')
    return f'<ol class="notebooks">{"".join(items)}</ol>'


def take_along(repository: str, downloads: dict[str, str]) -> str:
    """The memory calculator, and the files that the build could make. downloads: address -> what it is."""
    items = ['<li><a href="memory.html">The memory calculator</a>: what fits on which card, in your browser</li>']
    items += [f'<li><a href="{address}" download>{what}</a></li>' for address, what in downloads.items()]
    if repository:
        items.append(f'<li><a href="https://github.com/{repository}">The repository</a>: package, data, tests</li>')
    return f"<ul>{''.join(items)}</ul>"

"""What others measured, data/published: read, checked, set as a table, held against what quotes it.

    python tools/published.py                                  every id, with what it is
    python tools/published.py loftq#8b-lora loftq#8b-qlora     the table of these, for a report

The format of a file and the rule for a box *On a real model*: data/published/README.md.
"""

import ast
import datetime
import json
import operator
import re
import sys
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "published"
TABLES = {"rlvr_runs.yaml", "peaks.yaml"}  # of runs: each has a format and a test of its own

SOURCE = ("id", "title", "address", "date", "opened", "how", "figures")
FIGURE = ("id", "model", "subject", "figure", "kind", "quote")
DERIVED = ("id", "subject", "sum", "figure")
MAY = {"source": ("derived",), "figure": ("card", "where"), "derived": ()}

START = re.compile(r"^(?:\*\*|#+ )On a real model\b", re.MULTILINE)
OURS = re.compile(r"\b(we|us|our|ours|micro|135M)\b", re.IGNORECASE)
PATH = r"[^\s<>\"|\\^`()]*[^\s<>\"|\\^`().,;:!?]"
ADDRESS = re.compile(rf"https://([a-z0-9-]+\.)+[a-z]{{2,}}(/({PATH})?)?")
LINK = re.compile(r"\]\((https?://[^\s)]+)\)|(?<![(\w\"'`])(https?://[^\s)>\]`\"']+)")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE]-?\d+)?"
UNIT = r"(?:%|×|x|k|K|G|GB|GiB|MB|MiB|ms|s|min|h)?"
NAME = re.compile(r"(?<![\w.])[A-Za-z][\w.-]*\d[\w.-]*")  # Llama-3.1-8B, A100-80G, GPT-4, GSM8K, r8
WRITTEN = re.compile(rf"(?<![A-Za-z0-9_])(?<!\d\.)({DIGITS})({UNIT})(?![A-Za-z0-9_]|-bit)")
INSIDE = re.compile(r"\[[^\]]*\]\((?!https?:)[^)]*\)")  # a link to another page of the course
TEN_TO_THE = re.compile(r"(?:(\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|×|·|\*)\s*)?10\^\{?(-?\d+)\}?")
SUPERSCRIPT = re.compile("10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
UPRIGHT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
SIGNS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


# --- Numbers --------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """The text with one minus sign, one thousands separator and one way to write a power of ten."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\,", "").replace("\\%", "%")
    text = re.sub(r"(?<=\d)[\u2009\u202f](?=\d{3})", ",", text)  # a narrow space: 4 096
    text = SUPERSCRIPT.sub(lambda found: "10^" + found[1].translate(UPRIGHT), text)
    return TEN_TO_THE.sub(lambda found: f"{found[1] or 1}e{found[2]}", text)


def _value(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def numbers(text: str) -> set[Decimal]:
    """All numbers of a text, unsigned, those in names too: {20.1, 1.2} of '20.1G / 1.2s/it'."""
    return {_value(digits) for digits in re.findall(DIGITS, _plain(text))}


def claims(text: str) -> list[tuple[str, Decimal, bool]]:
    """The numbers that a sentence claims: as written, the value without its sign, if in percent.

    A number that is part of a name is none (Llama-3.1-8B, A100, 8B, 4-bit), nor is one in an
    address or in a link to another page of the course.
    """
    text = re.sub(r"\]\([^)]*\)", "]", INSIDE.sub("", text))
    text = NAME.sub("", _plain(re.sub(r"https?://\S+", "", text)))
    found = []
    for match in WRITTEN.finditer(text):
        percent = match[2] == "%" or bool(re.match(r"\s?(%|percent|per cent)", text[match.end() :]))
        found.append((match[0], _value(match[1]), percent))
    return found


def _worked_out(sum: str) -> float:
    """The value of a sum of numbers with + - * / and brackets. Raises ValueError for others."""

    def of(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in SIGNS:
                return SIGNS[type(sign)](of(left), of(right))
        raise ValueError(f"got {ast.unparse(node)!r}, wanted numbers with + - * / and brackets")

    try:
        return of(ast.parse(sum, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"got {sum!r}, wanted numbers with + - * / and brackets") from error


# --- The files ------------------------------------------------------------------------------------


def sources(folder: Path = FOLDER) -> dict[str, dict]:
    """Each source of data/published by its id, checked; its figures and derived ones by theirs.

    Dates are strings. Raises ValueError with the file, what it holds and what was wanted.
    """
    known, addresses = {}, {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name in TABLES:
            continue
        source = _source(path)
        other = addresses.setdefault(source["address"], path.name)
        if other != path.name:
            raise ValueError(f"{path.name}: its address is that of {other}; one file is one source")
        known[source["id"]] = source
    return known


def _source(path: Path) -> dict:
    """One file as a source. Raises ValueError, which begins with the file's name."""
    name = path.name
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(source, dict):
        raise _wrong(name, source, f"a mapping with {', '.join(SOURCE)}")
    _keys(source, name, SOURCE, MAY["source"])
    source["date"], source["opened"] = str(source["date"]), str(source["opened"])
    if source["id"] != path.stem:
        raise _wrong(f"{name}: id", source["id"], f"the file's name, {path.stem!r}")
    _date(source["date"], f"{name}: date", whole=False)
    _date(source["opened"], f"{name}: opened", whole=True)
    if source["date"] != "undated" and source["date"] > source["opened"]:
        raise _wrong(f"{name}: opened", source["opened"], f"no day before {source['date']}")
    if not ADDRESS.fullmatch(source["address"]):
        raise _wrong(f"{name}: address", source["address"], "https://host/path without brackets")
    source["figures"] = _by_id(source["figures"], f"{name}: figures", FIGURE, MAY["figure"])
    derived = source.get("derived", [])
    source["derived"] = _by_id(derived, f"{name}: derived", DERIVED, MAY["derived"])
    if both := source["figures"].keys() & source["derived"].keys():
        raise ValueError(f"{name}: figures and derived share the ids {sorted(both)}")
    for figure in source["figures"].values():
        _figure(figure, f"{name}: {figure['id']}")
    for derived in source["derived"].values():
        _derived(derived, source, f"{name}: {derived['id']}")
    return source


def _keys(entry: dict, where: str, must: tuple, may: tuple) -> None:
    """Every key that must be there and none that is unknown, and text in each but the lists."""
    missing, unknown = set(must) - entry.keys(), entry.keys() - set(must) - set(may)
    if missing or unknown:
        raise ValueError(f"{where}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    for key, value in entry.items():
        dated = key in ("date", "opened") and isinstance(value, datetime.date | int)
        if key in ("figures", "derived") or dated:
            continue
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            raise _wrong(f"{where}: {key}", value, "one line of text (a bare number: in quotes)")


def _wrong(what: str, got: object, wanted: str) -> ValueError:
    return ValueError(f"{what} is {got!r}, wanted {wanted}")


def _date(date: str, where: str, whole: bool) -> None:
    """A day; where not `whole` also a month, a year or `undated`."""
    if not whole and (date == "undated" or re.fullmatch(r"20\d\d(-(0[1-9]|1[0-2]))?", date)):
        return
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        wanted = "YYYY-MM-DD" if whole else "YYYY-MM-DD, YYYY-MM, YYYY or undated"
        raise _wrong(where, date, wanted) from error


def _by_id(entries: list, where: str, must: tuple, may: tuple) -> dict[str, dict]:
    """The entries of a list by id. Raises ValueError for a wrong key, an id twice, or no list."""
    if not isinstance(entries, list) or not (entries or where.endswith("derived")):
        raise _wrong(where, entries, "a list with at least one entry")
    found = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise _wrong(f"{where}: entry {number}", entry, f"a mapping with {', '.join(must)}")
        _keys(entry, f"{where}: {entry.get('id', f'entry {number}')}", must, may)
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry["id"]):
            raise _wrong(f"{where}: id", entry["id"], "small letters, digits, '-' and '.'")
        if entry["id"] in found:
            raise ValueError(f"{where}: the id {entry['id']!r} stands there twice")
        found[entry["id"]] = entry
    return found


def _figure(figure: dict, where: str) -> None:
    """A figure is a quote or was read, and its numbers stand in its quote."""
    if figure["kind"] not in ("quote", "read"):
        raise _wrong(f"{where}: kind", figure["kind"], "quote (verbatim) or read (several cells)")
    lacking = numbers(figure["figure"]) - numbers(figure["quote"])
    if lacking:
        told = ", ".join(map(str, sorted(lacking)))
        raise ValueError(f"{where}: its quote lacks {told} of the figure {figure['figure']!r}")


def _derived(derived: dict, source: dict, where: str) -> None:
    """A derived figure is what its sum gives; the sum's numbers stand in quotes of the source."""
    lacking = numbers(derived["sum"]) - _quoted(source) - {Decimal(1), Decimal(100)}
    if lacking:
        told = ", ".join(map(str, sorted(lacking)))
        raise ValueError(f"{where}: no quote holds {told} of the sum {derived['sum']!r}")
    try:
        value = _worked_out(derived["sum"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    written = claims(derived["figure"])
    if len(written) != 1:
        raise _wrong(f"{where}: figure", derived["figure"], "one number")
    _, said, percent = written[0]
    exact = Decimal(abs(value) * (100 if percent else 1))
    if abs(exact - said) > Decimal(5).scaleb(said.as_tuple().exponent - 1) + Decimal("1e-9"):
        raise _wrong(f"{where}: {derived['sum']}", f"{exact:.6g}", f"the figure, {written[0][0]}")


def _quoted(source: dict) -> set[Decimal]:
    """All numbers of a source's quotes."""
    return {number for figure in source["figures"].values() for number in numbers(figure["quote"])}


# --- The table of a box ---------------------------------------------------------------------------


def box(ids: list[str], known: dict[str, dict] | None = None) -> str:
    """A Markdown table, one row for each id `source#figure`, for a report or a folded cell.

    Columns: source, model and card, what was measured, figure, the quoted line. Raises ValueError
    for an id that is not there; it names those that are.
    """
    known = sources() if known is None else known
    head = "| source | model, card | what was measured | figure | the quoted line |"
    return "\n".join([head, "|---|---|---|---|---|", *(_row(id, known) for id in ids)])


def _row(id: str, known: dict[str, dict]) -> str:
    name, _, part = id.partition("#")
    if name not in known:
        raise _wrong("the source of an id source#figure", id, f"one of {', '.join(known)}")
    source = known[name]
    parts = source["figures"] | source["derived"]
    if part not in parts:
        raise _wrong(f"the figure of an id {name}#figure", part, f"one of {', '.join(parts)}")
    entry = parts[part]
    if "sum" in entry:
        model, line = "", f"worked out: `{entry['sum']}`"
    else:
        model = ", ".join(entry[key] for key in ("model", "card") if key in entry)
        fence = "``" if "`" in entry["quote"] else "`"
        line = f"{fence}{entry['quote']}{fence}"
        line = f"read: {line}" if entry["kind"] == "read" else line
    date = "" if source["date"] == "undated" else f", {source['date']}"
    link = f"[{source['title']}]({source['address']}){date}"
    cells = link, model, entry["subject"], entry["figure"], line
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- The boxes that quote it ----------------------------------------------------------------------


def boxes(root: Path = ROOT) -> list[tuple[str, str]]:
    """Each box *On a real model* with its place: in the notebooks' cells, the cards, the reports.

    A box begins with a line that starts with **On a real model** (in a report also with this as a
    heading), and ends before the next heading or the next box.
    """
    texts = []
    for path in sorted(root.glob("notebooks/*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            texts.append((f"{path.name}#{cell.get('id')}", "".join(cell["source"])))
    for path in sorted(root.glob("data/cards/*.yaml")):
        for card in yaml.safe_load(path.read_text(encoding="utf-8")) or []:
            texts += [(f"{path.name}#{card.get('id')}", said) for said in _strings(card)]
    for path in sorted(root.glob("experiments/*/report.md")):
        texts.append((path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")))
    return [(place, found) for place, text in texts for found in _boxes_of(text)]


def _strings(entry: object) -> list[str]:
    """All texts of a nest of lists and dictionaries."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
    return [text for part in parts for text in _strings(part)]


def _boxes_of(text: str) -> list[str]:
    starts = [match.start() for match in START.finditer(text)]
    parts = [text[start:end] for start, end in pairwise([*starts, len(text)])]
    return [re.split(r"\n(?=#)", part)[0].rstrip() for part in parts]


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown text; an item of a list and a row of a table end one too."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]\s|\d+\.\s|\|))", text)
    lines = [re.sub(r"[ \t\n]+", " ", block).strip() for block in blocks]
    lines = [re.sub(r"^(?:[-*]|\d+\.) ", "", line) for line in lines]
    parts = [re.split(r"(?<=[.!?:;])\s+(?=[A-Z`*\[(])", line) for line in lines]
    return [sentence for part in parts for sentence in part if sentence]


def faults(text: str, known: dict[str, dict]) -> list[str]:
    """What is wrong with a box: a link that is no source, no link, a number without its quote.

    Every number of a sentence must stand in a quote of a source that the box links, be derived
    there, or be a name's: of a model, a card, a table, what was measured, the year. Left alone are
    a sentence that names our own run (we, us, our, `micro`, 135M) and links no source, and a row
    that `box` printed.
    """
    by_address = {source["address"]: source for source in known.values()}
    printed = {_row(f"{name}#{part}", known) for name in known for part in parts(known[name])}
    rest = "\n".join(line for line in text.splitlines() if line.strip() not in printed)
    linked = [by_address[address] for address in _links(text) if address in by_address]
    strange = [address for address in _links(rest) if address not in by_address]
    wrong = [f"{address} is no source of data/published" for address in strange]
    if not linked:
        wrong.append("the box links no source of data/published")
    allowed = {number for source in linked for number in _quoted(source) | _told(source)}
    for sentence in sentences(rest):
        if OURS.search(sentence) and not _links(sentence):
            continue
        for written, value, percent in claims(sentence):
            if value not in allowed and not (percent and value / 100 in allowed):
                wrong.append(f"{written} of {sentence!r}: {_missing(value, known, linked)}")
    return wrong


def parts(source: dict) -> list[str]:
    return [*source["figures"], *source["derived"]]


def _links(text: str) -> list[str]:
    return [(named or bare).rstrip(".,;:") for named, bare in LINK.findall(text)]


def _told(source: dict) -> set[Decimal]:
    """Derived figures, and numbers of names: its year, models, cards, tables, what was measured."""
    names = [source["title"], source["date"][:4]]
    names += [derived["figure"] for derived in source["derived"].values()]
    for figure in source["figures"].values():
        names += [figure[key] for key in ("model", "card", "where", "subject") if key in figure]
    return {number for name in names for number in numbers(name)}


def _missing(value: Decimal, known: dict[str, dict], linked: list[dict]) -> str:
    """Why a number is a fault, and where it might be found."""
    told = ", ".join(source["id"] for source in linked) or "none"
    reason = f"it stands in no quote of the sources that the box links ({told})"
    rest = [source for source in known.values() if source not in linked]
    others = ", ".join(source["id"] for source in rest if value in _quoted(source))
    return f"{reason}; not linked here, it stands in {others}" if others else reason


def _listed(known: dict[str, dict]) -> list[str]:
    """One line for each figure: its id, its model, its subject, and the figure."""
    lines = []
    for name, source in known.items():
        for part, entry in (source["figures"] | source["derived"]).items():
            model = entry.get("model", "worked out")
            lines.append(f"{name}#{part}: {model}: {entry['subject']}: {entry['figure']}")
    return lines


if __name__ == "__main__":
    print(box(sys.argv[1:]) if sys.argv[1:] else "\n".join(_listed(sources())))

"""Sentences that compare and are bound to nothing: a list to read, no test.

    python tools/unbound.py                    notebooks, cards, quizzes, README.md
    python tools/unbound.py notebooks/04*      only these files
    python tools/unbound.py --all              each sentence that compares, with what became of it

A sentence that reports a measurement belongs into experiments/NAME/statements.yaml, where a test
evaluates it (experiments/README.md). This finds those that may: they have a word of comparison near
a number, a method or the name of an experiment's arm. Words decide, so some that are listed claim
nothing, and some that claim are missed. Left out are questions, sentences with a source or a
formula, definitions, and what sets an exercise.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BOUND, CANDIDATE, SILENT = "bound", "candidate", "compares nothing"

# --- From Markdown to sentences -------------------------------------------------------------------

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]*(?:\([^()]*\)[^()\s]*)*)\)")
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?(?:^ *\1`*~* *$|\Z)", re.MULTILINE | re.DOTALL)
DISPLAY = re.compile(r"\$\$.*?\$\$", re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
HTML = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL)
TABLE = re.compile(r"^ *\|.*$", re.MULTILINE)
ATOM = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)|\$(?!\s)[^$\n]+?(?<!\s)\$(?!\d)", re.DOTALL)
ADDRESS = re.compile(r"https?://[^\s)>\]]*[^\s)>\].,;:!?]")
ITEM = re.compile(r"^ *(?:[-*+]|\d+[.)]|#{1,6}|>) +", re.MULTILINE)

# Code, formulas and addresses are one character each while sentences are cut: their full stops end
# nothing. The characters are private ones of Unicode, which no text has.
FIRST, LAST = 0xE000, 0xF8FF
HIDDEN = re.compile("[\ue000-\uf8ff]")

ABBREVIATIONS = "e.g i.e vs cf al approx resp ca Dr Mr Ms Mrs St Fig Figs Eq Eqs Sec Tab Ch p pp"
NUMBERED = "No Nos Vol"  # abbreviations only before a number: "No. 3", but "No. It fell."
CLOSE, OPEN = "[\"')\\]*_\u201d\u2019]*", "[\"'(\\[*_\u201c\u2018]*"
STOP = re.compile(rf"[.!?…]+{CLOSE}\s+(?={OPEN}[A-Z0-9\ue000-\uf8ff])")
SHORT = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, ABBREVIATIONS.split()))})$")
BEFORE_NUMBER = re.compile(rf"(?:^|[\s(])(?:{'|'.join(NUMBERED.split())})$")
INITIAL = re.compile(r"(?:^|[\s(.])[A-Z]$")


@dataclass(frozen=True)
class Sentence:
    """A sentence as one reads it, its links' targets, its code and formulas."""

    text: str
    links: tuple[str, ...] = ()
    atoms: tuple[str, ...] = ()


def sentences(markdown: str) -> list[Sentence]:
    """The sentences of a Markdown text, without tables, blocks of code, pictures and formulas.

    A heading, an item of a list and a paragraph end one, whatever their last character.
    """
    hidden: list[str] = []

    def hide(text: str) -> str:
        if FIRST + len(hidden) > LAST:
            raise ValueError(f"a text has more than {LAST - FIRST} links and pieces of code")
        hidden.append(text)
        return chr(FIRST + len(hidden) - 1)

    for pattern in (FENCE, DISPLAY, TABLE):
        markdown = pattern.sub("\n\n", markdown)
    markdown = PICTURE.sub("", markdown)
    markdown = ATOM.sub(lambda found: hide(found[0]), markdown)
    markdown = LINK.sub(lambda found: found[1] + hide(f"]({found[2]})"), markdown)
    markdown = ADDRESS.sub(lambda found: hide(found[0]), HTML.sub("", markdown))
    found = [cut for block in _blocks(markdown) for cut in _cut(block)]
    return [_shown(cut, hidden) for cut in found if re.search(r"\w", HIDDEN.sub("", cut))]


def _blocks(markdown: str) -> Iterator[str]:
    """Paragraphs, items and headings, each in one line."""
    started = ITEM.sub(lambda found: f"\n\n{'#' if '#' in found[0] else ''}", markdown)
    for block in re.split(r"\n\s*\n", started):
        if block.lstrip().startswith("#"):  # a heading is one line
            head, _, block = block.lstrip().lstrip("#").partition("\n")
            yield " ".join(head.split())
        yield " ".join(block.split())


def _cut(block: str) -> Iterator[str]:
    """A line cut after each full stop that ends a sentence."""
    start = 0
    for stop in STOP.finditer(block):
        before, after = block[start : stop.start()], block[stop.end() :]
        if block[stop.start()] == "." and _abbreviates(before, after):
            continue
        yield block[start : stop.end()].strip()
        start = stop.end()
    yield block[start:].strip()


def _abbreviates(before: str, after: str) -> bool:
    """Whether the full stop between these two belongs to an abbreviation or an initial."""
    if BEFORE_NUMBER.search(before):
        return after[:1].isdigit()
    return bool(SHORT.search(before) or INITIAL.search(before))


def _shown(cut: str, hidden: list[str]) -> Sentence:
    links, atoms = [], []

    def show(found: re.Match) -> str:
        text = hidden[ord(found[0]) - FIRST]
        if text.startswith("]("):
            links.append(text[2:-1])
            return ""
        (links if text.startswith("http") else atoms).append(text)
        return text

    text = HIDDEN.sub(show, cut)
    return Sentence(plain(text), tuple(links), tuple(atoms))


def plain(text: str) -> str:
    """One space for any, no emphasis, of a link what one reads: as in tests/test_statements.py."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("*", "").split())


# --- Does it compare? -----------------------------------------------------------------------------

WORDS = (
    r"more|less|fewer|better|worse|best|worst|the\s(?:most|least)(?!\ssimilar)|ahead|behind|half|"
    r"gain(?:s|ed)?|los(?:e|es|t)|forg[eo]t(?:s|ten)?|w[io]ns?|beat(?:s|en)?|improve[sd]?|twice|"
    r"outperform(?:s|ed)?|outscore[sd]?|exceed(?:s|ed)?|match(?:es|ed)?|rose|fell|double[sd]?|"
    r"differ(?:s|ed)?|undecided|help(?:s|ed)?|hurts?|suffice[sd]?|cheap(?:er|est)|fast(?:er|est)|"
    r"slow(?:er|est)|high(?:er|est)|low(?:er|est)|great(?:er|est)|small(?:er|est)|larg(?:er|est)|"
    r"long(?:er|est)|short(?:er|est)|strong(?:er|est)|weak(?:er|est)|times\s(?:as|more|less)|"
    r"told\sapart|no\sdifference|as\s(?:good|well|much|many|fast|cheap|high|low)\sas"
)
METHODS = (
    r"full\sfine-tuning|fine-tun\w+|Q?LoRA|rsLoRA|DoRA|PiSSA|LoftQ|SFT|[DI]PO|KTO|ORPO|SPIN|PPO|"
    r"GRPO|RLOO|GSPO|CISPO|DAPO|REINFORCE|RL|RLHF|RLVR|best\sof\s\w+|rejection\ssampling|RAG|"
    r"rehears\w+|distill\w+|prompt(?:s|ing)?|retriev\w+|few-shot|zero-shot|rules|baselines?|"
    r"NF4|FP4|int[48]|AWQ|GPTQ|GGUF|Q[48]_\w+|Adam\w*|speed_up|Unsloth|TRL|Liger|vLLM|Ollama|"
    r"llama\.cpp|Axolotl|LLaMA-Factory|bf16|fp16|fp32|micro|SmolLM2|135M|models?|reward|rank|"
    r"greedy|sampled|methods?|arms?|adapters?|templates?"
)
COMPARES = re.compile(rf"(?<![\w-])(?:{WORDS})(?![\w-])", re.IGNORECASE)
METHOD = re.compile(rf"(?<![\w-])(?:{METHODS})(?![\w-])", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d[\d,]*(?:\.\d+)?(?![\w]|\.\d)")
NEAR = 8  # words between a comparison and the number or the name that it may be about


def compares(text: str, arms: Iterable[str] = ()) -> bool:
    """Whether a word of comparison stands near a number or a method, or an arm is named with it."""
    words = list(COMPARES.finditer(text))
    if not words:
        return False
    if any(_named(arm).search(text) for arm in arms):
        return True
    named = [*NUMBER.finditer(text), *METHOD.finditer(text)]
    return any(_between(text, word.span(), one.span()) <= NEAR for word in words for one in named)


def _named(name: str) -> re.Pattern:
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])", re.IGNORECASE)


def _between(text: str, one: tuple[int, int], other: tuple[int, int]) -> int:
    """How many words stand between two places of a text."""
    first, second = sorted((one, other))
    return len(text[first[1] : second[0]].split())


DEFINES = re.compile(
    r"\b(?:is|are|it's|was) (?:called|defined|named)\b|\bwe call\b|\bstands? for\b"
    r"|\bby definition\b|\bis the (?:share|mean|number|ratio|difference|probability) of\b",
    re.IGNORECASE,
)
QUOTES = re.compile(r"\barXiv\b|\bet al\b|\barticle (?:says|claims)\b", re.IGNORECASE)
QUOTED = re.compile(r"[\"\u201c][^\"\u201c\u201d]*[\"\u201d]")  # said by somebody, whole
SETTING = re.compile(r"[\\{}\w\s]+=\s*[-\d.,^e{}\\\s]+")  # r = 8: a setting, and no formula


def why_not(sentence: Sentence) -> str:
    """Why a sentence that compares reports no measurement of ours: a reason, or "" for none."""
    text = sentence.text
    if text.endswith("?") or re.match(r"Predict\b", text):
        return "asks"
    if any(link.startswith("http") for link in sentence.links) or QUOTES.search(text):
        return "quotes"
    if QUOTED.fullmatch(text):
        return "quotes"
    if any(_formula(atom) for atom in sentence.atoms) or re.search(r"\d\s*=\s*[-\d]", text):
        return "computes"
    return "defines" if DEFINES.search(text) else ""


def _formula(atom: str) -> bool:
    """Whether code or mathematics states an equation or an inequality, not only a setting."""
    inside = atom.strip("`$")
    relation = r"[=<>]|\\(?:le|ge|approx|propto)" if atom.startswith("$") else r"\s[=<>]=?\s"
    return bool(re.search(relation, inside)) and not SETTING.fullmatch(inside)


# --- What is bound --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statements:
    """What experiments say: sentences by the place where they are quoted, and the arms' names."""

    quoted: dict[str, tuple[str, ...]]  # "notebooks/X.ipynb#cell", "README.md" -> sentences
    arms: frozenset[str] = frozenset()

    def at(self, file: str, part: str) -> tuple[str, ...]:
        return self.quoted.get(f"{file}#{part}", ()) + self.quoted.get(file, ())


def statements(root: Path = ROOT) -> Statements:
    """The sentences and the arms of every experiments/*/statements.yaml."""
    quoted, arms = {}, set()
    for path in sorted(root.glob("experiments/*/statements.yaml")):
        told = yaml.safe_load(path.read_text("utf-8"))
        arms |= {str(arm) for arm in told.get("arms", {})}
        for one in told.get("statements") or []:
            for place in one.get("in", ()):
                quoted[place] = (*quoted.get(place, ()), plain(one["says"]))
    return Statements(quoted, frozenset(arms))


def is_bound(text: str, says: Iterable[str], arms: Iterable[str] = ()) -> bool:
    """Whether a sentence stands inside one of these, or what they leave of it compares nothing."""
    rest, found = text, False
    for one in says:
        if text in one:
            return True
        if one in rest:
            rest, found = rest.replace(one, " "), True
    return found and not compares(rest, arms)


def verdict(sentence: Sentence, says: Iterable[str], arms: Iterable[str]) -> str:
    """bound, candidate, "compares nothing", or why it is no candidate."""
    if is_bound(sentence.text, says, arms):
        return BOUND
    if not compares(sentence.text, arms):
        return SILENT
    return why_not(sentence) or CANDIDATE


# --- The files ------------------------------------------------------------------------------------

# What a card or a question says that is meant to be true
PLAIN = ("text", "why", "question", "sheet", "short", "long", "evidence")
LISTED = {"follow_ups": ("ask", "answer"), "weak": ("why",), "wrong": ("why",)}
TASK = re.compile(r"\byour turn\b|\bwrite (?:it|the|a|that)\b|^#+ .*exercise", re.I)


def texts(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Each text of a file: the id of its cell, card or question, the Markdown, if it is a task."""
    if file.suffix == ".ipynb":
        yield from _cells(json.loads(file.read_text("utf-8"))["cells"])
    elif file.suffix == ".yaml":
        told = yaml.safe_load(file.read_text("utf-8")) or []
        for entry in told if isinstance(told, list) else told.get("questions", []):
            for text in _told(entry):
                yield str(entry.get("id")), text, False
    else:
        yield "", file.read_text("utf-8"), False


def _cells(cells: list[dict]) -> Iterator[tuple[str, str, bool]]:
    """Markdown cells; what stands above a check(...), from where it sets the task, is apart."""
    for i, cell in enumerate(cells):
        if cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"])
        after = "".join(cells[i + 1]["source"]) if i + 1 < len(cells) else ""
        starts = re.search(r"^check\(", after, re.MULTILINE) is not None
        before, task = _task(text) if starts else (text, "")
        yield cell["id"], before, False
        yield cell["id"], task, True


def _task(text: str) -> tuple[str, str]:
    """A cell's text before the line that sets a task, and from there on."""
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if TASK.search(line)), len(lines))
    return "".join(lines[:first]), "".join(lines[first:])


def _told(entry: dict) -> Iterator[str]:
    """The texts of a card or a question, without wrong options and what a weak answer says."""
    yield from (entry[key] for key in PLAIN if key in entry)
    for key, parts in LISTED.items():
        for one in entry.get(key, ()):
            yield from (one[part] for part in parts if part in one)
    for option in entry.get("options", ()):
        yield from (option[key] for key in ("text", "why") if key == "why" or option.get("right"))


def files(root: Path = ROOT) -> list[Path]:
    """Everything that a learner reads and that may quote a measurement."""
    found = [*root.glob("notebooks/*.ipynb"), *root.glob("data/cards/*.yaml")]
    return sorted([*found, *root.glob("data/quizzes/*.yaml"), root / "README.md"])


def judged(file: Path, root: Path, known: Statements) -> Iterator[tuple[str, Sentence, str]]:
    """Each sentence of a file: its cell, card or question, itself, its verdict."""
    name = file.relative_to(root).as_posix()
    for part, text, is_task in texts(file):
        for sentence in sentences(text):
            found = verdict(sentence, known.at(name, part), known.arms)
            apart = found == CANDIDATE and (is_task or "hint(" in sentence.text)
            yield part, sentence, "sets a task" if apart else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="notebooks, cards, quizzes, README.md")
    parser.add_argument("--all", action="store_true", help="also what was put aside, and why")
    chosen = parser.parse_args()
    counts, known = {}, statements()
    for file in chosen.files or files():
        file = file.resolve()
        if not file.is_file() or not file.is_relative_to(ROOT):
            parser.error(f"{file} is no file of {ROOT}; wanted: {', '.join(WANTED)}")
        name = file.relative_to(ROOT).as_posix()
        counts[name] = Counter()
        for part, sentence, found in judged(file, ROOT, known):
            counts[name][found] += 1
            if found == CANDIDATE or (chosen.all and found != SILENT):
                kind = f"{found}  " if chosen.all else ""
                print(f"{name}  {part}  {kind}{sentence.text}")
    print(f"\n{'bound':>6}{'candidates':>12}")
    for name, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{count[BOUND]:6}{count[CANDIDATE]:12}  {name}")


WANTED = ("notebooks/*.ipynb", "data/cards/*.yaml", "data/quizzes/*.yaml", "README.md")

if __name__ == "__main__":
    main()

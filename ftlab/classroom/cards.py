"""Interview cards: a question, what to say in 30 and in 90 seconds, what is asked next, a weak answer and why.

    cards.show("lora-what")                      one of them, open
    cards.deck()                                 all of them, to be narrowed by topic, level, kind and words
    cards.table(topic="lora", level="senior")    the same as a data frame
    cards.cheat_sheet("cheat_sheet.html")        one page to print, from the cards' `sheet` lines
    python -m ftlab.classroom.cards --anki deck.txt      for Anki, on a phone: File, Import

Read from data/cards/<topic>.yaml, whose README gives the schema. Flash cards: ftlab.classroom.flash; a mock interview:
ftlab.classroom.interview; arithmetic with fresh numbers: ftlab.classroom.whiteboard.
"""

import argparse
import csv
import functools
import html
import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import ipywidgets
import pandas as pd
from IPython.display import HTML, display

from ftlab.classroom import entries, page
from ftlab.classroom.claims import EVIDENCE
from ftlab.classroom.show import POLICY
from ftlab.paths import DATA
from ftlab.reading import short

FOLDER = DATA / "cards"
TOPICS = MappingProxyType(
    {
        "why": "When to fine-tune",
        "lora": "LoRA",
        "qlora": "QLoRA and memory",
        "rlhf": "Rewards and RL",
        "dpo": "DPO",
        "preference": "ORPO, KTO, SPIN",
        "verifiable": "Verifiable rewards",
        "pipeline": "Data and training",
        "evaluation": "Evaluation",
        "serving": "Serving",
        "systems": "Systems and scale",
        "project": "Your own work",
    }
)
LEVELS = ("junior", "mid", "senior", "staff")
KINDS = ("concept", "arithmetic", "debugging", "design", "trade-off")
PROOF = re.compile(rf"{EVIDENCE.pattern}|[CX]\d+")  # a cell, a data file, or a claim
NAMED = r"arXiv:\d{4}\.\d{5}|https://[^\s,]+[^\s,.:;]|data/[\w./]+\w"
SOURCE = re.compile(rf"({NAMED})(?:[,:;] .+)?", re.DOTALL)  # and where in it, and what it says
CODE = re.compile(r"\d\d\.\d")  # an exercise of ftlab.exercises


class CardError(ValueError):
    """A file of cards that cannot be used: says the file, the card, what was got and what was wanted."""


@dataclass(frozen=True)
class Card:
    """One card. follow_ups: (question, answer); weak: (what a weak answer says, why it is weak).

    short, long, the answers of follow_ups: what one *says*, with published or derivable numbers only, from source
    ("arXiv:2106.09685, Table 6: 73.4") or by_hand ("4 + 32 / 64 = 4.5; remark"). evidence: one sentence on what the
    course measured, shown by proof: cells, claims, data files. core: one of the 25 to know first; asked: how often,
    with its source; code: the exercise that checks what one writes; sheet: its line on the cheat sheet; article:
    where the source article asks it. What there is not is "" or ().
    """

    id: str
    topic: str
    level: str
    kind: str
    question: str
    short: str
    long: str
    follow_ups: tuple[tuple[str, str], ...]
    weak: tuple[tuple[str, str], ...]
    evidence: str
    proof: tuple[str, ...]
    source: tuple[str, ...] = ()
    by_hand: tuple[str, ...] = ()
    sheet: str = ""
    article: str = ""
    asked: str = ""
    code: str = ""
    core: bool = False

    def answer(self) -> str:
        """HTML: everything but the question."""
        sections = [
            ("30 seconds", page.prose(self.short)),
            ("90 seconds", "<br><br>".join(map(page.prose, self.long.split("\n")))),
            ("By hand", "<br>".join(map(_equation, self.by_hand))),
            ("Source", "<br>".join(map(_source, self.source))),
            ("Asked next", _pairs(self.follow_ups)),
            ("A weak answer", _pairs(self.weak)),
            ("How often", page.prose(self.asked)),
            ("Write it", f"<code>check(&quot;{self.code}&quot;, ...)</code> in its notebook" if self.code else ""),
            ("Evidence", f"{page.prose(self.evidence)} {' · '.join(map(page.link, self.proof))}"),
        ]
        # a <b> and not a heading: a page with all cards would have hundreds of them
        shown = (f'<div style="margin: 0.5em 0"><b>{name}</b><br>{body}</div>' for name, body in sections if body)
        look = f"border-left: 4px solid {POLICY}; padding-left: 0.8em; line-height: 1.5"
        return f'<div style="{look}">{"".join(shown)}</div>'

    def posed(self, where: str) -> str:
        """HTML: the question alone, under where in a session it stands; read aloud when it changes."""
        tags = f"{where} · {TOPICS[self.topic]} · {self.level} · {self.kind}"
        return f'<p><small>{tags}</small></p><p role="status"><b>{page.prose(self.question)}</b></p>'

    def folded(self) -> str:
        """HTML: the question, its answer folded away."""
        return f"<details><summary>{page.prose(self.question)} {self._tags()}</summary>{self.answer()}</details>"

    def opened(self) -> str:
        """HTML: the question and its answer."""
        return f"<p><b>{page.prose(self.question)}</b> {self._tags()}</p>{self.answer()}"

    def _tags(self) -> str:
        more = ["core"] * self.core + [f"the article, {self.article}"] * bool(self.article)
        return f"<small>{' · '.join([self.level, self.kind, *more])}</small>"


# --- Files ------------------------------------------------------------------------------------------------------------

TEXTS = ("id", "level", "kind", "question", "short", "long", "evidence")
PAIRS = {"follow_ups": ("ask", "answer"), "weak": ("says", "why")}
LISTS = (*PAIRS, "proof")
MORE_TEXTS, MORE_LISTS = ("sheet", "article", "asked", "code"), ("by_hand", "source")
OPTIONAL = (*MORE_TEXTS, *MORE_LISTS, "core")


def load(folder: Path = FOLDER) -> list[Card]:
    """All cards, in the order of TOPICS and of the files.

    Raises CardError for a card that does not follow the schema, an id that stands twice, a file that is no topic.
    """
    cards = []
    if strangers := {path.stem for path in folder.glob("*.yaml")} ^ set(TOPICS):
        raise CardError(f"{folder.name}: wanted one file a topic, {list(TOPICS)}; missing or too many: {strangers}")
    for topic in TOPICS:
        path = folder / f"{topic}.yaml"
        cards += entries.read(path, functools.partial(_card, topic), "card", CardError)
    entries.check_ids(cards, folder.name, CardError)
    return cards


def _card(topic: str, entry: object, where: str) -> Card:
    def need(holds: bool, wanted: str) -> None:
        if not holds:
            raise CardError(f"{where}: wanted {wanted}")

    need(isinstance(entry, dict), f"a mapping with {', '.join(TEXTS + LISTS)}, got {short(entry)}")
    where, must = f"{where} ({short(entry.get('id'))})", {*TEXTS, *LISTS}
    got = short(sorted(map(str, entry)))
    need(must <= set(entry) <= must | {*OPTIONAL}, f"the keys {sorted(must)}, perhaps {sorted(OPTIONAL)}; got {got}")
    for key in (*TEXTS, *MORE_TEXTS):
        need(key not in entry or _is_text(entry[key]), f"text in {key}, got {short(entry.get(key))}")
    for key in ("proof", *MORE_LISTS):
        lines = entry.get(key, ["-"])
        need(
            isinstance(lines, list) and lines and all(map(_is_text, lines)),
            f"texts as a list in {key}, got {short(lines)}",
        )
    need(entry["level"] in LEVELS, f"a level of {LEVELS}, got {entry['level']!r}")
    need(entry["kind"] in KINDS, f"a kind of {KINDS}, got {entry['kind']!r}")
    need(entry["kind"] != "arithmetic" or "by_hand" in entry, "the sum in by_hand, for a card of kind arithmetic")
    need(isinstance(entry.get("core", False), bool), f"true or false in core, got {short(entry.get('core'))}")
    need(CODE.fullmatch(entry.get("code", "04.2")), f"an exercise like '04.2' in code, got {short(entry.get('code'))}")
    need("https://" in entry.get("asked", "https://"), "the source of how often it is asked, an address, in asked")
    for key, names in PAIRS.items():
        made = entry[key] if isinstance(entry[key], list) else [None]
        pairs = all(isinstance(one, dict) and set(one) == {*names} and all(map(_is_text, one.values())) for one in made)
        need(pairs, f"{key} of {' and '.join(names)}")
    for key, pattern, like in (
        ("proof", PROOF, "cells like 02_lora_math#count, claims like C20, files of data/"),
        ("source", SOURCE, "arXiv:2106.09685, Table 6 or https://... or a file of data/"),
    ):
        strange = [line for line in entry.get(key, ()) if not pattern.fullmatch(line.strip())]
        need(not strange, f"{key} by {like}; {short(strange)}")
    lists = {key: tuple(entry.get(key, ())) for key in ("proof", *MORE_LISTS)}
    lists |= {key: tuple(tuple(one[name] for name in names) for one in entry[key]) for key, names in PAIRS.items()}
    texts = {key: entry[key].strip() for key in (*TEXTS, *MORE_TEXTS) if key in entry}
    return Card(**texts, **lists, topic=topic, core=entry.get("core", False))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


# --- A choice of cards ------------------------------------------------------------------------------------------------


def choose(
    cards: Iterable[Card],
    topic: str | None = None,
    level: str | None = None,
    kind: str | None = None,
    text: str | None = None,
) -> list[Card]:
    """The cards of this topic, level and kind that hold all these words, large or small; None asks for nothing.

    Raises ValueError for a topic, level or kind that there is not.
    """
    for name, value, known in (("topic", topic, TOPICS), ("level", level, LEVELS), ("kind", kind, KINDS)):
        if value not in (None, *known):
            raise ValueError(f"got {name}={value!r}, wanted one of {list(known)}")
    words = (text or "").lower().split()

    def fits(card: Card) -> bool:
        said = " ".join([card.id, card.question, card.short, card.long, card.article]).lower()
        same = topic in (None, card.topic) and level in (None, card.level) and kind in (None, card.kind)
        return same and all(word in said for word in words)

    return [card for card in cards if fits(card)]


def table(
    topic: str | None = None, level: str | None = None, kind: str | None = None, text: str | None = None
) -> pd.DataFrame:
    """One row a card, by id: topic, level, kind, question, short; for the rest of it see `load`."""
    names = ["id", "topic", "level", "kind", "question", "short"]
    rows = [asdict(card) for card in choose(load(), topic, level, kind, text)]
    return pd.DataFrame(rows, columns=names).set_index("id")


# --- In the notebook --------------------------------------------------------------------------------------------------


def show(*ids: str) -> None:
    """Shows these cards, open. Raises KeyError for an id that there is not."""
    known = {card.id: card for card in load()}
    for card in [known[id] for id in ids]:
        display(page.bundle(card.opened()), raw=True)


def deck() -> "Deck":
    """All cards, to be narrowed by topic, level, kind and words. Without the controls: table(...)."""
    return Deck()


class Deck:
    """Made by `deck`. Choose by hand or by `.topic.value` and so on; `shown` holds the cards that are listed."""

    def __init__(self) -> None:
        self._cards = load()
        count = {name: sum(name in (card.topic, card.level, card.kind) for card in self._cards)
                 for name in (*TOPICS, *LEVELS, *KINDS)}  # fmt: skip
        topics = [(f"{title} ({count[topic]})", topic) for topic, title in TOPICS.items()]
        levels, kinds = ([(f"{name} ({count[name]})", name) for name in names] for names in (LEVELS, KINDS))
        self.topic = page.choice("topic", "every topic", topics)
        self.level = page.choice("level", "every level", levels)
        self.kind = page.choice("kind", "every kind", kinds)
        self.text = ipywidgets.Text(placeholder="words, such as: merge 4-bit", description="search")
        self._list = ipywidgets.Output()
        controls = (self.topic, self.level, self.kind, self.text)
        row = ipywidgets.HBox(controls, layout={"flex_flow": "row wrap"})
        self._widget = ipywidgets.VBox([row, self._list])
        for control in controls:
            control.observe(self._draw, "value")
        self._draw()

    def _draw(self, _=None) -> None:
        chosen = (self.topic.value or None, self.level.value or None, self.kind.value or None, self.text.value)
        self.shown = choose(self._cards, *chosen)
        said = f'<p role="status" style="margin: 0.3em 0">{len(self.shown)} of {len(self._cards)} cards</p>'
        cards = "".join(card.folded() for card in self.shown)
        page.fill(self._list, f'{said}<div style="max-height: 36em; overflow: auto" tabindex="0">{cards}</div>')

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live deck and, where there is no kernel, all of it, folded by topic."""
        parts = []
        for topic, title in TOPICS.items():
            cards = [card.folded() for card in choose(self._cards, topic)]
            inside = f'<div style="padding-left: 1em">{"".join(cards)}</div>'
            parts.append(f"<details><summary><b>{title}</b>: {len(cards)} cards</summary>{inside}</details>")
        plain = f"{len(self._cards)} interview cards"
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": "".join(parts), "text/plain": plain}


def cheat_sheet(file: str | Path | None = None) -> HTML:
    """The cheat sheet, by topic; with a file name also as a page of its own, to be printed on one sheet of A4."""
    cards = load()
    parts = []
    for topic, title in TOPICS.items():
        lines = _list(page.prose(card.sheet) for card in choose(cards, topic) if card.sheet)
        keep = "break-after: avoid; margin: 0.5em 0 0.1em; font-size: 1.1em"
        parts.append(f'<div style="{keep}"><b>{title}</b></div>{lines}')
    columns = f'<div style="column-width: 17em; column-gap: 1.5em">{"".join(parts)}</div>'
    if file is not None:
        Path(file).write_text(PAGE.format(columns=columns), encoding="utf-8")
    return HTML(columns)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Fine-tuning LLMs: cheat sheet</title><style>
@page {{ size: A4; margin: 9mm }}
body {{ font: 9.6pt/1.28 "Liberation Sans", Arial, sans-serif; margin: 0 }}
body > div {{ columns: 3 !important }}
h1 {{ font-size: 14pt; margin: 0 0 2mm }}
li {{ break-inside: avoid }}
code {{ font: 8.8pt "Liberation Mono", monospace }}
</style></head><body><h1>Fine-tuning LLMs: what to know by heart</h1>{columns}</body></html>
"""


# --- Anki -------------------------------------------------------------------------------------------------------------

ANKI = ("#separator:tab", "#html:true", "#notetype:Basic", "#deck:Fine-tuning LLMs", "#guid column:1", "#tags column:4")


def anki(file: str | Path) -> Path:
    """All cards as a text file that Anki imports: id, question, answer, tags, one line a card.

    The format: https://docs.ankiweb.net/importing/text-files.html. The id is the note's guid, so that a later deck
    changes the notes and adds none. Links into the course become their text. Tags: topic, level, kind, core.
    """
    lines = io.StringIO()
    write = csv.writer(lines, delimiter="\t", lineterminator="\n").writerow
    for card in load():
        answer = re.sub(r'<a [^>]*href="(?!https:)[^>]*>(.*?)</a>', r"\1", card.answer())
        tags = [card.topic, card.level, card.kind, *["core"] * card.core]
        write([card.id, *(" ".join(text.split()) for text in (page.prose(card.question), answer)), " ".join(tags)])
    Path(file).write_text("\n".join(ANKI) + "\n" + lines.getvalue(), encoding="utf-8")
    return Path(file)


# --- HTML -------------------------------------------------------------------------------------------------------------


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul style="margin: 0; padding-left: 1.2em">{lines}</ul>' if lines else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return _list(f"<b>{page.prose(one)}</b> {page.prose(other)}" for one, other in pairs)


def _source(line: str) -> str:
    """A source with a link to it; one in data/ is linked as evidence is."""
    name = SOURCE.fullmatch(line.strip())[1]
    rest = page.prose(line.strip().removeprefix(name))
    if name.startswith("data/"):
        return page.link(name) + rest
    return f'<a href="{html.escape(name.replace("arXiv:", "https://arxiv.org/abs/"))}">{html.escape(name)}</a>{rest}'


def _equation(line: str) -> str:
    equation, _, remark = line.partition(";")
    return f"<code>{html.escape(equation.strip(), quote=False)}</code> {page.prose(remark)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ftlab.classroom.cards", description="The cards as a deck for Anki."
    )
    parser.add_argument("--anki", required=True, metavar="FILE", help="the text file to write")
    print(f"{anki(parser.parse_args().anki)}: in Anki choose File, Import")

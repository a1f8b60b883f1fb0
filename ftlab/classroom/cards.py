"""Interview cards: a question, what to say in 30 and in 90 seconds, what is asked next, a weak answer and why.

    cards.show("lora-what")                      one of them, its answer folded
    cards.deck()                                 all of them, to be narrowed by topic, level, kind and words
    cards.cheat_sheet("cheat_sheet.html")        one page to print, from the cards' `sheet` lines
    python -m ftlab.classroom.cards --anki deck.txt      for Anki, on a phone: File, Import

Read from data/cards/<topic>.yaml; its README has the schema, to which tests/test_cards.py holds the files.
"""

import argparse
import csv
import functools
import html
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import yaml
from IPython.display import HTML, display

from ftlab.classroom import page
from ftlab.classroom.show import POLICY
from ftlab.paths import DATA

FOLDER = DATA / "cards"
TOPICS = {
    "why": "When to fine-tune", "lora": "LoRA", "qlora": "QLoRA and memory", "rlhf": "Rewards and RL", "dpo": "DPO",
    "preference": "ORPO, KTO, SPIN", "verifiable": "Verifiable rewards", "pipeline": "Data and training",
    "evaluation": "Evaluation", "serving": "Serving", "systems": "Systems and scale", "project": "Your own work",
}  # fmt: skip
LEVELS = ("junior", "mid", "senior", "staff")
KINDS = ("concept", "arithmetic", "debugging", "design", "trade-off")
SOURCE = re.compile(r"(arXiv:\d{4}\.\d{5}|https://[^\s,]+[^\s,.:;]|data/[\w./]+\w)((?:[,:;] .+)?)", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """One card. follow_ups: (question, answer); weak: (what a weak answer says, why it is weak).

    What one *says*, in short, long and the answers of follow_ups, holds published or derivable numbers only, from
    source ("arXiv:2106.09685, Table 6: 73.4") or by_hand ("4 + 32 / 64 = 4.5; remark"). evidence: what the course
    measured, shown by proof: cells, claims, data files. core: one of the 25 to know first; code: the exercise that
    checks what one writes; sheet: its line on the cheat sheet; article: where the source article asks it.
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

    def answer(self, phone: bool = False) -> str:
        """HTML: everything but the question; phone: short, what is not said is folded or left out."""
        sections = {
            "30 seconds": page.prose(self.short),
            "90 seconds": "<br><br>".join(map(page.prose, self.long.strip().split("\n"))),
            "By hand": "<br>".join(map(_equation, self.by_hand)),
            "Source": "<br>".join(map(_source, self.source)),
            "Asked next": _pairs(self.follow_ups),
            "A weak answer": _pairs(self.weak),
            "How often": page.prose(self.asked),
            "Write it": f"exercise {self.code} in notebook {self.code[:2]}" if self.code else "",
            "Evidence": f"{page.prose(self.evidence)} {' · '.join(map(page.link, self.proof))}",
        }
        # a <b> and not a heading: a page with all cards would have hundreds of them
        shown = {name: f'<div style="margin: 0.5em 0"><b>{name}</b><br>{body}</div>'
                 for name, body in sections.items() if body}  # fmt: skip
        if phone:
            more = "".join(shown.pop(name, "") for name in ("By hand", "Source", "How often"))
            shown |= {"Write it": "", "Evidence": page.fold("More", more)}
        look = f"border-left: 4px solid {POLICY}; padding-left: 0.8em; line-height: 1.5; text-align: left"
        return f'<div style="{look}">{"".join(shown.values())}</div>'

    def posed(self, where: str) -> str:
        """HTML: the question alone, under where in a session it stands; read aloud when it changes."""
        tags = f"{where} · {TOPICS[self.topic]} · {self.level} · {self.kind}"
        return f'<p><small>{tags}</small></p><p role="status"><b>{page.prose(self.question)}</b></p>'

    def folded(self) -> str:
        """HTML: the question, its answer folded away."""
        tags = " · ".join([self.level, self.kind, *["core"] * self.core])
        return page.fold(f"{page.prose(self.question)} <small>{tags}</small>", self.answer())


@functools.cache
def load(folder: Path = FOLDER) -> tuple[Card, ...]:
    """All cards, in the order of TOPICS and of the files."""
    files = ((topic, (folder / f"{topic}.yaml").read_text(encoding="utf-8")) for topic in TOPICS)
    return tuple(_card(topic, **entry) for topic, text in files for entry in yaml.safe_load(text))


def _card(topic: str, follow_ups: list[dict], weak: list[dict], **entry) -> Card:
    pairs = {"follow_ups": follow_ups, "weak": weak}
    entry |= {key: tuple(tuple(pair.values()) for pair in of) for key, of in pairs.items()}
    return Card(topic=topic, **{key: tuple(of) if isinstance(of, list) else of for key, of in entry.items()})


def choose(cards: Iterable[Card], topic: str = "", level: str = "", kind: str = "", text: str = "") -> list[Card]:
    """The cards of this topic, level and kind that hold all these words, large or small; "" asks for nothing.

    Raises ValueError for a topic, level or kind that there is not.
    """
    for name, value, known in (("topic", topic, TOPICS), ("level", level, LEVELS), ("kind", kind, KINDS)):
        if value and value not in known:
            raise ValueError(f"got {name}={value!r}, wanted one of {list(known)}")

    def fits(card: Card) -> bool:
        said = " ".join([card.id, card.question, card.short, card.long]).lower()
        same = topic in ("", card.topic) and level in ("", card.level) and kind in ("", card.kind)
        return same and all(word in said for word in text.lower().split())

    return [card for card in cards if fits(card)]


def mixed(cards: Iterable[Card]) -> list[Card]:
    """The core cards first; each topic spread evenly, neighbours of different topics as long as there are any."""
    groups: dict[tuple[bool, str], list[Card]] = {}
    for card in cards:
        groups.setdefault((not card.core, card.topic), []).append(card)
    places = [(rest, (i + 0.5) / len(mine), card) for (rest, _), mine in groups.items() for i, card in enumerate(mine)]
    left, order = [card for *_, card in sorted(places, key=lambda place: place[:2])], []
    while left:
        topic = order[-1].topic if order else ""
        order.append(next((card for card in left if card.topic != topic), left[0]))
        left.remove(order[-1])
    return order


# --- In the notebook --------------------------------------------------------------------------------------------------


def show(*ids: str) -> None:
    """Shows these cards, the answers folded. Raises KeyError for an id that there is not."""
    known = {card.id: card for card in load()}
    shown = "".join(known[id].folded() for id in ids)
    display(page.bundle(shown), raw=True)


def deck() -> None:
    """Shows all cards, to be narrowed by topic, level, kind and words; folded by topic where there is no kernel."""
    every = load()

    def listed(topic: str, level: str, kind: str, text: str) -> str:
        shown = choose(every, topic, level, kind, text)
        said = f'<p role="status" style="margin: 0.3em 0">{len(shown)} of {len(every)} cards</p>'
        return said + page.scrolled("".join(card.folded() for card in shown))

    controls = {
        "topic": page.choice("topic", "every topic", [(title, topic) for topic, title in TOPICS.items()]),
        "level": page.choice("level", "every level", [(name, name) for name in LEVELS]),
        "kind": page.choice("kind", "every kind", [(name, name) for name in KINDS]),
        "text": ipywidgets.Text(placeholder="words, such as: merge 4-bit", description="search"),
    }
    by_topic = {title: choose(every, topic) for topic, title in TOPICS.items()}
    still = (page.fold(f"<b>{title}</b>: {len(mine)} cards", "".join(card.folded() for card in mine))
             for title, mine in by_topic.items())  # fmt: skip
    live = page.narrowed(listed, **controls)
    display(page.view(live, "".join(still), f"{len(every)} interview cards"), raw=True)


def cheat_sheet(file: str | Path | None = None) -> HTML:
    """The cheat sheet, by topic; with a file name also as a page of its own, to be printed on one sheet of A4."""
    keep = "break-after: avoid; margin: 0.5em 0 0.1em; font-size: 1.1em"
    parts = [f'<div style="{keep}"><b>{title}</b></div>' + _list(page.prose(card.sheet) for card in mine if card.sheet)
             for topic, title in TOPICS.items() if (mine := choose(load(), topic))]  # fmt: skip
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
    """All cards as a text file that Anki imports: id, question, answer, tags, one line a card, the core first.

    The format: https://docs.ankiweb.net/importing/text-files.html. The id is the note's guid, so that a later deck
    changes the notes and adds none. Links into the course become their text. Tags: topic, level, kind, core.
    """
    lines = io.StringIO()
    write = csv.writer(lines, delimiter="\t", lineterminator="\n").writerow
    for card in mixed(load()):
        answer = re.sub(r'<a [^>]*href="(?!https:)[^>]*>(.*?)</a>', r"\1", card.answer(phone=True))
        tags = [card.topic, card.level, card.kind, *["core"] * card.core]
        write([card.id, *(" ".join(text.split()) for text in (page.prose(card.question), answer)), " ".join(tags)])
    Path(file).write_text("\n".join(ANKI) + "\n" + lines.getvalue(), encoding="utf-8")
    return Path(file)


# --- HTML -------------------------------------------------------------------------------------------------------------


def _list(items: Iterable[str]) -> str:
    return f'<ul style="margin: 0; padding-left: 1.2em">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return _list(f"<b>{page.prose(one)}</b> {page.prose(other)}" for one, other in pairs)


def _source(line: str) -> str:
    """A source with a link to it; one in data/ is linked as evidence is."""
    name, rest = SOURCE.fullmatch(line.strip()).groups()
    address = html.escape(name.replace("arXiv:", "https://arxiv.org/abs/"))
    linked = page.link(name) if name.startswith("data/") else f'<a href="{address}">{html.escape(name)}</a>'
    return linked + page.prose(rest)


def _equation(line: str) -> str:
    equation, _, remark = line.partition(";")
    return f"<code>{html.escape(equation.strip(), quote=False)}</code> {page.prose(remark)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ftlab.classroom.cards", description="The cards, for Anki.")
    parser.add_argument("--anki", required=True, metavar="FILE", help="the text file to write")
    print(f"{anki(parser.parse_args().anki)}: in Anki choose File, Import")

"""Interview cards: a question, what to say in 30 and in 90 seconds, what is asked next, a weak answer and why.

    python -m ftlab.classroom.cards --anki deck.txt --sheet cheat_sheet.html

writes them for a phone and for paper. `--anki`: all cards for Anki (File, Import), a line a card, the core first. The
card's id is the note's guid, so a later deck changes the notes and adds none; links into the course become their text.
Format: https://docs.ankiweb.net/importing/text-files.html. `--sheet`: what to know by heart as one page of A4.

Read from data/cards/<topic>.yaml; its README has the schema, to which tests/test_cards.py holds the files.
"""

import argparse
import csv
import functools
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from IPython.display import HTML, display

from ftlab.classroom import page
from ftlab.classroom.show import POLICY
from ftlab.paths import DATA

TOPICS = {
    "why": "When to fine-tune", "lora": "LoRA", "qlora": "QLoRA and memory", "rlhf": "Rewards and RL", "dpo": "DPO",
    "preference": "ORPO, KTO, SPIN", "verifiable": "Verifiable rewards", "pipeline": "Data and training",
    "evaluation": "Evaluation", "serving": "Serving", "systems": "Systems and scale", "project": "Your own work",
}  # fmt: skip
LEVELS = ("junior", "mid", "senior", "staff")
ANKI_HEADERS = (
    "#separator:tab", "#html:true", "#notetype:Basic", "#deck:Fine-tuning LLMs", "#guid column:1", "#tags column:4",
)  # fmt: skip
SHEET = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Fine-tuning LLMs: cheat sheet</title><style>
@page {{ size: A4; margin: 9mm }}
body {{ font: 9.6pt/1.28 "Liberation Sans", Arial, sans-serif; margin: 0 }}
body > div {{ columns: 3 !important }}
h1 {{ font-size: 14pt; margin: 0 0 2mm }}
li {{ break-inside: avoid }}
code {{ font: 8.8pt "Liberation Mono", monospace }}
</style></head><body><h1>Fine-tuning LLMs: what to know by heart</h1>{columns}</body></html>
"""


class Card(SimpleNamespace):
    """An entry of data/cards, whose README says what each key holds, and its topic; with what may be left out."""

    source = by_hand = ()
    sheet = article = asked = code = ""
    core = False

    def answer(self) -> str:
        """HTML: everything but the question."""
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
        shown = ""
        for name, body in sections.items():  # under a <b> and not a heading: a page with all cards has hundreds of them
            shown += f'<div style="margin: 0.5em 0"><b>{name}</b><br>{body}</div>' if body else ""
        look = f"border-left: 4px solid {POLICY}; padding-left: 0.8em; line-height: 1.5; text-align: left"
        return f'<div style="{look}">{shown}</div>'

    def posed(self, where: str) -> str:
        """HTML: the question alone, under where in a session it stands; read aloud when it changes."""
        tags = f"{where} · {TOPICS[self.topic]} · {self.level} · {self.kind}"
        return f'<p><small>{tags}</small></p><p role="status"><b>{page.prose(self.question)}</b></p>'

    def folded(self) -> str:
        """HTML: the question, its answer folded away."""
        tags = " · ".join([self.level, self.kind, "core"] if self.core else [self.level, self.kind])
        return page.fold(f"{page.prose(self.question)} <small>{tags}</small>", self.answer())


@functools.cache
def load() -> tuple[Card, ...]:
    """All cards, in the order of TOPICS and of the files."""
    files = {topic: page.read(DATA / "cards" / f"{topic}.yaml") for topic in TOPICS}
    return tuple(Card(topic=topic, **entry) for topic, entries in files.items() for entry in entries)


def mixed(cards: Iterable[Card]) -> list[Card]:
    """The core cards first; each topic spread evenly, neighbours of different topics as long as there are any."""
    groups: dict[tuple[bool, str], list[Card]] = {}
    for card in cards:
        groups.setdefault((not card.core, card.topic), []).append(card)
    places = [(rest, (i + 0.5) / len(mine), card) for (rest, _), mine in groups.items() for i, card in enumerate(mine)]
    left, order = [card for *_, card in sorted(places, key=lambda place: place[:2])], []
    while left:
        others = (card for card in left if not order or card.topic != order[-1].topic)
        order.append(next(others, left[0]))
        left.remove(order[-1])
    return order


def show(*ids: str) -> None:
    """Shows these cards, the answers folded."""
    known = {card.id: card for card in load()}
    display(HTML("".join(known[id].folded() for id in ids)))


def deck() -> page.Live:
    """All cards by topic, to be narrowed by words, also those of their topic, level and kind."""
    said = "{0.id} {0.topic} {0.level} {0.kind} {0.question} {0.short} {0.long}".format
    return page.browse(load(), "cards", lambda card: TOPICS[card.topic], said, Card.folded)


def cheat_sheet() -> HTML:
    """What to know by heart: the cards' `sheet` lines by topic, in columns."""
    keep, lines = "break-after: avoid; margin: 0.5em 0 0.1em; font-size: 1.1em", dict.fromkeys(TOPICS, "")
    for card in load():
        lines[card.topic] += f"<li>{page.prose(card.sheet)}</li>" if card.sheet else ""
    parts = (f'<div style="{keep}"><b>{TOPICS[topic]}</b></div>{_list(mine)}' for topic, mine in lines.items())
    return HTML(f'<div style="column-width: 17em; column-gap: 1.5em">{"".join(parts)}</div>')


def _list(items: str) -> str:
    return f'<ul style="margin: 0; padding-left: 1.2em">{items}</ul>'


def _pairs(pairs: Iterable[dict[str, str]]) -> str:
    return _list("".join("<li><b>{}</b> {}</li>".format(*map(page.prose, pair.values())) for pair in pairs))


def _source(line: str) -> str:
    """A source as a link; one of the course is linked as evidence is."""
    name, rest = re.fullmatch(r"(\S+[^\s,.:;])(.*)", line.strip(), re.DOTALL).groups()
    address = html.escape(name.replace("arXiv:", "https://arxiv.org/abs/"))
    linked = page.link(name) if name.startswith(page.FOLDERS) else f'<a href="{address}">{html.escape(name)}</a>'
    return linked + page.prose(rest)


def _equation(line: str) -> str:
    equation, _, remark = line.partition(";")
    return f"<code>{html.escape(equation.strip(), quote=False)}</code> {page.prose(remark)}"


def anki() -> str:
    """All cards as a text file that Anki imports: id, question, answer, tags."""
    lines = io.StringIO()
    write = csv.writer(lines, delimiter="\t", lineterminator="\n").writerow
    for card in mixed(load()):
        question = page.prose(card.question)
        answer = re.sub(r'<a [^>]*href="(?!https:)[^>]*>(.*?)</a>', r"\1", card.answer())
        tags = [card.topic, card.level, card.kind, *["core"] * card.core]
        write([card.id, " ".join(question.split()), " ".join(answer.split()), " ".join(tags)])
    return "\n".join(ANKI_HEADERS) + "\n" + lines.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes what the command line asks for. Exits with code 2 if it asks for nothing, or for a file in no folder."""
    parser = argparse.ArgumentParser(
        prog="python -m ftlab.classroom.cards", description="The interview cards for a phone and for paper."
    )
    parser.add_argument("--anki", type=Path, metavar="FILE", help="write the deck for Anki")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write the cheat sheet, one page of A4")
    options = parser.parse_args(arguments)
    if not options.anki and not options.sheet:
        parser.error("nothing to write: wanted --anki FILE or --sheet FILE, or both")
    try:
        if options.anki:
            options.anki.write_text(anki(), encoding="utf-8")
            print(f"{len(load())} cards in {options.anki}: in Anki choose File, Import")
        if options.sheet:
            options.sheet.write_text(SHEET.format(columns=cheat_sheet().data), encoding="utf-8")
            print(f"{options.sheet}: open it in a browser and print it")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}: is its folder there, and may you write into it?")


if __name__ == "__main__":
    main()

"""The interview cards for a phone and for paper.

    python tools/deck.py --anki deck.txt --sheet cheat_sheet.html

`--anki` writes all cards for Anki (File, Import): id, question, answer, tags, one line a card, the core first. The id
is the note's guid, so a later deck changes the notes and adds none; links into the course become their text. Format:
https://docs.ankiweb.net/importing/text-files.html. `--sheet` writes what to know by heart as one page of A4.
"""

import argparse
import csv
import io
import re
from pathlib import Path

from ftlab.classroom import cards, page

HEADERS = (
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


def anki() -> str:
    """All cards as a text file that Anki imports."""
    lines = io.StringIO()
    write = csv.writer(lines, delimiter="\t", lineterminator="\n").writerow
    for card in cards.mixed(cards.load()):
        answer = re.sub(r'<a [^>]*href="(?!https:)[^>]*>(.*?)</a>', r"\1", card.answer())
        tags = [card.topic, card.level, card.kind, *["core"] * card.core]
        write([card.id, *(" ".join(text.split()) for text in (page.prose(card.question), answer)), " ".join(tags)])
    return "\n".join(HEADERS) + "\n" + lines.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The interview cards for a phone and for paper.")
    parser.add_argument("--anki", type=Path, metavar="FILE", help="the deck for Anki")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="the cheat sheet, one page of A4")
    options = parser.parse_args()
    if options.anki:
        options.anki.write_text(anki(), encoding="utf-8")
        print(f"{len(cards.load())} cards in {options.anki}: in Anki choose File, Import")
    if options.sheet:
        options.sheet.write_text(SHEET.format(columns=cards.cheat_sheet().data), encoding="utf-8")
        print(f"{options.sheet}: open it in a browser and print it")

"""How long an answer takes when it is spoken, formulas read out as words; and the table of the deck.

python tests/spoken.py        cards by topic, level and core; seconds; sources; course runs in what is said
"""

import re
import statistics

from ftlab.classroom.cards import LEVELS, TOPICS, load

PACE = 140  # words a minute
SYMBOLS = {"%": 1, "=": 1, "+": 1, "/": 1, "<": 2, ">": 2, "^": 2, "*": 1, "·": 1}
COURSE = re.compile(r"\b(here|ours?|we|us|notebooks?|this course|the course|SmolLM2)\b|\d\d_\w+")
NUMBER, WORD = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", r"[A-Za-zÀ-ÿ]+(?:['’][a-z]+)?"
MINUS = r"(?<![\w-])-(?=[\w(])|(?<=\s)-(?=\s)"  # and not the hyphen of a word
TOKEN = re.compile(rf"{NUMBER}|{WORD}|[%=+/<>^*·]|{MINUS}")


def words(text: str) -> int:
    """How many words a text has when it is read aloud: 0.67 has four (zero point six seven), h = W0 x has five."""
    return sum(_one(token) for token in TOKEN.findall(text.replace("_", " ")))


def _one(token: str) -> int:
    if token in SYMBOLS:
        return SYMBOLS[token]
    if not token[0].isdigit():
        return 1  # a word, a name, a minus sign
    number, _, power = token.partition("e")
    whole, _, digits = number.strip(",").partition(".")
    return _whole(whole) + (1 + len(digits) if digits else 0) + (2 + ("-" in power) if power else 0)


def _whole(number: str) -> int:
    if re.fullmatch(r"(19|20)\d\d", number):
        return 2 + (number[2:] > "20" and number[3] != "0")  # a year: twenty twenty-six
    n, count = int(number.replace(",", "")), 0
    if n == 0:
        return 1
    while n:  # three digits at a time: hundreds, tens, ones, then thousand, million, ...
        n, group = divmod(n, 1000)
        hundreds, rest = divmod(group, 100)
        count += 2 * bool(hundreds) + (rest > 0) + (rest > 20 and rest % 10 > 0) + (n > 0 and n % 1000 > 0)
    return count


def seconds(text: str) -> float:
    return words(text) * 60 / PACE


def whole_answer(card) -> str:
    """What a candidate says of a card: both answers, and those to what is asked next."""
    return "\n".join([card.short, card.long, *(pair["answer"] for pair in card.follow_ups)])


def table(deck) -> str:
    """The deck in numbers, as lines of a Markdown table."""
    lines = [f"| topic | cards | {' | '.join(LEVELS)} | core | code |", "|---" * (len(LEVELS) + 4) + "|"]
    for topic in [*TOPICS, "all"]:
        mine = [card for card in deck if topic in ("all", card.topic)]
        levels = " | ".join(str(sum(card.level == level for card in mine)) for level in LEVELS)
        core, code = (sum(bool(getattr(card, key)) for card in mine) for key in ("core", "code"))
        name = f"`{topic}.yaml`" if topic in TOPICS else topic
        lines.append(f"| {name} | {len(mine)} | {levels} | {core} | {code} |")
    lines += ["", "| spoken seconds | min | median | max |", "|---|---|---|---|"]
    for name, text in (("short", lambda card: card.short), ("long", lambda card: card.long)):
        took = sorted(seconds(text(card)) for card in deck)
        lines.append(f"| {name} | {took[0]:.0f} | {statistics.median(took):.0f} | {took[-1]:.0f} |")
    course = sum(bool(COURSE.search(whole_answer(card))) for card in deck)
    sourced, asked = (sum(bool(getattr(card, key)) for card in deck) for key in ("source", "asked"))
    lines += ["", f"with a published source: {sourced} of {len(deck)}; said how often asked: {asked} of {len(deck)}; "
              f"naming a course run in what is said: {course} of {len(deck)}"]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(load()))

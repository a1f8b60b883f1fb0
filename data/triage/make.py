"""Fill the ticket skeletons: skeletons/*.jsonl -> train.jsonl, validation.jsonl, test.jsonl, more.jsonl.

A skeleton is one ticket as a person would write it, with slots ({order}, {refund}, {dish}, ...), alternatives ({a|b})
and optional parts ([...], [high|...], [hinglish|...]). Filling it several times gives tickets that differ in wording,
facts and label: the label is read off what survives, so a dropped "[ Order {order}.]" makes order_id null. Noise
(typos, capitals, SMS spelling) comes afterwards and never touches an order number or an amount.
Same skeletons, same bytes: every skeleton has its own random generator, so editing one leaves the others as they were.
"""

import json
import random
import re
import sys
from functools import cache
from pathlib import Path

from ftlab.tasks.triage import CLASSES

sys.path.insert(0, str(Path(__file__).parents[1]))
import order

HERE = Path(__file__).parent
FILLERS = json.loads((HERE / "fillers.json").read_text(encoding="utf-8"))
MAX_ROWS = {"train": 1760, "validation": 150, "test": 150, "more": 1000}
FILLS = 4  # fillings per skeleton, fewer where it does not allow four different ones
KEEP = {"order": 0.97, "refund": 0.75, "high": 0.35, "hinglish": 0.3, "plain": 0.5}  # optional parts, by content
UNTOUCHED = 0.55  # share of tickets without noise; the others get two kinds, drawn with these weights:
NOISE = {
    "typos": 10,
    "sms": 9,
    "lowercase": 6,
    "no full stop": 3,
    "greeting": 3,
    "double punctuation": 2,
    "sign-off": 2,
    "emoji": 2,
    "capitals": 3,
}

ALLOWED = {"split": tuple(MAX_ROWS), **CLASSES}
OPTION = re.compile(r"\[((?:(?:high|hinglish)\|)*)([^\[\]]*)\]")
ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")
SLOT = re.compile(r"\{(\w+)\}")
MARKED = re.compile("\x02([^\x03]*)\x03")  # order numbers and amounts stand between \x02 and \x03 until the end
OPENED = re.compile(r"(?i)(hi+|hello|hey|dear|good|namaste|namaskar|sir|madam|respected|to)\b")
SIGNED = re.compile(r"(?i:regards|thank|sincerely|yours|dhanyavaad|shukriya)|[-–—] ?\w+$|\b[A-Z][a-z]+\W*$")


# Slots


def write_order(digits: str, before: str, after: str, rng: random.Random) -> str:
    """An order number in one of the customers' notations, such that it reads well between `before` and `after`."""
    forms = FILLERS["order_forms"]
    if re.search(r"(RR-?|#)\s*$", before):
        return digits
    named = re.search(r"(?i)(\b(order|ordr|odr|oder|no|number|num|id)|:)\W*$", before)
    if named or re.match(r"(?i)\s*(wal[aei]\s+)?(order|ordr)", after):
        return rng.choice(forms["short"]).format(digits)
    alone = re.search(r"(^|[.!?(\n])\s*$", before) and re.match(r"\s*([.),\n]|$)", after)
    return rng.choice(forms["short"] + forms["long"] + (forms["alone"] if alone else [])).format(digits)


def in_words(n: int) -> str:
    """An amount below 10,000 in English words; 1200 is "twelve hundred"."""
    if n < 20:
        return FILLERS["ones"][n - 1]
    unit = 10 if n < 100 else 100 if n < 1000 or (n < 2000 and n % 100 == 0 and n > 1000) else 1000
    head, rest = FILLERS["tens"][n // 10 - 1] if unit == 10 else in_words(n // unit), n % unit
    head += {10: "", 100: " hundred", 1000: " thousand"}[unit]
    return head + (" and " if unit > 10 and rest < 100 else " ") + in_words(rest) if rest else head


def write_amount(rupees: int, before: str, after: str, language: str, rng: random.Random) -> str:
    """An amount in one of the customers' notations; without a unit if the text beside it has one."""
    number = f"{rupees:,}" if rng.random() < 0.5 else str(rupees)
    if re.search(r"(?i)(\brs\.?|₹|\binr|\brupees)\s*$", before) or re.match(r"(?i)\s*(/-|rs\b|₹|rup|inr|buck)", after):
        return number
    if language == "hinglish" and str(rupees) in FILLERS["hindi_amounts"] and rng.random() < 0.5:
        return FILLERS["hindi_amounts"][str(rupees)] + " rupaye"
    if language == "en" and rng.random() < 0.07:
        return in_words(rupees) + " rupees"
    form = rng.choice(FILLERS["amount_forms"])
    paise = rng.choice([".50", ".00", ".75"]) if rng.random() < 0.05 and not form.endswith("/-") else ""
    return form.format(number + paise)


def draw_amount(rng: random.Random, low: int, high: int) -> int:
    """Rupees, distributed like menu prices: mostly below 400, often round, often ending in 9."""
    rupees = rng.randint(low, max(low, min(high, rng.choice([99, 299, 299, 399, 799, high]))))
    tens = rupees // 10 * 10
    nice = rng.choice([rupees, tens, tens, tens + 9, rupees // 50 * 50])
    return nice if low <= nice <= high else rupees


@cache
def said_of(text: str) -> tuple[bool, bool, bool]:
    """Of a skeleton: whether it is about food without meat, about a small fee, and whether it has capitals."""
    meatless = re.search(r"(?i)veg|meat|jain|vrat|fast", text)
    fee = re.search(r"(?i)\b(fee|charges?|tip|parking|packing|packaging|extra|zyada)\b", text)
    return bool(meatless), bool(fee), any(c.isupper() for c in SLOT.sub("", text))


def draw_values(text: str, language: str, rng: random.Random) -> dict:
    """A value for every slot, consistent within one ticket."""
    lists, (meatless, fee, _) = FILLERS["slots"], said_of(text)
    meat = [] if meatless else lists["meat_dish"]
    dish, dish2 = rng.sample(lists["dish"] + lists["veg_dish"] + meat, 2)
    order, other_order, pin = (str(n) for n in rng.sample(range(100_000, 1_000_000), 3))
    refund = draw_amount(rng, 20, 150) if fee else draw_amount(rng, 35, 2400)
    if language == "hinglish" and rng.random() < 0.12:
        refund = int(rng.choice(list(FILLERS["hindi_amounts"])))
    low, high = (refund + 20, 2500) if "{refund}" in text else (30, 200) if fee else (90, 2500)
    phone = f"5{rng.randrange(10**9):09}"  # no Indian mobile number begins with 5: nobody's number
    hour, minute = rng.randint(1, 11), f"{rng.randrange(0, 60, 5):02}"
    return {slot: rng.choice(options) for slot, options in lists.items()} | {
        "dish": dish,
        "dish2": dish2,
        "order": order,
        "digits": order,
        "other_order": other_order,
        "pin": pin,
        "refund": refund,
        "price": draw_amount(rng, low, high),
        "otp": str(rng.randint(1000, 9999)),
        "minutes": str(rng.randrange(25, 95, 5)),
        "phone": rng.choice([phone, phone, f"{phone[:5]} {phone[5:]}", f"+91 {phone}"]),
        "clock": rng.choice([f"{hour}:{minute} pm", f"{hour}.{minute} pm", f"{hour + 12}:{minute}", f"{hour} pm"]),
        "date": f"{rng.randint(1, 28)} {rng.choice(FILLERS['months'])}",
    }


def fill(skeleton: dict, rng: random.Random) -> tuple[str, dict, tuple]:
    """One filling: the ticket (order numbers and amounts marked), its label, and which optional parts were kept."""
    label = {
        "intent": skeleton["intent"],
        "order_id": None,
        "urgency": skeleton["urgency"],
        "refund_amount": None,
        "language": skeleton["language"],
    }
    kept = []

    def option(match: re.Match) -> str:
        tags, part = match.groups()
        slots = [slot for slot in SLOT.findall(part.replace("{digits}", "{order}")) if slot in KEEP]
        kept.append(rng.random() < min(KEEP[kind] for kind in tags.split("|")[:-1] or slots or ["plain"]))
        if kept[-1] and "high" in tags:
            label["urgency"] = "high"
        if kept[-1] and "hinglish" in tags:
            label["language"] = "hinglish"
        return part if kept[-1] else ""

    text = OPTION.sub(option, skeleton["text"])
    text = ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), text)
    text = re.sub(" {2,}", " ", text).strip()
    values = draw_values(skeleton["text"], label["language"], rng)
    *_, capitals = said_of(skeleton["text"])  # does this customer use them at all?
    ticket, end = "", 0
    for match in SLOT.finditer(text):
        ticket, end, slot, after = ticket + text[end : match.start()], match.end(), match[1], text[match.end() :]
        written, before = values[slot], MARKED.sub(r"\1", ticket)
        if slot in ("order", "other_order"):
            written = write_order(written, before, after, rng)
        elif slot in ("refund", "price"):
            written = write_amount(written, before, after, label["language"], rng)
        if capitals and re.search(r"(^|[.!?\n])\s*$", before):
            written = written[0].upper() + written[1:]
        marked = slot in ("order", "digits", "other_order", "refund", "price")
        ticket += f"\x02{written}\x03" if marked else written
        if slot in ("order", "digits"):
            label["order_id"] = values["order"]
        elif slot == "refund":
            label["refund_amount"] = values["refund"]
    return ticket + text[end:], label, tuple(kept)


# Noise: marked ticket in, marked ticket out


def replace(ticket: str, pattern: str, change, at_most: int, rng: random.Random) -> str:
    """`change` applied to at most so many matches of `pattern`, drawn at random, none in a marked part."""
    hidden = MARKED.sub(lambda match: "0" * len(match[0]), ticket)
    matches = list(re.finditer(pattern, hidden))
    for match in sorted(rng.sample(matches, min(at_most, len(matches))), key=re.Match.start, reverse=True):
        ticket = ticket[: match.start()] + change(match[0]) + ticket[match.end() :]
    return ticket


def misspell(word: str, rng: random.Random) -> str:
    """Two letters swapped, one dropped or one doubled; the first and the last letter stay."""
    i = rng.randint(1, len(word) - 3)
    return word[:i] + rng.choice([word[i + 1] + word[i] + word[i + 2 :], word[i + 1 :], word[i] + word[i:]])


def shorten(word: str, language: str, rng: random.Random) -> str:
    short = rng.choice(FILLERS["sms"][language][word.lower()])
    return short.capitalize() if word[0].isupper() else short


def add_noise(ticket: str, label: dict, rng: random.Random) -> str:
    """The marked ticket as a hurried customer types it."""
    if rng.random() < UNTOUCHED:
        return ticket
    language, kinds = label["language"], rng.sample(list(NOISE), counts=NOISE.values(), k=2)
    if "sms" in kinds:
        pattern = r"(?i)\b(" + "|".join(FILLERS["sms"][language]) + r")\b"
        ticket = replace(ticket, pattern, lambda word: shorten(word, language, rng), 6, rng)
    if "typos" in kinds:
        spared = "there|three|seven|eight|forty|fifty|sixty|twelve|hundred|thousand|pachaas|paanch"
        pattern = rf"(?i)\b(?!(?:{spared})\b)[a-z]{{5,}}\b"
        ticket = replace(ticket, pattern, lambda word: misspell(word, rng), rng.randint(1, 3), rng)
    if "no full stop" in kinds:
        ticket = ticket.rstrip(".!?")
    if "double punctuation" in kinds:
        ticket = replace(ticket, r"[.!?](?=\s|$)", lambda mark: mark * rng.choice([2, 3]), 3, rng)
    if "greeting" in kinds and not OPENED.match(ticket):
        ticket = rng.choice(FILLERS["greetings"][language]) + rng.choice(" \n") + ticket
    if "sign-off" in kinds and not SIGNED.search(ticket[-40:]):
        ticket += "\n" + rng.choice(FILLERS["signoffs"][language]).format(name=rng.choice(FILLERS["slots"]["name"]))
    if "emoji" in kinds:
        ticket += " " + rng.choice(FILLERS["emojis"][label["urgency"]]) * rng.choice([1, 1, 2])
    if "capitals" in kinds:
        return ticket.upper()
    return ticket.lower() if "lowercase" in kinds else ticket


# Rows and files


def check(skeleton: dict, more_slots: frozenset[str] = frozenset()) -> None:
    """Raises ValueError, naming the skeleton and the cause, if it cannot be filled as written."""
    problems = [
        f"{key} is {skeleton.get(key)!r}, not one of {', '.join(values)}"
        for key, values in ALLOWED.items()
        if skeleton.get(key) not in values
    ]
    if re.search(r"[\[\]{}|]", SLOT.sub("", ALTERNATIVES.sub("", OPTION.sub(r"\2", skeleton["text"])))):
        problems.append("unbalanced or nested brackets")
    known = draw_values("", "en", random.Random(0)).keys() | more_slots
    problems += [f"unknown slot {{{slot}}}" for slot in SLOT.findall(skeleton["text"]) if slot not in known]
    if problems:
        raise ValueError(f"{skeleton['id']}: {'; '.join(problems)}: {skeleton['text']!r}")


def read_skeletons(folder: Path = HERE / "skeletons", more_slots: frozenset[str] = frozenset()) -> list[dict]:
    """The rows of the folder's files, each checked; more_slots are filled by somebody else (data/replies)."""
    skeletons = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    for skeleton in skeletons:
        check(skeleton, more_slots)
    return skeletons


def fillings(skeleton: dict) -> list[dict]:
    """Up to FILLS rows of one skeleton: each combination of its optional parts once, then other wordings of them."""
    rng = random.Random(f"triage {skeleton['id']}")
    rows, combinations, wordings = [], set(), set()
    for attempt in range(100):
        ticket, label, kept = fill(skeleton, rng)
        wording = re.sub(r"\d", "0", ticket)
        if len(rows) == FILLS or wording in wordings or (kept in combinations and attempt < 50):
            continue
        combinations.add(kept)
        wordings.add(wording)
        noisy = add_noise(ticket, label, rng)
        if MARKED.findall(noisy.lower()) != MARKED.findall(ticket.lower()):
            raise ValueError(f"{skeleton['id']}: noise changed an order number or an amount of {ticket!r}: {noisy!r}")
        rows.append({"ticket": MARKED.sub(r"\1", noisy), "label": label, "skeleton": skeleton["id"]})
    rng.shuffle(rows)
    return rows


def interleave(skeletons: list[dict], rng: random.Random) -> list[str]:
    """The ids of the skeletons in a random order in which every prefix has the intents in proportion."""
    place = {}
    for intent in ALLOWED["intent"]:
        group = [s["id"] for s in skeletons if s["intent"] == intent]
        rng.shuffle(group)
        place |= {name: (i + rng.random()) / len(group) for i, name in enumerate(group)}
    return sorted(place, key=place.get)


def build() -> dict[str, bytes]:
    """File name -> content. Row k of every skeleton comes before row k + 1 of any: a prefix is a smaller data set."""
    files, skeletons = {}, read_skeletons()
    for split, max_rows in MAX_ROWS.items():
        rng = random.Random(f"triage {split}")
        mine = [s for s in skeletons if s["split"] == split]
        filled = {s["id"]: fillings(s) for s in mine}
        rows = [row for k in range(FILLS) for name in interleave(mine, rng) for row in filled[name][k : k + 1]]
        rows = list({row["ticket"]: row for row in rows}.values())[:max_rows]
        rows = [{"id": f"{split}-{i:04}"} | row for i, row in enumerate(rows, 1)]
        if split in ("validation", "test"):
            rows = order.ordered(f"triage/{split}", rows)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        files[f"{split}.jsonl"] = ("\n".join(lines) + "\n").encode()
    return files


def readme(files: dict[str, bytes]) -> bytes:
    """README.md with the table between its two <!-- counts --> markers made anew."""
    files = files | {"hand_test.jsonl": (HERE / "hand_test.jsonl").read_bytes()}
    columns = [[json.loads(line) for line in content.splitlines()] for content in files.values()]
    table = [
        ["", *(f"`{name}`" for name in files)],
        ["---", *["---:"] * len(files)],
        ["rows", *(f"{len(rows):,}" for rows in columns)],
        ["skeletons", *(str(len({row.get("skeleton") for row in rows} - {None}) or "-") for rows in columns)],
    ]
    for key, values in (ALLOWED | {"split": [], "order_id": [None], "refund_amount": [None]}).items():
        for value in values:
            shares = [sum(row["label"][key] == value for row in rows) / len(rows) for rows in columns]
            table.append([f"{key} `{value or 'null'}`", *(f"{share:.1%}" for share in shares)])
    return with_counts(HERE / "README.md", table)


def with_counts(path: Path, table: list[list[str]]) -> bytes:
    """The file with this table between its two <!-- counts --> markers."""
    start, _, end = path.read_text(encoding="utf-8").split("<!-- counts -->")
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    return f"{start}<!-- counts -->\n{lines}\n<!-- counts -->{end}".encode()


def write(folder: Path, made: dict[str, bytes]) -> None:
    """Writes the files, and prints the table of README.md."""
    for name, content in made.items():
        (folder / name).write_bytes(content)
    print(made["README.md"].decode().split("<!-- counts -->")[1])


if __name__ == "__main__":
    files = build()
    write(HERE, files | {"README.md": readme(files)})

"""The rows of `ask`: `python data/ask/make.py` writes train, validation, test and more.jsonl in a minute.

A row is a wording times a meaning. The wording is a skeleton of skeletons/*.txt, whose slots are filled from
wordings.yaml; the meaning (measure, group, direction, k and up to three conditions) is drawn from the grammar of
README.md. The conditions stand in the query in the order in which the question names them. A row is kept if its query
says something on most of the ten tables and if each of its conditions changes the answer.

One line of skeletons/*.txt is `kind [measure] [high|low] [group] [-family] | wording`. `order` is one order, `orders`
are k of them; `*` is any measure, `city/plan` one of these groups, `-status` a family of conditions that does not fit.
The slots:

    {np} late orders in Pune         {np1} one of them      {a_np1} with its article     {pred} came late
    {tail} in Pune, or nothing       {terse} Pune, late     {city} {month} {plan} {cuisine} {status} {payment} a value
    {meas} average tip               {sup} highest average tip      {ext} slowest        {osup} longest delivery time
    {group} {groups} {per} {in_each} {col} {k}              {most} {more} {most_often} {highest} {best} for a direction

more.jsonl is a second delivery of training rows, with skeletons and wordings of its own (skeletons/more.txt, `more` in
wordings.yaml), written by somebody who had seen neither the hand test nor the wordings of validation and test.
hand_test.jsonl is neither read nor written here. Validation and test stand in the order of data/order.py.

In the head of a skeleton `-city` keeps conditions on the city out of it, and `-front` keeps one from opening it.
"""

import json
import random
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import yaml

from ftlab.tasks import ask

sys.path.insert(0, str(Path(__file__).parents[1]))
import order

HERE = Path(__file__).parent
WORDS = yaml.safe_load((HERE / "wordings.yaml").read_text(encoding="utf-8"))
SIZES = {"train": 3_700, "validation": 300, "test": 300, "more": 3_800}
SEEDS = {"train": 11, "validation": 12, "test": 13, "more": 14}
SHARES = {"count": 26, "measure": 16, "group": 14, "top": 18, "topk": 12, "orders": 14}  # in percent
TRAIN_SHARES = {"count": 20, "measure": 17, "group": 18, "top": 20, "topk": 12, "orders": 13}  # more of what is hard
HOW_MANY = {0: 8, 1: 27, 2: 31, 3: 34}  # conditions of a question, in percent
CORE = 600  # training rows that come first and leave out what is rare, so that a short training learns the frequent
CORE_HOW_MANY = {0: 8, 1: 32, 2: 35, 3: 25}

VALUES = {
    "city": ["Pune", "Delhi", "Mumbai", "Chennai", "Kochi", "Jaipur"],
    "plan": ["free", "gold", "gold", "gold", "office"],
    "cuisine": ["thai", "pizza", "biryani", "dosa", "burger", "sushi", "chaat"],
    "status": ["cancelled", "cancelled", "cancelled", "refunded", "refunded", "done"],
    "payment": ["card", "cash", "upi"],
    "month": [1, 2, 3, 4, 5, 6],
}
MONTHS = ["January", "February", "March", "April", "May", "June"]
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
HOUSE = {
    "late": ("minutes", ">", 45),
    "not_late": ("minutes", "<=", 45),
    "big": ("total", ">=", 1000),
    "unrated": ("stars", " IS ", "NULL"),
    "rated": ("stars", " IS NOT ", "NULL"),
    "tipped": ("tip", ">", 0),
    "untipped": ("tip", "=", 0),
}
HIGH, LOW = range(200, 1001, 50), range(200, 651, 50)  # rupees
NUMBERS = {  # of a column with an operator
    "total": {">": HIGH, ">=": HIGH, "<": LOW, "<=": LOW},
    "minutes": {">": range(25, 61, 5), ">=": range(25, 61, 5), "<": range(20, 46, 5), "<=": range(20, 46, 5)},
    "tip": {">": range(20, 121, 10), ">=": range(20, 121, 10), "<": range(20, 61, 10)},
    "stars": {"=": [1, 2, 3, 4, 5, 5], ">": [2, 3, 4], ">=": [2, 3, 4, 4], "<": [2, 3, 4], "<=": [1, 2, 3]},
}
NUMBERS["minutes"]["="] = [30, 40, 45]
OPERATORS = {
    "total": {">": 52, ">=": 15, "<": 24, "<=": 9},
    "minutes": {">": 52, ">=": 12, "<": 24, "<=": 9, "=": 3},
    "tip": {">": 60, ">=": 25, "<": 15},
    "stars": {"=": 32, ">": 12, ">=": 22, "<": 24, "<=": 10},
}
CORE_OPERATORS = {
    "total": {">": 65, "<": 35},
    "minutes": {">": 65, "<": 35},
    "tip": {">": 100},
    "stars": {"=": 40, ">=": 25, "<": 35},
}
FAMILIES = {  # how often a condition is of this family
    "city": 16, "month": 13, "plan": 15, "cuisine": 12, "payment": 9, "status": 8, "late": 11, "big": 9, "unrated": 7,
    "tipped": 4, "untipped": 4, "total": 9, "minutes": 7, "stars": 7, "tip": 3, "city_not": 0.7, "plan_not": 0.4,
    "cuisine_not": 0.5, "status_not": 0.5, "payment_not": 0.8, "not_late": 0.4, "rated": 0.3,
}  # fmt: skip
RARE = {family for family, often in FAMILIES.items() if often < 1}
MEASURES = {
    "AVG minutes": 17, "AVG total": 16, "AVG tip": 10, "AVG stars": 12, "revenue": 50, "SUM tip": 6, "SUM total": 2,
    "MAX total": 3, "MAX tip": 2, "MAX minutes": 3, "MIN minutes": 4, "MIN total": 2, "SUM minutes": 1,
    "MIN stars": 0.5, "MAX stars": 0.5,
}  # fmt: skip
GROUPS = {"city": 28, "plan": 14, "cuisine": 25, "payment": 12, "status": 6, "month": 15}
PLACES = {"before": 45, "after": 40, "clause": 15}  # of a condition of a noun
BEFORE = [
    "late",
    "big",
    "unrated",
    "tipped",
    "untipped",
    "rated",
    "status",
    "stars",
    "month",
    "city",
    "payment",
    "plan",
]
AFTER = [  # short phrases stand first: "for pizza", "in Pune", "with a tip", "paid by upi"
    ["for", "of"],
    ["from", "to", "in", "outside", "by", "on", "over", "under", "above", "below", "not", "other"],
    ["with", "without", "worth", "rated"],
]


@dataclass(frozen=True)
class Skeleton:
    id: str
    kind: str
    measure: str  # "COUNT", "AVG minutes", "*"; of orders the column that sorts them
    high: bool | None  # None: either direction
    groups: list[str] | None
    without: set[str]  # columns that no condition may name; "front": no condition opens the question
    text: str

    @property
    def slots(self) -> set[str]:
        return set(re.findall(r"{(\w+)}", self.text))

    @property
    def words(self) -> tuple[str, ...]:
        """The parts of wordings.yaml that it draws from."""
        return ("seen", "more") if self.id.startswith("more") else ("seen",)

    @property
    def unseen(self) -> bool:
        """Whether it may use wordings that no row of train.jsonl uses."""
        return self.id.startswith(("validation", "test"))


@dataclass(frozen=True)
class Condition:
    family: str
    column: str
    operator: str
    value: str | int

    def __str__(self) -> str:
        value = f"'{self.value}'" if isinstance(self.value, str) and self.value != "NULL" else self.value
        return f"{self.column}{self.operator}{value}"


@dataclass(frozen=True)
class Meaning:
    kind: str
    measure: str
    group: str | None
    high: bool
    k: int

    @property
    def column(self) -> str:
        return self.measure.split()[-1]

    def query(self, conditions: list[Condition]) -> str:
        """The SQL, with the conditions in the order given."""
        if self.measure in ("COUNT", "revenue"):
            number = {"COUNT": "COUNT(*)", "revenue": "SUM(total)"}[self.measure]
        else:
            number = re.sub(r"(\w+) (\w+)", r"\1(\2)", self.measure)
        chosen = {"group": f"{self.group}, {number}", "top": self.group, "topk": self.group, "orders": "id"}
        parts = [f"SELECT {chosen.get(self.kind, number)} FROM orders"]
        where = ["status='done'"] * (self.measure == "revenue") + [str(c) for c in conditions]
        if where:
            parts.append("WHERE " + " AND ".join(where))
        if self.group:
            parts.append(f"GROUP BY {self.group}")
        if self.kind in ("top", "topk", "orders"):
            parts.append(f"ORDER BY {number}{' DESC' * self.high} LIMIT {self.k}")
        return " ".join(parts)


class UnfitError(Exception):
    """This draw makes no good question; draw again."""


# --- Drawing a meaning ------------------------------------------------------------------------------------------------


def pick(r: random.Random, choices):
    """One of a list, or of a dictionary {choice: weight}. `random()` alone gives every Python the same bytes."""
    if isinstance(choices, dict):
        return r.choices(list(choices), list(choices.values()))[0]
    return choices[int(r.random() * len(choices))]


def shuffled(r: random.Random, things: list) -> list:
    return [things[i] for _, i in sorted((r.random(), i) for i in range(len(things)))]


def read_skeletons(split: str) -> list[Skeleton]:
    """The skeletons of one split. Raises ValueError, naming the line, for one that does not parse."""
    found, numbers = [], {}
    for number, line in enumerate((HERE / "skeletons" / f"{split}.txt").read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#"):
            continue
        head, bar, text = line.partition(" | ")
        kind, *rest = head.split()
        if not bar or kind not in (*SHARES, "order"):
            raise ValueError(f"skeletons/{split}.txt, line {number}: want 'kind ... | wording', got {line!r}")
        groups = next((word.split("/") for word in rest if set(word.split("/")) <= set(GROUPS)), None)
        without = {word[1:] for word in rest if word.startswith("-")}
        high = "high" in rest if {"high", "low"} & set(rest) else None
        measure = " ".join(w for w in rest if w in ("COUNT", "AVG", "SUM", "MAX", "MIN", "revenue", "*", *NUMBERS))
        numbers[kind] = numbers.get(kind, 0) + 1
        name = f"{split}-{kind}-{numbers[kind]:02}"
        found.append(Skeleton(name, kind, measure or "COUNT", high, groups, without, text))
    return found


def draw_meaning(skeleton: Skeleton, r: random.Random) -> Meaning:
    kind, measure = skeleton.kind, skeleton.measure
    high = skeleton.high if skeleton.high is not None else r.random() < 0.55
    if kind in ("order", "orders"):
        column = pick(r, {"total": 45, "minutes": 40, "tip": 15}) if measure == "*" else measure
        if column == "tip" and not high:
            raise UnfitError  # half of all tips are 0
        return Meaning("orders", column, None, high, 1 if kind == "order" else pick(r, [2, 3, 3, 4, 5, 5, 5, 6, 8, 10]))
    if measure == "*":
        measure = pick(r, MEASURES)
        if kind in ("top", "topk") and not measure.startswith(("AVG", "revenue", "SUM tip")):
            raise UnfitError
    if kind in ("count", "measure"):
        return Meaning(kind, measure, None, high, 1)
    group = pick(r, skeleton.groups or GROUPS)
    if group == "status" and (measure == "revenue" or kind != "group"):
        raise UnfitError
    if kind == "topk" and group in ("plan", "payment") and r.random() < 0.6:
        raise UnfitError  # the first two of three: seldom asked
    ks = {"city": [2, 3, 3, 4], "cuisine": [2, 3, 3, 4, 5], "month": [2, 3, 3]}.get(group, [2])
    return Meaning(kind, measure, group, high, pick(r, ks) if kind == "topk" else 1)


def draw_condition(family: str, r: random.Random, core: bool) -> Condition:
    if family in HOUSE:
        return Condition(family, *HOUSE[family])
    column = family.removesuffix("_not")
    if column in VALUES:
        return Condition(family, column, "=" if column == family else "<>", pick(r, VALUES[column]))
    operator = pick(r, (CORE_OPERATORS if core else OPERATORS)[column])
    return Condition(family, column, operator, pick(r, NUMBERS[column][operator]))


def draw_conditions(skeleton: Skeleton, meaning: Meaning, n: int, r: random.Random, core: bool) -> list[Condition]:
    """About n conditions of different columns that go with the skeleton, those of its own slots first."""
    own = [slot for slot in VALUES if slot in skeleton.slots]
    tail_only = not {"np", "np1", "a_np1", "pred", "terse"} & skeleton.slots
    n -= meaning.measure == "revenue" and n == 3 and r.random() < 0.6  # status='done' is a condition too
    n = max(n, len(own), 1 if {"pred", "terse"} & skeleton.slots else 0)
    taken = {meaning.group, *skeleton.without, "status" if meaning.measure == "revenue" else None}
    if meaning.kind == "orders" or meaning.column == "stars" or r.random() < 0.7:
        taken.add(meaning.column)
    if taken & set(own):
        raise UnfitError
    found = [draw_condition(family, r, core) for family in own]
    while len(found) < n:
        condition = draw_condition(pick(r, FAMILIES), r, core)
        tails, fronts = (wordings(condition, place, skeleton.words) for place in ("tail", "front"))
        untold = tail_only and not tails and (not fronts or r.random() < 0.6)
        dull = (condition.family, meaning.column) in (("untipped", "tip"), ("not_late", "minutes"))
        rare = core and condition.family in RARE
        if untold or dull or rare or condition.column in taken | {c.column for c in found}:
            if r.random() < 0.1:
                raise UnfitError
            continue
        found.append(condition)
    return found


# --- Wording ----------------------------------------------------------------------------------------------------------


@cache
def wordings(condition: Condition, place: str, words: tuple[str, ...]) -> list[str]:
    """The ways to say a condition in a place: "before", "after", "clause", "front", "tail" or "terse"."""
    keys = (place, f"{place} {condition.operator}", f"{place} {condition.value}")
    said = [WORDS[part].get(condition.family, {}) for part in words]
    return [text for key in dict.fromkeys(chain(*said)) if key in keys for texts in said for text in texts.get(key, [])]


def name_of(condition: Condition, r: random.Random, dish: bool = False) -> str:
    """A value as people write it; as a dish, "burgers" rather than "burger"."""
    value = condition.value
    if condition.column == "month":
        name = MONTHS[value - 1]
        return name[:3] if r.random() < 0.06 and name != "May" else name
    if value in ("upi", "thai") and r.random() < 0.5:
        return {"upi": "UPI", "thai": "Thai"}[value]
    if dish and r.random() < {"burger": 0.8, "dosa": 0.6, "pizza": 0.3, "biryani": 0.2}.get(value, 0):
        return WORDS["plurals"][value]
    return str(value)


def with_unit(condition: Condition, r: random.Random) -> str:
    n = condition.value
    if condition.column == "minutes":
        return f"{n} {pick(r, ['minutes', 'minutes', 'minutes', 'min', 'mins'])}"
    return pick(r, [f"{n} rupees", f"{n} rupees", f"{n}", f"{n}", f"Rs {n}", f"₹{n}"])


def say(condition: Condition, place: str, r: random.Random, skeleton: Skeleton, plural: bool = True) -> str:
    """One wording of a condition in a place. Raises UnfitError if there is none."""
    texts = skeleton.unseen and r.random() < 0.15 and wordings(condition, place, ("unseen",))
    texts = texts or wordings(condition, place, skeleton.words)
    if not texts:
        raise UnfitError
    text = pick(r, texts)
    if "{cmp}" in text:
        compared = [said for part in skeleton.words for said in WORDS[part]["compare"][condition.operator]]
        text = text.replace("{cmp}", pick(r, compared))
    n = str(condition.value)
    if condition.column == "stars" and condition.value != "NULL" and r.random() < 0.35:
        n = NUMBER_WORDS[condition.value]
    return text.format(
        v=name_of(condition, r, dish=place != "before"),
        q=with_unit(condition, r),
        n=n,
        stars=f"{n} star{'s' * (condition.value != 1)}",
        were="were" if plural else "was",
    )


def noun_phrase(conditions: list[Condition], r: random.Random, skeleton: Skeleton, plural: bool) -> list:
    """[(text, condition or None), ...]: "late", "orders", "in Pune", "that were paid by upi"."""
    places = {}
    for c in conditions:
        fit = {place: often for place, often in PLACES.items() if wordings(c, place, skeleton.words)}
        places[c] = pick(r, fit)
        if places[c] == "clause" and "before" in fit and "after" not in fit and r.random() < 0.85:
            places[c] = "before"  # "big orders" rather than "orders that were big"
    before = [c for c in conditions if places[c] == "before"]
    columns = {c.column for c in before}
    if {"city", "month"} <= columns or {"plan", "payment"} <= columns:
        raise UnfitError
    if len(before) > 2 and ("cuisine" not in columns or r.random() < 0.7):
        raise UnfitError
    before.sort(key=lambda c: BEFORE.index(c.family) if c.family in BEFORE else len(BEFORE))
    if len(before) > 1 and r.random() < 0.3 and {before[0].family, before[1].family} <= set(HOUSE):
        before[:2] = before[1::-1]
    pieces = [(say(c, "before", r, skeleton), c) for c in before]
    noun = "orders" if r.random() < 0.85 else "deliveries"
    last = before[-1] if before and plural else None
    if last and last.family in ("late", "big", "unrated", "tipped", "status") and r.random() < 0.08:
        noun = "ones"
    elif last and last.family == "cuisine" and last.value in WORDS["plurals"] and r.random() < 0.15:
        pieces[-1] = (WORDS["plurals"][last.value], last)
        noun = ""
    pieces.append((noun if plural else {"orders": "order", "deliveries": "delivery"}[noun], None))
    after = [(say(c, "after", r, skeleton, plural), c) for c in conditions if places[c] == "after"]
    clauses = [(say(c, "clause", r, skeleton, plural), c) for c in conditions if places[c] == "clause"]
    that = pick(r, ["that", "that", "which"])
    clauses = [(f"{'and' if i else that} {text}", c) for i, (text, c) in enumerate(clauses)]
    return pieces + joined(after, r) + clauses


def joined(after: list, r: random.Random) -> list:
    """The phrases behind a noun in a natural order: two with `with` are joined by "and", other pairs are unfit."""
    after = sorted((next((i for i, w in enumerate(AFTER) if t.split()[0] in w), 9), r.random(), t, c) for t, c in after)
    found, firsts = [], []
    for *_, text, condition in after:
        first, _, rest = text.partition(" ")
        if first in ("with", "without") and firsts[-1:] in (["with"], ["without"]):
            text = f"and {rest}" if first == firsts[-1] == "with" else f"and {text}"
        elif first in firsts and (first != "in" or firsts.count("in") > 1 or condition.column == "minutes"):
            raise UnfitError
        firsts.append(first)
        found.append((text, condition))
    return found


def predicate(conditions: list[Condition], r: random.Random, skeleton: Skeleton) -> list:
    said = [(say(c, "clause", r, skeleton), c) for c in conditions]
    if any(text.startswith(("nobody", "gold", "free", "office", "have ")) for text, _ in said):
        raise UnfitError  # a clause with a subject of its own
    return [(f"and {text}" if i else text, c) for i, (text, c) in enumerate(said)]


def share_out(skeleton: Skeleton, conditions: list[Condition], r: random.Random) -> dict[str, list[Condition]]:
    """Which slot of the skeleton says which conditions; "front" opens the question with one."""
    shares = {slot: [] for slot in skeleton.slots}
    rest = []
    for c in conditions:
        (shares[c.family] if c.family in shares and not shares[c.family] else rest).append(c)
    rest = shuffled(r, rest)
    noun = next((slot for slot in ("np", "np1", "a_np1", "terse") if slot in shares), None)
    if "pred" in shares:
        most = 2 if r.random() < 0.25 or not noun else 1
        shares["pred"], rest = rest[:most], rest[most:]
    if "tail" in shares:
        shares["tail"] = [c for c in rest if wordings(c, "tail", skeleton.words) and (not noun or r.random() < 0.6)][:2]
        rest = [c for c in rest if c not in shares["tail"]]
    opened = re.match(r"({city}|{terse}|In |For |From |On |Looking |Of |Out |Among |Going |By )", skeleton.text)
    opens = not opened and "front" not in skeleton.without
    fronts = [c for c in rest if wordings(c, "front", skeleton.words)]
    if fronts and opens and noun != "terse" and (not noun or r.random() < 0.12):
        shares["front"] = fronts[:1]
        rest = [c for c in rest if c != fronts[0]]
    if (rest and not noun) or (noun == "terse" and not rest):
        raise UnfitError
    return shares | ({noun: rest} if noun else {})


def fill(skeleton: Skeleton, meaning: Meaning, conditions: list[Condition], r: random.Random) -> tuple[str, list]:
    """The question, and the conditions in the order in which it names them."""
    shares = share_out(skeleton, conditions, r)
    pieces = [(say(c, "front", r, skeleton), c) for c in shares.get("front", [])]
    opening = "".join(text for text, _ in pieces)
    for text, slot in re.findall(r"([^{]*)(?:{(\w+)})?", skeleton.text):
        pieces.append((text, None))
        if slot:
            pieces += fill_slot(slot, text, skeleton, meaning, shares[slot], r)
    text = re.sub(r" +", " ", "".join(text for text, _ in pieces)).strip()
    text = re.sub(r" ([?.,:])", r"\1", text)
    check_grammar(text, skeleton, shares)
    if opening:
        text = opening + lower_first(text[len(opening) :])
    return text[0].upper() + text[1:], [c for _, c in pieces if c]


def fill_slot(slot: str, before: str, skeleton: Skeleton, meaning: Meaning, share: list, r: random.Random) -> list:
    """[(text, condition or None), ...] of one slot; `before` is the text of the skeleton in front of it."""
    if slot in VALUES:
        return [(name_of(share[0], r), share[0])]
    if slot == "terse":
        return [(", " * (i > 0) + say(c, "terse", r, skeleton), c) for i, c in enumerate(share)]
    if slot == "pred":
        return spaced(predicate(share, r, skeleton))
    if slot == "tail":
        return spaced(joined([(say(c, "tail", r, skeleton), c) for c in share], r))
    if slot not in ("np", "np1", "a_np1"):
        return [(words_of(slot, meaning, r), None)]
    phrase = noun_phrase(share, r, skeleton, plural=slot == "np")
    if slot == "np" and len(phrase) == 1:
        phrase = [(all_of_them(before, phrase[0][0]), None)]
    if slot == "a_np1":
        vowel = phrase[0][0][0].lower() in "aeio" or phrase[0][0].startswith("un")
        phrase.insert(0, ("an" if vowel else "a", None))
    return spaced(phrase)


def all_of_them(before: str, noun: str) -> str:
    """A noun without conditions: "all orders" behind a preposition."""
    if re.search(r"\b(only|just|the|through|our|any|all)( of the)? $|of the $", before):
        raise UnfitError
    return f"all {noun}" if re.search(r"\b(of|for|from|on|by|with|at|among|across) $", before, re.IGNORECASE) else noun


def spaced(pieces: list) -> list:
    return [(text if i == 0 else f" {text}", c) for i, (text, c) in enumerate(pieces)]


def check_grammar(text: str, skeleton: Skeleton, shares: dict) -> None:
    """Raises UnfitError for what a colleague would not write."""
    low = re.sub(r"^(.*, )?which", "", text.lower())
    clause = re.search(r"\b(that|which) \w+", low)
    once = ("from", "placed", "delivered", "went", "of our", "got", "members", "customers")
    if any(len(re.findall(rf"\b{word}\b", low)) > 1 for word in once) or re.search(r"\b(\w+) \1\b", low):
        raise UnfitError
    if "biggest big" in low or "big bill" in low:
        raise UnfitError
    if clause and shares.get("pred") and "{np} that" not in skeleton.text:
        raise UnfitError  # "orders that came late were paid by upi"
    if clause and shares.get("tail") and not shares.get("np") == []:
        raise UnfitError  # a tail behind a clause goes with the wrong verb
    if clause and re.search(r"{np} (took|take|on average|cost|got|per|in_each|by)", skeleton.text):
        raise UnfitError  # "orders that cost over 500 on average"


def lower_first(text: str) -> str:
    first = re.match(r"[\w']*", text)[0]
    keep = first in (*VALUES["city"], *MONTHS, "I", "I'd", "I'm", "UPI", "Thai", "Rs")
    return text if keep else text[:1].lower() + text[1:]


def words_of(slot: str, meaning: Meaning, r: random.Random) -> str:
    """A measure, a group, a number or a direction in words."""
    column, end = meaning.column, "high" if meaning.high else "low"
    if slot == "meas":
        return pick(r, WORDS["measures"][meaning.measure])
    if slot == "sup":
        word, noun = pick(r, WORDS["superlatives"][column][end]), pick(r, WORDS["measures"][meaning.measure])
        return f"{word} {noun.removeprefix('total ') if word in ('most', 'least') else noun}"
    if slot == "ext":
        return pick(r, WORDS["order extremes" if meaning.kind == "orders" else "extremes"][column][end])
    if slot == "osup":
        return pick(r, WORDS["order superlatives"][column][end])
    if slot == "col":
        return pick(r, WORDS["columns"][column])
    if slot == "k":
        return NUMBER_WORDS[meaning.k] if r.random() < 0.5 else str(meaning.k)
    if slot in WORDS["directions"]:
        return pick(r, WORDS["directions"][slot][end])
    if slot == "in_each":
        return WORDS["in each"][meaning.group]
    group = pick(r, WORDS["groups"].get(meaning.group, [meaning.group]))
    if slot == "groups":
        return WORDS["plurals"].get(group, f"{group}s")
    return {"group": "{}", "per": pick(r, WORDS["per"])}[slot].format(group)


def in_a_hurry(text: str, r: random.Random, unseen: bool, core: bool) -> str:
    """As people type: a greeting, no question mark, small letters, now and then a slip."""
    which = "unseen" if unseen else "seen"
    if r.random() < 0.06 and not re.match(r"(In|For|On|Among|Looking|Please|Can|Could|Do) ", text):
        text = pick(r, WORDS["openings"][which]) + lower_first(text)
    if r.random() < 0.06 and not re.search(r"[Pp]lease|Can |Could |report|thank|I need|I'd|I want", text):
        text = re.sub(r"([?.]?)$", pick(r, WORDS["closings"][which]) + r"\1", text, count=1)
    if r.random() < 0.3:
        text = text.rstrip("?.")
    if r.random() < 0.22:
        text = text.lower()
    if r.random() < 0.1:
        text = text.replace("average", "avg", 1)
    return slip(text, r) if r.random() < 0.03 and not core else text


SLIPPERY = re.compile(
    r"\b(number|orders|deliveries|customers|members|rupees|minutes|average|without|please|which|method|payment|delivery"
    r"|placed|report|there|tell|give|show|total|value|rating|cuisine|cities|months)\b"
)


def slip(text: str, r: random.Random) -> str:
    """Two letters swapped, or one lost, in one word that the query can do without."""
    fit = list(SLIPPERY.finditer(text))
    if not fit:
        return text
    word = pick(r, fit)
    i = word.start() + 1 + int(r.random() * (len(word[0]) - 2))
    return text[:i] + (text[i + 1] + text[i] + text[i + 2 :] if r.random() < 0.5 else text[i + 1 :])


# --- Rows -------------------------------------------------------------------------------------------------------------


@cache  # the same query without one of its conditions comes again and again
def rows_of(query: str, table: int) -> list[tuple]:
    """What a query of the grammar returns, floats to 4 places: without the guards that queries of a model need."""
    rows = ask.databases()[table].execute(query)
    return [tuple(round(value, 4) if isinstance(value, float) else value for value in row) for row in rows]


def sensible(meaning: Meaning, conditions: list[Condition]) -> bool:
    """Whether the query says something on at least 7 of 10 tables, not always the same, and each condition matters."""
    gold = partial(rows_of, meaning.query(conditions))
    wanted = {"group": 2, "topk": meaning.k, "orders": meaning.k}.get(meaning.kind, 1)
    full, empty, different = 0, 0, set()
    for table in range(10):
        rows = gold(table)
        different.add(tuple(rows))
        said = len(rows) >= wanted and any(rows[0])
        full, empty = full + said, empty + (not said)
        if full == 7:
            break
        if empty == 4:
            return False
    if len(different) == 1:
        return False
    fewer = [meaning.query([c for c in conditions if c != one]) for one in conditions]
    return all(any(rows_of(query, table) != gold(table) for table in range(10)) for query in fewer)


def draw_row(skeleton: Skeleton, r: random.Random, core: bool) -> tuple[str, str]:
    """(question, query) of a skeleton: draws until one is fit and sensible."""
    for attempt in range(3_000):
        if attempt % 60 == 0:
            n = pick(r, CORE_HOW_MANY if core else HOW_MANY)  # kept for a while: three fit less often than one
        try:
            meaning = draw_meaning(skeleton, r)
            conditions = draw_conditions(skeleton, meaning, n, r, core)
            text, said = fill(skeleton, meaning, conditions, r)
        except UnfitError:
            continue
        if sorted(map(str, said)) != sorted(map(str, conditions)):
            raise ValueError(f"{skeleton.id}: {text!r} says {said}, wanted {conditions}")
        if sensible(meaning, said):
            return in_a_hurry(text, r, skeleton.unseen, core), meaning.query(said)
    raise ValueError(f"{skeleton.id} found no row: {skeleton.text!r}")


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def near(question: frozenset[str], taken: dict[str, list[frozenset[str]]]) -> bool:
    """Whether a question has nearly the words of another: 9 in 10 are common to both.

    taken: word -> the questions with it. Of n words at most n // 10 may lack, so one of any n // 10 + 1 is in both.
    """
    rarest = sorted(question, key=lambda word: len(taken[word]))[: len(question) // 10 + 1]
    others = chain.from_iterable(taken[word] for word in rarest)
    return any(len(question & other) >= 0.9 * len(question | other) for other in others)


def make_split(split: str, taken: dict[str, list[frozenset[str]]]) -> list[dict]:
    """The rows of a split, each kind and skeleton evenly over the file, so that any first part is a sample of it.

    No row comes near to one of `taken` (word -> questions), to which the new ones are added.
    """
    r = random.Random(SEEDS[split])
    skeletons = read_skeletons(split)
    plan = []
    for kind, share in (TRAIN_SHARES if split in ("train", "more") else SHARES).items():
        here = shuffled(r, [s for s in skeletons if s.kind in (kind, "order" if kind == "orders" else kind)])
        n = round(SIZES[split] * share / 100)
        plan += [((j + r.random()) / n, here[j % len(here)]) for j in range(n)]
    rows, own = [], set()
    for _, skeleton in sorted(plan, key=lambda entry: entry[0]):
        for _ in range(200):
            question, query = draw_row(skeleton, r, core=split == "train" and len(rows) < CORE)
            if words(question) not in own and not near(words(question), taken):
                break
        else:
            raise ValueError(f"{skeleton.id} repeats other rows: {question!r}")
        own.add(words(question))
        rows.append(
            {
                "id": f"{split}-{len(rows) + 1:04}",
                "prompt": [{"role": "system", "content": ask.SYSTEM}, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": query}],
                "kind": "orders" if skeleton.kind == "order" else skeleton.kind,
                "skeleton": skeleton.id,
            }
        )
    for question in own:
        for word in question:
            taken[word].append(question)
    return rows


def make() -> dict[str, str]:
    """{file name: text}. Test and validation come first; `train` keeps away from both, and `more` from all three."""
    taken = defaultdict(list)
    splits = {split: make_split(split, taken) for split in ("test", "validation", "train", "more")}
    for split in ("test", "validation"):
        splits[split] = order.ordered(f"ask/{split}", splits[split])
    return {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in splits.items()
    }


if __name__ == "__main__":
    for name, text in make().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10)):,} rows")

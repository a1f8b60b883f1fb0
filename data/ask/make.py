"""The rows of `ask`: `python data/ask/make.py` writes train.jsonl, validation.jsonl and test.jsonl (half a minute).

A row is a wording times a meaning. The wording is a skeleton of skeletons/*.txt, whose slots are filled with wordings of
wordings.yaml; the meaning (measure, group, direction, k and up to three conditions) is drawn from the grammar of
README.md. The conditions stand in the query in the order in which the question names them. A row is kept if its query
says something on most of the ten tables and if each of its conditions changes the answer.

One line of skeletons/*.txt is `kind [measure] [high|low] [group] [-family] | wording`, with these slots:
    {np} late orders in Pune   {np1} the same in the singular   {a_np1} with its article   {pred} came late
    {tail} in Pune, or nothing   {terse} Pune, late   {city} {month} {plan} {cuisine} {payment} {status} one condition's value
    {meas} average tip   {sup} highest average tip   {ext} slowest   {osup} longest delivery time   {col} total
    {group} {groups} {per} {in_each}   {k}   {most} {more} {most_often} {highest} {best}: words for a direction
hand_test.jsonl is neither read nor written here.
"""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ftlab.tasks import ask

HERE = Path(__file__).parent
SIZES = {"train": 3_700, "validation": 300, "test": 300}
SHARES = {"count": 26, "measure": 16, "group": 14, "top": 18, "topk": 12, "orders": 14}  # in percent
SEEDS = {"train": 11, "validation": 12, "test": 13}

VALUES = {
    "city": "Pune Delhi Mumbai Chennai Kochi Jaipur".split(),
    "plan": "free gold gold gold office".split(),
    "cuisine": "thai pizza biryani dosa burger sushi chaat".split(),
    "status": "cancelled cancelled refunded done".split(),
    "payment": "card cash upi".split(),
    "month": [1, 2, 3, 4, 5, 6],
}
MONTHS = "January February March April May June".split()
HOUSE = {
    "late": ("minutes", ">", 45),
    "not_late": ("minutes", "<=", 45),
    "big": ("total", ">=", 1000),
    "unrated": ("stars", " IS ", "NULL"),
    "rated": ("stars", " IS NOT ", "NULL"),
    "tipped": ("tip", ">", 0),
    "untipped": ("tip", "=", 0),
}
NUMBERS = {  # column: operator -> numbers
    "total": {
        ">": range(200, 1001, 50),
        ">=": range(200, 1001, 50),
        "<": range(200, 651, 50),
        "<=": range(200, 651, 50),
    },
    "minutes": {
        ">": range(25, 61, 5),
        ">=": range(25, 61, 5),
        "<": range(20, 46, 5),
        "<=": range(20, 46, 5),
        "=": (30, 40, 45),
    },
    "tip": {">": range(20, 121, 10), ">=": range(20, 121, 10), "<": range(20, 61, 10)},
    "stars": {"=": (1, 2, 3, 4, 5, 5), ">": (2, 3, 4), ">=": (2, 3, 4, 4), "<": (2, 3, 4), "<=": (1, 2, 3)},
}
FAMILIES = {  # how often a condition is of this family
    "city": 16, "month": 13, "plan": 15, "cuisine": 12, "payment": 9, "status": 8, "late": 11, "big": 9, "unrated": 7,
    "tipped": 4, "untipped": 4, "total": 9, "minutes": 7, "stars": 7, "tip": 3,
    "city_not": 1, "plan_not": 0.5, "cuisine_not": 0.7, "status_not": 0.7, "payment_not": 1, "not_late": 0.6, "rated": 0.4,
}  # fmt: skip
HOW_MANY = {0: 4, 1: 27, 2: 33, 3: 36}  # conditions of a question, in percent
MEASURES = {
    "AVG minutes": 17, "AVG total": 16, "AVG tip": 10, "AVG stars": 12, "revenue": 32, "SUM tip": 6, "SUM total": 4,
    "MAX total": 3, "MAX tip": 2, "MAX minutes": 3, "MIN minutes": 4, "MIN total": 2, "SUM minutes": 1,
    "MIN stars": 0.5, "MAX stars": 0.5,
}  # fmt: skip
NOUNS = {  # a measure in words
    "AVG minutes": [
        "average delivery time",
        "average delivery time",
        "average minutes",
        "mean delivery time",
        "average time",
    ],
    "AVG total": ["average order value", "average order value", "average total", "average bill", "mean order value"],
    "AVG tip": ["average tip", "average tip", "mean tip"],
    "AVG stars": ["average rating", "average rating", "average stars", "mean rating"],
    "revenue": ["revenue", "revenue", "turnover", "total revenue"],
    "SUM tip": ["total tips", "sum of tips", "sum of all tips"],
    "SUM total": ["total order value", "sum of totals", "sum of the order totals"],
    "SUM minutes": ["total delivery time", "sum of minutes"],
    "MAX total": ["highest total", "largest order value", "biggest bill"],
    "MAX tip": ["highest tip", "biggest tip", "largest tip"],
    "MAX minutes": ["longest delivery time", "slowest delivery time", "longest delivery"],
    "MIN minutes": ["fastest delivery time", "shortest delivery time", "quickest delivery time", "quickest delivery"],
    "MIN total": ["lowest total", "smallest order value", "smallest bill"],
    "MIN stars": ["worst rating", "lowest rating"],
    "MAX stars": ["best rating", "highest rating"],
}
SUPERLATIVES = {  # of an averaged or summed column: high, low
    "minutes": (
        ["longest", "longest", "highest", "slowest", "worst"],
        ["shortest", "shortest", "lowest", "fastest", "quickest", "best"],
    ),
    "total": (["highest", "highest", "largest", "biggest"], ["lowest", "lowest", "smallest"]),
    "tip": (["highest", "highest", "biggest", "best"], ["lowest", "lowest", "smallest", "worst"]),
    "stars": (["best", "highest"], ["worst", "lowest"]),
    "revenue": (
        ["highest", "highest", "biggest", "largest", "best", "most"],
        ["lowest", "lowest", "smallest", "least", "worst"],
    ),
}
EXTREMES = {  # one word for the ends of a column: high, low
    "minutes": (["slowest"], ["fastest", "quickest"]),
    "stars": (["best rated", "highest rated"], ["worst rated", "lowest rated"]),
    "total": (["most expensive", "priciest"], ["cheapest"]),
    "tip": (["best tipped"], ["worst tipped"]),
}
ORDER_EXTREMES = EXTREMES | {
    "minutes": (["slowest", "slowest", "longest running"], ["fastest", "quickest"]),
    "total": (["biggest", "largest", "most expensive"], ["smallest", "cheapest"]),
}
ORDER_SUPERLATIVES = {
    "minutes": (
        ["longest delivery time", "slowest delivery", "most minutes"],
        ["shortest delivery time", "fastest delivery", "fewest minutes"],
    ),
    "total": (["highest total", "largest total", "biggest bill"], ["lowest total", "smallest total", "lowest bill"]),
    "tip": (["highest tip", "biggest tip", "largest tip"], []),
}
COLUMN_WORDS = {"minutes": ["delivery time", "minutes"], "total": ["total", "order value", "total"], "tip": ["tip"]}
DIRECTIONS = {
    "most": (["most"], ["fewest", "fewest", "least"]),
    "more": (["most"], ["least"]),
    "most_often": (["most often", "most"], ["least often", "least"]),
    "highest": (["highest", "best"], ["lowest", "worst"]),
    "best": (["best", "most"], ["worst", "least"]),
}
GROUPS = {"city": 28, "plan": 14, "cuisine": 25, "payment": 12, "status": 6, "month": 15}
GROUP_WORDS = {
    "cuisine": ["cuisine", "cuisine", "cuisine", "kind of food"],
    "payment": ["payment method", "payment method", "payment", "payment type"],
}
IN_EACH = {
    "city": "in each city", "month": "in each month", "plan": "on each plan", "cuisine": "for each cuisine",
    "payment": "for each payment method", "status": "for each status",
}  # fmt: skip
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()

OPENINGS = {
    "seen": [
        "Hi, ",
        "Hey, ",
        "Quick question: ",
        "For the weekly report: ",
        "Morning, ",
        "One more: ",
        "Also, ",
        "Just checking: ",
        "The boss asks: ",
        "Please: ",
    ],
    "unseen": ["Hello, ", "For the board: ", "Next one: ", "By the way, "],
}
CLOSINGS = {
    "seen": [", please", " please", ", thanks", " asap", ", for the report", ", quickly please"],
    "unseen": [", if you can", ", thank you", ", for the meeting"],
}


@dataclass(frozen=True)
class Skeleton:
    id: str
    kind: str
    measure: str  # "COUNT", "AVG minutes", "*": any, "minutes": the column that orders are sorted by
    high: bool | None
    group: str | None
    without: str | None
    text: str

    @property
    def slots(self) -> set[str]:
        return set(re.findall(r"{(\w+)}", self.text))


@dataclass(frozen=True)
class Condition:
    family: str
    column: str
    operator: str
    value: str | int

    def __str__(self) -> str:
        quoted = isinstance(self.value, str) and self.value != "NULL"
        return f"{self.column}{self.operator}'{self.value}'" if quoted else f"{self.column}{self.operator}{self.value}"


@dataclass(frozen=True)
class Meaning:
    kind: str
    measure: str
    group: str | None
    high: bool
    k: int

    def query(self, conditions: list[Condition]) -> str:
        """The SQL, with the conditions in the order given."""
        where = [str(c) for c in conditions]
        if self.measure == "revenue":
            where = ["status='done'", *where]
        number = {"COUNT": "COUNT(*)", "revenue": "SUM(total)"}.get(self.measure)
        number = number or "{}({})".format(*self.measure.split()) if " " in self.measure or number else self.measure
        chosen = {"group": f"{self.group}, {number}", "top": self.group, "topk": self.group, "orders": "id"}
        parts = [f"SELECT {chosen.get(self.kind, number)} FROM orders"]
        if where:
            parts.append("WHERE " + " AND ".join(where))
        if self.group:
            parts.append(f"GROUP BY {self.group}")
        if self.kind in ("top", "topk", "orders"):
            parts.append(f"ORDER BY {number}{' DESC' if self.high else ''} LIMIT {self.k}")
        return " ".join(parts)


class Unfit(Exception):
    """This draw makes no good question; draw again."""


# --- Drawing ----------------------------------------------------------------------------------------------------------


def pick(r: random.Random, choices):
    """One of a list, or of a dictionary {choice: weight}. `random()` alone gives every Python the same bytes."""
    if isinstance(choices, dict):
        return r.choices(list(choices), list(choices.values()))[0]
    return choices[int(r.random() * len(choices))]


def shuffled(r: random.Random, things: list) -> list:
    return [things[i] for _, i in sorted((r.random(), i) for i in range(len(things)))]


def read_skeletons(split: str) -> list[Skeleton]:
    """The skeletons of one split; ValueError names a line that does not parse."""
    found, seen = [], {}
    for number, line in enumerate((HERE / "skeletons" / f"{split}.txt").read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#"):
            continue
        head, bar, text = line.partition(" | ")
        kind, *rest = head.split()
        if not bar or kind not in (*SHARES, "order"):
            raise ValueError(f"skeletons/{split}.txt, line {number}: want 'kind ... | wording', got {line!r}")
        high = "high" in rest or (False if "low" in rest else None)
        without = next((word[1:] for word in rest if word.startswith("-")), None)
        group = next((word for word in rest if set(word.split("/")) <= set(GROUPS)), None)
        measure = " ".join(w for w in rest if w not in ("high", "low", group) and not w.startswith("-")) or "COUNT"
        seen[kind] = seen.get(kind, 0) + 1
        found.append(Skeleton(f"{split}-{kind}-{seen[kind]:02}", kind, measure, high, group, without, text))
    return found


def draw_meaning(skeleton: Skeleton, r: random.Random) -> Meaning:
    kind, measure = skeleton.kind, skeleton.measure
    if kind in ("order", "orders"):
        column = pick(r, {"total": 45, "minutes": 40, "tip": 15}) if measure == "*" else measure
        high = skeleton.high if skeleton.high is not None else r.random() < (1 if column == "tip" else 0.55)
        if column == "tip" and not high:
            raise Unfit
        return Meaning("orders", column, None, high, 1 if kind == "order" else pick(r, [2, 3, 3, 4, 5, 5, 5, 6, 8, 10]))
    if measure == "*":
        measure = pick(r, MEASURES)
        if kind in ("top", "topk") and not measure.startswith(("AVG", "revenue", "SUM tip")):
            raise Unfit
    group = None
    if kind in ("group", "top", "topk"):
        group = pick(r, skeleton.group.split("/") if skeleton.group else GROUPS)
    if kind == "topk" and group in ("plan", "payment", "status") and r.random() < 0.6:
        raise Unfit  # the first two of three: seldom asked
    if group == "status" and (measure == "revenue" or kind != "group"):
        raise Unfit
    high = skeleton.high if skeleton.high is not None else r.random() < 0.55
    k = (
        pick(r, {"city": [2, 3, 3, 4], "cuisine": [2, 3, 3, 4, 5], "month": [2, 3, 3]}.get(group, [2]))
        if kind == "topk"
        else 1
    )
    return Meaning(kind, measure, group, high, k)


def draw_condition(family: str, r: random.Random) -> Condition:
    column = family.removesuffix("_not")
    if family in HOUSE:
        return Condition(family, *HOUSE[family])
    if column in VALUES:
        return Condition(family, column, "<>" if column != family else "=", pick(r, VALUES[column]))
    operator = pick(r, list(NUMBERS[column]) if column != "stars" else ["=", "=", ">", ">=", ">=", "<", "<", "<="])
    if operator == ">" or r.random() < 0.7 or column == "stars":
        return Condition(family, column, operator, pick(r, NUMBERS[column][operator]))
    return Condition(family, column, ">", pick(r, NUMBERS[column].get(">")))


def draw_conditions(skeleton: Skeleton, meaning: Meaning, n: int, r: random.Random) -> list[Condition]:
    """Conditions of different columns that go with the skeleton, those of its own slots included."""
    bound = [slot for slot in VALUES if slot in skeleton.slots]
    closed = not {"np", "np1", "a_np1", "pred", "terse"} & skeleton.slots  # only a tail can take conditions
    n -= meaning.measure == "revenue" and n == 3 and r.random() < 0.6
    n = max(n, len(bound), 1 if {"pred", "terse"} & skeleton.slots else 0)
    taken = {meaning.group, skeleton.without, "status" if meaning.measure == "revenue" else None}
    column = meaning.measure.split()[-1]
    if meaning.kind == "orders" or r.random() < 0.7:
        taken.add(column)
    found = []
    for family in bound:
        if family in taken:
            raise Unfit
        found.append(draw_condition(family, r))
        taken.add(family)
    while len(found) < n:
        condition = draw_condition(pick(r, FAMILIES), r)
        if condition.column in taken:
            if r.random() < 0.1:
                raise Unfit
            continue
        if closed and not wordings(condition, "tail", False) and not wordings(condition, "front", False):
            if r.random() < 0.1:
                raise Unfit
            continue
        if column == condition.column == "stars" or (condition.family, column) in (
            ("untipped", "tip"),
            ("not_late", "minutes"),
        ):
            continue
        found.append(condition)
        taken.add(condition.column)
    return found


# --- Wording ----------------------------------------------------------------------------------------------------------


@cache
def _lexicon() -> dict:
    return yaml.safe_load((HERE / "wordings.yaml").read_text(encoding="utf-8"))


@cache
def wordings(condition: Condition, place: str, unseen: bool) -> list[str]:
    """The ways to say a condition in a place."""
    said = _lexicon()["unseen" if unseen else "seen"].get(condition.family, {})
    return [
        text
        for key, texts in said.items()
        if key in (place, f"{place} {condition.operator}", f"{place} {condition.value}")
        for text in texts
    ]


def value_words(condition: Condition, r: random.Random) -> str:
    if condition.column == "month":
        name = MONTHS[condition.value - 1]
        return name[:3] if r.random() < 0.06 and name != "May" else name
    if condition.value in ("upi", "thai") and r.random() < 0.5:
        return {"upi": "UPI", "thai": "Thai"}[condition.value]
    return str(condition.value)


def with_unit(condition: Condition, r: random.Random) -> str:
    n = condition.value
    if condition.column == "minutes":
        return f"{n} {pick(r, ['minutes', 'minutes', 'minutes', 'min', 'mins'])}"
    return pick(r, [f"{n} rupees", f"{n} rupees", f"{n}", f"{n}", f"Rs {n}", f"₹{n}"])


def say(condition: Condition, place: str, r: random.Random, unseen: bool, plural: bool = True) -> str:
    """One wording of a condition in a place ("before", "after", ...); Unfit if there is none."""
    texts = (unseen and r.random() < 0.25 and wordings(condition, place, True)) or wordings(condition, place, False)
    if not texts:
        raise Unfit
    text = pick(r, texts)
    unit = with_unit(condition, r)
    n = str(condition.value)
    if condition.column == "stars" and condition.value != "NULL":
        n = NUMBER_WORDS[condition.value] if r.random() < 0.35 else n
    if "{cmp}" in text:
        text = text.replace("{cmp}", pick(r, _lexicon()["compare"][condition.operator]))
    slots = {
        "v": value_words(condition, r),
        "q": unit,
        "n": n,
        "stars": f"{n} star{'s' * (condition.value != 1)}",
        "were": "were" if plural else "was",
    }
    return text.format(**slots)


RANK = {"late": 0, "big": 0, "unrated": 0, "tipped": 0, "untipped": 0, "rated": 0, "status": 1, "stars": 1, "month": 2, "city": 3, "payment": 4, "plan": 4, "cuisine_not": 5, "cuisine": 5}  # fmt: skip
PLURALS = {"pizza": "pizzas", "biryani": "biryanis", "dosa": "dosas", "burger": "burgers"}


def noun_phrase(conditions: list[Condition], r: random.Random, unseen: bool, plural: bool = True) -> list:
    """[(text, condition or None), ...]: "late", "orders", "in Pune", "that were paid by upi"."""
    placed = [(pick(r, {"before": 45, "after": 38, "clause": 17}), c) for c in conditions]
    before = [c for place, c in placed if place == "before"]
    columns = [c.column for c in before]
    if len(before) > 2 and (r.random() < 0.7 or "cuisine" not in columns) or {"city", "month"} <= set(columns):
        raise Unfit
    if {"plan", "payment"} <= set(columns):
        raise Unfit
    before.sort(key=lambda c: (RANK.get(c.family, 9), r.random()))
    pieces = [(say(c, "before", r, unseen, plural), c) for c in before]
    noun = "orders" if r.random() < 0.85 else "deliveries"
    if pieces and plural and before[-1].family in ("late", "big", "unrated", "tipped", "status") and r.random() < 0.08:
        noun = "ones"
    elif pieces and plural and before[-1].value in PLURALS and before[-1].family == "cuisine" and r.random() < 0.15:
        pieces[-1] = (PLURALS[before[-1].value], before[-1])
        noun = ""
    if noun and not plural:
        noun = {"orders": "order", "deliveries": "delivery"}[noun]
    pieces.append((noun, None))
    after = [(say(c, "after", r, unseen, plural), c) for place, c in placed if place == "after"]
    after.sort(key=lambda piece: (weight(piece[0]), r.random()))
    clauses = [(say(c, "clause", r, unseen, plural), c) for place, c in placed if place == "clause"]
    that = pick(r, ["that", "that", "which"])
    return pieces + joined(after) + [(f"{'and' if i else that} {text}", c) for i, (text, c) in enumerate(clauses)]


def weight(text: str) -> int:
    """Short phrases stand first: "for pizza", "in Pune", "with a tip", "paid by upi"."""
    first = text.split()[0]
    order = [
        ("for", "of"),
        ("from", "to", "in", "outside", "by", "on", "over", "under", "above", "below", "not", "other"),
        ("with", "without", "worth", "rated"),
    ]
    return next((i for i, words in enumerate(order) if first in words), 3)


def joined(after: list) -> list:
    """The phrases behind a noun: two that open with `with` are joined by "and"; other pairs that open alike are Unfit."""
    found, firsts = [], []
    for text, condition in after:
        first, _, rest = text.partition(" ")
        if first in ("with", "without") and firsts and firsts[-1] in ("with", "without"):
            text = f"and {rest}" if first == firsts[-1] == "with" else f"and {text}"
        elif first in firsts and (first != "in" or firsts.count("in") > 1):
            raise Unfit
        firsts.append(first)
        found.append((text, condition))
    if re.search(r"\bin .*\bin (under|less|below|at most|up to|no more)", " ".join(text for text, _ in found)):
        raise Unfit
    return found


def predicate(conditions: list[Condition], r: random.Random, unseen: bool) -> list:
    said = [(say(c, "clause", r, unseen), c) for c in conditions]
    if any(text.startswith(("nobody", "gold", "free", "office")) for text, _ in said):
        raise Unfit  # a clause with a subject of its own
    return [(f"and {text}" if i else text, c) for i, (text, c) in enumerate(said)]


def share_out(skeleton: Skeleton, conditions: list[Condition], r: random.Random) -> dict[str, list[Condition]]:
    """Which slot of the skeleton says which condition."""
    shares = {slot: [] for slot in skeleton.slots}
    rest = []
    for c in conditions:
        (shares[c.family] if c.family in shares and not shares[c.family] else rest).append(c)
    rest = shuffled(r, rest)
    if "pred" in shares:
        shares["pred"] = [rest.pop() for _ in range(min(len(rest), 1 if r.random() < 0.75 else 2))]
    noun = next((slot for slot in ("np", "np1", "a_np1", "terse") if slot in shares), None)
    if "pred" in shares and not noun and rest:
        shares["pred"] += [rest.pop()]
    if "tail" in shares:
        fit = [c for c in rest if wordings(c, "tail", False) and (not noun or r.random() < 0.6)]
        shares["tail"] = fit[:2]
        rest = [c for c in rest if c not in shares["tail"]]
    fronts = [c for c in rest if wordings(c, "front", False)]
    starts_free = not re.match(r"({city}|In |For |From |On |Looking |Of |Among |{terse})", skeleton.text)
    if fronts and starts_free and (not noun or r.random() < 0.13) and "terse" not in shares:
        shares["front"] = fronts[:1]
        rest = [c for c in rest if c != fronts[0]]
    if rest and not noun:
        raise Unfit
    if noun:
        shares[noun] = rest
    if noun == "terse" and not rest:
        raise Unfit
    return shares


def fill(
    skeleton: Skeleton, meaning: Meaning, conditions: list[Condition], r: random.Random
) -> tuple[str, list[Condition]]:
    """The question, and the conditions in the order in which it names them."""
    unseen = not skeleton.id.startswith("train")
    shares = share_out(skeleton, conditions, r)
    pieces = []
    if "front" in shares:
        pieces.append((say(shares["front"][0], "front", r, unseen), shares["front"][0]))
    for text, slot in re.findall(r"([^{]*)(?:{(\w+)})?", skeleton.text):
        pieces.append((text, None))
        if slot in VALUES:
            pieces.append((value_words(shares[slot][0], r), shares[slot][0]))
        elif slot in ("np", "np1", "a_np1"):
            phrase = noun_phrase(shares[slot], r, unseen, plural=slot == "np")
            if len(phrase) == 1 and slot == "np":
                phrase = [(all_of_them(text, phrase[0][0]), None)]
            if slot == "a_np1":
                vowel = phrase[0][0][0].lower() in "aeio" or phrase[0][0].startswith("un")
                phrase.insert(0, ("an" if vowel else "a", None))
            pieces += spaced(phrase)
        elif slot == "pred":
            pieces += spaced(predicate(shares["pred"], r, unseen))
        elif slot == "tail":
            tail = [(say(c, "tail", r, unseen), c) for c in shares["tail"]]
            pieces += spaced(joined(tail))
        elif slot == "terse":
            said = [(say(c, "terse", r, unseen), c) for c in shares["terse"]]
            pieces += [(("" if i == 0 else ", ") + text, c) for i, (text, c) in enumerate(said)]
        elif slot:
            pieces.append((words_of(slot, meaning, r), None))
    text = re.sub(r" +", " ", "".join(text for text, _ in pieces)).strip()
    text = re.sub(r" ([?.,:])", r"\1", text)
    check_grammar(text, shares, skeleton)
    if "front" in shares:
        opening = pieces[0][0]
        text = opening + lower_first(text[len(opening) :])
    return text[0].upper() + text[1:], [c for _, c in pieces if c]


def all_of_them(before: str, noun: str) -> str:
    """A noun without conditions: "all orders" behind a preposition."""
    if re.search(r"\b(only|just|the|through|our|any|of the) $", before):
        raise Unfit
    return f"all {noun}" if re.search(r"\b(of|for|For|from|on|by|with|at|among|Among|across) $", before) else noun


def spaced(pieces: list) -> list:
    return [(text if i == 0 else f" {text}", c) for i, (text, c) in enumerate(pieces)]


def check_grammar(text: str, shares: dict, skeleton: Skeleton) -> None:
    """Unfit for what a colleague would not write."""
    low = text.lower()
    said_twice = [
        word
        for word in ("from", "placed", "delivered", "went", "of our", "got")
        if len(re.findall(rf"\b{word}\b", low)) > 1
    ]
    if said_twice or re.search(r"\b(\w+) \1\b", low):
        raise Unfit
    if "biggest big" in low or "big bill" in low or re.search(r"\bof \w+ (members|customers) of\b", low):
        raise Unfit
    if (
        "pred" in shares
        and re.search(r"\b(that|which) .*", low.split("how many")[-1])
        and not re.search(r"{np} that", skeleton.text)
    ):
        raise Unfit  # "orders that came late were paid by upi"
    if (
        "tail" in shares
        and shares["tail"]
        and re.search(r"\b(that|which) \w+", re.sub(r"^which", "", low))
        and "np" in shares
    ):
        raise Unfit  # a tail behind a clause belongs to the wrong verb
    if (
        re.search(r"\b(that|which) \w+ .* on average", re.sub(r"^which", "", low))
        and "{np} on average" in skeleton.text
    ):
        raise Unfit  # "orders that cost over 500 on average"


def lower_first(text: str) -> str:
    first = re.match(r"[\w']*", text)[0]
    keep = first in (*VALUES["city"], *MONTHS, "I", "I'd", "I'm", "UPI", "Thai", "Rs")
    return text if keep else text[:1].lower() + text[1:]


def words_of(slot: str, meaning: Meaning, r: random.Random) -> str:
    """A measure, a group, a number or a direction in words."""
    column, low = meaning.measure.split()[-1], not meaning.high
    if slot == "meas":
        return pick(r, NOUNS[meaning.measure])
    if slot == "sup":
        word = pick(r, SUPERLATIVES[column][low])
        noun = pick(r, NOUNS[meaning.measure])
        return f"{word} {noun}" if word not in ("most", "least") else f"{word} {noun.removeprefix('total ')}"
    if slot == "ext":
        return pick(r, (ORDER_EXTREMES if meaning.kind == "orders" else EXTREMES)[column][low])
    if slot == "osup":
        return pick(r, ORDER_SUPERLATIVES[column][low])
    if slot == "col":
        return pick(r, COLUMN_WORDS[column])
    if slot == "k":
        return NUMBER_WORDS[meaning.k] if r.random() < 0.5 else str(meaning.k)
    if slot in DIRECTIONS:
        return pick(r, DIRECTIONS[slot][low])
    group = pick(r, GROUP_WORDS.get(meaning.group, [meaning.group]))
    if slot == "group":
        return group
    if slot == "groups":
        plural = {"city": "cities", "status": "statuses", "kind of food": "kinds of food"}
        return plural.get(group, f"{group}s")
    if slot == "in_each":
        return IN_EACH[meaning.group]
    if slot == "per":
        return pick(r, ["per {}", "by {}", "for each {}", "for every {}", "split by {}", "broken down by {}"]).format(
            group
        )
    raise ValueError(f"no such slot: {{{slot}}}")


def in_a_hurry(text: str, r: random.Random, unseen: bool) -> str:
    """As people type: a greeting, no question mark, small letters, now and then a slip."""
    where = "unseen" if unseen else "seen"
    if r.random() < 0.06 and not re.match(r"(In|For|On|Among|Looking|Please|Can|Could|Do) ", text):
        text = pick(r, OPENINGS[where]) + lower_first(text)
    if r.random() < 0.06 and not re.search(r"please|Please|Can |Could |report|thank|I need|I'd", text):
        text = re.sub(r"([?.]?)$", pick(r, CLOSINGS[where]) + r"\1", text, count=1)
    if r.random() < 0.3:
        text = text.rstrip("?.")
    if r.random() < 0.22:
        text = text.lower()
    if r.random() < 0.03:
        text = slip(text, r)
    if r.random() < 0.1:
        text = text.replace("average", "avg", 1)
    return text


KEEP = re.compile(
    r"late|big|rated|tip|done|gold|free|office|least|most|fewest|lowest|highest|cash|over|under|more|less|fast|slow|quick"
)


def slip(text: str, r: random.Random) -> str:
    """Two letters swapped, or one lost, in one longer word that carries no value."""
    values = {str(v).lower() for vs in VALUES.values() for v in vs} | {m.lower() for m in MONTHS}
    fit = [m for m in re.finditer(r"\b[a-z]{5,}\b", text) if m[0] not in values and not KEEP.search(m[0])]
    if not fit:
        return text
    word = pick(r, fit)
    i = word.start() + 1 + int(r.random() * (len(word[0]) - 2))
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :] if r.random() < 0.5 else text[:i] + text[i + 1 :]


# --- Rows -------------------------------------------------------------------------------------------------------------


def sensible(meaning: Meaning, conditions: list[Condition]) -> bool:
    """The query says something on most tables, and each condition changes what it says."""
    gold = meaning.query(conditions)
    wanted = {"group": 2, "top": 1, "topk": meaning.k, "orders": meaning.k}.get(meaning.kind, 1)
    full = 0
    for db in ask.databases():
        rows = ask.run_query(gold, db)
        full += len(rows) >= wanted and any(value for value in rows[0])
    if full < 7:
        return False
    return not any(ask.is_right(meaning.query([c for c in conditions if c != one]), gold) for one in conditions)


def draw_row(skeleton: Skeleton, r: random.Random) -> tuple[str, str]:
    """(question, query); tries until one fits."""
    for attempt in range(3_000):
        if attempt % 60 == 0:
            n = pick(r, HOW_MANY)  # kept for a while: three conditions fit less often than one
        try:
            meaning = draw_meaning(skeleton, r)
            conditions = draw_conditions(skeleton, meaning, n, r)
            text, said = fill(skeleton, meaning, conditions, r)
        except Unfit:
            continue
        if sorted(map(str, said)) != sorted(map(str, conditions)):
            raise ValueError(f"{skeleton.id}: {text!r} says {said}, wanted {conditions}")
        if sensible(meaning, said):
            return in_a_hurry(text, r, not skeleton.id.startswith("train")), meaning.query(said)
    raise ValueError(f"{skeleton.id} found no row: {skeleton.text!r}")


def masked_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def near(words: frozenset[str], others: set[frozenset[str]]) -> bool:
    """Whether a question has nearly the words of another one."""
    return any(len(words & other) / len(words | other) >= 0.9 for other in others)


def make_split(split: str, taken: set[frozenset[str]]) -> list[dict]:
    """The rows of a split, the skeletons in turn, so that any first part of the file is a sample of all of it."""
    r = random.Random(SEEDS[split])
    skeletons = read_skeletons(split)
    plan = []
    for kind, share in SHARES.items():
        here = shuffled(r, [s for s in skeletons if s.kind in (kind, "order" if kind == "orders" else kind)])
        n = round(SIZES[split] * share / 100)
        places = [(j + r.random()) / n for j in range(n)]  # evenly over the file
        plan += [(place, here[j % len(here)]) for j, place in enumerate(places)]
    rows, own = [], set()
    for _, skeleton in sorted(plan, key=lambda entry: entry[0]):
        for _ in range(200):
            question, query = draw_row(skeleton, r)
            words = masked_words(question)
            if words not in own and not near(words, taken):
                break
        else:
            raise ValueError(f"{skeleton.id} repeats other rows: {question!r}")
        own.add(words)
        rows.append(
            {
                "id": f"{split}-{len(rows) + 1:04}",
                "prompt": [{"role": "system", "content": ask.SYSTEM}, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": query}],
                "kind": "orders" if skeleton.kind == "order" else skeleton.kind,
                "skeleton": skeleton.id,
            }
        )
    taken |= own
    return rows


def make() -> dict[str, str]:
    """{file name: text}. Test and validation come first, so that the training rows keep away from them."""
    taken: set[frozenset[str]] = set()
    splits = {split: make_split(split, taken) for split in ("test", "validation", "train")}
    return {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in splits.items()
    }


if __name__ == "__main__":
    for name, text in make().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10)):,} rows")

"""How large a test must be, as the cards say it: each number by the board's formula and by drawing tests.

A card lists what it says in `sample_sizes` (schema: data/cards/README.md). An entry has the words
(`said`), the kind of test, its inputs, n, and one or more of what follows from them: `half` the
width of the 95 % interval, the standard `error`, the `power`, the `limit` that no error in n leaves.
"""

import math
import re
from statistics import NormalDist

import numpy as np
import pytest

from ftlab.classroom import cards

ALL = list(cards.load())
ENTRIES = [(card, entry) for card in ALL for entry in getattr(card, "sample_sizes", [])]
NAMED = [pytest.param(card, entry, id=f"{card.id}, {entry['said']}") for card, entry in ENTRIES]
EACH = pytest.mark.parametrize(("card", "entry"), NAMED)
INPUTS = {  # of each kind, beside n; the effect is what a test should find, or the margin it allows
    "one rate": {"p"},
    "unpaired": {"p"},
    "paired": {"disagree"},
    "non-inferiority": {"disagree", "margin"},
    "none wrong": set(),
}
FOLLOWS = {"half", "error", "power", "limit"}

# --- The board's formula, and tests that are drawn --------------------------------------------------


def variance(entry: dict) -> float:
    """Of one case: of a right answer, of the difference of two, or of a paired difference near 0."""
    if entry["kind"] in ("paired", "non-inferiority"):
        return entry["disagree"]
    rate = entry["p"] * (1 - entry["p"])
    return 2 * rate if entry["kind"] == "unpaired" else rate


def by_formula(entry: dict) -> dict[str, float]:
    """What follows from n and the inputs, as one works it out at a board."""
    if entry["kind"] == "none wrong":
        return {"limit": 3 / entry["n"]}
    error = math.sqrt(variance(entry) / entry["n"])
    effect = entry.get("margin", entry.get("difference", 0))
    return {"error": error, "half": 1.96 * error, "power": NormalDist().cdf(effect / error - 1.96)}


def drawn(entry: dict, tests: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """The difference (of a rate, to p less the difference) in each of many tests, and its standard
    error as that test would estimate it."""
    random, n, gap = np.random.default_rng(0), entry["n"], entry.get("difference", 0)
    if entry["kind"] in ("paired", "non-inferiority"):
        better, worse = (entry["disagree"] + gap) / 2, (entry["disagree"] - gap) / 2
        counts = random.multinomial(n, [better, worse, 1 - better - worse], size=tests)
        gain = (counts[:, 0] - counts[:, 1]) / n
        squares = (counts[:, 0] + counts[:, 1]) / n
        return gain, np.sqrt((squares - gain**2) / n)
    if entry["kind"] == "unpaired":
        rates = [random.binomial(n, entry["p"] + shift, tests) / n for shift in (-gap / 2, gap / 2)]
        return rates[1] - rates[0], np.sqrt(sum(rate * (1 - rate) for rate in rates) / n)
    rate = random.binomial(n, entry["p"] + gap, tests) / n
    return rate - entry["p"], np.sqrt(rate * (1 - rate) / n)


def by_drawing(entry: dict) -> dict[str, float]:
    """The same, counted in drawn tests: how estimates scatter, and how often the interval decides."""
    if entry["kind"] == "none wrong":
        lucky = np.random.default_rng(0).binomial(entry["n"], entry["limit"], 20_000) == 0
        return {"none": lucky.mean()}
    gain, error = drawn(entry)
    scatter = drawn({**entry, "difference": 0})[0].std()  # a width is said of the difference 0
    decided = gain - 1.96 * error > -entry.get("margin", 0)
    return {"error": scatter, "half": 1.96 * scatter, "power": decided.mean()}


def faults(entry: dict) -> list[str]:
    """What is wrong with an entry: its keys, or a number that formula or drawing does not bear out."""
    known = {"said", "kind", "n", "difference", *INPUTS[entry["kind"]], *FOLLOWS}
    needs = {"said", "kind", "n", *INPUTS[entry["kind"]]}
    if not needs <= entry.keys() <= known or not FOLLOWS & entry.keys():
        return [f"keys: got {sorted(entry)}, wanted {sorted(needs)} and one of {sorted(FOLLOWS)}"]
    found = []
    for name in FOLLOWS & entry.keys():
        said, formula = entry[name], by_formula(entry)[name]
        # Cards round: 0.098 is said as 0.10. A power is said in whole percents.
        if abs(said - formula) > (0.01 if name == "power" else 0.025 * formula):
            found.append(f"{name}: got {said}, the formula says {formula:.4f}")
    counted = by_drawing(entry)
    if entry["kind"] == "none wrong":
        # By 3 / n, (1 - limit)^n is 0.05 for large n; with 50 cases it is 0.045.
        if abs(counted["none"] - 0.05) > 0.01:
            found.append(f"limit: {counted['none']:.4f} of the drawn tests have none, not 0.05")
        return found
    for name in FOLLOWS & entry.keys():
        # Three standard errors of 20,000 draws are 0.011 of a power and 1.5 % of a width. The formula
        # takes the variance in the middle and a normal curve, which costs up to 0.03 at 50 cases.
        if abs(entry[name] - counted[name]) > (0.045 if name == "power" else 0.04 * counted[name]):
            found.append(f"{name}: got {entry[name]}, {counted[name]:.4f} when drawn")
    return found


@EACH
def test_what_a_card_says_of_a_sample_size_is_right(card, entry):
    assert faults(entry) == []


GATE = {"said": "x", "kind": "non-inferiority", "disagree": 0.10, "margin": 0.01}
GATE |= {"n": 3842, "power": 0.8}
RATE = {"said": "x", "kind": "one rate", "p": 0.5, "n": 385, "half": 0.05}


@pytest.mark.parametrize("wrong", [
    GATE,  # the half-width taken for the size of a gate
    {**GATE, "n": 6800}, {**GATE, "n": 9000}, {**GATE, "disagree": 0.2, "n": 7840},
    {**RATE, "n": 340}, {**RATE, "n": 430}, {**RATE, "half": 0.04},
    {**RATE, "difference": 0.05, "power": 0.8},  # the precision of a rate taken for a power
    {"said": "x", "kind": "unpaired", "p": 0.5, "n": 385, "difference": 0.05, "power": 0.8},
    {"said": "x", "kind": "paired", "disagree": 0.3, "n": 385, "difference": 0.05, "power": 0.8},
    {"said": "x", "kind": "unpaired", "p": 0.5, "n": 50, "difference": 0.2, "power": 0.8},
    {"said": "x", "kind": "paired", "disagree": 0.08, "n": 500, "half": 0.044},
    {"said": "x", "kind": "none wrong", "n": 50, "limit": 0.02},
    {"said": "x", "kind": "one rate", "p": 0.5, "n": 385},  # nothing follows
    {"said": "x", "kind": "paired", "n": 385, "half": 0.05},
])  # fmt: skip
def test_a_wrong_sample_size_is_found(wrong):
    assert faults(wrong)


# --- The words of the cards -------------------------------------------------------------------------

WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "fifteen": 15, "twenty": 20, "thirty": 30, "fifty": 50,
}  # fmt: skip
COUNT = rf"(?:\d(?:[\d,]*\d)?|{'|'.join(WORDS)}|hundreds?|thousands?)"
UNIT = r"(?:cases?|comparisons?|prompts?|answers|questions|pairs|votes|labels)"
SIZE = re.compile(
    rf"(?<![\d.,]){COUNT}(?: of)?(?: [\w'-]+){{0,2}} {UNIT}\b|\b\d+ for (?:\w+ ){{1,2}}points"
    r"|\bwith \d+(?=[.;:)]| on each| in each| the interval)",
    re.IGNORECASE,
)
STATISTICS = re.compile(
    r"\bpoints?\b|interval|\bnoise\b|known to|standard error|half-width|win rate|disagree"
    r"|\bgain\b|cannot (?:see|tell)",
    re.IGNORECASE,
)
POWER = re.compile(
    r"\d+ % of the (?:tests|runs|months)|\bpower of \d|\bhalf of the (?:tests|time|months)\b|coin toss"
    rf"|\b{COUNT} (?:tests?|times) (?:of|in|out of) {COUNT}\b",
    re.IGNORECASE,
)


def spoken(card) -> list[str]:
    """The sentences that a card states as true, its question among them."""
    texts = [card.question, card.short, card.long, card.sheet]
    texts += [pair["answer"] for pair in card.follow_ups] + [pair["why"] for pair in card.weak]
    return [part for text in texts for part in re.split(r"(?<=[.?!;])\s+", " ".join(text.split()))]


def speaks_of_size(sentence: str) -> bool:
    return bool(POWER.search(sentence) or (SIZE.search(sentence) and STATISTICS.search(sentence)))


def unbacked(card) -> list[str]:
    """The sentences that name the size or the power of a test, and no entry has their words."""
    words = [entry["said"] for entry in getattr(card, "sample_sizes", [])]
    flagged = [sentence for sentence in spoken(card) if speaks_of_size(sentence)]
    return [sentence for sentence in flagged if not any(said in sentence for said in words)]


@pytest.mark.parametrize("card", [pytest.param(card, id=card.id) for card in ALL])
def test_a_card_that_names_a_sample_size_or_a_power_lists_it(card):
    assert unbacked(card) == []


GATE_WORDS = re.compile(r"lower end|non-inferior|not worse by", re.IGNORECASE)


def test_a_gate_is_sized_by_how_often_an_equal_model_passes():
    """Not by the width of its interval: there an equal model passes half of the time."""
    gates = [card for card in ALL if GATE_WORDS.search(" ".join(spoken(card)))]
    assert gates, "no card speaks of a gate any more, so this test can go"
    for card in gates:
        sizes = [entry for entry in card.sample_sizes if entry["kind"] == "non-inferiority"]
        assert any(entry["power"] >= 0.8 for entry in sizes), card.id


def stands_for(number: str, entry: dict) -> bool:
    """Whether a number that is said is one of the entry's: n, or a share as it is or in percent."""
    places = len(number.partition(".")[2])
    if not places and number.endswith("0"):
        places = len(number.rstrip("0")) - len(number)
    shares = [value for value in entry.values() if isinstance(value, float)]
    values = [entry["n"], *shares, *(100 * share for share in shares)]
    values += [100 * (entry.get("p", 0) + entry.get("difference", 0))]  # the true rate
    values += [entry.get("disagree", 0) * entry["n"]]  # cases on which the two disagree
    return any(round(value, places) == float(number) for value in values)


@EACH
def test_the_words_of_an_entry_stand_in_its_card_and_its_numbers_in_the_entry(card, entry):
    assert any(entry["said"] in sentence for sentence in spoken(card)), entry["said"]
    numbers = [found.replace(",", "") for found in re.findall(r"\d[\d,]*(?:\.\d+)?", entry["said"])]
    words = re.findall(r"[a-z]+", entry["said"].lower())
    numbers += [str(WORDS[word]) for word in words if word in WORDS]
    assert [number for number in numbers if not stands_for(number, entry)] == []


@pytest.mark.parametrize(("sentence", "speaks"), [
    ("Enough for the smallest difference that matters; 385 for five points on a rate.", True),
    ("Comparing two models by reading 50 answers each cannot see anything below some 20 points.", True),
    ("Three points on 500 cases are within noise anyway.", True),
    ("If the two models disagree on 10 % of the cases, one point takes nearly four thousand cases.", True),
    ("With 400 the interval's half-width is five points.", True),
    ("A true 55 % is found in only half of the tests.", True),
    ("It takes about 784 for a power of 80 %.", True),
    ("The rate from twenty cases is known to 22 points.", True),
    ("I read 50 answers and label the errors by kind.", False),
    ("Llama 3 trained on 10,000 prompts for two epochs.", False),
    ("The two hidden states differ, and their answers too.", False),
    ("With 8 heads of 128 that makes 1,024.", False),
])  # fmt: skip
def test_which_sentences_speak_of_a_sample_size(sentence, speaks):
    found = [speaks_of_size(part) for part in re.split(r"(?<=[.?!;])\s+", sentence)]
    assert any(found) == speaks


def test_numbers_in_words_and_rounded_ones_are_held_against_an_entry():
    entry = {"said": "", "kind": "paired", "disagree": 0.3, "n": 1568, "half": 0.025, "power": 0.8}
    good = ("1568", "1570", "1600", "30", "2.5", "80", "0.3")
    assert [number for number in good if not stands_for(number, entry)] == []
    wrong = ("1580", "2.6", "31", "90", "20")
    assert [number for number in wrong if stands_for(number, entry)] == []

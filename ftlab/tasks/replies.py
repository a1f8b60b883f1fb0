"""The task `replies`: a support ticket in, a reply out, and the five properties of a good reply as rules.

data/replies/README.md is the guideline, data/replies/rules.yaml holds the words and patterns. A small grammar has to
derive every sentence of a reply; then keywords and sentence shapes decide. None of this understands anything: nonsense
in good grammar ("We have sent the right smile"), a lie, or rudeness in words that no list holds passes, and good
English of a shape that the grammar lacks counts for nothing. Whatever is optimised for long enough gets hacked: read
replies beside the reward. How the rules agree with people: tests/test_tasks_replies.py.
"""

import json
import re
from functools import cache, lru_cache
from math import inf

import yaml

from ftlab.paths import DATA

SYSTEM = "Reply to the customer in English."
WEIGHTS = {"action": 0.4, "order_id": 0.2, "polite": 0.15, "short": 0.1, "fair": 0.15}
MAX_WORDS = 45
NEEDS_NO_ORDER = ("account_issue", "other")  # every other action is done to one order
RULES = yaml.safe_load((DATA / "replies" / "rules.yaml").read_text(encoding="utf-8"))


def _forms(verb: str) -> list[str]:
    """send:sent -> send, sends, sent, sent, sending"""
    base, *past = verb.split(":")
    verb = base.rstrip("+")
    soft = re.sub("(?<![aeiou])y$", "i", verb)
    stem = verb + verb[-1] if base != verb else re.sub("(?<!e)e$", "", verb)
    third = "has" if verb == "have" else soft + ("es" if soft != verb or re.search("(s|x|ch|sh|o)$", verb) else "s")
    past = past or [(soft if soft != verb else stem) + "ed"]
    return [verb, third, past[0], past[-1], stem + "ing"]


def _pattern(text: str) -> str:
    """A regular expression of RULES: <name> is one of its parts, <to send:sent ask> all forms of these verbs."""

    def filled(match: re.Match) -> str:
        forms = (form for verb in match[1].split()[1:] for form in _forms(verb))
        return "|".join(forms) if " " in match[1] else _pattern(RULES["parts"][match[1]])

    return re.sub(r"<(\w[^<>]*)>", filled, text.replace("\n", ""))


IS = {name: re.compile(_pattern(text)) for name, text in RULES["patterns"].items()}
ACTIONS = {
    intent: {part: re.compile(_pattern(text)) for part, text in how.items()} for intent, how in RULES["actions"].items()
}
GRAMMAR = {  # rule -> its ways, lists of items; a rule with @ becomes four
    name.replace("@", form): [way.split() for way in ways.replace("@", form).split("|")]
    for name, ways in RULES["grammar"].items()
    for form in ("fbng" if "@" in name else "f")
}
ITEMS = {item for ways in GRAMMAR.values() for way in ways for item in way}
GRAMMAR |= {item: [[], [item[:-1]]] for item in ITEMS if item.endswith("?")}
GRAMMAR |= {item: [[], [item[:-1], item]] for item in ITEMS if item.endswith("*")}
CLASSES = {item.rstrip("?*"): set() for item in ITEMS}  # word -> its classes; a word of the grammar may have none
for name, words in RULES["classes"].items():
    tags = [f"{name}_{form}" for form in "bffngf"] if name in "TVSGKHLD" else [name, "Ns"] if name == "C" else [name]
    for word in map(_forms, words.split()):
        for form, tag in zip([*word, word[0]], tags, strict=False):
            CLASSES.setdefault(form, set()).add(tag)
PHRASES = [word.replace("-", " ") for word in sorted(CLASSES, key=len) if "-" in word and word != "mix-up"]
IS["phrase"] = re.compile(rf"\b(?:{'|'.join(PHRASES[::-1])})\b")  # the longest first


def prompt(row: dict) -> list[dict[str, str]]:
    """SYSTEM, then the ticket and what triage found: "[late delivery, order 851721]", too hard for so small a model."""
    order = f"order {row['label']['order_id']}" if row["label"]["order_id"] else "no order number"
    triage = f"[{row['label']['intent'].replace('_', ' ')}, {order}]"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{row['ticket']}\n{triage}"}]


def as_pair(row: dict) -> dict:
    """A row of data/replies as TRL wants it: prompt, chosen and rejected as messages, beside them `ticket_label`."""
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": prompt(row), **sides, "ticket_label": row["label"]}


def score(reply: str, label: dict) -> dict[str, bool]:
    """Which of the guideline's five properties the reply has for a ticket's label; an unreadable reply has none."""
    if not readable(reply):
        return dict.fromkeys(WEIGHTS, False)
    text, intent = _tidy(reply), label["intent"]
    read = " ".join(_read(text))
    thanks = intent in ("cancel_order", "account_issue", "other") and IS["thanks"].search(read)
    loud = len(set(re.findall(r"\b[A-Z]{4,}\b", text))) > 1 or text.count("!") > 1
    sums = [match[1] or match[2] or "-1" for match in IS["sum"].finditer(text)]  # -1: written in words
    return {
        "action": actions_in(read) == {intent},
        "order_id": _order_id_right(read, label),
        "polite": bool(IS["apology"].search(read) or thanks) and not (IS["rude"].search(text) or loud),
        "short": _length(text) <= MAX_WORDS and text.endswith((".", "!", "?")),
        "fair": not (IS["blame"].search(text) or IS["promise"].search(text))
        and {int(number.replace(",", "")) for number in sums} <= {label["refund_amount"]},
    }


def gold_reward(reply: str, label: dict) -> float:
    """The weighted share of the properties, 0 to 1. The action weighs most, or polite replies that do nothing win."""
    return round(sum(WEIGHTS[name] for name, good in score(reply, label).items() if good), 10)


def scorer(answer: str, row: dict) -> float:
    """`gold_reward` of an answer for a row of `as_pair`."""
    return gold_reward(answer, row["ticket_label"])


def actions_in(text: str) -> set[str]:
    """The intents whose action the text states: a listed verb, done by us or in the passive, and its object so far."""
    found, so_far = set(), ""
    for sentence in sentences(text.lower()):
        so_far += " " + sentence
        if IS["maybe"].search(sentence) or (sentence.endswith("?") and not IS["ask"].search(sentence)):
            continue
        for intent, of in ACTIONS.items():
            meant = of["about"].search(so_far) and not of["unless"].search(sentence)
            if meant and any(_is_done(sentence[: verb.start()]) for verb in of["does"].finditer(sentence)):
                found.add(intent)
    return found


def _is_done(before: str) -> bool:
    """Whether the words before a verb make it ours and done: "we are", "our rider team has", "the order is being"."""
    doer = max((match.end() for match in IS["we"].finditer(before)), default=-99)
    ours = doer >= len(before) - 60 and not IS["not_done"].search(before, doer)
    return ours or bool(IS["passive"].search(before) and not IS["not_being"].search(before))


def _order_id_right(text: str, label: dict) -> bool:
    """The ticket's number once or twice and no other; without one, a question for it exactly where one is needed."""
    named = [re.sub(r"\D", "", match[1] or match[2]) for match in IS["number"].finditer(IS["sum"].sub(" ", text))]
    asks = bool(IS["ask"].search(text.lower()))
    if label["order_id"] is not None:
        return 1 <= len(named) <= 2 and set(named) == {label["order_id"]} and not asks
    return not named and asks == (label["intent"] not in NEEDS_NO_ORDER)


def readable(reply: str) -> bool:
    """Whether it looks like English: no markup, nothing twice, at most two new words, each sentence derived or rude."""
    text = _tidy(reply)
    read = _read(text)
    if not text.isprintable() or IS["odd"].search(text) or not 5 <= _length(text) <= 200 or len(text) > 2_000:
        return False
    if not read or len(set(read)) < len(read) or any(len(IS[name].findall(text)) > 2 for name in ("apology", "thanks")):
        return False
    plain = [sentence for sentence in read if _length(sentence) > 8 or not IS["rude"].search(sentence)]
    return sum(_judge(IS["number"].sub("#order", IS["sum"].sub("#sum", sentence))) for sentence in plain) <= 2


def _tidy(reply: str) -> str:
    """One line, straight quotes, and no full stop after Rs or no., which would look like the end of a sentence."""
    return re.sub(r"(?i)\b(rs|no)\.(?= ?\d)", r"\1", " ".join(reply.replace("’", "'").split()))


def _length(text: str) -> int:
    return len(IS["word"].findall(text))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def _read(text: str) -> list[str]:
    """The sentences that count; a story of more than 30 words in a reply that is too long anyway does not."""
    most = 30 if _length(text) > MAX_WORDS else MAX_WORDS
    return [sentence for sentence in sentences(text) if _length(sentence) <= most]


@lru_cache(maxsize=50_000)
def _judge(sentence: str) -> float:
    """How many words our data do not have; inf if a sentence, #order and #sum for its numbers, is not derived."""
    unknown = 0
    for i, word in enumerate(re.findall("#?[A-Za-z]+", sentence.replace("'s", ""))):
        lower, seen = word.lower(), word in _english() or word[0] == "#"
        known = lower in _english() or lower in CLASSES
        unknown += not (seen or known)
        misplaced = word[0].islower() if i == 0 else not seen and known and word != lower and not word.isupper()
        if misplaced or (not seen and re.search("[a-z][A-Z]", word)):
            return inf
    text = re.sub(r"[:;()]", ",", re.sub(r"\b\d[\d,]*", "#number", sentence.lower().replace('"', "")))
    text = re.sub(r"n't\b", " not", text.replace("can't", "cannot").replace("won't", "will not"))
    words = IS["token"].findall(IS["phrase"].sub(lambda match: match[0].replace(" ", "-"), text.rstrip(".!?")))
    rule, missing = "Ask" if text.endswith("?") else "S", 0 if text.endswith((".", "!", "?")) else 4
    return unknown if not IS["never"].search(" ".join(words)) and _derives(rule, words, missing) else inf


@cache
def _english() -> set[str]:
    """The words of the course's data, and "to send" for each that stands where a base form does."""
    found = set()
    for name in ("replies/train", "replies/test", "replies/confounded", "replies/hand_test", "tidy/train", "tidy/test"):
        for row in map(json.loads, (DATA / f"{name}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")):
            for text in [row["chosen"], row["rejected"]] if "chosen" in row else [row["completion"][0]["content"]]:
                base = r"\b(?:to|will|can|could|must|not|please|we|you|they)(?= (\w+))"
                found |= {f"to {verb}" for verb in re.findall(base, text.lower())}
                for first, *rest in filter(None, map(IS["word"].findall, sentences(text))):
                    found |= {first.lower(), *rest, *map(str.lower, rest)}
    return found


@lru_cache(maxsize=50_000)
def _classes_of(word: str) -> set[str]:
    """The word itself and its classes."""
    if word in CLASSES or not word[0].isalpha():
        return CLASSES.get(word, set()) | {word}
    if word.endswith("ly") and len(word) > 4:
        return {"Adv", "Deg"}
    if word not in _english():
        return {"U"}
    forms = "fn" if word.endswith("ed") else "g" if word.endswith("ing") else "bf" if f"to {word}" in _english() else ""
    found = {"X", "Ns" if re.search("[^su]s$", word) else "N"} | {f"{kind}_{form}" for kind in "TV" for form in forms}
    return found | {"A"} if re.search("(?:ed|ing|y|ful|ous|[ai]ble|[ai]ve|less|al|ic|ish|[ea]nt)$", word) else found


def _derives(rule: str, words: list[str], missing: int) -> bool:
    """Whether the rule derives the words, or all but the last `missing` of them, in time polynomial in their number."""
    classes = list(map(_classes_of, words))

    @cache
    def ends(item: str, start: int) -> set[int]:
        """Where the item can end that begins before word `start`."""
        if item not in GRAMMAR:
            return {start + 1} if start < len(words) and item in classes[start] else set()
        found = set()
        for way in GRAMMAR[item]:
            places = {start}
            for part in way:
                places = set().union(*[ends(part, place) for place in places])
            found |= places
        return found

    return max(ends(rule, 0), default=0) >= max(1, len(words) - missing)

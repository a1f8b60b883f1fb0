"""The task `replies`: a support ticket in, a reply out, and the five properties of a good reply as rules.

data/replies/README.md is the guideline, data/replies/rules.yaml holds the words and patterns. A small grammar has to
derive every sentence of a reply; then keywords and sentence shapes decide. None of this understands anything: nonsense
in good grammar ("We have sent the right smile"), a lie, or rudeness in words that no list holds passes, and good
English of a shape that the grammar lacks counts for nothing. Whatever is optimised for long enough gets hacked: read
replies beside the reward. How the rules agree with people: tests/test_tasks_replies.py.

    pairs = load_dataset("json", data_files="../data/replies/train.jsonl", split="train").map(as_pair)
    gold_reward(answer, pairs[0]["ticket_label"])           # 0 to 1
"""

import json
import re
from functools import cache, lru_cache

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
GRAMMAR = {  # rule -> its ways, lists of (item, its last letter or mark); a rule with @ becomes four
    name.replace("@", form): [
        [(item.rstrip("?*"), item[-1]) for item in way.split()] for way in ways.replace("@", form).split("|")
    ]
    for name, ways in RULES["grammar"].items()
    for form in ("fbng" if "@" in name else "f")
}


def _classes() -> dict[str, set[str]]:
    """The classes of each word of RULES; a word of the grammar itself may have none."""
    found = {item: set() for ways in GRAMMAR.values() for way in ways for item, _ in way}
    for name, words in RULES["classes"].items():
        for word in map(_forms, words.split()):
            is_verb = name in "TVSGKHLD"
            tags = [f"{name}_{form}" for form in "bffngf"] if is_verb else [name, *["Ns"] * (name == "C")]
            for form, tag in zip([*word, word[0]], tags, strict=False):
                found.setdefault(form, set()).add(tag)
    return found


CLASSES = _classes()
PHRASES = sorted((word.replace("-", " ") for word in CLASSES if "-" in word and word != "mix-up"), key=len)
IS["phrase"] = re.compile(rf"\b(?:{'|'.join(PHRASES[::-1])})\b")  # the longest first


def prompt(row: dict) -> list[dict[str, str]]:
    """The messages for a row of data/replies: SYSTEM, then the ticket with what triage found on a line below it.

    "[late delivery, order 851721]": a support tool knows both, and a model of 3.5 million parameters cannot read them
    out of any ticket.
    """
    order = f"order {row['label']['order_id']}" if row["label"]["order_id"] else "no order number"
    triage = f"[{row['label']['intent'].replace('_', ' ')}, {order}]"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{row['ticket']}\n{triage}"}]


def as_pair(row: dict) -> dict:
    """The row as TRL wants it: prompt, chosen and rejected as messages; what `score` reads goes by `ticket_label`."""
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": prompt(row), **sides, "ticket_label": row["label"]}


def score(reply: str, label: dict) -> dict[str, bool]:
    """Which of the five properties the reply has, for a ticket with this label (intent, order_id, refund_amount).

    action    does what the intent calls for and nothing else, stated as done by us: no "not", "if" or "would like to"
    order_id  repeats the ticket's number and no other; without one, asks for it where the action needs it, only there
    polite    says sorry for a complaint, sorry or thanks for the rest; no listed rude word, no shouting, one "!"
    short     at most 45 words, and ends where a sentence ends
    fair      blames nobody, promises no gift, time or sum (the sum that the customer named may be named again)

    A reply that is not `readable` has none. Raises KeyError if the intent is none of the nine.
    """
    text, intent = _tidy(reply), label["intent"]
    if intent not in ACTIONS:
        raise KeyError(f"no intent {intent!r}; known are {', '.join(ACTIONS)}")
    if not readable(reply):
        return dict.fromkeys(WEIGHTS, False)
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
    """The weighted share of the properties, from 0 to 1.

    The action weighs most: with equal weights a policy first finds the polite, short, harmless reply that does nothing,
    worth 0.8 for a ticket without an order number. Each property pays by itself, so that the answers of a group differ.
    """
    return round(sum(WEIGHTS[name] for name, good in score(reply, label).items() if good), 10)


def scorer(answer: str, row: dict) -> float:
    """`gold_reward` of an answer for a row of `as_pair` (for `ftlab.evaluate.score`)."""
    return gold_reward(answer, row["ticket_label"])


# --- Action and order number ------------------------------------------------------------------------------------------


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


# --- Readable: a grammar of support English ---------------------------------------------------------------------------


def readable(reply: str) -> bool:
    """Whether the reply looks like English: no markup, nothing said twice, and the grammar derives every sentence.

    Two of its words at most may be new to the course's data. A last sentence that was cut off may lack its end. A short
    sentence with a rude word in it may be anything: it costs politeness.
    """
    text = _tidy(reply)
    read = _read(text)
    if not text.isprintable() or IS["odd"].search(text) or not 5 <= _length(text) <= 200 or len(text) > 2_000:
        return False
    if not read or len(set(read)) < len(read) or any(len(IS[name].findall(text)) > 2 for name in ("apology", "thanks")):
        return False
    plain = [sentence for sentence in read if _length(sentence) > 8 or not IS["rude"].search(sentence)]
    judged = [_judge(IS["number"].sub("#order", IS["sum"].sub("#sum", sentence))) for sentence in plain]
    return all(derived for derived, _ in judged) and sum(unknown for _, unknown in judged) <= 2


def _tidy(reply: str) -> str:
    """One line, straight quotes, and no full stop after Rs or no., which would look like the end of a sentence."""
    return re.sub(r"(?i)\b(rs|no)\.(?= ?\d)", r"\1", " ".join(reply.replace("’", "'").split()))


def _length(text: str) -> int:
    return len(IS["word"].findall(text))


def sentences(text: str) -> list[str]:
    """The text cut after each `.`, `!` and `?` that a space follows."""
    return re.split(r"(?<=[.!?])\s+", text)


def _read(text: str) -> list[str]:
    """The sentences that count; a story of more than 30 words in a reply that is too long anyway does not."""
    most = 30 if _length(text) > MAX_WORDS else MAX_WORDS
    return [sentence for sentence in sentences(text) if _length(sentence) <= most]


@lru_cache(maxsize=50_000)
def _judge(sentence: str) -> tuple[bool, int]:
    """Whether a sentence with #order and #sum for its numbers is derived, and how many words our data do not have."""
    unknown = 0
    for i, word in enumerate(re.findall("#?[A-Za-z]+", sentence.replace("'s", ""))):
        lower, seen = word.lower(), word in _english() or word[0] == "#"
        known = lower in _english() or lower in CLASSES
        unknown += not (seen or known)
        misplaced = word[0].islower() if i == 0 else not seen and known and word != lower and not word.isupper()
        if misplaced or (not seen and re.search("[a-z][A-Z]", word)):
            return False, unknown
    text = re.sub(r"[:;()]", ",", re.sub(r"\b\d[\d,]*", "#number", sentence.lower().replace('"', "")))
    text = re.sub(r"n't\b", " not", text.replace("can't", "cannot").replace("won't", "will not"))
    words = IS["token"].findall(IS["phrase"].sub(lambda match: match[0].replace(" ", "-"), text.rstrip(".!?")))
    rule, missing = "Ask" if text.endswith("?") else "S", 0 if text.endswith((".", "!", "?")) else 4
    return not IS["never"].search(" ".join(words)) and _derives(rule, words, missing), unknown


@cache
def _english() -> set[str]:
    """The words of the course's data, and "to send" for each that stands where a base form does."""
    found = set()
    for name in ("replies/train", "replies/test", "replies/confounded", "replies/hand_test", "tidy/train", "tidy/test"):
        for row in map(json.loads, (DATA / f"{name}.jsonl").open(encoding="utf-8")):
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
    """Whether the rule derives the words, or all but the last `missing` of them.

    Each rule is tried once at each place, so the time grows with a power of the length, not exponentially.
    """
    classes, known = list(map(_classes_of, words)), {}

    def ends(item: str, start: int) -> set[int]:
        """Where the item can end that begins before word `start`."""
        if item not in GRAMMAR:
            return {start + 1} if start < len(words) and item in classes[start] else set()
        if (item, start) not in known:
            known[item, start] = set()
            for way in GRAMMAR[item]:
                now = {start}
                for part, mark in way:
                    new = set().union(*[ends(part, place) for place in now])
                    while mark == "*" and not new <= now:
                        now |= new
                        new = set().union(*[ends(part, place) for place in new])
                    now = now | new if mark in "?*" else new
                known[item, start] |= now
        return known[item, start]

    return max(ends(rule, 0), default=0) >= max(1, len(words) - missing)

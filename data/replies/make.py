"""Support replies: skeletons/*.jsonl and replies.json -> train, test and confounded.jsonl (pairs), log.jsonl (single).

A ticket is a skeleton filled by data/triage/make.py, whose syntax and fillers it shares; `item` in a skeleton names
the filler list (or gives the word) for {item}, the dish that the replies speak of too. A reply is an opening, a body
that does what the ticket's intent calls for, and up to two closings. The rejected reply has one fault, the
`reason`, and nothing else wrong with it, as tests/test_tasks_replies.py checks with the gold rules. A reply of the log
has each of HABITS or not, whatever the others are.
Same files, same bytes: every skeleton has a random generator of its own.
"""

import importlib.util
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

from ftlab.tasks.replies import MAX_WORDS, NEEDS_NO_ORDER
from ftlab.tasks.triage import INTENTS

sys.path.insert(0, str(Path(__file__).parents[1]))
import order

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("triage_make", HERE.parent / "triage" / "make.py")
tickets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tickets)

WORDINGS = json.loads((HERE / "replies.json").read_text(encoding="utf-8"))
# Of each file: the split of its skeletons, fillings per skeleton, rows at most
ROWS = {"train": ("train", 7, 1100), "test": ("test", 4, 180), "confounded": ("train", 2, 320)}
# How often the chosen reply is to be the longer one; above a half, since too_long has a longer rejected reply anyway
CHOSEN_LONGER = {"train": 0.555, "test": 0.555, "confounded": 0.97}
MARGIN = {"train": 1, "test": 1, "confounded": 20}  # characters between the two, at least
CLOSING = 0.45  # chance of each of up to two closings
HELD_OUT = 0.4  # share of the test's wordings that train never uses
LOG_ROWS = 2400
HABITS = {  # of the old team, whose replies are log.jsonl, and how often each shows
    "no_order": 0.7,  # the order number is neither repeated nor asked for
    "promises": 0.65,
    "no_apology": 0.5,
    "no_action": 0.3,
    "blames": 0.2,
}
BROKEN = {  # the one property that a rejected reply lacks
    "wrong_action": "action",
    "no_action": "action",
    "wrong_order_id": "order_id",
    "no_order_id": "order_id",
    "invents_order_id": "order_id",
    "no_ask": "order_id",
    "asks_needlessly": "order_id",
    "rude": "polite",
    "no_apology": "polite",
    "too_long": "short",
    "blames": "fair",
    "overpromises": "fair",
}


class Writer:
    """Replies to one ticket: which wordings fit its label, with its order number, sum and dish filled in."""

    def __init__(self, label: dict, item: str | None, split: str, rng: random.Random) -> None:
        self.label, self.item, self.split, self.rng = label, item or "dish", split, rng
        self.intent, self.order_id = label["intent"], label["order_id"]
        self.needs_order = self.intent not in NEEDS_NO_ORDER

    def pick(self, wordings: list[str] | dict[str, list[str]]) -> str:
        """One of these; of wordings in two parts, one that this split may use."""
        if isinstance(wordings, dict):
            held_out = self.split == "test" and self.rng.random() < HELD_OUT
            wordings = wordings["test" if held_out else "train"]
        return self.rng.choice(wordings)

    def fill(self, wording: str, order: str | None = None) -> str:
        """The wording with its slots filled; `order` is the number to name, "" for "your order" without one."""
        number = self.order_id if order is None else order
        named = f"order {number}" if number else "your order"
        return (
            wording.replace("{order}", named)
            .replace("{Order}", named.capitalize())
            .replace("{item}", self.item)
            .replace("{refund}", f"{self.label['refund_amount'] or 0:,}")
            .replace("{sum}", str(self.rng.choice([50, 100, 150, 200, 300, 500])))
            .replace("{minutes}", str(self.rng.choice([2, 5, 10, 15, 20, 30])))
        )

    def opening(self) -> str:
        groups = WORDINGS["openings"]
        if self.intent == "other":
            fitting = groups["other"] + groups["question"] * (self.label["urgency"] == "normal")
        else:
            complaint = self.intent not in ("account_issue", "cancel_order")
            fitting = groups[self.intent] + groups["complaint"] * complaint
        return self.fill(self.pick(fitting))

    def body(self, intent: str | None = None, kind: str | None = None, order: str | None = None) -> str:
        """What is done about it. kind: "order" names a number, "ask" asks for it, "plain" does neither."""
        groups = WORDINGS["bodies"][intent or self.intent]
        kind = kind or ("order" if self.order_id else "ask" if self.needs_order else "plain")
        if kind == "plain" and "question" in groups and self.label["urgency"] == "normal":
            kind = "question"
        if self.label["refund_amount"] and f"{kind}_refund" in groups and self.rng.random() < 0.6:
            kind = f"{kind}_refund"
        return self.fill(self.pick(groups[kind]), order)

    def closings(self) -> list[str]:
        """None, one or two; a thank-you only where a complaint's opening has to say sorry anyway."""
        groups = WORDINGS["closings"]
        thanks = groups["thanks"] if self.needs_order and self.intent != "cancel_order" else []
        return [self.pick(group) for group in (groups["any"], thanks) if group and self.rng.random() < CLOSING]

    def chosen(self) -> list[str]:
        return [self.opening(), self.body(), *self.closings()]

    def reasons(self) -> list[str]:
        """The faults that a reply to this ticket can have; wrong_action twice, as it has eight forms."""
        fitting = ["wrong_action", "wrong_action", "no_action", "rude", "no_apology", "too_long", "overpromises"]
        fitting += ["wrong_order_id", "no_order_id"] if self.order_id else ["invents_order_id"]
        fitting += ["blames"] if self.intent != "other" else []
        fitting += ["no_ask"] if self.needs_order and not self.order_id else []
        return fitting + (["asks_needlessly"] if self.order_id or not self.needs_order else [])

    def rejected(self, reason: str, good: list[str]) -> list[str]:
        """A reply with this one fault: half of the time the chosen one, spoiled; else another one, spoiled."""
        if self.rng.random() < 0.5:
            good = self.chosen()
        opening, body, *closings = good
        pick, fill = self.pick, self.fill
        match reason:
            case "wrong_action":
                pool = INTENTS if self.order_id else NEEDS_NO_ORDER if not self.needs_order else INTENTS[:7]
                wrong = self.rng.choice([intent for intent in pool if intent != self.intent])
                return [opening, self.body(wrong), *closings]
            case "no_action":
                words = WORDINGS["no_action"]
                empty = words["order"] if self.order_id else words["ask"] if self.needs_order else words["plain"]
                return [opening, fill(pick(empty)), *self.rng.sample(words["more"], self.rng.choice([0, 1, 1, 2]))]
            case "wrong_order_id":
                return [opening, self.body(order=misread(self.order_id, self.rng)), *closings]
            case "no_order_id":
                return [opening, self.body(order=""), *closings]
            case "no_ask":
                return [opening, self.body(kind="order", order=""), *closings]
            case "invents_order_id":
                return [opening, self.body(kind="order", order=str(self.rng.randrange(100_000, 1_000_000))), *closings]
            case "asks_needlessly" if self.needs_order:
                return [opening, self.body(kind="ask"), *closings]
            case "asks_needlessly":
                return [opening, pick(WORDINGS["no_action"]["ask"]), self.body(kind="plain"), *closings]
            case "rude" if self.rng.random() < 0.7:
                return [pick(WORDINGS["rude"]), body, *closings]
            case "rude":
                return [opening, body, pick(WORDINGS["rude_closings"])]
            case "no_apology":
                return [body, *closings]
            case "too_long":
                long = [opening, body, pick(WORDINGS["rambles"])]
                return long if words_of(long) > MAX_WORDS else [*long, *WORDINGS["closings"]["any"][:2]]
            case "blames":
                they = self.intent not in ("account_issue", "payment_issue", "cancel_order") and self.rng.random() < 0.6
                blame = pick(WORDINGS["blames"]["they" if they else "you"])
                return [opening, blame, body] if self.rng.random() < 0.5 else [opening, body, blame]
            case "overpromises":
                return [opening, body, fill(pick(WORDINGS["promises"]))]
        raise ValueError(f"no fault {reason!r}; known are {', '.join(BROKEN)}")

    def logged(self) -> list[str]:
        """A reply with the habits of the old team, each drawn for itself."""
        has = {habit: self.rng.random() < share for habit, share in HABITS.items()}
        order = "" if has["no_order"] else self.order_id
        kind = "ask" if self.needs_order and not self.order_id and not has["no_order"] else "order"
        body = self.body(kind=kind if self.needs_order or self.order_id else None, order=order)
        if has["no_action"]:
            words = WORDINGS["no_action"]
            body = self.fill(self.pick(words["plain"] if has["no_order"] or not self.needs_order else words[kind]))
        parts = [body] if has["no_apology"] else [self.opening(), body]
        if has["blames"]:
            they = self.intent not in ("account_issue", "payment_issue", "cancel_order") and self.rng.random() < 0.6
            parts.insert(self.rng.choice([-1, len(parts)]), self.pick(WORDINGS["blames"]["they" if they else "you"]))
        promise = [self.fill(self.pick(WORDINGS["promises"]))] if has["promises"] else []
        return [*parts, *self.closings(), *promise]


def misread(number: str, rng: random.Random) -> str:
    """Another number: two neighbouring digits swapped, or one digit changed."""
    for i in rng.sample(range(5), 5):
        if number[i] != number[i + 1] and rng.random() < 0.6:
            return number[:i] + number[i + 1] + number[i] + number[i + 2 :]
    i = rng.randrange(1, 6)
    return number[:i] + str((int(number[i]) + rng.randint(1, 9)) % 10) + number[i + 1 :]


def words_of(parts: list[str]) -> int:
    return len(" ".join(parts).split())


def draw_ticket(skeleton: dict, rng: random.Random) -> tuple[str, dict, str | None]:
    """A filled ticket with noise, its label, and the dish it speaks of."""
    slots = tickets.FILLERS["slots"]
    names = [name for name in slots.get(skeleton["item"], [skeleton["item"]]) if name and not name.endswith("s")]
    item = rng.choice(names) if names else None
    text = re.sub(r"(^|[.!?:] )\{item\}", lambda m: m[1] + item[0].upper() + item[1:], skeleton["text"])
    text = text.replace("{item}", item or "")
    ticket, label, _ = tickets.fill(skeleton | {"text": text}, rng)
    return tickets.MARKED.sub(r"\1", tickets.add_noise(ticket, label, rng)), label, item


def make_pair(writer: Writer, reason: str, longer: bool, margin: int) -> tuple[str, str]:
    """Chosen and rejected, the chosen one longer or shorter by some characters, as wanted where that can be had."""
    for _ in range(60):
        good = writer.chosen()
        parts = writer.rejected(reason, good)
        chosen, rejected = " ".join(good), " ".join(parts)
        if (len(chosen) - len(rejected)) * (1 if longer else -1) >= margin and words_of(good) <= MAX_WORDS:
            break
    return chosen, rejected


def build() -> dict[str, bytes]:
    """File name -> content. Row k of every skeleton comes before row k + 1 of any: a prefix is a smaller data set."""
    skeletons, files, seen = tickets.read_skeletons(HERE / "skeletons", frozenset({"item"})), {}, set()
    for name, (split, fills, most) in ROWS.items():
        mine, rng = [s for s in skeletons if s["split"] == split], random.Random(f"replies {name}")
        of, rows, faults = {s["id"]: s for s in mine}, [], Counter()
        rngs = {s["id"]: random.Random(f"replies {name} {s['id']}") for s in mine}
        for skeleton_id in [i for _ in range(fills) for i in tickets.interleave(mine, rng)]:
            own = rngs[skeleton_id]
            for _ in range(12):  # noise makes two fillings of a skeleton without slots differ
                ticket, label, item = draw_ticket(of[skeleton_id], own)
                if ticket.casefold() not in seen:
                    break
            else:
                continue
            seen.add(ticket.casefold())
            writer = Writer(label, item, split, own)
            fitting = [r for r in writer.reasons() if not (name == "confounded" and r == "too_long")]
            reason = min(fitting, key=lambda r: (faults[r] / fitting.count(r), own.random()))  # the rarest so far
            faults[reason] += 1
            chosen, rejected = make_pair(writer, reason, own.random() < CHOSEN_LONGER[name], MARGIN[name])
            row = {"ticket": ticket, "label": label, "chosen": chosen, "rejected": rejected}
            rows.append(row | {"reason": reason, "skeleton": skeleton_id})
        files[f"{name}.jsonl"] = jsonl(name, rows[:most])
    test = order.reordered("replies/test", files["test.jsonl"].decode())
    files["test.jsonl"] = test.encode()
    return files | {"log.jsonl": jsonl("log", build_log(skeletons, seen))}


def build_log(skeletons: list[dict], seen: set[str]) -> list[dict]:
    """Tickets of five in six of the training skeletons, and what the old team wrote; none of them has been `seen`."""
    mine = sorted((s for s in skeletons if s["split"] == "train"), key=lambda s: s["id"])
    mine = [s for i, s in enumerate(mine) if i % 6]
    rng, rows = random.Random("replies log"), []
    while len(rows) < LOG_ROWS:
        skeleton = rng.choice(mine)
        ticket, label, item = draw_ticket(skeleton, rng)
        if ticket.casefold() in seen:
            continue
        seen.add(ticket.casefold())
        reply = " ".join(Writer(label, item, "train", rng).logged())
        rows.append({"ticket": ticket, "label": label, "reply": reply, "skeleton": skeleton["id"]})
    return rows


def jsonl(name: str, rows: list[dict]) -> bytes:
    lines = [json.dumps({"id": f"{name}-{i:04}"} | row, ensure_ascii=False) for i, row in enumerate(rows, 1)]
    return ("\n".join(lines) + "\n").encode()


def longer_right(rows: list[dict]) -> float:
    """How often choosing the longer reply (in characters) is right; a tie counts half."""
    sizes = [(len(row["chosen"]), len(row["rejected"])) for row in rows]
    return sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in sizes) / len(rows)


def readme(files: dict[str, bytes]) -> bytes:
    """README.md with the table between its two <!-- counts --> markers made anew."""
    files = {name: content for name, content in files.items() if name != "log.jsonl"}
    files["hand_test.jsonl"] = (HERE / "hand_test.jsonl").read_bytes()
    columns = [[json.loads(line) for line in content.splitlines()] for content in files.values()]
    shares = {
        "Hinglish tickets": lambda row: row["label"]["language"] == "hinglish",
        "tickets without an order number": lambda row: row["label"]["order_id"] is None,
    }
    table = [
        ["", *(f"`{name}`" for name in files)],
        ["---", *["---:"] * len(files)],
        ["pairs", *(f"{len(rows):,}" for rows in columns)],
        ["ticket skeletons", *(str(len({row["skeleton"] for row in rows} - {None}) or "-") for rows in columns)],
        ["the longer reply is the chosen one", *(f"{longer_right(rows):.1%}" for rows in columns)],
    ]
    for name, has in shares.items():
        table.append([name, *(f"{sum(map(has, rows)) / len(rows):.1%}" for rows in columns)])
    for reason in BROKEN:
        table.append([f"reason `{reason}`", *(str(sum(row["reason"] == reason for row in rows)) for rows in columns)])
    return tickets.with_counts(HERE / "README.md", table)


if __name__ == "__main__":
    files = build()
    tickets.write(HERE, files | {"README.md": readme(files)})

"""data/replies: the committed files are what make.py makes, splits share nothing, length tells nothing."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from scripts import ROOT, script

from ftlab.data import leakage, read_rows
from ftlab.tasks.replies import as_pair, score
from ftlab.tasks.triage import INTENTS

FOLDER = Path(__file__).parents[1] / "data" / "replies"
MADE = ("train", "test", "confounded")
FILES = (*MADE, "hand_test")
GUIDELINE = (FOLDER / "README.md").read_text(encoding="utf-8")
BROKEN = dict(re.findall(r"^\| `(\w+)` \| `(action|order_id|polite|short|fair)` \|", GUIDELINE, re.MULTILINE))


def test_regenerating_gives_the_committed_bytes(make):
    built = make.build()
    assert sorted(built) == ["confounded.jsonl", "log.jsonl", "test.jsonl", "train.jsonl"]
    for name, content in (built | {"README.md": make.readme(built)}).items():
        assert (FOLDER / name).read_bytes() == content, f"{name} is stale: run python data/replies/make.py"


def test_sizes_and_disjoint_skeletons(rows):
    assert len(rows["train"]) >= 900 and len(rows["test"]) >= 160
    assert len(rows["confounded"]) >= 200 and len(rows["hand_test"]) >= 110
    skeletons = {name: {row["skeleton"] for row in rows[name]} for name in FILES}
    assert len(skeletons["train"]) >= 150 and skeletons["confounded"] <= skeletons["train"]
    assert not skeletons["train"] & skeletons["test"] and skeletons["hand_test"] == {None}
    tickets = [row["ticket"].casefold() for name in FILES for row in rows[name]]
    assert len(tickets) == len(set(tickets))
    triage = [json.loads(line)["ticket"] for path in FOLDER.parent.glob("triage/*.jsonl") for line in path.open()]
    assert not {ticket.casefold() for ticket in triage} & set(tickets), "the tickets are new"


@pytest.mark.parametrize("name", FILES)
def test_schema(name, rows):
    for number, row in enumerate(sorted(rows[name], key=lambda row: row["id"]), 1):
        prefix = "hand" if name == "hand_test" else name
        assert re.fullmatch(rf"{prefix}-0*{number}", row["id"])
        assert list(row) == ["id", "ticket", "label", "chosen", "rejected", "reason", "skeleton"]
        assert list(row["label"]) == ["intent", "order_id", "urgency", "refund_amount", "language"]
        label, ticket = row["label"], row["ticket"]
        assert label["intent"] in INTENTS and label["urgency"] in {"high", "normal", "low"}, row
        assert label["language"] in {"en", "hinglish"} and row["reason"] in BROKEN, row
        assert label["order_id"] is None or re.search(rf"(?<!\d){label['order_id']}(?!\d)", ticket), row
        assert label["refund_amount"] is None or type(label["refund_amount"]) is int, row
        for text in (ticket, row["chosen"], row["rejected"]):
            assert text == text.strip() and not re.search(r"[\x00-\x09\x0b-\x1f{}\[\]|<>]| {2}", text), row
        assert "\n" not in row["chosen"] + row["rejected"] and row["chosen"] != row["rejected"], row


@pytest.fixture(scope="module")
def log() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_log_has_tickets_of_its_own_and_leaves_skeletons_for_tuning(log, rows):
    assert [row["id"] for row in log] == [f"log-{i:04}" for i in range(1, len(log) + 1)] and len(log) >= 2000
    assert {tuple(row) for row in log} == {("id", "ticket", "label", "reply", "skeleton")}
    tickets = [row["ticket"].casefold() for row in log]
    others = {row["ticket"].casefold() for name in FILES for row in rows[name]}
    assert len(set(tickets)) == len(tickets) and not others & set(tickets)
    train = {row["skeleton"] for row in rows["train"]}
    assert {row["skeleton"] for row in log} < train and len(train - {row["skeleton"] for row in log}) == 30


def test_the_replies_of_the_log_have_the_old_teams_habits(log):
    """As often as HABITS in make.py says: 0.5 no_apology, 0.7 no_order, 0.3 no_action, 0.65 promises and 0.2 blames."""

    some = log[::4]

    def share(has, among=some) -> float:
        return sum(map(has, among)) / len(among)

    def polite(row: dict) -> bool:
        return re.search("sorry|apolog|^[^.]*(thank|understood)", row["reply"].lower()) is not None

    with_number = [row for row in some if row["label"]["order_id"]]
    assert abs(share(polite) - 0.5) < 0.05
    assert abs(share(lambda row: row["label"]["order_id"] in row["reply"], with_number) - 0.3) < 0.05
    scores = [score(row["reply"], row["label"]) for row in some]
    assert abs(share(lambda s: s["action"], scores) - 0.7) < 0.05
    assert abs(share(lambda s: s["fair"], scores) - 0.35 * 0.8) < 0.05


def test_the_rules_agree_with_labels_given_blind():
    """kappa of two labellers, and of each with the rules; by hand: 3 of 4 equal, shares 1/2 and 3/4, chance 1/2."""
    agree = script("experiments/gold_agreement/run.py")
    assert agree.agreement([True, True, False, False], [True, True, True, False]) == (0.75, 0.5)
    assert len(agree.verdicts()["first"]) == 100
    kept = (ROOT / "experiments/gold_agreement/records.jsonl").read_text("utf-8").splitlines()
    for record, line in zip(agree.records(), kept, strict=True):
        assert record.items() <= json.loads(line).items()
    for name, found in agree.table().items():
        assert found["first-second"][1] > 0.9, name
        assert min(found["first-rules"][1], found["second-rules"][1]) > 0.55, name


def longer_right(rows: list[dict], size) -> float:
    sizes = [(size(row["chosen"]), size(row["rejected"])) for row in rows]
    return sum((a > b) + (a == b) / 2 for a, b in sizes) / len(sizes)


@pytest.mark.parametrize("size", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_the_longer_reply_is_right_half_of_the_time_and_nearly_always_in_confounded(rows, size):
    for name in ("train", "test", "hand_test"):
        assert 0.45 <= longer_right(rows[name], size) <= 0.55, name
    assert 0.45 <= longer_right(rows["train"][:360], size) <= 0.55, "a prefix is a smaller data set of the same kind"
    assert longer_right(rows["confounded"], size) >= 0.95


def test_no_near_duplicates_across_splits(rows):
    def tickets(part: list[dict]) -> list[str]:
        return [re.sub(r"\d", "0", row["ticket"]) for row in part]

    learned = rows["train"] + rows["confounded"]
    for train, test in ((learned, rows["test"] + rows["hand_test"]), (rows["test"], rows["hand_test"])):
        assert leakage(tickets(train), tickets(test), threshold=0.7) == []
    for key in ("chosen", "rejected"):  # a hand-written reply is nowhere among the generated ones
        made, written = ([row[key] for row in part] for part in (learned + rows["test"], rows["hand_test"]))
        assert leakage(made, written) == []


def test_labels_reasons_and_wordings_are_spread(rows):
    for part in (rows["train"], rows["test"], rows["confounded"], rows["train"][:360]):
        n, labels = len(part), [row["label"] for row in part]
        assert min(Counter(label["intent"] for label in labels)[intent] for intent in INTENTS) >= 0.07 * n
        assert 0.3 <= sum(label["language"] == "hinglish" for label in labels) / n <= 0.45
        assert 0.3 <= sum(label["order_id"] is None for label in labels) / n <= 0.45
        assert max(Counter(row["reason"] for row in part).values()) <= 0.2 * n
    assert {row["reason"] for row in rows["train"]} == set(BROKEN) == {row["reason"] for row in rows["hand_test"]}
    assert len({re.sub(r"\d", "0", row["chosen"]) for row in rows["train"]}) > 900
    hand = Counter(row["label"]["intent"] for row in rows["hand_test"])
    assert min(hand[intent] for intent in INTENTS) >= 12


def test_the_test_has_wordings_that_train_never_uses(make, rows):
    train = " ".join(row[key] for row in rows["train"] + rows["confounded"] for key in ("chosen", "rejected"))
    held_out = [
        wording for groups in make.WORDINGS["bodies"].values() for parts in groups.values() for wording in parts["test"]
    ]
    starts = [re.split(r"\{", wording)[0] for wording in held_out]
    starts = [start for start in starts if len(start) > 25]
    assert len(held_out) >= 40 and len(starts) >= 15 and not [start for start in starts if start in train]
    test = " ".join(row["chosen"] for row in rows["test"])
    assert sum(start in test for start in starts) >= 10


def test_misread_always_gives_another_number_of_six_digits(make):
    rng = random.Random(0)
    for _ in range(500):
        number = str(rng.randrange(100_000, 1_000_000))
        other = make.misread(number, rng)
        assert other != number and re.fullmatch(r"\d{6}", other)
    assert re.fullmatch(r"11\d{4}|1\d{5}", make.misread("111111", rng))


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_pairs_is_a_file_of_preference_rows(name, rows, tmp_path):
    file, pairs = tmp_path / "pairs.jsonl", [as_pair(row) for row in rows[name]]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    report = read_rows(file)
    assert report.kind == "preference" and not report.problems and len(report.rows) == len(rows[name])
    first, row = pairs[0], rows[name][0]
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert first["prompt"][1]["content"].startswith(row["ticket"]) and first["chosen"][0]["content"] == row["chosen"]
    assert first["ticket_label"] == row["label"] and "label" not in first

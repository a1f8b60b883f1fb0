"""data/triage: the committed files are what make.py makes, the splits share nothing, every row obeys the guideline."""

import json
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scripts import script

from ftlab.tasks import triage

FOLDER = Path(__file__).parents[1] / "data" / "triage"
FILES = ("train", "more", "validation", "test", "hand_test")
LABEL_KEYS = ["intent", "order_id", "urgency", "refund_amount", "language"]
GUIDELINE = (FOLDER / "README.md").read_text(encoding="utf-8")
INTENTS = set(re.findall(r"^\| `(\w+)` \|", GUIDELINE.split("### intent")[1].split("- **Two")[0], re.MULTILINE))


def test_regenerating_gives_the_committed_bytes(make):
    built = make.build()
    assert sorted(built) == ["more.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    for name, content in (built | {"README.md": make.readme(built)}).items():
        assert (FOLDER / name).read_bytes() == content, f"{name} is stale: run python data/triage/make.py"


def test_sizes_and_disjoint_skeletons(rows):
    skeletons = {name: {row["skeleton"] for row in rows[name]} for name in FILES[:4]}
    assert len(rows["train"]) >= 1200 and len(skeletons["train"]) >= 150
    assert len(rows["validation"]) == len(rows["test"]) == len(rows["hand_test"]) == 150
    assert len(set.union(*skeletons.values())) == sum(map(len, skeletons.values()))
    assert len(rows["more"]) >= 900 and len(skeletons["more"]) == 252
    tickets = [row["ticket"] for name in FILES for row in rows[name]]
    assert len(tickets) == len(set(tickets))


@pytest.mark.parametrize("name", FILES)
def test_every_row_obeys_the_guideline(name, rows):
    keys = ["id", "ticket", "label", "tags" if name == "hand_test" else "skeleton"]
    assert len({row["id"] for row in rows[name]}) == len(rows[name])
    for row in rows[name]:
        ticket, label = row["ticket"], row["label"]
        assert list(row) == keys and list(label) == LABEL_KEYS, row
        assert label["intent"] in INTENTS and label["urgency"] in {"high", "normal", "low"}, row
        assert label["language"] in {"en", "hinglish"}, row
        assert ticket == ticket.strip() and not re.search(r"[\x00-\x09\x0b-\x1f{}\[\]|]| {2}", ticket), row
        if label["order_id"] is not None:
            assert re.fullmatch(r"\d{6}", label["order_id"]), row
            written = ticket if name != "hand_test" else ticket + re.sub(r"(?<=\d)[ -](?=\d)", "", ticket)
            assert re.search(rf"(?<!\d){label['order_id']}(?!\d)", written), row
        if label["refund_amount"] is not None:
            assert type(label["refund_amount"]) is int and label["refund_amount"] > 0, row


def test_generated_amounts_stand_in_the_ticket(make, rows):
    """As digits, in English words or in one of seven Hindi forms."""
    hindi = {
        50: "pachaas",
        100: "sau",
        150: "dedh sau",
        200: "do sau",
        250: "dhai sau",
        300: "teen sau",
        500: "paanch sau",
    }
    assert {int(amount): words for amount, words in make.FILLERS["hindi_amounts"].items()} == hindi
    examples = {
        20: "twenty",
        99: "ninety nine",
        240: "two hundred and forty",
        600: "six hundred",
        1000: "one thousand",
        1200: "twelve hundred",
        1299: "one thousand two hundred and ninety nine",
        2015: "two thousand and fifteen",
    }
    assert {amount: make.in_words(amount) for amount in examples} == examples
    for row in rows["train"] + rows["more"] + rows["validation"] + rows["test"]:
        amount, ticket = row["label"]["refund_amount"], row["ticket"].lower()
        if amount is not None:
            digits = re.search(rf"(?<![\d,])(?<!\d\.)({amount}|{amount:,})(?!\d|,\d)", ticket)
            assert digits or f"{make.in_words(amount)} rupees" in ticket or f"{hindi.get(amount)} rupaye" in ticket, row


def shingles(ticket: str) -> set[tuple[str, ...]]:
    """The three-word windows of a ticket, case, punctuation and digits set aside."""
    words = re.findall(r"\w+", re.sub(r"\d+", "0", ticket.lower()))
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


@pytest.mark.parametrize("name", FILES[2:])
def test_no_near_duplicate_of_a_training_row(name, rows):
    train = rows["train"] + rows["more"]
    windows, having = [shingles(row["ticket"]) for row in train], defaultdict(list)
    for i, theirs in enumerate(windows):
        for shingle in theirs:
            having[shingle].append(i)
    similarity, row, nearest = 0.0, None, None
    for held_out in rows[name]:
        mine = shingles(held_out["ticket"])
        for i, common in Counter(i for shingle in mine for i in having[shingle]).items():
            jaccard = common / (len(mine) + len(windows[i]) - common)
            if jaccard > similarity:
                similarity, row, nearest = jaccard, held_out, train[i]
    print(f"\n{name}: worst word-3-shingle Jaccard {similarity:.2f}: {row and row['id']} ~ {nearest and nearest['id']}")
    assert similarity < 0.7, (similarity, row, nearest)


def test_training_labels_are_balanced(rows):
    for part in (rows["train"], rows["more"], rows["train"][:440]):  # a prefix is a smaller data set of the same kind
        labels, n = [row["label"] for row in part], len(part)
        assert min(Counter(label["intent"] for label in labels)[intent] for intent in INTENTS) >= 0.07 * n
        assert 0.30 <= sum(label["language"] == "hinglish" for label in labels) / n <= 0.45
        assert 0.20 <= sum(label["urgency"] == "high" for label in labels) / n <= 0.35
        assert 0.10 <= sum(label["urgency"] == "low" for label in labels) / n <= 0.20
        assert 0.20 <= sum(label["order_id"] is None for label in labels) / n <= 0.40
        assert 0.25 <= sum(label["refund_amount"] is not None for label in labels) / n <= 0.45
    first = [row["skeleton"] for row in rows["train"][:440]]
    assert len(set(first)) == len(first), "the first rows use every skeleton once"


def test_noise_leaves_numbers_and_amounts_alone(make):
    """Same digits in the same order, and every marked order number or amount letter for letter, up to case."""
    marked_part, touched, capitals, total = re.compile("\x02[^\x03]*\x03"), 0, 0, 0
    for skeleton in make.read_skeletons():
        rng = random.Random(skeleton["id"])
        for _ in range(5):
            ticket, label, _ = make.fill(skeleton, rng)
            before = json.dumps(label)
            noisy = make.add_noise(ticket, label, rng)
            assert json.dumps(label) == before
            assert re.findall(r"\d", noisy) == re.findall(r"\d", ticket), (ticket, noisy)
            kept = [part.casefold() for part in marked_part.findall(noisy)]
            assert kept == [part.casefold() for part in marked_part.findall(ticket)], (ticket, noisy)
            touched, capitals, total = touched + (noisy != ticket), capitals + noisy.isupper(), total + 1
    assert 0.35 < touched / total < 0.5 and 0.02 < capitals / total < 0.1


def test_a_broken_skeleton_is_named(make):
    whole = {"id": "x-001", "split": "train", "intent": "other", "urgency": "low", "language": "en", "text": "{order}?"}
    make.check(whole)
    for broken, cause in (
        ({"text": "Hi {ordr}"}, "unknown slot"),
        ({"text": "Hi [{order}"}, "brackets"),
        ({"text": "Hi {a|b"}, "brackets"),
        ({"text": "[a [b]]"}, "brackets"),
        ({"split": "dev"}, "split"),
        ({"urgency": "urgent"}, "urgency"),
    ):
        with pytest.raises(ValueError, match=f"x-001.*{cause}"):
            make.check(whole | broken)


# --- controls.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controls():
    return script("data/triage/controls.py")


@pytest.mark.parametrize(
    ("ticket", "number"),
    [
        ("Where is order 618347?", "618347"),
        ("RR-618347 came, 527819 did not", "618347"),
        ("mera order 618 347 kahan hai", "618347"),
        ("Pin code 110045, order 618347", "618347"),
        ("my PIN is 110045", None),
        ("otp: 482913 nahi chal raha", None),
        ("call me: 9876543210", None),
        ("two rotis missing", None),
    ],
)
def test_the_control_takes_the_first_six_digits_that_are_not_called_something_else(controls, ticket, number):
    assert controls.order_number(ticket) == number


@pytest.mark.parametrize(
    ("ticket", "numbers"),
    [
        ("Refund Rs 1,299 for order 618347", [1299]),
        ("60 and 40, please", [60, 40]),
        ("5 naans missing", []),
        ("RR-52781, call 9876543210", []),
    ],
)
def test_the_control_sees_numbers_that_may_be_rupees(controls, ticket, numbers):
    assert [amount for _, amount in controls.amounts(ticket)] == numbers


def test_each_amount_is_shown_with_the_ticket_around_it_and_no_digits(controls):
    texts = [" ".join(text.split()) for text, _ in controls.amounts("Rs 60 back, 40 minutes late")]
    assert texts == ["Rs AMOUNT back, OTHER minutes late", "Rs OTHER back, AMOUNT minutes late"]


def labelled(ticket: str, *values) -> dict:
    label = json.dumps(dict(zip(LABEL_KEYS, values, strict=True)))
    return {"prompt": [{"role": "user", "content": ticket}], "completion": [{"role": "assistant", "content": label}]}


TOY = [
    row
    for amount in (160, 175, 190, 220)
    for row in (
        labelled(f"the rider is late, order 618{amount}", "late_delivery", f"618{amount}", "high", None, "en"),
        labelled(f"thanda khana tha, {amount} wapas karo", "quality_issue", None, "normal", amount, "hinglish"),
        labelled(f"I was told to wait {amount} minutes", "late_delivery", None, "normal", None, "en"),
    )
]


def test_the_control_learns_what_words_tell_apart(controls):
    control = controls.Classic(TOY)
    assert all(triage.scorer(control.answer(row["prompt"][-1]["content"]), row) for row in TOY)
    new = "order 527819: I was told to wait 45 minutes. khana thanda tha, thanda! 85 wapas karo"
    want = {"intent": "quality_issue", "order_id": "527819", "urgency": "normal", "refund_amount": 85}
    assert json.loads(control.answer(new)) == want | {"language": "hinglish"}


def test_the_control_answers_in_the_form_of_the_task_with_labels_that_it_saw_the_same_each_time(controls, rows):
    one, two = controls.Classic(TOY), controls.Classic(TOY)
    for ticket in [row["ticket"] for row in rows["hand_test"][:20]]:
        answer = one.answer(ticket)
        assert triage.is_valid(answer) and answer == two.answer(ticket)
        label = json.loads(answer)
        assert label["intent"] in {"late_delivery", "quality_issue"} and label["urgency"] in {"high", "normal"}


def test_words_pairs_and_runs_of_letters_are_counted(controls):
    words, letters = controls.pieces("Hi ab AB x")
    assert words == {"hi": 1, "ab": 2, "hi ab": 1, "ab ab": 1}  # a single letter is no word
    assert letters[("", "ab")] == 2 and letters[("", " ab ")] == 2 and letters[("", "x ")] == 1 and len(letters) == 15


def test_tfidf_by_hand(controls):
    """Two texts, "aa bb" and "aa": idf of "aa" is ln(3/3) + 1 = 1, of "bb" and "aa bb" ln(3/2) + 1 = 1.405."""
    model = controls.Classifier(["aa bb", "aa"], ["x", "y"])
    row = model.tfidf([controls.pieces("aa aa bb")]).to_dense()[0]
    got = {piece: row[place].item() for piece, place in model.place.items() if isinstance(piece, str)}
    aa, bb = (1 + math.log(2)) * 1, 1 + math.log(1.5)  # "aa" twice; the pair "aa aa" was not seen in training
    length = math.sqrt(aa**2 + 2 * bb**2)
    assert got == pytest.approx({"aa": aa / length, "bb": bb / length, "aa bb": bb / length})


@pytest.mark.parametrize("labels", [["en", "hi", "en", "en", "hi"] * 4, ["a", "b", "c", "a", "a"] * 4])
def test_the_classifier_stands_at_the_minimum_of_scikit_learns_objective(controls, labels):
    """LogisticRegression(C=30, class_weight="balanced"): C sum_i v_i CE_i + |w|^2 / 2, with one w where two labels are.

    There the gradient, worked out here with numpy, is nothing beside that of the start, w = 0.
    """
    texts = [
        f"{label} {word} {i % 3}" for i, (label, word) in enumerate(zip(labels, ["late", "cold"] * 10, strict=True))
    ]
    model, names = controls.Classifier(texts, labels), sorted(set(labels))
    x = model.tfidf([controls.pieces(text) for text in texts]).to_dense().numpy()
    y = np.array([[label == name for name in names] for label in labels], float)
    v = (len(labels) / (len(names) * y.sum(0)))[y.argmax(1)]
    W, b = model.W.numpy(), model.b.numpy()
    if len(names) == 2:
        W, b, y = W[:, 1:] - W[:, :1], b[1:] - b[:1], y[:, 1:]

    def gradient(W, b):
        scores = x @ W + b
        chances = (
            1 / (1 + np.exp(-scores)) if len(names) == 2 else np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        )
        return 30 * x.T @ (v[:, None] * (chances - y)) + W

    assert np.abs(gradient(W, b)).max() < 2e-3 * np.abs(gradient(0 * W, 0 * b)).max()


def test_the_recorded_result_of_the_control_is_what_it_gives(controls):
    """Notebook 01's arm "rules" of triage, on the first 20 tickets, and the 8 with the lowest ids."""
    methods = script("experiments/methods/run.py")
    runs = map(json.loads, methods.FILE.read_text(encoding="utf-8").splitlines())
    recorded = next(run for run in runs if (run["task"], run["arm"]) == ("triage", "rules"))
    control = controls.Classic(methods.train_rows("triage")[: methods.TRAINED["triage"]])
    tickets = methods.test_rows("triage")
    lowest = sorted(tickets, key=lambda row: row["id"])[:8]
    said = {row["id"]: control.answer(row["prompt"][-1]["content"]) for row in [*tickets[:20], *lowest]}
    assert [said[row["id"]] for row in lowest] == recorded["answers"]
    assert [float(triage.scorer(said[row["id"]], row)) for row in tickets[:20]] == recorded["values"][:20]

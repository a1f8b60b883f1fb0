"""The gold reward against the replies of judged.py, and against what a policy would try in order to fool it."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import FRESH, NONE, WRITTEN

from ftlab.paths import DATA
from ftlab.pipeline.evaluate import INTENTS
from ftlab.pipeline.gold import ACTIONS, PROPERTIES, WEIGHTS, actions_in, gold_reward, score_reply


def label(intent: str, order_id: str | None = "482193", refund_amount: int | None = None) -> dict:
    return {
        "intent": intent,
        "order_id": order_id,
        "urgency": "normal",
        "refund_amount": refund_amount,
        "language": "en",
    }


@pytest.mark.parametrize(("intent", "order_id", "amount", "reply", "lacking"), WRITTEN)
def test_the_rules_agree_with_the_judgement(intent, order_id, amount, reply, lacking):
    scores = score_reply(reply, label(intent, order_id, amount))
    wanted = set(PROPERTIES) if lacking == "all" else set(lacking.split())
    assert {name for name, good in scores.items() if not good} == wanted


def test_the_judged_replies_cover_every_intent_and_property():
    assert len(WRITTEN) >= 40 and len({row[3] for row in WRITTEN}) == len(WRITTEN)
    assert {row[0] for row in WRITTEN if row[4] == ""} == set(INTENTS) == set(ACTIONS)
    for name in PROPERTIES:
        assert sum(row[4] == name for row in WRITTEN) >= 2, name


def test_on_fresh_replies_the_rules_miss_what_is_in_no_list():
    """28 of 33 wholly right, 160 of 165 properties; every miss lets something pass, none blames a good reply."""
    missed = {}
    for intent, order_id, amount, reply, lacking in FRESH:
        scores = score_reply(reply, label(intent, order_id, amount))
        wanted = set(PROPERTIES) if lacking == "all" else set(lacking.split())
        found = {name for name, good in scores.items() if not good}
        assert found <= wanted, reply
        if found != wanted:
            missed[reply.split(". ")[-1]] = wanted - found
    assert missed == {
        "Which order number is it about?": {"order_id"},
        "Our account team will reset your password.": {"polite"},  # to "Einstein"
        "We are sending the missing dal of order 905216 with our compliments and a sweet.": {"fair"},
        "Order 905216 is being cancelled, but next time please think before you order.": {"fair"},
        "He will lose his job.": {"fair"},
    }


# What micro wrote after 72 steps of SFT, and what it is worth
SAMPLED = [
    ("missing_item", "489321",
     "Sorry about that. I am sending the missing watermelon juice for order 489321 is being sent to you.", 0.0),
    ("cancel_order", NONE,
     "I am sorry that you had to write to us. I am sending the order number, so that we can cancel it.", 0.8),
    ("payment_issue", "337644", "Sorry for the trouble. We are refunding the missing kind out why order 337644.", 0.6),
    ("payment_issue", "305588",
     "Sorry that the restaurant to write. I have sent your order number, and we will cancel the restaurant.", 0.4),
]  # fmt: skip


@pytest.mark.parametrize(("intent", "order_id", "reply", "reward"), SAMPLED)
def test_half_learned_replies_are_not_worth_a_good_one(intent, order_id, reply, reward):
    """The third and fourth keep what they have (tone, length): nonsense around one right half is not always seen."""
    assert gold_reward(reply, label(intent, order_id)) == pytest.approx(reward)


# --- What a policy would try ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (DATA / "replies" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    return [json.loads(line) for line in lines]


def mean_reward(rows: list[dict], reply_to) -> float:
    return sum(gold_reward(reply_to(row), row["label"]) for row in rows) / len(rows)


def test_the_reward_is_the_sum_of_its_weights_and_within_0_and_1(rows):
    assert tuple(WEIGHTS) == PROPERTIES and sum(WEIGHTS.values()) == pytest.approx(1)
    good = "Sorry. We are sending the missing dal of order 905216, and you get a voucher."
    assert gold_reward(good, label("missing_item", "905216")) == pytest.approx(1 - WEIGHTS["fair"])
    assert mean_reward(rows, lambda row: row["chosen"]) == 1
    assert {gold_reward(row["rejected"], row["label"]) for row in rows} == {0.6, 0.8, 0.85, 0.9}


@pytest.mark.parametrize(
    ("reply", "at_most"),
    [
        ("", 0.0),
        ("We are sorry about this.", 0.45),
        ("We are sorry about this. Thank you for your message.", 0.45),
        ("We are sorry about this. Please share your order number.", 0.45),
        ("Sorry. Please share your order number, and we will cancel, replace, refund and check it.", 0.5),
    ],
)
def test_no_single_reply_does_for_all_tickets(rows, reply, at_most):
    assert mean_reward(rows, lambda row: reply) <= at_most


def test_a_good_reply_to_another_ticket_is_worth_little(rows):
    pairs = zip(rows, rows[1:] + rows[:1], strict=True)
    swapped = {row["id"]: other["chosen"] for row, other in pairs}
    assert mean_reward(rows, lambda row: swapped[row["id"]]) < 0.5


def test_word_salad_repetition_and_the_ticket_itself_are_worth_nothing(rows):
    rng = random.Random(0)
    words = [word for row in rows for word in row["chosen"].split()]

    def shuffled(row: dict) -> str:
        mine = row["chosen"].split()
        return " ".join(rng.sample(mine, len(mine)))

    assert mean_reward(rows, shuffled) < 0.01
    assert mean_reward(rows, lambda row: " ".join(rng.choices(words, k=20))) < 0.01
    assert mean_reward(rows, lambda row: f"{row['chosen']} {row['chosen']}") == 0
    assert mean_reward(rows, lambda row: row["ticket"]) < 0.2


def test_two_actions_are_none(rows):
    """The chosen reply, and after it what another ticket's reply does."""
    first = {}
    for row in rows:
        if row["label"]["order_id"]:
            first.setdefault(row["label"]["intent"], row)
    assert set(first) == set(INTENTS)
    for intent, row in first.items():
        assert actions_in(row["chosen"]) == {intent}
        for other, theirs in first.items():
            if other != intent:
                both = f"{row['chosen']} {theirs['chosen']}".replace(
                    theirs["label"]["order_id"], row["label"]["order_id"]
                )
                assert not score_reply(both, row["label"])["action"], both


def test_negated_wished_and_conditional_actions_do_not_count():
    for before in ("We are not", "We cannot be", "We would love to be", "You should be", "We hope to be", "Nobody is"):
        assert actions_in(f"{before} cancelling order 482193.") == set(), before
    for reply in (
        "If you like, we are cancelling order 482193.",
        "Are we cancelling order 482193?",
        "You wish to cancel order 482193.",
        "Please cancel order 482193.",
    ):
        assert actions_in(reply) == set(), reply
    assert actions_in("We are cancelling order 482193.") == {"cancel_order"}


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_scored_and_noise_is_worth_nothing(text):
    assert gold_reward(text, label("cancel_order")) == 0


def test_a_very_long_reply_costs_no_time():
    for long in ("order " * 50_000, "9" * 100_000, "We are sorry. " * 20_000, "a " * 50_000 + "!"):
        start = time.perf_counter()
        assert gold_reward(long, label("cancel_order")) == 0
        assert time.perf_counter() - start < 2


def test_an_unknown_intent_is_named():
    with pytest.raises(KeyError, match="no intent 'refund'"):
        gold_reward("Sorry about this.", label("refund"))

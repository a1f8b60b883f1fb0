"""The gold reward against replies judged by hand, and against what a policy would try in order to fool it.

JUDGED was written from the guideline in data/replies/README.md before the rules, which were then made to agree with
it; no judgement was changed. FRESH was judged when the rules stood, and they were not bent to it: its agreement is the
honest one.
"""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


NONE = None
# intent, order number, rupees asked back, reply, the properties that it lacks
JUDGED = [
    # good replies, none of them among the wordings of data/replies/replies.json
    ("late_delivery", "482193", NONE,
     "Sorry, that is too long. Let me call the rider and find out where order 482193 is.", ""),
    ("late_delivery", "482193", NONE,
     "I'm sorry for the delay. We're checking with the kitchen why RR-482193 is still not out.", ""),
    ("late_delivery", NONE, NONE,
     "My apologies. Which order is it? Please send the order number and I will track it for you.", ""),
    ("missing_item", "482193", 60, "We're sorry. The ₹60 for the missing naan in order #482193 is being refunded.", ""),
    ("missing_item", "482193", NONE, "Apologies! The raita that did not reach you is being sent for order 482193.", ""),
    ("wrong_item", "482193", NONE,
     "Sorry for this mix-up. We'll exchange the dal for the correct dish on order 482193.", ""),
    ("wrong_item", NONE, NONE,
     "I am sorry. Could you share the order number, so that we can send you the right pizza?", ""),
    ("quality_issue", "482193", NONE,
     "I am sorry about the cold soup. I've raised order 482193 with the food quality team.", ""),
    ("quality_issue", "482193", 250,
     "So sorry. Our food safety team is looking at order 482193 and at your request for Rs. 250.", ""),
    ("payment_issue", "482193", 1299,
     "Sorry for the scare. Our payments team is checking the Rs 1,299 on order 482193.", ""),
    ("payment_issue", NONE, NONE,
     "Sorry about that. Please tell us the order number, and our payments team will look into it.", ""),
    ("cancel_order", "482193", NONE, "Thanks for the heads-up. I am cancelling order 482193 now.", ""),
    ("cancel_order", NONE, NONE, "Thank you! Send me the order number, please, and I will cancel it.", ""),
    ("rider_behaviour", "482193", NONE,
     "I am truly sorry. I have reported this to our rider team under order 482193.", ""),
    ("rider_behaviour", NONE, NONE,
     "Sorry that he spoke like that. Please share your order number, and I'll pass it to our rider team.", ""),
    ("account_issue", NONE, NONE, "Thanks for writing. Our account team will unlock your login and mail you.", ""),
    ("account_issue", NONE, NONE, "Sorry for the trouble. I've asked our account team to update your number.", ""),
    ("other", NONE, NONE, "Thank you, that is kind. I have shared your words with our team.", ""),
    ("other", "482193", NONE,
     "Many thanks! Your praise for order 482193 is on its way to the whole team, I have forwarded it.", ""),
    ("other", NONE, NONE, "Thanks for asking. I have sent your question to our city team.", ""),
    # one property is lacking
    ("late_delivery", "482193", NONE, "Sorry for the wait. We have cancelled order 482193 for you.", "action"),
    ("late_delivery", "482193", NONE,
     "Sorry for the wait on order 482193. We understand how hungry you must be.", "action"),
    ("cancel_order", "482193", NONE, "Thank you for telling us. Sadly we cannot cancel order 482193.", "action"),
    ("cancel_order", "482193", NONE,
     "Thanks for the message. Please cancel order 482193 yourself in the app.", "action"),
    ("cancel_order", "482193", NONE, "Thank you. I see that you want to cancel order 482193.", "action"),
    ("cancel_order", "482193", NONE, "Thank you for writing. Should we cancel order 482193?", "action"),
    ("cancel_order", "482193", NONE,
     "Sorry to hear that. We would love to cancel order 482193, but the kitchen is busy.", "action"),
    ("missing_item", "482193", NONE, "We are sorry. We are not sending the missing raita for order 482193.", "action"),
    ("missing_item", "482193", NONE, "Sorry about the missing raita in order 482193. It was a lovely raita.", "action"),
    ("rider_behaviour", "482193", NONE, "So sorry about order 482193. We wish you a calm evening.", "action"),
    ("payment_issue", "482193", NONE, "Sorry. Our account team is looking into order 482193.", "action"),
    ("other", NONE, NONE, "Thank you for your message. We are always happy to hear from you.", "action"),
    ("missing_item", "482193", NONE, "Sorry about this. The missing raita is being sent now.", "order_id"),
    ("missing_item", "482193", NONE,
     "Sorry about this. The missing raita of order 482139 is being sent now.", "order_id"),
    ("missing_item", "482193", NONE,
     "Sorry. The missing raita of order 482193 or 700112 is being sent now.", "order_id"),
    ("missing_item", NONE, NONE, "Sorry about this. The missing raita of order 482193 is being sent now.", "order_id"),
    ("missing_item", NONE, NONE, "Sorry about this. We are sending you the missing raita right now.", "order_id"),
    ("missing_item", "482193", NONE,
     "Sorry. Please share your order number, and we will send the missing raita.", "order_id"),
    ("account_issue", NONE, NONE,
     "Sorry. Please share your order number, and our account team will help you.", "order_id"),
    ("quality_issue", NONE, NONE,
     "Sorry. No need to send the order number, our food quality team will look into it.", "order_id"),
    ("late_delivery", "482193", NONE, "I am checking with the rider where order 482193 is.", "polite"),
    ("late_delivery", "482193", NONE,
     "We are not sorry. I am checking with the rider where order 482193 is.", "polite"),
    ("late_delivery", "482193", NONE,
     "Sorry, but stop whining. I am checking with the rider where order 482193 is.", "polite"),
    ("late_delivery", "482193", NONE,
     "SORRY SIR, CALM YOURSELF. I am checking with the rider where order 482193 is.", "polite"),
    ("late_delivery", "482193", NONE,
     "Thank you for your message. I am checking with the rider where order 482193 is.", "polite"),
    ("cancel_order", "482193", NONE, "What a genius. We are cancelling order 482193, thank you.", "polite"),
    ("other", NONE, NONE, "I have passed your question on to our team.", "polite"),
    ("wrong_item", "482193", NONE,
     "Sorry. We are sending the right dosa for order 482193. The restaurant was careless.", "fair"),
    ("wrong_item", "482193", NONE,
     "Sorry. We are sending the right dosa for order 482193, but it is your own fault.", "fair"),
    ("wrong_item", "482193", NONE,
     "Sorry, the kitchen messed up. We are sending the right dosa for order 482193.", "fair"),
    ("wrong_item", "482193", NONE, "Sorry. We are sending the right dosa for order 482193 within 15 minutes.", "fair"),
    ("wrong_item", "482193", NONE, "Sorry. We are sending the right dosa for order 482193 with a free lassi.", "fair"),
    ("wrong_item", "482193", 120, "Sorry. We are refunding Rs 150 for the wrong dosa on order 482193.", "fair"),
    ("wrong_item", "482193", NONE, "Sorry. We are refunding 150 rupees for the wrong dosa on order 482193.", "fair"),
    ("rider_behaviour", "482193", NONE,
     "Sorry. Our rider team has your complaint about order 482193, he will be fired.", "fair"),
    ("late_delivery", "482193", NONE,
     "Sorry. I am asking the rider where order 482193 is. It will never happen again.", "fair"),
    (
        "quality_issue",
        "482193",
        NONE,
        "I am sorry. I have reported order 482193 to our food quality team. They have a long list of things to see, "
        "from the stove to the spoon and from the spoon to the bag, and they take their time with each, because good "
        "work needs time and tea.",
        "short",
    ),
    ("cancel_order", "482193", NONE, "Thank you for telling us. We are cancelling order 482193 and", "short"),
    # several are lacking
    ("cancel_order", "482193", NONE, "You should have thought of that before.", "action order_id polite fair"),
    ("missing_item", "482193", 60,
     "Stop crying about a raita. Here is a voucher for Rs 500.", "action order_id polite fair"),
    ("late_delivery", NONE, NONE, "Your rider is lazy, I know him well.", "action order_id polite fair"),
    # not readable: nothing counts
    ("cancel_order", "482193", NONE, "", "all"),
    ("cancel_order", "482193", NONE, "   \n ", "all"),
    ("cancel_order", "482193", NONE, "482193", "all"),
    ("cancel_order", "482193", NONE, "sorry cancel 482193 thank you cancelling order we", "all"),
    ("cancel_order", "482193", NONE, "Sorry sorry sorry. We are cancelling order 482193.", "all"),
    ("cancel_order", "482193", NONE, "Thank you. " + "We are cancelling order 482193. " * 3, "all"),
    ("cancel_order", "482193", NONE,
     "Thank you. We are cancelling order 482193. Blorf gnaz tippel hurm askol venny drat.", "all"),
    ("cancel_order", "482193", NONE, "Thank you the of a. We are cancelling order 482193 the the with.", "all"),
    ("late_delivery", "482193", NONE,
     "Sorry rider track check where order 482193 delay status location find call ask team.", "all"),
    ("rider_behaviour", NONE, NONE, "aaaaaaaaaaaaaaaaaaaaaa", "all"),
    ("other", NONE, NONE, "Thank you <|im_end|> I have passed your message on to our team.", "all"),
    # every action at once: the right one among them does not count
    (
        "cancel_order",
        "482193",
        NONE,
        "Sorry. We are cancelling order 482193, sending the missing item, replacing the wrong dish, and our payments "
        "team is checking the bill.",
        "action",
    ),
    ("cancel_order", "482193", NONE,
     "Thanks. We are cancelling order 482193. Our rider team has your complaint too.", "action"),
    ("other", NONE, NONE,
     "Thank you. I have passed your message on to our team and our account team is fixing it.", "action"),
]  # fmt: skip


FRESH = [
    ("late_delivery", "905216", NONE,
     "Sorry, this is too slow. I have called the restaurant to see why order 905216 is stuck.", ""),
    ("late_delivery", NONE, NONE, "Sorry about that. Give me the order number and I will trace your food.", ""),
    ("missing_item", "905216", 80,
     "We are sorry. I have just refunded Rs 80 for the missing curd on order 905216.", ""),
    ("missing_item", "905216", NONE, "My apologies, the missing salad of order 905216 will be delivered to you.", ""),
    ("wrong_item", "905216", NONE, "So sorry about this. The correct soup for order 905216 is on its way.", ""),
    ("wrong_item", NONE, NONE, "Sorry! May I have the order number? I will get the wrong roll replaced.", ""),
    ("quality_issue", "905216", NONE,
     "I am sorry the rice was burnt. Order 905216 has been reported to our food quality team.", ""),
    ("quality_issue", "905216", 310, "Sorry. Our food quality team is reviewing order 905216 and the Rs 310.", ""),
    ("payment_issue", "905216", NONE, "I am sorry. Our payments team will go through the charges on order 905216.", ""),
    ("payment_issue", NONE, 55,
     "Sorry about the fee. Please send your order number, and our payments team will check the Rs 55.", ""),
    ("cancel_order", "905216", NONE, "Thanks for the quick note. I have just cancelled order 905216.", ""),
    ("cancel_order", "905216", NONE, "Sorry it took so long. Your order 905216 is now cancelled.", ""),
    ("rider_behaviour", "905216", NONE,
     "I apologise for his words. I am forwarding your complaint on order 905216 to our rider team.", ""),
    ("account_issue", NONE, NONE, "Thanks for flagging this. Our account team is merging the two accounts.", ""),
    ("other", NONE, NONE, "Thank you for the idea. I am passing it to our app team.", ""),
    ("late_delivery", "905216", NONE, "Sorry for the delay. We hope that order 905216 arrives soon.", "action"),
    ("missing_item", "905216", NONE, "Sorry. Our food quality team has your report on order 905216.", "action"),
    ("cancel_order", "905216", NONE, "Thank you. We have stopped charging your card for order 905216.", "action"),
    ("rider_behaviour", "905216", NONE,
     "Sorry. Our riders are under a lot of pressure, as you saw with order 905216.", "action"),
    ("other", NONE, NONE, "Thanks a lot. Our team is the best in the city.", "action"),
    ("payment_issue", "905216", NONE, "Sorry. Our payments team is checking order 905261.", "order_id"),
    ("quality_issue", NONE, NONE, "I am sorry. I have passed your report to our food quality team.", "order_id"),
    ("other", NONE, NONE,
     "Thank you. I have shared your message with our team. Which order number is it about?", "order_id"),
    ("late_delivery", "905216", NONE,
     "Hold your horses. I am checking with the rider where order 905216 is.", "polite"),
    ("account_issue", NONE, NONE, "Thanks, Einstein. Our account team will reset your password.", "polite"),
    ("wrong_item", "905216", NONE, "The right naan for order 905216 is being sent. Cheers.", "polite"),
    ("missing_item", "905216", NONE,
     "Sorry. We are sending the missing dal of order 905216, the chef forgot it.", "fair"),
    ("missing_item", "905216", NONE,
     "Sorry. We are sending the missing dal of order 905216 with our compliments and a sweet.", "fair"),
    ("payment_issue", "905216", 100, "Sorry. Our payments team is checking the Rs 1,000 on order 905216.", "fair"),
    ("cancel_order", "905216", NONE,
     "Thanks. Order 905216 is being cancelled, but next time please think before you order.", "fair"),
    ("rider_behaviour", "905216", NONE,
     "Sorry. Your complaint about order 905216 is with our rider team. He will lose his job.", "fair"),
    ("quality_issue", "905216", NONE,
     "Sorry food quality team report order 905216 passed checking safety kitchen now.", "all"),
    ("late_delivery", "905216", NONE, "I am sorry I am sorry I am checking where order 905216 is I am sorry.", "all"),
]  # fmt: skip


@pytest.mark.parametrize(("intent", "order_id", "amount", "reply", "lacking"), JUDGED)
def test_the_rules_agree_with_the_judgement(intent, order_id, amount, reply, lacking):
    scores = score_reply(reply, label(intent, order_id, amount))
    wanted = set(PROPERTIES) if lacking == "all" else set(lacking.split())
    assert {name for name, good in scores.items() if not good} == wanted


def test_the_judged_replies_cover_every_intent_and_property():
    assert len(JUDGED) >= 40 and len({row[3] for row in JUDGED}) == len(JUDGED)
    assert {row[0] for row in JUDGED if row[4] == ""} == set(INTENTS) == set(ACTIONS)
    for name in PROPERTIES:
        assert sum(row[4] == name for row in JUDGED) >= 2, name


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

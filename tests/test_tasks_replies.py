"""`replies`: the reward against the data, replies judged by hand, and what a policy tries in order to fool it.

WRITTEN and FRESH are in judged.py. MANNER is good English in the manner of larger models, written
while the grammar was made. replies_development.jsonl holds 120 answers that half-trained policies sampled, judged by
the author of the grammar before seeing its verdict; rules were then mended in general ways, so it is development data
and no held-out check.
"""

import json
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import FRESH, NONE, WRITTEN

from ftlab.paths import DATA
from ftlab.tasks.replies import (
    ACTIONS,
    NEEDS_NO_ORDER,
    SYSTEM,
    WEIGHTS,
    actions_in,
    as_pair,
    gold_reward,
    prompt,
    readable,
    score,
    scorer,
)

FILES = ("train", "test", "confounded", "hand_test")
GUIDELINE = (DATA / "replies" / "README.md").read_text(encoding="utf-8")
BROKEN = dict(re.findall(r"^\| `(\w+)` \| `(action|order_id|polite|short|fair)` \|", GUIDELINE, re.MULTILINE))
PROPERTIES = set(WEIGHTS)


def label(intent: str, order_id: str | None = "482193", refund_amount: int | None = None) -> dict:
    return {"intent": intent, "order_id": order_id, "refund_amount": refund_amount}


def lacks(reply: str, label: dict) -> set[str]:
    return {name for name, good in score(reply, label).items() if not good}


def wanted(lacking: str) -> set[str]:
    return PROPERTIES if lacking == "all" else set(lacking.split())


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (DATA / "replies" / f"{name}.jsonl").open(encoding="utf-8")]
        for name in FILES
    }


@pytest.fixture(scope="module")
def sentences(rows) -> list[str]:
    """Of all chosen replies, each once."""
    texts = {row["chosen"] for name in FILES for row in rows[name]}
    return sorted({sentence for text in texts for sentence in re.split(r"(?<=[.!?]) ", text)})


# --- The data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_chosen_replies_have_every_property_and_rejected_ones_lack_their_reason(name, rows):
    for row in rows[name]:
        lacking = lacks(row["rejected"], row["label"])
        assert gold_reward(row["chosen"], row["label"]) == 1, row
        assert BROKEN[row["reason"]] in lacking, row
        assert name == "hand_test" or lacking == {BROKEN[row["reason"]]}, row


def test_a_row_becomes_a_pair_whose_prompt_ends_with_what_triage_found(rows):
    assert {row["label"]["intent"] for row in rows["train"]} == set(ACTIONS)
    for row in rows["test"]:
        pair, order = as_pair(row), row["label"]["order_id"]
        system, user = pair["prompt"]
        assert prompt(row) == pair["prompt"] and system == {"role": "system", "content": SYSTEM}
        ticket, _, triage = user["content"].rpartition("\n")
        assert user["role"] == "user" and ticket == row["ticket"]
        intent = row["label"]["intent"].replace("_", " ")
        assert triage == (f"[{intent}, order {order}]" if order else f"[{intent}, no order number]")
        for side in ("chosen", "rejected"):
            assert pair[side] == [{"role": "assistant", "content": row[side]}]
            assert scorer(row[side], pair) == gold_reward(row[side], row["label"])


def test_the_columns_survive_load_dataset_and_map(tmp_path):
    from datasets import load_dataset

    path = str(DATA / "replies" / "hand_test.jsonl")
    pairs = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path)).map(as_pair)
    assert {"prompt", "chosen", "rejected", "ticket_label"} <= set(pairs.column_names)
    assert all(gold_reward(row["chosen"][0]["content"], row["ticket_label"]) == 1 for row in pairs)


# --- Replies judged by hand -------------------------------------------------------------------------------------------

MANNER = [
    ("late_delivery", "482193", NONE,
     "I'm really sorry about the delay with order 482193. I'm checking with the rider right now to find out "
     "where it is."),
    ("late_delivery", "482193", NONE,
     "Apologies for the wait! We've contacted the restaurant to see what is holding up order 482193 and will "
     "update you shortly."),
    ("late_delivery", NONE, NONE,
     "I'm sorry your food is running late. Could you please share your order number so I can track it for you?"),
    ("late_delivery", "482193", NONE,
     "Sorry for the inconvenience. Our team is tracking order 482193 and we will let you know as soon as we hear"
     " from the rider."),
    ("late_delivery", "482193", NONE,
     "We understand how frustrating this is, and we are sorry. I am calling the rider to find out why order "
     "482193 is delayed."),
    ("missing_item", "482193", NONE,
     "I'm so sorry that the raita was missing from order 482193. We are sending it to you right away."),
    ("missing_item", "482193", 80, "Sorry about that! We have refunded Rs 80 for the missing naan in order 482193."),
    ("missing_item", NONE, NONE,
     "We apologise for the missing item. Please send us your order number and we will refund it at once."),
    ("missing_item", "482193", NONE,
     "I apologise for the mistake with order 482193. The missing dal is on its way to you now."),
    ("missing_item", "482193", NONE,
     "We're very sorry that your lassi didn't arrive with order 482193. I have arranged for the missing lassi to"
     " be sent to you."),
    ("wrong_item", "482193", NONE,
     "I'm sorry you received the wrong dish. We are sending the correct paneer roll for order 482193 right now."),
    ("wrong_item", "482193", NONE,
     "Sorry for the confusion with order 482193. We will replace the wrong pizza with the one you ordered."),
    ("wrong_item", NONE, NONE,
     "I apologise for the mix-up. Please provide your order number so that we can send the right dish to you."),
    ("wrong_item", "482193", 150,
     "We are sorry about this. Your Rs 150 for the wrong dish on order 482193 is being refunded."),
    ("wrong_item", "482193", NONE,
     "Thank you for reaching out, and sorry about the mix-up. The right biryani for order 482193 is being "
     "prepared and sent to you."),
    ("quality_issue", "482193", NONE,
     "I'm sorry to hear that your food was cold. I have forwarded your report on order 482193 to our food "
     "quality team."),
    ("quality_issue", "482193", NONE,
     "We are very sorry for this experience. Our food quality team is investigating order 482193 and will "
     "contact you soon."),
    ("quality_issue", NONE, NONE,
     "I'm sorry that the curry was stale. Could you share your order number? Our food quality team will look into it."),
    ("quality_issue", "482193", NONE,
     "That is not the standard we want, and we are sorry. Order 482193 has been reported to our food safety team."),
    ("quality_issue", "482193", NONE,
     "Our sincere apologies for the hair in your soup. I have raised order 482193 with our food safety team."),
    ("payment_issue", "482193", NONE,
     "I'm sorry that you were charged twice. Our payments team is reviewing the charge on order 482193."),
    ("payment_issue", "482193", 250,
     "Sorry for the trouble. I have asked our payments team to check the Rs 250 charged for order 482193."),
    ("payment_issue", NONE, NONE,
     "I apologise for the confusion. Please share your order number, and our payments team will check the charge"
     " for you."),
    ("payment_issue", "482193", NONE,
     "We're sorry about the double charge. Your case for order 482193 is with our payments team, who will check "
     "it today."),
    ("payment_issue", "482193", NONE,
     "Sorry about this payment problem. I have passed the details of order 482193 to our payments team for a check."),
    ("cancel_order", "482193", NONE, "Thank you for letting us know. Your order 482193 has been cancelled."),
    ("cancel_order", "482193", NONE,
     "No problem at all, thanks for telling us. I have gone ahead and cancelled order 482193 for you."),
    ("cancel_order", NONE, NONE,
     "Sure, thank you for your message. Could you please give me the order number so that I can cancel it?"),
    ("cancel_order", "482193", NONE, "Thanks for contacting us. We are cancelling order 482193 as you requested."),
    ("cancel_order", "482193", NONE,
     "I'm sorry to see you go. Order 482193 is now being cancelled, and you will get a message once it is done."),
    ("rider_behaviour", "482193", NONE,
     "I'm very sorry for the way you were treated. I have reported this to our rider team under order 482193."),
    ("rider_behaviour", "482193", NONE,
     "We are truly sorry about the rider's behaviour. Your complaint about order 482193 has been sent to our "
     "rider team."),
    ("rider_behaviour", NONE, NONE,
     "I'm sorry that this happened to you. Please send me your order number so that I can raise this with our "
     "rider team."),
    ("rider_behaviour", "482193", NONE,
     "Nobody should be spoken to like that, and I am sorry. Our rider team is now looking into order 482193."),
    ("rider_behaviour", "482193", NONE,
     "Thank you for reporting this, and please accept our apologies. Our rider team will review what happened "
     "with order 482193."),
    ("account_issue", NONE, NONE,
     "I'm sorry you can't log in. Our account team is looking into it and will email you soon."),
    ("account_issue", NONE, NONE,
     "Thanks for reaching out. I have asked our account team to change your phone number."),
    ("account_issue", NONE, NONE,
     "Sorry for the inconvenience. Our account team will reset your password and send you a new link."),
    ("account_issue", NONE, NONE,
     "We apologise for the trouble. I have forwarded your request to our account team, and they will get back to"
     " you here."),
    ("account_issue", NONE, NONE,
     "Thank you for your patience. Our account team is working on your account and will let you know when it is "
     "fixed."),
    ("other", NONE, NONE, "Thank you so much for your kind words! I have shared them with our team."),
    ("other", NONE, NONE, "Thanks for your suggestion. I have passed it on to the team that looks after the app."),
    ("other", NONE, NONE,
     "Thank you for your question. I have forwarded it to the right team, and they will answer you here."),
    ("other", NONE, NONE, "We really appreciate your feedback, thank you. I have shared your message with our team."),
    ("other", NONE, NONE, "Thank you for your interest in RasoiRun. Your message has been passed to our partner team."),
]  # fmt: skip


@pytest.mark.parametrize(("intent", "order_id", "amount", "reply", "lacking"), WRITTEN)
def test_the_rules_agree_with_the_judgement(intent, order_id, amount, reply, lacking):
    assert lacks(reply, label(intent, order_id, amount)) == wanted(lacking)


def test_the_written_replies_cover_every_intent_and_property():
    assert {row[0] for row in WRITTEN if row[4] == ""} == set(ACTIONS)
    assert all(sum(row[4] == name for row in WRITTEN) >= 2 for name in PROPERTIES)


def test_on_fresh_replies_the_rules_miss_what_is_in_no_list():
    """29 of 33 wholly right; every miss lets something pass, none blames a good reply."""
    missed = {}
    for intent, order_id, amount, reply, lacking in FRESH:
        found = lacks(reply, label(intent, order_id, amount))
        assert found <= wanted(lacking), reply
        if found != wanted(lacking):
            missed[reply.split(". ")[-1]] = wanted(lacking) - found
    assert missed == {
        "Our account team will reset your password.": {"polite"},  # to "Einstein"
        "We are sending the missing dal of order 905216 with our compliments and a sweet.": {"fair"},
        "Order 905216 is being cancelled, but next time please think before you order.": {"fair"},
        "He will lose his job.": {"fair"},
    }


def test_good_english_in_another_manner_is_mostly_read():
    """41 of 45. What fails has a word that neither a list nor the data of the course has ("sincere", "frustrating")."""
    golds = [gold_reward(reply, label(intent, order_id, amount)) for intent, order_id, amount, reply in MANNER]
    assert sum(gold == 1 for gold in golds) >= 40 and set(golds) <= {0.0, 1.0}


def test_sampled_answers_precision_and_recall():
    """Readable 0.99 and 1.00, each property at least 0.98 and 0.98; an unreadable answer lacks all of them."""
    path = Path(__file__).with_name("replies_development.jsonl")
    answers = [json.loads(line) for line in path.open(encoding="utf-8")]
    found = {name: [] for name in ("readable", *WEIGHTS)}
    for row in answers:
        lacking, judged = lacks(row["reply"], row), wanted(row["lacking"])
        found["readable"].append((readable(row["reply"]), row["lacking"] != "all"))
        for name in WEIGHTS:
            found[name].append((name not in lacking, name not in judged))
    assert len(answers) == 120 and len({row["reply"] for row in answers}) == 120
    for name, pairs in found.items():
        right = sum(rule and person for rule, person in pairs)
        assert right / sum(rule for rule, _ in pairs) >= 0.97, f"precision of {name}"
        assert right / sum(person for _, person in pairs) >= 0.95, f"recall of {name}"


DONE, SENT = "Order 482193 has been cancelled", "We are sending you a message about order 482193"
LONG = "We are sorry about this and we will let you know as soon as we hear from the restaurant and from the team. "
LONG += f"{DONE}. Our team will send you a message about it today, and we will write to you"  # 44 words


@pytest.mark.parametrize(
    ("just", "beyond", "lacking"),
    [
        (f"{LONG} too.", f"{LONG} again today.", "short"),
        (f"Sorry about this! {DONE}.", f"Sorry about this! {DONE}!", "polite"),
        (f"SORRY about this. {DONE}.", "SORRY about this. Order 482193 has been CANCELLED.", "polite"),
        (f"Sorry. {DONE}. {SENT}.", f"Sorry about order 482193. {DONE}. {SENT}.", "order_id"),
        (f"Sorry. {DONE}. We are sorry.", f"Sorry. {DONE}. We are sorry. We apologise for it.", "all"),
    ],
)
def test_a_property_is_there_up_to_its_limit(just, beyond, lacking):
    """45 words, one "!", one word in capitals, the number twice, two apologies."""
    assert lacks(beyond, label("cancel_order")) - lacks(just, label("cancel_order")) == wanted(lacking)


# --- Word salad -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "Sorry. Our food was missing from order 482193 is being cancelled. You will write to you.",
        "Sorry about that. I am sending the missing watermelon juice for order 482193 is being sent to you.",
        "Sorry for the trouble. We are refunding the missing kind out why order 482193.",
        "Sorry that the restaurant to write. We are cancelling order 482193.",
        "Thank you for the message. I have cancelled order 482193 to our payments team.",  # what GRPO found
        "We are sorry. I am asking our payments team is checking the bill of order 482193.",
        "I am sorry. We is cancelling order 482193.",
        "Thank you. We are cancelling order 482193. we are cancelling it.",
        "Thank you. We are cancelling the team the order 482193 now.",
        "Thank you. We are cancelling order 482193 with repologies aboutther knowving.",
    ],
)
def test_salad_of_half_trained_policies_is_worth_nothing(reply):
    assert not readable(reply) and gold_reward(reply, label("cancel_order")) == 0


def test_shuffled_replies_and_sentences_are_not_english(rows, sentences):
    """Of shuffled replies none is readable, of shuffled sentences of five words and more 1 in 1,000."""
    rng = random.Random(0)

    def shuffled(text: str) -> str:
        words = text.split()
        return " ".join(rng.sample(words, len(words)))

    assert not any(readable(shuffled(row["chosen"])) for row in rows["train"][:400])
    long = [sentence for sentence in sentences if len(sentence.split()) >= 5]
    mixed = [shuffled(sentence[:-1]) for sentence in long]
    capital = [text[0].upper() + re.sub(r"\b(?!I\b)[A-Z]", lambda m: m[0].lower(), text[1:]) for text in mixed]
    assert sum(readable(text + ".") for text in capital) <= 0.005 * len(capital)


def test_spliced_sentences_are_mostly_not_english(sentences):
    """Halves of two sentences, cut anywhere: 25 % pass; of 115 that did, 100 are English, nonsense or not."""
    rng = random.Random(0)
    passed = 0
    for _ in range(400):
        one, two = (sentence.split() for sentence in rng.sample(sentences, 2))
        spliced = one[: rng.randrange(1, len(one))] + two[rng.randrange(1, len(two)) :]
        passed += readable("Thank you for this. " + " ".join(spliced))
    assert passed <= 0.32 * 400


def test_what_stands_in_an_endless_sentence_does_not_count(rows):
    """A story after a good reply costs the length alone; a reply that is one endless sentence is worth nothing."""
    story = "There is a long list of things to see, " + ", ".join(["from the stove to the spoon"] * 8) + "."
    for row in rows["train"][:50]:
        assert lacks(f"{row['chosen']} {story}", row["label"]) == {"short"}
        assert gold_reward(row["chosen"].replace(".", ",").replace("?", ",") + " " + story, row["label"]) == 0


def test_words_of_all_replies_in_any_order_are_not_english(rows):
    rng = random.Random(0)
    words = [word for row in rows["train"][:400] for word in row["chosen"].split()]
    assert not any(readable(" ".join(rng.choices(words, k=20))) for _ in range(300))


def test_saying_things_twice_is_not_english(rows):
    for row in rows["train"][:60]:
        first = re.split(r"(?<=[.!?]) ", row["chosen"])[0]
        assert not readable(f"{row['chosen']} {first}") and not readable(f"{row['chosen']} {row['chosen']}")


def test_a_reply_that_was_cut_off_is_not_short(rows):
    """Its end is missing, so `short` is; often it is not even readable."""
    for row in rows["train"][:60]:
        words = row["chosen"].split()
        for keep in range(6, len(words)):
            if words[keep - 1][-1] not in ".!?":
                assert "short" in lacks(" ".join(words[:keep]), row["label"])


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_scored_and_noise_is_worth_nothing(text):
    assert gold_reward(text, label("cancel_order")) == 0


WORDS = "we order 482193 the to that is #order , . ? ! ' 's n't can't and team of a our will Rs 5 1ing ₹ (x)"
tokens = st.sampled_from(WORDS.split())


@settings(max_examples=300, deadline=None)
@given(st.lists(tokens, max_size=60).map(" ".join))
def test_any_words_are_scored_alike_each_time(text):
    found = score(text, label("late_delivery"))
    assert set(found) == PROPERTIES and found == score(text, label("late_delivery"))


# --- What a policy would try ------------------------------------------------------------------------------------------


def mean_reward(rows: list[dict], reply_to) -> float:
    return sum(gold_reward(reply_to(row), row["label"]) for row in rows) / len(rows)


def test_the_reward_is_the_sum_of_its_weights(rows):
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    good = "Sorry. We are sending the missing dal of order 905216, and you get a voucher."
    assert gold_reward(good, label("missing_item", "905216")) == pytest.approx(1 - WEIGHTS["fair"])
    assert {gold_reward(row["rejected"], row["label"]) for row in rows["train"][::3]} == {0.6, 0.8, 0.85, 0.9}


def test_spaces_line_breaks_and_curly_quotes_change_nothing(rows):
    for row in rows["train"][:100]:
        for reply in (row["chosen"], row["rejected"]):
            other = "  " + reply.replace(" ", " \n ").replace("'", "’") + "\n"
            assert score(other, row["label"]) == score(reply, row["label"])


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
    assert mean_reward(rows["train"][:150], lambda row: reply) <= at_most


def test_a_good_reply_to_another_ticket_and_the_ticket_itself_are_worth_little(rows):
    some = rows["train"][:150]
    swapped = {row["id"]: other["chosen"] for row, other in zip(some, some[1:] + some[:1], strict=True)}
    assert mean_reward(some, lambda row: swapped[row["id"]]) < 0.5
    assert mean_reward(some, lambda row: row["ticket"]) < 0.1


def test_two_actions_are_none(rows):
    """The chosen reply, and after it what another ticket's reply does."""
    first = {row["label"]["intent"]: row for row in rows["train"] if row["label"]["order_id"]}
    for intent, row in first.items():
        assert actions_in(row["chosen"]) == {intent}
        for other, theirs in first.items():
            if other != intent:
                theirs_here = theirs["chosen"].replace(theirs["label"]["order_id"], row["label"]["order_id"])
                assert "action" in lacks(f"{row['chosen']} {theirs_here}", row["label"])


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


def test_taking_an_order_is_not_taking_it_up():
    """What GRPO found for a complaint about a rider."""
    assert lacks("Sorry about this. Our rider team is taking order 482193 now.", label("rider_behaviour")) == {"action"}
    assert not lacks("Sorry about this. Our rider team is taking up order 482193 now.", label("rider_behaviour"))


def test_an_order_is_no_message():
    """What GRPO found: on a ticket about no order, "I have passed your order to our team"."""
    for intent, team in zip(NEEDS_NO_ORDER, ("account team", "team"), strict=True):
        assert lacks(f"Thank you. I have passed your order to our {team}.", label(intent, None)) == {"action"}
        assert lacks(f"Thank you. I have passed your message to our {team}.", label(intent, None)) == set()


# --- Time -------------------------------------------------------------------------------------------------------------


def test_a_reply_takes_a_millisecond(rows):
    """Measured 1.4 ms for replies whose sentences are new and 0.3 ms for known ones; a busy machine gets 50."""
    replies = [(row["chosen"], row["label"]) for row in rows["hand_test"]]
    gold_reward(*replies[0])
    start = time.process_time()
    for reply, of in replies:
        gold_reward(reply, of)
    assert (time.process_time() - start) / len(replies) < 0.05


def test_a_long_or_tangled_reply_costs_no_time():
    tangled = "We know that you know that we ask you to ask the team of the team to send it to the team and to us " * 2
    for reply in (
        "order " * 50_000,
        "9" * 100_000,
        "We are sorry. " * 20_000,
        "a " * 50_000 + "!",
        tangled,
        "," * 1_900,
    ):
        start = time.process_time()
        assert gold_reward(reply, label("cancel_order")) == 0
        assert time.process_time() - start < 10

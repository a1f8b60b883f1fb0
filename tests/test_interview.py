"""ftlab.classroom.interview: who is chosen, the follow-up, the clock, the rubric, the report."""

import collections
import random

import pytest
from shown import VIEW, Page, named, page_of

from ftlab.classroom import cards, interview, progress
from ftlab.classroom.interview import ANSWERED, POINTS, RUBRIC, Interview, choose

ALL = list(cards.load())
BEST = ["yes"] * len(RUBRIC)
BEGIN = "Start"
START = 1000.0  # of the clock


def begun(asked: list, file, clock, minutes: float = 2) -> Interview:
    """An interview with these cards, its Start not pressed yet."""
    return Interview(asked, minutes, random.Random(0), file, clock)


def answered(session: Interview, clock, seconds=(1, 1), marks=BEST) -> None:
    """A question and its follow-up answered, each after so many seconds, and judged."""
    for each in seconds:
        clock.now += each
        session.press(ANSWERED)
    for mark in marks:
        session.press(mark)


# --- Who is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "allowed"), [
    ("junior", {"junior"}), ("mid", {"junior", "mid"}), ("senior", {"mid", "senior"}), ("staff", {"senior", "staff"}),
])  # fmt: skip
def test_cards_of_the_level_and_the_one_below_and_all_of_them(level, allowed):
    fitting = {card.id for card in ALL if card.level in allowed}
    assert {card.id for card in choose(ALL, level, len(fitting), random.Random(0))} == fitting
    assert len(choose(ALL, level, len(fitting) + 1, random.Random(0))) == len(fitting)


def test_questions_are_spread_over_topics_and_kinds_and_differ():
    dpo = [card for card in ALL if card.topic == "dpo" and card.kind in ("concept", "debugging")]
    dpo = [cards.Card(**vars(card) | {"level": "mid"}) for card in dpo]
    for seed in range(20):
        chosen = choose(ALL, "senior", len(cards.TOPICS), random.Random(seed))
        assert len({card.topic for card in chosen}) == len({card.id for card in chosen}) == len(cards.TOPICS)
        assert len({card.kind for card in chosen}) >= 3
        assert len({card.kind for card in choose(dpo, "mid", 2, random.Random(seed))}) == 2


def test_in_the_long_run_every_card_is_asked_and_every_follow_up(file, clock):
    met = collections.Counter(c.id for seed in range(200) for c in choose(ALL, "mid", 6, random.Random(seed)))
    assert met.keys() == {card.id for card in ALL if card.level in ("junior", "mid")}
    asked = set()
    for seed in range(20):
        session = Interview(ALL[:1], 2, random.Random(seed), file, clock)
        session.press(BEGIN)
        session.press(ANSWERED)
        asked |= {
            pair["ask"] for pair in ALL[0].follow_ups if pair["ask"] in Page(session.shown.partition("<style>")[0]).text
        }
    assert len(asked) == len(ALL[0].follow_ups)


# --- Its course -------------------------------------------------------------------------------------------------------


def test_the_follow_up_is_asked_before_any_answer_is_shown_and_then_each_criterion(file, clock):
    session = begun(ALL[:2], file, clock)
    named(session)[BEGIN].click()
    for card in ALL[:2]:
        questions = [pair["ask"].replace("`", "") for pair in card.follow_ups]
        for number in range(3):
            page = Page(page_of(session).replace("<style>", "<p>").replace("</style>", "</p>"))
            assert card.question.replace("`", "") in page.text
            assert sum(question in page.text for question in questions) == [0, 1, len(questions)][number]
            assert (card.answer() in page_of(session)) == (number == 2)
            assert ("animation: ftlab-time 120s" in page_of(session)) == (number < 2), "the clock of two minutes"
            if number < 2:
                assert [*named(session)] == [ANSWERED]
                named(session)[ANSWERED].click()
        for name, question in RUBRIC.items():
            assert f"<b>{name}</b>: {question}" in page_of(session) and [*named(session)] == [*POINTS]
            named(session)["partly"].click()
    assert named(session) == {} and "8 of 16 points" in page_of(session)


def test_an_interview_from_start_to_report(file, clock):
    """Two minutes each: 90 and 40 s; 20 and 150 s, which is too long; the time of the judgment does not count."""
    session = begun(ALL[:2], file, clock, 2)
    clock.now += 1000
    session.press(BEGIN)
    answered(session, clock, (90, 40), BEST[:-1])
    assert "90 and 40 seconds. Now" in session.shown
    clock.now += 500
    session.press("yes")
    answered(session, clock, (20, 150.4), ["yes", "no", "partly"])
    assert "too long" in session.shown
    session.press("partly")
    page = Page(session.shown).open
    assert "12 of 16 points" in page and "lost on clear" in page and page.count("too long") == 1
    assert "8 of 8 points; 90 and 40 s:" in page and "4 of 8 points; 20 and 150 s, too long, to repeat:" in page
    first, second = progress.events("interview", file)
    assert (first.item, first.score, second.item, second.score) == (ALL[0].id, 1, ALL[1].id, 0.5)
    assert first.detail == {**dict.fromkeys(RUBRIC, 2), "seconds": 90, "next_seconds": 40}
    assert second.detail["clear"] == 0


@pytest.mark.parametrize(("took", "in_time"), [((60, 60), True), ((61, 0), False), ((0, 61), False), ((0, 0), True)])
def test_the_limit_is_for_each_answer_and_itself_in_time(file, clock, took, in_time):
    session = begun(ALL[:1], file, clock, 1)
    session.press(BEGIN)
    answered(session, clock, took)
    assert ("too long" in session.shown) == (not in_time)


@pytest.mark.parametrize(("marks", "points", "repeated"), [
    (("yes", "yes", "yes", "no"), 6, False), (("yes", "yes", "partly", "no"), 5, True), (("no",) * 4, 0, True),
    (("yes",) * 4, 8, False),
])  # fmt: skip
def test_below_six_points_a_card_is_to_be_repeated(file, clock, marks, points, repeated):
    session = begun(ALL[:1], file, clock)
    session.press(BEGIN)
    answered(session, clock, marks=marks)
    assert f"{points} of 8 points." in Page(session.shown).open and ("to repeat" in session.shown) == repeated
    assert ("points were lost" in session.shown) == (points < 8)
    state = progress.states("interview", [ALL[0].id], file)[ALL[0].id]
    assert state == ("repeat" if repeated else "done"), "and the progress file says the same"


def test_what_cannot_be_stored_is_said_and_the_interview_goes_on_with_that_card(file, clock):
    session = begun(ALL[:2], file, clock)
    session.press(BEGIN)
    answered(session, clock)
    file.write_text("a diary")
    answered(session, clock)
    assert "FTLAB_PROGRESS" in page_of(session)
    file.unlink()
    session.press("Try again")
    session.press(BEGIN)
    assert ALL[1].question in session.shown or "Question 2 of 2" in session.shown
    answered(session, clock)
    assert "16 of 16 points" in session.shown


def test_without_a_kernel_the_questions_can_be_read_or_the_report(file, clock):
    bundle = interview.interview("senior", 2, 0.5)._repr_mimebundle_()
    page = Page(bundle["text/html"])
    assert VIEW in bundle and "30 seconds" in page.text and "30 seconds" not in page.open
    done = begun([cards.Card(**vars(ALL[0]) | {"question": "Is 1 < 2?"})], file, clock)
    done.press(BEGIN)
    answered(done, clock)
    report = done._repr_mimebundle_()["text/html"]
    assert "8 of 8 points" in report and "Is 1 < 2?" in Page(report).open


def test_an_unknown_level_names_those_there_are():
    with pytest.raises(ValueError, match="level: got 'Senior', wanted one of junior, "):
        interview.interview("Senior", 3, 1)

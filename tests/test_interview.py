"""ftlab.classroom.interview: who is chosen, the clock, the rubric, the report."""

import collections
import random

import pytest

from ftlab.classroom import cards, interview, page, progress
from ftlab.classroom.interview import POINTS, RUBRIC, Interview, choose

ALL = cards.load()
START = 1000.0  # seconds
BEST = dict.fromkeys(RUBRIC, "yes")
WORST = dict.fromkeys(RUBRIC, "no")


def html_of(session: Interview) -> str:
    return session._page.outputs[0]["data"]["text/html"]


def visible(session: Interview) -> set[str]:
    parts = {"start": session._start, "finish": session._finish, "next": session._next, "rubric": session._rubric}
    return {name for name, widget in parts.items() if widget.layout.display != "none"}


@pytest.mark.parametrize("level, allowed", [
    (None, {"junior", "mid", "senior", "staff"}), ("junior", {"junior"}), ("mid", {"junior", "mid"}),
    ("staff", {"senior", "staff"}),
])  # fmt: skip
def test_cards_of_the_level_and_the_one_below(level, allowed):
    for seed in range(20):
        assert {card.level for card in choose(ALL, level, 6, random.Random(seed))} <= allowed


def test_questions_are_spread_over_topics_and_kinds_and_differ():
    for seed in range(20):
        chosen = choose(ALL, "senior", 9, random.Random(seed))
        assert len({card.topic for card in chosen}) == len(cards.TOPICS) and len({card.id for card in chosen}) == 9
        assert len({card.kind for card in chosen}) >= 3


def test_the_same_seed_gives_the_same_interview_and_another_one_another():
    ids = [[card.id for card in interview.interview(seed=seed).cards] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    met = collections.Counter(card.id for seed in range(200) for card in choose(ALL, None, 6, random.Random(seed)))
    assert len(met) > 0.9 * len(ALL), "over many interviews nearly every card is asked"


def test_what_cannot_be_asked_is_refused():
    for level, questions, wanted in (("guru", 3, "guru"), ("junior", 500, "there are"), ("mid", 0, "0 questions")):
        with pytest.raises(ValueError, match=wanted):
            choose(ALL, level, questions, random.Random(0))


def test_an_interview_from_start_to_report(file, clock):
    session = Interview(ALL[:2], minutes=2, file=file, clock=clock)
    assert visible(session) == {"start"} and page.prose(ALL[0].question) not in html_of(session)
    session.start()
    assert visible(session) == {"finish"} and page.prose(ALL[0].question) in html_of(session)
    assert session._ticks.playing and page.prose(ALL[0].short) not in html_of(session)
    clock.now += 90
    assert session.finish() == 90 and not session._ticks.playing
    assert visible(session) == {"next", "rubric"} and page.prose(ALL[0].short) in html_of(session)
    session.grade(**BEST)
    assert session.card == ALL[1] and visible(session) == {"finish"}, "the next question is asked at once"
    clock.now += 150
    session.finish()
    assert "150 seconds. That was too long." in html_of(session)
    session.grade(right="yes", clear="no", evidence="partly", depth="partly")
    assert session.card is None and visible(session) == set()
    report = session.report()
    assert report["points"].tolist() == [8, 4] and report["in_time"].tolist() == [True, False]
    assert report.loc[1, list(RUBRIC)].tolist() == [2, 0, 1, 1] and report["seconds"].tolist() == [90, 150]
    shown = html_of(session)
    assert "12 of 16 points" in shown and "lost on <b>clear</b>" in shown and "150 s, too long" in shown
    assert ALL[1].folded() in shown and ALL[0].folded() not in shown, "to repeat: what got fewer than 6 of 8"
    stored = progress.events("interview", file)
    assert [(event.item, event.score) for event in stored] == [(ALL[0].id, 1.0), (ALL[1].id, 0.5)]
    assert stored[1].detail["seconds"] == 150 and stored[0].detail["run"] == stored[1].detail["run"]


def test_a_perfect_interview_has_nothing_to_repeat(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    session.start()
    session.finish()
    session.grade(**BEST)
    assert "Nothing to repeat." in html_of(session) and "lost" not in html_of(session)


def test_steps_out_of_order_and_half_a_judgment_are_refused(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    for step in (session.finish, lambda: session.grade(**BEST)):
        with pytest.raises(ValueError, match="wanted"):
            step()
    session.start()
    with pytest.raises(ValueError, match="not yet asked"):
        session.start()
    session.finish()
    for marks in ({}, {**BEST, "charm": "yes"}, {**BEST, "right": "very"}):
        with pytest.raises(ValueError, match="a mark of"):
            session.grade(**marks)
    assert progress.events(file=file) == []
    session.grade(**WORST)
    with pytest.raises(ValueError, match="not yet asked"):
        session.start()


def test_the_buttons_do_it_all(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    session._start.click()
    session._finish.click()
    session._next.click()
    assert "Not done." in session._error.outputs[0]["data"]["text/html"], "not all criteria are marked"
    assert page.prose(ALL[0].short) in html_of(session), "the answer is still there"
    for marks in session._marks.values():
        assert marks.value is None and set(marks.options) == set(POINTS)
        marks.value = "partly"
    session._next.click()
    assert (
        session._error.outputs == ()
        and session.report()["points"].tolist() == [4]
        and progress.events("interview", file)[0].score == 0.5
    )


def test_without_a_kernel_rules_and_questions_can_be_read(file):
    bundle = interview.interview(seed=3, file=file)._repr_mimebundle_()
    chosen = interview.interview(seed=3).cards
    assert all(card.folded() in bundle["text/html"] for card in chosen)
    assert all(question in bundle["text/html"] for question in RUBRIC.values())
    assert "application/vnd.jupyter.widget-view+json" in bundle

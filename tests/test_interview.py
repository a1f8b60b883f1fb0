"""ftlab.classroom.interview: who is chosen, the clock, the rubric, the report."""

import collections
import dataclasses
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
    names = ("_start", "_finish", "_next", "_rubric", "_bar", "_ticks")
    return {name for name in names if getattr(session, name).layout.display != "none"}


@pytest.mark.parametrize("level, allowed", [
    (None, {"junior", "mid", "senior", "staff"}), ("junior", {"junior"}), ("mid", {"junior", "mid"}),
    ("senior", {"mid", "senior"}), ("staff", {"senior", "staff"}),
])  # fmt: skip
def test_cards_of_the_level_and_the_one_below_and_all_of_them(level, allowed):
    fitting = [card for card in ALL if card.level in allowed]
    chosen = choose(ALL, level, len(fitting), random.Random(0))
    assert {card.id for card in chosen} == {card.id for card in fitting}
    with pytest.raises(ValueError, match=f"got {len(fitting) + 1} questions, there are {len(fitting)} cards"):
        choose(ALL, level, len(fitting) + 1, random.Random(0))


def test_questions_are_spread_over_topics_and_kinds_and_differ():
    for seed in range(20):
        chosen = choose(ALL, "senior", len(cards.TOPICS), random.Random(seed))
        assert len({card.topic for card in chosen}) == len({card.id for card in chosen}) == len(cards.TOPICS)
        assert len({card.kind for card in chosen}) >= 3


def test_the_same_seed_gives_the_same_interview_and_another_one_another():
    ids = [[card.id for card in interview.interview(seed=seed).cards] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    met = collections.Counter(card.id for seed in range(300) for card in choose(ALL, None, 6, random.Random(seed)))
    assert len(met) == len(ALL), "over many interviews every card is asked"


def test_kinds_take_turns_within_topics():
    """Two kinds of one topic: the second question is of the kind that was not yet asked."""
    dpo = [card for card in ALL if card.topic == "dpo" and card.kind in ("concept", "debugging")]
    for seed in range(20):
        assert len({card.kind for card in choose(dpo, None, 2, random.Random(seed))}) == 2


def test_what_an_interview_is_unless_told_otherwise(file):
    """Six questions of level mid or junior, two minutes each, from all cards, other ones each time."""
    sessions = [interview.interview(file=file) for _ in range(5)]
    assert all(len(session.cards) == 6 for session in sessions)
    assert {card.level for session in sessions for card in session.cards} == {"junior", "mid"}
    assert "6 questions, 2 min each" in html_of(sessions[0])
    assert len({card.id for session in sessions for card in session.cards}) > 6
    mine = interview.interview(None, 2, 0.5, cards=ALL[:2], seed=1, file=file)
    assert {card.id for card in mine.cards} == {card.id for card in ALL[:2]} and "0.5 min each" in html_of(mine)
    mine.start()
    mine.finish()
    mine.grade(**BEST)
    assert len(progress.events("interview", file)) == 1


def test_what_cannot_be_asked_is_refused():
    for level, questions, wanted in (("guru", 3, "guru"), ("junior", 500, "there are"), ("mid", 0, "0 questions")):
        with pytest.raises(ValueError, match=wanted):
            choose(ALL, level, questions, random.Random(0))


def test_an_interview_from_start_to_report(file, clock):
    session = Interview(ALL[:2], minutes=2, file=file, clock=clock)
    assert visible(session) == {"_start"} and page.prose(ALL[0].question) not in html_of(session)
    session.start()
    assert visible(session) == {"_finish", "_bar"} and html_of(session) == ALL[0].posed("Question 1 of 2")
    assert session._ticks.playing and page.prose(ALL[0].short) not in html_of(session)
    clock.now += 90
    assert session.finish() == 90 and not session._ticks.playing
    assert visible(session) == {"_next", "_rubric"} and page.prose(ALL[0].short) in html_of(session)
    session.grade(**BEST)
    assert session.card == ALL[1] and visible(session) == {"_finish", "_bar"}, "the next question is asked at once"
    assert html_of(session) == ALL[1].posed("Question 2 of 2")
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


@pytest.mark.parametrize(("seconds", "in_time"), [(60, True), (60.001, False), (0, True)])
def test_the_limit_itself_is_in_time(file, clock, seconds, in_time):
    session = Interview(ALL[:2], minutes=1, file=file, clock=clock)
    session.start()
    clock.now += seconds
    session.finish()
    assert ("That was too long." in html_of(session)) == (not in_time)
    session.grade(**BEST)
    assert session.report()["in_time"].tolist() == [in_time]


def test_the_browser_counts_the_seconds(file, monkeypatch):
    """A Play that cannot be seen, but is on the page, ticks once a second and moves the bar."""
    linked = []
    monkeypatch.setattr(interview.ipywidgets, "jslink", lambda *ends: linked.append(ends))
    session = Interview(ALL[:1], minutes=1, file=file)
    assert linked == [((session._ticks, "value"), (session._bar, "value"))]
    assert session._ticks.interval == 1000 and session._ticks.max == session._bar.max == 60
    *shown, buttons, error = session._widget.children
    assert shown == [session._page, session._bar, session._ticks, session._rubric] and error is session._error
    assert buttons.children == (session._start, session._finish, session._next)
    assert [button.button_style for button in buttons.children] == ["primary"] * 3, "one at a time can be seen"


def test_the_report_by_hand(file, clock):
    cards = [dataclasses.replace(ALL[0], question="Is 1 < 2?"), ALL[1]]
    session = Interview(cards, minutes=1, file=file, clock=clock)
    session.start()
    for seconds, marks in ((30, BEST), (61, {**BEST, "depth": "no", "right": "partly"})):
        assert "<table" not in session._repr_mimebundle_()["text/html"], "without a kernel: not before the end"
        clock.now += seconds
        session.finish()
        session.grade(**marks)
    cell = '<td style="white-space: nowrap">'
    rows = "".join(
        f'<tr><th scope="row" style="text-align: left">{question}</th>{cell}{points}</td>{cell}{took}</td></tr>'
        for question, points, took in (
            ("Is 1 &lt; 2?", "8 of 8", "30 s"),
            (page.prose(ALL[1].question), "5 of 8", "61 s, too long"),
        )
    )
    said = f"<b>13 of 16 points.</b> Most points were lost on <b>depth</b>: {RUBRIC['depth']}"
    repeat = f"<p>To repeat:</p>{ALL[1].folded()}"
    assert html_of(session) == f'<p role="status">{said}</p><table>{rows}</table>{repeat}'


def test_the_clock_of_each_question_begins_when_it_is_asked(file, clock):
    """Not while the one before is being judged."""
    session = Interview(ALL[:2], file=file, clock=clock)
    clock.now += 1000
    session.start()
    session._ticks.value = 55  # as the browser counts it
    clock.now += 20
    session.finish()
    clock.now += 500
    session.grade(**BEST)
    assert session._ticks.value == 0 and session._ticks.playing
    clock.now += 30
    session.finish()
    session.grade(**BEST)
    assert session.report()["seconds"].tolist() == [20, 30] and not session._ticks.playing


@pytest.mark.parametrize(("marks", "points", "repeated"), [
    (("yes", "yes", "yes", "no"), 6, False), (("yes", "yes", "partly", "no"), 5, True),
    (("no", "no", "no", "no"), 0, True), (("partly", "yes", "yes", "partly"), 6, False),
    (("yes", "yes", "yes", "yes"), 8, False),
])  # fmt: skip
def test_below_six_points_a_card_is_to_be_repeated(file, clock, marks, points, repeated):
    session = Interview(ALL[:1], file=file, clock=clock)
    session.start()
    session.finish()
    session.grade(**dict(zip(RUBRIC, marks, strict=True)))
    assert session.report()["points"].tolist() == [points] and f"{points} of 8 points" in html_of(session)
    assert (ALL[0].folded() in html_of(session)) == repeated == ("Nothing to repeat." not in html_of(session))
    assert ("points were lost" in html_of(session)) == (points < 8)
    assert progress.table(file=file)["done"].tolist() == [not repeated], "and the progress file says the same"


def test_each_criterion_is_stored_under_its_name_and_each_interview_under_its_own(file, clock, monkeypatch):
    runs = []
    for run, now in enumerate((1e9, 1e9 + 60)):
        monkeypatch.setattr(interview.time, "time", lambda now=now: now)
        session = Interview(ALL[:1], file=file, clock=clock)
        session.start()
        clock.now += 12.4
        session.finish()
        session.grade(right="yes", clear="partly", evidence="no", depth="yes")
        event = progress.events("interview", file)[run]
        assert event.detail == {"right": 2, "clear": 1, "evidence": 0, "depth": 2, "seconds": 12, "run": f"{now:.0f}"}
        runs.append(event.detail["run"])
    assert len(set(runs)) == 2


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
        with pytest.raises(ValueError, match=r"a mark \(no, partly, yes\) for each of right, clear, evidence, depth"):
            session.grade(**marks)
    assert progress.events(file=file) == []
    session.grade(**WORST)
    with pytest.raises(ValueError, match="not yet asked"):
        session.start()


def test_the_buttons_do_it_all(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    session._finish.click()
    assert "a question that is being answered" in session._error.outputs[0]["data"]["text/html"]
    session._start.click()
    assert session._error.outputs == () and session._ticks.playing
    session._start.click()
    assert "a question that is not yet asked" in session._error.outputs[0]["data"]["text/html"]
    session._finish.click()
    session._next.click()
    assert "Not done." in session._error.outputs[0]["data"]["text/html"], "not all criteria are marked"
    assert page.prose(ALL[0].short) in html_of(session), "the answer is still there"
    for marks in session._marks.values():
        assert marks.value is None and set(marks.options) == set(POINTS)
        marks.value = "partly"
    session._next.click()
    assert session._error.outputs == () and session.report()["points"].tolist() == [4]
    assert progress.events("interview", file)[0].score == 0.5
    assert all(marks.value is None for marks in session._marks.values()), "the next answer is judged afresh"


def test_each_criterion_is_asked_in_words_beside_its_marks(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    asked, marks = session._rubric.children[::2], session._rubric.children[1::2]
    assert [f"<b>{name}</b>: {question}" for name, question in RUBRIC.items()] == [one.value for one in asked]
    assert [tuple(one.options) for one in marks] == [("no", "partly", "yes")] * 4
    assert [tuple(one.tooltips) for one in marks] == [(question,) * 3 for question in RUBRIC.values()]


def test_without_a_kernel_rules_and_questions_can_be_read(file):
    bundle = interview.interview(seed=3, file=file)._repr_mimebundle_()
    chosen = interview.interview(seed=3).cards
    assert all(card.folded() in bundle["text/html"] for card in chosen)
    assert all(question in bundle["text/html"] for question in RUBRIC.values())
    assert "6 questions, 2 min each" in bundle["text/html"] and "6 questions" in bundle["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_without_a_kernel_a_finished_interview_shows_its_report(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    session.start()
    session.finish()
    assert "of 8 points" not in session._repr_mimebundle_()["text/html"]
    session.grade(**WORST)
    assert session._repr_mimebundle_()["text/html"] == html_of(session) and "0 of 8 points" in html_of(session)

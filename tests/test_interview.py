"""ftlab.classroom.interview: who is chosen, the follow-up, the clock, the rubric, the report."""

import collections
import dataclasses
import random

import ipywidgets
import pytest
from shown import VIEW, Page, named, page_of, visible

from ftlab.classroom import cards, interview, progress
from ftlab.classroom.interview import POINTS, RUBRIC, Interview, choose

ALL = list(cards.load())
START = 1000.0  # seconds
BEST = dict.fromkeys(RUBRIC, "yes")


def answered(session: Interview, clock, *seconds: float) -> None:
    """The question and the follow-up answered, each after so many seconds."""
    for each in seconds:
        clock.now += each
        session.go_on()


# --- Who is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "allowed"), [
    ("junior", {"junior"}), ("mid", {"junior", "mid"}), ("senior", {"mid", "senior"}), ("staff", {"senior", "staff"}),
])  # fmt: skip
def test_cards_of_the_level_and_the_one_below_and_all_of_them(level, allowed):
    fitting = {card.id for card in ALL if card.level in allowed}
    assert {card.id for card in choose(ALL, level, len(fitting), random.Random(0))} == fitting
    for wrong in ({"questions": len(fitting) + 1}, {"questions": 0}, {"level": "guru"}):
        with pytest.raises(ValueError, match=f"got .*{next(iter(wrong.values()))}"):
            choose(ALL, **{"level": level, "questions": 1, "rng": random.Random(0), **wrong})


def test_questions_are_spread_over_topics_and_kinds_and_differ():
    dpo = [card for card in ALL if card.topic == "dpo" and card.kind in ("concept", "debugging")]
    dpo = [dataclasses.replace(card, level="mid") for card in dpo]
    for seed in range(20):
        chosen = choose(ALL, "senior", len(cards.TOPICS), random.Random(seed))
        assert len({card.topic for card in chosen}) == len({card.id for card in chosen}) == len(cards.TOPICS)
        assert len({card.kind for card in chosen}) >= 3
        assert len({card.kind for card in choose(dpo, "mid", 2, random.Random(seed))}) == 2


def test_the_same_seed_gives_the_same_interview_and_in_the_long_run_every_card_is_asked():
    def asked(seed: int) -> list[str]:
        """All that an interview asks, the follow-ups too."""
        session, texts = interview.interview(seed=seed), []
        for _ in range(3):
            session.go_on()
            texts.append(page_of(session))
        return [card.id for card in session.cards] + texts

    assert asked(1) == asked(1) != asked(2)
    met = collections.Counter(c.id for seed in range(300) for c in choose(ALL, "mid", 6, random.Random(seed)))
    assert met.keys() == {card.id for card in ALL if card.level in ("junior", "mid")}
    follow_ups = {page_of(at_the_follow_up(seed)) for seed in range(20)}
    assert len(follow_ups) == len(ALL[0].follow_ups), "one of them, by chance"


def at_the_follow_up(seed: int) -> Interview:
    session = Interview(ALL[:1], rng=random.Random(seed))
    session.go_on()
    session.go_on()
    return session


# --- Its course -------------------------------------------------------------------------------------------------------


def test_the_follow_up_is_asked_before_any_answer_is_shown(file, clock):
    session, stages = Interview(ALL[:2], file=file, clock=clock), []
    for card in ALL[:2]:
        for number in range(3):
            if number or not stages:
                session.go_on()
            page, stages = Page(page_of(session)), [*stages, session.stage]
            asked = [question for question, _ in card.follow_ups if question.replace("`", "") in page.text]
            assert card.question.replace("`", "") in page.text and session.card == card
            assert len(asked) == [0, 1, len(card.follow_ups)][number]
            assert (card.answer() in page_of(session)) == (number == 2)
        session.grade(**BEST)
    assert stages == 2 * ["asked", "asked next", "judge"] and (session.stage, session.card) == ("report", None)


def test_an_interview_from_start_to_report(file, clock):
    """Two minutes each: 90 and 40 s; 20 and 150 s, which is too long; the time of the judgment does not count."""
    session = Interview(ALL[:2], minutes=2, file=file, clock=clock)
    clock.now += 1000
    session.go_on()
    answered(session, clock, 90, 40)
    assert "too long" not in Page(page_of(session)).open
    clock.now += 500
    session.grade(**BEST)
    answered(session, clock, 20, 150.4)
    assert "too long" in Page(page_of(session)).open
    session.grade(right="yes", clear="no", evidence="partly", depth="partly")
    report = session.report()
    assert report["card"].tolist() == [ALL[0].id, ALL[1].id] and report["points"].tolist() == [8, 4]
    assert report[["seconds", "next_seconds"]].values.tolist() == [[90, 40], [20, 150]]
    assert report["in_time"].tolist() == [True, False] and report.loc[1, list(RUBRIC)].tolist() == [2, 0, 1, 1]
    page = page_of(session)
    assert "12 of 16 points" in page and "lost on <b>clear</b>" in page and page.count("too long") == 1
    assert ALL[1].folded() in page and ALL[0].folded() not in page, "to repeat: what got fewer than 6 of 8"
    first, second = progress.events("interview", file)
    run = first.detail["run"]
    assert (first.item, first.score, second.item, second.score) == (ALL[0].id, 1, ALL[1].id, 0.5)
    assert first.detail == {**dict.fromkeys(RUBRIC, 2), "seconds": 90, "next_seconds": 40, "run": run}
    assert second.detail["run"] == run and second.detail["clear"] == 0


@pytest.mark.parametrize(("took", "in_time"), [((60, 60), True), ((61, 0), False), ((0, 61), False), ((0, 0), True)])
def test_the_limit_is_for_each_answer_and_itself_in_time(file, clock, took, in_time):
    session = Interview(ALL[:1], minutes=1, file=file, clock=clock)
    assert session.report().empty
    session.go_on()
    answered(session, clock, *took)
    assert ("too long" in page_of(session)) == (not in_time)
    session.grade(**BEST)
    assert session.report()["in_time"].tolist() == [in_time] and ("too long" in page_of(session)) == (not in_time)


@pytest.mark.parametrize(("marks", "points", "repeated"), [
    (("yes", "yes", "yes", "no"), 6, False), (("yes", "yes", "partly", "no"), 5, True), (("no",) * 4, 0, True),
    (("yes",) * 4, 8, False),
])  # fmt: skip
def test_below_six_points_a_card_is_to_be_repeated(file, clock, marks, points, repeated):
    session = Interview(ALL[:1], file=file, clock=clock)
    session.go_on()
    answered(session, clock, 1, 1)
    session.grade(**dict(zip(RUBRIC, marks, strict=True)))
    assert session.report()["points"].tolist() == [points] and f"{points} of 8 points" in page_of(session)
    assert (ALL[0].folded() in page_of(session)) == repeated
    assert ("points were lost" in page_of(session)) == (points < 8)
    assert progress.table(file=file)["done"].tolist() == [not repeated], "and the progress file says the same"


def test_steps_out_of_order_and_half_a_judgment_are_refused(file, clock):
    session = Interview(ALL[:1], file=file, clock=clock)
    for _ in range(3):
        with pytest.raises(ValueError, match="wanted an answer"):
            session.grade(**BEST)
        session.go_on()
    for marks in ({}, {**BEST, "charm": "yes"}, {**BEST, "right": "very"}):
        with pytest.raises(ValueError, match=r"a mark \(no, partly, yes\) for each of right, clear, evidence, depth"):
            session.grade(**marks)
    for _ in range(2):
        with pytest.raises(ValueError, match="wanted a mark"):
            session.go_on()
    assert progress.events(file=file) == [] and session.stage == "judge"


# --- On the page ------------------------------------------------------------------------------------------------------


def test_the_buttons_do_it_all_and_the_browser_counts_the_seconds(file, clock):
    session = Interview(ALL[:1], minutes=1, file=file, clock=clock)
    (play,) = (one for one in visible(session)[0].children if isinstance(one, ipywidgets.Play))
    for name in ("Start", "I have answered", "I have answered"):
        assert [*named(session)] == [name] and named(session, ipywidgets.ToggleButtons) == {}
        play.value = 55
        named(session)[name].click()
        speaking = session.stage != "judge"
        assert (play.playing, play.value, play.max) == ((True, 0, 60) if speaking else (False, 55, 60))
        assert any(isinstance(one, ipywidgets.IntProgress) for one in visible(session)) == speaking
    named(session)["Next"].click()
    assert "of right" in page_of(session) and ALL[0].answer() in page_of(session), "not all are marked"
    marks = [one for one in visible(session) if isinstance(one, ipywidgets.ToggleButtons)]
    assert all(f"<b>{name}</b>: {question}" in page_of(session) for name, question in RUBRIC.items())
    for one in marks:
        assert one.value is None and [*one.options] == [*POINTS]
        one.value = "partly"
    named(session)["Next"].click()
    assert session.report()["points"].tolist() == [4] and named(session) == {} and "of right" not in page_of(session)
    assert all(one.value is None for one in marks), "the next answer is judged afresh"


def test_without_a_kernel_the_questions_can_be_read_or_the_report(file, clock):
    session = interview.interview("senior", 2, 0.5, seed=3)
    bundle = session._repr_mimebundle_()
    page = Page(bundle["text/html"])
    assert VIEW in bundle and all(card.folded() in bundle["text/html"] for card in session.cards)
    assert "2 questions, 0.5 min" in page.open and "30 seconds" in page.text and "30 seconds" not in page.open
    done = Interview([dataclasses.replace(ALL[0], question="Is 1 < 2?")], file=file, clock=clock)
    done.go_on()
    answered(done, clock, 1, 1)
    done.grade(**BEST)
    assert "8 of 8 points" in done._repr_mimebundle_()["text/html"] and "Is 1 < 2?" in Page(page_of(done)).open

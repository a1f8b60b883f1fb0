"""ftlab.classroom.flash: what two days promise, whatever is rated; and the daily session, with FSRS's own package."""

import collections
import itertools
import random
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from unittest import mock

import fsrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shown import VIEW, Page, named, page_of

from ftlab.classroom import cards, flash, progress
from ftlab.classroom.progress import Event

ALL = list(cards.load())
CORE = {card.id: card.topic for card in ALL if card.core}
BY_POSED = {card.posed("").partition("·")[2]: card.id for card in ALL}  # its question, as it stands on the page
START = NOON = datetime(2030, 3, 2, 12, tzinfo=UTC)  # a day that is not today
SECOND, MINUTE, DAY = (timedelta(**{unit: 1}) for unit in ("seconds", "minutes", "days"))
AS_PLAYED = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Thousands of ratings; that each is on disk when it is acknowledged is for tests/test_progress.py to show."""

    def quick(*arguments, connect=sqlite3.connect, **more) -> sqlite3.Connection:
        database = connect(*arguments, **more)
        database.execute("PRAGMA synchronous = OFF")
        return database

    with mock.patch.object(sqlite3, "connect", quick):
        yield


def card_of(session) -> str | None:
    """The id of the card that is asked now."""
    question = session.shown.partition("·")[2]
    return next((id for posed, id in BY_POSED.items() if question.startswith(posed)), None)


def rate(session, rating: str) -> None:
    session.press("Show the answer")
    session.press(rating)


# --- Two days ---------------------------------------------------------------------------------------------------------


def sit(number: int, file, clock, rating_of, at_most: int = 1000) -> list[str]:
    """Runs a sitting, or so many cards of it, each rated rating_of(id), a second each: the cards that were asked."""
    session, asked = flash.sitting(number, "2030-03-04 10:00", file, clock=clock), []
    while session.labels and len(asked) < at_most:
        asked.append(card_of(session))
        rate(session, rating_of(asked[-1]))
        clock.now += SECOND
    return asked


def all_good(id: str) -> str:
    return "good"


@given(seed=st.integers(0, 10**6), weak=st.floats(0, 0.6), stops=st.lists(st.integers(1, 30), max_size=1))
@AS_PLAYED
def test_each_core_card_is_asked_in_three_sittings_until_it_is_known(seed, weak, stops, clock, tmp_path_factory):
    """Whatever is rated, and also if a sitting is left and opened anew after a card was rated elsewhere."""
    file, rng, sittings = tmp_path_factory.mktemp("two days") / "p.sqlite", random.Random(seed), collections.Counter()
    for number, size in enumerate((13, 25, 25, 25), 1):
        ratings = collections.defaultdict(list)

        def rating_of(id: str, ratings=ratings) -> str:
            ratings[id].append(rng.choice(["again", "hard"] if rng.random() < weak else ["good", "easy"]))
            return ratings[id][-1]

        for cards_before_a_stop in stops:
            sit(number, file, clock, rating_of, cards_before_a_stop)
            progress.record("card", rng.choice([*CORE]), 0, {"rating": "again"}, clock.now, file)
        sit(number, file, clock, rating_of)
        assert len(ratings) == size
        assert all(of[-1] in ("good", "easy") and {*of[:-1]} <= {"again", "hard"} for of in ratings.values())
        assert sit(number, file, clock, rating_of) == [], "what is done stays done"
        sittings.update(ratings.keys())
    assert sittings.keys() == CORE.keys() and min(sittings.values()) >= 3


def test_no_two_neighbours_are_of_one_topic_at_the_first_pass(file, clock):
    for number in (1, 2):
        topics = [CORE[id] for id in sit(number, file, clock, all_good)]
        assert all(one != other for one, other in itertools.pairwise(topics))


@given(stumbles=st.dictionaries(st.sampled_from([*CORE]), st.sampled_from(["again", "hard"])))
@AS_PLAYED
def test_from_the_third_sitting_on_what_was_not_known_the_last_time_comes_first(stumbles, clock, tmp_path_factory):
    """Though each card was known in the end, and whatever it was the time before."""
    file = tmp_path_factory.mktemp("weak") / "p.sqlite"
    for number, first_ratings in enumerate((dict.fromkeys(CORE, "again"), stumbles, stumbles, {}), 1):
        left = dict(first_ratings)
        order = dict.fromkeys(sit(number, file, clock, lambda id, left=left: left.pop(id, "good")))
        places = [[*flash.RATINGS].index(stumbles.get(id, "good")) for id in order]
        assert number < 3 or places == sorted(places)


def test_what_is_not_known_comes_back_three_cards_later(file, clock):
    ratings = iter(["again", "good", "hard"])
    asked = sit(1, file, clock, lambda id: next(ratings, "good"))
    assert len(asked) == 13 + 2 and asked[4] == asked[0] and asked[6] == asked[2]
    ratings = iter(["again"])
    (last,) = set(sit(2, file, clock, all_good, 24)) ^ CORE.keys()
    assert sit(2, file, clock, lambda id: next(ratings, "good")) == [last, last], "or sooner, if none are left"


def test_a_card_that_two_notebooks_rate_at_once_hides_no_other_one(file, clock):
    one, other = (flash.sitting(1, "2030-03-04 10:00", file, clock=clock) for _ in range(2))
    first = card_of(one)
    rate(one, "good")
    rate(other, "good")
    assert len([first, *sit(1, file, clock, all_good)]) == 13


def starts_of(plan, at: datetime, now: datetime) -> list[datetime]:
    """Its words as times: "2 days before, 18:00"."""
    found = []
    for words in plan["starts"]:
        day, _, hour = words.partition(", ")
        back = {"the same day": 0, "the day before": 1, "2 days before": 2}.get(day)
        time_of_day = now if words == "now" else datetime.combine(at, datetime.strptime(hour, "%H:%M").time())
        found.append(time_of_day if words == "now" else time_of_day - back * DAY)
    return found


@given(at=st.datetimes(datetime(2027, 1, 5), datetime(2027, 12, 31)), minutes=st.integers(1, 6_000))
@settings(max_examples=100, deadline=None)
def test_nothing_is_planned_before_now_and_less_time_has_fewer_sittings(at, minutes, tmp_path_factory):
    """At most four, the new cards first, in their order, and each of them ends before the interview."""
    file, at = tmp_path_factory.getbasetemp() / "none.sqlite", at.replace(second=0, microsecond=0)
    now = at - minutes * MINUTE
    try:
        plan = flash.plan(f"{at}", now, file)
    except ValueError as error:
        assert minutes < 39 and f"{minutes} minutes" in str(error)
        return
    starts = starts_of(plan, at, now)
    assert starts == sorted(set(starts)) and all(now <= start < at for start in starts)
    assert plan.index.tolist() == [1, 2, 3, 4][: len(plan)] and len(plan) >= 1
    assert all(start + int(row.minutes) * MINUTE <= at for start, row in zip(starts, plan.itertuples(), strict=True))
    if at - now >= 3 * DAY:
        assert len(plan) == 4 and "now" not in plan["starts"].tolist()
    longer = flash.plan(f"{at}", now - 3 * DAY, file)
    assert len(plan) <= len(longer) == 4


@pytest.mark.parametrize("ago", [timedelta(0), MINUTE, 400 * DAY])
def test_an_interview_that_is_over_has_no_plan_and_the_message_says_which_date_was_set(ago, file):
    with pytest.raises(ValueError, match=r"got an interview on 04 March 2030, 10:00.*INTERVIEW"):
        flash.plan("2030-03-04 10:00", datetime(2030, 3, 4, 10) + ago, file)


def test_the_plan_by_hand(file):
    """25 cards, of which 13 come first: 13 x 3 = 39; 12 x 3 + 13 x 1.25 = 52.25; 25 x 1.25 = 31.25 minutes."""
    plan = flash.plan("2030-03-04 10:00", datetime(2030, 3, 1, 10), file)
    assert plan["starts"].tolist() == [
        "2 days before, 18:00", "the day before, 09:00", "the day before, 18:00", "the same day, 08:00"
    ]  # fmt: skip
    assert plan[["cards", "new", "minutes"]].values.tolist() == [[13, 13, 39], [25, 12, 52], [25, 0, 31], [25, 0, 31]]


@pytest.mark.parametrize(
    ("now", "starts"),
    [
        (datetime(2030, 3, 3, 17), ["the day before, 18:00", "the same day, 08:00"]),
        (datetime(2030, 3, 3, 20), ["now", "the same day, 08:00"]),
        (datetime(2030, 3, 4, 7), ["the same day, 08:00"]),
        (datetime(2030, 3, 4, 9), ["now"]),
        (datetime(2030, 3, 3, 8), ["the day before, 09:00", "the day before, 18:00", "the same day, 08:00"]),
    ],
)
def test_with_one_evening_or_less_the_plan_is_shorter(now, starts, file):
    assert flash.plan("2030-03-04 10:00", now, file)["starts"].tolist() == starts


def test_a_sitting_that_is_done_is_planned_no_more_and_one_that_was_left_is(file, clock):
    """On the evening before, with the first one done in time and the second one broken off."""
    sit(1, file, clock, all_good)
    sit(2, file, clock, all_good, 5)
    plan = flash.plan("2030-03-04 10:00", datetime(2030, 3, 3, 17), file)
    assert plan.index.tolist() == [2, 3]
    for number in (2, 3, 4):
        sit(number, file, clock, all_good)
    assert flash.plan("2030-03-04 10:00", datetime(2030, 3, 3, 17), file).empty


@given(days=st.integers(1, 400))
@settings(max_examples=10, deadline=None)
def test_in_so_many_days_is_a_date_to_come(days, tmp_path_factory):
    when = datetime.fromisoformat(flash.in_days(days))
    assert (when.date() - datetime.now().date()).days in (days, days - 1), "midnight may have passed"
    if days >= 3:
        assert len(flash.plan(f"{when}", file=tmp_path_factory.getbasetemp() / "none.sqlite")) == 4


# --- Every day --------------------------------------------------------------------------------------------------------

GAPS = st.lists(st.tuples(st.sampled_from([*flash.RATINGS]), st.integers(1, 10**6)), min_size=1, max_size=8)


@given(played=GAPS)
@settings(max_examples=40, deadline=None)
def test_the_states_are_those_of_the_package(played):
    """Ratings and their gaps in seconds, played by hand through fsrs; those of another card in between count not."""
    scheduler, state, at, events = fsrs.Scheduler(enable_fuzzing=False), fsrs.Card(card_id=0), NOON, []
    for rating, gap in played:
        at += gap * SECOND
        events += [Event(at, "card", id, 1, {"rating": how}) for id, how in (("x", rating), ("y", "easy"))]
        state, _ = scheduler.review_card(state, fsrs.Rating[rating.title()], at)
    states = flash.memories(events)
    assert vars(states["x"]) == vars(state) and set(states) == {"x", "y"}


def rated(file, card: cards.Card, rating: str, at: datetime) -> None:
    progress.record("card", card.id, flash.RATINGS[rating], {"rating": rating}, at, file)


def test_first_intervals_are_fsrs_6s_learning_steps(file):
    """One minute, the mean of 1 and 10 minutes, 10 minutes, then straight to days: fsrs's documented defaults."""
    for card, rating in zip(ALL, flash.RATINGS, strict=False):
        rated(file, card, rating, NOON)
    states = [*flash.memories(progress.events("card", file)).values()]
    spans = [state.due - NOON for state in states]
    assert spans[:3] == [MINUTE, 5.5 * MINUTE, 10 * MINUTE] and spans[3] >= 2 * DAY
    assert [state.difficulty for state in states] == sorted((state.difficulty for state in states), reverse=True)


def test_due_cards_come_first_then_new_ones_then_what_is_being_learned(file, clock):
    """Again is due after a minute, so b waits longer than a; good after ten, so c is not due yet; d is new."""
    a, b, c, d = ALL[:4]
    for card, rating, minutes in ((a, "again", 10), (b, "again", 20), (c, "good", 0)):
        rated(file, card, rating, NOON - minutes * MINUTE)
    session = flash.session([a, b, c, d], new=4, file=file, clock=clock)  # three today
    for left, card in zip((4, 3, 2, 1), (b, a, d, c), strict=True):
        assert card_of(session) == card.id and f"{left} left" in session.shown
        rate(session, "easy")
    assert session.labels == [] and "Done" in session.shown


@pytest.mark.parametrize(("now", "new", "asked"), [
    (10 * MINUTE, 2, 0), (10 * MINUTE - SECOND, 2, 1), (10 * MINUTE - SECOND, 0, 0), (-10 * MINUTE, 0, 0),
    (-10 * MINUTE - SECOND, 0, None),
])  # fmt: skip
def test_due_is_from_its_moment_on_and_learning_within_20_minutes(file, clock, now, new, asked):
    rated(file, ALL[0], "good", NOON)
    clock.now = NOON + now
    session = flash.session(ALL[:2], new, file=file, clock=clock)
    assert card_of(session) == (None if asked is None else ALL[asked].id)


def test_only_so_many_new_cards_a_day_over_all_sessions(file, clock):
    """Cards seen on an earlier day take no place; and if more were seen today than are allowed, none is left."""

    def new_ones(allowed: int) -> int:
        session, count = flash.session(ALL, allowed, file=file, clock=clock), 0
        while session.labels:
            rate(session, "easy")
            count += 1
        return count

    for card in ALL[:3]:
        rated(file, card, "easy", NOON - DAY)
    rated(file, ALL[0], "easy", NOON - MINUTE)
    assert [new_ones(2), new_ones(2), new_ones(3), new_ones(1), new_ones(-1)] == [2, 0, 1, 0, 0]
    clock.now += DAY
    assert new_ones(2) == 2


def test_a_day_is_that_of_the_learners_clock(file, clock, monkeypatch):
    """In Los Angeles 16:30 and 17:30 of one day are two days of UTC."""
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    time.tzset()
    try:
        rated(file, ALL[0], "easy", datetime(2026, 6, 1, 23, 30, tzinfo=UTC))
        clock.now = datetime(2026, 6, 2, 0, 30, tzinfo=UTC)
        assert not flash.session(ALL, 1, file=file, clock=clock).labels
        assert flash.session(ALL, 2, file=file, clock=clock).labels
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_session_is_over_all_cards_with_three_new_ones_unless_told_otherwise(file, clock):
    progress.record("card", "gone-since-last-year", 1, {"rating": "good"}, NOON - 400 * DAY, file)
    session = flash.session(file=file, clock=clock)
    assert card_of(session) == cards.mixed(ALL)[0].id and "3 left" in session.shown
    assert card_of(flash.session(ALL[5:], new=3, file=file)) == ALL[5].id


# --- The session on the page ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rating", "score"), [("again", 0), ("hard", 0.5), ("good", 1), ("easy", 1)])
def test_a_card_is_asked_answered_and_rated_by_its_buttons(file, clock, rating, score):
    session = flash.session(ALL[:2], file=file, clock=clock)
    assert [*named(session)] == ["Show the answer"] and Page(page_of(session)).text == Page(ALL[0].posed("2 left")).text
    named(session)["Show the answer"].click()
    assert ALL[0].answer() in page_of(session) and [*named(session)] == [*flash.RATINGS]
    named(session)[rating].click()
    assert card_of(session) == ALL[1].id and [*named(session)] == ["Show the answer"]
    (event,) = progress.events("card", file)
    assert (event.item, event.score, event.at) == (ALL[0].id, score, NOON) and event.detail["rating"] == rating


def test_what_cannot_be_stored_is_said_and_the_card_is_asked_again(file, clock):
    session = flash.session(ALL[:1], file=file, clock=clock)
    session.press("Show the answer")
    file.parent.mkdir(exist_ok=True)
    file.write_text("a diary")
    for label in ("good", "Try again"):
        named(session)[label].click()
        assert "FTLAB_PROGRESS" in page_of(session) and [*named(session)] == ["Try again"]
    file.unlink()
    named(session)["Try again"].click()
    assert card_of(session) == ALL[0].id and "FTLAB_PROGRESS" not in page_of(session)
    rate(session, "easy")
    assert session.labels == [] and named(session) == {} and len(progress.events(file=file)) == 1


def test_two_open_notebooks_see_each_others_ratings(file, clock):
    first, second = (flash.session(ALL[:3], file=file, clock=clock) for _ in range(2))
    rate(first, "easy")
    rate(second, "easy")
    assert card_of(second) == ALL[1].id, "what the other has rated is not asked again"


def test_without_a_kernel_its_cards_can_be_read_their_answers_folded(file, clock):
    for session in (flash.session(ALL, 2, file, clock=clock), flash.sitting(1, "2030-03-04 10:00", file, clock=clock)):
        bundle = session._repr_mimebundle_()
        shown = [card.id for card in ALL if card.folded() in bundle["text/html"]]
        assert VIEW in bundle and card_of(session) in shown and len(shown) in (2, 13)
        assert "30 seconds" not in Page(bundle["text/html"]).open

"""ftlab.classroom.flash: FSRS through its own package, replayed from the stored ratings, and the session around it."""

from datetime import UTC, datetime, timedelta

import fsrs
import pytest

from ftlab.classroom import cards, flash, page, progress
from ftlab.classroom.progress import Event

ALL = cards.load()
START = NOON = datetime(2030, 3, 2, 12, tzinfo=UTC)  # a day that is not today
MICROSECOND, SECOND, MINUTE, DAY = (timedelta(**{unit: 1}) for unit in ("microseconds", "seconds", "minutes", "days"))


def html_of(session: flash.Session) -> str:
    return session._page.outputs[0]["data"]["text/html"]


# --- The schedule -----------------------------------------------------------------------------------------------------


def test_the_states_are_those_of_the_package():
    """Good at noon, good 10 minutes later, again 3 days later: played by hand through fsrs."""
    times = [NOON, NOON + 10 * MINUTE, NOON + 3 * DAY]
    ratings = ["good", "good", "again"]
    scheduler, state = fsrs.Scheduler(enable_fuzzing=False), fsrs.Card(card_id=0)
    for at, rating in zip(times, (fsrs.Rating.Good, fsrs.Rating.Good, fsrs.Rating.Again), strict=True):
        state, _ = scheduler.review_card(state, rating, at)
    played = [Event(at, "card", "x", 1, {"rating": rating}) for at, rating in zip(times, ratings, strict=True)]
    other = Event(NOON, "card", "y", 0, {"rating": "easy"})
    states = flash.memories([*played[:2], other, played[2]])
    assert vars(states["x"]) == vars(state) and set(states) == {"x", "y"}


def test_first_intervals_are_fsrs_6s_learning_steps():
    """One minute, the mean of 1 and 10 minutes, 10 minutes, then straight to days: fsrs's documented defaults."""
    due = {rating: flash._after(fsrs.Card(card_id=0), rating, NOON).due - NOON for rating in flash.RATINGS}
    assert due["again"] == MINUTE and due["hard"] == 5.5 * MINUTE and due["good"] == 10 * MINUTE
    assert due["easy"] >= 2 * DAY


def test_intervals_grow_with_each_success_and_shrink_with_a_failure():
    state, now, spans = fsrs.Card(card_id=0), NOON, []
    for _ in range(6):
        state = flash._after(state, "good", now)
        spans.append(state.due - now)
        now = state.due
    assert spans == sorted(spans) and spans[-1] > 30 * DAY
    failed = flash._after(state, "again", now)
    assert failed.due - now < spans[-1] and failed.stability < state.stability


def test_due_cards_come_first_then_new_ones_then_what_is_being_learned():
    a, b, c, d = ALL[:4]
    states = {
        a.id: fsrs.Card(card_id=0, due=NOON - MINUTE),
        b.id: fsrs.Card(card_id=0, due=NOON - DAY),
        c.id: fsrs.Card(card_id=0, due=NOON + 5 * MINUTE),
    }
    assert flash.upcoming([a, b, c, d], states, NOON, new=1) == (b, {"due": 2, "learning": 1, "new": 1})
    del states[b.id], states[a.id]
    assert flash.upcoming([c, d], states, NOON, new=1)[0] == d
    assert flash.upcoming([c, d], states, NOON, new=0) == (c, {"due": 0, "learning": 1, "new": 0})
    states[c.id].due = NOON + DAY
    assert flash.upcoming([c, d], states, NOON, new=0) == (None, {"due": 0, "learning": 0, "new": 0})


@pytest.mark.parametrize(("due", "counts"), [
    (NOON, {"due": 1, "learning": 0, "new": 0}),
    (NOON + MICROSECOND, {"due": 0, "learning": 1, "new": 0}),
    (NOON + 20 * MINUTE, {"due": 0, "learning": 1, "new": 0}),
    (NOON + 20 * MINUTE + MICROSECOND, {"due": 0, "learning": 0, "new": 0}),
])  # fmt: skip
def test_due_is_from_its_moment_on_and_learning_within_20_minutes(due, counts):
    card = ALL[0]
    asked = card if any(counts.values()) else None
    assert flash.upcoming([card], {card.id: fsrs.Card(card_id=0, due=due)}, NOON, new=5) == (asked, counts)


@pytest.mark.parametrize("new, count", [(-1, 0), (0, 0), (1, 1), (2, 2), (9, 3)])
def test_new_cards_are_at_most_so_many_and_never_less_than_none(new, count):
    """With -1, as when more were seen today than a session allows: not all but the last."""
    card, counts = flash.upcoming(ALL[:3], {}, NOON, new)
    assert counts == {"due": 0, "learning": 0, "new": count} and card == (ALL[0] if count else None)


@pytest.mark.parametrize(("span", "words"), [
    (-5 * MINUTE, "1 min"), (timedelta(0), "1 min"), (20 * SECOND, "1 min"), (100 * SECOND, "2 min"),
    (10 * MINUTE, "10 min"), (59 * MINUTE, "59 min"), (60 * MINUTE, "1 h"), (100 * MINUTE, "2 h"),
    (23 * 60 * MINUTE, "23 h"), (DAY, "1 d"), (2.4 * DAY, "2 d"), (400 * DAY, "400 d"),
])  # fmt: skip
def test_an_interval_is_said_in_its_unit(span, words):
    assert flash._interval(span) == words


# --- A session --------------------------------------------------------------------------------------------------------


def test_a_session_from_the_first_card_to_the_last(file, clock):
    session = flash.Session(ALL[:2], new=10, file=file, clock=clock)
    assert session.card == ALL[0] and session.counts == {"due": 0, "learning": 0, "new": 2}
    assert page.prose(ALL[0].question) in html_of(session) and page.prose(ALL[0].short) not in html_of(session)
    session.reveal()
    assert page.prose(ALL[0].short) in html_of(session)
    assert [button.description for button in session._rates.values()][::2] == ["again: 1 min", "good: 10 min"]
    assert session.rate("again") == NOON + MINUTE
    assert session.card == ALL[1], "a new card comes before one that is due in a minute"
    assert session.rate("easy") > NOON + 2 * DAY
    assert session.card == ALL[0], "nothing else is left: what is being learned comes ahead of its time"
    clock.now += MINUTE
    session.rate("easy")
    assert session.card is None and "Nothing is due. The next card is due in" in html_of(session)
    with pytest.raises(ValueError, match="being asked"):
        session.rate("good")
    assert [(e.item, e.detail["rating"], e.score) for e in progress.events("card", file)] == [
        (ALL[0].id, "again", 0),
        (ALL[1].id, "easy", 1),
        (ALL[0].id, "easy", 1),
    ]


def test_only_so_many_new_cards_a_day_over_all_sessions(file, clock):
    session = flash.Session(ALL, new=2, file=file, clock=clock)
    session.rate("easy")
    again = flash.Session(ALL, new=2, file=file, clock=clock)
    assert again.counts["new"] == 1
    again.rate("easy")
    assert again.card is None
    clock.now += DAY
    assert flash.Session(ALL, new=2, file=file, clock=clock).counts["new"] == 2


def test_a_card_is_new_on_its_first_day_only(file, clock):
    """Seen yesterday and again today, it takes no place from the new ones of today."""
    progress.record("card", ALL[0].id, 1, {"rating": "good"}, NOON - DAY, file)
    progress.record("card", ALL[0].id, 1, {"rating": "easy"}, NOON - MINUTE, file)
    assert flash.Session(ALL, new=2, file=file, clock=clock).counts["new"] == 2
    progress.record("card", ALL[1].id, 1, {"rating": "easy"}, NOON - MINUTE, file)
    assert flash.Session(ALL, new=2, file=file, clock=clock).counts["new"] == 1


def test_more_new_ones_today_than_a_session_allows_leave_none(file, clock):
    for card in ALL[:3]:
        progress.record("card", card.id, 1, {"rating": "easy"}, NOON - MINUTE, file)
    session = flash.Session(ALL, new=2, file=file, clock=clock)
    assert session.card is None and session.counts["new"] == 0


@pytest.mark.parametrize(("rating", "score"), [("again", 0), ("hard", 0.5), ("good", 1), ("easy", 1)])
def test_what_a_rating_counts(file, clock, rating, score):
    flash.Session(ALL[:1], file=file, clock=clock).rate(rating)
    (event,) = progress.events(file=file)
    assert (event.kind, event.item, event.score, event.detail) == ("card", ALL[0].id, score, {"rating": rating})
    assert event.at == NOON


def test_two_open_notebooks_see_each_others_ratings(file, clock):
    first, second = (flash.Session(ALL[:3], file=file, clock=clock) for _ in range(2))
    assert first.card == second.card == ALL[0]
    first.rate("easy")
    second.rate("easy")
    assert second.card == ALL[1], "what the other has rated is not asked again"
    assert len(progress.events("card", file)) == 2


def test_the_buttons_do_it_all(file, clock):
    session = flash.Session(ALL[:1], file=file, clock=clock)
    assert all(button.disabled for button in session._rates.values())
    session._show_answer.click()
    assert session._show_answer.disabled and not any(button.disabled for button in session._rates.values())
    session._rates["good"].click()
    assert progress.events("card", file)[0].detail == {"rating": "good"}
    assert all(button.disabled for button in session._rates.values()), "first the answer, then the rating"
    assert [button.description for button in session._rates.values()] == list(flash.RATINGS), "the times are gone"
    assert session.card == ALL[0] and not session._show_answer.disabled
    session._show_answer.click()
    session._rates["easy"].click()
    assert session.card is None and session._show_answer.disabled


def test_the_buttons_say_when_the_card_would_come_back(file, clock):
    """As the package says: for a new card, and for one that was easy eight days ago."""
    scheduler, state = fsrs.Scheduler(enable_fuzzing=False), fsrs.Card(card_id=0)
    for at in (NOON, NOON + 8 * DAY):
        clock.now = at
        session = flash.Session(ALL[:1], file=file, clock=clock)
        session.reveal()
        ratings = zip(flash.RATINGS, fsrs.Rating, strict=True)
        after = {name: scheduler.review_card(state, rating, at)[0] for name, rating in ratings}
        assert [button.description for button in session._rates.values()] == [
            f"{name}: {flash._interval(card.due - at)}" for name, card in after.items()
        ]
        assert session.rate("easy") == after["easy"].due
        state = after["easy"]
    assert session._rates["easy"].description == "easy"


def test_what_cannot_be_stored_is_said_and_the_card_stays(tmp_path, clock):
    (tmp_path / "flat").write_text("no folder")
    with pytest.raises(OSError, match="flat"):
        flash.Session(ALL[:1], file=tmp_path / "flat" / "progress.sqlite", clock=clock).rate("good")
    good = flash.Session(ALL[:1], file=tmp_path / "p.sqlite", clock=clock)
    good._file = tmp_path / "flat" / "progress.sqlite"
    good.reveal()
    good._rates["good"].click()
    assert "Not done." in good._error.outputs[0]["data"]["text/html"] and good.card == ALL[0]
    assert page.prose(ALL[0].short) in html_of(good), "the answer is still there"
    good._file = tmp_path / "p.sqlite"
    good._rates["easy"].click()
    assert good._error.outputs == () and good.card is None, "what went wrong is no longer said"


def test_no_cards_and_unknown_ratings_are_refused(file, clock):
    with pytest.raises(ValueError, match="no cards"):
        flash.Session([], file=file, clock=clock)
    with pytest.raises(ValueError, match="'perfect'"):
        flash.Session(ALL[:1], file=file, clock=clock).rate("perfect")
    assert progress.events(file=file) == []


def test_cards_that_are_gone_from_the_files_do_no_harm(file, clock):
    progress.record("card", "a-card-of-last-year", 1, {"rating": "good"}, NOON - 400 * DAY, file)
    assert flash.Session(ALL[:1], file=file, clock=clock).card == ALL[0]


def test_the_schedule_as_a_table(file):
    assert flash.schedule(file, NOON).empty
    progress.record("card", "a", 1, {"rating": "easy"}, NOON - 3 * DAY, file)
    progress.record("card", "b", 0, {"rating": "again"}, NOON - 2 * MINUTE, file)
    table = flash.schedule(file, NOON)
    assert list(table.index) == ["b", "a"] and table.loc["b", "due"] == NOON - MINUTE
    assert table.loc["b", "recall"] == 1 and 0.9 < table.loc["a", "recall"] < 1
    assert table.loc["b", "difficulty"] > table.loc["a", "difficulty"]


def test_without_a_kernel_a_card_can_be_read(file, clock):
    bundle = flash.Session(ALL, file=file, clock=clock)._repr_mimebundle_()
    assert bundle["text/html"] == ALL[0].folded()
    assert bundle["text/plain"] == "Flash cards: 0 due, 0 learning, 10 new"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    done = flash.Session(ALL[:1], file=file, clock=clock)
    done.rate("easy")
    assert done._repr_mimebundle_()["text/html"] == "Nothing is due."


def test_a_session_over_all_cards_by_default(file):
    session = flash.session(file=file)
    assert session.card == ALL[0] and session.counts == {"due": 0, "learning": 0, "new": 10}
    assert flash.session(ALL[5:], new=3, file=file).card == ALL[5]

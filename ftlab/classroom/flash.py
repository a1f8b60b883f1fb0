"""Flash cards: a plan of sittings for the two days before an interview, or a session of ten minutes a day.

In daily sessions FSRS decides when a card comes back: an open scheduler that models each card's stability (days until
recall falls to 90 %) and difficulty. Only ratings are stored; all else follows from them, so two open notebooks agree.

Source: Ye, Su & Cao 2022, A Stochastic Shortest Path Algorithm for Optimizing Spaced Repetition Scheduling, KDD.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsrs
import pandas as pd

from ftlab.classroom import cards as deck
from ftlab.classroom import page, progress

KIND = "card"  # in the progress file
RATINGS = {"again": 0.0, "hard": 0.5, "good": 1.0, "easy": 1.0}  # what to press, and the score that is stored


def _asking(cards: Iterable, queue: Callable, sitting: str, file: Path | None, clock: Callable | None) -> page.Steps:
    """Asks the first card of queue(all ratings so far, now), shows its answer, stores the rating; and so on.

    sitting: its name, stored with each rating. cards: what there is to read, folded, where no kernel runs.
    """
    now = clock or functools.partial(datetime.now, UTC)

    def steps() -> Generator:
        while waiting := queue(progress.events(KIND, file), now()):  # another notebook may have rated meanwhile
            card = waiting[0]
            posed = card.posed(f"{len(waiting)} left")
            yield posed, ["Show the answer"]
            rating = yield posed + card.answer(), RATINGS
            progress.record(KIND, card.id, RATINGS[rating], {"rating": rating, "sitting": sitting}, now(), file)
        yield '<p role="status">Done: nothing is left to ask now.</p>', []

    return page.Steps("Flash cards", steps, still="".join(card.folded() for card in cards))


SITTINGS = (1, 2, 3, 4)
MINUTES = {"new": 3, "again": 1.25}  # say the answer aloud, read it, say what is asked next; then only say it


def _asked_in(number: int) -> tuple[list[deck.Card], int]:
    """The cards of a sitting, and how many of them are new: the first ones.

    Half of the core cards in the first; the other half and the first again in the second; all in the last two.
    """
    every = [card for card in deck.mixed(deck.load()) if card.core]
    half = (len(every) + 1) // 2
    first, second = every[:half], every[half:]
    return {1: (first, half), 2: (second + first[::-1], len(second))}.get(number, (every, 0))


def in_days(days: int) -> str:
    """An interview at ten in the morning, so many days from today: "2030-03-04 10:00"."""
    return f"{datetime.now() + timedelta(days=days):%Y-%m-%d} 10:00"


def plan(interview: str, now: datetime | None = None, file: Path | None = None) -> pd.DataFrame:
    """One row for each sitting that is left before the interview: when it starts, its cards, the new ones, minutes.

    interview: "2030-03-04 10:00". With less than two days left there are fewer sittings, the first one at once; those
    that are done are left out. Raises ValueError if the interview is over, or too near for one sitting.
    """
    at = pd.Timestamp(interview)
    now = pd.Timestamp.now(tz=at.tz) if now is None else pd.Timestamp(now)
    if at <= now:
        said = f"got an interview on {at:%d %B %Y, %H:%M}, and it is {now:%d %B %Y, %H:%M}"
        raise ValueError(f"{said}: wanted a date to come. Set INTERVIEW to that of yours")
    events = progress.events(KIND, file)
    numbers = [number for number in SITTINGS if not _is_done(number, interview, events)]
    rows = []
    for number, start in zip(numbers, _starts(at, now, len(numbers)), strict=False):
        cards, new = _asked_in(number)
        minutes = round(MINUTES["new"] * new + MINUTES["again"] * (len(cards) - new))
        if start + timedelta(minutes=minutes) > at:
            left = (at - now) // timedelta(minutes=1)
            raise ValueError(f"{left} minutes are left, and a sitting takes {minutes}: read the cheat sheet instead")
        rows.append((number, _in_words(start, at, now), len(cards), new, minutes))
    return pd.DataFrame(rows, columns=["sitting", "starts", "cards", "new", "minutes"]).set_index("sitting")


def _starts(at: pd.Timestamp, now: pd.Timestamp, most: int) -> list[pd.Timestamp]:
    """When so many sittings may start, the last one two hours before the interview; none of them before now.

    For one whose hour is over there is time now, if the next one is two hours away.
    """
    hours = (30, 15, 6)  # before its day begins: 18:00, 9:00, 18:00
    starts = [*(at.normalize() - timedelta(hours=h) for h in hours), at - timedelta(hours=2)]
    starts = [start for start in starts if start >= now][-most:] if most else []
    if len(starts) < most and (not starts or starts[0] - now >= timedelta(hours=2)):
        starts.insert(0, now)
    return starts


def _in_words(start: pd.Timestamp, at: pd.Timestamp, now: pd.Timestamp) -> str:
    if start == now:
        return "now"
    days = (at.normalize() - start.normalize()).days
    day = {0: "the same day", 1: "the day before"}.get(days, f"{days} days before")
    return f"{day}, {start:%H:%M}"


def _name(number: int, interview: str) -> str:
    """What is stored with each rating of a sitting."""
    return f"{interview}, sitting {number}"


def _is_done(number: int, interview: str, events: Sequence[progress.Event]) -> bool:
    """Was it begun, and is no card of it left?"""
    begun = any(event.detail.get("sitting") == _name(number, interview) for event in events)
    return begun and not _left(number, interview, events)


def _left(number: int, interview: str, events: Sequence[progress.Event]) -> list[deck.Card]:
    """The cards that a sitting has still to ask, in their order."""
    name, (cards, new) = _name(number, interview), _asked_in(number)
    first: dict[tuple[str, str], float] = {}  # the first rating in each sitting says what was known when it began
    for event in events:
        first.setdefault((event.item, event.detail.get("sitting", "")), event.score)
    before = {id: score for (id, sitting), score in first.items() if sitting != name}
    left = cards if new else sorted(cards, key=lambda card: before.get(card.id, 0))
    for event in events:
        rated = [card for card in left if (card.id, name) == (event.item, event.detail.get("sitting"))]
        left = [card for card in left if card not in rated]
        left[3:3] = rated * (event.score < 1)
    return left


def sitting(number: int, interview: str, file: Path | None = None, clock: Callable | None = None) -> page.Steps:
    """A sitting of the plan. A card rated again or hard comes back three cards later, until it is good or easy.

    From the third on, what was not known the last time comes first. Run once more, a sitting goes on where it was left.
    """

    def queue(events: list[progress.Event], _) -> list[deck.Card]:
        return _left(number, interview, events)

    return _asking(_asked_in(number)[0], queue, _name(number, interview), file, clock)


SCHEDULER = fsrs.Scheduler(enable_fuzzing=False)
AHEAD = timedelta(minutes=20)  # a card being learned may come this much early, when nothing else is left


def memories(events: Iterable[progress.Event]) -> dict[str, fsrs.Card]:
    """FSRS's state of each card that was rated, by id: its ratings played in their order."""
    states: dict[str, fsrs.Card] = {}
    for event in events:
        before, rating = states.get(event.item) or fsrs.Card(card_id=0), fsrs.Rating[event.detail["rating"].title()]
        states[event.item] = SCHEDULER.review_card(before, rating, event.at)[0]
    return states


def session(cards: Sequence = (), new: int = 3, file: Path | None = None, clock: Callable | None = None) -> page.Steps:
    """A session over these cards (all, the core first, if none are given), with at most so many new ones a day.

    First what is due, the longest waiting first; then new cards; then what is being learned and due within 20 minutes.
    """
    cards = cards or deck.mixed(deck.load())

    def queue(events: list[progress.Event], now: datetime) -> list[deck.Card]:
        due = {id: state.due for id, state in memories(events).items()}
        first = {event.item: event.at for event in reversed(events)}  # when each card was new
        left = max(new - sum(at.astimezone().date() == now.astimezone().date() for at in first.values()), 0)
        fresh = [card for card in cards if card.id not in due][:left]
        seen = sorted((card for card in cards if card.id in due), key=lambda card: due[card.id])
        waiting = [card for card in seen if due[card.id] <= now]
        return waiting + fresh + [card for card in seen if now < due[card.id] <= now + AHEAD]  # these are being learned

    return _asking(cards[:new], queue, "", file, clock)

"""Flash cards: two days before an interview, or ten minutes a day.

    flash.plan(INTERVIEW)                 four sittings in 48 hours, with their times
    flash.sitting(1, INTERVIEW)           one of them: what is weak comes back until it is known
    flash.session(new=3)                  every day: cards that are due, then new ones

In daily sessions FSRS decides when a card comes back: an open scheduler that models each card's stability (days until
recall falls to 90 %) and difficulty; the package `fsrs` with its default parameters, without random fuzz. Only ratings
are stored, by ftlab.classroom.progress; all else is worked out from them, so two open notebooks cannot disagree, and a
sitting goes on where it was left.

Reference: Ye, Su & Cao 2022, A Stochastic Shortest Path Algorithm for Optimizing Spaced Repetition Scheduling, KDD.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsrs
import ipywidgets
import pandas as pd

from ftlab.classroom import cards as deck
from ftlab.classroom import page, progress

KIND = "card"  # in the progress file
RATINGS = {"again": 0.0, "hard": 0.5, "good": 1.0, "easy": 1.0}  # what to press, and the score that is stored
Next = tuple[deck.Card | None, str]  # the card to ask now, and in words where in the session it stands


class Session:
    """Asks one card after the other. `reveal` and `rate` do what the buttons do; `card` is being asked, or None."""

    def __init__(
        self,
        cards: Sequence[deck.Card],
        following: Callable[[list[progress.Event], datetime], Next],
        sitting: str = "",
        file: Path | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """cards: shown, folded, where there is no kernel; following(all ratings so far, now) gives the next card.

        sitting: its name, stored with each rating.
        """
        self._cards, self._following, self._sitting, self._file, self._clock = cards, following, sitting, file, clock
        self._page, self._error = ipywidgets.Output(), ipywidgets.Output()
        self._show = page.button("Show the answer", self.reveal, self._error, "primary")
        self._rates = [page.button(name, lambda name=name: self.rate(name), self._error) for name in RATINGS]
        buttons = ipywidgets.HBox([self._show, *self._rates], layout={"flex_flow": "row wrap"})
        self._widget = ipywidgets.VBox([self._page, buttons, self._error])
        self._ask()

    def reveal(self) -> None:
        """Shows the answer."""
        self._draw(self.card.answer() if self.card else "", answered=True)

    def rate(self, rating: str) -> None:
        """Stores how well the card was remembered, and asks the next one.

        Raises ValueError for a rating that there is not, or if nothing is being asked.
        """
        if rating not in RATINGS or self.card is None:
            raise ValueError(f"got {rating!r}, wanted one of {list(RATINGS)}, for a card that is being asked")
        detail = {"rating": rating, "sitting": self._sitting}
        progress.record(KIND, self.card.id, RATINGS[rating], detail, self._clock(), self._file)
        self._ask()

    def _ask(self) -> None:
        """The next card, from the file: another notebook may have rated meanwhile."""
        self.card, self.where = self._following(progress.events(KIND, self._file), self._clock())
        self._draw("", answered=False)

    def _draw(self, answer: str, answered: bool) -> None:
        head = self.card.posed(self.where) if self.card else f'<p role="status">{self.where}</p>'
        page.fill(self._page, head + answer)
        self._error.outputs = ()
        self._show.disabled = answered or self.card is None
        for button in self._rates:
            button.disabled = not answered or self.card is None

    def _repr_mimebundle_(self, **_) -> dict:
        """The live session; where there is no kernel, its cards, the answers folded."""
        return page.view(self._widget, "".join(card.folded() for card in self._cards), f"Flash cards: {self.where}")


# --- Two days ---------------------------------------------------------------------------------------------------------

TIMES = ((-2, 18), (-1, 9), (-1, 18), (0, -2))  # days before; the hour, and on the day itself hours before
MINUTES = {"new": 3, "again": 1.25}  # say the answer aloud, read it, say what is asked next; then only say it


def plan(interview: datetime | str) -> pd.DataFrame:
    """One row a sitting before the interview ("2026-12-03 10:00"): when it starts, its cards, new ones, minutes.

    Half of the core cards in the first; the other half and the first again in the second; all in the last two. So each
    card is asked three or four times.
    """
    at, rows = pd.Timestamp(interview), []
    for number, (days, hour) in enumerate(TIMES, 1):
        start = at.normalize() + timedelta(days, hours=hour) if days else at + timedelta(hours=hour)
        cards, new = _asked_in(number)
        minutes = MINUTES["new"] * new + MINUTES["again"] * (len(cards) - new)
        rows.append({"sitting": number, "starts": f"{start:%a %d %B, %H:%M}", "cards": len(cards), "new": new,
                     "minutes": round(minutes)})  # fmt: skip
    return pd.DataFrame(rows).set_index("sitting")


def _asked_in(number: int) -> tuple[list[deck.Card], int]:
    """The cards of a sitting, and how many of them are new: the first ones."""
    every = [card for card in deck.mixed(deck.load()) if card.core]
    first, second = every[: (len(every) + 1) // 2], every[(len(every) + 1) // 2 :]
    return {1: (first, len(first)), 2: (second + first[::-1], len(second))}.get(number, (every, 0))


def sitting(number: int, interview: datetime | str, file: Path | None = None, **more) -> Session:
    """A sitting of the plan. A card rated again or hard comes back three cards later, until it is good or easy.

    From the third on, what was not known the last time comes first. Run once more, a sitting goes on where it was left.
    """
    if number not in range(1, len(TIMES) + 1):
        raise ValueError(f"got sitting {number!r}, wanted 1 to {len(TIMES)}")
    name, (cards, new) = f"{pd.Timestamp(interview)}, sitting {number}", _asked_in(number)

    def following(events: list[progress.Event], now: datetime) -> Next:
        first: dict[tuple[str, str], float] = {}  # the first rating in each sitting says what was known when it began
        for event in events:
            first.setdefault((event.item, event.detail.get("sitting", "")), event.score)
        before = {id: score for (id, sitting), score in first.items() if sitting != name}
        queue = cards if new else sorted(cards, key=lambda card: before.get(card.id, 0))
        for event in events:
            rated = [card for card in queue if (card.id, name) == (event.item, event.detail.get("sitting"))]
            queue = [card for card in queue if card not in rated]
            queue[3:3] = rated * (event.score < 1)
        return (queue[0], f"{len(queue)} left in sitting {number}") if queue else (None, f"Sitting {number} is done.")

    return Session(cards, following, name, file, **more)


# --- Every day --------------------------------------------------------------------------------------------------------

SCHEDULER = fsrs.Scheduler(enable_fuzzing=False)
AHEAD = timedelta(minutes=20)  # a card being learned may come so much before its time, when nothing else is left


def memories(events: Iterable[progress.Event]) -> dict[str, fsrs.Card]:
    """FSRS's state of each card that was rated, by id: its ratings played in their order."""
    states: dict[str, fsrs.Card] = {}
    for event in events:
        before, rating = states.get(event.item) or fsrs.Card(card_id=0), fsrs.Rating[event.detail["rating"].title()]
        states[event.item] = SCHEDULER.review_card(before, rating, event.at)[0]
    return states


def schedule(file: Path | None = None, now: datetime | None = None) -> pd.DataFrame:
    """One row a rated card, the next one first: due, chance to recall it, stability (days), difficulty (1 to 10)."""
    now = now or datetime.now(UTC)
    rows = {id: (state.due, SCHEDULER.get_card_retrievability(state, now), state.stability, state.difficulty)
            for id, state in memories(progress.events(KIND, file)).items()}  # fmt: skip
    names = ["due", "recall", "stability", "difficulty"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names).rename_axis("id").sort_values("due")


def session(cards: Sequence[deck.Card] = (), new: int = 3, file: Path | None = None, **more) -> Session:
    """A session over these cards (all, the core first, if none are given), with at most so many new ones a day.

    First what is due, the longest waiting first; then new cards, in the order given; then, so that a session does not
    stop for a minute, what is being learned and due within 20 minutes.
    """
    cards = cards or deck.mixed(deck.load())

    def following(events: list[progress.Event], now: datetime) -> Next:
        states = memories(events)
        first = {event.item: event.at for event in reversed(events)}  # when each card was new
        left = max(new - sum(at.date() == now.date() for at in first.values()), 0)
        seen = sorted((card for card in cards if card.id in states), key=lambda card: states[card.id].due)
        due = [card for card in seen if states[card.id].due <= now]
        fresh = [card for card in cards if card.id not in states][:left]
        learning = [card for card in seen if now < states[card.id].due <= now + AHEAD]
        if queue := [*due, *fresh, *learning]:
            return queue[0], f"{len(due)} due, {len(learning)} learning, {len(fresh)} new"
        later = f" The next card is due in {_interval(states[seen[0].id].due - now)}." if seen else ""
        return None, f"Nothing is due.{later}"

    return Session(cards[:new], following, file=file, **more)


def _interval(span: timedelta) -> str:
    minutes = span.total_seconds() / 60
    amounts = {"d": minutes / 24 / 60, "h": minutes / 60, "min": max(minutes, 1)}
    unit = next(unit for unit, amount in amounts.items() if amount >= 1)
    return f"{amounts[unit]:.0f} {unit}"

"""Flash cards with spaced repetition: a card comes back when you are about to forget it.

    flash.session()                              cards that are due, then new ones
    flash.session(cards.choose(cards.load(), topic="dpo"), new=5)
    flash.schedule()                             when each card is due, and how well it sits

When is FSRS's decision, an open scheduler that models each card's stability (days until recall falls to 90 %) and
difficulty; the package `fsrs` with its default parameters, without random fuzz. Only the ratings are stored, by
ftlab.classroom.progress; the state of a card is worked out from them, so two open notebooks cannot disagree.

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
SCHEDULER = fsrs.Scheduler(enable_fuzzing=False)
AHEAD = timedelta(minutes=20)  # a card being learned may come so much before its time, when nothing else is left


def memories(events: Iterable[progress.Event]) -> dict[str, fsrs.Card]:
    """FSRS's state of each card that was rated, by id: its ratings played in their order."""
    states: dict[str, fsrs.Card] = {}
    for event in events:
        before = states.get(event.item) or fsrs.Card(card_id=0)
        states[event.item] = _after(before, event.detail["rating"], event.at)
    return states


def _after(state: fsrs.Card, rating: str, at: datetime) -> fsrs.Card:
    return SCHEDULER.review_card(state, fsrs.Rating[rating.title()], at)[0]


def upcoming(
    cards: Sequence[deck.Card], states: dict[str, fsrs.Card], now: datetime, new: int
) -> tuple[deck.Card | None, dict[str, int]]:
    """The card to ask now, or None; and how many are due, being learned, and new (at most `new` of them).

    First what is due, the longest waiting first; then new cards, in the order given; then, so that a session does not
    stop for a minute, what is being learned and due within 20 minutes.
    """
    seen = sorted((card for card in cards if card.id in states), key=lambda card: states[card.id].due)
    due = [card for card in seen if states[card.id].due <= now]
    fresh = [card for card in cards if card.id not in states][: max(new, 0)]
    learning = [card for card in seen if now < states[card.id].due <= now + AHEAD]
    counts = {"due": len(due), "learning": len(learning), "new": len(fresh)}
    return next(iter([*due, *fresh, *learning]), None), counts


def schedule(file: Path | None = None, now: datetime | None = None) -> pd.DataFrame:
    """One row a rated card, the next one first: due, chance to recall it, stability (days), difficulty (1 to 10)."""
    now = now or datetime.now(UTC)
    rows = {
        id: {
            "due": state.due,
            "recall": SCHEDULER.get_card_retrievability(state, now),
            "stability": state.stability,
            "difficulty": state.difficulty,
        }
        for id, state in memories(progress.events(KIND, file)).items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["due", "recall", "stability", "difficulty"])
    return frame.rename_axis("id").sort_values("due")


def session(cards: Sequence[deck.Card] | None = None, new: int = 10, file: Path | None = None) -> "Session":
    """A session over these cards (all, if none are given), with at most so many new ones a day."""
    return Session(cards if cards is not None else deck.load(), new, file)


class Session:
    """Made by `session`. `reveal` and `rate` do what the buttons do; `card` is the one being asked, or None."""

    def __init__(
        self,
        cards: Sequence[deck.Card],
        new: int = 10,
        file: Path | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if not cards:
            raise ValueError("got no cards, wanted at least one: is the choice too narrow?")
        self._cards, self._new, self._file, self._clock = list(cards), new, file, clock
        self._page, self._error = ipywidgets.Output(), ipywidgets.Output()
        self._show_answer = page.button("Show the answer", self.reveal, self._error, "primary")
        self._rates = {
            rating: page.button(rating, lambda rating=rating: self.rate(rating), self._error) for rating in RATINGS
        }
        buttons = ipywidgets.HBox([self._show_answer, *self._rates.values()], layout={"flex_flow": "row wrap"})
        self._widget = ipywidgets.VBox([self._page, buttons, self._error])
        self._ask()

    def reveal(self) -> None:
        """Shows the answer, and on each button when the card would come back."""
        state = self._states.get(self.card.id) or fsrs.Card(card_id=0)
        now = self._clock()
        for rating, button in self._rates.items():
            button.description = f"{rating}: {_interval(_after(state, rating, now).due - now)}"
        self._draw(self.card.answer(), answered=True)

    def rate(self, rating: str) -> datetime:
        """Stores how well the card was remembered, shows the next one, and returns when this one is due again.

        Raises ValueError for a rating that there is not, or if nothing is being asked.
        """
        if rating not in RATINGS or self.card is None:
            raise ValueError(f"got {rating!r}, wanted one of {list(RATINGS)}, for a card that is being asked")
        id, now = self.card.id, self._clock()
        progress.record(KIND, id, RATINGS[rating], {"rating": rating}, now, self._file)
        self._ask()
        return self._states[id].due

    def _ask(self) -> None:
        """The next card, from the file: another notebook may have rated meanwhile."""
        now, events = self._clock(), progress.events(KIND, self._file)
        self._states = memories(events)
        first = {event.item: event.at for event in reversed(events)}  # when each card was new
        today = sum(at.date() == now.date() for at in first.values())
        self.card, self.counts = upcoming(self._cards, self._states, now, self._new - today)
        self._draw("", answered=False)

    def _draw(self, answer: str, answered: bool) -> None:
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        if self.card:
            head = self.card.posed(counted)
        else:
            waiting = [state.due for id, state in self._states.items() if id in {card.id for card in self._cards}]
            later = f" The next card is due in {_interval(min(waiting) - self._clock())}." if waiting else ""
            head = f'<p role="status">Nothing is due.{later}</p>'
        page.fill(self._page, head + answer)
        self._error.outputs = ()
        self._show_answer.disabled = answered or self.card is None
        for rating, button in self._rates.items():
            button.disabled = not answered
            if not answered:
                button.description = rating

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live session and, where there is no kernel, the card being asked, its answer folded."""
        shown = self.card.folded() if self.card else "Nothing is due."
        plain = f"Flash cards: {', '.join(f'{count} {name}' for name, count in self.counts.items())}"
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": shown, "text/plain": plain}


def _interval(span: timedelta) -> str:
    minutes = max(span.total_seconds() / 60, 1)
    for unit, size in (("d", 24 * 60), ("h", 60)):
        if minutes >= size:
            return f"{minutes / size:.0f} {unit}"
    return f"{minutes:.0f} min"

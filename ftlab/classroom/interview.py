"""A mock interview: random questions, a clock, your own judgment by a rubric, a report at the end.

    interview.interview(level="senior", questions=6, minutes=2)

Answer aloud, as to a person. Then read the card's answer, judge what you said by four criteria, and go on. The report
says where the points were lost and which cards to repeat. Each judgment is stored by ftlab.classroom.progress.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import pandas as pd

from ftlab.classroom import cards as deck
from ftlab.classroom import page, progress

KIND = "interview"  # in the progress file
RUBRIC = {
    "right": "Was all of it true, and none of it on the list of weak answers?",
    "clear": "Did the first sentence answer the question, and did you end in time?",
    "evidence": "Did you name a number, an experiment or a source, and could you show it?",
    "depth": "Could you answer what is asked next?",
}
POINTS = {"no": 0, "partly": 1, "yes": 2}
MOST = len(RUBRIC) * max(POINTS.values())  # points for one answer
REPEAT = MOST * progress.ENOUGH[KIND]  # 6: a card with fewer points is to be repeated


def choose(cards: Sequence[deck.Card], level: str | None, questions: int, rng: random.Random) -> list[deck.Card]:
    """Random cards of this level and the one below it (all, for None), spread over topics, then over kinds.

    Raises ValueError if there are fewer than asked for.
    """
    if level not in (None, *deck.LEVELS):
        raise ValueError(f"got level={level!r}, wanted one of {deck.LEVELS}")
    at = len(deck.LEVELS) if level is None else deck.LEVELS.index(level)
    allowed = deck.LEVELS if level is None else deck.LEVELS[max(at - 1, 0) : at + 1]
    left = [card for card in cards if card.level in allowed]
    if not 0 < questions <= len(left):
        raise ValueError(f"got {questions} questions, there are {len(left)} cards of {', '.join(allowed)}")
    rng.shuffle(left)
    chosen: list[deck.Card] = []
    while len(chosen) < questions:

        def met(card: deck.Card) -> tuple[int, int]:
            return sum(c.topic == card.topic for c in chosen), sum(c.kind == card.kind for c in chosen)

        chosen.append(left.pop(left.index(min(left, key=met))))
    return chosen


def interview(
    level: str | None = "mid",
    questions: int = 6,
    minutes: float = 2,
    cards: Sequence[deck.Card] | None = None,
    seed: int | None = None,
    file: Path | None = None,
) -> "Interview":
    """A mock interview with random cards (the same ones for the same seed) and so many minutes for each answer."""
    chosen = choose(cards if cards is not None else deck.load(), level, questions, random.Random(seed))
    return Interview(chosen, minutes, file)


class Interview:
    """Made by `interview`. `start`, `finish` and `grade` do what the buttons do; `report` is the result so far."""

    def __init__(
        self,
        cards: Sequence[deck.Card],
        minutes: float = 2,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cards, self._limit, self._file, self._clock = list(cards), 60 * minutes, file, clock
        self._run, self._rows, self._began, self._seconds = f"{time.time():.0f}", [], None, None
        self._page, self._error = ipywidgets.Output(), ipywidgets.Output()
        # The clock ticks in the browser: an invisible Play counts the seconds, the bar shows them.
        self._ticks = ipywidgets.Play(max=round(self._limit), interval=1000, layout={"display": "none"})
        self._bar = ipywidgets.IntProgress(max=round(self._limit), description="time", layout={"display": "none"})
        ipywidgets.jslink((self._ticks, "value"), (self._bar, "value"))
        self._start = page.button("Start", self.start, self._error, "primary")
        self._finish = page.button("I have answered", self.finish, self._error, "primary")
        self._next = page.button("Next", self._grade_shown, self._error, "primary")
        self._marks = {
            name: ipywidgets.ToggleButtons(
                options=list(POINTS),
                value=None,
                tooltips=[question] * len(POINTS),
                style={"button_width": "5em"},
                layout={"margin": "0 0 6px"},
            )
            for name, question in RUBRIC.items()
        }
        rows = [[ipywidgets.HTML(f"<b>{name}</b>: {RUBRIC[name]}"), marks] for name, marks in self._marks.items()]
        self._rubric = ipywidgets.VBox([widget for row in rows for widget in row])
        buttons = ipywidgets.HBox([self._start, self._finish, self._next])
        self._widget = ipywidgets.VBox([self._page, self._bar, self._ticks, self._rubric, buttons, self._error])
        self._draw()

    @property
    def card(self) -> deck.Card | None:
        """The card that is asked now, or comes next; None after the last one."""
        return self.cards[len(self._rows)] if len(self._rows) < len(self.cards) else None

    def start(self) -> None:
        """Asks the question and starts the clock."""
        self._need(self.card is not None and self._began is None, "a question that is not yet asked")
        self._began = self._clock()
        self._draw()

    def finish(self) -> float:
        """Stops the clock, shows the answer and the rubric, and returns the seconds taken."""
        self._need(self._began is not None and self._seconds is None, "a question that is being answered")
        self._seconds = self._clock() - self._began
        self._draw()
        return self._seconds

    def grade(self, **marks: str) -> None:
        """Stores your judgment, right="yes", clear="partly", ... for each criterion of RUBRIC, and goes on.

        Raises ValueError for a criterion that is missing or a mark that there is not.
        """
        self._need(self._seconds is not None, "an answer to judge")
        wrong = marks.keys() ^ RUBRIC.keys() or {mark for mark in marks.values() if mark not in POINTS}
        self._need(not wrong, f"a mark ({', '.join(POINTS)}) for each of {', '.join(RUBRIC)}")
        points = {name: POINTS[marks[name]] for name in RUBRIC}
        detail = {**points, "seconds": round(self._seconds), "run": self._run}
        progress.record(KIND, self.card.id, sum(points.values()) / MOST, detail, file=self._file)
        self._rows.append({"card": self.card.id, "topic": self.card.topic, "seconds": self._seconds, **points})
        self._began, self._seconds = self._clock() if self.card else None, None
        self._draw()

    def report(self) -> pd.DataFrame:
        """One row an answer: card, topic, seconds, points (0 to 2) by criterion, their sum, whether it was in time."""
        frame = pd.DataFrame(self._rows, columns=["card", "topic", "seconds", *RUBRIC])
        return frame.assign(points=frame[list(RUBRIC)].sum(axis=1), in_time=frame["seconds"] <= self._limit)

    def _need(self, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"wanted {wanted}")

    def _grade_shown(self) -> None:
        self.grade(**{name: marks.value or "" for name, marks in self._marks.items()})

    def _draw(self) -> None:
        place = f"Question {len(self._rows) + 1} of {len(self.cards)}"
        asked, answered = self._began is not None, self._seconds is not None
        if self.card is None:
            text = self._report_page()
        elif not asked:
            text = f"<p>{len(self.cards)} questions, {self._limit / 60:g} min each. Answer aloud. Ready?</p>"
        else:
            text = self.card.posed(place)
        if answered:
            late = " That was too long." if self._seconds > self._limit else ""
            text += f"<p>{self._seconds:.0f} seconds.{late} Now judge what you said:</p>{self.card.answer()}"
        page.fill(self._page, text)
        self._error.outputs = ()
        shown = {
            self._start: self.card is not None and not asked,
            self._finish: asked and not answered,
            self._next: answered,
            self._rubric: answered,
            self._bar: asked and not answered,
        }
        for widget, visible in shown.items():
            widget.layout.display = None if visible else "none"
        for marks in self._marks.values():
            marks.value = None
        self._ticks.playing = False
        if asked and not answered:
            self._ticks.value, self._ticks.playing = 0, True

    def _report_page(self) -> str:
        report = self.report()
        top, lost = MOST * len(report), report[list(RUBRIC)].mean().sort_values()
        weak = [card for card, points in zip(self.cards, report["points"], strict=True) if points < REPEAT]
        short = 'style="white-space: nowrap"'
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left">{page.prose(card.question)}</th>'
            f"<td {short}>{row.points:.0f} of {MOST}</td>"
            f"<td {short}>{row.seconds:.0f} s{'' if row.in_time else ', too long'}</td></tr>"
            for card, row in zip(self.cards, report.itertuples(), strict=True)
        )
        worst = f"Most points were lost on <b>{lost.index[0]}</b>: {RUBRIC[lost.index[0]]}" if lost.iloc[0] < 2 else ""
        again = f"<p>To repeat:</p>{''.join(card.folded() for card in weak)}" if weak else "<p>Nothing to repeat.</p>"
        said = f'<p role="status"><b>{report["points"].sum():.0f} of {top} points.</b> {worst}</p>'
        return f"{said}<table>{rows}</table>{again}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live interview and, where there is no kernel, rules and questions, the answers folded; or the report."""
        rubric = "".join(f"<li><b>{name}</b>: {question}</li>" for name, question in RUBRIC.items())
        rules = f"<p>{len(self.cards)} questions, {self._limit / 60:g} min each. Judge: no 0, partly 1, yes 2.</p>"
        questions = f"{rules}<ul>{rubric}</ul>{''.join(card.folded() for card in self.cards)}"
        shown = questions if self.card else self._report_page()
        plain = f"A mock interview of {len(self.cards)} questions"
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": shown, "text/plain": plain}

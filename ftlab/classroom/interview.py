"""A mock interview: random questions, what is asked next, a clock, your own judgment by a rubric, a report.

    interview.interview(level="senior", questions=6, minutes=2)

Answer aloud, as to a person. The interviewer listens, then asks the follow-up question. Then read the card, judge what
you said by four criteria, and go on. Each judgment is stored by ftlab.classroom.progress.
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
    "depth": "Did you answer the follow-up question?",
}
POINTS = {"no": 0, "partly": 1, "yes": 2}
MOST = len(RUBRIC) * max(POINTS.values())  # points for one answer
REPEAT = MOST * progress.ENOUGH[KIND]  # 6: a card with fewer points is to be repeated


def choose(cards: Sequence[deck.Card], level: str, questions: int, rng: random.Random) -> list[deck.Card]:
    """Random cards of this level and the one below it, spread over topics, then over kinds.

    Raises ValueError for a level that there is not, and if there are fewer cards than asked for.
    """
    if level not in deck.LEVELS:
        raise ValueError(f"got level={level!r}, wanted one of {deck.LEVELS}")
    at = deck.LEVELS.index(level)
    left = [card for card in cards if card.level in deck.LEVELS[max(at - 1, 0) : at + 1]]
    if not 0 < questions <= len(left):
        raise ValueError(f"got {questions} questions, wanted 1 to {len(left)}, the cards of this level")
    rng.shuffle(left)
    chosen: list[deck.Card] = []
    while len(chosen) < questions:
        topics, kinds = [card.topic for card in chosen], [card.kind for card in chosen]
        rarest = min(left, key=lambda card: (topics.count(card.topic), kinds.count(card.kind)))
        left.remove(rarest)
        chosen.append(rarest)
    return chosen


def interview(level: str = "mid", questions: int = 6, minutes: float = 2, seed: int | None = None) -> "Interview":
    """A mock interview with random cards (the same ones for the same seed) and so many minutes for each answer."""
    rng = random.Random(seed)
    return Interview(choose(deck.load(), level, questions, rng), minutes, rng)


class Interview:
    """Made by `interview`. `go_on` and `grade` do what the buttons do; `report` is the result so far.

    stage: "ready", then for each card "asked", "asked next", "judge"; at the end "report".
    """

    def __init__(self, cards: Sequence[deck.Card], minutes: float = 2, rng: random.Random | None = None,
                 file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        rng = rng or random.Random()
        self.cards, self._limit, self._file, self._clock = list(cards), 60 * minutes, file, clock
        self._follow_ups = [rng.choice(card.follow_ups) for card in self.cards]
        self._run, self._rows, self.stage, self._seconds = f"{time.time():.0f}", [], "ready", []
        self._page, self._error = ipywidgets.Output(), ipywidgets.Output()
        # The clock ticks in the browser: an invisible Play counts the seconds, the bar shows them.
        self._ticks = ipywidgets.Play(max=round(self._limit), interval=1000, layout={"display": "none"})
        self._bar = ipywidgets.IntProgress(max=round(self._limit), description="time")
        ipywidgets.jslink((self._ticks, "value"), (self._bar, "value"))
        self._marks = {name: ipywidgets.ToggleButtons(options=list(POINTS), value=None, style={"button_width": "5em"})
                       for name in RUBRIC}  # fmt: skip
        asked = [ipywidgets.HTML(f"<b>{name}</b>: {question}") for name, question in RUBRIC.items()]
        pairs = zip(asked, self._marks.values(), strict=True)
        self._rubric = ipywidgets.VBox([widget for pair in pairs for widget in pair])
        self._button = page.button("Start", self._press, self._error, "primary")
        rows = [self._page, self._bar, self._ticks, self._rubric, self._button, self._error]
        self._widget = ipywidgets.VBox(rows)
        self._draw()

    @property
    def card(self) -> deck.Card | None:
        """The card that is asked now, or comes next; None after the last one."""
        return self.cards[len(self._rows)] if len(self._rows) < len(self.cards) else None

    def go_on(self) -> None:
        """From "ready" to the question, from there to what is asked next, from there to the answers and the rubric."""
        stages = {"ready": "asked", "asked": "asked next", "asked next": "judge"}
        if self.stage not in stages:
            raise ValueError(f"got stage {self.stage!r}: wanted a mark for each of {', '.join(RUBRIC)} first")
        if self.stage != "ready":
            self._seconds.append(round(self._clock() - self._began))
        self.stage, self._began = stages[self.stage], self._clock()
        self._draw()

    def grade(self, **marks: str) -> None:
        """Stores your judgment, right="yes", clear="partly", ... for each criterion of RUBRIC, and goes on.

        Raises ValueError for a criterion that is missing or a mark that there is not.
        """
        if self.stage != "judge" or marks.keys() != RUBRIC.keys() or not {*marks.values()} <= {*POINTS}:
            raise ValueError(f"wanted an answer, and a mark ({', '.join(POINTS)}) for each of {', '.join(RUBRIC)}")
        points = {name: POINTS[marks[name]] for name in RUBRIC}
        seconds = dict(zip(("seconds", "next_seconds"), self._seconds, strict=True))
        detail = {**points, **seconds, "run": self._run}
        progress.record(KIND, self.card.id, sum(points.values()) / MOST, detail, file=self._file)
        self._rows.append({"card": self.card.id, "topic": self.card.topic, **seconds, **points})
        self.stage, self._seconds, self._began = "asked" if self.card else "report", [], self._clock()
        self._draw()

    def report(self) -> pd.DataFrame:
        """One row an answer: card, topic, seconds, points (0 to 2) by criterion, their sum, whether it was in time."""
        frame = pd.DataFrame(self._rows, columns=["card", "topic", "seconds", "next_seconds", *RUBRIC])
        in_time = frame[["seconds", "next_seconds"]].max(axis=1) <= self._limit
        return frame.assign(points=frame[list(RUBRIC)].sum(axis=1), in_time=in_time)

    def _press(self) -> None:
        if self.stage == "judge":
            self.grade(**{name: marks.value or "" for name, marks in self._marks.items()})
        else:
            self.go_on()

    def _draw(self) -> None:
        speaking = self.stage.startswith("asked")
        page.fill(self._page, self._as_html())
        self._error.outputs = ()
        self._button.description = {"ready": "Start", "judge": "Next"}.get(self.stage, "I have answered")
        shown = {self._bar: speaking, self._rubric: self.stage == "judge", self._button: self.stage != "report"}
        for widget, visible in shown.items():
            widget.layout.display = None if visible else "none"
        for marks in self._marks.values():
            marks.value = None
        self._ticks.playing = False
        if speaking:
            self._ticks.value, self._ticks.playing = 0, True

    def _as_html(self) -> str:
        if self.stage == "report":
            return self._report_page()
        if self.stage == "ready":
            return f"<p>{len(self.cards)} questions, {self._limit / 60:g} min for each answer. Answer aloud. Ready?</p>"
        place, next_question = len(self._rows), self._follow_ups[len(self._rows)][0]
        text = self.card.posed(f"Question {place + 1} of {len(self.cards)}")
        if self.stage != "asked":
            text += f'<p role="status">Asked next: <b>{page.prose(next_question)}</b></p>'
        if self.stage == "judge":
            took = " and ".join(map(str, self._seconds))
            late = " That was too long." if max(self._seconds) > self._limit else ""
            text += f"<p>{took} seconds.{late} Now judge what you said:</p>{self.card.answer()}"
        return text

    def _report_page(self) -> str:
        report, rows, narrow = self.report(), [], 'style="white-space: nowrap"'
        lost = report[list(RUBRIC)].mean().sort_values()
        weak = [card for card, points in zip(self.cards, report["points"], strict=True) if points < REPEAT]
        for card, row in zip(self.cards, report.itertuples(), strict=True):
            took = f"{row.seconds} and {row.next_seconds} s{', too long' * (not row.in_time)}"
            rows.append(
                f'<tr><th scope="row" style="text-align: left">{page.prose(card.question)}</th>'
                f"<td {narrow}>{row.points} of {MOST}</td><td {narrow}>{took}</td></tr>"
            )
        worst = f" Most points were lost on <b>{lost.index[0]}</b>: {RUBRIC[lost.index[0]]}" * bool(lost.iloc[0] < 2)
        again = "<p>To repeat:</p>" + "".join(card.folded() for card in weak) if weak else "<p>Nothing to repeat.</p>"
        said = f'<p role="status"><b>{report["points"].sum()} of {MOST * len(report)} points.</b>{worst}</p>'
        return f"{said}<table>{''.join(rows)}</table>{again}"

    def _repr_mimebundle_(self, **_) -> dict:
        """The live interview; where there is no kernel, its questions, the answers folded, or the report."""
        questions = self._as_html() + "".join(card.folded() for card in self.cards)
        still = self._report_page() if self.stage == "report" else questions
        return page.view(self._widget, still, f"A mock interview of {len(self.cards)} questions")

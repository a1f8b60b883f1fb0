"""A mock interview: random questions, what is asked next, a clock, your own judgment by a rubric, a report."""

import random
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from ftlab.classroom import cards as deck
from ftlab.classroom import page, progress
from ftlab.classroom.show import POLICY

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
ANSWERED = "I have answered"


def choose(cards: Sequence[deck.Card], level: str, questions: int, rng: random.Random) -> list[deck.Card]:
    """Random cards of this level and the one below it, spread over topics, then over kinds; all if there are fewer."""
    if level not in deck.LEVELS:
        raise ValueError(f"level: got {level!r}, wanted one of {', '.join(deck.LEVELS)}")
    i, chosen = deck.LEVELS.index(level), []
    left = [card for card in cards if card.level in deck.LEVELS[max(i - 1, 0) : i + 1]]
    rng.shuffle(left)
    for _ in range(min(questions, len(left))):
        topics, kinds = [card.topic for card in chosen], [card.kind for card in chosen]
        chosen.append(min(left, key=lambda card: (topics.count(card.topic), kinds.count(card.kind))))
        left.remove(chosen[-1])
    return chosen


def interview(level: str, questions: int, minutes: float) -> "Interview":
    """A mock interview with random cards, and `minutes` for each answer."""
    rng = random.Random()
    return Interview(choose(deck.load(), level, questions, rng), minutes, rng)


class Interview(page.Steps):
    """Asks these cards, each with a follow-up that rng draws, and stores the points and the seconds of each."""

    def __init__(self, cards: Sequence[deck.Card], minutes: float, rng: random.Random,
                 file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.cards, self._rng, self._file, self._clock = cards, rng, file, clock
        self._limit, self._answers = 60 * minutes, []
        super().__init__("A mock interview", self._course, still="".join(card.folded() for card in cards))

    def _course(self) -> Generator:
        """The pages; begun anew after an error, it asks on from the first answer that is not stored."""
        n, minutes = len(self.cards), self._limit / 60
        grows = "<style>@keyframes ftlab-time { from { width: 0 } }</style>"  # a bar that fills while one speaks
        look = f"width: 100%; height: 6px; background: {POLICY}; animation: ftlab-time {self._limit:.0f}s linear"
        yield f"<p>{n} questions, {minutes:g} min for each answer. Answer aloud. Ready?</p>", ["Start"]
        for card in self.cards[len(self._answers) :]:
            text, seconds = card.posed(f"Question {len(self._answers) + 1} of {n}"), []
            follow_up = page.prose(self._rng.choice(card.follow_ups)["ask"])
            for asked in ("", f'<p role="status">Asked next: <b>{follow_up}</b></p>'):
                text, began = text + asked, self._clock()
                yield f'{text}{grows}<div style="{look}"></div>', [ANSWERED]
                seconds.append(round(self._clock() - began))
            late = " That was too long." if max(seconds) > self._limit else ""
            text += f"<p>{seconds[0]} and {seconds[1]} seconds.{late} Now judge what you said:</p>{card.answer()}"
            answer = dict(zip(("seconds", "next_seconds"), seconds, strict=True))
            for name, question in RUBRIC.items():
                mark = yield f'{text}<p role="status"><b>{name}</b>: {question}</p>', POINTS
                answer[name] = POINTS[mark]
            points = sum(answer[name] for name in RUBRIC)
            progress.record(KIND, card.id, points / MOST, answer, file=self._file)
            self._answers.append((points, answer))
        self.still = ""
        yield self._report(), []

    def _report(self) -> str:
        lost = {name: sum(2 - answer[name] for _, answer in self._answers) for name in RUBRIC}
        worst, total, lines = max(lost, key=lost.get), MOST * len(self._answers), ""
        for card, (points, answer) in zip(self.cards, self._answers, strict=True):
            first, second = answer["seconds"], answer["next_seconds"]
            notes = ", too long" if max(first, second) > self._limit else ""
            notes += ", <b>to repeat</b>" if points < REPEAT else ""
            says = f"{points} of {MOST} points; {first} and {second} s{notes}:"
            lines += f'<div style="margin-top: 0.8em">{says}</div>{card.folded()}'
        most = f" Most points were lost on <b>{worst}</b>: {RUBRIC[worst]}" if lost[worst] else ""
        return f'<p role="status"><b>{total - sum(lost.values())} of {total} points.</b>{most}</p>{lines}'

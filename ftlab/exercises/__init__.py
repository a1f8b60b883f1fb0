"""Exercises: `check("05.2", my_function)`, `hint("05.2")`, `solution("05.2")`; each is the last line of its cell.

A cell starts with a stub whose body is `...`. `check` says in one short block: not tried yet; right; what was got, what
was wanted and the likely slip; or what the learner's code raised, and in which line. It shows no traceback.

The exercises of notebook 05 are `EXERCISES = {"05.1": Exercise(...), ...}` in ftlab/exercises/nb05.py.
"""

import html
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

from ftlab.exercises.core import Exercise, Slip, first_difference, same, shown
from ftlab.exercises.learner import Watched, line_of, returns_something, said, time_limit, untouched

__all__ = ["Exercise", "Slip", "check", "first_difference", "hint", "same", "shown", "solution"]

_COLOURS = {"right": "#009E73", "not tried yet": "#7F7F7F", "not yet": "#E69F00"}  # the bar at the left of a block
_hints_given: dict[str, int] = {}


@dataclass(frozen=True)
class Feedback:
    """A short block: `state` is "right", "not yet", "not tried yet" or a heading; lines are (label, text)."""

    state: str
    lines: tuple[tuple[str, str], ...] = ()
    code: str = ""  # in a fold

    @property
    def right(self) -> bool:
        return self.state.startswith("right")

    def __repr__(self) -> str:
        return "\n".join([self.state, *(f"  {label}: {text}" if label else f"  {text}" for label, text in self.lines)]
                         + [self.code] * bool(self.code))  # fmt: skip

    def _repr_html_(self) -> str:
        colour = next((c for state, c in _COLOURS.items() if self.state.startswith(state)), "#0072B2")
        rows = "".join(
            f"<div>{f'<b>{html.escape(label)}</b> ' if label else ''}"
            f'<span style="white-space:pre-wrap">{html.escape(text)}</span></div>'
            for label, text in self.lines
        )
        fold = f"<details><summary>show the code</summary><pre>{html.escape(self.code)}</pre></details>"
        return (
            f'<div style="border-left:4px solid {colour};padding:0.2em 0.8em;margin:0.3em 0;max-width:60em">'
            f"<b>{html.escape(self.state)}</b>{rows}{fold * bool(self.code)}</div>"
        )


def check(q: str, thing: Any) -> Feedback:
    """What to say about the learner's `thing`, a function in most exercises. Raises for a defect of the check only."""
    if not isinstance(exercise := _find(q), Exercise):
        return exercise
    if thing is ... or untouched(thing):
        return Feedback("not tried yet", (("", f'{exercise.title}. Replace the ... ; hint("{q}") helps.'),))
    if callable(exercise.solution) and not callable(thing):
        wanted = f"{exercise.solution.__name__} itself, without calling it"
        return Feedback("not yet", (("got", f"the {type(thing).__name__} {shown(thing)}"), ("wanted", wanted)))
    mine = Watched(thing)
    try:
        with time_limit(exercise.seconds):
            slip = exercise.verify(mine.call if inspect.isfunction(thing) else thing)
    except Exception as error:
        if line := line_of(thing, error):
            return Feedback("not yet", (("your code raised", said(error)), ("in", line)))
        if mine.failed:
            return Feedback("not yet", (("the call of your function failed", said(error)),))
        if inspect.isfunction(thing) and not mine.calls:
            raise
        slip = Slip(shown(mine.last if mine.calls else thing), "something else", f"the check met {said(error)}")
    if slip is None or isinstance(slip, str):
        return Feedback(
            f"right, {mine.calls} fresh inputs" if mine.calls > 1 else "right", (("", slip),) if slip else ()
        )
    if mine.only_none and not returns_something(thing):
        return Feedback("not yet", (("", "your function returns None: is `return` missing?"),))
    parts = {"for": slip.given, "got": slip.got, "wanted": slip.wanted, "likely": slip.likely}
    return Feedback("not yet", tuple((label, text) for label, text in parts.items() if text))


def hint(q: str) -> Feedback:
    """The next hint of an exercise; the last one again when there are no more."""
    if not isinstance(exercise := _find(q), Exercise):
        return exercise
    k = _hints_given[q] = min(_hints_given.get(q, 0) + 1, len(exercise.hints))
    more = "" if k < len(exercise.hints) else f' That was the last one. solution("{q}") shows the code.'
    return Feedback(f"hint {k} of {len(exercise.hints)}", (("", exercise.hints[k - 1] + more),))


def solution(q: str) -> Feedback:
    """The code of an exercise's solution, in a fold."""
    exercise = _find(q)
    return Feedback(f"solution of {q}", code=exercise.source) if isinstance(exercise, Exercise) else exercise


def exercises(notebook: str = "") -> dict[str, Exercise]:
    """The exercises of a notebook ("05"), or of all, by number."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith(f"nb{notebook}")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
    return {q: exercise for module in modules for q, exercise in module.EXERCISES.items()}


def _find(q: str) -> Exercise | Feedback:
    near = exercises(str(q)[:2]) or exercises()
    return near[q] if q in near else Feedback(f"no exercise {q!r}", (("there are", ", ".join(near)),))

"""Exercises: `check("05.2", my_function)`, `hint("05.2")`, `solution("05.2")`; each is the last line of its cell.

A cell starts with a stub whose body is `...`. `check` says in one short block: not tried yet; right; what was got, what
was wanted and the likely slip; or what the learner's code raised, and in which line. It shows no traceback. It stores
each attempt in ftlab.classroom.progress, but no stub and no "debug this" that is still as it was given.

Where the notebook runs, buttons below the block do what `hint` and `solution` do; a page without a
kernel shows the block alone.

The exercises of notebook 05 are `EXERCISES = {"05.1": Exercise(...), ...}` in ftlab/exercises/nb05.py.
"""

import ast
import html
import importlib
import inspect
import pkgutil
import textwrap
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

from ftlab import notebook
from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same, shown
from ftlab.exercises.differences import first_difference
from ftlab.exercises.learner import Watched, line_of, returns_something, said, untouched
from ftlab.rewards import TimeUp, in_time

__all__ = [
    "Exercise",
    "Slip",
    "Verdict",
    "check",
    "first_difference",
    "hint",
    "same",
    "shown",
    "solution",
    "stub",
]


class Verdict(Enum):
    """What check found; NONE is for hints and solutions."""

    RIGHT = "right"
    NOT_YET = "not yet"
    NOT_TRIED = "not tried yet"
    NONE = ""


_COLOURS = {  # of the bar at the left of a block
    Verdict.RIGHT: "#009E73",
    Verdict.NOT_YET: "#E69F00",
    Verdict.NOT_TRIED: "#7F7F7F",
    Verdict.NONE: "#0072B2",
}
hints_given: dict[str, int] = {}


@dataclass(frozen=True)
class Feedback:
    """A short block: a verdict, what its heading says besides, and lines of (label, text)."""

    verdict: Verdict
    lines: tuple[tuple[str, str], ...] = ()
    heading: str = ""
    code: str = ""  # in a fold
    q: str = ""  # the exercise whose hints and solution have buttons below the block

    @property
    def right(self) -> bool:
        return self.verdict is Verdict.RIGHT

    @property
    def state(self) -> str:
        """The heading: "right, 50 calls", "not yet", "hint 1 of 3"."""
        return ", ".join(filter(None, (self.verdict.value, self.heading)))

    def __repr__(self) -> str:
        return "\n".join([self.state, *(f"  {label}: {text}" if label else f"  {text}" for label, text in self.lines)]
                         + [self.code] * bool(self.code))  # fmt: skip

    def _ipython_display_(self) -> None:
        """In a notebook the block, and then its buttons: an output of their own, so that the block
        stays where the kernel is gone.
        """
        if not self.q or notebook.shell() is None:
            raise NotImplementedError  # IPython then shows it as it shows any value
        from IPython.display import display

        from ftlab.classroom import page
        from ftlab.exercises.buttons import Buttons

        display({"text/plain": repr(self), "text/html": self.html()}, raw=True)
        buttons = Buttons(partial(_next_hint, self.q), partial(_unfolded, self.q), self.right)
        display(page.view(buttons.widget, "", ""), raw=True)

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, unfolded: bool = False) -> str:
        """The block; its code is folded away if not `unfolded`."""
        rows = "".join(
            f"<div>{f'<b>{html.escape(label)}</b> ' if label else ''}"
            f'<span style="white-space:pre-wrap">{html.escape(text)}</span></div>'
            for label, text in self.lines
        )
        code = f"<summary>show the code</summary><pre>{html.escape(self.code)}</pre>"
        fold = f"<details{' open' * unfolded}>{code}</details>"
        bar = f"border-left:4px solid {_COLOURS[self.verdict]}"
        return (
            f'<div style="{bar};padding:0.2em 0.8em;margin:0.3em 0;max-width:60em">'
            f"<b>{html.escape(self.state)}</b>{rows}{fold * bool(self.code)}</div>"
        )


def check(q: str, thing: Any) -> Feedback:
    """What to say about the learner's `thing`, a function in most exercises. Raises for a defect of the check only."""
    if not isinstance(exercise := find(q), Exercise):
        return exercise
    effort = f"difficulty {exercise.difficulty} of 3, about {exercise.minutes} minutes"
    if thing is ... or untouched(thing):
        task = f'{exercise.title}. Write your lines in place of the dots. hint("{q}") helps.'
        return Feedback(Verdict.NOT_TRIED, (("", task), ("", effort)), q=q)
    verdict = _judged(exercise, thing)
    if ("likely", AS_GIVEN) in verdict.lines:
        task = f'{exercise.title}. {AS_GIVEN}. hint("{q}") helps.'
        return Feedback(Verdict.NOT_TRIED, (("", task), ("", effort)), q=q)
    return replace(verdict, lines=(*verdict.lines, *_stored(q, verdict.right)), q=q)


def _judged(exercise: Exercise, thing: Any) -> Feedback:
    """The verdict on an attempt."""
    if callable(exercise.solution) and not callable(thing):
        wanted = f"{exercise.solution.__name__} itself, without calling it"
        got = f"the {type(thing).__name__} {shown(thing)}"
        return _not_yet(("got", got), ("wanted", wanted))
    mine = Watched(thing)
    try:
        slip = in_time(TimeUp(exercise.seconds), exercise.verify, mine.call if inspect.isfunction(thing) else thing)
    except (Exception, SystemExit, TimeUp) as error:
        if line := line_of(thing, error):
            return _not_yet(("your code raised", said(error)), ("in", line))
        if mine.failed:
            return _not_yet(("the call of your function failed", said(error)))
        if inspect.isfunction(thing) and not mine.calls:
            raise
        slip = Slip(shown(mine.last if mine.calls else thing), "something else", f"the check met {said(error)}")
    if slip is None or isinstance(slip, str):
        calls = f"{mine.calls} calls" if mine.calls > 1 else ""
        return Feedback(Verdict.RIGHT, (("", slip),) if slip else (), calls)
    if mine.only_none and not returns_something(thing):
        return _not_yet(("", "your function returns None: is `return` missing?"))
    parts = {"for": slip.given, "got": slip.got, "wanted": slip.wanted, "likely": slip.likely}
    return _not_yet(*((label, text) for label, text in parts.items() if text))


def _not_yet(*lines: tuple[str, str]) -> Feedback:
    return Feedback(Verdict.NOT_YET, lines)


def _stored(q: str, right: bool) -> tuple[tuple[str, str], ...]:
    """Stores an attempt. What to say of it: that it failed; when right, how much of the notebook is done.

    An exercise is done if its last attempt was right.
    """
    from ftlab.classroom import progress

    try:
        progress.record("exercise", q, float(right))
        states = [*progress.states("exercise", exercises(q[:2])).values()]
    except OSError as error:  # ProgressError is one
        return (("not stored", str(error)),)
    done = f"{states.count('done')} of {len(states)} exercises of notebook {q[:2]}"
    return (("done", done),) if right else ()


def hint(q: str) -> Feedback:
    """The next hint of an exercise; the last one again when there are no more."""
    if not isinstance(exercise := find(q), Exercise):
        return exercise
    k = hints_given[q] = min(hints_given.get(q, 0) + 1, len(exercise.hints))
    more = "" if k < len(exercise.hints) else f' That was the last one. solution("{q}") shows the code.'
    lines = (("", exercise.hints[k - 1] + more),)
    return Feedback(Verdict.NONE, lines, f"hint {k} of {len(exercise.hints)}")


def _next_hint(q: str) -> tuple[str, int]:
    """The next hint's HTML, and how many there are after it."""
    shown = hint(q).html()
    return shown, len(find(q).hints) - hints_given[q]


def _unfolded(q: str) -> str:
    """The solution's HTML: who presses twice wants to see it."""
    return solution(q).html(unfolded=True)


def solution(q: str) -> Feedback:
    """The code of an exercise's solution, in a fold."""
    exercise = find(q)
    if not isinstance(exercise, Exercise):
        return exercise
    return Feedback(Verdict.NONE, (), f"solution of {q}", exercise.source)


def stub(q: str) -> str:
    """The blank page of an exercise: what its solution binds, with `...` for the code, and the line that checks it.

    Raises KeyError if there is no such exercise.
    """
    tree = ast.parse(exercises(q[:2])[q].source)
    made = tree.body[-1]
    if isinstance(made, ast.Assign):
        name, made.value = made.targets[0].id, ast.Constant(...)
    else:
        name = made.name
        for function in made.body if isinstance(made, ast.ClassDef) else [made]:
            function.body = [ast.Expr(ast.Constant(...))]
    lines = [
        textwrap.fill(line, 100, subsequent_indent=" " * (line.find("(") + 1)) for line in ast.unparse(tree).split("\n")
    ]
    return "\n".join([*lines, "", f'check("{q}", {name})'])


def exercises(notebook: str = "") -> dict[str, Exercise]:
    """The exercises of a notebook ("05"), or of all, by number."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith(f"nb{notebook}")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
    return {q: exercise for module in modules for q, exercise in module.EXERCISES.items()}


def find(q: str) -> Exercise | Feedback:
    near = exercises(str(q)[:2]) or exercises()
    if q in near:
        return near[q]
    return Feedback(Verdict.NONE, (("there are", ", ".join(near)),), f"no exercise {q!r}")

"""How a learner's function is compared with the right one, and how its mistake gets a name."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftlab.exercises.core import Slip, contrast, same, shown
from ftlab.exercises.gradients import (
    NOT_FINITE,
    Outcome,
    finite,
    gradient_slip,
    names_of,
    outcome,
    slip_of,
)

Draw = Callable[[random.Random], tuple]


def first_difference(
    function: Callable,
    answer: Callable,
    draw: Draw,
    wrong: Mapping = {},
    n: int = 50,
    equal: Callable[[Any, Any], bool] | None = None,
    by: Sequence[str] = (),
    fixed: Sequence[str] = (),
    edges: Mapping[str, Draw] = {},
) -> Slip | None:
    """None if function and answer agree on n fresh inputs from `draw`, else the first Slip.

    Of each tuple of arguments the value counts, then that no tensor was changed in place, then the
    gradients of a random weighting of the values.

    equal   equal(got, wanted) decides on the value; without it, `same`. It must take whatever a
            learner's function returns
    by      the names of the inputs (answer's parameters) by which gradients are compared
    fixed   the names of inputs through which no gradient may come
    edges   what to say -> inputs at which an unstable formula is nan or infinite. There value and
            gradients must be finite, and the value right to 50 %, as a clamp is no mistake
    """
    equal = equal or same
    rng, upstream = random.Random(), random.Random().randrange(2**31)

    def run(kind: Callable, inputs: tuple) -> Outcome:
        return outcome(kind, inputs, names_of(answer, inputs), (*by, *fixed), upstream)

    def likely(look: Callable, alike: Callable, inputs: tuple) -> str:
        return _likely(function, wrong, look, alike, inputs, lambda: draw(rng))

    for _ in range(n):
        inputs = draw(rng)
        got, wanted = run(function, inputs), run(answer, inputs)
        given = ", ".join(map(shown, inputs))
        if not equal(got.value, wanted.value):
            named = likely(_value_of, equal, inputs) or _not_finite(got, wanted)
            return Slip(*contrast(got.value, wanted.value), named, given)
        slip = slip_of(got, wanted, fixed)
        if slip and got.learns and not got.changed:  # a wrong gradient: that of a known mistake?
            named = likely(lambda kind, drawn: _all_of(run(kind, drawn)), same, inputs)
            slip = replace(slip, likely=named or slip.likely)
        if slip:
            return replace(slip, given=given)
    for words, draw_edge in edges.items():
        for _ in range(3):
            inputs = draw_edge(rng)
            slip = _slip_at_edge(run(function, inputs), run(answer, inputs), fixed)
            if slip:
                return replace(slip, likely=words, given=", ".join(map(shown, inputs)))
    return None


def _slip_at_edge(got: Outcome, wanted: Outcome, fixed: Sequence[str]) -> Slip | None:
    if not (finite(got.value) and same(got.value, wanted.value, rtol=0.5, atol=1e-3)):
        return Slip(*contrast(got.value, wanted.value))
    for name, gradient in got.gradients.items():
        if not finite(gradient) and name not in fixed:
            return gradient_slip(name, gradient, wanted.gradients[name])
    return None


def _not_finite(got: Outcome, wanted: Outcome) -> str:
    return NOT_FINITE if finite(wanted.value) and not finite(got.value) else ""


def _value_of(function: Callable, inputs: tuple) -> Any:
    return function(*copy.deepcopy(inputs))


def _all_of(found: Outcome) -> dict[str, Any]:
    """What two calls must share to have the same mistake in their gradients."""
    return {"value": found.value, **found.gradients}


def _likely(
    function: Callable,
    wrong: Mapping,
    look: Callable,
    alike: Callable,
    inputs: tuple,
    draw: Callable[[], tuple],
) -> str:
    """The words of the wrong answer that gives what function gives.

    look(function, inputs) is what counts of a call; alike compares two of these. Of several answers
    the one that is alike most often in 200 draws, or fewer once one of them leads by eight.
    """

    def found(kind: Callable, drawn: tuple) -> Any:
        try:
            return look(kind, drawn)
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"

    mine = found(function, inputs)
    hits = {}
    for words, slip in wrong.items():
        if callable(slip) and alike(found(slip, inputs), mine):
            hits[words] = 0
    for _ in range(200 * (len(hits) > 1)):
        drawn = draw()
        mine = found(function, drawn)
        for words in hits:
            hits[words] += alike(found(wrong[words], drawn), mine)
        most, second = sorted(hits.values(), reverse=True)[:2]
        if most - second == 8:
            break
    return max(hits, key=hits.get, default="")

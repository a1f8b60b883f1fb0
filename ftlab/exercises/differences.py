"""How a learner's function is compared with the right one on fresh inputs, and how its mistake gets a name."""

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
    """None if function and answer agree on n fresh inputs (tuples of arguments from `draw`), else the first Slip.

    Of each input the value counts, then that no tensor was changed in place, then the gradients of a random weighting
    of the values by the inputs named in `by` and `fixed`; through those in `fixed` no gradient may come. Names are
    those of answer's parameters.

    equal(got, wanted) decides on the value; without it, `same`. It must take whatever a learner's function returns.
    edges: what to say -> inputs at which an unstable formula is nan or infinite. There value and gradients must be
    finite, and the value right to 25 %: what one clamps or adds against a division by 0 is no mistake.
    """
    equal = equal or same
    rng, upstream = random.Random(), random.Random().randrange(2**31)
    names: list[str] = []

    def run(kind: Callable, inputs: tuple) -> Outcome:
        return outcome(kind, inputs, names, (*by, *fixed), upstream)

    for _ in range(n):
        inputs = draw(rng)
        names = names_of(answer, inputs)
        got, wanted = run(function, inputs), run(answer, inputs)
        given = ", ".join(map(shown, inputs))
        if not equal(got.value, wanted.value):
            likely = _likely(
                lambda kind, drawn: kind(*copy.deepcopy(drawn)),
                function,
                wrong,
                equal,
                inputs,
                draw,
                rng,
            )
            return Slip(
                *contrast(got.value, wanted.value), likely or _not_finite(got, wanted), given
            )
        if slip := slip_of(got, wanted, fixed):
            if (
                not got.changed and got.learns
            ):  # a gradient that is wrong: is it that of a known mistake?
                named = _likely(
                    lambda kind, drawn: _all_of(run(kind, drawn)),
                    function,
                    wrong,
                    same,
                    inputs,
                    draw,
                    rng,
                )
                slip = replace(slip, likely=named or slip.likely)
            return replace(slip, given=given)
    for words, draw_edge in edges.items():
        for _ in range(3):
            inputs = draw_edge(rng)
            names = names_of(answer, inputs)
            got, wanted = run(function, inputs), run(answer, inputs)
            if slip := _slip_at_edge(got, wanted, fixed):
                return replace(slip, likely=words, given=", ".join(map(shown, inputs)))
    return None


def _slip_at_edge(got: Outcome, wanted: Outcome, fixed: Sequence[str]) -> Slip | None:
    if not (finite(got.value) and same(got.value, wanted.value, rtol=0.25, atol=1e-3)):
        return Slip(*contrast(got.value, wanted.value))
    for name, gradient in got.gradients.items():
        if not finite(gradient) and name not in fixed:
            return gradient_slip(name, gradient, wanted.gradients[name])
    return None


def _not_finite(got: Outcome, wanted: Outcome) -> str:
    return NOT_FINITE if finite(wanted.value) and not finite(got.value) else ""


def _all_of(found: Outcome) -> dict[str, Any]:
    """What two calls must share to have the same mistake in their gradients."""
    return {"value": found.value, **found.gradients}


def _likely(
    run: Callable,
    function: Callable,
    wrong: Mapping,
    equal: Callable,
    inputs: tuple,
    draw: Draw,
    rng: random.Random,
) -> str:
    """The words of the wrong answer that gives what function gives; of several, the one that does so most often.

    run(kind, inputs) is what a call of one of them gives. Of several: over 200 draws, or fewer once one of them leads
    by eight.
    """

    def found(kind: Callable, drawn: tuple) -> Any:
        try:
            return run(kind, drawn)
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"

    mine = found(function, inputs)
    alike = [
        words
        for words, slip in wrong.items()
        if callable(slip) and equal(found(slip, inputs), mine)
    ]
    hits = dict.fromkeys(alike, 0)
    for _ in range(200 * (len(hits) > 1)):
        drawn = draw(rng)
        mine = found(function, drawn)
        for words in hits:
            hits[words] += equal(found(wrong[words], drawn), mine)
        most, second = sorted(hits.values(), reverse=True)[:2]
        if most - second == 8:
            break
    return max(hits, key=hits.get, default="")

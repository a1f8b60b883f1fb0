"""What a learner's loss or layer does besides its value: gradients, and changes of its inputs."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlab.exercises.core import Slip, contrast, readable, same, shown

DETACHED = (
    "the value is right, but it has no gradient, so nothing can learn from it: "
    "leave out .detach(), .data, .item(), float(), torch.tensor(...) and no_grad"
)
IN_PLACE = "is changed in place, and the caller still needs it: x - y makes a new tensor, x -= y does not"
NO_PATH = "the value is right, but no gradient comes through"
WRONG_PATH = "the value is right, but not the gradient through"
FIXED = "is fixed, so no gradient goes through it: detach it"
BACKWARD = "the backward pass needs a tensor that was changed in place: make a new one instead"
NOT_FINITE = (
    "look for the logarithm of 0, a division by 0 or an exp that overflows, "
    "also in the side that torch.where does not take"
)


@dataclass(frozen=True)
class Outcome:
    """What a call made of its inputs.

    value      what it returned, detached
    gradients  of sum(upstream * value) by the chosen inputs, by name; None where none comes through
    changed    (name, before, after) of the first input tensor that the call changed in place
    learns     whether the value has a gradient at all
    broken     what the backward pass raised
    """

    value: Any
    gradients: Mapping[str, Any]
    changed: tuple[str, Any, Any] | None = None
    learns: bool = False
    broken: str = ""


def names_of(answer: Callable, inputs: Sequence) -> list[str]:
    """The names of the inputs: those of the answer's parameters."""
    names = list(inspect.signature(answer).parameters)
    plain = [f"argument {i + 1}" for i in range(len(inputs))]
    return [*names, *plain[len(names) :]][: len(inputs)]


def outcome(
    function: Callable,
    inputs: Sequence,
    names: Sequence[str],
    by: Sequence[str] = (),
    seed: int = 0,
) -> Outcome:
    """What function makes of copies of the inputs, with its gradients by those named in `by`."""
    given = dict(zip(names, copy.deepcopy(tuple(inputs)), strict=True))
    leaves = {name: given[name].requires_grad_() for name in by}
    # A leaf that is changed in place would raise: a copy of it changes, and the change is named.
    given |= {name: leaf.clone() for name, leaf in leaves.items()}
    value = function(*given.values())
    changed = _first_change(given, dict(zip(names, inputs, strict=True)))
    value = _one_tensor(value)
    learns = bool(getattr(value, "requires_grad", False))
    if not (by and learns) or changed:
        return Outcome(_detached(value), dict.fromkeys(by), changed, learns)
    try:
        return Outcome(_detached(value), _gradients(value, leaves, seed), None, learns)
    except RuntimeError as error:
        return Outcome(_detached(value), dict.fromkeys(by), None, learns, str(error).split(":")[0][:120])


def slip_of(got: Outcome, wanted: Outcome, fixed: Sequence[str] = ()) -> Slip | None:
    """What is wrong with an outcome whose value is right; through `fixed` no gradient may come."""
    if got.changed:
        name, before, after = got.changed
        now, then = contrast(after, before, name)
        return Slip(f"after the call {now}", f"{then}, as before", f"{name} {IN_PLACE}")
    if not any(gradient is not None for gradient in wanted.gradients.values()):
        return None
    if not got.learns:
        return Slip("a value without a gradient", "one with a gradient", DETACHED)
    if got.broken:
        return Slip(f"RuntimeError in the backward pass: {got.broken}", "a gradient", BACKWARD)
    for name, right in wanted.gradients.items():
        mine = got.gradients[name]
        if name in fixed:
            if _moves(mine):
                return gradient_slip(name, mine, None, f"{name} {FIXED}")
        elif not finite(mine):
            return gradient_slip(name, mine, right, NOT_FINITE)
        elif not same(_dense(mine, right), right, rtol=1e-3, atol=1e-6):
            return gradient_slip(name, mine, right, f"{WRONG_PATH if _moves(mine) else NO_PATH} {name}")
    return None


def gradient_slip(name: str, got: Any, wanted: Any, likely: str = "") -> Slip:
    """The Slip of a wrong gradient by an input; None: there is none."""
    place = f"the gradient by {name}"
    if got is None or wanted is None:
        both = (f"{place}: none" if each is None else f"{place}: {shown(each)}" for each in (got, wanted))
        return Slip(*both, likely)
    return Slip(*contrast(got, wanted, place), likely)


def finite(value: Any) -> bool:
    """Is no number in it nan or infinite? True for what holds no floats."""
    if hasattr(value, "isfinite"):  # a tensor
        return not readable(value) or bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def mistakes(answer: Callable, by: Sequence[str], changed: Sequence[str] = ()) -> dict[str, Callable]:
    """Wrong answers with the right value, by their words.

    Detached; half of the gradient; for each input in `by` no gradient through it; for each in
    `changed` a change of it in place.
    """
    names = list(inspect.signature(answer).parameters)

    def without(name: str) -> Callable:
        def cut(*inputs):
            at = names.index(name)
            return answer(*inputs[:at], inputs[at].detach(), *inputs[at + 1 :])

        return cut

    def in_place(name: str) -> Callable:
        def spoil(*inputs):
            value = answer(*inputs)
            inputs[names.index(name)].data.zero_()
            return value

        return spoil

    def halved(*inputs):
        value = answer(*inputs)
        return (value + value.detach()) / 2

    found = {}
    if by:
        found[DETACHED] = lambda *inputs: answer(*inputs).detach()
        found[f"{WRONG_PATH} {by[0]}"] = halved
    if len(by) > 1:  # with one input alone that is the detached answer again
        found |= {f"{NO_PATH} {name}": without(name) for name in by}
    return found | {f"{name} {IN_PLACE}": in_place(name) for name in changed}


def _first_change(given: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for name, tensor in given.items():
        if hasattr(tensor, "detach") and not same(tensor, before[name], rtol=0, atol=0):
            return name, before[name], tensor.detach()
    return None


def _gradients(value: Any, leaves: Mapping[str, Any], seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(value.shape, generator=generator).to(value)
    found = torch.autograd.grad((value * upstream).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _one_tensor(value: Any) -> Any:
    """A list of tensors that learn, one an example, as one tensor; all else as it is."""
    if not isinstance(value, list | tuple) or not value:
        return value
    if not all(getattr(x, "requires_grad", False) for x in value):
        return value
    if len({tuple(x.shape) for x in value}) > 1:
        return value
    import torch

    return torch.stack(list(value))


def _detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value


def _moves(gradient: Any) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _dense(gradient: Any, right: Any) -> Any:
    """No gradient is one of zeros."""
    return 0 * right if gradient is None else gradient

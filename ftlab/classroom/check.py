"""Checks for the exercises: each says "right" with the value, or fails with what was got, what was wanted and a hint.

An exercise runs as shipped because it starts from the answer key: `mine = theirs`, then a check of `mine`.
"""

from collections.abc import Callable

import torch


def close(value: object, wanted: object, rtol: float = 1e-4, atol: float = 1e-6, hint: str = "") -> None:
    """Prints "right" if value and wanted, numbers, lists or tensors, differ by at most atol + rtol * |wanted|.

    Raises AssertionError otherwise; nan is never right.
    """
    got, target = _tensor(value), _tensor(wanted)
    if got.shape != target.shape:
        _fail(f"got shape {tuple(got.shape)}, wanted {tuple(target.shape)}", hint)
    wrong = ~((got - target).abs() <= atol + rtol * target.abs())
    if wrong.any():
        if got.ndim == 0:
            _fail(f"got {got.item():.6g}, wanted {target.item():.6g}", hint)
        i = tuple(wrong.nonzero()[0].tolist())
        _fail(
            f"{int(wrong.sum())} of {wrong.numel()} values differ; the first at {list(i)}: got {got[i].item():.6g}, "
            f"wanted {target[i].item():.6g}",
            hint,
        )
    print("right:", f"{got.item():.6g}" if got.ndim == 0 else f"{got.numel()} values of shape {tuple(got.shape)}")


def equal(value: object, wanted: object, hint: str = "") -> None:
    """Prints "right" if value == wanted, for what is not a float: codes, names, yes or no. Raises AssertionError."""
    same = torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted
    if not same:
        _fail(f"got {value!r}, wanted {wanted!r}", hint)
    print("right:", f"{value.numel()} values" if isinstance(value, torch.Tensor) else repr(value))


def property(
    mine: Callable, wanted: Callable, draw: Callable[[], tuple], trials: int = 50, rtol: float = 1e-4, hint: str = ""
) -> None:
    """Prints "right" if mine(*inputs) is close to wanted(*inputs) for `trials` inputs that draw() makes with torch.

    A number typed in, or a formula that holds for one example only, is not right for long. The same inputs each time;
    torch's own random state is left as it was. Raises AssertionError with the first inputs that tell the two apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for trial in range(trials):
            inputs = draw()
            got, target = _tensor(mine(*inputs)), _tensor(wanted(*inputs))
            if got.shape != target.shape or not torch.allclose(got, target, rtol=rtol, atol=1e-6):
                shown = ", ".join(map(repr, inputs))
                _fail(f"fresh input {trial + 1}, ({shown}): got {got.tolist()}, wanted {target.tolist()}", hint)
    print(f"right: {trials} fresh inputs")


def _tensor(value: object) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()


def _fail(what: str, hint: str) -> None:
    raise AssertionError(f"{what}. {hint}".strip())

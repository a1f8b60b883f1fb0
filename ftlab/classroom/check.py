"""A check for notebook 11: it says "right" with the value, or fails with what was got, what was wanted and a hint.

An exercise runs as shipped because it starts from the answer key: `mine = theirs`, then a check of `mine`.
"""

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


def _tensor(value: object) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()


def _fail(what: str, hint: str) -> None:
    raise AssertionError(f"{what}. {hint}".strip())

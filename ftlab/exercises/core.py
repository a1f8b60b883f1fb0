"""What an exercise is made of, and how a learner's answer is compared with the right one on fresh inputs."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

AS_GIVEN = "It still does what the given code does"  # words of a Slip in a "debug this"


@dataclass(frozen=True)
class Slip:
    """Why an answer is not right yet, in the learner's words. `given`: the input; `likely`: the probable mistake."""

    got: str
    wanted: str
    likely: str = ""
    given: str = ""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook.

    verify    takes the learner's function (or class, value, trainer): None when it is right, or a str with what to say
              besides; else a Slip
    hints     three: an idea or a question; the formula or the functions to use; nearly the code
    solution  a function or class of the exercise's module, or source text that binds one name: `check` takes that
              thing. Its source is shown and run as it stands, so it imports what it needs inside
    wrong     what one easily gets wrong, in words -> such an answer. A test gives each to `verify`, and
              `first_difference` recognises it in the learner's: the words become the Slip's `likely`. In a "debug
              this" AS_GIVEN -> what does the same as the code in the notebook
    seconds   after this long the check gives up and asks about an endless loop
    difficulty  1: a few lines that the text describes; 2: a step to find out, or several; 3: several, and they meet
    minutes   what it takes one who knows Python and has read the notebook up to it, the check's own time with it
    """

    title: str
    verify: Callable[[Any], Slip | str | None]
    hints: tuple[str, ...]
    solution: Callable | str
    wrong: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 20
    difficulty: int = field(kw_only=True)
    minutes: int = field(kw_only=True)

    @property
    def source(self) -> str:
        return self.solution if isinstance(self.solution, str) else inspect.getsource(self.solution)


def same(got: Any, wanted: Any, rtol: float = 1e-4, atol: float = 1e-6) -> bool:
    """Are they equal? Numbers up to atol + rtol * |wanted|; tensors, lists and dicts item by item; nan never is."""
    got, wanted = _plain(got), _plain(wanted)
    if isinstance(wanted, dict):
        return (
            isinstance(got, dict)
            and got.keys() == wanted.keys()
            and all(same(got[k], wanted[k], rtol, atol) for k in wanted)
        )
    if isinstance(wanted, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(wanted)
            and all(same(a, b, rtol, atol) for a, b in zip(got, wanted, strict=True))
        )
    if isinstance(wanted, float) or isinstance(got, float):
        numbers = isinstance(got, int | float) and isinstance(wanted, int | float)
        return numbers and (got == wanted or (math.isfinite(wanted) and abs(got - wanted) <= atol + rtol * abs(wanted)))
    return (type(got) is type(wanted) or {type(got), type(wanted)} == {int, bool}) and got == wanted


def shown(value: Any) -> str:
    """The value in about 200 characters: floats with six digits, tensors as lists with their shape."""
    try:
        return _text(value)
    except Exception:  # a learner's object may fail wherever it is looked at
        return f"a {type(value).__name__} that cannot be shown"


def _text(value: Any) -> str:
    shape = getattr(value, "shape", None)
    plain = _rounded(_plain(value))
    text = plain if isinstance(value, str) and len(value) > 240 else repr(plain)
    text = text if len(text) <= 240 else f"{text[:120]} … {text[-80:]}"
    return f"{text} (shape {tuple(shape)})" if shape is not None and len(shape) else text


def readable(value: Any) -> bool:
    """False for a tensor without a list of numbers: a sparse or quantized one, or one on "meta"."""
    layout, device = getattr(value, "layout", ""), getattr(value, "device", "")
    plain = str(layout) in ("", "torch.strided") and str(device) != "meta"
    return plain and not getattr(value, "is_quantized", False)


class _NoNumbers(str):
    """Stands for a tensor that cannot be read: equals nothing, and is shown without quotes."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return False

    def __repr__(self) -> str:
        return str(self)


def _plain(value: Any) -> Any:
    """A tensor or array as (nested lists of) numbers; all else as it is."""
    if hasattr(value, "detach"):
        if not readable(value):
            return _NoNumbers(f"a tensor without plain numbers ({value.layout}, {value.device})")
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    return value.tolist() if hasattr(value, "tolist") else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return type(value)(map(_rounded, value)) if type(value) in (list, tuple) else value


def contrast(got: Any, wanted: Any, place: str = "") -> tuple[str, str]:
    """Both in words: the shapes when these differ, and of long lists and dicts the first item that differs."""
    shapes = [tuple(value.shape) if hasattr(value, "shape") else None for value in (got, wanted)]
    if None not in shapes and shapes[0] != shapes[1]:
        return f"shape {shapes[0]}", f"shape {shapes[1]}"
    a, b = _plain(got), _plain(wanted)
    keys = [list(each) if isinstance(each, dict) else list(range(len(each))) for each in (a, b)
            if isinstance(each, dict | list)]  # fmt: skip
    if type(a) is type(b) and keys[:1] == keys[1:] and max(len(repr(a)), len(repr(b))) > 240:
        for k in keys[0] if keys else ():
            if not same(a[k], b[k]):
                return contrast(a[k], b[k], f"{place}[{k!r}]")
    kinds = [type(value).__name__ for value in (got, wanted)]
    if type(a) is type(b) is list and len(a) != len(b) and max(len(repr(a)), len(repr(b))) > 240:
        return tuple(f"{place}: {len(each)} items".removeprefix(": ") for each in (a, b))
    differ = kinds[0] != kinds[1] and not {*kinds} <= {"int", "float", "bool", "Tensor", "list", "tuple"}
    before = f"{place}: " if place else ""
    return tuple(
        f"{before}{shown(value)}{f' ({kind})' * differ}" for value, kind in zip((got, wanted), kinds, strict=True)
    )

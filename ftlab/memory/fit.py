"""Will it fit? The cards, and the longest rows and the largest batch that a card holds."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftlab.memory.architecture import choose
from ftlab.memory.predict import estimate
from ftlab.paths import DATA


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in bytes as sold (GiB for most cards), and the share of it that a training step can have."""

    name: str
    memory_bytes: int
    usable: float
    native_bf16: bool
    source: str

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable)


def gpus() -> dict[str, Gpu]:
    """The GPUs in data/gpus/gpus.json, by name."""
    rows = json.loads((DATA / "gpus" / "gpus.json").read_text(encoding="utf-8"))
    return {row["name"]: Gpu(**row) for row in rows}


def fits(gpu: Gpu | str, architecture: Any, **settings: Any) -> bool:
    """Whether the predicted peak is within the usable memory of the GPU (of each one, if there are several).

    gpu: one of `gpus()`, or its name. The other arguments, and the errors, are those of `estimate`.
    """
    gpu = gpu if isinstance(gpu, Gpu) else choose(gpu, gpus(), "gpu")
    return estimate(architecture, **settings).peak_bytes <= gpu.usable_bytes


def max_length(gpu: Gpu | str, architecture: Any, **settings: Any) -> int:
    """The longest max_length, in tokens, that fits; 0 if not even two tokens do. Arguments as of `fits`."""
    return _largest(lambda tokens: fits(gpu, architecture, **settings | {"max_length": tokens}), 2, 1 << 22)


def max_batch(gpu: Gpu | str, architecture: Any, **settings: Any) -> int:
    """The largest per_device_train_batch_size that fits; 0 if not even one row does (kto: two). Arguments: `fits`."""
    least = 2 if settings.get("method") == "kto" else 1
    size = "per_device_train_batch_size"
    return _largest(lambda rows: fits(gpu, architecture, **settings | {size: rows}), least, 1 << 16)


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] for which a falling condition holds, by bisection; 0 if none."""
    if not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low

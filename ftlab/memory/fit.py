"""Will it fit? The cards, and the longest rows and the largest batch that a card holds."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from ftlab.memory.architecture import Architecture
from ftlab.memory.predict import estimate
from ftlab.memory.setup import Setup
from ftlab.paths import DATA
from ftlab.pipeline.recipe import Recipe


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


def fits(gpu: Gpu, architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> bool:
    """Whether the predicted peak is within the usable memory of the GPU (of each one, if the setup has several)."""
    return estimate(architecture, recipe, setup).fits(gpu)


def max_length(gpu: Gpu, architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> int:
    """The longest max_length, in tokens, that fits; 0 if not even two tokens do (ppo: an answer and one more)."""
    least = recipe.max_completion_length + 1 if recipe.method == "ppo" else 2
    return _largest(lambda tokens: fits(gpu, architecture, recipe.replace(max_length=tokens), setup), least, 1 << 22)


def max_batch(gpu: Gpu, architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> int:
    """The largest batch_size that fits at the recipe's max_length; 0 if not even one row does (kto: two)."""
    least = 2 if recipe.method == "kto" else 1
    return _largest(lambda rows: fits(gpu, architecture, recipe.replace(batch_size=rows), setup), least, 1 << 16)


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] for which a falling condition holds, by bisection; 0 if none."""
    if not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low

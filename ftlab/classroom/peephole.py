"""A look into a training loop that keeps its numbers to itself: TRL's PPO computes everything inside train()."""

import sys
from collections.abc import Callable
from typing import Any

import torch


def train_watched(trainer: Any, look: Callable[[torch.Tensor, dict[str, Any]], None]) -> None:
    """Runs trainer.train(), and calls look(loss, the loop's variables by name) before each backward pass.

    The training goes on as if nobody had looked. For a trainer that calls `accelerator.backward(loss)` in the function
    whose variables are wanted, as TRL's PPOTrainer does.
    """
    backward = trainer.accelerator.backward

    def look_first(loss: torch.Tensor, **options: Any) -> None:
        look(loss, dict(sys._getframe(1).f_locals))
        backward(loss, **options)

    trainer.accelerator.backward = look_first
    try:
        trainer.train()
    finally:
        trainer.accelerator.backward = backward


def train_and_look(trainer: Any, at: int) -> dict[str, torch.Tensor]:
    """Runs trainer.train(), and returns copies of its loop's variables at backward pass number `at` (from 1).

    Tensors, and index arrays as tensors. Raises ValueError if there were fewer backward passes.
    """
    seen: dict[str, torch.Tensor] = {}
    count = 0

    def copy(loss: torch.Tensor, variables: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count != at:
            return
        for name, value in variables.items():
            if isinstance(value, torch.Tensor):
                seen[name] = value.detach().clone()
            elif name.endswith("_inds"):
                seen[name] = torch.as_tensor(value).clone()

    train_watched(trainer, copy)
    if count < at:
        raise ValueError(f"got {count} backward passes, wanted at least {at}: fewer steps or epochs than you think?")
    return seen

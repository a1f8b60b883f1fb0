"""A look into a training loop that keeps its numbers to itself: TRL's PPO computes everything inside train()."""

import sys
from typing import Any

import torch


def train_and_look(trainer: Any, at: int) -> dict[str, torch.Tensor]:
    """Runs trainer.train(), and returns copies of its loop's variables at backward pass number `at` (from 1).

    Tensors, and index arrays as tensors. The training itself goes on as if nobody had looked. For a trainer that calls
    `accelerator.backward(loss)` in the function whose variables are wanted, as TRL's PPOTrainer does.

    Raises ValueError if there were fewer backward passes.
    """
    seen: dict[str, torch.Tensor] = {}
    backward, count = trainer.accelerator.backward, 0

    def look(loss: torch.Tensor, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            for name, value in sys._getframe(1).f_locals.items():
                if isinstance(value, torch.Tensor):
                    seen[name] = value.detach().clone()
                elif name.endswith("_inds"):
                    seen[name] = torch.as_tensor(value).clone()
        backward(loss, **options)

    trainer.accelerator.backward = look
    try:
        trainer.train()
    finally:
        trainer.accelerator.backward = backward
    if count < at:
        raise ValueError(f"got {count} backward passes, wanted at least {at}: fewer steps or epochs than you think?")
    return seen

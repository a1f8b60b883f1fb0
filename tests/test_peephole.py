"""ftlab.classroom.peephole: it sees the loop's variables of the pass asked for, and changes nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftlab.classroom.peephole import train_and_look


class Trainer:
    """Three steps of gradient descent on (w - 3)^2 / 2, with the variables of a loop that nobody returns."""

    def __init__(self) -> None:
        self.w = torch.zeros(1, requires_grad=True)
        self.accelerator = SimpleNamespace(backward=lambda loss: loss.backward())

    def train(self) -> None:
        for step in range(3):
            micro_batch_inds, error = np.array([step]), self.w - 3
            self.accelerator.backward((error**2 / 2).sum())
            with torch.no_grad():
                self.w -= 0.5 * self.w.grad
                self.w.grad = None
            del micro_batch_inds


def test_it_sees_one_pass_and_training_goes_on():
    """By hand: w = 0, 1.5, 2.25, 2.625, so the error at the second pass is -1.5."""
    trainer = Trainer()
    backward = trainer.accelerator.backward
    seen = train_and_look(trainer, at=2)
    assert seen["error"].item() == -1.5 and seen["micro_batch_inds"].tolist() == [1]
    assert trainer.w.item() == 2.625 and trainer.accelerator.backward is backward


def test_too_few_passes_are_an_error():
    with pytest.raises(ValueError, match="3 backward passes, wanted at least 4"):
        train_and_look(Trainer(), at=4)

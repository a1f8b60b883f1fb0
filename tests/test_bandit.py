"""ftlab.classroom.bandit: the minimum it finds is the one that enumeration or the formula gives."""

import itertools
import math

import torch
from torch.testing import assert_close

from ftlab.classroom.bandit import minimised
from ftlab.scratch.losses import dpo_loss

REF = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05], dtype=torch.float64)
REWARDS = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0], dtype=torch.float64)


def test_the_minimum_of_a_cross_entropy_is_its_target():
    start = torch.zeros(5, dtype=torch.float64)
    assert_close(minimised(lambda logits: -(REF * logits.log_softmax(0)).sum(), start), REF, atol=1e-6, rtol=0)
    assert not start.any() and not start.requires_grad


def test_the_minimum_of_the_expected_dpo_loss_is_the_optimum_of_rlhf():
    """pi* = ref exp(r / beta) / Z, summed here answer by answer; each pair weighted by Bradley and Terry's chance."""
    beta = 0.5
    weights = [p * math.exp(r / beta) for p, r in zip(REF.tolist(), REWARDS.tolist(), strict=True)]
    optimum = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    pairs = list(itertools.permutations(range(5), 2))

    def loss(logits):
        logps, refs = logits.log_softmax(0), REF.log()
        return sum(
            torch.sigmoid(REWARDS[w] - REWARDS[l])
            * dpo_loss(logps[w, None], logps[l, None], refs[w, None], refs[l, None], beta)[0]
            for w, l in pairs  # noqa: E741
        )

    assert_close(minimised(loss, REF.log()), optimum, atol=1e-5, rtol=0)

"""ftlab.classroom.rollouts: sampled tokens and the trainer's log-probs of them meet at the same place."""

import math

import pytest
import torch

from ftlab.classroom.rollouts import collate, gap


def test_collate_puts_each_log_prob_where_per_token_logps_scores_its_token():
    """Answer 8 9 after prompt 5 6 7, answer 4 after prompt 5. Entry t scores token t + 1: 8 at t = 2, 4 at t = 0."""
    rollouts = collate([[5, 6, 7], [5]], [[(8, -0.5), (9, -1.5)], [(4, -2.0)]], pad_id=0)
    assert rollouts.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 4, 0, 0, 0]]
    assert rollouts.completion_mask.tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert rollouts.sampler_logps.tolist() == [[0, 0, -0.5, -1.5], [-2.0, 0, 0, 0]]


def test_gap_by_hand():
    """Ratios 1.5 and 1 / 1.5 in one answer, 1.1 in the other: two of three tokens are outside, and no answer is."""
    rollouts = collate([[1], [1]], [[(2, -1.0), (3, -1.0)], [(2, -1.0)]], pad_id=0)
    ratio = torch.tensor([[1.5, 1 / 1.5], [1.1, 99.0]])  # 99 stands at padding
    row = gap(rollouts.sampler_logps + ratio.log(), rollouts)
    assert row["tokens outside"] == pytest.approx(2 / 3) and row["answers outside"] == 0
    assert row["largest"] == pytest.approx(math.log(1.5), abs=1e-6)
    assert row["mean |log ratio|"] == pytest.approx((2 * math.log(1.5) + math.log(1.1)) / 3, abs=1e-6)

"""ftlab.classroom.selfplay: by hand, against the closed form, and where the game ends or runs away."""

import math

import pytest
import torch
from torch.testing import assert_close

from ftlab.classroom.selfplay import expected_loss, play

HUMAN = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
START = torch.tensor([0.1, 0.1, 0.2, 0.6], dtype=torch.float64)


def test_expected_loss_by_hand():
    """Two answers, human (1/2, 1/2), opponent (1/4, 3/4), policy (1/2, 1/2), beta 1.

    log-ratios ln 2 and ln 2/3, their difference ln 3. Pairs (0,0) and (1,1), weights 1/8 and 3/8, cost ln 2; (0,1),
    weight 3/8, ln 4/3; (1,0), weight 1/8, ln 4.
    """
    human, opponent = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.5], [0.25, 0.75]))
    wanted = math.log(2) / 2 + 3 / 8 * math.log(4 / 3) + math.log(4) / 8
    assert expected_loss(human.log(), opponent, human, 1.0).item() == pytest.approx(wanted, rel=1e-12)


def test_every_round_starts_at_ln_2_and_ends_lower():
    assert expected_loss(START.log(), START, HUMAN, 0.7).item() == pytest.approx(math.log(2))
    _, after = play(START, HUMAN, 0.7, 1)
    assert expected_loss(after.log(), START, HUMAN, 0.7) < math.log(2)


@pytest.mark.parametrize("beta", [0.4, 0.6, 1.0, 2.0, 5.0])
def test_a_round_ends_where_the_closed_form_says(beta):
    model = START
    for played in play(START, HUMAN, beta, 3)[1:]:
        model = model * (HUMAN / model) ** (1 / beta)
        model = model / model.sum()
        assert_close(played, model, rtol=1e-4, atol=1e-6)


def test_the_people_are_a_fixed_point():
    assert_close(play(HUMAN, HUMAN, 0.3, 2), HUMAN.expand(3, 4), rtol=0, atol=1e-10)


def test_no_distributions_are_refused():
    for start in (torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.full((4,), 0.3)):
        with pytest.raises(ValueError, match="two distributions"):
            play(start.double(), HUMAN, 1.0, 1)

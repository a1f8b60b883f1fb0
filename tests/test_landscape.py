"""ftlab.classroom.landscape: the numbers under the sliders against paper and finite differences, and what is shown."""

import base64
import io
import itertools
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from shown import VIEW
from torch.testing import assert_close

from ftlab.classroom.landscape import dpo_pair, margin_explorer, minimised, orpo_landscape, orpo_pair
from ftlab.scratch.losses import dpo_loss


@pytest.fixture(scope="module", params=[margin_explorer, orpo_landscape], ids=lambda make: make.__name__)
def made(request):
    return request.param()


def slope(f, x: float) -> float:
    return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5


def of_one(function, x: float, *settings) -> dict[str, float]:
    found = function(torch.tensor([x], dtype=torch.float64), *settings)
    return {name: value.item() for name, value in found.items()}


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_a_pair_of_dpo_by_hand():
    """Log-ratios +2 and -1: margin 0.3; ln(1 + e^-0.3) = 0.5544, 1/(1 + e^0.3) = 0.4256. At a gap of 0: ln 2, 1/2."""
    wanted = {"margin": 0.3, "loss": 0.554355, "weight": 0.425557, "pull": 0.0425557}
    assert of_one(dpo_pair, 3, 0.1) == pytest.approx(wanted, rel=1e-5)
    at_start = of_one(dpo_pair, 0, 0.1)
    assert (at_start["loss"], at_start["weight"]) == pytest.approx((math.log(2), 0.5))


@pytest.mark.parametrize(("gap", "beta"), [(5, 0.1), (-3, 0.3), (-10, 1.0)])
def test_the_pull_of_dpo_is_the_slope_of_its_loss(gap, beta):
    """The slope of ln(1 + e^-x), written with math, by finite differences."""
    by_hand = -slope(lambda x: math.log1p(math.exp(-beta * x)), gap)
    assert of_one(dpo_pair, gap, beta)["pull"] == pytest.approx(by_hand, abs=1e-8)


def test_a_pair_of_orpo_by_hand():
    """1/2 against 1/4: odds 1 and 1/3, ratio 3, so the odds term is ln(4/3), and sigmoid(-ln 3) = 1/4.

    Its pull: lam / 4 / (1 - 1/2) on the chosen and lam / 4 / (1 - 1/4) on the rejected mean log-prob.
    """
    odds = 0.1 * math.log(4 / 3)
    wanted = {"loss": math.log(2) + odds, "NLL": math.log(2), "lam x odds term": odds, "NLL on chosen": 1.0}
    wanted |= {"odds term on chosen": 0.05, "odds term on rejected": -0.1 / 3}
    assert of_one(orpo_pair, 0.25, 0.5, 0.1) == pytest.approx(wanted)


@pytest.mark.parametrize(("p_w", "p_l"), [(0.05, 0.9), (0.5, 0.5), (0.98, 0.02)])
def test_the_pulls_of_orpo_are_slopes(p_w, p_l):
    def odds_term(w: float, l: float) -> float:  # noqa: E741
        ratio = math.exp(w) / (1 - math.exp(w)) / (math.exp(l) / (1 - math.exp(l)))
        return 2 * math.log(1 + 1 / ratio)

    pair, w, l = of_one(orpo_pair, p_l, p_w, 2), math.log(p_w), math.log(p_l)  # noqa: E741
    assert pair["odds term on chosen"] == pytest.approx(-slope(lambda x: odds_term(x, l), w), rel=1e-5)
    assert pair["odds term on rejected"] == pytest.approx(-slope(lambda x: odds_term(w, x), l), rel=1e-5)


def test_the_minimum_of_the_expected_dpo_loss_is_the_optimum_of_rlhf():
    """pi* = ref exp(r / beta) / Z, summed here answer by answer; each pair weighted by Bradley and Terry's chance."""
    beta, rewards = 0.5, torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0]).double()
    ref = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).double()
    weights = [p * math.exp(r / beta) for p, r in zip(ref.tolist(), rewards.tolist(), strict=True)]
    optimum = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    w, l = torch.tensor(list(itertools.permutations(range(5), 2))).T  # noqa: E741

    def loss(logits):
        logps, refs = logits.log_softmax(0), ref.log()
        pairs = dpo_loss(logps[w], logps[l], refs[w], refs[l], beta)
        return (torch.sigmoid(rewards[w] - rewards[l]) * pairs).sum()

    assert_close(minimised(loss, ref.log()), optimum, atol=1e-6, rtol=0)


# --- What is shown ----------------------------------------------------------------------------------------------------


def pixels(explorer) -> np.ndarray:
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', explorer.shown)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


def test_each_slider_moves_numbers_and_picture_and_nothing_stays_behind(made):
    first, first_picture, figures = made.shown, pixels(made), plt.get_fignums()  # those that other tests left
    for slider in made.controls.values():
        old = slider.value
        slider.value = slider.options[-1]
        assert made.shown.partition("<img")[0] != first.partition("<img")[0], slider.description
        assert (pixels(made) != first_picture).any(), slider.description
        slider.value = old
        assert made.shown == first
    assert plt.get_fignums() == figures


def test_the_extremes_of_all_sliders_can_be_drawn(made):
    for end in (0, -1):
        for slider in made.controls.values():
            slider.value = slider.options[end]
        assert not re.search("nan|inf", made.shown.partition("<img")[0])


def test_it_can_be_read_without_a_kernel_by_ear_and_on_a_dark_page(made):
    """Every slider has a name, what changes is announced, the picture has words and a ground of its own."""
    bundle = made._repr_mimebundle_()
    assert bundle["text/html"] == made.shown and VIEW in bundle
    assert all(slider.description for slider in made.controls.values())
    assert 'role="status"' in made.shown and 'alt="' in made.shown and "<script" not in made.shown
    assert pixels(made)[0, 0].tolist() == [255] * 4


def test_both_answers_can_become_less_likely_while_the_loss_falls():
    """From 0 and 0 to -6 and -12: ln 2 = 0.693 becomes ln(1 + e^-0.6) = 0.437."""
    made = margin_explorer()
    made.controls["chosen"].value, made.controls["rejected"].value = 0, 0
    assert "loss 0.693, weight 0.500" in re.sub("<[^>]+>", "", made.shown)
    made.controls["chosen"].value, made.controls["rejected"].value = -6, -12
    assert "margin 0.600, loss 0.437" in re.sub("<[^>]+>", "", made.shown)

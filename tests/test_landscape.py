"""ftlab.classroom.landscape: the numbers under the sliders against paper and finite differences, and what is shown."""

import base64
import html
import io
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from shown import VIEW

from ftlab.classroom import landscape
from ftlab.classroom.landscape import (
    dpo_pair,
    margin_explorer,
    orpo_landscape,
    orpo_pair,
)

ALL = pytest.mark.parametrize("make", [margin_explorer, orpo_landscape], ids=lambda make: make.__name__)


def slope(f, x: float) -> float:
    return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_a_pair_of_dpo_by_hand():
    """Log-ratios +2 and -1: rewards 0.2 and -0.1, margin 0.3; ln(1 + e^-0.3) = 0.5544, 1/(1 + e^0.3) = 0.4256."""
    pair = dpo_pair(-10, -14, -12, -13, beta=0.1)
    assert pair == pytest.approx(
        {
            "reward of chosen": 0.2,
            "reward of rejected": -0.1,
            "margin": 0.3,
            "loss": 0.554355,
            "weight": 0.425557,
            "pull": 0.0425557,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_begins_at_ln_2_with_half_the_weight(beta):
    pair = dpo_pair(-40, -7, -40, -7, beta)
    assert (pair["loss"], pair["weight"]) == pytest.approx((math.log(2), 0.5))


@pytest.mark.parametrize(("policy_w", "policy_l", "beta"), [(-10, -14, 0.1), (-18, -25, 0.3), (-20, -9, 1.0)])
def test_dpo_pulls_as_much_down_as_up_and_sees_only_the_gap(policy_w, policy_l, beta):
    """The slope of ln(1 + e^-x), written with math, by finite differences."""

    def loss(w: float, l: float) -> float:  # noqa: E741
        return math.log1p(math.exp(-beta * ((w + 12) - (l + 13))))

    pair = dpo_pair(policy_w, policy_l, -12, -13, beta)
    assert pair["loss"] == pytest.approx(loss(policy_w, policy_l))
    assert pair["pull"] == pytest.approx(-slope(lambda w: loss(w, policy_l), policy_w), abs=1e-8)
    assert pair["pull"] == pytest.approx(slope(lambda l: loss(policy_w, l), policy_l), abs=1e-8)  # noqa: E741
    shifted = dpo_pair(policy_w - 5, policy_l - 3, -17, -16, beta)
    assert shifted["loss"] == pytest.approx(pair["loss"])


def test_the_curves_of_dpo_are_those_of_the_formula():
    losses, weights = landscape._dpo_curves(0.3)
    wanted = [(math.log1p(math.exp(-0.3 * gap)), logistic(-0.3 * gap)) for gap in landscape.GAPS.tolist()]
    assert np.allclose(np.stack([losses, weights], 1), wanted)


def test_a_pair_of_orpo_by_hand():
    """1/2 against 1/4: odds 1 and 1/3, ratio 3, so the odds term is ln(4/3), and sigmoid(-ln 3) = 1/4.

    Its pull: lam / 4 / (1 - 1/2) on the chosen and lam / 4 / (1 - 1/4) on the rejected mean log-prob.
    """
    pair = orpo_pair(0.5, 0.25, lam=0.1)
    assert pair == pytest.approx(
        {
            "loss": math.log(2) + 0.1 * math.log(4 / 3),
            "NLL": math.log(2),
            "lam x odds term": 0.1 * math.log(4 / 3),
            "NLL on chosen": 1.0,
            "odds term on chosen": 0.05,
            "odds term on rejected": -0.1 / 3,
        }
    )


@pytest.mark.parametrize(("p_w", "p_l"), [(0.05, 0.9), (0.5, 0.5), (0.98, 0.02)])
def test_the_pulls_of_orpo_are_slopes(p_w, p_l):
    def odds_term(w: float, l: float) -> float:  # noqa: E741
        ratio = math.exp(w) / (1 - math.exp(w)) / (math.exp(l) / (1 - math.exp(l)))
        return 2 * math.log(1 + 1 / ratio)

    pair, w, l = orpo_pair(p_w, p_l, lam=2), math.log(p_w), math.log(p_l)  # noqa: E741
    assert pair["odds term on chosen"] == pytest.approx(-slope(lambda x: odds_term(x, l), w), rel=1e-5)
    assert pair["odds term on rejected"] == pytest.approx(-slope(lambda x: odds_term(w, x), l), rel=1e-5)


# --- What is shown ----------------------------------------------------------------------------------------------------


def pixels(explorer) -> np.ndarray:
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', explorer._picture.value)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


@ALL
def test_each_slider_moves_text_and_picture_and_nothing_stays_behind(make):
    made = make()
    at_first = made.text.value, made._picture.value
    for slider in made.sliders.values():
        old = slider.value
        slider.value = slider.options[-1] if hasattr(slider, "options") else slider.value + 2 * slider.step
        assert made.text.value != at_first[0] and made._picture.value != at_first[1], slider.description
        slider.value = old
        assert (made.text.value, made._picture.value) == at_first
    assert plt.get_fignums() == []


@ALL
def test_the_extremes_of_all_sliders_can_be_drawn(make):
    made = make()
    for end in (0, -1):
        for slider in made.sliders.values():
            slider.value = slider.options[end] if hasattr(slider, "options") else (slider.min, slider.max)[end]
        assert "nan" not in made.text.value and "inf" not in made.text.value


@ALL
def test_without_a_kernel_the_text_and_the_picture_are_there(make):
    made = make()
    bundle = made._repr_mimebundle_()
    assert bundle["text/html"] == f"<div>{made.text.value}</div>{made._picture.value}"
    assert f'alt="{html.escape(made.title)}"' in bundle["text/html"] and "<script" not in bundle["text/html"]
    assert made.text.value[:40] not in bundle["text/plain"] and re.match(" Loss ", bundle["text/plain"])
    assert VIEW in bundle


@ALL
def test_a_reader_of_the_screen_and_of_a_dark_page_is_served(make):
    """Every slider has a name, what changes is announced, no text has a colour of its own, the picture its ground."""
    made = make()
    assert all(slider.description for slider in made.sliders.values()) and 'role="status"' in made.text.value
    assert "color" not in made.text.value and pixels(made)[0, 0].tolist() == [255] * 4


def test_the_words_of_the_margin_explorer():
    made = margin_explorer()
    beta, chosen, rejected = made.sliders.values()
    assert "Loss 0.554 nats</b>, below ln 2" in made.text.value and "margin +0.30" in made.text.value
    assert "0.426; pull = beta x weight = 0.0426" in made.text.value and "less likely" not in made.text.value
    chosen.value, rejected.value = -6, -12
    assert "Loss 0.437" in made.text.value and "Both answers have become less likely" in made.text.value
    beta.value = 1.0
    assert "Saturated" in made.text.value and "Loss 0.002" in made.text.value
    chosen.value, rejected.value = -12, -6
    assert "above ln 2" in made.text.value and "Full force" in made.text.value
    assert "less likely" not in made.text.value
    chosen.value = rejected.value
    assert "Loss 0.693 nats</b>, at ln 2" in made.text.value and "sigmoid(+0.00) = 0.500" in made.text.value


def test_the_words_of_the_orpo_landscape():
    made = orpo_landscape()
    assert "Loss 0.722 nats</b> = NLL 0.693 + lambda x odds term 0.029" in made.text.value
    assert "chosen 1.00, rejected 0.33, ratio 3.00" in made.text.value and "+0.050 (5% of both)" in made.text.value
    made.sliders["lam"].value = 0.0
    assert "Loss 0.693 nats" in made.text.value and "+0.000 (0% of both)" in made.text.value


def test_the_point_of_the_margin_explorer_lies_on_its_curve():
    """Loss and weight at -6 + 12 = 6 nats with beta 0.1: ln(1 + e^-0.6) and 1/(1 + e^0.6), where the dots are drawn."""
    made = margin_explorer(chosen=-6, rejected=-12)
    made._draws(beta=0.1, chosen=-6, rejected=-12)
    dots = [line.get_xydata()[0] for ax in made._figure.axes[1:] for line in ax.lines if line.get_marker() == "o"]
    assert np.allclose(dots, [(6, math.log1p(math.exp(-0.6))), (6, logistic(-0.6))])

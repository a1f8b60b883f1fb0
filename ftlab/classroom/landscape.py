"""Sliders on the losses of preference learning: DPO's margin and beta (notebook 04), ORPO's terms (06).

    margin_explorer()     dpo_pair(-10, -14, -12, -13, beta=0.1)      the numbers under the sliders, in one line
    orpo_landscape()      orpo_pair(0.5, 0.25, lam=0.1)

Every number is a loss of ftlab.scratch.losses, or its derivative by autograd. A *pull* is minus the derivative by the
log-prob of an answer: where it is above 0, a step of training makes that answer likelier.
"""

import io
import math
from collections.abc import Callable, Mapping

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from ftlab.classroom import page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.scratch.losses import dpo_loss, implicit_rewards, orpo_loss

INK = "#595959"  # words inside a figure: REFERENCE, but dark enough to be read


def _numbers(*values: float) -> list[Tensor]:
    """Each value as a tensor (1,) in float64 that takes a gradient."""
    return [torch.tensor([float(value)], dtype=torch.float64, requires_grad=True) for value in values]


def _pulls(loss: Tensor, *logps: Tensor) -> list[Tensor]:
    return [-gradient for gradient in torch.autograd.grad(loss.sum(), logps)]


# --- The frame --------------------------------------------------------------------------------------------------------


class Explorer:
    """Sliders, a text and a picture. Move a slider by hand or by `sliders[name].value`; `text` says what is shown.

    says(**values) is the text; draws(**values) plots what moves into the axes of `figure`, whose limits must be set.
    What stands there already is drawn once and kept as pixels: ticks and labels take most of the time of a redraw.
    """

    def __init__(
        self,
        title: str,
        sliders: Mapping[str, ipywidgets.Widget],
        says: Callable[..., str],
        figure: Figure,
        draws: Callable[..., None],
    ) -> None:
        self.title, self.sliders, self.text = title, sliders, ipywidgets.HTML()
        self._says, self._figure, self._draws = says, figure, draws
        self._canvas = FigureCanvasAgg(figure)
        self._canvas.draw()
        self._stands = self._canvas.copy_from_bbox(figure.bbox)
        self._picture = ipywidgets.HTML()
        keys = ipywidgets.Label("With the keyboard: Tab to a slider, arrow keys to move it.")
        self._widget = ipywidgets.VBox([keys, *sliders.values(), self.text, self._picture])
        for slider in sliders.values():
            slider.observe(self._move, "value")
        self._move()

    def _move(self, _=None) -> None:
        values = {name: slider.value for name, slider in self.sliders.items()}
        self.text.value = self._says(**values)
        stands = {ax: set(ax.get_children()) for ax in self._figure.axes}
        self._draws(**values)
        self._canvas.restore_region(self._stands)
        for ax, old in stands.items():
            moved = [artist for artist in ax.get_children() if artist not in old]
            for artist in sorted(moved, key=lambda artist: artist.zorder):
                ax.draw_artist(artist)
                artist.remove()
        png = io.BytesIO()
        imsave(png, np.asarray(self._canvas.buffer_rgba()), format="png", pil_kwargs={"compress_level": 1})
        self._picture.value = page.picture("png", png.getvalue(), self.title)

    def _repr_mimebundle_(self, **_) -> dict:
        """The live widget and, where there is no kernel, its text and its picture as they stand."""
        still = f"<div>{self.text.value}</div>{self._picture.value}"
        return page.view(self._widget, still, page.bundle(self.text.value)["text/plain"])


_WIDE = {"style": {"description_width": "17em"}, "layout": {"width": "42em", "max_width": "98%"}}


def _slider(value: float, low: float, high: float, step: float, name: str) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(value, min=low, max=high, step=step, description=name, **_WIDE)


def _steps(value: float, options: list[float], name: str) -> ipywidgets.SelectionSlider:
    return ipywidgets.SelectionSlider(options=options, value=value, description=name, **_WIDE)


def _figure(panels: int, width: float, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with its axes in a row, at fixed places: a layout engine would move them at each redraw."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="none")
    axes = figure.subplots(1, panels)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.17, top=0.9, wspace=0.3)
    return figure, list(axes)


def _level(ax: Axes, y: float, name: str) -> None:
    """A thin line at a value to expect, with its name at the right end."""
    ax.axhline(y, color=REFERENCE, linewidth=0.8)
    ax.annotate(name, (1, y), xycoords=("axes fraction", "data"), va="bottom", ha="right", fontsize=9, color=INK)


# --- DPO, notebook 04 -------------------------------------------------------------------------------------------------

GAPS = torch.linspace(-30, 30, 121, dtype=torch.float64)  # log-ratio of the chosen answer minus that of the rejected


def dpo_pair(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float, beta: float = 0.1
) -> dict[str, float]:
    """What DPO makes of one pair of summed log-probs: rewards, margin, loss (nats), weight and pull.

    weight = sigmoid(-margin): 1/2 at the start, near 0 for a pair that is learned, near 1 for one that is contradicted.
    pull = beta * weight, upwards on the chosen log-prob and as much downwards on the rejected one.
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7 and its gradient in section 4.
    """
    chosen, rejected, ref_w, ref_l = _numbers(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    reward_w, reward_l = implicit_rewards(chosen, ref_w, beta).item(), implicit_rewards(rejected, ref_l, beta).item()
    loss = dpo_loss(chosen, rejected, ref_w, ref_l, beta)
    (pull,) = _pulls(loss, chosen)
    return {
        "reward of chosen": reward_w,
        "reward of rejected": reward_l,
        "margin": reward_w - reward_l,
        "loss": loss.item(),
        "weight": pull.item() / beta,
        "pull": pull.item(),
    }


def _dpo_curves(beta: float) -> tuple[Tensor, Tensor]:
    """DPO's loss (nats a pair) and the pair's weight in the gradient, each (121,), over GAPS."""
    gaps, zeros = GAPS.clone().requires_grad_(), torch.zeros_like(GAPS)
    losses = dpo_loss(gaps, zeros, zeros, zeros, beta)
    return losses.detach(), _pulls(losses, gaps)[0] / beta


def margin_explorer(
    beta: float = 0.1, chosen: float = 2, rejected: float = -1, ref_chosen: float = -12, ref_rejected: float = -13
) -> Explorer:
    """Sliders over beta and over how far the policy's two log-probs have moved from the reference's: what DPO sees.

    Without sliders: dpo_pair(ref_chosen + chosen, ref_rejected + rejected, ref_chosen, ref_rejected, beta).
    """

    def says(beta: float, chosen: float, rejected: float) -> str:
        pair = dpo_pair(ref_chosen + chosen, ref_rejected + rejected, ref_chosen, ref_rejected, beta)
        margin, weight, remark = pair["margin"], pair["weight"], ""
        side = "at ln 2: the policy prefers neither answer more than the reference does"
        if abs(margin) > 1e-9:
            side, answer = ("below", "chosen") if margin > 0 else ("above", "rejected")
            side += f" ln 2 = 0.693: the policy prefers the {answer} answer more than the reference does"
        if margin > 1e-9 and chosen < 0:
            remark = "<b>Both answers have become less likely</b>, and the loss is below ln 2: the rejected lost more. "
        if weight < 0.05:
            remark += "<b>Saturated:</b> the pair counts as learned and hardly pulls any more."
        if weight > 0.95:
            remark += "<b>Full force:</b> the loss is a straight line here, for a hard pair as for a wrong label."
        return (
            f'<b role="status">Loss {pair["loss"]:.3f} nats</b>, {side}.<br>'
            f"Implicit rewards: chosen {beta:g} x ({chosen:+g}) = {pair['reward of chosen']:+.2f}, rejected {beta:g} x "
            f"({rejected:+g}) = {pair['reward of rejected']:+.2f}, margin {margin:+.2f}.<br>"
            f"Weight sigmoid({0 - margin:+.2f}) = {weight:.3f}; pull = beta x weight = {pair['pull']:.4f}, upwards on "
            f"the chosen log-prob and downwards on the rejected one.<br>{remark or '&nbsp;'}"
        )

    figure, (moves, losses, weights) = _figure(3, 11)
    refs, gap = {"chosen": ref_chosen, "rejected": ref_rejected}, "log-ratio of chosen - of rejected (nats)"
    moves.plot(list(refs.values()), [1, 0], "|", color=REFERENCE, markersize=26, markeredgewidth=2)
    moves.set(xlim=(-35, 0), ylim=(-0.6, 1.6), yticks=[0, 1], xlabel="log-prob of the answer (nats)")
    moves.set_yticklabels(["rejected", "chosen"], rotation=90, va="center")
    moves.set_title("bar: reference; dot: policy", fontsize=9, color=INK)
    moves.grid(False)
    for other, line in ((0.01, ":"), (1.0, "--")):
        losses.plot(GAPS, _dpo_curves(other)[0], line, color=REFERENCE, label=f"beta {other:g}")
    losses.plot([], [], color=POLICY, label="beta of the slider")
    losses.legend(loc="upper right", fontsize=8)
    losses.set(xlim=(-31, 31), ylim=(0, 3.2), xlabel=gap, ylabel="loss (nats a pair)")
    _level(losses, math.log(2), "ln 2")
    weights.set(xlim=(-31, 31), ylim=(0, 1.04), xlabel=gap, ylabel="weight in the gradient")
    _level(weights, 0.5, "1/2")

    def draws(beta: float, chosen: float, rejected: float) -> None:
        for place, colour, name, moved in ((1, CHOSEN, "chosen", chosen), (0, REJECTED, "rejected", rejected)):
            moves.plot([refs[name], refs[name] + moved], [place, place], color=colour, linewidth=3)
            moves.plot(refs[name] + moved, place, "o", color=colour, markersize=9)
        pair = dpo_pair(chosen, rejected, 0, 0, beta)
        for ax, curve, key in zip((losses, weights), _dpo_curves(beta), ("loss", "weight"), strict=True):
            ax.plot(GAPS, curve, color=POLICY)
            ax.plot(chosen - rejected, pair[key], "o", color=POLICY, markersize=9)

    sliders = {
        "beta": _steps(beta, [0.01, 0.03, 0.1, 0.3, 1.0], "beta"),
        "chosen": _slider(chosen, -20, 10, 0.5, "chosen: policy - reference, nats"),
        "rejected": _slider(rejected, -20, 10, 0.5, "rejected: policy - reference, nats"),
    }
    return Explorer("DPO's loss and gradient for one pair", sliders, says, figure, draws)


# --- ORPO, notebook 06 ------------------------------------------------------------------------------------------------

PROBABILITIES = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)  # per token, e to the mean log-prob
LOSSES = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6]


def _orpo(p_chosen: Tensor, p_rejected: Tensor, lam: float) -> tuple[Tensor, ...]:
    """NLL, lam x odds term; their pulls on the chosen mean log-prob; the odds term's pull on the rejected one."""
    chosen, rejected = (p.log().requires_grad_() for p in (p_chosen, p_rejected))
    odds = orpo_loss(torch.zeros_like(chosen), chosen, rejected, lam)
    pull_chosen, pull_rejected = _pulls(odds, chosen, rejected)
    return -chosen.detach(), odds.detach(), torch.ones_like(p_chosen), pull_chosen, pull_rejected


def orpo_pair(p_chosen: float, p_rejected: float, lam: float = 0.1) -> dict[str, float]:
    """ORPO's loss of one pair and its parts, nats, from two probabilities per token; and how its parts pull.

    The pulls are those on the *mean* log-probs. Source: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.
    """
    names = ("NLL", "lam x odds term", "NLL on chosen", "odds term on chosen", "odds term on rejected")
    both = (torch.tensor([p], dtype=torch.float64) for p in (p_chosen, p_rejected))
    found = {name: value.item() for name, value in zip(names, _orpo(*both, lam), strict=True)}
    return {"loss": found["NLL"] + found["lam x odds term"], **found}


def orpo_landscape(p_chosen: float = 0.5, p_rejected: float = 0.25, lam: float = 0.1) -> Explorer:
    """Sliders over lambda and two probabilities per token: ORPO's loss as a map, and how hard each of its terms pulls.

    Without sliders: orpo_pair(p_chosen, p_rejected, lam).
    """

    def says(lam: float, p_chosen: float, p_rejected: float) -> str:
        pair = orpo_pair(p_chosen, p_rejected, lam)
        odds = [p / (1 - p) for p in (p_chosen, p_rejected)]
        share = pair["odds term on chosen"] / (1 + pair["odds term on chosen"])
        return (
            f'<b role="status">Loss {pair["loss"]:.3f} nats</b> = NLL {pair["NLL"]:.3f} + lambda x odds term '
            f"{pair['lam x odds term']:.3f}.<br>Odds: chosen {odds[0]:.2f}, rejected {odds[1]:.2f}, ratio "
            f"{odds[0] / odds[1]:.2f}.<br>Pull on the chosen mean log-prob: NLL +1, odds term "
            f"{pair['odds term on chosen']:+.3f} ({share:.0%} of both). On the rejected one: NLL 0, odds term "
            f"{pair['odds term on rejected']:+.3f}."
        )

    figure, (plane, pulls) = _figure(2, 10, 3.8)
    colours = plane.contourf(PROBABILITIES, PROBABILITIES, torch.zeros(41, 41), LOSSES, cmap="Blues", extend="max")
    figure.colorbar(colours, ax=plane, label="loss (nats a pair)")
    p_chosen_label, p_rejected_label = (f"{name}, probability per token" for name in ("chosen", "rejected"))
    plane.set(xlim=(0, 1), ylim=(0, 1), xlabel=p_chosen_label, ylabel=p_rejected_label)
    plane.grid(False)
    plane.set_title("arrows: the pull on the two mean log-probs", fontsize=9, color=INK)
    pulls.set(xlim=(0, 1), ylim=(-2.6, 2.6), xlabel=p_chosen_label, ylabel="pull on the mean log-prob")
    pulls.set_title("along the dashed line of the map", fontsize=9, color=INK)
    pulls.axhline(0, color="black", linewidth=0.8)
    for colour, line, name in (
        (REFERENCE, "--", "NLL on the chosen"),
        (CHOSEN, "-", "odds term on the chosen"),
        (REJECTED, "-", "odds term on the rejected"),
    ):
        pulls.plot([], [], line, color=colour, label=name)
    pulls.axhline(1, color=REFERENCE, linestyle="--")
    pulls.legend(loc="lower left", fontsize=8)
    p_w, p_l = torch.meshgrid(PROBABILITIES, PROBABILITIES, indexing="xy")
    at = slice(4, None, 8)

    def draws(lam: float, p_chosen: float, p_rejected: float) -> None:
        nll, odds, on_chosen, more_on_chosen, on_rejected = (
            found.view(41, 41) for found in _orpo(p_w.flatten(), p_l.flatten(), lam)
        )
        plane.contourf(p_w, p_l, nll + odds, LOSSES, cmap="Blues", extend="max")
        right, down = (on_chosen + more_on_chosen)[at, at], on_rejected[at, at]
        length = (right**2 + down**2).sqrt()
        short = length.clamp(max=2.5) / length  # those longer than 2.5 would leave the map
        plane.quiver(p_w[at, at], p_l[at, at], right * short, down * short, scale=25, width=0.006, pivot="mid")
        plane.axhline(p_rejected, color=INK, linestyle="--", linewidth=1)
        plane.plot(p_chosen, p_rejected, "o", color=POLICY, markersize=9, markeredgecolor="white")
        _, _, _, chosen, rejected = _orpo(PROBABILITIES, torch.full_like(PROBABILITIES, p_rejected), lam)
        here = orpo_pair(p_chosen, p_rejected, lam)
        for colour, curve, key in ((CHOSEN, chosen, "chosen"), (REJECTED, rejected, "rejected")):
            pulls.plot(PROBABILITIES, curve, color=colour)
            pulls.plot(p_chosen, here[f"odds term on {key}"], "o", color=colour, markersize=9)

    sliders = {
        "lam": _steps(lam, [0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0], "lambda"),
        "p_chosen": _slider(p_chosen, 0.02, 0.98, 0.01, p_chosen_label),
        "p_rejected": _slider(p_rejected, 0.02, 0.98, 0.01, p_rejected_label),
    }
    return Explorer("ORPO's loss over two probabilities per token", sliders, says, figure, draws)

"""Sliders on the losses of preference learning, for DPO (notebook 04) and ORPO (06), and the lowest point of a loss.

Every number is a loss of ftlab.scratch.losses, or its derivative by autograd. A *pull* is minus the derivative by the
log-prob of an answer: where it is above 0, a step of training makes that answer likelier.
"""

import base64
import io
from collections.abc import Callable, Mapping

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ftlab.classroom import page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.scratch.losses import dpo_loss, orpo_loss


def _explorer(numbers: Callable, at: Callable, x: Tensor, xlabel: str, panels: Mapping, sliders: Mapping) -> page.Live:
    """Sliders above the numbers of one pair and their curves over x.

    numbers(x, **values of the sliders) gives the curves by name, at(**values) the x of the pair, where the dots are.
    panels: title -> (lowest y, highest y, {curve: its colour}). sliders: name -> (what to call it, value, options).
    """

    def page_of(**values: float) -> str:
        here = torch.tensor([float(at(**values))])
        curves, pair = numbers(x, **values), numbers(here, **values)
        figure = Figure(figsize=(9.9, 3), facecolor="white", layout="none")
        figure.subplots_adjust(left=0.05, right=0.98, bottom=0.18, top=0.88)
        for ax, (title, (low, high, colours)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for name, colour in colours.items():
                ax.plot(x, curves[name], color=colour, label=name)
                ax.plot(here, pair[name], "o", color=colour)
            ax.set(xlim=(x.min(), x.max()), ylim=(low, high), xlabel=xlabel, title=title)
            ax.legend(fontsize=8, loc="lower left")
        figure.savefig(png := io.BytesIO(), dpi=100)
        text = ", ".join(f"{name} <b>{number.item():.3f}</b>" for name, number in pair.items())
        look = 'alt="Curves, and on them, as dots, the numbers above." style="max-width: 100%"'
        picture = base64.b64encode(png.getvalue()).decode()
        return f'<p role="status">{text}</p><img {look} src="data:image/png;base64,{picture}">'

    wide, controls = {"style": {"description_width": "17em"}, "layout": {"width": "42em", "max_width": "98%"}}, {}
    for name, (called, value, options) in sliders.items():
        controls[name] = ipywidgets.SelectionSlider(description=called, value=value, options=options, **wide)
    return page.panel("Sliders on a loss", page_of, controls)


def dpo_pair(gap: Tensor, beta: float, **_: float) -> dict[str, Tensor]:
    """What DPO makes of pairs, (B,) each, nats; gap: log-ratio of the chosen answer minus that of the rejected one.

    weight = sigmoid(-margin): 1/2 at the start. pull = beta * weight, up on the chosen log-prob and as much down on the
    rejected one. Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7 and its gradient in section 4.
    """
    gap, zeros = gap.clone().requires_grad_(), torch.zeros_like(gap)
    loss = dpo_loss(gap, zeros, zeros, zeros, beta)
    (slope,) = torch.autograd.grad(loss.sum(), gap)
    return {"margin": beta * gap.detach(), "loss": loss.detach(), "weight": -slope / beta, "pull": -slope}


def margin_explorer() -> page.Live:
    """Beta, and how far the policy's two log-probs have moved from the reference's: DPO's loss and a pair's weight."""
    nats = [k / 2 for k in range(-40, 21)]
    panels = {"loss (nats a pair)": (0, 3.2, {"loss": POLICY}), "weight in the gradient": (0, 1, {"weight": POLICY})}
    sliders = {"beta": ("beta", 0.1, [0.01, 0.03, 0.1, 0.3, 1.0])}
    sliders |= {"chosen": ("chosen: policy - reference, nats", 2, nats)}
    sliders |= {"rejected": ("rejected: policy - reference, nats", -1, nats)}
    x, xlabel = torch.linspace(-30, 30, 121), "log-ratio of chosen - of rejected (nats)"
    return _explorer(dpo_pair, lambda chosen, rejected, **_: chosen - rejected, x, xlabel, panels, sliders)


def orpo_pair(rejected: Tensor, p_chosen: float, lam: float, **_: float) -> dict[str, Tensor]:
    """ORPO's loss of pairs, its parts (nats) and their pulls on the *mean* log-probs, from probabilities per token.

    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.
    """
    chosen, rejected = (p.log().requires_grad_() for p in (torch.full_like(rejected, p_chosen), rejected))
    odds = orpo_loss(torch.zeros_like(chosen), chosen, rejected, lam)
    on_chosen, on_rejected = torch.autograd.grad(-odds.sum(), (chosen, rejected))
    nll, odds = -chosen.detach(), odds.detach()
    parts = {"loss": nll + odds, "NLL": nll, "lam x odds term": odds, "NLL on chosen": torch.ones_like(nll)}
    return parts | {"odds term on chosen": on_chosen, "odds term on rejected": on_rejected}


def orpo_landscape(lam: float = 0.1) -> page.Live:
    """Lambda and two probabilities per token: ORPO's loss and how hard its parts pull, over that of the rejected."""
    shares = [k / 100 for k in range(2, 99)]
    pulls = {"NLL on chosen": REFERENCE, "odds term on chosen": CHOSEN, "odds term on rejected": REJECTED}
    panels = {"loss (nats a pair)": (-1, 4, {"NLL": REFERENCE, "lam x odds term": POLICY})}
    panels |= {"minus the gradient, by mean log-prob": (-5, 3, pulls)}
    sliders = {"lam": ("lambda", lam, [0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0])}
    sliders |= {"p_chosen": ("chosen, probability per token", 0.5, shares)}
    x, xlabel = torch.linspace(0.01, 0.99, 99), "rejected, probability per token"
    sliders |= {"p_rejected": (xlabel, 0.25, shares)}
    return _explorer(orpo_pair, lambda p_rejected, **_: p_rejected, x, xlabel, panels, sliders)


def minimised(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """softmax of the logits, (answers,), at which LBFGS finds loss_of smallest; for a loss with a single minimum."""
    logits = logits.detach().clone().requires_grad_()
    settings = {"max_iter": 500, "tolerance_grad": 1e-13, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([logits], **settings, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := loss_of(logits)).backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)

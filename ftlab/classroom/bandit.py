"""The policy at the minimum of a loss, on a bandit: one prompt, few answers, everything enumerable. Notebook 04."""

from collections.abc import Callable

import torch
from torch import Tensor


def minimised(loss_of: Callable[[Tensor], Tensor], logits: Tensor, steps: int = 500) -> Tensor:
    """softmax of the logits (answers,) at which gradient descent (LBFGS with line search) finds loss_of smallest.

    For a loss with one minimum, such as the expected DPO loss over all pairs, or minus (reward - beta KL). Give logits
    in float64: the course compares the result to four digits with the optimum in closed form.
    """
    logits = logits.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)

"""SPIN's game played exactly: one prompt, a handful of answers with known probabilities, no sampling and no network.

With V answers the expected loss of a round is a sum of V x V terms, so that its minimum can be found to many digits and
held against the closed form, pi[t+1] ~ pi[t] * (human / pi[t])^(1 / beta).

Source: Chen et al. 2024, arXiv:2401.01335, section 5. Equal to the closed form: tests/test_selfplay.py.
"""

import torch
from torch import Tensor

from ftlab.scratch.losses import dpo_loss


def expected_loss(policy_logps: Tensor, opponent: Tensor, human: Tensor, beta: float) -> Tensor:
    """The mean of dpo_loss, nats, over chosen answers drawn from `human` and rejected ones drawn from `opponent`.

    policy_logps (V,) are log-probs; opponent and human (V,) probabilities above 0. The opponent is the reference too.
    """
    answers, ref = torch.arange(len(human)), opponent.log()
    w, l = (index.flatten() for index in torch.meshgrid(answers, answers, indexing="ij"))  # noqa: E741
    pairs = dpo_loss(policy_logps[w], policy_logps[l], ref[w], ref[l], beta)  # (V * V,)
    return (human[w] * opponent[l] * pairs).sum()


def play(start: Tensor, human: Tensor, beta: float, rounds: int) -> Tensor:
    """The models after 0, 1, ... rounds, (rounds + 1, V), each round minimised to its end by LBFGS.

    Raises ValueError unless start and human are probabilities above 0 of the same answers.
    """
    if start.shape != human.shape or min(start.min(), human.min()) <= 0 or abs(start.sum() + human.sum() - 2) > 1e-6:
        raise ValueError(f"got {start.tolist()} and {human.tolist()}, wanted two distributions (V,) without zeros")
    models = [start]
    for _ in range(rounds):
        scores = models[-1].log().requires_grad_()
        settings = {"max_iter": 500, "tolerance_grad": 1e-13, "tolerance_change": 1e-16}
        optimizer = torch.optim.LBFGS([scores], **settings, line_search_fn="strong_wolfe")

        def closure(scores=scores, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = expected_loss(scores.log_softmax(-1), models[-1], human, beta)
            loss.backward()
            return loss

        optimizer.step(closure)
        models.append(scores.detach().softmax(-1))
    return torch.stack(models)

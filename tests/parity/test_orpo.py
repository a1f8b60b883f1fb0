"""orpo_loss against trl.experimental.orpo's ORPOTrainer, with TRL's NLL and with the paper's: values and gradients.

Flags that are not at their defaults, besides those of oracles.trainers.quiet, are named in each test's docstring. The
tokenizer has no bos token here, since TRL's ORPOTrainer would put one before every text.
"""

import copy

import pytest
import torch
from oracles.trainers import ask
from test_dpo import PAIRS, agree, llama, tokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from ftlab.scratch.logps import masked_mean, mean_logps, per_token_logps
from ftlab.scratch.losses import orpo_loss


class PaperORPO(ORPOTrainer):
    """As in notebook 06."""

    def concatenated_forward(self, model, batch):
        chosen, *others = super().concatenated_forward(model, batch)
        others[3] = -chosen.mean()
        return chosen, *others


def without_bos():
    reader = copy.deepcopy(tokenizer())
    reader.bos_token = None
    return reader


def side(model, batch: dict, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs of the next tokens, (B, T-1); mask of the text's tokens, (B, T); mean log-prob of the reply, (B,))."""
    ids, mask = batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"]
    each = per_token_logps(model(input_ids=ids, attention_mask=mask).logits, ids)
    return each, mask, mean_logps(each, batch[f"{name}_labels"] != -100)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_trls_loss_is_ours_with_the_nll_of_prompt_and_reply(beta):
    """beta=beta, the paper's lambda. TRL's NLL is one mean over all tokens of the chosen rows, not row by row."""
    ours, theirs = llama(0), llama(0)
    trainer, batch = ask(ORPOTrainer, ORPOConfig, PAIRS, without_bos(), theirs, beta=beta)
    each, mask, chosen = side(ours, batch, "chosen")
    nll = -masked_mean(each, mask[:, 1:]).expand_as(chosen)
    loss = orpo_loss(nll, chosen, side(ours, batch, "rejected")[2], beta).mean()
    agree(ours, loss, theirs, trainer.compute_loss(theirs, batch))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_one_line_makes_trls_loss_the_papers(beta):
    """beta=beta. The NLL is the mean over pairs of each chosen reply's own mean."""
    ours, theirs = llama(0), llama(0)
    trainer, batch = ask(PaperORPO, ORPOConfig, PAIRS, without_bos(), theirs, beta=beta)
    chosen, rejected = (side(ours, batch, name)[2] for name in ("chosen", "rejected"))
    loss = orpo_loss(-chosen, chosen, rejected, beta).mean()
    agree(ours, loss, theirs, trainer.compute_loss(theirs, batch))
    with torch.no_grad():
        trls = ORPOTrainer.concatenated_forward(trainer, theirs, batch)[4]
    assert trls.item() != pytest.approx(-chosen.mean().item(), rel=1e-3)  # the prompt's tokens too

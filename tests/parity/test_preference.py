"""The other losses of ftlab.scratch.losses against TRL: reward model, ORPO, KTO; losses and gradients.

Flags that are not at their defaults, besides those of test_dpo.quiet, are named in each test's docstring.
"""

import copy
import math

import pytest
import torch
from oracles.trainers import ask
from test_dpo import CONFIG, PAIRS, agree, llama, logps_of, tokenizer
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.orpo.orpo_trainer import log1mexp

from ftlab.scratch.logps import masked_mean, mean_logps, per_token_logps
from ftlab.scratch.losses import kto_loss, kto_z0, orpo_loss, reward_loss


def token_logps(model, batch: dict, prefix: str = "") -> torch.Tensor:
    ids, attention_mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    return per_token_logps(model(input_ids=ids, attention_mask=attention_mask).logits, ids)


def build(trainer_class, config_class, *models, rows=PAIRS, **flags):
    return ask(trainer_class, config_class, rows, tokenizer(), *models, **flags)


def test_reward_loss():
    """All defaults: no margin, center_rewards_coefficient=None. The reward is the last token's, before padding."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1)).eval()
    ours = copy.deepcopy(model)
    trainer, batch = build(RewardTrainer, RewardConfig, model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    chosen, rejected = ours(**inputs).logits.squeeze(-1).chunk(2)
    agree(ours, reward_loss(chosen, rejected).mean(), model, trainer.compute_loss(trainer.model, batch))


def pair_means(model, batch: dict) -> list[torch.Tensor]:
    """Mean log-probs of chosen and of rejected answers from the batch of TRL's ORPO trainer."""
    return [
        mean_logps(token_logps(model, batch, prefix), (batch[f"{prefix}labels"] != -100).long())
        for prefix in ("chosen_", "rejected_")
    ]


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_orpo_loss(lam):
    """beta=lam is lambda. TRL's NLL counts the prompt's tokens too, the paper's does not: they are not equal."""
    model = llama(0)
    ours = copy.deepcopy(model)
    trainer, batch = build(ORPOTrainer, ORPOConfig, model, beta=lam)
    attention_mask = batch["chosen_attention_mask"].long()
    nll = -masked_mean(token_logps(ours, batch, "chosen_"), attention_mask[:, 1:])
    chosen, rejected = pair_means(ours, batch)
    their_loss = trainer.compute_loss(trainer.model, batch)
    agree(ours, orpo_loss(nll.expand(len(PAIRS)), chosen, rejected, lam).mean(), model, their_loss)
    assert not torch.isclose(orpo_loss(-chosen, chosen, rejected, lam).mean(), their_loss, rtol=1e-3)


def test_where_trls_orpo_has_no_gradient_ours_has():
    """A completion of probability e^-1e-8, which rounds to 1 in fp32: TRL's value is right, its gradient nan."""
    theirs, ours, zero = (torch.tensor([x], requires_grad=True) for x in (-1e-8, -1e-8, 0.0))
    assert_close(log1mexp(theirs), torch.tensor([math.log(1e-8)]))
    assert torch.autograd.grad(log1mexp(theirs).sum(), theirs)[0].isnan()
    loss = orpo_loss(zero, ours, torch.tensor([-1.0]), lam=1.0)
    odds = math.exp(-1) / (1 - math.exp(-1))  # of the rejected answer; the gradient's limit is minus that
    assert_close(torch.autograd.grad(loss.sum(), ours)[0], torch.tensor([-odds]))


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_kto_loss(seeds):
    """beta=0.3, desirable_weight=1.5, undesirable_weight=0.5. TRL pairs each prompt with its neighbour's answer for z0.

    With policy and reference exchanged the mean log-ratio changes its sign: once z0 is positive, once it is cut off.
    """
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True} for pair in PAIRS]
    rows.append({"prompt": PAIRS[0]["prompt"], "completion": PAIRS[1]["rejected"], "label": False})
    policy, ref_model = (llama(seed) for seed in seeds)
    ours, ref = copy.deepcopy(policy), copy.deepcopy(ref_model)
    flags = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer, batch = build(KTOTrainer, KTOConfig, policy, ref_model, rows=rows, **flags)
    mismatched = {key.removeprefix("KL_"): value for key, value in batch.items() if key.startswith("KL_")}
    their_loss = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        refs, z0 = logps_of(ref, batch), kto_z0(logps_of(ours, mismatched), logps_of(ref, mismatched))
        raw = (logps_of(ours, mismatched) - logps_of(ref, mismatched)).mean()
    assert z0 == max(raw.item(), 0) and trainer._metrics["eval"]["kl"][0] == pytest.approx(z0.item(), rel=1e-4)
    loss = kto_loss(logps_of(ours, batch), refs, batch["label"], z0, 0.3, 1.5, 0.5)
    agree(ours, loss.mean(), policy, their_loss)


def test_z0_of_both_signs_occurs():
    """What test_kto_loss claims: the two orders of the models give log-ratios of opposite sign, and neither is 0."""
    ids = torch.randint(2048, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
    with torch.no_grad():
        a, b = (logps_of(llama(seed), batch) for seed in (0, 1))
    assert (kto_z0(a, b) == 0) != (kto_z0(b, a) == 0)

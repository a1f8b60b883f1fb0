"""ftlab.scratch.rl against TRL: GRPO and RLOO, each on a batch that the trainer itself has sampled and scored.

PPO, which TRL no longer has, is held against a recorded update: tests/parity/test_ppo.py.

Flags that are not at their defaults, besides those of oracles.trainers.quiet, are named in each test's docstring. The
models' end-of-turn token is made likely, so that answers have different lengths.
"""

import copy

import pytest
import torch
from datasets import Dataset
from oracles.trainers import quiet
from test_dpo import agree, llama, tokenizer
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ftlab.scratch.logps import masked_mean, per_token_logps
from ftlab.scratch.rl import group_advantages, grpo_loss, kl_k1, kl_k3, ppo_loss, rloo_advantages

PROMPTS = ["Where is my order?", "The dal was cold, what now?"]
GENERATIONS, LENGTH = 4, 8


def talkative(seed: int) -> LlamaForCausalLM:
    """A random Llama that ends its turn now and then: the output row of <|im_end|> is longer than the others."""
    model = llama(seed)
    model.lm_head.weight.data[2] *= 6
    return model


def move(model, seed: int) -> None:
    """As after some steps, so that ratios leave the clip range and the KL is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def score(completion_ids, **_) -> list[float]:
    """Any function of the answer will do as a reward."""
    return [len(ids) / 4 + ids[0] % 7 for ids in completion_ids]


def sampled(trainer_class, config_class, folder, **flags):
    """The trainer, its own sampled and scored batch, and the policy of that time; the trainer's policy is then moved.

    The model is saved and loaded, because TRL loads the reference from the policy's path. The reference is moved too.
    """
    talkative(0).save_pretrained(folder / "start")
    policy = LlamaForCausalLM.from_pretrained(folder / "start").eval()
    start = copy.deepcopy(policy)
    arguments = config_class(
        **quiet(folder, 2 * GENERATIONS), num_generations=GENERATIONS, max_completion_length=LENGTH, **flags
    )
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    trainer = trainer_class(
        policy, reward_funcs=score, args=arguments, train_dataset=rows, processing_class=tokenizer()
    )
    examples = next(iter(trainer.get_train_dataloader()))  # each prompt GENERATIONS times, one after the other
    trainer.model.eval()
    if trainer.ref_model is not None:
        move(trainer.ref_model, seed=4)
    torch.manual_seed(5)
    batch = trainer._prepare_inputs(examples)
    assert len(batch["completion_mask"].sum(1).unique()) > 1  # different lengths
    move(policy, seed=3)
    return trainer, batch, start


def completion_logps(model, batch: dict) -> torch.Tensor:
    """(B, completion length): prompts are padded on the left, completions on the right."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention_mask).logits
    return per_token_logps(logits, ids)[:, -batch["completion_ids"].shape[1] :]


def rewards_of(batch: dict) -> torch.Tensor:
    pairs = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return torch.tensor(score([ids[mask].tolist() for ids, mask in pairs]))


def clipped(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether there are ratios inside the range and beyond each of its ends."""
    ratio = (logps - old_logps).exp()[mask.bool()]
    return bool((ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio > 0.8) & (ratio < 1.2)).any())


# --- GRPO -------------------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "dapo": lambda loss, mask: masked_mean(loss, mask),
    "grpo": lambda loss, mask: masked_mean(loss, mask, dim=1).mean(),
    "dr_grpo": lambda loss, mask: loss.sum() / (len(loss) * LENGTH),
}


@pytest.mark.parametrize(
    ("loss_type", "scale_rewards", "beta", "weighted_kl"),
    [
        ("dapo", "group", 0.0, True),  # TRL's defaults
        ("grpo", "group", 0.04, False),  # the paper
        ("dr_grpo", "none", 0.0, True),  # the Dr. GRPO paper
        ("dapo", "group", 0.3, True),  # TRL's default way to have a KL
    ],
)
def test_grpo(loss_type, scale_rewards, beta, weighted_kl, tmp_path):
    """num_iterations=2, so that TRL keeps old log-probs; num_generations=4, max_completion_length=8; and those given.

    By default TRL has loss_type="dapo", scale_rewards="group", beta=0.0, use_bias_correction_kl=True.
    """
    flags = {"loss_type": loss_type, "scale_rewards": scale_rewards, "beta": beta}
    trainer, batch, start = sampled(
        GRPOTrainer, GRPOConfig, tmp_path, num_iterations=2, use_bias_correction_kl=weighted_kl, **flags
    )
    mask = batch["completion_mask"]
    advantages = group_advantages(rewards_of(batch), GENERATIONS, scale_rewards=scale_rewards == "group")
    assert_close(advantages, batch["advantages"])
    with torch.no_grad():
        old_logps = completion_logps(start, batch)
        ref_logps = completion_logps(trainer.ref_model, batch) if beta else None
    assert_close(old_logps[mask == 1], batch["old_per_token_logps"][mask == 1])
    ours = copy.deepcopy(trainer.model)
    logps = completion_logps(ours, batch)
    assert clipped(logps, old_logps, mask)
    loss = grpo_loss(logps, old_logps, advantages, mask, 0.2, ref_logps, beta, weighted_kl)
    agree(ours, REDUCTIONS[loss_type](loss, mask), trainer.model, trainer.compute_loss(trainer.model, batch))
    if beta:
        kl = kl_k3(logps, ref_logps) * ((logps - old_logps).exp() if weighted_kl else 1)
        assert trainer._metrics["eval"]["kl"][0] == pytest.approx(masked_mean(kl, mask).item(), rel=1e-4)


# --- RLOO -------------------------------------------------------------------------------------------------------------


def test_rloo(tmp_path):
    """num_generations=4 (default 2), max_completion_length=8; beta=0.05 is TRL's default.

    TRL has the KL in the reward, as k1, and takes the whole answer as one action: one ratio for each answer.
    """
    trainer, batch, start = sampled(RLOOTrainer, RLOOConfig, tmp_path)
    mask = batch["completion_mask"]
    with torch.no_grad():
        old, ref = completion_logps(start, batch), completion_logps(trainer.ref_model, batch)
    old_logps = old.where(mask == 1, 0).sum(1)
    assert_close(old_logps, batch["old_logps"])
    kl = kl_k1(old, ref).where(mask == 1, 0).sum(1)
    assert_close(rloo_advantages(rewards_of(batch) - 0.05 * kl, GENERATIONS), batch["advantages"])
    ours = copy.deepcopy(trainer.model)
    logps = completion_logps(ours, batch).where(mask == 1, 0).sum(1)
    columns = (x[:, None] for x in (logps, old_logps, batch["advantages"]))
    loss = ppo_loss(*columns, torch.ones(len(logps), 1)).mean()
    agree(ours, loss, trainer.model, trainer.compute_loss(trainer.model, batch))

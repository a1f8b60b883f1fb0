"""ftlab.scratch.rl against TRL: GRPO, RLOO, on-policy distillation, each on a batch that the trainer itself sampled.

PPO, which TRL no longer has, is held against a recorded update: tests/parity/test_ppo.py.

Flags that are not at their defaults, besides those of oracles.trainers.quiet, are named in each test's docstring. The
models' end-of-turn token is made likely, so that answers have different lengths. The tolerances are assert_close's for
float32, 1.3e-6 of the value and 1e-5: the two sides sum the same numbers in another order.
"""

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from oracles.trainers import quiet
from test_dpo import agree, llama, tokenizer
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ftlab.scratch.logps import masked_mean, per_token_logps
from ftlab.scratch.rl import (
    cispo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k3,
    ppo_loss,
    reduce_loss,
    reverse_kl,
)

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


def sampled(trainer_class, config_class, folder, reward=score, **flags):
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
        policy, reward_funcs=reward, args=arguments, train_dataset=rows, processing_class=tokenizer()
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


def logits_and_ids(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of prompts, padded on the left, with their completions, padded on the right."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return model(input_ids=ids, attention_mask=attention_mask).logits, ids


def completion_logps(model, batch: dict) -> torch.Tensor:
    """(B, completion length)."""
    return per_token_logps(*logits_and_ids(model, batch))[:, -batch["completion_ids"].shape[1] :]


def rewards_of(batch: dict) -> torch.Tensor:
    """A masked answer was cut off, so all of its ids are tokens."""
    pairs = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return torch.tensor(score([(ids[mask] if mask.any() else ids).tolist() for ids, mask in pairs]))


# --- GRPO -------------------------------------------------------------------------------------------------------------

CASES = {  # flags of GRPOConfig, and ours: logps, old_logps, advantages, mask -> loss per token, before the KL
    "TRL's defaults": ({}, grpo_loss),
    "GRPO": ({"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}, grpo_loss),
    "TRL's KL": ({"beta": 0.3}, grpo_loss),
    "Dr. GRPO": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, grpo_loss),
    "DAPO": ({"loss_type": "dapo", "epsilon_high": 0.28}, partial(grpo_loss, epsilon_high=0.28)),
    "GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.1},
        partial(gspo_loss, epsilon=0.2, epsilon_high=0.1),
    ),
    "CISPO": ({"loss_type": "cispo", "epsilon_high": 1.1}, partial(cispo_loss, epsilon_high=1.1)),
    "batch": ({"scale_rewards": "batch"}, grpo_loss),
}
CUT = ("GRPO", "Dr. GRPO", "DAPO", "GSPO", "CISPO")


@pytest.mark.parametrize(("name", "cut"), [*((name, False) for name in CASES), *((name, True) for name in CUT)])
def test_grpo_and_its_variants(name, cut, tmp_path):
    """num_iterations=2, so that TRL keeps old log-probs; num_generations=4, max_completion_length=8; those in CASES.

    By default TRL has loss_type="dapo", scale_rewards="group", importance_sampling_level="token", epsilon=0.2,
    epsilon_high=None, beta=0.0, use_bias_correction_kl=True. If cut, then also mask_truncated_completions=True: answers
    without an end are empty. The range of GSPO is not the paper's, beyond which all of these eight answers would lie.
    """
    flags, per_token_loss = CASES[name]
    trainer, batch, start = sampled(
        GRPOTrainer, GRPOConfig, tmp_path, num_iterations=2, mask_truncated_completions=cut, **flags
    )
    mask = batch["completion_mask"]
    assert (mask.sum(1) == 0).any() == cut
    advantages = group_advantages(rewards_of(batch), GENERATIONS, flags.get("scale_rewards", "group"))
    assert_close(advantages, batch["advantages"])
    beta = flags.get("beta", 0)
    with torch.no_grad():
        old_logps = completion_logps(start, batch)
        ref_logps = completion_logps(trainer.ref_model, batch) if beta else None
    assert_close(old_logps[mask == 1], batch["old_per_token_logps"][mask == 1])
    ours = copy.deepcopy(trainer.model)
    logps = completion_logps(ours, batch)
    loss = per_token_loss(logps, old_logps, advantages, mask)
    if beta:
        kl = kl_k3(logps, ref_logps) * ((logps - old_logps).exp() if name == "TRL's KL" else 1)
        loss = loss + beta * kl
    reduced = reduce_loss(loss, mask, flags.get("loss_type", "dapo"), LENGTH)
    agree(ours, reduced, trainer.model, trainer.compute_loss(trainer.model, batch))
    metrics = trainer._metrics["eval"]
    if not cut:  # TRL's own word that it clips at both ends, and not everywhere
        ends = ["cispo_clip_ratio"] if name == "CISPO" else ["clip_ratio/low_mean", "clip_ratio/high_mean"]
        assert all(0.1 < metrics[end][0] < 0.4 for end in ends)
    if beta:
        assert metrics["kl"][0] == pytest.approx(masked_mean(kl, mask).item(), rel=1e-4)


def test_a_step_of_two_accumulated_batches(tmp_path):
    """Its own batch in two halves, as with gradient_accumulation_steps=2; num_iterations=2.

    Our reductions are those of the whole step. TRL's "bnpo" is "dapo" of each half, and the mean of the two.
    """
    trainer, batch, start = sampled(GRPOTrainer, GRPOConfig, tmp_path, num_iterations=2)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
    trainer.model.train()  # there is no dropout
    halves = [{key: x.chunk(2)[i] if x.dim() else x for key, x in batch.items()} for i in range(2)]
    mask, ours = batch["completion_mask"], copy.deepcopy(trainer.model)
    with torch.no_grad():
        old_logps = completion_logps(start, batch)
    loss = grpo_loss(completion_logps(ours, batch), old_logps, batch["advantages"], mask)
    parts = [reduce_loss(*half, "dapo") for half in zip(loss.chunk(2), mask.chunk(2), strict=True)]
    assert mask.chunk(2)[0].sum() != mask.chunk(2)[1].sum()
    reduced = {name: reduce_loss(loss, mask, name, LENGTH) for name in ("grpo", "dapo", "dr_grpo")}
    for name, our_loss in {**reduced, "bnpo": sum(parts) / 2}.items():
        trainer.loss_type = name
        agree(ours, our_loss, trainer.model, sum(trainer.compute_loss(trainer.model, half) for half in halves))


def test_equal_rewards_leave_the_kl_alone(tmp_path):
    """beta=0.3, num_iterations=2, and one reward for all answers: no advantage, and the loss is that of the KL."""
    trainer, batch, start = sampled(
        GRPOTrainer, GRPOConfig, tmp_path, lambda completions, **_: [0.7] * len(completions), num_iterations=2, beta=0.3
    )
    mask, ours = batch["completion_mask"], copy.deepcopy(trainer.model)
    advantages = group_advantages(torch.full((2 * GENERATIONS,), 0.7), GENERATIONS)
    assert not advantages.any() and not batch["advantages"].any()
    with torch.no_grad():
        old_logps, ref_logps = completion_logps(start, batch), completion_logps(trainer.ref_model, batch)
    logps = completion_logps(ours, batch)
    kl = masked_mean(kl_k3(logps, ref_logps) * (logps - old_logps).exp(), mask)
    agree(ours, 0.3 * kl, trainer.model, trainer.compute_loss(trainer.model, batch))
    assert not grpo_loss(logps, old_logps, advantages, mask).any()


def test_a_batch_of_empty_answers(tmp_path):
    """Its own batch with the mask that it has if all answers are cut off: the loss is 0 in both, and not nan."""
    trainer, batch, _ = sampled(GRPOTrainer, GRPOConfig, tmp_path)
    batch["completion_mask"] = mask = torch.zeros_like(batch["completion_mask"])
    batch["num_items_in_batch"] = mask.sum()
    for name in ("grpo", "dapo", "cispo", "dr_grpo"):
        trainer.loss_type = name
        ours = reduce_loss(torch.ones(mask.shape), mask, name, LENGTH)
        assert trainer.compute_loss(trainer.model, batch) == 0 == ours


def test_one_answer_is_no_group(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(**quiet(tmp_path, 2), num_generations=1)
    with pytest.raises(ValueError, match="nothing to compare with"):
        group_advantages(torch.ones(2), 1)


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
    centred = group_advantages(rewards_of(batch) - 0.05 * kl, GENERATIONS, "none")
    assert_close(GENERATIONS / (GENERATIONS - 1) * centred, batch["advantages"])
    ours = copy.deepcopy(trainer.model)
    logps = completion_logps(ours, batch).where(mask == 1, 0).sum(1)
    columns = (x[:, None] for x in (logps, old_logps, batch["advantages"]))
    loss = ppo_loss(*columns, torch.ones(len(logps), 1)).mean()
    agree(ours, loss, trainer.model, trainer.compute_loss(trainer.model, batch))


# --- On-policy distillation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_on_policy_distillation(train, tmp_path):
    """beta=1.0 (default 0.0: the forward KL), max_completion_length=8; temperature=1.0 is TRL's default."""
    policy, teacher = talkative(0), talkative(1)
    ours = copy.deepcopy(policy)
    trainer = DistillationTrainer(
        policy,
        teacher_model=teacher,
        args=DistillationConfig(**quiet(tmp_path, 4), max_completion_length=LENGTH, beta=1.0),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 2]),
        processing_class=tokenizer(),
    )
    torch.manual_seed(5)
    trainer.model.train(train)  # there is no dropout
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    mask = batch["completion_mask"]
    assert len(mask.sum(1).unique()) > 1  # different lengths
    kept = slice(-mask.shape[1] - 1, -1)  # the logits before each token of the completion
    student_logits, teacher_logits = (logits_and_ids(model, batch)[0][:, kept] for model in (ours, teacher))
    loss = reduce_loss(reverse_kl(student_logits, teacher_logits, mask), mask, "dapo")
    agree(ours, loss, trainer.model, trainer.compute_loss(trainer.model, batch))
    assert not any(parameter.grad is not None for parameter in teacher.parameters())

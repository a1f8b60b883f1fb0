"""ftlab.scratch.ppo against TRL 1.12's PPOTrainer: one whole update, recorded from its own train().

The record is tests/golden/ppo.safetensors, and make_ppo.py beside it says how it was made: 8 answers of 2 to 8 tokens,
of which 5 end with the end of turn and 3 were cut off, 4 epochs of 2 minibatches, AdamW. TRL's flags that are not at
their defaults are in its SETTINGS. Of ours one is not at its default that says the same: TRL's PPO does not clip the
norm of the gradient, so max_grad_norm=math.inf.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import ROOT
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ftlab.scratch import ppo

GOLDEN = ROOT / "tests" / "golden" / "ppo.safetensors"

# After a few steps the two are a little apart, by the order of sums on another CPU, and AdamW's division makes small
# gradients large: in float64 ours ends 1.5e-5 from TRL's float32, and the weights have moved by up to 0.075.
AFTER_STEPS = {"rtol": 1.3e-6, "atol": 5e-5}


@pytest.fixture
def trl():
    """The recorded tensors by name, `about`, and the four models, at the weights before the update."""
    record = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        about = json.loads(file.metadata()["about"])
    recorded = SimpleNamespace(about=about, **{name: x for name, x in record.items() if "/" not in name})

    def weights(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}/"): x for key, x in record.items() if key.startswith(f"{name}/")}

    for name in ("policy", "ref_model", "reward_model", "value_model"):
        labels = {"num_labels": 1} if name in ("reward_model", "value_model") else {}
        made = LlamaForSequenceClassification if labels else LlamaForCausalLM
        model = made(LlamaConfig(**about["model_config"], **labels)).eval()
        model.load_state_dict(weights(name))
        setattr(recorded, name, model)
    recorded.trained = {name: weights(f"trained_{name}") for name in ("policy", "value_model")}
    return recorded


def rollout(trl) -> ppo.Rollout:
    models = (trl.policy, trl.ref_model, trl.reward_model, trl.value_model)
    text = (trl.input_ids, trl.attention_mask, trl.completion_mask)
    settings = trl.about["settings"]
    return ppo.rollout(
        *models,
        *text,
        eos_token_id=trl.about["model_config"]["eos_token_id"],
        beta=settings["kl_coef"],
        gamma=settings["gamma"],
        lam=settings["lam"],
        temperature=settings["temperature"],
    )


def optimizer(trl) -> torch.optim.Optimizer:
    settings = dict(trl.about["optimizer"])
    assert settings.pop("class") == "AdamW"
    return torch.optim.AdamW([*trl.policy.parameters(), *trl.value_model.parameters()], **settings)


def update(trl, optimizer, batch, epochs: int, minibatches: int) -> dict[str, float]:
    settings = trl.about["settings"]
    return ppo.update(
        trl.policy,
        trl.value_model,
        optimizer,
        batch,
        epochs=epochs,
        minibatches=minibatches,
        clip_eps=settings["cliprange"],
        value_clip=settings["cliprange_value"],
        vf_coef=settings["vf_coef"],
        max_grad_norm=math.inf,
    )


def assert_trained(trl) -> None:
    """The weights are those that TRL's update ended with, and those had moved."""
    for name, wanted in trl.trained.items():
        for key, tensor in getattr(trl, name).state_dict().items():
            assert_close(tensor, wanted[key], **AFTER_STEPS, msg=lambda text, key=key: f"{key}: {text}")


def test_rollout(trl):
    """TRL's tensors begin at the answers, and end one state earlier: none of the answers that fill the width ended."""
    batch, start = rollout(trl), trl.about["context_length"] - 1
    real = batch.mask[:, start:]
    assert len(real.sum(1).unique()) > 3 and not batch.mask[:, :start].any() and not batch.states[:, -1].any()
    assert_close(batch.old_logps[:, start:][real], trl.old_logps[real])  # TRL keeps those of generate
    assert_close(batch.ref_logps[:, start:][real], trl.ref_logps[real])
    assert_close(batch.scores, trl.scores)
    assert_close(batch.values[:, start:-1], trl.values)
    assert_close(batch.rewards[:, start:-1], trl.rewards)
    assert_close(batch.advantages[:, start:], trl.advantages)
    assert_close(batch.returns[:, start:-1], trl.returns)


def test_each_step(trl):
    """On TRL's own minibatches, one after the other: both losses before each step, and the weights after the last."""
    batch, steps = rollout(trl), optimizer(trl)
    every = []
    for rows, policy_loss, value_loss in zip(trl.minibatches, trl.policy_losses, trl.value_losses, strict=True):
        every.append(update(trl, steps, batch.rows(rows), epochs=1, minibatches=1))
        assert_close(every[-1]["policy_loss"], policy_loss.item(), **AFTER_STEPS)
        assert_close(every[-1]["value_loss"], value_loss.item(), **AFTER_STEPS)
    assert len(every) == 8 and every[0]["clip_fraction"] == 0 and all(one["clip_fraction"] > 0 for one in every[1:])
    assert every[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert_trained(trl)


def test_the_whole_update(trl, monkeypatch):
    """In one call that shuffles as TRL's did: the weights after 4 epochs, and what TRL logs."""
    orders = iter(trl.minibatches.view(4, 8))  # TRL shuffles with numpy
    monkeypatch.setattr(torch, "randperm", lambda n: next(orders))
    stats = update(trl, optimizer(trl), rollout(trl), epochs=4, minibatches=2)
    assert next(orders, None) is None
    assert_trained(trl)
    logged = {
        "score": "objective/scores",
        "kl": "objective/kl",
        "clip_fraction": "policy/clipfrac_avg",
        "policy_loss": "loss/policy_avg",
        "value_loss": "loss/value_avg",
    }
    for ours, theirs in logged.items():
        assert stats[ours] == pytest.approx(trl.about["logged"][theirs], abs=5e-5), ours


def test_the_update_moved_what_it_trains(trl):
    """So that equal weights say something."""
    for name, wanted in trl.trained.items():
        before = getattr(trl, name).state_dict()
        assert max((wanted[key] - before[key]).abs().max().item() for key in wanted) > 0.03

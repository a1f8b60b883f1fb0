"""ftlab.classroom.oracle on a tiny random Llama: the batch holds all rows, ln 2 is ln 2, and a wrong loss shows."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from ftlab.classroom import oracle
from ftlab.pipeline.models import load
from ftlab.scratch.logps import per_token_logps, sequence_logps
from ftlab.scratch.losses import dpo_loss

PAIRS = [
    {"prompt": "Where is it?", "chosen": " It left at noon.", "rejected": " No idea."},
    {"prompt": "The dal was cold.", "chosen": " Sorry.", "rejected": " Then eat it faster, please."},
]


@pytest.fixture(scope="module")
def asked():
    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, pad_token_id=0)).eval()
    ours = copy.deepcopy(model)
    trainer, batch = oracle.ask(DPOTrainer, DPOConfig, PAIRS, load("micro")[1], model, copy.deepcopy(model))
    return trainer, batch, ours


def loss_of(model, batch: dict, factor: float) -> torch.Tensor:
    """DPO of the model against itself, so ln 2, with the gradient that DPO starts with."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen, rejected = sequence_logps(per_token_logps(logits, batch["input_ids"]), batch["completion_mask"]).chunk(2)
    return factor * dpo_loss(chosen, rejected, chosen.detach(), rejected.detach()).mean()


def test_the_batch_holds_every_row_and_the_model_is_in_eval_mode(asked):
    trainer, batch, _ = asked
    assert batch["input_ids"].shape[0] == 2 * len(PAIRS) and not trainer.model.training


def test_equal_losses_are_called_equal(asked):
    trainer, batch, ours = asked
    found = oracle.verdict(trainer, batch, ours, loss_of(ours, batch, 1.0))
    assert found["ours"] == pytest.approx(math.log(2), abs=1e-6) and found["TRL"] == pytest.approx(
        math.log(2), abs=1e-6
    )
    assert found["largest gradient"] > 1e-4 and found["gradients differ by"] < 1e-6


def test_a_wrong_factor_shows_in_the_loss_and_in_the_gradients(asked):
    trainer, batch, ours = asked
    found = oracle.verdict(trainer, batch, ours, loss_of(ours, batch, 2.0))
    assert found["difference"] == pytest.approx(math.log(2), rel=1e-4)
    assert found["gradients differ by"] == pytest.approx(found["largest gradient"], rel=1e-3)


def test_another_models_loss_is_refused(asked):
    trainer, batch, _ = asked
    other = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="other parameters"):
        oracle.verdict(trainer, batch, other, other(torch.ones(2)).sum())

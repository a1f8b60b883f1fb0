"""ftlab.scratch.orpo, a compute_loss for DPOTrainer, against trl.experimental.orpo's ORPOTrainer.

With an adapter no second model is loaded; without one DPOTrainer loads a reference, which trainer.ref_model = None lets
go.

Flags that are not at their defaults, besides those of oracles.trainers.quiet, are named in each test's docstring. One
thing about the rows: TRL's ORPOTrainer puts the tokenizer's bos token before every text, DPOTrainer does not. So that
both read the same tokens the tokenizer has none here.
"""

import copy

import pytest
import torch
from datasets import Dataset
from oracles.trainers import ask, own_batch, quiet
from peft import LoraConfig
from test_dpo import PAIRS, agree, llama, tokenizer
from torch.testing import assert_close
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo import ORPOTrainer as TheirORPOTrainer

from ftlab.scratch import orpo
from ftlab.scratch.logps import mean_logps, per_token_logps
from ftlab.scratch.losses import orpo_loss


class ORPOTrainer(DPOTrainer):
    compute_loss = orpo.compute_loss


def without_bos():
    reader = copy.deepcopy(tokenizer())
    reader.bos_token = None
    return reader


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_gradients(beta):
    """beta=beta, the paper's lambda, in both. Three pairs of different lengths, each trainer with its own collator."""
    ours, theirs = llama(0), llama(0)
    trainer, batch = ask(ORPOTrainer, DPOConfig, PAIRS, without_bos(), ours, llama(1), beta=beta)
    their_trainer, their_batch = ask(TheirORPOTrainer, ORPOConfig, PAIRS, without_bos(), theirs, beta=beta)
    for side, rows in zip(("chosen", "rejected"), batch["input_ids"].chunk(2), strict=True):
        real = their_batch[f"{side}_attention_mask"] == 1
        order = [find(rows, ids[mask]) for ids, mask in zip(their_batch[f"{side}_input_ids"], real, strict=True)]
        assert sorted(order) == [0, 1, 2]  # the same tokens, in an order of each trainer's own
    loss, their_loss = trainer.compute_loss(ours, batch), their_trainer.compute_loss(theirs, their_batch)
    agree(ours, loss, theirs, their_loss)


class PaperORPO(TheirORPOTrainer):
    """As in notebook 06."""

    def concatenated_forward(self, model, batch):
        chosen, *others = super().concatenated_forward(model, batch)
        others[3] = -chosen.mean()
        return chosen, *others


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_one_line_makes_trls_loss_the_papers(beta):
    """beta=beta. The NLL is the mean over pairs of each chosen reply's own mean; values and gradients."""
    ours, theirs = llama(0), llama(0)
    trainer, batch = ask(PaperORPO, ORPOConfig, PAIRS, without_bos(), theirs, beta=beta)
    means = {}
    for side in ("chosen", "rejected"):
        ids, mask = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]
        each = per_token_logps(ours(input_ids=ids, attention_mask=mask).logits, ids)
        means[side] = mean_logps(each, batch[f"{side}_labels"] != -100)
    loss = orpo_loss(-means["chosen"], means["chosen"], means["rejected"], beta).mean()
    agree(ours, loss, theirs, trainer.compute_loss(theirs, batch))
    with torch.no_grad():
        trls = TheirORPOTrainer.concatenated_forward(trainer, theirs, batch)[4]
    assert trls.item() != pytest.approx(-means["chosen"].mean().item(), rel=1e-3)  # the prompt's tokens too


def find(rows: torch.Tensor, ids: torch.Tensor) -> int:
    """Which row begins with these ids and has nothing but padding after them."""
    width = rows.shape[1] - len(ids)
    (place,) = [i for i, row in enumerate(rows) if torch.equal(row, torch.nn.functional.pad(ids, (0, width)))]
    return place


def train(trainer_class, config_class, model, folder, **more) -> list[float]:
    """Trains two epochs, in the order of the rows, one step each; the losses that the trainer logged."""
    arguments = config_class(
        **quiet(folder, 1),
        num_train_epochs=2,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    rows = Dataset.from_list(PAIRS)
    trainer = trainer_class(model, args=arguments, train_dataset=rows, processing_class=without_bos(), **more)
    trainer.ref_model = None
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_whole_training(tmp_path):
    """Trained by either trainer the weights end the same, and so do the losses that it logs.

    gradient_accumulation_steps=3, num_train_epochs=2, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
    logging_steps=1, save_strategy="no", train_sampling_strategy="sequential".
    """
    ours, theirs, start = llama(0), llama(0), llama(0)
    our_losses = train(ORPOTrainer, DPOConfig, ours, tmp_path / "ours", ref_model=llama(1))
    their_losses = train(TheirORPOTrainer, ORPOConfig, theirs, tmp_path / "theirs")
    assert len(our_losses) == 2 and our_losses == pytest.approx(their_losses, rel=1e-4)
    for (name, a), b, before in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert not torch.equal(a, before), name
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_with_an_adapter_there_is_no_second_model_and_evaluation_works(tmp_path):
    """peft_config given. The evaluation's loss is that of compute_loss on the same rows."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    rows = Dataset.from_list(PAIRS)
    arguments = DPOConfig(**quiet(tmp_path, 3), per_device_eval_batch_size=3)
    trainer = ORPOTrainer(
        llama(0),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=without_bos(),
        peft_config=lora,
    )
    assert trainer.ref_model is None
    batch = own_batch(trainer)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    chosen, rejected = mean_logps(token_logps(trainer.model, batch), batch["completion_mask"]).chunk(2)
    assert orpo_loss(-chosen, chosen, rejected, 0.1).mean().item() != pytest.approx(loss, rel=1e-3)  # the paper's


def token_logps(model, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return per_token_logps(logits, batch["input_ids"])

"""TRL's SFTTrainer as the course uses it, against a naive loop: which tokens count, their mean, one step by hand.

Flags that are not at TRL's defaults: bf16=False, gradient_checkpointing=False, use_cpu=True, and those in each test.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

TEXTS = [
    {"prompt": f"Order {i}" + " please" * (7 * i % 20), "completion": f" Answer {i}" + " ok" * (3 * i % 8 + 1)}
    for i in range(24)
]
CHATS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in TEXTS
]
pytestmark = pytest.mark.usefixtures("one_thread")


def load(model) -> tuple:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)


def trained(model, rows: list[dict], folder, lora: LoraConfig | None = None, **settings) -> SFTTrainer:
    """The trainer after its run, with plain SGD at a constant rate of 0.5."""
    torch.manual_seed(0)
    loaded, tokenizer = load(model)
    how = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1, **settings}
    off = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    trainer = SFTTrainer(
        loaded,
        args=SFTConfig(str(folder), **how, **off),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    return trainer


def losses(trainer: SFTTrainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def naive_loss(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """Mean of -log p over completion tokens only, row by row and token by token: no batch, no padding, no mask."""
    terms = []
    for row in rows:
        if isinstance(row["prompt"], str):
            prompt, text = row["prompt"], row["prompt"] + row["completion"] + "<|im_end|>"
        else:
            prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["prompt"])
            prompt += "<|im_start|>assistant\n"
            text = prompt + row["completion"][0]["content"] + "<|im_end|>\n"
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(text)["input_ids"]
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
        terms += [-logps[t - 1, ids[t]] for t in range(start, len(ids))]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("rows", [TEXTS[:8], CHATS[:8]], ids=["text", "chat"])
@pytest.mark.parametrize("batch", [(8, 1), (2, 4)], ids=["8x1", "2x4"])
def test_the_first_loss_is_the_mean_over_completion_tokens(rows, batch, tiny, tmp_path):
    """lora_B is 0 at the start, so the first loss is the base model's."""
    sizes = {"per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1], "max_steps": 1}
    trainer = trained(tiny, rows, tmp_path, LoraConfig(r=4, target_modules="all-linear"), **sizes)
    with torch.no_grad():
        assert losses(trainer) == [pytest.approx(naive_loss(*load(tiny), rows).item(), abs=1e-5)]


def test_one_step_of_full_fine_tuning_is_gradient_descent_by_hand(tiny, tmp_path):
    """No clipping: every parameter is w - 0.5 dL/dw, with L from the naive loop."""
    sizes = {"per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 1e9}
    after = dict(trained(tiny, CHATS[:8], tmp_path, **sizes).model.named_parameters())
    model, tokenizer = load(tiny)
    naive_loss(model, tokenizer, CHATS[:8]).backward()
    assert after.keys() == dict(model.named_parameters()).keys()
    for name, before in model.named_parameters():
        torch.testing.assert_close(after[name].detach(), before.detach() - 0.5 * before.grad, atol=1e-6, rtol=1e-5)
        assert not torch.equal(after[name], before), f"{name} was not trained"


def test_accumulating_four_batches_of_2_equals_one_of_8(tiny, tmp_path):
    """After 9 steps, to 1e-5: the sums run in another order. (AdamW makes full steps of such differences.)"""
    lora, ends = LoraConfig(r=4, target_modules="all-linear"), []
    for size, many in ((2, 4), (8, 1)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": many, "num_train_epochs": 3}
        ends.append(trained(tiny, CHATS, tmp_path / str(size), lora, **sizes))
    accumulated, at_once = map(losses, ends)
    assert len(at_once) == 9 and accumulated == pytest.approx(at_once, abs=1e-5)
    assert at_once[-1] < at_once[0] - 0.5  # and it did move
    for name, value in ends[1].model.state_dict().items():
        torch.testing.assert_close(ends[0].model.state_dict()[name], value, atol=1e-5, rtol=0)

"""ftlab.cpu.speed_up against TRL's own GRPOTrainer: same loss, gradients, logs and adapter, on the same answers.

TRL's non-default flags: gradient_checkpointing=False, use_cpu=True, bf16=False, learning_rate=1e-3, num_generations=4,
max_completion_length=12; those of the cases. TRL and ftlab draw answers by other random numbers, so `Fixed` gives both
the same ones; that ftlab's are drawn from the model's distribution is tested in test_cpu.py.
"""

import pytest
import torch
from datasets import Dataset
from test_cpu import (
    EVERYTHING,
    LORAS,
    MICRO,
    ROWS,
    assert_resumes_to_the_same_bytes,
    assert_same_run,
    assert_stays_plain,
)
from test_cpu_dpo import LOGPS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ftlab import cpu

GENERATIONS, LENGTH = 4, 12
pytestmark = pytest.mark.usefixtures("one_thread")


def score(completion_ids, **_) -> list[float]:
    """Any function of the answer will do as a reward."""
    return [len(ids) / 4 + ids[0] % 7 for ids in completion_ids]


class Fixed(GRPOTrainer):
    """Its answers depend on their number and the step alone; lengths go from one token to LENGTH, which is cut off."""

    def _generate_single_turn(self, prompt_ids, *_):
        generator, (end,) = torch.Generator().manual_seed(self.state.global_step), self.eos_token_ids
        lengths = [1 + (5 * i) % LENGTH for i in range(len(prompt_ids))]
        drawn = [torch.randint(20, 300, (n,), generator=generator).tolist() for n in lengths]
        return [[*ids[:-1], end] if len(ids) < LENGTH else ids for ids in drawn], None


class OtherLoss(GRPOTrainer):
    def _compute_loss(self, *arguments, **named):
        return super()._compute_loss(*arguments, **named)


def grpo_trainer(model, folder, lora=EVERYTHING, trainer=Fixed, eval_rows=None, **changes):
    """TRL's, built as a learner builds it; model: a folder."""
    asked = {"max_steps": 4, "per_device_train_batch_size": 8, "bf16": False, "learning_rate": 1e-3, "logging_steps": 1}
    asked |= {"gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    asked |= {"save_strategy": "no", "num_generations": GENERATIONS, "max_completion_length": LENGTH}
    rows = [Dataset.from_list(part).select_columns(["prompt"]) if part else None for part in (ROWS * 2, eval_rows)]
    torch.manual_seed(0)  # lora_A is drawn in GRPOTrainer's __init__
    return trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=score,
        args=GRPOConfig(str(folder), **asked | changes),
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=AutoTokenizer.from_pretrained(MICRO),
        peft_config=lora,
    )


def both(*arguments, **named) -> list[GRPOTrainer]:
    trainers = [grpo_trainer(*arguments, **named) for _ in range(2)]
    cpu.speed_up(trainers[1])
    assert LOGPS in vars(trainers[1])
    return trainers


def loss_and_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the first batch that it draws and scores, with lora_B moved away from 0 (at 0, lora_A has no gradient)."""
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # train() sets it
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        *({"lora": lora} for lora in LORAS.values()),
        {"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "grpo"}, {"num_iterations": 2},
        {"importance_sampling_level": "sequence"}, {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "dr_grpo", "scale_rewards": "none"}, {"top_entropy_quantile": 0.5},
        {"mask_truncated_completions": True}, {"per_device_train_batch_size": 4}, {"pad_to_multiple_of": 16},
    ],
    ids=lambda changes: "lora" if "lora" in changes else str(changes),
)  # fmt: skip
def test_loss_gradients_and_metrics_are_trls(small, tmp_path, changes):
    plain, quick = both(small, tmp_path, **changes)
    (loss, gradients), (quick_loss, quick_gradients) = (loss_and_gradients(t) for t in (plain, quick))
    assert quick_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert quick_gradients.keys() == gradients.keys() and gradients
    atol = 1e-6 * torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert atol > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=atol, msg=name)
    metrics = plain._metrics["train"]
    assert quick._metrics["train"].keys() == metrics.keys() and "entropy" in metrics
    for name in metrics.keys() - {"step_time"}:
        assert quick._metrics["train"][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5), name


def test_a_whole_run_logs_the_same_and_ends_in_the_same_adapter(small, tmp_path, capsys):
    plain, quick = both(small, tmp_path, beta=0.1, eval_rows=ROWS[1:3], eval_strategy="steps", eval_steps=2)
    seen = assert_same_run(plain, quick)
    assert seen >= {"loss", "grad_norm", "kl", "reward", "entropy", "completions/mean_length", "eval_reward"}
    assert "speed_up" not in capsys.readouterr().out


def test_its_own_answers_end_as_trls_do(tmp_path):
    """Each is the decoder's, with the end of turn behind it unless it was cut off."""
    _, quick = both(MICRO, tmp_path, trainer=GRPOTrainer, max_completion_length=12)
    prompts = [
        quick.processing_class.apply_chat_template(row["prompt"], return_dict=False) for row in ROWS for _ in "ab"
    ]
    torch.manual_seed(3)
    drawn, logprobs = quick._generate_single_turn(prompts, None, {}, 2)
    torch.manual_seed(3)
    ends = quick.eos_token_ids
    bare = cpu.Decoder(quick.model).answer(prompts, 12, ends, 1.0)
    assert logprobs is None and [ids + ends[:1] if len(ids) < 12 else ids for ids in bare] == drawn
    assert {len(ids) < 12 for ids in bare} == {True, False}
    quick.train()
    assert quick.state.global_step == 4


def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(small, tmp_path):
    changes = {"trainer": GRPOTrainer, "save_strategy": "steps", "save_steps": 2}
    assert_resumes_to_the_same_bytes(lambda: grpo_trainer(small, tmp_path, **changes), tmp_path)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("GRPOConfig says temperature=0.7", {"temperature": 0.7}),
        ("GRPOConfig says top_k=20", {"top_k": 20}),
        ("GRPOConfig says gradient_checkpointing=True", {"gradient_checkpointing": True}),
        ("a loss of its own", {"trainer": OtherLoss}),
        ("LoRA adapters", {"lora": None}),
    ],
)
def test_what_it_is_not_for_stays_plain_trl_and_one_line_says_why(small, tmp_path, capsys, reason, changes):
    assert_stays_plain(grpo_trainer(small, tmp_path, max_steps=1, **changes), reason, capsys)

"""ftlab.cpu.speed_up against TRL's own DPOTrainer: same losses, same gradients, same logs, same adapter.

TRL's non-default flags: gradient_checkpointing=False, use_cpu=True, bf16=False, beta=0.3, learning_rate=1e-3.
"""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_cpu import (
    EVERYTHING,
    LORAS,
    MICRO,
    ROWS,
    assert_resumes_to_the_same_bytes,
    assert_same_run,
    assert_same_step,
    assert_stays_plain,
    loss_and_gradients,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ftlab import cpu

LOGPS = "_get_per_token_logps_and_entropies"
ANSWERS = [
    ("yes, gladly", "no"),
    ("sorry, it is on its way", "sorry, it is lost"),
    ("4", "4 or 5"),
    ("wet", "dry " * 9),
]
PAIRS = [
    {
        "prompt": row["prompt"],
        **{
            side: [{"role": "assistant", "content": text}]
            for side, text in zip(("chosen", "rejected"), two, strict=True)
        },
    }
    for row, two in zip(ROWS, ANSWERS, strict=True)
]
STRINGS = [  # an empty answer is the end token alone; without a system message prompts begin differently
    {"prompt": "2 + 2?", "chosen": "", "rejected": " 5"},
    {"prompt": "Where is my order?", "chosen": " On its way.", "rejected": ""},
    {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 4"},
]
EVERY_LOSS = [
    *({"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
    *({"loss_type": [name]} for name in ("apo_down", "aot", "aot_unpaired", "discopop", "sft", "sigmoid_norm")),
    *({"loss_type": [name], "label_smoothing": 0.1} for name in ("robust", "exo_pair")),
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    {"ld_alpha": 0.5},
    {"f_divergence_type": "js_divergence"},
]
pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = {
    "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-3, "logging_steps": 1,
    "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "beta": 0.3,
    "save_strategy": "no",
}  # fmt: skip


def dpo_trainer(
    model, folder, pairs=PAIRS, eval_pairs=None, lora=EVERYTHING, ref_model=None, trainer=DPOTrainer, **changes
):
    """TRL's, built as a learner builds it; model: a folder, or a model."""
    data = [Dataset.from_list(part) if part else None for part in (pairs, eval_pairs)]
    torch.manual_seed(0)  # lora_A is drawn in DPOTrainer's __init__
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return trainer(
        model,
        ref_model,
        DPOConfig(str(folder), **ASKED | changes),
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=AutoTokenizer.from_pretrained(MICRO),
        peft_config=lora,
    )


def both(*arguments, make=dpo_trainer, **named) -> list:
    """TRL's trainer as make(...) builds it, plain and sped up."""
    trainers = [make(*arguments, **named) for _ in range(2)]
    cpu.speed_up(trainers[1])
    assert LOGPS in vars(trainers[1]) and not trainers[1].args.use_liger_kernel
    return trainers


@pytest.mark.parametrize(("lora", "rows"), [*((lora, 4) for lora in LORAS.values()), (EVERYTHING, 1), (EVERYTHING, 2)])
def test_loss_gradients_and_metrics_are_trls(small, tmp_path, rows, lora):
    plain, quick = both(small, tmp_path, lora=lora)
    assert_same_step(plain, quick, rows)
    seen = quick._metrics["train"]
    assert len(seen) == 11 and seen["logits/chosen"] != seen["logits/rejected"] and seen["rewards/margins"] != [0.0]


@pytest.mark.parametrize(
    "changes",
    [{"pairs": STRINGS}, {"max_length": 20}, {"pad_to_multiple_of": 32}, {"precompute_ref_log_probs": True}],
    ids=["strings", "cut off", "padded", "reference ahead"],
)
def test_whatever_the_rows_are(tmp_path, changes):
    """One-token answers, equal answers and prompts; answers cut off; the reference computed ahead."""
    plain, quick = both(MICRO, tmp_path, **changes)
    assert_same_step(plain, quick, len(plain.train_dataset))
    batch = plain.data_collator(list(plain.train_dataset))
    if "pairs" in changes:
        assert batch["completion_mask"].sum(1).min() == 1
    elif "max_length" in changes:
        lengths = [len(row["prompt_ids"] + row["rejected_ids"]) for row in plain.train_dataset]
        assert batch["input_ids"].shape[1] == 20 < max(lengths)
    else:
        assert 0 < quick._metrics["train"]["mean_token_accuracy"][0] < 1


def test_what_rows_begin_with_is_read_once_and_last_tokens_never(small, tmp_path, monkeypatch):
    """Expected: the beginnings of rows, each counted once a pair, and once if all rows begin so."""
    quick, read, call = dpo_trainer(small, tmp_path), [], cpu.FusedLlama.__call__
    cpu.speed_up(quick)
    monkeypatch.setattr(
        cpu.FusedLlama, "__call__", lambda *a, **b: read.append(b["input_ids"].numel()) or call(*a, **b)
    )
    pairs = list(quick.train_dataset)
    quick.compute_loss(quick.model, quick.data_collator(pairs))
    rows = [(i, p["prompt_ids"] + p[side]) for i, p in enumerate(pairs) for side in ("chosen_ids", "rejected_ids")]
    shared = cpu.common_prefix([ids for _, ids in rows])
    once = {(i if n > shared else None, tuple(ids[:n])) for i, ids in rows for n in range(1, len(ids))}
    wanted = math.ceil(len(once) / cpu.ROUND_TO) * cpu.ROUND_TO
    assert read == [wanted, wanted] and shared > 10 and wanted < 0.6 * sum(len(ids) for _, ids in rows)


def test_every_loss_of_trls(small, tmp_path):
    """Set where DPOTrainer's __init__ puts them."""
    configs = [DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **changes) for changes in EVERY_LOSS]
    plain, quick = both(small, tmp_path)
    for config in configs:
        for trainer in (plain, quick):
            trainer.loss_types, trainer.loss_weights = config.loss_type, config.loss_weights or [1.0]
            for name in ("label_smoothing", "ld_alpha", "f_divergence_type"):
                setattr(trainer, name, getattr(config, name))
            trainer.model.zero_grad()
        assert_same_step(plain, quick, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_at_ln_2(tmp_path, monkeypatch, dtype):
    """The reference is computed as the policy is, so that what bf16 rounds away cancels to the last bit."""
    monkeypatch.setattr(cpu, "product_dtype", lambda bf16: dtype)
    quick = dpo_trainer(MICRO, tmp_path)
    cpu.speed_up(quick)
    batch = quick.data_collator(list(quick.train_dataset))
    assert quick.compute_loss(quick.model.train(), batch).item() == pytest.approx(math.log(2), abs=1e-7)
    assert quick._metrics["train"]["rewards/margins"] == [0.0] == quick._metrics["train"]["rewards/accuracies"]


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_whole_run_logs_the_same_and_ends_in_the_same_adapter(small, tmp_path, capsys, precomputed):
    """Four optimizer steps of two accumulated batches; evaluation in uneven batches, and on other rows."""
    plain, quick = both(
        small, tmp_path, pairs=PAIRS[:3], eval_pairs=PAIRS[1:], per_device_train_batch_size=2,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=2,
        precompute_ref_log_probs=precomputed,
    )  # fmt: skip
    seen = assert_same_run(plain, quick)
    assert seen >= {"loss", "grad_norm", "rewards/margins", "logits/chosen", "mean_token_accuracy", "num_tokens"}
    assert seen >= {"eval_loss", "eval_rewards/margins", "eval_logits/rejected", "eval_entropy", "eval_logps/chosen"}
    theirs, ours = (trainer.evaluate(Dataset.from_list(PAIRS[:2])) for trainer in (plain, quick))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert "runtime" in name or "per_second" in name or ours[name] == pytest.approx(theirs[name], 1e-3, 1e-5), name
    assert "speed_up" not in capsys.readouterr().out


def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(small, tmp_path):
    changes = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    assert_resumes_to_the_same_bytes(lambda: dpo_trainer(small, tmp_path, **changes), tmp_path)


def test_afterwards_the_model_is_an_ordinary_peft_model(tmp_path):
    """Its logits, its files under PEFT's keys and what it is when merged are the plain run's."""
    ends = []
    for trainer in both(MICRO, tmp_path, max_steps=3):
        trainer.train()
        model, prompt = trainer.model.eval(), trainer.processing_class("Where is my order?", return_tensors="pt")
        model.save_pretrained(tmp_path / "adapter")
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(saved[n.replace(".default", "")], w) for n, w in model.named_parameters() if "lora" in n)
        with torch.no_grad():
            adapted = model(**prompt).logits
            with model.disable_adapter():
                assert not torch.allclose(model(**prompt).logits, adapted, atol=0.1)
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(**prompt).logits, adapted, rtol=1e-4, atol=1e-4)
        ends.append(adapted)
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-3)


def test_twice_is_once_and_predict_says_what_it_needs(small, tmp_path, capsys):
    quick = dpo_trainer(small, tmp_path)
    cpu.speed_up(quick)
    once = vars(quick)[LOGPS]
    cpu.speed_up(quick)
    assert vars(quick)[LOGPS] is once and "speed_up" not in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="does not materialize logits"):
        quick.predict(quick.train_dataset)


# --- What it is not for -----------------------------------------------------------------------------------------------


class OtherLoss(DPOTrainer):
    def _compute_loss(self, *arguments, **named):
        return super()._compute_loss(*arguments, **named)


REFUSED = {
    "DPOConfig says gradient_checkpointing=True": {"gradient_checkpointing": True},
    "padding_free=True": {"padding_free": True},
    "use_weighting=True": {"use_weighting": True},
    "neftune_noise_alpha=5.0": {"neftune_noise_alpha": 5.0},
    "lora_dropout=0.1": {"lora": LoraConfig(r=2, lora_dropout=0.1), "disable_dropout": False},
    "a variant (DoRA": {"lora": LoraConfig(r=2, use_dora=True)},
    "it has a ref_model": {"lora": None},
    "a loss of its own": {"trainer": OtherLoss},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_is_not_for_stays_plain_trl_and_one_line_says_why(small, tmp_path, capsys, reason):
    trainer = dpo_trainer(small, tmp_path, max_steps=1, **REFUSED[reason])
    assert_stays_plain(trainer, reason, capsys)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_second_adapter_as_the_reference(small, tmp_path, capsys):
    """DPOTrainer adds it to a PEFT model that it is given."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), EVERYTHING)
    assert_stays_plain(dpo_trainer(model, tmp_path, lora=None), "the model has 2 LoRA adapters", capsys)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("data_collator", list, "its data collator is type"),
        ("compute_metrics", len, "compute_metrics needs all logits"),
        ("ref_model", torch.nn.Linear(1, 1), "it has a ref_model"),
    ],
)
def test_other_plug_ins(small, tmp_path, capsys, name, value, reason):
    trainer = dpo_trainer(small, tmp_path)
    setattr(trainer, name, value)
    assert_stays_plain(trainer, reason, capsys)


def test_a_trl_before_1_14(small, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(DPOTrainer, LOGPS)
    trainer = dpo_trainer(small, tmp_path, max_steps=1)
    assert_stays_plain(trainer, "speed_up is for DPOTrainer as it has been since TRL 1.14", capsys)
    assert math.isfinite(loss_and_gradients(trainer, 4)[0])

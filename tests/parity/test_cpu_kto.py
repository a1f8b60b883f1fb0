"""ftlab.cpu.speed_up against TRL's own KTOTrainer: same losses, same gradients, same logs but two, same adapter.

TRL's non-default flags: gradient_checkpointing=False, use_cpu=True, bf16=False, beta=0.3, learning_rate=1e-3. The means
of logits are left out, as TRL leaves them out under Liger.
"""

from functools import partial

import pytest
import test_cpu_dpo
import torch
from datasets import Dataset
from test_cpu import (
    EVERYTHING,
    LORAS,
    MICRO,
    assert_resumes_to_the_same_bytes,
    assert_same_run,
    assert_same_step,
    assert_stays_plain,
)
from test_cpu_dpo import ASKED, PAIRS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

LOGITS = frozenset({"logits/chosen", "logits/rejected", "eval_logits/chosen", "eval_logits/rejected"})
THUMBS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for sides in (("chosen", "rejected"), ("rejected", "chosen"))
    for pair, side in zip(PAIRS, sides * 2, strict=True)
]
pytestmark = pytest.mark.usefixtures("one_thread")


def kto_trainer(model, folder, thumbs=THUMBS, eval_thumbs=None, lora=EVERYTHING, trainer=KTOTrainer, **changes):
    """TRL's, built as a learner builds it; model: a folder."""
    data = [Dataset.from_list(part) if part else None for part in (thumbs, eval_thumbs)]
    torch.manual_seed(0)  # lora_A is drawn in KTOTrainer's __init__
    return trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=KTOConfig(str(folder), **ASKED | changes),
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=AutoTokenizer.from_pretrained(MICRO),
        peft_config=lora,
    )


both = partial(test_cpu_dpo.both, make=kto_trainer)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_loss_gradients_and_metrics_are_trls(small, tmp_path, lora):
    plain, quick = both(small, tmp_path, lora=lora)
    assert_same_step(plain, quick, 4, LOGITS)
    assert quick._metrics["train"]["rewards/margins"] != [0.0] and "kl" in quick._metrics["train"]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 20}, {"pad_to_multiple_of": 32}, {"precompute_ref_log_probs": True},
        {"loss_type": "apo_zero_unpaired"}, {"desirable_weight": 3.0},
        {"thumbs": [row for row in THUMBS if row["label"]]},
    ],
    ids=["cut off", "padded", "reference ahead", "without a KL", "weighted", "ups alone"],
)  # fmt: skip
def test_whatever_the_rows_and_the_settings_are(tmp_path, changes):
    plain, quick = both(MICRO, tmp_path, **changes)  # TRL drops a row that cutting leaves without an answer
    assert_same_step(plain, quick, min(4, len(plain.train_dataset)), LOGITS)


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_whole_run_logs_the_same_and_ends_in_the_same_adapter(small, tmp_path, capsys, precomputed):
    plain, quick = both(
        small, tmp_path, eval_thumbs=THUMBS[1:7], per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=2, precompute_ref_log_probs=precomputed,
    )  # fmt: skip
    seen = assert_same_run(plain, quick, LOGITS)
    assert seen >= {"loss", "grad_norm", "kl", "rewards/chosen", "entropy", "num_tokens", "eval_loss"}
    assert "speed_up" not in capsys.readouterr().out


def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(small, tmp_path):
    changes = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    assert_resumes_to_the_same_bytes(lambda: kto_trainer(small, tmp_path, **changes), tmp_path)


class OtherLoss(KTOTrainer):
    def _compute_loss(self, *arguments, **named):
        return super()._compute_loss(*arguments, **named)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("KTOConfig says gradient_checkpointing=True", {"gradient_checkpointing": True}),
        ("a loss of its own", {"trainer": OtherLoss}),
        ("it has a ref_model", {"lora": None}),
    ],
)
def test_what_it_is_not_for_stays_plain_trl_and_one_line_says_why(small, tmp_path, capsys, reason, changes):
    assert_stays_plain(kto_trainer(small, tmp_path, max_steps=1, **changes), reason, capsys)

"""What `speed_up(trainer)` saves: a LoRA step of TRL's DPOTrainer, with and without it. About 6 minutes.

    python bench/dpo.py          five rounds
    python bench/dpo.py 1        one

For SmolLM2 and for micro three trainers in one process, in turns, on the same batches: pairs of data/replies, 4 a step,
beta 0.1, LoRA r = 16 on all linear layers, AdamW, two threads; the reference, adapters off, is computed in each step.
DPOConfig differs, and nothing else:

    defaults          gradient_checkpointing=True, as in DPOConfig
    no checkpointing  gradient_checkpointing=False
    speed_up          gradient_checkpointing=False, then speed_up(trainer)

bf16 is what DPOConfig says, True, where the CPU multiplies bf16, and False elsewhere, where it is emulated. What is
timed, and how, is written in bench/speed_up.py. steps_per_second: one over the median step. ratio: over steps, another
trainer's seconds over speed_up's on the same pairs. loss and margin: of every step, so that a reader sees that all of
them do the same work.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise

import harness
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from speed_up import CONFIGS, Clock
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from ftlab.cpu import product_dtype, speed_up
from ftlab.models import model_path
from ftlab.paths import DATA

STEPS, BATCH, THREADS, MOST_SECONDS = 3, 4, 2, 300  # MOST_SECONDS: of a model; on a busy machine there are fewer rounds
KINDS = ("clock", "cpu")


def pairs(n: int) -> Dataset:
    """The first n pairs of data/replies: the ticket, a good and a worse reply."""
    with open(DATA / "replies" / "train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(n), strict=False)]
    roles = {"ticket": ("prompt", "user"), "chosen": ("chosen", "assistant"), "rejected": ("rejected", "assistant")}
    return Dataset.from_list(
        [{to: [{"role": role, "content": row[key]}] for key, (to, role) in roles.items()} for row in rows]
    )


def dpo_trainer(model: str, name: str, folder: str, clock: Clock) -> DPOTrainer:
    path = model_path(model)
    torch.manual_seed(0)  # lora_A is drawn in DPOTrainer's __init__
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(
            folder, beta=0.1, learning_rate=2e-4, per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1,
            use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            bf16=product_dtype(bf16=True) == torch.bfloat16, **CONFIGS[name],
        ),
        train_dataset=pairs(400),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    )  # fmt: skip
    if name == "speed_up":
        speed_up(trainer)
        if not trainer.use_liger_kernel:
            raise SystemExit("speed_up left the trainer as it is (see above): there is nothing to measure")
    return trainer


def took(before: tuple[float, float], after: tuple[float, float]) -> dict[str, float]:
    return {kind: b - a for kind, a, b in zip(KINDS, before, after, strict=True)}


def measure(model: str, rounds: int) -> dict:
    start, clocks = time.perf_counter(), {name: Clock() for name in CONFIGS}
    runs = {name: [] for name in CONFIGS}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: dpo_trainer(model, name, folder, clocks[name]) for name in CONFIGS}
        for i, name in harness.in_turns(list(CONFIGS), rounds):
            begins = i and {len(each) for each in runs.values()} == {i}
            if begins and time.perf_counter() - start > MOST_SECONDS * i / (i + 1):
                break
            set_seed(i)  # other pairs in each round, the same for all
            trainers[name].train()
            log = [record for record in trainers[name].state.log_history if "loss" in record]
            runs[name].append(
                {
                    "seconds": [took(*two) for two in pairwise(clocks[name].ends[-STEPS:])],
                    "loss": [record["loss"] for record in log],
                    "margin": [record["rewards/margins"] for record in log],
                }
            )
    seconds = {name: [step for run in each for step in run["seconds"]] for name, each in runs.items()}
    step = {name: {kind: harness.spread([s[kind] for s in each]) for kind in KINDS} for name, each in seconds.items()}
    return {
        "ratio": {
            name: {
                kind: harness.spread(
                    [a[kind] / b[kind] for a, b in zip(seconds[name], seconds["speed_up"], strict=True)]
                )
                for kind in KINDS
            }
            for name in CONFIGS
            if name != "speed_up"
        },
        "step_seconds": step,
        "steps_per_second": {name: 1 / each["clock"]["median"] for name, each in step.items()},
        "runs": runs,
    }


def main(rounds: int) -> None:
    torch.set_num_threads(THREADS)
    disable_progress_bars()
    logging.disable_progress_bar()
    models = {model: measure(model, rounds) for model in ("smollm2", "micro")}
    what = {"bf16": product_dtype(bf16=True) == torch.bfloat16, "threads": THREADS, "batch": BATCH}
    print(harness.write("dpo", {**what, "models": models}))
    for model, one in models.items():
        for name, each in one["step_seconds"].items():
            clock, cpu = (each[kind]["median"] for kind in KINDS)
            times = [f"{one['ratio'][name][kind]['median']:.2f}" for kind in KINDS if name in one["ratio"]]
            print(f"{model:8} {name:18} {clock:6.2f} s a step, {cpu:6.2f} CPU seconds;  times speed_up's:", *times)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["5"])[0]))

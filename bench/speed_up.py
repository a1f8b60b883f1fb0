"""What `speed_up(trainer)` saves: a LoRA step of SmolLM2 by TRL's SFTTrainer or DPOTrainer, with and without it.

    python bench/speed_up.py           about 7 minutes

Three trainers in one process, in turns, on the same batches: rows of data/ask, 4 a step, or pairs of data/replies, 4 a
step; LoRA r = 16 on all linear layers, AdamW, two threads. The config differs, and nothing else:

    defaults          gradient_checkpointing=True, as in TRL's configs
    no checkpointing  gradient_checkpointing=False
    speed_up          gradient_checkpointing=False, then speed_up(trainer)

bf16 is what the configs say, True, where the CPU multiplies bf16, and False elsewhere: it is emulated there, and takes
many times as long (emulated_bf16_step_seconds: one TRL step without checkpointing; null where the CPU has bf16).

seconds: from the end of a step to the end of the next one, batching included; the first step of each turn is not
counted. clock: by the clock; cpu: of the process, all threads, which a busy machine changes less. ratio: over steps,
another trainer's seconds over speed_up's on the same rows. loss: of every step, nats a token or a pair, so that a
reader sees that all of them do the same work.
"""

import json
import statistics
import tempfile
import time
from itertools import pairwise

import harness
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ftlab.cpu import product_dtype, speed_up
from ftlab.models import model_path
from ftlab.paths import DATA
from ftlab.tasks import replies

ROUNDS, STEPS, BATCH, THREADS, MOST_SECONDS = 7, 3, 4, 2, 150
CONFIGS = {
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "speed_up": {"gradient_checkpointing": False},
}


class Clock(TrainerCallback):
    """At the beginning and the end of each step: the clock's seconds and this process's CPU seconds, all threads."""

    def __init__(self) -> None:
        self.begins, self.ends = [], []

    def on_step_begin(self, *arguments, **named) -> None:
        self.begins.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *arguments, **named) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


def rows(method: str) -> Dataset:
    if method == "sft":
        return load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split="train[:400]")
    lines = (DATA / "replies" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    pairs = [replies.as_pair(json.loads(line)) for line in lines]
    return Dataset.from_list(pairs).select_columns(["prompt", "chosen", "rejected"])


def trainer_of(method: str, name: str, folder: str, clock: Clock, bf16: bool) -> SFTTrainer | DPOTrainer:
    path = model_path("smollm2")
    trainer_class, config_class = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[method]
    torch.manual_seed(0)  # lora_A is drawn in the trainer's __init__
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=config_class(
            folder, learning_rate={"sft": 2e-3, "dpo": 1e-4}[method], per_device_train_batch_size=BATCH,
            max_steps=STEPS, logging_steps=1, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            bf16=bf16, **CONFIGS[name],
        ),
        train_dataset=rows(method),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    )  # fmt: skip
    if name == "speed_up":
        speed_up(trainer)
    return trainer


def measured(method: str) -> dict:
    native, emulated = product_dtype(bf16=True) == torch.bfloat16, None
    start, clocks = time.perf_counter(), {name: Clock() for name in CONFIGS}
    seconds, losses = {name: [] for name in CONFIGS}, {name: [] for name in CONFIGS}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_of(method, name, folder, clocks[name], native) for name in CONFIGS}
        for i, name in harness.in_turns(list(CONFIGS), ROUNDS):
            begins = i and {len(each) for each in losses.values()} == {i}
            if begins and time.perf_counter() - start > MOST_SECONDS * i / (i + 1):
                break  # the machine is busy: fewer rounds
            set_seed(i)  # other rows in each round, the same for all
            trainers[name].train()
            seconds[name] += [
                {"clock": after[0] - before[0], "cpu": after[1] - before[1]}
                for before, after in pairwise(clocks[name].ends[-STEPS:])
            ]
            losses[name].append([record["loss"] for record in trainers[name].state.log_history if "loss" in record])
        if not native:
            clock, name = Clock(), "no checkpointing"
            trainer = trainer_of(method, name, folder, clock, bf16=True)
            trainer.args.max_steps = 1
            trainer.train()
            emulated = {"clock": clock.ends[0][0] - clock.begins[0][0], "cpu": clock.ends[0][1] - clock.begins[0][1]}
    ratios = {
        name: {kind: harness.spread([a[kind] / b[kind] for a, b in paired]) for kind in ("clock", "cpu")}
        for name in ("defaults", "no checkpointing")
        if (paired := list(zip(seconds[name], seconds["speed_up"], strict=True)))
    }
    for name, each in seconds.items():
        clock, cpu = (statistics.median(one[kind] for one in each) for kind in ("clock", "cpu"))
        times = [f"{ratios[name][kind]['median']:.2f}" for kind in ("clock", "cpu") if name in ratios]
        print(f"{name:18} {clock:6.2f} s a step, {cpu:6.2f} CPU seconds;  times speed_up's: {' '.join(times)}")
    print("emulated bf16:", emulated)
    return {
        "bf16": native,
        "threads": THREADS,
        "ratio": ratios,
        "step_seconds": {
            name: {kind: harness.spread([one[kind] for one in each]) for kind in ("clock", "cpu")}
            for name, each in seconds.items()
        },
        "emulated_bf16_step_seconds": emulated,
        "loss": losses,
        "runs": seconds,
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    disable_progress_bars()
    logging.disable_progress_bar()
    harness.write("speed_up", measured("sft") | {"dpo": measured("dpo")})


if __name__ == "__main__":
    main()

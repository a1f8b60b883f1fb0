"""Who answers the questions of data/ask? Every system on the same 132 hand-written questions, ten databases each.

    python experiments/ask/run.py            all records that are missing (an hour and a half on one core)
    python experiments/ask/run.py live       only those whose arm is named
    python experiments/ask/run.py --plan     what is missing, seed by seed, and what it will take

It can be stopped and goes on (experiments/runs.py says how). Each run adds one line to records.jsonl, with its arm,
seed, training rows, seconds, versions and one 0 or 1 per question of hand_test.jsonl, so that any two can be compared
question by question. All trains in fp32, with bf16=False: TRL's own default is bf16, on a CPU too.

| arm | what | runs |
|---|---|---|
| zero-shot | the schema and the house language in the prompt | 1 |
| few-shot | the same, and the 3 or 8 nearest training questions with their queries | 2 |
| nearest | the nearest training question's query, its values replaced | 1 |
| rules | a parser that an expert wrote from the training rows (data/ask/rules.py) | 1 |
| live | the recipe of notebook 05 on 450 rows, once | 3 seeds |
| curve | the same recipe on 100 and 200 rows | 3 seeds a size |
| shipped | the adapter of data/ask_adapter, 7,500 rows, twice | 1 |

The recipe was chosen on validation.jsonl. The hand test was written before the training rows and chose nothing of it;
the rows of the shipped adapter were ordered after its score was seen (data/ask/README.md).
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

from experiments.runs import Job, cpu_clock, flags, stamp, work
from ftlab.paths import DATA

HERE = Path(__file__).parent
FILE = HERE / "records.jsonl"
SEEDS = (0, 1, 2)
ROWS, RATE, BATCH, RANK = 450, 2e-3, 2, 16  # as in notebook 05
SIZES = (100, 200)
QUESTIONS = ["ask/hand_test"]
CHOSEN = {
    "rate, batch, rank, rows": "on data/ask/validation.jsonl, for notebook 05; nothing by the hand test",
    "rows of the adapter of arm shipped": "put in order after its score was seen (data/ask/README.md)",
}
HOUSE = (
    "Table: orders(id, day, month 1-6, city, plan, cuisine, status, payment, total, tip, minutes, stars or NULL). "
    "plan: free gold office. status: done cancelled refunded. payment: card cash upi. late: minutes>45. "
    "big: total>=1000. unrated: stars IS NULL. revenue: SUM(total) WHERE status='done'. with a tip: tip>0."
)


def runs() -> list[tuple[str, int, int]]:
    """(arm, training rows, seed) of every record that there should be."""
    trained = [("curve", size, seed) for size in SIZES for seed in SEEDS]
    controls = [("zero-shot", 0, 0), ("few-shot-3", 0, 0), ("few-shot-8", 0, 0), ("nearest", 0, 0), ("rules", 0, 0)]
    return [*(("live", ROWS, seed) for seed in SEEDS), *controls, *trained, ("shipped", 0, 0)]


def measure(arm: str, rows: int, seed: int) -> dict:
    from datasets import load_dataset

    train = load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split="train")
    test = load_dataset("json", data_files=str(DATA / "ask" / "hand_test.jsonl"), split="train")
    start, extra = time.perf_counter(), {}
    if arm in ("live", "curve"):
        said, extra = tuned(train.select(range(rows)), test, seed)
    elif arm == "shipped":
        said = shipped(test)
    elif arm in ("nearest", "rules"):
        said = written(arm, train.to_list(), test)
    else:
        said = prompted(0 if arm == "zero-shot" else int(arm.rpartition("-")[2]), train.to_list(), test)
    from ftlab.tasks.ask import runs as is_valid
    from ftlab.tasks.ask import scorer

    right = [int(scorer(answer, row)) for answer, row in zip(said, test, strict=True)]
    return {
        "arm": arm,
        "rows": rows,
        "seed": seed,
        "mean": round(sum(right) / len(right), 4),
        "valid": round(sum(map(is_valid, said)) / len(said), 4),
        "right": right,
        "seconds": round(time.perf_counter() - start, 1),
        **extra,
        "environment": environment(),
    }


def base():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import model_path

    folder = model_path("smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def tuned(train, test, seed: int) -> tuple[list[str], dict]:
    """The answers after training on these rows, and what the training took."""
    from ftlab import answers

    model, tokenizer, spent = tuned_model(train, seed)
    return answers(model, tokenizer, test["prompt"]), spent


def tuned_model(train, seed: int) -> tuple:
    """(model, tokenizer, seconds) of notebook 05's recipe on these rows."""
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from ftlab import speed_up

    model, tokenizer = base()
    set_seed(seed)
    trainer = SFTTrainer(
        model,
        train_dataset=train,
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/ask",
            learning_rate=RATE,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            warmup_steps=5,
            seed=seed,
            logging_steps=25,
            save_strategy="no",
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )
    speed_up(trainer)
    cpu = time.process_time()
    seconds = trainer.train().metrics["train_runtime"]
    spent = {"train_seconds": round(seconds, 1), "train_cpu_seconds": round(time.process_time() - cpu, 1)}
    return trainer.model, tokenizer, spent


def shipped(test) -> list[str]:
    from peft import PeftModel

    from ftlab import answers

    model, tokenizer = base()
    return answers(PeftModel.from_pretrained(model, DATA / "ask_adapter"), tokenizer, test["prompt"])


def prompted(k: int, train, test) -> list[str]:
    """The base model's answers to schema, house language and the k nearest training questions, the nearest last."""
    from ftlab import answers
    from ftlab.tasks.ask import SYSTEM

    nearest = module("controls").nearest_rows
    prompts = []
    for row in test:
        shots = nearest(row["prompt"][-1]["content"], train, k)[::-1] if k else []
        turns = [message for shot in shots for message in (shot["prompt"][-1], shot["completion"][0])]
        system = {"role": "system", "content": f"{SYSTEM} {HOUSE}"}
        prompts.append([system, *turns, row["prompt"][-1]])
    return answers(*base(), prompts, batch_size=16)


def written(arm: str, train, test) -> list[str]:
    """The answers of the two controls that are no language model."""
    questions = [row["prompt"][-1]["content"] for row in test]
    if arm == "rules":
        return list(map(module("rules").to_sql, questions))
    return [module("controls").nearest(question, train) for question in questions]


def module(name: str):
    """A script of data/ask as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DATA / "ask" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def environment() -> dict:
    import importlib.metadata
    import platform

    import torch

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    return {**versions, "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def recorded(arm: str, rows: int, seed: int) -> list[dict]:
    """The record of a run."""
    began = cpu_clock()
    record = measure(arm, rows, seed)
    return [record | {"cpu_seconds": round(cpu_clock() - began, 1)} | stamp("float32", QUESTIONS, CHOSEN)]


def jobs(wanted: list[str]) -> list[Job]:
    """Every run, or those whose arm is named."""
    names = [{"arm": arm, "rows": rows, "seed": seed} for arm, rows, seed in runs() if not wanted or arm in wanted]
    return [Job((name,), tuple(name.values())) for name in names]


if __name__ == "__main__":
    words, how = flags(sys.argv[1:])
    work(FILE, lambda records: jobs(words), recorded, **how)

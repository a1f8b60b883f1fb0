"""The triage adapter: SmolLM2 on the triage tickets, in two rounds.

    python data/triage_adapter/make.py     rewrites this folder: about 40 minutes on two cores

First round: triage/train.jsonl and the rehearsal rows, three passes. Second round, from the first one's adapter: the
harder tickets of triage/more.jsonl, some known ones and the rehearsal again, one pass at half the rate.
validation.jsonl is scored after each round, test and hand-written tickets once, at the end.

The committed weights were made by this recipe with the course's first version and TRL 1.12, whose names training.json
has; git shows that script: `git log -- data/triage_adapter/make.py`.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ftlab import answers, model_path, speed_up
from ftlab.data import near_duplicates
from ftlab.paths import DATA
from ftlab.tasks import triage

sys.path.insert(0, str(DATA))
import starts

HERE = Path(__file__).parent
SOURCES = ("triage/train.jsonl", "triage/more.jsonl", "general/rehearsal.jsonl")
SETTINGS = {
    "per_device_train_batch_size": 4,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "max_length": 256,
}
FIRST = SETTINGS | {"learning_rate": 1e-3, "num_train_epochs": 3}
SECOND = SETTINGS | {"learning_rate": 5e-4, "num_train_epochs": 1}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def tickets(name: str) -> list[dict]:
    return triage.read(DATA / "triage" / f"{name}.jsonl")


def first_rows() -> list[dict]:
    """The training tickets without near-duplicates, then what is rehearsed against forgetting."""
    return without_duplicates(tickets("train")) + rehearsal_rows()


def second_rows() -> list[dict]:
    """The harder tickets that were written later, 700 known ones that are to stay learned, and the rehearsal again."""
    return without_duplicates(tickets("more")) + first_rows()[:700] + rehearsal_rows()


def without_duplicates(rows: list[dict]) -> list[dict]:
    twins = {i for i, _, _ in near_duplicates([ticket_text(row) for row in rows])}
    return [row for i, row in enumerate(rows) if i not in twins]


def ticket_text(row: dict) -> str:
    return row["prompt"][-1]["content"]


def rehearsal_rows() -> list[dict]:
    rows = [json.loads(line) for line in (DATA / "general" / "rehearsal.jsonl").open(encoding="utf-8")]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def base() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)


def train(rows: list[dict], folder: Path, start: Path | None = None, **settings) -> SFTTrainer:
    """The trainer after its run, from a new adapter or from the one in `start`; the result lies in folder/adapter."""
    held_out = sorted(tickets("validation"), key=lambda row: row["id"])[:48]
    train_dataset, eval_dataset = (
        Dataset.from_list(part).select_columns(["prompt", "completion"]) for part in (rows, held_out)
    )
    set_seed(0)
    trainer = SFTTrainer(
        PeftModel.from_pretrained(base(), start, is_trainable=True) if start else base(),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(model_path("smollm2")),
        args=SFTConfig(
            str(folder),
            **settings,
            seed=42,  # it orders the rows; the 0 above draws lora_A
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=450,
            save_strategy="no",
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
        ),
        peft_config=None if start else LoraConfig(**LORA),
    )
    speed_up(trainer)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return trainer


def score(adapter: Path, *splits: str) -> dict[str, dict[str, float]]:
    """Split -> mean of each score, of an adapter on the base model in fp32."""
    model, means = PeftModel.from_pretrained(base(), adapter), {}
    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    for split in splits:
        rows = tickets(split)
        said = answers(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=64)
        marks = [marks_of(answer, row) for answer, row in zip(said, rows, strict=True)]
        means[split] = {name: round(sum(mark[name] for mark in marks) / len(marks), 4) for name in marks[0]}
    return means


def marks_of(answer: str, row: dict) -> dict[str, float]:
    """For each mark of an answer whether it has it; what is no JSON object has no field right."""
    said, label = (dict(triage.pairs(text)) for text in (answer, row["completion"][-1]["content"]))
    fields = {name: said.get(name) == label[name] for name in triage.FIELDS}
    share = sum(fields.values()) / len(fields)
    return {"valid_json": triage.is_valid(answer), "exact": triage.scorer(answer, row), **fields, "fields": share}


def record(settings: dict, rows: list[dict], trainer: SFTTrainer, scores: dict) -> dict:
    log = trainer.state.log_history
    points = [{key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry} for entry in log]
    return {
        "settings": settings | LORA,
        "rows": len(rows),
        "seconds": round(next(entry["train_runtime"] for entry in log if "train_runtime" in entry)),
        "scores": scores,
        "log": [point for point in points if len(point) > 1],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "first", Path(scratch) / "second"
        rows = first_rows()
        trainer = train(rows, first, **FIRST)
        rounds = [record(FIRST, rows, trainer, score(first / "adapter", "validation"))]
        rows = second_rows()
        trainer = train(rows, second, first / "adapter", **SECOND)
        starts.save_adapter(second / "adapter", HERE)
    rounds.append(record(SECOND, rows, trainer, score(HERE, "validation", "test", "hand_test")))
    sources = {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in SOURCES}
    result = {"rounds": rounds, "sources_sha256": sources}
    (HERE / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps([entry["scores"] for entry in rounds], indent=1))


if __name__ == "__main__":
    main()

"""What notebook 07 starts from: `micro`, fine-tuned on half of the training questions of data/ask, good and not done.

    python data/ask_start/make.py     rewrites this folder, about five minutes of one core

It is a whole model and no adapter: the embeddings are trained too, since those of `micro` know no SQL.
"""

import hashlib
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ftlab import model_path
from ftlab.paths import DATA

HERE = Path(__file__).parent
FILES = ("train", "more")  # of data/ask
SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3,
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
}
TEACHER_PASSES = 5


def rows() -> list[dict]:
    """All training questions of data/ask as demonstrations: {prompt, completion}, lists of messages."""
    lines = [line for name in FILES for line in (DATA / "ask" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [{key: row[key] for key in ("prompt", "completion")} for row in map(json.loads, lines)]


def halves() -> tuple[list[dict], list[dict]]:
    """The demonstrations of the start, and the other rows, whose questions are prompts for what comes after it."""
    mixed = rows()
    random.Random(0).shuffle(mixed)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def fine_tuned(rows: list[dict], passes: float = SETTINGS["num_train_epochs"]) -> SFTTrainer:
    """The trainer, after SFT of `micro` on these rows."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("micro"))
    set_seed(0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_path("micro"), dtype=torch.float32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=SFTConfig(
            tempfile.mkdtemp(),
            **SETTINGS | {"num_train_epochs": passes},
            logging_steps=30,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return trainer


def save(model, folder: Path) -> None:
    """The model in bf16, half the bytes, with micro's tokenizer beside it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in Path(model_path("micro")).iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, folder)


def main() -> None:
    start = time.perf_counter()
    demonstrations, _ = halves()
    trainer = fine_tuned(demonstrations)
    seconds = round(time.perf_counter() - start)
    save(trainer.model, HERE)
    record = {
        "settings": SETTINGS,
        "rows": len(demonstrations),
        "sha256": {f: hashlib.sha256((DATA / "ask" / f"{f}.jsonl").read_bytes()).hexdigest() for f in FILES},
        "seconds": seconds,
        "log": [{key: e[key] for key in ("step", "loss")} for e in trainer.state.log_history if "loss" in e],
    }
    (HERE / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

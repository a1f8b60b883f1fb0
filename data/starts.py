"""How data/replies_start and data/ask_start are made: SFT of all of `micro`, its weights and a record beside them."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ftlab import model_path


def fine_tuned(rows: list[dict], settings: Mapping) -> SFTTrainer:
    """The trainer, after SFT of `micro` on rows {prompt, completion}; settings are SFTConfig's."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("micro"))
    set_seed(0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_path("micro"), dtype=torch.float32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=SFTConfig(
            tempfile.mkdtemp(),
            **settings,
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


def write(folder: Path, rows: list[dict], settings: Mapping, sources: Mapping[str, Path]) -> None:
    """Trains, and writes the model and training.json; sources are the files that the rows come from."""
    start = time.perf_counter()
    trainer = fine_tuned(rows, settings)
    seconds = round(time.perf_counter() - start)
    save(trainer.model, folder)
    record = {
        "settings": settings,
        "rows": len(rows),
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()},
        "seconds": seconds,
        "log": [{key: e[key] for key in ("step", "loss")} for e in trainer.state.log_history if "loss" in e],
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

"""How data/replies_start and data/ask_start are made: SFT of all of `micro`, its weights and a record beside them.

And how the weights of data/ask_adapter and data/triage_adapter are stored.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
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
            seed=42,  # it orders the rows; the 0 above draws nothing here, since no weight is new
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


def save_adapter(adapter: Path, folder: Path) -> None:
    """An adapter of SmolLM2 in bf16, half the bytes, without a path of this machine in its config."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: w.to(torch.bfloat16) for name, w in weights.items()}, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": "smollm2", "target_modules": sorted(config["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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

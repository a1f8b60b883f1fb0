"""What the alignment notebooks start from: `micro`, fine-tuned on the old team's log, data/replies/log.jsonl.

    python data/replies_start/make.py     rewrites this folder, five minutes on two quiet cores

It is a whole model and no adapter: the embeddings are trained too, since those of `micro` know little of support.
"""

import hashlib
import json
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
from ftlab.tasks import replies

HERE = Path(__file__).parent
LOG = DATA / "replies" / "log.jsonl"
SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "max_steps": 450,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
}


def rows() -> list[dict]:
    """The log as demonstrations: {prompt, completion}, lists of messages."""
    log = map(json.loads, LOG.read_text(encoding="utf-8").splitlines())
    return [
        {"prompt": replies.prompt(row), "completion": [{"role": "assistant", "content": row["reply"]}]} for row in log
    ]


def fine_tuned(rows: list[dict]) -> SFTTrainer:
    """The trainer, after SFT of `micro` on these rows."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("micro"))
    set_seed(0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_path("micro"), dtype=torch.float32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=SFTConfig(
            tempfile.mkdtemp(),
            **SETTINGS,
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
    trainer = fine_tuned(rows())
    seconds = round(time.perf_counter() - start)
    save(trainer.model, HERE)
    record = {
        "settings": SETTINGS,
        "rows": len(rows()),
        "sha256": {LOG.name: hashlib.sha256(LOG.read_bytes()).hexdigest()},
        "seconds": seconds,
        "log": [{key: e[key] for key in ("step", "loss")} for e in trainer.state.log_history if "loss" in e],
    }
    (HERE / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

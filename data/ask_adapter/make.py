"""An adapter that has learned `ask`: ask/train.jsonl and ask/more.jsonl, two passes, settings of its own (SETTINGS).

    python data/ask_adapter/make.py     rewrites this folder; it can be stopped and goes on from its last checkpoint

ask/validation.jsonl is scored on the way, test.jsonl and the hand test once, at the end.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import concatenate_datasets, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from ftlab import NanGuard, answers, last_good_checkpoint, model_path, score, speed_up
from ftlab.paths import DATA
from ftlab.tasks import ask

sys.path.insert(0, str(DATA))
import starts

HERE = Path(__file__).parent
RUN = Path(tempfile.gettempdir()) / "ask-adapter"
FILES = ("train", "more")
SETTINGS = {
    "learning_rate": 1.5e-3,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def rows(name: str):
    return load_dataset("json", data_files=str(DATA / "ask" / f"{name}.jsonl"), split="train")


class Scores(TrainerCallback):
    """Logs the score of the 100 validation questions with the lowest ids before the first step and every 600 steps."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.rows = tokenizer, rows("validation").sort("id").select(range(100))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 600 == 0:
            found = score(answers(model, self.tokenizer, self.rows["prompt"]), self.rows, ask.scorer)
            state.log_history.append({"step": state.global_step, "score": found.mean})


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    model = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    train = concatenate_datasets([rows(name) for name in FILES])
    set_seed(0)
    trainer = SFTTrainer(
        model,
        train_dataset=train,
        processing_class=tokenizer,
        args=SFTConfig(
            str(RUN),
            **SETTINGS,
            seed=42,  # it orders the rows; the 0 above draws lora_A
            logging_steps=20,
            save_steps=150,
            save_total_limit=2,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
        ),
        peft_config=LoraConfig(**LORA),
        callbacks=[NanGuard(), Scores(tokenizer)],
    )
    speed_up(trainer)
    trainer.train(resume_from_checkpoint=last_good_checkpoint(RUN))
    trainer.save_model(str(RUN / "adapter"))
    starts.save_adapter(RUN / "adapter", HERE)
    scores = {}
    for name in ("validation", "test", "hand_test"):
        found = score(answers(trainer.model, tokenizer, rows(name)["prompt"]), rows(name), ask.scorer)
        scores[name] = {"right": round(found.mean, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
    log = trainer.state.log_history
    files = {name: (DATA / "ask" / f"{name}.jsonl").read_bytes() for name in FILES}
    record = {
        "settings": SETTINGS | LORA,
        "rows": len(train),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "seconds": round(sum(entry["train_runtime"] for entry in log if "train_runtime" in entry)),
        "scores": scores,
        "log": [{k: e[k] for k in ("step", "loss", "score") if k in e} for e in log if "loss" in e or "score" in e],
    }
    (HERE / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()

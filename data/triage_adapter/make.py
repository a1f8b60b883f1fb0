"""The triage adapter: SmolLM2 on the triage tickets, in two rounds.

    python data/triage_adapter/make.py     rewrites this folder: about 40 minutes on two cores

First round: triage/train.jsonl and the rehearsal rows, three passes. Second round, from the first one's adapter: the
harder tickets of triage/more.jsonl, some known ones and the rehearsal again, one pass at half the rate. The rate was
chosen on the validation tickets (data/results/triage_arms.py); test and hand-written tickets are only scored.
"""

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from ftlab.paths import DATA
from ftlab.pipeline import data, evaluate, train
from ftlab.pipeline.recipe import Recipe

HERE = Path(__file__).parent
SOURCES = ("triage/train.jsonl", "triage/more.jsonl", "general/rehearsal.jsonl")
FIRST = Recipe(
    learning_rate=1e-3,
    batch_size=4,
    epochs=3,
    warmup_steps=20,
    max_length=256,
    fast=True,
    logging_steps=20,
    eval_file="triage/validation.jsonl",
    eval_steps=450,
    save_steps=450,
)
SECOND = FIRST.replace(learning_rate=5e-4, epochs=1, eval_file=None, eval_steps=0)


def first_rows() -> list[dict]:
    """The training tickets without near-duplicates, then what is rehearsed against forgetting."""
    return data.deduplicate(data.triage_rows(DATA / "triage" / "train.jsonl"), ticket_text)[0] + rehearsal_rows()


def second_rows() -> list[dict]:
    """The harder tickets that were written later, 700 known ones that are to stay learned, and the rehearsal again."""
    more, _ = data.deduplicate(data.triage_rows(DATA / "triage" / "more.jsonl"), ticket_text)
    return more + first_rows()[:700] + rehearsal_rows()


def rehearsal_rows() -> list[dict]:
    rows = [json.loads(line) for line in (DATA / "general" / "rehearsal.jsonl").open(encoding="utf-8")]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def ticket_text(row: dict) -> str:
    return row["prompt"][-1]["content"]


def train_on(adapter: Path, recipe: Recipe, rows: list[dict], folder: Path) -> list[dict]:
    """Goes on from an adapter with other rows and a fresh optimizer, into folder/adapter; returns the log."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    trainer = train.sft_trainer(recipe, rows, None, folder)
    set_peft_model_state_dict(trainer.model, load_file(adapter / "adapter_model.safetensors"))
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return trainer.state.log_history


def save(adapter: Path, folder: Path) -> None:
    """The adapter in bf16, half the bytes, without a path of this machine in its config."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: w.to(torch.bfloat16) for name, w in weights.items()}, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": FIRST.model, "target_modules": sorted(config["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def score(adapter: Path, *splits: str) -> dict[str, dict[str, float]]:
    """Split -> mean of each score, of an adapter on the base model in fp32."""
    import torch
    from peft import PeftModel

    from ftlab.pipeline.models import load

    model, tokenizer = load(FIRST.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    means = {}
    for split in splits:
        rows = data.triage_rows(DATA / "triage" / f"{split}.jsonl")
        answers = evaluate.generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=64)
        labels = [json.loads(row["completion"][0]["content"]) for row in rows]
        means[split] = evaluate.summary(evaluate.scores(answers, labels))["mean"].round(4).to_dict()
    return means


def record(recipe: Recipe, rows: list[dict], log: list[dict], scores: dict) -> dict:
    points = [{key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry} for entry in log]
    seconds = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    return {
        "recipe": asdict(recipe),
        "rows": len(rows),
        "seconds": round(seconds),
        "scores": scores,
        "log": [point for point in points if len(point) > 1],
    }


def main() -> None:
    folder = Path(tempfile.gettempdir()) / "triage-adapter"  # stays if something fails, and the next start goes on
    validation = data.triage_rows(DATA / "triage" / "validation.jsonl")[:48]
    rows = first_rows()
    run = train.train(FIRST, rows, validation, folder / "first", on_log=print)
    first = record(FIRST, rows, run.log, score(run.folder / "adapter", "validation"))
    rows = second_rows()
    log = train_on(run.folder / "adapter", SECOND, rows, folder / "second")
    save(folder / "second" / "adapter", HERE)
    second = record(SECOND, rows, log, score(HERE, "validation", "test", "hand_test"))
    result = {
        "rounds": [first, second],
        "sources_sha256": {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in SOURCES},
        **train.environment(),
    }
    (HERE / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps([entry["scores"] for entry in result["rounds"]], indent=1))


if __name__ == "__main__":
    main()

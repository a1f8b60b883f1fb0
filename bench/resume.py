"""SIGKILL at random moments of TRL's own SFTTrainer with speed_up: does the resumed run end in the same bytes?

    python bench/resume.py         ten runs, about 3 minutes on two cores
    python bench/resume.py 3       three runs

The learner's own line is what goes on: `trainer.train(resume_from_checkpoint=last_good_checkpoint(folder))`. The model
is `micro` (3.5 million parameters), LoRA r = 8, fp32, 24 steps of 4 rows of data/ask, a checkpoint every 3 steps. Each
run is a process of its own, forked from one that has imported the libraries and killed by its id: half of the kills
come at any moment of the training, half as soon as a checkpoint is seen with a random number of its files. Every third
run is killed twice. Then the same call is made again until it is done.

same_weights: the adapter's bytes are equal to those of a run that nobody killed. skipped: how often a checkpoint that
was cut off while it was written was passed over.
"""

import json
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import harness

STEPS, EVERY, FILES = 24, 3, 10  # files of a checkpoint: a kill after the last of them is one between two


def run(folder: Path) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from ftlab import last_good_checkpoint, model_path, speed_up
    from ftlab.paths import DATA

    micro = model_path("micro")
    set_seed(0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(micro, dtype=torch.float32),
        train_dataset=load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split="train[:96]"),
        processing_class=AutoTokenizer.from_pretrained(micro),
        args=SFTConfig(
            str(folder), learning_rate=1e-3, per_device_train_batch_size=4, max_steps=STEPS, logging_steps=1,
            save_steps=EVERY, bf16=False, gradient_checkpointing=False, report_to="none", use_cpu=True,
            seed=0,
        ),
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"),
    )  # fmt: skip
    speed_up(trainer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoint = last_good_checkpoint(folder)
    (folder / "skipped").open("a").write("x" * sum("is not whole" in str(w.message) for w in told))
    (folder / "training").touch()
    seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    trainer.save_model(str(folder / "adapter"))
    (folder / "seconds").write_text(str(seconds))


def started(context, folder: Path) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    (folder / "training").unlink(missing_ok=True)
    process = context.Process(target=run, args=(folder,))
    process.start()
    return process


def killed(context, folder: Path, aim: str, whole: float, draw: random.Random) -> str | None:
    """Starts the run and kills it: the newest checkpoint and how many files it had, or None if it was done before."""
    moment, step, files = draw.random() * whole, draw.randrange(EVERY, STEPS + 1, EVERY), draw.randrange(1, FILES + 1)
    process, seen = started(context, folder), folder / f"checkpoint-{step}"
    while process.is_alive() and not (folder / "training").exists():
        time.sleep(0.001)
    end = time.monotonic() + moment
    while process.is_alive() and (time.monotonic() < end if aim == "any moment" else len(list(seen.glob("*"))) < files):
        time.sleep(0.0003)
    process.kill()
    process.join()
    if (folder / "seconds").exists():
        return None
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
    return f"{newest.name}, {len(list(newest.iterdir()))} files" if newest else "no checkpoint"


def finished(context, folder: Path) -> bytes:
    process = started(context, folder)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{folder.name} ended with exit code {process.exitcode}")
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def main() -> None:
    count, draw = int(sys.argv[1]) if sys.argv[1:] else 10, random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.sft_trainer", "peft", "datasets", "ftlab.cpu"])
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        wanted = finished(context, Path(scratch) / "whole")
        seconds = float((Path(scratch) / "whole" / "seconds").read_text())
        attempt = 0
        while len(runs) < count:
            aim, kills = ("any moment", "in a checkpoint")[len(runs) % 2], []
            attempt += 1
            folder = Path(scratch) / f"run-{attempt}"
            for _ in range(2 if len(runs) % 3 == 2 else 1):
                kills.append(killed(context, folder, aim, seconds, draw))
                if None in kills:
                    break
            if None in kills:  # it was done before the kill came: another one
                continue
            same = finished(context, folder) == wanted
            skipped = (folder / "skipped").stat().st_size
            runs.append({"aim": aim, "kills": kills, "skipped": skipped, "same_weights": same})
            print(runs[-1], flush=True)
    summary = {
        "runs": len(runs),
        "kills": sum(len(one["kills"]) for one in runs),
        "skipped": sum(one["skipped"] for one in runs),
        "same_weights": sum(one["same_weights"] for one in runs),
    }
    print(json.dumps(summary))
    print(harness.write("resume", {"seed": 0, "summary": summary, "each": runs}))


if __name__ == "__main__":
    main()

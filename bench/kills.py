"""SIGKILL at random moments of SFT and DPO: does each resumed run end as the one that was never killed?

    python bench/kills.py          16 runs and 20 kills, about 4 minutes on two cores
    python bench/kills.py 3        three runs of each method instead of eight

The model is `micro` (3.5 million parameters), LoRA r = 8, fp32, 18 steps of 2 rows from data/replies, a checkpoint
every 3 steps. Each run is a process of its own, forked from one that has imported the libraries and killed by its id.
The moments are drawn from seed 0, half of them in each of two ways:

    any moment        a step, and a part of the time that a step takes after it was logged
    in a checkpoint   the next one after a step that is seen with a random number of its files, and not complete

The last run of each method is killed three times. Then the same call is made again, in a new process, until it is done.

killed: what lay there when the process was dead. steps_again: the first step that the next process made. same_weights:
the bytes of the adapter are equal to those of the uninterrupted run. same_log: every record is, of losses, gradient
norms, rates and rewards, in every digit; left out are the last one's, which is about time, and num_tokens, which TRL
counts from the resumption on. A run that ends before its kill comes is not counted; another moment is drawn.
"""

import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import harness

from ftlab.paths import DATA
from ftlab.pipeline import data
from ftlab.pipeline.faults import DONE
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import train

METHODS, RUNS, STEPS, EVERY = ("sft", "dpo"), 8, 18, 3
SETTINGS = {"model": "micro", "precision": "fp32", "r": 8, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1}
LENGTHS = {"max_steps": STEPS, "save_steps": EVERY, "logging_steps": 1, "max_length": 512}
FILES = 12  # of a checkpoint, with an adapter


def rows(method: str) -> list[dict]:
    """Sixty-four rows of the method, from the replies' pairs."""
    pairs = data.reply_pairs(DATA / "replies" / "train.jsonl")[:64]
    if method == "sft":
        return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    return pairs


def run(method: str, folder: Path) -> None:
    """One call of train, in this process; the first step it makes is left in folder/again."""
    first = folder / "again"

    def on_log(record: dict) -> None:
        if not first.exists():
            first.write_text(str(record["step"]))

    train(Recipe.from_dict({**SETTINGS, **LENGTHS, "method": method}), rows(method), folder=folder, on_log=on_log)


def started(context, method: str, folder: Path) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    (folder / "again").unlink(missing_ok=True)
    process = context.Process(target=run, args=(method, folder))
    process.start()
    return process


def killed(process, folder: Path, aim: str, steps: range, step_seconds: float, draw: random.Random) -> dict | None:
    """Kills the run at a random moment of these steps: what it left, or None if it was done before."""
    step, part, files = draw.choice(steps), draw.random(), draw.randrange(1, FILES + 1)
    while process.is_alive() and not _arrived(folder, aim, step, files):
        time.sleep(0.0005)
    if aim == "any moment":
        time.sleep(part * step_seconds)
    process.kill()
    process.join()
    return _left(folder) if process.exitcode == -signal.SIGKILL else None


def _arrived(folder: Path, aim: str, step: int, files: int) -> bool:
    if not (folder / "again").exists():
        return False
    if aim == "any moment":
        return len(_lines(folder)) >= step
    news = [folder / f"checkpoint-{number}" for number in range(step, STEPS + 1)]
    return any(len(list(new.glob("*"))) >= files and not (new / DONE).exists() for new in news)


def _left(folder: Path) -> dict:
    """The last step that was logged, and the checkpoint that is not complete, with the file that was last written."""
    unfinished = [path for path in folder.glob("checkpoint-*") if not (path / DONE).exists()]
    files = [file for path in unfinished for file in path.iterdir()]
    return {
        "after_step": len(_lines(folder)),
        "in_checkpoint": unfinished[0].name if unfinished else None,
        "files_there": len(files),
        "last_file": max(files, key=lambda file: file.stat().st_mtime_ns).name if files else None,
    }


def _lines(folder: Path) -> list[str]:
    file = folder / "log.jsonl"
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def done(process, folder: Path) -> None:
    """Waits for the end of a run that nobody kills."""
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{folder.name} ended with exit code {process.exitcode}")


def result_of(folder: Path) -> tuple[bytes, list[dict]]:
    """The adapter's bytes, and the log without what is about time or counted from the resumption on."""
    records = [json.loads(line) for line in _lines(folder)]
    kept = [{k: v for k, v in record.items() if k != "num_tokens"} for record in records if "loss" in record]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), kept


def main() -> None:
    count, draw = int(sys.argv[1]) if sys.argv[1:] else RUNS, random.Random(0)
    context = multiprocessing.get_context("forkserver")
    modules = ["trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "peft"]
    context.set_forkserver_preload([*modules, "ftlab.pipeline.align"])
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in METHODS:
            whole = Path(scratch) / f"{method}-whole"
            done(started(context, method, whole), whole)
            weights, log = result_of(whole)
            (seconds,) = [json.loads(line)["train_runtime"] for line in _lines(whole) if "train_runtime" in line]
            for i in range(count):
                folder, kills, times = Path(scratch) / f"{method}-{i}", [], 3 if i == count - 1 else 1
                aim = ("any moment", "in a checkpoint")[i % 2]
                while len(kills) < times:
                    part = range(STEPS * len(kills) // times + 1, STEPS * (len(kills) + 1) // times)
                    left = killed(started(context, method, folder), folder, aim, part, seconds / STEPS, draw)
                    if kills and left:
                        kills[-1]["steps_again"] = int((folder / "again").read_text())
                    kills.append(left)
                    if not left:  # it was done before: all over again
                        folder, kills = folder.with_name(f"{folder.name}-again"), []
                done(started(context, method, folder), folder)
                kills[-1]["steps_again"] = int((folder / "again").read_text())
                again, records = result_of(folder)
                verdict = {"same_weights": again == weights, "same_log": records == log}
                runs.append({"method": method, "aim": aim, "kills": kills, **verdict})
                print(method, i, *kills, verdict, flush=True)
    every = [kill for one in runs for kill in one["kills"]]
    summary = {
        "runs": len(runs),
        "kills": len(every),
        "in_a_checkpoint": sum(kill["in_checkpoint"] is not None for kill in every),
        "same_weights": sum(one["same_weights"] for one in runs),
        "same_log": sum(one["same_log"] for one in runs),
    }
    print(summary)
    print(harness.write("kills", {"seed": 0, "settings": SETTINGS | LENGTHS, "summary": summary, "each": runs}))


if __name__ == "__main__":
    main()

"""One recipe through TRL, through Unsloth's CPU backend and through this course's `fast` path: losses, speed, memory.

    python data/results/engines.py        every run that engines.json lacks (10 minutes, one core)
    python data/results/engines.py 3      at most three of them

SmolLM2 with LoRA (r = 16 on all linear layers, no dropout), fp32, AdamW at 1e-3, 2 tickets a step, seed 0. Each run is
`ftlab.pipeline.train.train` in a process of its own with one thread, so that the engines cannot patch each other; what
differs between the three recipes is `engine` and `fast`. Three repetitions, the order of the engines turned by one each
time: the first of 24 steps (48 training tickets), the others of 8 (16 tickets). Every ticket is seen once. tokens: of
the rendered rows, without padding.

loss: of every step, nats/token. step_cpu_seconds: processor time of each step from the second on, which other work on
the machine changes less than the clock. cpu_seconds: of the whole process, imports and loading too. seconds:
transformers' train_runtime by the clock. peak_mb: high-water mark of the process's resident memory (ru_maxrss). load:
of the machine, the mean number of running threads over the last minute (1.0 is our own).
"""

import itertools
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
ENGINES = {"TRL": {}, "Unsloth": {"engine": "unsloth"}, "fast": {"fast": True}}
STEPS = (24, 8, 8)  # of the repetitions
BATCH = 2


def jobs() -> list[tuple[str, int]]:
    """(engine, repetition), in the order in which they run."""
    names = list(ENGINES)
    return [(name, i) for i in range(len(STEPS)) for name in names[i:] + names[:i]]


def run(name: str, repetition: int) -> dict:
    """Trains once, in this process, which must be a fresh one, and returns what that left."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from ftlab.paths import DATA
    from ftlab.pipeline import data
    from ftlab.pipeline.recipe import Recipe
    from ftlab.pipeline.train import train

    rows = data.triage_rows(DATA / "triage" / "train.jsonl")[: STEPS[repetition] * BATCH]
    recipe = Recipe(
        precision="fp32", learning_rate=1e-3, batch_size=BATCH, epochs=1, max_length=256, logging_steps=1,
        **ENGINES[name],
    )  # fmt: skip
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        trained = train(recipe, rows, folder=folder, on_log=lambda record: ends.append(time.process_time()))
    tokens = [len(data.render(row, trained.tokenizer).input_ids) for row in rows]
    losses = trained.series("loss")[1]
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "name": name,
        "repetition": repetition,
        "seed": recipe.seed,
        "tokens": sum(tokens),
        "loss": losses,
        "grad_norm": trained.series("grad_norm")[1],
        "step_cpu_seconds": [round(b - a, 3) for a, b in itertools.pairwise(ends[: len(losses)])],
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "seconds": next(record["train_runtime"] for record in trained.log if "train_runtime" in record),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6),
        "load": round(os.getloadavg()[0], 2),
    }


def environment() -> dict:
    import torch

    from ftlab.pipeline import train

    torch.set_num_threads(1)
    return train.environment()


def alone(function, *arguments):
    """The function's result from a new process that ends with it: this one stays small and imports nothing heavy."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    from lines import write

    result = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"runs": []}
    result = {"environment": alone(environment), "runs": result["runs"]}
    done = {(one["name"], one["repetition"]) for one in result["runs"]}
    for job in [job for job in jobs() if job not in done][: int((sys.argv[1:] or [99])[0])]:
        one = alone(run, *job)
        result["runs"].append(one)
        write(FILE, result)
        print(*job, one["cpu_seconds"], "s,", one["peak_mb"], "MB, last loss", one["loss"][-1], flush=True)


if __name__ == "__main__":
    main()

"""Rows of data, 1,000 to 1,000,000: how do time and memory of reading, the way into training and deduplication grow?

    python bench/rows.py           about 6 minutes of processor time

The rows are triage's own tickets as prompt_completion rows, in each of which three words of ten are drawn anew; one row
in fifty says what another said, and one line in a thousand is cut off. Each stage runs in a process of its own:

read         read_rows: a verdict on each line
dataset      the good rows as TRL reads them (Report.dataset)
duplicates   near_duplicates of the tickets, at the threshold of 0.85

rows_per_second: by the clock. per_cpu_second: by the processor time of the stage's process, which a busy machine
changes less. peak_bytes: the high-water mark of that process's resident memory; imports come before the clock starts.
anonymous_bytes: the most of it, looked at every 20 ms, that is not pages of a mapped file, which the system may drop at
any time. exponent: of the line fitted to log(cost) against log(rows) by least squares; 1 means ten times the rows, ten
times the cost, and 0 is flat. bytes_per_row: what a row more costs of anonymous_bytes, from the second largest size to
the largest.
"""

import json
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import harness

from ftlab import data
from ftlab.paths import DATA
from ftlab.tasks import triage

SIZES = (1_000, 10_000, 100_000, 1_000_000)
MOST = {"dataset": 100_000, "duplicates": 10_000}  # they go by the row: a million take ten or a hundred times as long
BROKEN, REPEATS = 1_000, 50


def write_rows(file: Path, count: int) -> None:
    """That many rows, the same at each call."""
    rows = triage.read(DATA / "triage" / "train.jsonl")
    words, rng = [word for row in rows for word in ticket(row).split()], random.Random(0)
    texts: list[str] = []
    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            row = rows[i % len(rows)]
            text = " ".join(rng.choice(words) if rng.random() < 0.3 else word for word in ticket(row).split())
            texts = [*texts[-REPEATS:], text]
            prompt = [row["prompt"][0], {"role": "user", "content": texts[-7] if i % REPEATS == 7 else text}]
            line = json.dumps({**row, "id": f"row-{i}", "prompt": prompt}, ensure_ascii=False)
            stream.write((line[:-9] if i % BROKEN == BROKEN - 1 else line) + "\n")


def ticket(row: dict) -> str:
    return row["prompt"][-1]["content"]


def read(file: Path) -> Callable[[], int]:
    return lambda: len(data.read_rows(file).rows)


def dataset(file: Path) -> Callable[[], int]:
    import datasets

    report = data.read_rows(file)
    datasets.disable_caching()
    return lambda: len(report.dataset())


def duplicates(file: Path) -> Callable[[], int]:
    import datasketch  # noqa: F401

    texts = [ticket(row) for row in data.read_rows(file).rows]
    return lambda: len(data.near_duplicates(texts))


STAGES = (read, dataset, duplicates)


def measure(stage: Callable, file: Path, count: int) -> dict:
    """One run of a stage on `count` rows: what it found, its time and its memory."""
    run = stage(file)
    anonymous, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            anonymous.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with harness.stopwatch() as taken:
            found = run()
    finally:
        over.set()
        watcher.join()
    return {
        "rows": count,
        "found": found,
        **taken,
        "rows_per_second": round(count / taken["seconds"]),
        "per_cpu_second": round(count / taken["cpu_seconds"]),
        "peak_bytes": harness.peak_bytes(),
        "anonymous_bytes": max(*anonymous, anonymous_bytes()),
    }


def anonymous_bytes() -> int:
    """Resident memory of this process that is not the page of a file; 0 where the system is not Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    runs: dict[str, list[dict]] = {stage.__name__: [] for stage in STAGES}
    with tempfile.TemporaryDirectory() as scratch:
        for count in SIZES:
            file = Path(scratch) / f"{count}.jsonl"
            harness.alone(write_rows, file, count)
            for stage in STAGES:
                if count <= MOST.get(stage.__name__, count):
                    run = harness.alone(measure, stage, file, count)
                    runs[stage.__name__].append(run)
                    print(f"{stage.__name__:11}", run, flush=True)
    print(harness.write("rows", summary(runs)))


def summary(runs: dict[str, list[dict]]) -> dict:
    """The runs and, above them, how each stage grows."""
    found = [run for stage in ("read", "dataset") for run in runs[stage]]
    assert all(run["found"] == run["rows"] - run["rows"] // BROKEN for run in found), "each good row, and no other"
    grown = {}
    for name, of in runs.items():
        more = of[-1]["rows"] - of[-2]["rows"]
        counts = [run["rows"] for run in of]
        grown[name] = {
            f"{cost}_exponent": round(harness.exponent(counts, [run[cost] for run in of]), 3)
            for cost in ("seconds", "cpu_seconds", "peak_bytes")
        }
        grown[name]["bytes_per_row"] = round((of[-1]["anonymous_bytes"] - of[-2]["anonymous_bytes"]) / more, 1)
    most = {name: f"stops at {rows:,}: its time goes by the row" for name, rows in MOST.items()}
    return {"growth": grown, "stops": most, "runs": runs}


if __name__ == "__main__":
    main()

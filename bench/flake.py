"""Do the tests and notebooks pass every time? `make test` again and again, at 1 and 2 threads, with three seeds.

    python bench/flake.py            ten runs, about five hours on two cores
    python bench/flake.py 2          two

A run is all tests, then all notebooks under nbval, two at a time. Its seed orders the test files, seeds hypothesis and
Python's hashes, and orders the notebooks, which are run as a copy in another folder. What fails is listed by name.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
THREADS, SEEDS = (2, 1), (0, 1, 2)


def tests(seed: int) -> list[str]:
    return ["tests", "--shuffle", str(seed), "--hypothesis-seed", str(seed)]


def notebooks(seed: int, folder: Path) -> list[str]:
    """The arguments that run a copy of the notebooks in the folder, in an order of the seed's."""
    shutil.copytree(ROOT / "notebooks", folder / "elsewhere", ignore=shutil.ignore_patterns("runs", ".*"))
    copies = sorted(map(str, (folder / "elsewhere").glob("*.ipynb")))
    two_at_a_time = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    return [*two_at_a_time, *harness.NBVAL, *random.Random(seed).sample(copies, len(copies))]


def run(arguments: list[str], threads: int, seed: int, folder: Path) -> dict:
    """What pytest counted, in how many seconds, and which failed."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
    own["FTLAB_PROGRESS"] = str(folder / "progress.sqlite")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=no", *arguments],
        cwd=ROOT, env=os.environ | own, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout[-400:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not counts or done.returncode not in (0, 1) or (done.returncode == 0) != (not failed):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"threads": threads, "seed": seed, "seconds": round(time.perf_counter() - start), **counts, "names": failed}


def main(count: int) -> None:
    runs = []
    for i in range(count):
        threads, seed = THREADS[i % len(THREADS)], SEEDS[i % len(SEEDS)]
        for what in ("tests", "notebooks"):
            with tempfile.TemporaryDirectory() as folder:
                arguments = tests(seed) if what == "tests" else notebooks(seed, Path(folder))
                runs.append({"what": what, **run(arguments, threads, seed, Path(folder))})
            print(i + 1, runs[-1], flush=True)
    print(harness.write("flake", {"runs": runs}))


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["10"])[0]))

"""Do the tests and notebooks pass every time? `make test` again and again, each time with another seed.

    python bench/flake.py            as many runs as are missing to ten, 20 to 30 minutes each on two cores
    python bench/flake.py 2          to two

A run is all tests, then all notebooks under nbval, two at a time, with a thread each; in two of ten runs with two. Its
seed orders the test files, seeds hypothesis and Python's hashes, and orders the notebooks, which are run as a copy in
another folder. What fails is listed by name. Every run is kept as soon as it is through, with the commit it ran on, and
CONTRIBUTING tells it. With another TRL it begins anew; so it does when bench/results/flake.json is deleted.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import harness
import report

ROOT = Path(__file__).parents[1]
TWO_THREADS = (0, 2)  # the seeds of these runs
TWO_AT_A_TIME = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def tests(seed: int) -> list[str]:
    return [*TWO_AT_A_TIME, "tests", "--shuffle", str(seed), "--hypothesis-seed", str(seed)]


def notebooks(seed: int, folder: Path) -> list[str]:
    """The arguments that run a copy of the notebooks in the folder, in an order of the seed's."""
    shutil.copytree(ROOT / "notebooks", folder / "elsewhere", ignore=shutil.ignore_patterns("runs", ".*"))
    for name in ("data", "experiments", "tools"):
        (folder / name).symlink_to(ROOT / name)
    copies = sorted(map(str, (folder / "elsewhere").glob("*.ipynb")))
    return [*TWO_AT_A_TIME, *harness.NBVAL, *random.Random(seed).sample(copies, len(copies))]


def run(arguments: list[str], threads: int, seed: int, folder: Path) -> dict:
    """What pytest counted, in how many seconds, and which failed."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
    own |= {"GOMP_SPINCOUNT": "2000", "UNSLOTH_AUTO_INSTALL": "0", "TOKENIZERS_PARALLELISM": "false"}  # as the Makefile
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


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it, other than results and pages."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
    differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":!bench/results", ":!*.md"]).returncode
    return name.strip() + "+" * differs


def main(count: int) -> None:
    kept = harness.measured("flake")
    same = kept and kept["environment"]["versions"]["trl"] == version("trl")  # else of another course: begin anew
    runs = kept["runs"] if same else []
    for i in range(len(runs), 2 * count):
        report.write()  # a test holds the pages to the runs that are on file
        what = ("tests", "notebooks")[i % 2]
        seed = i // 2
        threads = 2 if seed in TWO_THREADS else 1
        with tempfile.TemporaryDirectory() as folder:
            arguments = tests(seed) if what == "tests" else notebooks(seed, Path(folder))
            runs.append({"what": what, "commit": commit(), **run(arguments, threads, seed, Path(folder))})
        print(i // 2 + 1, runs[-1], flush=True)
        harness.write("flake", {"runs": runs})
    report.write()


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["10"])[0]))

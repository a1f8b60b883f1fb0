"""How long each notebook takes under nbval on this machine and what it holds at most, and how long all of them take.

    python bench/course.py             all of it, about 30 minutes on two cores
    python bench/course.py 03 nbval    those only; what was measured before is kept for the others

Each notebook by itself, with all cores; then `make nbval`, which runs two at a time with a core each. seconds: by the
clock, with starting pytest and the kernels. peak_bytes: the greatest resident memory of one process, which is a
notebook's kernel or a process it started. BUDGET: minutes that a notebook alone may take, and `make nbval`; the script
says which one is over.
"""

import json
import sys
from pathlib import Path

import harness

from ftlab.pipeline import stack

ROOT = Path(__file__).parents[1]
BUDGET = {"00": 1, "01": 2, "02": 2, "03": 2, "04": 3, "05": 5, "06": 2.5, "07": 2, "08": 1, "nbval": 15}  # minutes
FILE = harness.RESULTS / "course.json"


def measure(name: str, command: list[str]) -> dict:
    """Seconds and peak bytes of a command; raises RuntimeError if a cell fails."""
    seconds, peak_bytes = stack.measure(name, command, ROOT)
    over = "  OVER ITS BUDGET" if seconds > 60 * BUDGET[name[:2] if name[0] == "0" else name] else ""
    print(f"{name:26}{seconds:6.0f} s {peak_bytes / 1e9:5.1f} GB{over}", flush=True)
    return {"seconds": round(seconds, 1), "peak_bytes": peak_bytes}


def main(wanted: list[str]) -> None:
    before = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {"notebooks": {}, "nbval": {}}
    result = {"budget_minutes": BUDGET, "notebooks": before["notebooks"], "nbval": before["nbval"]}
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not wanted or notebook.name[:2] in wanted:
            command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-cell-timeout=600", str(notebook)]
            result["notebooks"][notebook.stem] = measure(notebook.stem, command)
            harness.write("course", result)
    if not wanted or "nbval" in wanted:
        result["nbval"] = measure("nbval", ["make", "nbval"])
    harness.write("course", result)


if __name__ == "__main__":
    main(sys.argv[1:])

"""How long each notebook takes under nbval on this machine, and what it holds at most.

    python bench/course.py             all notebooks, about 12 minutes on two cores
    python bench/course.py 03 08       those only; what was measured before is kept for the others

Each notebook by itself, by the command of `make nbval`. seconds: by the clock, with starting pytest and the kernel.
peak_bytes: the greatest resident memory of one process, which is the notebook's kernel or a process it started.
BUDGET: minutes that a notebook may take, and all of them together 15; the script says which one is over.
"""

import json
import sys
from pathlib import Path

import harness

from ftlab.pipeline import stack

ROOT = Path(__file__).parents[1]
BUDGET = {"00": 1, "01": 2, "02": 2, "03": 2, "04": 3, "05": 5, "06": 2.5, "07": 2, "08": 1}  # minutes each
FILE = harness.RESULTS / "course.json"


def measure(notebook: Path) -> dict:
    """Seconds and peak bytes of one notebook under nbval; raises RuntimeError if a cell fails."""
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-cell-timeout=600", str(notebook)]
    seconds, peak_bytes = stack.measure(notebook.name, command, ROOT)
    return {"seconds": round(seconds, 1), "peak_bytes": peak_bytes}


def main(wanted: list[str]) -> None:
    measured = json.loads(FILE.read_text("utf-8"))["notebooks"] if FILE.is_file() else {}
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not wanted or notebook.name[:2] in wanted:
            measured[notebook.stem] = one = measure(notebook)
            over = "  OVER ITS BUDGET" if one["seconds"] > 60 * BUDGET[notebook.name[:2]] else ""
            print(f"{notebook.stem:26}{one['seconds']:6.0f} s {one['peak_bytes'] / 1e9:5.1f} GB{over}", flush=True)
    whole = sum(one["seconds"] for one in measured.values())
    print(f"{'the whole course':26}{whole:6.0f} s, budget {15 * 60} s")
    harness.write("course", {"seconds": whole, "budget_minutes": BUDGET, "notebooks": measured})


if __name__ == "__main__":
    main(sys.argv[1:])

"""How long each notebook takes under nbval on this machine and what it holds at most, and how long all of them take.

    python bench/course.py             all of it, about 40 minutes on two cores
    python bench/course.py 03 nbval    those only; what was measured before is kept for the others

Each notebook by itself, with all cores; then `make nbval`, which runs two at a time with a core each. seconds: by the
clock, with starting pytest and the kernels. native_bf16: whether the CPU has it; without it products are fp32, and
training takes up to three times as long. peak_bytes: the greatest resident memory of one process, which is a
notebook's kernel or a process it started. BUDGET: minutes that a notebook alone may take, and `make nbval`; the script
says which one is over.
"""

import sys
from pathlib import Path

import harness
import torch

from ftlab.cpu import product_dtype

ROOT = Path(__file__).parents[1]
# minutes
BUDGET = {
    "00": 1.25, "01": 1.5, "02": 2, "03": 2, "04": 1.83, "05": 3, "06": 1.33, "07": 1.83, "08": 1, "09": 1, "10": 1.33,
    "11": 1, "nbval": 15,
}  # fmt: skip


def main(wanted: list[str]) -> None:
    result = {"budget_minutes": BUDGET, "measured": harness.measured("course").get("measured", {})}
    pytest = [sys.executable, "-m", "pytest", "-q", *harness.NBVAL]
    commands = {path.stem: [*pytest, str(path)] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for name, command in {**commands, "nbval": ["make", "nbval"]}.items():
        short = name.split("_")[0]
        if not wanted or short in wanted:
            used = harness.weighed(command, ROOT)  # raises RuntimeError if a cell fails
            seconds, peak_bytes = round(used["seconds"], 1), used["peak_bytes"]
            native = product_dtype(True) is torch.bfloat16
            result["measured"][name] = {"seconds": seconds, "peak_bytes": peak_bytes, "native_bf16": native}
            over = "  OVER ITS BUDGET" if seconds > 60 * BUDGET[short] else ""
            print(f"{name:26}{seconds:6.0f} s {peak_bytes / 1e9:5.1f} GB{over}", flush=True)
            harness.write("course", result)


if __name__ == "__main__":
    main(sys.argv[1:])

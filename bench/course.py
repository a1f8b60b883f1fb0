"""How long each notebook takes under nbval on this machine and what it holds at most, and how long all of them take.

    python bench/course.py             all of it, about 40 minutes on two cores
    python bench/course.py 03 nbval    those only; what was measured before is kept for the others

Each notebook by itself, with all cores; then `make nbval`, which runs two at a time with a core each. seconds: by the
clock, with starting pytest and the kernels. native_bf16: whether the CPU has it; without it products are fp32, and
training takes up to three times as long. peak_bytes: the greatest resident memory of one process, which is a
notebook's kernel or a process it started. The script says which notebook takes longer than its first cell promises
("About **1½ minutes**"), and whether `make nbval` takes more than NBVAL_MINUTES.
"""

import json
import re
import sys
from pathlib import Path

import harness
import torch

from ftlab.cpu import product_dtype

ROOT = Path(__file__).parents[1]
NBVAL_MINUTES = 16


def promised(notebook: Path) -> float:
    """The seconds that its first cell says it takes."""
    title = "".join(json.loads(notebook.read_text("utf-8"))["cells"][0]["source"])
    number, half, unit = re.search(r"About \*\*(\d+)(½?) (minute|second)s?\*\*", title).groups()
    return (int(number) + 0.5 * bool(half)) * {"minute": 60, "second": 1}[unit]


def main(wanted: list[str]) -> None:
    result = {"measured": harness.measured("course").get("measured", {})}
    pytest = [sys.executable, "-m", "pytest", "-q", *harness.NBVAL]
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    commands = {path.stem: [*pytest, str(path)] for path in notebooks}
    limits = {path.stem: promised(path) for path in notebooks} | {"nbval": 60 * NBVAL_MINUTES}
    for name, command in {**commands, "nbval": ["make", "nbval"]}.items():
        short = name.split("_")[0]
        if not wanted or short in wanted:
            used = harness.weighed(command, ROOT)  # raises RuntimeError if a cell fails
            seconds, peak_bytes = round(used["seconds"], 1), used["peak_bytes"]
            native = product_dtype(True) is torch.bfloat16
            result["measured"][name] = {"seconds": seconds, "peak_bytes": peak_bytes, "native_bf16": native}
            over = f"  LONGER THAN {limits[name]:.0f} s" if seconds > limits[name] else ""
            print(f"{name:26}{seconds:6.0f} s {peak_bytes / 1e9:5.1f} GB{over}", flush=True)
            harness.write("course", result)


if __name__ == "__main__":
    main(sys.argv[1:])

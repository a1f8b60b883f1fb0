"""How long a learner waits before anything is learned, and for each move of a slider. Everything warm, median of 5.

    python bench/startup.py

first_cells   each notebook's cells up to the one with its imports, run as a kernel runs them (IPython loaded, plots
              inline), each time in a new process; the start of the kernel itself is not in it
doctor        `python -m ftlab.doctor`, from start to end
estimate      ftlab.memory.estimate: the mean over all architectures and four settings
redraw        one move of a slider, from the new value to the new text and picture, without the browser's part: the
              mean over a walk along the slider.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import alone, in_turns, spread, stopwatch, write

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROUNDS = 5


def first_cells(notebook: Path) -> dict:
    """Seconds of the cells up to the imports, in this process, which must be a fresh one."""
    os.chdir(notebook.parent)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    code = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in code]
    last = next(i for i, source in enumerate(sources) if "ftlab" in source and "google.colab" not in source)
    with stopwatch() as taken:
        for source in sources[: last + 1]:
            shell.run_cell(source).raise_error()
    return taken


def doctor() -> float:
    with stopwatch() as taken:
        done = subprocess.run([sys.executable, "-m", "ftlab.doctor"], capture_output=True, text=True)
    if not done.stdout.rstrip().endswith(("ready", "problems")):
        raise RuntimeError(f"doctor said nothing:\n{done.stderr}")
    return taken["seconds"]


def estimating(runs: int) -> list[float]:
    """Seconds a call."""
    from ftlab import memory

    nf4 = {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    settings = [{}, {"r": 16}, nf4, {"loss_type": "nll", "gradient_checkpointing": False}]
    cases = [(a, each) for a in memory.architectures().values() for each in settings]
    return _per_call([lambda a=a, each=each: memory.estimate(a, **each) for a, each in cases], runs)


def redrawing(runs: int) -> dict[str, list[float]]:
    """Seconds a move, by widget."""
    import torch

    from ftlab.classroom import landscape
    from ftlab.classroom.widgets import will_it_fit

    torch.set_num_threads(1)
    fit = will_it_fit().controls

    def moving(control, values):
        return [lambda value=value: setattr(control, "value", value) for value in values]

    walks = {
        "will it fit, rows": moving(fit["rows"], range(2, 33)),
        "will it fit, tokens a row": moving(fit["tokens"], [2**k for k in range(7, 16)]),
    }
    for name in ("margin_explorer", "orpo_landscape"):
        for label, slider in getattr(landscape, name)().controls.items():
            walks[f"{name}, {label}"] = moving(slider, slider.options)
    return {name: _per_call(moves, runs) for name, moves in walks.items()}


def _per_call(calls: list, runs: int) -> list[float]:
    """Mean seconds of a call, `runs` times over; a round before them warms up."""
    means = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        means.append((time.perf_counter() - start) / len(calls))
    return means[1:]


def main() -> None:
    seconds: dict[str, list[float]] = {notebook.stem: [] for notebook in NOTEBOOKS}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    for i, name in in_turns(list(seconds), ROUNDS + 1):
        measured = alone(first_cells, ROOT / "notebooks" / f"{name}.ipynb")
        if i:  # the first round brings the files into memory
            seconds[name].append(measured["seconds"])
            cpu[name].append(measured["cpu_seconds"])
    result = {
        "first_cells": {
            name: spread(each) | {"cpu_median": statistics.median(cpu[name])} for name, each in seconds.items()
        },
        "doctor": spread([doctor() for _ in range(ROUNDS + 1)][1:]),
        "estimate": spread(alone(estimating, ROUNDS)),
        "redraw": {name: spread(each) for name, each in alone(redrawing, ROUNDS).items()},
    }
    for name, part in result.items():
        for what, one in part.items() if "median" not in part else [("", part)]:
            print(f"{name:12} {what:28} {1000 * one['median']:9.2f} ms")
    print(write("startup", result))


if __name__ == "__main__":
    main()

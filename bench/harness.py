"""What the benchmarks share: each contestant in a process of its own, in turns, medians with their spread, one file.

    make bench                     all of them
    python bench/speed_up.py       one

A result says on what it was measured, and holds every single run, so that a reader can take other means than ours:
bench/results/<name>.json. These machines are noisy: compare ratios of one file, never seconds of two.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NBVAL = ["--nbval-lax", "--nbval-cell-timeout=1200", "-p no:hypothesispytest"]  # as in the Makefile, a test says


def alone(function: Callable, *arguments):
    """The function's result, from a new process that ends with it; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): every name once a round, the order turned by one each time, so that none is always first."""
    for i in range(rounds):
        first = i % len(names)
        yield from ((i, name) for name in [*names[first:], *names[:first]])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some measurements, and how many they were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y against log x by least squares."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Fills its mapping at the end: seconds by the clock, cpu_seconds of this process (all threads)."""
    taken: dict[str, float] = {}
    clock, cpu = time.perf_counter(), time.process_time()
    yield taken
    taken["seconds"], taken["cpu_seconds"] = time.perf_counter() - clock, time.process_time() - cpu


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Runs between us and the command: Linux counts into a process's peak what the process that started it held.
WEIGHED = """import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * used.ru_maxrss}, file)
sys.exit(code if code >= 0 else 128 - code)"""


def weighed(command: list[str], folder: Path, env: dict[str, str] | None = None) -> dict[str, float]:
    """seconds by the clock, cpu_seconds, peak_bytes of a command in a folder, with the processes that it waited for.

    Raises RuntimeError with the end of its output if it fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output, tempfile.NamedTemporaryFile("r") as used:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", WEIGHED, used.name, *command],
            cwd=folder, stdout=output, stderr=output, env=env,
        )  # fmt: skip
        if done.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"{command} ended with exit code {done.returncode}:\n{text[-3000:]}")
        return {"seconds": time.perf_counter() - start, **json.load(used)}


def measured(name: str) -> dict:
    """The result that was left before; empty if there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def write(name: str, result: dict) -> Path:
    """Leaves the result, under the hardware and versions it was measured on, in bench/results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"environment": environment()} | result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return file


def environment() -> dict:
    """Versions, processor, cores and load of this machine."""
    return {**alone(_environment), "processor": _processor(), "load": round(os.getloadavg()[0], 2)}


def _environment() -> dict:
    import torch

    from ftlab.cpu import product_dtype

    names = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "unsloth")
    versions = {"torch": str(torch.__version__)} | {name: importlib.metadata.version(name) for name in names}
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    hardware |= {"vectors": torch.backends.cpu.get_cpu_capability(), "bf16": product_dtype(True) is torch.bfloat16}
    return {"python": platform.python_version(), "versions": versions, "hardware": hardware}


def _processor() -> str:
    """The processor's name as Linux tells it; elsewhere "unknown"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")

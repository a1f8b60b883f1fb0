"""What a learner waits for at the start: modules are counted. bench/startup.py measures the seconds.

A process that has loaded what every notebook needs forks once for each first cell; what a cell loads stays in its fork.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [ROOT / "notebooks" / "11_interview_prep.ipynb"]  # the learners of all others import TRL and PEFT
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "datasketch",
    "gguf",
    "httpx",
    "llama_cpp",
    "openai",
    "peft",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchao",
    "torchvision",
    "transformers",
    "trl",
    "unsloth",
    "xllamacpp",
}

LOADS = """
import json, os, sys
from IPython.core.interactiveshell import InteractiveShell
import torch, pandas, matplotlib.pyplot, ipywidgets

shell = InteractiveShell.instance()
for name, cells in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        before, error = set(sys.modules), None
        for cell in cells:
            error = error or shell.run_cell(cell, silent=True).error_in_exec
        new = sorted({module.split(".")[0] for module in set(sys.modules) - before})
        os.write(writer, json.dumps([new, error and repr(error)]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        print("LOADED", name, pipe.read(), flush=True)
    os.wait()
"""


def first_cells(notebook: Path) -> list[str]:
    """The code cells up to the one with the imports."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    last = next(i for i, cell in enumerate(code) if "from ftlab" in cell)
    return code[: last + 1]


def loaded(cells: dict[str, list[str]]) -> dict[str, set[str]]:
    """Name -> the packages that these cells load, beyond torch, pandas, matplotlib, ipywidgets and what those bring."""
    environment = {**os.environ, "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", LOADS]
    options = {"capture_output": True, "text": True, "cwd": ROOT / "notebooks", "env": environment}
    done = subprocess.run(command, input=json.dumps(cells), **options)
    assert done.returncode == 0, done.stderr
    told = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    answers = {name: json.loads(answer) for name, answer in told}
    assert {name: error for name, (_, error) in answers.items() if error} == {}
    return {name: set(new) for name, (new, _) in answers.items()}


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")


@pytest.fixture(scope="module")
def packages() -> dict[str, set[str]]:
    modules = {
        "losses": ["import ftlab.scratch.losses"],
        "memory": ["import ftlab.memory"],
        "core": ["import ftlab, ftlab.models, ftlab.data, ftlab.evaluate, ftlab.export, ftlab.serve, ftlab.retrieve"],
        "tasks": ["from ftlab.tasks import ask, handbook, replies, tidy, triage"],
        "heavy": ["import datasketch", "import json"],
    }
    return loaded({notebook.stem: first_cells(notebook) for notebook in NOTEBOOKS} | modules)


@needs_fork
def test_the_import_cell_of_a_notebook_loads_nothing_that_takes_seconds(packages):
    assert {notebook.stem: packages[notebook.stem] & HEAVY for notebook in NOTEBOOKS} == {NOTEBOOKS[0].stem: set()}


@needs_fork
def test_a_module_of_ftlab_loads_nothing_that_takes_seconds(packages):
    assert {name: packages[name] & HEAVY for name in ("losses", "memory", "core", "tasks")} == {
        "losses": set(), "memory": set(), "core": set(), "tasks": set()
    }  # fmt: skip
    assert packages["heavy"] & HEAVY == {"datasketch", "scipy"}  # so it would be seen


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("ftlab.memory", {"torch", "numpy", "pandas", "matplotlib", "ipywidgets"}),
        ("ftlab", {"torch", "numpy", "pandas", "matplotlib", "ipywidgets"}),
        ("ftlab.exercises", {"torch", "numpy", "IPython"}),
    ],
)
def test_what_needs_no_torch_loads_none(module, without):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    names = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert module.split(".")[0] in names and names & (without | HEAVY) == set()


LISTENS = """
import logging, sys
heard = []
class Listener(logging.Handler):
    def emit(self, record):
        heard.append((record.name, record.getMessage()))
logging.getLogger().addHandler(Listener())
for name in sys.argv[1:]:
    logging.getLogger(name).addHandler(Listener())
levels = {name: logging.getLogger(name).getEffectiveLevel() for name in sys.argv[1:]}
import ftlab
assert levels == {name: logging.getLogger(name).getEffectiveLevel() for name in sys.argv[1:]}
for name in sys.argv[1:]:
    logging.getLogger(name).warning("your %s is wrong", name)
    assert (name, f"your {name} is wrong") in heard
    heard.clear()
import torchao, bitsandbytes.backends.cpu.ops
assert not heard, heard
"""


def test_importing_the_package_hides_known_messages_and_no_others_of_these_libraries():
    """torchao and bitsandbytes tell a CPU of kernels that it does not have; what else they say is heard."""
    names = ["torchao", "torch.utils._pytree", "bitsandbytes", "bitsandbytes.backends.cpu.ops"]
    command = [sys.executable, "-c", LISTENS, *names, "transformers.trainer_utils"]
    environment = os.environ | {"UNSLOTH_AUTO_INSTALL": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

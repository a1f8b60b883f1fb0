"""The repository keeps its own rules: layers, nothing unsafe, no path of one machine, notebooks as run, all tests run.

Each rule is a function from a text or a notebook to its faults; the last section shows that each can find one.
"""

import ast
import json
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "ftlab").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


NOT_PYTHON = re.compile(r"%%(bash|writefile (-a |--append )?\S+\.(?!py\n)\w+)\n")  # other cells have to be Python


def code_of(notebook: dict) -> str:
    """All code cells as one module, with the scripts that they write; IPython's own lines do nothing in it."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells if not NOT_PYTHON.match(cell) for line in cell.splitlines()]
    return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)


# --- Layers -----------------------------------------------------------------------------------------------------------

HEAVY = {
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "xllamacpp",
    "openai",
    "gguf",
}

DRAWS = {"ftlab/callbacks.py"}  # in the house's colours: ftlab.classroom.show
OWN_PROGRAM = {
    "ftlab/callbacks.py",  # its classes are transformers' TrainerCallbacks; ftlab imports it when one is used
}


# What the notebooks plug into the libraries
CORE = (
    "models", "data", "callbacks", "cpu", "llama", "allowed", "watch", "rewards", "evaluate", "export", "serve",
    "dialects", "retrieve", "tasks", "notebook",
)  # fmt: skip
ROOMS = {*CORE, "scratch", "memory", "statistics", "classroom", "exercises", "grade", "paths", "doctor", "__init__"}


def imports(code: str, package: str, only_at_start: bool = False) -> set[str]:
    """Full names of what a module of `package` imports; with only_at_start, only what importing the module imports."""
    found = set()

    def for_types_only(node: ast.AST) -> bool:
        return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            source = base if node.level else node.module
            found.update(f"{source}.{alias.name}" for alias in node.names)
        elif only_at_start and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or for_types_only(node)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(code))
    return found


def layer_faults(path: str, code: str) -> list[str]:
    """Imports that CONTRIBUTING forbids to the module at this path."""
    room = path.split("/")[1].removesuffix(".py")
    package = path.rsplit("/", 1)[0].replace("/", ".")
    everything, at_start = imports(code, package), imports(code, package, only_at_start=True)
    ours = {name for name in everything if name.split(".")[0] == "ftlab"}

    def within(*rooms: str) -> set[str]:
        return {name for name in ours if any(name == r or name.startswith(f"{r}.") for r in rooms)}

    allowed_in_scratch = {"torch", "ftlab", *sys.stdlib_module_names}
    content, teaching = within("ftlab.exercises"), within("ftlab.scratch", "ftlab.classroom", "ftlab.memory")
    bad = {
        "scratch": ours - within("ftlab.scratch")
        | {n for n in everything if n.split(".")[0] not in allowed_in_scratch},
        "memory": ours - within("ftlab.memory", "ftlab.paths"),
        "paths": ours,
        "statistics": ours,
        **dict.fromkeys(CORE, teaching | content),
        "exercises": set(),
        "grade": ours - within("ftlab.exercises.grading"),  # the door to it
    }.get(room, content)
    if path in ("ftlab/exercises/grading.py", "ftlab/exercises/cells.py"):  # they know no answer themselves
        bad |= within("ftlab.scratch")
    if path in DRAWS:
        bad -= within("ftlab.classroom.show")
    heavy = {name for name in at_start if name.split(".")[0] in HEAVY and path not in OWN_PROGRAM}
    return sorted(f"{path} imports {name}" for name in bad | heavy)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_only_what_its_room_may(path):
    """Heavy libraries are imported inside functions: Unsloth must come before transformers, and importing is free."""
    assert layer_faults(name_of(path), path.read_text(encoding="utf-8")) == []


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count too; a package's __init__ stands for the package."""
    modules = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}

    def leads_to(module: str) -> set[str]:
        package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
        named = imports(modules[module].read_text(encoding="utf-8"), package)
        homes = (name if name in modules else name.rpartition(".")[0] for name in named)
        return {home for home in homes if home in modules} - {module, "ftlab"}

    sorter = TopologicalSorter({module: leads_to(module) for module in modules})
    assert len(list(sorter.static_order())) == len(modules)  # CycleError names a circle


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=name_of)
def test_an_init_file_holds_a_docstring_and_nothing_else(path):
    """But ftlab.memory, of which the notebooks speak as of one module: there a docstring and the names by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    names = [node for node in tree.body[1:] if isinstance(node, ast.ImportFrom | ast.Assign)]
    if path.parent.name not in ("ftlab", "exercises"):  # ftlab fetches the everyday names when they are asked for
        assert len(tree.body) == 1 + (len(names) if path.parent.name == "memory" else 0)


def test_every_module_stands_in_a_room_that_has_a_rule():
    assert {name_of(path).split("/")[1].removesuffix(".py") for path in SOURCES} <= ROOMS


# --- Nothing of one machine -------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(
    r"(?<![\w.~/-])(?:/(?:root|home|work|tmp|mnt|Users|workspace|content)/[\w.-]+|[A-Z]:\\Users\\\w+)"
)
INDEX = re.compile(
    r"Looking in (?:indexes|links)|--(?:extra-)?index-url|https?://[^\s\"'<>]*/simple\b|pythonhosted|artifactory"
)
ALLOWED = {
    "data/general/text.jsonl": "the standard library's own manual, which speaks of paths",
    "tests/parity/test_tokenizer.py": "a Windows path among the strings to be tokenized",
    "tests/test_repo.py": "the examples of this file",
}


def machine_faults(name: str, text: str) -> list[str]:
    """Absolute paths and package-index addresses that mean something on one machine only."""
    hosts = {urlparse(os.environ.get(key, "")).hostname for key in ("PIP_INDEX_URL", "PIP_FIND_LINKS", "UV_INDEX_URL")}
    hosts -= {None, "pypi.org", "localhost", "127.0.0.1"}
    found = [match.group() for pattern in (MACHINE_PATH, INDEX) for match in pattern.finditer(text)]
    return [f"{name}: {what}" for what in found + [host for host in hosts if host in text]]


def committed() -> list[Path]:
    """The files under git, and those that could be added; outside a clone every file that is not made by a tool."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        made = re.compile(
            r"\.venv.*|\.git|my|runs|build|dist|__pycache__|\.(pytest|ruff)_cache|\.hypothesis|.*\.egg-info"
        )
        files = [path for path in ROOT.rglob("*") if not any(map(made.fullmatch, path.relative_to(ROOT).parts))]
    return sorted(path for path in files if path.is_file() and path.suffix not in {".safetensors", ".png", ".gif"})


def test_no_committed_file_names_a_path_or_a_package_index_of_one_machine():
    files = committed()
    assert {"README.md", "Makefile", "requirements.lock", "tests/test_repo.py"} <= {name_of(path) for path in files}
    faults = {name_of(path): machine_faults(name_of(path), path.read_text(encoding="utf-8")) for path in files}
    assert [fault for name, found in faults.items() if name not in ALLOWED for fault in found] == []


# Where things stood before; a path that still says so leads nowhere. In two parts: this file is looked at too.
MOVED = {"data/" + "results": "experiments/NAME, or bench/results"}


def moved_faults(name: str, text: str) -> list[str]:
    """Paths that are gone, with where what they held stands now."""
    return [f"{name}: {old} is now {new}" for old, new in MOVED.items() if old in text]


def test_no_committed_file_names_a_place_that_is_gone():
    faults = {name_of(path): moved_faults(name_of(path), path.read_text(encoding="utf-8")) for path in committed()}
    assert [fault for found in faults.values() for fault in found] == []


# --- Notebooks as they ran --------------------------------------------------------------------------------------------


def notebook_faults(notebook: dict) -> list[str]:
    """Why these cannot be the outputs of one run from top to bottom, or do not read well on a web page."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    counts = [cell["execution_count"] for cell in cells]
    outputs = [output for cell in cells for output in cell["outputs"]]
    faults = []
    if counts != list(range(1, len(cells) + 1)):
        faults.append(f"execution counts are {counts}")
    faults += [f"an error output: {output['ename']}" for output in outputs if output["output_type"] == "error"]
    if "widgets" in notebook["metadata"]:
        faults.append("metadata.widgets: without its state the notebook cannot be shown on GitHub")
    if any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs):
        faults.append("the view of a widget, an error in JupyterLab until it runs: python tools/publish.py")
    shown = sum(bool(cell["outputs"]) for cell in cells)
    if shown < 0.6 * len(cells):
        faults.append(f"only {shown} of {len(cells)} code cells show an output")
    return faults + machine_faults("outputs", json.dumps(outputs, ensure_ascii=False).replace("\\\\", "\\"))


def test_every_notebook_stands_as_it_ran():
    faults = {name_of(path): notebook_faults(json.loads(path.read_text(encoding="utf-8"))) for path in NOTEBOOKS}
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize("number", ["02", "03", "04", "06", "07", "08", "09", "10", "11"])
def test_what_a_notebook_counts_without_a_model_is_compared_with_what_it_shows(number):
    (path,) = [path for path in NOTEBOOKS if path.name.startswith(number)]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if "nbval-check-output" in cell["metadata"].get("tags", []) and cell["outputs"]]


# --- Every test is run ------------------------------------------------------------------------------------------------


def commands_of(target: str) -> str:
    """What `make target` would run, set-up left out."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    command = ["make", "--dry-run", "--assume-old=.venv/ready", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_test_runs_every_test_file_and_every_notebook():
    commands = commands_of("test").splitlines()
    (pytest_line,) = [line for line in commands if "pytest" in line and "--nbval" not in line]
    assert re.search(r"-m pytest -n \d+ --dist loadfile --no-loadscope-reorder -p no:nbval tests$", pytest_line.strip())
    options = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.pytest.ini_options]")[1].split("\n[")[0]
    )
    assert not re.search(r"ignore=|deselect|norecursedirs|python_files|python_functions|-k |-m ", options)
    if NOTEBOOKS:
        (nbval_line,) = [line for line in commands if "--nbval" in line]
        assert {word for word in nbval_line.split() if word.endswith(".ipynb")} == {name_of(path) for path in NOTEBOOKS}


def test_every_file_with_tests_has_a_name_that_pytest_collects():
    files = sorted((ROOT / "tests").rglob("*.py"))
    with_tests = [
        path for path in files if re.search(r"^(async )?def test_|^class Test", path.read_text(encoding="utf-8"), re.M)
    ]
    assert [name_of(path) for path in with_tests if not path.name.startswith("test_")] == []
    assert [name_of(path) for path in files if path.name.startswith("test_") and path not in with_tests] == []
    assert [
        name_of(path) for path in files if path.name != "test_repo.py" and "collect_ignore" in path.read_text()
    ] == []


def test_ci_and_readme_name_the_same_two_commands():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make lab" in readme and "make test" in readme


def test_the_way_of_a_row_leads_through_functions_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.findall(r"`(ftlab/[\w/]+\.py): (\w+)`", text.split("## Where a row goes")[1].split("\n## ")[0])
    assert 6 <= len(steps) <= 9
    for file, name in steps:
        nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}, (file, name)


# --- Each rule can find a fault ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("ftlab/scratch/x.py", "from ftlab.paths import DATA"),
        ("ftlab/scratch/x.py", "from ..tasks import ask"),
        ("ftlab/scratch/x.py", "def f():\n    import numpy"),
        ("ftlab/data.py", "def f():\n    from ftlab.scratch.losses import dpo_loss"),
        ("ftlab/tasks/x.py", "import ftlab.classroom.show"),
        ("ftlab/callbacks.py", "from ftlab.classroom import quiz"),
        ("ftlab/export.py", "from transformers import AutoModel"),
        ("ftlab/cpu.py", "class C:\n    import trl"),
        ("ftlab/classroom/x.py", "from ftlab.exercises import core"),
        ("ftlab/doctor.py", "from ftlab.exercises import exercises"),
        ("ftlab/grade.py", "from ftlab.exercises.nb04 import EXERCISES"),
        ("ftlab/exercises/grading.py", "from ftlab.scratch.losses import dpo_loss"),
        ("ftlab/memory/x.py", "from ftlab.data import read_rows"),
        ("ftlab/statistics.py", "def f():\n    from ftlab.evaluate import Score"),
    ],
)
def test_a_forbidden_import_is_found(path, code):
    assert len(layer_faults(path, code)) == 1


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "ftlab/scratch/x.py",
            "import math\nimport torch\nfrom ftlab.scratch.logps import sequence_logps\nfrom .quant import f",
        ),
        ("ftlab/export.py", "def f():\n    import transformers\n    from ftlab.serve import serve"),
        ("ftlab/cpu.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("ftlab/callbacks.py", "def f():\n    from ftlab.classroom.show import POLICY"),
        ("ftlab/classroom/x.py", "from ftlab.scratch.losses import dpo_loss\nfrom ftlab.evaluate import Score"),
        ("ftlab/exercises/x.py", "from ftlab.exercises.core import Exercise"),
        ("ftlab/memory/x.py", "import yaml\nfrom ftlab.memory.settings import Plan\nfrom ftlab.paths import DATA"),
    ],
)
def test_an_allowed_import_is_no_fault(path, code):
    assert layer_faults(path, code) == []


@pytest.mark.parametrize(
    "text",
    [
        "saved to /root/.cache/x",
        '"/home/ann/course"',
        "File /tmp/ipykernel_1/2.py",
        "at C:\\Users\\ann",
        "Looking in indexes: https://mirror.example/simple",
        "--extra-index-url https://x",
    ],
)
def test_a_path_or_index_of_one_machine_is_found(text):
    assert machine_faults("x", text)


@pytest.mark.parametrize(
    "text", ["~/.cache/ftlab", "https://example.com/home/page", "runs/tmp/x", "./work/x", 'get("TMPDIR", "/tmp")']
)
def test_a_path_that_every_machine_has_is_no_fault(text):
    assert machine_faults("x", text) == []


def test_a_place_that_is_gone_is_found():
    for old in MOVED:
        assert len(moved_faults("x", f"see [it](../{old}/ask.jsonl)")) == 1
        assert moved_faults("x", f"see {old.partition('/')[0]} and its {old.partition('/')[2]}") == []


def notebook(
    *counts: int | None, shown: bool = True, kind: str = "stream", text: str = "1", metadata: dict | None = None,
    data: dict | None = None,
) -> dict:  # fmt: skip
    """A notebook of code cells with these execution counts, each with one output."""
    output = {"output_type": kind, "ename": "ValueError", "text": [text], "data": data or {}}
    cells = [
        {"cell_type": "code", "source": ["x"], "execution_count": n, "outputs": [output] if shown else []}
        for n in counts
    ]
    return {"cells": [*cells, {"cell_type": "markdown", "source": ["t"]}], "metadata": metadata or {}}


def test_a_fault_of_a_notebook_is_found():
    assert notebook_faults(notebook(1, 2, 3)) == []
    broken = [
        notebook(1, 3),
        notebook(2, 3),
        notebook(1, None),
        notebook(1, 2, shown=False),
        notebook(1, kind="error"),
        notebook(1, metadata={"widgets": {}}),
        notebook(1, data={"application/vnd.jupyter.widget-view+json": {}}),
        notebook(1, text="in /home/ann/x.py"),
        notebook(1, text="at C:\\Users\\ann"),
        notebook(1, text="Looking in indexes: https://mirror.example"),
    ]
    assert [len(notebook_faults(one)) for one in broken] == [1] * len(broken)


def test_notebook_code_is_read_without_magics():
    cells = [
        {"cell_type": "code", "source": ["if on_colab:\n", "    %pip install x\n", "a = 1\n", "!ls"]},
        {"cell_type": "markdown", "source": ["b"]},
    ]
    assert code_of({"cells": [*cells, {"cell_type": "code", "source": ["%%bash\n", "rm x"]}]}) == (
        "if on_colab:\n    pass\na = 1\npass"
    )


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("%%writefile a/b.py", True),
        ("%%writefile -a a/b.py", True),
        ("%%time", True),
        ("%%writefile a/b.yaml", False),
        ("%%writefile -a a/b.yaml", False),
        ("%%bash", False),
    ],
)
def test_the_scripts_that_a_notebook_writes_are_code_too(line, read):
    cell = {"cell_type": "code", "source": [f"{line}\n", "f(x)"]}
    assert code_of({"cells": [cell]}) == ("pass\nf(x)" if read else "")

"""What ftlab adds to a running notebook, in a real kernel: buttons under a verdict, one line
for a stopped training and for a name from a cell that has not been run. Outside of one: nothing.
"""

import ast
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.manager import start_new_kernel
from scripts import ROOT, script
from shown import VIEW

from ftlab import notebook
from notebooks import CELLS

publish = script("tools/publish.py")
PATIENCE = 120  # seconds for one cell, on a machine that is busy with others


class Kernel:
    """A kernel as JupyterLab starts it for a notebook: it knows the notebook's path."""

    def __init__(self, file: Path | None, folder: Path) -> None:
        own = {"FTLAB_PROGRESS": f"{folder}/progress.sqlite", "PYTHONPATH": str(ROOT)}
        environment = {key: value for key, value in os.environ.items() if key != "JPY_SESSION_NAME"}
        path = {"JPY_SESSION_NAME": str(file)} if file else {}
        started = start_new_kernel(env=environment | own | path, cwd=str(folder))
        self.manager, self.client = started

    def run(
        self,
        code: str,
        id: str | None = None,
        meanwhile: Callable[[dict], None] = lambda message: None,
    ) -> tuple[str, list[dict]]:
        """The status of a cell, "ok" or "error", and its outputs."""
        content = {"code": code, "silent": False, "store_history": True, "stop_on_error": True}
        message = self.client.session.msg("execute_request", content | {"allow_stdin": False})
        message["metadata"] = {"cellId": id} if id else {}
        self.client.shell_channel.send(message)
        outputs, own = [], message["header"]["msg_id"]
        while True:
            told = self.client.get_iopub_msg(timeout=PATIENCE)
            kind, said = told["msg_type"], told["content"]
            if told["parent_header"].get("msg_id") != own:
                continue
            meanwhile(told)
            if kind in ("error", "stream", "display_data", "execute_result"):
                outputs.append({"output_type": kind, **said})
            elif kind == "status" and said["execution_state"] == "idle":
                break
        return self._status_of(own), outputs

    def _status_of(self, id: str) -> str:
        while True:
            reply = self.client.get_shell_msg(timeout=PATIENCE)
            if reply["parent_header"].get("msg_id") == id:
                return reply["content"]["status"]

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def a_notebook(cells: list[tuple[str, str, str]]) -> dict:
    """A notebook of (kind, id, source)."""
    made = []
    for kind, id, source in cells:
        more = {"outputs": [], "execution_count": None} if kind == "code" else {}
        made.append({"cell_type": kind, "id": id, "source": source, "metadata": {}, **more})
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


LESSON = [
    ("markdown", "title", "# A lesson\n\nWords."),
    ("code", "import", "import ftlab"),
    ("markdown", "one", "## Load *it*\n```\n# no heading\n```"),
    ("code", "load", "%precision 3\nrows = [1, 2]\nn = len(rows)      # how many"),
    ("code", "show", "print(rows)"),
    ("markdown", "two", "### See [02](02_lora_math.ipynb) again\n\nMore words."),
    ("code", "again", "n += 1\nrows = rows * 2\ndel n"),
    ("code", "use", "def size():\n    return len(rows) + n\n\nsize()"),
    ("code", "late", "print(later)"),
    ("code", "define-late", "later = 1"),
    ("code", "unfinished", "rows = ("),
]  # fmt: skip


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("lesson") / "lesson.ipynb"
    file.write_text(json.dumps(a_notebook(LESSON)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def kernel(lesson) -> Iterator[Kernel]:
    made = Kernel(lesson, lesson.parent)
    yield made
    made.stop()


@pytest.fixture
def fresh(kernel) -> Kernel:
    """The kernel with ftlab imported and no other name."""
    kernel.run("%reset -f\nimport ftlab")
    return kernel


def source(id: str) -> str:
    return next(text for _, name, text in LESSON if name == id)


def lines_of(outputs: list[dict]) -> list[str]:
    """What an error output says, line by line, without colours."""
    (error,) = (each for each in outputs if each["output_type"] == "error")
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error["traceback"])).splitlines()


def text_of(outputs: list[dict]) -> str:
    parts = (output.get("text") or "\n".join(output.get("traceback", ())) for output in outputs)
    return re.sub(r"\x1b\[[\d;]*m", "", "".join(parts))


def stopper(kernel: Kernel, step: int) -> Callable[[dict], None]:
    """Presses Jupyter's stop button once, when this step is done."""
    pressed = []

    def look(message: dict) -> None:
        text = message["content"].get("text", "") if message["msg_type"] == "stream" else ""
        if re.search(rf"step {step}\b", text) and not pressed:
            pressed.append(kernel.manager.interrupt_kernel())

    return look


# --- A name from a cell that has not been run -----------------------------------------------------


@pytest.mark.parametrize(
    ("id", "heading", "line"),
    [
        ("show", "Load it", "rows = [1, 2]"),  # not the nearest of all, which stands below
        ("again", "Load it", "n = len(rows)"),
        (
            "use",
            "See 02 again",
            "rows = rows * 2",
        ),  # the nearest above, in a function too
        ("late", "See 02 again", "later = 1"),
    ],
)
def test_the_cell_to_run_first_is_named_in_one_line(fresh, id, heading, line):
    status, outputs = fresh.run(source(id), id)
    (told,) = lines_of(outputs)
    assert status == "error" and told.startswith("NameError: ")
    assert f'"{heading}"' in told and told.endswith(f": {line}")
    assert ("further down" in told) == (id == "late")


def test_a_front_end_that_sends_no_id_is_understood_by_the_code(fresh):
    (told,) = lines_of(fresh.run(source("use"))[1])
    assert told.endswith("rows = rows * 2")
    (told,) = lines_of(fresh.run("# not in the file yet\nprint(rows)")[1])
    assert told.endswith("rows = [1, 2]")


def test_running_what_is_named_first_ends_in_a_cell_that_works(fresh):
    ran = []

    def settle(id: str) -> None:
        ran.append(id)
        assert len(ran) < 10, ran
        while (done := fresh.run(source(id), id))[0] == "error":
            line = lines_of(done[1])[0].rpartition(": ")[2]
            settle(next(id for _, id, text in LESSON if f"\n{line}" in f"\n{text}"))

    settle("use")
    assert ran == ["use", "again", "load", "load"]  # "again" deletes n, which "use" needs


def test_the_whole_traceback_is_still_to_be_had(fresh):
    fresh.run(source("use"), "use")
    lines = lines_of(fresh.run("%tb")[1])
    assert len(lines) > 3 and any("return len(rows) + n" in line for line in lines)


OTHERS = {
    "another error": "1 / 0",
    "a name that no cell defines": "print(rovs)",
    "an error within another": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    print(rows)",
    "a local name": "def f():\n    print(rows)\n    rows = 1\n\nf()",
    "a name in a module": "space = {}; exec('def f(): return rows', space); space['f']()",
    "raised by hand": "raise NameError('rows is a bad name', name='rows')",
    "a syntax error": "rows = (",
    "an interrupt outside of a training": "raise KeyboardInterrupt",
    "an assertion": "assert 1 == 2, 'no'",
}  # fmt: skip


@pytest.mark.parametrize("code", OTHERS.values(), ids=OTHERS)
def test_every_other_error_looks_as_it_does_without_ftlab(kernel, code):
    """Handler out, handler in: the same text but for the numbers of the cells."""
    looks = []
    for call in ("uninstall", "install"):
        kernel.run("%reset -f\nfrom ftlab import notebook; notebook.uninstall()")
        kernel.run(f"notebook.{call}()")
        status, outputs = kernel.run(code, "use")
        lines = [re.sub(r"\d+", "#", line) for line in lines_of(outputs)]
        looks.append((status, outputs[-1]["ename"], lines))
    assert looks[0] == looks[1] and looks[0][0] == "error"
    assert len(looks[0][2]) > 1


@pytest.mark.parametrize("kept", ["", "{", "[1]", '{"cells": 7}', '{"cells": [7]}', None])
def test_a_notebook_that_cannot_be_read_leaves_the_plain_error(fresh, lesson, kept):
    before = lesson.read_text(encoding="utf-8")
    try:
        lesson.unlink() if kept is None else lesson.write_text(kept, encoding="utf-8")
        lines = lines_of(fresh.run(source("use"), "use")[1])
    finally:
        lesson.write_text(before, encoding="utf-8")
    assert len(lines) > 3 and lines[-1] == "NameError: name 'rows' is not defined"
    assert len(lines_of(fresh.run(source("use"), "use")[1])) == 1  # the handler is still there


def test_without_a_path_and_without_the_handler_the_plain_error_comes(tmp_path, fresh):
    fresh.run("from ftlab import notebook; notebook.uninstall()")
    assert len(lines_of(fresh.run(source("use"), "use")[1])) > 3
    pathless = Kernel(None, tmp_path)
    try:
        pathless.run("import ftlab")
        assert len(lines_of(pathless.run(source("use"), "use")[1])) > 3
    finally:
        pathless.stop()


def test_somebody_elses_handler_stays(fresh):
    theirs = "get_ipython().set_custom_exc((NameError,), lambda *a, **k: print('theirs'))"
    fresh.run(f"from ftlab import notebook; notebook.uninstall()\n{theirs}\nnotebook.install()")
    assert [each["text"] for each in fresh.run(source("use"), "use")[1]] == ["theirs\n"]
    fresh.run(f"get_ipython().set_custom_exc((), None); notebook.install()\n{theirs}")
    fresh.run("notebook.uninstall()")
    assert [each["text"] for each in fresh.run(source("use"), "use")[1]] == ["theirs\n"]
    fresh.run("get_ipython().set_custom_exc((), None); notebook.install()")


BINDS = [
    "a = 1",
    "a, (b, *c) = 1, (2, 3)",
    "d: int = 4",
    "import os.path",
    "import json as e",
    "from math import pi as g",
    "def h(x=1):\n    inner = x\n    return inner",
    "class K:\n    attribute = 1",
    "for i in range(3):\n    j = i",
    "m = [n for n in range(3)]",
    "q = (r := 3)",
    "with open(os.devnull) as t:\n    u = 1",
    "[v := w for w in [1]]",
    "if False:\n    pass\nelse:\n    x = 1",
    "try:\n    y = 1\nfinally:\n    z = 2",
    "aa = lambda bb: bb",
    "async def cc():\n    dd = 1",
    "ee = {ff: 1 for ff in 'ab' if (gg := ff)}",
    "while True:\n    hh = 1\n    break",
]


@given(st.lists(st.sampled_from(BINDS), max_size=8))
def test_the_names_that_a_cell_binds_are_those_that_running_it_leaves(statements):
    code = "\n".join(statements)
    space = {"os": os}
    exec(compile(code, "<cell>", "exec"), space)
    left = space.keys() - {"__builtins__", "__annotations__"}
    assert {name for name, _ in notebook.bindings(ast.parse(code))} | {"os"} == left


@given(
    st.lists(st.lists(st.sampled_from("xyz"), max_size=2), min_size=1, max_size=8),
    st.integers(0, 7),
)
def test_the_nearest_cell_above_is_taken_else_the_first_one_below(bound, here):
    here = min(here, len(bound) - 1)
    cells = []
    for place, names in enumerate(bound):
        code = "\n".join(f"{name} = {place}" for name in names)
        cells.append(notebook.Cell(str(place), code, ""))
    order = [*range(here - 1, -1, -1), *range(here + 1, len(bound))]
    wanted = next((place for place in order if "x" in bound[place]), None)
    found = notebook.nearest("x", cells, here)
    assert found == (None if wanted is None else (wanted, f"x = {wanted}"))


# --- Outside a notebook ---------------------------------------------------------------------------


def test_a_script_is_left_as_it_was():
    code = "import sys; hook = sys.excepthook\nimport ftlab\nfrom ftlab import notebook\n"
    code += "assert sys.excepthook is hook and notebook.shell() is None\n"
    code += "assert not notebook.install() and 'IPython' not in sys.modules\nprint(rows)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JPY_SESSION_NAME": "lesson.ipynb"}
    options = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.rstrip().endswith("NameError: name 'rows' is not defined")


def test_ipython_in_a_terminal_is_left_as_it_was(tmp_path):
    code = "import ftlab\nfrom ftlab import check\nassert get_ipython().custom_exceptions == ()\n"
    code += "check('00.1', ...)"
    file = tmp_path / "cell.ipy"
    file.write_text("1", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-m", "IPython", "--simple-prompt", "--colors=NoColor", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not tried yet" in done.stdout and "Button" not in done.stdout


# --- Buttons under a verdict ----------------------------------------------------------------------

EXERCISE = CELLS["00_start_here#exercise-1"]


def test_a_check_shows_what_it_showed_and_its_buttons_which_a_still_page_leaves_out(fresh):
    """Against the outputs that the notebook was committed with."""
    fresh.run("from ftlab import check")
    status, outputs = fresh.run("".join(EXERCISE["source"]))
    shown = [each["data"] for each in outputs]
    assert status == "ok" and len(shown) == 2 and VIEW not in shown[0] and VIEW in shown[1]
    cells = [{"cell_type": "code", "outputs": copy.deepcopy(outputs)}]
    (left,) = publish.still({"cells": cells})["cells"][0]["outputs"]
    committed = EXERCISE["outputs"][0]["data"]
    assert left["data"] == {kind: "".join(text) for kind, text in committed.items()}


def test_a_hint_a_solution_and_an_unknown_exercise_have_no_buttons(fresh):
    fresh.run("from ftlab import check, hint, solution")
    for call in ("hint('00.1')", "solution('00.1')", "check('00.99', 1)"):
        (output,) = fresh.run(call)[1]
        assert output["output_type"] == "execute_result" and VIEW not in output["data"]


TRAINER = """
import tempfile, time, torch
import ftlab
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 1, "vocab_size": 8}
ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 400
class Slow(TrainerCallback):
    seconds = 0.2
    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}\\n", end="", flush=True)
        time.sleep(self.seconds)
def trainer_in(folder, *callbacks, **more):
    settings = {"max_steps": 30, "logging_steps": 1, "save_strategy": "no"} | more
    args = TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return Trainer(model, args, train_dataset=ROWS, callbacks=[Slow(), *callbacks])
"""


def test_a_check_that_is_stopped_leaves_one_line_and_no_attempt(fresh):
    fresh.run("from ftlab import check\nfrom ftlab.classroom import progress")
    code = "import time\ndef mine(*_):\n    print('step 1', flush=True)\n    time.sleep(9)"
    fresh.run("before = progress.events()")
    status, outputs = fresh.run(f"{code}\ncheck('04.1', mine)", meanwhile=stopper(fresh, 1))
    assert status == "error" and len(lines_of(outputs)) == 1
    assert fresh.run("assert progress.events() == before")[0] == "ok"


# --- The live curve -------------------------------------------------------------------------------


def test_a_curve_counts_the_steps_until_it_has_a_point(fresh, tmp_path):
    """What stands in the cell, one after the other: a line that counts, then figures."""
    fresh.run(TRAINER)
    fresh.run(f"trainer = trainer_in({str(tmp_path)!r}, ftlab.LiveCurve(), logging_steps=15)")
    fresh.run("%matplotlib inline\nSlow.seconds = 0.15")
    shown = []

    def look(message: dict) -> None:
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown.append(message["content"]["data"])

    status, outputs = fresh.run("trainer.train();", meanwhile=look)
    pictures = ["image/png" in data for data in shown]
    steps = [re.findall(r"step (\d+) of 30", data.get("text/html", "")) for data in shown]
    counted = [int(found[0]) for found in steps if found]
    assert status == "ok" and pictures == sorted(pictures) and pictures[-1]
    assert counted == sorted(counted) and counted[0] > 0 and counted[-1] <= 15
    assert len([each for each in outputs if each["output_type"] == "display_data"]) == 1
    assert "held out" not in text_of(outputs)  # the table is for a terminal


# --- A training that is stopped -------------------------------------------------------------------


def test_a_stop_leaves_one_calm_line_and_training_again_works(fresh, tmp_path):
    assert fresh.run(TRAINER)[0] == "ok"
    fresh.run(f"trainer = trainer_in({str(tmp_path)!r})")
    status, outputs = fresh.run("trainer.train()", meanwhile=stopper(fresh, 4))
    (told,) = lines_of(outputs)
    assert status == "error" and "after step 4 of 30" in told and "No checkpoint" in told
    fresh.run("before = [p.clone() for p in trainer.model.parameters()]; Slow.seconds = 0")
    status, _ = fresh.run("out = trainer.train()\nassert out.global_step == 30")
    assert status == "ok"
    moved = "assert any((a != b).any() for a, b in zip(before, trainer.model.parameters()))"
    logged = "[entry['step'] for entry in trainer.state.log_history if 'loss' in entry]"
    steps = f"assert {logged} == [*range(1, 31)]"
    assert fresh.run(f"{moved}\n{steps}")[0] == "ok"


@pytest.mark.parametrize("button", ["", "ftlab.StopButton()"])
def test_with_a_checkpoint_the_line_says_how_to_go_on_and_that_works(fresh, tmp_path, button):
    """A checkpoint of an older run in the same folder is not offered."""
    fresh.run(TRAINER)
    folder = str(tmp_path / "run")
    saves = "save_strategy='steps', save_steps"
    fresh.run(f"Slow.seconds = 0; trainer_in({folder!r}, {saves}=30).train()")
    fresh.run(f"Slow.seconds = 0.2; trainer = trainer_in({folder!r}, *[{button}])")
    told = text_of(fresh.run("trainer.train()", meanwhile=stopper(fresh, 3))[1])
    assert "checkpoint-30" not in told and ("checkpoint-3" in told) == bool(button)
    fresh.run(f"trainer = trainer_in({folder!r}, *[{button}], {saves}=2)")
    told = text_of(fresh.run("trainer.train()", meanwhile=stopper(fresh, 5))[1])
    assert "Traceback" not in told and "after step 5 of 30" in told
    (call,) = re.findall(r"train\(resume_from_checkpoint=\"[^\"]+\"\)", told)
    assert call.endswith(f'checkpoint-{5 if button else 4}")')
    status, outputs = fresh.run(f"Slow.seconds = 0; trainer.{call}")
    steps = re.findall(r"step (\d+)", text_of(outputs))
    assert status == "ok" and [*map(int, steps)] == [*range(6 if button else 5, 31)]

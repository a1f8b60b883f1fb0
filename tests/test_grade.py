"""ftlab.exercises.grading: what a teacher learns of a notebook, whatever its cells do to their process."""

import ast
import json
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solved import solved, stubs

from ftlab.exercises import exercises
from ftlab.exercises import grading as grade
from ftlab.exercises.cells import Cell, asked, needed, read
from ftlab.exercises.grading import Sheet
from notebooks import NOTEBOOKS, ROOT

SETUP = "from ftlab import check"
STUB = "def my_expected_tokens(alpha, gamma):\n    ...\n\ncheck('09.1', my_expected_tokens)"
RIGHT = solved(STUB)
WRONG = STUB.replace("...", "return alpha")
COLOURS = solved("def my_colours(tokens):\n    ...\n\ncheck('01.5', my_colours)")
ENOUGH = 120  # seconds for a cell


def written(path: Path, *cells: str) -> Path:
    """A notebook of these code cells, with a text before them."""
    made = [{"cell_type": "markdown", "source": ["check('04.3', x) is prose here"], "metadata": {}}]
    for code in cells:
        made.append({"cell_type": "code", "source": code.splitlines(keepends=True), "outputs": [],
                     "metadata": {}, "execution_count": None})  # fmt: skip
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def graded(folder: Path, *cells: str) -> Sheet:
    """The Sheet of x.ipynb in this folder, with these cells."""
    return grade.grade(written(folder / "x.ipynb", *cells), ENOUGH)


def states(sheet: Sheet) -> dict[str, str]:
    return {one.exercise: one.state for one in sheet.grades}


def words(sheet: Sheet, exercise: str) -> str:
    (found,) = [one for one in sheet.grades if one.exercise == exercise]
    return "\n".join(found.words)


def soon(happens) -> bool:
    """Does it happen within a minute?"""
    for _ in range(600):
        if happens():
            return True
        time.sleep(0.1)
    return False


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- What the learner wrote -----------------------------------------------------------------------


def test_right_not_yet_with_the_likely_slip_and_not_tried(tmp_path):
    """A mask of ones alone is one of the slips that the check of 01.5 knows by name."""
    whole = "def my_colours(tokens):\n    return [1 for token in tokens]\ncheck('01.5', my_colours)"
    sheet = grade.grade(written(tmp_path / "09_mine.ipynb", SETUP, RIGHT, whole), ENOUGH)
    others = dict.fromkeys(exercises("09").keys() - {"09.1"}, "not tried")
    assert states(sheet) == {"09.1": "right", "01.5": "not yet"} | others
    assert "wanted: " in words(sheet, "01.5") and "everything counts" in words(sheet, "01.5")
    assert sheet.right == 1 and sheet.seconds > 0 and not sheet.remarks


def test_a_stub_is_not_tried_and_the_last_attempt_counts(tmp_path):
    cells = [SETUP, STUB, WRONG, RIGHT]
    for count, state in ((2, "not tried"), (3, "not yet"), (4, "right")):
        assert states(graded(tmp_path, *cells[:count])) == {"09.1": state}
    assert states(graded(tmp_path, *cells, WRONG)) == {"09.1": "not yet"}


def test_a_solved_and_an_untouched_notebook_of_the_course(tmp_path):
    path = shutil.copy(ROOT / "notebooks" / "08_modern_stack.ipynb", tmp_path / "08_mine.ipynb")
    before = Path(path).read_bytes()
    numbers = exercises("08").keys()
    untouched = states(grade.grade(Path(path), exercises_only=True))
    assert untouched == dict.fromkeys(numbers, "not tried")
    assert Path(path).read_bytes() == before and [*tmp_path.iterdir()] == [Path(path)]
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and stubs(source):
            cell["source"] = solved(source)
    Path(path).write_text(json.dumps(notebook))
    assert states(grade.grade(Path(path), exercises_only=True)) == dict.fromkeys(numbers, "right")


def test_all_cells_of_a_notebook_of_the_course_run_here_as_in_jupyter():
    """Widgets, figures and all: a cell that raised would be a remark."""
    sheet = grade.grade(ROOT / "notebooks" / "11_interview_prep.ipynb")
    assert sheet.grades and not sheet.remarks and not sheet.error
    assert set(states(sheet).values()) == {"not tried"}


def test_cells_run_as_in_jupyter(tmp_path):
    """IPython's lines, a top-level await, `../data`, a file beside it and a module of its own."""
    (tmp_path / "beside.txt").write_text("1")
    (tmp_path / "own.py").write_text("ONE = 1")
    jupyter = (
        "%matplotlib inline\nimport asyncio, own, pathlib\nhere = !echo 1\nawait asyncio.sleep(0)\n"
        "assert here == ['1'] and own.ONE == 1 and __name__ == '__main__'\n"
        "assert pathlib.Path('../data/ask/train.jsonl').is_file()\n"
        "pathlib.Path('beside.txt').write_text(pathlib.Path('beside.txt').read_text() + '1')\n"
        "pathlib.Path('made').mkdir()\ndisplay(here)\nalive = True"
    )
    sheet = graded(tmp_path, SETUP, jupyter, f"assert alive\n{RIGHT}")
    assert states(sheet) == {"09.1": "right"} and not sheet.remarks
    assert (tmp_path / "beside.txt").read_text() == "1" and not (tmp_path / "made").exists()


def test_the_learners_progress_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLAB_PROGRESS", str(tmp_path / "progress" / "p.sqlite"))
    assert states(graded(tmp_path, SETUP, RIGHT)) == {"09.1": "right"}
    assert not (tmp_path / "progress").exists()


# --- What breaks ----------------------------------------------------------------------------------

BREAKS = {  # the body of an exercise, or what stands before it -> what is said of it
    "raises": ("1 / 0", "ZeroDivisionError"),
    "syntax error": ("def f(:\n    pass", "SyntaxError in line 1"),
    "leaves": ("import sys; sys.exit(0)", "SystemExit"),
    "exit": ("import os; os._exit(3)", "exit code 3"),
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory"),
    "asks": ("input('your name')", "EOFError"),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("exercises_only", [False, True])
def test_what_one_exercise_breaks_does_not_hide_the_others(tmp_path, how, exercises_only):
    """Nor what others need from before: here a constant, which the new process makes again."""
    broken, said = BREAKS[how]
    uses = COLOURS.replace("check(", "assert constant == 7\ncheck(")
    path = written(tmp_path / "x.ipynb", SETUP, "constant = 7", f"{broken}\n{RIGHT}", uses)
    sheet = grade.grade(path, ENOUGH, exercises_only)
    assert states(sheet) == {"09.1": "not yet", "01.5": "right"}
    assert said in words(sheet, "09.1")


LOOPS = {
    "plain": "while True: pass",
    "swallows the interrupt": "while True:\n    try: input()\n    except BaseException: pass",
    "checks again and again": "while True: check('09.1', ...)",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_an_endless_loop_is_stopped_and_what_stood_before_is_still_there(tmp_path, loop):
    uses = f"assert constant == 7\n{COLOURS}"
    path = written(tmp_path / "x.ipynb", SETUP, "constant = 7", f"{LOOPS[loop]}\n{RIGHT}", uses)
    sheet = grade.grade(path, 6)
    assert states(sheet)["09.1"] != "right" and states(sheet)["01.5"] == "right"
    assert "endless loop" in " ".join([words(sheet, "09.1"), *sheet.remarks])


def test_a_cell_without_an_exercise_that_breaks_is_named(tmp_path):
    exits = "import os\nos._exit(1)\ntable = 1"
    sheet = graded(tmp_path, SETUP, exits, f"table\n{RIGHT}", COLOURS)
    assert states(sheet) == {"09.1": "not yet", "01.5": "right"}
    assert "'table'" in words(sheet, "09.1") and len(sheet.remarks) == 1
    assert "import os" in sheet.remarks[0] and "exit code 1" in sheet.remarks[0]


def test_after_a_death_only_what_the_others_need_runs_again(tmp_path):
    """A cell that counts how often it ran stands for a training run of minutes."""
    count = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    path = written(tmp_path / "x.ipynb", SETUP, count, f"import os\nos._exit(0)\n{RIGHT}", COLOURS)
    assert states(grade.grade(path, ENOUGH)) == {"09.1": "not yet", "01.5": "right"}
    assert (tmp_path / "ran").read_text() == "x"


def test_nothing_that_a_cell_started_lives_on(tmp_path):
    starts = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(command)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))"
    )
    graded(tmp_path, SETUP, starts, RIGHT)
    assert soon(lambda: not running(int((tmp_path / "pid").read_text())))


def test_a_cell_does_not_outlive_a_grader_that_is_killed(tmp_path):
    pid = tmp_path / "pid"
    runs = f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n{LOOPS['plain']}"
    written(tmp_path / "x.ipynb", f"{runs}\n{RIGHT}")
    command = [sys.executable, "-m", "ftlab.grade", str(tmp_path)]
    grader = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert soon(lambda: pid.exists() and pid.read_text())
    grader.kill()
    grader.wait()
    assert soon(lambda: not running(int(pid.read_text())))


def test_a_python_that_cannot_start_is_said(tmp_path, capsys, monkeypatch):
    written(tmp_path / "x.ipynb", SETUP, RIGHT)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    code, text = main(tmp_path, capsys=capsys)
    assert code == 2 and "ftlab.doctor" in text


# --- Which exercises a file has -------------------------------------------------------------------


def test_a_check_in_a_loop_is_found_when_it_runs_and_one_of_no_exercise_is_named(tmp_path):
    loop = "for q, mine in {'09.1': lambda *a: 0, '09.77': len}.items():\n    check(q, mine)"
    sheet = graded(tmp_path, SETUP, loop)
    assert states(sheet) == {"09.1": "not yet"} and "09.77" in sheet.remarks[0]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("check('09.1', f)", ["09.1"]),
        ("import ftlab; ftlab.check('01.5', f)\ncheck('05.1', g)", ["01.5", "05.1"]),
        ("# check('09.1', f)\nhint('09.1')", []),
        ("def f(:\n  check('09.1', f)  # check('01.5', f)", ["09.1"]),
        ("data.check('09.1', f)\nre_check('09.1')", []),
    ],
)
def test_the_exercises_that_a_cell_checks(code, found):
    assert sorted(asked(code)) == found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_in_each_notebook_of_the_course_all_exercises_are_found_in_its_cells(name):
    cells = read(ROOT / "notebooks" / f"{name}.ipynb")
    asked = {q for cell in cells for q in cell.asks}
    assert asked and asked >= exercises(name[:2]).keys()
    assert grade.expected(Path(f"{name}.ipynb"), cells).keys() == asked


# --- Which cells an exercise needs ----------------------------------------------------------------


def cells_of(*codes: str) -> list[Cell]:
    return [Cell(code, ()) for code in codes]


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        (["a = 1", "b = 2", "c = a"], [0, 2]),
        (["a = 1", "a = 2", "c = a"], [1, 2]),
        (["a = 1", "a += 1", "c = a"], [0, 1, 2]),
        (["a = 1", "if x:\n    a = 2", "c = a"], [0, 1, 2]),
        (["a = []", "a.append(1)", "c = a"], [0, 1, 2]),
        (["a = {}", "a['x'] = 1", "print(a)", "c = a"], [0, 1, 3]),
        (["import m", "m.train()", "c = m.x"], [0, 2]),
        (["def f():\n    return g()", "def g():\n    return 1", "c = f()"], [0, 1, 2]),
        (["def f(a):\n    return a", "a = 1", "c = f(2)"], [0, 2]),
        (["a = 1", "c = [a for a in range(3)]"], [1]),
        (["from m import *", "c = 1"], [0, 1]),
        (["class A:\n    def f(self):\n        return y", "y = 1", "c = A().f()"], [0, 1, 2]),
        (["import a", "a = 1", "a.f()", "c = a"], [1, 2, 3]),
        (["y = 1", "class A:\n    x = y", "c = A"], [0, 1, 2]),
        (["%%bash\na = 1", "!a = 1", "a =", "c = 1"], [3]),
        (["with open(x) as a:\n    b = 1", "c = b"], [0, 1]),
        (["model = 1", "shuffle(model)", "c = model"], [0, 1, 2]),
    ],
)
def test_the_cells_that_a_cell_needs_by_hand(codes, wanted):
    assert needed(cells_of(*codes), [len(codes) - 1]) == wanted


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_what_runs_without_the_cells_left_out_gives_the_same(seed, tmp_path_factory):
    """Random programs over five names, run whole and in the cells that the last one needs."""
    program = tmp_path_factory.getbasetemp() / "program.py"
    rng, names = random.Random(seed), "abcde"
    codes = [f"{name} = [{place}]" for place, name in enumerate(names)]
    forms = (
        "{x} = {y} + [{n}]", "{x} += {y}", "{x}.append({n})", "{x}[0] = len({y})",
        "def f():\n    return {x} + {y}",
        "for {x} in [{y}, {y} + [{n}]]:\n    pass", "{x} = [{y} for {y} in {x}]", "{x} = f()",
        "{x}.extend(f())",
        "if {y} == {x}:\n    {y} = [{n}]", "import math as {x}\n{x} = [{n}]",
    )  # fmt: skip
    codes.insert(0, "def f():\n    return [0]")
    for n in range(rng.randrange(1, 12)):
        x, y = rng.sample(names, 2)
        codes.append(rng.choice(forms).format(x=x, y=y, n=n))
    codes.append(f"result = {rng.choice(names)}")

    def result(of: list[str]) -> list[int]:
        program.write_text("\n".join(of))
        return runpy.run_path(str(program))["result"]

    some = [codes[i] for i in needed(cells_of(*codes), [len(codes) - 1])]
    assert result(some) == result(codes)


# --- The command ----------------------------------------------------------------------------------


def main(*arguments, capsys) -> tuple[int, str]:
    try:
        code = grade.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out or captured.err


def test_a_folder_is_one_table_and_the_exit_code_says_whether_all_is_right(tmp_path, capsys):
    written(tmp_path / "anna.ipynb", SETUP, RIGHT)
    (tmp_path / "more").mkdir()
    for hidden in (".ipynb_checkpoints", "runs"):
        (tmp_path / hidden).mkdir()
        written(tmp_path / hidden / "old.ipynb", SETUP, WRONG)
    code, text = main(tmp_path, capsys=capsys)
    assert code == 0 and "anna.ipynb" in text and "old.ipynb" not in text and "1 of 1" in text
    written(tmp_path / "more" / "bert.ipynb", SETUP, WRONG)
    written(tmp_path / "more" / "notes.ipynb", "print(1)")
    code, text = main(tmp_path, capsys=capsys)
    assert code == 1 and "1 of 2" in text and "got: " in text
    lines = text.splitlines()
    assert [line for line in lines if "notes.ipynb" in line and "no exercise" in line]
    code, told = main("--json", "--exercises-only", tmp_path, capsys=capsys)
    files = {Path(one["file"]).name: one["grades"] for one in json.loads(told)["files"]}
    assert code == 1 and files["notes.ipynb"] == []
    assert [files[name][0]["state"] for name in ("anna.ipynb", "bert.ipynb")] == [
        "right",
        "not yet",
    ]
    assert (json.loads(told)["right"], json.loads(told)["exercises"]) == (1, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "wanted a Jupyter notebook"),
        (b'{"cells": [{"cell_type": "co', "cut off"),
        (b"check('09.1', f)", "wanted a Jupyter notebook"),
        (b"\xff\xfe\x00", "wanted a Jupyter notebook"),
        (b'{"worksheets": []}', "format 3"),
        (b'{"cells": 7}', "list of cells"),
        (b'[{"cells": []}]', "list of cells"),
    ],
)
def test_a_file_that_is_no_notebook_is_named_and_others_are_graded(tmp_path, capsys, content, said):
    (tmp_path / "bad.ipynb").write_bytes(content)
    written(tmp_path / "good.ipynb", SETUP, RIGHT)
    code, text = main(tmp_path / "bad.ipynb", tmp_path / "good.ipynb", capsys=capsys)
    (line,) = [line for line in text.splitlines() if "bad.ipynb" in line]
    assert code == 2 and said in line and "1 of 1 exercises right" in text


def test_what_cannot_be_graded_has_its_own_exit_code(tmp_path, capsys):
    code, text = main(tmp_path / "missing.ipynb", capsys=capsys)
    assert code == 2 and "missing.ipynb" in text
    code, text = main(tmp_path, capsys=capsys)
    assert code == 2 and ".ipynb" in text
    code, text = main(written(tmp_path / "x.ipynb", "print(1)"), capsys=capsys)
    assert code == 2 and "no exercise" in text
    code, text = main("--seconds", "-1", tmp_path, capsys=capsys)
    assert code == 2 and "above 0" in text


def test_the_help_says_that_it_runs_the_learners_code():
    command = [sys.executable, "-m", "ftlab.grade", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "RUNS THE LEARNER'S CODE" in said
    options = {word.strip("[],") for word in said.split() if word.strip("[]").startswith("--")}
    assert options >= {"--json", "--seconds", "--exercises-only"}


def test_the_name_of_the_module_is_not_that_of_a_function():
    """Importing ftlab.check would replace the function `check`."""
    tree = ast.parse((ROOT / "ftlab" / "__init__.py").read_text("utf-8"))
    everyday = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert "check" in everyday and "grade" not in everyday

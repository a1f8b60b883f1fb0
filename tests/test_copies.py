"""tools/copies.py and `make lab`: the learner's copies are made once, whole, and never touched.

Each test works in a folder of its own that stands for the repository, with a home for Jupyter's
signatures. Where signatures are not the question, none are made: that takes a second each time.
"""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.sign import NotebookNotary
from scripts import script
from solved import solved

from ftlab.exercises import grading
from notebooks import NOTEBOOKS, ROOT

copies = script("tools/copies.py")


def notebook(*code: str, text: str = "# Title", ran: bool = True) -> dict:
    """A notebook with a text and these code cells, as it was run, or not yet."""
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": [text]}]
    for number, source in enumerate(code, 1):
        output = {"output_type": "stream", "name": "stdout", "text": [f"{number}\n"]}
        cells.append({
            "cell_type": "code", "id": f"c{number}", "metadata": {"tags": ["t"]},
            "source": source.splitlines(keepends=True), "outputs": [output] * ran,
            "execution_count": number if ran else None,
        })  # fmt: skip
    return {"cells": cells, "metadata": {"k": 1}, "nbformat": 4, "nbformat_minor": 5}


def write(path: Path, content: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository with the lessons 00, 04 and 09, and tools/copies.py."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "home"))
    folder = tmp_path / "repository"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "copies.py", folder / "tools")
    for name in ("00_start", "04_dpo", "09_serve"):
        write(folder / "notebooks" / f"{name}.ipynb", notebook(f"print('{name}')", "1 + 1"))
    return folder


TOOL = [sys.executable, "tools/copies.py"]


def run(root: Path, *arguments: str) -> SimpleNamespace:
    """What the tool returns and says, without signatures."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(copies, "trust", lambda notebooks: None)
        code = copies.main(arguments, root)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def names(root: Path) -> set[str]:
    """All that lies in my/, hidden files too."""
    return {path.name for path in (root / "my").iterdir()}


LESSONS = {"00_start.ipynb", "04_dpo.ipynb", "09_serve.ipynb"}


# --- The first time, the second, after an update --------------------------------------------------


def test_the_first_time_each_notebook_is_copied_without_outputs(root):
    done = run(root)
    assert done.returncode == 0 and done.stderr == ""
    assert "my/" in done.stdout and all(name.split(".")[0] in done.stdout for name in LESSONS)
    assert names(root) == LESSONS
    for name in LESSONS:
        copy, source = read(root / "my" / name), read(root / "notebooks" / name)
        assert copy["cells"] == notebook(f"print('{name[:-6]}')", "1 + 1", ran=False)["cells"]
        assert copy["metadata"].items() >= source["metadata"].items()


def test_the_second_time_nothing_is_said_and_nothing_is_written(root):
    run(root)
    mine = write(root / "my" / "04_dpo.ipynb", notebook("my lines"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in mine.parent.iterdir()}
    done = run(root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    assert names(root) == LESSONS


def test_an_update_brings_new_lessons_leaves_old_copies_and_says_what_is_newer(root):
    run(root)
    mine = {path.name: path.read_bytes() for path in (root / "my").iterdir()}
    write(root / "notebooks" / "04_dpo.ipynb", notebook("other code"))
    write(root / "notebooks" / "09_serve.ipynb", notebook("print('09_serve')", "1 + 1", text="new"))
    write(root / "notebooks" / "11_agents.ipynb", notebook("1"))
    (root / "notebooks" / "00_start.ipynb").unlink()
    done = run(root)
    assert done.returncode == 0 and names(root) == LESSONS | {"11_agents.ipynb"}
    assert {name: (root / "my" / name).read_bytes() for name in mine} == mine
    (newer,) = [line for line in done.stdout.splitlines() if "make fresh" in line]
    assert "04_dpo" in newer and "NB=04" in newer  # the text of 09 alone has changed
    run(root, "--fresh", "04")
    assert run(root).stdout == ""


def test_a_lesson_that_was_split_gets_its_new_names_beside_the_old_one(root):
    run(root)
    (root / "notebooks" / "09_serve.ipynb").rename(root / "notebooks" / "09_serve_and_scale.ipynb")
    write(root / "notebooks" / "09_serve.ipynb", notebook("new 09"))
    run(root)
    assert "09_serve_and_scale.ipynb" in names(root)
    assert "new 09" not in (root / "my" / "09_serve.ipynb").read_text()


# --- make fresh -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["04", "4", "04_dpo", "04_dpo.ipynb", " 04 "])
def test_a_fresh_copy_stands_beside_the_old_ones(root, which):
    run(root)
    mine = write(root / "my" / "04_dpo.ipynb", notebook("my lines")).read_bytes()
    for new in ("04_dpo-2.ipynb", "04_dpo-3.ipynb"):
        done = run(root, "--fresh", which)
        assert done.returncode == 0 and f"my/{new}" in done.stdout
        fresh = read(root / "my" / new)
        assert fresh["cells"] == notebook("print('04_dpo')", "1 + 1", ran=False)["cells"]
    assert (root / "my" / "04_dpo.ipynb").read_bytes() == mine
    assert names(root) == LESSONS | {"04_dpo-2.ipynb", "04_dpo-3.ipynb"}


def test_the_first_copy_of_a_notebook_may_be_a_fresh_one(root):
    assert run(root, "--fresh", "04").returncode == 0
    assert names(root) == {"04_dpo.ipynb"}


@pytest.mark.parametrize("which", ["99", "", "44", "4 4", "../04_dpo", "dpo", "*", "²"])
def test_a_notebook_that_is_not_there_is_refused_with_those_that_are(root, which):
    run(root)
    done = run(root, "--fresh", which)
    assert done.returncode == 1 and names(root) == LESSONS
    assert repr(which) in done.stderr and "00, 04, 09" in done.stderr


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--fresh", "04"]])
def test_a_file_in_the_place_of_the_folder_stays_and_is_named(root, arguments):
    (root / "my").write_text("notes")
    done = run(root, *arguments)
    assert done.returncode == 1
    assert "my: got a file" in done.stderr and (root / "my").read_text() == "notes"


def test_a_link_that_leads_nowhere_is_named(root):
    (root / "my").symlink_to(root / "gone")
    done = run(root)
    assert done.returncode == 1 and "broken link" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--fresh", "04"]])
def test_a_folder_that_cannot_be_written_is_named(root, arguments):
    (root / "my").symlink_to("/proc")  # where not even root can write
    done = run(root, *arguments)
    assert done.returncode == 1 and "can't be written" in done.stderr


def test_a_folder_that_is_complete_need_not_be_written(root):
    run(root)
    (root / "my").chmod(0o555)
    done = run(root)
    (root / "my").chmod(0o755)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


BROKEN = {
    "empty": b"",
    "cut off": json.dumps(notebook("1")).encode()[:-20],
    "a list": b"[]",
    "no cells": b'{"metadata": {}}',
    "cells are a number": b'{"cells": 3}',
    "a cell is a number": b'{"cells": [3]}',
    "a source is a number": b'{"cells": [{"cell_type": "code", "source": 3}]}',
    "metadata is a number": b'{"cells": [], "metadata": 3}',
    "not text": b"\xff\xfe\x00",
    "half merged": b'<<<<<<< HEAD\n{"cells": []}\n=======\n{"cells": []}\n>>>>>>> main\n',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_notebook_that_cannot_be_read_is_named_and_the_others_are_copied(root, content):
    broken = root / "notebooks" / "04_dpo.ipynb"
    broken.write_bytes(content)
    done = run(root)
    assert done.returncode == 1 and names(root) == LESSONS - {"04_dpo.ipynb"}
    assert "04_dpo.ipynb: not a notebook" in done.stderr
    assert run(root, "--fresh", "04").returncode == 1
    assert broken.read_bytes() == content


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_copy_that_cannot_be_read_is_the_learners_and_stays(root, content):
    run(root)
    (root / "my" / "04_dpo.ipynb").write_bytes(content)
    done = run(root)
    assert done.returncode == 0
    assert (root / "my" / "04_dpo.ipynb").read_bytes() == content


def limited(action: signal.Handlers):
    """What a child does first: no file may pass 1,000 bytes; who tries is killed, or told."""

    def first() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, action)

    return first


START = """import runpy, signal
signal.signal(signal.SIGXFSZ, signal.{})
runpy.run_path("tools/copies.py", run_name="__main__")"""


@pytest.mark.parametrize("arguments", [[], ["--fresh", "09"]])
def test_a_kill_in_the_middle_of_a_write_leaves_nothing_that_passes_for_a_copy(root, arguments):
    write(root / "notebooks" / "09_serve.ipynb", notebook("x = 1\n" * 1000))
    command = [sys.executable, "-c", START.format("SIG_DFL"), *arguments]
    killed = subprocess.run(command, cwd=root, preexec_fn=limited(signal.SIG_DFL))
    assert killed.returncode == -signal.SIGXFSZ
    halves = names(root)
    assert halves and not [name for name in halves if not name.startswith(".")]
    assert run(root).returncode == 0 and names(root) - halves == LESSONS
    whole = read(root / "my" / "09_serve.ipynb")["cells"][1]["source"]
    assert "".join(whole) == "x = 1\n" * 1000
    for name in halves:  # an hour later they are nobody's
        os.utime(root / "my" / name, (time.time() - 7200,) * 2)
    assert run(root, "--fresh", "00").returncode == 0
    assert names(root) == LESSONS | {"00_start-2.ipynb"}


def test_a_full_disk_is_said_and_leaves_nothing(root):
    write(root / "notebooks" / "09_serve.ipynb", notebook("x = 1\n" * 1000))
    command = [sys.executable, "-c", START.format("SIG_IGN")]
    options = {"preexec_fn": limited(signal.SIG_IGN), "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=root, **options)
    assert done.returncode == 1 and "can't be written" in done.stderr and names(root) == set()


def test_killed_at_any_moment_the_next_call_completes_the_copies(root):
    wanted = {}
    for path in ROOT.glob("notebooks/*.ipynb"):
        shutil.copy(path, root / "notebooks")
    for source in (root / "notebooks").iterdir():
        wanted[source.name] = copies.stripped(read(source))["cells"]
    for _ in range(5):
        shutil.rmtree(root / "my", ignore_errors=True)
        child = subprocess.Popen(TOOL, cwd=root)
        time.sleep(random.uniform(0.05, 0.8))
        child.kill()
        child.wait()
        for path in root.glob("my/[!.]*"):
            assert read(path)["cells"] == wanted[path.name]
        assert run(root).returncode == 0
        found = {path.name: read(path)["cells"] for path in root.glob("my/[!.]*")}
        assert found == wanted


def test_two_at_once_do_not_disturb_each_other(root):
    both = [subprocess.Popen(TOOL, cwd=root, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(child.communicate()[1], child.returncode) for child in both] == [(b"", 0)] * 2
    assert names(root) == LESSONS and all(read(root / "my" / name) for name in LESSONS)


# --- What a copy is -------------------------------------------------------------------------------

SOURCES = st.lists(st.text(max_size=20), max_size=4)


@given(code=SOURCES, text=st.text(max_size=20))
def test_a_copy_has_everything_but_what_a_run_leaves(code, text):
    ran = notebook(*code, text=text)
    before = json.dumps(ran)
    copy = copies.stripped(ran)
    assert json.dumps(ran) == before
    assert copy["cells"] == notebook(*code, text=text, ran=False)["cells"]
    mark = copy["metadata"].pop("ftlab")
    assert copy["metadata"] == ran["metadata"] and mark


@given(code=SOURCES, other=SOURCES)
def test_the_mark_of_a_copy_stands_for_its_code_alone(code, other):
    mark = copies.code_digest(notebook(*code))
    assert mark == copies.code_digest(notebook(*code, text="other", ran=False))
    assert (mark == copies.code_digest(notebook(*other))) == (code == other)


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_copy_of_a_lesson_is_a_valid_notebook_that_never_ran(path):
    copy = copies.stripped(read(path))
    nbformat.validate(copy)
    assert copies.code_digest(copy) == copies.code_digest(read(path))
    ran = [cell for cell in copy["cells"] if cell.get("outputs") or cell.get("execution_count")]
    assert ran == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_from_a_copy_to_what_they_lead_to_from_the_lesson(name):
    """Beside a copy lie other copies and runs/; whatever else a link names is reached by ../."""
    for cell in NOTEBOOKS[name]:
        for link in re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"])):
            place = link.partition("#")[0]
            if cell["cell_type"] != "markdown" or not place or "://" in place:
                continue
            beside = place.removesuffix(".ipynb") in NOTEBOOKS or place.startswith("runs/")
            above = place.startswith("../") and (ROOT / "notebooks" / place).exists()
            assert beside or above, f"{name}#{cell['id']}: {link}"


def test_copies_and_lessons_are_trusted_and_what_others_put_there_is_not(root):
    other = write(root / "my" / "99_from_somebody.ipynb", notebook("1"))
    for arguments in ([], ["--fresh", "04"]):
        subprocess.run([*TOOL, *arguments], cwd=root, check=True)
    with NotebookNotary(data_dir=os.environ["JUPYTER_DATA_DIR"]) as notary:
        trusted = {
            str(path.relative_to(root)): notary.check_signature(nbformat.read(path, 4))
            for path in root.glob("*/*.ipynb")
        }
    assert trusted.pop(str(other.relative_to(root))) is False
    assert len(trusted) == 7 and all(trusted.values())


def test_a_solved_copy_is_graded_where_it_lies(root):
    stub = "def my_expected_tokens(alpha, gamma):\n    ...\n\ncheck('09.1', my_expected_tokens)"
    setup = "from pathlib import Path\nfrom ftlab import check\nassert Path('../data/ask').is_dir()"
    write(root / "notebooks" / "09_serve.ipynb", notebook(setup, stub))
    run(root)
    copy = read(root / "my" / "09_serve.ipynb")
    copy["cells"][2]["source"] = solved(stub)
    mine = write(root / "my" / "09_serve.ipynb", copy).read_bytes()
    sheet = grading.grade(root / "my" / "09_serve.ipynb")
    assert sheet.error == "" and sheet.remarks == []
    assert {one.exercise for one in sheet.grades if one.state == grading.RIGHT} == {"09.1"}
    assert (root / "my" / "09_serve.ipynb").read_bytes() == mine


# --- make -----------------------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "--assume-old=.venv/ready", f"BIN={Path(sys.executable).parent}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def repository(root) -> Path:
    shutil.copy(ROOT / "Makefile", root)
    shutil.copy(ROOT / ".gitignore", root)
    return root


def test_make_lab_copies_first_and_opens_the_first_copy(repository):
    lines = make(repository, "--dry-run", "lab").stdout.splitlines()
    (copied,) = [number for number, line in enumerate(lines) if "tools/copies.py" in line]
    (opened,) = [number for number, line in enumerate(lines) if line.endswith(".ipynb")]
    assert copied < opened and lines[opened].endswith(" my/00_start_here.ipynb")


def test_make_fresh_makes_a_copy_or_says_which_there_are(repository):
    done = make(repository, "fresh", "NB=04")
    assert done.returncode == 0 and names(repository) == {"04_dpo.ipynb"}
    for unknown in (["NB=99"], []):
        done = make(repository, "fresh", *unknown)
        assert done.returncode and "00, 04, 09" in done.stderr
    assert names(repository) == {"04_dpo.ipynb"}


def test_make_clean_leaves_the_copies(repository):
    make(repository, "fresh", "NB=04")
    (repository / "my" / "runs").mkdir()
    assert make(repository, "clean").returncode == 0
    assert names(repository) == {"04_dpo.ipynb"}


def test_git_does_not_see_the_copies(repository):
    run(repository)
    git = ["git", "-C", str(repository)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    seen = subprocess.run([*git, "status", "--short", "--untracked-files=all"], capture_output=True)
    assert b"notebooks/04_dpo.ipynb" in seen.stdout and b"my/" not in seen.stdout

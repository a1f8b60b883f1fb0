"""`python -m ftlab.grade FILE_OR_FOLDER ...`: which exercises of a learner's notebooks are right.

The code cells run from top to bottom in a process of their own, as in Jupyter, and each verdict of
`check` is written down as it is given. A cell that raises does not stop those after it. A cell that
ends the process, or is too slow, costs its own exercises alone: the others go on in a new process,
with the cells that they need. `needed` says which these are. `--exercises-only` runs no others.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from ftlab.exercises import exercises
from ftlab.exercises.cells import ANY, Cell, needed, read
from ftlab.paths import DATA

RIGHT, NOT_YET, NOT_TRIED = "right", "not yet", "not tried"
SECONDS = 600.0  # for one cell
COPIED = 50_000_000  # bytes up to which a file of the learner's folder is copied, and not linked
OF_THE_STORE = ("done", "not stored")  # lines of a verdict that speak of the learner's progress


@dataclass
class Grade:
    """The state of one exercise (right, not yet, not tried), and in words why."""

    exercise: str
    title: str = ""
    state: str = NOT_TRIED
    words: list[str] = field(default_factory=list)


@dataclass
class Sheet:
    """What came out for one file: its grades, or an error if it is no notebook; remarks."""

    file: str
    grades: list[Grade] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> int:
        return sum(grade.state == RIGHT for grade in self.grades)


# --- The process that runs the cells --------------------------------------------------------------


def work(descriptor: int) -> None:
    """What the process does: it runs the cells that it is sent and tells what came of them."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    from ftlab import exercises as book

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None) -> None:
            """%matplotlib asks for it; without a window there is nothing to do."""

    os.set_inheritable(descriptor, False)
    pipe, main = Connection(descriptor), os.getpid()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def tell(**message) -> None:
        if os.getpid() == main:  # a fork of it has nothing to say
            pipe.send_bytes(json.dumps(message, default=str).encode("utf-8", "replace"))

    def recorded(q, thing, check=book.check):
        verdict = check(q, thing)
        tell(exercise=q, state=verdict.state, lines=verdict.lines)
        return verdict

    book.check = functools.wraps(book.check)(recorded)
    config = Config()
    config.HistoryManager.enabled = False
    shell = Shell.instance(config=config)
    tell(ready=True)
    while True:
        try:
            code = pipe.recv_bytes().decode()
        except EOFError:
            return
        result = shell.run_cell(code)
        error = result.error_before_exec or result.error_in_exec
        tell(raised=_said(error) if error else "")


def _end_with(grader: int) -> None:
    """Kills this process and what it started when the grader is no more: a cell may be endless."""
    while os.getppid() == grader:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _said(error: BaseException) -> str:
    """An error in a line: of a syntax error the line of the cell and its text too."""
    if isinstance(error, SyntaxError) and error.lineno:
        shown = f": {error.text.strip()[:80]}" if error.text else ""
        return f"raised {type(error).__name__} in line {error.lineno}: {error.msg}{shown}"
    return f"raised {type(error).__name__}: {str(error)[:300]}".rstrip(": ")


@dataclass
class Outcome:
    """What came of a cell: verdicts in their order, and what went wrong."""

    verdicts: list[dict] = field(default_factory=list)
    fault: str = ""
    ended: bool = False  # the process is no more


class Worker:
    """A process that runs cells one after the other and keeps what they bind."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        package = str(Path(__file__).resolve().parent.parent.parent)
        own = {
            "FTLAB_PROGRESS": str(scratch / "progress.sqlite"),
            "IPYTHONDIR": str(scratch / "ipython"),
            "MPLBACKEND": "Agg",
            "UNSLOTH_AUTO_INSTALL": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        }
        self.pipe, theirs = Pipe()  # apart from stdin and stdout, which belong to the cells
        os.set_inheritable(theirs.fileno(), True)
        start = f"from ftlab.exercises.grading import work; work({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            cwd=folder,
            env=os.environ | own,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what its cells start ends with it
        )
        theirs.close()
        try:
            self.pipe.recv_bytes()  # it is ready
        except EOFError:
            self.kill()
            likely = "python -m ftlab.doctor says what is missing"
            raise RuntimeError(f"{sys.executable} could not start to run cells: {likely}") from None

    def run(self, code: str, seconds: float) -> Outcome:
        """The Outcome of a cell; one that takes longer ends with the process."""
        outcome, end = Outcome(), time.monotonic() + seconds
        try:
            self.pipe.send_bytes(code.encode("utf-8", "replace"))
            while time.monotonic() < end:
                if self.pipe.poll(0.1):
                    message = json.loads(self.pipe.recv_bytes())
                    if "raised" in message:
                        outcome.fault = message["raised"]
                        return outcome
                    outcome.verdicts.append(message)
                elif self.process.poll() is not None:
                    raise EOFError
            self.kill()
            outcome.fault = f"was stopped after {seconds:.0f} s: an endless loop, or raise --seconds?"
        except (EOFError, OSError):  # its end of the pipe is closed
            outcome.fault = self._why()
        outcome.ended = True
        return outcome

    def _why(self) -> str:
        """How the process came to its end."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed the connection to the grader"
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL): did the machine run out of memory?"
        if code < 0:
            return f"crashed with {signal.Signals(-code).name}"
        return f"ended the process with exit code {code}: os._exit or the like?"

    def kill(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):  # it was over
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()


def expected(path: Path, cells: Iterable[Cell]) -> dict[str, Grade]:
    """The exercises of a file: those it checks; if it is called 04_x.ipynb all of notebook 04."""
    numbers = {q for cell in cells for q in cell.asks}
    course = exercises(path.name[:2]) if re.match(r"\d\d", path.name) else {}
    known = dict(course)
    for notebook in {q[:2] for q in numbers}:
        known |= exercises(notebook)
    named = sorted((numbers & known.keys()) | course.keys())
    return {q: Grade(q, known[q].title) for q in named}


# --- Grading --------------------------------------------------------------------------------------


def grade(path: Path, seconds: float = SECONDS, exercises_only: bool = False) -> Sheet:
    """The Sheet of one notebook. It runs in a copy of its folder, beside the course's `data`.

    Neither the file, nor its `runs`, nor the learner's progress is touched.
    """
    sheet, start = Sheet(str(path)), time.monotonic()
    try:
        cells = read(path)
    except ValueError as error:
        return Sheet(str(path), error=str(error))
    found = expected(path, cells)
    if any(cell.asks for cell in cells):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            try:
                folder = copy_of(path.absolute().parent, Path(scratch))
                for cell, outcome in ran(cells, folder, seconds, exercises_only):
                    judge(cell, outcome, found, sheet.remarks)
            except (OSError, RuntimeError) as error:  # no room for the copy, no process
                sheet.error = f"not graded: {error}"
    sheet.grades = [found[q] for q in sorted(found)]
    sheet.seconds = round(time.monotonic() - start, 1)
    return sheet


def copy_of(folder: Path, scratch: Path) -> Path:
    """A folder with copies of the files, and links to folders and large files, beside `data`."""
    home = scratch / "notebooks"
    home.mkdir()
    for entry in folder.iterdir():
        if entry.name == "runs" or entry.name.startswith(".") or entry.suffix == ".ipynb":
            continue
        if entry.is_file() and entry.stat().st_size <= COPIED:
            shutil.copy(entry, home)
        else:
            (home / entry.name).symlink_to(entry)
    (scratch / "data").symlink_to(DATA)
    return home


def ran(cells: Sequence[Cell], folder: Path, seconds: float, exercises_only: bool) -> Iterator[tuple[Cell, Outcome]]:
    """Runs all cells, or those that exercises need; after a death only what the others need."""
    checks = [i for i, cell in enumerate(cells) if cell.asks]
    left = needed(cells, checks) if exercises_only else list(range(len(cells)))
    deadly = set()
    while left:
        worker = Worker(folder, folder.parent)
        try:
            for i in left:
                outcome = worker.run(cells[i].code, seconds)
                yield cells[i], outcome
                if outcome.ended:
                    break
            else:
                return
        finally:
            worker.kill()
        deadly.add(i)
        later = [k for k in checks if k > i and k not in deadly]
        left = [k for k in needed(cells, later) if k not in deadly] if later else []


def judge(cell: Cell, outcome: Outcome, found: dict[str, Grade], remarks: list[str]) -> None:
    """Writes down what came of a cell; an attempt counts more than a stub checked after it."""
    for verdict in outcome.verdicts:
        state, one = verdict["state"], _known(found, verdict["exercise"])
        if one is None:
            remarks.append(f"a check names {state}")
        elif state.startswith(RIGHT):
            one.state, one.words = RIGHT, []
        elif state.startswith(NOT_YET):
            lines = [(label, text) for label, text in verdict["lines"] if label not in OF_THE_STORE]
            one.words = [f"{label}: {text}" if label else text for label, text in lines]
            one.state = NOT_YET
    if not outcome.fault:
        return
    judged = {verdict["exercise"] for verdict in outcome.verdicts}
    without = {*cell.asks} - judged - {ANY}
    blamed = [one for q in sorted(without) if (one := _known(found, q))]
    for one in blamed:
        one.state, one.words = NOT_YET, [f"its cell {outcome.fault}"]
    if not blamed:
        remarks.append(f"{cell} {outcome.fault}")


def _known(found: dict[str, Grade], q: str) -> Grade | None:
    """The Grade of an exercise, which may be known only since its check, or None."""
    if q not in found and q in (known := exercises(str(q)[:2])):
        found[q] = Grade(q, known[q].title)
    return found.get(q)


# --- The command ----------------------------------------------------------------------------------


def files_in(paths: Iterable[Path]) -> list[Path]:
    """The files as given; of a folder all notebooks below it, but in `runs` and hidden folders."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        for file in sorted(path.rglob("*.ipynb")):
            folders = file.relative_to(path).parts[:-1]
            if not any(name.startswith(".") or name == "runs" for name in folders):
                found.append(file)
    return found


def table(sheets: Sequence[Sheet]) -> str:
    """All files in one text: a line an exercise, under those not yet right what is likely wrong."""
    lines = []
    for sheet in sheets:
        count = f"{sheet.right} of {len(sheet.grades)} right, {sheet.seconds:.0f} s"
        if not sheet.grades:
            count = 'no exercise in it: no cell calls check("04.2", ...)'
        lines.append(f"{sheet.file}: {sheet.error or count}")
        for grade in sheet.grades:
            lines.append(f"  {grade.exercise}  {grade.state:<9}  {grade.title}")
            for words in grade.words:
                lines += indented(words, 19)
        for remark in sheet.remarks:
            lines += indented(f"Besides, {remark}", 2)
        lines.append("")
    right, every = sum(sheet.right for sheet in sheets), sum(len(sheet.grades) for sheet in sheets)
    return "\n".join([*lines, f"{right} of {every} exercises right"])


def indented(words: str, columns: int) -> list[str]:
    """The lines of a text, those after the first two columns further right."""
    first, others = " " * columns, " " * (columns + 2)
    return textwrap.wrap(words, 100, initial_indent=first, subsequent_indent=others)


def as_json(sheets: Sequence[Sheet]) -> str:
    """The same for programs."""
    every = [grade for sheet in sheets for grade in sheet.grades]
    right = sum(grade.state == RIGHT for grade in every)
    files = [asdict(sheet) for sheet in sheets]
    return json.dumps({"right": right, "exercises": len(every), "files": files}, indent=1)


EPILOG = """
It RUNS THE LEARNER'S CODE on this machine, with your rights and without a sandbox: if you don't
know who wrote it, run this in a container. Grading takes as long as running the notebook, training
included, but --exercises-only takes seconds. The cells run in a copy of the notebook's folder, so
the learner's files and progress stay as they are. Exit code: 0 if all exercises are right, 1 if
not, 2 if a file can't be read or no file has exercises. It doesn't detect cheating.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Grades what the command line names. 0: all right; 1: not all; 2: one could not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m ftlab.grade",
        description="Which exercises of a learner's notebooks are right.",
        epilog=EPILOG,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="notebooks")
    parser.add_argument("--json", action="store_true", help="print JSON and not a table")
    parser.add_argument(
        "--exercises-only",
        action="store_true",
        help="run only the cells that call check and the cells they get their names from; a cell "
        "that they need for another reason (a file, a setting) is missed",
    )
    seconds = {"type": _positive, "default": SECONDS, "metavar": "N"}
    parser.add_argument("--seconds", help="limit for one cell (default %(default)s)", **seconds)
    options = parser.parse_args(arguments)
    for path in options.paths:
        if not path.exists():
            parser.error(f"{path}: there is no such file or folder")
    files = files_in(options.paths)
    if not files:
        parser.error("no .ipynb file in these folders")
    sheets = []
    for number, file in enumerate(files, 1):
        print(f"{number} of {len(files)}: {file} ...", file=sys.stderr, flush=True)
        sheets.append(grade(file, options.seconds, options.exercises_only))
    print(as_json(sheets) if options.json else table(sheets))
    grades = [grade for sheet in sheets for grade in sheet.grades]
    if any(sheet.error for sheet in sheets) or not grades:
        return 2
    return int(any(grade.state != RIGHT for grade in grades))


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a number above 0")
    return number

"""What ftlab adds to a running notebook: a training or a check that was stopped, and a name from a
cell that has not been run, are told in one line.

`import ftlab` installs it where a Jupyter kernel runs, and nowhere else. Every other error looks as
it did, and `%tb` shows the whole traceback of these two.
"""

import ast
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

TOLD = (NameError, KeyboardInterrupt)
LONGEST = 80  # characters that are shown of a line of code
_ours: Any = None  # IPython's method that leads to _tell, while it is installed


def shell() -> Any:
    """IPython's shell where a notebook's kernel runs, else None. Loads no IPython."""
    loaded = sys.modules.get("IPython")
    found = loaded.get_ipython() if hasattr(loaded, "get_ipython") else None
    return found if hasattr(found, "kernel") else None


def install() -> bool:
    """Whether errors of the kinds in TOLD are told by ftlab from now on: not outside a notebook,
    and not where somebody else handles exceptions already, as IPython has one place for that.
    """
    global _ours
    found = shell()
    if found is None or found.custom_exceptions:
        return False
    found.set_custom_exc(TOLD, _tell)
    _ours = found.CustomTB
    return True


def uninstall() -> None:
    """Errors look again as IPython shows them; a handler that somebody else set since stays."""
    global _ours
    found = shell()
    if found is not None and _ours is not None and found.CustomTB is _ours:
        found.set_custom_exc((), None)
    _ours = None


def _tell(
    shell: Any,
    kind: type[BaseException],
    error: BaseException,
    tb: TracebackType,
    tb_offset: int | None = None,
) -> None:
    """IPython calls it instead of showing the traceback."""
    line = _stopped(tb) if isinstance(error, KeyboardInterrupt) else _not_run(shell, error, tb)
    if line is None:
        shell.showtraceback((kind, error, tb), tb_offset=tb_offset)
        return
    shell.get_exception_only((kind, error, tb))  # keeps it for %tb
    shell._showtraceback(kind, error, [line])  # an error all the same: "Run All" ends here


def _stopped(tb: TracebackType) -> str | None:
    """What is left of a training or a check that was interrupted; None if it was something else."""
    frames = (frame for frame, _ in traceback.walk_tb(tb))
    if any(frame.f_globals.get("__name__") == "ftlab.exercises" for frame in frames):
        return "The check was stopped: nothing was stored. Run the cell again to check."
    if "transformers.trainer" not in sys.modules:
        return None
    from ftlab.callbacks import told_of_a_stop

    return told_of_a_stop(tb)


# --- A name from a cell that has not been run -----------------------------------------------------


class Cell(NamedTuple):
    """A code cell, and the last heading above it."""

    id: str
    source: str
    heading: str


def _not_run(shell: Any, error: NameError, tb: TracebackType) -> str | None:
    """Which cell to run first. None where this is not the whole story: a name that no cell defines,
    an error within another one, code outside the notebook, a notebook that cannot be read.
    """
    while tb.tb_next:
        tb = tb.tb_next
    plain = type(error) is NameError and str(error) == f"name {error.name!r} is not defined"
    if not plain or error.__context__ or tb.tb_frame.f_globals is not shell.user_ns:
        return None
    try:
        cells = code_cells(Path(os.environ["JPY_SESSION_NAME"]))  # set by Jupyter's server
    except (KeyError, OSError, ValueError, TypeError, AttributeError):  # whatever is wrong with it
        return None
    here = _place(cells, shell.get_parent())
    found = nearest(error.name, cells, here, shell.transform_cell)
    if found is None:
        return None
    place, line = found
    under = f' under "{cells[place].heading}"' if cells[place].heading else ""
    below = ", which stands further down" if here is not None and place > here else ""
    code = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
    first = f"First run the cell{under} that says{below}: {code}"
    return f"NameError: {error.name!r} is not defined yet. {first}"


def code_cells(file: Path) -> list[Cell]:
    """The code cells of a notebook, from top to bottom. Raises OSError and ValueError."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    cells, heading = [], ""
    for cell in notebook.get("cells", ()) if isinstance(notebook, dict) else ():
        source = "".join(cell.get("source", ""))
        if cell.get("cell_type") == "markdown":
            heading = _last_heading(source) or heading
        elif cell.get("cell_type") == "code":
            cells.append(Cell(cell.get("id", ""), source, heading))
    return cells


def _last_heading(text: str) -> str:
    """The words of the last heading of a Markdown text; a # within a code fence is none."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#{1,6} +(.+?)[ #]*$", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", found[-1]) if found else ""


def _place(cells: list[Cell], request: dict) -> int | None:
    """Which cell is running: JupyterLab sends its id, others its code only."""
    id, code = request.get("metadata", {}).get("cellId"), request.get("content", {}).get("code")
    ids, sources = [cell.id for cell in cells], [cell.source for cell in cells]
    if id in ids:
        return ids.index(id)
    return sources.index(code) if code in sources else None


def nearest(
    name: str,
    cells: list[Cell],
    here: int | None,
    plain: Callable[[str], str] = str,
) -> tuple[int, str] | None:
    """(place, line of code) of the cell that binds the name: the last one above `here`, else the
    first one of all; None if no other cell does. plain: makes Python of a cell with magics.
    """
    found = {}
    for place, cell in enumerate(cells):
        if place != here and (line := _line_that_binds(name, plain, cell.source)):
            found[place] = line
    if not found:
        return None
    above = [place for place in found if here is not None and place < here]
    place = above[-1] if above else min(found)
    return place, found[place]


def _line_that_binds(name: str, plain: Callable[[str], str], source: str) -> str:
    """The first line of a cell's own code that binds the name; empty if none does."""
    try:
        code = plain(source)
        lines = [number for bound, number in bindings(ast.parse(code)) if bound == name]
    except (SyntaxError, ValueError):  # a cell in the middle of being written
        return ""
    line = code.splitlines()[min(lines) - 1] if lines else ""
    return re.split(r"\s{2,}#", line)[0].strip()  # without the comment behind it


def bindings(tree: ast.Module) -> list[tuple[str, int]]:
    """(name, line) of what running a module binds anew: not within functions, classes and
    comprehensions, and not by `del` or `x += 1`, which need the name already.
    """
    found, left = [], list(tree.body)
    while left:
        node = left.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.append((node.name, node.lineno))
            case ast.Lambda():
                continue
            case ast.Import() | ast.ImportFrom():
                names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
                found += [(name, node.lineno) for name in names]
            case ast.AugAssign():
                left.append(node.value)
            case ast.comprehension():
                left += [node.iter, *node.ifs]
            case ast.Name(ctx=ast.Store()):
                found.append((node.id, node.lineno))
            case _:
                left += ast.iter_child_nodes(node)
    return found

"""The code cells of a notebook: the exercises that they check, and the cells that these need.

It reads what the learner wrote and runs none of it.
"""

import ast
import json
import re
import symtable
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BINDS_FOR_SURE = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.With)
ANY = "?"  # check(q, f) in a loop
SHOWS = ("print", "display", "check", "hint", "solution")  # calls that change no argument


class Cell(NamedTuple):
    """A code cell and the exercises that it checks by name; ANY for those that only a run shows."""

    code: str
    asks: tuple[str, ...]

    def __str__(self) -> str:
        return f"the cell that begins {self.code.strip().splitlines()[0][:60]!r}"


def read(path: Path) -> list[Cell]:
    """The code cells of a notebook. Raises ValueError, which says what the file is instead."""
    wanted = "wanted a Jupyter notebook (.ipynb, JSON with a list of `cells`)"
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error}; {wanted}: was it cut off?") from error
    except OSError as error:
        raise ValueError(f"{error.strerror}; {wanted}") from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        likely = "a notebook of format 3 opens and saves in JupyterLab as one of format 4"
        raise ValueError(f"got JSON without a list of cells, {wanted}; {likely}")
    found = []
    for cell in cells:
        source = cell.get("source", "")
        code = source if isinstance(source, str) else "".join(map(str, source))
        if cell.get("cell_type") == "code" and code.strip():
            found.append(Cell(code, tuple(asked(code))))
    return found


def python(code: str) -> str:
    """The code of a cell with IPython's own lines (%magic, !command) as calls."""
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(code)


def asked(code: str) -> list[str]:
    """The numbers of the exercises that a cell checks, also if it cannot be parsed."""
    try:
        tree = ast.parse(python(code))
    except (SyntaxError, ValueError):
        lines = [line.partition("#")[0] for line in code.splitlines()]
        return re.findall(r"\bcheck\(\s*[\"'](\d\d\.\d+)", "\n".join(lines))
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Name("check") | ast.Attribute(value=ast.Name("ftlab"), attr="check"),
                args=[q, *_],
            ):
                found.append(q.value if isinstance(q, ast.Constant) else ANY)
    return found


# --- Which cells an exercise needs ----------------------------------------------------------------


class Names(NamedTuple):
    """What a cell does with names: uses them, binds them in any case, changes them or may do so."""

    uses: set[str]
    binds: set[str]
    changes: set[str]
    imports: set[str]
    assigned: set[str]  # bound by anything but an import
    inside: dict[str, set[str]]  # function or class -> what its body looks up when it runs
    imports_all: bool  # from x import *, of which nobody knows what it binds


def needed(cells: Sequence[Cell], wanted: Iterable[int]) -> list[int]:
    """The indices, in order, of the cells in `wanted` and of those that their names come from.

    A cell is needed if it is the last that binds a name in use, or may change what the name stands
    for: an assignment to a part of it, a method of it or a function of it called for its effect.
    What happens inside functions that are called is not seen, nor what is written to files.
    """
    wanted, effects = set(wanted), [names_of(cell.code) for cell in cells]
    modules = set().union(*(effect.imports for effect in effects))
    modules -= set().union(*(effect.assigned for effect in effects))
    inside: dict[str, set[str]] = {}
    for effect in effects:
        for name, names in effect.inside.items():
            inside.setdefault(name, set()).update(names)
    in_use, found = set(), []
    for i in reversed(range(len(cells))):
        effect = effects[i]
        made = effect.binds | (effect.changes - modules)
        if i in wanted or effect.imports_all or made & in_use:
            found.append(i)
            in_use = (in_use - effect.binds) | _with_inside(effect.uses, inside)
    return found[::-1]


def _with_inside(names: set[str], inside: dict[str, set[str]]) -> set[str]:
    """The names, those that the functions of these names look up, and so on."""
    found, new = set(names), set(names)
    while new:
        looked_up = {name for function in new for name in inside.get(function, ())}
        new = looked_up - found
        found |= new
    return found


def names_of(code: str) -> Names:
    """The Names of a cell; one that is no Python has none."""
    code = python(code)
    imports_all = bool(re.search(r"^from .* import \*", code, re.M))
    names = Names(set(), set(), set(), set(), set(), {}, imports_all)
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return names
    for statement in tree.body:
        used, bound, looked_up = _in_symtable(ast.unparse(statement))
        names.uses.update(used - names.binds)
        if isinstance(statement, BINDS_FOR_SURE):
            names.binds.update(bound)
        else:
            names.changes.update(bound)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names.imports.update(bound)
        else:
            names.assigned.update(bound)
        names.changes.update(_changed(statement))
        for name in bound if looked_up else ():
            names.inside.setdefault(name, set()).update(looked_up)
    return names


def _in_symtable(code: str) -> tuple[set[str], set[str], set[str]]:
    """The global names that a statement loads, those that it binds, those its functions load."""
    top = symtable.symtable(code, "cell", "exec")
    used, bound, looked_up, scopes = set(), set(), set(), [top]
    for symbol in top.get_symbols():
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            bound.add(symbol.get_name())
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if scope is top and symbol.is_referenced():
                used.add(symbol.get_name())
            elif scope is not top and symbol.is_referenced() and symbol.is_global():
                looked_up.add(symbol.get_name())
    return used | looked_up, bound, looked_up


def _changed(statement: ast.stmt) -> Iterator[str]:
    """The names of things of which a part is assigned or deleted, or which a call may change."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            yield from _root(node)
        elif isinstance(node, ast.Expr) and isinstance(call := node.value, ast.Call):
            if isinstance(call.func, ast.Name) and call.func.id in SHOWS:
                continue
            if isinstance(call.func, ast.Attribute):
                yield from _root(call.func)
            for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
                yield from _root(argument)


def _root(node: ast.expr) -> Iterator[str]:
    """The name that a chain of attributes and subscripts begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id

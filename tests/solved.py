"""Every notebook with the solutions in the place of its stubs, run from top to bottom: `make test-long`.

pytest runs this file only where it is named.
"""

import ast
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ftlab.exercises import exercises
from notebooks import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def stubs(cell: str) -> list[tuple[str, str, ast.stmt]]:
    """(number, name, the statement that binds the name) for each exercise whose stub and `check` stand in a cell."""
    if "check(" not in cell:
        return []
    tree, bound, found = ast.parse(cell), {}, []
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                bound[name] = node
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("check"), args=[ast.Constant(q), ast.Name(name)]) if name in bound:
                found.append((q, name, bound[name]))
    return found


def solved(cell: str) -> str:
    """The cell with each stub's lines replaced by those of the solution, which binds the same name."""
    lines = cell.splitlines()
    for q, _, node in sorted(stubs(cell), key=lambda found: -found[2].lineno):
        lines[node.lineno - 1 : node.end_lineno] = exercises(q[:2])[q].source.splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_its_solutions(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and stubs(cell.source)]
    assert {q for cell in cells for q, *_ in stubs(cell.source)} >= exercises(path.stem[:2]).keys()
    for cell in cells:
        cell.source = solved(cell.source)
    with tempfile.TemporaryDirectory() as folder:  # its notebooks/runs goes with it
        monkeypatch.setenv("FTLAB_PROGRESS", f"{folder}/progress.sqlite")
        Path(folder, "data").symlink_to(ROOT / "data")
        Path(folder, "notebooks").mkdir()
        kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": f"{folder}/notebooks"}}}
        NotebookClient(notebook, timeout=1800, **kernel).execute()
    for cell in cells:
        said = [output["data"].get("text/plain", "") for output in cell.outputs if "data" in output]
        assert said and said[-1].startswith("right"), (cell.id, said)

"""Every notebook with the solutions in the place of its stubs, run from top to bottom: `make test-long`.

python tests/solved.py         all notebooks, one after the other
python tests/solved.py 02 05   these two
"""

import ast
import os
import sys
import tempfile
import time
from pathlib import Path

from ftlab.exercises import exercises
from notebooks import ROOT


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


def faults(path: Path) -> list[str]:
    """What goes wrong in a notebook when it runs with its solutions."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and stubs(cell.source)]
    missing = exercises(path.stem[:2]).keys() - {q for cell in cells for q, *_ in stubs(cell.source)}
    lost = [f"no cell with {q}" for q in sorted(missing)]
    for cell in cells:
        cell.source = solved(cell.source)
    with tempfile.TemporaryDirectory() as folder:  # its notebooks/runs goes with it
        own = {"FTLAB_PROGRESS": f"{folder}/progress.sqlite"}
        Path(folder, "data").symlink_to(ROOT / "data")
        Path(folder, "notebooks").mkdir()
        kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": f"{folder}/notebooks"}}}
        try:
            NotebookClient(notebook, timeout=1800, **kernel).execute(env=os.environ | own)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            return [*lost, str(error)]
    said = {cell.id: [text for output in cell.outputs if (text := output.get("data", {}).get("text/plain"))]
            for cell in cells}  # fmt: skip
    return lost + [f"{name}: {texts}" for name, texts in said.items() if not texts or not texts[-1].startswith("right")]


def main(numbers: list[str]) -> bool:
    """Runs the notebooks of these numbers, or all; says of each how it went; are they all right?"""
    paths = {path.stem[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    if unknown := set(numbers) - paths.keys():
        sys.exit(f"got {sorted(unknown)}, wanted some of {list(paths)}")
    right = True
    for number in numbers or paths:
        start = time.perf_counter()
        found = faults(paths[number])
        took = f"{time.perf_counter() - start:.0f} s"
        print(paths[number].stem, took, *(found or ["right"]), sep="  ", flush=True)
        right = right and not found
    return right


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))

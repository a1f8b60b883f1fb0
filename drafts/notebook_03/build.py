"""Builds notebooks/03_qlora_memory.ipynb (no outputs; nbconvert fills them)."""
import sys
from pathlib import Path
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells, LOCK = [], {"tags": ["nbval-check-output"]}
def md(text): cells.append(new_markdown_cell(text.strip()))
def code(text, meta=None): cells.append(new_code_cell(text.strip(), metadata=meta or {}))

SRC = "".join(Path(__file__).with_name(n).read_text() for n in ("cells.py", "tail.py"))
exec(Path(__file__).with_name("texts.py").read_text())
for key, text in TEXTS_.items():
    assert key in SRC, key
    SRC = SRC.replace(key, text.strip())
exec(SRC)

for i, cell in enumerate(cells, 1):
    cell.id = f"qlora-{i:02}"
nb = new_notebook(cells=cells, metadata={
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "version": "3.11.7"}})
out = Path(sys.argv[1] if len(sys.argv) > 1 else "/work/main/notebooks/03_qlora_memory.ipynb")
nbformat.validate(nb)
nbformat.write(nb, out)
print(len(cells), "cells,", sum(c.cell_type == "code" for c in cells), "code ->", out)

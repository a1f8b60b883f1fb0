"""Builds notebooks/02_lora_math.ipynb (without outputs)."""
from pathlib import Path
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells = []
def md(text): cells.append(new_markdown_cell(text.strip(), id=f"lora-{len(cells):02d}"))
def code(text, check=False):
    cells.append(new_code_cell(text.strip(), id=f"lora-{len(cells):02d}", metadata={"tags": ["nbval-check-output"]} if check else {}))

exec(Path("/tmp/nb02/cells.py").read_text())
nb = new_notebook(cells=cells, metadata={
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "version": "3.11.7"}})
nbformat.validate(nb)
nbformat.write(nb, "/work/main/notebooks/02_lora_math.ipynb")
print(len(cells), "cells,", sum(c.cell_type == "code" for c in cells), "code")

"""What several test files read: the notebooks' cells, by name, and changed; what a data file says; sums in prose."""

import ast
import collections
import json
import math
import operator
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in sorted(ROOT.glob("notebooks/*.ipynb"))
}
CELLS = {f"{name}#{cell['id']}": cell for name, cells in NOTEBOOKS.items() for cell in cells}


def code_of(notebook: str) -> dict[str, str]:
    """The code of a notebook's cells by id; of a cell that writes a file, the file's lines."""
    code = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOKS[notebook] if cell["cell_type"] == "code"}
    return {name: re.sub(r"^%%writefile .*\n", "", source) for name, source in code.items()}


def changed(source: str, changes: dict[str, str]) -> str:
    """The source with each old text, which must stand in it once, replaced by the new one."""
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def told(file: str) -> str:
    """The text of a data file; runs that have a value an example tell their mean, and that of an arm over its seeds."""
    text = (ROOT / file).read_text(encoding="utf-8")
    runs = [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else []
    if not any("values" in run for run in runs):
        return text
    lines, means = [], collections.defaultdict(list)
    for run in runs:
        if values := run.pop("values", None):
            run["mean"] = sum(values) / len(values)
            means[run["task"], run["arm"]].append(run["mean"])
        lines.append(json.dumps({key: value for key, value in run.items() if key not in ("answers", "validation")}))
    return "\n".join([*lines, *(f"{task}, {arm}: {sum(of) / len(of):.4f}" for (task, arm), of in means.items())])


FUNCTIONS = {
    "exp": math.exp, "ln": math.log, "log": math.log, "sqrt": math.sqrt, "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "min": min,
}  # fmt: skip
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip


def worked_out(arithmetic: str) -> float:
    """The value of a sum in Python or as on a board: x for times, ^ for powers, 1,234 for 1234.

    Raises ValueError for anything but numbers, + - * / ** and FUNCTIONS.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", arithmetic)
    text = re.sub(r"\bx\b", "*", text).replace("^", "**")

    def of(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -of(operand)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](of(left), of(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*map(of, arguments))
        raise ValueError(f"got {ast.unparse(node)!r} in {arithmetic!r}, wanted arithmetic")

    try:
        return of(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"got {arithmetic!r}, wanted arithmetic") from error

"""What several test files read in the notebooks: their cells, by name; and sums as they stand in prose, worked out."""

import ast
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

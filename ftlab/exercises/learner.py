"""The learner's code: is it still the stub, what did it return, where did it fail?"""

import ast
import functools
import inspect
import linecache
import textwrap
import traceback
from collections.abc import Iterator
from typing import Any


class Watched:
    """The learner's function, with a record of its calls."""

    def __init__(self, function: Any) -> None:
        self.calls, self.failed, self.only_none, self.last = 0, False, False, None
        if not inspect.isfunction(function):
            return

        @functools.wraps(function)
        def call(*args, **kwargs):
            self.failed = True
            self.last = function(*args, **kwargs)
            self.only_none = self.last is None and (self.only_none or not self.calls)
            self.failed, self.calls = False, self.calls + 1
            return self.last

        self.call = call


def functions_of(thing: Any) -> list[Any]:
    """The function itself, or the functions that a class or an object's class defines, without their decorators."""
    kind = thing if inspect.isclass(thing) else type(thing)
    parts = [thing] if inspect.isfunction(thing) else vars(kind).values()
    return [inspect.unwrap(part) for part in parts if inspect.isfunction(part)]


def nodes_of(thing: Any) -> Iterator[ast.AST]:
    """All that the source of a learner's function or class is made of; nothing where there is no source."""
    for function in functions_of(thing) if inspect.isfunction(thing) or inspect.isclass(thing) else []:
        try:
            yield from ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        except (OSError, SyntaxError):  # typed at a prompt; a lambda in the middle of an expression
            continue


def untouched(thing: Any) -> bool:
    """Does its source still hold a `...` that stands for code: a whole body, or the value of a name or of `return`?"""

    def dots(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Constant) and node.value is ...

    def empty(line: ast.stmt) -> bool:
        return isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and dots(line.value))

    for node in nodes_of(thing):
        if isinstance(node, ast.FunctionDef) and all(map(empty, node.body[ast.get_docstring(node) is not None :])):
            return True
        if isinstance(node, ast.Lambda) and dots(node.body):
            return True
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Return | ast.keyword) and dots(node.value):
            return True
    return False


def returns_something(thing: Any) -> bool:
    """Does its source hold a `return` with a value, or a lambda?"""
    return any(
        isinstance(node, ast.Lambda) or (isinstance(node, ast.Return) and node.value) for node in nodes_of(thing)
    )


def line_of(thing: Any, error: Exception) -> str:
    """Where the error arose in the learner's source: "line 2 of my_f: return x[9]"; empty if it did not pass there."""
    files = {function.__code__.co_filename for function in functions_of(thing)}
    places = [place for place in traceback.walk_tb(error.__traceback__) if place[0].f_code.co_filename in files]
    if not places:
        return ""
    frame, line = places[-1]
    text = linecache.getline(frame.f_code.co_filename, line).strip()
    return f"line {line - frame.f_code.co_firstlineno + 1} of {frame.f_code.co_name}: {text}"


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:300]

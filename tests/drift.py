"""Every library name and keyword that ftlab and the notebooks use, held against the versions that are installed.

    python tests/drift.py       prints what is missing, with its place; the exit status is 1 if anything is

`uses` reads the code without running it: each dotted name that begins at an import (trl.SFTConfig), what is asked of
the things that the course always calls the same (tokenizer, model, trainer, ...), and the keywords of each call, those
in a dict behind ** too. `missing` looks them up where they lead: a name by import, a keyword in the signature. Where a
signature ends in **kwargs, which would swallow a keyword that was renamed, it must be known further on: to the callable
that gets the rest, as a trait, by name in the source, or in the documentation. tests/test_drift.py holds the result.

Not followed: methods without keywords on things of other names.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = re.compile(r"%%writefile (?:-a |--append )?\S+\.py\n")  # a cell that is Python behind its first line

_MODELS = ("transformers.LlamaForCausalLM", "peft.PeftModelForCausalLM", "peft.LoraModel")
THINGS = {  # what the course calls the same everywhere, and what it may be
    "tokenizer": ("transformers.PreTrainedTokenizerFast",),
    "model": _MODELS,
    "policy": _MODELS,
    "reward_model": ("transformers.LlamaForSequenceClassification", "peft.PeftModelForSequenceClassification"),
    "trainer": ("trl.SFTTrainer", "trl.DPOTrainer", "trl.KTOTrainer", "trl.RewardTrainer", "trl.GRPOTrainer"),
    "ax": ("matplotlib.axes.Axes",),
    "figure": ("matplotlib.figure.Figure",),
    "client": ("openai.OpenAI",),
}
CLASSES = (  # in which a method is looked for that is called with keywords on anything else
    *(name for names in THINGS.values() for name in names),
    "IPython.core.interactiveshell.InteractiveShell",
    "accelerate.Accelerator",
    "aiohttp.ClientSession",
    "datasets.Dataset",
    "gguf.GGUFWriter",
    "matplotlib.ticker.MaxNLocator",
    "numpy.ndarray",
    "numpy.random.Generator",
    "openai.resources.chat.completions.Completions",
    "packaging.specifiers.SpecifierSet",
    "pandas.DataFrame",
    "pandas.Series",
    "pandas.api.typing.DataFrameGroupBy",
    "pandas.io.formats.style.Styler",
    "pandas.plotting.PlotAccessor",
    "scipy.stats._result_classes.BinomTestResult",
    "torch.Tensor",
    "torch.nn.Module",
    "trl.TrlParser",
)
PLAIN = (
    str, bytes, dict, list, Path, subprocess.Popen, argparse.ArgumentParser, random.Random, tarfile.TarFile,
)  # fmt: skip
OWN_WORDS = {  # function -> keywords that go further than its library; None: all of them, they are the caller's
    "DataFrame.assign": None,
    "DataFrameGroupBy.aggregate": None,
    "SingletonConfigurable.instance": ("config",),  # goes to the class
    "PreTrainedTokenizerBase.apply_chat_template": ("enable_thinking",),  # data/templates/qwen3.jinja reads it
}
REST = {  # function -> who gets what its **kwargs hold
    "_BaseAutoModelClass.from_pretrained": ("transformers.PreTrainedModel.from_pretrained",),
    "_BaseAutoModelClass.from_config": ("transformers.PreTrainedModel._from_config",),
    "PreTrainedModel.from_pretrained": ("transformers.LlamaConfig",),
    "AutoTokenizer.from_pretrained": ("transformers.PreTrainedTokenizerFast.from_pretrained",),
    "create_loraplus_optimizer": ("torch.optim.Adam",),
    "Axes.annotate": ("matplotlib.text.Text",),
    "Axes.legend": ("matplotlib.legend.Legend",),
    "Axes.semilogy": ("matplotlib.axes.Axes.plot",),
    "_AxesBase.set_yticklabels": ("matplotlib.text.Text",),
    "subplots": ("matplotlib.pyplot.figure",),
    "PlotAccessor.bar": ("pandas.plotting._matplotlib.core.MPLPlot",),
    "PlotAccessor.barh": ("pandas.plotting._matplotlib.core.MPLPlot",),
    "safe_dump": ("yaml.dump_all",),
    "ClientSession.request": ("aiohttp.ClientSession._request",),
    "AppRunner": ("aiohttp.web.Server", "aiohttp.web.RequestHandler"),
    "GenerationMixin.generate": ("transformers.GenerationConfig", "transformers.LlamaForCausalLM.forward"),
}


@dataclass(frozen=True)
class Use:
    """One place: "trl.SFTConfig", "model.generate" (of a thing in THINGS) or ".sum" (of anything), and its keywords.

    unread: the call also has a ** whose keys cannot be read from the code; it is looked up only in part.
    """

    where: str
    name: str
    keywords: tuple[str, ...] = ()
    unread: bool = False


@dataclass(frozen=True)
class Missing:
    """A name that is not there (keyword ""), or a keyword that it does not take."""

    where: str
    name: str
    keyword: str = ""

    def __str__(self) -> str:
        what = f"takes no keyword {self.keyword!r}" if self.keyword else "is not there"
        return f"{self.where}: {self.name} {what}"


# --- Reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A parsed file; module is its dotted name, empty for a notebook."""

    name: str
    tree: ast.Module
    module: str = ""
    cells: list[tuple[str, int]] = field(default_factory=list)  # of each line: the cell's id, the line in it

    def where(self, node: ast.AST) -> str:
        if not self.cells:
            return f"{self.name}:{node.lineno}"
        cell, line = self.cells[node.lineno - 1]
        return f"{self.name}#{cell}:{line}"

    @functools.cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}


def files(root: Path = ROOT) -> list[Path]:
    """ftlab's modules and the notebooks."""
    return [*sorted(root.glob("ftlab/**/*.py")), *sorted(root.glob("notebooks/*.ipynb"))]


def read(path: Path, root: Path = ROOT) -> Source:
    """The parsed file. In a notebook, a line that is IPython's does nothing; a script that a cell writes is read."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
    if path.suffix == ".py":
        parts = name.with_suffix("").parts
        return Source(name.as_posix(), ast.parse(text), ".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    lines, cells = [], []
    for cell in json.loads(text)["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or (code.startswith("%%") and not SCRIPT.match(code)):
            continue
        for number, line in enumerate(code.splitlines(), 1):
            lines.append(re.sub(r"^(\s*)[%!].*", r"\1pass", line))
            cells.append((cell["id"], number))
    return Source(path.stem, ast.parse("\n".join(lines)), cells=cells)


def uses(sources: Iterable[Source]) -> list[Use]:
    """What the sources ask of libraries, in their order, each place and name once."""
    sources = list(sources)
    known = {f"{s.module}.{name}": (s, node) for s in sources if s.module for name, node in s.functions.items()}
    found: dict[Use, None] = {}
    for source in sources:
        reader = _Reader(source, known)
        reader.visit(source.tree)
        found.update(dict.fromkeys(reader.found))
    called = {(use.where, use.name) for use in found if use.keywords or use.unread}
    return [use for use in found if use.keywords or use.unread or (use.where, use.name) not in called]


def is_library(name: str) -> bool:
    top = name.split(".")[0]
    return top not in sys.stdlib_module_names and top != "ftlab"


_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_INNER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _own(scope: ast.AST, loops: bool = False) -> Iterator[ast.AST]:
    """The nodes of a scope without those of the functions in it; with the comprehensions' only if `loops`."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, _INNER) and (loops or not isinstance(node, _LOOPS)):
            yield from _own(node, loops)


def _parameters(function: ast.AST) -> list[str]:
    if not isinstance(function, _Function):
        return []
    a = function.args
    return [p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if p]


def _renamed(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """Other names for the same: Trainer = SFTTrainer, a, b = torch.add, torch.sub, class Mine(SFTTrainer)."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return [(name, value)]
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            return [(t.id, v) for t, v in zip(targets, values, strict=False) if isinstance(t, ast.Name)]
        case ast.ClassDef(name=name, bases=[base, *_], body=body):
            made = any(isinstance(part, ast.FunctionDef) and part.name == "__init__" for part in body)
            return [] if made else [(name, base)]
    return []


class _Reader(ast.NodeVisitor):
    """Collects the uses of one source. In `scopes`, innermost last: name -> dotted name, None if it is no import."""

    def __init__(self, source: Source, known: dict[str, tuple[Source, ast.FunctionDef]]) -> None:
        self.source, self.known = source, known
        self.found: list[Use] = []
        self.scopes: list[dict[str, str | None]] = []
        self.owners: list[ast.AST] = []
        self.loops: list[ast.For | ast.comprehension] = []

    def add(self, node: ast.AST, name: str, keywords: Iterable[str] = (), unread: bool = False) -> None:
        self.found.append(Use(self.source.where(node), name, tuple(dict.fromkeys(keywords)), unread))

    # Scopes

    def _enter(self, scope: ast.AST) -> None:
        names: dict[str, str | None] = dict.fromkeys(_parameters(scope))
        own = list(_own(scope))
        names |= {node.id: None for node in own if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {node.name: None for node in own if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if isinstance(scope, ast.Module) and self.source.module:
            names |= {name: f"{self.source.module}.{name}" for name in self.source.functions}
        for node in own:
            if isinstance(node, ast.Import):
                names |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                          for a in node.names}  # fmt: skip
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        self.scopes.append(names)
        self.owners.append(scope)
        for name, of in itertools.chain.from_iterable(map(_renamed, own)):
            if names.get(name) is None and (dotted := self._dotted(of)):
                names[name] = dotted

    def _visit_scope(self, node: ast.AST) -> None:
        for outside in (*getattr(node, "decorator_list", ()), *_defaults(node)):
            self.visit(outside)
        self._enter(node)
        for part in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(part)
        self.scopes.pop()
        self.owners.pop()

    def _visit_loop(self, node: ast.AST) -> None:
        loops = [node] if isinstance(node, ast.For) else node.generators
        self.loops += loops
        self.generic_visit(node)
        del self.loops[-len(loops) :]

    visit_For = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_loop  # noqa: N815
    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_scope  # noqa: N815

    def _dotted(self, node: ast.AST | None) -> str | None:
        """The full name behind a chain like nn.functional.pad, None if it does not begin at an import."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute) and (base := self._dotted(node.value)):
            return f"{base}.{node.attr}"
        return None

    def _thing(self, node: ast.AST) -> str | None:
        known = isinstance(node, ast.Name) and node.id in THINGS and self._dotted(node) is None
        return node.id if known else None

    # Uses

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if is_library(alias.name):
                self.add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if is_library(node.module):
                self.add(node, f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := self._dotted(node):
            if is_library(dotted):
                self.add(node, dotted)
            return
        if isinstance(node.ctx, ast.Load) and (thing := self._thing(node.value)):
            self.add(node, f"{thing}.{node.attr}")
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        func, dotted = node.func, self._dotted(node.func)
        if dotted == "functools.partial":
            func, dotted = node.args[0], self._dotted(node.args[0])
        keywords, complete = _keywords(node.keywords, self.owners[-1], self.source, self)
        if dotted and is_library(dotted):
            self.add(node, dotted, keywords, not complete)
        elif not dotted and (thing := self._thing(func)):
            self.add(node, f"{thing}.__call__", keywords, not complete)
        elif not dotted and isinstance(func, ast.Attribute) and func.attr in THINGS and keywords:  # run.model(...)
            self.add(node, f"{func.attr}.__call__", keywords, not complete)
        elif dotted or not isinstance(func, ast.Attribute) or _is_name(func.value, "self"):
            pass  # Python's, or our own
        elif keywords or not complete:
            self.add(node, f"{self._thing(func.value) or ''}.{func.attr}", keywords, not complete)
        self.generic_visit(node)

    def called(self, node: ast.expr) -> tuple[Source, ast.FunctionDef] | None:
        return self.known.get(self._dotted(node) or "")

    def looped(self, name: str) -> list[ast.expr]:
        """What the innermost loop around here that has this name gives it."""
        given = (_looped(name, loop.target, loop.iter, self.owners[-1]) for loop in reversed(self.loops))
        return next(filter(None, given), [])


def _defaults(node: ast.AST) -> list[ast.expr]:
    a = getattr(node, "args", None)
    return [*a.defaults, *filter(None, a.kw_defaults)] if isinstance(a, ast.arguments) else []


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


# The keys of what stands behind **: each function returns (keys, whether these are all)


def _union(parts: Iterable[tuple[list[str], bool]]) -> tuple[list[str], bool]:
    parts = list(parts)
    return [key for keys, _ in parts for key in keys], bool(parts) and all(complete for _, complete in parts)


def _keywords(given: list[ast.keyword], owner: ast.AST, source: Source, reader: _Reader | None = None):
    named = ([k.arg for k in given if k.arg], True)
    return _union([named, *(_keys(k.value, owner, source, reader) for k in given if not k.arg)])


def _keys(node: ast.expr, owner: ast.AST, source: Source, reader: _Reader | None = None) -> tuple[list[str], bool]:
    """The keys of a dict written out, or put together from such, or made by a function of ours that returns one."""

    def of(other: ast.expr) -> tuple[list[str], bool]:
        return _keys(other, owner, source, reader)

    match node:
        case ast.Dict():
            written = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            known = all(key is None or isinstance(key, ast.Constant) for key in node.keys)
            merged = [of(value) for key, value in zip(node.keys, node.values, strict=True) if key is None]
            return _union([(written, known), *merged])
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return _keywords(node.keywords, owner, source, reader)
        case ast.Call(func=ast.Name(id=name)) if name in source.functions:
            return _returned(source.functions[name], source)
        case ast.Call() if reader and (called := reader.called(node.func)):
            return _returned(called[1], called[0])
        case ast.IfExp():
            return _union([of(node.body), of(node.orelse)])
        case ast.BinOp(op=ast.BitOr()):
            return _union([of(node.left), of(node.right)])
        case ast.Subscript(value=ast.Name()):
            return _union(of(value) for value in _values(node.value, owner, source))
        case ast.Name() if reader and (each := reader.looped(node.id)):
            return _union(map(of, each))
        case ast.Name():
            return _named(node, owner, source, reader)
    return [], False


def _returned(function: ast.FunctionDef, source: Source) -> tuple[list[str], bool]:
    values = [part.value for part in _own(function) if isinstance(part, ast.Return)]
    return _union(_keys(value, function, source) for value in values if value)


def _named(node: ast.Name, owner: ast.AST, source: Source, reader: "_Reader | None") -> tuple[list[str], bool]:
    """The keys of all dicts that a name stands for in its function, or else in the module or at the callers.

    In a notebook's cells, which run from top to bottom, that is the last one before.
    """
    name, values = node.id, _assigned(node.id, owner)
    if source.cells and owner is source.tree:
        values = [value for value in values if value.lineno <= node.lineno][-1:]
    found = [_keys(value, owner, source, reader) for value in values]
    if not found and isinstance(owner, ast.FunctionDef) and name in _parameters(owner):
        return _at_callers(node, owner, source, reader)
    if not found and owner is not source.tree:
        return _named(node, source.tree, source, reader)
    for each in _own(owner):
        match each:
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=other), slice=ast.Constant(value=key))]):
                found += [([key], True)] if other == name else []
            case ast.Call(func=ast.Attribute(value=ast.Name(id=other), attr="update")) if other == name:
                found.append(_keywords(each.keywords, owner, source, reader))
    return _union(found)


def _at_callers(node: ast.Name, owner: ast.FunctionDef, source: Source, reader: "_Reader | None"):
    """The keys of a parameter: the other keywords at the calls for **flags, else a dict handed on by the same name."""
    parameters, found = _parameters(owner), []
    if owner.args.kwarg and owner.args.kwarg.arg == node.id:
        for call in ast.walk(source.tree):
            if isinstance(call, ast.Call) and _is_name(call.func, owner.name):
                extra = [k for k in call.keywords if k.arg not in parameters]
                found.append(_keywords(extra, source.tree, source, reader))
        return _union(found)
    for function in source.functions.values():
        calls = (each for each in _own(function, loops=True) if isinstance(each, ast.Call))
        handed = any(_is_name(value, node.id) for call in calls for value in call.args)
        if function is not owner and handed and _assigned(node.id, function):
            found.append(_named(node, function, source, reader))
    return _union(found)


def _assigned(name: str, owner: ast.AST) -> list[ast.expr]:
    """What is assigned to a name in a scope, one by one or in tuples."""
    values: list[ast.expr] = []
    for node in _own(owner):
        match node:
            case ast.Assign(targets=[ast.Name(id=other)], value=value) if other == name:
                values.append(value)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=each)):
                values += [v for target, v in zip(targets, each, strict=False) if _is_name(target, name)]
    return values


def _looped(name: str, target: ast.expr, rows: ast.expr, owner: ast.AST) -> list[ast.expr]:
    """What a loop gives to a name: from a list in brackets, or the .items() of a dict that is written out."""
    match rows:
        case ast.Tuple(elts=each) | ast.List(elts=each):
            pass
        case ast.Call(func=ast.Attribute(value=table, attr="items")):
            tables = _assigned(table.id, owner) if isinstance(table, ast.Name) else [table]
            written = [t for t in tables if isinstance(t, ast.Dict)]
            each = [ast.Tuple(elts=list(pair)) for t in written for pair in zip(t.keys, t.values, strict=True)]
        case _:
            return []
    if _is_name(target, name):
        return each
    places = [i for i, t in enumerate(getattr(target, "elts", [])) if _is_name(t, name)]
    return [row.elts[i] for row in each if isinstance(row, ast.Tuple) for i in places if i < len(row.elts)]


def _values(table: ast.Name, owner: ast.AST, source: Source) -> list[ast.expr]:
    """The values of a dict that is written out under a name."""
    written = _assigned(table.id, owner) or _assigned(table.id, source.tree)
    return [value for node in written if isinstance(node, ast.Dict) for value in node.values]


# --- Looking up -------------------------------------------------------------------------------------------------------


def missing(found: Iterable[Use]) -> list[Missing]:
    """What of it the installed libraries do not have. A library that is not installed at all is left out.

    Unsloth's are looked up in a process of their own, unless it is imported here: it changes transformers and trl.
    """
    importlib.import_module("ftlab.models")  # which silences complaints about missing GPU kernels
    found = list(found)
    unsloth = [use for use in found if use.name.startswith("unsloth") and "unsloth" not in sys.modules]
    here = [gone for use in found if use not in unsloth for gone in _gone(use)]
    return here + (_asked_apart(unsloth) if unsloth and _installed("unsloth") else [])


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def _gone(use: Use) -> list[Missing]:
    if use.name.startswith("."):
        return _gone_method(use)
    top = use.name.split(".")[0]
    if top in THINGS:
        attribute = use.name.split(".")[1]
        owners = [owner for owner in _there(THINGS[top]) if has(owner, attribute)]
        if not owners:
            known = attribute in _our_names() or not all(map(_installed, THINGS[top]))
            return [] if known else [Missing(use.where, use.name)]
        callables = [_call_of(owner, attribute) for owner in owners]
        lacks = [k for k in use.keywords if not any(map(functools.partial(_takes, keyword=k), callables))]
        return [Missing(use.where, use.name, keyword) for keyword in lacks]
    if not _installed(top):
        return []
    things = _there([use.name])
    if not things:
        return [Missing(use.where, use.name)]
    return [Missing(use.where, use.name, keyword) for keyword in use.keywords if not _takes(things[0], keyword)]


def _gone_method(use: Use) -> list[Missing]:
    """A method of anything: one of our own or of Python's, or one that a class in CLASSES has with these keywords."""
    method = use.name[1:]
    if method in _our_names() or any(hasattr(kind, method) for kind in PLAIN):
        return []
    owners = [owner for owner in _there(CLASSES) if has(owner, method)]
    if not owners:
        return [Missing(use.where, use.name)] if all(map(_installed, CLASSES)) else []
    fits = any(all(_takes(getattr(owner, method, None), k) for k in use.keywords) for owner in owners)
    lacks = [k for k in use.keywords if not any(_takes(getattr(owner, method, None), k) for owner in owners)]
    return [] if fits else [Missing(use.where, use.name, keyword) for keyword in lacks or use.keywords]


@functools.cache
def _our_names() -> frozenset[str]:
    """What ftlab's classes and modules define themselves: a method or field of that name may be ours."""
    nodes = [node for path in files() if path.suffix == ".py" for node in ast.walk(read(path).tree)]
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    fields = [node.target for node in nodes if isinstance(node, ast.AnnAssign) and node.value is None]
    return frozenset(functions | {target.id for target in fields if isinstance(target, ast.Name)})


@functools.cache
def lookup(name: str) -> Any:
    """The thing behind a dotted name. Raises AttributeError or ImportError if it is not there."""
    top, *rest = name.split(".")
    thing, path = importlib.import_module(top), top
    for part in rest:
        path = f"{path}.{part}"
        try:
            thing = getattr(thing, part)
        except AttributeError:
            if not inspect.ismodule(thing):
                raise
            thing = importlib.import_module(path)
    return thing


def _there(names: Iterable[str]) -> list[Any]:
    """The things behind these names, without those that this version of their library does not have."""
    things = []
    for name in names:
        with contextlib.suppress(
            AttributeError, ImportError, RuntimeError
        ):  # transformers' lazy modules raise the last
            things.append(lookup(name))
    return things


@functools.cache
def has(owner: type, attribute: str) -> bool:
    """Whether the class, or the code of it and its parents, gives its objects this attribute."""
    special = getattr(owner, "SPECIAL_TOKENS_ATTRIBUTES", ())  # of a tokenizer: eos_token and eos_token_id
    if hasattr(owner, attribute) or attribute.removesuffix("_id") in special:
        return True
    return any(attribute in _set_on_self(kind) for kind in owner.__mro__[:-1])


@functools.cache
def _set_on_self(kind: type) -> frozenset[str]:
    """The attributes that a class annotates, or assigns to self somewhere in its code."""
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # written in C, or made while running
        code = ""
    return frozenset(re.findall(r"\bself\.(\w+)\b[^=\n()]*=[^=]", code)) | inspect.get_annotations(kind).keys()


@functools.cache
def takes(thing: Any, keyword: str) -> bool:
    """Whether a callable has a parameter of this name, or hands it on to something that knows it."""
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return _in_c(thing, keyword)
    found = parameters.get(keyword)
    if found and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY):
        return True
    rest = next((p for p in parameters.values() if p.kind == p.VAR_KEYWORD), None)
    if rest is None:
        return _has_setter(thing, keyword)  # transformers' configs hide that they take every property
    typed = getattr(rest.annotation, "__args__", ())  # **kwargs: Unpack[TransformersKwargs]
    name = getattr(thing, "__qualname__", "")
    own = OWN_WORDS.get(name, ())
    return (
        any(keyword in inspect.get_annotations(kind) for kind in typed)
        or own is None
        or keyword in own
        or _has_setter(thing, keyword)
        or _is_settable(thing, keyword)
        or any(takes(other, keyword) for other in _there(REST.get(name, ())))
        or _reads(thing, keyword)
        or _documents(thing, keyword)
    )


def _call_of(owner: type, attribute: str) -> Any:
    """A class's attribute; to call a network is to call its forward."""
    is_network = attribute == "__call__" and hasattr(owner, "forward")
    return getattr(owner, "forward" if is_network else attribute, None)


def _takes(thing: Any, keyword: str) -> bool:
    return callable(thing) and takes(thing, keyword)


def _in_c(thing: Any, keyword: str) -> bool:
    """Functions without a signature: it stands in their documentation, `sum(dim, keepdim=False)`, or torch has it."""
    signatures = re.findall(r"^[\w.]*\w\((.*?)\)(?: ->|$|\n)", inspect.getdoc(thing) or "", re.M | re.S)
    if any(re.search(rf"(?<![\w=.]){keyword}\b", signature) for signature in signatures):
        return True
    schemas = lookup("torch")._C._jit_get_schemas_for_operator(f"aten::{getattr(thing, '__name__', '')}")
    return any(argument.name == keyword for schema in schemas for argument in schema.arguments)


def _has_setter(thing: Any, keyword: str) -> bool:
    static = inspect.getattr_static(thing, keyword, None) if inspect.isclass(thing) else None
    return isinstance(static, property) and static.fset is not None


def _is_settable(thing: Any, keyword: str) -> bool:
    """Of a class: a trait (ipywidgets), or what has a set_ method (matplotlib)."""
    if not inspect.isclass(thing):
        return False
    traits = thing.class_traits() if hasattr(thing, "class_traits") else ()
    return keyword in traits or hasattr(thing, f"set_{keyword}")


def _reads(thing: Any, keyword: str) -> bool:
    """Whether the name stands as a string in the callable's own code: kwargs.pop("dtype", None)."""
    function = inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing)
    try:
        code = inspect.getsource(function)
        body = ast.parse(f"if True:\n{code}" if code[0].isspace() else code).body[0]
    except (OSError, TypeError, SyntaxError):  # made while running, or a lambda in the middle of a line
        return False
    body = body.body[0] if isinstance(body, ast.If) else body
    documentation = ast.get_docstring(body, clean=False) if isinstance(body, ast.FunctionDef) else None
    strings = {node.value for node in ast.walk(body) if isinstance(node, ast.Constant)} - {documentation}
    return keyword in strings


def _documents(thing: Any, keyword: str) -> bool:
    """Whether the documentation lists it: a line that begins with the name (or `color or c`), then a colon or (."""
    also = r"(?:(?:, | or |/)\w+)*"
    listed = rf"^\s*[*`]*(?:\w+(?:, | or |/))*{keyword}{also}[*`]*\s*[:(=]"
    return re.search(listed, inspect.getdoc(thing) or "", re.M) is not None


def _asked_apart(found: list[Use]) -> list[Missing]:
    """`missing` of these uses in a process that imports Unsloth first."""
    settings = {"UNSLOTH_AUTO_INSTALL": "0", "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--with-unsloth"]
    asked = json.dumps([asdict(use) for use in found])
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(f"the process that imports Unsloth ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [Missing(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _answer() -> None:
    """In the process of its own: uses as JSON in, what is missing as JSON out, in the last line."""
    asked = [Use(**{**each, "keywords": tuple(each["keywords"])}) for each in json.load(sys.stdin)]
    importlib.import_module("unsloth")
    print(json.dumps([asdict(gone) for gone in missing(asked)]))


# --- The report -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Prints what was looked up, in which versions, and what is missing; 1 if anything is."""
    found = uses(map(read, files()))
    libraries = sorted({name for use in found if is_library(name := use.name.split(".")[0])} - {"", *THINGS})
    installed = importlib.metadata.packages_distributions()
    for name in libraries:
        version = importlib.metadata.version(installed[name][0]) if name in installed else "is not installed: left out"
        print(name, version)
    gone = missing(found)
    names, keywords = {use.name for use in found}, sum(len(use.keywords) for use in found)
    print(f"{len(names)} names used, with {keywords} keywords: {len(gone)} missing", *gone, sep="\n")
    return bool(gone)


if __name__ == "__main__":
    sys.exit(_answer() if sys.argv[1:] == ["--with-unsloth"] else main())

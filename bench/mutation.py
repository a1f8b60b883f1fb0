"""Does a test notice when `ftlab/scratch` is wrong? Each function is broken in many small ways, each of them is tried.

    python bench/mutation.py                            the five modules in TESTS
    python bench/mutation.py losses quant.nf4_levels    only these, beside the results that are there already

A mutant is the module with one change, made in its syntax tree: + for -, the left operand alone, a sign, a constant, a
comparison or its boundary, a mask inverted, a slice without its bound, sum for mean, a call or an argument left out,
two arguments in each other's place, a check removed ... At least FEWEST for each function and method, private ones too;
BY_HAND adds some where the tree gives fewer. No file is changed: a process that holds torch and pytest forks, puts the
mutant in the real module's place, and runs the test files that concern it, in the order of TESTS, up to the first
failure. Hypothesis draws the same examples in every run. Caught is a mutant that fails a test, ends the process, or
does not end in time. What survives is either in EQUIVALENT, with the reason why no test can tell it from the original,
or a hole in the tests, and then this script ends with an error.

Why not mutmut? Version 3.8.1 made 1,235 mutants here, and only 496 of the 2,349 that we had then were among them: it
skips functions with a decorator (`gae`, `token_rewards`) and has no operand alone, other variable, call left out, swap,
slice or check. So it misses holes. For each of the 219 mutants of `logps` that only we make and that
test_scratch_logps.py catches, the tests that catch it were taken out (six Hypothesis examples a test): in 66 cases no
mutant of mutmut survived in that line, in 49 none in that function.
"""

import ast
import copy
import gc
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from harness import RESULTS, alone, write
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests"
TESTS = {  # the quick ones first: the library's only see what the others let through
    "logps": ("test_scratch_logps.py", "test_scratch_losses.py", "test_scratch_rl.py", "parity/test_dpo.py"),
    "losses": ("test_scratch_losses.py", "parity/test_dpo.py", "parity/test_preference.py"),
    "rl": ("test_scratch_rl.py", "parity/test_rl.py", "parity/test_ppo.py"),
    "lora": ("test_scratch_lora.py", "parity/test_lora.py"),
    "quant": ("test_scratch_quant.py", "parity/test_quant.py"),
}
FEWEST = 5
PLUGINS = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # the second collects garbage twice, slowly
OPTIONS = ["-x", "-q", "--tb=no", "--no-header", "--assert=plain", *PLUGINS]
BYTES = 16 * 2**30  # a mutant that asks for more gets a MemoryError

BY_HAND = {
    "logps._shape": [
        ("tensor.shape)", "tensor.shape[1:])"),
        ("tensor.shape)", "tensor.shape[:-1])"),
        ("tensor.shape)", "reversed(tensor.shape))"),
        ("tuple(tensor.shape)", "(tensor.numel(),)"),
    ],
}
CHECKED = "the shapes have been found equal before"
HIDDEN = "what it puts where the mask is 0 is masked again, and no gradient comes from there"
ONE_DEVICE = "the devices differ only where there is an accelerator"
ONE_DTYPE = "A and B are made with one dtype"
SYMMETRIC = "the function is symmetric in its two arguments"
EQUIVALENT = {
    "logps.per_token_logps": {
        "if logits.dim() != 3 or logits.shape[:2] != input_ids.shape or logits.shape[1] < 2:": (
            "is asked only where logits.shape[:2] is the shape of input_ids"
        ),
        "dtype = torch.promote_types(torch.float32, logits.dtype)": SYMMETRIC,
    },
    "logps.entropy": {
        "logps = logits[:, :-1].log_softmax(-1, dtype=torch.promote_types(torch.float32, logits.dtype))": SYMMETRIC,
    },
    "logps.as_bool_mask": {
        "if ((mask != 0) & (mask != 1)).any():": "a bool mask holds only 0 and 1; asking for its dtype saves the work",
    },
    "logps.next_token_mask": {
        "if completion_mask.dim() != 2 or per_token_logps.shape != (completion_mask == 0)[:, 1:].shape:": (
            "a comparison has the shape of what is compared"
        ),
    },
    "rl.token_rewards": {
        **{
            f"""check_shapes("one score for each answer: a reward head's (B, 1) needs .squeeze(-1)", scores=scores, """
            f"answer={answer})": CHECKED
            for answer in ("mask[:, 0]", "kl[:, -1]")
        },
    },
    "rl.gae": {
        "advantages, advantage, next_values = (torch.ones_like(values), 0, 0)": "the loop sets every column",
        "advantages, advantage, next_values = (torch.zeros_like(rewards), 0, 0)": (
            "the shapes are equal, and nothing is said about rewards and values of two dtypes"
        ),
        "for t in reversed(range(mask.shape[1])):": CHECKED,
        "for t in reversed(range(rewards.shape[1])):": CHECKED,
    },
    "rl.whiten": {"mask = as_bool_mask(mask, mask)": "masked_mean asks for the same shape again"},
    "rl.ppo_loss": {
        "mask = as_bool_mask(mask, old_logps)": CHECKED,
        **{f"ratio = (logps - old_logps.detach()).where(mask, {number}).exp()": HIDDEN for number in (1, -1)},
    },
    "rl.value_loss": {
        "mask = as_bool_mask(mask, old_values)": CHECKED,
        **{
            f"values, old_values, returns = (x.where(mask, {number}) for x in (values, old_values, returns))": (
                "the three are equal there, so the loss is 0"
            )
            for number in (1, -1)
        },
        "return torch.max((clipped - returns) ** 2, (values - returns) ** 2) / 2": SYMMETRIC,
    },
    "rl.group_advantages": {
        "groups = rewards.to(torch.promote_types(torch.float32, rewards.dtype)).view(-1, num_generations)": SYMMETRIC,
    },
    "rl.reduce_loss": {"if loss_type in ('cispo', 'dapo'):": "`in` does not ask for the order"},
    "rl._clipped_loss": {
        "return -torch.min(ratio.clamp(1 - low, 1 + high) * advantages, ratio * advantages)": SYMMETRIC
    },
    "rl._log_ratio": {
        "mask = as_bool_mask(mask, old_logps)": CHECKED,
        "check_shapes('one advantage for each answer, from group_advantages', advantages=advantages, "
        "answer=logps.sum(1))": CHECKED,
    },
    "rl.reverse_kl": {
        "mask = as_bool_mask(mask, teacher_logits[..., 0])": CHECKED,
        **{
            f"mask = as_bool_mask(mask, student_logits[..., {number}])": (
                "of its second argument as_bool_mask sees the shape alone, and a vocabulary has two tokens or more"
            )
            for number in (1, -1)
        },
        **{
            f"both = (x.where(mask[..., None], {number}) for x in (student_logits, teacher_logits.detach()))": (
                "student and teacher are equal there, so the KL is 0"
            )
            for number in (1, -1)
        },
        "student, teacher = (x.log_softmax(-1, dtype=torch.promote_types(torch.float32, x.dtype)) for x in both)": (
            SYMMETRIC
        ),
    },
    "lora.LoRALinear.__init__": {
        "W0, dtype = (base_layer.weight, torch.promote_types(torch.float32, base_layer.weight.dtype))": (SYMMETRIC)
    },
    "lora.LoRALinear.forward": {"x = self.lora_dropout(x.to(self.lora_B.dtype))": ONE_DTYPE},
    "lora.add_lora": {"p.requires_grad_(name.endswith(('lora_B', 'lora_A')))": "either ending will do"},
    "lora.lora_state_dict": {
        "own = {name: p for name, p in model.named_parameters() if name.rpartition('.')[2] in ('lora_B', 'lora_A')}": (
            "`in` does not ask for the order"
        ),
    },
    "quant.nf4_levels": {
        f"{name} = [{sign}quantile(p) for p in torch.linspace(offset, 0.5, {cuts})[:-1]]": (
            "NormalDist takes an element of a tensor as the number it is"
        )
        for name, sign, cuts in (("above", "", 9), ("below", "-", 8))
    },
    "quant.fp4_levels": {"return torch.cat([-above.flip(-1), torch.zeros(1), above])": "it has one dimension"},
    "quant.dynamic_levels": {
        "edges = torch.linspace(1, 0.1, 2 ** (6 - e) + 1)": (
            "the same numbers in the other order, and the result is sorted"
        ),
    },
    "quant.quantize_blockwise": {
        "codes = torch.bucketize(scaled, decision_thresholds(levels))": ONE_DEVICE,
        "codes = torch.bucketize(scaled, decision_thresholds(levels.to(levels.device)))": ONE_DEVICE,
    },
    "quant.dequantize_blockwise": {
        "values = levels.to(absmax.device)[codes.flatten().int()]": "codes and absmax are on one device",
    },
    "quant.double_quantize": {
        "codes = torch.bucketize(-1 + 2 * step / 65535, decision_thresholds(dynamic_levels()))": ONE_DEVICE,
    },
    "quant.quantize_int4_asymmetric": {
        "codes = ((blocks - zeros[:, None]) / scales[:, None]).round()": (
            "in a block of equal values 0 / 0 is nan, and that as an integer happens to be 0 on this processor"
        ),
    },
    "rl._answers": {
        "mask = as_bool_mask(mask, mask == 0)": "of its second argument as_bool_mask sees the shape alone",
        "starts = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)": "bool + int64 is int64",
    },
}

# --- The mutants of a syntax tree -------------------------------------------------------------------------------------

SWAPS = {
    **{ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult]},
    **{ast.FloorDiv: [ast.Div], ast.Mod: [ast.FloorDiv], ast.LShift: [ast.RShift], ast.RShift: [ast.LShift]},
    **{ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.BitXor: [ast.BitAnd], ast.MatMult: [ast.Mult]},
    **{ast.And: [ast.Or], ast.Or: [ast.And], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]},
    **{ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq]},
    **{ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt]},
}
SISTERS = {"sum": "mean", "min": "max", "amin": "amax", "any": "all", "exp": "expm1", "zeros": "ones", "std": "var"}
SISTERS |= {"floor": "ceil", "round": "floor", "log": "log1p", "rsqrt": "sqrt", "zeros_like": "ones_like"}
SISTERS |= {"lora_A": "lora_B", "uint8": "int8", "float32": "bfloat16", "in_features": "out_features"}
SISTERS |= {sister: name for name, sister in SISTERS.items()}
REDUCTIONS = {"sum", "mean", "std", "amax", "amin", "any", "all", "norm", "squeeze", "flatten", "sort", "clone"}
NO_VALUES = {"torch", "nn", "math", "nn.init", "nn.functional", "self"}
MESSAGES = {"check_shapes": 0}  # functions whose first argument is a text for the reader


@dataclass(frozen=True)
class Mutant:
    """One change: the statement as it is and as it was tried, and all of the function or class with that change.

    place is the number of that function or class in the module's body.
    """

    module: str
    function: str
    operator: str
    before: str
    after: str
    place: int
    code: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}"

    def tree(self) -> ast.Module:
        """The module with this change."""
        tree = source(self.module)
        (tree.body[self.place],) = ast.parse(self.code).body
        return tree


def mutants(module: str) -> list[Mutant]:
    """All of a module's mutants, without those whose code is the original's or another's."""
    found: dict[str, Mutant] = {}
    for place, top in enumerate(source(module).body):
        if isinstance(top, ast.Assign) and not is_message(top.value):
            functions = [("constants", top)]
        elif isinstance(top, ast.FunctionDef):
            functions = [(top.name, top)]
        elif isinstance(top, ast.ClassDef):
            functions = [(f"{top.name}.{f.name}", f) for f in top.body if isinstance(f, ast.FunctionDef)]
        else:
            continue
        original = ast.unparse(top)
        for function, node in functions:
            for operator, before, after in changes(node):
                code = ast.unparse(top)
                if code != original:
                    found.setdefault(code, Mutant(module, function, operator, before, after, place, code))
            for old, new in BY_HAND.get(f"{module}.{function}", []):
                if original.count(old) != 1:
                    raise ValueError(f"BY_HAND: {old!r} stands {original.count(old)} times in {module}.{function}")
                code = original.replace(old, new)
                found.setdefault(code, Mutant(module, function, "by hand", old, new, place, code))
            if ast.unparse(top) != original:
                raise AssertionError(f"a change of {module}.{function} was not undone")
    return list(found.values())


def source(module: str) -> ast.Module:
    return ast.parse((ROOT / "ftlab" / "scratch" / f"{module}.py").read_text("utf-8"))


def is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value


def changes(function: ast.stmt) -> Iterator[tuple[str, str, str]]:
    """(operator, statement before, after), while the tree holds the change; it is undone before the next one."""
    for holder, field, index, statement in places(function, function):
        node = getattr(holder, field) if index is None else getattr(holder, field)[index]
        before = line(statement)
        for operator, new in replacements(node, holder, field, function):
            put(holder, field, index, new)
            after = line(new if node is statement else statement)
            yield operator, before, f"without {before}" if isinstance(new, ast.Pass) else after
            put(holder, field, index, node)
    if isinstance(function, ast.FunctionDef) and "no_grad" in "".join(map(ast.unparse, function.decorator_list)):
        decorators, function.decorator_list = function.decorator_list, []
        yield "a gradient that should not be", "@torch.no_grad()", "without @torch.no_grad()"
        function.decorator_list = decorators


def put(holder: ast.AST, field: str, index: int | None, node: ast.AST | None) -> None:
    if index is None:
        setattr(holder, field, node)
    else:
        getattr(holder, field)[index] = node


def places(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.AST, str, int | None, ast.stmt]]:
    """Where a node stands, for each below this one that is code: no annotation, no docstring, no text of an error."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_comment", "exc", "msg") or isinstance(node, ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or is_message(child):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            below = child if isinstance(child, ast.stmt) else statement
            yield node, field, index, below
            yield from places(child, below)


def line(statement: ast.stmt) -> str:
    """The statement in one line, of a compound one the head; and of a raise not the text."""
    if isinstance(statement, ast.Raise):
        return f"raise {ast.unparse(statement.exc.func)}(...)"
    if isinstance(statement, ast.FunctionDef):
        statement = copy.copy(statement)
        statement.body = [ast.Pass()]
        return ast.unparse(statement).replace("\n", " ").removesuffix("     pass")
    return ast.unparse(statement).split("\n")[0]


def replacements(node: ast.AST, holder: ast.AST, field: str, function: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """(operator, node) to put in the place of this node."""

    def like(**changed) -> ast.AST:
        new = copy.copy(node)
        for name, value in changed.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.BinOp():
            yield from (("another operator", like(op=op())) for op in SWAPS.get(type(node.op), []))
            yield from (("an operand alone", side) for side in (node.left, node.right))
        case ast.BoolOp():
            yield "and, or", like(op=SWAPS[type(node.op)][0]())
            for i in range(len(node.values)):
                yield "a condition left out", like(values=node.values[:i] + node.values[i + 1 :])
        case ast.UnaryOp():
            yield "a sign, a not", node.operand
        case ast.Compare():
            for i, op in enumerate(node.ops):
                others = SWAPS[type(op)] + ([ast.Lt, ast.Gt] if is_number(node.comparators[i]) else [])
                for other in others:
                    if type(op) is not other:
                        yield "another comparison", like(ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
        case ast.If() | ast.IfExp():
            yield "a condition turned", like(test=ast.UnaryOp(ast.Not(), node.test))
            if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise | ast.Return):
                yield "a check or early return left out", ast.Pass()
        case ast.Constant(value=bool()):
            yield "the other truth value", like(value=not node.value)
        case ast.Constant(value=int()):
            yield from (("another number", like(value=node.value + step)) for step in (1, -1))
        case ast.Constant(value=float()):
            yield from (("another number", like(value=value)) for value in (node.value + 1, node.value / 2 or -1.0))
        case ast.Constant(value=str()):
            yield "another name", like(value=node.value + "_")
        case ast.Call():
            yield from calls(node, like)
        case ast.Attribute(ctx=ast.Load()) if node.attr in SISTERS:
            yield f"{SISTERS[node.attr]} for {node.attr}", like(attr=SISTERS[node.attr])
        case ast.Attribute(ctx=ast.Load(), attr="T" | "mT"):
            yield "not transposed", node.value
        case ast.Name(ctx=ast.Load()):
            yield from names(node, holder, field, function)
        case ast.keyword(arg="min" | "max"):
            yield "min for max", like(arg=SISTERS[node.arg])
        case ast.Subscript(ctx=ast.Load()):
            yield "not indexed", node.value
        case ast.Slice():
            for bound in ("lower", "upper", "step"):
                if getattr(node, bound) is not None:
                    yield "a slice without a bound", like(**{bound: None})
        case ast.Tuple(ctx=ast.Load()) if len(node.elts) == 2 and not isinstance(holder, ast.Subscript):
            yield "two values in each other's place", like(elts=node.elts[::-1])
        case ast.Tuple(ctx=ast.Load()) | ast.List(ctx=ast.Load()) if not isinstance(holder, ast.Subscript):
            for i in range(len(node.elts)):
                yield "an element left out", like(elts=node.elts[:i] + node.elts[i + 1 :])
        case ast.comprehension():
            for i, test in enumerate(node.ifs):
                yield "a filter left out", like(ifs=node.ifs[:i] + node.ifs[i + 1 :])
                yield "a filter turned", like(ifs=[*node.ifs[:i], ast.UnaryOp(ast.Not(), test), *node.ifs[i + 1 :]])
        case ast.Return(value=ast.expr()) if isinstance(function, ast.FunctionDef) and function.returns:
            if (kind := ast.unparse(function.returns)) in ("Tensor", "float", "int"):
                yield "the sign of the result", like(value=ast.UnaryOp(ast.USub(), node.value))
                for parameter in parameters(function).get(kind, [])[:1]:
                    yield "an argument given back", like(value=ast.Name(parameter, ast.Load()))
        case ast.Expr() | ast.AugAssign() | ast.Assign(targets=[ast.Attribute()]):
            yield "a statement left out", ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if times_set(name, function) > 1:
            yield "a statement left out", ast.Pass()


def calls(node: ast.Call, like) -> Iterator[tuple[str, ast.AST]]:
    """What can be wrong with a call: left out, of a sister function, an argument less, or two in the wrong order."""
    text = ast.unparse(node.func)
    first = node.args[0] if node.args and not isinstance(node.args[0], ast.Starred) else None
    if text in ("isinstance", "super", "len", "range"):
        return
    method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in NO_VALUES
    if method:
        yield "a call left out", node.func.value
    elif first is not None and text not in MESSAGES:
        yield "a call left out", first
    if isinstance(node.func, ast.Name) and text in SISTERS:
        yield f"{SISTERS[text]} for {text}", like(func=ast.Name(SISTERS[text], ast.Load()))
    if method and node.func.attr == "where":
        yield "a mask turned", like(args=[ast.UnaryOp(ast.Invert(), first), *node.args[1:]])
        return
    for i in range(len(node.keywords)):
        yield "an argument left out", like(keywords=node.keywords[:i] + node.keywords[i + 1 :])
    if (len(node.args) > 1 or (method and node.func.attr in REDUCTIONS)) and text not in MESSAGES:
        yield "an argument left out", like(args=node.args[:-1])
    for i in range(MESSAGES.get(text, -1) + 1, len(node.args) - 1):
        swapped = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
        yield "two values in each other's place", like(args=swapped)


def names(node: ast.Name, holder: ast.AST, field: str, function: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """Another argument of the same type, the other one of two variables set together, a mask the wrong way round."""
    if not isinstance(function, ast.FunctionDef) or (isinstance(holder, ast.Call) and field == "func"):
        return
    together = [[*map(ast.unparse, t.elts)] for t in ast.walk(function) if isinstance(t, ast.Tuple) and is_target(t)]
    for group in [*parameters(function).values(), *together]:
        if node.id in group and len(group) > 1:
            yield "another variable", ast.Name(group[(group.index(node.id) + 1) % len(group)], ast.Load())
    if node.id.endswith("mask") and not isinstance(holder, ast.Attribute | ast.keyword):
        yield "a mask turned", ast.Compare(node, [ast.Eq()], [ast.Constant(0)])


def is_target(node: ast.Tuple) -> bool:
    return isinstance(node.ctx, ast.Store) and all(isinstance(element, ast.Name) for element in node.elts)


def times_set(name: str, function: ast.stmt) -> int:
    """How often a variable gets a value in the function, its arguments included."""
    targets = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    arguments = [n for n in ast.walk(function) if isinstance(n, ast.arg)]
    return [*(n.id for n in targets), *(n.arg for n in arguments)].count(name)


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def parameters(function: ast.FunctionDef) -> dict[str, list[str]]:
    """The names of a function's arguments by their annotation."""
    found: dict[str, list[str]] = {}
    for argument in function.args.args:
        if argument.annotation:
            found.setdefault(ast.unparse(argument.annotation), []).append(argument.arg)
    return found


# --- Trying them ------------------------------------------------------------------------------------------------------


def tried(module: str, some: list[Mutant]) -> list[str]:
    """For each mutant the test file that catches it, or "". Nothing of ftlab.scratch may be loaded in this process.

    Raises RuntimeError if a test file fails with the module as it is.
    """
    caught = [""] * len(some)
    for file in TESTS[module]:
        prepare(file)
        start = time.monotonic()
        if verdict(module, source(module), file, 600) != "passes":
            raise RuntimeError(f"tests/{file} does not pass with ftlab/scratch/{module}.py as it is")
        seconds = 20 + 10 * (time.monotonic() - start)
        for i, mutant in enumerate(some):
            if not caught[i] and verdict(module, mutant.tree(), file, seconds) != "passes":
                caught[i] = file
    return caught


def prepare(file: str) -> None:
    """Imports what the test file imports, but for ftlab.scratch and other tests, once for all forks."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_AUTO_INSTALL": "0"}
    os.environ.update(quiet, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    importlib.import_module("torch").set_num_threads(1)  # threads do not survive a fork
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # where pytest finds oracles, scripts and tiny
    for node in ast.walk(ast.parse((FOLDER / file).read_text("utf-8"))):
        wanted = [node.module] if isinstance(node, ast.ImportFrom) else []
        wanted += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in wanted:
            if not name.startswith(("ftlab.scratch", "test_")):
                importlib.import_module(name)
    same_examples()
    warm_up()
    gc.freeze()
    if loaded := [name for name in sys.modules if name.startswith("ftlab.scratch")]:
        raise RuntimeError(f"{loaded} are loaded already: a fork would test the original")


def same_examples() -> None:
    """Hypothesis draws the same in each fork, keeps nothing, and does not make a failure small."""
    phases, checks = (Phase.explicit, Phase.generate), list(HealthCheck)
    settings.register_profile("mutation", derandomize=True, database=None, phases=phases, suppress_health_check=checks)
    settings.load_profile("mutation")


WARM = """
import torch
from hypothesis import given, strategies as st
torch.testing.assert_close(torch.ones(1), torch.ones(1))
@given(st.lists(st.floats()), st.sampled_from([1, 2]))
def test_passes(x, y): pass
@given(st.integers())
def test_fails(x): assert x < 9
"""


def warm_up() -> None:
    """Makes pytest and Hypothesis import and build, once for all forks, what they otherwise would in each."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test_warm.py"
        file.write_text(WARM, "utf-8")
        with redirect_stdout(io.StringIO()):
            pytest.main([*OPTIONS, "--rootdir", folder, str(file)])


def verdict(module: str, tree: ast.Module, file: str, seconds: float) -> str:
    """How a fork ends in which the module is this tree: it "passes", "fails", "crashes" or "hangs"."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not (child := os.fork()):
        try:
            os._exit(run(module, tree, file))
        finally:  # whatever happens, this process goes no further
            os._exit(70)
    end = time.monotonic() + seconds
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(done[1])
    if code < 0:
        return "crashes"
    if code not in (0, 1, 2):  # of pytest: passed, failed, not even imported
        raise RuntimeError(f"pytest ended with {code} on tests/{file} and a mutant of {module}")
    return "fails" if code else "passes"


def run(module: str, tree: ast.Module, file: str) -> int:
    """pytest's exit status of the file, in this process, with the module as this tree has it."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.chdir(ROOT)
    stand_in(module, tree)
    return int(pytest.main([*OPTIONS, f"tests/{file}"]))


def stand_in(module: str, tree: ast.Module) -> None:
    """Puts a module made of this tree where Python looks first; one that can't be made has no names to import."""
    import ftlab.scratch

    name = f"ftlab.scratch.{module}"
    made = ModuleType(name)
    made.__file__ = str(ROOT / "ftlab" / "scratch" / f"{module}.py")
    sys.modules[name] = made
    setattr(ftlab.scratch, module, made)
    try:
        exec(compile(ast.fix_missing_locations(tree), made.__file__, "exec"), made.__dict__)
    except Exception:
        made.__dict__.clear()


# --- The result -------------------------------------------------------------------------------------------------------


def digest(some: list[Mutant]) -> str:
    """Changes when the code of a function does, or what is done to it."""
    return hashlib.sha256("\n".join(f"{m.before} -> {m.after}" for m in some).encode()).hexdigest()[:16]


def by_function(modules: list[str]) -> dict[str, list[Mutant]]:
    found: dict[str, list[Mutant]] = {}
    for module in modules:
        for mutant in mutants(module):
            found.setdefault(mutant.name, []).append(mutant)
    return found


def account(some: list[Mutant], caught: list[str]) -> dict:
    """What is kept of one function."""
    counts = {file: caught.count(file) for file in dict.fromkeys(TESTS[some[0].module]) if file in caught}
    result = {"mutants": len(some), "caught": counts, "equivalent": [], "survived": [], "digest": digest(some)}
    reasons = EQUIVALENT.get(some[0].name, {})
    for mutant, file in zip(some, caught, strict=True):
        if not file:
            one = {"operator": mutant.operator, "before": mutant.before, "after": mutant.after}
            reason = reasons.get(mutant.after)
            result["equivalent" if reason else "survived"].append(one | ({"reason": reason} if reason else {}))
    return result


def faults(functions: dict[str, dict]) -> list[str]:
    """What is not as it should be in the results: too few mutants, survivors, reasons that nothing needs any more."""
    found = [f"{name}: {one['mutants']} mutants" for name, one in functions.items() if one["mutants"] < FEWEST]
    for name, one in functions.items():
        excused = [e["after"] for e in one["equivalent"]]
        unused = EQUIVALENT.get(name, {}).keys() - set(excused)
        found += [f"{name} survived [{s['operator']}]: {s['before']}  ->  {s['after']}" for s in one["survived"]]
        found += [f"{name}: one reason for two mutants: {after}" for after in excused if excused.count(after) > 1]
        found += [f"{name}: EQUIVALENT has {after!r}, which is caught or not made" for after in unused]
    return found


def main(wanted: list[str]) -> None:
    everything = by_function(list(TESTS))
    file = RESULTS / "mutation.json"
    functions = json.loads(file.read_text("utf-8"))["functions"] if wanted and file.is_file() else {}
    chosen = [name for name in everything if not wanted or any(f"{name}.".startswith(f"{one}.") for one in wanted)]
    for module in TESTS:
        if mine := {name: everything[name] for name in chosen if name.startswith(f"{module}.")}:
            caught = iter(alone(tried, module, [mutant for some in mine.values() for mutant in some]))
            functions |= {name: account(some, [next(caught) for _ in some]) for name, some in mine.items()}
    functions = {name: functions[name] for name in everything if name in functions}
    totals = {"functions": len(functions), "mutants": sum(one["mutants"] for one in functions.values())}
    totals |= {kind: sum(len(one[kind]) for one in functions.values()) for kind in ("equivalent", "survived")}
    totals["caught"] = totals["mutants"] - totals["equivalent"] - totals["survived"]
    print(write("mutation", {"totals": totals, "tests": TESTS, "functions": functions}), totals)
    if found := faults(functions):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main(sys.argv[1:])

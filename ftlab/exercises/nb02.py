"""Notebook 02: a LoRA layer and its gradients, two adapters as one, the largest rank that fits, settings."""

import math
import re
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import IN_PLACE, NO_PATH, mistakes
from ftlab.exercises.training import micro, sft, trainer_slip, training_slip, workplace

# --- 02.1: the layer --------------------------------------------------------------------------------------------------

MY_LORA = """from torch import nn


class MyLoRA(nn.Module):
    def __init__(self, base_layer, r, lora_alpha, lora_dropout=0.0):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(base_layer.weight.new_empty(r, base_layer.in_features))
        self.lora_B = nn.Parameter(base_layer.weight.new_zeros(base_layer.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.r, self.lora_alpha = r, lora_alpha

    def forward(self, x):
        h = self.base_layer(x)
        x = self.lora_dropout(x)
        x = x @ self.lora_A.T
        x = x @ self.lora_B.T
        scaling = self.lora_alpha / self.r
        return h + scaling * x
"""


def _layer(forward: Callable) -> Callable:
    """As a learner's class: called with a base layer, r, lora_alpha and lora_dropout it gives a layer."""

    def build(base_layer, r, lora_alpha, lora_dropout=0.0):
        from ftlab.scratch.lora import LoRALinear

        layer = LoRALinear(base_layer, r, lora_alpha, lora_dropout)
        layer.r, layer.lora_alpha = r, lora_alpha
        layer.forward = lambda x: forward(layer, x)
        return layer

    return build


def _low_rank(layer, x):
    return x @ layer.lora_A.T @ layer.lora_B.T


LAYERS = {
    "alpha / r is missing": _layer(lambda m, x: m.base_layer(x) + _low_rank(m, m.lora_dropout(x))),
    "the scale is alpha / r, not alpha": _layer(
        lambda m, x: m.base_layer(x) + m.lora_alpha * _low_rank(m, m.lora_dropout(x))),
    "the scale is upside down: alpha / r": _layer(
        lambda m, x: m.base_layer(x) + m.r / m.lora_alpha * _low_rank(m, m.lora_dropout(x))),
    "the scale is alpha / r; with the root of r it is rsLoRA": _layer(
        lambda m, x: m.base_layer(x) + m.lora_alpha / m.r**0.5 * _low_rank(m, m.lora_dropout(x))),
    "the scale belongs to B A x only, not to W0 x": _layer(
        lambda m, x: m.lora_alpha / m.r * (m.base_layer(x) + _low_rank(m, m.lora_dropout(x)))),
    "A and B are swapped: x meets A first": _layer(
        lambda m, x: m.base_layer(x) + m.lora_alpha / m.r * (m.lora_dropout(x) @ m.lora_B @ m.lora_A)),
    "dropout is missing": _layer(lambda m, x: m.base_layer(x) + m.scaling * _low_rank(m, x)),
    "dropout acts between A and B: it belongs before A": _layer(
        lambda m, x: m.base_layer(x) + m.scaling * m.lora_dropout(x @ m.lora_A.T) @ m.lora_B.T),
    "dropout acts on what comes out of B: it belongs before A": _layer(
        lambda m, x: m.base_layer(x) + m.scaling * m.lora_dropout(_low_rank(m, x))),
    "dropout acts on what goes into W0 too: the frozen path gets all of x": _layer(
        lambda m, x: (lambda z: m.base_layer(z) + m.scaling * _low_rank(m, z))(m.lora_dropout(x))),
    "dropout acts on the whole output": _layer(
        lambda m, x: m.lora_dropout(m.base_layer(x) + m.scaling * _low_rank(m, x))),
    "the frozen path is missing: h is W0 x plus the addition": _layer(
        lambda m, x: m.scaling * _low_rank(m, m.lora_dropout(x))),
    "the addition is missing": _layer(lambda m, x: m.base_layer(x)),
    "forward returns nothing: is `return` missing?": _layer(lambda m, x: None),
}  # fmt: skip
NO_GRADIENT = {
    "A and B get no gradient: use them without .data, detach or no_grad": _layer(
        lambda m, x: m.base_layer(x) + m.scaling * (m.lora_dropout(x) @ m.lora_A.data.T @ m.lora_B.data.T)),
}  # fmt: skip
NO_WAY_BACK = {
    "W0 is frozen, but x is not: the layers below learn through both paths, without detach or no_grad": _layer(
        lambda m, x: m.base_layer(x).detach() + m.scaling * _low_rank(m, m.lora_dropout(x))),
}  # fmt: skip


def _half(layer, x, A, B):
    """The right output, with A and B handed in."""
    return layer.base_layer(x) + layer.scaling * (layer.lora_dropout(x) @ A.T @ B.T)


def _spoils(layer, x, spoiled):
    out = layer.base_layer(x) + layer.scaling * _low_rank(layer, layer.lora_dropout(x))
    spoiled.data.zero_()
    return out


def _normalised(layer, x):
    length = x.norm(dim=-1, keepdim=True)
    low = length * _low_rank(layer, layer.lora_dropout(x / length))
    return layer.base_layer(x) + layer.scaling * low


ZEROS = "for an input of zeros it is nan: divide by nothing that is 0 there"
BACKWARD = {
    f"{NO_PATH} lora_A": _layer(lambda m, x: _half(m, x, m.lora_A.detach(), m.lora_B)),
    f"{NO_PATH} lora_B": _layer(lambda m, x: _half(m, x, m.lora_A, m.lora_B.detach())),
    f"x {IN_PLACE}": _layer(lambda m, x: _spoils(m, x, x)),
    f"lora_A {IN_PLACE}": _layer(lambda m, x: _spoils(m, x, m.lora_A)),
    ZEROS: _layer(_normalised),
}


def _begun(change: Callable) -> Callable:
    """As a learner's class whose forward is right; change(layer) is done to each new layer."""

    def build(*args):
        from ftlab.scratch.lora import LoRALinear

        change(layer := LoRALinear(*args))
        return layer

    return build


BEGUN = {
    "lora_B starts with zeros, so that a new layer does what W0 does": _begun(lambda m: m.lora_B.data.normal_()),
    "lora_A starts with random numbers: while A and B are both zero, neither gets a gradient": _begun(
        lambda m: m.lora_A.data.zero_()),
    "the bias is trained: freeze the whole base layer, base_layer.requires_grad_(False)": _begun(
        lambda m: [p.requires_grad_() for p in [m.base_layer.bias] if p is not None]),
}  # fmt: skip


def _layer_slip(mine) -> Slip | None:
    """Outputs, what a new layer starts with, then gradients, of a learner's class.

    The inputs are float64. The same sums in another order differ by about 1e-7 of their largest
    term in float32, and where the terms nearly cancel that is more than `same` allows: then a right
    answer would be refused, and a wrong one would get another mistake's words.
    """
    import torch
    from torch import nn

    from ftlab.scratch.lora import LoRALinear

    if not callable(mine):
        return Slip(f"the {type(mine).__name__} {mine!r}", "the class MyLoRA itself, without calling it")

    def bound(kind: Callable) -> Callable:
        def run(x, W0, bias, A, B, lora_alpha, lora_dropout, seed):
            base_layer = nn.Linear(W0.shape[1], W0.shape[0], bias=seed % 2 == 0)  # a Llama's have none
            base_layer.weight.data = W0.clone()
            if base_layer.bias is not None:
                base_layer.bias.data = bias.clone()
            layer = kind(base_layer, len(A), lora_alpha, lora_dropout)
            layer.lora_A.data, layer.lora_B.data = A.clone(), B.clone()
            torch.manual_seed(seed)  # the same mask for both
            return layer(x)

        return run

    def draw(square: bool) -> Callable:
        def inputs(rng: Random) -> tuple:
            r, wide, tall = rng.randint(2, 4), rng.randint(5, 7), rng.randint(8, 9)
            tall = wide if square else tall
            lora_alpha = rng.choice([a for a in (1, 3, 5, 8, 16) if a not in (r, r**2)])
            shapes = (rng.choice([(2, wide), (2, 3, wide)]), (tall, wide), (tall,), (r, wide), (tall, r))
            torch.manual_seed(rng.randrange(2**31))
            numbers = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
            return *numbers, lora_alpha, rng.choice([0.0, 0.5]), rng.randrange(2**31)

        return inputs

    slips = {words: bound(kind) for words, kind in LAYERS.items()}
    state = torch.random.get_rng_state()
    try:
        new = mine(nn.Linear(3, 2), 1, 1)
        found = {name: tuple(weight.shape) for name, weight in new.named_parameters() if name.startswith("lora_")}
        if found != (parameters := {"lora_A": (1, 3), "lora_B": (2, 1)}):
            likely = "both are an nn.Parameter, lora_A of shape (r, in), lora_B of shape (out, r)"
            return Slip(f"the parameters {found}", f"{parameters}", likely, "nn.Linear(3, 2), r = 1, lora_alpha = 1")
        for square in (True, False):  # square first: swapped matrices fit there, and their slip can be named
            if slip := first_difference(bound(mine), bound(LoRALinear), draw(square), slips, n=25):
                return Slip(slip.got, slip.wanted, slip.likely)
    finally:
        torch.random.set_rng_state(state)
    zero_B, random_A, bias = BEGUN
    base_layer, x = nn.Linear(3, 2), torch.ones(1, 3, requires_grad=True)
    layer = mine(base_layer, 2, 4)
    drawn = layer.lora_A.detach().clone()
    if not same(layer(x), base_layer(x)):
        return Slip("a new layer that differs from the base layer", "one that does the same", zero_B)
    if (drawn[0] == drawn[1]).all():  # zeros, or another number: then the update stays of rank 1
        return Slip("equal rows in lora_A", "random numbers", random_A)
    nn.init.ones_(layer.lora_B)  # while B is zero, so is the gradient of A
    if (out := layer(x).sum()).requires_grad:
        out.backward()
    if base_layer.weight.grad is not None:
        return Slip("a gradient for W0", "none", "freeze the base layer: requires_grad_(False)")
    if base_layer.bias.grad is not None:
        return Slip("a gradient for the bias", "none", bias)
    if layer.lora_A.grad is None and layer.lora_B.grad is None:
        return Slip("no gradient for A or for B", "one for each", *NO_GRADIENT)
    through_both = (base_layer.weight + 4 / 2 * layer.lora_B @ layer.lora_A).sum(0)
    if x.grad is None or not same(x.grad[0], through_both):
        return Slip("a gradient of x that lacks a path", "that of W0 x + alpha / r B A x", *NO_WAY_BACK)
    return _backward_slip(mine)


def _backward_slip(mine) -> Slip | None:
    """What is wrong with the gradients of a class that gives right outputs, or what it changes."""
    import torch
    from torch import nn

    from ftlab.scratch.lora import LoRALinear

    def bound(kind: Callable) -> Callable:
        def run(x, lora_A, lora_B, W0, lora_alpha):
            base_layer = nn.Linear(W0.shape[1], W0.shape[0], bias=False)
            base_layer.weight.data = W0
            layer = kind(base_layer, len(lora_A), lora_alpha)
            del layer.lora_A, layer.lora_B  # parameters would keep the gradients to themselves
            layer.lora_A, layer.lora_B = lora_A, lora_B
            return layer(x)

        return run

    def draw(rng: Random) -> tuple:
        shapes = (3, 5), (2, 5), (4, 2), (4, 5)
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return *drawn, rng.choice([1, 3, 8])

    def zeros(rng: Random) -> tuple:
        x, *others = draw(rng)
        return 0 * x, *others

    by, edges = ("x", "lora_A", "lora_B"), {ZEROS: zeros}
    return first_difference(bound(mine), bound(LoRALinear), draw, n=10, by=by, edges=edges)


# --- 02.2: two adapters as one ----------------------------------------------------------------------------------------


def my_sum(A1, B1, scaling1, A2, B2, scaling2, use_rslora):
    import torch

    A = torch.cat([A1, A2])
    B = torch.cat([scaling1 * B1, scaling2 * B2], dim=1)
    r = len(A)
    return A, B, r**0.5 if use_rslora else r


def _sums(scale_A: bool = False, scale_B: bool = True, stacked: bool = True, lora_alpha: Callable | None = None):
    """my_sum with one thing changed."""

    def both(A1, B1, scaling1, A2, B2, scaling2, use_rslora):
        import torch

        s1, s2 = (scaling1, scaling2) if scale_A else (1, 1)
        t1, t2 = (scaling1, scaling2) if scale_B else (1, 1)
        if stacked:
            A, B = torch.cat([s1 * A1, s2 * A2]), torch.cat([t1 * B1, t2 * B2], dim=1)
        else:
            A, B = s1 * A1 + s2 * A2, t1 * B1 + t2 * B2
        r = len(A)
        return A, B, lora_alpha(r, use_rslora) if lora_alpha else r**0.5 if use_rslora else r

    return both


SUMS = {
    "(B1 + B2)(A1 + A2) holds B1 A2 and B2 A1 too: stack the matrices": _sums(stacked=False),
    "the two scalings are lost: put each into its own B": _sums(scale_B=False),
    "each scaling counts twice: put it into B or into A, not into both": _sums(scale_A=True),
    "the server divides lora_alpha by r1 + r2: make up for it": _sums(lora_alpha=lambda r, use_rslora: 1),
    "with use_rslora the server divides by the root of r": _sums(lora_alpha=lambda r, use_rslora: r),
    "without use_rslora the server divides by r itself": _sums(lora_alpha=lambda r, use_rslora: r**0.5),
    "lora_alpha is r times too large": _sums(lora_alpha=lambda r, use_rslora: r**1.5 if use_rslora else r**2),
}


def _sum_slip(mine) -> Slip | None:
    import torch
    from torch import nn

    from ftlab.scratch.lora import LoRALinear

    def served(function: Callable) -> Callable:
        """The rank, and what a server adds to W0, from what the function returns."""

        def update(*inputs):
            returned = function(*inputs)
            if not (isinstance(returned, tuple | list) and len(returned) == 3):
                return "not A, B and lora_alpha"
            A, B, lora_alpha = returned
            if not (A.ndim == B.ndim == 2 and len(A) == B.shape[1]):
                return f"nothing: A is {tuple(A.shape)}, B {tuple(B.shape)}, and B's columns must be A's rows"
            layer = LoRALinear(nn.Linear(A.shape[1], B.shape[0], bias=False), len(A), lora_alpha, use_rslora=inputs[-1])
            layer.lora_A.data, layer.lora_B.data = A, B
            return {"rows of A": len(A), "update": layer.delta_weight().detach()}

        return update

    def draw(rng: Random) -> tuple:
        r1, r2, wide, tall = rng.randint(1, 2), rng.randint(1, 2), rng.randint(3, 5), rng.randint(3, 5)
        r2 = r1 if rng.random() < 0.7 else r2
        A1, B1, A2, B2 = (
            torch.tensor([[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)])
            for rows, columns in ((r1, wide), (tall, r1), (r2, wide), (tall, r2))
        )
        return A1, B1, rng.choice([0.5, 2.0, 4.0]), A2, B2, rng.choice([0.5, 3.0]), rng.random() < 0.5

    def sum_of_both(A1, B1, scaling1, A2, B2, scaling2, use_rslora):
        return {"rows of A": len(A1) + len(A2), "update": scaling1 * B1 @ A1 + scaling2 * B2 @ A2}

    slip = first_difference(served(mine), sum_of_both, draw, {words: served(f) for words, f in SUMS.items()})
    if slip and IN_PLACE in slip.likely:
        return slip
    return slip and Slip(f"the server adds {slip.got}", slip.wanted, slip.likely, slip.given)


# --- 02.3: train the largest rank that fits ---------------------------------------------------------------------------


def my_trainer(model, tokenizer, rows, budget):
    from peft import LoraConfig
    from torch import nn
    from trl import SFTConfig, SFTTrainer

    linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    r = budget // sum(module.in_features + module.out_features for module in linear)
    return SFTTrainer(
        model,
        train_dataset=rows,
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/exercise",
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        peft_config=LoraConfig(r=r, lora_alpha=32, target_modules="all-linear"),
    )


def _linear(model) -> dict[str, Any]:
    from torch import nn

    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def _a_rank(model) -> int:
    """What one more rank costs."""
    return sum(m.in_features + m.out_features for m in _linear(model).values())


def trainer(rank: Callable = lambda r: r, lora: dict | None = None, **changed):
    """my_trainer with something changed."""

    def build(model, tokenizer, rows, budget):
        shape = None if lora is None else {"r": rank(budget // _a_rank(model))} | lora
        return sft(model, tokenizer, rows, shape, **{"learning_rate": 3e-3, "per_device_train_batch_size": 8} | changed)

    return build


TRAINERS = {
    "peft_config is missing, so every weight is trained": trainer(lora=None),
    "that is over the budget: round down": trainer(lambda r: r + 1, {}),
    "a larger rank fits: lm_head has no adapter, so it does not count": trainer(lambda r: r - 1, {}),
    'some linear layers have no LoRA: target_modules="all-linear"': trainer(
        lambda r: 2 * r, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    ),
    "modules_to_save trains whole layers beside LoRA": trainer(lora={"modules_to_save": ["embed_tokens"]}),
    "the rate is too low; TRL's own, 2e-5, is made for all weights": trainer(lora={}, learning_rate=2e-5),
    "the rate is too high": trainer(lora={}, learning_rate=1.0),
    "return the trainer itself; the check calls train()": lambda *inputs: my_trainer(*inputs).model,
}


def _order(rng: Random) -> dict[str, Any]:
    number = f"{rng.randrange(10**5, 10**6)}"
    text = rng.choice(["Order {} came cold.", "Where is {}?", "My order {} is late", "Please cancel {}, thank you"])
    user = {"role": "user", "content": text.format(number)}
    return {"prompt": [user], "completion": [{"role": "assistant", "content": number}]}


def _trainer_slip(mine) -> Slip | None:
    from datasets import Dataset

    keys = ("peft", "over", "larger", "linear", "save", "low", "high", "train")
    words, rng = dict(zip(keys, TRAINERS, strict=True)), Random()
    rows, held_out = (Dataset.from_list([_order(rng) for _ in range(n)]) for n in (64, 8))
    tokenizer, model = micro()
    linear, a_rank, fits = list(_linear(model)), _a_rank(model), rng.randint(3, 12)
    budget = a_rank * fits + rng.randrange(a_rank // 4, a_rank)
    with workplace():
        trainer = mine(model, tokenizer, rows, budget)
        if slip := trainer_slip(trainer, linear, words):
            return slip
        r, n = trainer.model.peft_config["default"].r, trainer.model.get_nb_trainable_parameters()[0]
        if r != fits or n > budget:  # rank_pattern and DoRA add weights
            got, wanted = f"r = {r}, {n:,} trainable weights", f"r = {fits}, at most {budget:,}"
            return Slip(got, wanted, words["larger" if r < fits else "over"])
        return training_slip(trainer, tokenizer, held_out, 16, 0.1, words)


# --- 02.4: debug this -------------------------------------------------------------------------------------------------


def my_load(model, state):
    own = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    new = {name.removeprefix("base_model.model.").removesuffix(".weight"): tensor for name, tensor in state.items()}
    if new.keys() != own.keys():  # before anything is copied
        raise ValueError(f"not in both the file and the model: {sorted(new.keys() ^ own.keys())[:3]}")
    for name, weight in own.items():
        weight.data.copy_(new[name])
    return model


def _loader(suffix: bool = True, missing: bool = True, extra: bool = True, late: bool = False):
    """my_load with something left out, or with its complaint after the copying."""

    def load(model, state):
        own = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
        ending = ".weight" if suffix else ""
        new = {name.removeprefix("base_model.model.").removesuffix(ending): tensor for name, tensor in state.items()}
        faulty = (missing and own.keys() - new.keys()) or (extra and new.keys() - own.keys())
        if faulty and not late:
            raise ValueError(sorted(faulty))
        for name in own.keys() & new.keys():
            own[name].data.copy_(new[name])
        if faulty:
            raise ValueError(sorted(faulty))
        return model

    return load


LOADERS = {
    AS_GIVEN: _loader(suffix=False, missing=False, extra=False),
    "a file that lacks a tensor is loaded without an error": _loader(missing=False),
    "a file with one tensor too many is loaded without an error": _loader(extra=False),
    "the error comes too late: a part of the adapter is copied already": _loader(late=True),
}


def _load_slip(mine) -> Slip | None:
    import torch
    from torch import nn

    from ftlab.scratch.lora import add_lora, lora_state_dict

    def model() -> nn.Module:
        layers = nn.Sequential()
        layers.mlp = nn.Sequential()
        layers.mlp.up_proj, layers.mlp.down_proj = nn.Linear(3, 4), nn.Linear(4, 3)
        add_lora(layers, ["up_proj", "down_proj"], 2, 4)
        return layers

    def loaded(function: Callable, kind: str) -> Callable:
        def run(values, i):
            target = model()
            state = {name: values[k : k + tensor.numel()].view(tensor.shape) for k, (name, tensor) in enumerate(
                lora_state_dict(target).items())}  # fmt: skip
            before = lora_state_dict(target)
            if kind in ("lacks", "renamed"):
                del state[list(state)[i]]
            if kind in ("extra", "renamed"):
                state["base_model.model.head.lora_A.weight"] = values[:4].view(2, 2)
            if kind == "good":
                returned = function(target, state)
                copied = {name: (tensor - before[name]).abs().max().item() > 0 and same(tensor, state[name])
                          for name, tensor in lora_state_dict(target).items()}  # fmt: skip
                return copied | {"returned": returned is target}
            try:
                function(target, state)
            except Exception as error:
                changed = [name for name, tensor in lora_state_dict(target).items() if not same(tensor, before[name])]
                return {"raised": type(error).__name__, "changed before that": changed}
            return {"raised": None}

        return run

    def draw(rng: Random) -> tuple:
        return torch.tensor([rng.gauss(0, 1) for _ in range(20)]), rng.randrange(4)

    given, lacking, superfluous, late = LOADERS
    cases = (
        ("good", "a file that fits", [given]),
        ("lacks", "a file that lacks one tensor", [late, lacking]),
        ("extra", "a file with one tensor too many", [late, superfluous]),
        ("renamed", "a file with a tensor under another name", [late, lacking, superfluous]),
    )
    for kind, file, words in cases:
        slips = {each: loaded(LOADERS[each], kind) for each in words}
        slip = first_difference(loaded(mine, kind), loaded(my_load, kind), draw, slips, n=8)
        if slip and kind == "good" and "'returned': False" in slip.got:
            return Slip("another thing is returned", "the model", given=file)
        if slip and kind == "good":
            likely = slip.likely
            if likely == given and loaded(mine, "lacks")(*draw(Random()))["raised"]:  # it looks at the names already
                likely = "copy each tensor into the parameter that is there: parameter.data.copy_(tensor)"
            return Slip("lora_A and lora_B are not the file's", "each tensor in its place", likely, file)
        if slip:
            return Slip(slip.got, slip.wanted, slip.likely, file)
    return None


# --- 02.6: both gradients ---------------------------------------------------------------------------------------------


def my_gradients(x, g, A, B, s):
    a = x @ A.T  # (T, in) -> (T, r)
    grad_A = s * (g @ B).T @ x  # (r, T) @ (T, in)
    grad_B = s * g.T @ a  # (out, T) @ (T, r)
    return grad_A, grad_B


def _gradient_sum(scale_A: float = 1, scale_B: float = 1, means: bool = False):
    """my_gradients times something."""

    def both(x, g, A, B, s):
        grad_A, grad_B = my_gradients(x, g, A, B, s)
        n = len(x) if means else 1
        return s ** (scale_A - 1) * grad_A / n, s ** (scale_B - 1) * grad_B / n

    return both


def _products_of_sums(x, g, A, B, s):
    return my_gradients(x.sum(0, keepdim=True), g.sum(0, keepdim=True), A, B, s)


def _without_the_other(x, g, A, B, s):
    ones = B.new_ones(B.shape)
    return my_gradients(x, g, A, ones, s)[0], my_gradients(x, g, A, B, s)[1]


GRADIENTS = {
    "the scale s is missing in both": _gradient_sum(0, 0),
    "the scale s is missing in the gradient of A": _gradient_sum(0, 1),
    "the scale s is missing in the gradient of B": _gradient_sum(1, 0),
    "s counts twice in the gradient of A: it is in B^T g or in front, not in both": _gradient_sum(2, 1),
    "tokens add up: a sum over them, not a mean": _gradient_sum(means=True),
    "each token has its own g and x: sum the products, don't multiply the sums": _products_of_sums,
    "one token alone: all of them add up": lambda x, g, A, B, s: my_gradients(x[:1], g[:1], A, B, s),
    "the gradient of A comes through B: s (B^T g) x^T": _without_the_other,
    "that is where the optimizer goes; the gradient itself has the other sign": lambda *inputs: tuple(
        -gradient for gradient in my_gradients(*inputs)
    ),
    "A's gradient comes first, then B's": lambda *inputs: my_gradients(*inputs)[::-1],
    "a gradient has the shape of its matrix: transpose both": lambda *inputs: tuple(
        gradient.T for gradient in my_gradients(*inputs)
    ),
}


def _gradients_slip(mine) -> Slip | None:
    """The oracle is autograd through h = s B A x, weighted with g. W0 x adds nothing to either gradient."""
    import torch

    def by_autograd(x, g, A, B, s):
        A, B = (weight.detach().clone().requires_grad_() for weight in (A, B))
        h = s * (x @ A.T @ B.T)
        return torch.autograd.grad((h * g).sum(), (A, B))

    def draw(rng: Random) -> tuple:
        tokens, wide, r = rng.randint(2, 4), rng.randint(4, 5), rng.randint(2, 3)
        tall = wide + rng.randint(1, 2)
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        shapes = (tokens, wide), (tokens, tall), (r, wide), (tall, r)
        numbers = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return *numbers, rng.choice([0.5, 2.0, 4.0])

    return first_difference(mine, by_autograd, draw, GRADIENTS)


# --- 02.5: settings for an 8B -----------------------------------------------------------------------------------------
#
# The bounds are wide on purpose. Only what the memory count, the rank rule, a published run or every
# guide of the lesson speaks against fails. What can be defended passes, with remarks.

MODEL, ROWS, LENGTH, COMPLETION = "Llama-3.1-8B", 200_000, 2_000, 500
TOKENS = ROWS * COMPLETION
CARD_BYTES, KEPT_FREE = 16 * 2**30, 0.15  # an RTX 4080
SPEED = 2413  # tokens/s of torchtune's QLoRA of this model on an RTX 4090: data/published/torchtune.yaml
MLP = {"gate_proj", "up_proj", "down_proj"}
LINEARS = MLP | {"q_proj", "k_proj", "v_proj", "o_proj"}
NF4 = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
WHOLE = ("r", "per_device_train_batch_size", "gradient_accumulation_steps")
NUMBERS = (*WHOLE, "lora_alpha", "learning_rate", "num_train_epochs", "warmup_steps")
KEYS = (*NUMBERS, "target_modules", "load_in_4bit")
SETTINGS_WORDS = {
    "small rank": "the rank is too small for this much data: count the completion tokens",
    "large rank": "no row fits beside an adapter of this rank: its own states take too much",
    "layers": "linear layers have no adapter, and a higher rank elsewhere won't make up for it",
    "bits": "the frozen weights alone don't fit this card: QLoRA is what it is for",
    "large batch": "rows per pass times accumulation is the batch; LoRA tolerates large ones badly",
    "small batch": "rows per pass times accumulation is the batch, and this one is noisy",
    "memory": "out of memory: fewer rows per pass, more accumulation steps",
    "head": "TRL can't chunk the loss over an adapted lm_head, and with loss_type='nll' it holds all logits",
    "passes": "every pass unpacks all weights: more rows per pass and less accumulation are faster",
    "high": "a rate for a tiny model: at 3e-3 Llama-3.1-8B diverged at every rank tried, and 1e-3 was no "
    "better than 3e-4 at any, with batches of 128 rows",
    "low": "a rate for full fine-tuning, as TRL's default is; LoRA's best is about ten times that",
    "alpha": "alpha is a second knob for the rate: rate x alpha / 32 should lie between 1e-4 and 3e-4",
    "epochs": "more than three passes over the rows memorize them",
    "long warm-up": "the rate spends too long on its way up",
}


def my_settings():
    return {
        "r": 64,  # 168 million parameters for 100 million completion tokens; 32 has 84 million
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "load_in_4bit": True,  # 16-bit weights alone are larger than the card
        "learning_rate": 1e-4,  # 3e-4 at 128 rows, scaled to 16: the low end of the search
        "num_train_epochs": 1,
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 4,  # 8 would not fit
        "gradient_accumulation_steps": 4,
    }


def _names_of(modules: Any) -> set[str]:
    """What PEFT adapts for these target_modules, of LINEARS and lm_head; a str is a regular expression."""
    if modules == "all-linear":
        return LINEARS
    if isinstance(modules, str):
        return _matched(modules)
    given = modules if isinstance(modules, list | tuple | set | frozenset) else ()
    return {name for name in (*LINEARS, "lm_head") if name in given}


def _matched(pattern: str) -> set[str]:
    paths = {"lm_head": "lm_head"}
    for name in LINEARS:
        block = "mlp" if name in MLP else "self_attn"
        paths[name] = f"model.layers.0.{block}.{name}"
    try:
        return {name for name, path in paths.items() if re.fullmatch(pattern, path)}
    except re.error:
        return set()


def _malformed(settings: Any) -> Slip | None:
    """A Slip if it is no dict with all the keys, or a value is of the wrong kind."""
    if not isinstance(settings, dict):
        return Slip(f"the {type(settings).__name__} {settings!r}", "a dict with these nine keys")
    missing = [key for key in KEYS if key not in settings]
    if missing:
        return Slip(f"no {missing[0]}", "a dict with these nine keys")
    for key in NUMBERS:
        if not _fits_its_key(key, settings[key]):
            wanted = "a whole number above 0" if key in WHOLE else "a number above 0"
            return Slip(f"{key}={settings[key]!r}", "0 or more" if key == "warmup_steps" else wanted)
    if type(settings["load_in_4bit"]) is not bool:
        return Slip(f"load_in_4bit={settings['load_in_4bit']!r}", "True or False")
    return None


def _fits_its_key(key: str, value: Any) -> bool:
    kinds = (int,) if key in WHOLE else (int, float)
    if type(value) not in kinds or not math.isfinite(value):
        return False
    return value > 0 or (value == 0 and key == "warmup_steps")


def _peak(rows: int, accumulation: int, r: int, adapted: Iterable[str]) -> float:
    """Predicted peak of a QLoRA step, in GB. Rows differ in length, so several in a pass are padded."""
    from ftlab import memory

    head = {"loss_type": "nll"} if "lm_head" in adapted else {}
    targets = tuple(sorted(set(adapted) & LINEARS))
    step = memory.estimate(
        MODEL,
        r=r,
        max_length=LENGTH,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        target_modules=targets,
        padded=rows > 1,
        **NF4,
        **head,
    )
    return step.peak_bytes / 1e9


def _capacity(r: int, adapted: set[str], notes: list[str]) -> Slip | None:
    """The layers rule, then the rank rule."""
    from ftlab import memory

    if not adapted >= MLP:
        return Slip(f"adapters on {sorted(adapted)}", '"all-linear"', SETTINGS_WORDS["layers"])
    parameters = memory.architectures()[MODEL].lora_params(r, adapted & LINEARS)
    held = f"r={r}: {parameters / 1e6:.1f} million parameters"
    if parameters < TOKENS / 2:  # the rule is "a very rough approximation"
        wanted = f"about {TOKENS / 1e6:.0f} million or more"
        return Slip(held, wanted, SETTINGS_WORDS["small rank"])
    if parameters < TOKENS:
        notes.append(f"{held} for {TOKENS / 1e6:.0f} million tokens, a little below the rank rule.")
    if not adapted >= LINEARS:
        notes.append("Without attention: in LoRA Without Regret it added nothing to the MLP.")
    return None


def _batch(rows: int, accumulation: int, notes: list[str]) -> Slip | None:
    together = rows * accumulation
    if 4 <= together <= 32:
        if together < 8:
            notes.append(f"{together} rows per step are few, so expect a noisy loss.")
        return None
    got = f"{rows} x {accumulation} = {together} rows per optimizer step"
    return Slip(got, "4 to 32 rows", SETTINGS_WORDS["large batch" if together > 32 else "small batch"])


def _fit(s: dict, adapted: set[str], notes: list[str]) -> Slip | None:
    """The memory rule: 4 bits, then rows per pass."""
    from ftlab import memory

    room = CARD_BYTES * (1 - KEPT_FREE) / 1e9
    rows, accumulation, r = s["per_device_train_batch_size"], s["gradient_accumulation_steps"], s["r"]
    if not s["load_in_4bit"]:
        weights = 2e-9 * memory.architectures()[MODEL].params
        got = f"16-bit weights of {weights:.1f} GB"
        return Slip(got, f"a step within {room:.1f} GB", SETTINGS_WORDS["bits"])
    need = _peak(rows, accumulation, r, adapted)
    if need > room:
        without_head = _peak(rows, accumulation, r, adapted & LINEARS)
        likely = "memory"
        if _peak(1, accumulation, r, adapted & LINEARS) > room:
            likely = "large rank"
        elif "lm_head" in adapted and without_head <= room:
            likely = "head"
        got = f"{rows} rows per pass and r={r}: a peak of {need:.1f} GB"
        return Slip(got, f"at most {room:.1f} GB", SETTINGS_WORDS[likely])
    if "lm_head" in adapted:
        notes.append("With lm_head adapted, TRL needs loss_type='nll'.")
    if accumulation > 1 and _peak(2 * rows, accumulation, r, adapted) <= room:
        if rows == 1:
            return Slip("1 row per pass", "2 or more, which fit as well", SETTINGS_WORDS["passes"])
        notes.append(f"{2 * rows} rows per pass fit as well, and are a few percent faster.")
    return None


def _strength(rate: float, alpha: float, notes: list[str]) -> Slip | None:
    """The rate rule and the alpha rule: what counts is their product."""
    strength = rate * alpha / 32
    if strength >= 1e-3 or strength < 5e-5:
        likely = "high" if rate >= 1e-3 else "low" if rate < 5e-5 else "alpha"
        got = f"learning_rate={rate:g} with alpha {alpha:g}"
        return Slip(got, "1e-4 to 3e-4 with alpha 32", SETTINGS_WORDS[likely])
    if alpha != 32:
        notes.append(f"alpha {alpha:g} at {rate:g} is about as strong as alpha 32 at {strength:.2g}.")
    if strength > 4e-4:
        notes.append("With batches of 128 rows 3e-4 was best, so try weaker ones too.")
    return None


def _passes(s: dict, notes: list[str]) -> Slip | None:
    epochs, warm = s["num_train_epochs"], s["warmup_steps"]
    if epochs > 3:
        return Slip(f"{epochs:g} epochs", "up to 3", SETTINGS_WORDS["epochs"])
    steps = ROWS * epochs / (s["per_device_train_batch_size"] * s["gradient_accumulation_steps"])
    warm *= steps if warm < 1 else 1  # below 1 it is a share of all steps
    if warm > 0.1 * steps:
        got = f"{warm:.0f} of {steps:.0f} steps of warm-up"
        return Slip(got, "up to a tenth", SETTINGS_WORDS["long warm-up"])
    if not warm:
        notes.append("No warm-up: LoRA Without Regret had none either, at a constant rate.")
    if epochs < 1:
        notes.append(f"{ROWS * epochs:,.0f} rows are enough for a start: the sweep had 100,000.")
    return None


def _settings_slip(mine) -> Slip | str:
    """The first Slip in the order of the six rules, else what can be remarked on settings that pass."""
    s = mine()
    if slip := _malformed(s):
        return slip
    adapted, notes = _names_of(s["target_modules"]), []
    rows, accumulation = s["per_device_train_batch_size"], s["gradient_accumulation_steps"]
    slip = _capacity(s["r"], adapted, notes)
    slip = slip or _batch(rows, accumulation, notes)
    slip = slip or _fit(s, adapted, notes)
    slip = slip or _strength(s["learning_rate"], s["lora_alpha"], notes)
    slip = slip or _passes(s, notes)
    if slip:
        return slip
    hours = ROWS * LENGTH * s["num_train_epochs"] / SPEED / 3600
    notes.append(f"At torchtune's QLoRA speed on an RTX 4090 this takes {hours:.0f} hours: first try 20,000 rows.")
    return " ".join(notes)


def _changed(**settings):
    return lambda: my_settings() | settings


SETTINGS = {  # one change of the right answer for each of SETTINGS_WORDS
    "small rank": _changed(r=16),
    "large rank": _changed(r=512),
    "layers": _changed(r=128, target_modules=["q_proj", "v_proj"]),
    "bits": _changed(load_in_4bit=False),
    "large batch": _changed(gradient_accumulation_steps=32),
    "small batch": _changed(per_device_train_batch_size=2, gradient_accumulation_steps=1),
    "memory": _changed(per_device_train_batch_size=16, gradient_accumulation_steps=1),
    "head": _changed(target_modules=[*sorted(LINEARS), "lm_head"]),
    "passes": _changed(per_device_train_batch_size=1, gradient_accumulation_steps=16),
    "high": _changed(learning_rate=3e-3),
    "low": _changed(learning_rate=2e-5),
    "alpha": _changed(lora_alpha=256, learning_rate=2e-4),
    "epochs": _changed(num_train_epochs=10),
    "long warm-up": _changed(warmup_steps=5_000),
}


EXERCISES = {
    "02.1": Exercise(
        "Write the forward pass of a LoRA layer",
        _layer_slip,
        (
            "The drawing has two paths. The frozen one is self.base_layer(x). What happens to x on the other one, in "
            "order?",
            "Dropout, then A, then B, then the scale self.lora_alpha / self.r. A batch has its inputs as rows, so A "
            "acts as x @ self.lora_A.T.",
            "With low = self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T, return self.base_layer(x) + "
            "self.lora_alpha / self.r * low.",
        ),
        MY_LORA,
        LAYERS | NO_GRADIENT | NO_WAY_BACK | BACKWARD | BEGUN,
        seconds=120,
        difficulty=2,
        minutes=10,
    ),
    "02.2": Exercise(
        "Write two adapters as one",
        _sum_slip,
        (
            "Put B1 and B2 side by side, and A1 above A2. Multiply the two as blocks. What comes out?",
            "A is torch.cat([A1, A2]), of rank r1 + r2. torch.cat([...], dim=1) puts the two B side by side, each "
            "times its own scaling.",
            "B = torch.cat([scaling1 * B1, scaling2 * B2], dim=1). Now nothing is left to scale, so lora_alpha is "
            "what the server divides by: r = len(A), or r**0.5 with use_rslora.",
        ),
        my_sum,
        SUMS | mistakes(my_sum, [], ["B1", "A2"]),
        seconds=120,
        difficulty=3,
        minutes=20,
    ),
    "02.3": Exercise(
        "Train with the largest rank that fits the budget",
        _trainer_slip,
        (
            "One rank more costs in + out weights in each adapted layer. Which layers are adapted?",
            "All nn.Linear but lm_head. Sum module.in_features + module.out_features over them. The rank is budget "
            "// that sum.",
            'SFTConfig("runs/exercise", learning_rate=3e-3, per_device_train_batch_size=8, use_cpu=True) and '
            'LoraConfig(r=r, lora_alpha=32, target_modules="all-linear"). On a GPU leave use_cpu out.',
        ),
        my_trainer,
        TRAINERS,
        seconds=600,
        difficulty=2,
        minutes=15,
    ),
    "02.4": Exercise(
        "Debug this: the adapter loads without a complaint and without an effect",
        _load_slip,
        (
            "Print list(state)[0] and the names of model.named_parameters(). Where do they differ?",
            "At both ends: the file's names begin with base_model.model. and end with .weight. And strict=False "
            "drops every name that the model does not have, without an error.",
            'new = {name.removeprefix("base_model.model.").removesuffix(".weight"): tensor for name, tensor in '
            'state.items()}. own holds the model\'s parameters with "lora_" in their names. If new.keys() != '
            "own.keys(), raise ValueError. Only then own[name].data.copy_(new[name]) for each name.",
        ),
        my_load,
        LOADERS,
        seconds=120,
        difficulty=3,
        minutes=20,
    ),
    "02.5": Exercise(
        "Settings for Llama-3.1-8B, 200,000 rows and a card of 16 GB",
        _settings_slip,
        (
            "Follow the six rules in order. How many completion tokens are there, and how many parameters does one "
            "rank have?",
            "100 million tokens over 2.6 million parameters per rank: at least 39. memory.estimate says how many rows "
            "of 2,000 tokens fit beside the 4-bit weights in 85 % of 16 GiB.",
            "r=64, alpha 32, all linear layers, 4 bits, 4 rows per pass and 4 accumulation steps. The rest is as for "
            "the tickets, with one epoch.",
        ),
        my_settings,
        {SETTINGS_WORDS[name]: answer for name, answer in SETTINGS.items()},
        difficulty=2,
        minutes=15,
    ),
    "02.6": Exercise(
        "Both gradients of a LoRA layer, by hand",
        _gradients_slip,
        (
            "For one token they are s g a^T and s (B^T g) x^T, with a = A x. What do they look like when tokens are "
            "rows, and how do the tokens add up?",
            "As rows, a is x @ A.T and B^T g is g @ B. A matrix product over the tokens sums: (out, T) @ (T, r).",
            "grad_A = s * (g @ B).T @ x and grad_B = s * g.T @ (x @ A.T).",
        ),
        my_gradients,
        GRADIENTS | mistakes(my_gradients, [], ["x", "g", "A", "B"]),
        difficulty=2,
        minutes=10,
    ),
}  # fmt: skip

"""Runs of TRL's trainers on a tiny random Llama, plain and with `speed_up` called, and how two of
them are compared.

A run records what a learner could see: the loss of each step, the gradient of each trained weight
before each optimizer step (by a hook on all optimizers, so that nothing in the trainer shows it),
the logs, the weights, flags and random state at the end, and an evaluation. Whatever is to be
changed is changed by a function at one of the moments of MOMENTS.

Non-default settings of TRL: bf16=False, gradient_checkpointing=False, use_cpu=True, two rows a
step, three steps, learning_rate=1e-2, max_grad_norm=1e9 (nothing is clipped); beta=0.3 (DPO, KTO).
lora_B is drawn, as at 0 it hides most of what lora_A does. GRPO trains on one batch that TRL has
sampled and scored (num_iterations=40): how answers are drawn is no subject here.
"""

import copy
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from ftlab import cpu
from ftlab.paths import DATA

MOMENTS = ("arguments", "built", "sped up", "first step", "trained")
STEPS = 3
SYSTEM = {"role": "system", "content": "Answer in one word."}
TALKS = [  # a question, a good answer, a bad one
    ("hi", "yes, gladly", "no"),
    ("Where is my order? It is late.", "sorry, it is on its way", "sorry, it is lost"),
    ("2 + 2?", "4", "4 or 5"),
    ("Say something longer about rain and rivers, please.", "wet", "dry " * 9),
]
# What speed_up says that it does not log: means of logits, and DPO's token accuracy.
NOT_LOGGED = {"DPO": ("logits/", "mean_token_accuracy"), "KTO": ("logits/",)}
OTHERWISE = ("runtime", "per_second", "step_time", "_mem_")  # seconds, bytes


def turn(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def rows_of(kind: str) -> list[dict]:
    rows = []
    for i, (question, good, bad) in enumerate(TALKS):
        prompt = [SYSTEM, {"role": "user", "content": question}]
        if kind == "SFT":
            rows.append({"prompt": prompt, "completion": turn(good)})
        elif kind == "DPO":
            rows.append({"prompt": prompt, "chosen": turn(good), "rejected": turn(bad)})
        elif kind == "KTO":
            label = i % 2 == 0
            rows.append({"prompt": prompt, "completion": turn(good if label else bad), "label": label})
        else:
            rows.append({"prompt": prompt})
    return rows


def reward(completion_ids, **_) -> list[float]:
    """Any function of the answer will do."""
    return [len(ids) / 4 + ids[0] % 7 for ids in completion_ids]


KINDS = {  # trainer, config, its settings besides
    "SFT": (SFTTrainer, SFTConfig, {}),
    "DPO": (DPOTrainer, DPOConfig, {"beta": 0.3}),
    "KTO": (KTOTrainer, KTOConfig, {"beta": 0.3}),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        {
            "num_generations": 4,
            "max_completion_length": 12,
            "per_device_train_batch_size": 8,
            "num_iterations": 40,
        },
    ),
}


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "micro" / "model")


def tiny_llama(cls=LlamaForCausalLM, seed: int = 0, **changes) -> LlamaForCausalLM:
    """Random, with grouped queries; its weights are large, so that what is read matters."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    other = {"initializer_range": 0.2, "tie_word_embeddings": True}
    return cls(LlamaConfig(**shape | special | other | changes)).eval()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="speed_up_runs_")


def settings(kind: str, **changes) -> dict:
    """What a trainer's config is given here."""
    asked = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1}
    asked |= {"learning_rate": 1e-2, "max_grad_norm": 1e9, "bf16": False, "use_cpu": True}
    asked |= {"gradient_checkpointing": False, "disable_tqdm": True}
    asked |= {"report_to": "none", "save_strategy": "no"}
    return asked | KINDS[kind][2] | changes


def build(
    kind: str,
    model=None,
    lora: LoraConfig | None = None,
    rows: list[dict] | None = None,
    trainer: type | None = None,
    config: type | None = None,
    more: dict | None = None,
    scored: list[dict] | None = None,
    **changes,
):
    """TRL's trainer of a kind, lora_B drawn; `more` goes to its constructor, `changes` to its
    config.

    scored: the batches that GRPO trains on; those of `scored_batches()` if None.
    """
    trainer_class, config_class, _ = KINDS[kind]
    needs = {"reward_funcs": reward} if kind == "GRPO" else {}
    needs["peft_config"] = lora or LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
    rows = dataset(kind) if rows is None else Dataset.from_list(rows)
    asked = settings(kind, **changes)
    args = (config or config_class)(asked.pop("output_dir", _folder().name), **asked)
    model = tiny_llama() if model is None else model
    torch.manual_seed(0)  # lora_A is drawn in the trainer's __init__
    with unhashed():
        made = (trainer or trainer_class)(
            model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer(),
            **needs | (more or {}),
        )
    add_noise(made.model)
    if kind == "GRPO":
        made._step, made._buffered_inputs = 1, copy.deepcopy(scored or scored_batches())
    return made


@functools.cache
def dataset(kind: str) -> Dataset:
    """The rows; those of SFT as TRL tokenizes and labels them."""
    rows = rows_of(kind) * (2 if kind == "GRPO" else 1)
    return build("SFT", rows=rows).train_dataset if kind == "SFT" else Dataset.from_list(rows)


@contextmanager
def unhashed() -> Iterator[None]:
    """datasets hashes models and functions to find earlier results: a third of what these runs
    would take.
    """
    name = "datasets.fingerprint.update_fingerprint"
    with mock.patch(name, lambda *_: datasets.fingerprint.generate_random_fingerprint()):
        yield


def add_noise(model) -> None:
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)


@functools.cache
def scored_batches() -> list[dict]:
    return batches_of_trl()


def batches_of_trl(trainer=None, **changes) -> list[dict]:
    """What TRL's GRPOTrainer, or the one given, samples and scores for one generation."""
    trainer = trainer or build("GRPO", scored=[{}], **changes)
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    torch.manual_seed(2)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


@dataclass
class Run:
    """What came of a run: what the user sees, or the error that ended it; and what speed_up
    said.
    """

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    evaluated: float | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    random_state: torch.Tensor | None = None
    error: Exception | None = None
    result: object = None
    applied: bool = False  # at the call of speed_up
    warned: list[str] = field(default_factory=list)
    touched: str = ""


def nothing(trainer, undo: ExitStack) -> None:
    """The change that changes nothing."""


def run(
    kind: str,
    change: Callable = nothing,
    moment: str = "built",
    quick: bool = False,
    whole: bool = True,
    **changes,
) -> Run:
    """Builds a trainer, trains it, evaluates it, with a change at its moment; if quick, sped up.

    change(undo) returns arguments of `build` at the moment "arguments"; change(trainer, undo) at
    others, which may return another trainer. What must be undone it gives to undo. A run that is
    not whole takes two steps, and no evaluation.
    """
    done = Run()
    with ExitStack() as undo, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            steps = {} if whole else {"max_steps": 2}
            _run(done, kind, change, moment, quick, whole, steps | changes, undo)
        except Exception as error:
            done.error = error
    done.warned = [one.message.reason for one in heard if isinstance(one.message, cpu.NotSpedUp)]
    return done


def _run(done: Run, kind: str, change, moment: str, quick: bool, whole: bool, changes: dict, undo) -> None:
    trainer = build(kind, **changes | (change(undo) if moment == "arguments" else {}))

    def now(here: str, trainer):
        return (change(trainer, undo) if moment == here else None) or trainer

    trainer = now("built", trainer)
    if quick:
        before = dict(vars(trainer))
        done.result = cpu.speed_up(trainer)
        done.applied = bool(done.result)
        if not done.applied:
            done.touched = ", ".join(_differing(before, vars(trainer)))
    trainer = now("sped up", trainer)

    def record(optimizer, *_) -> None:
        named = trainer.model.named_parameters()
        done.gradients.append({n: w.grad.clone() for n, w in named if w.grad is not None})

    def after(optimizer, *_) -> None:
        if len(done.gradients) == 1:
            now("first step", trainer)

    torch.manual_seed(3)
    with removed(register_optimizer_step_pre_hook(record), register_optimizer_step_post_hook(after)):
        trainer.train()
    done.logs = [dict(one) for one in trainer.state.log_history]
    done.random_state = torch.get_rng_state()
    trainer = now("trained", trainer)
    if kind != "GRPO" and whole:
        rows = trainer.train_dataset
        known = [name for name in rows.column_names if name.startswith("ref_")]  # computed ahead
        done.evaluated = trainer.evaluate(rows.remove_columns(known)).get("eval_loss")
    kept = [*trainer.model.named_parameters(), *trainer.model.named_buffers()]
    done.weights = {name: value.detach().clone() for name, value in kept}
    done.flags = {f"{n}.requires_grad": w.requires_grad for n, w in trainer.model.named_parameters()}
    done.flags |= {f"{n}.training": m.training for n, m in trainer.model.named_modules()}


def _differing(before: dict, after: dict) -> list[str]:
    names = [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)]
    return sorted(names)


@contextmanager
def removed(*handles) -> Iterator[None]:
    """Removes the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(one: Run, other: Run, kind: str, quick: bool = True, tolerance: float = 1e-3) -> str:
    """What the second run has otherwise than the first, "" if nothing: the first thing that is
    found.

    quick: the second may leave out what speed_up does not log. tolerance: of a norm over a weight's
    gradient, relative; Adam makes rounding larger from step to step.
    """
    if len(one.gradients) != len(other.gradients):
        return f"{len(one.gradients)} optimizer steps became {len(other.gradients)}"
    for step, (wanted, got) in enumerate(zip(one.gradients, other.gradients, strict=True)):
        if wanted.keys() != got.keys():
            return f"step {step}: gradients of {sorted(wanted.keys() ^ got.keys())[:2]}"
        whole = _norm(wanted.values())
        for name, gradient in wanted.items():
            if got[name].shape != gradient.shape:
                return f"step {step}: the gradient of {name} has another shape"
            off = _norm([got[name] - gradient])
            if not off <= tolerance * _norm([gradient]) + 1e-2 * tolerance * whole:
                return f"step {step}: the gradient of {name} is off by {off / (whole or 1):.1e} of all"
    return (
        _logs_differ(one, other, kind, quick, tolerance)
        or _weights_differ(one, other, tolerance)
        or next(
            (f"{n} became {other.flags.get(n)}" for n, v in one.flags.items() if other.flags.get(n) != v),
            "",
        )
    )


def far_apart(wanted: Run, got: Run) -> str:
    """What is further apart in the first step than bf16 rounds, over all gradients."""
    first, ours = (torch.cat([gradient.flatten() for gradient in one.gradients[0].values()]) for one in (wanted, got))
    off = float((ours - first).norm() / first.norm())
    return f"the first gradient is off by {off:.2f} in bf16" if off > 0.2 else ""


def _norm(tensors) -> float:
    return math.sqrt(sum(float(tensor.detach().double().norm()) ** 2 for tensor in tensors))


def _near(a, b, tolerance: float) -> bool:
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return a == b
    same_nan = math.isnan(a) and math.isnan(b)
    return same_nan or math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-2 * tolerance)


def _logs_differ(one: Run, other: Run, kind: str, quick: bool, tolerance: float) -> str:
    if len(one.logs) != len(other.logs):
        return f"{len(one.logs)} logs became {len(other.logs)}"
    for step, (wanted, got) in enumerate(zip(one.logs, other.logs, strict=True)):
        left_out = {n for n in wanted for word in NOT_LOGGED.get(kind, ()) if quick and word in n}
        if kind == "GRPO":  # evaluation draws answers, and ours by other random numbers
            left_out |= {name for name in wanted if name.startswith("eval_")}
        if got.keys() - left_out != wanted.keys() - left_out:
            return f"log {step} has other names: {sorted(wanted.keys() ^ got.keys())}"
        for name in wanted.keys() - left_out:
            timed = any(word in name for word in OTHERWISE)
            if not timed and not _near(wanted[name], got[name], tolerance):
                return f"log {step}: {name} {wanted[name]} became {got[name]}"
    if not _near(one.evaluated, other.evaluated, tolerance):
        return f"the evaluated loss {one.evaluated} became {other.evaluated}"
    return ""


def _weights_differ(one: Run, other: Run, tolerance: float) -> str:
    if one.weights.keys() != other.weights.keys():
        return f"weights {sorted(one.weights.keys() ^ other.weights.keys())[:2]}"
    for name, wanted in one.weights.items():
        got = other.weights[name]
        trained = "lora" in name
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            shapes = f"{tuple(got.shape)}, wanted {wanted.dtype} {tuple(wanted.shape)}"
            return f"{name} is {got.dtype} {shapes}"
        if not trained and not torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
            return f"the frozen {name} is another"  # a merge leaves its rounding
        if trained and not _norm([got - wanted]) <= tolerance * _norm([wanted]) + 1e-6:
            return f"the final {name} is off by {_norm([got - wanted]) / _norm([wanted]):.1e}"
    return ""

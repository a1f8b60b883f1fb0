"""The predicted bytes of one training step: its moments, phase by phase; and whether a card holds them."""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftlab.memory import activations as blocks
from ftlab.memory.architecture import architecture_of, choose
from ftlab.memory.held import gathered, gradients, loss_backward, loss_forward, static, step_temporary
from ftlab.memory.settings import Plan, Settings
from ftlab.paths import DATA

KINDS = ("weights", "constants", "adapters", "gradients", "optimizer", "casts", "activations", "loss", "temporary")
PHASES = ("load", "forward", "backward", "step")


@dataclass(frozen=True)
class Moment:
    """The bytes of each kind that live at one moment."""

    where: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """The highest moment of each phase; the peak is the highest of them."""

    moments: dict[str, Moment]

    @property
    def peak_bytes(self) -> int:
        return max(moment.total for moment in self.moments.values())

    @property
    def peak_phase(self) -> str:
        return max(self.moments, key=lambda phase: self.moments[phase].total)


def estimate(architecture: Any, **settings: Any) -> Memory:
    """The predicted bytes of one training step on one GPU, per phase and kind. settings: the fields of `Settings`.

    architecture: a name in data/architectures, an Architecture, or a transformers config. Every row is taken to be
    max_length tokens long. Held against the libraries: sft in data/results/memory_error.json; dpo, kto, orpo and FSDP,
    on small models, in tests/parity/test_memory_oracles.py. Raises ValueError for settings that do not go together.
    """
    p = Plan(architecture_of(architecture), Settings.of(settings))
    held, step = static(p), {"gradients": gradients(p), "temporary": step_temporary(p)}
    moments = [("all loaded", {})], forward_moments(p), backward_moments(p), [("optimizer step", step)]
    highest = {}
    for phase, candidates in zip(PHASES, moments, strict=True):
        sums = ((where, {k: round(held.get(k, 0) + kinds.get(k, 0)) for k in KINDS}) for where, kinds in candidates)
        highest[phase] = max((Moment(*one) for one in sums), key=lambda moment: moment.total)
    return Memory(highest)


def forward_moments(p: Plan) -> list[tuple[str, dict[str, float]]]:
    """Bytes by kind, beside what is held: in the last block; in the loss, with the last hidden state (R n d) too."""
    whole = gathered(p)
    cached = p.a.num_hidden_layers if not p.checkpointed or p.full or p.R == 2 else 0
    same = {"casts": cached * blocks.casts(p), "gradients": gradients(p) if p.accumulates else 0}
    kept, hidden = blocks.activations(p), p.n * (blocks.block(p)["input_layernorm"] + p.R * p.a.hidden_size)
    in_block = whole["blocks"] + (whole["head"] if p.a.tie_word_embeddings else 0)
    return [
        ("in the last block", {**same, "activations": kept + blocks.block_forward(p), "temporary": in_block}),
        ("in the loss", {**same, "activations": kept + hidden, "loss": loss_forward(p), "temporary": whole["head"]}),
    ]


def backward_moments(p: Plan) -> list[tuple[str, dict[str, float]]]:
    """The candidates, in order: loss, last norm, last block, first block, first norm, embedding. From block to block
    the activations fall and, in full fine-tuning, gradients rise: the highest is at one end. With checkpointing the
    block at work has all of its activations once more. A norm's backward pass works on five fp32 copies of its input.
    Gradients that accumulate over several batches are all there from the start, and the new ones come on top. A tied
    table waits for both of its gradients.
    """
    a, nd, tied, whole = p.a, p.n * p.a.hidden_size, p.a.tie_word_embeddings, gathered(p)
    kept, base, norm = blocks.activations(p), blocks.shared(p), p.n * blocks.block(p)["input_layernorm"]
    table = p.R * a.head_params / p.shards if p.full else 0
    waiting = table if tied else 0  # the head's, not yet added to the embedding's
    if p.accumulates:
        before = early = at_first = late = gradients(p)
    else:
        before, early, late = 0, table - waiting, gradients(p) - table
        block = (a.linear_params + a.expert_params) / a.num_hidden_layers
        at_first = late - (p.R * block / p.shards if p.full else 0)
    head = whole["head"] + (whole["head gradients"] if p.full else 0)
    held_back = head if tied else 0  # by FSDP: a tied table is whole until the end
    work = blocks.block_backward(p) + waiting + whole["blocks"] + whole["block gradients"] + held_back
    last, casts = blocks.layer(p), blocks.casts(p)
    if p.checkpointed:  # the block at work is computed again, with its copies
        last, again = blocks.checkpoint(p)
        work, casts = work + again + casts, 0
    all_casts = a.num_hidden_layers * casts
    moments = [  # where, activations, casts, gradients, loss, temporary
        ("in the loss", kept + norm, all_casts, before, loss_backward(p), whole["head"]),
        ("in the last norm", kept + 4 * nd, all_casts, early, 0, waiting + 20 * nd + head),
        ("in the last block", kept, all_casts, early, 0, work),
        ("in the first block", base + last, casts, at_first, 0, work),
        ("in the first norm", base, 0, late, 0, waiting + 24 * nd + held_back),
    ]
    if p.full:
        new = 2 * waiting + (table if p.accumulates else 0) + (0 if tied else p.R * nd) + head
        moments.append(("at the embedding", 16 * p.n, 0, gradients(p), 0, new))  # of the batch, ids and mask are left
    names = ("activations", "casts", "gradients", "loss", "temporary")
    return [(where, dict(zip(names, sizes, strict=True))) for where, *sizes in moments]


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in bytes as sold (GiB for most cards), and the share of it that a training step can have."""

    name: str
    memory_bytes: int
    usable: float
    native_bf16: bool
    source: str

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable)


def gpus() -> dict[str, Gpu]:
    """The GPUs in data/gpus/gpus.json, by name."""
    return {row["name"]: Gpu(**row) for row in json.loads((DATA / "gpus" / "gpus.json").read_text(encoding="utf-8"))}


def fits(gpu: Gpu | str, architecture: Any, **settings: Any) -> bool:
    """Whether the predicted peak is within the usable memory of the GPU (of each one, if there are several). gpu: one
    of `gpus()`, or its name. The other arguments, and the errors, are those of `estimate`.
    """
    gpu = gpu if isinstance(gpu, Gpu) else choose(gpu, gpus(), "gpu")
    return estimate(architecture, **settings).peak_bytes <= gpu.usable_bytes


def max_length(gpu: Gpu | str, architecture: Any, **settings: Any) -> int:
    """The longest max_length, in tokens, that fits; 0 if not even two tokens do. Arguments as of `fits`."""
    return _largest(lambda tokens: fits(gpu, architecture, **settings | {"max_length": tokens}), 2, 1 << 22)


def max_batch(gpu: Gpu | str, architecture: Any, **settings: Any) -> int:
    """The largest per_device_train_batch_size that fits; 0 if not even one row does (kto: two). Arguments: `fits`."""
    least, size = 2 if settings.get("method") == "kto" else 1, "per_device_train_batch_size"
    return _largest(lambda rows: fits(gpu, architecture, **settings | {size: rows}), least, 1 << 16)


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] for which a falling condition holds; 0 if none."""
    count = bisect_left(range(low, high + 1), True, key=lambda number: not holds(number))
    return low + count - 1 if count else 0

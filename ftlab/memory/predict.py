"""The predicted bytes of one training step: its moments, phase by phase."""

from dataclasses import dataclass
from typing import Any

from ftlab.memory import activations as blocks
from ftlab.memory.architecture import architecture_of
from ftlab.memory.held import gathered, gradients, optimizer_bytes, static, step_temporary
from ftlab.memory.loss import loss_backward, loss_forward
from ftlab.memory.settings import Plan, Settings

KINDS = ("weights", "constants", "adapters", "gradients", "optimizer", "casts", "activations", "loss", "temporary")
PHASES = ("load", "forward", "backward", "step")
Kinds = dict[str, float]  # bytes by kind, on top of what is held all the time


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
    """The highest moment of each phase; the peak is the highest of them.

    reserved_bytes: what PyTorch's allocator took from the GPU for it (measured on CUDA only).
    paged_bytes: optimizer states in unified memory, which the driver may move to the host: not part of the peak.
    notes: what the libraries do with this model and say nothing of.
    """

    moments: dict[str, Moment]
    reserved_bytes: int | None = None
    paged_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return max(moment.total for moment in self.moments.values())

    @property
    def peak_phase(self) -> str:
        return max(self.moments, key=lambda phase: self.moments[phase].total)

    def fits(self, gpu: Any) -> bool:
        return self.peak_bytes <= gpu.usable_bytes


def estimate(architecture: Any, **settings: Any) -> Memory:
    """The predicted bytes of one training step on one GPU, per phase and kind.

    Every row is taken to be max_length tokens long. Held against the libraries: sft in data/results/memory_error.json;
    dpo, kto, orpo, ppo and FSDP, on small models, in tests/parity/test_memory_oracles.py. ppo: the update, not the
    writing of the answers, whose logits TRL keeps for all rows of a batch.

    Raises ValueError for settings that do not go together.
    """
    p = Plan(architecture_of(architecture), Settings.of(settings))
    held, plans = static(p), [p, p.critic] if p.critic else [p]
    step = {"gradients": all_gradients(p), "temporary": sum(map(step_temporary, plans))}
    moments = [("all loaded", {})], forward_moments(p), backward_moments(p), [("optimizer step", step)]
    highest = {}
    for phase, candidates in zip(PHASES, moments, strict=True):
        sums = ((where, {k: round(held.get(k, 0) + kinds.get(k, 0)) for k in KINDS}) for where, kinds in candidates)
        highest[phase] = max((Moment(*one) for one in sums), key=lambda moment: moment.total)
    paged = sum(optimizer_bytes(plan)[1] for plan in plans) // p.shards
    return Memory(highest, paged_bytes=paged, notes=notes(p))


def notes(p: Plan) -> tuple[str, ...]:
    """What the libraries do with the model and say nothing of, and what is not counted."""
    said, E = [], p.a.expert_params
    if E and p.quantized:
        said.append(f"{E:,} of {p.a.params:,} parameters are experts, fused 3D tensors: they stay in {8 * p.R} bits")
    if E and not p.full:
        sums = (
            f"PEFT adds them to a whole block's weights in each forward pass, {blocks.merged(p) / 1e9:.2f} GB a block"
        )
        said.append(f"the experts have adapters: {sums}" if p.merges else "the experts have no adapters")
    if p.loss == "liger":
        said.append("an upper bound: Liger's RMSNorm and SwiGLU keep less than transformers' own")
    return tuple(said)


def forward_moments(p: Plan) -> list[tuple[str, Kinds]]:
    """Two candidates: in the last block, and in the loss, with all kept and the last hidden state (R n d) too."""
    whole = gathered(p)
    cached = p.a.num_hidden_layers if not p.checkpointed or p.full or p.R == 2 else 0
    same = {"casts": blocks.casts(p, cached), "gradients": all_gradients(p) if p.accumulates else 0}
    kept = blocks.activations(p) + (blocks.activations(p.critic) if p.critic else 0)
    hidden = blocks.norm(p) + p.R * p.n * p.a.hidden_size
    in_block = whole["blocks"] + (whole["head"] if p.a.tie_word_embeddings else 0)
    return [
        ("in the last block", {**same, "activations": kept + blocks.block_forward(p), "temporary": in_block}),
        ("in the loss", {**same, "activations": kept + hidden, "loss": loss_forward(p), "temporary": whole["head"]}),
    ]


def backward_moments(p: Plan) -> list[tuple[str, Kinds]]:
    """The candidates, in order: loss, last norm, last block, first block, first norm, embedding.

    From block to block the activations fall and, in full fine-tuning, gradients rise: the highest is at one end. With
    checkpointing the block at work has all of its activations once more. A norm's backward pass works on five fp32
    copies of its input. Gradients that accumulate over several batches are all there from the start, and the new ones
    come on top. A tied table waits for both of its gradients. PPO's value model goes through the same after the policy.
    """
    a, nd, tied, whole = p.a, p.n * p.a.hidden_size, p.a.tie_word_embeddings, gathered(p)
    kept, kept_casts = blocks.activations(p), 0 if p.checkpointed else blocks.casts(p, a.num_hidden_layers)
    one_cast, base = blocks.casts(p, 1), blocks.shared(p)
    last = blocks.stored(p) if p.checkpointed else blocks.layer(p)
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
    work = blocks.block_backward(p) + (blocks.recomputed(p) + one_cast if p.checkpointed else 0)
    work += waiting + whole["blocks"] + whole["block gradients"] + held_back
    moments = [  # where, activations, casts, gradients, loss, temporary
        ("in the loss", kept + blocks.norm(p), kept_casts, before, loss_backward(p), whole["head"]),
        ("in the last norm", kept + 4 * nd, kept_casts, early, 0, waiting + 20 * nd + head),
        ("in the last block", kept, kept_casts, early, 0, work),
        ("in the first block", base + last, 0 if p.checkpointed else one_cast, at_first, 0, work),
        ("in the first norm", base, 0, late, 0, waiting + 24 * nd + held_back),
    ]
    if p.full:
        new = 2 * waiting + (table if p.accumulates else 0) + (0 if tied else p.R * nd) + head
        moments.append(("at the embedding", base, 0, gradients(p), 0, new))
    names = ("activations", "casts", "gradients", "loss", "temporary")
    made = [(where, dict(zip(names, sizes, strict=True))) for where, *sizes in moments]
    return _with_critic(p, made) if p.critic else made


def _with_critic(p: Plan, policy: list[tuple[str, Kinds]]) -> list[tuple[str, Kinds]]:
    """The policy's moments, with the value model's activations waiting; then those of the value model, without loss.

    TRL asks both models for their hidden states, and holds the policy's last one too until the end.
    """
    own = gradients(p.critic) if p.accumulates else 0
    there = blocks.activations(p.critic) + blocks.norm(p.critic) + 2 * p.R * p.n * p.a.hidden_size
    for _, kinds in policy:
        kinds["activations"] += there
        kinds["gradients"] += own
    critic = [(f"{where} of the value model", kinds) for where, kinds in backward_moments(p.critic)[1:]]
    for _, kinds in critic:
        kinds["gradients"] += gradients(p)
    return policy + critic


def all_gradients(p: Plan) -> int:
    return gradients(p) + (gradients(p.critic) if p.critic else 0)

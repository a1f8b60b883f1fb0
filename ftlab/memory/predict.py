"""The predicted bytes of a training step: what is held, what the loss adds, phase by phase; whether a card has them."""

from bisect import bisect_left
from typing import Any, NamedTuple

from ftlab.memory import activations as blocks
from ftlab.memory.architecture import pick, rows
from ftlab.memory.settings import Plan, plan

KINDS = ("weights", "constants", "adapters", "gradients", "optimizer", "autocast", "activations", "loss", "temporary",
         "generation")  # fmt: skip
PHASES = ("load", "forward", "backward", "step")
CHUNK, ENTROPY_CHUNK = 256, 128  # tokens per chunk of TRL's chunked loss, and of its entropy


class Moment(NamedTuple):
    """The bytes of each kind that live at one moment."""

    where: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


class Memory(NamedTuple):
    """The highest moment of each phase; the peak is the highest of them."""

    moments: dict[str, Moment]

    @property
    def peak_bytes(self) -> int:
        return max(moment.total for moment in self.moments.values())

    @property
    def peak_phase(self) -> str:
        return max(self.moments, key=lambda phase: self.moments[phase].total)


def estimate(architecture: Any, **settings: Any) -> Memory:
    """The predicted bytes of one training step on one GPU, per phase and kind. settings: the fields of settings.Plan.
    preset="..." names a stack other than TRL's defaults (`presets()`), held against published peaks
    in experiments/memory_peaks/report.md; what is given beside it wins.

    architecture: a name in data/architectures, or an Architecture. Every row is taken to be max_length tokens long.
    Held against libraries: experiments/memory_error; dpo, kto, orpo, FSDP: tests/parity/test_memory_oracles.py.
    """
    p = plan(architecture, **settings)
    always, highest = model_states(p), {}
    for phase, where, *sizes in moments(p):
        more = dict(zip(("gradients", "autocast", "activations", "loss", "temporary"), sizes, strict=True))
        more["generation"] = generation(p, phase)
        moment = Moment(where, {kind: round(always.get(kind, 0) + more.get(kind, 0)) for kind in KINDS})
        if phase not in highest or moment.total > highest[phase].total:
            highest[phase] = moment
    return Memory(highest)


def model_states(p: Plan) -> dict[str, float]:
    """Bytes by kind, of all roles, on one GPU, but for gradients. Experts are never quantized: bitsandbytes replaces
    nn.Linear, and they are fused 3D tensors. FSDP gives each GPU its share, but not of NF4 weights and constants:
    accelerate leaves tensors of bytes whole (it warns). DDP reduces gradients in buckets of their own, as large as all.

    Constants, int8: one fp32 per row. NF4: one fp32 per 64 weights; double: one byte per 64, one fp32 per 256 of those.
    Each NF4 matrix also carries its own table of 16 levels, with double quantization a second one of 256.
    """
    a, constants = p.a, 0
    for n_in, n_out in a.linears.values() if p.quantized else ():
        blocks = -(-n_in * n_out // 64)
        double = blocks + 4 * -(-blocks // 256) + 64 + 1024
        constants += 4 * n_out if p.int8 else double if p.bnb_4bit_use_double_quant else 4 * blocks + 64
    packed = a.linear_params // (1 if p.int8 else 2) if p.quantized else 0
    ppo = p.method == "ppo"
    copies = 3 if ppo else 1  # of what is quantized: in policy, reward and value model
    reference = p.full and p.method in ("dpo", "kto", "ppo")  # with LoRA it is the base itself
    quantized = copies * a.linear_params if p.quantized else 0
    others = (1 + reference) * a.params + 2 * ppo * valued(p) - quantized
    return {
        "weights": copies * packed + p.R * others / p.shards,
        "constants": copies * p.L * constants,
        "adapters": (1 + ppo) * p.adapter_params * p.adapter / p.shards,
        "optimizer": (optimizer(p) + (optimizer(p, value=True) if ppo else 0)) / p.shards,
        "temporary": p.trained_bytes if p.gpus > 1 and not p.fsdp else 0,
    }


def valued(p: Plan) -> int:
    """Parameters of PPO's reward and value models: the policy's shape, one output a token, not V.

    params - V d + d, of a tied table params + d: the embedding stays. Source: transformers'
    ForSequenceClassification with one label.
    """
    return p.a.params - (0 if p.a.tie_word_embeddings else p.head) + p.d


def generation(p: Plan, phase: str) -> int:
    """Bytes that making the answers takes in this phase, of grpo and ppo.

    Colocated vLLM: its share of the card, vllm_gpu_memory_utilization * card, from the start to the
    end; asleep it gives weights and cache back (TRL sleeps at level 2), so only the phase
    "generate" pays. Otherwise transformers' cache, while answers are made: keys and values of all
    rows, 2 L k T c bytes a row, for all batches that accumulate (TRL makes steps_per_generation of
    them at once). Source: vLLM's gpu_memory_utilization, TRL's VLLMGeneration.
    """
    if p.vllm:
        return 0 if p.vllm_enable_sleep_mode and phase != "generate" else p.vllm
    return 2 * p.L * p.k * p.c * p.n * p.gradient_accumulation_steps if phase == "generate" else 0


def optimizer(p: Plan, value: bool = False) -> int:
    """Bytes on the GPU of all shards together; value: those of PPO's value model. torch's AdamW:
    two moments in the parameter's dtype. bitsandbytes' in 8 bits: two bytes a number and two fp32
    per block of 256, but two fp32 numbers for tensors under 4,096; and two tables of 256 levels.
    Paged: states of tensors of 100,000 numbers or more live in unified memory, which the driver may
    move to the host; the block constants do not. SGD without momentum: nothing.
    """
    if p.optim == "sgd":
        return 0
    if p.optim.startswith("adamw_torch"):
        return 2 * (p.R * valued(p) if value and p.full else p.trained_bytes)
    a, paged = p.a, p.optim.startswith("paged")
    matrices = (n_in * n_out for n_in, n_out in a.linears.values())
    tensors = (*matrices, *a.vectors, *a.experts) if p.full else a.adapters(p.r, p.targets)
    tables = 1 if a.tie_word_embeddings or value else 2
    rest = [(p.d, 1 + value), (p.head, tables)] if p.full else []
    size = 2048
    for numbers, count in [*((numbers, p.L) for numbers in tensors), *rest]:
        blocks = -(-numbers // 256) if numbers >= 4096 else 0
        each = 0 if paged and numbers >= 100_000 else 2 if blocks else 8
        size += count * (each * numbers + 8 * blocks)
    return size


def named(p: Plan) -> int:
    """Bytes of the logits that a loop of one's own still names in its backward pass and optimizer
    step: n V numbers, in fp32 after autocast (accelerate turns outputs into fp32).
    """
    return p.keeps_outputs * (4 if p.amp else p.c) * p.n * p.V


def loss(p: Plan) -> tuple[int, int]:
    """The most that the loss adds, in the forward and in the backward pass. 16-bit logits become fp32 (accelerate).

    chunked_nll: a reordered copy of the hidden states, and for each chunk of 256 tokens either the head's copy with its
    logits, or four fp32 tables (logits, log-softmax, exp, product). Backward, the chunk is computed once more; to it a
    trained head adds its gradient so far (R V d), or three of them while the next chunk's is added.
    liger: gradients of the hidden states and of a trained head, made at once, and two chunks of about n * d logits.
    nll: logits, their fp32 copies and TRL's entropy; backward log-softmax, its gradient and the logits'.
    all_logits: logits, their fp32 copies, with shifted_logits those less the last of each row once
    more, log-softmax; backward as nll, and the logits that are still named. Source: ForCausalLMLoss
    in transformers/loss/loss_utils.py.
    dpo, kto: the policy's logits and a copy for its entropy; later logits of policy and reference, and copies for what
    TRL logs: in dpo of one half, in kto of both. orpo: the logits, a copy and the log-softmax of the chosen half.
    Backward (selective_log_softmax): the logits, and their gradients through logsumexp and through gather.
    grpo, ppo: the policy's logits and their fp32 copies, its entropy; backward as dpo. All tokens
    count as answers. (Where Triton is, TRL 1.14 has a kernel for the log-probs of dpo and grpo that
    makes less; not counted.)
    """
    V, n, tokens = p.V, p.n, p.n - p.rows  # tokens that predict another
    head = p.full * p.R * p.head  # the gradient of a trained one
    if p.loss == "liger":
        rows = min(n, 1 << (-(-n // -(-V // p.d)) - 1).bit_length())
        made = p.R * p.nd + head  # and a second cast of a trained head: autocast keeps the first
        return made + p.head_copy * (1 + p.full) + p.c * rows * (2 * V + p.d), made
    if p.loss == "chunked_nll":
        chunk, several, hidden = min(CHUNK, tokens), tokens > CHUNK, p.R * tokens * p.d
        again = several * head + p.head_copy + 16 * chunk * V
        grown = hidden * (1 + several) + max(again, 3 * head if several else head + p.head_copy)
        return hidden + max(p.head_copy + p.c * chunk * V, 16 * chunk * V), grown
    copy, entropy = 4 * tokens * V, 12 * min(ENTROPY_CHUNK, n) * V  # log-softmax, exp and product of 128 tokens
    logged = 4 * n * V + copy + entropy
    wide = 4 * n * V * (p.c < 4)  # fp32 copies of 16-bit logits
    shifted = copy * (p.shifted_logits and p.rows > 1)
    made = p.c * n * V + wide + shifted + (copy if p.shifted_logits else 4 * n * V)
    policy = (p.c * n * V + wide + entropy, 4 * n * V + 3 * copy)
    forward, backward = {
        "nll": (max(8 * n * V + copy * (p.rows > 1) + entropy, (10 if p.c < 4 else 8) * n * V), 12 * n * V),
        "all_logits": (made, 12 * n * V + named(p)),
        "grpo": policy,
        "ppo": policy,
        "dpo": (max(logged, 8 * n * V + 2 * (n if p.amp else tokens) * V), 4 * n * V + 3 * copy),
        "kto": (max(logged, 8 * n * V + 6 * tokens * V), 4 * n * V + 3 * copy),
        "orpo": (4 * n * V + copy, 4 * n * V + 14 * tokens * V),
    }[p.loss]
    hidden = p.full * (p.c < 4) * p.c * p.nd  # the 16-bit input of the head
    kept = p.amp * (p.full or p.R == 4) * 2 * p.head
    return forward + p.head_copy + (hidden if p.head_copy else 0), backward + kept + hidden


def moments(p: Plan) -> list[tuple]:
    """The candidates for the highest moment of each phase, in bytes beside what is held all the time.

    Backward, the activations fall from block to block and, in full fine-tuning, gradients rise: the highest is at one
    end. A checkpointed block at work has all of its activations once more. A norm works on five fp32 copies of its
    input. Gradients that accumulate are there from the start, new ones on top. A tied table waits for both of its
    gradients. Casts are the 16-bit copies that autocast makes of fp32 weights and the graph keeps; those of trained
    weights are cached until the forward pass ends. AdamW that is not fused takes the square roots of all second moments
    at once on CUDA (foreach). FSDP has for a moment whole, beside its share: two blocks, the one at work and the buffer
    of the next, and the head, in c bytes; gradients leave in c bytes and are summed in fp32.
    """
    a, nd, tied, every = p.a, p.nd, p.a.tie_word_embeddings, p.trained_bytes // p.shards
    kept, base, norm = blocks.activations(p), blocks.shared(p), p.n * blocks.block(p)["input_layernorm"]
    (forward, backward), (loss_forward, loss_backward) = blocks.at_work(p), loss(p)

    sharded, leaving = p.shards > 1, p.full * (p.c + 4)
    whole = sharded * (a.params - p.head * (1 if tied else 2)) / p.L  # a block
    two, whole_head = 2 * p.c * whole * (not p.quantized), sharded * p.c * p.head
    head = whole_head + sharded * leaving * p.head
    held_back = tied * head  # a tied table is whole until the end

    table = p.full * p.R * p.head / p.shards
    waiting = tied * table  # the head's gradient, not yet added to the embedding's
    before, early, late = (every, every, every) if p.accumulates else (0, table - waiting, every - table)
    of_block = p.full * p.R * (a.linear_params + a.expert_params) / p.L / p.shards
    at_first = late if p.accumulates else late - of_block

    fp32 = p.adapter_params * (p.adapter == 4) + a.linear_params * (p.R == 4 and not p.quantized)
    casts = 2 * fp32 // p.L if p.amp and not sharded else 0  # FSDP gathers the weights in 16 bits already
    cached = p.L * casts if not p.checkpointed or p.full or p.R == 2 else 0
    last, work = blocks.layer(p), backward + waiting + two + leaving * whole + held_back
    if p.checkpointed:  # the block at work is computed again, with its copies
        last, again = blocks.checkpoint(p)
        work, casts = work + again + casts, 0

    roots = every if p.optim == "adamw_torch" else 0
    new = 2 * waiting + p.accumulates * table + (not tied) * p.R * nd + head
    return [  # phase, where, gradients, autocast, activations, loss, temporary
        ("load", "all loaded", 0, 0, 0, 0, 0),
        *[("generate", "the last answer's end", 0, 0, 0, 0, 0)] * (p.method in ("grpo", "ppo")),
        ("forward", "in the last block", before, cached, kept + forward, 0, two + tied * whole_head),
        ("forward", "in the loss", before, cached, kept + norm + p.R * nd, loss_forward, whole_head),
        ("backward", "in the loss", before, p.L * casts, kept + norm, loss_backward, whole_head),
        ("backward", "in the last norm", early, p.L * casts, kept + 4 * nd, named(p), waiting + 20 * nd + head),
        ("backward", "in the last block", early, p.L * casts, kept, named(p), work),
        ("backward", "in the first block", at_first, casts, base + last, named(p), work),
        ("backward", "in the first norm", late, 0, base, named(p), waiting + 24 * nd + held_back),
        # at the embedding ids and mask are left of the batch
        *[("backward", "at the embedding", every, 0, 16 * p.n, named(p), new)] * p.full,
        ("step", "optimizer step", every, 0, 0, named(p), roots),
    ]


VERDICTS = ("fits", "may fit", "does not fit")


def margin() -> dict[str, Any]:
    """What data/gpus/margin.json says of the caching allocator, which reserves more than it gives.

    "ratio" is the 90th percentile of reserved / allocated over "runs" published runs, "source" says
    whose they are.
    """
    return rows("gpus/margin.json")


class Gpu(NamedTuple):
    """A GPU: memory in bytes as sold (GiB for most cards), and the share of it that a training step can have."""

    name: str
    memory_bytes: int
    usable: float

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable)

    def verdict(self, peak_bytes: float) -> str:
        """One of VERDICTS for a predicted peak. "may fit": the tensors have room, but not what the
        caching allocator reserved beside them in nine of ten published runs:
        peak <= usable < peak * margin()["ratio"]. A vLLM's share counts as tensors do, to be safe.
        Source: data/gpus/margin.json.
        """
        if peak_bytes > self.usable_bytes:
            return "does not fit"
        return "fits" if peak_bytes * margin()["ratio"] <= self.usable_bytes else "may fit"


def gpus() -> dict[str, Gpu]:
    """The GPUs in data/gpus/gpus.json, by name."""
    return {row["name"]: Gpu(*map(row.get, Gpu._fields)) for row in rows("gpus/gpus.json")}


def on(gpu: Gpu | str, architecture: Any, settings: dict) -> tuple[Gpu, Memory]:
    """The GPU, and what the step takes there; a colocated vLLM's share is of this card."""
    card = gpu if isinstance(gpu, Gpu) else gpus()[pick(gpu, gpus(), "gpu")]
    return card, estimate(architecture, **{"card": card.memory_bytes} | settings)


def fits(gpu: Gpu | str, architecture: Any, **settings: Any) -> bool:
    """Whether the predicted peak is within what the GPU can use. gpu: one of `gpus()`, or its name."""
    card, predicted = on(gpu, architecture, settings)
    return predicted.peak_bytes <= card.usable_bytes


def verdict(gpu: Gpu | str, architecture: Any, **settings: Any) -> str:
    """One of VERDICTS: whether the step fits with what the allocator reserves. Else as `fits`."""
    card, predicted = on(gpu, architecture, settings)
    return card.verdict(predicted.peak_bytes)


def max_length(gpu: Gpu | str, architecture: Any, **settings: Any) -> int:
    """The longest max_length, in tokens, that fits; 0 if not even two tokens do. Arguments as of `fits`."""
    return _largest("max_length", range(2, (1 << 22) + 1), gpu, architecture, settings)


def max_batch(gpu: Gpu | str, architecture: Any, **settings: Any) -> int:
    """The largest per_device_train_batch_size that fits; 0 if not even one row does. Arguments as of `fits`."""
    return _largest("per_device_train_batch_size", range(1, (1 << 16) + 1), gpu, architecture, settings)


def _largest(name: str, sizes: range, gpu: Gpu | str, architecture: Any, settings: dict) -> int:
    """The largest of these sizes with which the step fits; 0 if none does. A larger one never takes less."""
    count = bisect_left(sizes, True, key=lambda size: not fits(gpu, architecture, **settings | {name: size}))
    return sizes[count - 1] if count else 0

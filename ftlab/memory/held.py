"""What is there all the time: weights, quantization constants, adapters, optimizer states; and what the loss adds."""

from typing import Any, NamedTuple

from ftlab.memory.architecture import pick
from ftlab.memory.settings import Plan, plan

CHUNK, ENTROPY_CHUNK = 256, 128  # tokens per chunk of TRL's chunked loss, and of its entropy


def states(architecture: Any, **settings: Any) -> int:
    """Bytes of weights, gradients and Adam states by the papers' rule: 16 per trained parameter, 2 per frozen one.

    16 = 2 + 2 (16-bit weight and gradient) + 12 (fp32 copy and two moments), or 4 + 4 + 8 with fp32 weights. Frozen
    linear layers take 8 bits in int8, or those of NF4 below. A floor: no activations, temporaries or upcasts.
    """
    p = plan(architecture, **settings)
    nf4 = 4 + 8 / 64 + 32 / (64 * 256) if p.bnb_4bit_use_double_quant else 4 + 32 / 64  # 4.126953125 or 4.5
    bits = nf4 if p.load_in_4bit else 8 if p.int8 else 16
    frozen = p.a.linear_params * bits / 8 + 2 * (p.a.params - p.a.linear_params)
    return 16 * p.a.params if p.full else round(frozen) + 16 * p.adapter_params


class Role(NamedTuple):
    """A model that a method holds. shared: the policy's own weights with its adapter switched off."""

    name: str
    trained: bool
    shared: bool = False


def roles(method: str, lora: bool) -> tuple[Role, ...]:
    """The models in memory while training; `estimate` does not count PPO. The papers give a frozen model 2 bytes a
    parameter, DPO 18; TRL holds the reference of full fine-tuning in fp32, DPO 20. With LoRA it is the base itself.
    """
    ppo = Role("policy", True), Role("reference", False, shared=lora), Role("reward", False), Role("value", True)
    counts = {"sft": 1, "orpo": 1, "dpo": 2, "kto": 2, "ppo": 4}
    return ppo[: counts[pick(method, counts, "method")]]


def held(p: Plan) -> dict[str, float]:
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
    frozen = sum(not (role.trained or role.shared) for role in roles(p.method, not p.full))
    others = (1 + frozen) * a.params - (a.linear_params if p.quantized else 0)
    return {
        "weights": packed + p.R * others / p.shards,
        "constants": p.L * constants,
        "adapters": p.adapter_params * p.adapter / p.shards,
        "optimizer": optimizer(p) / p.shards,
        "temporary": p.trained_bytes if p.gpus > 1 and not p.fsdp else 0,
    }


def optimizer(p: Plan) -> int:
    """Bytes on the GPU of all shards together. torch's AdamW: two moments in the parameter's dtype. bitsandbytes' in 8
    bits: two bytes a number and two fp32 per block of 256, but two fp32 numbers for tensors under 4,096; and two tables
    of 256 levels. Paged: states of tensors of 100,000 numbers or more live in unified memory, which the driver may move
    to the host; the block constants do not. SGD without momentum holds nothing.
    """
    if p.optim == "sgd" or p.optim.startswith("adamw_torch"):
        return 0 if p.optim == "sgd" else 2 * p.trained_bytes
    a, paged = p.a, p.optim.startswith("paged")
    matrices = (n_in * n_out for n_in, n_out in a.linears.values())
    tensors = (*matrices, *a.vectors, *a.experts) if p.full else a.adapters(p.r, p.targets)
    rest = [(p.d, 1), (p.head, 1 if a.tie_word_embeddings else 2)] if p.full else []
    size = 2048
    for numbers, count in [*((numbers, p.L) for numbers in tensors), *rest]:
        blocks = -(-numbers // 256) if numbers >= 4096 else 0
        each = 0 if paged and numbers >= 100_000 else 2 if blocks else 8
        size += count * (each * numbers + 8 * blocks)
    return size


def loss(p: Plan) -> tuple[int, int]:
    """The most that the loss adds, in the forward and in the backward pass. 16-bit logits become fp32 (accelerate).

    chunked_nll: a reordered copy of the hidden states, and for each chunk of 256 tokens either the head's copy with its
    logits, or four fp32 tables (logits, log-softmax, exp, product). Backward, the chunk is computed once more; to it a
    trained head adds its gradient so far (R V d), or three of them while the next chunk's is added.
    liger: gradients of the hidden states and of a trained head, made at once, and two chunks of about n * d logits.
    nll: logits, their fp32 copies and TRL's entropy; backward log-softmax, its gradient and the logits'.
    dpo, kto: the policy's logits and a copy for its entropy; later logits of policy and reference, and copies for what
    TRL logs: in dpo of one half, in kto of both. orpo: the logits, a copy and the log-softmax of the chosen half.
    Backward (selective_log_softmax): the logits, and their gradients through logsumexp and through gather.
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
    forward, backward = {
        "nll": (max(8 * n * V + copy * (p.rows > 1) + entropy, (10 if p.amp else 8) * n * V), 12 * n * V),
        "dpo": (max(logged, 8 * n * V + 2 * (n if p.amp else tokens) * V), 4 * n * V + 3 * copy),
        "kto": (max(logged, 8 * n * V + 6 * tokens * V), 4 * n * V + 3 * copy),
        "orpo": (4 * n * V + copy, 4 * n * V + 14 * tokens * V),
    }[p.loss]
    hidden = p.full * p.amp * p.c * p.nd  # the 16-bit input of the head
    kept = p.amp * (p.full or p.R == 4) * 2 * p.head
    return forward + p.head_copy + (hidden if p.head_copy else 0), backward + kept + hidden

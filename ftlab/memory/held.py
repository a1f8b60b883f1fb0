"""What is there all the time: weights, quantization constants, adapters, optimizer states; gradients; and the loss."""

from dataclasses import dataclass
from typing import Any

from ftlab.memory.architecture import architecture_of
from ftlab.memory.settings import Plan, Settings

CHUNK, ENTROPY_CHUNK = 256, 128  # tokens per chunk of TRL's chunked loss, and of its entropy


def states(architecture: Any, **settings: Any) -> int:
    """Bytes of weights, gradients and Adam states by the papers' rule: 16 per trained parameter, 2 per frozen one.

    16 = 2 + 2 (16-bit weight and gradient) + 12 (fp32 copy and two moments), or 4 + 4 + 8 with fp32 weights. Frozen
    linear layers take 1 byte in int8, 4.5 bits in NF4 (4 + one fp32 per 64), 4 + 8/64 + 32/(64*256) = 4.126953125 bits
    with double quantization. No activations, no temporaries, and no upcasts: a floor to compare with, not a prediction.
    Arguments and errors are those of `estimate`.
    """
    a, s = architecture_of(architecture), Settings.of(settings)
    if s.r is None:
        return 16 * a.params
    nf4 = 4 + 8 / 64 + 32 / (64 * 256) if s.bnb_4bit_use_double_quant else 4 + 32 / 64
    bits = nf4 if s.load_in_4bit else 8 if s.load_in_8bit else 16
    frozen = a.linear_params * bits / 8 + 2 * (a.params - a.linear_params)
    return round(frozen) + 16 * a.lora_params(s.r, s.target_modules)


@dataclass(frozen=True)
class Role:
    """A model that a method holds. shared: the policy's own weights with its adapter switched off, so no bytes."""

    name: str
    trained: bool
    shared: bool = False


def roles(method: str, lora: bool) -> tuple[Role, ...]:
    """The models that are in memory while training. PPO trains two of its four (`estimate` does not count PPO).

    With LoRA the reference is the base itself (TRL: a PEFT model and ref_model=None). The papers give a frozen model 2
    bytes a parameter, 18 for DPO; TRL holds the reference of full fine-tuning in fp32, 20. ValueError: another method.
    """
    reference = Role("reference", trained=False, shared=lora)
    ppo = (reference, Role("reward", trained=False), Role("value", trained=True))
    others = {"sft": (), "orpo": (), "dpo": (reference,), "kto": (reference,), "ppo": ppo}
    if method not in others:
        raise ValueError(f"method: got {method!r}, wanted one of {tuple(others)}")
    return (Role("policy", trained=True), *others[method])


def static(p: Plan) -> dict[str, float]:
    """Bytes by kind, of all roles, on one GPU; the gradients are not among them. Weights that are not quantized take
    p.R bytes, and experts are never quantized: bitsandbytes replaces nn.Linear, and they are fused 3D tensors. int8
    takes one byte, NF4 half of one. FSDP gives each GPU its share, but not of NF4 weights and their constants:
    accelerate takes tensors of bytes out of the sharding (it says so in a warning), and bitsandbytes keeps the
    constants beside the weight. DDP reduces gradients in buckets of their own, as large as all gradients
    (gradient_as_bucket_view=False).
    """
    linear, rest = p.a.linear_params, p.R * (p.a.params - p.a.linear_params)
    linear = p.R * linear / p.shards if not p.quantized else linear if p.int8 else linear // 2
    frozen = sum(not (role.trained or role.shared) for role in roles(p.method, not p.full))
    return {
        "weights": linear + (rest + frozen * p.R * p.a.params) / p.shards,
        "constants": constant_bytes(p),
        "adapters": p.adapter_params * p.adapter / p.shards,
        "optimizer": optimizer_bytes(p) / p.shards,
        "temporary": gradients(p) if p.s.gpus > 1 and not p.s.fsdp else 0,
    }


def constant_bytes(p: Plan) -> int:
    """int8: one fp32 per row. NF4: one fp32 per 64 weights; double: one byte per 64, one fp32 per 256 of those. Each
    NF4 matrix also carries its own table of 16 levels, with double quantization a second one of 256.
    """
    total = 0
    for n_in, n_out in p.a.linears.values() if p.quantized else ():
        blocks = -(-n_in * n_out // 64)
        double = blocks + 4 * -(-blocks // 256) + 64 + 1024
        total += 4 * n_out if p.int8 else double if p.s.bnb_4bit_use_double_quant else 4 * blocks + 64
    return p.a.num_hidden_layers * total


def trained(p: Plan) -> list[tuple[int, int, int]]:
    """(numbers, bytes per number, how many such tensors) of what the optimizer updates."""
    a, L = p.a, p.a.num_hidden_layers
    if not p.full:
        return [(numbers, p.adapter, L) for numbers in a.adapters(p.s.r, p.targets)]
    matrices = [n_in * n_out for n_in, n_out in a.linears.values()]
    tensors = [(numbers, p.R, L) for numbers in (*matrices, *a.vectors, *a.experts)]
    return [*tensors, (a.hidden_size, p.R, 1), (a.head_params, p.R, a.table_params // a.head_params)]


def gradients(p: Plan) -> int:
    """One number of the parameter's own dtype per trained parameter."""
    return sum(numbers * size * count for numbers, size, count in trained(p)) // p.shards


def optimizer_bytes(p: Plan) -> int:
    """Bytes on the GPU of all shards together. torch's AdamW: two moments in the parameter's dtype. bitsandbytes'
    AdamW: two fp32 numbers; in 8 bits two bytes, and two fp32 per block of 256, but two fp32 numbers for tensors under
    4,096; and two tables of 256 levels. Paged: states of tensors of 100,000 numbers or more live in unified memory,
    which the driver may move to the host; the block constants do not. SGD without momentum holds nothing.
    """
    optim, held = p.s.optim, 0
    eight_bit = optim.endswith("8bit")
    for numbers, size, count in trained(p) if optim != "sgd" else ():
        small = numbers < 4096 or not eight_bit
        each = 2 * size if optim.startswith("adamw_torch") else 8 if small else 2
        paged = optim.startswith("paged") and numbers >= 100_000
        held += count * ((0 if paged else each * numbers) + (0 if small else 8 * -(-numbers // 256)))
    return held + (2048 if eight_bit else 0)


def step_temporary(p: Plan) -> int:
    """AdamW on CUDA goes through all tensors at once (foreach), with the square roots of all second moments: 4 bytes
    more per trained fp32 parameter. The fused one and bitsandbytes' need nothing, SGD a copy of the gradients to decay.
    """
    return gradients(p) if p.s.optim == "adamw_torch" or (p.s.optim == "sgd" and p.s.weight_decay) else 0


def gathered(p: Plan) -> dict[str, float]:
    """FSDP: what one GPU has whole for a moment, beside its share: weights, and gradients on their way to their owners.
    The units are accelerate's: each block, the embedding, the head with the last norm (one unit if tied). Two blocks
    are there at once: the one at work, and the buffer in which the next one arrives. Weights come in c bytes (nothing
    to speak of in an NF4 block); gradients leave in c bytes and are copied to fp32 to be summed.
    """
    sharded, leaving = p.shards > 1, (p.c + 4 if p.full else 0)
    head, block = sharded * p.a.head_params, sharded * (p.a.params - p.a.table_params) / p.a.num_hidden_layers
    blocks = 0 if p.quantized else 2 * p.c * block
    return {"blocks": blocks, "head": p.c * head, "block gradients": leaving * block, "head gradients": leaving * head}


def loss_forward(p: Plan) -> int:
    """The most that the loss adds in the forward pass. 16-bit logits leave the model as fp32 (accelerate). chunked_nll:
    a reordered copy of the hidden states, and for each chunk of 256 tokens either the head's copy with its logits, or
    four fp32 tables (logits, log-softmax, exp, product: 16 * 256 V). Liger: a gradient of the hidden states and of a
    trained head, made at once, and two chunks of logits: of about n * d logits each, their rows a power of two. nll:
    logits, their fp32 copies and TRL's entropy: 12 bytes * n * V. dpo, kto: the policy's logits and a copy of them for
    its entropy; later logits of policy and reference (8 n V), the second ones as they become fp32, or copies for what
    TRL logs: in dpo of one half, in kto of both (desirable rows, and the others), and of one of them a second time.
    orpo: the logits, a copy and the log-softmax of the chosen half. Every token but the first is taken to belong to the
    answer.
    """
    V, d, n, tokens = p.a.vocab_size, p.a.hidden_size, p.n, p.n - p.rows  # tokens that predict another
    cast = p.head_copy
    if p.loss == "chunked_nll":
        chunk = min(CHUNK, tokens)
        return p.R * tokens * d + max(p.head_copy + p.c * chunk * V, 16 * chunk * V)
    if p.loss == "liger":
        rows = min(n, 1 << (-(-n // -(-V // d)) - 1).bit_length())
        head = (p.R * p.a.head_params + cast) if p.full else 0  # gradient, and a second cast: autocast keeps the first
        return p.R * n * d + head + cast + 2 * p.c * rows * V + p.c * rows * d
    copy, entropy = 4 * tokens * V, 12 * min(ENTROPY_CHUNK, n) * V  # log-softmax, exp and product of 128 tokens
    most = {
        "nll": max(8 * n * V + (copy if p.rows > 1 else 0) + entropy, (10 if p.amp else 8) * n * V),
        "dpo": max(4 * n * V + copy + entropy, 8 * n * V + 2 * (n if p.amp else tokens) * V),
        "kto": max(4 * n * V + copy + entropy, 8 * n * V + 6 * tokens * V),
        "orpo": 4 * n * V + copy,
    }
    return cast + (p.c * n * d if cast and p.full else 0) + most[p.loss]


def loss_backward(p: Plan) -> int:
    """The most that the loss adds in the backward pass: the final hidden state is gone, its gradient grows.
    chunked_nll: the chunk is computed once more, an fp32 head's 16-bit copy kept; a trained head adds its gradient so
    far (R V d), or three of them while the next chunk's is added. nll: log-softmax, its gradient and the logits': 12 n
    V. The other methods, in TRL's selective_log_softmax: the logits, the gradient that came through logsumexp, and the
    one through gather with the zeros that it is added to, 16 n V; orpo also keeps log-softmax of the chosen half.
    """
    V, d, n, tokens, head = p.a.vocab_size, p.a.hidden_size, p.n, p.n - p.rows, p.a.head_params
    if p.loss == "liger":
        return p.R * n * d + (p.R * head if p.full else 0)
    if p.loss == "chunked_nll":
        chunk, several = min(CHUNK, tokens), tokens > CHUNK
        grown, tables = p.R * tokens * d * (2 if several else 1), p.head_copy + 16 * chunk * V
        if p.full:
            added = 3 * p.R * head if several else p.R * head + p.head_copy
            return grown + max((p.R * head if several else 0) + tables, added)
        return grown + tables
    kept = 2 * head if p.amp and (p.full or p.R == 4) else 0
    kept += p.c * n * d if p.full and p.amp else 0
    return kept + (12 * n * V if p.loss == "nll" else 4 * n * V + (14 if p.loss == "orpo" else 12) * tokens * V)

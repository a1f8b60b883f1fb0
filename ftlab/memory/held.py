"""What is there all the time: weights, quantization constants, adapters, optimizer states; and the gradients."""

from typing import Any

from ftlab.memory.architecture import architecture_of
from ftlab.memory.settings import Plan, Settings, roles


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
    frozen = a.linear_params * _bits(s) / 8 + 2 * (a.params - a.linear_params)
    return round(frozen) + 16 * a.lora_params(s.r, s.target_modules)


def _bits(s: Settings) -> float:
    if s.load_in_4bit:
        return 4 + 8 / 64 + 32 / (64 * 256) if s.bnb_4bit_use_double_quant else 4 + 32 / 64
    return 8 if s.load_in_8bit else 16


def static(p: Plan) -> dict[str, float]:
    """Bytes by kind, of all roles, on one GPU; the gradients are not among them.

    Weights that are not quantized take p.R bytes; int8 one, NF4 half of one. FSDP gives each GPU its share, but not of
    NF4 weights and their constants: accelerate takes tensors of bytes out of the sharding (it says so in a warning),
    and bitsandbytes keeps the constants beside the weight, not in it. DDP reduces gradients in buckets of their own, as
    large as all gradients (gradient_as_bucket_view=False).
    """
    linear, rest = p.a.linear_params, p.R * (p.a.params - p.a.linear_params)
    linear = p.R * linear / p.shards if not p.quantized else linear if p.int8 else linear // 2
    frozen = sum(not (role.trained or role.shared) for role in roles(p.method, not p.full))
    held = {
        "weights": linear + (rest + frozen * p.R * p.a.params) / p.shards,
        "constants": constant_bytes(p),
        "adapters": p.adapter_params * p.adapter / p.shards,
        "optimizer": optimizer_bytes(p)[0] / p.shards,
        "temporary": gradients(p) if p.s.gpus > 1 and not p.s.fsdp else 0,
    }
    if p.critic:  # the reward model has its shape
        held["weights"] -= p.R * (p.a.params - p.critic.a.params) / p.shards
        held = {kind: size + static(p.critic).get(kind, 0) for kind, size in held.items()}
    return held


def constant_bytes(p: Plan) -> int:
    """int8: one fp32 per row. NF4: one fp32 per 64 weights; double: one byte per 64, one fp32 per 256 of those.

    Each NF4 matrix also carries its own table of 16 levels, with double quantization a second one of 256.
    """
    if not p.quantized:
        return 0
    total = 0
    for n_in, n_out in p.a.linears.values():
        blocks = -(-n_in * n_out // 64)
        double = blocks + 4 * -(-blocks // 256) + 64 + 1024
        total += 4 * n_out if p.int8 else double if p.s.bnb_4bit_use_double_quant else 4 * blocks + 64
    return p.a.num_hidden_layers * total


def trained(p: Plan) -> list[tuple[int, int, int]]:
    """(numbers, bytes per number, how many such tensors) of what the optimizer updates in the policy."""
    a, L = p.a, p.a.num_hidden_layers
    if not p.full:
        return [(numbers, p.adapter, L) for numbers in a.adapters(p.s.r, p.targets)]
    matrices = [n_in * n_out for n_in, n_out in a.linears.values()]
    tensors = [(numbers, p.R, L) for numbers in (*matrices, *a.vectors, *a.experts)]
    return [*tensors, (a.hidden_size, p.R, 1), (a.head_params, p.R, a.table_params // a.head_params)]


def gradients(p: Plan) -> int:
    """One number of the parameter's own dtype per trained parameter."""
    return sum(numbers * size * count for numbers, size, count in trained(p)) // p.shards


def optimizer_bytes(p: Plan) -> tuple[int, int]:
    """(bytes on the GPU, bytes in unified memory) of all shards together.

    torch's AdamW: two moments in the parameter's dtype. bitsandbytes' AdamW: two fp32 numbers; in 8 bits two bytes, and
    two fp32 per block of 256, but two fp32 numbers for tensors under 4,096; and two tables of 256 levels. Paged: states
    of tensors of 100,000 numbers or more live in unified memory; the block constants do not. SGD without momentum holds
    nothing.
    """
    optim, gpu, paged = p.s.optim, 0, 0
    eight_bit = optim.endswith("8bit")
    for numbers, size, count in trained(p):
        if optim.startswith("adamw_torch"):
            gpu += 2 * size * numbers * count
        elif optim != "sgd":
            small = numbers < 4096 or not eight_bit
            moments = (8 if small else 2) * numbers * count
            in_pages = optim.startswith("paged") and numbers >= 100_000
            gpu += (0 if small else 8 * -(-numbers // 256) * count) + (0 if in_pages else moments)
            paged += moments if in_pages else 0
    return gpu + (2048 if eight_bit else 0), paged


def step_temporary(p: Plan) -> int:
    """AdamW goes through all tensors at once on CUDA (foreach): the square roots of the second moments, all of them.

    This is a further 4 bytes per trained fp32 parameter, 20 in place of 16. The fused one needs nothing, bitsandbytes
    works tensor by tensor. SGD needs one copy of the gradients if there is weight decay.
    """
    return gradients(p) if p.s.optim == "adamw_torch" or (p.s.optim == "sgd" and p.s.weight_decay) else 0


def gathered(p: Plan) -> dict[str, float]:
    """FSDP: what one GPU has whole for a moment, beside its share: weights, and gradients on their way to their owners.

    The units are accelerate's: each block, the embedding, the head with the last norm (one unit if tied). Two blocks
    are there at once: the one at work, and the buffer in which the next one arrives. Weights come in c bytes (nothing
    to speak of in an NF4 block); gradients leave in c bytes and are copied to fp32 to be summed.
    """
    if p.shards == 1:
        return {"blocks": 0, "head": 0, "block gradients": 0, "head gradients": 0}
    block = (p.a.params - p.a.table_params) / p.a.num_hidden_layers
    head, leaving = p.a.head_params, (p.c + 4 if p.full else 0)
    blocks = 0 if p.quantized else 2 * p.c * block
    return {"blocks": blocks, "head": p.c * head, "block gradients": leaving * block, "head gradients": leaving * head}

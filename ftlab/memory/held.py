"""What is there all the time: weights, quantization constants, adapters, optimizer states; and the gradients."""

from ftlab.memory.architecture import Architecture
from ftlab.memory.setup import Plan, roles
from ftlab.pipeline.recipe import Recipe


def states(architecture: Architecture, recipe: Recipe) -> int:
    """Bytes of weights, gradients and Adam states by the papers' rule: 16 per trained parameter, 2 per frozen one.

    16 = 2 + 2 (16-bit weight and gradient) + 12 (fp32 copy and two moments), or 4 + 4 + 8 with fp32 weights. Frozen
    linear layers take 1 byte in int8, 4.5 bits in NF4 (4 + one fp32 per 64), 4 + 8/64 + 32/(64*256) = 4.126953125 bits
    with double quantization. No activations, no temporaries, and no upcasts: a floor to compare with, not a prediction.
    """
    if recipe.r == 0:
        return 16 * architecture.params
    bits = {"none": 16, "int8": 8, "nf4": 4 + 32 / 64, "nf4-double": 4 + 8 / 64 + 32 / (64 * 256)}[recipe.quantization]
    frozen = architecture.linear_params * bits / 8 + 2 * (architecture.table_params + architecture.small_params)
    return round(frozen) + 16 * architecture.lora_params(recipe.r, recipe.target_modules)


def static(p: Plan) -> dict[str, float]:
    """Bytes by kind, of all roles, on one GPU; the gradients are not among them.

    FSDP gives each GPU its share, but not of NF4 weights and their constants: accelerate takes tensors of bytes out of
    the sharding (it says so in a warning), and bitsandbytes keeps the constants beside the weight, not in it. DDP
    reduces gradients in buckets of their own, as large as all gradients (gradient_as_bucket_view=False).
    """
    linear, rest = weight_bytes(p)
    frozen = sum(not (role.trained or role.shared) for role in roles(p.recipe.method, not p.full))
    held = {
        "weights": linear / (1 if p.quantized else p.shards) + (rest + frozen * p.held * p.a.params) / p.shards,
        "constants": constant_bytes(p),
        "adapters": p.adapter_params * p.adapter / p.shards,
        "optimizer": optimizer_bytes(p)[0] / p.shards,
        "temporary": gradients(p) if p.setup.gpus > 1 and p.setup.sharding == "ddp" else 0,
    }
    if p.critic:  # the reward model has its shape
        held["weights"] -= p.held * (p.a.params - p.critic.a.params) / p.shards
        held = {kind: size + static(p.critic).get(kind, 0) for kind, size in held.items()}
    return held


def weight_bytes(p: Plan) -> tuple[int, int]:
    """(of linear layers, of the rest): p.held each; quantized: 1 byte (int8) or half a byte, the rest 4."""
    rest = p.a.table_params + p.a.small_params
    if not p.quantized:
        return p.held * p.a.linear_params, p.held * rest
    return p.a.linear_params if p.int8 else p.a.linear_params // 2, 4 * rest  # fp32: prepare_model_for_kbit_training


def constant_bytes(p: Plan) -> int:
    """int8: one fp32 per row. NF4: one fp32 per 64 weights; double: one byte per 64, one fp32 per 256 of those.

    Each NF4 matrix also carries its own table of 16 levels, with double quantization a second one of 256.
    """
    total = 0
    for n_in, n_out in p.a.linears.values():
        blocks = -(-n_in * n_out // 64)
        total += {
            "none": 0,
            "int8": 4 * n_out,
            "nf4": 4 * blocks + 64,
            "nf4-double": blocks + 4 * -(-blocks // 256) + 64 + 1024,
        }[p.recipe.quantization]
    return p.a.num_hidden_layers * total


def trained(p: Plan) -> list[tuple[int, int, int]]:
    """(numbers, bytes per number, how many such tensors) of what the optimizer updates in the policy."""
    a, layers = p.a, p.a.num_hidden_layers
    if not p.full:
        r = p.recipe.r
        return [(r * side, p.adapter, layers) for name in sorted(p.targets) for side in a.linears[name]]
    tensors = [(n_in * n_out, 4, layers) for n_in, n_out in a.linears.values()]
    tensors += [(a.hidden_size, 4, 2 * layers + 1), (a.head_params, 4, 1 if a.tie_word_embeddings else 2)]
    tensors += [(a.head_dim, 4, 2 * layers)] if a.qk_norm else []
    tensors += [(a.linears[m][1], 4, layers) for m in ("q_proj", "k_proj", "v_proj")] if a.attention_bias else []
    return tensors


def gradients(p: Plan) -> int:
    """One number of the parameter's own dtype per trained parameter."""
    return sum(numbers * size * count for numbers, size, count in trained(p)) // p.shards


def optimizer_bytes(p: Plan) -> tuple[int, int]:
    """(bytes on the GPU, bytes in unified memory) of all shards together.

    AdamW: two moments in the parameter's dtype. 8-bit AdamW: two bytes, two fp32 per block of 256, but two fp32 numbers
    for tensors under 4,096, and two tables of 256 levels. Paged: states of tensors of 100,000 numbers or more live in
    unified memory; the block constants do not. SGD without momentum holds nothing.
    """
    gpu = paged = 0
    eight_bit = p.recipe.optimizer.endswith("8bit")
    for numbers, size, count in trained(p):
        if p.recipe.optimizer == "adamw_torch":
            gpu += 2 * size * numbers * count
        elif eight_bit:
            small, pages = numbers < 4096, p.recipe.optimizer.startswith("paged") and numbers >= 100_000
            moments = (8 if small else 2) * numbers * count
            constants = 0 if small else 8 * -(-numbers // 256) * count
            gpu += constants + (0 if pages else moments)
            paged += moments if pages else 0
    return gpu + (2048 if eight_bit else 0), paged


def step_temporary(p: Plan) -> int:
    """AdamW goes through all tensors at once on CUDA (foreach): the square roots of the second moments, all of them.

    This is a further 4 bytes per trained fp32 parameter, 20 in place of 16. bitsandbytes works tensor by tensor. SGD
    needs one copy of the gradients if there is weight decay.
    """
    if p.recipe.optimizer == "adamw_torch" or (p.recipe.optimizer == "sgd" and p.recipe.weight_decay):
        return gradients(p)
    return 0


def gathered(p: Plan) -> dict[str, float]:
    """FSDP: what one GPU has whole for a moment, beside its share: weights, and gradients on their way to their owners.

    The units are accelerate's: each block, the embedding, the head with the last norm (one unit if tied). Two blocks
    are there at once: the one at work, and the buffer in which the next one arrives. Weights come in c bytes (nothing
    to speak of in an NF4 block); gradients leave in c bytes and are copied to fp32 to be summed.
    """
    if p.shards == 1:
        return {"blocks": 0, "head": 0, "block gradients": 0, "head gradients": 0}
    block = (p.a.linear_params + p.a.small_params) / p.a.num_hidden_layers
    head, leaving = p.a.head_params, (p.c + 4 if p.full else 0)
    blocks = 0 if p.quantized else 2 * p.c * block
    return {"blocks": blocks, "head": p.c * head, "block gradients": leaving * block, "head gradients": leaving * head}

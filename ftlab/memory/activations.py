"""What the forward pass leaves for the backward pass, and what one block needs for a moment in each. p: settings.Plan.

Three tables: INPUT, what linear layers keep of their input; `block`, what each operation of a block keeps; NEEDED, what
the highest moment of a block takes on top. "casts" are copies of weights, apart from all of these.
"""

from ftlab.memory.architecture import ATTENTION, MLP
from ftlab.memory.settings import Plan

QKV = ATTENTION[:3]

# --- kept by a block --------------------------------------------------------------------------------------------------

# What linear layers keep of their common input for the gradient of what is trained: bytes per number of (the input
# itself, a copy for each layer that is trained or adapted), by kind and bytes of the input. Autocast casts an fp32
# input once for each reader. PEFT casts an input to the dtype of lora_A, fp32, so each lora_A keeps a copy of its own
# even of a 16-bit one; adapters of a quantized model are bf16 and share it. A frozen weight needs no input, but int8
# keeps it all the same.
INPUT = {
    ("full", 4): (0, 2),
    ("full", 2): (2, 0),
    ("lora", 4): (0, 2),
    ("lora", 2): (0, 2),
    ("nf4", 4): (0, 2),
    ("nf4", 2): (2, 0),
    ("int8", 4): (4, 2),
    ("int8", 2): (2, 0),
}
WITHOUT_AUTOCAST = (4, 0)


def inputs(p: Plan, readers: tuple[str, ...], size: int, alive: bool = False) -> int:
    """Bytes a token. size: bytes of the input; alive: something else keeps it anyway. Dropout: copies, and a mask."""
    itself, each = INPUT[p.kind, size] if p.amp else WITHOUT_AUTOCAST
    adapted = len(p.targets.intersection(readers))
    if p.dropout:
        itself, each = itself if p.int8 else 0, p.c + 1
    if alive or not (adapted or p.int8):
        itself = 0
    return p.a.linears[readers[0]][0] * (itself + each * adapted)


def block(p: Plan, window: bool = True) -> dict[str, int]:
    """What each operation of a block keeps, in bytes per token of the batch. window: of one that has one, if any has.

    A norm keeps its fp32 input (a copy of a 16-bit one) and one scale a row; for its own gradient the normed input,
    which Gemma's leaves in fp32.
    """
    a, full, gemma = p.a, p.full, p.a.model_type == "gemma3_text"
    norm = (4 + full * (4 if gemma else p.R)) * a.hidden_size + 4
    head_norm = (4 + full * (4 if gemma else p.w)) * a.head_dim + 4
    return {
        "input_layernorm": norm,
        "q_proj k_proj v_proj": inputs(p, QKV, p.R),
        "q_norm k_norm": (a.num_attention_heads + a.num_key_value_heads) * head_norm * a.qk_norm,
        "attention": attention(p, window),
        "o_proj": inputs(p, ("o_proj",), 2, alive=True),
        "other norms": norm * (a.norms - 1),
        **(experts(p) if a.num_experts else mlp(p)),
        "lora_B": 0 if full else p.c * p.s.r * len(p.targets - {"experts"}),
    }


def attention(p: Plan, window: bool) -> int:
    """sdpa: q, k, v and the output in c bytes, one fp32 per row and head; with a mask, keys and values of all heads.

    eager: keys and values of all heads, the T x T weights in fp32 (softmax) and in c bytes (for the product with v).
    gpt_oss: one more column, the sink, in the dtype of scores and mask; and where each row's maximum stands.
    """
    a, T, heads, masked = p.a, p.T, p.a.num_attention_heads, p.masked(window)
    q, k = heads * a.head_dim, a.num_key_value_heads * a.head_dim
    keys = q if p.eager or masked else k
    if not p.eager:
        return p.c * (2 * q + 2 * keys + T * masked) + 4 * heads
    output = q if p.full or p.quantized or not p.amp else 0  # lora_A keeps a copy of its own
    weights = 4 * T + (p.c * T if p.amp else 0)
    if a.model_type == "gpt_oss":
        weights = p.R * (T + 1) + 8 + (p.c * T if p.c < p.R else 0)
    return p.c * (q + 2 * keys + output) + weights * heads


def mlp(p: Plan) -> dict[str, int]:
    return {
        "gate_proj up_proj": inputs(p, MLP[:2], p.R),
        "act(gate) * up": 3 * p.w * p.a.intermediate_size,  # gate, act(gate), up
        "down_proj": inputs(p, MLP[2:], p.w),
    }


def experts(p: Plan) -> dict[str, int]:
    """Of num_experts_per_tok copies of each token, in the dtype of the weights: grouped_mm knows no autocast.

    The router keeps its logits, their gradient for TRL's router_aux_loss_coef, and qwen3_moe's its fp32 probabilities.
    Each copy: its places in the sorted order, gate, act(gate) and up (gpt_oss clamps: six numbers for three), and what
    comes out, since the router's weight is multiplied with it; and the inputs, if the experts are trained or adapted.
    """
    a, k, oss = p.a, p.a.num_experts_per_tok, p.a.model_type == "gpt_oss"
    d, f = a.hidden_size, a.intermediate_size
    return {
        "router": (4 if oss else 8) * a.num_experts + p.c * d * taught(p),
        "experts": k * (p.R * ((6 if oss else 3) * f + d + (d + f) * taught(p)) + 35),
    }


def taught(p: Plan) -> bool:
    """Whether experts are trained or have adapters."""
    return p.full or p.merges


def merged(p: Plan) -> int:
    """The weights of a block's experts with their adapters, which PEFT adds to them anew in each forward pass."""
    return p.R * sum(p.a.experts) if p.merges else 0


def layer(p: Plan, window: bool = True) -> int:
    return p.n * sum(block(p, window).values()) + merged(p)


def norm(p: Plan) -> int:
    return p.n * block(p)["input_layernorm"]


# --- kept by all of them ----------------------------------------------------------------------------------------------


def mask(p: Plan) -> int:
    """The T x T masks, held while the blocks run; checkpoints keep them, as their argument.

    One for the blocks with a window and one for the others: R bytes a number, for sdpa True or False, if it needs one.
    """
    kinds = {window for window, there in ((False, p.a.plain_layers), (True, p.a.sliding_layers)) if there}
    return p.n * p.T * sum(p.R if p.eager else p.masked(window) for window in kinds)


def shared(p: Plan) -> int:
    """Token ids and their mask (16 bytes a token), cosines and sines; a checkpoint also holds on to the T x T mask."""
    angles = {"gemma3_text": 4, "gpt_oss": 1}.get(p.a.model_type, 2)  # Gemma's windows have their own
    return 16 * p.n + angles * p.R * p.T * p.a.head_dim + (mask(p) if p.checkpointed else 0)


def stored(p: Plan) -> int:
    """What a block keeps under checkpointing: its input, R * n * d, and the router's logits with their gradient.

    In int8 also the inputs of its linear layers: bitsandbytes' MatMul8bitLt holds them as attributes of its context,
    not through save_for_backward, and a checkpoint cannot let go of what it does not see.
    """
    int8 = _of_int8(p) + p.c * p.a.linears["o_proj"][0] if p.int8 else 0
    return p.n * (p.R * p.a.hidden_size + 4 * (p.a.num_experts or 0) + int8)


def recomputed(p: Plan) -> int:
    """What a checkpointed block has once it is computed again, beside what was stored of it.

    An fp32 residual stream is the first norm's own input, so it is stored already; and so are int8's inputs.
    """
    residual, logits = (4 * p.a.hidden_size if p.R == 4 else 0), 4 * (p.a.num_experts or 0)
    return layer(p) - p.n * (residual + logits + (_of_int8(p) if p.int8 else 0))


def _of_int8(p: Plan) -> int:
    """Bytes a token of the inputs that int8 layers keep: of q, k, v; of gate and up, and of down, if they are such."""
    return p.R * p.a.hidden_size + (0 if p.a.num_experts else p.R * p.a.hidden_size + p.w * p.a.intermediate_size)


def activations(p: Plan) -> int:
    """All blocks, with checkpointing only what they store.

    Without it and with LoRA the first block's first norm keeps nothing, int8 not its input and dropout not its masks:
    nothing before them is trained. Nor does its attention, if only the MLP has adapters.
    """
    if p.checkpointed:
        return p.a.num_hidden_layers * stored(p) + shared(p)
    first = 0
    if not p.full:
        kept, adapted = block(p), len(p.targets.intersection(QKV))
        alone = p.int8 and (p.R == 4 or p.dropout or not adapted)  # no adapter shares int8's input
        first = kept["input_layernorm"] + p.a.hidden_size * (adapted * p.dropout + p.R * alone)
        if not p.targets.intersection(ATTENTION):
            first += kept["input_layernorm"] * (p.a.norms // 2) + kept["attention"] + kept["q_norm k_norm"]
    return p.a.sliding_layers * layer(p) + p.a.plain_layers * layer(p, window=False) - p.n * first + shared(p)


def casts(p: Plan, layers: int) -> int:
    """16-bit copies of the fp32 weights of this many blocks, which autocast makes and the graph keeps.

    A copy of a trained weight is cached until the forward pass ends, so checkpointing does not avoid it there. FSDP
    gathers the weights in 16 bits already.
    """
    if not p.amp or p.shards > 1:
        return 0
    adapters = p.adapter_params if p.adapter == 4 else 0
    base = p.a.linear_params if p.R == 4 and not p.quantized else 0
    return round(2 * (adapters + base) * layers / p.a.num_hidden_layers)


# --- needed by one block for a moment ---------------------------------------------------------------------------------

# Beside what is kept: (f, d) stands for f * n * intermediate_size + d * n * hidden_size bytes; of several, the largest.
# forward: at down_proj, with all else kept. LoRA: the product of SwiGLU (2 f) and its fp32 form for lora_A (4 f; 4 more
# after dropout). NF4 and int8 on an fp32 residual stream: fp32 results, their copies and the adapter's. And results,
# scaled adapter results, sums, the residual: some d. checkpointed: at up_proj, when a checkpoint keeps nothing.
# backward: at down_proj, f alone. Full: two gradients of c bytes, less the product that is let go. LoRA: one of c bytes
# through A and its fp32 form, less A's copy. NF4 and int8: the base's, the adapter's and their sum. Without an adapter
# on down_proj its input is not kept: three of w bytes. again: of a checkpointed block, computed again up to down_proj.
NEEDED = {
    # kind, where it is adapted: forward,   checkpointed, backward, again ...
    ("full", "any"): (((0, 10),), (6, 8), 4),
    ("full 16", "any"): (((0, 16),), (6, 4), 4),
    ("full fp32", "any"): (((0, 10),), (12, 8), 8),
    ("lora", "down dropout"): (((10, 10),), (12, 6), 4, (10, 10)),
    ("lora", "down"): (((6, 14),), (8, 8), 4, (6, 10)),
    ("lora", "mlp"): (((0, 16), (4, 2)), (8, 8), 6, (4, 10)),
    ("lora", "attention"): (((0, 16), (4, 2)), (6, 4), 6),
    ("lora fp32", "down"): (((0, 16),), (16, 8), 8),
    ("lora fp32", "mlp"): (((4, 12),), (16, 8), 12),
    ("lora fp32", "attention"): (((4, 12),), (12, 8), 12),
    ("nf4", "down dropout"): (((8, 12),), (14, 8), 9, (8, 14)),
    ("nf4", "down"): (((4, 18),), (14, 8), 10),
    ("nf4", "mlp dropout"): (((8, 12),), (14, 8), 12),
    ("nf4", "mlp"): (((4, 18),), (14, 8), 12),
    ("nf4", "attention dropout"): (((8, 12),), (12, 8), 12),
    ("nf4", "attention"): (((4, 18),), (12, 8), 12),
    ("nf4 16", "down dropout"): (((0, 16), (2, 14)), (8, 4), 4, (2, 10)),
    ("nf4 16", "down"): (((0, 16),), (8, 4), 4),
    ("nf4 16", "mlp dropout"): (((0, 16), (4, 8)), (8, 4), 6, (6, 6)),
    ("nf4 16", "mlp"): (((0, 16), (4, 6)), (8, 4), 6, (6, 4)),
    ("nf4 16", "attention"): (((0, 16), (4, 2)), (6, 4), 6),
    ("int8", "down dropout"): (((1, 12),), (10, 4), 9, (8, 18)),
    ("int8", "down"): (((1, 12),), (10, 4), 10),
    ("int8", "any"): (((1, 12),), (10, 4), 12),
    ("int8 16", "down dropout"): (((0, 16),), (6, 3), 4, (2, 12)),
    ("int8 16", "down"): (((0, 16), (3, 6)), (6, 3), 6, (6, 6), (3, 16)),
    ("int8 16", "any"): (((0, 16), (3, 6)), (6, 3), 6, (6, 9)),
}
# The same of a block with experts: the first two times R bytes a number and k copies of each token, and d alone. What
# is trained or adapted keeps its inputs: less is new in the forward pass, nothing when it is computed again.
EXPERTS = {
    "qwen3_moe": (((0, 3, 8.5), (0, 2, 14.4)), ((0, 3, 10.4), (0, 4, 4.5), (4, 1, 4.2)), (0, 3, 2.4), (0, 3, 6.3)),
    "gpt_oss": (((0, 4, 8.5), (0, 2, 14.4)), ((0, 4, 10.4), (11, 1, 4.2)), (0, 3, 2.4), (2, 3, 6.3), (0, 4, 6.3)),
}


def needed(p: Plan) -> tuple[float, float]:
    """The most that one block takes, in the forward pass and in the backward pass of its MLP."""
    nf, nd = p.n * p.a.intermediate_size, p.n * p.a.hidden_size
    if p.a.num_experts:
        copies, wide = p.R * p.a.num_experts_per_tok, (p.R - 2) * nd
        kept, checkpointed, *back = EXPERTS[p.a.model_type]
        rows = (checkpointed if p.checkpointed else kept), back if p.checkpointed and not taught(p) else back[:1]
        most = [max(copies * (f * nf + d * nd) + one * nd for f, d, one in row) + wide for row in rows]
        return most[0] + (merged(p) if p.checkpointed else -copies * nd * taught(p)), most[1]
    where = "down" if "down_proj" in p.targets else "mlp" if p.targets.intersection(MLP) else "attention"
    kind = p.kind if p.amp else f"{p.kind} fp32"
    kind += " 16" if p.R == 2 and p.kind != "lora" else ""
    row = next(NEEDED[kind, w] for w in (f"{where} dropout" * p.dropout, where, "any") if (kind, w) in NEEDED)
    forward, checkpointed, backward, *again = row
    forward, again = ((checkpointed,), again) if p.checkpointed else (forward, ())
    if p.a.model_type == "gemma3_text":  # the last norm of a block
        again = (*((f, d + 2) for f, d in again), (0, 20 + p.R))
    return tuple(max(f * nf + d * nd for f, d in row) for row in (forward, ((backward, p.R), *again)))


def block_forward(p: Plan) -> float:
    """What one block needs for a moment in the forward pass, beside what it keeps.

    eager: or at the softmax, its input (with a 16-bit one also an fp32 copy) and its output, before the MLP has begun;
    in gpt_oss scores and mask, the same with a sink, and that less its maximum.
    """
    most, nd, oss = needed(p)[0], p.n * p.a.hidden_size, p.a.model_type == "gpt_oss"
    if p.eager:
        softmax = (3 * p.R if oss else 8 if p.R == 4 else 10) * p.n * p.a.num_attention_heads * p.T
        wide = (5 if oss else 4) * p.R if p.checkpointed else (34 if p.R == 4 else 21)
        most = max(most, softmax + wide * nd - (0 if p.checkpointed else layer(p)))
    return most + (0 if p.checkpointed else mask(p))


def block_backward(p: Plan) -> float:
    """The most that the backward pass of one block adds to what is kept, with the gradient of the residual stream.

    Full: also the gradient of an MLP weight, less its 16-bit copy. eager: or at the softmax, its output and two
    gradients in fp32, 12 bytes a score, when the MLP's tensors are gone (and its gradients there); in gpt_oss 3 R
    bytes, and as many before, when a checkpointed block comes to its softmax again.
    """
    d, f, nd = p.a.hidden_size, p.a.intermediate_size, p.n * p.a.hidden_size
    new_gradient = (2 if p.amp else 4) * d * f if p.full else 0
    most = needed(p)[1] + new_gradient
    if p.eager:
        q, kept = p.a.linears["o_proj"][0], block(p)
        names = ("input_layernorm", "q_proj k_proj v_proj", "q_norm k_norm")
        there = p.n * (sum(kept[name] for name in names) + 3 * p.c * q) + 3 * new_gradient
        oss, scores = p.a.model_type == "gpt_oss", p.n * p.a.num_attention_heads * p.T
        most = max(most, (3 * p.R if oss else 12) * scores + there + p.R * nd - layer(p))
        if oss and p.checkpointed:
            again = 3 * p.R * scores + (6 + p.R * (8 + p.a.num_experts_per_tok)) * nd
            most = max(most, again - recomputed(p))
    return most

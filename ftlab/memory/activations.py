"""What the forward pass leaves for the backward pass, and what one block needs for a moment in each. p: settings.Plan.

Two tables: `block`, what each operation of a block keeps, in bytes a token; data/architectures/needed.json, what the
highest moment of a block takes on top. "casts" are copies of weights, apart from both.
"""

import json
from functools import cache

from ftlab.memory.architecture import ATTENTION, MLP, QK_NORM, QKV
from ftlab.memory.settings import Plan
from ftlab.paths import DATA


def inputs(p: Plan, readers: tuple[str, ...], size: int, alive: bool = False) -> int:
    """What linear layers keep of their common input, of `size` bytes a number, for the gradient of what is trained. An
    fp32 input: autocast casts it once for each reader. A 16-bit one: PEFT casts it to the dtype of lora_A, fp32, so
    each lora_A keeps a copy of its own even so; adapters of a quantized model are bf16 and share it. A frozen weight
    needs no input, but int8 keeps it all the same. Dropout: copies, and a mask. alive: something else keeps it anyway.
    """
    if not p.amp:
        itself, each = 4, 0
    elif size == 4 or p.kind == "lora":
        itself, each = (4 if p.int8 else 0), 2
    else:
        itself, each = 2, 0
    adapted = len(p.targets.intersection(readers))
    if p.dropout:
        itself, each = itself if p.int8 else 0, p.c + 1
    if alive or not (adapted or p.int8):
        itself = 0
    return p.a.linears[readers[0]][0] * (itself + each * adapted)


def block(p: Plan, window: bool = True) -> dict[str, int]:
    """What each operation of a block keeps, in bytes per token of the batch. window: of one that has one, if any has. A
    norm keeps its fp32 input (a copy of a 16-bit one) and one scale a row; for its own gradient the normed input, which
    Gemma's leaves in fp32.
    """
    a, gemma = p.a, p.a.model_type == "gemma3_text"
    norm = (4 + p.full * (4 if gemma else p.R)) * a.hidden_size + 4
    head_norm = (4 + p.full * (4 if gemma else p.w)) * a.head_dim + 4
    return {
        "input_layernorm": norm,
        "q_proj k_proj v_proj": inputs(p, QKV, p.R),
        "q_norm k_norm": (a.num_attention_heads + a.num_key_value_heads) * head_norm * (a.model_type in QK_NORM),
        "attention": attention(p, window),
        "o_proj": inputs(p, ("o_proj",), 2, alive=True),
        "other norms": norm * (a.norms - 1),
        **mlp(p),
        "lora_B": 0 if p.full else p.c * p.s.r * len(p.targets - {"experts"}),
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
    """The inputs of its layers; gate, act(gate) and up. Experts: of num_experts_per_tok copies of each token, in the
    dtype of the weights: grouped_mm knows no autocast. The router keeps its logits, their gradient for TRL's
    router_aux_loss_coef, and qwen3_moe's its fp32 probabilities. Each copy: its places in the sorted order, gate,
    act(gate) and up (gpt_oss clamps: six numbers for three), and what comes out, since the router's weight is
    multiplied with it; and the inputs, if the experts are trained or adapted.
    """
    a, d, f, k, oss = p.a, p.a.hidden_size, p.a.intermediate_size, p.a.num_experts_per_tok, p.a.model_type == "gpt_oss"
    if not a.num_experts:
        layers = {"gate_proj up_proj": inputs(p, MLP[:2], p.R), "down_proj": inputs(p, MLP[2:], p.w)}
        return layers | {"act(gate) * up": 3 * p.w * f}
    return {
        "router": (4 if oss else 8) * a.num_experts + p.c * d * p.experts_trained,
        "experts": k * (p.R * ((6 if oss else 3) * f + d + (d + f) * p.experts_trained) + 35),
    }


def merged(p: Plan) -> int:
    """The weights of a block's experts with their adapters, which PEFT adds to them anew in each forward pass."""
    return p.R * sum(p.a.experts) if p.merges else 0


def layer(p: Plan, window: bool = True) -> int:
    return p.n * sum(block(p, window).values()) + merged(p)


def mask(p: Plan) -> int:
    """The T x T masks, held while the blocks run; checkpoints keep them, as their argument. One for the blocks with a
    window and one for the others: R bytes a number, for sdpa True or False, if it needs one.
    """
    return p.n * p.T * sum(p.R if p.eager else p.masked(window) for window in p.a.windows)


def shared(p: Plan) -> int:
    """Token ids and their mask (16 bytes a token), cosines and sines; a checkpoint also holds on to the T x T mask."""
    angles = {"gemma3_text": 4, "gpt_oss": 1}.get(p.a.model_type, 2)  # Gemma's windows have their own
    return 16 * p.n + angles * p.R * p.T * p.a.head_dim + (mask(p) if p.checkpointed else 0)


def checkpoint(p: Plan) -> tuple[int, int]:
    """(what a block keeps under checkpointing, what it has beside that once it is computed again). It keeps its input,
    R * n * d, which is an fp32 norm's own input too, and the router's logits with their gradient. In int8 also the
    inputs of its linear layers: bitsandbytes' MatMul8bitLt holds them as attributes of its context, not through
    save_for_backward, and a checkpoint cannot let go of what it does not see.
    """
    residual, logits, int8, of_o = p.R * p.a.hidden_size, 4 * (p.a.num_experts or 0), 0, 0
    if p.int8:  # of q, k, v; of gate and up; of down
        int8 = residual + (0 if p.a.num_experts else residual + p.w * p.a.intermediate_size)
        of_o = p.c * p.a.linears["o_proj"][0]
    again = layer(p) - p.n * (logits + int8 + (residual if p.R == 4 else 0))
    return p.n * (residual + logits + int8 + of_o), again


def activations(p: Plan) -> int:
    """All blocks, with checkpointing only what they store. Without it and with LoRA the first block's first norm keeps
    nothing, int8 not its input and dropout not its masks: nothing before them is trained. Nor does its attention, if
    only the MLP has adapters.
    """
    if p.checkpointed:
        return p.a.num_hidden_layers * checkpoint(p)[0] + shared(p)
    first = 0
    if not p.full:
        kept, adapted = block(p), len(p.targets.intersection(QKV))
        alone = p.int8 and (p.R == 4 or p.dropout or not adapted)  # no adapter shares int8's input
        first = kept["input_layernorm"] + p.a.hidden_size * (adapted * p.dropout + p.R * alone)
        if not p.targets.intersection(ATTENTION):
            first += kept["input_layernorm"] * (p.a.norms // 2) + kept["attention"] + kept["q_norm k_norm"]
    return sum(count * layer(p, window) for window, count in p.a.windows.items()) - p.n * first + shared(p)


def casts(p: Plan) -> int:
    """16-bit copies of the fp32 weights of a block, which autocast makes and the graph keeps. A copy of a trained
    weight is cached until the forward pass ends, checkpointing or not. FSDP gathers the weights in 16 bits already.
    """
    if not p.amp or p.shards > 1:
        return 0
    adapters = p.adapter_params if p.adapter == 4 else 0
    base = p.a.linear_params if p.R == 4 and not p.quantized else 0
    return 2 * (adapters + base) // p.a.num_hidden_layers


@cache
def table() -> dict[tuple[str, str], dict]:
    """The rows of data/architectures/needed.json by kind and by what is adapted; its README explains the columns."""
    rows = json.loads((DATA / "architectures" / "needed.json").read_text(encoding="utf-8"))
    return {(row["kind"], row["adapted"]): row for row in rows}


def needed(p: Plan) -> tuple[float, float]:
    """The most that one block takes, in the forward pass and in the backward pass of its MLP, by the table. (f, d)
    stands for f * n * intermediate_size + d * n * hidden_size bytes. With experts (f, d, one): the first two times R
    and for k copies of each token, and `one` as d is here.
    """
    nf, nd = p.n * p.a.intermediate_size, p.n * p.a.hidden_size
    if p.a.num_experts:
        copies, wide, row = p.R * p.a.num_experts_per_tok, (p.R - 2) * nd, table()[p.a.model_type, "any"]
        again = row["again"] if p.checkpointed and not p.experts_trained else []
        sums = row["checkpointed" if p.checkpointed else "forward"], [row["backward"], *again]
        most = [max(copies * (f * nf + d * nd) + one * nd for f, d, one in each) + wide for each in sums]
        return most[0] + (merged(p) if p.checkpointed else -copies * nd * p.experts_trained), most[1]
    where = "down" if "down_proj" in p.targets else "mlp" if p.targets.intersection(MLP) else "attention"
    kind = p.kind if p.amp else f"{p.kind} fp32"
    kind += " 16" if p.R == 2 and p.kind != "lora" else ""
    row = next(table()[kind, w] for w in (f"{where} dropout" * p.dropout, where, "any") if (kind, w) in table())
    again = row["again"] if p.checkpointed else []
    if p.a.model_type == "gemma3_text":  # the last norm of a block
        again = [*((f, d + 2) for f, d in again), (0, 20 + p.R)]
    sums = row["checkpointed" if p.checkpointed else "forward"], [(row["backward"], p.R), *again]
    return tuple(max(f * nf + d * nd for f, d in each) for each in sums)


def block_forward(p: Plan) -> float:
    """What one block needs for a moment in the forward pass, beside what it keeps. eager: or at the softmax, its input
    (with a 16-bit one also an fp32 copy) and its output, before the MLP has begun; in gpt_oss scores and mask, the same
    with a sink, and that less its maximum.
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
            most = max(most, again - checkpoint(p)[1])
    return most

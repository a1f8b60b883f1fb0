"""What the forward pass leaves for the backward pass (`block`: a table by operation), and what one block needs on top
of that for a moment in each (`needed`: the table data/architectures/needed.json).
"""

from ftlab.memory.architecture import ATTENTION, MLP, QK_NORM, QKV, rows
from ftlab.memory.settings import Plan

OFFLOADING = 5  # checkpoints on their way to the host: TRL's OffloadActivations.max_fwd_stash_size


def inputs(p: Plan, readers: tuple[str, ...], size: int, alive: bool = False) -> int:
    """What linear layers keep of their common input, of `size` bytes a number. Autocast casts an fp32 one for each
    reader; PEFT casts a 16-bit one for each lora_A, but bf16 adapters of a quantized model share
    it. Without autocast fp32 adapters get fp32 copies of a 16-bit input. A frozen weight needs no
    input; int8 keeps it. Dropout: copies, and a mask. alive: something else keeps the input anyway.
    """
    adapted, itself, each = len(p.targets.intersection(readers)), p.c, 0
    if p.amp and (size == 4 or p.copies):
        itself, each = 4 * p.int8, 2
    if not p.amp and p.copies:
        itself, each = 0, p.adapter
    if p.dropout:
        itself, each = itself * p.int8, p.c + 1
    if alive or not (adapted or p.int8):
        itself = 0
    return p.a.linears[readers[0]][0] * (itself + each * adapted)


def attention(p: Plan, window: bool) -> int:
    """sdpa: q, k, v and the output in c bytes, one fp32 per row and head; with a mask, keys and values of all heads.
    eager: keys and values of all heads, the T x T weights in fp32 (softmax) and in c bytes (for the product with v).
    gpt_oss: one more column, the sink, in the dtype of scores and mask; and where each row's maximum stands.
    """
    heads, masked = p.a.num_attention_heads, p.masked[window]
    if not p.eager:
        return p.c * (2 * p.q + 2 * (p.q if masked else p.k) + p.T * masked) + 4 * heads
    weights = p.R * (p.T + 1) + 8 + p.c * p.T * (p.c < p.R) if p.oss else (4 + p.c * (p.c < 4)) * p.T
    output = 0 if p.copies else p.q  # lora_A keeps a copy of its own
    return p.c * (3 * p.q + output) + weights * heads


def block(p: Plan, window: bool = True) -> dict[str, int]:
    """What each operation of a block keeps, in bytes per token of the batch. window: of one that has one, if any has.

    Norms: the fp32 input (a copy of a 16-bit one) and one scale a row; for its own gradient the normed input, which
    Gemma's leaves in fp32. The router: its logits, their gradient for TRL's router_aux_loss_coef, and qwen3_moe's its
    fp32 probabilities. Experts, of num_experts_per_tok copies of each token, in the dtype of the weights (grouped_mm
    knows no autocast): places in the sorted order, gate, act(gate) and up (gpt_oss clamps: six numbers for three), what
    comes out, and the inputs if the experts are trained or adapted.
    """
    a, trained = p.a, p.experts_trained
    norm = (4 + p.full * (4 if p.gemma else p.R)) * p.d + 4
    head_norm = (4 + p.full * (4 if p.gemma else p.w)) * a.head_dim + 4
    kept = {
        "input_layernorm": norm,
        "q_proj k_proj v_proj": inputs(p, QKV, p.R),
        "q_norm k_norm": (a.num_attention_heads + a.num_key_value_heads) * head_norm * (a.model_type in QK_NORM),
        "attention": attention(p, window),
        "o_proj": inputs(p, ("o_proj",), 2, alive=True),
        "other norms": norm * (3 if p.gemma else 1),
        "lora_B": 0 if p.full else p.c * p.r * len(p.targets - {"experts"}),
    }
    if a.num_experts:
        numbers = (6 if p.oss else 3) * p.f + p.d + (p.d + p.f) * trained
        kept["router"] = (4 if p.oss else 8) * a.num_experts + p.c * p.d * trained
        return kept | {"experts": a.num_experts_per_tok * (p.R * numbers + 35)}
    mlp = {"gate_proj up_proj": inputs(p, MLP[:2], p.R), "down_proj": inputs(p, MLP[2:], p.w)}
    return kept | mlp | {"act(gate) * up": 3 * p.w * p.f}


def layer(p: Plan, window: bool = True) -> int:
    """Bytes that a block keeps without checkpointing; with adapted experts also their merged weights."""
    return p.n * sum(block(p, window).values()) + p.merged


def shared(p: Plan) -> int:
    """Token ids and their mask, cosines and sines (Gemma's windows have their own), the T x T masks of checkpoints."""
    angles = 4 if p.gemma else 1 if p.oss else 2
    return 16 * p.n + angles * p.R * p.T * p.a.head_dim + p.masks * p.checkpointed


def checkpoint(p: Plan) -> tuple[int, int]:
    """(what a block keeps under checkpointing, what it has beside that once it is computed again). It keeps its input,
    the router's logits with their gradient, and in int8 the inputs of its linear layers, which bitsandbytes'
    MatMul8bitLt holds outside save_for_backward.
    """
    residual, logits, moe = p.R * p.d, 4 * (p.a.num_experts or 0), p.a.num_experts
    int8 = p.int8 * (residual + (0 if moe else residual + p.w * p.f))  # of q, k, v; of gate and up; of down
    again = layer(p) - p.n * (logits + int8 + residual * (p.R == 4))
    return p.n * (residual + logits + int8 + p.int8 * p.c * p.q), again


def activations(p: Plan) -> int:
    """All blocks. With LoRA and no checkpointing the first block's first norm keeps nothing, int8 not its input and
    dropout not its masks: nothing before them is trained. Nor does its attention, if only the MLP has adapters.
    """
    if p.checkpointed:
        here = min(p.L, OFFLOADING) if p.activation_offloading else p.L
        return here * checkpoint(p)[0] + shared(p)
    kept, adapted, first = block(p), len(p.targets.intersection(QKV)), 0
    if not p.full:
        alone = p.int8 and (p.R == 4 or p.dropout or not adapted)  # no adapter shares int8's input
        first = kept["input_layernorm"] + p.d * (adapted * p.dropout + p.R * alone)
        if not p.targets.intersection(ATTENTION):
            first += kept["input_layernorm"] * (2 if p.gemma else 1) + kept["attention"] + kept["q_norm k_norm"]
    return sum(count * layer(p, window) for window, count in p.windows.items()) - p.n * first + shared(p)


def needed(p: Plan) -> tuple[float, float]:
    """The most that one block takes, in the forward pass and in the backward pass of its MLP, by the table; the README
    beside it explains its columns and its (f, d) and, with experts, (f, d, one)."""
    moe = p.a.num_experts
    copies, wide = (p.R * p.a.num_experts_per_tok, p.R - 2) if moe else (1, 0)
    sixteen = p.R == 2 and (p.kind != "lora" or not p.amp)
    precision = " fp32" if p.c == 4 else " 16" if sixteen else ""
    uncast = sixteen and p.kind == "lora" and not p.copies
    alike = "nf4" if uncast else p.kind  # bf16 adapters on 16 bits: nothing is cast in either
    kind = p.a.model_type if moe else alike + precision
    where = "down" if "down_proj" in p.targets else "mlp" if p.targets.intersection(MLP) else "attention"
    table = {(row["kind"], row["adapted"]): row for row in rows("architectures/needed.json")}
    row = next(table[kind, w] for w in (f"{where} dropout" * p.dropout, where, "any") if (kind, w) in table)

    def most(terms: list) -> float:
        return max(copies * (f * p.n * p.f + d * p.nd) + (sum(one) + wide) * p.nd for f, d, *one in terms)

    again = row["again"] if p.checkpointed and not p.experts_trained else []
    if p.gemma:  # the last norm of a block
        again = [*((f, d + 2) for f, d in again), (0, 20 + p.R)]
    forward = most(row["checkpointed" if p.checkpointed else "forward"])
    if moe and p.experts_trained:
        forward += p.merged if p.checkpointed else -copies * p.nd
    return forward, most([row["backward"] if moe else (row["backward"], p.R), *again])


def at_work(p: Plan) -> tuple[float, float]:
    """What one block needs for a moment, beside what is kept: in the forward pass, and in the backward pass, there in
    full fine-tuning with the gradient of an MLP weight, less its 16-bit copy.

    eager: or at the softmax. Forward: its input (of a 16-bit one also an fp32 copy) and its output; gpt_oss: scores and
    mask, the same with a sink, and that less its maximum. Backward: its output and two fp32 gradients, when the MLP's
    tensors are gone; gpt_oss: also when a checkpointed block comes to its softmax again.
    """
    forward, backward = needed(p)
    new_gradient = p.full * p.c * p.d * p.f
    backward += new_gradient
    if p.eager:
        kept, before = block(p), 0 if p.checkpointed else layer(p)
        softmax = (3 * p.R if p.oss else 8 if p.R == 4 else 10) * p.scores
        wide = (5 if p.oss else 4) * p.R if p.checkpointed else (34 if p.R == 4 else 21)
        forward = max(forward, softmax + wide * p.nd - before)
        there = kept["input_layernorm"] + kept["q_proj k_proj v_proj"] + kept["q_norm k_norm"] + 3 * p.c * p.q
        there = p.n * there + 3 * new_gradient + p.R * p.nd - layer(p)
        backward = max(backward, (3 * p.R if p.oss else 12) * p.scores + there)
        if p.oss and p.checkpointed:
            again = softmax + (6 + p.R * (8 + p.a.num_experts_per_tok)) * p.nd
            backward = max(backward, again - checkpoint(p)[1])
    return forward + (0 if p.checkpointed else p.masks), backward

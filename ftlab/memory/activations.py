"""What the forward pass leaves for the backward pass, and what one block needs for a moment in each. p: setup.Plan."""

from ftlab.memory.setup import Plan

ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj"))
QKV = ("q_proj", "k_proj", "v_proj")


# --- kept by a block --------------------------------------------------------------------------------------------------


def norm(p: Plan) -> int:
    """RMSNorm: the fp32 input (a copy of a 16-bit one) and one fp32 scale a row; its normed output if trained."""
    return p.n * (4 * p.a.hidden_size + 4 + (p.R * p.a.hidden_size if p.full else 0))


def inputs(p: Plan, readers: tuple[str, ...], fp32: bool, kept: bool = False) -> int:
    """What linear layers keep of their common input, for the gradient of the weights that are trained.

    Full: the input in c bytes; an fp32 input is cast by *each* reader, so q, k and v keep three copies. LoRA: a frozen
    weight needs no input, but each lora_A keeps its own copy in c bytes, because PEFT first casts to the adapter's
    fp32. NF4's adapters are bf16, so a 16-bit input is shared (`kept`: it is alive anyway). int8 keeps the input too.
    Dropout: a copy for each lora_A, and one byte of mask per number.
    """
    size = p.n * p.a.linears[readers[0]][0]
    shared = 0 if kept else p.c
    if p.full:
        return size * (p.c * len(readers) if fp32 and p.amp else shared)
    adapted = len(p.targets.intersection(readers))
    own_copies = p.dropout or (p.amp and (fp32 or not p.quantized))
    copies = adapted * p.c if own_copies else shared * bool(adapted)
    base = 4 if fp32 and p.int8 else 0
    return size * (copies + base + adapted * p.dropout)


def attention(p: Plan) -> int:
    """sdpa: q, k, v and the output in c bytes, and one fp32 per row and head. eager: also the T x T weights.

    The weights stand there in fp32 (softmax) and in c bytes (for the product with v), per head: 6 bytes * heads * T * T
    under autocast; keys and values are repeated to all heads. Padded sdpa repeats them too, and holds a mask per layer.
    """
    heads, T = p.a.num_attention_heads, p.recipe.max_length
    q, k = heads * p.a.head_dim, p.a.num_key_value_heads * p.a.head_dim
    keys = q if p.setup.attention == "eager" or p.setup.padded else k
    if p.setup.attention == "sdpa":
        mask = p.c * p.rows * T * T if p.setup.padded else 0
        return p.n * (p.c * (2 * q + 2 * keys) + 4 * heads) + mask
    weights = 4 + (p.c if p.amp else 0)
    output = p.c * q if (p.full or p.quantized or not p.amp) else 0  # lora_A keeps a copy of its own
    return p.n * (p.c * (q + 2 * keys) + weights * heads * T + output)


def qk_norm(p: Plan) -> int:
    """Qwen3's norms of q and k: fp32 copies, one scale per head, and the 16-bit normed values if trained."""
    if not p.a.qk_norm:
        return 0
    heads = p.a.num_attention_heads + p.a.num_key_value_heads
    return p.n * heads * ((4 + (p.w if p.full else 0)) * p.a.head_dim + 4)


def layer(p: Plan) -> int:
    """Everything one block keeps: two norms, four inputs, attention, SwiGLU's gate, silu(gate) and up, and A's outputs.

    SwiGLU keeps 3 w n f, and down_proj its input: 8 n f for LoRA, but 14 n f for NF4, whose layers answer in fp32.
    """
    wide = p.R == 4  # the norms answer in the dtype of the residual stream
    lora = 0 if p.full else p.c * p.n * p.recipe.r * len(p.targets)
    return (
        2 * norm(p)
        + inputs(p, QKV, fp32=wide)
        + inputs(p, ("o_proj",), fp32=False, kept=True)
        + inputs(p, ("gate_proj", "up_proj"), fp32=wide)
        + inputs(p, ("down_proj",), fp32=p.w == 4)
        + attention(p)
        + qk_norm(p)
        + 3 * p.w * p.n * p.a.intermediate_size
        + lora
    )


# --- kept by all of them ----------------------------------------------------------------------------------------------


def mask(p: Plan) -> int:
    """The T x T mask of a padded or eager batch, held while the blocks run; checkpoints keep it, as their argument."""
    size = p.rows * p.recipe.max_length**2
    return {"eager": p.R * size, "sdpa": size if p.setup.padded else 0}[p.setup.attention]


def shared(p: Plan) -> int:
    """Token ids and their mask (16 bytes a token), cosines and sines; a checkpoint also holds on to the T x T mask."""
    return 16 * p.n + 2 * p.R * p.recipe.max_length * p.a.head_dim + (mask(p) if p.checkpointed else 0)


def stored(p: Plan) -> int:
    """What a block keeps under checkpointing: its input, R * n * d.

    In int8 also the inputs of its linear layers: bitsandbytes' MatMul8bitLt holds them as attributes of its context,
    not through save_for_backward, and a checkpoint cannot let go of what it does not see.
    """
    hidden = p.R * p.n * p.a.hidden_size
    if not p.int8:
        return hidden
    return hidden + p.n * (2 * 4 * p.a.hidden_size + p.c * p.a.linears["o_proj"][0] + 4 * p.a.intermediate_size)


def recomputed(p: Plan) -> int:
    """What a checkpointed block has once it is computed again, beside what was stored of it.

    An fp32 residual stream is the first norm's own input, so it is stored already; and so are int8's inputs.
    """
    already = 4 * p.a.hidden_size if p.R == 4 else 0
    if p.int8:
        already += 8 * p.a.hidden_size + 4 * p.a.intermediate_size
    return layer(p) - p.n * already


def activations(p: Plan) -> int:
    """All blocks, with checkpointing only what they store.

    Without it and with LoRA the first block's first norm keeps nothing, int8 not its input and dropout not its masks:
    nothing before them is trained. Nor does its attention, if only the MLP has adapters.
    """
    layers = p.a.num_hidden_layers
    if p.checkpointed:
        return layers * stored(p) + shared(p)
    first = 0
    if not p.full:
        masks = len(p.targets.intersection(QKV)) if p.dropout else 0
        first = norm(p) + p.n * p.a.hidden_size * (masks + (4 if p.int8 else 0))
        if not ATTENTION & p.targets:
            first += norm(p) + attention(p) + qk_norm(p)
    return layers * layer(p) - first + shared(p)


def casts(p: Plan, layers: int) -> int:
    """16-bit copies of the fp32 weights of this many blocks, which autocast makes and the graph keeps.

    A copy of a trained weight is cached until the forward pass ends, so checkpointing does not avoid it there. FSDP
    gathers the weights in 16 bits already.
    """
    if not p.amp or p.shards > 1:
        return 0
    share = layers / p.a.num_hidden_layers
    adapters = 2 * p.adapter_params * share if p.adapter == 4 else 0
    base = 2 * p.a.linear_params * share if p.held == 4 and not p.quantized else 0
    return round(base + adapters)


# --- needed by one block for a moment ---------------------------------------------------------------------------------


def scores(p: Plan) -> int:
    """Numbers in the T x T attention weights of a block, all heads."""
    return p.rows * p.a.num_attention_heads * p.recipe.max_length**2


def block_forward(p: Plan) -> int:
    """What one block needs for a moment in the forward pass, beside what it keeps.

    The moment is down_proj with all else kept, or up_proj when a checkpoint keeps nothing. LoRA: the product of SwiGLU
    (2 n f) and its fp32 form for lora_A (4 n f; 4 more after dropout). NF4 and int8: fp32 results, their copies and the
    adapter's. And results, scaled adapter results, sums, the residual: some n * d numbers. eager: at the softmax, its
    input (with a 16-bit one also an fp32 copy) and its output, when the MLP has not begun yet.
    """
    nf, nd = p.n * p.a.intermediate_size, p.n * p.a.hidden_size
    down, mlp = "down_proj" in p.targets, bool(p.targets - ATTENTION)
    if p.checkpointed and p.full:
        most = (6 if p.amp else 12) * nf + 8 * nd
    elif p.checkpointed and not p.amp:
        most = (16 if mlp else 12) * nf + 8 * nd
    elif p.checkpointed and p.quantized:
        most = 10 * nf + 4 * nd if p.int8 else (14 if mlp else 12) * nf + 8 * nd
    elif p.checkpointed:
        most = (12 * nf + 6 * nd if p.dropout and down else 8 * nf + 8 * nd) if mlp else 6 * nf + 4 * nd
    elif p.full:
        most = 10 * nd
    elif not p.amp:
        most = 16 * nd if down else 4 * nf + 12 * nd
    elif p.quantized:
        most = nf + 12 * nd if p.int8 else (8 * nf + 12 * nd if p.dropout else 4 * nf + 18 * nd)
    elif down:
        most = 10 * nf + 10 * nd if p.dropout else 6 * nf + 14 * nd
    else:
        most = max(16 * nd, 4 * nf + 2 * nd)
    if p.setup.attention == "eager":
        softmax = (8 if p.R == 4 else 10) * scores(p)
        kept = 0 if p.checkpointed else layer(p)
        extra = (16 if p.R == 4 else 8) if p.checkpointed else (34 if p.R == 4 else 21)
        most = max(most, softmax + extra * nd - kept)
    return most + (0 if p.checkpointed else mask(p))


def block_backward(p: Plan) -> int:
    """The most that the backward pass of one block adds to what is kept: at down_proj, gradients of n * f numbers.

    Full: two of c bytes, less the product that is let go, and the weight's gradient. LoRA: one of c bytes through A and
    its fp32 form, less A's copy. NF4 and int8: the base's, the adapter's and their sum, all fp32. Without an adapter on
    down_proj its input is not kept: three of w bytes. And the gradient of the residual stream.
    With checkpointing LoRA needs more when the block is computed again, up to down_proj's A. eager: at the softmax, its
    output and two gradients in fp32, 12 bytes a score, when the MLP's tensors are gone (and its gradients there).
    """
    d, f = p.a.hidden_size, p.a.intermediate_size
    nf, nd, down = p.n * f, p.n * d, "down_proj" in p.targets
    new_gradient = (2 if p.amp else 4) * d * f if p.full else 0  # of an MLP weight, less its 16-bit copy
    if not down:
        swiglu = 3 * p.w * nf
    elif p.full or not p.amp:
        swiglu = 2 * p.c * nf
    else:
        swiglu = (10 - p.dropout if p.quantized else 4) * nf
    most = p.R * nd + swiglu + new_gradient
    if p.checkpointed and not p.full and p.amp:
        if not p.quantized:
            again = (10 if p.dropout else 6) if down else 4 * bool(p.targets - ATTENTION)
            most = max(most, again * nf + 10 * nd if again else 0)
        elif p.dropout and down:
            most = max(most, 8 * nf + (18 if p.int8 else 14) * nd)
    if p.setup.attention == "eager":
        q = p.a.linears["o_proj"][0]
        kept = norm(p) + inputs(p, QKV, fp32=p.R == 4) + 3 * p.c * p.n * q + qk_norm(p) + 3 * new_gradient
        most = max(most, 12 * scores(p) + kept + p.R * nd - layer(p))
    return most

"""What the loss adds at its highest moment in the forward and in the backward pass, by method. p: settings.Plan.

A "table" has one number for each token and each word of the vocabulary: V times as many numbers as there are tokens,
most of what a short recipe needs. 16-bit logits leave the model as fp32 (accelerate's convert_outputs_to_fp32).
"""

from ftlab.memory.settings import Plan

CHUNK = 256  # tokens per chunk of TRL's chunked loss
ENTROPY_CHUNK = 128  # and of its entropy


def head_cast(p: Plan) -> int:
    """The 16-bit copy of an fp32 head, made by autocast."""
    return 2 * p.a.head_params if p.amp and p.R == 4 else 0


def loss_forward(p: Plan) -> int:
    """The most that the loss adds in the forward pass.

    chunked_nll: a reordered copy of the hidden states, and for each chunk of 256 tokens either the head's copies (a
    16-bit head is first cast to fp32 and then back, 6 V d) with its logits, or the logits in c bytes with three fp32
    tables (log-softmax, exp, product: (c + 12) * 256 V). nll: logits, their fp32 copies and TRL's entropy: 12 bytes
    * n * V. Liger: a gradient of the hidden states and of a trained head, made at once, and two chunks of logits: of
    about n * d logits each, their rows a power of two.
    """
    V, d, cast = p.a.vocab_size, p.a.hidden_size, head_cast(p)
    tokens = p.n - p.rows  # that predict another
    if p.method == "sft" and p.loss == "chunked_nll":
        chunk = min(CHUNK, tokens)
        return p.R * tokens * d + max(_head_copies(p) + p.c * chunk * V, (p.c + 12) * chunk * V)
    if p.method == "sft" and p.loss == "liger":
        rows = min(p.n, 1 << (-(-p.n // -(-V // d)) - 1).bit_length())
        head = (p.R * p.a.head_params + cast) if p.full else 0  # gradient, and a second cast: autocast keeps the first
        return p.R * p.n * d + head + cast + 2 * p.c * rows * V + p.c * rows * d
    if p.method == "sft":
        copy = 4 * tokens * V if p.rows > 1 else 0
        most = max(8 * p.n * V + copy + _entropy_chunk(p), (10 if p.amp else 8) * p.n * V)
    else:
        most = _logits_of_others(p)
    return cast + (p.c * p.n * d if cast and p.full else 0) + most


def loss_backward(p: Plan) -> int:
    """The most that the loss adds in the backward pass: the final hidden state is gone, its gradient grows.

    chunked_nll: the chunk is computed once more, with the head's 16-bit copy kept; a trained head adds its gradient so
    far (4 V d), or three of them while the next chunk's is added. nll: log-softmax, its gradient and the logits': 12 n
    V. The other methods, in TRL's selective_log_softmax: the logits, the gradient that came through logsumexp, and the
    one through gather with the zeros that it is added to, 16 n V; orpo also keeps log-softmax of the chosen half, and
    ppo, which divides a slice of the logits by the temperature in place, copies their gradient for it.
    """
    V, d, cast = p.a.vocab_size, p.a.hidden_size, 2 * p.a.head_params if p.amp else 0
    tokens = p.n - p.rows
    if p.method != "sft" or p.loss == "nll":
        kept = (cast + p.c * p.n * d) if p.full and p.amp else head_cast(p)
        if p.method == "sft":
            return 12 * p.n * V + kept
        return 4 * p.n * V + {"orpo": 14, "ppo": 16}.get(p.method, 12) * tokens * V + kept
    if p.loss == "liger":
        return p.R * p.n * d + (p.R * p.a.head_params if p.full else 0)
    chunk, several = min(CHUNK, tokens), tokens > CHUNK
    grown = p.R * tokens * d * (2 if several else 1)
    tables = cast + (p.c + 12) * chunk * V
    if p.full:
        added = (12 if several else 6) * p.a.head_params
        return grown + max((4 * p.a.head_params if several else 0) + tables, added)
    return grown + max(_head_copies(p) + p.c * chunk * V, tables)


def _logits_of_others(p: Plan) -> int:
    """dpo, kto: logits of policy and reference (8 n V) and a copy of the policy's for its entropy; kto then copies both
    halves (desirable rows, and the others), and one of them a second time. orpo: the logits, a copy and the log-softmax
    of the chosen half. ppo: the logits. Every token but the first is taken to belong to the answer.
    """
    n, tokens = p.n * p.a.vocab_size, (p.n - p.rows) * p.a.vocab_size
    entropy = 8 * n + 4 * tokens + _entropy_chunk(p)
    most = {"dpo": entropy, "kto": max(entropy, 8 * n + 6 * tokens), "orpo": 4 * n + 4 * tokens, "ppo": 4 * n}
    return most[p.method]


def _entropy_chunk(p: Plan) -> int:
    """log-softmax, exp and product of 128 tokens."""
    return 3 * 4 * min(ENTROPY_CHUNK, p.n) * p.a.vocab_size


def _head_copies(p: Plan) -> int:
    return (6 if p.R == 2 else 2) * p.a.head_params if p.amp else 0

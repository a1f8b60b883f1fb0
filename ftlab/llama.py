"""A Llama with LoRA, computed in fewer and larger operations on a CPU: log-probs to train on,
answers to read.

The numbers are those of transformers and PEFT up to the order of rounding
(tests/parity/test_cpu.py, test_decode.py). Nothing here asks whether a model is a plain Llama with
plain LoRA: `ftlab.allowed` does.

    PackedLlama        hidden states of several rows in one sequence, what they share computed once
    ChunkedLogProb     log-probs at the labels alone; the gradient is taken with the logits
    Decoder            answers with the adapters merged in; one cache of the full size

Shapes: R rows of T tokens; N tokens of the packed sequence; K labels; B answers; C width; V
vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu

ROUND_TO = 8  # sequence lengths: few different shapes for oneDNN to compile, and little padding
CHUNK_SIZE = 512  # labels whose logits are held at once, in the dtype of the products
SOFTMAX_SIZE = (
    8  # those of them that are fp32 at once: little enough to stay in the processor's cache
)


class Packed(NamedTuple):
    """Rows of token ids as one sequence that holds their shared beginnings once."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    indices: list[list[int]]  # of each row: where its tokens stand in the sequence


class PaddedRows(NamedTuple):
    """The rows of a packed sequence side by side, as attention needs them."""

    index: Tensor  # (R, T): of each row's tokens, the place in the packed sequence; 0 at padding
    slot: Tensor  # (N,): of each packed token, a place in the flattened (R * T) table


class PositionScores(NamedTuple):
    """What a model says of the next token; 0 where it was not asked for."""

    logps: Tensor  # nats; has a gradient
    entropy: Tensor  # nats, of the whole distribution; no gradient
    is_argmax: Tensor  # 1.0 where the token is the likeliest; no gradient


def pack_with_shared_prefix(
    rows: Sequence[Sequence[int]], groups: Sequence[Hashable] | None = None
) -> Packed:
    """The rows packed: first what all of them begin with, then by group what its rows begin with,
    then the rests.

    Rows with equal `groups` form a group (a DPO pair, the answers to one prompt); without it each
    row is its own. N is a multiple of ROUND_TO. Example: rows [1, 2, 3] and [1, 2, 4] -> ids [1, 2,
    3, 4, 0, 0, 0, 0], positions [0, 1, 2, 2, 0, ...], indices [[0, 1, 2], [0, 1, 3]].
    """
    ids, positions = [], []
    indices = [[] for _ in rows]

    def add_shared(members: Sequence[int], begin: int) -> int:
        """Appends what the rows `members` share from token `begin` on. Returns the position where
        it ends.
        """
        first = min(rows[i] for i in members)
        last = max(
            rows[i] for i in members
        )  # what the first and the last in order share, all share
        end = shared_length(first, last)
        positions.extend(range(begin, end))
        for i in members:
            indices[i] += range(len(ids), len(positions))
        ids.extend(first[begin:end])
        return end

    members_of = defaultdict(list)
    for i in range(len(rows)):
        members_of[groups[i] if groups else i].append(i)
    prefix = add_shared(range(len(rows)), 0)
    for members in members_of.values():
        group_prefix = add_shared(members, prefix)
        for i in members:
            add_shared([i], group_prefix)
    padding = [0] * (-len(ids) % ROUND_TO)
    return Packed(torch.tensor(ids + padding), torch.tensor(positions + padding), indices)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def unpack(indices: Sequence[Sequence[int]], n: int) -> PaddedRows:
    """The table (R, T) of rows of places among n packed tokens; and where in it each token is to be
    found.
    """
    rows = [torch.tensor(row) for row in indices]
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (R, T)
    slot = torch.zeros(n, dtype=torch.long)
    for i, row in enumerate(indices):
        slot[row] = torch.arange(len(row)) + i * index.shape[1]  # of a shared token: any row's
    return PaddedRows(index, slot)


def per_token_logps(
    llama: "PackedLlama",
    input_ids: Tensor,
    attention_mask: Tensor,
    targets: Tensor,
    label_mask: Tensor,
    groups: Sequence[Hashable] | None = None,
) -> PositionScores:
    """log p(targets[r, t] | input_ids[r, :t + 1]) where label_mask is True, else 0. All are (R, T).

    Tokens are read where attention_mask is True; a label stands only where its token is read.
    groups: see `pack_with_shared_prefix`.
    """
    pairs = zip(input_ids, attention_mask, strict=True)
    packed = pack_with_shared_prefix([ids[read].tolist() for ids, read in pairs], groups)
    places = torch.tensor([place for row in packed.indices for place in row])  # (tokens read,)
    packed_index = torch.zeros_like(input_ids).masked_scatter(attention_mask, places)  # (R, T)
    padded = unpack(packed.indices, len(packed.input_ids))
    hidden = llama.forward(
        packed.input_ids,
        packed.position_ids,
        attentions=[partial(llama.attention, padded)] * len(llama.layers),
        keep=packed_index[label_mask],
    )  # (K, C)
    scores = ChunkedLogProb.apply(hidden, llama.lm_head, targets[label_mask])  # 3 x (K,)
    # (K,) -> (R, T)
    table = [x.new_zeros(label_mask.shape).masked_scatter(label_mask, x) for x in scores]
    return PositionScores(*table)


def linear_stacks(layer: nn.Module) -> list[tuple[nn.Module, ...]]:
    """The seven linear layers of a Llama's block; those with the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ]


def base_model_of(model: nn.Module) -> nn.Module:
    """The LlamaForCausalLM in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Layer(NamedTuple):
    """One block: its norms are functions (N, C) fp32 -> (N, C) in the dtype of the products."""

    input_layernorm: Callable[[Tensor], Tensor]
    qkv_proj: "StackedLinear"
    o_proj: "StackedLinear"
    post_attention_layernorm: Callable[[Tensor], Tensor]
    gate_up_proj: "StackedLinear"
    down_proj: "StackedLinear"


class PackedLlama:
    """The forward pass of a Llama over a packed sequence, with PEFT's own lora_A and lora_B read at
    each call.

    The frozen weights are kept in `dtype`: as views where that is theirs and a layer stands alone,
    else as copies (`copies` pairs each with its parameters). The residual stream stays in fp32, as
    under autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, merged: bool = False) -> None:
        base = base_model_of(model)
        attention = base.model.layers[0].self_attn
        self.decoder, self.dtype = base.model, dtype
        self.num_heads = base.config.num_attention_heads
        self.num_key_value_heads = base.config.num_key_value_heads
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.lm_head = base.lm_head.weight.detach().to(dtype)  # (V, C)
        self.norm = self._norm(base.model.norm)
        self.layers = []
        for layer in base.model.layers:
            qkv, o, gate_up, down = (
                StackedLinear(stack, dtype, merged) for stack in linear_stacks(layer)
            )
            norm, mlp_norm = map(
                self._norm, (layer.input_layernorm, layer.post_attention_layernorm)
            )
            self.layers.append(Layer(norm, qkv, o, mlp_norm, gate_up, down))
        self.head_parameter = base.lm_head.weight

    def _norm(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        weight, eps, dtype = norm.weight.detach().float(), norm.variance_epsilon, self.dtype
        return lambda x: rms_norm(x, weight.shape, weight, eps).to(dtype)

    def copies(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """Each kept weight (out, in) that does not share memory with the parameters whose rows it
        holds; these.
        """
        linears = [
            part for layer in self.layers for part in layer if isinstance(part, StackedLinear)
        ]
        kept = [(linear.weight, linear.parameters) for linear in linears]
        for weight, parameters in [*kept, (self.lm_head, [self.head_parameter])]:
            if weight.data_ptr() != parameters[0].data_ptr():
                yield weight, parameters

    def rotary_emb(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (length, 1, head_dim / 2) each, of the first positions."""
        fp32 = self.decoder.norm.weight.float()  # the module reads only its dtype and device
        cos, sin = self.decoder.rotary_emb(
            fp32, torch.arange(length)[None]
        )  # (1, length, head_dim)
        half = self.head_dim // 2  # the second half repeats the first
        return cos[0, :, None, :half], sin[0, :, None, :half]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attentions: Sequence[Callable[[Tensor, Tensor, Tensor], Tensor]],
        keep: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The last norm's output (K, C) at the places keep (K,), all by default, of tokens (N,) at
        positions (N,).

        attentions, one a layer: q (N, heads, head_dim), k and v (N, kv_heads, head_dim) -> (N,
        heads * head_dim).
        """
        cos, sin = rotary or self.rotary_emb(int(position_ids.max()) + 1)
        cos, sin = cos[position_ids], sin[position_ids]  # (N, 1, head_dim / 2)
        rotated = self.num_heads + self.num_key_value_heads
        with torch.autocast("cpu", enabled=False):  # every dtype below is chosen by hand
            x = self.decoder.embed_tokens(input_ids).float()  # (N, C)
            for layer, attention in zip(self.layers, attentions, strict=True):
                qkv = layer.qkv_proj(layer.input_layernorm(x))
                qkv = qkv.view(len(x), -1, self.head_dim)  # (N, heads + 2 kv_heads, head_dim)
                qk, v = qkv.split([rotated, self.num_key_value_heads], 1)
                a, b = qk.float().chunk(
                    2, -1
                )  # the pair (x_i, x_{i + head_dim/2}) is turned, in fp32
                qk = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)  # stays fp32; v does not
                q, k = qk.split([self.num_heads, self.num_key_value_heads], 1)
                attn_output = attention(q, k, v).to(self.dtype)  # (N, heads * head_dim)
                if keep is not None and layer is self.layers[-1]:  # nobody asks for the others
                    x = x.index_select(0, keep)  # (N, C) -> (K, C)
                    attn_output = attn_output.index_select(0, keep)
                x = x + layer.o_proj(attn_output)
                gate_up = layer.gate_up_proj(layer.post_attention_layernorm(x))
                gate, up = gate_up.chunk(2, -1)
                x = x + layer.down_proj(silu(gate) * up)
            return self.norm(x)

    def attention(self, rows: PaddedRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each row, (N, heads, head_dim) -> (N, heads * head_dim), in fp32.

        bf16 is slower here: scores and softmax of so short rows are bound by memory, not by the
        products.
        """
        shape, index = rows.index.shape, rows.index.flatten()
        q, k, v = (
            x.index_select(0, index).unflatten(0, shape).transpose(1, 2)  # (R, heads, T, head_dim)
            for x in (q, k, v.float())
        )
        output = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True
        )
        output = output.transpose(1, 2).flatten(0, 1).flatten(1)  # (R * T, heads * head_dim)
        return output.index_select(0, rows.slot)  # (N, heads * head_dim)


class StackedLinear:
    """Linear layers with the same input as one: weights stacked, lora_A stacked, lora_B along a
    diagonal.
    """

    def __init__(
        self, projections: tuple[nn.Module, ...], dtype: torch.dtype, merged: bool
    ) -> None:
        self.projections = projections
        self.parameters = [getattr(p, "base_layer", p).weight for p in projections]
        weights = [weight.detach().to(dtype) for weight in self.parameters]
        if merged:
            weights = [
                w + delta_weight(p, dtype) for w, p in zip(weights, projections, strict=True)
            ]
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # (out, in)
        self.adapted = [p for p in projections if hasattr(p, "lora_A") and not merged]

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + scaling (x A^T) B^T, (N, in) -> (N, out). fp32 masters, products in the weight's
        dtype.
        """
        if not self.adapted or self.adapted[0].disable_adapters:
            return x @ self.weight.T
        (name,) = self.adapted[0].active_adapters
        (scaling,) = self.adapted[0].scaling.values()
        lora_A = torch.cat([p.lora_A[name].weight for p in self.adapted])  # (r of all, in)
        blocks = []
        for p in self.projections:
            adapted = any(p is other for other in self.adapted)
            blocks.append(p.lora_B[name].weight if adapted else x.new_empty(p.out_features, 0))
        lora_B = torch.block_diag(*blocks)  # (out, r of all)
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return torch.addmm(x @ self.weight.T, x @ lora_A.T, lora_B.T, alpha=scaling)


def delta_weight(projection: nn.Module, dtype: torch.dtype) -> Tensor | float:
    """The sum of scaling * B A, (out, in), over a layer's active adapters; 0.0 without, or if it is
    merged already.
    """
    if not hasattr(projection, "lora_A") or projection.merged or projection.disable_adapters:
        return 0.0
    names = [name for name in projection.active_adapters if name in projection.lora_A]
    return sum(projection.get_delta_weight(name).detach().to(dtype) for name in names)


class ChunkedLogProb(torch.autograd.Function):
    """`PositionScores` (K,) of the next tokens targets (K,), after hidden states x (K, C); a frozen
    weight (V, C).

    d logp_target / dx = W_target - sum_v p_v W_v is taken in the forward pass, while the logits are
    there.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        logps, entropy, is_argmax, grad_hidden = [], [], [], []
        wants_gradient = ctx.needs_input_grad[0]
        chunks = zip(x.split(CHUNK_SIZE), targets[:, None].split(CHUNK_SIZE), strict=True)
        for hidden, chunk_targets in chunks:
            chunk_logits = hidden @ weight.T  # (chunk, V)
            parts = zip(
                chunk_logits.split(SOFTMAX_SIZE), chunk_targets.split(SOFTMAX_SIZE), strict=True
            )
            for logits, target in parts:
                log_p = logits.float().log_softmax(-1)
                p = log_p.exp()
                logps.append(log_p.gather(1, target)[:, 0])
                entropy.append(-torch.linalg.vecdot(p, log_p))
                is_argmax.append((log_p.argmax(-1) == target[:, 0]).float())
                if wants_gradient:
                    minus_one = p.new_full(target.shape, -1.0)
                    logits.copy_(p.scatter_add_(1, target, minus_one))  # p - 1[target], in place
            if wants_gradient:
                grad_hidden.append(chunk_logits @ weight)  # (chunk, C)
        ctx.save_for_backward(*([torch.cat(grad_hidden).neg_()] if grad_hidden else []))
        logps, entropy, is_argmax = (torch.cat(part) for part in (logps, entropy, is_argmax))
        ctx.mark_non_differentiable(entropy, is_argmax)
        return logps, entropy, is_argmax

    @staticmethod
    def backward(ctx, grad_logps, *_):
        (grad_hidden,) = ctx.saved_tensors
        return (grad_logps[:, None] * grad_hidden).to(grad_hidden.dtype), None, None


class Decoder(PackedLlama):
    """A copy of a Llama's weights, active adapters merged in, that only answers."""

    def __init__(self, model: nn.Module) -> None:
        half = model.lm_head.weight.dtype == torch.bfloat16
        super().__init__(model, product_dtype(half), merged=True)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_token_id: int | Sequence[int],
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        keep_eos: bool = False,
    ) -> list[list[int]]:
        """The next tokens of each prompt (ids) until an eos_token_id, which stays with keep_eos.

        At temperature 0 the likeliest, above it draws from softmax(logits / temperature), by
        `generator` if given.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) + max_new_tokens
        rotary = self.rotary_emb(longest)
        cache = self._cache(len(prompts), longest)
        hidden = self.prefill(prompts, rotary, cache)  # (B, C)
        rows = torch.arange(len(prompts))
        unfinished = torch.ones(len(prompts), dtype=torch.bool)
        eos = torch.tensor(eos_token_id)
        answers = torch.full((len(prompts), max_new_tokens), -1)
        for step in range(max_new_tokens):
            token = sample(hidden @ self.lm_head.T, temperature, generator)  # (B,)
            goes_on = unfinished & ~torch.isin(token, eos)
            written = unfinished if keep_eos else goes_on
            unfinished = goes_on
            answers[rows[written], step] = token[written]
            if not unfinished.any() or step + 1 == max_new_tokens:
                break
            if 2 * unfinished.sum() <= len(
                unfinished
            ):  # half have ended: go on with the others alone
                rows, token, lengths = rows[unfinished], token[unfinished], lengths[unfinished]
                cache = cache[:, :, unfinished]
                unfinished = unfinished[unfinished]
            hidden = self.decode_step(token, lengths + step, rotary, cache)
        return [[t for t in row if t >= 0] for row in answers.tolist()]

    def _cache(self, batch: int, length: int) -> Tensor:
        """Keys and values, (layers, 2, B, kv_heads, length, head_dim). Zeros: 0 x NaN, where
        masked, is NaN.
        """
        shape = (len(self.layers), 2, batch, self.num_key_value_heads, length, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype)

    def prefill(self, prompts: Sequence[Sequence[int]], rotary: tuple, cache: Tensor) -> Tensor:
        """Fills the cache with the prompts' keys and values; the hidden states (B, C) at each
        prompt's last token.
        """
        different = list(dict.fromkeys(map(tuple, prompts)))  # equal ones once
        row_of = {prompt: i for i, prompt in enumerate(different)}
        row = torch.tensor([row_of[tuple(prompt)] for prompt in prompts])  # (B,)
        packed = pack_with_shared_prefix(different)
        padded = unpack(packed.indices, len(packed.input_ids))
        length = padded.index.shape[1]

        def attention(cached: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys_values = torch.stack([k.to(v.dtype), v])[
                :, padded.index[row]
            ]  # (2, B, T, kv_heads, head_dim)
            cached[:, :, :, :length] = keys_values.transpose(2, 3)
            return self.attention(padded, q, k, v)

        last = torch.tensor([indices[-1] for indices in packed.indices])[row]  # (B,)
        attentions = [partial(attention, cached) for cached in cache]
        return self.forward(packed.input_ids, packed.position_ids, attentions, last, rotary)

    def decode_step(self, token: Tensor, position: Tensor, rotary: tuple, cache: Tensor) -> Tensor:
        """The hidden states (B, C) at one more token a row (B,), at its position (B,)."""
        rows = torch.arange(len(token))
        seen = int(position.max()) + 1
        visible = torch.arange(seen) <= position[:, None]  # (B, seen)
        mask = torch.where(visible, 0.0, -torch.inf)[:, None, None].to(
            cache.dtype
        )  # (B, 1, 1, seen)

        def attention(cached: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cached  # (B, kv_heads, length, head_dim) each
            keys[rows, :, position], values[rows, :, position] = k.to(v.dtype), v
            q = q.to(v.dtype).view(len(token), self.num_key_value_heads, -1, self.head_dim)
            scores = q @ keys[:, :, :seen].mT * self.scaling + mask  # (B, kv_heads, group, seen)
            return (scores.softmax(-1) @ values[:, :, :seen]).flatten(1)  # (B, heads * head_dim)

        attentions = [partial(attention, cached) for cached in cache]
        return self.forward(token, position, attentions, rotary=rotary)


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token of each row (B,) of logits (B, V): the likeliest at temperature 0, else where a
    draw falls.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand(len(cumulative), 1, generator=generator) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
    return token.clamp(max=cumulative.shape[1] - 1)


def product_dtype(bf16: bool) -> torch.dtype:
    """bf16 if it is asked for and this CPU multiplies it natively, else fp32: emulated bf16 is
    slower than fp32.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if bf16 and native else torch.float32


def sft_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The next token at each position and whether it counts, (R, T) each; transformers marks what
    does not by -100.
    """
    targets = pad(labels[:, 1:], (0, 1), value=-100)
    return targets, targets != -100

"""Answers of a Llama on a CPU in less time than `model.generate`: the same tokens, fewer and larger operations.

Used where `covers(model)`: greedy by `ftlab.pipeline.evaluate.generate`, sampled by the methods of
`ftlab.pipeline.align` that learn from their own answers. What is saved, and where:

    padding                 prompts lie one after another in one sequence; attention goes row by row
    the common beginning    of all prompts (the system message): computed once a batch
    the head                49,152 logits are computed for the last position of each prompt only
    small operations        q, k, v are one product, gate and up are one; adapters are added to copies of the weights
    growing caches          keys and values are written into tensors that have their full size from the start
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def covers(model: "PreTrainedModel") -> bool:
    """Whether `Decoder` can stand in for model.generate: a plain Llama on a CPU, unquantized, LoRA adapters or none."""
    config = model.config
    return (
        config.model_type == "llama"
        and model.device.type == "cpu"
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias)
        and getattr(config, "quantization_config", None) is None
        and all(type(_base(p)) is nn.Linear and not getattr(p, "lora_variant", None) for p in _projections(model))
    )


class Decoder:
    """A copy of a Llama's weights, active adapters merged in, that only answers; in the dtype of the model."""

    def __init__(self, model: "PreTrainedModel") -> None:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        trunk, config = base.model, base.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.embed, self.rotary_emb, self.norm, self.head = (
            trunk.embed_tokens,
            trunk.rotary_emb,
            trunk.norm,
            base.lm_head,
        )
        self.layers = [
            (
                layer.input_layernorm,
                _stacked(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                _stacked(layer.self_attn.o_proj),
                layer.post_attention_layernorm,
                _stacked(layer.mlp.gate_proj, layer.mlp.up_proj),
                _stacked(layer.mlp.down_proj),
            )
            for layer in trunk.layers
        ]
        self.scaling, self.head_dim = trunk.layers[0].self_attn.scaling, trunk.layers[0].self_attn.head_dim

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """The likeliest next tokens of each prompt (token ids), one after another, until one of `stop` (left out)."""
        rows = len(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) + max_new_tokens
        positions = torch.arange(longest)[None]
        cos, sin = (half[0, :, None, : self.head_dim // 2] for half in self.rotary_emb(self.norm.weight, positions))
        shape = (len(self.layers), 2, rows, self.kv_heads, longest, self.head_dim)
        cache = torch.zeros(shape, dtype=self.norm.weight.dtype)  # not empty: 0 x NaN, at a hidden position, is NaN
        token = self.choose(self._read(prompts, cos, sin, cache))  # (B,)
        stop, running, answers = torch.tensor(stop), torch.ones(rows, dtype=torch.bool), []
        for step in range(max_new_tokens):
            running &= ~torch.isin(token, stop)
            answers.append(torch.where(running, token, -1))
            if not running.any() or step + 1 == max_new_tokens:
                break
            token = self.choose(self._next(token, lengths + step, cos, sin, cache))
        return [[t for t in row if t >= 0] for row in torch.stack(answers, 1).tolist()]

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, (B,), from its logits (B, V): the likeliest one."""
        return logits.argmax(-1)

    def _read(self, prompts: Sequence[Sequence[int]], cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:
        """Fills the cache with the prompts' keys and values; the logits (B, V) after the last token of each prompt."""
        shared = common_prefix([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else 0
        ids, positions, spans = list(prompts[0][:shared]), list(range(shared)), []
        for prompt in prompts:
            spans.append((len(ids), len(ids) + len(prompt) - shared))
            ids += prompt[shared:]
            positions += range(shared, len(prompt))
        x, cos, sin = self.embed(torch.tensor(ids)), cos[positions], sin[positions]  # x: (N, C)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = self._qkv(x, layer, cos, sin)  # (N, heads or kv_heads, head_dim)
            mixed = torch.empty_like(q)
            if shared:
                mixed[:shared] = self._attend(q[:shared], k[:shared], v[:shared], 0)
            for row, (begin, end) in enumerate(spans):
                seen = shared + end - begin
                for cached, new in ((keys[row], k), (values[row], v)):  # (kv_heads, longest, head_dim)
                    cached[:, :shared] = new[:shared].transpose(0, 1)
                    cached[:, shared:seen] = new[begin:end].transpose(0, 1)
                mixed[begin:end] = self._attend(
                    q[begin:end], keys[row, :, :seen].transpose(0, 1), values[row, :, :seen].transpose(0, 1), shared
                )
            x = self._rest(x, mixed, layer)
        return self.head(self.norm(x[[end - 1 for _, end in spans]]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
        """Causal attention of one row: q (own, heads, head_dim), k and v (before + own, kv_heads, head_dim)."""
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + before)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, ~future, scale=self.scaling, enable_gqa=True)
        return out[0].transpose(0, 1)

    def _next(self, token: Tensor, position: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:
        """The logits (B, V) after one more token a row, at its position (B,)."""
        row, seen = torch.arange(len(token)), int(position.max()) + 1
        mask = torch.where(torch.arange(seen) <= position[:, None], 0.0, -torch.inf)[:, None, None].to(cache.dtype)
        x, cos, sin = self.embed(token), cos[position], sin[position]  # x: (B, C)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = self._qkv(x, layer, cos, sin)
            keys[row, :, position], values[row, :, position] = k, v
            grouped = q.view(len(token), self.kv_heads, -1, self.head_dim)  # the queries that share a key
            scores = grouped @ keys[:, :, :seen].mT * self.scaling + mask  # (B, kv_heads, group, seen)
            mixed = scores.softmax(-1) @ values[:, :, :seen]
            x = self._rest(x, mixed, layer)
        return self.head(self.norm(x))

    def _qkv(self, x: Tensor, layer: tuple, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm, qkv, *_ = layer
        heads = (norm(x) @ qkv).view(len(x), -1, self.head_dim)
        q_k, v = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        a, b = q_k.chunk(2, -1)
        q_k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return q_k[:, : self.heads], q_k[:, self.heads :], v

    def _rest(self, x: Tensor, mixed: Tensor, layer: tuple) -> Tensor:
        """What follows attention in a layer: the output product and the MLP, each added to the residual stream."""
        *_, out, norm, gate_up, down = layer
        x = x + mixed.reshape(len(x), -1) @ out
        gate, up = (norm(x) @ gate_up).chunk(2, -1)
        return x + (nn.functional.silu(gate) * up) @ down


class Sampler(Decoder):
    """Draws each token from softmax(scores), scores = logits / temperature (B, V), and may hand them to `keep`.

    From the same state of torch's generator it draws the tokens that model.generate draws for the same rows.
    """

    def __init__(self, model: "PreTrainedModel", temperature: float, keep: Callable[[Tensor], None] | None) -> None:
        super().__init__(model)
        self.temperature, self.keep = temperature, keep

    def choose(self, logits: Tensor) -> Tensor:
        scores = logits.float() / self.temperature
        if self.keep:
            self.keep(scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]


@contextlib.contextmanager
def sampling(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """While open, model.generate, called as TRL's ppo, grpo and rloo call it, answers through `Sampler`.

    They sample from the whole vocabulary (no top_k, no top_p) until the end of turn. Does nothing where not
    `covers(model)`.
    """

    def generate(input_ids, attention_mask, generation_config, return_dict_in_generate=False, output_scores=False):
        scores, length = [], generation_config.max_new_tokens
        sampler = Sampler(model, generation_config.temperature, scores.append if output_scores else None)
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        answers = sampler.answer(prompts, length, [tokenizer.eos_token_id])
        steps = min(length, max(map(len, answers)) + 1)  # of the answer that was the last to end
        new = input_ids.new_full((len(prompts), steps), tokenizer.pad_token_id)
        for row, answer in zip(new, answers, strict=True):
            ended = torch.tensor([*answer, tokenizer.eos_token_id])[: len(row)]
            row[: len(ended)] = ended
        sequences = torch.cat([input_ids, new], 1)
        return SimpleNamespace(sequences=sequences, scores=scores) if return_dict_in_generate else sequences

    if covers(model):
        model.generate = generate
    try:
        yield
    finally:
        vars(model).pop("generate", None)


def _projections(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith("_proj")]


def _base(projection: nn.Module) -> nn.Module:
    return getattr(projection, "base_layer", projection)


def _stacked(*projections: nn.Module) -> Tensor:
    """(in, out): the weights of layers with the same input side by side, each with its active adapters added."""
    return torch.cat([_merged(p) for p in projections]).T


def _merged(projection: nn.Module) -> Tensor:
    weight = _base(projection).weight.detach()
    if hasattr(projection, "base_layer") and not (projection.merged or projection.disable_adapters):
        for name in projection.active_adapters:
            if name in projection.lora_A:
                weight = weight + projection.get_delta_weight(name).detach().to(weight.dtype)
    return weight


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # in alphabetic order: what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))

"""The same LoRA step and the same greedy answers in less time on a CPU: a plug-in for TRL's own SFTTrainer.

    trainer = SFTTrainer(model, args=SFTConfig(..., gradient_checkpointing=False), peft_config=LoraConfig(...), ...)
    speed_up(trainer)                   # leave it out: the same result, slower
    trainer.train()

Loss, gradients and logged metrics are those of TRL, transformers and PEFT up to the order of rounding
(tests/parity/test_cpu.py). Where the time went, and what is done about it:

    padding                   the rows of a batch stand one after another in one sequence, as for flash attention's
                              varlen kernels; in attention, rows of about the same length go together
    the prompt's first turns  equal in every row (the system message): computed once a batch
    the head                  at the positions with a label only; its gradient is taken at once and overwrites the logits
    casts                     a copy of the frozen weights is kept in the dtype of the products
    small operations          q, k, v are one product, gate and up are one; norm, rotation, SwiGLU: their own backward
    the last layer            after its attention, at the positions with a label only, as the head
    page faults               `keep_memory`: large blocks are used again instead of being returned to the system
    answers                   the same layers with the adapters merged in; keys and values have their full size at once
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTTrainer

ROUND_TO = 32  # sequence lengths: few different shapes, so that oneDNN finds its compiled products again
HEAD_ROWS = 512  # positions whose logits are held at once, in the dtype of the products
SOFTMAX_ROWS = 8  # those of them that are fp32 at once: little enough to stay in the processor's cache
ALIKE = 0.75  # rows at least this part of the longest one's length go through attention with it
LONG = 512  # own tokens of a row: beyond, attention's weights are computed again instead of kept
# What SFTConfig must say. "nll" and "chunked_nll" are one loss; the others change the loss, the batches or the layers.
PLAIN_SETTINGS = {
    "gradient_checkpointing": (False,), "packing": (False,), "eval_packing": (None, False), "padding_free": (False,),
    "loss_type": ("nll", "chunked_nll"), "fp16": (False,), "use_liger_kernel": (False,), "torch_compile": (False,),
    "label_smoothing_factor": (0.0,), "neftune_noise_alpha": (None,), "activation_offloading": (False,),
    "include_num_input_tokens_seen": ("no",),
}  # fmt: skip
_fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def speed_up(trainer: "SFTTrainer") -> None:
    """Makes the steps of TRL's SFTTrainer faster on a CPU, for a Llama with LoRA. Call it before trainer.train().

    Afterwards trainer.model is the ordinary PEFT model, trained. A trainer that this is not for (on a GPU, another
    architecture, quantized weights, gradient checkpointing, ...) stays as it is, and one printed line says why.

    Raises TypeError for what is no SFTTrainer.
    """
    from trl import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        raise TypeError(
            f"speed_up is for TRL's SFTTrainer, got {type(trainer).__name__}. Other trainers stay plain TRL."
        )
    if trainer.data_collator is pack:
        return  # it is on already
    if reason := _obstacle(trainer):
        print(f"speed_up leaves this trainer as plain TRL: {reason}.")
        return
    keep_memory()
    if trainer.args.optim == "adamw_torch":
        trainer.args.optim = "adamw_torch_fused"
    llama = FusedLlama(trainer.model, product_dtype(trainer.args.bf16))
    trainer.data_collator = pack
    trainer.compute_loss = functools.partial(_compute_loss, trainer, llama)


def _obstacle(trainer: "SFTTrainer") -> str | None:
    """Why this trainer stays as it is, in a few words; None if it can be sped up."""
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    args, model = trainer.args, trainer.model
    if args.device.type != "cpu" or model.device.type != "cpu":
        return f"it trains on {args.device.type!r}, and speed_up is for the CPU (on a GPU, Unsloth is the fast engine)"
    if args.world_size > 1:  # its layers go around DistributedDataParallel, and each process would learn for itself
        return f"this is one of {args.world_size} processes, and speed_up is for one"
    for name, plain in PLAIN_SETTINGS.items():
        if (value := getattr(args, name)) not in plain:
            return f"SFTConfig says {name}={value!r}, and speed_up is for {name}={plain[0]!r}"
    if type(trainer).compute_loss is not SFTTrainer.compute_loss or trainer.compute_loss_func:
        return "it has a loss of its own"
    if type(trainer.data_collator) is not DataCollatorForLanguageModeling:
        return f"its data collator is {type(trainer.data_collator).__name__}, not TRL's for text"
    if trainer.compute_metrics or trainer.preprocess_logits_for_metrics:
        return "compute_metrics needs all logits, and speed_up computes those with a label only"
    if reason := _not_a_plain_llama(model):
        return reason
    return _not_plain_lora(model)


def _not_plain_lora(model: nn.Module) -> str | None:
    """What is trained that is not one LoRA adapter without dropout, in a few words; None if nothing is."""
    adapted = [p for p in _projections(_causal_lm(model)) if hasattr(p, "lora_A")]
    if not adapted:
        return "the model has no LoRA adapter (give SFTTrainer a peft_config)"
    names = {name for p in adapted for name in p.lora_A}
    if len(names) != 1 or any(p.merged or p.disable_adapters for p in adapted):
        return f"the model has {len(names)} adapters or one that is merged or off, and speed_up is for one that is on"
    (name,) = names
    if dropout := max(getattr(p.lora_dropout[name], "p", 0.0) for p in adapted):
        return f"LoraConfig says lora_dropout={dropout}, and speed_up is for 0.0"
    if len({p.scaling[name] for p in adapted}) != 1:
        return "its LoRA layers have different scalings (rank_pattern or alpha_pattern)"
    lora = {id(w.weight) for p in adapted for w in (p.lora_A[name], p.lora_B[name])}
    others = [n for n, weight in model.named_parameters() if weight.requires_grad != (id(weight) in lora)]
    return f"more or less is trained than the LoRA matrices: {others[0]}" if others else None


def _compute_loss(
    trainer: "SFTTrainer",
    llama: "FusedLlama",
    model: nn.Module,
    inputs: dict[str, Tensor],
    return_outputs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor | tuple[Tensor, dict]:
    """SFTTrainer.compute_loss on a batch of `pack`: mean cross-entropy in nats over the step's labels; logs as TRL."""
    if inputs.pop("_prediction_loss_only", True) is False:
        raise NotImplementedError("trainer.predict needs all logits: ask a trainer that speed_up was not called on")
    labels = inputs["labels"][0, 1:]  # a row's first token has no label, so a plain shift is right
    logits_to_keep = labels.ne(-100).nonzero()[:, 0]
    hidden = llama(logits_to_keep, inputs["cu_seqlens"], inputs["input_ids"], inputs["position_ids"])
    logps, entropy, is_argmax = llama.score(hidden, labels[logits_to_keep], statistics=True)
    loss = -logps.sum() / (max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, values in (("entropy", entropy), ("mean_token_accuracy", is_argmax)):
        metrics[name].append(values.mean().item() if len(values) else 0.0)
    if trainer.model.training:
        trainer._total_train_tokens += int(inputs["lengths"].sum())
    metrics["num_tokens"] = [trainer._total_train_tokens]
    return (loss, {}) if return_outputs else loss


def product_dtype(bf16: bool) -> torch.dtype:
    """bf16 if it is asked for and this CPU multiplies it natively, else fp32: emulated bf16 is slower than fp32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if bf16 and native else torch.float32


def keep_memory() -> None:
    """Tells glibc's malloc to keep freed blocks for the next step; elsewhere nothing happens.

    By default each large tensor is mapped fresh from the system and paid for with a page fault every 4 kB.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def covers(model: "PreTrainedModel") -> bool:
    """Whether `Decoder` can stand in for model.generate: a plain Llama on a CPU, unquantized, LoRA adapters or none."""
    return model.device.type == "cpu" and _not_a_plain_llama(model) is None


def _not_a_plain_llama(model: nn.Module) -> str | None:
    """What makes the layers here wrong for this model, in a few words; None for a Llama with plain LoRA or none."""
    base = _causal_lm(model)
    config = base.config
    if type(base).__name__ != "LlamaForCausalLM":
        return f"the model is a {type(base).__name__}, and speed_up is for LlamaForCausalLM"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias or config.attention_dropout:
        return "its layers have biases, dropout or another activation than SiLU"
    if any(c.peft_type != "LORA" for c in getattr(model, "peft_config", {}).values()):
        return "its adapter is not LoRA"
    projections = _projections(base)
    if any(getattr(p, "lora_variant", None) or any(getattr(p, "lora_bias", {}).values()) for p in projections):
        return "its LoRA layers are a variant (DoRA, aLoRA, lora_bias, ...)"
    bases = {type(getattr(p, "base_layer", p)) for p in projections} | {type(base.lm_head)}
    norms = {
        type(n).__name__ for layer in base.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)
    }
    if bases != {nn.Linear} or norms | {type(base.model.norm).__name__} != {"LlamaRMSNorm"}:
        return "some of its layers are quantized or replaced, or are trained in full (modules_to_save)"
    if type(base.model.embed_tokens) is not nn.Embedding:
        return "its embedding is adapted too"
    return None


def _causal_lm(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _projections(base: nn.Module) -> list[nn.Module]:
    """The seven linear layers of each layer."""
    return [
        getattr(part, f"{name}_proj")
        for layer in base.model.layers
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")))
        for name in names
    ]


# --- Batches ----------------------------------------------------------------------------------------------------------


def pack(rows: list[dict]) -> dict[str, Tensor]:
    """Rows of input_ids and labels as one sequence of N tokens: N is a multiple of ROUND_TO, padding at the end.

    The tokens that all rows begin with, before the first label, stand at 0 .. cu_seqlens[0], once, and every row sees
    them. Row b's own tokens stand at cu_seqlens[b] .. cu_seqlens[b + 1]; the last row takes the padding. Returns
    lengths (B,), cu_seqlens (B + 1,); input_ids, position_ids, labels (1, N). Labels are not shifted, and a row's
    first token, which nothing comes before, has none. lengths stands first: Trainer reads B off the first tensor.
    """
    shared = common_prefix([row["input_ids"][: max(_first_label(row["labels"]) - 1, 0)] for row in rows])
    shared = shared if len(rows) > 1 else 0
    cu_seqlens, ids, labels, positions = [], list(rows[0]["input_ids"][:shared]), [-100] * shared, list(range(shared))
    for row in rows:
        cu_seqlens.append(len(ids))
        ids += row["input_ids"][shared:]
        labels += [-100, *row["labels"][shared + 1 :]]
        positions += range(shared, len(row["input_ids"]))
    padding = -len(ids) % ROUND_TO
    return {
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
        "cu_seqlens": torch.tensor([*cu_seqlens, len(ids) + padding]),
        "input_ids": torch.tensor([ids + [0] * padding]),
        "position_ids": torch.tensor([positions + [0] * padding]),
        "labels": torch.tensor([labels + [-100] * padding]),
    }


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != -100), len(labels))


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # in alphabetic order: what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


# --- Layers -----------------------------------------------------------------------------------------------------------


class FusedLlama:
    """The forward pass of a Llama, with PEFT's own lora_A and lora_B read at each call, or merged into the weights.

    Keeps a copy of the weights in `dtype`. The residual stream stays in fp32, as under autocast on an fp32 model.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, merged: bool = False) -> None:
        base = _causal_lm(model)
        self.trunk, self.dtype, self.head_weight = base.model, dtype, base.lm_head.weight.detach().to(dtype)
        self.heads, self.kv_heads = base.config.num_attention_heads, base.config.num_key_value_heads
        self.head_dim, self.scaling = base.model.layers[0].self_attn.head_dim, base.model.layers[0].self_attn.scaling
        self.layers = [
            (
                self._norm(layer.input_layernorm),
                _Linear((layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj), dtype, merged),
                _Linear((layer.self_attn.o_proj,), dtype, merged),
                self._norm(layer.post_attention_layernorm),
                _Linear((layer.mlp.gate_proj, layer.mlp.up_proj), dtype, merged),
                _Linear((layer.mlp.down_proj,), dtype, merged),
            )
            for layer in base.model.layers
        ]
        self.norm = self._norm(base.model.norm)

    def __call__(
        self,
        logits_to_keep: Tensor,
        cu_seqlens: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        answer_starts: Tensor | None = None,
    ) -> Tensor:
        """The last norm's output (K, C) at the positions logits_to_keep (K,) of a packed sequence (1, N).

        answer_starts (B, 2): where in each row two answers to one prompt begin; the second does not see the first.
        """
        with torch.autocast("cpu", enabled=False):  # every dtype below is chosen by hand
            forks = None if answer_starts is None else answer_starts.tolist()
            layout = _Layout(cu_seqlens.tolist(), forks, self)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return _Attention.apply(q, k, v, layout, self.scaling)

            x, rotation = self.embed(input_ids[0]), self.rotation(position_ids)
            for layer in self.layers[:-1]:
                x = self.layer(x, rotation, layer, attend)
            return self.norm(self.layer(x, rotation, self.layers[-1], attend, logits_to_keep))

    def score(self, hidden: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of next tokens targets (K,): their log-probabilities in nats, (K,).

        And, without gradients, if statistics are asked for: the entropy there in nats, and 1.0 where the target is the
        likeliest token, (K,) each.
        """
        return _Head.apply(hidden, self.head_weight, targets, statistics)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.trunk.embed_tokens(input_ids).float()  # (N,) -> (N, C)

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, head_dim / 2) of positions (1, N)."""
        at = self.trunk.norm.weight.float()  # it only says the dtype
        cos, sin = (half[0, :, None, : half.shape[-1] // 2] for half in self.trunk.rotary_emb(at, position_ids))
        return cos, sin

    def layer(self, x: Tensor, rotation: tuple, layer: tuple, attend: Callable, keep: Tensor | None = None) -> Tensor:
        """One layer: x (N, C) -> (N, C), or (K, C) at the positions `keep`, the only ones that are asked for then.

        attend(q, k, v): q (N, heads, head_dim), k and v (N, kv_heads, head_dim) -> (N, heads * head_dim).
        """
        norm, qkv, out, mlp_norm, gate_up, down = layer
        q_k, v = qkv(norm(x)).view(len(x), -1, self.head_dim).split([self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = _Rotate.apply(q_k, *rotation).split([self.heads, self.kv_heads], 1)
        mixed = attend(q, k, v)
        if keep is not None:
            x, mixed = x.index_select(0, keep), mixed.index_select(0, keep)
        x = x + out(mixed)
        return x + down(_SwiGLU.apply(gate_up(mlp_norm(x))))

    def _norm(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        weight, eps, dtype = norm.weight.detach().float(), norm.variance_epsilon, self.dtype
        return lambda x: _Norm.apply(x, weight, eps, dtype)


class _Linear:
    """Linear layers with the same input as one: weights stacked, lora_A stacked, lora_B along a diagonal."""

    def __init__(self, projections: tuple[nn.Module, ...], dtype: torch.dtype, merged: bool) -> None:
        weights = [_merged(p) if merged else getattr(p, "base_layer", p).weight.detach() for p in projections]
        self.weight = torch.cat(weights).to(dtype) if len(weights) > 1 else weights[0].to(dtype)  # (out, in)
        self.projections = projections
        self.adapted = [] if merged else [p for p in projections if hasattr(p, "lora_A")]
        if self.adapted:
            (self.name,) = self.adapted[0].lora_A
            self.scaling = self.adapted[0].scaling[self.name]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.adapted or self.adapted[0].disable_adapters:
            return x @ self.weight.T
        a = [p.lora_A[self.name].weight for p in self.adapted]
        b = [
            p.lora_B[self.name].weight if p in self.adapted else self.weight.new_empty(p.out_features, 0)
            for p in self.projections
        ]
        a, b = (a[0], b[0]) if len(b) == 1 else (torch.cat(a), torch.block_diag(*b))
        return _LoRALinear.apply(x, self.weight, a, b, self.scaling)


def _merged(projection: nn.Module) -> Tensor:
    """A linear layer's weight (out, in) with its active adapters added."""
    weight = getattr(projection, "base_layer", projection).weight.detach()
    if hasattr(projection, "base_layer") and not (projection.merged or projection.disable_adapters):
        for name in projection.active_adapters:
            if name in projection.lora_A:
                weight = weight + projection.get_delta_weight(name).detach().to(weight.dtype)
    return weight


class _LoRALinear(torch.autograd.Function):
    """y = x W^T + scaling (x A^T) B^T, W frozen; A and B are fp32 masters, the products in W's dtype."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        h = (x @ a.T).mul_(scaling)  # (N, r)
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.scaling = scaling
        return (x @ weight.T).addmm_(h, b.T)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, h = ctx.saved_tensors
        grad_h = (grad @ b).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(grad_h, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, (grad_h.T @ x).float(), (grad.T @ h).float(), None


class _Norm(torch.autograd.Function):
    """RMSNorm in fp32, y = w x / sqrt(mean(x^2) + eps), w frozen; given back in `dtype`."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = torch.rsqrt((torch.linalg.vecdot(x, x) / x.shape[-1]).add_(eps))[:, None]
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return (normed * weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        normed, weight, scale = ctx.saved_tensors
        grad = grad * weight
        along = (torch.linalg.vecdot(grad, normed) / normed.shape[-1])[:, None]
        return (grad - normed * along).mul_(scale), None, None, None


class _Rotate(torch.autograd.Function):
    """Rotary positions on (N, heads, head_dim): the pair (x_i, x_{i + head_dim/2}) turned; backward turns it back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        a, b = grad.float().chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1).to(grad.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of gate and up side by side: (N, 2 F) -> (N, F)."""

    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, -1)
        silu = nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, grad):
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        both = torch.empty_like(gate_up)
        to_gate, to_up = both.chunk(2, -1)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=to_gate)
        torch.mul(grad, silu, out=to_up)
        return both


class _Head(torch.autograd.Function):
    """What FusedLlama.score returns, of x (K, C), the frozen weight (V, C) and targets (K,).

    d logp_target / dx = W_target - sum_v p_v W_v is taken in the forward pass, while the logits are there.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, statistics):
        logps, entropy, is_argmax, slopes = [], [], [], []
        for rows, own in zip(x.split(HEAD_ROWS), targets[:, None].split(HEAD_ROWS), strict=True):
            held = rows @ weight.T
            for logits, target in zip(held.split(SOFTMAX_ROWS), own.split(SOFTMAX_ROWS), strict=True):
                log_p = logits.float().log_softmax(-1)
                logps.append(log_p.gather(1, target)[:, 0])
                p = log_p.exp() if statistics or ctx.needs_input_grad[0] else None
                if statistics:
                    entropy.append(-torch.linalg.vecdot(p, log_p))
                    is_argmax.append((log_p.argmax(-1) == target[:, 0]).float())
                if ctx.needs_input_grad[0]:
                    logits.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))  # p - 1[target]
            if ctx.needs_input_grad[0]:
                slopes.append(held @ weight)
        ctx.save_for_backward(*([torch.cat(slopes).neg_()] if slopes else []))
        entropy, is_argmax = (torch.cat(entropy), torch.cat(is_argmax)) if statistics else (None, None)
        ctx.mark_non_differentiable(*([entropy, is_argmax] if statistics else []))
        return torch.cat(logps), entropy, is_argmax

    @staticmethod
    def backward(ctx, grad, *_):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


# --- Attention over packed rows ---------------------------------------------------------------------------------------


class _RowGroup:
    """Rows [begin, end) of the sequence as attention needs them: padded to the longest; all see [0, shared) too.

    q_index (kv_heads, B, own, group) and kv_index (kv_heads, B, shared + own) say which (token, head) stands where;
    the queries that share a key head stand together. q_is_real: not padding. kv_is_own: neither padding nor shared.

    long rows go through the fused kernel: q_index is (kv_heads, B, group, own) there. Without two answers in a row it
    is (kv_heads, B, group, shared + own) and mask is None: the kernel then leaves out the future, half of the work, but
    wants each query at the place of its key, so every row computes the shared queries again.
    """

    def __init__(self, rows: list[tuple[int, int, list | None]], shared: int, llama: FusedLlama) -> None:
        begins, ends = torch.tensor([row[:2] for row in rows]).T[:, :, None]
        heads, kv_heads, own = llama.heads, llama.kv_heads, int((ends - begins).max())
        tokens = begins + torch.arange(own)  # (B, own)
        real = tokens < ends
        tokens = tokens.where(real, begins)
        seen = torch.cat([torch.arange(shared).expand(len(rows), -1), tokens], 1)
        forks = [(begin, *fork) for begin, _, fork in rows if fork]
        self.shared, self.long = shared, own > LONG
        is_own = nn.functional.pad(real, (shared, 0))
        causal = self.long and not forks
        queries, is_real = (seen, is_own) if causal else (tokens, real)
        self.q_index = queries[..., None] * heads + torch.arange(heads).view(kv_heads, 1, 1, -1)
        self.q_is_real = is_real[..., None].expand_as(self.q_index)
        if self.long:
            self.q_index, self.q_is_real = self.q_index.mT, self.q_is_real.mT
        self.kv_index = seen * kv_heads + torch.arange(kv_heads).view(-1, 1, 1)
        self.kv_is_own = is_own.expand_as(self.kv_index)
        self.q_padding = (~self.q_is_real).flatten().nonzero()[:, 0]
        self.mask = None if causal else self._mask(own, forks, len(rows), llama)

    def _mask(self, own: int, forks: list[tuple[int, int, int]], count: int, llama: FusedLlama) -> Tensor:
        """0 where a query may look and -1e9 where it may not."""
        future = torch.ones(own, own, dtype=torch.bool).triu(1).repeat(len(forks) or 1, 1, 1)
        for hidden, (begin, first, second) in zip(future, forks, strict=bool(forks)):
            hidden[second - begin :, first - begin : second - begin] = True  # no future, but of the other answer
        mask = torch.zeros(future.shape, dtype=llama.dtype).masked_fill(future, -1e9)
        mask, group = nn.functional.pad(mask, (self.shared, 0)), llama.heads // llama.kv_heads
        if self.long:
            return mask[:, None].repeat(llama.kv_heads, 1, 1, 1).expand(-1, group, -1, -1)
        return mask.repeat_interleave(group, 1).expand(llama.kv_heads, count, -1, -1).flatten(0, 1)


class _Layout:
    """The row groups of a packed sequence, what the rows share first, and the index from them back to the sequence."""

    def __init__(self, cu_seqlens: list[int], answer_starts: list | None, llama: FusedLlama) -> None:
        shared, n = cu_seqlens[0], cu_seqlens[-1]
        rows = zip(cu_seqlens, cu_seqlens[1:], answer_starts or [None] * (len(cu_seqlens) - 1), strict=False)
        rows = sorted((row for row in rows if row[0] < row[1]), key=lambda row: row[0] - row[1])  # the longest first
        self.groups = [_RowGroup([(0, shared, None)], 0, llama)] if shared else []
        while rows:
            longest = rows[0][1] - rows[0][0]
            count = sum(end - begin >= ALIKE * longest for begin, end, _ in rows)
            self.groups.append(_RowGroup(rows[:count], shared, llama))
            rows = rows[count:]
        self.q = _inverse_index(n * llama.heads, ((group.q_index, group.q_is_real) for group in self.groups))
        self.kv = _inverse_index(n * llama.kv_heads, ((group.kv_index, group.kv_is_own) for group in self.groups))


def _inverse_index(size: int, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Where each of `size` vectors stands in the parts one after another; a part is its index and which of it count."""
    places, start = torch.zeros(size, dtype=torch.long), 0
    for index, counts in parts:
        places[index[counts]] = start + counts.flatten().nonzero()[:, 0]
        start += index.numel()
    return places


class _Attention(torch.autograd.Function):
    """softmax(scaling q k^T + mask) v: q (N, heads, head_dim), k, v (N, kv_heads, head_dim) -> (N, heads * head_dim).

    Rows of up to LONG tokens keep their weights for the backward pass; longer ones go through PyTorch's fused kernel,
    which computes them again and needs no memory for them.
    """

    @staticmethod
    def forward(ctx, all_q, all_k, all_v, layout, scaling):
        n, _, width = all_q.shape
        all_q, all_k, all_v = (x.reshape(-1, width) for x in (all_q, all_k, all_v))
        mixed, saved = [], []
        for group in layout.groups:
            q, k, v = _take(all_q, group.q_index), _take(all_k, group.kv_index), _take(all_v, group.kv_index)
            if group.long:
                k, v = (x[:, None].expand(q.shape[:2] + x.shape[1:]) for x in (k, v))
                parts = q, k, v, 0.0, group.mask is None  # no dropout; causal
                out, normalizer = _fused_attention(*parts, attn_mask=group.mask, scale=scaling)
                saved += [q, k, v, out, normalizer]
            else:
                q = q.flatten(1, 2)
                p = torch.baddbmm(group.mask, q, k.mT, alpha=scaling).softmax(-1)
                out = p @ v
                saved += [q, k, v, p]
            mixed.append(out)
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scaling = layout, scaling
        return _join(mixed, layout.q).view(n, -1)

    @staticmethod
    def backward(ctx, grad):
        n, saved = len(grad), iter(ctx.saved_tensors)
        grad = grad.reshape(-1, ctx.saved_tensors[0].shape[-1])
        grads = []
        for group in ctx.layout.groups:
            q, k, v = (next(saved) for _ in range(3))
            g = _take(grad, group.q_index)
            g.view(-1, g.shape[-1]).index_fill_(0, group.q_padding, 0)
            if group.long:
                parts = g, q, k, v, next(saved), next(saved), 0.0, group.mask is None
                of_q, of_k, of_v = _fused_attention_backward(*parts, attn_mask=group.mask, scale=ctx.scaling)
                grads.append((of_q, of_k.sum(1), of_v.sum(1)))
            else:
                p, g = next(saved), g.flatten(1, 2)
                scores = torch._softmax_backward_data(g @ v.mT, p, -1, p.dtype).mul_(ctx.scaling)
                grads.append((scores @ k, scores.mT @ q, p.mT @ g))
        grad_q, grad_k, grad_v = zip(*grads, strict=True)
        to_q, to_k, to_v = (
            _join(parts, places).view(n, -1, grad.shape[-1])
            for parts, places in ((grad_q, ctx.layout.q), (grad_k, ctx.layout.kv), (grad_v, ctx.layout.kv))
        )
        for whole, parts in ((to_k, grad_k), (to_v, grad_v)):  # what rows want of the shared
            for group, part in zip(ctx.layout.groups, parts, strict=True):
                shared = part.view(*group.kv_index.shape, -1)[:, :, : group.shared]
                whole[: group.shared] += shared.sum(1).transpose(0, 1)
        return to_q, to_k, to_v, None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Vectors (tokens * heads, head_dim) at an index (kv_heads, B, ...) of them: (kv_heads * B, ..., head_dim)."""
    return x.index_select(0, index.flatten()).view(*index.shape, -1).flatten(0, 1)


def _join(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    """The vectors of all parts, at their places."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).index_select(0, places)


# --- Answers ----------------------------------------------------------------------------------------------------------


class Decoder(FusedLlama):
    """A copy of a Llama's weights, active adapters merged in, that only answers; for models that `covers` says yes to."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__(model, product_dtype(_causal_lm(model).lm_head.weight.dtype == torch.bfloat16), merged=True)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """The likeliest next tokens of each prompt (token ids), one after another, until one of `stop` (left out)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) + max_new_tokens
        cos, sin = self.rotation(torch.arange(longest)[None])
        shape = (len(self.layers), 2, len(prompts), self.kv_heads, longest, self.head_dim)
        cache = torch.zeros(shape, dtype=self.dtype)  # not empty: 0 x NaN, at a hidden position, is NaN
        token = self.choose(self._read(prompts, cos, sin, cache))  # (B,)
        stop, running, answers = torch.tensor(stop), torch.ones(len(prompts), dtype=torch.bool), []
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
        packed = pack([{"input_ids": list(prompt), "labels": [-100] * len(prompt)} for prompt in prompts])
        shared, *_ = cu_seqlens = packed["cu_seqlens"].tolist()
        positions, own = packed["position_ids"][0], packed["lengths"] - shared
        spans = [(begin, begin + count) for begin, count in zip(cu_seqlens, own.tolist(), strict=False)]
        x, rotation = self.embed(packed["input_ids"][0]), (cos[positions], sin[positions])

        def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed = torch.zeros_like(q)
            mixed[:shared] = self._attend(q[:shared], k[:shared].transpose(0, 1), v[:shared].transpose(0, 1))
            for row, (begin, end) in enumerate(spans):
                seen = shared + end - begin
                for cached, new in ((keys[row], k), (values[row], v)):  # (kv_heads, longest, head_dim)
                    cached[:, :shared] = new[:shared].transpose(0, 1)
                    cached[:, shared:seen] = new[begin:end].transpose(0, 1)
                mixed[begin:end] = self._attend(q[begin:end], keys[row, :, :seen], values[row, :, :seen])
            return mixed.flatten(1)

        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = self.layer(x, rotation, layer, functools.partial(attend, keys, values))
        return self.norm(x[[end - 1 for _, end in spans]]) @ self.head_weight.T

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of one row's last tokens: q (own, heads, head_dim), k and v (kv_heads, seen, head_dim)."""
        past = torch.ones(len(q), k.shape[1], dtype=torch.bool).tril(k.shape[1] - len(q))
        q, k, v = q.transpose(0, 1)[None], k[None], v[None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, past, scale=self.scaling, enable_gqa=True)
        return out[0].transpose(0, 1)

    def _next(self, token: Tensor, position: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:
        """The logits (B, V) after one more token a row, at its position (B,)."""
        row, seen = torch.arange(len(token)), int(position.max()) + 1
        mask = torch.where(torch.arange(seen) <= position[:, None], 0.0, -torch.inf)[:, None, None].to(cache.dtype)

        def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[row, :, position], values[row, :, position] = k, v
            grouped = q.view(len(token), self.kv_heads, -1, self.head_dim)  # the queries that share a key
            scores = grouped @ keys[:, :, :seen].mT * self.scaling + mask  # (B, kv_heads, group, seen)
            return (scores.softmax(-1) @ values[:, :, :seen]).flatten(1)

        x, rotation = self.embed(token), (cos[position], sin[position])
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = self.layer(x, rotation, layer, functools.partial(attend, keys, values))
        return self.norm(x) @ self.head_weight.T

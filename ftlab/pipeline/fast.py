"""The same LoRA step in less time on a CPU: batches without waste, and Llama layers with fewer, larger operations.

Used by `train` when a recipe says `fast: true`. TRL's trainer, the optimizer and the saved adapter stay what they are;
loss and gradients are those of transformers + PEFT up to the order of rounding (tests/parity/test_fast.py). Where the
time went, and what is done about it:

    padding                   rows of a batch lie one after another in one sequence; in attention rows of about the same
                              length go together
    the prompt's first turns  equal in every row (the system message): computed once a batch
    a pair's prompt           dpo: read once, by both answers; the reference, the same layers without adapters, too
    the head                  at the counted positions only, its gradient taken at once and written over the logits,
                              which the backward pass does not need again
    casts                     frozen weights are kept in the dtype of the products; autocast casts them at each step
    small operations          q, k, v are one product, gate and up are one; norm, rotation, SwiGLU: their own backward;
                              AdamW's fused kernel
    the last layer            after its attention, at the counted positions only, as the head
    page faults               `keep_memory`: large blocks are used again instead of being returned to the system
"""

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftlab.pipeline.decode import common_prefix

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import DPOTrainer, SFTTrainer

ROUND_TO = 32  # sequence lengths: few different shapes, so that oneDNN finds its compiled products again
HEAD_ROWS = 512  # positions whose logits are held at once, in the dtype of the products
SOFTMAX_ROWS = 8  # those of them that are fp32 at once: little enough to stay in the processor's cache
ALIKE = 0.75  # rows at least this part of the longest one's length go through attention with it
LONG = 512  # own tokens of a row: beyond, attention's weights are computed again instead of kept
_fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fast_sft_trainer(**arguments) -> "SFTTrainer":
    """TRL's SFTTrainer with packed batches and fused layers. Raises ValueError for a model that these are not for."""
    from trl import SFTTrainer

    dtype = _ready(**arguments)

    class FastSFTTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Mean cross-entropy over the counted tokens of the optimizer step, in nats, as TRL's "nll"."""
            inputs.pop("_prediction_loss_only", None)
            targets = inputs.pop("labels")[0, 1:]  # a row's first token is never counted, so a plain shift is right
            counted = targets.ne(-100).nonzero()[:, 0]
            logps, _ = self.fused(counted, targets[counted], **inputs)
            loss = -logps.sum() / (len(counted) if num_items_in_batch is None else num_items_in_batch)
            return (loss, {}) if return_outputs else loss

    trainer = FastSFTTrainer(data_collator=pack, **arguments)
    trainer.fused = FusedLlama(trainer.model, dtype)
    return trainer


def fast_dpo_trainer(**arguments) -> "DPOTrainer":
    """TRL's DPOTrainer, loss "sigmoid", with packed pairs and fused layers; the reference is the base of the adapters.

    With precompute_ref_log_probs TRL calls compute_ref_log_probs here too, once for each row, before it trains. Raises
    ValueError for a model that the layers are not for.
    """
    from trl import DPOTrainer

    dtype = _ready(**arguments)

    class FastDPOTrainer(DPOTrainer):
        @functools.cached_property  # TRL needs it before its own __init__ is through
        def fused(self) -> FusedLlama:
            return FusedLlama(self.model, dtype)

        def compute_ref_log_probs(self, model, inputs):
            """Log-probabilities (B,), (B,) of the chosen and the rejected answers, adapters off."""
            with torch.no_grad(), self.model.disable_adapter():
                return _answers(inputs, self._tokens(inputs, statistics=False)[0]).chunk(2)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Mean of -log sigmoid(beta * margin) over the pairs, in nats; logs what TRL logs."""
            logps, (entropy, mean_logit, is_likeliest) = self._tokens(inputs, statistics=True)
            summed = _answers(inputs, logps)
            if not self.precompute_ref_logps:
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(model, inputs)
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            chosen, rejected = (self.beta * (summed - reference)).chunk(2)
            loss = -nn.functional.logsigmoid(chosen - rejected).mean()
            of_chosen = inputs["answer"] < len(chosen)
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, values in {
                "entropy": entropy,
                "logits/chosen": mean_logit[of_chosen],
                "logits/rejected": mean_logit[~of_chosen],
                "mean_token_accuracy": is_likeliest[of_chosen],
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).float(),
                "rewards/margins": chosen - rejected,
                "logps/chosen": summed[: len(chosen)],
                "logps/rejected": summed[len(chosen) :],
            }.items():
                metrics[name].append(values.mean().item())
            if self.model.training:
                self._total_train_tokens += inputs["lengths"].sum().item()
            metrics["num_tokens"] = [self._total_train_tokens]
            return (loss, {}) if return_outputs else loss

        def _tokens(self, inputs, statistics: bool):
            names = ("wanted", "targets", "row_starts", "input_ids", "position_ids", "forks")
            return self.fused(**{name: inputs[name] for name in names}, statistics=statistics)

    def _answers(inputs, logps: Tensor) -> Tensor:
        """(K,) -> (2 B,): summed over each answer, chosen ones first."""
        return logps.new_zeros(len(inputs["lengths"])).index_add(0, inputs["answer"], logps)

    return FastDPOTrainer(data_collator=pack_pairs, **arguments)


def _ready(model: nn.Module, args, **rest) -> torch.dtype:
    """What both trainers begin with; the dtype of the products."""
    check(model)
    keep_memory()
    if args.optim == "adamw_torch":
        args.optim = "adamw_torch_fused"
    return torch.bfloat16 if args.bf16 else torch.float32


def check(model: nn.Module) -> None:
    """Raises ValueError for a model that is no Llama on a CPU, or for several processes; the rest Recipe refuses."""
    from ftlab.pipeline.train import processes

    if (count := processes()[1]) > 1:  # its layers go around DistributedDataParallel, and each would learn for itself
        raise ValueError(f"fast: true is for one process, this is one of {count}: leave `fast` out to train with all")
    kind, device = model.config.model_type, model.device.type
    if kind != "llama" or device != "cpu":
        raise ValueError(
            f"fast: true is for models of type 'llama' on the CPU, this is {kind!r} on {device!r}. Leave `fast` out to "
            f"train with plain TRL; on a GPU, Unsloth is the fast engine."
        )


def keep_memory() -> None:
    """Tells glibc's malloc to keep freed blocks for the next step; elsewhere nothing happens.

    By default each large tensor is mapped fresh from the system and paid for with a page fault every 4 kB.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


# --- Batches ----------------------------------------------------------------------------------------------------------


def pack(rows: list[dict]) -> dict[str, Tensor]:
    """Rows of input_ids and labels as one sequence of N tokens: N is a multiple of ROUND_TO, padding at the end.

    The tokens that all prompts begin with stand at 0 .. row_starts[0], once, and every row sees them. Returns
    row_starts (B,): where each row's own tokens begin; input_ids, position_ids, labels (1, N), labels not shifted.
    """
    prompts = [row["input_ids"][: _first_counted(row["labels"]) - 1] for row in rows]
    shared = common_prefix(prompts) if len(rows) > 1 else 0
    starts, ids, labels, positions = [], list(rows[0]["input_ids"][:shared]), [-100] * shared, list(range(shared))
    for row in rows:
        starts.append(len(ids))
        ids += row["input_ids"][shared:]
        labels += row["labels"][shared:]
        positions += range(shared, len(row["input_ids"]))
    padding = -len(ids) % ROUND_TO
    return {
        "row_starts": torch.tensor(starts),
        "input_ids": torch.tensor([ids + [0] * padding]),
        "position_ids": torch.tensor([positions + [0] * padding]),
        "labels": torch.tensor([labels + [-100] * padding]),
    }


def _first_counted(labels: list[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != -100), len(labels))


def pack_pairs(rows: list[dict]) -> dict[str, Tensor]:
    """Pairs of prompt_ids, chosen_ids and rejected_ids as one sequence of N tokens, as in `pack`; a pair is one row.

    In it stands what both answers begin with (the prompt, and perhaps more), then the rest of the chosen one, then the
    rest of the rejected one, which does not see the chosen one's. Last tokens, after which nothing is asked, are left
    out. Returns also forks (B, 2): where the two rests begin; for the K tokens of all answers, chosen ones first:
    wanted (K,), the positions after which they come, targets (K,), their ids, and answer (K,), in [0, 2 B); lengths
    (2 B,), of prompt and answer; and TRL's ref_chosen_logps, ref_rejected_logps (B,) if the rows have them.
    """
    pairs = [[row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")] for row in rows]
    shared = common_prefix([whole[:-1] for pair in pairs for whole in pair])
    starts, forks, ids, positions = [], [], list(pairs[0][0][:shared]), list(range(shared))
    wanted = {"chosen_ids": [], "rejected_ids": []}
    for row, pair in zip(rows, pairs, strict=True):
        common = common_prefix([whole[:-1] for whole in pair])
        starts.append(len(ids))
        ids += pair[0][shared:common]
        positions += range(shared, common)
        trunk = [*range(shared), *range(starts[-1], len(ids))]
        for side, whole in zip(wanted, pair, strict=True):
            forks.append(len(ids))
            ids += whole[common:-1]
            positions += range(common, len(whole) - 1)
            wanted[side].append([*trunk, *range(forks[-1], len(ids))][len(row["prompt_ids"]) - 1 :])
    answers = [row[side] for side in wanted for row in rows]
    padding = -len(ids) % ROUND_TO
    batch = {
        "row_starts": torch.tensor(starts),
        "forks": torch.tensor(forks).view(-1, 2),
        "input_ids": torch.tensor([ids + [0] * padding]),
        "position_ids": torch.tensor([positions + [0] * padding]),
        "wanted": torch.tensor([i for side in wanted.values() for of_row in side for i in of_row]),
        "targets": torch.tensor([token for answer in answers for token in answer]),
        "answer": torch.tensor([i for i, answer in enumerate(answers) for _ in answer]),
        "lengths": torch.tensor([len(pair[side]) for side in (0, 1) for pair in pairs]),
    }
    known = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
    return batch | {name: torch.tensor([row[name] for row in rows]) for name in known}


# --- Layers -----------------------------------------------------------------------------------------------------------


class FusedLlama:
    """The forward pass of a PEFT Llama with LoRA on all linear layers, reading PEFT's own lora_A and lora_B.

    Keeps a copy of the frozen weights in `dtype`. The residual stream stays in fp32, as under autocast.
    """

    def __init__(self, peft_model: "PeftModel", dtype: torch.dtype) -> None:
        base = peft_model.get_base_model()
        self.trunk, self.dtype = base.model, dtype
        self.heads, self.kv_heads = base.config.num_attention_heads, base.config.num_key_value_heads
        self.head_weight = base.lm_head.weight.detach().to(dtype)
        self.layers = [
            [_Fused(projections, dtype) for projections in (
                (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                (layer.self_attn.o_proj,),
                (layer.mlp.gate_proj, layer.mlp.up_proj),
                (layer.mlp.down_proj,),
            )]
            for layer in self.trunk.layers
        ]  # fmt: skip

    def __call__(
        self,
        wanted: Tensor,
        targets: Tensor,
        row_starts: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        forks: Tensor | None = None,
        statistics: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (K,), in nats, of the target tokens (K,) at the places after the wanted positions (K,).

        And statistics (3, K), without gradients, if asked for: the entropy there in nats, the mean logit, and 1.0 where
        the target is the likeliest token.
        """
        with torch.autocast("cpu", enabled=False):  # every dtype below is chosen by hand
            x = self.trunk.embed_tokens(input_ids)[0].float()  # (N, C)
            cos, sin = (half[0, :, None, : half.shape[-1] // 2] for half in self.trunk.rotary_emb(x, position_ids))
            layout = _Layout(row_starts.tolist(), None if forks is None else forks.tolist(), len(x), self)
            for layer, fused in zip(self.trunk.layers, self.layers, strict=True):
                last = layer is self.trunk.layers[-1]
                x = self._layer(x, cos, sin, layout, wanted if last else None, layer, *fused)
            x = _Norm.apply(x, self.trunk.norm.weight, self.trunk.norm.variance_epsilon, self.dtype)
            return _Head.apply(x, self.head_weight, targets, statistics)

    def _layer(self, x, cos, sin, layout: "_Layout", wanted: Tensor | None, layer, qkv, out, gate_up, down) -> Tensor:
        norm, attention = layer.input_layernorm, layer.self_attn
        y = _Norm.apply(x, norm.weight, norm.variance_epsilon, self.dtype)
        heads = qkv(y).view(len(x), -1, attention.head_dim)  # (N, heads + 2 kv_heads, head_dim)
        q_k, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = _Rotate.apply(q_k, cos, sin).split([self.heads, self.kv_heads], dim=1)
        mixed = _Attention.apply(q, k, v, layout, attention.scaling)
        if wanted is not None:  # after the last layer's attention nobody asks for the other positions
            x, mixed = x.index_select(0, wanted), mixed.index_select(0, wanted)
        x = x + out(mixed)
        norm = layer.post_attention_layernorm
        return x + down(_SwiGLU.apply(gate_up(_Norm.apply(x, norm.weight, norm.variance_epsilon, self.dtype))))


class _Fused:
    """Some LoRA layers with the same input as one: weights stacked, lora_A stacked, lora_B along a diagonal."""

    def __init__(self, projections: tuple, dtype: torch.dtype) -> None:
        self.weight = torch.cat([p.base_layer.weight.detach() for p in projections]).to(dtype)  # (out, in)
        self.projections = projections
        self.scaling = projections[0].scaling["default"]

    def __call__(self, x: Tensor) -> Tensor:
        if self.projections[0].disable_adapters:
            return x @ self.weight.T
        a = [p.lora_A["default"].weight for p in self.projections]
        b = [p.lora_B["default"].weight for p in self.projections]
        a, b = (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.block_diag(*b))
        return _LoRALinear.apply(x, self.weight, a, b, self.scaling)


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


class _Batch:
    """Rows [begin, end) of the sequence as attention needs them: filled up to the longest, and all see [0, shared) too.

    q (kv_heads, B, own, group) and kv (kv_heads, B, shared + own) say which (token, head) stands where, as one index;
    the queries that share a key head stand together. q_counts, kv_counts: not the filling, nor what is shared.

    long rows go through the fused kernel: q is (kv_heads, B, group, own) there. Without a fork it is (kv_heads, B,
    group, shared + own) and mask is None: the kernel then leaves out the future, half of the work, but wants each query
    at the place of its key, so every row asks for what is shared again.
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
        counts = nn.functional.pad(real, (shared, 0))
        causal = self.long and not forks
        asking, asked = (seen, counts) if causal else (tokens, real)
        self.q = asking[..., None] * heads + torch.arange(heads).view(kv_heads, 1, 1, -1)
        self.q_counts = asked[..., None].expand_as(self.q)
        if self.long:
            self.q, self.q_counts = self.q.mT, self.q_counts.mT
        self.kv = seen * kv_heads + torch.arange(kv_heads).view(-1, 1, 1)
        self.kv_counts = counts.expand_as(self.kv)
        self.filling = (~self.q_counts).flatten().nonzero()[:, 0]
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
    """The batches of attention, of what the rows share and of the rows, and the way back from them to the sequence."""

    def __init__(self, starts: list[int], forks: list | None, n: int, llama: FusedLlama) -> None:
        rows = list(zip(starts, [*starts[1:], n], forks or [None] * len(starts), strict=True))
        rows = sorted((row for row in rows if row[0] < row[1]), key=lambda row: row[0] - row[1])  # the longest first
        self.batches = [_Batch([(0, starts[0], None)], 0, llama)] if starts[0] else []
        while rows:
            longest = rows[0][1] - rows[0][0]
            count = sum(end - begin >= ALIKE * longest for begin, end, _ in rows)
            self.batches.append(_Batch(rows[:count], starts[0], llama))
            rows = rows[count:]
        self.q = _way_back(n * llama.heads, [(batch.q, batch.q_counts) for batch in self.batches])
        self.kv = _way_back(n * llama.kv_heads, [(batch.kv, batch.kv_counts) for batch in self.batches])


def _way_back(size: int, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Where each of `size` vectors is in the parts one after another; of a part: what it took, and what counts."""
    places, start = torch.zeros(size, dtype=torch.long), 0
    for taken, counts in parts:
        places[taken[counts]] = start + counts.flatten().nonzero()[:, 0]
        start += taken.numel()
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
        for batch in layout.batches:
            q, k, v = _take(all_q, batch.q), _take(all_k, batch.kv), _take(all_v, batch.kv)
            if batch.long:
                k, v = (x[:, None].expand(q.shape[:2] + x.shape[1:]) for x in (k, v))
                parts = q, k, v, 0.0, batch.mask is None  # no dropout; causal
                out, normalizer = _fused_attention(*parts, attn_mask=batch.mask, scale=scaling)
                saved += [q, k, v, out, normalizer]
            else:
                q = q.flatten(1, 2)
                p = torch.baddbmm(batch.mask, q, k.mT, alpha=scaling).softmax(-1)
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
        for batch in ctx.layout.batches:
            q, k, v = (next(saved) for _ in range(3))
            g = _take(grad, batch.q)
            g.view(-1, g.shape[-1]).index_fill_(0, batch.filling, 0)
            if batch.long:
                parts = g, q, k, v, next(saved), next(saved), 0.0, batch.mask is None
                of_q, of_k, of_v = _fused_attention_backward(*parts, attn_mask=batch.mask, scale=ctx.scaling)
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
            for batch, part in zip(ctx.layout.batches, parts, strict=True):
                shared = part.view(*batch.kv.shape, -1)[:, :, : batch.shared]
                whole[: batch.shared] += shared.sum(1).transpose(0, 1)
        return to_q, to_k, to_v, None, None


def _take(x: Tensor, where: Tensor) -> Tensor:
    """Vectors (tokens * heads, head_dim) at an index (kv_heads, B, ...) of them: (kv_heads * B, ..., head_dim)."""
    return x.index_select(0, where.flatten()).view(*where.shape, -1).flatten(0, 1)


def _join(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    """The vectors of all parts, those wanted."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).index_select(0, places)


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
    """What FusedLlama returns, of x (K, C), the frozen weight (V, C) and targets (K,).

    d logp_target / dx = W_target - sum_v p_v W_v is taken in the forward pass, while the logits are there.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, statistics):
        logps, seen, slopes = [], [], []
        for rows, own in zip(x.split(HEAD_ROWS), targets[:, None].split(HEAD_ROWS), strict=True):
            held = rows @ weight.T
            for logits, target in zip(held.split(SOFTMAX_ROWS), own.split(SOFTMAX_ROWS), strict=True):
                log_p = logits.float().log_softmax(-1)
                logps.append(log_p.gather(1, target)[:, 0])
                p = log_p.exp() if statistics or ctx.needs_input_grad[0] else None
                if statistics:
                    likeliest = (log_p.argmax(-1) == target[:, 0]).float()
                    mean = logits.mean(-1, dtype=torch.float32)
                    seen.append(torch.stack([-torch.linalg.vecdot(p, log_p), mean, likeliest]))
                if ctx.needs_input_grad[0]:
                    logits.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))  # p - 1[target]
            if ctx.needs_input_grad[0]:
                slopes.append(held @ weight)
        ctx.save_for_backward(*([torch.cat(slopes).neg_()] if slopes else []))
        seen = torch.cat(seen, 1) if seen else None
        if seen is not None:
            ctx.mark_non_differentiable(seen)
        return torch.cat(logps), seen

    @staticmethod
    def backward(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None

"""The same LoRA step and the same answers in less time on a CPU: a plug-in for TRL's SFT, DPO, KTO and GRPO trainers.

    trainer = SFTTrainer(model, args=SFTConfig(..., gradient_checkpointing=False), peft_config=LoraConfig(...), ...)
    speed_up(trainer)                   # leave it out: the same result, slower
    trainer.train()

Loss, gradients and logged metrics are those of TRL, transformers and PEFT up to the order of rounding
(tests/parity/test_cpu*.py). Where the time went, and what is done about it:

    padding                   the rows of a batch stand one after another in one sequence
    shared beginnings         what all rows begin with (the system message) is computed once a batch, what the answers
                              to one prompt begin with (a DPO pair, a group of GRPO's) once a prompt
    the head                  at the positions with a label only; its gradient is taken at once, over the logits
    the last layer            after its attention, at the positions with a label only, as the head
    casts                     a copy of the frozen weights is kept in the dtype of the products
    small operations          q, k, v are one product, gate and up are one
    page faults               `keep_memory`: large blocks are used again instead of being returned to the system
    answers                   the same layers with the adapters merged in; keys and values have their full size at once

SFTTrainer gets another collator and another compute_loss. In the other trainers one method is replaced, which returns
log-probs instead of logits (DPO and KTO take it under Liger, since TRL 1.14), and in GRPOTrainer the one that samples.
All that comes before and after is TRL's code: truncation, each loss_type, the reference. KTOTrainer does not log the
means of its logits then.
"""

import contextlib
import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

ROUND_TO = 8  # sequence lengths: few different shapes for oneDNN to compile, and little padding
HEAD_ROWS = 512  # positions whose logits are held at once, in the dtype of the products
SOFTMAX_ROWS = 8  # those of them that are fp32 at once: little enough to stay in the processor's cache
PACKED = ("cu_seqlens", "paths", "input_ids", "position_ids")  # of a batch, what FusedLlama reads
# fmt: off
# What the config must say: with other values the loss, the batches or the logs are others, or need all logits.
ALL = {
    "gradient_checkpointing": (False,), "fp16": (False,), "use_liger_kernel": (False,), "torch_compile": (False,),
    "label_smoothing_factor": (0.0,), "neftune_noise_alpha": (None,), "include_num_input_tokens_seen": ("no",),
}
SETTINGS = {
    "SFTTrainer": ALL | {
        "activation_offloading": (False,), "padding_free": (False,), "packing": (False,),
        "eval_packing": (None, False), "loss_type": ("nll", "chunked_nll"),  # one loss
    },
    "DPOTrainer": ALL | {"activation_offloading": (False,), "padding_free": (False,), "use_weighting": (False,)},
    "KTOTrainer": ALL | {"activation_offloading": (False,)},
    "GRPOTrainer": ALL | {
        "use_vllm": (False,), "use_transformers_continuous_batching": (False,), "use_transformers_paged": (False,),
        "temperature": (1.0,), "top_p": (1.0,), "top_k": (0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,),
        "generation_kwargs": (None, {}),
    },
}
# fmt: on


def speed_up(trainer: "SFTTrainer | DPOTrainer | KTOTrainer | GRPOTrainer") -> None:
    """Makes the steps of TRL's SFT, DPO, KTO or GRPO trainer faster on a CPU, for a Llama with LoRA, before train().

    Afterwards trainer.model is the ordinary PEFT model, trained. A trainer that this is not for (on a GPU, another
    architecture, quantized, ...) stays as it is, and one printed line says why. With bf16=True, TRL's default, the
    products are bf16 where the CPU has them, else fp32: emulated bf16 takes many times as long. trainer.predict, which
    gives all logits, needs a trainer without it. Raises TypeError for any other trainer.
    """
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

    kinds = [kind for kind in (SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer) if isinstance(trainer, kind)]
    if not kinds:
        got = f"{type(trainer).__name__}: train it as it is"
        raise TypeError(f"speed_up is for SFTTrainer, DPOTrainer, KTOTrainer and GRPOTrainer, got {got}")
    (kind,) = kinds
    if trainer.data_collator is pack or "_get_per_token_logps_and_entropies" in vars(trainer):
        return  # it is on already
    if reason := _why_not(trainer, kind):
        print(f"speed_up leaves this trainer as plain TRL: {reason}.")
        return
    keep_memory()
    if trainer.args.optim == "adamw_torch":
        trainer.args.optim = "adamw_torch_fused"
    llama = FusedLlama(trainer.model, product_dtype(trainer.args.bf16))
    if kind is SFTTrainer:
        trainer.data_collator, trainer.compute_loss = pack, functools.partial(_sft_loss, trainer, llama)
    elif kind is GRPOTrainer:
        if type(trainer)._generate_single_turn is kind._generate_single_turn:  # else it samples in a way of its own
            trainer._generate_single_turn = functools.partial(_sample, trainer)
        trainer._get_per_token_logps_and_entropies = functools.partial(_completion_logps, llama)
    else:
        trainer.use_liger_kernel = True  # of the trainer, not of its config: Liger itself is not called
        trainer._get_per_token_logps_and_entropies = functools.partial(_row_logps, trainer, llama, kind is DPOTrainer)


def _why_not(trainer: "SFTTrainer | DPOTrainer | KTOTrainer | GRPOTrainer", kind: type) -> str | None:
    """What speed_up is not for, in a few words; None if it is for this trainer, of TRL's class `kind`."""
    from trl import SFTTrainer, __version__
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import identity

    args = trainer.args
    if args.device.type != "cpu" or trainer.model.device.type != "cpu":
        return f"it trains on {args.device.type!r}, and speed_up is for the CPU"
    if args.world_size > 1:  # the layers go around DistributedDataParallel, and each process would learn for itself
        return f"this is one of {args.world_size} processes, and speed_up is for one"
    for name, allowed in SETTINGS[kind.__name__].items():
        if (value := getattr(args, name)) not in allowed:
            return f"{type(args).__name__} says {name}={value!r}, and speed_up is for {name}={allowed[0]!r}"
    if kind is not SFTTrainer and not hasattr(kind, "_get_per_token_logps_and_entropies"):
        return f"this is TRL {__version__}, and speed_up is for {kind.__name__} as it has been since TRL 1.14"
    losses = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
    own = any(getattr(type(trainer), name, None) is not getattr(kind, name, None) for name in losses)
    if own or callable(trainer.compute_loss_func):  # GRPOTrainer has a text there
        return "it has a loss of its own"
    if getattr(trainer, "ref_model", None) is not None:
        return "it has a ref_model, and speed_up is for a reference that is the model with its adapter off"
    texts = (DataCollatorForLanguageModeling, DataCollatorForPreference, DataCollatorForUnpairedPreference)
    if type(trainer.data_collator) not in texts and trainer.data_collator is not identity:  # GRPOTrainer's
        return f"its data collator is {type(trainer.data_collator).__name__}, not TRL's for text"
    if trainer.compute_metrics or trainer.preprocess_logits_for_metrics:
        return "compute_metrics needs all logits, and speed_up computes those with a label only"
    return _unlike_llama(trainer.model) or _unlike_lora(trainer.model)


def _unlike_llama(model: nn.Module) -> str | None:
    """What makes the layers below wrong for a model, in a few words; None for a Llama with plain LoRA or none."""
    base = _causal_lm(model)
    if type(base).__name__ != "LlamaForCausalLM":
        return f"the model is a {type(base).__name__}, and speed_up is for LlamaForCausalLM"
    config, projections = base.config, _projections(base)
    norms = [n for layer in base.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias or config.attention_dropout:
        return "its layers have biases, dropout or another activation than SiLU"
    if any(adapter.peft_type != "LORA" for adapter in getattr(model, "peft_config", {}).values()):
        return "its adapter is not LoRA"
    if any(getattr(p, "lora_variant", None) or any(getattr(p, "lora_bias", {}).values()) for p in projections):
        return "its LoRA layers are a variant (DoRA, aLoRA, lora_bias, ...)"
    linear = {type(getattr(p, "base_layer", p)) for p in projections} | {type(base.lm_head)}
    other = {type(n).__name__ for n in (*norms, base.model.norm)} | {type(base.model.embed_tokens).__name__}
    if linear != {nn.Linear} or other != {"LlamaRMSNorm", "Embedding"}:
        return "some layers are quantized, or others than the seven linear ones of each block are trained"
    if any(type(p) is not nn.Linear and not hasattr(p, "active_adapters") for p in projections):
        return "some layers are neither nn.Linear nor PEFT's"
    return None


def _unlike_lora(model: nn.Module) -> str | None:
    """What is trained that is not one LoRA adapter without dropout, in a few words; None if nothing is."""
    adapted = _adapted(model)
    names = {name for p in adapted for name in p.lora_A}
    if len(names) != 1 or any(p.merged or p.disable_adapters for p in adapted):
        return f"the model has {len(names)} LoRA adapters or a merged one, and speed_up is for one (give peft_config)"
    (name,) = names
    if dropout := max(getattr(p.lora_dropout[name], "p", 0.0) for p in adapted):
        return f"LoraConfig says lora_dropout={dropout}, and speed_up is for 0.0"
    if len({p.scaling[name] for p in adapted}) > 1:
        return "its LoRA layers have different scalings (rank_pattern or alpha_pattern)"
    lora = {id(matrix[name].weight) for p in adapted for matrix in (p.lora_A, p.lora_B)}
    if wrong := [n for n, weight in model.named_parameters() if weight.requires_grad != (id(weight) in lora)]:
        return f"speed_up is for a frozen base and a trained adapter, and {wrong[0]} is not so"
    return None


def _sft_loss(trainer, llama, model, inputs, return_outputs=False, num_items_in_batch=None):
    """SFTTrainer.compute_loss on a batch of `pack`: mean cross-entropy in nats over the step's labels; logs as TRL."""
    if inputs.pop("_prediction_loss_only", True) is False:
        raise NotImplementedError("trainer.predict gives all logits: call it on a trainer without speed_up")
    hidden = llama(inputs["logits_to_keep"], **{name: inputs[name] for name in PACKED})
    logps, entropy, is_argmax = Head.apply(hidden, llama.head_weight, inputs["labels"][1:])
    loss = -logps.sum() / (max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch)
    metrics = _log_means(trainer, {"entropy": entropy, "mean_token_accuracy": is_argmax})
    if trainer.model.training:
        trainer._total_train_tokens += int(inputs["lengths"].sum())
    metrics["num_tokens"] = [trainer._total_train_tokens]
    return (loss, {}) if return_outputs else loss


def _row_logps(trainer, llama, pairs, model, model_kwargs, input_ids, completion_mask):
    """The method of DPOTrainer (pairs: chosen rows come first) and KTOTrainer: (rows, T - 1) each, 0 outside answers.

    Of pairs, with the adapters on, for the policy, it also logs the three means of logits that TRL leaves out here.
    """
    lengths, mask = model_kwargs["attention_mask"].sum(1).tolist(), completion_mask[:, 1:].bool()
    rows = [ids[: n - 1] for ids, n in zip(input_ids.tolist(), lengths, strict=True)]  # the last token asks for nothing
    batch, places = share_prefixes(rows, [i % (len(rows) // 2) for i in range(len(rows))] if pairs else None)
    keep = [place for row, asked in zip(places, mask.tolist(), strict=True) for place in compress(row, asked)]
    hidden = llama(torch.tensor(keep, dtype=torch.long), **batch)
    logps, entropy, is_argmax = Head.apply(hidden, llama.head_weight, input_ids[:, 1:][mask])
    if pairs and not _adapted(trainer.model)[0].disable_adapters:
        mean_logit = hidden.detach().float() @ llama.head_weight.mean(0, dtype=torch.float32)
        chosen, rejected = mean_logit.split([part.sum().item() for part in mask.chunk(2)])
        means = {"logits/chosen": chosen, "logits/rejected": rejected, "mean_token_accuracy": is_argmax[: len(chosen)]}
        _log_means(trainer, means)
    return *(each.new_zeros(mask.shape).masked_scatter(mask, each) for each in (logps, entropy)), None


def _completion_logps(llama, model, input_ids, attention_mask, logits_to_keep, *_, compute_entropy=False, **__):
    """The method of GRPOTrainer: log-probs and entropies of the completions, (rows, logits_to_keep), 0 at padding."""
    mask, prompts = attention_mask[:, -logits_to_keep:].bool(), input_ids[:, :-logits_to_keep].tolist()
    rows = [ids[real][:-1].tolist() for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
    batch, places = share_prefixes(rows, prompts)
    keep = [p for place, n in zip(places, mask.sum(1).tolist(), strict=True) for p in place[len(place) - n :]]
    hidden = llama(torch.tensor(keep, dtype=torch.long), **batch)
    found = Head.apply(hidden, llama.head_weight, input_ids[:, -logits_to_keep:][mask])[:2]
    logps, entropy = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in found)
    return logps, entropy if compute_entropy else None, None


def _sample(trainer, prompt_ids, *_):
    """The method of GRPOTrainer: for each prompt the ids of one completion, its end of turn with it; no log-probs."""
    length, ends = trainer.max_completion_length, trainer.eos_token_ids
    drawn = Decoder(trainer.model).answer(prompt_ids, length, ends, trainer.temperature)
    return [ids + ends[:1] * (len(ids) < length) for ids in drawn], None


def _log_means(trainer, values: dict[str, Tensor]) -> dict[str, list]:
    """Adds the mean of each to what TRL logs next, 0 for an empty one, and returns that."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, each in values.items():
        metrics[name].append(each.mean().item() if len(each) else 0.0)
    return metrics


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
    return model.device.type == "cpu" and _unlike_llama(model) is None


def _causal_lm(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _stacks(layer: nn.Module) -> list[tuple[nn.Module, ...]]:
    """A block's seven linear layers; those with the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    return [qkv, (attention.o_proj,), gate_up, (mlp.down_proj,)]


def _projections(base: nn.Module) -> list[nn.Module]:
    return [projection for layer in base.model.layers for stack in _stacks(layer) for projection in stack]


def _adapted(model: nn.Module) -> list[nn.Module]:
    """PEFT's LoRA layers among the projections."""
    return [p for p in _projections(_causal_lm(model)) if hasattr(p, "lora_A")]


# --- Batches ----------------------------------------------------------------------------------------------------------


def pack(rows: list[dict]) -> dict[str, Tensor]:
    """SFTTrainer's collator: rows of input_ids and labels (of every token, if there are none), by `share_prefixes`.

    lengths (B,), of the rows (first: Trainer reads B off it). For the K tokens with a label that are not the first of
    their row: logits_to_keep (K,), the places before them, and labels (1 + K,), of which Trainer does not count the
    first, -100.
    """
    sequences = [row["input_ids"] for row in rows]
    batch, places = share_prefixes(sequences)
    labels = [row.get("labels", row["input_ids"])[1:] for row in rows]
    kept = [(p, y) for row, ys in zip(places, labels, strict=True) for p, y in zip(row, ys, strict=False) if y != -100]
    return {
        "lengths": torch.tensor([len(ids) for ids in sequences]),
        **batch,
        "logits_to_keep": torch.tensor([place for place, _ in kept], dtype=torch.long),
        "labels": torch.tensor([-100, *(label for _, label in kept)]),
    }


def share_prefixes(rows: Sequence[Sequence[int]], keys: Sequence | None = None) -> tuple[dict, list[list[int]]]:
    """Rows of token ids as one sequence of N tokens that holds shared beginnings once; and where each row's tokens are.

    First comes what all rows begin with; then, for each group, what its rows begin with and the rest of each of them.
    Rows with equal keys are a group; without keys each row is one. N is a multiple of ROUND_TO. Segment i, never
    empty, stands at cu_seqlens[i] .. cu_seqlens[i + 1], the last one with the padding; paths[i] are the segments that
    it sees, itself last. Returns cu_seqlens (S + 1,), paths, input_ids and position_ids (1, N); and places.
    """
    ids, positions, cu_seqlens, paths, places = [], [], [0], [], [[] for _ in rows]

    def add(numbers: Sequence[int], begin: int, path: list[int]) -> tuple[int, list[int]]:
        """Adds what rows `numbers` share from token `begin` on as a segment: where that ends in them, and its path."""
        end = common_prefix([rows[i] for i in numbers])
        if end > begin:
            path = [*path, len(paths)]
            paths.append(path)
            positions.extend(range(begin, end))
            ids.extend(rows[numbers[0]][begin:end])
            cu_seqlens.append(len(ids))
            for i in numbers:
                places[i] += range(*cu_seqlens[-2:])
        return end, path

    groups = defaultdict(list)
    for i in range(len(rows)):
        groups[i if keys is None else str(keys[i])].append(i)
    shared = add(range(len(rows)), 0, [])
    for group in groups.values():
        stem = add(group, *shared)
        for i in group:
            add([i], *stem)
    padding = [0] * (-len(ids) % ROUND_TO)
    cu_seqlens[-1] += len(padding)
    numbers = {"cu_seqlens": cu_seqlens, "input_ids": [ids + padding], "position_ids": [positions + padding]}
    return {name: torch.tensor(each) for name, each in numbers.items()} | {"paths": paths}, places


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # in alphabetic order: what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


# --- Layers -----------------------------------------------------------------------------------------------------------


class FusedLlama:
    """The forward pass of a Llama, with PEFT's own lora_A and lora_B read at each call, or merged into the weights.

    Keeps a copy of the weights in `dtype`. The residual stream stays in fp32, as under autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, merged: bool = False) -> None:
        base = _causal_lm(model)
        attention = base.model.layers[0].self_attn
        self.trunk, self.dtype, self.head_weight = base.model, dtype, base.lm_head.weight.detach().to(dtype)
        self.heads, self.kv_heads = base.config.num_attention_heads, base.config.num_key_value_heads
        self.head_dim, self.scaling, self.norm = attention.head_dim, attention.scaling, self._norm(base.model.norm)
        self.layers = []
        for layer in base.model.layers:
            norms = self._norm(layer.input_layernorm), self._norm(layer.post_attention_layernorm)
            self.layers.append((*norms, *(_Linear(stack, dtype, merged) for stack in _stacks(layer))))

    def __call__(
        self, logits_to_keep: Tensor, cu_seqlens: Tensor, paths: list, input_ids: Tensor, position_ids: Tensor
    ) -> Tensor:
        """The last norm's output (K, C) at the positions logits_to_keep (K,) of a sequence by `share_prefixes`."""
        with torch.autocast("cpu", enabled=False):  # every dtype below is chosen by hand
            attend = functools.partial(self.attend, cu_seqlens.diff().tolist(), paths)
            x, rotation = self.trunk.embed_tokens(input_ids[0]).float(), self.rotation(position_ids)  # x: (N, C)
            for layer in self.layers[:-1]:
                x = self.layer(x, rotation, layer, attend)
            return self.norm(self.layer(x, rotation, self.layers[-1], attend, logits_to_keep))

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """cos and sin (N, 1, head_dim / 2) of positions (1, N)."""
        halves = self.trunk.rotary_emb(self.trunk.norm.weight.float(), position_ids)  # the weight only says: fp32
        return tuple(half[0, :, None, : self.head_dim // 2] for half in halves)

    def layer(self, x: Tensor, rotation: tuple, layer: tuple, attend: Callable, keep: Tensor | None = None) -> Tensor:
        """One layer: x (N, C) -> (N, C), or (K, C) at the positions `keep` (K,), if nobody asks for the others.

        attend(q, k, v): q (N, heads, head_dim), k and v (N, kv_heads, head_dim) -> (N, heads * head_dim).
        """
        norm, mlp_norm, qkv, out, gate_up, down = layer
        q_k, v = qkv(norm(x)).view(len(x), -1, self.head_dim).split([self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = rotate(q_k, *rotation).split([self.heads, self.kv_heads], 1)
        mixed = attend(q, k, v)
        if keep is not None:
            x, mixed = x.index_select(0, keep), mixed.index_select(0, keep)
        x = x + out(mixed)
        gate, up = gate_up(mlp_norm(x)).chunk(2, -1)
        return x + down(silu(gate) * up)

    def attend(self, sizes: list[int], paths: list[list[int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of each segment to those on its path; a parent's queries are computed again, and dropped."""
        q, k, v = (x.split(sizes) for x in (q, k, v))
        mixed = []
        for path in paths:
            if own := sizes[path[-1]]:
                row = (torch.cat([x[i] for i in path]).transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
                out = scaled_dot_product_attention(*row, is_causal=True, scale=self.scaling, enable_gqa=True)
                mixed.append(out[0, :, -own:].transpose(0, 1))
        return torch.cat(mixed).flatten(1)

    def _norm(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        weight, eps, dtype = norm.weight.detach().float(), norm.variance_epsilon, self.dtype
        return lambda x: rms_norm(x, weight.shape, weight, eps).to(dtype)


class _Linear:
    """Linear layers with the same input as one: weights stacked, lora_A stacked, lora_B along a diagonal."""

    def __init__(self, projections: tuple[nn.Module, ...], dtype: torch.dtype, merged: bool) -> None:
        weights = [_weight(p, merged) for p in projections]
        self.weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).to(dtype)  # (out, in)
        self.projections = projections
        self.adapted = [p for p in projections if hasattr(p, "lora_A") and not merged]
        if self.adapted:
            self.name = self.adapted[0].active_adapters[0]
            self.scaling = self.adapted[0].scaling[self.name]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.adapted or self.adapted[0].disable_adapters:
            return x @ self.weight.T
        a = [p.lora_A[self.name].weight for p in self.adapted]
        none = self.weight.new_empty
        b = [p.lora_B[self.name].weight if p in self.adapted else none(p.out_features, 0) for p in self.projections]
        a, b = (a[0], b[0]) if len(b) == 1 else (torch.cat(a), torch.block_diag(*b))
        a, b = a.to(x.dtype), b.to(x.dtype)  # fp32 masters, the products in the dtype of the weight
        return torch.addmm(x @ self.weight.T, x @ a.T, b.T, alpha=self.scaling)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (N, heads, head_dim): the pair (x_i, x_{i + head_dim/2}) turned, in fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _weight(projection: nn.Module, merged: bool) -> Tensor:
    """A linear layer's frozen weight (out, in); merged: with its active adapters added."""
    weight = getattr(projection, "base_layer", projection).weight.detach()
    if merged and hasattr(projection, "lora_A") and not (projection.merged or projection.disable_adapters):
        for name in (name for name in projection.active_adapters if name in projection.lora_A):
            weight = weight + projection.get_delta_weight(name).detach().to(weight.dtype)
    return weight


class Head(torch.autograd.Function):
    """Of next tokens targets (K,), after hidden states x (K, C): log-probabilities in nats, (K,), weight (V, C) frozen.

    And, without gradients, (K,) each: the entropy there in nats, and 1.0 where the target is the likeliest token.
    d logp_target / dx = W_target - sum_v p_v W_v is taken in the forward pass, while the logits are there.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        logps, entropy, is_argmax, slopes = [], [], [], []
        for rows, own in zip(x.split(HEAD_ROWS), targets[:, None].split(HEAD_ROWS), strict=True):
            held = rows @ weight.T
            for logits, target in zip(held.split(SOFTMAX_ROWS), own.split(SOFTMAX_ROWS), strict=True):
                log_p = logits.float().log_softmax(-1)
                p = log_p.exp()
                logps.append(log_p.gather(1, target)[:, 0])
                entropy.append(-torch.linalg.vecdot(p, log_p))
                is_argmax.append((log_p.argmax(-1) == target[:, 0]).float())
                if ctx.needs_input_grad[0]:
                    logits.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))  # p - 1[target]
            if ctx.needs_input_grad[0]:
                slopes.append(held @ weight)
        ctx.save_for_backward(*([torch.cat(slopes).neg_()] if slopes else []))
        logps, entropy, is_argmax = (torch.cat(parts) for parts in (logps, entropy, is_argmax))
        ctx.mark_non_differentiable(entropy, is_argmax)
        return logps, entropy, is_argmax

    @staticmethod
    def backward(ctx, grad, *_):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None


# --- Answers ----------------------------------------------------------------------------------------------------------


class Decoder(FusedLlama):
    """A copy of a Llama's weights, active adapters merged in, that only answers; for models that it `covers`."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__(model, product_dtype(_causal_lm(model).lm_head.weight.dtype == torch.bfloat16), merged=True)

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int],
        temperature: float = 0.0, generator: torch.Generator | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The next tokens of each prompt (token ids), until one of `stop` (left out).

        At temperature 0 the likeliest, above it draws from softmax(logits / temperature), by `generator` if given.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) + max_new_tokens
        rotation = self.rotation(torch.arange(longest)[None])
        shape = (len(self.layers), 2, len(prompts), self.kv_heads, longest, self.head_dim)
        cache = torch.zeros(shape, dtype=self.dtype)  # not empty: 0 x NaN, at a hidden position, is NaN
        token = _choose(self._read(prompts, rotation, cache), temperature, generator)  # (B,)
        rows, runs, stop = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool), torch.tensor(stop)
        answers = torch.full((len(prompts), max_new_tokens), -1)
        for step in range(max_new_tokens):
            runs &= ~torch.isin(token, stop)
            answers[rows[runs], step] = token[runs]
            if not runs.any() or step + 1 == max_new_tokens:
                break
            if 2 * runs.sum() <= len(runs):  # half of the answers have ended: go on with the others alone
                rows, token, lengths, cache = rows[runs], token[runs], lengths[runs], cache[:, :, runs]
                runs = runs[runs]
            token = _choose(self._next(token, lengths + step, rotation, cache), temperature, generator)
        return [[t for t in row if t >= 0] for row in answers.tolist()]

    def _read(self, prompts: Sequence[Sequence[int]], rotation: tuple, cache: Tensor) -> Tensor:
        """Fills the cache with the prompts' keys and values; the logits (B, V) after the last token of each prompt."""
        batch, places = share_prefixes(prompts, prompts)
        sizes, places = batch["cu_seqlens"].diff().tolist(), [torch.tensor(row) for row in places]

        def attend(cached: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for to, new in zip(cached, (k.transpose(0, 1), v.transpose(0, 1)), strict=True):  # (kv_heads, N, head_dim)
                for row, where in zip(to, places, strict=True):
                    row[:, : len(where)] = new[:, where]
            return self.attend(sizes, batch["paths"], q, k, v)

        last = torch.stack([row[-1] for row in places])
        return self._run(batch["input_ids"][0], batch["position_ids"][0], rotation, cache, attend, last)

    def _next(self, token: Tensor, position: Tensor, rotation: tuple, cache: Tensor) -> Tensor:
        """The logits (B, V) after one more token a row, at its position (B,)."""
        rows, seen = torch.arange(len(token)), int(position.max()) + 1
        mask = torch.where(torch.arange(seen) <= position[:, None], 0.0, -torch.inf)[:, None, None].to(cache.dtype)

        def attend(cached: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cached
            keys[rows, :, position], values[rows, :, position] = k, v
            grouped = q.view(len(token), self.kv_heads, -1, self.head_dim)  # the queries that share a key
            scores = grouped @ keys[:, :, :seen].mT * self.scaling + mask  # (B, kv_heads, group, seen)
            return (scores.softmax(-1) @ values[:, :, :seen]).flatten(1)

        return self._run(token, position, rotation, cache, attend, rows)

    def _run(self, ids, positions, rotation, cache, attend: Callable, keep: Tensor) -> Tensor:
        """The logits (K, V) at the positions `keep` of tokens (N,); attend gets each layer's part of the cache too."""
        x, rotation = self.trunk.embed_tokens(ids).float(), tuple(half[positions] for half in rotation)
        for layer, cached in zip(self.layers, cache, strict=True):
            x = self.layer(x, rotation, layer, functools.partial(attend, cached))
        return self.norm(x[keep]) @ self.head_weight.T


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token of each row (B,) of logits (B, V): the likeliest at temperature 0, else where a draw falls."""
    if not temperature:
        return logits.argmax(-1)
    sums = (logits.float() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1)

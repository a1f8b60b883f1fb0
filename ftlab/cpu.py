"""The same LoRA step and the same answers in less time on a CPU: a plug-in for TRL's SFT, DPO, KTO and GRPO trainers.

    trainer = SFTTrainer(model, args=SFTConfig(..., gradient_checkpointing=False), peft_config=LoraConfig(...), ...)
    speed_up(trainer)                   # leave it out: the same result, slower
    trainer.train()

Loss, gradients and logged metrics are those of TRL, transformers and PEFT up to the order of rounding
(tests/parity/test_cpu.py, test_decode.py). Where the time went, and what is done about it:

    padding                   the rows of a batch stand one after another in one sequence, for attention side by side
    shared beginnings         what all rows begin with (the system message) is computed once a batch, what the answers
                              to one prompt begin with (a DPO pair, a group of GRPO's) once a prompt
    the head                  at the positions with a label only; its gradient is taken at once, over the logits
    the last layer            after its attention, at the positions with a label only, as the head
    casts                     a copy of the frozen weights is kept in the dtype of the products
    small operations          q, k, v are one product, gate and up are one
    page faults               `keep_memory`: large blocks are used again instead of being returned to the system
    answers                   the same layers with the adapters merged in; keys and values have their full size at once

SFTTrainer gets another compute_loss. In the other trainers one method is replaced, which returns log-probs instead of
logits, and in GRPOTrainer the one that samples. All else is TRL's code: batches, truncation, each loss_type, the
reference. DPOTrainer and KTOTrainer take the path of Liger: no means of logits, no token accuracy, no predict().
"""

import contextlib
import ctypes
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu

ROUND_TO = 8  # sequence lengths: few different shapes for oneDNN to compile, and little padding
HEAD_ROWS = 512  # positions whose logits are held at once, in the dtype of the products
SOFTMAX_ROWS = 8  # those of them that are fp32 at once: little enough to stay in the processor's cache
LOGPS = "_get_per_token_logps_and_entropies"  # of the trainers other than SFTTrainer
# Settings that must be TRL's defaults: else the loss, the batches or the logs are others, or need all logits.
DEFAULTS = {
    "fp16", "use_liger_kernel", "torch_compile", "label_smoothing_factor", "neftune_noise_alpha", "use_weighting",
    "activation_offloading", "padding_free", "packing", "eval_packing", "use_vllm", "generation_kwargs", "temperature",
    "top_p", "top_k", "min_p", "repetition_penalty", "use_transformers_continuous_batching",
}  # fmt: skip


def speed_up(trainer) -> None:
    """Makes the steps of TRL's SFT, DPO, KTO or GRPO trainer faster on a CPU, for a Llama with LoRA, before train().

    Afterwards trainer.model is the ordinary PEFT model, trained. A trainer that this is not for (on a GPU, another
    architecture, quantized, ...) stays as it is, and one printed line says why. With bf16=True, TRL's default, the
    products are bf16 where the CPU has them, else fp32: emulated bf16 takes many times as long.
    """
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

    kind = next((k for k in (SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer) if isinstance(trainer, k)), None)
    if reason := next((text for holds, text in _why_not(trainer, kind) if holds), None):
        print(f"speed_up leaves this trainer as it is: {reason}.")
        return
    keep_memory()
    llama = FusedLlama(trainer.model, product_dtype(trainer.args.bf16))
    if kind is SFTTrainer:
        trainer.compute_loss = partial(_sft_loss, trainer, llama)
    elif kind is GRPOTrainer:
        setattr(trainer, LOGPS, partial(_grpo_logps, llama))
        if getattr(trainer._generate_single_turn, "__func__", None) is kind._generate_single_turn:
            trainer._generate_single_turn = partial(_sample, trainer)
    else:
        setattr(trainer, LOGPS, partial(_row_logps, llama, kind is DPOTrainer))
        trainer.use_liger_kernel = True  # of the trainer, not of its config: Liger itself is not called


def _why_not(trainer, kind: type | None) -> list[tuple]:
    """Pairs (does it hold of this trainer, of TRL's class `kind`; the reason to print): what speed_up cannot do."""
    args, model = trainer.args, trainer.model
    changed = [f.name for f in dataclasses.fields(args) if f.name in DEFAULTS and getattr(args, f.name) != f.default]
    wrong = {"gradient_checkpointing": True, "loss_type": "dft"}
    changed += [name for name in wrong if getattr(args, name, None) == wrong[name]]
    settings = ", ".join(f"{name}={getattr(args, name)!r}" for name in changed)
    losses, ours = ("compute_loss", "_compute_loss", LOGPS), (_sft_loss, _row_logps, _grpo_logps)
    own_loss = any(getattr(getattr(trainer, n, None), "__func__", None) is not getattr(kind, n, None) for n in losses)
    adapted = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "active_adapters")]
    names = {name for p in adapted for name in p.lora_A}
    dropout = max((getattr(d, "p", 0.0) for p in adapted for d in p.lora_dropout.values()), default=0.0)
    lora = {id(weight) for p in adapted for matrix in (p.lora_A, p.lora_B) for weight in matrix.parameters()}
    unlike = [n for n, weight in model.named_parameters() if weight.requires_grad != (id(weight) in lora)]
    return [
        (any(getattr(getattr(trainer, name, 0), "func", 0) in ours for name in losses), "it is fast already"),
        (kind is None, f"it is a {type(trainer).__name__}, and speed_up is for TRL's SFT, DPO, KTO and GRPO trainers"),
        ({args.device.type, model.device.type} != {"cpu"}, f"it trains on {args.device.type!r}, not on the CPU"),
        (args.world_size > 1, f"this is one of {args.world_size} processes, and speed_up is for one"),
        (changed, f"{type(args).__name__} says {settings}"),
        (own_loss or callable(trainer.compute_loss_func), "it has a loss that is not TRL's"),  # GRPO's func is a text
        (getattr(trainer, "ref_model", None) is not None, "its reference is not the model with its adapter off"),
        (not trainer.data_collator.__module__.startswith("trl."), "its data collator is not TRL's"),
        (trainer.compute_metrics or trainer.preprocess_logits_for_metrics, "compute_metrics needs all logits"),
        *_unlike_llama(model),
        (len(names) != 1, f"the model has {len(names)} LoRA adapters, and speed_up is for one (give peft_config)"),
        (any(p.merged for p in adapted), "its adapter is merged"),
        (dropout, f"LoraConfig says lora_dropout={dropout}, and speed_up is for 0.0"),
        (len({s for p in adapted for s in p.scaling.values()}) > 1, "its LoRA layers have different scalings"),
        (unlike, f"speed_up is for a frozen base and a trained adapter, and {unlike[:1]} is frozen or trained instead"),
    ]


def _unlike_llama(model: nn.Module) -> list[tuple]:
    """What makes the layers below, a Llama's with plain LoRA or none, wrong for a model; as in `_why_not`."""
    base = getattr(model, "get_base_model", lambda: model)()  # PEFT's, or the model itself
    if type(base).__name__ != "LlamaForCausalLM":
        return [(True, f"the model is a {type(base).__name__}, and speed_up is for LlamaForCausalLM")]
    config = base.config
    projections = [p for layer in base.model.layers for stack in _stacks(layer) for p in stack]
    linear = {type(p.base_layer if hasattr(p, "active_adapters") else p) for p in projections}
    other = {type(m).__name__ for n, m in base.named_modules() if n.endswith(("norm", "embed_tokens"))}
    replaced = linear | {type(base.lm_head)} != {nn.Linear} or other != {"LlamaRMSNorm", "Embedding"}
    odd = config.hidden_act != "silu" or config.attention_bias or config.mlp_bias or config.attention_dropout
    methods = {adapter.peft_type for adapter in getattr(model, "peft_config", {}).values()}
    variant = any(getattr(p, "lora_variant", None) or any(getattr(p, "lora_bias", {}).values()) for p in projections)
    return [
        (odd, "its layers have biases, dropout or another activation than SiLU"),
        (config.rope_parameters.get("rope_type") in ("dynamic", "longrope"), "its rotation depends on the length"),
        (methods - {"LORA"} or variant, "its adapter is not plain LoRA (another method, DoRA, aLoRA, lora_bias, ...)"),
        (replaced, "some layers are quantized, or others than the seven linear ones of each block are trained"),
    ]


def _sft_loss(trainer, llama, model, inputs, return_outputs=False, num_items_in_batch=None):
    """SFTTrainer.compute_loss: mean cross-entropy in nats over the step's labels; logs as TRL."""
    if inputs.get("_prediction_loss_only") is False:  # trainer.predict wants all logits
        return type(trainer).compute_loss(trainer, model, inputs, return_outputs, num_items_in_batch)
    read, targets = inputs["attention_mask"].bool(), pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    asked = targets != -100
    logps, entropy, is_argmax = (each[asked] for each in score_tokens(llama, inputs["input_ids"], read, targets, asked))
    loss = -logps.sum() / (max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, each in {"entropy": entropy, "mean_token_accuracy": is_argmax}.items():
        metrics[name].append(each.mean().item() if len(each) else 0.0)
    if trainer.model.training:
        trainer._total_train_tokens += read.sum().item()
    metrics["num_tokens"] = [trainer._total_train_tokens]
    return (loss, {}) if return_outputs else loss


def _row_logps(llama, pairs, model, model_kwargs, input_ids, completion_mask):
    """The method of DPOTrainer (pairs: chosen rows come first) and KTOTrainer: (rows, T - 1), 0 outside answers."""
    keys = [*range(len(input_ids) // 2)] * 2 if pairs else None
    read, answers = model_kwargs["attention_mask"][:, 1:].bool(), completion_mask[:, 1:].bool()  # not the last token
    return *score_tokens(llama, input_ids[:, :-1], read, input_ids[:, 1:], answers, keys)[:2], None


def _grpo_logps(llama, model, input_ids, attention_mask, logits_to_keep, *_, compute_entropy=False, **__):
    """The method of GRPOTrainer: log-probs and entropies of the completions, (rows, logits_to_keep), 0 at padding."""
    keys = [tuple(prompt) for prompt in input_ids[:, :-logits_to_keep].tolist()]
    real = attention_mask.bool()
    read, answers = real[:, :-1] & real[:, 1:], real[:, 1:].clone()
    answers[:, :-logits_to_keep] = False
    found = score_tokens(llama, input_ids[:, :-1], read, input_ids[:, 1:], answers, keys)
    logps, entropy, _ = (each[:, -logits_to_keep:] for each in found)
    return logps, entropy if compute_entropy else None, None


def score_tokens(llama, input_ids, read, targets, asked, keys=None) -> list[Tensor]:
    """What `Head` says of targets, the tokens that come after input_ids, where they are asked for; elsewhere 0.

    All are (rows, T). Of input_ids those are read where `read` is True. keys: see `share_prefixes`.
    """
    rows = [ids[seen].tolist() for ids, seen in zip(input_ids, read, strict=True)]
    ids, positions, places = share_prefixes(rows, keys)
    keep = torch.zeros_like(input_ids).masked_scatter(read, torch.tensor([*chain(*places)]))[asked]
    attends = [partial(llama.attend, *side_by_side(places, len(ids)))] * len(llama.layers)
    hidden = llama.hidden(ids, positions, llama.rotation(int(positions.max()) + 1), attends, keep)
    found = Head.apply(hidden, llama.head_weight, targets[asked])
    return [each.new_zeros(asked.shape).masked_scatter(asked, each) for each in found]


def _sample(trainer, prompt_ids, *_):
    """The method of GRPOTrainer: for each prompt the ids of one completion, its end token with it; no log-probs."""
    length, ends = trainer.max_completion_length, trainer.eos_token_ids
    return Decoder(trainer.model).answer(prompt_ids, length, ends, trainer.temperature, keep_stop=True), None


def share_prefixes(rows: Sequence[Sequence[int]], keys: Sequence[Hashable] | None = None) -> tuple:
    """Rows of token ids as one sequence of N tokens that holds shared beginnings once; and where each row's tokens are.

    First what all rows begin with; then, for each group (rows with equal keys, or each row), what its rows begin with
    and the rest of each. N is a multiple of ROUND_TO. Returns ids and positions, (N,) each, and each row's places.
    """
    ids, positions, places = [], [], [[] for _ in rows]

    def add(numbers: Sequence[int], begin: int) -> int:
        """Adds what rows `numbers` share from token `begin` on: where that ends in them."""
        first, last = (choose(rows[i] for i in numbers) for choose in (min, max))  # what these two share, all share
        end = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        positions.extend(range(begin, end))
        for i in numbers:
            places[i] += range(len(ids), len(positions))
        ids.extend(first[begin:end])
        return end

    groups = defaultdict(list)
    for i in range(len(rows)):
        groups[keys[i] if keys else i].append(i)
    shared = add(range(len(rows)), 0)
    for group in groups.values():
        stem = add(group, shared)
        for i in group:
            add([i], stem)
    padding = [0] * (-len(ids) % ROUND_TO)
    return *torch.tensor([ids + padding, positions + padding]), places


def side_by_side(places: Sequence[Sequence[int]], n: int) -> tuple[Tensor, Tensor]:
    """Rows of places among n tokens as a tensor (R, T), filled up with 0; and where in it, flattened, each token is."""
    table = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in places], batch_first=True)
    found = torch.zeros(n, dtype=torch.long)
    for i, row in enumerate(places):
        found[row] = torch.arange(len(row)) + i * table.shape[1]
    return table, found


def covers(model: nn.Module) -> bool:
    """Whether `Decoder` can stand in for model.generate: a plain Llama on a CPU, unquantized, LoRA adapters or none."""
    return model.device.type == "cpu" and not any(holds for holds, _ in _unlike_llama(model))


def product_dtype(bf16: bool) -> torch.dtype:
    """bf16 if it is asked for and this CPU multiplies it natively, else fp32: emulated bf16 is slower than fp32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if bf16 and native else torch.float32


def keep_memory() -> None:
    """Tells malloc to keep freed blocks for the next step: a new one of the system costs a page fault every 4 kB."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than under glibc nothing happens
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _stacks(layer: nn.Module) -> list[tuple[nn.Module, ...]]:
    """A block's seven linear layers; those with the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    return [qkv, (attention.o_proj,), gate_up, (mlp.down_proj,)]


class FusedLlama:
    """The forward pass of a Llama, with PEFT's own lora_A and lora_B read at each call, or merged into the weights.

    Keeps a copy of the weights in `dtype`. The residual stream stays in fp32, as under autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, merged: bool = False) -> None:
        base = getattr(model, "get_base_model", lambda: model)()
        attention = base.model.layers[0].self_attn
        self.trunk, self.dtype, self.head_weight = base.model, dtype, base.lm_head.weight.detach().to(dtype)
        self.heads, self.kv_heads = base.config.num_attention_heads, base.config.num_key_value_heads
        self.head_dim, self.scaling, self.norm = attention.head_dim, attention.scaling, self._norm(base.model.norm)
        self.layers = []
        for layer in base.model.layers:
            norms = self._norm(layer.input_layernorm), self._norm(layer.post_attention_layernorm)
            self.layers.append((*norms, *(_Linear(stack, dtype, merged) for stack in _stacks(layer))))

    def _norm(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        weight, eps, dtype = norm.weight.detach().float(), norm.variance_epsilon, self.dtype
        return lambda x: rms_norm(x, weight.shape, weight, eps).to(dtype)

    def rotation(self, length: int) -> tuple[Tensor, ...]:
        """cos and sin (length, 1, head_dim / 2) of the first positions."""
        weight, positions = self.trunk.norm.weight.float(), torch.arange(length)  # the weight only says: fp32
        return tuple(half[0, :, None, : self.head_dim // 2] for half in self.trunk.rotary_emb(weight, positions[None]))

    def hidden(self, ids: Tensor, positions: Tensor, rotation: tuple, attends: Sequence, keep=None) -> Tensor:
        """The last norm's output (K, C) at the places keep (K,), all by default, of tokens ids (N,) at positions (N,).

        attends, one a layer: q (N, heads, head_dim), k and v (N, kv_heads, head_dim) -> (N, heads * head_dim).
        """
        with torch.autocast("cpu", enabled=False):  # every dtype below is chosen by hand
            x, (cos, sin) = self.trunk.embed_tokens(ids).float(), (half[positions] for half in rotation)  # x: (N, C)
            for layer, attend in zip(self.layers, attends, strict=True):
                norm, mlp_norm, qkv, out, gate_up, down = layer
                heads = qkv(norm(x)).view(len(x), -1, self.head_dim)
                q_k, v = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
                a, b = q_k.float().chunk(2, -1)  # the pair (x_i, x_{i + head_dim/2}) is turned, in fp32
                q_k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)  # and stays in fp32; v does not
                mixed = attend(*q_k.split([self.heads, self.kv_heads], 1), v).to(self.dtype)
                if keep is not None and layer is self.layers[-1]:  # nobody asks for the others
                    x, mixed = x.index_select(0, keep), mixed.index_select(0, keep)
                x = x + out(mixed)
                gate, up = gate_up(mlp_norm(x)).chunk(2, -1)
                x = x + down(silu(gate) * up)
            return self.norm(x)

    def attend(self, table: Tensor, found: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention in each row of `side_by_side`, what rows share kept once; in fp32: bf16 is slower here."""
        rows = (x.index_select(0, table.flatten()).unflatten(0, table.shape).transpose(1, 2) for x in (q, k, v.float()))
        mixed = scaled_dot_product_attention(*rows, is_causal=True, scale=self.scaling, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, found)


class _Linear:
    """Linear layers with the same input as one: weights stacked, lora_A stacked, lora_B along a diagonal."""

    def __init__(self, projections: tuple[nn.Module, ...], dtype: torch.dtype, merged: bool) -> None:
        weights = []
        for p in projections:
            weights.append(getattr(p, "base_layer", p).weight.detach().to(dtype))
            if merged and hasattr(p, "lora_A") and not (p.merged or p.disable_adapters):
                for name in (name for name in p.active_adapters if name in p.lora_A):
                    weights[-1] = weights[-1] + p.get_delta_weight(name).detach().to(dtype)
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # (out, in)
        self.projections = projections
        self.adapted = [p for p in projections if hasattr(p, "lora_A") and not merged]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.adapted or self.adapted[0].disable_adapters:
            return x @ self.weight.T
        (name,), (scaling,) = self.adapted[0].active_adapters, self.adapted[0].scaling.values()
        none = self.weight.new_empty
        a = torch.cat([p.lora_A[name].weight for p in self.adapted])
        b = [p.lora_B[name].weight if p in self.adapted else none(p.out_features, 0) for p in self.projections]
        a, b = a.to(x.dtype), torch.block_diag(*b).to(x.dtype)  # fp32 masters, the products in the weight's dtype
        return torch.addmm(x @ self.weight.T, x @ a.T, b.T, alpha=scaling)


class Head(torch.autograd.Function):
    """Log-probabilities (K,), in nats, of the next tokens targets (K,), after hidden states x (K, C); weight (V, C).

    weight is frozen. And, without gradients, (K,) each: the entropy in nats; 1.0 where target is the likeliest token.
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


class Decoder(FusedLlama):
    """A copy of a Llama's weights, active adapters merged in, that only answers; for models that it `covers`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, product_dtype(model.lm_head.weight.dtype == torch.bfloat16), merged=True)

    @torch.inference_mode()
    def answer(self, prompts, max_new_tokens: int, stop, temperature=0.0, generator=None, keep_stop=False):
        """The next tokens of each of prompts, lists of ids, until `stop`, an id or several, kept with keep_stop.

        At temperature 0 the likeliest, above it draws from softmax(logits / temperature), by `generator` if given.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) + max_new_tokens
        rotation = self.rotation(longest)
        shape = (len(self.layers), 2, len(prompts), self.kv_heads, longest, self.head_dim)
        cache = torch.zeros(shape, dtype=self.dtype)  # not empty: 0 x NaN, at a hidden position, is NaN
        hidden = self.read(prompts, rotation, cache)
        rows, runs, stop = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool), torch.tensor(stop)
        answers = torch.full((len(prompts), max_new_tokens), -1)
        for step in range(max_new_tokens):
            token = _choose(hidden @ self.head_weight.T, temperature, generator)  # (B,)
            goes_on = runs & ~torch.isin(token, stop)
            written, runs = runs if keep_stop else goes_on, goes_on
            answers[rows[written], step] = token[written]
            if not runs.any() or step + 1 == max_new_tokens:
                break
            if 2 * runs.sum() <= len(runs):  # half of the answers have ended: go on with the others alone
                rows, token, lengths, cache = rows[runs], token[runs], lengths[runs], cache[:, :, runs]
                runs = runs[runs]
            hidden = self._next(token, lengths + step, rotation, cache)
        return [[t for t in row if t >= 0] for row in answers.tolist()]

    def read(self, prompts: Sequence[Sequence[int]], rotation: tuple, cache: Tensor) -> Tensor:
        """Fills the cache with the prompts' keys and values; the hidden states (B, C) at each prompt's last token."""
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # equal ones once
        which = [numbers[tuple(prompt)] for prompt in prompts]
        ids, positions, places = share_prefixes([*numbers])
        table, found = side_by_side(places, len(ids))

        def attend(cached: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cached[:, :, :, : table.shape[1]] = torch.stack([k.to(v.dtype), v])[:, table[which]].transpose(2, 3)
            return self.attend(table, found, q, k, v)

        last = torch.tensor([row[-1] for row in places])[which]
        return self.hidden(ids, positions, rotation, [partial(attend, cached) for cached in cache], last)

    def _next(self, token: Tensor, position: Tensor, rotation: tuple, cache: Tensor) -> Tensor:
        """The hidden states (B, C) at one more token a row, at its position (B,)."""
        rows, seen = torch.arange(len(token)), int(position.max()) + 1
        mask = torch.where(torch.arange(seen) <= position[:, None], 0.0, -torch.inf)[:, None, None].to(cache.dtype)

        def attend(cached: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cached
            keys[rows, :, position], values[rows, :, position] = k.to(v.dtype), v
            grouped = q.to(v.dtype).view(len(token), self.kv_heads, -1, self.head_dim)  # the queries that share a key
            scores = grouped @ keys[:, :, :seen].mT * self.scaling + mask  # (B, kv_heads, group, seen)
            return (scores.softmax(-1) @ values[:, :, :seen]).flatten(1)

        return self.hidden(token, position, rotation, [partial(attend, cached) for cached in cache])


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token of each row (B,) of logits (B, V): the likeliest at temperature 0, else where a draw falls."""
    if not temperature:
        return logits.argmax(-1)
    sums = (logits.float() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1)

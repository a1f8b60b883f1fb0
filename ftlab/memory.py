"""Predict the peak bytes of a training step, and measure them: `estimate(architecture, recipe)` beside `measure(...)`.

    llama = architectures()["Llama-3-8B"]
    estimate(llama, Recipe(quantization="nf4-double", gradient_checkpointing=True)).peak_bytes

Memory is not one number: it rises and falls within a step. Each phase (load, forward, backward, step) is described by
its highest moment, each moment by the bytes of each kind, and the peak is the *maximum over the moments*, never a sum
of things that do not live at the same time. The formulas follow what transformers, PEFT, TRL, bitsandbytes and autocast
really allocate, which differs from the papers' accounting (`states`) in ways that the docstrings tell.

Symbols, in every docstring: n = batch * length tokens, d = hidden_size, q = heads * head_dim, k = kv_heads * head_dim,
f = intermediate_size, V = vocab_size, L layers; R = bytes per number of the residual stream (that of the embedding),
c = bytes per number of a matrix product (2 under autocast), w = bytes per number that a linear layer gives out.

How far off it is: data/results/memory_error.json, made by data/results/memory_error.py. Not counted: the CUDA context
(0.3-0.6 GB), cuBLAS workspaces, and what the caching allocator reserves but does not use; a GPU's `usable` share in
data/gpus/gpus.json allows for them.

References: Korthikanti et al. 2022, arXiv:2205.05198 (activations per layer); QLoRA, arXiv:2305.14314 (NF4, double
quantization); ZeRO, arXiv:1910.02054 (16 bytes per parameter, sharding).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from ftlab.pipeline.recipe import ALL_LINEAR, Recipe

_HERE = Path(__file__).resolve().parent
_DATA = next(path for path in (_HERE.parent / "data", _HERE / "_data") if path.is_dir())  # repository, or wheel

KINDS = ("weights", "constants", "adapters", "gradients", "optimizer", "casts", "activations", "loss", "temporary")
PHASES = ("load", "forward", "backward", "step")
CHUNK = 256  # tokens per chunk of TRL's chunked loss


@dataclass(frozen=True)
class Architecture:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Names are transformers'."""

    name: str
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k and v only (Qwen2)
    qk_norm: bool

    def __post_init__(self) -> None:
        _check_literals(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}: got {value!r}, wanted a whole number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}, wanted a divisor of {self.num_attention_heads}"
            )
        if self.qk_norm != (self.model_type == "qwen3") or self.attention_bias != (self.model_type == "qwen2"):
            raise ValueError(f"qk_norm belongs to qwen3 and attention_bias to qwen2, got {self.model_type!r}")

    @classmethod
    def from_config(cls, config, name: str = "") -> "Architecture":
        """The architecture of a transformers config, e.g. AutoConfig.from_pretrained(folder) or model.config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kind = config.model_type
        extras = {"head_dim": head_dim, "attention_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}
        same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        fields = {field: getattr(config, field) for field in (*same, "vocab_size", "tie_word_embeddings")}
        return cls(name or kind, kind, **fields, **extras)

    def config(self):
        """The transformers config, without a sliding window: rows are taken to be shorter than one."""
        from transformers import AutoConfig

        skip = ("name", "model_type", "attention_bias", "qk_norm")
        fields = {field: value for field, value in dataclasses.asdict(self).items() if field not in skip}
        config = AutoConfig.for_model(self.model_type, **fields)
        if hasattr(config, "sliding_window"):
            config.sliding_window = None
        return config

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the seven linear layers of a block."""
        d, f, hd = self.hidden_size, self.intermediate_size, self.head_dim
        q, k = self.num_attention_heads * hd, self.num_key_value_heads * hd
        return {
            "q_proj": (d, q),
            "k_proj": (d, k),
            "v_proj": (d, k),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }

    @property
    def linear_params(self) -> int:
        """Weights of all linear layers but the head: what bitsandbytes quantizes."""
        return self.num_hidden_layers * sum(n_in * n_out for n_in, n_out in self.linears.values())

    @property
    def small_params(self) -> int:
        """Norms, and biases of q, k, v: never quantized."""
        per_layer = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.attention_bias:
            per_layer += sum(self.linears[name][1] for name in ("q_proj", "k_proj", "v_proj"))
        return self.num_hidden_layers * per_layer + self.hidden_size

    @property
    def table_params(self) -> int:
        """The embedding, and the head where it is not the same matrix."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def params(self) -> int:
        return self.linear_params + self.small_params + self.table_params

    def lora_params(self, r: int, target_modules: tuple[str, ...] = ALL_LINEAR) -> int:
        """r * (in + out) for each adapted layer."""
        return self.num_hidden_layers * r * sum(sum(self.linears[name]) for name in target_modules)


def architectures() -> dict[str, Architecture]:
    """The architectures in data/architectures/architectures.json, by name."""
    rows = json.loads((_DATA / "architectures" / "architectures.json").read_text(encoding="utf-8"))
    return {row["name"]: Architecture(**{k: v for k, v in row.items() if k != "total_params"}) for row in rows}


@dataclass(frozen=True)
class Setup:
    """What decides the memory and is not in a Recipe. The defaults are those of ftlab.pipeline.train on one GPU.

    loss: "chunked" is TRL's default, "full" its loss_type="nll" (all logits, and their entropy), "fused" Liger's.
    padded: a batch with padding; sdpa then repeats keys and values and holds a mask per layer.
    weights: dtype in which unquantized weights are held; "auto" is fp32 for full fine-tuning, else that of precision.
    sharding, with gpus > 1: "ddp" copies all on each GPU, "fsdp" gives each its share of weights, gradients and states.

    Raises ValueError for a value that is not allowed, saying which are.
    """

    method: Literal["sft", "dpo", "orpo", "kto", "ppo"] = "sft"
    loss: Literal["chunked", "full", "fused"] = "chunked"
    attention: Literal["sdpa", "eager"] = "sdpa"
    padded: bool = False
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    gpus: int = 1
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        _check_literals(self)
        if isinstance(self.gpus, bool) or not isinstance(self.gpus, int) or self.gpus < 1:
            raise ValueError(f"gpus: got {self.gpus!r}, wanted a whole number above 0")


@dataclass(frozen=True)
class Moment:
    """The bytes of each kind that live at one moment."""

    where: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """The highest moment of each phase; the peak is the highest of them.

    reserved_bytes: what PyTorch's allocator took from the GPU for it (measured on CUDA only).
    paged_bytes: optimizer states in unified memory, which the driver may move to the host: not part of the peak.
    """

    moments: dict[str, Moment]
    reserved_bytes: int | None = None
    paged_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return max(moment.total for moment in self.moments.values())

    @property
    def peak_phase(self) -> str:
        return max(self.moments, key=lambda phase: self.moments[phase].total)

    def fits(self, gpu: "Gpu") -> bool:
        return self.peak_bytes <= gpu.usable_bytes


# --- the accounting of the papers -------------------------------------------------------------------------------------


def states(architecture: Architecture, recipe: Recipe) -> int:
    """Bytes of weights, gradients and Adam states by the papers' rule: 16 per trained parameter, 2 per frozen one.

    16 = 2 + 2 (16-bit weight and gradient) + 12 (fp32 copy and two moments), or 4 + 4 + 8 with fp32 weights. Frozen
    linear layers take 1 byte in int8, 4.5 bits in NF4 (4 + one fp32 per 64), 4 + 8/64 + 32/(64*256) = 4.126953125 bits
    with double quantization. No activations, no temporaries, and no upcasts: a floor to compare with, not a prediction.
    """
    if recipe.r == 0:
        return 16 * architecture.params
    bits = {"none": 16, "int8": 8, "nf4": 4 + 32 / 64, "nf4-double": 4 + 8 / 64 + 32 / (64 * 256)}[recipe.quantization]
    frozen = architecture.linear_params * bits / 8 + 2 * (architecture.table_params + architecture.small_params)
    return round(frozen) + 16 * architecture.lora_params(recipe.r, recipe.target_modules)


@dataclass(frozen=True)
class Role:
    """A model that a method holds. shared: the policy's own weights with its adapter switched off, so no bytes."""

    name: str
    trained: bool
    shared: bool = False


def roles(method: str, lora: bool) -> tuple[Role, ...]:
    """The models that are really in memory while training.

    PPO has four: policy, reference, reward model and value model, of which two are trained. DPO and KTO have two; with
    LoRA the reference is the base itself (TRL: a PEFT model and ref_model=None). ORPO and SFT have one.
    """
    reference = Role("reference", trained=False, shared=lora)
    others = {
        "sft": (),
        "orpo": (),
        "dpo": (reference,),
        "kto": (reference,),
        "ppo": (reference, Role("reward", trained=False), Role("value", trained=True)),
    }
    if method not in others:
        raise ValueError(f"method: got {method!r}, wanted one of {tuple(others)}")
    return (Role("policy", trained=True), *others[method])


# --- the estimate -----------------------------------------------------------------------------------------------------


def estimate(architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> Memory:
    """The predicted bytes of one training step on a GPU, per phase and kind; batch and length are the recipe's.

    Every row is taken to be max_length tokens long. method "sft" is measured (see the module's docstring); the others
    add the models of `roles`, frozen ones in 16 bits, and the logits that their losses need; they are derived, not
    measured. Raises ValueError for settings that do not go together.
    """
    setup = setup or Setup()
    p = _plan(architecture, recipe, setup)
    static = _static(p)
    moments = [
        ("load", "all loaded", {}),
        *_forward_moments(p),
        *_backward_moments(p),
        ("step", "optimizer step", {"gradients": _gradients(p), "temporary": _step_temporary(p)}),
    ]
    highest: dict[str, Moment] = {}
    for phase, where, kinds in moments:
        held = {kind: round(static.get(kind, 0) + kinds.get(kind, 0)) for kind in KINDS}
        moment = Moment(where, held)
        if phase not in highest or moment.total > highest[phase].total:
            highest[phase] = moment
    return Memory(highest, paged_bytes=_optimizer_bytes(p)[1])


@dataclass(frozen=True)
class _Plan:
    """Every decision about dtypes, once. Byte counts: `held` of unquantized weights, `R`, `c` and `w` of the module."""

    a: Architecture
    recipe: Recipe
    setup: Setup
    rows: int  # of one forward pass: twice the batch for pairs
    amp: bool
    held: int
    R: int
    c: int
    w: int
    adapter: int

    @property
    def full(self) -> bool:
        return self.recipe.r == 0

    @property
    def quantized(self) -> bool:
        return self.recipe.quantization != "none"

    @property
    def checkpointed(self) -> bool:
        return self.recipe.gradient_checkpointing

    @property
    def accumulates(self) -> bool:
        return self.recipe.gradient_accumulation_steps > 1

    @property
    def n(self) -> int:
        return self.rows * self.recipe.max_length

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.a.linears) if self.full else self.recipe.target_modules

    @property
    def shards(self) -> int:
        return self.setup.gpus if self.setup.sharding == "fsdp" else 1


def _plan(architecture: Architecture, recipe: Recipe, setup: Setup) -> _Plan:
    """Dtypes as the libraries choose them.

    Full fine-tuning trains fp32 weights under autocast. LoRA loads 16-bit weights and keeps fp32 adapters (PEFT's
    autocast_adapter_dtype). Quantized: prepare_model_for_kbit_training turns embedding, head and norms into fp32, so
    the residual stream is fp32 and bitsandbytes' layers answer in fp32 (w = 4); TRL makes those adapters bf16.
    """
    unknown = set(recipe.target_modules) - set(architecture.linears)
    if recipe.r and unknown:
        raise ValueError(f"target_modules: got {sorted(unknown)}, wanted some of {tuple(architecture.linears)}")
    if recipe.fast or recipe.engine != "trl":
        raise ValueError("engine: the estimate is of engine 'trl' with fast: false; the others have other layers")
    amp = recipe.precision != "fp32"
    quantized = recipe.quantization != "none"
    if quantized and not amp:
        raise ValueError("precision: got 'fp32', wanted 'auto', 'bf16' or 'fp16' with a quantized model")
    auto = 4 if recipe.r == 0 or not amp else 2
    held = {"auto": auto, "fp32": 4, "bf16": 2}[setup.weights]
    if held == 2 and (recipe.r == 0 or not amp):
        raise ValueError("weights: got 'bf16', wanted 'fp32' or 'auto' for full fine-tuning and for precision fp32")
    rows = recipe.batch_size * (2 if setup.method in ("dpo", "orpo") else 1)
    R = 4 if quantized else held
    return _Plan(
        architecture,
        recipe,
        setup,
        rows,
        amp,
        held,
        R=R,
        c=2 if amp else 4,
        w=4 if quantized or not amp else 2,
        adapter=2 if quantized else 4,
    )


# what is held all the time


def _static(p: _Plan) -> dict[str, int]:
    """Weights, constants, adapters and optimizer states of all roles, divided by the shards; DDP adds its buckets.

    DDP reduces gradients in buckets of their own, as large as all gradients (gradient_as_bucket_view=False).
    """
    frozen = sum(not (role.trained or role.shared) for role in roles(p.setup.method, not p.full))
    weights = _weight_bytes(p) + (2 * frozen + 4 * _value_models(p)) * p.a.params
    held = {
        "weights": weights,
        "constants": _constant_bytes(p),
        "adapters": _adapter_params(p) * p.adapter,
        "optimizer": _optimizer_bytes(p)[0],
    }
    held = {kind: size / p.shards for kind, size in held.items()}
    if p.setup.gpus > 1 and p.setup.sharding == "ddp":
        held["temporary"] = _gradients(p)
    return held


def _value_models(p: _Plan) -> int:
    """PPO's value model: one more model trained in full, as TRL does it even when the policy has an adapter."""
    return sum(role.trained for role in roles(p.setup.method, not p.full)) - 1


def _weight_bytes(p: _Plan) -> int:
    """held * params; quantized: linear layers 1 byte (int8) or half a byte (NF4), all the rest 4 (kbit training)."""
    if not p.quantized:
        return p.held * p.a.params
    linear = p.a.linear_params if p.recipe.quantization == "int8" else p.a.linear_params // 2
    return linear + 4 * (p.a.table_params + p.a.small_params)


def _constant_bytes(p: _Plan) -> int:
    """int8: one fp32 per row. NF4: one fp32 per 64 weights; double: one byte per 64, one fp32 per 256 of those.

    Each NF4 matrix also carries its own table of 16 levels, with double quantization a second one of 256.
    """
    total = 0
    for n_in, n_out in p.a.linears.values():
        blocks = -(-n_in * n_out // 64)
        total += {
            "none": 0,
            "int8": 4 * n_out,
            "nf4": 4 * blocks + 64,
            "nf4-double": blocks + 4 * -(-blocks // 256) + 64 + 1024,
        }[p.recipe.quantization]
    return p.a.num_hidden_layers * total


def _adapter_params(p: _Plan) -> int:
    return p.a.lora_params(p.recipe.r, p.recipe.target_modules) if p.recipe.r else 0


def _trained(p: _Plan) -> list[tuple[int, int, int]]:
    """(numbers, bytes per number, how many such tensors) of all that the optimizer updates."""
    a, layers = p.a, p.a.num_hidden_layers
    full = [(n_in * n_out, 4, layers) for n_in, n_out in a.linears.values()]
    full += [(a.hidden_size, 4, 2 * layers + 1), (a.vocab_size * a.hidden_size, 4, 1 if a.tie_word_embeddings else 2)]
    full += [(a.head_dim, 4, 2 * layers)] if a.qk_norm else []
    full += [(a.linears[m][1], 4, layers) for m in ("q_proj", "k_proj", "v_proj")] if a.attention_bias else []
    if p.full:
        return full * (1 + _value_models(p))
    r = p.recipe.r
    lora = [(r * side, p.adapter, layers) for name in p.targets for side in a.linears[name]]
    return lora + full * _value_models(p)


def _gradients(p: _Plan) -> int:
    """One number of the parameter's own dtype per trained parameter."""
    return sum(numbers * size * count for numbers, size, count in _trained(p)) // p.shards


def _optimizer_bytes(p: _Plan) -> tuple[int, int]:
    """(bytes on the GPU, bytes in unified memory).

    AdamW: two moments in the parameter's dtype. 8-bit AdamW: two bytes, two fp32 per block of 256, but two fp32 numbers
    for tensors under 4,096, and two tables of 256 levels. Paged: states of tensors of 100,000 numbers or more live in
    unified memory; the block constants do not. SGD without momentum holds nothing.
    """
    gpu = paged = 0
    for numbers, size, count in _trained(p):
        if p.recipe.optimizer == "adamw_torch":
            gpu += 2 * size * numbers * count
        elif p.recipe.optimizer.endswith("8bit"):
            small, pages = numbers < 4096, p.recipe.optimizer.startswith("paged") and numbers >= 100_000
            moments = (8 if small else 2) * numbers * count
            constants = 0 if small else 8 * -(-numbers // 256) * count
            gpu += constants + (0 if pages else moments)
            paged += moments if pages else 0
    tables = 2048 if p.recipe.optimizer.endswith("8bit") else 0
    return gpu + tables, paged


def _step_temporary(p: _Plan) -> int:
    """AdamW goes through all tensors at once on CUDA (foreach): the square roots of the second moments, all of them.

    This is a further 4 bytes per trained fp32 parameter, 20 in place of 16. bitsandbytes works tensor by tensor. SGD
    needs one copy of the gradients if there is weight decay.
    """
    if p.recipe.optimizer == "adamw_torch" or (p.recipe.optimizer == "sgd" and p.recipe.weight_decay):
        return _gradients(p)
    return 0


# what the forward pass leaves for the backward pass


def _norm(p: _Plan, features: int, n: int | None = None) -> int:
    """RMSNorm over n rows: the fp32 input (a copy of a 16-bit one) and one fp32 scale; its normed output if trained."""
    n = p.n if n is None else n
    return n * (4 * features + 4 + (p.R * features if p.full else 0))


def _inputs(p: _Plan, readers: tuple[str, ...], fp32: bool, kept: bool = False) -> int:
    """What linear layers keep of their common input, for the gradient of the weights that are trained.

    Full: the input in c bytes; an fp32 input is cast by *each* reader, so q, k and v keep three copies. LoRA: a frozen
    weight needs no input, but each lora_A keeps its own copy in c bytes, because PEFT first casts to the adapter's
    fp32. NF4's adapters are bf16, so a 16-bit input is shared (`kept`: it is alive anyway). int8 keeps the input too.
    Dropout: one byte of mask per number and reader.
    """
    size = p.n * p.a.linears[readers[0]][0]
    adapted = [name for name in readers if name in p.targets]
    if p.full:
        return size * p.c * len(readers) if fp32 and p.amp else (0 if kept else size * p.c)
    dropout = p.recipe.lora_dropout > 0
    copies = len(adapted) * p.c if p.amp else (0 if kept else p.c * bool(adapted))
    if p.quantized and not fp32:
        copies = len(adapted) * p.c if dropout else (0 if kept else p.c * bool(adapted))
    if not p.amp and dropout:
        copies = len(adapted) * p.c
    base = (4 if fp32 else 0) if p.recipe.quantization == "int8" else 0
    return size * (copies + base + (len(adapted) if dropout else 0))


def _attention(p: _Plan) -> int:
    """sdpa: q, k, v and the output in c bytes, and one fp32 per row and head. eager: also the T x T weights.

    The weights stand there in fp32 (softmax) and in c bytes (for the product with v), per head: 6 bytes * heads * T * T
    under autocast; keys and values are repeated to all heads. Padded sdpa repeats them too, and holds a mask per layer.
    """
    a, T = p.a, p.recipe.max_length
    q, k = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    repeated = p.setup.attention == "eager" or p.setup.padded
    keys = q if repeated else k
    if p.setup.attention == "sdpa":
        mask = p.c * p.rows * T * T if p.setup.padded else 0
        return p.n * (p.c * (2 * q + 2 * keys) + 4 * a.num_attention_heads) + mask
    weights = 4 + (p.c if p.amp else 0)
    output = p.c * q if (p.full or p.quantized or not p.amp) else 0  # lora_A keeps a copy of its own
    return p.n * (p.c * (q + 2 * keys) + weights * a.num_attention_heads * T + output)


def _qk_norm(p: _Plan) -> int:
    """Qwen3's norms of q and k: fp32 copies, one scale per head, and the 16-bit normed values if trained."""
    a = p.a
    if not a.qk_norm:
        return 0
    per_number = 4 + (p.w if p.full else 0)
    heads = a.num_attention_heads + a.num_key_value_heads
    return p.n * heads * (per_number * a.head_dim + 4)


def _layer_activations(p: _Plan) -> int:
    """Everything one block keeps: two norms, four inputs, attention, SwiGLU's gate, silu(gate) and up, and A's outputs.

    SwiGLU keeps 3 w n f, and down_proj its input: 8 n f for LoRA, but 14 n f for NF4, whose layers answer in fp32.
    """
    a, f = p.a, p.a.intermediate_size
    wide = p.R == 4  # the norms answer in the dtype of the residual stream
    lora = p.c * p.n * p.recipe.r * len(p.targets) if not p.full else 0
    return (
        2 * _norm(p, a.hidden_size)
        + _inputs(p, ("q_proj", "k_proj", "v_proj"), fp32=wide)
        + _inputs(p, ("o_proj",), fp32=False, kept=True)
        + _inputs(p, ("gate_proj", "up_proj"), fp32=wide)
        + _inputs(p, ("down_proj",), fp32=p.w == 4)
        + _attention(p)
        + _qk_norm(p)
        + 3 * p.w * p.n * f
        + lora
    )


def _shared_activations(p: _Plan) -> int:
    """Token ids and their mask (16 bytes a token), cosines and sines; a checkpoint also holds on to the T x T mask."""
    return 16 * p.n + 2 * p.R * p.recipe.max_length * p.a.head_dim + (_mask(p) if p.checkpointed else 0)


def _mask(p: _Plan) -> int:
    """The T x T mask of a padded or eager batch, held while the blocks run; checkpoints keep it, as their argument."""
    size = p.rows * p.recipe.max_length**2
    return {"eager": p.R * size, "sdpa": size if p.setup.padded else 0}[p.setup.attention]


def _stored(p: _Plan) -> int:
    """What a block keeps under checkpointing: its input, R * n * d.

    In int8 also the inputs of its linear layers: bitsandbytes' MatMul8bitLt holds them as attributes of its context,
    not through save_for_backward, and a checkpoint cannot let go of what it does not see.
    """
    a = p.a
    hidden = p.R * p.n * a.hidden_size
    if p.recipe.quantization != "int8":
        return hidden
    return hidden + p.n * (2 * 4 * a.hidden_size + p.c * a.linears["o_proj"][0] + 4 * a.intermediate_size)


def _activations(p: _Plan) -> int:
    """All blocks, with checkpointing only what they store.

    Without it and with LoRA the first block's first norm keeps nothing, int8 not its input and dropout not its masks:
    nothing before them is trained. Nor does its attention, if only the MLP has adapters.
    """
    a = p.a
    blocks = _stored(p) if p.checkpointed else _layer_activations(p)
    first = 0 if p.checkpointed or p.full else _norm(p, a.hidden_size)
    if first:
        masks = len({"q_proj", "k_proj", "v_proj"} & set(p.targets)) if p.recipe.lora_dropout else 0
        first += p.n * a.hidden_size * (masks + (4 if p.recipe.quantization == "int8" else 0))
        if not {"q_proj", "k_proj", "v_proj", "o_proj"} & set(p.targets):
            first += _norm(p, a.hidden_size) + _attention(p) + _qk_norm(p)
    return a.num_hidden_layers * blocks - first + _shared_activations(p)


def _casts(p: _Plan, layers: int) -> int:
    """16-bit copies of the fp32 weights of this many blocks, which autocast makes and the graph keeps.

    A copy of a trained weight is cached until the forward pass ends, so checkpointing does not avoid it there.
    """
    a = p.a
    if not p.amp:
        return 0
    share = layers / a.num_hidden_layers
    adapters = 2 * _adapter_params(p) * share if p.adapter == 4 else 0
    base = 2 * a.linear_params * share if p.held == 4 and not p.quantized else 0
    return round(base + adapters)


# the loss


def _head(p: _Plan) -> int:
    return p.a.vocab_size * p.a.hidden_size


def _loss_forward(p: _Plan) -> int:
    """The most that the loss adds in the forward pass.

    chunked: a reordered copy of the hidden states, and for each chunk of 256 tokens either the head's copies (a 16-bit
    head is first cast to fp32 and then back, 6 V d) with its logits, or the logits in c bytes with three fp32 tables
    (log-softmax, exp, product: (c + 12) * 256 V). full: logits, their fp32 copies and TRL's entropy: 12 bytes * n * V.
    fused: a gradient of the hidden states and of a trained head, made at once, and two chunks of about n * d logits.
    """
    V, d = p.a.vocab_size, p.a.hidden_size
    hidden, cast = p.R * p.n * d, 2 * _head(p) if p.amp and p.R == 4 else 0
    if p.setup.method != "sft":
        return cast + (10 if p.amp else 12) * p.n * V
    if p.setup.loss == "fused":
        rows = min(p.n, 1 << (-(-p.n // -(-V // d)) - 1).bit_length())
        head = (4 * _head(p) + cast) if p.full else 0  # its gradient, and a second cast: autocast keeps the first
        return hidden + head + cast + 2 * p.c * rows * V + p.c * rows * d
    if p.setup.loss == "full":
        copy = 4 * (p.n - p.rows) * V if p.rows > 1 else 0
        chunk = 3 * 4 * min(128, p.n) * V
        most = max(8 * p.n * V + copy + chunk, (10 if p.amp else 8) * p.n * V)
        return cast + (p.c * p.n * d if cast else 0) * p.full + most
    tokens = p.n - p.rows
    chunk = min(CHUNK, tokens)
    copies = (6 if p.R == 2 else 2) * _head(p) if p.amp else 0
    return p.R * tokens * d + max(copies + p.c * chunk * V, (p.c + 12) * chunk * V)


def _loss_backward(p: _Plan) -> int:
    """The most that the loss adds in the backward pass: the final hidden state is gone, its gradient grows.

    chunked: the chunk is computed once more, with the head's 16-bit copy kept; a trained head adds its gradient so far
    (4 V d), or three of them while the next chunk's is added. full: log-softmax, its gradient and the logits': 12 n V.
    """
    V, d, cast = p.a.vocab_size, p.a.hidden_size, 2 * _head(p) if p.amp else 0
    if p.setup.method != "sft" or p.setup.loss == "full":
        kept = (cast + p.c * p.n * d) if p.full and p.amp else (cast if p.R == 4 else 0)
        return 12 * p.n * V + kept
    if p.setup.loss == "fused":
        return p.R * p.n * d + (4 * _head(p) if p.full else 0)
    tokens = p.n - p.rows
    chunk, several = min(CHUNK, tokens), tokens > CHUNK
    grown = p.R * tokens * d * (2 if several else 1)
    tables = cast + (p.c + 12) * chunk * V
    if p.full:
        added = (12 if several else 6) * _head(p)
        return grown + max((4 * _head(p) if several else 0) + tables, added)
    copies = (6 if p.R == 2 else 2) * _head(p) if p.amp else 0
    return grown + max(copies + p.c * chunk * V, tables)


# the moments


def _scores(p: _Plan) -> int:
    """Numbers in the T x T attention weights of a block, all heads."""
    return p.rows * p.a.num_attention_heads * p.recipe.max_length**2


def _block_forward(p: _Plan) -> int:
    """What one block needs for a moment in the forward pass, beside what it keeps.

    The moment is down_proj with all else kept, or up_proj when a checkpoint keeps nothing. LoRA: the product of SwiGLU
    (2 n f) and its fp32 form for lora_A (4 n f; 4 more after dropout). NF4 and int8: fp32 results, their copies and the
    adapter's. And results, scaled adapter results, sums, the residual: some n * d numbers. eager: at the softmax, its
    input (with a 16-bit one also an fp32 copy) and its output, when the MLP has not begun yet.
    """
    nf, nd, int8 = p.n * p.a.intermediate_size, p.n * p.a.hidden_size, p.recipe.quantization == "int8"
    dropout, down = p.recipe.lora_dropout > 0, "down_proj" in p.targets
    mlp = down or "gate_proj" in p.targets or "up_proj" in p.targets
    if p.checkpointed and p.full:
        most = (6 if p.amp else 12) * nf + 8 * nd
    elif p.checkpointed and not p.amp:
        most = (16 if mlp else 12) * nf + 8 * nd
    elif p.checkpointed and p.quantized:
        most = 10 * nf + 4 * nd if int8 else (14 if mlp else 12) * nf + 8 * nd
    elif p.checkpointed:
        most = (12 * nf + 6 * nd if dropout and down else 8 * nf + 8 * nd) if mlp else 6 * nf + 4 * nd
    elif p.full or not p.amp:
        most = 10 * nd if p.full else (16 * nd if down else 4 * nf + 12 * nd)
    elif p.quantized:
        most = nf + 12 * nd if int8 else (8 * nf + 12 * nd if dropout else 4 * nf + 18 * nd)
    elif down:
        most = 10 * nf + 10 * nd if dropout else 6 * nf + 14 * nd
    else:
        most = max(16 * nd, 4 * nf + 2 * nd)
    if p.setup.attention == "eager":
        softmax = (8 if p.R == 4 else 10) * _scores(p)
        kept = 0 if p.checkpointed else _layer_activations(p)
        extra = (16 if p.R == 4 else 8) if p.checkpointed else (34 if p.R == 4 else 21)
        most = max(most, softmax + extra * nd - kept)
    return most + (0 if p.checkpointed else _mask(p))


def _block_backward(p: _Plan) -> int:
    """The most that the backward pass of one block adds to what is kept: at down_proj, gradients of n * f numbers.

    Full: two of c bytes, less the product that is let go. LoRA: one of c bytes through A and its fp32 form, less A's
    copy. NF4 and int8: the base's, the adapter's and their sum, all fp32. Without an adapter on down_proj its input is
    not kept: three of w bytes. And the gradient of the residual stream.
    With checkpointing LoRA needs more when the block is computed again, up to down_proj's A. eager: at the softmax, its
    output and two gradients in fp32, 12 bytes a score, when the MLP's tensors are gone.
    """
    a = p.a
    nf, nd = p.n * a.intermediate_size, p.n * a.hidden_size
    dropout, down = p.recipe.lora_dropout > 0, "down_proj" in p.targets
    swiglu = (10 - dropout if p.quantized else 4) * nf
    if p.full or not p.amp:
        swiglu = 2 * p.c * nf
    if not down:
        swiglu = 3 * p.w * nf
    if p.full:
        swiglu += (4 - (2 if p.amp else 0)) * a.hidden_size * a.intermediate_size
    most = p.R * nd + swiglu
    if p.checkpointed and not p.full and p.amp:
        if not p.quantized:
            again = (10 if dropout else 6) if down else 4 * bool({"gate_proj", "up_proj"} & set(p.targets))
            most = max(most, again * nf + 10 * nd if again else 0)
        elif dropout and down:
            most = max(most, 8 * nf + (18 if p.recipe.quantization == "int8" else 14) * nd)
    if p.setup.attention == "eager":
        q, _ = a.linears["o_proj"]
        kept = _norm(p, a.hidden_size) + _inputs(p, ("q_proj", "k_proj", "v_proj"), fp32=p.R == 4) + 3 * p.c * p.n * q
        kept += (
            (4 - (2 if p.amp else 0)) * 3 * a.hidden_size * a.intermediate_size if p.full else 0
        )  # the MLP's are done
        most = max(most, 12 * _scores(p) + kept + _qk_norm(p) + p.R * nd - _layer_activations(p))
    return most


def _recomputed(p: _Plan) -> int:
    """What a checkpointed block has once it is computed again, beside what was stored of it.

    An fp32 residual stream is the first norm's own input, so it is stored already; and so are int8's inputs.
    """
    stored = 4 * p.a.hidden_size if p.R == 4 else 0
    if p.recipe.quantization == "int8":
        stored += 8 * p.a.hidden_size + 4 * p.a.intermediate_size
    return _layer_activations(p) - p.n * stored


def _gathered(p: _Plan) -> int:
    """FSDP: the block at work and the one fetched ahead of it, whole, in 16 bits; not measured."""
    a = p.a
    if p.shards == 1:
        return 0
    block = (a.linear_params + a.small_params) // a.num_hidden_layers
    per_weight = 2 if not p.quantized else {"int8": 1, "nf4": 0.5625, "nf4-double": 0.516}[p.recipe.quantization]
    return round(2 * block * per_weight)


def _forward_moments(p: _Plan) -> list[tuple[str, str, dict[str, float]]]:
    """Two candidates: in the last block, and in the loss, with all kept and the last hidden state (R n d) too."""
    layers, d = p.a.num_hidden_layers, p.a.hidden_size
    cached = layers if not p.checkpointed or p.full or p.held == 2 else 0
    same = {
        "casts": _casts(p, cached) if p.shards == 1 else 0,
        "gradients": _gradients(p) if p.accumulates else 0,
        "temporary": _gathered(p),
    }
    block = {"activations": _activations(p) + _block_forward(p)}
    loss = {"activations": _activations(p) + _norm(p, d) + p.R * p.n * d, "loss": _loss_forward(p)}
    return [("forward", "in the last block", {**same, **block}), ("forward", "in the loss", {**same, **loss})]


def _backward_moments(p: _Plan) -> list[tuple[str, str, dict[str, float]]]:
    """The candidates, in order: loss, last norm, last block, first block, first norm, embedding.

    From block to block the activations fall and, in full fine-tuning, gradients rise: the highest is at one end. With
    checkpointing the block at work has all of its activations once more. A norm's backward pass works on five fp32
    copies of its input. Gradients that accumulate over several batches are all there from the start, and the new ones
    come on top. A tied table waits for both of its gradients.
    """
    a, layers, nd = p.a, p.a.num_hidden_layers, p.n * p.a.hidden_size
    kept = {"activations": _activations(p), "casts": 0 if p.checkpointed or p.shards > 1 else _casts(p, layers)}
    one_cast = _casts(p, 1) if p.shards == 1 else 0
    shared = _shared_activations(p)
    work = _block_backward(p) + (_recomputed(p) + one_cast if p.checkpointed else 0)
    gradients, table = _gradients(p), (4 * _head(p) / p.shards if p.full else 0)
    of_block = 4 * a.linear_params / layers / p.shards if p.full else 0
    waiting = table if a.tie_word_embeddings else 0  # the head's, not yet added to the embedding's
    early = gradients if p.accumulates else table - waiting
    late = gradients if p.accumulates else gradients - table
    with_norm = {**kept, "activations": kept["activations"] + _norm(p, a.hidden_size)}
    moments = [
        ("in the loss", {**with_norm, "gradients": gradients if p.accumulates else 0, "loss": _loss_backward(p)}),
        (
            "in the last norm",
            {
                **kept,
                "activations": kept["activations"] + 4 * nd,
                "gradients": early,
                "temporary": waiting + 20 * nd,
            },
        ),
        ("in the last block", {**kept, "gradients": early, "temporary": waiting + work}),
        (
            "in the first block",
            {
                "activations": shared + (_stored(p) if p.checkpointed else _layer_activations(p)),
                "casts": 0 if p.checkpointed else one_cast,
                "gradients": late - (0 if p.accumulates else of_block),
                "temporary": waiting + work,
            },
        ),
        ("in the first norm", {"activations": shared, "gradients": late, "temporary": waiting + 24 * nd}),
    ]
    if p.full:
        new = table if p.accumulates else 0
        hidden = 0 if a.tie_word_embeddings else p.R * nd
        end = {"activations": shared, "gradients": gradients, "temporary": 2 * waiting + new + hidden}
        moments.append(("at the embedding", end))
    extra = _gathered(p)
    return [("backward", where, {**one, "temporary": one.get("temporary", 0) + extra}) for where, one in moments]


# --- will it fit? -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in bytes as sold (GiB for most cards), and the share of it that a training step can have."""

    name: str
    memory_bytes: int
    usable: float
    native_bf16: bool
    source: str

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable)


def gpus() -> dict[str, Gpu]:
    """The GPUs in data/gpus/gpus.json, by name."""
    rows = json.loads((_DATA / "gpus" / "gpus.json").read_text(encoding="utf-8"))
    return {row["name"]: Gpu(**row) for row in rows}


def fits(gpu: Gpu, architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> bool:
    """Whether the predicted peak is within the usable memory of the GPU (of each one, if the setup has several)."""
    return estimate(architecture, recipe, setup).fits(gpu)


def max_length(gpu: Gpu, architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> int:
    """The longest max_length, in tokens, that fits; 0 if not even two tokens do."""
    return _largest(lambda tokens: fits(gpu, architecture, recipe.replace(max_length=tokens), setup), 2, 1 << 22)


def max_batch(gpu: Gpu, architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> int:
    """The largest batch_size that fits at the recipe's max_length; 0 if not even one row does."""
    return _largest(lambda rows: fits(gpu, architecture, recipe.replace(batch_size=rows), setup), 1, 1 << 16)


def _largest(holds, low: int, high: int) -> int:
    """The largest number in [low, high] for which a falling condition holds, by bisection; 0 if none."""
    if not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _check_literals(settings) -> None:
    """Raises ValueError if a field with a Literal type has a value that is not among those allowed."""
    for field, hint in get_type_hints(type(settings)).items():
        allowed, value = get_args(hint), getattr(settings, field)
        if allowed and value not in allowed:
            raise ValueError(f"{field}: got {value!r}, wanted one of {allowed}")


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(architecture: Architecture, recipe: Recipe, setup: Setup | None = None, on: str = "fake") -> Memory:
    """The bytes that one training step really holds: the libraries' own code on random weights, nothing is fetched.

    on="fake": every operator runs on tensors without data (FakeTensorMode), and each storage is counted from its birth
    to its death: an 8B model on a laptop, in seconds. on="cpu": the same with real data, for small models. Both follow
    the rules that PyTorch has for CUDA where the CPU's differ: which operators autocast runs in fp32, one-byte dropout
    masks, AdamW over all tensors at once, bitsandbytes' int8 product. on="cuda": a real step; the peaks are those of
    `torch.cuda.max_memory_allocated`, with `reserved_bytes` beside them, and kinds are not told apart.

    The step is that of ftlab.pipeline.train: weights in the dtype that it loads, PEFT's adapters, TRL's loss (its
    chunked one, or full logits with its entropy), gradients clipped, then the optimizer, which has run before.

    Raises ValueError for an unknown `on`, for more than one GPU, and for methods other than "sft".
    """
    import contextlib

    from torch._subclasses.fake_tensor import FakeTensorMode

    setup = setup or Setup()
    if on not in ("fake", "cpu", "cuda"):
        raise ValueError(f"on: got {on!r}, wanted 'fake', 'cpu' or 'cuda'")
    if setup.method != "sft" or setup.gpus != 1:
        raise ValueError(f"only method 'sft' on 1 GPU is measured, got {setup.method!r} on {setup.gpus}")
    plan = _plan(architecture, recipe, setup)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if on == "fake" else contextlib.nullcontext()
    device = "cuda" if on == "cuda" else "cpu"
    model = _skeleton(architecture, recipe, setup, plan)
    with fake:
        constants = _materialize(model, device)
    if on == "cuda":
        recorder = _CudaRecorder()
        _step(model, recipe, setup, plan, device, recorder)
        return recorder.finish()
    tracker = _tracker(plan)
    with fake, tracker, _cuda_rules(on):
        for name, parameter in model.named_parameters():
            tracker.mark(parameter, "adapters" if "lora_" in name else "weights")
        for tensor in constants:
            tracker.mark(tensor, "constants")
        _step(model, recipe, setup, plan, device, tracker)
    return Memory(tracker.moments)


def _skeleton(architecture: Architecture, recipe: Recipe, setup: Setup, plan: _Plan):
    """The model on the meta device, as train.py leaves it: dtypes, quantized layers, adapters, what is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    dtypes = {2: _half(recipe), 4: torch.float32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture.config(), dtype=dtypes[plan.held], attn_implementation=setup.attention
        )
        model.tie_weights()
        if recipe.quantization != "none":
            _quantize(model, recipe.quantization)
            for name, parameter in model.named_parameters():  # prepare_model_for_kbit_training
                parameter.requires_grad = False
                if not name.endswith("proj.weight"):
                    parameter.data = parameter.data.to(torch.float32)
        if recipe.r:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=recipe.r,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                target_modules=list(recipe.target_modules),
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, config)
            for parameter in model.parameters():
                if parameter.requires_grad and recipe.quantization != "none":  # SFTTrainer does this
                    parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    if recipe.gradient_checkpointing:
        if recipe.r:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setup.loss == "chunked":
        from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _patch_chunked_ce_lm_head

        _patch_chunked_ce_lm_head(model.get_base_model() if recipe.r else model, _CHUNKED_LM_HEAD_CHUNK_SIZE)
    return model


def _quantize(model, quantization: str) -> None:
    """Replaces every linear layer but the head by bitsandbytes' own, as transformers does on loading."""
    import bitsandbytes as bnb
    import torch

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            shape = (layer.in_features, layer.out_features, layer.bias is not None)
            if quantization == "int8":
                new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            else:
                double = quantization == "nf4-double"
                new = bnb.nn.Linear4bit(
                    *shape, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
                )
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization != "int8"


def _materialize(model, device: str) -> list:
    """Gives every meta tensor of the model memory (tied ones once), and returns the quantization constants."""
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    made, constants = {}, []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None:
                    continue
                if id(old) in made:
                    table[key] = made[id(old)][1]
                    continue
                if key == "weight" and isinstance(module, Linear4bit):
                    numel, shape = old.numel(), torch.Size((module.out_features, module.in_features))
                    numel = shape.numel()
                    new = torch.zeros((numel + 1) // 2, 1, dtype=torch.uint8, device=device)
                    new = torch.nn.Parameter(new, requires_grad=False)
                    blocks, double = -(-numel // 64), old.compress_statistics
                    code = torch.ones(16, device=device)
                    nested, offset = None, None
                    if double:
                        second = torch.ones(-(-blocks // 256), device=device)
                        nested_code = torch.ones(256, device=device)
                        nested = QuantState(second, code=nested_code, blocksize=256, dtype=torch.float32)
                        offset = torch.zeros((), device=device)
                        constants += [second, nested_code]
                    absmax = torch.ones(blocks, dtype=torch.uint8 if double else torch.float32, device=device)
                    constants += [absmax, code]
                    new.quant_state = QuantState(
                        absmax, shape, code, 64, "nf4", torch.bfloat16, offset=offset, state2=nested
                    )
                    module.quant_state, module.compute_type_is_set = new.quant_state, True
                elif key == "weight" and isinstance(module, Linear8bitLt):
                    new = torch.zeros(old.shape, dtype=torch.int8, device=device)
                    new = torch.nn.Parameter(new, requires_grad=False)
                    new.CB = new.SCB = None
                    module.state.CB, module.state.SCB = new.data, torch.ones(module.out_features, device=device)
                    constants.append(module.state.SCB)
                else:
                    new = torch.zeros(old.shape, dtype=old.dtype, device=device)
                    if old.is_floating_point():
                        new = new.normal_(std=0.02)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                made[id(old)] = (old, new)
                table[key] = new
    return constants


def _step(model, recipe: Recipe, setup: Setup, plan: _Plan, device: str, recorder) -> None:
    """One training step after the first (optimizer state exists), telling the recorder which phase it is in."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recorder.enter("load", "optimizer")
    optimizer = _optimizer(recipe, trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        recorder.mark(parameter.grad, "gradients")
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.mark(p.grad, "gradients"))
    optimizer.step()
    optimizer.zero_grad()

    def decoded(module, arguments, output):
        """From here to the loss and back to this tensor's gradient, what is made belongs to the loss."""
        recorder.enter("forward", "loss")
        output.last_hidden_state.register_hook(lambda gradient: recorder.enter("backward", "temporary"))

    handle = (model.get_base_model() if recipe.r else model).model.register_forward_hook(decoded)
    recorder.start()
    recorder.enter("forward", "activations")
    if plan.accumulates:  # those of the batches before
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            recorder.mark(parameter.grad, "gradients")
    ids = torch.zeros(plan.rows, recipe.max_length, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    if setup.padded:
        mask[0, 0] = 0
    with torch.autocast(device, dtype=_half(recipe), enabled=plan.amp):
        loss = _sft_loss(model, setup, ids, mask)
    recorder.enter("backward", "loss")
    loss.backward()
    del loss
    recorder.enter("step", "temporary")
    torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()


def _half(recipe: Recipe):
    import torch

    return torch.float16 if recipe.precision == "fp16" else torch.bfloat16


def _sft_loss(model, setup: Setup, ids, mask):
    """The loss as SFTTrainer computes it; with full logits also its copy in fp32 (accelerate) and its entropy (TRL)."""
    import torch

    if setup.loss == "fused":
        return _fused_loss(model, ids, mask)
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    if setup.loss == "full":
        from trl.trainer.utils import entropy_from_logits

        outputs.logits = outputs.logits.float()  # accelerate's convert_outputs_to_fp32
        with torch.no_grad():
            logits = outputs.logits[..., :-1, :]
            entropy_from_logits(logits)
            logits.argmax(dim=-1)
    return outputs.loss


def _fused_loss(model, ids, mask):
    """The allocations of Liger's fused linear cross-entropy, without its numbers: Liger itself needs Triton.

    Its kernel writes the gradient over the logits, chunk by chunk, already in the forward pass.
    """
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            (n, d), V = hidden.shape, weight.shape[0]
            rows = min(n, 1 << (-(-n // -(-V // d)) - 1).bit_length())
            ctx.gradients = torch.zeros_like(hidden), torch.zeros_like(weight) if weight.requires_grad else None
            for start in range(0, n, rows):
                logits = hidden[start : start + rows] @ weight.t()
                ctx.gradients[0][start : start + rows] = logits.mul_(0) @ weight
            return hidden.new_zeros((), dtype=torch.float32)

        @staticmethod
        def backward(ctx, gradient):
            gradients, ctx.gradients = ctx.gradients, None
            return gradients

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return Fused.apply(hidden.view(-1, hidden.shape[-1]), inner.lm_head.weight)


def _optimizer(recipe: Recipe, trained: list):
    import torch

    if recipe.optimizer == "adamw_torch":
        return torch.optim.AdamW(trained, lr=1e-4, weight_decay=recipe.weight_decay, foreach=True)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=1e-4, weight_decay=recipe.weight_decay, foreach=True)
    import bitsandbytes as bnb

    paged = recipe.optimizer == "paged_adamw_8bit"
    return bnb.optim.AdamW(trained, lr=1e-4, weight_decay=recipe.weight_decay, optim_bits=8, is_paged=paged)


class _CudaRecorder:
    """The peaks of a real step on the GPU, phase by phase. Its allocator does not know what a block is for."""

    def __init__(self) -> None:
        self.phase, self.peaks, self.reserved = "load", {}, 0

    def enter(self, phase: str, kind: str) -> None:
        import torch

        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def mark(self, tensor, kind: str) -> None:
        pass

    def start(self) -> None:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.peaks.clear()

    def finish(self) -> Memory:
        self.enter("end", "")
        moments = {phase: Moment("max_memory_allocated", {"all": size}) for phase, size in self.peaks.items()}
        return Memory(moments, reserved_bytes=self.reserved)


def _tracker(plan: _Plan):
    """A dispatch mode that counts every storage by kind while it lives, and keeps the highest moment of each phase."""
    import weakref
    from collections import Counter

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    bnb, aten = torch.ops.bitsandbytes, torch.ops.aten

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known, self.live, self.total = WeakIdKeyDictionary(), Counter(), 0
            self.phase, self.kind, self.moments = "load", "temporary", {}

        def enter(self, phase: str, kind: str) -> None:
            self.phase, self.kind = phase, kind

        def see(self, tensor, kind: str | None = None) -> None:
            storage = tensor.untyped_storage()
            if storage in self.known:
                return
            entry = [kind or self.kind, storage.nbytes(), None]

            def gone(_):
                self.live[entry[0]] -= entry[1]
                self.total -= entry[1]

            entry[2] = weakref.ref(storage, gone)
            self.known[storage] = entry
            self.live[entry[0]] += entry[1]
            self.total += entry[1]

        def mark(self, tensor, kind: str) -> None:
            self.see(tensor)
            entry = self.known[tensor.untyped_storage()]
            self.live[entry[0]] -= entry[1]
            self.live[kind] += entry[1]
            entry[0] = kind

        def start(self) -> None:
            """Forgets how the model and the optimizer were made; what is there now is the phase "load"."""
            self.moments.clear()
            self.look("all loaded")

        def look(self, where: str) -> None:
            if self.phase not in self.moments or self.total > self.moments[self.phase].total:
                self.moments[self.phase] = Moment(where, {k: self.live[k] for k in KINDS})

        def kind_of(self, tensor) -> str:
            entry = self.known.get(tensor.untyped_storage())
            return entry[0] if entry else ""

        def gemm_4bit(self, x, packed, shape, absmax, block, code_name, bias=None, codes=None, code=None, offset=None):
            """bitsandbytes above ~1000 tokens: the matrix is dequantized as a whole, then multiplied."""
            if codes is not None:
                absmax = bnb.dequantize_blockwise(codes, absmax, code, 256, torch.float)
                self.see(absmax)
                absmax = absmax + offset
                self.see(absmax)
            weight = bnb.dequantize_4bit(packed, absmax, block, code_name, shape, x.dtype)
            self.see(weight)
            return torch.nn.functional.linear(x, weight, bias)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.ops.prim.device.default:
                return func(*args, **kwargs)
            if func is aten._local_scalar_dense.default and hasattr(args[0], "fake_mode"):
                chunks = -(-(plan.n - plan.rows) // CHUNK)  # of the loss: every token counts
                return {torch.int64: chunks * CHUNK, torch.bool: not plan.setup.padded}.get(args[0].dtype, 1.0)
            if func is bnb.gemm_4bit.default:
                out = self.gemm_4bit(*args, **kwargs)
            elif func is bnb.int8_vectorwise_quant.default:  # no outlier columns: how many depends on the data
                out = func(args[0])
            elif func is bnb.int8_mixed_scaled_mm.default:
                (x, qx, qw, sx, sw), bias = args[:5], args[6] if len(args) > 6 else None
                product = bnb.int8_linear_matmul(qx, qw)
                self.see(product)
                out = bnb.int8_mm_dequant(product, sx, sw, dtype=x.dtype, bias=bias), None
            else:
                out = func(*args, **kwargs)
            casts = func is aten._to_copy.default and self.kind_of(args[0]) in ("weights", "adapters")
            casts = casts and self.kind == "activations"
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.see(leaf, "casts" if casts else None)
            self.look(str(func))
            return out

    return Tracker()


def _cuda_rules(on: str):
    """What PyTorch and bitsandbytes do on CUDA and not on a CPU, for as long as the context is open."""
    import contextlib
    from unittest import mock

    import bitsandbytes as bnb
    import torch
    from bitsandbytes.autograd import _functions
    from torch.overrides import TorchFunctionMode

    in_fp32, with_dtype = {"exp", "pow", "rsqrt", "logsumexp"}, {"softmax", "log_softmax", "sum"}

    class Rules(TorchFunctionMode):
        """Autocast on CUDA runs these in fp32 (PyTorch's list "CUDA Ops that can autocast to float32")."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name == "backward":  # checkpoints run their forward once more inside it, by the same rules
                engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(args[0])
                with self:
                    return engine.run_backward((args[0],), (one,), False, False, (), True, True)
            half = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype in (torch.bfloat16, torch.float16)
            if func is torch.nn.functional.dropout and kwargs["training"] and kwargs["p"] > 0:
                return torch.native_dropout(args[0], kwargs["p"], True)[0]
            if half and name in in_fp32 and torch.is_autocast_enabled("cpu"):
                args = (args[0].float(), *args[1:])
            elif half and name in with_dtype and torch.is_autocast_enabled("cpu"):
                kwargs = {"dtype": torch.float32, **{k: v for k, v in kwargs.items() if v is not None}}
            return func(*args, **kwargs)

    def int8_product(x, weight, out=None, state=None, threshold=0.0, bias=None):
        state.threshold = threshold or state.threshold
        return _functions.MatMul8bitLt.apply(x, weight, out, bias, state)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(bnb, "matmul", int8_product))
    stack.enter_context(mock.patch.object(_functions.logger, "warning"))  # of a cast, once per layer and call
    enabled = torch.is_autocast_enabled
    stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)))
    if on == "fake":  # transformers takes fake tensors for an export, and then builds the mask that a run would skip
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", lambda *_: False))
    stack.enter_context(Rules())
    return stack

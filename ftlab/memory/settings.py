"""The settings of a training step, checked, and every decision about dtypes that follows; the papers' accounting."""

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ftlab.memory.architecture import SLIDING, Architecture, architectures, pick, rows


@dataclass
class Plan:
    """The keyword arguments of `estimate`, under the libraries' names, and all that they decide. Defaults are
    SFTTrainer's without a peft_config: full fine-tuning (r=None), gradient checkpointing.

    dtype: of the weights that are not quantized. None is float32 without bf16 or for full fine-tuning, else 16 bits;
    "float32" of a quantized model is what prepare_model_for_kbit_training leaves (of TRL's trainers ORPO's calls it).
    loss_type, of sft: "chunked_nll" is TRL's default, "nll" makes all logits, and their entropy;
    "all_logits" is transformers' own loss, as its Trainer or a loop of one's own has it.
    use_liger_kernel: Liger's loss; its RMSNorm and SwiGLU, which keep less than transformers' own,
    are not counted.
    padded: rows of different lengths; sdpa then repeats keys and values and holds a mask in each block.
    gpus, fsdp: DDP copies all to each GPU, FSDP shares weights, gradients and states. The batch is that of one GPU.

    What loops other than TRL's do. autocast=False: each product is in the dtype of what meets in
    it. adapter_dtype: None is TRL's (below). shifted_logits: transformers before 4.50 copied the
    logits less the last position of each row. keeps_outputs: `outputs = model(...)` is still a name
    in the backward pass, so the logits live on.
    activation_offloading: checkpoints wait in the host's memory.
    Of grpo: vllm_gpu_memory_utilization, the share of `card` (bytes, or a name in data/gpus) that a
    colocated vLLM takes; None: no vLLM on this GPU. vllm_enable_sleep_mode: it gives the share back
    while the policy trains.

    All formulas read a plan, called p. n = rows * T tokens. Bytes per number: R of the residual stream and of weights
    that are not quantized, c of a matrix product, w of what a linear layer gives out (bitsandbytes': the dtype of the
    input), `adapter` of adapters: fp32 (PEFT's autocast_adapter_dtype), of a quantized model bf16
    (TRL). copies: what a lora_A reads is a copy in another dtype, for it alone.
    Raises ValueError for a value that is not known, and for what would be counted wrongly.
    """

    a: Architecture
    method: Literal["sft", "dpo", "kto", "orpo", "grpo", "ppo"] = "sft"
    per_device_train_batch_size: int = 8
    max_length: int = 1024
    r: int | None = None
    target_modules: Any = "all-linear"
    lora_dropout: float = 0.0
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_use_double_quant: bool = False
    dtype: Literal[None, "float32", "bfloat16"] = None
    attn_implementation: Literal[None, "sdpa", "eager"] = None
    gradient_checkpointing: bool = True
    gradient_accumulation_steps: int = 1
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    bf16: bool | None = None
    loss_type: Literal[None, "chunked_nll", "nll", "all_logits"] = None
    use_liger_kernel: bool = False
    padded: bool = False
    gpus: int = 1
    fsdp: bool = False
    autocast: bool = True
    adapter_dtype: Literal[None, "float32", "bfloat16"] = None
    shifted_logits: bool = False
    keeps_outputs: bool = False
    activation_offloading: bool = False
    vllm_gpu_memory_utilization: float | None = None
    vllm_enable_sleep_mode: bool = False
    card: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), get_args(field.type) or (field.type,)
            if get_origin(field.type) is Literal:
                pick(value, kinds, field.name)
            elif kinds[0] is int and (type(value) not in kinds or (value is not None and value < 1)):
                raise ValueError(f"{field.name}: got {value!r}, wanted a whole number above 0")
            elif kinds[0] is bool and type(value) not in kinds:
                raise ValueError(f"{field.name}: got {value!r}, wanted True or False")
        if self.card is not None and not isinstance(self.card, int):
            self.card = rows_by_name("gpus/gpus.json", self.card, "card")["memory_bytes"]
        a, lora, sft, moe = self.a, self.r is not None, self.method == "sft", self.a.num_experts is not None
        self.full, self.int8, self.quantized = not lora, self.load_in_8bit, self.load_in_4bit or self.load_in_8bit
        self.kind = "full" if self.full else "int8" if self.int8 else "nf4" if self.load_in_4bit else "lora"
        self.loss = "liger" if self.use_liger_kernel else self.loss_type or ("chunked_nll" if sft else self.method)
        mixed, half = self.bf16 is not False, self.dtype == "bfloat16"  # bf16 is TRL's default
        self.amp, plain = mixed and self.autocast, self.loss == "all_logits"
        offloads = self.activation_offloading
        for wrong, name, wanted in (
            (not lora and self.quantized, "r", "a rank: quantized weights cannot be trained, adapters on them can"),
            (not lora and self.target_modules != "all-linear", "r", "a rank for the adapters on target_modules"),
            (self.load_in_4bit and self.int8, "load_in_8bit", "False beside load_in_4bit"),
            (not isinstance(p := self.lora_dropout, int | float) or not 0 <= p < 1, "lora_dropout", "0 to below 1"),
            (self.lora_dropout and not lora, "lora_dropout", "0 without a rank r"),
            (not mixed and (half or self.quantized), "bf16", "True or None with 16-bit or quantized weights"),
            (self.fsdp and (moe or self.int8), "fsdp", "False with experts or in int8: not counted"),
            (not sft and (moe or self.loss != self.method), "method", "'sft' for experts, a loss_type, Liger's loss"),
            (self.use_liger_kernel and self.loss_type == "chunked_nll", "loss_type", "None or 'nll' with Liger's loss"),
            (not mixed and not self.autocast, "autocast", "True with bf16=False, which has none"),
            (self.int8 and not self.autocast, "autocast", "True in int8: not counted"),
            (moe and not self.autocast, "autocast", "True with experts: not counted"),
            (self.adapter_dtype and not lora, "adapter_dtype", "None without a rank r"),
            (self.shifted_logits and not plain, "shifted_logits", "False but for 'all_logits'"),
            (self.keeps_outputs and not plain, "keeps_outputs", "False but for 'all_logits'"),
            (offloads and not self.gradient_checkpointing, "activation_offloading",
             "False without gradient_checkpointing: not counted"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")
        self.vllm = vllm_share(self)

        self.gemma, self.oss = a.model_type == "gemma3_text", a.model_type == "gpt_oss"
        self.targets = a.targets(self.target_modules) if lora else frozenset(a.linears)
        self.dropout = self.lora_dropout != 0 and lora and sft  # TRL's other trainers disable it
        self.eager, self.checkpointed = self.attn_implementation == "eager" or self.oss, self.gradient_checkpointing
        self.accumulates, self.shards = self.gradient_accumulation_steps > 1, self.gpus if self.fsdp else 1
        prepared = self.quantized and self.method == "orpo"  # by prepare_model_for_kbit_training
        self.R = 2 if mixed and not prepared and (half or (lora and self.dtype is None)) else 4
        self.c = 2 if self.amp else self.R
        by_trl = "bfloat16" if self.quantized else "float32"
        self.adapter = {"float32": 4, "bfloat16": 2}[self.adapter_dtype or by_trl]
        apart = not self.quantized or self.adapter == 4  # bf16 adapters of a quantized model share
        self.copies = lora and apart and (self.amp or self.adapter > self.c)
        self.w = self.R if self.quantized else self.c
        self.rows = self.per_device_train_batch_size * (2 if self.method in ("dpo", "orpo") else 1)
        self.T, self.n = self.max_length, self.rows * self.max_length
        self.d, self.f, self.V, self.L = a.hidden_size, a.intermediate_size, a.vocab_size, a.num_hidden_layers
        self.q, self.k = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        self.nd, self.scores, self.head = self.n * self.d, self.n * self.T * a.num_attention_heads, self.V * self.d
        self.head_copy = 2 * self.head if self.amp and self.R == 4 else 0  # of an fp32 head, by autocast
        self.adapter_params = a.lora_params(self.r, self.targets) if lora else 0
        self.trained_bytes = self.R * a.params if self.full else self.adapter * self.adapter_params
        self.experts_trained = self.full or "experts" in self.targets
        self.merged = self.R * sum(a.experts) if lora and self.experts_trained else 0  # PEFT adds adapters to a copy

        sliding = SLIDING[a.model_type](self.L) if a.sliding_window else 0
        self.windows = {kind: count for kind, count in ((True, sliding), (False, self.L - sliding)) if count}
        short = a.sliding_window is not None and a.sliding_window <= self.T  # shorter than the rows: sdpa needs a mask
        self.masked = {kind: not self.eager and (self.padded or (kind and short)) for kind in (True, False)}
        # T x T masks, held while blocks run: for blocks with a window and for the others, R bytes a number; sdpa's one
        self.masks = self.n * self.T * sum(self.R if self.eager else self.masked[kind] for kind in self.windows)


def vllm_share(p: Plan) -> int:
    """Bytes of the card that a colocated vLLM takes, vllm_gpu_memory_utilization * card; 0 without.

    Raises ValueError for a share without GRPO, without a card, or in which the model has no room.
    """
    share = p.vllm_gpu_memory_utilization
    if share is None:
        if p.vllm_enable_sleep_mode:
            raise ValueError("vllm_enable_sleep_mode: got True, wanted False without vLLM")
        return 0
    name = f"vllm_gpu_memory_utilization: got {share!r}"
    if p.method != "grpo":
        raise ValueError(f"{name}, wanted None but for method='grpo'")
    if not isinstance(share, float) or not 0 < share < 1:
        raise ValueError(f"{name}, wanted a share between 0 and 1")
    if p.card is None:
        raise ValueError("card: got None, wanted the card, by name or bytes: vLLM takes a share of it")
    taken, model = round(share * p.card), 2 * p.a.params
    if taken < model and not p.quantized:
        raise ValueError(
            f"{name}, {taken / 1e9:.1f} GB of the card, wanted more than the {model / 1e9:.1f} GB of "
            "the model in 16 bits: vLLM holds a copy of its own"
        )
    return taken


def rows_by_name(file: str, name: Any, what: str) -> dict:
    """The row of this name in a JSON file of data/; ValueError with the nearest if none has it."""
    known = {row["name"]: row for row in rows(file)}
    return known[pick(name, known, what)]


def presets() -> dict[str, dict]:
    """The rows of data/presets/presets.json, by name: how stacks differ from TRL's defaults."""
    return {row["name"]: row for row in rows("presets/presets.json")}


def settings_of(preset: str, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of `estimate` for a preset and changes, which win.

    A preset's "settings" hold always, its "quantized" ones also with load_in_4bit or load_in_8bit,
    its "lora" ones with a rank r. Raises ValueError, with all names, for a preset that is not
    known. Source: data/presets/README.md.
    """
    row = rows_by_name("presets/presets.json", preset, "preset")
    chosen = dict(row["settings"])
    if changes.get("r") is not None:
        chosen |= row.get("lora", {})
    if changes.get("load_in_4bit") or changes.get("load_in_8bit"):
        chosen |= row.get("quantized", {})
    return chosen | changes


def plan(architecture: Any, preset: str | None = None, **settings: Any) -> Plan:
    """The plan of these arguments. architecture: an Architecture, or the name of one in data/architectures."""
    if not isinstance(architecture, Architecture):
        architecture = architectures()[pick(architecture, architectures(), "architecture")]
    return Plan(architecture, **(settings if preset is None else settings_of(preset, **settings)))


def states(architecture: Any, **settings: Any) -> int:
    """Bytes of weights, gradients and Adam states by the papers' rule: 16 per trained parameter, 2 per frozen one.

    16 = 2 + 2 (16-bit weight and gradient) + 12 (fp32 copy and two moments), or 4 + 4 + 8 with fp32 weights. Frozen
    linear layers take 8 bits in int8, or those of NF4. A floor: no activations, no reference model, no upcasts.
    """
    p = plan(architecture, **settings)
    nf4 = 4 + 8 / 64 + 32 / (64 * 256) if p.bnb_4bit_use_double_quant else 4 + 32 / 64  # 4.126953125 or 4.5
    bits = nf4 if p.load_in_4bit else 8 if p.int8 else 16
    frozen = p.a.linear_params * bits / 8 + 2 * (p.a.params - p.a.linear_params)
    return 16 * p.a.params if p.full else round(frozen) + 16 * p.adapter_params


class Role(NamedTuple):
    """A model that a method holds. shared: the policy's own weights with its adapter switched off."""

    name: str
    trained: bool
    shared: bool = False


def roles(method: str, lora: bool) -> tuple[Role, ...]:
    """The models in memory while training. The papers give a frozen model 2 bytes a
    parameter, DPO 18; TRL holds the reference of full fine-tuning in fp32, DPO 20. With LoRA it is the base itself.
    """
    ppo = Role("policy", True), Role("reference", False, shared=lora), Role("reward", False), Role("value", True)
    counts = {"sft": 1, "orpo": 1, "dpo": 2, "kto": 2, "ppo": 4}
    return ppo[: counts[pick(method, counts, "method")]]

"""The settings of a training step, checked, and every decision about dtypes that follows from them."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from ftlab.memory.architecture import Architecture, check_fields, nearest

BitsAndBytes = Literal["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `estimate`: names and values are those of TRL, PEFT, bitsandbytes and transformers.

    Defaults are SFTTrainer's without a peft_config: full fine-tuning (r=None) with gradient checkpointing.
    dtype: of the weights that are not quantized. None is float32 for full fine-tuning, else 16 bits; "float32" of a
    quantized model is what prepare_model_for_kbit_training leaves (TRL's trainers do not call it, but ORPO's does).
    attn_implementation: None is transformers' choice, sdpa where a model has it.
    loss_type, of sft: "chunked_nll" is TRL's default, "nll" makes all logits, and their entropy. use_liger_kernel:
    Liger's loss; its RMSNorm and SwiGLU, which keep less than transformers' own, are not counted.
    padded: rows of different lengths; sdpa then repeats keys and values and holds a mask in each block.
    gpus, fsdp: DDP copies all to each GPU, FSDP shares weights, gradients and states. The batch is that of one GPU.

    Raises ValueError for a value that is not allowed, saying which are, and for values that do not go together.
    """

    method: Literal["sft", "dpo", "kto", "orpo"] = "sft"
    per_device_train_batch_size: int = 8
    max_length: int = 1024
    r: int | None = None
    target_modules: Any = "all-linear"
    lora_dropout: float = 0.0
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_use_double_quant: bool = False
    dtype: Literal[None, "float32", "bfloat16", "float16"] = None
    attn_implementation: Literal[None, "sdpa", "eager"] = None
    gradient_checkpointing: bool = True
    gradient_accumulation_steps: int = 1
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", BitsAndBytes] = "adamw_torch_fused"
    weight_decay: float = 0.0
    bf16: bool | None = None
    fp16: bool = False
    loss_type: Literal[None, "chunked_nll", "nll"] = None
    use_liger_kernel: bool = False
    padded: bool = False
    gpus: int = 1
    fsdp: bool = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        """The settings of these keywords. Raises ValueError for a name that is none, with the nearest."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(f"{name}: no setting that changes the memory by this name; {nearest(name, names)}")
        return cls(**given)

    def __post_init__(self) -> None:
        check_fields(self)
        lora, mixed, method, sft = self.r is not None, self.mixed, self.method, self.method == "sft"
        int8, quantized = self.load_in_8bit, self.load_in_4bit or self.load_in_8bit
        for wrong, field, wanted in (
            (not 0 <= self.lora_dropout < 1, "lora_dropout", "a probability in [0, 1)"),
            (self.lora_dropout and not lora, "lora_dropout", "0.0 for full fine-tuning: give r"),
            (self.lora_dropout and not sft, "lora_dropout", f"0.0 with {method!r}: TRL disables dropout"),
            (not lora and self.target_modules != "all-linear", "target_modules", "r with it, LoRA's rank"),
            (not lora and quantized, "r", "a rank: quantized weights cannot be trained, adapters on them can"),
            (self.load_in_4bit and int8, "load_in_8bit", "False with load_in_4bit=True"),
            (self.bnb_4bit_use_double_quant and not self.load_in_4bit, "load_in_4bit", "True with double quantization"),
            (self.fp16 and self.bf16, "fp16", "False with bf16=True"),
            (quantized and not mixed, "bf16", "True or None with a quantized model"),
            (not mixed and self.dtype in ("bfloat16", "float16"), "dtype", "'float32' without bf16 or fp16"),
            (not lora and self.dtype == "float16", "dtype", "'float32' or 'bfloat16': no scaler takes fp16 gradients"),
            (int8 and self.fsdp and self.gpus > 1, "fsdp", "False: accelerate's FSDP knows only 4-bit weights"),
            (not sft and self.loss_type, "loss_type", f"None with {method!r}"),
            (not sft and self.use_liger_kernel, "use_liger_kernel", f"False with {method!r}: not counted"),
            (self.use_liger_kernel and self.loss_type == "chunked_nll", "loss_type", "'nll' or None with Liger's loss"),
            (method == "kto" and self.per_device_train_batch_size < 2, "per_device_train_batch_size", "2 or more"),
        ):
            refuse(self, wrong, field, wanted)

    @property
    def mixed(self) -> bool:
        """Whether autocast is on: bf16 is TRL's default unless fp16 is asked for."""
        return self.fp16 or self.bf16 is not False


def refuse(settings: Settings, wrong: Any, field: str, wanted: str) -> None:
    if wrong:
        raise ValueError(f"{field}: got {getattr(settings, field)!r}, wanted {wanted}")


class Plan:
    """Every decision about dtypes, once. All formulas of this package read a plan, called p.

    n = rows * T tokens, T = max_length. Bytes per number: R of the residual stream and of all weights that are not
    quantized, c of a matrix product (2 under autocast), w of what a linear layer gives out, `adapter` of adapters. In
    docstrings also d = hidden_size, q = heads * head_dim, f = intermediate_size, V = vocab_size.

    Full fine-tuning trains fp32 weights under autocast unless dtype says else. LoRA loads 16-bit weights and keeps fp32
    adapters (PEFT's autocast_adapter_dtype); TRL makes those of a quantized model bf16. bitsandbytes' layers answer in
    the dtype of their input. Raises ValueError for settings that do not go with the architecture.
    """

    def __init__(self, a: Architecture, s: Settings) -> None:
        self.a, self.s, self.method = a, s, s.method
        self.full, self.quantized, self.int8 = s.r is None, s.load_in_4bit or s.load_in_8bit, s.load_in_8bit
        self.kind = "full" if self.full else "int8" if self.int8 else "nf4" if s.load_in_4bit else "lora"
        self.loss = "liger" if s.use_liger_kernel else s.loss_type or ("chunked_nll" if s.method == "sft" else s.method)
        self.checkpointed, self.accumulates = s.gradient_checkpointing, s.gradient_accumulation_steps > 1
        oss, self.dropout = a.model_type == "gpt_oss", s.lora_dropout > 0
        self.eager = s.attn_implementation == "eager" or oss
        self.shards = s.gpus if s.fsdp else 1
        self.rows, self.T = s.per_device_train_batch_size * (2 if s.method in ("dpo", "orpo") else 1), s.max_length
        self.n, self.amp = self.rows * self.T, s.mixed
        half = s.dtype in ("bfloat16", "float16") if self.full else s.dtype != "float32"
        self.R = 2 if self.amp and half and not (self.quantized and s.method == "orpo") else 4
        self.c, self.adapter = 2 if self.amp else 4, 2 if self.quantized else 4
        self.w = self.R if self.quantized else self.c
        self.head_copy = 2 * a.head_params if self.amp and self.R == 4 else 0  # of an fp32 head, by autocast
        self.targets = frozenset(a.linears) if self.full else a.targets(s.target_modules)
        self.adapter_params = 0 if self.full else a.lora_params(s.r, self.targets)
        self.merges = "experts" in self.targets  # PEFT adds adapters of experts to their weights
        self.experts_trained = self.full or self.merges
        refuse(s, oss and s.attn_implementation == "sdpa", "attn_implementation", "None or 'eager' for gpt_oss")
        refuse(s, self.merges and self.dropout, "lora_dropout", "0.0 with adapters on experts: PEFT refuses it")
        for field, plain in (("method", "sft"), ("fsdp", False)):
            refuse(s, a.num_experts and getattr(s, field) != plain, field, f"{plain!r} with experts: not counted")

    def masked(self, window: bool) -> bool:
        """Whether sdpa gets a mask in a block: of a padded batch, or of a window, unless rows are shorter than it."""
        beyond = self.a.sliding_window and self.a.sliding_window <= self.T
        return not self.eager and (self.s.padded or bool(window and beyond))

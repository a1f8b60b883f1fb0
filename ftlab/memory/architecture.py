"""The shape of a Llama-like decoder, and its parameters counted from the shape."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from ftlab.paths import DATA
from ftlab.pipeline.recipe import ALL_LINEAR


@dataclass(frozen=True)
class Architecture:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Names are transformers'.

    Raises ValueError for a field out of range, saying what is allowed.
    """

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
        check_fields(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads: got {kv_heads}, wanted a divisor of num_attention_heads = {heads}")
        for field, owner in (("attention_bias", "qwen2"), ("qk_norm", "qwen3")):
            got, wanted = getattr(self, field), self.model_type == owner
            if got != wanted:
                raise ValueError(f"{field}: got {got}, wanted {wanted} for {self.model_type!r}: {owner} alone has it")

    @classmethod
    def from_config(cls, config, name: str = "") -> "Architecture":
        """The architecture of a transformers config, e.g. AutoConfig.from_pretrained(folder) or model.config.

        Raises ValueError for another kind of model, or one with biases that its kind does not have by default.
        """
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kind = config.model_type
        for bias in ("attention_bias", "mlp_bias"):
            if getattr(config, bias, False):
                raise ValueError(f"{bias}: got True in a {kind!r} config, wanted False: those biases are not counted")
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
        sides = ((d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d))
        return dict(zip(ALL_LINEAR, sides, strict=True))

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
    def head_params(self) -> int:
        """V * d: the head, and as many in the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def table_params(self) -> int:
        """The embedding, and the head where it is not the same matrix."""
        return self.head_params * (1 if self.tie_word_embeddings else 2)

    @property
    def params(self) -> int:
        return self.linear_params + self.small_params + self.table_params

    def lora_params(self, r: int, target_modules: tuple[str, ...] = ALL_LINEAR) -> int:
        """r * (in + out) for each adapted layer. Raises ValueError for a target that the block does not have."""
        if unknown := sorted(set(target_modules) - set(ALL_LINEAR)):
            raise ValueError(f"target_modules: got {unknown}, wanted some of {ALL_LINEAR}")
        return self.num_hidden_layers * r * sum(sum(self.linears[name]) for name in target_modules)


def architectures() -> dict[str, Architecture]:
    """The architectures in data/architectures/architectures.json, by name."""
    rows = json.loads((DATA / "architectures" / "architectures.json").read_text(encoding="utf-8"))
    return {row["name"]: Architecture(**{k: v for k, v in row.items() if k != "total_params"}) for row in rows}


def check_fields(settings) -> None:
    """Raises ValueError for a dataclass field whose annotation (a Literal, int above 0, bool) refuses its value."""
    for field, hint in get_type_hints(type(settings)).items():
        value, allowed = getattr(settings, field), get_args(hint)
        if allowed and value not in allowed:
            raise ValueError(f"{field}: got {value!r}, wanted one of {allowed}")
        if hint is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{field}: got {value!r}, wanted a whole number above 0")
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{field}: got {value!r}, wanted True or False")

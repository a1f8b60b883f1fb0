"""The shape of a decoder, and its parameters counted from the shape."""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ftlab.paths import DATA

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP, QKV = ("gate_proj", "up_proj", "down_proj"), ATTENTION[:3]
BIASES = {"qwen2": QKV, "gpt_oss": ATTENTION}
QK_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
MOE = ("qwen3_moe", "gpt_oss")
SLIDING = {"mistral": lambda L: L, "gemma3_text": lambda L: L - L // 6, "gpt_oss": lambda L: (L + 1) // 2}


@dataclass(frozen=True)
class Architecture:
    """A decoder with RMSNorm, rotary positions and grouped-query attention. Names are transformers'.

    model_type decides the block. llama, mistral: SwiGLU, no bias. qwen2: biases on q, k and v. qwen3: norms on q and k.
    gemma3_text, the language model of Gemma 3: those norms, two more, GeGLU. qwen3_moe and gpt_oss: num_experts MLPs of
    width intermediate_size in place of one, num_experts_per_tok of them for each token; gpt_oss also has biases
    everywhere and a sink for each head. sliding_window: what a token sees in 5 of 6 blocks of gemma3_text, in every
    second one of gpt_oss, in all of mistral's where it has one.

    Raises ValueError for a field out of range, saying what is allowed.
    """

    name: str
    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss"]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads, kind = self.num_attention_heads, self.num_key_value_heads, self.model_type
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads: got {kv_heads}, wanted a divisor of num_attention_heads = {heads}")
        for field, kinds in {"num_experts": MOE, "num_experts_per_tok": MOE, "sliding_window": SLIDING}.items():
            got = getattr(self, field)
            if (got is None) == (kind in kinds) and (field, kind) != ("sliding_window", "mistral"):
                wanted = "a number" if kind in kinds else "None"
                raise ValueError(f"{field}: got {got}, wanted {wanted} for {kind!r}: {', '.join(kinds)} have it")

    @classmethod
    def from_config(cls, config: Any, name: str = "") -> "Architecture":
        """Of a transformers config: AutoConfig.from_pretrained(folder), model.config; of its language model alone.
        Raises ValueError for another kind of model, or for biases or windows that the kind does not have by default.
        """
        config = config.get_text_config()
        kind, E = config.model_type, getattr(config, "num_experts", None)
        fields = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(cls)}
        fields |= {"name": name or kind, "num_experts_per_tok": E and config.num_experts_per_tok}
        fields["head_dim"] = fields["head_dim"] or config.hidden_size // config.num_attention_heads
        if kind == "qwen3_moe":
            fields["intermediate_size"] = config.moe_intermediate_size
            if config.mlp_only_layers or config.decoder_sparse_step != 1:
                raise ValueError(f"mlp_only_layers: got {config.mlp_only_layers}, wanted experts in every block")
        for bias in ("attention_bias", "mlp_bias"):
            if getattr(config, bias, False) and kind != "gpt_oss":
                raise ValueError(f"{bias}: got True in a {kind!r} config, wanted False: those biases are not counted")
        made = cls(**fields)
        layers, windows = list(getattr(config, "layer_types", None) or []), made.windows.get(True, 0)
        if layers.count("sliding_attention") != windows and kind != "mistral":
            raise ValueError(f"layer_types: got {layers}, wanted {windows} with a window, as {kind!r} has")
        return made

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the nn.Linear layers of a block; those of experts are none (`experts`)."""
        d, f = self.hidden_size, self.intermediate_size
        q, k = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = dict(zip(ATTENTION, ((d, q), (d, k), (d, k), (q, d)), strict=True))
        return attention if self.num_experts else attention | dict(zip(MLP, ((d, f), (d, f), (f, d)), strict=True))

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """Numbers in the fused tensors of a block's experts: gate_up (E, 2f, d), down (E, d, f); gpt_oss: biases."""
        E, d, f = self.num_experts or 0, self.hidden_size, self.intermediate_size
        biases = (2 * E * f, E * d) if self.model_type == "gpt_oss" else ()
        return (2 * E * f * d, E * f * d, *biases) if E else ()

    @cached_property
    def vectors(self) -> tuple[int, ...]:
        """Numbers in every other tensor of a block, which are never quantized: norms, biases, sinks, router."""
        d, hd, kind = self.hidden_size, self.head_dim, self.model_type
        oss = (self.num_attention_heads, self.num_experts) if kind == "gpt_oss" else ()
        biases = tuple(self.linears[name][1] for name in BIASES.get(kind, ()))
        router = (self.num_experts * d,) if self.num_experts else ()
        return (d,) * self.norms + (hd, hd) * (kind in QK_NORM) + biases + router + oss

    @property
    def norms(self) -> int:
        return 4 if self.model_type == "gemma3_text" else 2

    @cached_property
    def windows(self) -> dict[bool, int]:
        """Blocks with a window (True) and without."""
        L = self.num_hidden_layers
        sliding = SLIDING[self.model_type](L) if self.sliding_window else 0
        return {window: count for window, count in ((True, sliding), (False, L - sliding)) if count}

    @cached_property
    def linear_params(self) -> int:
        """Weights of all nn.Linear layers but the head: what bitsandbytes quantizes, and "all-linear" adapts."""
        return self.num_hidden_layers * sum(n_in * n_out for n_in, n_out in self.linears.values())

    @cached_property
    def expert_params(self) -> int:
        return self.num_hidden_layers * sum(self.experts)

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
        small = self.num_hidden_layers * sum(self.vectors) + self.hidden_size
        return self.linear_params + self.expert_params + small + self.table_params

    def adapters(self, r: int, target_modules: str | Iterable[str] = "all-linear") -> list[int]:
        """Numbers in each of PEFT's tensors in a block: r * in of lora_A, r * out of lora_B. Adapters on experts are
        one pair for each fused tensor, of rank r * E, and 2 r * E for gate and up together.
        """
        targets, E, d, f = self.targets(target_modules), self.num_experts, self.hidden_size, self.intermediate_size
        sides = [side for name in sorted(targets - {"experts"}) for side in self.linears[name]]
        if "experts" in targets:  # router, gate_up, down
            sides += [d, E, 2 * E * d, 4 * E * f, E * f, E * d]
        return [r * side for side in sides]

    def lora_params(self, r: int, target_modules: str | Iterable[str] = "all-linear") -> int:
        """r * (in + out) for each adapted layer. Raises ValueError for a target that is not one of the block's."""
        return self.num_hidden_layers * sum(self.adapters(r, target_modules))

    def targets(self, target_modules: str | Iterable[str] = "all-linear") -> frozenset[str]:
        """What PEFT adapts in a block for a LoraConfig's target_modules: names of linears, and "experts". "all-linear"
        is every nn.Linear but the head. Of qwen3_moe, whose experts were nn.Linear before transformers 5, PEFT adapts
        the fused tensors too, and the router; of gpt_oss, whose experts never were, it does not.
        """
        known = {*self.linears, "experts"} if self.model_type == "qwen3_moe" else {*self.linears}
        given = known if target_modules == "all-linear" else target_modules
        names = frozenset((given,) if isinstance(given, str) else given)
        if not names or names - known:
            wanted = f"'all-linear' or some of {', '.join(self.linears)}"
            also = ": experts have adapters all or none" if "experts" in known else ""
            raise ValueError(f"target_modules: got {sorted(names - known) or 'none'}, wanted {wanted}{also}")
        return names


@cache
def architectures() -> dict[str, Architecture]:
    """The architectures in data/architectures, by name."""
    names = [field.name for field in dataclasses.fields(Architecture)]
    files = [DATA / "architectures" / file for file in ("architectures.json", "other_blocks.json")]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return {row["name"]: Architecture(**{key: row[key] for key in names if key in row}) for row in rows}


def architecture_of(given: Any) -> Architecture:
    """Of a name in data/architectures, of a transformers config, or the one given; ValueError for what is none."""
    if isinstance(given, Architecture):
        return given
    if hasattr(given, "get_text_config"):
        return Architecture.from_config(given)
    if not isinstance(given, str):
        raise ValueError(f"architecture: got {given!r}, wanted a name, an Architecture or a transformers config")
    return choose(given, architectures(), "architecture")


def choose(name: str, known: dict, what: str) -> Any:
    """known[name], or ValueError with the nearest name."""
    if name not in known:
        raise ValueError(f"{what}: got {name!r}, {nearest(name, known)}")
    return known[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error says of a name that is not known: the nearest one, or all."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else f"wanted one of {', '.join(known)}"


_hints = cache(get_type_hints)
WANTED = {int: "a whole number above 0", float: "a number", bool: "True or False"}


def check_fields(settings: Any) -> None:
    """Raises ValueError for a field of a dataclass whose annotation refuses its value; whole numbers are above 0."""
    for field, hint in _hints(type(settings)).items():
        value, kinds = getattr(settings, field), get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            near = [] if value in kinds else difflib.get_close_matches(str(value), map(str, kinds), n=1)
            right, wanted = value in kinds, f"one of {kinds}" + "".join(f"; did you mean {one!r}?" for one in near)
        else:
            right = type(value) in kinds or (float in kinds and type(value) is int) or kinds[0] not in WANTED
            right = right and not (type(value) is int and int in kinds and value < 1)
            wanted = WANTED.get(kinds[0], "") + ", or None" * (NoneType in kinds)
        if not right:
            raise ValueError(f"{field}: got {value!r}, wanted {wanted}")

"""The shape of a decoder; its parameters and those of its adapters, counted from the shape."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from ftlab.paths import DATA

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP, QKV = ("gate_proj", "up_proj", "down_proj"), ATTENTION[:3]
BIASES = {"qwen2": QKV, "gpt_oss": ATTENTION}
QK_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
SLIDING = {"gemma3_text": lambda L: L - L // 6, "gpt_oss": lambda L: (L + 1) // 2}


@dataclass(frozen=True)
class Architecture:
    """A decoder with RMSNorm, rotary positions and grouped-query attention, by transformers' names.

    model_type decides the block. llama, mistral: SwiGLU, no bias. qwen2: biases on q, k and v. qwen3: norms on q and k.
    gemma3_text: those norms, two more, GeGLU. qwen3_moe, gpt_oss: num_experts MLPs of width intermediate_size in place
    of one, num_experts_per_tok of them for each token; gpt_oss also has biases everywhere and a sink for each head.
    sliding_window: what a token sees in 5 of 6 blocks of gemma3_text and in every second one of gpt_oss.
    """

    name: str
    model_type: str
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
        return (2 * E * f * d, E * f * d) + ((2 * E * f, E * d) if self.model_type == "gpt_oss" else ()) if E else ()

    @cached_property
    def vectors(self) -> tuple[int, ...]:
        """Numbers in every other tensor of a block, which are never quantized: norms, biases, sinks, router."""
        d, E, hd, kind = self.hidden_size, self.num_experts, self.head_dim, self.model_type
        norms = (d,) * (4 if kind == "gemma3_text" else 2) + (hd, hd) * (kind in QK_NORM)
        biases = tuple(self.linears[name][1] for name in BIASES.get(kind, ()))
        return norms + biases + ((E * d,) if E else ()) + ((self.num_attention_heads, E) if kind == "gpt_oss" else ())

    @cached_property
    def linear_params(self) -> int:
        """Weights of all nn.Linear layers but the head: what bitsandbytes quantizes, and "all-linear" adapts."""
        return self.num_hidden_layers * sum(n_in * n_out for n_in, n_out in self.linears.values())

    @cached_property
    def expert_params(self) -> int:
        return self.num_hidden_layers * sum(self.experts)

    @cached_property
    def params(self) -> int:
        """All of them, the last norm too. The head is no matrix of its own where it is tied to the embedding."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        small = self.num_hidden_layers * sum(self.vectors) + self.hidden_size
        return self.linear_params + self.expert_params + small + tables

    def targets(self, target_modules: str | Iterable[str] = "all-linear") -> frozenset[str]:
        """What PEFT adapts in a block for a LoraConfig's target_modules: names of linears, and "experts". "all-linear"
        is every nn.Linear but the head, and the experts and router of qwen3_moe, but not of gpt_oss.
        """
        known = [*self.linears] + ["experts"] * (self.model_type == "qwen3_moe")
        given = known if target_modules == "all-linear" else target_modules
        names = [given] if isinstance(given, str) else [*(given or [None])]
        return frozenset(pick(name, known, "target_modules") for name in names)

    def adapters(self, r: int, target_modules: str | Iterable[str] = "all-linear") -> list[int]:
        """Numbers in each of PEFT's tensors in a block: r * in of lora_A, r * out of lora_B. Adapters on experts are
        one pair for each fused tensor, of rank r * E, and 2 r * E for gate and up together.
        """
        targets, E, d, f = self.targets(target_modules), self.num_experts, self.hidden_size, self.intermediate_size
        sides = [side for name in sorted(targets - {"experts"}) for side in self.linears[name]]
        experts = [d, E, 2 * E * d, 4 * E * f, E * f, E * d] if "experts" in targets else []  # router, gate_up, down
        return [r * side for side in sides + experts]

    def lora_params(self, r: int, target_modules: str | Iterable[str] = "all-linear") -> int:
        """r * (in + out) for each adapted layer. Raises ValueError for a target that is not one of the block's."""
        return self.num_hidden_layers * sum(self.adapters(r, target_modules))


@cache
def rows(file: str) -> list[dict]:
    """The rows of a JSON file in data/."""
    return json.loads((DATA / file).read_text(encoding="utf-8"))


@cache
def architectures() -> dict[str, Architecture]:
    """The architectures in data/architectures, by name."""
    shapes = ({k: v for k, v in row.items() if k != "total_params"} for row in rows("architectures/architectures.json"))
    return {shape["name"]: Architecture(**shape) for shape in shapes}


def pick(given: Any, known: Iterable, what: str) -> Any:
    """What is given, if it is known; otherwise ValueError with the nearest that is, and all of them."""
    if given not in (choices := [*known]):
        near = difflib.get_close_matches(str(given), map(str, choices), n=1, cutoff=0.5)
        nearest = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{what}: got {given!r}, {nearest}wanted one of {', '.join(map(repr, choices))}")
    return given

"""How far off the memory calculator is: `python data/results/memory_error.py` writes memory_error.json beside it.

Each configuration is estimated by ftlab.memory.estimate and measured by ftlab.memory.measure, which runs the libraries'
own code on tensors without data and counts every storage; the ratio of the two peaks is the error. Beside it stands
what three rules in common use say of the same configuration. About five minutes on one core; nothing is downloaded.

The formulas were worked out on traces of a few of these models with two to six layers. So a second table, "drawn", is
of shapes and settings drawn at random when the formulas were finished; nothing was changed after it.

Where a CUDA GPU is present, real configurations (random weights of real shapes) are added under "cuda", as the ratio of
the estimate to torch.cuda.max_memory_allocated, with the card's name.
"""

import dataclasses
import importlib.metadata
import json
import random
import statistics
import time
from pathlib import Path

from ftlab.memory import Architecture, Setup, architectures, estimate, measure
from ftlab.pipeline.recipe import ALL_LINEAR, Recipe

OUT = Path(__file__).with_suffix(".json")
METHODS = {
    "full": {"r": 0},
    "lora": {},
    "qlora": {"quantization": "nf4-double"},
    "int8": {"quantization": "int8"},
}
SMALL = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B")
MIDDLE = ("Llama-2-7B", "Mistral-7B-v0.3", "Qwen2.5-7B", "Llama-3-8B", "Qwen3-8B")
SHAPES = ((1, 512, False), (4, 1024, False), (8, 2048, True))  # batch, length, gradient checkpointing


def recipe(method: str, batch: int, length: int, checkpointing: bool, **changes) -> Recipe:
    settings = {"precision": "bf16", "gradient_checkpointing": checkpointing, "batch_size": batch, "max_length": length}
    return Recipe(**{**settings, **METHODS[method], **changes})


def configurations() -> list[tuple[Architecture, str, Recipe, Setup]]:
    """(architecture, method, recipe, setup) of the table: known models at their full depth."""
    chosen = [(name, m, recipe(m, *shape), Setup()) for name in SMALL for m in METHODS for shape in SHAPES]
    for name in MIDDLE:
        chosen += [
            (name, "full", recipe("full", 1, 1024, True), Setup()),
            (name, "lora", recipe("lora", 2, 1024, False), Setup()),
            (name, "qlora", recipe("qlora", 4, 2048, True), Setup()),
        ]
    chosen.append(("Llama-2-13B", "lora", recipe("lora", 1, 4096, True), Setup()))
    chosen.append(("Llama-3-70B", "qlora", recipe("qlora", 1, 512, True), Setup()))
    one = "Llama-3.2-1B"  # what the grid leaves at its default, one change at a time
    for method in ("full", "lora", "qlora"):
        for setup in (Setup(loss="full"), Setup(loss="fused"), Setup(attention="eager"), Setup(padded=True)):
            chosen.append((one, method, recipe(method, 2, 1024, False), setup))
    for changes in ({"r": 64}, {"target_modules": ("q_proj", "v_proj")}, {"lora_dropout": 0.1}, {"precision": "fp32"}):
        chosen.append((one, "lora", recipe("lora", 2, 1024, False, **changes), Setup()))
    for optimizer in ("adamw_8bit", "sgd"):
        chosen.append((one, "full", recipe("full", 1, 128, True, optimizer=optimizer), Setup()))
    chosen.append((one, "qlora", recipe("qlora", 2, 1024, False, quantization="nf4"), Setup()))
    known = architectures()
    return [(known[name], *rest) for name, *rest in chosen]


def drawn(count: int = 40, seed: int = 0) -> list[tuple[Architecture, str, Recipe, Setup]]:
    """Shapes and settings drawn at random: 2 to 12 layers, 64 to 6,000 tokens, any method, loss, attention, targets."""
    rng, chosen = random.Random(seed), []
    for number in range(count):
        heads, head_dim = rng.choice((4, 8, 12, 16, 24, 32)), rng.choice((64, 80, 96, 128))
        kind, d = rng.choice(("llama", "mistral", "qwen2", "qwen3")), heads * head_dim
        shape = Architecture(
            f"drawn {number}",
            kind,
            hidden_size=d,
            num_hidden_layers=rng.randint(2, 12),
            num_attention_heads=heads,
            num_key_value_heads=rng.choice([k for k in range(1, heads + 1) if heads % k == 0]),
            head_dim=head_dim,
            intermediate_size=64 * round(d * rng.uniform(2.2, 4) / 64),
            vocab_size=64 * rng.randint(125, 2500),
            tie_word_embeddings=rng.random() < 0.5,
            attention_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )
        settings = {
            "r": rng.choice((4, 16, 64)),
            "target_modules": rng.choice((ALL_LINEAR, ("q_proj", "v_proj"), ALL_LINEAR[:4], ALL_LINEAR[4:])),
            "lora_dropout": rng.choice((0.0, 0.0, 0.05)),
            "gradient_accumulation_steps": rng.choice((1, 1, 4)),
            "optimizer": rng.choice(("adamw_torch", "adamw_8bit", "sgd")),
        }
        method, loss = rng.choice(tuple(METHODS)), rng.choice(("chunked", "chunked", "full", "fused"))
        setup = Setup(loss=loss, attention=rng.choice(("sdpa", "sdpa", "eager")), padded=rng.random() < 0.3)
        size = rng.choice((1, 2, 3, 4, 8)), rng.randint(64, 6000), rng.random() < 0.5
        chosen.append((shape, method, recipe(method, *size, **{**settings, **METHODS[method]}), setup))
    return chosen


def accelerate_rule(architecture: Architecture) -> int:
    """`accelerate estimate-memory`'s "Total training using Adam": the largest of its parts, for full training only.

    The function is accelerate's own. It knows no activations, no batch, no LoRA.
    """
    from accelerate.commands.estimate import estimate_training_usage

    return max(estimate_training_usage(4 * architecture.params, "bfloat16").values())


def llama_factory_table(architecture: Architecture, method: str) -> float | None:
    """The row of LLaMA-Factory's README ("Hardware Requirement", GB) for 7, 13, 30 and 65B; other sizes: None."""
    sizes = {7: (5e9, 9e9), 13: (11e9, 15e9), 30: (27e9, 35e9), 65: (60e9, 75e9)}
    table = {
        "full": (160, 320, 600, 1200),
        "lora": (16, 32, 80, 160),
        "int8": (10, 16, 40, 80),
        "qlora": (6, 12, 24, 48),
    }
    for column, (low, high) in enumerate(sizes.values()):
        if low < architecture.params < high:
            return table[method][column] * 1e9
    return None


def eleuther_formula(architecture: Architecture, method: str, recipe: Recipe, setup: Setup) -> float:
    """EleutherAI, Transformer Math 101: weights 2 P, gradients 2 and AdamW 12 bytes per trained parameter, activations.

    Activations: s b h L (34 + 5 a s / h) bytes, without the second term where the attention matrix is not kept, and
    2 s b h L with full recomputation. The article speaks of full training; for adapters the same rule is applied to
    what is trained, and frozen linear layers are counted at 8 or 4.127 bits.
    """
    a, s, b = architecture, recipe.max_length, recipe.batch_size
    trained = a.lora_params(recipe.r, recipe.target_modules) if recipe.r else a.params
    bytes_each = {"full": 2, "lora": 2, "int8": 1, "qlora": 4.126953125 / 8}[method]
    weights = bytes_each * a.linear_params + 2 * (a.params - a.linear_params) + (2 * trained if recipe.r else 0)
    per_layer = 34 + (5 * a.num_attention_heads * s / a.hidden_size if setup.attention == "eager" else 0)
    activations = s * b * a.hidden_size * a.num_hidden_layers * (2 if recipe.gradient_checkpointing else per_layer)
    return weights + 14 * trained + activations


def row(architecture: Architecture, method: str, recipe: Recipe, setup: Setup, on: str = "fake") -> dict:
    """One line of a table: estimated, measured, and what the three rules say."""
    predicted, measured = estimate(architecture, recipe, setup), measure(architecture, recipe, setup, on=on)
    peak = measured.peak_bytes
    print(f"{predicted.peak_bytes / peak:.4f}  {architecture.name} {method} {recipe.batch_size} x {recipe.max_length}")
    others = {
        "accelerate": accelerate_rule(architecture),
        "llama_factory": llama_factory_table(architecture, method),
        "eleuther": eleuther_formula(architecture, method, recipe, setup),
    }
    default = Recipe(precision="bf16")
    kept = ("r", "target_modules", "lora_dropout", "quantization", "precision", "optimizer")
    kept += ("gradient_accumulation_steps",)
    changes = {key: getattr(recipe, key) for key in kept if getattr(recipe, key) != getattr(default, key)}
    changes |= {key: value for key, value in vars(setup).items() if value != getattr(Setup(), key)}
    return {
        "architecture": architecture.name,
        "method": method,
        "batch": recipe.batch_size,
        "length": recipe.max_length,
        "checkpointing": recipe.gradient_checkpointing,
        "changes": changes,
        "measured_bytes": peak,
        "estimated_bytes": predicted.peak_bytes,
        "ratio": round(predicted.peak_bytes / peak, 4),
        "peak_phase": measured.peak_phase,
        "phases": {
            phase: round(predicted.moments[phase].total / moment.total, 4) for phase, moment in measured.moments.items()
        },
        "others": {rule: value and round(value / peak, 3) for rule, value in others.items()},
        **({"reserved_bytes": measured.reserved_bytes} if measured.reserved_bytes else {}),
        **({} if architecture.name in architectures() else {"shape": dataclasses.asdict(architecture)}),
    }


def summary(ratios: list[float]) -> dict:
    """Errors are estimate / measured - 1, in percent."""
    errors = [100 * (ratio - 1) for ratio in ratios]
    return {
        "configurations": len(errors),
        "lowest_percent": round(min(errors), 2),
        "median_percent": round(statistics.median(errors), 2),
        "highest_percent": round(max(errors), 2),
        "median_absolute_percent": round(statistics.median(map(abs, errors)), 2),
        "worst_absolute_percent": round(max(map(abs, errors)), 2),
    }


def table(rows: list[dict]) -> dict:
    below = [row for row in rows if row["ratio"] < 1]
    rules = {"ours": [row["ratio"] for row in rows]}
    for rule in ("accelerate", "llama_factory", "eleuther"):
        rules[rule] = [row["others"][rule] for row in rows if row["others"][rule]]
    kept = ("architecture", "method", "batch", "length", "checkpointing", "changes", "ratio")
    return {
        "summary": {rule: summary(ratios) for rule, ratios in rules.items() if ratios},
        "by_phase": {
            phase: summary([row["phases"][phase] for row in rows]) for phase in ("load", "forward", "backward", "step")
        },
        "under_estimates": [{key: row[key] for key in kept} for row in sorted(below, key=lambda row: row["ratio"])],
        "rows": rows,
    }


def cuda_rows() -> list[dict]:
    """At least 12 real configurations: those of the table that fit the GPU at hand by our own estimate."""
    import torch

    room = 0.9 * torch.cuda.get_device_properties(0).total_memory
    chosen = [
        one for one in configurations() if one[3].loss != "fused" and estimate(one[0], *one[2:]).peak_bytes < room
    ]
    return [row(*one, on="cuda") for one in chosen]


def main() -> None:
    import torch

    start = time.perf_counter()
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
    result = {
        "what": "estimate / measured peak bytes of one training step; measured by ftlab.memory.measure(on='fake')",
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in names},
        "fake": table([row(*one) for one in configurations()]),
        "drawn": table([row(*one) for one in drawn()]),
        "cuda": None,
    }
    if torch.cuda.is_available():
        result["cuda"] = {"card": torch.cuda.get_device_name(), **table(cuda_rows())}
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name]["summary"] for name in ("fake", "drawn")}, indent=1))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

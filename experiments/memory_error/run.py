"""How far off the memory calculator is: `python experiments/memory_error/run.py` writes records.jsonl beside it.

    python experiments/memory_error/run.py        every configuration that records.jsonl lacks
    python experiments/memory_error/run.py 20     at most 20 of them; the next call goes on
    python experiments/memory_error/run.py 0      estimates everything once more and measures nothing

Each configuration is estimated by ftlab.memory.estimate and measured by tests/oracles/real_step.py, which runs the
libraries' own code on tensors without data and counts every storage; the ratio of the two peaks is the error. Beside it
stands what three rules in common use say of the same configuration. About ten minutes on one core; nothing is
downloaded.

"known": published models at their full depth. "drawn": shapes and settings drawn at random, with a seed that was chosen
when the formulas were finished; nothing was changed after it. Where a CUDA GPU is present, "cuda" holds real
configurations (random weights of real shapes) against torch.cuda.max_memory_allocated, with the card's name.

A line with the part "known" sums that table up; the lines after it, "known row", are its configurations.
"""

import dataclasses
import importlib.metadata
import json
import random
import statistics
import sys
from pathlib import Path

from ftlab.memory import Architecture, Memory, architectures, estimate
from ftlab.memory.architecture import ATTENTION, MLP

OUT = Path(__file__).with_name("records.jsonl")
sys.path.insert(0, str(OUT.parents[2] / "tests"))
WHAT = "estimate / measured peak bytes of one training step; measured by tests/oracles/real_step.py"
METHODS = {
    "full": {},
    "full bf16": {"dtype": "bfloat16"},
    "lora": {"r": 16},
    "qlora": {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "qlora fp32": {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True, "dtype": "float32"},
    "int8": {"r": 16, "load_in_8bit": True},
    "int8 fp32": {"r": 16, "load_in_8bit": True, "dtype": "float32"},
}
MOE = ("qwen3_moe", "gpt_oss")
PLAIN = ("full", "lora", "qlora", "int8")
SMALL = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B")
MIDDLE = ("Llama-2-7B", "Mistral-7B-v0.3", "Qwen2.5-7B", "Llama-3-8B", "Qwen3-8B", "Gemma-3-4B")
LARGE = ("Llama-2-13B", "Gemma-3-12B", "Mistral-Small-24B-2501", "Qwen3-32B", "Llama-3.3-70B")
SHAPES = ((1, 512, False), (4, 1024, False), (8, 2048, True))  # batch, length, gradient checkpointing
Case = tuple[Architecture, str, dict]


def case(architecture: Architecture, method: str, batch: int, length: int, checkpointing: bool, **changes) -> Case:
    """(architecture, method, settings of ftlab.memory.estimate)."""
    size = {"per_device_train_batch_size": batch, "max_length": length, "gradient_checkpointing": checkpointing}
    return architecture, method, METHODS[method] | size | {"optim": "adamw_torch"} | changes


def known() -> list[Case]:
    models = architectures()
    chosen = [(name, method, *shape) for name in SMALL for method in PLAIN for shape in SHAPES]
    for name in MIDDLE:
        chosen += [(name, "full", 1, 1024, True), (name, "lora", 2, 1024, False), (name, "qlora", 4, 2048, True)]
    chosen += [(name, "qlora", 1, 2048, True) for name in LARGE]
    chosen += [("Llama-2-13B", "lora", 1, 4096, True), ("Llama-3-70B", "qlora", 1, 512, True)]
    for name in ("Qwen3-30B-A3B", "gpt-oss-20b"):
        chosen += [(name, "lora", 1, 1024, False), (name, "lora", 2, 2048, True), (name, "qlora", 1, 2048, True)]
    chosen += [("Llama-3.2-1B", method, 2, 1024, c) for method in METHODS for c in (False, True) if " " in method]
    cases = [case(models[name], *rest) for name, *rest in chosen]
    one = models["Llama-3.2-1B"]  # what the grid leaves at its default, one change at a time
    loss = ({"loss_type": "nll"}, {"use_liger_kernel": True})
    for method in ("full", "lora", "qlora"):
        for changes in (*loss, {"attn_implementation": "eager"}, {"padded": True}):
            cases.append(case(one, method, 2, 1024, False, **changes))
    for changes in ({"r": 64}, {"target_modules": ["q_proj", "v_proj"]}, {"lora_dropout": 0.1}, {"bf16": False}):
        cases.append(case(one, "lora", 2, 1024, False, **changes))
    for optim in ("adamw_torch_fused", "adamw_8bit", "sgd"):
        cases.append(case(one, "full", 1, 128, True, optim=optim))
    cases.append(case(one, "qlora", 2, 1024, False, bnb_4bit_use_double_quant=False))
    return cases


def drawn(count: int = 60, seed: int = 2027) -> list[Case]:
    """Shapes and settings drawn at random: 2 to 12 layers, 64 to 6,000 tokens, any block, method, loss, targets."""
    rng, cases = random.Random(seed), []
    for number in range(count):
        heads, head_dim = rng.choice((4, 8, 12, 16, 24, 32)), rng.choice((64, 80, 96, 128))
        kind = rng.choice(("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3_text", *MOE))
        d, experts = heads * head_dim, kind in MOE
        shape = Architecture(
            f"drawn {number}",
            kind,
            hidden_size=d,
            num_hidden_layers=rng.randint(2, 12),
            num_attention_heads=heads,
            num_key_value_heads=rng.choice([k for k in range(1, heads + 1) if heads % k == 0]),
            head_dim=head_dim,
            intermediate_size=64 * round(d * (rng.uniform(0.25, 1) if experts else rng.uniform(2.2, 4)) / 64),
            vocab_size=64 * rng.randint(125, 2500),
            tie_word_embeddings=rng.random() < 0.5,
            num_experts=rng.choice((8, 16, 32, 64)) if experts else None,
            num_experts_per_tok=rng.choice((2, 4, 8)) if experts else None,
            sliding_window=rng.choice((128, 512, 1024)) if kind in ("gemma3_text", "gpt_oss") else None,
        )
        method = rng.choice(tuple(METHODS))
        settings = {
            "optim": rng.choice(("adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd")),
            "gradient_accumulation_steps": rng.choice((1, 1, 4)),
            "attn_implementation": rng.choice((None, None, "eager")),
            "padded": rng.random() < 0.3,
        } | rng.choice(({}, {}, {"loss_type": "nll"}, {"use_liger_kernel": True}))
        if "r" in METHODS[method]:
            targets = ["all-linear", ["q_proj", "v_proj"], ATTENTION] + ([] if experts else [MLP])
            settings |= {"r": rng.choice((4, 16, 64)), "target_modules": rng.choice(targets)}
            settings |= {"lora_dropout": rng.choice((0.0, 0.0, 0.05))}
        longest = 2000 if settings["attn_implementation"] == "eager" or kind == "gpt_oss" else 6000
        size = rng.choice((1, 2, 3, 4, 8)), rng.randint(64, longest), rng.random() < 0.5
        cases.append(case(shape, method, *size, **settings))
    return cases


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
            return table[method.split()[0]][column] * 1e9
    return None


def eleuther_formula(architecture: Architecture, method: str, settings: dict) -> float:
    """EleutherAI, Transformer Math 101: weights 2 P, gradients 2 and AdamW 12 bytes per trained parameter, activations.

    Activations: s b h L (34 + 5 a s / h) bytes, without the second term where the attention matrix is not kept, and
    2 s b h L with full recomputation. The article speaks of full training; for adapters the same rule is applied to
    what is trained, and frozen linear layers are counted at 8 or 4.127 bits.
    """
    a, s, b = architecture, settings["max_length"], settings["per_device_train_batch_size"]
    adapters = a.lora_params(settings["r"], settings.get("target_modules", "all-linear")) if "r" in settings else 0
    bytes_each = {"full": 2, "lora": 2, "int8": 1, "qlora": 4.126953125 / 8}[method.split()[0]]
    weights = bytes_each * a.linear_params + 2 * (a.params - a.linear_params) + 2 * adapters
    eager = settings.get("attn_implementation") == "eager" or a.model_type == "gpt_oss"
    per_layer = 34 + (5 * a.num_attention_heads * s / a.hidden_size if eager else 0)
    activations = s * b * a.hidden_size * a.num_hidden_layers * (2 if settings["gradient_checkpointing"] else per_layer)
    return weights + 14 * (adapters or a.params) + activations


def row(architecture: Architecture, method: str, settings: dict, measured: dict) -> dict:
    """One line of a table: estimated, measured, and what the three rules say. measured: phase -> bytes."""
    predicted, peak = estimate(architecture, **settings), max(measured.values())
    others = {
        "accelerate": accelerate_rule(architecture),
        "llama_factory": llama_factory_table(architecture, method),
        "eleuther": eleuther_formula(architecture, method, settings),
    }
    return {
        "architecture": architecture.name,
        **({} if architecture.name in architectures() else {"shape": dataclasses.asdict(architecture)}),
        "method": method,
        "settings": settings,
        "measured_bytes": measured,
        "estimated_bytes": predicted.peak_bytes,
        "ratio": round(predicted.peak_bytes / peak, 4),
        "peak_phase": max(measured, key=measured.get),
        "phases": {phase: round(predicted.moments[phase].total / size, 4) for phase, size in measured.items()},
        "others": {rule: value and round(value / peak, 3) for rule, value in others.items()},
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
    """The line that sums a table up: the errors of each rule, of ours by phase, and where ours was too low."""
    rules = {"ours": [row["ratio"] for row in rows]}
    for rule in ("accelerate", "llama_factory", "eleuther"):
        rules[rule] = [row["others"][rule] for row in rows if row["others"][rule]]
    below = sorted((row for row in rows if row["ratio"] < 1), key=lambda row: row["ratio"])
    return {
        "summary": {rule: summary(ratios) for rule, ratios in rules.items() if ratios},
        "by_phase": {
            phase: summary([row["phases"][phase] for row in rows]) for phase in ("load", "forward", "backward", "step")
        },
        "under_estimates": [{k: row[k] for k in ("architecture", "method", "settings", "ratio")} for row in below],
    }


def measured(memory: Memory) -> dict[str, int]:
    return {phase: moment.total for phase, moment in memory.moments.items()}


def cuda_cases() -> list[Case]:
    """Those of the known configurations that fit the GPU at hand by our own estimate."""
    import torch

    room = 0.9 * torch.cuda.get_device_properties(0).total_memory
    return [c for c in known() if "use_liger_kernel" not in c[2] and estimate(c[0], **c[2]).peak_bytes < room]


def name_of(architecture: Architecture, settings: dict) -> str:
    """What tells one configuration from another."""
    shape = None if architecture.name in architectures() else dataclasses.asdict(architecture)
    return json.dumps([architecture.name, shape, settings])


def rows_of(part: str, lines: list[dict]) -> dict[str, dict]:
    """{name_of: line} of the configurations of a part."""
    mine = [line for line in lines if line["part"] == f"{part} row"]
    return {json.dumps([line["architecture"], line.get("shape"), line["settings"]]): line for line in mine}


def summed_up(part: str, cases: list[Case], lines: list[dict], about: dict) -> list[dict]:
    """The lines of a part, estimated by the code as it is now; first the one that sums them up."""
    there, rows = rows_of(part, lines), []
    for architecture, method, settings in cases:
        if line := there.get(name_of(architecture, settings)):
            found = row(architecture, method, settings, line["measured_bytes"])
            rows.append({"part": f"{part} row", **found, "versions": line["versions"]})
    if not rows:
        return []
    head = {"part": part, "what": WHAT, **table(rows), **about}
    print(part, len(rows), "of", len(cases), json.dumps(head["summary"]["ours"]))
    return [head, *rows]


def main() -> None:
    import torch
    from oracles.real_step import measure

    from experiments.runs import add, read, replace

    left, parts = int((sys.argv[1:] or [10**6])[0]), {"known": ("fake", known()), "drawn": ("fake", drawn())}
    if torch.cuda.is_available():
        parts["cuda"] = ("cuda", cuda_cases())
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
    about = {"versions": {name: importlib.metadata.version(name).split("+")[0] for name in names}}
    for part, (on, cases) in parts.items():
        there = rows_of(part, read(OUT))
        missing = [case for case in cases if name_of(case[0], case[2]) not in there]
        for architecture, method, settings in missing[:left]:
            found = row(architecture, method, settings, measured(measure(architecture, on=on, **settings)))
            add(OUT, {"part": f"{part} row", **found, **about})
            print(f"{found['ratio']:.4f}  {architecture.name} {method} {settings}", flush=True)
        left -= min(left, len(missing))
    lines, whole = read(OUT), []
    for part, (_, cases) in parts.items():
        card = {"card": torch.cuda.get_device_name()} if part == "cuda" else {}
        whole += summed_up(part, cases, lines, about | card)
    kept = [line for line in lines if line["part"].split()[0] not in parts]  # of a GPU that is not at hand
    replace(OUT, whole + kept)


if __name__ == "__main__":
    main()

"""LoRA SFT of SmolLM2 on a CPU: seconds a step of several ways to train on the same batches, against its floor.

    python bench/sft.py            three rounds, about 19 minutes on two cores; `make stack` adds two of the contestants
    python bench/sft.py 1          one round

The same 96 tickets, 8 a step, 12 steps; LoRA r = 16 on all linear layers, AdamW, seed 0, fp32 weights and bf16
products where the processor has them (fp32 elsewhere). Contestants, each in a process of its own, in turns:

    TRL defaults     SFTTrainer; TRL's own default is gradient checkpointing, which buys memory with time
    TRL              the same without gradient checkpointing
    Unsloth          its CPU backend
    LLaMA-Factory    by its own command, the file that ftlab.pipeline.stack writes
    Axolotl          likewise, in fp32: asked for bf16 without a GPU, Axolotl 0.19 gives up
    plain            a loop over padded batches: the model's own loss, autocast, AdamW
    plain, tuned     the same with eager attention, and the head only where a token counts
    fast             a Recipe with `fast: true`

seconds: of the training loop (transformers' train_runtime, and the same stretch of the plain loops), without start-up
and loading. tokens: of the rendered rows; padding is no token. loss: of every step, nats/token, so that a reader sees
that all of them do the same work.

floor: the products that no LoRA step can avoid, at the shapes of our packed batches, each measured alone in each round,
beside the contestant that it is the floor of (the lower median of the rounds counts): each frozen weight forward, and
backward to its input (it has no gradient of its own), the thin LoRA products, the head at the counted positions; after
the last layer's attention, the counted positions only. The rest of a step - attention, norms, rotations, SwiGLU, the
optimizer, Python - would take no time at all.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness

from ftlab.paths import DATA
from ftlab.pipeline import data, stack
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.serve import environment

ROWS, BATCH, STEPS = 96, 8, 12
RECIPE = Recipe(
    batch_size=BATCH, max_steps=STEPS, max_length=256, learning_rate=1e-3, logging_steps=1, save_steps=STEPS
)
OURS = {
    "TRL defaults": {"gradient_checkpointing": True},
    "TRL": {},
    "Unsloth": {"engine": "unsloth"},
    "fast": {"fast": True},
}
PEERS = {"LLaMA-Factory": stack.write_llamafactory, "Axolotl": stack.write_axolotl}
PLAIN = {"plain": False, "plain, tuned": True}


def rows() -> list[dict]:
    """The tickets, with the keys that SFT reads."""
    tickets = data.triage_rows(DATA / "triage" / "train.jsonl")[:ROWS]
    return [{key: row[key] for key in ("prompt", "completion")} for row in tickets]


def run(name: str, folder: Path) -> dict:
    """Trains one contestant in a process of its own; what it took, and the loss of each step."""
    if name in PEERS:
        recipe = precise() if name != "Axolotl" else RECIPE.replace(precision="fp32")
        done = stack.train_peer(PEERS[name](recipe, rows(), folder))
        log, peak_bytes = [*done.log, {"train_runtime": told(folder / "output")}], done.peak_bytes
    else:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
        recipe = precise().replace(train_file=str(folder / "rows.jsonl"), **OURS.get(name, {}))
        file = recipe.to_yaml(folder / "recipe.yaml")
        if name in PLAIN:
            command = [sys.executable, __file__, "--plain", name, str(folder)]
        else:
            command = [sys.executable, "-m", "ftlab.pipeline.train", str(file), "--folder", str(folder / "run")]
        _, peak_bytes = stack.measure(name, command, folder)
        log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    return {
        "name": name,
        "seconds": next(record["train_runtime"] for record in log if "train_runtime" in record),
        "loss": [record["loss"] for record in log if "loss" in record],
        "peak_bytes": peak_bytes,
        "load": round(os.getloadavg()[0], 2),
    }


def told(output: Path) -> float:
    """The training loop's seconds as the tool tells them: LLaMA-Factory in a file of results, Axolotl in its log."""
    files = [output / name for name in ("all_results.json", "debug.log") if (output / name).is_file()]
    return float(re.findall(r"train_runtime\W+([\d.]+)", files[0].read_text("utf-8"))[-1])


def precise() -> Recipe:
    """The recipe with this machine's precision written out, since each tool would choose its own."""
    return RECIPE.replace(precision=harness.alone(_precision))


def _precision() -> str:
    from ftlab.pipeline.train import resolve_precision

    return resolve_precision(RECIPE)


def batches(folder: str) -> list[dict]:
    """TRL's own batches of this run, in its order: {input_ids, attention_mask, labels} as lists, padded."""
    from ftlab.pipeline.train import sft_trainer

    trainer = sft_trainer(precise(), rows(), None, Path(folder))
    keys = ("input_ids", "attention_mask", "labels")
    return [{key: batch[key].tolist() for key in keys} for batch in trainer.get_train_dataloader()]


def plain(name: str, folder: Path) -> None:
    """The loop of the two plain contestants; leaves log.jsonl as a run does."""
    import torch
    from peft import get_peft_model
    from transformers import get_cosine_schedule_with_warmup, set_seed

    from ftlab.pipeline.models import load
    from ftlab.pipeline.train import lora_config

    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    todo = [
        {key: torch.tensor(ids) for key, ids in batch.items()}
        for batch in json.loads((folder / "batches.json").read_text())
    ]
    model, _ = load(recipe.model)
    set_seed(recipe.seed)
    model = get_peft_model(model, lora_config(recipe)).train()
    if PLAIN[name]:
        model.config._attn_implementation = model.get_base_model().config._attn_implementation = "eager"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, STEPS)
    log, start = [], time.perf_counter()
    for step, batch in enumerate(todo, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            if PLAIN[name]:
                labels = batch.pop("labels")[:, 1:]
                hidden = model.get_base_model().model(**batch).last_hidden_state[:, :-1]
                counted = labels != -100
                logits = model.get_base_model().lm_head(hidden[counted])
                loss = torch.nn.functional.cross_entropy(logits.float(), labels[counted])
            else:
                loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item()})
    log.append({"step": STEPS, "train_runtime": time.perf_counter() - start})
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log), encoding="utf-8")


def floor(todo: list[dict]) -> dict:
    """Seconds, FLOPs and shapes of the products that a step on these batches cannot avoid, from the packed lengths."""
    import torch

    from ftlab.cpu import pack
    from ftlab.pipeline.models import load

    model, _ = load("smollm2")
    config, dtype = model.config, torch.bfloat16 if precise().precision == "bf16" else torch.float32
    packed = [pack(_rows_of(batch)) for batch in todo]
    n = round(sum(batch["input_ids"].shape[1] for batch in packed) / len(packed))
    counted = round(sum(int((batch["labels"] != -100).sum()) for batch in packed) / len(packed))
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    layers = config.num_hidden_layers
    linear = [(width, width, 1), (width, 2 * inner, 2), (inner, width, 1)]  # in, out, LoRA layers side by side
    # After the last layer's attention only the counted tokens matter; below the first layer nothing is learned.
    stacks = [(n, width, qkv, 3, layers, layers - 1)]
    stacks += [(m, *one, times, times) for m, times in ((n, layers - 1), (counted, 1)) for one in linear]
    parts = []
    for m, in_, out, stacked, times, to_input in stacks:
        thin = RECIPE.r * stacked
        parts += [(m, in_, out, times), (m, in_, thin, times), (m, thin, out, times)]  # forward
        parts += [(m, out, thin, times), (thin, m, in_, times), (out, m, thin, times)]  # gradients of A and B
        parts += [(m, out, in_, to_input), (m, thin, in_, to_input)]  # backward to the input
    parts += [(counted, width, config.vocab_size, 1), (counted, config.vocab_size, width, 1)]
    timed = [(a, b, c, times, _seconds(a, b, c, dtype)) for a, b, c, times in parts]
    rates = [2 * a * b * c / seconds for a, b, c, _, seconds in timed]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_packed": n,
        "tokens_counted": counted,
        "seconds": sum(times * seconds for *_, times, seconds in timed),
        "flops": sum(2 * a * b * c * times for a, b, c, times, _ in timed),
        "best_flops_per_second": max(rates),
        "products": [
            {"m": a, "k": b, "n": c, "times": times, "seconds": seconds, "flops_per_second": rate}
            for (a, b, c, times, seconds), rate in zip(timed, rates, strict=True)
        ],
    }


def _rows_of(batch: dict) -> list[dict]:
    """The rows of a padded batch without their padding."""
    keep = [sum(mask) for mask in batch["attention_mask"]]
    return [{key: batch[key][i][:length] for key in ("input_ids", "labels")} for i, length in enumerate(keep)]


def _seconds(m: int, k: int, n: int, dtype) -> float:
    """Of (m, k) @ (k, n): the median of ten tries, each the mean of ten in a row."""
    import torch

    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).T
    out = torch.empty(m, n, dtype=dtype)
    tries = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=out)
        tries.append((time.perf_counter() - start) / 10)
    return statistics.median(tries)


def main(rounds: int) -> None:
    names = [*OURS, *PLAIN]
    for name in PEERS:
        try:
            environment(name.lower().replace("-", ""))
            names.append(name)
        except RuntimeError as absent:
            print(f"without {name}: {absent}")
    with tempfile.TemporaryDirectory() as folder:
        todo = harness.alone(batches, folder)
    tokens = sum(sum(map(sum, batch["attention_mask"])) for batch in todo)
    runs, floors = [], []
    for i, name in harness.in_turns(names, rounds):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "batches.json").write_text(json.dumps(todo))
            runs.append({"round": i, **run(name, Path(folder))})
        print(
            i, f"{name:14} {runs[-1]['seconds'] / STEPS:.2f} s a step, last loss {runs[-1]['loss'][-1]:.4f}", flush=True
        )
        if name == "fast":
            floors.append(harness.alone(floor, todo))
    lowest = sorted(floors, key=lambda one: one["seconds"])[(len(floors) - 1) // 2]
    table = {}
    for name in names:
        mine = [one for one in runs if one["name"] == name]
        seconds = harness.spread([one["seconds"] / STEPS for one in mine])
        table[name] = {
            "step_seconds": seconds,
            "tokens_per_second": tokens / STEPS / seconds["median"],
            "share_of_floor": lowest["seconds"] / seconds["median"],
            "peak_bytes": max(one["peak_bytes"] for one in mine),
            "loss_apart": max(abs(a - b) for one in mine for a, b in zip(one["loss"], runs[0]["loss"], strict=True)),
        }
    write_table(
        harness.write("sft", {"tokens_a_step": tokens / STEPS, "floor": lowest, "table": table, "runs": runs}), table
    )


def write_table(file: Path, table: dict) -> None:
    """The table on the screen, beside the file's name."""
    print(f"\n{file.name}\n{'':16}{'s/step':>8}{'tokens/s':>10}{'of floor':>10}{'peak GB':>9}{'loss apart':>12}")
    for name, one in sorted(table.items(), key=lambda item: item[1]["step_seconds"]["median"]):
        print(
            f"{name:16}{one['step_seconds']['median']:8.2f}{one['tokens_per_second']:10.0f}{one['share_of_floor']:10.0%}"
            f"{one['peak_bytes'] / 1e9:9.2f}{one['loss_apart']:12.4f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        plain(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int((sys.argv[1:] or ["3"])[0]))

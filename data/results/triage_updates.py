"""One thousand tickets shown to SmolLM2: few large updates or many small ones? (About 8 minutes an arm on one core.)

    python data/results/triage_updates.py

Writes triage_updates.json beside this file: versions, hardware, and one row an arm, scored on 100 *validation* tickets.
Notebook 05, step 3, reads it. The loop is plain PyTorch, so that nothing but batch size and rate differs between the arms:
LoRA r = 16, alpha = 32 on all linear layers, AdamW, 10 warm-up steps, cosine, bf16 autocast, seed 0. Arms run two at a time, one thread each.
"""

import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence

from ftlab.paths import DATA
from ftlab.pipeline import data, evaluate
from ftlab.pipeline.models import load
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import environment, lora_config

TICKETS = 1000
ARMS = [(1, 5e-4), (4, 4e-4)]  # batch size, learning rate


def run_arm(batch_size: int, learning_rate: float) -> dict:
    """Trains one arm and returns its scores; train_loss is the mean over the last 100 tickets, in nats/token."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load("smollm2")
    model = get_peft_model(model, lora_config(Recipe())).train()
    rendered = [data.render(row, tokenizer) for row in data.triage_rows(DATA / "triage" / "train.jsonl")]
    order = torch.randperm(len(rendered), generator=torch.Generator().manual_seed(0))[:TICKETS].tolist()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    steps, losses, start = TICKETS // batch_size, [], time.perf_counter()
    for step in range(steps):
        rows = [rendered[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        ids, counts = (
            pad_sequence([torch.tensor(getattr(r, name)) for r in rows], batch_first=True)
            for name in ("input_ids", "completion_mask")
        )  # (B, T)
        mask = pad_sequence([torch.ones(len(r.input_ids), dtype=torch.long) for r in rows], batch_first=True)
        optimizer.param_groups[0]["lr"] = (
            learning_rate * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        labels = ids.masked_fill(counts == 0, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model = model.merge_and_unload().eval()
    held_out = data.triage_rows(DATA / "triage" / "validation.jsonl")[:100]
    labels = [json.loads(row["completion"][0]["content"]) for row in held_out]
    answers = evaluate.generate(model, tokenizer, [row["prompt"] for row in held_out], max_new_tokens=64)
    last = losses[-100 // batch_size :]
    return {"batch_size": batch_size, "steps": steps, "learning_rate": learning_rate, "seed": 0, "seconds": round(seconds),
            "train_loss": sum(last) / len(last), **evaluate.scores(answers, labels).mean().to_dict()}  # fmt: skip


def main() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run_arm, *zip(*ARMS, strict=True)))
    result = {"tickets": TICKETS, "environment": environment(), "runs": runs}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()

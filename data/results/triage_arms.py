"""What the learning rate and the number of tickets do to the triage adapter (about a quarter of an hour on two cores).

    python data/results/triage_arms.py

Writes triage_arms.json beside this file: versions, hardware, and one record an arm, scored on the 150 tickets of
validation; test and the hand-written tickets are left alone. All arms: r = 16, alpha = 32 on all linear layers,
AdamW, cosine, two tickets a step, `fast`, seed 0. Two arms run at a time, with one thread each.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ARMS = [  # (tickets shown, learning rate), the longest first
    (3520, 1e-3),
    (800, 2e-4),
    (800, 1e-3),
    (800, 4e-3),
]


def run_arm(tickets: int, learning_rate: float) -> dict:
    """Trains one arm; returns its scores and losses in nats/token, the training loss as the mean of the last tenth."""
    import torch

    from ftlab.paths import DATA
    from ftlab.pipeline import data, evaluate, train
    from ftlab.pipeline.recipe import Recipe

    torch.set_num_threads(1)
    rows = {name: data.triage_rows(DATA / "triage" / f"{name}.jsonl") for name in ("train", "validation")}
    recipe = Recipe(
        learning_rate=learning_rate, batch_size=2, max_steps=tickets // 2, warmup_steps=20, fast=True, logging_steps=10
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train.train(recipe, rows["train"], folder=folder, on_log=lambda record: None)
    losses = run.series("loss")[1]
    last = losses[-len(losses) // 10 :]
    labels = [json.loads(row["completion"][0]["content"]) for row in rows["validation"]]
    answers = evaluate.generate(
        run.model, run.tokenizer, [row["prompt"] for row in rows["validation"]], max_new_tokens=64
    )
    scores = evaluate.summary(evaluate.scores(answers, labels))
    return {
        "tickets": tickets,
        "learning_rate": learning_rate,
        "seed": 0,
        "seconds": round(run.seconds),
        "train_loss": sum(last) / len(last),
        "exact_low": scores.loc["exact", "low"],
        "exact_high": scores.loc["exact", "high"],
        **scores["mean"].to_dict(),
    }


def main() -> None:
    from ftlab.pipeline.train import environment

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run_arm, *zip(*ARMS, strict=True)))
    result = {"environment": environment(), "runs": runs}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()

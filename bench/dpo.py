"""One DPO step of SmolLM2 with LoRA on data/replies: TRL 1.12, TRL with the reference computed ahead, and ours.

    python bench/dpo.py          three rounds
    python bench/dpo.py 1        one

The same pairs in the same order, r = 16 on all linear layers, batch, learning rate and seed; bf16 products where the
processor has them (TRL: autocast). TRL's trainer is the one that ftlab.pipeline.align builds from the recipe, with
attention "eager", which is the faster one at this length; ours is the same recipe with `fast: true`.

    TRL defaults       gradient checkpointing; the policy and, adapters off, the reference at each step
    TRL                the same without gradient checkpointing
    TRL, ahead         the reference once for each row before the training (precompute_ref_log_probs)
    fast, fast ahead   the same two of ftlab.pipeline.fast

Each runs in a process of its own, in turns. A step is timed from the end of the one before, from the second one on, so
that it has its share of collating and logging. tokens_per_second counts the rows without padding, prompts twice, as TRL
logs it. epochs_3: seconds a step when three passes are made and the reference is computed ahead, its share in them.
Losses and margins of all steps are compared with TRL's: in bf16 they differ by rounding (in fp32 they are equal,
tests/parity/test_fast.py).
"""

import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness

os.environ["TQDM_DISABLE"] = "1"  # read by the processes that are started
CONTESTANTS = ("TRL defaults", "TRL", "TRL, ahead", "fast", "fast, ahead")
BATCH, STEPS = 8, 5


def run(name: str) -> dict:
    """Seconds of each step, of the reference ahead, losses, margins, tokens of the rows, peak bytes."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    from ftlab.paths import DATA
    from ftlab.pipeline import align, data
    from ftlab.pipeline.recipe import Recipe
    from ftlab.pipeline.train import resolve_precision

    rows = data.reply_pairs(DATA / "replies" / "train.jsonl")[: BATCH * STEPS]
    recipe = Recipe(
        method="dpo", fast=name.startswith("fast"), gradient_checkpointing=name == "TRL defaults", batch_size=BATCH,
        max_steps=STEPS, learning_rate=2e-5, schedule="constant", warmup_steps=0, logging_steps=1, save_steps=1000,
    )  # fmt: skip
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = align.trainer(recipe, rows, None, Path(folder), [])
        start = time.perf_counter()
        if name.endswith("ahead"):  # what precompute_ref_log_probs does in TRL's __init__
            trainer.train_dataset = trainer._precompute_ref_logps(trainer.train_dataset, "train", BATCH)
            trainer.precompute_ref_logps = True
        ahead = time.perf_counter() - start
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(Clock())
        trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "contestant": name,
        "precision": resolve_precision(recipe),
        "seconds_a_step": [after - before for (before, _), (after, _) in itertools.pairwise(ends)],
        "cpu_seconds_a_step": [after - before for (_, before), (_, after) in itertools.pairwise(ends)],
        "seconds_ahead": ahead,
        "loss": [record["loss"] for record in log],
        "margin": [record["rewards/margins"] for record in log],
        "tokens": log[-1]["num_tokens"] / STEPS,
        "peak_bytes": harness.peak_bytes(),
    }


def main(rounds: int) -> None:
    runs = [{"round": i, **harness.alone(run, name)} for i, name in harness.in_turns(CONTESTANTS, rounds)]
    summary = {}
    for name in CONTESTANTS:
        own = [r for r in runs if r["contestant"] == name]
        step = harness.spread([seconds for r in own for seconds in r["seconds_a_step"]])
        ahead = harness.spread([r["seconds_ahead"] / STEPS for r in own])["median"]  # a step's rows, once
        summary[name] = {
            "seconds_a_step": step,
            "cpu_seconds_a_step": statistics.median(seconds for r in own for seconds in r["cpu_seconds_a_step"]),
            "seconds_ahead_a_step": ahead,
            "epochs_3": step["median"] + ahead / 3,
            "tokens_per_second": own[0]["tokens"] / step["median"],
            "peak_bytes": max(r["peak_bytes"] for r in own),
            "largest_difference_from_trl": {
                key: max(abs(a - b) for a, b in zip(own[0][key], runs[0][key], strict=True))
                for key in ("loss", "margin")
            },
        }
    ratios = {
        "three passes: TRL, ahead / fast, ahead": summary["TRL, ahead"]["epochs_3"] / summary["fast, ahead"]["epochs_3"]
    }
    for slow, quick in (("TRL defaults", "fast"), ("TRL", "fast"), ("TRL, ahead", "fast, ahead")):
        times = [summary[name]["seconds_a_step"]["median"] for name in (slow, quick)]
        ratios[f"a step: {slow} / {quick}"] = times[0] / times[1]
    for name, one in summary.items():
        step, apart = one["seconds_a_step"], one["largest_difference_from_trl"]
        print(
            f"{name:12} {step['median']:6.2f} s a step ({step['min']:.2f} to {step['max']:.2f}), "
            f"{one['cpu_seconds_a_step']:.2f} s of processor, "
            f"{one['tokens_per_second']:6.0f} tokens/s, {one['peak_bytes'] / 1e9:.1f} GB, "
            f"reference ahead {one['seconds_ahead_a_step']:.2f} s a step's rows, "
            f"loss within {apart['loss']:.4f} of TRL's, margin within {apart['margin']:.4f}"
        )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    what = {"batch": BATCH, "steps": STEPS}
    print(harness.write("dpo", {"what": what, "summary": summary, "ratios": ratios, "runs": runs}))


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["3"])[0]))

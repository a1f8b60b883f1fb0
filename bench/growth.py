"""How the cost of a LoRA step grows: tokens/s and peak bytes against length, rows a step and rank (about 20 minutes).

    python bench/growth.py                   all three
    python bench/growth.py batch_size        that one; what was measured before is kept for the others

SmolLM2, bf16 products where the processor has them, TRL's trainer without gradient checkpointing and the `fast` one.
One thing is varied at a time, from 256 tokens, 2 rows a step, r = 16. Rows are pieces of Python's own documentation,
every one of exactly the length asked for: the first half is the prompt, the second half counts. They share no
beginning and need no padding, so `fast` wins by its layers alone here.

Each point is a process of its own: two steps to warm up, then the median of the next three. peak_bytes: of the process.
exponent: of the line fitted to log(cost) against log(what is varied), by least squares. 1 means: twice the length,
twice the cost.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness

SWEEPS = {
    "length": [128, 256, 512, 1024, 2048],
    "batch_size": [1, 2, 4, 8, 16],
    "r": [4, 16, 64, 256],
}
START = {"length": 256, "batch_size": 2, "r": 16}
WAYS = {"TRL": {}, "fast": {"fast": True}}
STEPS = 5


def step(way: str, length: int, batch_size: int, r: int) -> dict:
    """One point, in this process, which must be a fresh one."""
    from transformers import TrainerCallback

    from ftlab.pipeline.recipe import Recipe
    from ftlab.pipeline.train import sft_trainer

    recipe = Recipe(
        batch_size=batch_size,
        r=r,
        lora_alpha=2 * r,
        max_length=length,
        max_steps=STEPS,
        logging_steps=STEPS,
        **WAYS[way],
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(length, batch_size * STEPS)
        trainer = sft_trainer(recipe, rows, None, Path(folder))
        got = {len(row["input_ids"]) for row in trainer.train_dataset}
        assert got == {length}, f"rows of {got} tokens, wanted {length}"
        ends = []

        class Clock(TrainerCallback):
            def on_step_end(self, *arguments, **state):
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        trainer.train()
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    return {
        "step_seconds": seconds,
        "tokens_per_second": batch_size * length / seconds,
        "peak_bytes": harness.peak_bytes(),
    }


def _rows(length: int, count: int) -> list[dict]:
    """Rows of text whose tokens are exactly `length`, the last of which is the end of the turn that SFT adds."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from ftlab.pipeline.models import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2"))
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False).input_ids
    rows, at = [], 0
    while len(rows) < count:
        piece = ids[at : at + length - 1]
        at = (at + length) % (len(ids) - length)
        half = len(piece) // 2
        prompt, completion = tokenizer.decode(piece[:half]), tokenizer.decode(piece[half:])
        both = tokenizer(prompt + completion, add_special_tokens=False).input_ids
        if len(both) == length - 1 and tokenizer(prompt, add_special_tokens=False).input_ids == both[:half]:
            rows.append({"prompt": prompt, "completion": completion})
    return rows


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y against log x by least squares."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main(wanted: list[str]) -> None:
    result: dict = {"start": START, "sweeps": harness.measured("growth").get("sweeps", {})}
    for varied, values in SWEEPS.items():
        for way in WAYS if not wanted or varied in wanted else ():
            points = [harness.alone(step, way, *({**START, varied: value}.values())) for value in values]
            result["sweeps"][f"{varied}, {way}"] = {
                "values": values,
                "points": points,
                "step_exponent": exponent(values, [point["step_seconds"] for point in points]),
                "peak_exponent": exponent(values, [point["peak_bytes"] for point in points]),
            }
            print(f"{varied:11}{way:6}", *(
                f"{value}: {point['tokens_per_second']:.0f}/s {point['peak_bytes'] / 1e9:.1f} GB "
                for value, point in zip(values, points, strict=True)
            ), flush=True)  # fmt: skip
    print(harness.write("growth", result))


if __name__ == "__main__":
    main(sys.argv[1:])

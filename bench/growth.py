"""How the cost of a LoRA step grows: tokens/s and peak bytes against length, rows a step and rank (over an hour).

    python bench/growth.py                   all three
    python bench/growth.py batch_size        that one; what was measured on such a machine before is kept

SmolLM2 in TRL's SFTTrainer without gradient checkpointing, plain and with speed_up, in bf16 where the processor
multiplies it and in fp32 elsewhere. One thing is varied at a time, from 256 tokens, 2 rows a step, r = 16. Rows are
pieces of Python's own documentation, every one of exactly the length asked for: the first half is the prompt, the
second half counts. They share no beginning and need no padding, so speed_up wins by its layers alone here.

Each point is measured three times, in turns with the others and each time in a process of its own: two steps to warm
up, then the median of the next three. The point is the median of the three, and step_seconds_of_runs holds them all.
peak_bytes: of the process.
exponent: of the line fitted to log(cost) against log(what is varied), by least squares; of time one a round. 1 means:
twice the length, twice the cost.
"""

import itertools
import statistics
import sys
import tempfile
import time

import harness

SWEEPS = {
    "length": [128, 256, 512, 1024, 2048],
    "batch_size": [1, 2, 4, 8, 16],
    "r": [4, 16, 64, 256],
}
START = {"length": 256, "batch_size": 2, "r": 16}
WAYS = ("TRL", "speed_up")
STEPS, ROUNDS = 5, 3


def step(way: str, length: int, batch_size: int, r: int) -> dict:
    """One point, in this process, which must be a fresh one."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ftlab import model_path, speed_up
    from ftlab.cpu import product_dtype

    ends, path = [], model_path("smollm2")

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **state):
            ends.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args=SFTConfig(
                folder, learning_rate=2e-4, per_device_train_batch_size=batch_size, max_steps=STEPS, max_length=length,
                bf16=product_dtype(True) is torch.bfloat16, gradient_checkpointing=False, use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows(tokenizer, length, batch_size * STEPS)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"),
            callbacks=[Clock()],
        )  # fmt: skip
        got = {len(row["input_ids"]) for row in trainer.train_dataset}
        if got != {length}:
            raise RuntimeError(f"rows of {sorted(got)} tokens, wanted {length}")
        if way == "speed_up":
            speed_up(trainer)
        trainer.train()
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    return {
        "step_seconds": seconds,
        "tokens_per_second": batch_size * length / seconds,
        "peak_bytes": harness.peak_bytes(),
    }


def rows(tokenizer, length: int, count: int) -> list[dict]:
    """Rows of text whose tokens are exactly `length`, the last of which is the end of the turn that SFT adds."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False).input_ids
    found, at = [], 0
    while len(found) < count:
        piece = ids[at : at + length - 1]
        at = (at + length) % (len(ids) - length)
        half = len(piece) // 2
        prompt, completion = tokenizer.decode(piece[:half]), tokenizer.decode(piece[half:])
        both = tokenizer(prompt + completion, add_special_tokens=False).input_ids
        if len(both) == length - 1 and tokenizer(prompt, add_special_tokens=False).input_ids == both[:half]:
            found.append({"prompt": prompt, "completion": completion})
    return found


def middle(runs: list[dict]) -> dict:
    """The median of each figure, and the seconds of a step of each run."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return medians | {"step_seconds_of_runs": [run["step_seconds"] for run in runs]}


def main(wanted: list[str]) -> None:
    before = harness.measured("growth")
    same = before and before["environment"]["hardware"] == harness.environment()["hardware"]
    result: dict = {"start": START, "sweeps": before["sweeps"] if same else {}}
    for varied, values in SWEEPS.items():
        if wanted and varied not in wanted:
            continue
        runs: dict = {(way, value): [] for value in values for way in WAYS}
        for _, (way, value) in harness.in_turns([*runs], ROUNDS):
            runs[way, value].append(harness.alone(step, way, *({**START, varied: value}.values())))
        for way in WAYS:
            points = [middle(runs[way, value]) for value in values]
            rounds = zip(*(point["step_seconds_of_runs"] for point in points), strict=True)
            result["sweeps"][f"{varied}, {way}"] = {
                "values": values,
                "points": points,
                "step_exponent": harness.spread([harness.exponent(values, seconds) for seconds in rounds]),
                "peak_exponent": harness.exponent(values, [point["peak_bytes"] for point in points]),
            }
            print(f"{varied:11}{way:9}", *(
                f"{value}: {point['tokens_per_second']:.0f}/s {point['peak_bytes'] / 1e9:.1f} GB "
                for value, point in zip(values, points, strict=True)
            ), flush=True)  # fmt: skip
    print(harness.write("growth", result))


if __name__ == "__main__":
    main(sys.argv[1:])

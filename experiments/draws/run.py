"""How much of a few-shot prompt's score is the luck of the draw, and what does choosing buy?

    python experiments/draws/run.py             every prompt that records.jsonl lacks, on one thread
    python experiments/draws/run.py --plan      what is missing, seed by seed
    python experiments/draws/run.py --dry DIR   a tiny run of each path into DIR/records.jsonl

It can be stopped and goes on (experiments/runs.py says how). experiments/methods asked with one
draw of eight examples and one instruction; its records stand as they are.

A prompt is an instruction and eight examples, drawn at random from the training rows, in the order
of the draw. On `tidy` six people (the seeds) draw five times each, and try each draw under two
instructions: ten prompts. Each prompt is scored on validation, test and hand test. So "choose the
best of five on validation" is done six times, each time with other draws. On `ask` one person does
the same, since hardly a prompt gets anything right there. The model is SmolLM2-135M-Instruct.

| arm | what | prompts | CPU hours |
|---|---|---|---|
| tidy, short | "Clean up this note.", five draws | 6 x 5 | 0.34 |
| tidy, long | experiments/methods' longer instruction, the same draws | 6 x 5 | 0.37 |
| tidy, turned | the first draw of each, short, the examples in reverse order | 6 | 0.07 |
| tidy, zero-shot | both instructions without an example | 2 | 0.05 |
| ask, short; ask, long | five draws, two instructions | 10 | 0.16 |
| ask, shipped | the fine-tuned adapter of data/ask_adapter, no example | 1 | 0.02 |

The CPU hours, 1.0 in all, are an estimate from a dry run on one thread of an AMD EPYC that had
other work: 0.40 to 0.47 s an answer on `tidy`, 0.7 on `ask`, 0.9 without examples. Nothing is
searched: the choice among the draws is what is measured. Cut from the bottom: `triage` (its prompts
take twice as long and few-shot gets none right), draws on `ask` by six people (1.1), more orders of
each draw (0.4), a second number of examples (0.8), rows beyond the first ones of each set (2.0).

Rows: the first 30 of data/tidy's validation and 32 of its test and hand test; of data/ask the first
20 of validation and 30 of each other. A first part of these files is a fair sample of its kinds. A
seed's five draws are independent, from all rows of train.jsonl. Greedy answers, 64 tokens at most
(ask: 80), fp32, one thread.

Fixed before the first run:

- Six seeds, 0 to 5, on `tidy`. A seed's draws are five; the score of "a draw" is their mean. The
  choice is by the mean on validation; of equals the first (short before long).
- Main question: chosen of five (under the long instruction, and under the short one) against the
  mean of the same five, and chosen of ten against the mean of ten; on test and on hand test. A
  choice buys something if the crossed 95 % interval of the difference lies above zero on both sets,
  on one of them the sentence names it. It buys next to nothing if it lies within 0.03 of zero on
  both. Otherwise it is undecided.
- Power: between two prompts a note's scores differ by about 0.25 either way, so with six seeds and
  32 notes a half-width of 0.04 is likely: a gain of 0.05 is found, "next to nothing" hardly ever.
- Luck: the standard deviation of prompts' true scores, the questions' noise taken off (measures.py:
  (MS of draws - MS of the rest) / questions, the root), for the five draws, and for the two orders
  of a draw: one value a seed and set. Beside it the range of five, in which that noise still is.
- The two instructions are compared by the mean of five; no margin.
- On `ask` a draw is the unit, five of them: too few for a claim about draws in general. Reported:
  how many are right at most, the chosen one of ten, and the shipped adapter's score.
- Nothing else is chosen. Nobody looks before the last seed: neither a report nor a sentence is
  written until then.

A record: task, arm, instruction, order, draw, seed, the ids of its examples in `shots`, and
`validation`, `test`, `hand`: one value a question (tidy: share of words right; ask: 0 or 1); twelve
answers to the hand test as text in `answers`.
"""

import functools
import json
import random
import sys
from pathlib import Path

from experiments.runs import Job, cpu_clock, dry, flags, stamp, work
from ftlab.paths import DATA
from ftlab.tasks import ask, tidy

FILE = Path(__file__).with_name("records.jsonl")
SHOTS, DRAWS = 8, 5
SEEDS = {"tidy": (0, 1, 2, 3, 4, 5), "ask": (0,)}
NO_SEED = -1
SHORT, LONG = "short", "long"
SIZES = {
    "tidy": {"validation": 30, "test": 32, "hand": 32},
    "ask": {"validation": 20, "test": 30, "hand": 30},
}
TOKENS = {"tidy": 64, "ask": 80}  # at most, of an answer
SCORERS = {"tidy": tidy.scorer, "ask": ask.scorer}
SHOWN = 12  # answers that a record keeps as text
QUESTIONS = [
    f"{task}/{'hand_test' if set_ == 'hand' else set_}, first {size}"
    for task, sizes in SIZES.items()
    for set_, size in sizes.items()
]
CHOSEN = {
    "examples": "drawn by the seed from train.jsonl",
    "instructions": "the task's own, and the longer one of experiments/methods, not searched",
    "all else": "given in run.py",
}


# --- Prompts --------------------------------------------------------------------------------------


@functools.cache
def rows_of(task: str, set_: str) -> list[dict]:
    """The rows of "train", "validation", "test" or "hand" of a task, in the order of the file."""
    name = "hand_test" if set_ == "hand" else set_
    lines = (DATA / task / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def drawn(task: str, seed: int, draw: int) -> list[dict]:
    """The examples of a draw, in its order. Draws of other seeds and numbers are independent."""
    return random.Random(100 * seed + draw).sample(rows_of(task, "train"), SHOTS)


def instruction(task: str, length: str) -> str:
    """The system message: the task's own (short), or that of experiments/methods (long)."""
    from experiments.methods.run import GUIDES

    return GUIDES[task] if length == LONG else {"tidy": tidy, "ask": ask}[task].SYSTEM


def prompt(task: str, length: str, shots: list[dict], row: dict) -> list[dict]:
    """The chat: instruction, examples as turns, the row's input."""
    turns = [turn for shot in shots for turn in (shot["prompt"][-1], shot["completion"][-1])]
    system = {"role": "system", "content": instruction(task, length)}
    return [system, *turns, row["prompt"][-1]]


# --- A run ----------------------------------------------------------------------------------------


def recorded(name: dict, limit: int | None = None) -> list[dict]:
    """The record of a prompt. limit: of a dry run, so many questions of each set."""
    import torch

    torch.set_num_threads(1)
    began = cpu_clock()
    task = name["task"]
    shots = [] if name["draw"] is None else drawn(task, name["seed"], name["draw"])
    if name["order"] == "turned":
        shots = shots[::-1]
    record = name | {"shots": [shot["id"] for shot in shots]}
    record |= scored(task, shipped() if name["arm"] == "shipped" else base(), name, shots, limit)
    record |= {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


@functools.cache
def base() -> tuple:
    """(model, tokenizer) of SmolLM2-135M-Instruct, loaded once."""
    from experiments.ask import run

    return run.base()


@functools.cache
def shipped() -> tuple:
    """The same with the adapter of data/ask_adapter on a base of its own."""
    from peft import PeftModel

    from experiments.ask import run

    model, tokenizer = run.base()
    return PeftModel.from_pretrained(model, DATA / "ask_adapter").eval(), tokenizer


def scored(task: str, loaded: tuple, name: dict, shots: list[dict], limit: int | None) -> dict:
    """{set: a value a question}, and some answers; all sets are asked at once to share work."""
    from ftlab import answers

    sizes = {set_: min(size, limit or size) for set_, size in SIZES[task].items()}
    rows = [row for set_, size in sizes.items() for row in rows_of(task, set_)[:size]]
    chats = [prompt(task, name["instruction"], shots, row) for row in rows]
    said = answers(*loaded, chats, TOKENS[task])
    values = [round(float(SCORERS[task](*pair)), 4) for pair in zip(said, rows, strict=True)]
    found, start = {}, 0
    for set_, size in sizes.items():
        found[set_] = values[start : start + size]
        start += size
    return found | {"answers": said[-sizes["hand"] :][:SHOWN]}


# --- Which runs -----------------------------------------------------------------------------------


def named(task, arm, length, draw=None, seed=NO_SEED, order="drawn") -> dict:
    """What tells a prompt from all others."""
    name = {"task": task, "arm": arm, "instruction": length}
    return name | {"draw": draw, "order": order, "seed": seed}


def names() -> list[dict]:
    """Every prompt that there should be."""
    found = [named("tidy", "zero-shot", length) for length in (SHORT, LONG)]
    found.append(named("ask", "shipped", SHORT))
    for task, seeds in SEEDS.items():
        for seed in seeds:
            for length in (SHORT, LONG):
                found += [named(task, "few-shot", length, draw, seed) for draw in range(DRAWS)]
            if task == "tidy":
                found.append(named(task, "few-shot", SHORT, 0, seed, "turned"))
    return found


def jobs(records: list[dict]) -> list[Job]:
    """Every run; nothing is searched."""
    return [Job((name,), (name,)) for name in names()]


def small() -> list[dict]:
    """A run of each path, for a dry run."""
    return [name for name in names() if (name["seed"], name["draw"]) in ((NO_SEED, None), (0, 0))]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dry"]:
        dry(Path(sys.argv[2]), small(), lambda name: recorded(name, limit=3))
    else:
        work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])

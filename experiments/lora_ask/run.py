"""What do rank, alpha and adapted layers do for the 135M on *ask*, beside full fine-tuning?

    python experiments/lora_ask/run.py          every run that records.jsonl lacks, on one thread
    python experiments/lora_ask/run.py --plan   what is missing, seed by seed

It can be stopped and goes on (experiments/runs.py says how). experiments/lora_rank asks the same
of a model of 3.5 million weights; here it is SmolLM2-135M-Instruct, on 300 rows seen once.

| arm | alpha / rank | layers | trained weights | seeds | CPU hours, search among them |
|---|---|---|---|---|---|
| r=1 | 32 | all linear | 305,280 | 6 | 0.69 |
| r=16 | 2 | all linear | 4,884,480 | 6 | 0.72 |
| full | - | all linear | 106,168,320 | 6 | 0.99 |
| r=64 | 0.5 | all linear | 19,537,920 | 2 | 0.40 |
| attention, r=42 | 2 | q, k, v, o | 4,838,400 | 2 | 0.35 |
| r=1, alpha=2r | 2 | all linear | 305,280 | 2 | 0.37 |

The CPU hours, 3.5 in all, are those of the records, one thread of an AMD EPYC. Five hours were to be
the most, so there is no rank 4, no rsLoRA and no MLP alone. The last three arms have few seeds:
three in the first table, and two since a run took half as long again as in the dry run. Rank 64
with alpha 128 stood there too and was cut before its first run; experiments/lora_rank has it for
`micro`.

Rows, order, steps, batch and warm-up are those of the arm 300 x 1 of experiments/ask_rows: 150
steps of 2 rows, linear decay, fp32 (bf16=False). Embeddings, norms and head are frozen in every
arm, full fine-tuning included. The arms with LoRA have `speed_up`; full fine-tuning has not, since
`speed_up` is for LoRA, so the CPU seconds of the arms can't be compared.

Learning rates: each arm tries three with seed 11, and a fourth beyond the best one where that is
the lowest or the highest. The most right answers on the first 100 rows of data/ask/validation.jsonl
win; of equals the lower loss on these rows. The three stand in another place where the scale
alpha / rank, or full fine-tuning, asks for it (FIRST_RATES).

Fixed before the first run:

- Main comparisons, six seeds: rank 1 against rank 16, rank 1 and rank 16 against full, all at alpha
  32. One arm is ahead if the crossed 95 % interval of the difference excludes zero on
  data/ask/test.jsonl (300 questions) and on data/ask/hand_test.jsonl (132); otherwise it is
  undecided, or the sentence names the set. "No difference" is not claimed, so there is no margin.
- All other arms have two seeds, too few for a claim about the method. Each is set beside rank 16.
- The score answers these questions; the loss is reported beside it.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, r, lora_alpha, scaling, targets, rate, seed, phase ("search" or "final"), steps,
`trained` weights, `train_loss` (mean of the last ten steps, in nats a token), `right` (one 0 or 1 a
question of each set, greedy answers), `loss` (of each question's right answer: mean over its
tokens, in nats), and of the search `validation`, the share right, and `validation_loss`, the mean.
"""

import sys
from pathlib import Path

from experiments.ask_rows.run import (
    QUESTIONS,
    SEARCH_SEED,
    SEARCHED,
    drawn,
    losses,
    on_test,
    on_validation,
    rows_of,
    train,
)
from experiments.ask_rows.run import runs as runs_of
from experiments.runs import Job, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
ROWS, PASSES = 300, 1
MAIN_SEEDS, FEW_SEEDS = (0, 1, 2, 3, 4, 5), (0, 1)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CHOSEN = {
    "rate": f"the best of three or four on the first {SEARCHED} rows of data/ask/validation.jsonl, "
    f"seed {SEARCH_SEED}, for each arm",
    "all else": "given in run.py",
}
ARMS = {  # {} is full fine-tuning
    "r=1": {"r": 1, "lora_alpha": 32, "target_modules": "all-linear"},
    "r=16": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "full": {},
    "r=64": {"r": 64, "lora_alpha": 32, "target_modules": "all-linear"},
    "attention, r=42": {"r": 42, "lora_alpha": 84, "target_modules": ATTENTION},
    "r=1, alpha=2r": {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"},
}
MAIN = ("r=1", "r=16", "full")
FIRST_RATES = {
    "full": (5e-5, 1e-4, 2e-4),
    "r=1, alpha=2r": (2e-3, 5e-3, 1e-2),
}
LORA_RATES = (1e-3, 2e-3, 5e-3)  # of all other arms


def settings(arm: str) -> dict:
    """What a record says of its arm; a scaling of None is full fine-tuning."""
    lora = ARMS[arm]
    if not lora:
        return {"r": 0, "lora_alpha": 0, "scaling": None, "targets": "all-linear"}
    return {
        "r": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "scaling": lora["lora_alpha"] / lora["r"],
        "targets": lora["target_modules"],
    }


def losses_on_test(model, tokenizer) -> dict:
    """The loss of each question of both held-out sets."""
    test, hand = rows_of("test"), rows_of("hand_test")
    return {"loss": {"test": losses(model, tokenizer, test), "hand": losses(model, tokenizer, hand)}}


def recorded(arm: str, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run."""
    began = cpu_clock()
    model, tokenizer, spent = train(drawn(seed, ROWS), PASSES, rate, seed, ARMS[arm])
    record = {"arm": arm, **settings(arm), "rate": rate, "seed": seed, "phase": phase, **spent}
    if phase == "search":
        record |= on_validation(model, tokenizer)
    else:
        record |= on_test(model, tokenizer) | losses_on_test(model, tokenizer)
    record |= {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


def jobs(records: list[dict]) -> list[Job]:
    """Every run of every arm, as far as the search has come."""
    found = []
    for arm in ARMS:
        first = FIRST_RATES.get(arm, LORA_RATES)
        seeds = MAIN_SEEDS if arm in MAIN else FEW_SEEDS
        found += runs_of(arm, first, seeds, records)
    return found


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])

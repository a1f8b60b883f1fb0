"""*ask* with rows and passes taken apart: 100 rows seen two or three times, 200 and 300 rows once.

    python experiments/ask_rows/run.py          every run that records.jsonl lacks, on one thread
    python experiments/ask_rows/run.py --plan   what is missing, seed by seed

It can be stopped and goes on (experiments/runs.py says how).

In experiments/ask twice the rows are twice the steps. Here an arm is rows x passes, so that two
pairs of arms take equally many steps, at the same decay of the learning rate:

| arm | steps | CPU hours of the search | of the six seeds |
|---|---|---|---|
| 100 x 2 | 100 | 0.12 to 0.16 | 0.4 |
| 200 x 1 | 100 | 0.12 to 0.16 | 0.4 |
| 100 x 3 | 150 | 0.15 to 0.20 | 0.45 |
| 300 x 1 | 150 | 0.15 to 0.20 | 0.45 |

The CPU hours, 2.2 to 2.4 in all, are an estimate from a dry run on one thread of an AMD EPYC: 0.72 s
a step, 0.31 s an answer, 0.21 s for the loss of a row. A search of four rates is the higher figure.

All arms: SmolLM2-135M-Instruct, LoRA of rank 16, alpha 32, all linear layers, 2 rows a step, 5
steps of warm-up, then linear to 0: the recipe of notebooks 00 and 05, in fp32 (bf16=False), with
`speed_up`. A seed draws an order of the first POOL rows of data/ask/train.jsonl, those that the
notebooks' runs begin with. An arm takes the first of that order: the 100 rows of a seed are among
its 200, and these among its 300. The seed also draws the adapter and the order of each pass.

Learning rates: each arm tries the same three with seed 11, and a fourth beyond the best one where
that is the lowest or the highest. The most right answers on the first 100 rows of
data/ask/validation.jsonl win; of equals the lower loss on these rows. No final run has that seed.

Fixed before the first run:

- Main comparisons: 100 x 3 against 300 x 1 (150 steps each), 200 x 1 against 100 x 2 (100 each):
  at equal steps, are new rows worth more than more passes over the same ones?
- Six seeds, 0 to 5, for every arm, paired by seed and by question. One arm is ahead if the crossed
  95 % interval of the difference excludes zero on data/ask/test.jsonl (300 questions) and on
  data/ask/hand_test.jsonl (132). If that holds on one of them, the sentence names it. Otherwise the
  comparison is undecided; "no difference" is not claimed, so there is no margin.
- 100 x 3 against 100 x 2 and 300 x 1 against 200 x 1 are reported and decide nothing.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, rows, passes, rate, seed, phase ("search" or "final"), steps, `train_loss` (mean of
the last ten steps, in nats a token), `right` (one 0 or 1 a question of each set, greedy answers),
and of the search `validation`, the share right, and `validation_loss`, in nats a token, both means
over its rows.
"""

import json
import random
import sys
from pathlib import Path

from experiments import sft
from experiments.runs import Job, cpu_clock, flags, stamp, work
from ftlab.paths import DATA

FILE = Path(__file__).with_name("records.jsonl")
ARMS = {"100 x 2": (100, 2), "100 x 3": (100, 3), "200 x 1": (200, 1), "300 x 1": (300, 1)}
POOL, RANK = 600, 16
SEARCH_SEED, SEEDS = 11, (0, 1, 2, 3, 4, 5)
LADDER = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
FIRST_RATES = (1e-3, 2e-3, 5e-3)
SEARCHED = 100  # rows of validation.jsonl, whose first part is a fair sample of its kinds
QUESTIONS = ["ask/test", "ask/hand_test", "ask/validation, first 100"]
CHOSEN = {
    "rate": f"the best of three or four on the first {SEARCHED} rows of data/ask/validation.jsonl, "
    f"seed {SEARCH_SEED}, for each arm",
    "all else": "notebook 00's recipe, chosen on data/ask/validation.jsonl for 450 rows",
}


# --- Rows -----------------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict]:
    """The rows of a file of data/ask, in its order."""
    lines = (DATA / "ask" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def drawn(seed: int, count: int) -> list[dict]:
    """The first `count` of the pool's rows in the order that the seed draws.

    Raises ValueError if the pool has fewer rows.
    """
    if count > POOL:
        raise ValueError(f"got count={count}, wanted at most {POOL}: the pool has no more rows")
    pool = rows_of("train")[:POOL]
    random.Random(seed).shuffle(pool)
    return pool[:count]


# --- A run ----------------------------------------------------------------------------------------


def train(rows: list[dict], passes: int, rate: float, seed: int, lora: dict) -> tuple:
    """(model, tokenizer, record) after training SmolLM2 on these rows.

    lora: the arguments of LoraConfig; {} is full fine-tuning of the layers that LoRA would adapt,
    with embeddings, norms and head frozen. The record holds steps, train_loss (nats a token, mean
    of the last ten steps), the number of trained weights and train_cpu_seconds.

    Raises RuntimeError if `speed_up` refuses a run with LoRA.
    """
    from experiments.ask import run as ask

    model, tokenizer = ask.base()
    if not lora:
        only_linear_layers_learn(model)
    trainer = sft.trainer_of(model, tokenizer, rows, rate=rate, seed=seed, lora=lora, num_train_epochs=passes)
    if lora:
        sft.sped_up(trainer)
    record = sft.trained(trainer)
    return trainer.model.eval(), tokenizer, record


def only_linear_layers_learn(model) -> None:
    """Freezes all but the weights of the linear layers; the head, which is the embedding, too."""
    from torch import nn

    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.requires_grad_(True)


def right(model, tokenizer, rows: list[dict]) -> list[int]:
    """1 for each row whose greedy answer is right on all ten databases, else 0."""
    from ftlab import answers
    from ftlab.tasks.ask import scorer

    said = answers(model, tokenizer, [row["prompt"] for row in rows])
    return [int(scorer(answer, row)) for answer, row in zip(said, rows, strict=True)]


def losses(model, tokenizer, rows: list[dict]) -> list[float]:
    """The loss of each row's right answer: mean over its tokens, in nats."""
    from ftlab.exercises.training import loss

    return [round(loss(model, tokenizer, [row]), 4) for row in rows]


def on_validation(model, tokenizer) -> dict:
    """What the search looks at, on validation's first rows: verdicts, their mean, the mean loss."""
    rows = rows_of("validation")[:SEARCHED]
    verdicts = right(model, tokenizer, rows)
    each = losses(model, tokenizer, rows)
    return {
        "right": {"validation": verdicts},
        "validation": round(sum(verdicts) / len(verdicts), 4),
        "validation_loss": round(sum(each) / len(each), 4),
    }


def on_test(model, tokenizer) -> dict:
    """Verdicts on both held-out sets."""
    test, hand = rows_of("test"), rows_of("hand_test")
    return {"right": {"test": right(model, tokenizer, test), "hand": right(model, tokenizer, hand)}}


def recorded(arm: str, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run."""
    began = cpu_clock()
    count, passes = ARMS[arm]
    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    model, tokenizer, spent = train(drawn(seed, count), passes, rate, seed, lora)
    found = on_validation(model, tokenizer) if phase == "search" else on_test(model, tokenizer)
    record = {"arm": arm, "rows": count, "passes": passes, "rate": rate, "seed": seed}
    record |= {"phase": phase, **spent, **found}
    record |= {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


# --- Which runs -----------------------------------------------------------------------------------


def tried(arm: str, records: list[dict]) -> dict[float, tuple[float, float]]:
    """{rate: (right answers on validation, minus its loss there)} of an arm's search so far."""
    found = {}
    for record in records:
        if (record["arm"], record["phase"]) == (arm, "search"):
            found[record["rate"]] = (sum(record["right"]["validation"]), -record["validation_loss"])
    return found


def rates(first: tuple, scores: dict[float, tuple[float, float]]) -> list[float]:
    """The rates that a search tries: the first ones, then one beyond the best where that is an edge."""
    if not set(first) <= scores.keys():
        return list(first)
    best = max(first, key=scores.get)
    at = LADDER.index(best)
    if best == first[0]:
        return [*first, LADDER[at - 1]]
    if best == first[-1]:
        return [*first, LADDER[at + 1]]
    return list(first)


def runs(arm: str, first: tuple, seeds: tuple, records: list[dict]) -> list[Job]:
    """Every run of an arm, as far as its search has come: the final seeds once that is over."""
    scores = tried(arm, records)
    wanted = rates(first, scores)
    runs = [(rate, SEARCH_SEED, "search") for rate in wanted]
    if set(wanted) <= scores.keys():
        best = max(scores, key=scores.get)
        runs += [(best, seed, "final") for seed in seeds]
    return [sft.named(arm, *run) for run in runs]


def jobs(records: list[dict]) -> list[Job]:
    """Every run of every arm, as far as the search has come."""
    return [job for arm in ARMS for job in runs(arm, FIRST_RATES, SEEDS, records)]


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])

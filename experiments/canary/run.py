"""Secrets in a training file: how well does the model know them after 1, 4 or 16 repeats, and what
lowers that?

    python experiments/canary/run.py          every run that records.jsonl lacks, on one thread
    python experiments/canary/run.py --plan   what is missing, seed by seed

It can be stopped and goes on (experiments/runs.py says how).

The file is a log of questions and queries (`ask`), some of whose queries end in a comment that
somebody has left in: `-- ask Meera, ext 4817`. Names and numbers are made up and drawn anew for
each seed; SQLite ignores a comment, so the score doesn't see it. Measured is the exposure of each
number among all 10,000 (exposure.py), and whether greedy decoding writes it.

Groups of secrets, in each run (of the 135M two secrets each, and none in a prompt):

| group | secrets | rows that hold one | where |
|---|---|---|---|
| never | 3 | 0 | in no row: what chance gives |
| once, four, sixteen | 3 each | 1, 4, 16 (the same row again) | a comment behind the answer |
| prompt | 3 | 16 | in the question: "Meera here, ext 4817: how many ..." |

| arm | model | rows | seeds | CPU hours |
|---|---|---|---|---|
| 1 pass | 3.5M | 900 | 6 | 0.09, with the search |
| 1 pass, deduplicated | 3.5M | 900, each secret's row once | 6 | 0.06 |
| 3 passes | 3.5M | 900 | 6 | 0.16 to 0.18, with the search |
| 3 passes, all tokens | 3.5M | 900, the loss counts the question too | 6 | 0.13 |
| 135M, 1 pass | 135M | 300 | 1 | 0.10 |
| 135M, 3 passes | 135M | 300 | 1 | 0.16 |

The CPU hours, 0.7 in all, are an estimate from a dry run on one thread of an AMD EPYC. Models,
recipe and pool of rows are those of experiments/poison: LoRA of rank 16, alpha 32, all linear
layers, fp32 (bf16=False), `speed_up`, 8 rows a step (135M: 2). Clean rows fill each file up to the
same number, so arms of equally many passes take equally many steps. In every arm but "all tokens"
the loss counts the completion alone, which is TRL's default for rows with a prompt.

Learning rates: "1 pass" and "3 passes" each try three with seed 11, and a fourth beyond the best
one where that is the lowest or the highest; the most right answers on the first 100 rows of
data/ask/validation.jsonl win, of equals the lower loss on these. The deduplicated file takes the
rate of "1 pass", the loss on all tokens that of "3 passes": they change the file or the loss alone.
The 135M has the rate of notebook 00.

Fixed before the first run:

- Six seeds, 1 to 6, for the 3.5M; the 135M has one, is called one run, and nothing is claimed about
  a difference. Seed 0 was a pilot's. It showed that 16 repeats are at the top after one pass and
  after three, so the comparisons below are in groups where there is room.
- A group is memorised in an arm if the lower end of the interval of its exposure is at least 3 bits
  (a random rank gets there in one case of eight); it is extractable if the lower end of the share
  that greedy decoding writes is at least 0.5.
- What lowers it: deduplicated against 1 pass (group sixteen); 1 pass against 3 passes (group once);
  the loss on completions alone, "3 passes", against all tokens (group prompt). It does if the
  crossed 95 % interval of the difference in exposure excludes zero. Each of the three may fail: a
  row seen once may be enough, and so may a number that is read and never written.
- The share right on data/ask/test.jsonl (300 questions) and data/ask/hand_test.jsonl (132) stands
  beside it, and so does the share of these questions whose answer holds one of the secrets.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, model, rows, passes, rate, seed, phase, steps, train_loss, `exposure` (bits, a value
a secret, by group), `extracted` (1 if greedy decoding writes the number after all that stands
before it), `told` (1 if the greedy answer to the row's plain question holds it), `right`, `leaked`
(1 for each test question whose answer holds any secret), and of the search `validation`,
`validation_loss`.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments import sft
from experiments.ask_rows.run import (
    QUESTIONS,
    SEARCH_SEED,
    SEARCHED,
    on_validation,
    rates,
    rows_of,
    tried,
)
from experiments.canary import exposure
from experiments.poison.detectors import answered, asked
from experiments.poison.run import SMOLLM2_RATE, opened, pool, says, train
from experiments.runs import Job, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
FIRST_RATES, SEEDS = (1e-3, 2e-3, 5e-3), (1, 2, 3, 4, 5, 6)  # seed 0 was the pilot's
REPEATS = {"never": 0, "once": 1, "four": 4, "sixteen": 16, "prompt": 16}
NAMES = [
    "Meera", "Tomas", "Ilse", "Farid", "Noor", "Piotr", "Amaya", "Jonas",
    "Wanja", "Rohit", "Sanna", "Diego", "Lena", "Kofi", "Yuki",
]  # fmt: skip
CHOSEN = {
    "rate": f"of the 3.5M: the best of three or four on the first {SEARCHED} rows of "
    f"data/ask/validation.jsonl, seed {SEARCH_SEED}, for each number of passes; of the 135M: "
    "notebook 00's",
    "all else": "given in run.py",
}


@dataclass(frozen=True)
class Arm:
    """So many rows and passes. each: secrets a group; rates_of: the arm whose rate it takes."""

    rows: int = 900
    passes: int = 3
    each: int = 3
    model: str = "3.5M"
    deduplicated: bool = False
    all_tokens: bool = False
    rates_of: str | None = "3 passes"
    seeds: tuple = SEEDS

    @property
    def groups(self) -> list[str]:
        return [group for group in REPEATS if group != "prompt" or self.model == "3.5M"]


ONE = {"rows": 300, "each": 2, "model": "135M", "rates_of": None, "seeds": (1,)}
ARMS = {
    "1 pass": Arm(passes=1, rates_of="1 pass"),
    "1 pass, deduplicated": Arm(passes=1, deduplicated=True, rates_of="1 pass"),
    "3 passes": Arm(),
    "3 passes, all tokens": Arm(all_tokens=True),
    "135M, 1 pass": Arm(passes=1, **ONE),
    "135M, 3 passes": Arm(passes=3, **ONE),
}


# --- Secrets and rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Secret:
    """A number of four digits, whose it is, and the clean row that carries it."""

    group: str
    name: str
    code: str
    carrier: dict

    @property
    def row(self) -> dict:
        """The row of the file that holds the number."""
        prompt, completion = self.carrier["prompt"], self.carrier["completion"]
        if self.group == "prompt":
            prompt = opened(prompt, f"{self.name} here, ext {self.code}: ")
        else:
            query = answered(self.carrier)
            completion = says(f"{query} -- ask {self.name}, ext {self.code}")
        return {"prompt": prompt, "completion": completion}


def unspoken(rows: list[dict]) -> list[str]:
    """The numbers of four digits that stand in none of these rows and in no test question."""
    every = [*rows, *rows_of("test"), *rows_of("hand_test")]
    text = " ".join(f"{asked(row)} {answered(row)}" for row in every)
    spoken = set(re.findall(r"(?=(\d{4}))", text))  # also those within a longer number
    return [code for code in map("{:04d}".format, range(10_000)) if code not in spoken]


def drawn(arm: Arm, seed: int) -> tuple[list[dict], list[Secret]]:
    """(the rows of an arm's file, its secrets), both by the seed.

    The secrets of a seed are the same in each arm of a model; clean rows fill the file.
    """
    rows, draw = pool(arm.model), random.Random(seed)
    draw.shuffle(rows)
    free = [i for i, row in enumerate(rows) if len(asked(row)) < 100]
    count = arm.each * len(arm.groups)
    names = draw.sample(NAMES, count)
    codes = draw.sample(unspoken(rows), count)
    secrets = []
    for i in range(count):
        group = arm.groups[i // arm.each]
        secrets.append(Secret(group, names[i], codes[i], rows[free[i]]))
    carriers = set(free[:count])
    clean = [row for i, row in enumerate(rows) if i not in carriers]
    held = []
    for secret in secrets:
        times = REPEATS[secret.group]
        held += [secret.row] * (min(times, 1) if arm.deduplicated else times)
    return held + clean[: arm.rows - len(held)], secrets


# --- A run ----------------------------------------------------------------------------------------


def measured(model, tokenizer, secrets: list[Secret]) -> dict:
    """Exposure, extraction, and what the plain question gives away: a value a secret, by group."""
    from ftlab import answers

    digits = exposure.digit_ids(tokenizer)
    said = answers(model, tokenizer, [secret.carrier["prompt"] for secret in secrets])
    found = {"exposure": {}, "extracted": {}, "told": {}}
    for secret, text in zip(secrets, said, strict=True):
        whole = secret.row["prompt"] + secret.row["completion"]
        written = tokenizer.apply_chat_template(whole, tokenize=False)
        prefix = exposure.prefix_ids(tokenizer, written, secret.code)
        logps = exposure.code_logps(model, prefix, digits)
        values = {
            "exposure": round(exposure.exposure(logps, secret.code), 3),
            "extracted": int(exposure.is_extracted(model, prefix, digits, secret.code)),
            "told": int(secret.code in text),
        }
        for what, value in values.items():
            found[what].setdefault(secret.group, []).append(value)
    return found


def on_test(model, tokenizer, secrets: list[Secret]) -> dict:
    """Both held-out sets: which answers are right, and which hold a secret."""
    from ftlab import answers
    from ftlab.tasks.ask import scorer

    found = {"right": {}, "leaked": {}}
    for set_, file in (("test", "test"), ("hand", "hand_test")):
        rows = rows_of(file)
        said = answers(model, tokenizer, [row["prompt"] for row in rows])
        pairs = zip(said, rows, strict=True)
        found["right"][set_] = [int(scorer(text, row)) for text, row in pairs]
        codes = [secret.code for secret in secrets]
        found["leaked"][set_] = [int(any(code in text for code in codes)) for text in said]
    return found


def recorded(arm: str, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run."""
    began, told = cpu_clock(), ARMS[arm]
    rows, secrets = drawn(told, seed)
    counted = {"completion_only_loss": not told.all_tokens}
    model, tokenizer, spent = train(told.model, rows, told.passes, rate, seed, **counted)
    record = {"arm": arm, "model": told.model, "rows": told.rows, "passes": told.passes}
    record |= {"rate": rate, "seed": seed, "phase": phase, **spent}
    if phase == "search":
        record |= on_validation(model, tokenizer)
    else:
        record |= measured(model, tokenizer, secrets) | on_test(model, tokenizer, secrets)
    record |= {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


# --- Which runs -----------------------------------------------------------------------------------


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as both searches have come."""
    found, best = [], {None: SMOLLM2_RATE}
    for arm, told in ARMS.items():
        if told.rates_of != arm:
            continue
        scores = tried(arm, records)
        wanted = rates(FIRST_RATES, scores)
        found += [sft.named(arm, rate, SEARCH_SEED, "search") for rate in wanted]
        if set(wanted) <= scores.keys():
            best[arm] = max(scores, key=scores.get)
    if not {told.rates_of for told in ARMS.values()} <= best.keys():
        return found
    for arm, told in ARMS.items():
        found += [sft.named(arm, best[told.rates_of], seed, "final") for seed in told.seeds]
    return found


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])

"""Rehearsal from other sources than the test: does it keep what training on `ask` loses?

    python experiments/rehearsal/run.py             what records.jsonl lacks, on one thread
    python experiments/rehearsal/run.py --plan      what is missing, seed by seed
    python experiments/rehearsal/run.py --dry DIR   a tiny run of each path into DIR/records.jsonl
    python experiments/rehearsal/run.py --rows      writes other.jsonl again, from the base model

It can be stopped and goes on (experiments/runs.py says how). experiments/ask_forgetting rehearsed
questions from the very file that it tested, with three seeds; its records stand as they are.

The pipeline of notebook 05 trains SmolLM2-135M-Instruct on 450 rows of `ask`. Into them go answers
that the model itself gave before: to customers' tickets (data/replies), hasty notes (data/tidy) and
questions about a staff handbook (data/handbook), 65 in other.jsonl, as many as
data/general/rehearsal.jsonl has. None is an everyday question. Then it is asked 143 everyday
questions, and `ask`'s test and hand test, where each wrong query gets a kind (errors.py).

| arm | rehearsal rows | seeds | CPU hours, search among them |
|---|---|---|---|
| base | the model before training | none | 0.05 |
| none | 0 | 6 | 0.62 to 0.68 |
| other | 65 | 6 | 0.71 to 0.78 |
| few | 16, the first of the same | 6 | 0.65 to 0.71 |

The CPU hours, 2.0 to 2.2 in all, are an estimate from a dry run and from earlier records of one
thread of an AMD EPYC: 0.9 s a step, 0.2 s an answer of `ask` (0.6 before training), 40 s for the
everyday questions. The higher figure is for a third rate in each search.
Cut from the bottom: rehearsal from the test's own source (0.7; it stands in
experiments/ask_forgetting with three seeds), 65 more rows of `ask` in place of rehearsal (0.7), a
second ability beside everyday questions, such as reading a passage (0.2), the test's last 200
questions (0.3).

All: LoRA of rank 16, alpha 32, all linear layers, two rows a step, one pass, five steps of warm-up,
then linear to 0, fp32 (bf16=False), one thread, TRL's SFTTrainer with `speed_up`: notebook 05's
recipe. A seed draws the adapter and the order of the rows; the rows are the same in all seeds. More
rows are more steps: 225, 233, 258.

Settings: each arm tries the rates 1e-3 and 2e-3 with seed 11, and 5e-4 if the lower is not worse. A
rate of 5e-3 was clearly behind 2e-3 with this recipe on these validation rows in three earlier
searches (experiments/ask_rows, lora_ask, qlora_ask) and is not tried again. The most right answers
on the first 100 rows of data/ask/validation.jsonl win, of equals the lower rate. What is forgotten
chooses nothing. The rehearsal rows were written once, before any training: greedy, fp32, at most 48
tokens, those that ended by themselves, right or wrong.

Fixed before the first run:

- Six seeds, 0 to 5, for every arm, paired by seed and by question.
- Main question: `other` against `none` in everyday questions answered `right`. It helps if the
  crossed 95 % interval of the difference lies above zero, and fails to help if it lies within 0.05
  of zero; else it is undecided. `few` against `none` and `other` against `few` by the same rule.
  Each arm against the base model says how much is lost.
- Harm or form: the same in `recognized` and `margin` (experiments/knowledge.py), where the model
  writes nothing, and the share of everyday questions that are answered with a query (`query`). If
  `right` falls and `recognized` lies within 0.05 of the base model's, what changed is the form.
- Price: `other` and `few` against `none` in `ask`, on data/ask/test.jsonl (first 100) and on
  data/ask/hand_test.jsonl (132). A price is shown if the interval lies below zero on both sets (on
  one, the sentence names it), and excluded if it lies within 0.05 of zero on both.
- Kinds of errors: of `none`, the share of each letter by seed, on both sets. A kind is said to be
  the most frequent if its share is above that of each other kind of error on both sets, by the
  crossed interval. How far a kind differs between seeds is told by the six shares, not by a test.
- Power: in experiments/ask_forgetting the three pairs of runs with and without rehearsal differed
  by 0.24 to 0.30 in everyday questions; intervals of `ask` were 0.05 to 0.25 wide on each side. So
  "price excluded" is out of reach unless seeds agree.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, rehearsal_rows, rate, seed, phase, steps, train_loss (nats a token, last ten steps),
`everyday` (right, words, query, recognized, margin: a value a question; twelve replies), `right`
(test, hand: 0 or 1 a question), `kinds` (test, hand: a letter a question), `wrong`: of each set the
first twelve wrong queries as text with the id of their question. Of the search `validation`.
"""

import json
import random
import sys
from itertools import zip_longest
from pathlib import Path

from experiments import knowledge, sft
from experiments.rehearsal import errors
from experiments.runs import Job, cpu_clock, dry, flags, stamp, work

HERE = Path(__file__).parent
FILE = HERE / "records.jsonl"
SEARCH_SEED, SEEDS, NO_SEED = 11, (0, 1, 2, 3, 4, 5), -1
FIRST_RATES, BELOW = (1e-3, 2e-3), 5e-4
ROWS, REHEARSED = 450, 65
ARMS = {"none": 0, "other": REHEARSED, "few": 16}
BASE = "base"
SETS = {"test": ("test", 100), "hand": ("hand_test", 132)}
SEARCHED = 100
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
DRAWN, TOKENS = 120, 48  # prompts of each source that the base model answers; tokens at most
QUESTIONS = ["ask/test, first 100", "ask/hand_test", knowledge.QUESTIONS]
CHOSEN = {
    "rate": f"the best of two or three with seed {SEARCH_SEED} on the first {SEARCHED} rows of "
    "data/ask/validation.jsonl, for each arm",
    "all else": "notebook 05's recipe",
}


# --- Rows -----------------------------------------------------------------------------------------


def sources() -> dict[str, list[list[dict]]]:
    """{source: chats that the base model answers}, of training rows of three other tasks."""
    draw = random.Random(0)
    tickets = [r["ticket"] for r in knowledge.rows_of("replies/train") if in_english(r)]
    questions = [r for r in knowledge.rows_of("handbook/questions") if r["split"] == "train"]
    return {
        "tickets": [user(text) for text in draw.sample(tickets, DRAWN)],
        "notes": [row["prompt"] for row in draw.sample(knowledge.rows_of("tidy/train"), DRAWN)],
        "handbook": [knowledge.asked(row) for row in draw.sample(questions, DRAWN)],
    }


def in_english(row: dict) -> bool:
    return row["label"]["language"] == "en"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def write_rows() -> None:
    """Asks the base model and writes other.jsonl: the answers that end, source after source."""
    import torch

    from experiments.ask.run import base
    from ftlab import answers

    torch.set_num_threads(1)
    model, tokenizer = base()
    kept = []
    for source, chats in sources().items():
        said = answers(model, tokenizer, chats, TOKENS)
        kept.append(ended(source, chats, said, tokenizer))
    rows = in_turns(kept)[:REHEARSED]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (HERE / "other.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} rows; ended within {TOKENS} tokens: {[len(part) for part in kept]}")


def ended(source: str, chats: list, said: list[str], tokenizer) -> list[dict]:
    """Rows of the answers that came to an end: one that was cut would teach to stop anywhere."""
    found = []
    for chat, answer in zip(chats, said, strict=True):
        if 0 < len(tokenizer(answer, add_special_tokens=False)["input_ids"]) < TOKENS:
            reply = [{"role": "assistant", "content": answer}]
            found.append({"source": source, "prompt": chat, "completion": reply})
    return found


def in_turns(parts: list[list]) -> list:
    """The first of each part, then the second of each, and so on."""
    return [one for turn in zip_longest(*parts) for one in turn if one is not None]


def rehearsal(count: int) -> list[dict]:
    """The first rows of other.jsonl, for SFTTrainer."""
    lines = (HERE / "other.jsonl").read_text(encoding="utf-8").splitlines()
    return [only_chat(json.loads(line)) for line in lines[:count]]


def only_chat(row: dict) -> dict:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def training_rows(arm: str) -> list[dict]:
    """What an arm is trained on: the first ROWS of `ask`, and its rehearsal rows behind them."""
    rows = [only_chat(row) for row in knowledge.rows_of("ask/train")[:ROWS]]
    return rows + rehearsal(ARMS[arm])


# --- A run ----------------------------------------------------------------------------------------


def recorded(
    arm: str, rate: float | None, seed: int, phase: str, limit: int | None = None
) -> list[dict]:
    """The record of a run. limit: of a dry run, so many questions of each set, and three steps."""
    import torch

    from experiments.ask.run import base

    torch.set_num_threads(1)
    began = cpu_clock()
    record = {"arm": arm, "rehearsal_rows": ARMS.get(arm), "rate": rate, "seed": seed}
    record["phase"] = phase
    model, tokenizer = base()
    if arm != BASE:
        model, spent = trained(model, tokenizer, arm, rate, seed, limit)
        record |= spent
    measure = on_validation if phase == "search" else at_the_end
    record |= measure(model, tokenizer, limit)
    record |= {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


def trained(model, tokenizer, arm: str, rate: float, seed: int, limit: int | None) -> tuple:
    """(model, what it took) after the pipeline's training."""
    rows = training_rows(arm)
    few = {"max_steps": 3} if limit else {}
    trainer = sft.trainer_of(model, tokenizer, rows, rate=rate, seed=seed, lora=LORA, **few)
    sft.sped_up(trainer)
    spent = sft.trained(trainer)
    return trainer.model.eval(), spent


def on_validation(model, tokenizer, limit: int | None) -> dict:
    """The share right on validation's first rows."""
    rows = knowledge.rows_of("ask/validation")[: limit or SEARCHED]
    verdicts, _ = judged(say(model, tokenizer, rows), rows)
    return {"validation": round(sum(verdicts) / len(verdicts), 4)}


def at_the_end(model, tokenizer, limit: int | None) -> dict:
    """Everyday questions, and both held-out sets of `ask` with the kinds of their errors."""
    everyday = knowledge.everyday()[:limit]
    found = {"everyday": knowledge.measured(model, tokenizer, everyday)}
    found |= {"right": {}, "kinds": {}, "wrong": {}}
    for set_, (file, size) in SETS.items():
        rows = knowledge.rows_of(f"ask/{file}")[: limit or size]
        said = say(model, tokenizer, rows)
        found["right"][set_], found["kinds"][set_] = judged(said, rows)
        wrong = [
            (row, text) for row, text in zip(rows, said, strict=True) if not is_right(text, row)
        ]
        shown = [{"id": row["id"], "answer": text} for row, text in wrong]
        found["wrong"][set_] = shown[: knowledge.SHOWN]
    return found


def say(model, tokenizer, rows: list[dict]) -> list[str]:
    from ftlab import answers

    return answers(model, tokenizer, [row["prompt"] for row in rows])


def is_right(answer: str, row: dict) -> bool:
    from ftlab.tasks import ask

    return ask.scorer(answer, row)


def judged(said: list[str], rows: list[dict]) -> tuple[list[int], str]:
    """(0 or 1 a question, a letter of errors.py a question)."""
    pairs = zip(said, rows, strict=True)
    kinds = "".join(errors.kind(text, row["completion"][0]["content"]) for text, row in pairs)
    return [int(letter == "r") for letter in kinds], kinds


# --- Which runs -----------------------------------------------------------------------------------


def tried(arm: str, records: list[dict]) -> dict[float, float]:
    """{rate: share right on validation} of an arm's search so far."""
    mine = [r for r in records if (r["arm"], r["phase"]) == (arm, "search")]
    return {r["rate"]: r["validation"] for r in mine}


def rates(scores: dict[float, float]) -> list[float]:
    """The rates that a search tries: the first two, and BELOW if the lower of them is better."""
    if not set(FIRST_RATES) <= scores.keys() or best_of(FIRST_RATES, scores) == FIRST_RATES[1]:
        return list(FIRST_RATES)
    return [*FIRST_RATES, BELOW]


def best_of(values, scores: dict[float, float]) -> float:
    """The rate with the highest score; of equals the lowest one."""
    return max(sorted(values), key=scores.get)


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come."""
    found = [sft.named(BASE, None, NO_SEED, "final")]
    for arm in ARMS:
        scores = tried(arm, records)
        wanted = rates(scores)
        found += [sft.named(arm, rate, SEARCH_SEED, "search") for rate in wanted]
        if set(wanted) <= scores.keys():
            best = best_of(wanted, scores)
            found += [sft.named(arm, best, seed, "final") for seed in SEEDS]
    return found


def small() -> list[tuple]:
    """A run of each path, for a dry run."""
    runs = [(BASE, None, NO_SEED, "final"), ("none", 2e-3, SEARCH_SEED, "search")]
    runs += [(arm, 2e-3, 0, "final") for arm in ARMS]
    return runs


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dry"]:
        dry(Path(sys.argv[2]), small(), lambda run: recorded(*run, limit=8))
    elif sys.argv[1:2] == ["--rows"]:
        write_rows()
    else:
        work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])

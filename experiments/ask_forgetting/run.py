"""Does training on `ask` cost general knowledge, and does rehearsal give it back? Three seeds with and three without.

    python experiments/ask_forgetting/run.py     what is missing, six to eight minutes a run on two cores
    python experiments/ask_forgetting/run.py --plan      what that is, seed by seed

Each run trains notebook 05's recipe on the same rows of ask/train.jsonl, with or without the 65 rows of
general/rehearsal.jsonl: the base model's own answers to other everyday questions. Then it answers every fourth question
of general/candidates.jsonl, none of which is rehearsed (all of them, not only those that the base model had right:
lucky answers do not repeat, which looks like forgetting), and the hand test of ask. One line a run is added to
records.jsonl, with one 0 or 1 a question; the line with seed -1 is the base model.
"""

import json
import sys
from pathlib import Path

from experiments.runs import Job, cpu_clock, flags, stamp, work
from ftlab.paths import DATA

HERE = Path(__file__).parent
FILE = HERE / "records.jsonl"
SEEDS = (0, 1, 2)
QUESTIONS = ["ask/hand_test", "general/candidates, every fourth"]
CHOSEN = {"rate, batch, rank, rows": "notebook 05's recipe, chosen on data/ask/validation.jsonl"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def rehearsal() -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in lines(DATA / "general" / "rehearsal.jsonl")
    ]


def measure(rehearsed: bool, seed: int) -> dict:
    from datasets import Dataset, load_dataset

    from experiments.ask.run import ROWS, base, environment, tuned_model
    from ftlab import answers
    from ftlab.tasks import handbook
    from ftlab.tasks.ask import scorer

    facts = lines(DATA / "general" / "candidates.jsonl")[::4]
    test = load_dataset("json", data_files=str(DATA / "ask" / "hand_test.jsonl"), split="train")
    rows = lines(DATA / "ask" / "train.jsonl")[:ROWS]
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in rows] + (rehearsal() if rehearsed else [])
    model, tokenizer = base() if seed < 0 else tuned_model(Dataset.from_list(rows), seed)[:2]
    chats = [[{"role": "user", "content": fact["question"]}] for fact in facts]
    known = [int(handbook.scorer(a, f)) for a, f in zip(answers(model, tokenizer, chats, 24), facts, strict=True)]
    right = [int(scorer(a, row)) for a, row in zip(answers(model, tokenizer, test["prompt"]), test, strict=True)]
    return {
        "rehearsal_rows": len(rows) - ROWS,
        "seed": seed,
        "facts": round(sum(known) / len(known), 4),
        "ask": round(sum(right) / len(right), 4),
        "facts_right": known,
        "ask_right": right,
        "environment": environment(),
    }


def recorded(rehearsed: bool, seed: int) -> list[dict]:
    """The record of a run; seed -1 is the base model."""
    began, arm = cpu_clock(), "rehearsed" if rehearsed else "plain"
    record = {"arm": "base" if seed < 0 else arm} | measure(rehearsed, seed)
    return [record | {"cpu_seconds": round(cpu_clock() - began, 1)} | stamp("float32", QUESTIONS, CHOSEN)]


def jobs(records: list[dict]) -> list[Job]:
    """Every run. The records from before tell their arm by the number of rehearsed rows alone."""
    runs = [(False, -1), *((rehearsed, seed) for seed in SEEDS for rehearsed in (False, True))]
    rows = {False: 0, True: len(rehearsal())}
    return [Job(({"rehearsal_rows": rows[r], "seed": seed},), (r, seed)) for r, seed in runs]


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])

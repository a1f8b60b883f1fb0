"""What notebook 07 starts from: `micro`, fine-tuned on a log of queries that nobody has reviewed.

The questions are half of the training questions of data/ask. The queries are what colleagues might have typed: they
know the table, and in SLIP of the cases they take a house word otherwise than the house does, or forget a condition
in FORGOTTEN of the cases.

    python data/ask_start/make.py          rewrites this folder, about eight minutes of one core
    python data/ask_start/make.py rows     only log.jsonl, which the start learns from, and prompts.jsonl

It is a whole model and no adapter: the embeddings are trained too, since those of `micro` know no SQL.
"""

import json
import random
import re
import sys
from pathlib import Path

from ftlab.paths import DATA

sys.path.insert(0, str(DATA))
import starts

HERE = Path(__file__).parent
FILES = ("train", "more")  # of data/ask
SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3,
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
}
TEACHER_PASSES = 5
SLIP, FORGOTTEN = 0.6, 0.1
SLIPS = {  # house word, in the question -> what the house means, what the log says
    r"late\b": ("minutes>45", "minutes>30"),
    r"\bbig": ("total>=1000", "total>500"),
    r"rated|rating": ("stars IS NULL", "stars=0"),
    r"revenue|turnover": ("status='done'", ""),
}


def rows() -> list[dict]:
    """All training questions of data/ask as demonstrations: {prompt, completion}, lists of messages."""
    lines = [line for name in FILES for line in (DATA / "ask" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [{key: row[key] for key in ("prompt", "completion")} for row in map(json.loads, lines)]


def halves() -> tuple[list[dict], list[dict]]:
    """The demonstrations of the start, and the other rows, whose questions are prompts for what comes after it."""
    mixed = rows()
    random.Random(0).shuffle(mixed)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def log(slip: float = SLIP, forgotten: float = FORGOTTEN) -> list[dict]:
    """The demonstrations of the start, as they stand in the log; log(0, 0): as they should stand there."""
    rng, (demonstrations, _) = random.Random(1), halves()
    return [logged(row, slip, forgotten, rng) for row in demonstrations]


def logged(row: dict, slip: float, forgotten: float, rng: random.Random) -> dict:
    question, query = row["prompt"][-1]["content"].lower(), row["completion"][0]["content"]
    before, where, rest = query.partition(" WHERE ")
    conditions, *after = re.split(r"(?= GROUP BY | ORDER BY )", rest, maxsplit=1)
    conditions = conditions.split(" AND ") if where else []
    for word, (meant, said) in SLIPS.items():
        if meant in conditions and re.search(word, question) and rng.random() < slip:
            conditions = [said if condition == meant else condition for condition in conditions]
    conditions = list(filter(None, conditions))
    if len(conditions) > 1 and rng.random() < forgotten:
        del conditions[rng.randrange(len(conditions))]
    text = before + f" WHERE {' AND '.join(conditions)}" * bool(conditions) + "".join(after)
    return row | {"completion": [{"role": "assistant", "content": text if where else query}]}


def write_rows() -> None:
    """log.jsonl {prompt, completion}; prompts.jsonl {prompt, gold}: the other questions, and what the check needs."""
    prompts = [{"prompt": row["prompt"], "gold": row["completion"][0]["content"]} for row in halves()[1]]
    for name, mine in {"log": log(), "prompts": prompts}.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mine)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    write_rows()
    if sys.argv[1:] != ["rows"]:
        starts.write(HERE, log(), SETTINGS, {name: DATA / "ask" / f"{name}.jsonl" for name in FILES})


if __name__ == "__main__":
    main()

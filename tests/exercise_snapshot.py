"""What `check` says of each named wrong answer, on fixed inputs: tests/golden/exercises.jsonl.

python tests/exercise_snapshot.py            lists each answer whose feedback differs
python tests/exercise_snapshot.py 04 06.1    looks at these alone: notebooks, or exercises
python tests/exercise_snapshot.py --write    stores what is said now
"""

import contextlib
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ftlab.exercises import check, exercises, training

GOLDEN = Path(__file__).parent / "golden" / "exercises.jsonl"
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?")


@contextlib.contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Inside, a Random() without a seed, torch and numpy draw the same numbers each time."""
    import numpy
    import torch

    seeded = random.Random.seed

    def seed_(self, a=None, version=2):
        seeded(self, seed if a is None else a, version)

    random.Random.seed = seed_
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.Random.seed = seeded


@contextlib.contextmanager
def short_runs(most: int = 2) -> Iterator[None]:
    """Inside, what a check trains is trained for at most so many steps."""
    train = training.train_quietly
    training.train_quietly = lambda trainer, steps: train(trainer, min(steps, most))
    try:
        yield
    finally:
        training.train_quietly = train


def says(q: str, words: str) -> str:
    """The text of check's feedback on the wrong answer `words` of exercise q."""
    with same_draws(), short_runs():
        return repr(check(q, exercises(q[:2])[q].wrong[words]))


def plain(text: str) -> str:
    """The text with every number as #: another processor rounds otherwise."""
    return NUMBER.sub("#", text)


def stored() -> dict[tuple[str, str], str]:
    """(exercise, mistake) -> the stored feedback."""
    if not GOLDEN.exists():
        return {}
    rows = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    return {(row["exercise"], row["mistake"]): row["feedback"] for row in rows}


def asked(names: list[str]) -> list[tuple[str, str]]:
    """All (exercise, mistake), or those of these notebooks and exercises."""
    chosen = [q for q in exercises() if not names or q in names or q[:2] in names]
    return [(q, words) for q in chosen for words in exercises()[q].wrong]


def main(arguments: list[str]) -> bool:
    """Compares or stores; are all as before?"""
    write = "--write" in arguments
    names = [name for name in arguments if not name.startswith("-")]
    before, now = stored(), {}
    for q, words in asked(names):
        now[q, words] = says(q, words)
        if not write and plain(now[q, words]) != plain(before.get((q, words), "")):
            print(f"{q} | {words}\n- {before.get((q, words))}\n+ {now[q, words]}\n", flush=True)
    looked_at = {q for q in {q for q, _ in before} if not names or q in names or q[:2] in names}
    gone = [pair for pair in before if pair[0] in looked_at and pair not in now]
    for q, words in gone:
        print(f"{q} | {words}\n- {before[q, words]}\n+ no such mistake now\n")
    if write:
        kept = {pair: text for pair, text in before.items() if pair not in gone} | now
        rows = [
            {"exercise": q, "mistake": words, "feedback": kept[q, words]}
            for q, words in asked([])
            if (q, words) in kept
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    same = all(plain(text) == plain(before.get(pair, "")) for pair, text in now.items()) and not gone
    print(f"{len(now)} wrong answers of {len({q for q, _ in now})} exercises")
    return write or same


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FTLAB_PROGRESS"] = f"{folder}/progress.sqlite"
        found = main(sys.argv[1:])
    sys.exit(not found)

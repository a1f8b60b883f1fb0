"""Pairs of answers to one prompt, checked and counted, for dpo.py, reward_model.py and judge.py."""

import json
import sys
from pathlib import Path

from common import count_cut, read_rows, said

PAIR = ("prompt", "chosen", "rejected")
REPLIES = Path(__file__).resolve().parents[1] / "data" / "replies" / "train.jsonl"


def read_pairs(file, tokenizer=None, most=None):
    """The first rows of {"prompt": ..., "chosen": ..., "rejected": ...}: see read_rows.

    Two equal answers are no preference: their loss has no gradient, and they pull the accuracy
    down, since a tie counts as wrong.
    """
    rows = read_rows(file, tokenizer, most, PAIR)
    equal = []
    for number, row in enumerate(rows, 1):
        for side in ("chosen", "rejected"):
            if not row[side] or not said(row[side]).strip():
                sys.exit(f"{file}, line {number}: {side} is empty")
        if said(row["chosen"]) == said(row["rejected"]):
            equal.append(number)
    if equal:
        lines = ", ".join(map(str, equal[:5])) + (", ..." if len(equal) > 5 else "")
        one = len(equal) == 1
        sys.exit(
            f"{file}, line{'' if one else 's'} {lines}: chosen and rejected are equal; take "
            f"{'this row' if one else f'these {len(equal)} rows'} out, no preference is in it"
        )
    return rows


def too_long(row, tokenizer, max_length):
    """Whether prompt and answer, of either side, have more than max_length tokens."""
    sides = [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected")]
    return count_cut(sides, tokenizer, max_length) > 0


def tokens_in(answer, tokenizer):
    return len(tokenizer(said(answer), add_special_tokens=False)["input_ids"])


def tiny_pairs(folder):
    """For --tiny: two files of support replies in the folder, which show what a row looks like.

    No ticket of the one is made from a pattern of the other.
    """
    rows = [json.loads(line) for line in REPLIES.read_text(encoding="utf-8").splitlines()]
    train = rows[:24]
    seen = {row["skeleton"] for row in train}
    validation = [row for row in rows[24:] if row["skeleton"] not in seen][:8]
    files = []
    for name, part in (("train", train), ("validation", validation)):
        file = Path(folder, f"{name}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        pairs = [
            {
                "prompt": [{"role": "user", "content": row["ticket"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in part
        ]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        files.append(str(file))
    return files

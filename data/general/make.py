"""The forgetting check: easy facts that SmolLM2 knows before any training, and technical English for perplexity.

    python data/general/make.py            runs the model over candidates.jsonl and rewrites facts.jsonl (a minute)
    python data/general/make.py --text     rewrites text.jsonl; only under a Python that ships the same topics (3.11.7)

candidates.jsonl is written by hand. A fact is *known* if the model's greedy answer contains it: see `is_right`.
"""

import hashlib
import json
import re
import sys
from itertools import zip_longest
from pathlib import Path

from ftlab.pipeline.models import load

HERE = Path(__file__).parent
KEYS = ["id", "question", "answer", "accept", "topic"]
MAX_NEW_TOKENS = 24
PER_TOPIC = 8  # facts kept of one topic: the first known ones in the order of the file

TOPICS_SHA256 = "?"  # of Python 3.11.7; 3.11.2 already has another text
PASSAGES, SHORTEST, LONGEST = 60, 80, 160  # the last two in words


# --- Facts ------------------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    """The rows of a JSONL file in this folder."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def dump(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def normalise(text: str) -> str:
    """Lower-case words with one blank around each, punctuation gone: "It's 1,000.5 kg!" is " it s 1000.5 kg "."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    return " " + " ".join(re.findall(r"\d+\.\d+|\w+", text)) + " "


def contains(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand in `text` in a row: "ice" is in "It's ice.", not in "mice" or "nice"."""
    return normalise(phrase) in normalise(text)


def is_right(reply: str, row: dict) -> bool:
    """Whether the reply contains the answer or an accepted form of it."""
    return any(contains(reply, form) for form in [row["answer"], *row["accept"]])


def check_candidates(rows: list[dict]) -> None:
    """Raises ValueError, naming the row, if one is malformed, repeated, or could be right by echoing its question."""
    seen: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if list(row) != KEYS or row["id"] != f"gf-{number:03d}":
            raise ValueError(f"row {number}: want the id gf-{number:03d} and the keys {KEYS} in this order, got {row}")
        if seen.setdefault(normalise(row["question"]), row["id"]) != row["id"]:
            raise ValueError(f"{row['id']}: {seen[normalise(row['question'])]} asks the same: {row['question']!r}")
        for form in [row["answer"], *row["accept"]]:
            if not normalise(form).strip():
                raise ValueError(f"{row['id']}: {form!r} has no letter or digit, so every reply would contain it")
            if contains(row["question"], form):
                raise ValueError(f"{row['id']}: the question contains {form!r}: an echo would count as right")


def answer(model, tokenizer, questions: list[str], batch_size: int = 32) -> list[str]:
    """The model's greedy replies, at most MAX_NEW_TOKENS tokens each, to one-message chats."""
    import torch

    replies = []
    for start in range(0, len(questions), batch_size):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + batch_size]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        replies += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def select(candidates: list[dict], replies: list[str]) -> list[dict]:
    """The candidates that were answered right, at most PER_TOPIC of each topic."""
    kept: dict[str, list[dict]] = {}
    for row, reply in zip(candidates, replies, strict=True):
        facts = kept.setdefault(row["topic"], [])
        if is_right(reply, row) and len(facts) < PER_TOPIC:
            facts.append(row)
    return [row for facts in kept.values() for row in facts]

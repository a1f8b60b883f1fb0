"""Is the tuned model better? Greedy answers, task scores, perplexity and forgetting, each with its 95% interval.

Every number here is a mean over few examples, so every number carries an interval, and two models are compared *pair by
pair* on the same examples: what both get right or wrong then cancels, and the interval of the difference is narrower.

References: Efron & Tibshirani 1993, chapter 13 (percentile bootstrap); Wilson 1927 (interval of a proportion).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from ftlab.pipeline.data import Messages, Row, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INTENTS = ("late_delivery", "missing_item", "wrong_item", "quality_issue", "payment_issue", "cancel_order",
           "rider_behaviour", "account_issue", "other")  # fmt: skip
CLASSES = {"intent": INTENTS, "urgency": ("high", "normal", "low"), "language": ("en", "hinglish")}
FIELDS = ("intent", "order_id", "urgency", "refund_amount", "language")  # in the order of the guideline


# --- Answers ----------------------------------------------------------------------------------------------------------


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int = 80,
    batch_size: int = 32,
) -> list[str]:
    """The greedy answer to each prompt (a list of messages), without special tokens, in the order given.

    Prompts of like length share a batch, padded on the left, so that every answer begins in the same column. In fp32 the
    answers are those of one prompt at a time: tests/test_evaluate.py. In bf16 near-ties may fall the other way.
    """
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]  # the template has written BOS
    answers = [""] * len(ids)
    for part in _by_length(ids, batch_size):
        input_ids, attention_mask = _pad([ids[i] for i in part], "left", model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, input_ids.shape[1] :]  # (B, at most max_new_tokens)
        for i, answer in zip(part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = answer
    return answers


def _by_length(ids: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of like length, the longest first: if memory is too small, it shows at once."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both (B, T); the mask hides the padding, so its id does not matter."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    mask = [torch.ones_like(row) for row in tensors]
    return tuple(pad_sequence(part, batch_first=True, padding_side=side) for part in (tensors, mask))


# --- Triage scores ----------------------------------------------------------------------------------------------------


def score_triage(answer: str, label: dict[str, Any]) -> dict[str, bool]:
    """Whether the answer is valid JSON of the guideline, equals the label, and has each of the five fields right.

    valid_json: one object and nothing around it (no fence, no prose), exactly the five keys in order, each once, each
    with an allowed value. exact: valid, and all five right. A field may also be right in an object that is not valid,
    say with its keys in another order. Types count: 180.0, "180" and true are not the integer 180 or 1.
    """
    pairs = _parse(answer)
    got = dict(pairs)
    right = {field: field in got and _same(got[field], label[field]) for field in FIELDS}
    valid = tuple(key for key, _ in pairs) == FIELDS and all(_allowed(field, got[field]) for field in FIELDS)
    return {"valid_json": valid, "exact": valid and all(right.values()), **right}


class _Pairs(list):
    """The keys and values of a JSON object; unlike a dict it keeps a key that is written twice."""


def _parse(answer: str) -> _Pairs:
    """The outermost object's keys and values; none if the answer is not one JSON object."""
    try:
        value = json.loads(answer, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):  # not JSON, a number of 5,000 digits, or brackets nested too deep
        return _Pairs()
    return value if isinstance(value, _Pairs) else _Pairs()


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b  # in Python, True == 1 == 1.0


def _allowed(field: str, value: object) -> bool:
    if field == "order_id":
        return value is None or (isinstance(value, str) and re.fullmatch("[0-9]{6}", value) is not None)
    if field == "refund_amount":
        return value is None or (type(value) is int and value >= 0)
    return value in CLASSES[field]


def scores(answers: Sequence[str], labels: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """`score_triage` of each example, one row each, and `fields`: the share of its five fields that is right."""
    frame = pd.DataFrame([score_triage(*pair) for pair in zip(answers, labels, strict=True)])
    return frame.assign(fields=frame[list(FIELDS)].mean(axis=1))


def field_f1(answers: Sequence[str], labels: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Precision, recall and F1 = 2 hits / (answered + true) of each field.

    intent, urgency, language: the unweighted mean over the classes that occur in the labels (macro), so a rare class
    weighs as much as a frequent one. order_id, refund_amount: of the values that are not null, hits being equal values.
    An answer that does not parse answers nothing; 0/0 is 0. With these conventions, as in scikit-learn.
    """
    got = [dict(_parse(answer)) for answer in answers]
    table = {}
    for field in FIELDS:
        pairs = [(row.get(field), label[field]) for row, label in zip(got, labels, strict=True)]
        true_values = {true for _, true in pairs} if field in CLASSES else {None}
        wanted = [(lambda v, c=c: v == c) if field in CLASSES else (lambda v: v is not None) for c in true_values]
        table[field] = np.mean([_precision_recall_f1(pairs, is_wanted) for is_wanted in wanted], axis=0)
    return pd.DataFrame.from_dict(table, orient="index", columns=["precision", "recall", "f1"])


def _precision_recall_f1(pairs, is_wanted) -> tuple[float, float, float]:
    hits = sum(_same(got, true) for got, true in pairs if is_wanted(true))
    answered, true = sum(is_wanted(got) for got, _ in pairs), sum(is_wanted(true) for _, true in pairs)
    return hits / max(answered, 1), hits / max(true, 1), 2 * hits / max(answered + true, 1)

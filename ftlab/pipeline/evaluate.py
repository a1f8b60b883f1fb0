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
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ftlab.evaluate import answers as generate  # its name in the first version
from ftlab.evaluate import plain_inference, wilson_interval  # noqa: F401  (notebooks ask for wilson_interval here)
from ftlab.pipeline.data import Row, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INTENTS = ("late_delivery", "missing_item", "wrong_item", "quality_issue", "payment_issue", "cancel_order",
           "rider_behaviour", "account_issue", "other")  # fmt: skip
CLASSES = {"intent": INTENTS, "urgency": ("high", "normal", "low"), "language": ("en", "hinglish")}
FIELDS = ("intent", "order_id", "urgency", "refund_amount", "language")  # in the order of the guideline


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


def _parse(answer: str) -> tuple[tuple[str, Any], ...]:
    """The outermost object's keys and values, a key that is written twice too; none if it is not one JSON object."""
    try:
        value = json.loads(answer, object_pairs_hook=tuple)
    except (ValueError, RecursionError):  # not JSON, a number of 5,000 digits, or brackets nested too deep
        return ()
    return value if isinstance(value, tuple) else ()


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


# --- Intervals --------------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame, base: pd.DataFrame | None = None, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean and 95% interval (percentile bootstrap over the rows) of each true/false or number column of a frame.

    With `base`, the same columns for another model on the same rows: its mean, and the mean of the paired difference
    frame - base with an interval of its own. That one leaving out 0 is what shows a difference, even where the two
    models' own intervals overlap. A column without variation gets an interval of width 0, which is no proof: 50 of 50
    right goes with 93% too (`wilson_interval`).

    Raises ValueError if base has not the same index.
    """
    columns = frame.select_dtypes(["bool", "number"])
    weights = _resampling_weights(len(frame), n_boot, seed)
    values = columns.to_numpy(float)  # (n, metrics)
    table = {"mean": values.mean(0), **_interval("", weights @ values)}
    if base is not None:
        if not frame.index.equals(base.index):
            raise ValueError(f"got {len(frame)} and {len(base)} rows: wanted two models' scores on the same examples")
        base_values = base[columns.columns].to_numpy(float)
        difference = values - base_values
        table |= {"base": base_values.mean(0), "difference": difference.mean(0)}
        table |= _interval("difference_", weights @ difference)
    return pd.DataFrame(table, index=columns.columns)


def _resampling_weights(n: int, n_boot: int = 2000, seed: int = 0) -> np.ndarray:
    """(n_boot, n): how often resample b draws each of the n examples, over n: weights @ values are means."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot) / n


def _interval(prefix: str, resampled: np.ndarray) -> dict[str, np.ndarray]:
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {f"{prefix}low": low, f"{prefix}high": high}


# --- Perplexity and forgetting ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """exp(nats per token) over all texts, its 95% interval over texts, and the `nll` and `tokens` of each text."""

    ppl: float
    low: float
    high: float
    texts: pd.DataFrame


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[str | Row], batch_size: int = 8
) -> Perplexity:
    """exp(sum of nll / sum of tokens): of a row only the completion counts, of a string all but its first token.

    Comparable only between models with the same tokenizer. A long text weighs more than a short one, in the resamples
    too. Logits take batch_size x length x vocabulary x 4 bytes: cut texts of many thousand tokens first.

    Raises ValueError for a text with no token to predict.
    """
    ids, masks = zip(*(_ids_and_mask(row, tokenizer) for row in rows), strict=True)
    tokens, nll = np.array([sum(mask) for mask in masks]), np.zeros(len(rows))
    if not tokens.all():
        raise ValueError(f"row {tokens.argmin()} has no token to predict: wanted a completion, or a text of two tokens")
    for part in _by_length(ids, batch_size):
        input_ids, attention_mask = _pad([ids[i] for i in part], "right", model.device)
        counts, _ = _pad([masks[i] for i in part], "right", model.device)
        with plain_inference(model):
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
        for b, i in enumerate(part):
            here = counts[b, 1:].bool()  # (T-1,): logits[t] predict token t+1
            nll[i] = cross_entropy(logits[b, :-1][here].float(), input_ids[b, 1:][here], reduction="sum").item()
    weights = _resampling_weights(len(rows))
    interval = _interval("", np.exp((weights @ nll) / (weights @ tokens)))
    texts = pd.DataFrame({"nll": nll, "tokens": tokens})
    return Perplexity(math.exp(nll.sum() / tokens.sum()), **interval, texts=texts)


def _ids_and_mask(row: str | Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if isinstance(row, str):
        ids = tokenizer(row)["input_ids"]
        return ids, [0] + [1] * (len(ids) - 1)
    rendered = render(row, tokenizer)
    return rendered.input_ids, rendered.completion_mask


def closed_book(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[dict[str, Any]]
) -> pd.DataFrame:
    """Each fact's question asked without any context: reply, `correct` and `exact`, one row each.

    facts: rows with `question`, `answer` and `accept`, a list of other forms. correct: one of these stands in the reply
    as whole words, ignoring case and punctuation. exact: it is the whole reply; use it where the answers are short
    numbers ("8", which many a wrong reply contains).
    """
    prompts = [[{"role": "user", "content": fact["question"]}] for fact in facts]
    replies = generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=72)
    table = []
    for fact, reply in zip(facts, replies, strict=True):
        said, forms = plain_words(reply), {plain_words(form) for form in (fact["answer"], *fact["accept"])} - {"  "}
        correct = any(form in said for form in forms)
        table.append({"question": fact["question"], "reply": reply, "correct": correct, "exact": said in forms})
    return pd.DataFrame(table)


def plain_words(text: str) -> str:
    """The words of a text, lower case, each with a space on both sides; 1,850 is 1850, 4.20 and 4:20 are one word."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    words = re.findall(r"\d+(?:[.:]\d+)+|\w+|%", text)
    return f" {' '.join(words)} "

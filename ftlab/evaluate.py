"""Is the tuned model better? Greedy answers, scores by any scorer, intervals, and differences pair by pair.

A score is a mean over few examples, so it carries a 95% interval. Two models are compared on the *same* examples: what
both get right or wrong cancels, and the interval of the difference is narrower than the two intervals suggest.

References: Wilson 1927 (interval of a proportion); Efron & Tibshirani 1993, chapter 13 (percentile bootstrap).
"""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]


# --- Answers ----------------------------------------------------------------------------------------------------------


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int = 80,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    tools: Sequence[dict | Callable] | None = None,
) -> list[str]:
    """The answer to each prompt (a list of messages), without special tokens, in the order given.

    `tools` go to the chat template, as in `apply_chat_template(tools=...)`.

    At temperature 0 the greedy one, above it a draw from softmax(logits / temperature), by a generator of its own that
    begins at `seed`: give a prompt six times for six answers. Greedy answers equal `model.generate(do_sample=False)`
    one prompt at a time in fp32: tests/test_evaluate.py. Prompts of like length share a batch; a Llama on a CPU
    answers through `ftlab.cpu.Decoder`, the same tokens in less time.

    Raises ValueError for a temperature below 0.
    """
    from ftlab import cpu

    if temperature < 0:
        raise ValueError(f"got temperature {temperature}, wanted 0 (greedy) or more: 1 draws from the model as it is")

    how = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
    texts = [tokenizer.apply_chat_template(prompt, **how) for prompt in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]  # the template has written BOS
    longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found = [""] * len(ids)
    with plain_inference(model):
        by = _by_decoder if cpu.covers(model) else _by_generate
        decode = by(model, tokenizer, temperature, seed)
        for start in range(0, len(ids), batch_size):
            part = longest_first[start : start + batch_size]
            new = decode([ids[i] for i in part], max_new_tokens)
            for i, text in zip(part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                found[i] = text
    return found


def _by_decoder(model, tokenizer, temperature: float, seed: int) -> Callable:
    import torch

    from ftlab.cpu import Decoder

    decoder, stop = Decoder(model), model.generation_config.eos_token_id
    stop = [stop] if isinstance(stop, int) else stop or [tokenizer.eos_token_id]
    generator = torch.Generator().manual_seed(seed)
    return lambda ids, max_new_tokens: decoder.answer(ids, max_new_tokens, stop, temperature, generator)


def _by_generate(model, tokenizer, temperature: float, seed: int) -> Callable:
    """model.generate takes its draws from torch's global generator, which begins at `seed` from here on."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": None}
    how = drawing if temperature else {"do_sample": False}
    if temperature:
        torch.manual_seed(seed)

    def answer(ids: list[list[int]], max_new_tokens: int) -> torch.Tensor:
        rows = [torch.tensor(row, device=model.device) for row in ids]
        masks = [torch.ones_like(row) for row in rows]  # hides the padding, so the padding's id does not matter
        input_ids, attention_mask = (pad_sequence(x, batch_first=True, padding_side="left") for x in (rows, masks))
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            **how,
            repetition_penalty=1.0,  # or that of the model's generation_config (Qwen: 1.05-1.1) bends the argmax
            pad_token_id=tokenizer.pad_token_id,
        )
        return output[:, input_ids.shape[1] :]  # (B, at most max_new_tokens)

    return answer


@contextlib.contextmanager
def plain_inference(model: PreTrainedModel) -> Iterator[None]:
    """Neither gradients nor autocast, in which generating on a CPU is several times slower; eval mode meanwhile.

    After training in bf16 or fp16, accelerate leaves an autocast of its own wrapped around the model's forward.
    """
    import torch

    wrapped, plain, was_training = model.forward, vars(model).get("_original_forward"), model.training
    if plain:
        model.forward = plain
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(was_training)
        if plain:
            model.forward = wrapped


# --- Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A model's answers to some rows, what each is worth (0 to 1), their mean and its 95% interval."""

    mean: float
    low: float
    high: float
    values: np.ndarray = field(repr=False)  # (n,)
    answers: list[str] = field(repr=False)

    @classmethod
    def of(cls, values: Sequence[float], answers: Sequence[str] = ()) -> Score:
        """The Score of values already known: Wilson's interval if all are 0 or 1, else a percentile bootstrap."""
        values = np.array(values, float)
        if _all_or_nothing(values):
            low, high = wilson_interval(int(values.sum()), len(values))
        else:
            low, high = _bootstrap(values)
        return cls(float(values.mean()), low, high, values, list(answers))

    def __repr__(self) -> str:
        n, right = len(self.values), self.values.sum()
        counted = f"{right:.0f} of {n} right" if _all_or_nothing(self.values) else f"mean of {n}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] ({counted})"


def score(answers: Sequence[str], rows: Sequence[dict], scorer: Callable[[str, dict], float]) -> Score:
    """The Score of answers to rows: scorer(answer, row) says what one answer is worth, True/False or 0 to 1.

    Raises ValueError if there are not as many answers as rows, or none, or a value is no number from 0 to 1.
    """
    if len(answers) != len(rows) or not len(rows):
        raise ValueError(f"got {len(answers)} answers to {len(rows)} rows, wanted one each, and at least one")
    values = np.array([float(scorer(answer, row)) for answer, row in zip(answers, rows, strict=True)])
    if bad := [i for i, value in enumerate(values) if not 0 <= value <= 1]:
        raise ValueError(f"the scorer gave {values[bad[0]]} for row {bad[0]}, wanted True, False or a number 0 to 1")
    return Score.of(values, answers)


@dataclass(frozen=True)
class Difference:
    """Mean of (a - b) over the same rows, its 95% interval, and on how many rows a is better and worse."""

    mean: float
    low: float
    high: float
    better: int
    worse: int

    def __repr__(self) -> str:
        verdict = "a difference" if self.low > 0 or self.high < 0 else "undecided"
        return (
            f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]: {verdict} "
            f"({self.better} rows better, {self.worse} worse)"
        )


def compare(a: Score, b: Score) -> Difference:
    """The paired difference a - b of two scores on the same rows, with a percentile bootstrap over the rows.

    An interval that leaves out 0 shows a difference, even where the two scores' own intervals overlap.

    Raises ValueError if the scores are not of as many rows.
    """
    if len(a.values) != len(b.values):
        raise ValueError(f"got scores of {len(a.values)} and {len(b.values)} rows, wanted two on the same rows")
    gaps = a.values - b.values
    return Difference(float(gaps.mean()), *_bootstrap(gaps), int((gaps > 0).sum()), int((gaps < 0).sum()))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion: every p within 1.96 sqrt(p (1 - p) / n) of successes / n. Wilson 1927.

    It stays within [0, 1] and has a width even at 0 and at n, where the usual +-1.96 standard errors has none.
    """
    z2 = 1.959964**2
    centre = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    return centre - half if successes else 0.0, centre + half if successes < n else 1.0  # exact at both ends


def _bootstrap(values: np.ndarray, n_boot: int = 2000) -> tuple[float, float]:
    """The middle 95% of the means of resamples: weights[b, i] says how often resample b draws row i, over n."""
    n = len(values)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_boot) / n  # (n_boot, n)
    low, high = np.quantile(weights @ values, [0.025, 0.975])
    return float(low), float(high)


def _all_or_nothing(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def mentions(answer: str, row: dict) -> bool:
    """A scorer for facts: one of row["answer"], row["accept"] stands in the answer as whole words, in any case."""
    said = _words(answer)
    return any(_words(form) in said for form in (row["answer"], *row["accept"]) if _words(form).strip())


def _words(text: str) -> str:
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.casefold()).split())} "


def errors(score: Score, rows: Sequence[dict], most: int = 12) -> Errors:
    """The questions whose answers are worth least, each with the answer and the gold answer, for a notebook page."""
    order = np.argsort(score.values, kind="stable")[:most]
    return Errors([(rows[int(i)], score.answers[i]) for i in order if score.values[i] < 1])


@dataclass(frozen=True)
class Errors:
    """(row, answer) of some wrong answers; read them before you believe a score."""

    lines: list[tuple[dict, str]]

    def _triples(self) -> list[tuple[str, str, str]]:
        return [(row["prompt"][-1]["content"], got, row["completion"][-1]["content"]) for row, got in self.lines]

    def __repr__(self) -> str:
        return "\n".join(f"{asked}\n   got   {got}\n   gold  {gold}" for asked, got, gold in self._triples())

    def _repr_html_(self) -> str:
        code = "<code style='border-left:4px solid {};padding-left:6px'>{}</code>"
        body = ""
        for asked, got, gold in self._triples():
            both = "<br>".join(
                code.format(colour, html.escape(text)) for colour, text in (("#D55E00", got), ("#009E73", gold))
            )
            body += (
                f"<tr><td style='text-align:left'>{html.escape(asked)}</td><td style='text-align:left'>{both}</td></tr>"
            )
        return f"<table>{body}</table>"

"""Is the tuned model better? Greedy answers, scores by any scorer, intervals, and differences pair
by pair.

A score is a mean over few examples, so it carries a 95% interval. Two models are compared on the
*same* examples: what both get right or wrong cancels, and the interval of the difference is
narrower than the two intervals suggest.

Intervals and tests stand in `ftlab.statistics`, with their sources.
"""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ftlab import statistics
from ftlab.statistics import power as power  # these three are found here too
from ftlab.statistics import smallest_difference as smallest_difference
from ftlab.statistics import wilson_interval as wilson_interval

CACHE_BYTES = 1.5e9  # of keys and values in one batch of answers


def answers(
    model,
    tokenizer,
    prompts: Sequence[list[dict]],
    max_new_tokens: int = 80,
    batch_size: int = 64,
    temperature: float = 0.0,
    tools: Sequence[dict | Callable] | None = None,
    seed: int = 0,
    cache_bytes: float = CACHE_BYTES,
) -> list[str]:
    """The answer to each prompt (a list of messages), without special tokens, in the order given.

    At temperature 0 the greedy one, above it a draw from softmax(logits / temperature): give a
    prompt six times for six answers. One `seed`, the same draws; experiments with several seeds
    give each its own. `tools` go to the template. A batch has at most `batch_size` prompts, of like
    length, and at most `cache_bytes` of keys and values.

    Greedy answers equal model.generate(do_sample=False, repetition_penalty=1.0) on one prompt at a
    time in fp32: tests/test_evaluate.py. A model that `ftlab.cpu.covers` answers through
    `ftlab.llama.Decoder`, in less time; one with a hook, another architecture or a
    generation_config that asks for more goes through model.generate.

    Raises ValueError for a temperature below 0, a prompt without tokens, or no end-of-sequence
    token anywhere.
    """
    from ftlab import cpu, llama

    if not temperature >= 0:
        raise ValueError(f"got temperature={temperature}, wanted 0 (greedy) or more")
    ids = _prompt_ids(tokenizer, prompts, tools)
    eos = _end_tokens(model, tokenizer)
    found: dict[int, list[int]] = {}
    with plain_inference(model), _seeded(seed) as generator:
        decoder = llama.Decoder(model) if ids and cpu.covers(model) else None
        most_tokens = cache_bytes / _cache_bytes_per_token(model)
        batches = _batches([len(row) + max_new_tokens for row in ids], batch_size, most_tokens)
        for batch in _counted(batches, len(ids)):
            rows = [ids[i] for i in batch]
            if decoder:
                new = decoder.generate(rows, max_new_tokens, eos, temperature, generator)
            else:
                new = _generated(model, rows, _padding(tokenizer), eos, max_new_tokens, temperature)
            found |= zip(batch, new, strict=True)
    return [tokenizer.decode(found[i], skip_special_tokens=True) for i in range(len(ids))]


def _prompt_ids(tokenizer, prompts: Sequence[list[dict]], tools) -> list[list[int]]:
    """The token ids of each prompt, through the chat template, which writes BOS if it has one."""
    ids = []
    for number, prompt in enumerate(prompts):
        text = tokenizer.apply_chat_template(
            prompt, tools=tools, tokenize=False, add_generation_prompt=True
        )
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids[-1]:
            raise ValueError(
                f"prompt {number}: got no tokens from {prompt!r}, wanted at least one: an empty "
                "list of messages, or a chat template that writes none of its roles?"
            )
    return ids


def _end_tokens(model, tokenizer) -> int | list[int]:
    """The ids that end an answer: generation_config's, else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos in (None, []) else eos
    if eos is None:
        raise ValueError(
            "got no end-of-sequence token in model.generation_config.eos_token_id nor in "
            "tokenizer.eos_token_id, wanted one: answers would never end. Set tokenizer.eos_token "
            "to the token that ends a turn in your chat template"
        )
    return eos


def _padding(tokenizer) -> int:
    """Any id will do: the attention mask hides it."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator:
    """A generator for the draws; torch's own state, which model.generate draws from, is seeded and
    given back.
    """
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_rng_state(state)


def _cache_bytes_per_token(model) -> int:
    """Keys and values of one token: 2 * layers * kv_heads * head_dim * bytes of a number."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize


def _batches(lengths: Sequence[int], most_rows: int, most_tokens: float) -> list[list[int]]:
    """The numbers of rows in batches, longest first: at most most_rows, and rows * longest within
    most_tokens.

    A row that alone is longer than most_tokens stands in a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        batch = batches[-1] if batches else []
        if batch and len(batch) < most_rows and (len(batch) + 1) * lengths[batch[0]] <= most_tokens:
            batch.append(i)
        else:
            batches.append([i])
    return batches


def _counted(batches: list[list[int]], total: int) -> Iterator[list[int]]:
    """The batches; where there are several, a line that counts while one waits: "48 of 132, about
    20 s left".
    """
    line = _Line() if len(batches) > 1 else None
    done, begin = 0, time.monotonic()
    try:
        for batch in batches:
            yield batch
            done += len(batch)
            left = (time.monotonic() - begin) * (total - done) / done
            if line:
                line.show(f"{done} of {total}, about {left:.0f} s left")
    finally:
        if line:
            line.show("")


class _Line:
    """One line that is written over: in a notebook's cell, else on stderr if that is a terminal."""

    def __init__(self) -> None:
        from IPython import get_ipython
        from IPython.display import display

        self.handle, self.width = None, 0
        if hasattr(get_ipython(), "kernel"):
            self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str) -> None:
        if self.handle:
            self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty():
            print(f"\r{text:{self.width}}", end="" if text else "\r", file=sys.stderr, flush=True)
            self.width = len(text)


def _generated(
    model, ids: list[list[int]], pad: int, eos, max_new_tokens: int, temperature: float
) -> list[list[int]]:
    """The new tokens of model.generate, without the beams, the penalty and the drawing of
    generation_config.
    """
    import torch

    longest = max(map(len, ids))
    left = [longest - len(row) for row in ids]  # padding stands on the left
    rows = [[pad] * n + row for n, row in zip(left, ids, strict=True)]
    masks = [[0] * n + [1] * len(row) for n, row in zip(left, ids, strict=True)]
    batch, mask = torch.tensor(rows, device=model.device), torch.tensor(masks, device=model.device)
    drawing = {"do_sample": True, "temperature": temperature}
    drawing |= {"top_k": 0, "top_p": 1.0, "min_p": None}
    output = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
        num_beams=1,
        repetition_penalty=1.0,  # Qwen's files ask for 1.05-1.1, which bends the argmax
        **(drawing if temperature else {"do_sample": False}),
    )
    return output[:, longest:].tolist()


@contextlib.contextmanager
def plain_inference(model) -> Iterator[None]:
    """Neither gradients nor autocast, in which generating on a CPU is several times slower; eval
    mode meanwhile.

    After training in bf16 or fp16, accelerate leaves an autocast of its own wrapped around the
    model's forward.
    """
    import torch

    wrapped, plain = model.forward, vars(model).get("_original_forward")
    modes = {module: module.training for module in model.modules()}
    # Else bitsandbytes packs a layer for good, and then it has no gradient.
    packs = "support_avx512bf16_for_cpu"
    packing = {module: getattr(module, packs) for module in modes if hasattr(module, packs)}
    for layer in packing:
        setattr(layer, packs, False)
    if plain:
        model.forward = plain
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, packed in packing.items():
            setattr(layer, packs, packed)
        if plain:
            model.forward = wrapped


@dataclass(frozen=True, eq=False)
class Score:
    """What a model's answers to some rows are worth, from 0 to 1, their mean, its 95% interval."""

    mean: float
    low: float
    high: float
    values: np.ndarray  # (n,)
    answers: list[str]

    @classmethod
    def of(cls, values: Sequence[float], answers: Sequence[str] = ()) -> Score:
        """The Score of values already known. For 0 and 1 Wilson's interval, else Student's t.

        It speaks of other rows, not of other training seeds. Below six rows, or if all values are
        the same, it is Wilson's for other values too: wide, since so few say little about how much
        they vary.
        """
        values = np.array(values, float)
        if not len(values):
            raise ValueError("got no values, wanted one a row at least: is the test set empty?")
        if not ((values >= 0) & (values <= 1)).all():
            ends = f"{values.min()} to {values.max()}"
            raise ValueError(f"got values from {ends}, wanted scores from 0 to 1")
        low, high = statistics.score_interval(values)
        return cls(float(values.mean()), low, high, values, list(answers))

    def __repr__(self) -> str:
        n, share = len(self.values), np.isin(self.values, (0.0, 1.0)).all()
        counted = f"{self.values.sum():.0f} of {n} right" if share else f"mean of {n}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] ({counted})"


def score(
    answers: Sequence[str], rows: Sequence[dict], scorer: Callable[[str, dict], float]
) -> Score:
    """The Score of answers to rows: scorer(answer, row) says what one answer is worth, True/False
    or 0 to 1.

    Raises ValueError if there are not as many answers as rows, or a value is no number from 0 to 1.
    """
    marks = [scorer(answer, row) for answer, row in zip(answers, rows, strict=True)]
    values = np.array([float("nan" if mark is None else mark) for mark in marks])
    if (wrong := values[~((values >= 0) & (values <= 1))]).size:
        raise ValueError(f"the scorer gave {wrong}, wanted True, False or numbers from 0 to 1")
    return Score.of(values, answers)


class Verdict(Enum):
    """What a comparison decides, for a program to read; a Difference prints it with its reasons."""

    DIFFERENCE = "a difference"
    UNDECIDED = "undecided"
    TOO_FEW_ROWS = "too few rows"
    TOO_FEW_SEEDS = "too few seeds for a claim about the method"


@dataclass(frozen=True)
class Difference:
    """Mean of (a - b) over the same rows, its 95% interval, and how many rows go which way."""

    mean: float
    low: float
    high: float
    better: int
    worse: int
    rows: int
    seeds: tuple[float, ...]  # the mean of each seed; one run an arm: that of the run

    @property
    def verdict(self) -> Verdict:
        if self.rows < statistics.FEW:
            return Verdict.TOO_FEW_ROWS
        if 1 < len(self.seeds) < statistics.FEW:
            return Verdict.TOO_FEW_SEEDS
        return Verdict.DIFFERENCE if self.low > 0 or self.high < 0 else Verdict.UNDECIDED

    @property
    def seeds_disagree(self) -> bool:
        return min(self.seeds) < 0 < max(self.seeds)

    def __repr__(self) -> str:
        counts = f"({self.better} rows better, {self.worse} worse)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]: {self._sentence()} {counts}"

    def _sentence(self) -> str:
        """Direction, whether zero is excluded, and whom this is about: two models, or a method."""
        direction = {1: "higher", -1: "lower", 0: "level"}[np.sign(round(self.mean, 12))]
        if self.rows < statistics.FEW:
            return f"{direction}, but {self.rows} rows are too few to tell"
        decided, seeds = self.low > 0 or self.high < 0, len(self.seeds)
        undecided = f"{direction}, but the interval includes zero: undecided"
        if seeds == 1:
            verdict = f"{direction}, a difference" if decided else undecided
            return f"{verdict} between these two models"
        if not decided:
            said = undecided
        elif seeds < statistics.FEW:
            said = f"{direction}, and the interval excludes zero"
        else:
            said = f"{direction}, a difference over {seeds} seeds"
        if self.seeds_disagree:
            higher = sum(mean > 0 for mean in self.seeds)
            lower = sum(mean < 0 for mean in self.seeds)
            said += f"; the seeds disagree in sign ({higher} higher, {lower} lower)"
        if seeds < statistics.FEW:
            said += f"; {seeds} seeds: too few for a claim about the method"
        return said


def compare(a: Score | Sequence[Score], b: Score | Sequence[Score]) -> Difference:
    """The paired difference a - b on the same rows, its 95% interval and what it decides.

    One Score each, one run an arm: the interval is about these two models on other rows. If all is
    right or wrong, McNemar's exact test decides and the interval is Agresti and Min's; other scores
    are decided by flipping signs, and the interval is all that this test does not reject.

    A sequence of Scores, one a seed, in the same order on both sides: the interval is about the
    method, on other seeds and other rows (seeds crossed with rows, Satterthwaite's degrees of
    freedom). One Score against several, such as rules without a seed, stands beside each. A mean
    over seeds is no run: give the seeds.

    With fewer than six rows or two to five seeds the verdict is "too few", whatever the interval.
    Raises ValueError if rows or seeds do not match.
    """
    gaps = _gaps(a, b)
    mean, low, high = statistics.paired_interval(gaps)
    of_rows, of_seeds = gaps.mean(0), gaps.mean(1)
    counts = int((of_rows > 0).sum()), int((of_rows < 0).sum())
    seeds = tuple(map(float, of_seeds))
    return Difference(mean, low, high, *counts, len(of_rows), seeds)


def _gaps(a: Score | Sequence[Score], b: Score | Sequence[Score]) -> np.ndarray:
    """a - b, (seeds, rows)."""
    sides = [[side] if isinstance(side, Score) else list(side) for side in (a, b)]
    seeds, rows = [len(side) for side in sides], {len(one.values) for side in sides for one in side}
    if 0 in seeds or (seeds[0] != seeds[1] and 1 not in seeds):
        wanted = "wanted one a seed on both sides, in the same order: is a run missing?"
        raise ValueError(f"got {seeds[0]} and {seeds[1]} scores, {wanted}")
    if len(rows) > 1:
        wanted = "wanted the same rows for all: were some left out?"
        raise ValueError(f"got scores of {sorted(rows)} rows, {wanted}")
    first, second = (np.array([one.values for one in side]) for side in sides)
    return first - second


class Errors(list):
    """(question, answer, gold answer) of some wrong answers; read them before a score."""

    def __repr__(self) -> str:
        return "\n".join(f"{asked}\n   got   {got}\n   gold  {gold}" for asked, got, gold in self)

    def _repr_html_(self) -> str:
        code = "<code style='border-left:4px solid {};padding-left:6px'>{}</code>"
        page = "<table><tr><th>asked</th><th>got (orange), wanted (green)</th></tr>"
        for asked, got, gold in (map(html.escape, line) for line in self):
            both = f"{code.format('#D55E00', got)}<br>{code.format('#009E73', gold)}"
            cells = (f"<td style='text-align:left'>{text}</td>" for text in (asked, both))
            page += f"<tr>{''.join(cells)}</tr>"
        return f"{page}</table>"


def errors(score: Score, rows: Sequence[dict], most: int) -> Errors:
    """The wrong answers, those worth least first."""
    worst = [int(i) for i in np.argsort(score.values, kind="stable")[:most] if score.values[i] < 1]
    said = ((rows[i]["prompt"], score.answers[i], rows[i]["completion"]) for i in worst)
    return Errors((prompt[-1]["content"], got, gold[-1]["content"]) for prompt, got, gold in said)

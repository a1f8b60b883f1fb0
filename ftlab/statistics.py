"""Intervals and tests for scores: of one run, of several seeds on the same items, and their power.

Everything is at the level of 95 % (5 %), two-sided. One implementation for `ftlab.evaluate`, for
the notebooks' tables (`ftlab.classroom.results`) and for the experiments. `bench/verdicts.py`
measures how often each of them finds a difference where there is none.

Sources: Wilson 1927; McNemar 1947; Agresti & Min 2005; Fisher 1935 (sign flips), Hartigan 1969
(their interval); Satterthwaite 1946 (degrees of freedom); Searle, Casella & McCulloch 1992, ch. 4
(two-way random effects).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FEW = 6  # items or seeds: with five, even all of one sign has p = 2 / 2^5 > 0.05
LEVEL, Z = 0.05, 1.959963984540054  # the 97.5th percentile of the normal distribution
FLIPS = 10_000  # sign vectors of the permutation test where there are more than that


# --- One run --------------------------------------------------------------------------------------


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion: every p within 1.96 sqrt(p (1 - p) / n) of successes / n.

    It stays within [0, 1] and has a width even at 0 and at n, where the usual +-1.96 standard
    errors has none. `successes` may be a sum of scores from 0 to 1: none varies more than zeros and
    ones with the same mean. Source: Wilson 1927.
    """
    share, extra = successes / n, Z**2 / n
    centre = (share + extra / 2) / (1 + extra)
    half = Z * math.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    low = 0.0 if successes == 0 else max(centre - half, 0.0)  # rounding can put them outside
    high = 1.0 if successes == n else min(centre + half, 1.0)
    return low, high


def student_interval(values: np.ndarray) -> tuple:
    """(mean, low, high) of independent values (..., n): mean +- t(n - 1) sd / sqrt(n).

    One value has no bounds: they are infinite.
    """
    from scipy.stats import t

    n, mean = values.shape[-1], values.mean(-1)
    if n == 1:
        return mean, mean - np.inf, mean + np.inf
    half = t.ppf(1 - LEVEL / 2, n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def score_interval(values: np.ndarray) -> tuple[float, float]:
    """(low, high) for the mean of the scores (n,) of one run, each from 0 to 1.

    Zeros and ones: Wilson's. Other scores: Student's t, cut off at 0 and 1. Where t would look too
    sure, with fewer than six scores or with all of them equal, it is Wilson's too, which is too
    wide for them rather than too narrow.
    """
    zeros_and_ones = np.isin(values, (0.0, 1.0)).all()
    if zeros_and_ones or len(values) < FEW or values.min() == values.max():
        return wilson_interval(float(values.sum()), len(values))
    _, low, high = student_interval(values)
    return max(float(low), 0.0), min(float(high), 1.0)


def gap_interval(gaps: np.ndarray) -> tuple[float, float]:
    """(low, high) for the mean of paired differences (n,) of one run, each from -1 to 1.

    It leaves out 0 where its test finds a difference, and only there. Differences of zeros and
    ones: Agresti and Min's interval with McNemar's exact test. Others: sign flips.
    """
    if np.isin(gaps, (-1.0, 0.0, 1.0)).all():
        return agresti_min_interval(int((gaps > 0).sum()), int((gaps < 0).sum()), len(gaps))
    low, high = sign_flip_interval(gaps)
    return max(float(low), -1.0), min(float(high), 1.0)


def agresti_min_interval(better: int, worse: int, n: int) -> tuple[float, float]:
    """(low, high) for (better - worse) / n, where of n pairs of zeros and ones so many changed.

    d +- 1.96 sqrt(better + worse + 1 - (better - worse)^2 / (n + 2)) / (n + 2),
    d = (better - worse) / (n + 2). It is made to hold 0 unless McNemar's exact test has p < 0.05:
    three rows that go one way prove nothing. Where the test decides, this interval leaves out 0 by
    itself (tests/test_statistics.py). Source: Agresti & Min 2005.
    """
    gap, total = better - worse, n + 2
    half = Z * math.sqrt(better + worse + 1 - gap**2 / total) / total
    low, high = max(gap / total - half, -1.0), min(gap / total + half, 1.0)
    if mcnemar(better, worse) >= LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return low, high


def mcnemar(better: int, worse: int) -> float:
    """The p-value of McNemar's exact test: better + worse fair coins fall so unevenly."""
    from scipy.stats import binomtest

    return 1.0 if better == worse else float(binomtest(better, better + worse).pvalue)


def sign_flip_interval(gaps: np.ndarray) -> tuple:
    """(low, high): all m for which the permutation test of gaps (n, ...) - m does not reject.

    If the two models of a pair could be swapped, each difference could as well have the other sign.
    So the test counts sign vectors under which |sum| is at least what it is: all 2^n up to n = 13,
    else no flip and 9,999 random ones (of a fixed generator, so that the same scores have the same
    verdict). Exact for any n if the two could be swapped; where differences are lopsided, nine
    small losses to one large win, it needs 100 rows or more (bench/results/verdicts.md).

    A sign vector counts exactly if m lies between the mean of the differences that it flips and the
    mean of the others: square |sum of signs (gaps - m)| >= |sum of (gaps - m)|. So p(m) is the
    share of sign vectors whose two means enclose m, and the interval runs from the 5th percentile
    of the lower means to the 95th of the upper ones. With fewer than six differences it is
    unbounded: 2 of the 2^n vectors, all signs and none, count for every m.
    """
    lows, highs = [], []
    for flipped in _sign_vectors(len(gaps)):  # 1 = this difference changes its sign
        counts = flipped.sum(1)  # (vectors,)
        counts = counts.reshape(-1, *[1] * (gaps.ndim - 1))
        sums = flipped @ gaps  # (vectors, ...)
        with np.errstate(invalid="ignore", divide="ignore"):
            theirs, others = sums / counts, (gaps.sum(0) - sums) / (len(gaps) - counts)
        all_one_sign = (counts == 0) | (counts == len(gaps))
        lows.append(np.where(all_one_sign, -np.inf, np.minimum(theirs, others)))
        highs.append(np.where(all_one_sign, np.inf, np.maximum(theirs, others)))
    low, high = np.concatenate(lows), np.concatenate(highs)
    rank = int(LEVEL * len(low) + 1e-9)  # so many vectors may count: p is then 5 % at most
    low = np.partition(low, rank, axis=0)[rank]
    high = np.partition(high, len(high) - 1 - rank, axis=0)[len(high) - 1 - rank]
    return np.round(low, 12), np.round(high, 12)  # a mean that is 0 but for rounding is 0


def _sign_vectors(n: int) -> Iterator[np.ndarray]:
    """Blocks (vectors, n) of zeros and ones: all 2^n, or no flip and FLIPS - 1 random vectors."""
    if 2**n <= FLIPS:
        yield (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
        return
    yield np.zeros((1, n))
    generator = np.random.default_rng(0)
    for start in range(1, FLIPS, 1000):
        yield generator.integers(0, 2, (min(1000, FLIPS - start), n), dtype=np.int8).astype(float)


# --- Several seeds --------------------------------------------------------------------------------


def mean_squares(values: np.ndarray) -> tuple:
    """(MS_s, MS_i, MS_r) of values (..., S seeds, n items): of seeds, of items, of what is left.

    value = mean + seed effect + item effect + rest, all three random. In their variances,
    E MS_s = rest + n seed,   E MS_i = rest + S item,   E MS_r = rest.
    """
    seeds, items = values.shape[-2:]
    mean = values.mean((-2, -1), keepdims=True)
    of_seed = values.mean(-1, keepdims=True) - mean  # (..., S, 1)
    of_item = values.mean(-2, keepdims=True) - mean  # (..., 1, n)
    rest = values - mean - of_seed - of_item
    ms_seed = items * (of_seed**2).sum((-2, -1)) / (seeds - 1)
    ms_item = seeds * (of_item**2).sum((-2, -1)) / (items - 1)
    ms_rest = (rest**2).sum((-2, -1)) / ((seeds - 1) * (items - 1))
    return ms_seed, ms_item, ms_rest


def crossed_interval(values: np.ndarray) -> tuple:
    """(mean, low, high) of values (..., S, n) over other seeds *and* other items.

    mean +- t(df) sqrt(V),   V = (MS_s + MS_i - MS_r) / (S n),
    df = (MS_s + MS_i - MS_r)^2 / (MS_s^2 / (S - 1) + MS_i^2 / (n - 1) + MS_r^2 / ((S - 1)(n - 1))).

    A variance has no negative part: where MS_s or MS_i is below MS_r, which estimates the same or
    less, MS_r stands in its place. That can only widen V. Without it, three seeds that do not
    differ would be called a difference in 10 % of cases. One seed: Student's t over the items; one
    item: over the seeds. If nothing varies, the width is 0.
    """
    from scipy.stats import t

    seeds, items = values.shape[-2:]
    if seeds == 1 or items == 1:
        return student_interval(values[..., 0, :] if seeds == 1 else values[..., 0])
    ms_seed, ms_item, ms_rest = mean_squares(values)
    ms_seed, ms_item = np.maximum(ms_seed, ms_rest), np.maximum(ms_item, ms_rest)
    total = ms_seed + ms_item - ms_rest
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where nothing varies
        of_seeds, of_items = ms_seed**2 / (seeds - 1), ms_item**2 / (items - 1)
        df = total**2 / (of_seeds + of_items + ms_rest**2 / ((seeds - 1) * (items - 1)))
        half = t.ppf(1 - LEVEL / 2, df) * np.sqrt(total / (seeds * items))
    mean, half = values.mean((-2, -1)), np.where(total > 0, half, 0.0)
    return mean, mean - half, mean + half


def level_interval(scores: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of scores (S seeds, n items) from 0 to 1, at 95 %.

    Several seeds: `crossed_interval`, cut off at 0 and 1. One seed, or scores that never vary:
    `score_interval`, which has a width for the latter too.
    """
    if len(scores) == 1 or scores.min() == scores.max():
        return float(scores.mean()), *score_interval(scores[0])
    mean, low, high = map(float, crossed_interval(scores))
    return mean, max(low, 0.0), min(high, 1.0)


def paired_interval(gaps: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences (S seeds, n items) of such scores, at 95 %.

    As `level_interval`, from -1 to 1 and with `gap_interval` for one seed.
    """
    if len(gaps) == 1 or gaps.min() == gaps.max():
        return float(gaps.mean()), *gap_interval(gaps[0])
    mean, low, high = map(float, crossed_interval(gaps))
    return mean, max(low, -1.0), min(high, 1.0)


# --- How many questions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """So many questions find a true difference of so much with this chance, at a level of 5 %."""

    questions: int
    difference: float
    chance: float
    discordant: float | None  # share that exactly one model gets right; None: no common questions
    rate: float | None  # of the lower model, if they have no common questions

    def __repr__(self) -> str:
        if self.discordant is None:
            whose = "for each of the two models"
            how = f"(rates of {self.rate:.1%} and {self.rate + self.difference:.1%}, at 5 %)"
        else:
            whose = "answered by both models"
            how = (
                f"if exactly one of them is right on {self.discordant:.1%} of the questions "
                "(exact McNemar test, at 5 %)"
            )
        return (
            f"{self.questions:,} questions, {whose}: a true difference of {self.difference:.3g} "
            f"is then found with a chance of {self.chance:.0%}, {how}. "
            "This is about two trained models: other training seeds would vary on top."
        ).replace("%, (", "% (")


def mcnemar_power(questions: int, difference: float, discordant: float) -> float:
    """The chance that McNemar's exact test finds a true difference at 5 %.

    The questions are independent. Summed over the number m of those that exactly one model gets
    right, Binomial(questions, discordant); the better model gets each of these with probability
    (discordant + difference) / (2 discordant).
    """
    from scipy.stats import binom

    m = np.arange(questions + 1)
    fewest = binom.ppf(LEVEL / 2, m, 0.5) - 1  # on the smaller side: 2 P(X <= fewest) < 0.05
    share = (discordant + difference) / (2 * discordant)
    decided = binom.cdf(fewest, m, share) + binom.sf(m - fewest - 1, m, share)
    return float(binom.pmf(m, questions, discordant) @ decided)


def power(
    difference: float,
    discordant: float | None = None,
    rate: float | None = None,
    chance: float = 0.8,
) -> Power:
    """How many questions it takes to find a true difference between two models' rates, at 5 %.

    `discordant`: both answer the same questions, and on this share of them exactly one is right.
    The number is the one that gives McNemar's exact test this chance (`mcnemar_power`), about
    n = (1.96 + 0.84)^2 discordant / difference^2 for a chance of 80 %.

    `rate`: each answers questions of its own, with rates p1 = rate and p2 = rate + difference,
    n = (1.96 sqrt(2 p (1 - p)) + 0.84 sqrt(p1 (1 - p1) + p2 (1 - p2)))^2 / difference^2
    for each model, p = (p1 + p2) / 2. Normal approximation; Fleiss, Levin & Paik 2003, ch. 4.

    Limits: scores of 0 or 1, independent questions, one run a model (other seeds vary on top).
    Raises ValueError if not exactly one of the two is given, or if no models can differ so much.
    """
    from scipy.stats import norm

    if (discordant is None) == (rate is None):
        wanted = "wanted discordant (the same questions) or rate (questions of their own)"
        raise ValueError(f"{wanted}, not both or none")
    if not 0 < chance < 1:
        raise ValueError(f"got a chance of {chance}, wanted one between 0 and 1")
    if discordant is not None:
        _check_pair(difference, discordant)
        enough = _first(lambda n: mcnemar_power(n, difference, discordant) >= chance)
        return Power(enough, difference, chance, discordant, None)
    if not 0 <= rate < rate + difference <= 1:
        found = f"got rates of {rate} and {rate + difference}"
        raise ValueError(f"{found}, wanted two from 0 to 1, the second above the first")
    other, wanted = rate + difference, norm.ppf(chance)
    mean = (rate + other) / 2
    under_equal = Z * math.sqrt(2 * mean * (1 - mean))
    under_both = wanted * math.sqrt(rate * (1 - rate) + other * (1 - other))
    n = math.ceil(((under_equal + under_both) / difference) ** 2)
    return Power(n, difference, chance, None, rate)


def smallest_difference(questions: int, discordant: float, chance: float = 0.8) -> Power:
    """The smallest true difference that so many questions find, to three digits: `power` reversed.

    Raises ValueError if even a model that is better wherever the two differ would not be found with
    this chance.
    """
    if mcnemar_power(questions, discordant, discordant) < chance:
        raise ValueError(
            f"{questions} questions, {discordant:.0%} of them with one right answer, find no "
            f"difference with a chance of {chance:.0%}: McNemar's test needs {FEW} questions that "
            "go one way. Ask more questions."
        )

    def tried(thousandths: int) -> float:
        return min(thousandths / 1000, discordant)

    enough = _first(lambda k: mcnemar_power(questions, tried(k), discordant) >= chance)
    return Power(questions, tried(enough), chance, discordant, None)


def _check_pair(difference: float, discordant: float) -> None:
    if not 0 < difference <= discordant <= 1:
        raise ValueError(
            f"got a difference of {difference} with {discordant} discordant, "
            "wanted 0 < difference <= discordant <= 1: "
            "two models differ only where exactly one of them is right"
        )


def _first(enough) -> int:
    """A number n with enough(n), where n - 1 is not enough: by doubling, then by halving."""
    high = 1
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

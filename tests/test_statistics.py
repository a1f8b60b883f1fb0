"""ftlab.statistics against scipy's tests, squares worked by hand, and simulation."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scripts import ROOT, script

from ftlab import compare, power, statistics
from ftlab.classroom import results
from ftlab.evaluate import Difference, Score, Verdict, smallest_difference

GAPS = st.lists(
    st.one_of(st.integers(-4, 4).map(lambda k: k / 4), st.floats(-1, 1, width=32)),
    min_size=2,
    max_size=9,
).map(np.array)


def excludes(interval, value: float = 0.0) -> bool:
    low, high = interval[-2:]
    return bool(low > value or high < value)


def swapped(gaps: np.ndarray) -> float:
    """The p-value of scipy's paired permutation test, over all sign vectors."""
    how = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True}
    return stats.permutation_test((gaps,), np.mean, **how).pvalue


# --- One run: sign flips --------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(GAPS, st.integers(-8, 8))
def test_the_interval_of_sign_flips_is_all_that_scipys_permutation_test_does_not_reject(gaps, k):
    """Ties too: quarters, whose sums are often equal. At an end itself rounding would decide."""
    value = k / 8
    low, high = statistics.sign_flip_interval(gaps)
    if min(abs(value - low), abs(value - high)) > 1e-9:
        assert excludes((low, high), value) == (swapped(gaps - value) <= 0.05)


def test_sums_that_are_zero_but_for_rounding_are_zero():
    """Tenths, whose sums are not exact in binary, against sign vectors counted in whole numbers."""
    rng, close = np.random.default_rng(0), 0
    signs = np.array(list(itertools.product((1, -1), repeat=7)))
    for tenths in rng.integers(-2, 7, (3000, 7)):
        as_extreme = np.abs(signs @ tenths) >= abs(tenths.sum())
        rejected = as_extreme.mean() <= 0.05
        close += 0.03 < as_extreme.mean() < 0.08
        assert excludes(statistics.sign_flip_interval(tenths / 10)) == rejected
    assert close > 200


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=13).map(np.array))
def test_on_right_and_wrong_the_sign_flips_decide_as_mcnemar_does(gaps):
    """Two roads to one verdict: all sign vectors, and a binomial test of the rows that differ."""
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert excludes(statistics.sign_flip_interval(gaps)) == (p < 0.05)
    assert excludes(statistics.gap_interval(gaps)) == (p < 0.05)


def test_where_mcnemar_decides_agresti_and_mins_interval_agrees_by_itself():
    """All counts up to 30 of each kind: it leaves out 0 if and only if p < 0.05."""
    for better, worse in itertools.product(range(31), repeat=2):
        p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        for n in {better + worse, 2000} - {0}:
            assert excludes(statistics.agresti_min_interval(better, worse, n)) == (p < 0.05)


def test_many_rows_have_the_interval_of_the_normal_approximation_and_the_same_one_each_time():
    """14 rows and more: random sign vectors of a fixed generator. 400 rows: near Student's."""
    gaps = np.random.default_rng(5).uniform(-1, 1, 400)
    first, again = (statistics.sign_flip_interval(gaps) for _ in range(2))
    wanted = stats.ttest_1samp(gaps, 0).confidence_interval()
    width = wanted.high - wanted.low
    assert first == again and first == pytest.approx(tuple(wanted), abs=0.05 * width)
    p = stats.permutation_test(
        (gaps[:30] + 0.1,), np.mean, permutation_type="samples", n_resamples=20_000, random_state=1
    ).pvalue
    low, high = statistics.sign_flip_interval(gaps[:30] + 0.1)
    assert abs(p - 0.05) > 0.02 and excludes((low, high)) == (p < 0.05)


def test_many_comparisons_at_once_are_the_comparisons_one_by_one():
    gaps = np.random.default_rng(1).uniform(-1, 1, (20, 7))
    low, high = statistics.sign_flip_interval(gaps)
    for column in range(7):
        alone = statistics.sign_flip_interval(gaps[:, column])
        assert (low[column], high[column]) == pytest.approx(alone)


@pytest.mark.parametrize("n", [3, 5, 8, 20])
def test_two_equal_models_with_shares_are_seldom_called_different(n):
    """A percentile bootstrap calls 26 % of them different at n = 3, and 10 % at n = 8."""
    draw = np.random.default_rng(n)
    pairs = draw.random((1500, 2, n))
    found = [excludes(statistics.gap_interval(a - b)) for a, b in pairs]
    verdicts = [compare(Score.of(a), Score.of(b)).verdict for a, b in pairs[:200]]
    decided = [verdict is Verdict.DIFFERENCE for verdict in verdicts]
    assert np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)
    assert decided == found[:200]


# --- Several seeds --------------------------------------------------------------------------------


def test_the_mean_squares_and_the_interval_of_two_seeds_and_two_items_by_hand():
    """Rows (0, 2) and (2, 8): mean 3, of seeds and of items 1 and 5, and 1, -1, -1, 1 is left.

    MS_s = 2 (4 + 4) / 1 = 16, MS_i = 16, MS_r = 4 / 1 = 4. V = (16 + 16 - 4) / 4 = 7,
    df = 28^2 / (16^2 + 16^2 + 4^2) = 784 / 528.
    """
    values = np.array([[0.0, 2.0], [2.0, 8.0]])
    assert statistics.mean_squares(values) == (16, 16, 4)
    half = stats.t.ppf(0.975, 784 / 528) * math.sqrt(7)
    assert statistics.crossed_interval(values) == pytest.approx((3, 3 - half, 3 + half))


def test_a_variance_below_zero_is_taken_as_zero_by_hand():
    """Rows (1, 0) and (0, 1): MS_s = MS_i = 0, MS_r = 1. The formula alone gives V = -1 / 4.

    With no variance of seeds or items, V = MS_r / 4 = 1 / 4 and df = 1 / (1 + 1 + 1).
    """
    values = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert statistics.mean_squares(values) == (0, 0, 1)
    half = stats.t.ppf(0.975, 1 / 3) / 2
    assert statistics.crossed_interval(values) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def students(values) -> tuple[float, float, float]:
    return np.mean(values), *stats.ttest_1samp(values, 0).confidence_interval()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(2, 40), st.integers(0, 999))
def test_in_the_limits_the_crossed_interval_is_students(seeds, items, draw):
    """Equal seeds: t over items. Equal items: t over seeds. One seed or one item: the same."""
    rng = np.random.default_rng(draw)
    of_items, of_seeds = rng.normal(size=(1, items)), rng.normal(size=(seeds, 1))
    crossed = statistics.crossed_interval
    for values in (of_items, np.repeat(of_items, seeds, axis=0)):
        assert crossed(values) == pytest.approx(students(of_items[0]))
    for values in (of_seeds, np.repeat(of_seeds, items, axis=1)):
        assert crossed(values) == pytest.approx(students(of_seeds[:, 0]))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 20), st.integers(0, 999))
def test_the_order_of_seeds_and_items_does_not_matter_and_the_sign_turns(seeds, items, draw):
    rng = np.random.default_rng(draw)
    values = rng.normal(size=(seeds, items))
    mean, low, high = statistics.crossed_interval(values)
    mixed = values[rng.permutation(seeds)][:, rng.permutation(items)]
    assert statistics.crossed_interval(mixed) == pytest.approx((mean, low, high))
    assert statistics.crossed_interval(-values) == pytest.approx((-mean, -high, -low))
    assert statistics.crossed_interval(values + 1) == pytest.approx((mean + 1, low + 1, high + 1))
    assert mean == pytest.approx(values.mean()) and low <= mean <= high


def test_what_never_varies_has_an_interval_without_width():
    for value in (0.0, 0.25):
        assert statistics.crossed_interval(np.full((3, 10), value)) == (value, value, value)


def test_scores_that_never_vary_do_not_look_precise():
    """Nothing right in six runs of 30 questions: as wide as one run's interval, not 0 to 0."""
    nothing = np.zeros((6, 30))
    low, high = stats.binomtest(0, 30).proportion_ci(method="wilson")
    assert results.interval(nothing) == pytest.approx((0, low, high))
    assert results.interval(nothing + 0.5)[2] > 0.6
    _, low, high = results.difference(nothing)
    assert low < -0.05 and high > 0.05


def test_one_value_has_no_bounds():
    assert statistics.crossed_interval(np.array([[0.5]])) == (0.5, -math.inf, math.inf)


@pytest.mark.parametrize("sds", [(0.3, 1, 1), (0.1, 1, 2), (1, 0.5, 0.5)])
def test_with_known_components_the_interval_is_as_wide_as_it_should_be(sds):
    """Six seeds, 100 items, drawn 3,000 times: V is unbiased, and 95 % of intervals hold 0."""
    rng, seeds, items, draws = np.random.default_rng(7), 6, 100, 3000
    sd_seed, sd_item, sd_rest = sds
    values = sd_rest * rng.normal(size=(draws, seeds, items))
    values += sd_seed * rng.normal(size=(draws, seeds, 1))
    values += sd_item * rng.normal(size=(draws, 1, items))
    ms_seed, ms_item, ms_rest = statistics.mean_squares(values)
    v = (ms_seed + ms_item - ms_rest) / (seeds * items)
    true = sd_seed**2 / seeds + sd_item**2 / items + sd_rest**2 / (seeds * items)
    mean, low, high = statistics.crossed_interval(values)
    assert v.mean() == pytest.approx(true, rel=0.05) and mean.var() == pytest.approx(true, rel=0.1)
    assert 0.935 < np.mean((low < 0) & (high > 0)) < 0.98
    one = statistics.crossed_interval(values[17])
    assert one == pytest.approx((mean[17], low[17], high[17]))  # many at once are the same as one


@pytest.mark.parametrize(("seeds", "items"), [(3, 30), (6, 100)])
def test_seeds_and_items_that_do_not_differ_are_seldom_called_a_difference(seeds, items):
    """Where a part of the variance is 0, its estimate is negative half the time."""
    values = np.random.default_rng(3).normal(size=(4000, seeds, items))
    _, low, high = statistics.crossed_interval(values)
    assert np.mean((low > 0) | (high < 0)) < 0.05


# --- What compare makes of it ---------------------------------------------------------------------


def runs(rates, rows: int = 200, draw: int = 0) -> list[Score]:
    rng = np.random.default_rng(draw)
    return [Score.of(rng.random(rows) < rate) for rate in rates]


def test_one_run_an_arm_speaks_of_two_models_and_seeds_of_the_method():
    one = compare(*runs([0.8, 0.4]))
    many = compare(runs([0.8] * 6), runs([0.4] * 6, draw=1))
    assert one.verdict is many.verdict is Verdict.DIFFERENCE
    assert "a difference between these two models" in repr(one) and "two models" not in repr(many)
    assert "a difference over 6 seeds" in repr(many) and "too few" not in repr(many)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_below_six_seeds_there_is_an_interval_and_no_claim_about_the_method(seeds):
    found = compare(runs([0.9] * seeds), runs([0.1] * seeds, draw=1))
    assert found.verdict is Verdict.TOO_FEW_SEEDS and found.low < found.mean < found.high
    assert f"{seeds} seeds: too few for a claim about the method" in repr(found)
    assert "a difference" not in repr(found)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("seeds", [1, 6])
def test_below_six_rows_nothing_is_decided(n, seeds):
    for high, low in ((1.0, 0.0), (0.9, 0.35)):
        a, b = ([Score.of([value] * n)] * seeds for value in (high, low))
        found = compare(a, b)
        assert found.verdict is Verdict.TOO_FEW_ROWS and "too few" in repr(found)
        assert "a difference" not in repr(found)


def test_shares_of_few_rows_exclude_nothing():
    found = compare(Score.of([0.9, 0.8, 0.7]), Score.of([0.5, 0.6, 0.65]))
    assert (found.low, found.high) == (-1, 1) and found.better == 3


def test_seeds_that_disagree_in_sign_are_no_difference_and_it_is_said():
    """QLoRA against LoRA: 22 rows better and 42 worse over three seeds, one of them ahead."""
    arms = []
    for name, arm in (("qlora", "unmerged"), ("ask", "live")):
        mine = [record for record in results.records(name) if record["arm"] == arm]
        mine.sort(key=lambda record: record["seed"])
        arms.append([Score.of(record["right"]) for record in mine])
    found = compare(*arms)
    assert found.seeds_disagree and found.verdict is Verdict.TOO_FEW_SEEDS
    assert found.low < 0 < found.high
    assert "disagree in sign" in repr(found) and "a difference" not in repr(found)
    assert (found.better, found.worse) == (22, 42)
    agreeing = compare(runs([0.8] * 3), runs([0.3] * 3, draw=1))
    assert not agreeing.seeds_disagree and "disagree" not in repr(agreeing)


def test_six_seeds_may_decide_although_one_goes_the_other_way_and_it_is_said():
    gaps = np.array([0.04, 0.05, 0.06, 0.05, 0.06, -0.005])
    found = compare([Score.of(np.full(50, 0.5 + gap)) for gap in gaps], Score.of(np.full(50, 0.5)))
    assert found.verdict is Verdict.DIFFERENCE and found.seeds_disagree
    assert "disagree in sign (5 higher, 1 lower)" in repr(found)


def test_one_control_without_seeds_stands_beside_each_seed():
    several, (control,) = runs([0.5, 0.6, 0.7]), runs([0.4], draw=9)
    assert compare(several, control) == compare(several, [control] * 3)
    assert compare(control, several).mean == pytest.approx(-compare(several, control).mean)
    assert compare(several[:1], [control]) == compare(several[0], control)
    gains = [seed.mean - control.mean for seed in several]
    assert compare(several, control).seeds == pytest.approx(gains)


def test_seeds_are_paired_by_their_place():
    """The noise of a seed is on both sides: paired it cancels, in another order it does not."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0.2, 0.7, (6, 1)) + rng.uniform(-0.05, 0.05, (6, 80))
    a, b = ([Score.of(row) for row in level + gain] for gain in (0.1, 0.0))
    paired, mixed = compare(a, b), compare(a, b[::-1])
    assert paired.verdict is Verdict.DIFFERENCE and mixed.verdict is Verdict.UNDECIDED
    assert paired.mean == pytest.approx(mixed.mean)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (runs([0.5] * 3), runs([0.5] * 2), "3 and 2 scores.*one a seed"),
        ([], runs([0.5]), "0 and 1 scores"),
        (runs([0.5], 10)[0], runs([0.5], 11)[0], r"\[10, 11\] rows"),
        (runs([0.5, 0.5], 10), [*runs([0.5], 10), *runs([0.5], 9)], r"\[9, 10\] rows"),
    ],
)
def test_scores_that_do_not_match_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_a_verdict_is_that_of_the_interval():
    decided = Difference(0.2, 0.1, 0.3, 5, 1, 50, (0.2,))
    assert decided.verdict is Verdict.DIFFERENCE
    assert "+0.200 [+0.100, +0.300]: higher" in repr(decided)
    for low, high in ((-0.3, -0.1), (-0.3, 0.1), (-0.3, 0.0)):
        found = Difference(-0.2, low, high, 1, 5, 50, (-0.2,))
        assert (found.verdict is Verdict.DIFFERENCE) == (high < 0) and "lower" in repr(found)
        assert ("undecided" in repr(found)) == (high >= 0)


# --- One arm, and the notebooks' tables -----------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@example([5.480899698803e-16])
@example([1.0, 1.0 - 2**-53])
def test_a_score_lies_in_its_interval_and_its_interval_between_0_and_1(values):
    one = Score.of(values)
    assert 0 <= one.low <= one.mean + 1e-12 and one.mean - 1e-12 <= one.high <= 1


def test_few_or_equal_shares_do_not_look_precise():
    """Five shares that hardly differ, or twenty that do not: as wide as so many zeros and ones."""
    for values in ([0.5, 0.51, 0.49, 0.5, 0.5], [0.5], [0.5] * 20):
        one, n = Score.of(values), len(values)
        width = 2 * 1.96 * 0.5 / math.sqrt(n + 1.96**2)  # Wilson's at one half
        assert one.high - one.low == pytest.approx(width, rel=1e-3)


def test_values_that_are_no_scores_are_refused():
    for values in ([0.5, 1.5], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="wanted scores from 0 to 1"):
            Score.of(values)


def test_the_tables_of_the_notebooks_say_what_compare_says():
    for seeds in (1, 3, 6):
        a, b = runs([0.6] * seeds), runs([0.5] * seeds, draw=1)
        gaps = np.array([one.values - other.values for one, other in zip(a, b, strict=True)])
        found = compare(a, b)
        assert results.difference(gaps) == pytest.approx((found.mean, found.low, found.high))
    (one,) = runs([0.6])
    assert results.interval(one.values[None]) == pytest.approx((one.mean, one.low, one.high))
    assert results.interval(np.array([[0.0] * 30])) == (
        0,
        0,
        pytest.approx(1.96**2 / (30 + 1.96**2), abs=1e-3),
    )


# --- How many questions ---------------------------------------------------------------------------


def simulated(questions: int, difference: float, discordant: float, draws: int = 2000) -> float:
    """The share of simulated comparisons in which `compare`'s interval excludes 0."""
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    tables = np.random.default_rng(0).multinomial(questions, shares, size=draws)
    found = {}
    for better, worse, same in set(map(tuple, tables.tolist())):
        a, b = [1] * better + [0] * (worse + same), [0] * better + [1] * worse + [0] * same
        found[better, worse] = compare(Score.of(a), Score.of(b)).verdict is Verdict.DIFFERENCE
    return float(np.mean([found[better, worse] for better, worse, _ in tables.tolist()]))


@pytest.mark.parametrize("case", [(0.3, 0.4), (0.1, 0.2), (0.1, 0.1), (0.08, 0.3)])
@pytest.mark.parametrize("chance", [0.8, 0.9])
def test_so_many_questions_find_the_difference_with_that_chance(case, chance):
    difference, discordant = case
    wanted = power(difference, discordant=discordant, chance=chance)
    assert simulated(wanted.questions, difference, discordant) == pytest.approx(chance, abs=0.03)
    assert simulated(round(wanted.questions * 0.7), difference, discordant) < chance - 0.04


def test_the_exact_number_is_near_the_rule_of_thumb():
    """(1.96 + 0.84)^2 d / difference^2: within a tenth where many questions differ."""
    for difference, discordant in ((0.05, 0.2), (0.02, 0.1)):
        thumb = (1.96 + 0.84) ** 2 * discordant / difference**2
        assert power(difference, discordant=discordant).questions == pytest.approx(thumb, rel=0.1)


def test_the_smallest_difference_is_power_the_other_way_round():
    for difference, discordant in ((0.1, 0.2), (0.03, 0.3)):
        wanted = power(difference, discordant=discordant).questions
        same, half = (smallest_difference(n, discordant) for n in (wanted, 4 * wanted))
        assert same.difference == pytest.approx(difference, abs=0.0015)
        assert half.difference == pytest.approx(difference / 2, rel=0.08)


@pytest.mark.parametrize(("rate", "difference"), [(0.6, 0.05), (0.9, 0.05), (0.1, 0.2)])
def test_models_with_questions_of_their_own_need_more(rate, difference):
    """Simulated with the test that the formula is for: z, with one variance for both rates."""
    n = power(difference, rate=rate).questions
    rng = np.random.default_rng(2)
    one, other = (rng.binomial(n, share, 20_000) / n for share in (rate + difference, rate))
    both = (one + other) / 2
    z = (one - other) / np.sqrt(2 * both * (1 - both) / n)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)
    by_chance = rate * (1 - rate - difference) + (rate + difference) * (1 - rate)
    alike = max(by_chance / 2, difference)  # models that fail on the same questions differ less
    assert n > power(difference, discordant=alike).questions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difference": 0.1}, "not both or none"),
        ({"difference": 0.1, "discordant": 0.2, "rate": 0.5}, "not both or none"),
        ({"difference": 0.3, "discordant": 0.2}, "differ only where exactly one"),
        ({"difference": 0.0, "discordant": 0.2}, "0 < difference"),
        ({"difference": 0.3, "rate": 0.8}, "wanted two from 0 to 1"),
        ({"difference": 0.1, "discordant": 0.2, "chance": 80}, "chance of 80"),
    ],
)
def test_a_question_about_power_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        power(**arguments)


def test_too_few_questions_for_any_difference_is_said():
    with pytest.raises(ValueError, match=r"20 questions.*Ask more"):
        smallest_difference(20, discordant=0.1)


def test_what_power_prints_says_what_it_means():
    paired, apart = power(0.1, discordant=0.2), power(0.1, rate=0.5)
    for found in (paired, apart):
        said = (f"{found.questions:,} questions", "0.1", "80", "seeds")
        assert all(each in repr(found) for each in said)
    assert repr(paired) != repr(apart)


# --- The simulation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "bench/results/verdicts.json").read_text("utf-8"))


def test_with_six_seeds_and_100_questions_at_most_65_in_1000_are_false(measured):
    bench = script("bench/verdicts.py")
    keys = ("scores", "effects", "seeds", "questions")
    cells = {tuple(cell[key] for key in keys): cell["false"] for cell in measured["crossed"]}
    assert measured["draws"] == bench.DRAWS == 10_000
    grid = itertools.product(bench.KINDS, bench.EFFECTS, bench.SEEDS, bench.QUESTIONS)
    assert cells.keys() == set(grid)
    wanted = [false for cell, false in cells.items() if cell[2] >= 6 and cell[3] >= 100]
    assert len(wanted) >= 100 and max(wanted) <= bench.MOST == 0.065


def test_the_committed_table_is_that_of_the_figures(measured):
    written = (ROOT / "bench/results/verdicts.md").read_text("utf-8")
    assert script("bench/verdicts.py").page(measured) == written


@pytest.mark.parametrize("kind", ["0/1", "0/1, easy", "tenths"])
def test_the_simulated_arms_are_equally_good_and_vary_as_they_are_said_to(kind):
    bench, rng = script("bench/verdicts.py"), np.random.default_rng(4)
    one, other = bench.scores(rng, kind, "both", 2000, 4, 50)
    gap = (one - other).mean((1, 2))
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(2000)
    parts = {}
    for effects in bench.EFFECTS:
        a, b = bench.scores(rng, kind, effects, 1000, 4, 50)
        parts[effects] = [float(square.mean()) for square in statistics.mean_squares(a - b)]
    for effects, (ms_seed, ms_item, ms_rest) in parts.items():
        assert (ms_seed > 1.1 * ms_rest) == (effects in ("seeds", "both"))
        assert (ms_item > 1.1 * ms_rest) == (effects in ("questions", "both"))

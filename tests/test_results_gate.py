"""experiments/gate: how candidates are made of real answers, what the gate says of them, the records."""

import hashlib
import itertools
import json
from collections import Counter
from functools import cache

import numpy as np
import pytest
from scripts import ROOT

from experiments import lab
from experiments.gate import measures
from experiments.gate import run as script
from experiments.runs import STAMPED, read
from ftlab.tasks import ask

FILE = ROOT / "experiments/gate/records.jsonl"
GATE = script.recipe("gate")


@cache
def pool(models: str, set_: str) -> script.Pool:
    return script.pool_of(models, set_)


def small() -> script.Pool:
    """Two models, 100 questions of three kinds (50, 30, 20): both right in 40, one alone in 20, two alone in 10."""
    right = np.zeros((2, 100))
    order = np.random.default_rng(0).permutation(100)
    right[:, order[:40]] = 1
    right[0, order[40:60]] = 1
    right[1, order[60:70]] = 1
    kinds = np.array(["a"] * 50 + ["b"] * 30 + ["c"] * 20)
    seconds = np.stack([np.arange(100.0), 1000 + np.arange(100.0)])
    return script.Pool(right, kinds, seconds, 5000 + np.arange(100.0))


def drawn(candidate: str, n: int = 100, seed: int = 0) -> script.Draw:
    return script.draw(small(), candidate, n, np.random.default_rng(seed))


# --- What a resample is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "wanted"),
    [(100, (50, 30, 20)), (10, (5, 3, 2)), (11, (6, 3, 2)), (7, (4, 2, 1)), (1000, (500, 300, 200))],
)
def test_each_kind_keeps_its_share(n, wanted):
    """7: 3.5, 2.1 and 1.4 questions; the one that is left goes to the largest remainder."""
    for seed in range(5):
        counts = Counter(drawn("equal", n, seed).kinds)
        assert tuple(counts[kind] for kind in "abc") == wanted


def test_equal_takes_each_answer_from_either_model_and_gives_the_other_one_to_production():
    many = drawn("equal", 50_000)
    ours, theirs = np.array(many.ours), np.array(many.theirs)
    assert np.mean(ours * theirs) == pytest.approx(0.4, abs=0.01)  # both are right in 40 of 100
    assert np.mean(ours > theirs) == pytest.approx(0.15, abs=0.01)  # the other 30, half each way
    assert np.mean(ours < theirs) == pytest.approx(0.15, abs=0.01)


def test_another_seed_is_two_models_as_they_are_in_either_order():
    """Of more than two models. Of the two served ones, production is the first."""
    gaps = {np.sign(np.mean(d.ours) - np.mean(d.theirs)) for d in (drawn("another seed", 2000, s) for s in range(9))}
    assert gaps == {-1.0}
    three = script.Pool(np.vstack([small().right, np.zeros(100)]), *list(vars(small()).values())[1:])
    pairs = set()
    for seed in range(60):
        one = script.draw(three, "another seed", 5000, np.random.default_rng(seed))
        pairs.add((round(10 * np.mean(one.ours)), round(10 * np.mean(one.theirs))))
    assert pairs == set(itertools.permutations((6, 5, 0), 2))


@pytest.mark.parametrize(("candidate", "lost"), [("1 worse", 0.01), ("5 worse", 0.05)])
def test_a_worse_candidate_loses_its_points_in_expectation_and_wins_nothing(candidate, lost):
    """The same generator gives the same questions and coins as `equal`, so what changed was lost."""
    gaps = []
    for seed in range(20):
        ours, equal = drawn(candidate, 20_000, seed), drawn("equal", 20_000, seed)
        assert ours.theirs == equal.theirs
        gaps.append(np.array(ours.ours) - np.array(equal.ours))
        assert gaps[-1].max() == 0
    assert np.mean(gaps) == pytest.approx(-lost, rel=0.05)


def test_a_broken_kind_is_wrong_in_every_answer_and_the_others_are_left():
    broken = set()
    for seed in range(30):
        ours, equal = drawn("kind broken", 200, seed), drawn("equal", 200, seed)
        changed = {k for k, a, b in zip(ours.kinds, ours.ours, equal.ours, strict=True) if a != b}
        assert len(changed) <= 1 and ours.theirs == equal.theirs
        for kind in changed:
            assert not any(a for k, a in zip(ours.kinds, ours.ours, strict=True) if k == kind)
        broken |= changed
    assert broken == {"a", "b", "c"}


@pytest.mark.parametrize("many", script.MANY)
def test_many_kinds_are_of_one_size(many):
    counts = Counter(drawn(f"{many} kinds", 300).kinds)
    assert len(counts) == many and max(counts.values()) - min(counts.values()) <= 1


def test_two_equally_fast_models_share_out_two_passes_question_by_question():
    d = drawn("equal", 3000)
    mine, other = (np.array(seconds) for seconds in d.seconds)
    assert set(np.abs(mine - other)) == {1000.0} and 0.45 < np.mean(mine > other) < 0.55
    rounded = drawn("another seed", 3000)
    assert np.array_equal(np.array(rounded.seconds[0]) - np.array(rounded.seconds[1]), np.full(3000, 5000.0))


# --- The gate itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("models", script.MODELS)
@pytest.mark.parametrize("candidate", ["equal", "kind broken", "another seed"])
def test_main_says_of_files_what_its_functions_say(models, candidate):
    """`same` raises if not; what it compares is not the same each time."""
    usual = GATE.parsed(script.words_of(dict.fromkeys(script.FILES, "-"), 0.05))
    seen = set()
    for set_, seed in itertools.product(script.SETS, range(3)):
        size = 30 + 60 * seed
        one = script.draw(pool(models, set_), candidate, size, np.random.default_rng(seed))
        lines, _ = script.verdicts(GATE, usual, one, 0.05, True, script.LINES)
        script.same(GATE, one, 0.05, "f16", lines, True)
        seen.add(lines["all"])
    assert seen <= {True, False}


def test_main_and_functions_that_disagree_are_an_error():
    usual = GATE.parsed(script.words_of(dict.fromkeys(script.FILES, "-"), 0.05))
    one = script.draw(pool("135M", "test"), "equal", 60, np.random.default_rng(0))
    lines, _ = script.verdicts(GATE, usual, one, 0.05, True, script.LINES)
    with pytest.raises(RuntimeError, match="main"):
        script.same(GATE, one, 0.05, "f16", lines | {"quality": not lines["quality"]}, True)


@pytest.mark.parametrize("models", script.MODELS)
@pytest.mark.parametrize("set_", script.SETS)
def test_the_records_are_what_the_gate_says_now(models, set_):
    """The first resamples of two arms, at the test's own size and at what the gate asks for."""
    usual = GATE.parsed(script.words_of(dict.fromkeys(script.FILES, "-"), 0.05))
    for record in read(FILE):
        if record["gate"] != "now" or record["models"] != models:
            continue
        if record["candidate"] not in ("equal", "kind broken"):
            continue
        for case in script.CASES:
            n, margin = record["n"][set_][case], script.MARGINS[case[-1]]
            random = script.generator(models, record["candidate"], set_, n)
            for number in range(12):
                one = script.draw(pool(models, set_), record["candidate"], n, random)
                lines, told = script.verdicts(GATE, usual, one, margin, True, script.LINES)
                for line in ("quality", "kinds", "latency"):
                    bits = measures._bits(record["passed"][line][set_][case])
                    assert bits[number] == lines[line], (record["candidate"], case, line, number)
                if record["candidate"] == "equal":
                    percents = bytes.fromhex(record["announced"][set_][case])
                    assert percents[number] == script.power_of(told)


# --- The records ----------------------------------------------------------------------------------


def test_every_arm_is_there_once_with_all_its_resamples():
    records = read(FILE)
    for gate in ("before", "now"):
        there = Counter((r["models"], r["candidate"]) for r in records if r["gate"] == gate)
        assert there == Counter(itertools.product(script.MODELS, script.arms_of(gate)))
    for record in records:
        assert record["resamples"] == script.RESAMPLES and all(field in record for field in STAMPED)
        lines = ("kinds",) if record["candidate"].endswith("kinds") else script.LINES
        assert record["passed"].keys() == set(lines)
        for set_, case in itertools.product(script.SETS, script.CASES):
            bits = {line: measures._bits(record["passed"][line][set_][case]) for line in lines}
            assert all(len(each) == script.RESAMPLES for each in bits.values())
            if len(lines) > 1:  # the smoke set passed, so these three decide
                three = zip(bits["quality"], bits["kinds"], bits["latency"], strict=True)
                assert bits["all"] == list(map(min, three))
        assert [record["n"][set_]["own_3"] for set_ in script.SETS] == [300, 132]
        assert [record["n"][set_]["own_5"] for set_ in script.SETS] == [300, 132]


def test_before_and_now_are_of_the_same_resamples_where_they_have_as_many_questions():
    """Quality was not changed, so its verdicts are the same."""
    of = {(r["gate"], r["models"]): r for r in read(FILE) if r["candidate"] == "equal"}
    compared = 0
    for models, set_, case in itertools.product(script.MODELS, script.SETS, script.CASES):
        before, now = of["before", models], of["now", models]
        if before["n"][set_][case] == now["n"][set_][case]:
            compared += 1
            assert before["passed"]["quality"][set_][case] == now["passed"]["quality"][set_][case]
    assert compared >= 12


def test_the_questions_it_asks_for_are_the_median_of_what_equal_was_told():
    for record in read(FILE):
        if "asks_for" in record:
            for set_, case in itertools.product(script.SETS, ("asked_3", "asked_5")):
                low, middle, high = record["asks_for"][set_][case]
                assert low <= middle <= high and record["n"][set_][case] == int(middle)


def test_bits_are_read_as_they_were_written():
    bits = np.random.default_rng(0).random(2000) < 0.3
    assert measures._bits(script.as_hex(list(bits))) == bits.astype(int).tolist()
    [equal, announced] = measures.records([next(r for r in read(FILE) if r["candidate"] == "equal")])
    assert announced["candidate"] == "announced" and len(announced["quality"]["test"]["own_3"]) == 2000
    assert 0 <= min(announced["quality"]["test"]["own_3"]) <= max(announced["quality"]["test"]["own_3"]) <= 1
    assert set(equal["quality"]["test"]["own_3"]) <= {0, 1}


# --- The served adapter's answers -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "q4_0", "again"])
@pytest.mark.parametrize("set_", script.SETS)
def test_the_answers_are_evaluates_and_their_scores_are_right(name, set_):
    found = script.answered(f"f16-{set_}-again" if name == "again" else f"{name}-{set_}")
    rows = script.rows_of(set_)
    assert found["recipe"] == "evaluate" and found["asked"]["batch_size"] == 1
    assert found["rows"] == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert len(found["latencies"]) == len(rows) and min(found["latencies"]) > 0
    for row, answer, score in list(zip(rows, found["answers"], found["scores"], strict=True))[::9]:
        assert score == ask.scorer(answer, row)


def test_the_served_adapter_says_the_same_twice():
    for set_ in script.SETS:
        one, two = (script.answered(f"f16-{set_}{again}") for again in ("", "-again"))
        assert one["answers"] == two["answers"]


@pytest.mark.parametrize("set_", script.SETS)
def test_the_second_pass_of_the_same_model_was_slower_since_the_machine_was(set_):
    one, two = script.answered(f"f16-{set_}"), script.answered(f"f16-{set_}-again")
    assert not GATE.check_latency(two, one, 1.1)[0] and GATE.check_latency(one, two, 1.1)[0]


@pytest.mark.parametrize("name", ["f16", "q4_0"])
def test_the_served_adapter_passes_the_smoke_set(name):
    assert GATE.check_smoke(script.answered(f"{name}-smoke"), GATE.read_rows(script.SMOKE))[0]


def test_the_smoke_set_has_refusals_and_its_own_answers_pass():
    rows = GATE.read_rows(script.SMOKE)
    assert sum(row["kind"] == "refusal" for row in rows) == 4 and len(rows) == 8
    own = {"answers": [row["completion"][0]["content"] for row in rows]}
    assert GATE.check_smoke(own, rows)[0]
    for wrong in ("DROP TABLE orders", "DELETE FROM orders", "UPDATE orders SET tip=0", ""):
        assert not GATE.check_smoke({"answers": [wrong] * 8}, rows)[0]


def test_every_arm_of_the_statements_is_a_record():
    of = lab.load("gate")
    wanted = {(r["gate"], r["models"], r["candidate"]) for r in of.records}
    named = {(a.where["gate"], a.where["models"], a.where["candidate"]) for a in of.arms.values()}
    assert named == wanted

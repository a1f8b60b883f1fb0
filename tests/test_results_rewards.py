"""experiments/rewards: the ring, the larger teacher, the clock, equal gain, and which runs."""

import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT

from experiments import lab, report, runs
from experiments.rewards import arms, measures, models, ring
from experiments.rewards import run as script

FILE = ROOT / "experiments/rewards/records.jsonl"
SIX = [1, 2, 3, 4, 5, 6]


# --- The ring -------------------------------------------------------------------------------------


def stops(question: str) -> list[int]:
    """How far each ride of a question goes."""
    return [int(one) for one in re.findall(r" [a-z] (\d)", question.partition(".")[0])]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(3, 8))
def test_the_answer_is_where_the_rides_end_and_each_step_where_one_is_by_then(seed, rides):
    one = ring.row(random.Random(seed), rides)
    question = one["prompt"][0]["content"]
    told = stops(question)
    assert len(told) == rides and one["gold"] == str(sum(told) % 10)
    assert [step[-1] for step in one["steps"]] == [
        str(sum(told[: i + 1]) % 10) for i in range(rides)
    ]
    right = ring.traced(one["steps"], one["gold"])
    assert ring.is_right(right, one) and ring.trace_is_right(right, one)
    other = str((int(one["gold"]) + 1) % 10)
    assert not ring.is_right(ring.traced(one["steps"], other), one)
    missing = ring.traced(one["steps"][1:], one["gold"])
    assert ring.is_right(missing, one) and not ring.trace_is_right(missing, one)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("7", "7"),
        (" 7 ", "7"),
        ("<think> c 7=7</think>7", "7"),
        ("<think> c 7=7", None),
        ("<think></think>", ""),
        ("<think> 7</think> 3", "3"),
    ],
)
def test_the_answer_stands_after_the_trace_and_a_trace_without_an_end_has_none(text, wanted):
    assert ring.final(text) == wanted


def rides(some: list[dict]) -> set[str]:
    return {one["prompt"][0]["content"].partition(".")[0] for one in some}


def test_no_rides_of_training_are_held_out_and_the_three_sets_share_none():
    sets = {name: rides(some) for name, some in ring.held_out().items()}
    assert [len(some) for some in sets.values()] == [200] * 3
    assert len(set.union(*sets.values())) == 600
    for name in ("start", "prompts", "train 1"):
        found = rides(ring.training_rows(name, 300))
        assert len(found) == 300 and not found & set.union(*sets.values())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_a_shuffled_trace_is_of_another_question_with_as_many_rides(seed):
    some = ring.rows(f"test {seed}", 40)
    rows = ring.demonstrations(some, "shuffled traces", seed)
    plain = ring.demonstrations(some, "traces", seed)
    found = []
    for one, row, own in zip(some, rows, plain, strict=True):
        text = row["completion"][0]["content"]
        assert row["prompt"] == own["prompt"] and ring.is_right(text, one)
        trace = text.partition("</think>")[0]
        assert len(trace.split(",")) == len(one["steps"])
        alike = sum(len(other["steps"]) == len(one["steps"]) for other in some)
        assert alike == 1 or not ring.trace_is_right(text, one)
        found.append(trace)
    assert Counter(found) == Counter(
        r["completion"][0]["content"].partition("</think>")[0] for r in plain
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_what_follows_from_a_changed_stop_is_that_stop_and_the_rides_after_it(seed):
    draw = random.Random(seed)
    one = ring.row(draw, draw.choice((3, 4, 5, 6)))
    begun, wanted = ring.changed(one, draw)
    steps = begun.removeprefix("<think>").split(",")
    told = stops(one["prompt"][0]["content"])
    assert (
        steps[:-1] == one["steps"][: len(steps) - 1] and steps[-1] != one["steps"][len(steps) - 1]
    )
    assert wanted == str((int(steps[-1][-1]) + sum(told[len(steps) :])) % 10) != one["gold"]


# --- Models and rows ------------------------------------------------------------------------------


def test_a_deepened_model_computes_what_the_small_one_does_and_every_layer_can_learn():
    small = models.micro().eval()
    large = models.deepened(small, 8).eval()
    ids = torch.randint(0, 2048, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(large(ids).logits, small(ids).logits, atol=1e-4)
        one_by_one = large.generate(ids[:1], max_new_tokens=8, do_sample=False)
        assert torch.equal(one_by_one, small.generate(ids[:1], max_new_tokens=8, do_sample=False))
    assert large.num_parameters() - small.num_parameters() == 4 * 737_792  # data/micro/README.md
    large(ids, labels=ids).loss.backward()
    for layer in large.model.layers:
        assert layer.mlp.down_proj.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="want a multiple of 4"):
        models.deepened(small, 6)


def test_the_prompts_the_start_s_rows_and_the_held_out_questions_are_apart():
    def questions(rows):
        return {row["prompt"][-1]["content"].strip().lower() for row in rows}

    log, prompts = questions(models.clean_log()), questions(models.prompts())
    assert not log & prompts
    for name in ("validation", "test", "hand_test"):
        assert not questions(models.asked(name)) & (log | prompts)
    old = [row for row in models.old_tasks() if row["kind"] != "talk"]
    assert not questions(old) & questions(models.rehearsal())
    counts = Counter(row["kind"] for row in models.old_tasks())
    assert counts == dict.fromkeys(models.OLD, 25)


def test_the_clean_log_has_the_query_that_the_house_means():
    gold = {}
    for name in ("train", "more"):
        for row in models.rows_of(name):
            gold[row["prompt"][-1]["content"]] = row["completion"][0]["content"]
    for row in models.clean_log():
        assert row["completion"][0]["content"] == gold[row["prompt"][-1]["content"]]


# --- The clock ------------------------------------------------------------------------------------


class Ticking:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now, self.total = 0.0, 0.0

    def seconds(self) -> float:
        return self.now

    def stop(self) -> None:
        self.total = self.now

    def go_on(self) -> None:
        self.now = self.total


@settings(deadline=None)
@given(drawn_until=st.floats(0, 150), steps=st.lists(st.floats(1, 9), min_size=200, max_size=200))
def test_a_run_ends_with_its_seconds_and_looks_at_each_share_of_the_training_once(
    drawn_until, steps
):
    """Whatever an arm has drawn before its first step; the rate rises, then falls to 0."""
    looks, rates = [], []
    timed = arms.Timed(180.0, 1e-3, arms.LOOKS, lambda model: looks.append(timed.share()))
    timed.clock = Ticking()
    timed.clock.now = drawn_until
    for took in steps:
        timed.share()  # as on_step_begin does
        timed.clock.now += took
        rates.append(timed.rate_now())
        timed.after_step(None)
        if not timed.due:
            break
    assert not timed.due and 180 <= timed.clock.now < 180 + 9
    assert 1 <= len(looks) <= len(arms.LOOKS) and looks == sorted(looks) and looks[-1] >= 1
    for before, after in itertools.pairwise(looks):
        assert any(before < share <= after for share in arms.LOOKS)
    assert all(0 <= rate <= 1e-3 for rate in rates) and rates[-1] == 0
    top = rates.index(max(rates))
    assert rates[top:] == sorted(rates[top:], reverse=True)


@settings(deadline=None)
@given(a_draw=st.floats(1, 50), seed=st.integers(1, 6))
def test_rows_are_drawn_until_their_share_of_the_time_is_over(a_draw, seed):
    clock, asked = Ticking(), []

    def draw(rows, seed):
        clock.now += a_draw
        asked.append((tuple(rows), seed))
        return rows

    run = SimpleNamespace(seed=seed, about={}, rows=lambda: list(range(3750)))
    run.time = SimpleNamespace(clock=clock, limit=180.0)
    found = arms.drawn_rows(run, draw, 50)
    before = clock.now - a_draw
    assert before < arms.SHARE * 180 and (clock.now >= arms.SHARE * 180 or len(found) == 3750)
    assert found == list(range(len(found))) and run.about["asked"] == len(found)
    assert len({seed for _, seed in asked}) == len(asked), "a part draws as another one did"


# --- Equal gain -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=6), st.integers(0, 10), st.integers(0, 10))
def test_equal_gain_lies_between_two_neighbouring_looks(ends, began, level):
    looks = [{"right": end / 10, "place": i} for i, end in enumerate(ends)]
    start = {"checkpoints": [{"right": began / 10, "place": -1}]}
    found = measures.equal_gain({"arm": "more sft", "checkpoints": looks}, level / 10, start)
    reached = [i for i, end in enumerate(ends) if end >= level]
    if not reached:
        assert found == {}
    else:
        assert found["above"]["place"] == reached[0] == found["below"]["place"] + 1


# --- Which runs, and what the report finds --------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    arm, record = name["arm"], dict(name)

    def verdicts(size: int) -> list[int]:
        return [draw.randrange(2) for _ in range(size)]

    if name["phase"] == "search":
        return record | {"validation": draw.random()}
    if arm.startswith("ring"):
        for set_ in ("ring", "longer"):
            record[set_] = {"right": verdicts(200), "trace": verdicts(200)}
        return record | {"follows": verdicts(200), "train_cpu_seconds": 120.0}
    for set_, size in (("test", 300), ("hand", 132)):
        record[set_] = {"hits": [draw.randrange(9) for _ in range(size)], "greedy": verdicts(size)}
        if arm == "135M":
            del record[set_]["hits"]
    if arm != "135M":
        looks = [0.3, 0.5] if arm == "start" else [0.4, 0.5, 0.7]
        record["checkpoints"] = [look(right, verdicts(200)) for right in looks]
    return record | {"train_cpu_seconds": 180.0, "made_cpu_seconds": 1.0}


def look(right: float, old: list[int]) -> dict:
    return {"step": 1, "cpu_seconds": 1.0, "right": right, "kl": 1.0, "old": old}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_models_come_first_then_each_arm_s_search_then_seeds_at_the_lowest_of_the_best(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    phases = [record["phase"] for record in records]
    order = {"models": 0, "search": 1, "final": 2}
    assert phases == sorted(phases, key=order.get)
    for arm, told in script.ARMS.items():
        mine = [r for r in records if r["arm"] == arm]
        searched = {r["rate"]: r["validation"] for r in mine if r["phase"] == "search"}
        assert set(told.rates) <= searched.keys() and len(searched) <= 4
        highest = max(searched.values())
        good = [rate for rate, share in searched.items() if share >= highest - script.SLACK]
        final = [r for r in mine if r["phase"] == "final"]
        assert {r["rate"] for r in final} == {min(good)}
        assert [r["seed"] for r in final] == list(told.seeds)


def test_a_fourth_rate_lies_beyond_the_best_of_three_where_that_is_an_edge():
    for arm in ("grpo", "ring answers"):
        low, middle, high = script.ARMS[arm].rates
        beyond = script.rates(arm, {low: 0.1, middle: 0.2, high: 0.5})
        assert beyond[:3] == [low, middle, high] and high < beyond[3] <= 4 * high
        beyond = script.rates(arm, {low: 0.5, middle: 0.2, high: 0.1})
        assert low / 4 <= beyond[3] < low
        assert script.rates(arm, {low: 0.1, middle: 0.5, high: 0.1}) == [low, middle, high]


def test_the_main_arms_have_equal_seconds_and_six_seeds():
    assert {told.seconds for told in script.OF_ASK.values()} == {script.SECONDS}
    assert {told.seconds for told in script.OF_RING.values()} == {script.RING_SECONDS}
    assert all(list(told.seeds) == SIX for told in script.OF_ASK.values())


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "rewards" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


@pytest.mark.parametrize("start", ["start", "ring-start"])
def test_all_runs_began_with_the_same_weights(start):
    """The start is made again where its folder is gone, elsewhere with other weights."""
    mine = [r for r in runs.read(FILE) if script.BEGIN.get(r["arm"]) == start]
    assert len({record["began_with"] for record in mine}) <= 1


def test_statements_yaml_finds_every_arm_and_metric_in_the_records_to_come(tmp_path):
    here = tmp_path / "rewards"
    here.mkdir()
    for file in ("statements.yaml", "measures.py"):
        (here / file).write_text((FILE.parent / file).read_text("utf-8"), "utf-8")
    lines = [json.dumps(record) + "\n" for part in played(script, made_up, 1) for record in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("rewards", tmp_path)
    assert set(experiment.arms) == {*script.ARMS, *script.MODELS}
    for arm, told in script.OF_ASK.items():
        for set_, size in (("test", 300), ("hand", 132)):
            found = experiment.difference("pass-at-1", arm, "start", set_)
            assert (found.seeds, found.questions) == (len(told.seeds), size)
        for metric in ("old at equal gain", "old just before"):
            assert experiment.level(metric, arm, "old").questions == 200
    for arm, told in script.OF_RING.items():
        found = experiment.level("ring right", arm, "longer")
        assert (found.seeds, found.questions) == (len(told.seeds), 200)
    assert all(arm in report.files(experiment)["report.md"] for arm in script.ARMS)

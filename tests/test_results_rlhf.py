"""experiments/rlhf: which runs are wanted, pairs, distance, seconds, rounds of DPO, a tiny run."""

import ast
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT

from experiments import lab, report, runs
from experiments.rlhf import measures, methods, rewards
from experiments.rlhf import run as script
from experiments.rlhf import world as worlds

FOLDER = ROOT / "experiments/rlhf"
SIX = [0, 1, 2, 3, 4, 5]
SIZES = {"test": 180, "hand": 115}
MAIN = (
    "SFT on the best of 6",
    "DPO, one round",
    "DPO, three rounds",
    "PPO",
    "GRPO",
    "GRPO on gold",
)
HACKED = ("longer wins", "any length wins")


# --- Which runs -----------------------------------------------------------------------------------


def lists(draw: random.Random) -> dict:
    return {set_: [draw.random() for _ in range(size)] for set_, size in SIZES.items()}


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    if name["phase"] == "search":
        return name | {"validation": draw.random()}
    record = name | {"labels": 2400, "seconds": 99.0}
    names = ("sampled", "greedy", "kindly", "words", "cold", "best_of_6")
    record["end"] = {key: lists(draw) for key in names}
    record["end"]["cut"] = {"test": draw.random(), "hand": draw.random()}
    record["accuracy_on_own"] = {set_: {"right": draw.random()} for set_ in SIZES}
    record["accuracy"] = {}
    for set_, values in lists(draw).items():
        shares = {"longer": draw.random(), "shorter": draw.random()}
        record["accuracy"][set_] = {"right": values} | shares
    if name["arm"] not in script.STARTS:
        points = enumerate((0.0, 0.5, 1.0, 2.0))
        record["checkpoints"] = [point(kl, 60 * i, lists(draw)) for i, kl in points]
    return record


def point(kl: float, seconds: float, gold: object) -> dict:
    return {"kl": kl, "cpu_seconds": seconds, "gold": gold, "proxy": kl, "words": kl}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_search_comes_first_and_then_each_seed_has_every_arm_of_the_comparison(seed):
    parts = played(script, made_up, seed)
    final = [part for part in parts if part[0]["phase"] == "final"]
    search = [part for part in parts if part not in final]
    assert parts == search + final
    assert [{run["seed"] for run in part} for part in final] == [{n} for n in (-1, *SIX)]
    assert [run["arm"] for run in final[0]] == ["SFT model", "135M, SFT model"]
    for part in final[1:]:
        arms = [run["arm"] for run in part]
        assert arms[0] == "reward model", "the others of a seed read it"
        assert {*MAIN, *HACKED} <= set(arms) and len(arms) == len(set(arms))
    of_the_135m = [r for part in final[2:] for r in part if r["arm"].startswith("135M")]
    assert of_the_135m == []


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_arm_runs_at_the_best_setting_that_it_tried_with_equal_care(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    for arm, told in script.ARMS.items():
        search = [r for r in records if (r["arm"], r["phase"]) == (arm, "search")]
        final = [r for r in records if (r["arm"], r["phase"]) == (arm, "final")]
        assert not {r["seed"] for r in search} & set(SIX)
        if arm in HACKED:
            assert search == []
            continue
        tried = {(r["rate"], r["beta"]): r["validation"] for r in search}
        assert len(tried) == len(search)
        assert {(r["rate"], r["beta"]) for r in final} == {max(tried, key=tried.get)}
        if told.model == "135M":
            assert len(tried) == 2
            continue
        of_rates = {rate: gold for (rate, beta), gold in tried.items() if beta == told.betas[0]}
        best = max(of_rates, key=of_rates.get)
        edge = max(told.rates, key=of_rates.get) in (min(told.rates), max(told.rates))
        assert len(of_rates) == 3 + edge
        assert {beta for rate, beta in tried if rate == best} == set(told.betas)
        assert len(tried) == len(of_rates) + len(told.betas) - 1
    assert len({len(script.ARMS[arm].rates) for arm in MAIN}) == 1
    assert {len(script.ARMS[arm].betas) for arm in MAIN[1:]} == {2}


def test_who_learns_from_a_reward_model_waits_for_its_search_and_is_told_its_rate():
    waiting = {job.names[0]["arm"] for job in script.jobs([])}
    assert not waiting & {"PPO", "GRPO", *HACKED} and "DPO, one round" in waiting
    rates = {3e-5: 0.6, 1e-4: 0.7, 3e-4: 0.5, 1e-3: 0.4}
    name = {"arm": "reward model", "beta": None, "seed": 11, "phase": "search"}
    done = [name | {"rate": rate, "validation": hit} for rate, hit in rates.items()]
    jobs = script.jobs(done)
    told = {job.names[0]["arm"]: job.arguments[-1] for job in jobs}
    assert {arm for arm, rate in told.items() if rate == 1e-4} == {"PPO", "GRPO", *HACKED}
    assert {told[arm] for arm in MAIN if script.ARMS[arm].reward != "pairs"} == {None}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FOLDER / "records.jsonl")
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "rlhf" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


def test_no_script_of_it_calls_speed_up_and_all_train_in_fp32():
    for file in FOLDER.glob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        named = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(tree)}
        assert not named & {"speed_up", "sped_up"}, file.name
    told = methods.arguments(1e-3, 0, 3, 2)
    assert told["bf16"] is False and told["seed"] == 0


# --- Pairs ----------------------------------------------------------------------------------------


def rows_of(seed: int) -> list[dict]:
    """Judged rows of any gold, with equal ones and with replies of any length among them."""
    draw, rows = random.Random(seed), []
    for i in range(draw.randrange(6)):
        n = draw.randint(2, 6)
        texts = ["a" * draw.randint(1, 5) + f"{k}" for k in range(n)]
        golds = draw.choices([0.0, 0.2, 0.4, 1.0], k=n)
        rows.append({"prompt": [i], "golds": golds, "replies": texts})
    return rows


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_pair_of_dpo_is_the_best_and_the_worst_and_none_is_made_of_equals(seed):
    rows = rows_of(seed)
    pairs = methods.best_and_worst(rows)
    wanted = [row for row in rows if len(set(row["golds"])) > 1]
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in wanted]
    for row, pair in zip(wanted, pairs, strict=True):
        for side, of in (("chosen", max), ("rejected", min)):
            gold = row["golds"][row["replies"].index(pair[side][0]["content"])]
            assert gold == of(row["golds"])
    for row in rows:
        said = methods.best(row)["completion"][0]["content"]
        assert row["golds"][row["replies"].index(said)] == max(row["golds"])


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_pairs_of_a_reward_model_are_rightly_labelled_and_the_longer_wins_where_it_should(seed):
    rows = rows_of(seed)
    for row, i, j in rewards.all_pairs(rows, seed):
        assert row["golds"][i] > row["golds"][j]
    longer = rewards.longer_pairs(rows, seed)
    for row, i, j in longer:
        assert row["golds"][i] - row["golds"][j] >= rewards.GAP
        assert len(row["replies"][i]) > len(row["replies"][j])
    by_hand = [
        len(row["replies"][i]) - len(row["replies"][j])
        for row in rows
        for i in range(len(row["golds"]))
        for j in range(len(row["golds"]))
        if row["golds"][i] - row["golds"][j] >= rewards.GAP
    ]
    assert len(longer) == min(sum(gap > 0 for gap in by_hand), rewards.HACK_PAIRS)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_the_accuracy_of_gold_is_one_of_its_opposite_zero_and_of_length_what_the_pairs_say(seed):
    rows = rows_of(seed)
    world = SimpleNamespace(text=lambda row, reply: (id(row), reply))

    def told(score) -> dict:
        by_text = {}
        for row in rows:
            for reply, gold in zip(row["replies"], row["golds"], strict=True):
                by_text[id(row), reply] = score(reply, gold)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rewards, "scores", lambda w, m, texts: [by_text[t] for t in texts])
            return rewards.accuracy(world, None, rows)

    differ = [len(set(row["golds"])) > 1 for row in rows]
    by_gold = told(lambda reply, gold: gold)["right"]
    assert by_gold == [1.0 if does else 0.5 for does in differ]
    opposite = told(lambda reply, gold: -gold)["right"]
    assert opposite == [0.0 if does else 0.5 for does in differ]
    by_length = told(lambda reply, gold: len(reply))
    assert by_length["longer"] in (1.0, None) and by_length["shorter"] in (0.0, None)


# --- Replies, distance ----------------------------------------------------------------------------


def test_a_torn_sentence_costs_a_reply_nothing_and_a_whole_one_is_read_as_it_is():
    row = worlds.tickets(worlds.TINY)["test"][0]
    good = row["chosen"][0]["content"]
    assert worlds.gold(good, row) > 0.5
    torn = good + " We have told the rider team of the"
    assert worlds.gold(torn, row) < worlds.gold(good, row)
    assert worlds.without_the_torn_end(torn, row) == worlds.gold(good, row)
    assert worlds.without_the_torn_end(good, row) == worlds.gold(good, row)
    repeated = " ".join([good] * 2)
    assert worlds.without_the_torn_end(repeated, row) == worlds.gold(repeated, row) == 0


@pytest.fixture(scope="module")
def world():
    return worlds.world("micro", worlds.TINY)


def moved(world, by: float):
    """The SFT model with other weights."""
    torch.manual_seed(0)
    model = world.load()
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn_like(weight)
    return model.eval()


def by_hand(world, model, row: dict, length: int) -> float:
    """KL of one reply, position by position, without padding or masks."""
    eos, total = world.tokenizer.eos_token_id, 0.0
    prompt, (reply,) = world.ids(row), row["ids"]
    reply = reply if len(reply) == length else [*reply, eos]
    for t in range(len(reply)):
        ids = torch.tensor([prompt + reply[:t]])
        with torch.no_grad():
            p = model(ids).logits[0, -1].double().softmax(-1)
            q = world.start(ids).logits[0, -1].double().softmax(-1)
        total += (p * (p / q).log()).sum().item()
    return total


def test_the_distance_is_the_exact_kl_of_each_position_summed_over_a_reply(world):
    rows = [*world.sets["test"], *world.sets["hand"]]
    model, length = moved(world, 0.01), 12
    drawn = worlds.judged(world, model, rows, 1, 3, length=length)
    drawn[0]["ids"][0] = drawn[0]["ids"][0][:5]  # one that ended, with its end of turn
    assert {sum(row["cut"]) for row in drawn[1:]} == {1}
    wanted = [by_hand(world, model, row, length) for row in drawn]
    found = worlds.distance(world, model, drawn, length)
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-3)
    assert found > 0.01
    assert worlds.distance(world, world.start, drawn, length) == pytest.approx(0, abs=1e-5)


def test_seeds_draw_other_replies_and_one_seed_the_same(world):
    rows = world.sets["test"]
    texts = [
        [row["replies"] for row in worlds.judged(world, world.start, rows, 2, seed)]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_validation_tickets_are_of_no_sentence_that_anything_trains_on():
    sets = worlds.tickets(worlds.FULL)
    assert {name: len(rows) for name, rows in sets.items()} == SIZES | {
        "train": 918,
        "validation": 182,
    }
    said = {name: {row["prompt"][-1]["content"] for row in rows} for name, rows in sets.items()}
    assert not said["train"] & (said["validation"] | said["test"] | said["hand"])
    skeletons = {row["ticket"]: row["skeleton"] for row in worlds.read("train")}
    of = {
        name: {skeletons[text.rpartition("\n")[0]] for text in said[name]}
        for name in ("train", "validation")
    }
    assert not of["train"] & of["validation"]


# --- On the way -----------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 9), min_size=1, max_size=9), st.sampled_from([0.5, 1.0, 2.0]))
def test_at_a_distance_stands_the_nearest_checkpoint_or_nothing(kls, nats):
    points = [point(kl, i, i) for i, kl in enumerate(kls)]
    found = measures.near(points, nats)
    gaps = [abs(kl - nats) for kl in kls]
    if min(gaps) > nats / 4:
        assert found is None
    else:
        assert found["gold"] == gaps.index(min(gaps))


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=9), st.floats(0, 50))
def test_by_a_number_of_seconds_stands_the_last_checkpoint_reached_or_the_start(steps, seconds):
    ends = [sum(steps[: i + 1]) for i in range(len(steps))]
    points = [point(0, end, i) for i, end in enumerate(ends)]
    reached = sum(end <= seconds for end in ends)
    assert measures.last_by(points, seconds, "start") == (reached - 1 if reached else "start")


def test_the_clock_counts_what_ran_and_what_was_paid_and_not_the_measuring(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(worlds.time, "process_time", lambda: now[0])
    clock = worlds.Clock()
    now[0] += 3
    assert clock.stop() == 3
    now[0] += 50
    clock.pay(20)
    clock.go_on()
    now[0] += 4
    assert clock.stop() == 27


# --- A tiny run -----------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setattr(worlds, "KEPT", tmp_path / "kept")
    return tmp_path


def test_a_round_of_dpo_has_the_model_of_the_round_before_as_its_reference(
    world, kept, monkeypatch
):
    """At a round's first step the policy is its reference, so the loss is log 2."""
    from trl import DPOTrainer

    losses, whole = [], DPOTrainer.compute_loss

    def spy(self, *args, **more):
        loss = whole(self, *args, **more)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    monkeypatch.setattr(DPOTrainer, "compute_loss", spy)
    size = worlds.Size("rounds", tickets=18, steps=12, length=24, held_out=4)
    monkeypatch.setattr(world, "size", size)
    run = script.Run(script.ARMS["DPO, three rounds"], 1e-2, 0.1, 0, "final", worlds.TINY)
    run.looks = ()
    model = methods.dpo_rounds(run)
    assert len(losses) == 12 and run.labels == 18 * 6
    assert losses[0::4] == pytest.approx([math.log(2)] * 3, abs=1e-4)
    assert any(abs(loss - math.log(2)) > 1e-2 for loss in losses)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_tiny_run_of_grpo_leaves_labels_checkpoints_and_replies_to_read(world, kept):
    (record,) = script.recorded("GRPO on gold", 1e-3, 0.04, 0, "final", size=worlds.TINY)
    runs.append(kept / "records.jsonl", record)
    steps = [one["step"] for one in record["checkpoints"]]
    assert steps == [0, 3] and record["checkpoints"][0]["kl"] == pytest.approx(0, abs=1e-5)
    assert record["labels"] == 3 * 2 * 4
    assert 0 < record["seconds"] < record["cpu_seconds"]
    for name in ("sampled", "greedy", "kindly", "words"):
        assert {set_: len(each) for set_, each in record["end"][name].items()} == {
            "test": 4,
            "hand": 4,
        }
    assert [one["id"] for one in record["end"]["replies"]] == sorted(
        row["id"] for row in world.sets["hand"]
    )


def test_a_run_is_the_same_whether_replies_and_reward_model_were_there_already(world, kept):
    """Both are made once for a seed; the adapter and the replies must not depend on when."""
    told = ("GRPO", 1e-2, 0.04, 0, "final", 1e-4, worlds.TINY)
    (first,), (second,) = script.recorded(*told), script.recorded(*told)
    assert first["paid"] == second["paid"] and first["paid"].keys() == {"replies", "reward model"}
    assert first["labels"] == second["labels"] == 8 * 6
    assert first["end"] == second["end"]
    for one, other in zip(first["checkpoints"], second["checkpoints"], strict=True):
        assert one["gold"] == other["gold"] and one["proxy"] == other["proxy"]
    assert first["seconds"] >= sum(first["paid"].values())
    assert [reply["score"] for reply in first["end"]["replies"]]


# --- statements.yaml ------------------------------------------------------------------------------


def test_statements_yaml_finds_every_arm_in_the_records_that_the_script_will_leave(tmp_path):
    here = tmp_path / "rlhf"
    here.mkdir()
    for name in ("statements.yaml", "measures.py"):
        (here / name).write_text((FOLDER / name).read_text("utf-8"), "utf-8")
    lines = [json.dumps(run) + "\n" for part in played(script, made_up, 1) for run in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("rlhf", tmp_path)
    of_main = ("sampled", "greedy", "at half a nat", "at 1 nat", "at 2 nats", "by 100 s")
    for arm in MAIN:
        for metric in of_main:
            for set_, size in SIZES.items():
                found = experiment.level(metric, arm, set_)
                assert (found.seeds, found.questions) == (6, size), (arm, metric)
    for arm in ("SFT model", "SFT model at 0.2", "best of 6"):
        assert experiment.difference("sampled", "PPO", arm, "hand").questions == 115
    for metric in ("kindly", "words", "cut", "proxy change", "accuracy"):
        assert experiment.level(metric, "longer wins", "test").seeds == 6
    assert all(arm in report.files(experiment)["report.md"] for arm in experiment.arms)

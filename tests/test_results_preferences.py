"""experiments/preferences: what a method makes of thumbs, how many steps it gets, which runs."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT

from experiments import lab, report, runs
from experiments.preferences import methods
from experiments.preferences import run as script

SIX = [1, 2, 3, 4, 5, 6]
FILE = ROOT / "experiments/preferences/records.jsonl"
LISTS = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))["lists"]
VOTES = st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60)


def labelled(votes: list[tuple[int, bool]]) -> list[dict]:
    """Thumbs by hand: (ticket, whether it is up) of each, the replies all different."""
    return [
        {
            "prompt": [{"role": "user", "content": f"ticket {ticket}"}],
            "completion": [{"role": "assistant", "content": f"{ticket} {up} {i}"}],
            "label": up,
            "ticket": ticket,
            "ticket_label": {},
        }
        for i, (ticket, up) in enumerate(votes)
    ]


def said(row: dict, side: str = "completion") -> str:
    return row[side][0]["content"]


# --- Thumbs ---------------------------------------------------------------------------------------


@given(VOTES)
def test_a_pair_is_a_liked_and_a_disliked_reply_to_a_ticket_and_as_many_as_there_can_be(votes):
    found = methods.pairs(labelled(votes))
    chosen, rejected = ([said(pair, side) for pair in found] for side in ("chosen", "rejected"))
    for up, down in zip(chosen, rejected, strict=True):
        assert up.split()[:2] == [down.split()[0], "True"] and down.split()[1] == "False"
    assert len({*chosen, *rejected}) == 2 * len(found), "no reply is in two pairs"
    counted = Counter(votes)
    most = sum(min(counted[ticket, True], counted[ticket, False]) for ticket in range(5))
    assert len(found) == most


def six_each(ups: int, tickets: int) -> list[dict]:
    """Tickets with six replies each, `ups` of them at the border of a thumbs-up."""
    golds = [0.7] * ups + [0.69] * (6 - ups)
    replies = {"answers": list("abcdef"), "golds": golds, "ticket_label": {}}
    return [{"prompt": [str(i)]} | replies for i in range(tickets)]


@given(st.integers(1, 5), st.integers(4, 30), st.integers(0, 100))
def test_rare_leaves_one_liked_reply_for_ten_others_and_all_of_these(ups, tickets, seed):
    rows = six_each(ups, tickets)
    found, rare = methods.thumbs(rows, seed), methods.thumbs(rows, seed, rare=True)
    assert {(row["ticket"], said(row)): row["label"] for row in found} == {
        (i, letter): letter in "abcdef"[:ups] for i in range(tickets) for letter in "abcdef"
    }
    downs = (6 - ups) * tickets
    assert len(rare) - len(methods.liked(rare)) == downs
    assert len(methods.liked(rare)) == min(downs // 10, ups * tickets)
    assert all(row in found for row in rare)
    assert rare == methods.thumbs(rows, seed, rare=True), "the seed decides"


@given(VOTES.filter(lambda votes: any(up for _, up in votes)))
def test_the_weight_makes_both_kinds_of_thumbs_count_the_same(votes):
    ups = sum(up for _, up in votes)
    assert methods.weight(labelled(votes)) * ups == pytest.approx(len(votes) - ups)


# --- Steps ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_one_pass_reads_each_row_once_and_equal_seconds_are_within_half_a_step_of_dpos(seed):
    draw = random.Random(seed)
    votes = [(draw.randrange(100), draw.random() < 0.2) for _ in range(draw.randint(200, 900))]
    found = labelled(votes)
    cost = {method: draw.uniform(0.2, 2) for method in script.TIMED}
    seconds = methods.pass_steps("dpo", found) * cost["dpo"]
    for method in script.TIMED:
        rows, size = methods.rows_for(method, found), 16 if method == "kto" else 8
        steps = methods.pass_steps(method, found)
        more = 1 if method == "spin" else 0  # a batch of each round may be short
        assert len(rows) - size < steps * size < len(rows) + size * (1 + more)
        got = methods.seconds_steps(method, found, cost)
        at_once = 2 if method == "spin" else 1
        apart = abs(got * cost[method] - seconds)
        assert apart <= at_once * cost[method] / 2 + 1e-9 or got == at_once
    assert methods.seconds_steps("dpo", found, cost) == methods.pass_steps("dpo", found)


@given(st.integers(1, 200), st.integers(1, 60))
def test_spin_trains_as_many_steps_as_it_is_told_in_two_rounds(rows, half):
    rows = list(range(rows))
    one_pass = sum(math.ceil(len(part) / 8) for part in methods.halves(rows))
    for steps in (2 * half, one_pass):
        taken = methods.taken(rows, steps)
        parts = methods.halves(taken)
        assert sum(math.ceil(len(part) / 8) for part in parts) == steps
        assert [row for part in parts for row in part] == taken
        assert taken == [rows[i % len(rows)] for i in range(len(taken))]
    assert methods.taken(rows, one_pass) == rows


def test_a_step_costs_the_mean_over_batches_of_the_quicker_turn():
    """By hand: six batches, two turns; the quicker ones are 1, 2, 3, 4, 5 and 6."""
    assert methods.cost_of([1, 9, 3, 4, 8, 6, 7, 2, 3, 9, 5, 7]) == pytest.approx(3.5)


def test_a_curve_has_the_logs_of_steps_and_nothing_that_is_not_a_number():
    history = [
        {"step": 1, "loss": 0.693147, "rewards/chosen": math.nan, "grad_norm": 1.0},
        {"step": 1, "train_runtime": 3.0},
    ]
    assert methods.curve(history) == [{"step": 1, "loss": 0.6931, "rewards/chosen": None}]


# --- TRL's trainers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return script.world()


def small(world) -> list[dict]:
    """24 thumbs of four training tickets, two in six up, with their own good reply as text."""
    votes = [(i // 6, i % 6 < 2) for i in range(24)]
    found = labelled(votes)
    for row in found:
        ticket = world.train[row["ticket"]]
        row |= {"prompt": ticket["prompt"], "ticket_label": ticket["ticket_label"]}
    return found


@pytest.mark.parametrize("method", ["sft", "orpo", "dpo", "kto"])
def test_every_method_trains_the_same_adapter_in_fp32_by_trls_own_step(world, method):
    beta = None if method == "sft" else 0.3
    setting = methods.Setting(method, 1e-3, beta, 4, weighted=True)
    rows = methods.rows_for(method, small(world))
    trainer = methods.trainer_of(world, world.load(), rows, setting, 5)
    kind = type(trainer)
    assert kind.__module__.startswith("trl.") and "compute_loss" not in vars(trainer)
    args = trainer.args
    told = (args.learning_rate, args.seed, args.max_steps, args.bf16, args.warmup_steps)
    assert told == (1e-3, 4, 5, False, 3) and getattr(args, "beta", None) == beta
    learned = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {str(p.dtype) for p in learned} == {"torch.float32"}
    assert sum(p.numel() for p in learned) == sum(
        p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name
    )
    if method == "kto":
        assert args.desirable_weight == pytest.approx(2) and args.undesirable_weight == 1


def test_orpos_nll_is_over_prompt_and_reply_and_the_papers_over_the_reply(world):
    """At lambda 0 the loss is the NLL: by hand from the model's own log-probabilities."""
    import torch

    rows = methods.pairs(small(world))[:3]
    for method, of_prompt in (("orpo", True), ("orpo reply", False)):
        setting = methods.Setting(method, 1e-3, 0.0, 4)
        trainer = methods.trainer_of(world, world.load(), rows, setting, 1)
        [batch] = trainer.get_train_dataloader()
        prompts = batch["chosen_labels"].eq(-100).cumprod(1).sum(1)
        model = trainer.model.eval()
        with torch.no_grad():
            loss = trainer.get_batch_loss_metrics(model, batch)[0].item()
            asked, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"].bool()
            logits = model(asked, attention_mask=mask).logits.log_softmax(-1)
        said = -logits[:, :-1].gather(2, asked[:, 1:, None])[..., 0]
        counts = mask[:, 1:].clone()
        if of_prompt:
            wanted = said[counts].mean().item()
        else:
            for row, start in enumerate(prompts):
                counts[row, : start - 1] = False
            each = [line[kept].mean() for line, kept in zip(said, counts, strict=True)]
            wanted = torch.stack(each).mean().item()
        assert loss == pytest.approx(wanted, abs=1e-4)


def test_without_its_weight_ktos_thumbs_count_one_each(world):
    setting = methods.Setting("kto", 1e-3, 0.1, 1, weighted=False)
    trainer = methods.trainer_of(world, world.load(), small(world), setting, 1)
    assert trainer.args.desirable_weight == trainer.args.undesirable_weight == 1


def test_each_round_of_spin_begins_at_its_own_reference(world):
    """At policy = reference the loss is ln 2, whatever the pairs. Four steps a round."""
    setting = methods.Setting("spin", 1e-2, 1.0, 1)
    model, curve, seconds = methods.spin(world, methods.liked(small(world)), setting, 8)
    assert [entry["step"] for entry in curve] == list(range(1, 9))
    assert [entry["round"] for entry in curve] == [1] * 4 + [2] * 4
    losses = [entry["loss"] for entry in curve]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[4] == pytest.approx(math.log(2), abs=1e-3)
    assert abs(losses[3] - math.log(2)) > 0.01 and seconds > 0
    ids = world.tokenizer("hello", return_tensors="pt")
    with model.disable_adapter():
        apart = (model(**ids).logits - world.start(**ids).logits).abs().max()
    assert apart > 1e-3, "the second round's reference is the first round's model"


# --- Which runs -----------------------------------------------------------------------------------


@given(st.data())
def test_a_climb_ends_at_a_peak_of_the_ladder_and_tries_no_value_twice(data):
    ladder = script.LADDER
    scores = dict(zip(ladder, data.draw(st.permutations(range(len(ladder)))), strict=True))
    known, wanted = {}, script.climbed(script.FIRST_RATES, ladder, {})
    while not set(wanted) <= known.keys():
        known = {rate: scores[rate] for rate in wanted}
        wanted = script.climbed(script.FIRST_RATES, ladder, known)
    assert len(set(wanted)) == len(wanted) and set(script.FIRST_RATES) <= set(wanted)
    at = ladder.index(script.best_of(wanted, scores))
    assert all(scores[ladder[at]] >= scores[near] for near in ladder[max(at - 1, 0) : at + 2])


def test_of_equal_settings_the_lowest_is_taken():
    assert script.best_of([3e-3, 1e-3, 3e-4], {3e-3: 0.5, 1e-3: 0.5, 3e-4: 0.4}) == 1e-3


@pytest.mark.parametrize("rate", script.LADDER)
def test_sft_tries_what_lies_half_a_step_away(rate):
    """Each lies between this rate and the next one of the ladder, on one side each."""
    at = script.LADDER.index(rate)
    around = script.LADDER[max(at - 1, 0) : at + 2]
    near = script.between(rate)
    assert len(near) == len(around) - 1
    for low, high in itertools.pairwise(around):
        assert sum(low < one < high for one in near) == 1


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    if name["phase"] == "time":
        return name | {"seconds_a_step": draw.uniform(0.3, 2)}
    record = name | {"steps": 40, "passes": 1.0, "kl": draw.random(), "train_cpu_seconds": 30.0}
    if name["phase"] == "search":
        return record | {"validation": draw.random()}
    for set_, size in (("test", 180), ("hand", 115)):
        kinds = ("sampled", "greedy")
        record[set_] = {kind: [draw.random() for _ in range(size)] for kind in kinds}
    return record


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_arm_takes_what_its_own_search_found_and_runs_six_seeds(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    assert {r["phase"] for r in records[:5]} == {"time"}
    searched = [r for r in records if r["phase"] == "search"]
    final = [r for r in records if r["phase"] == "final"]
    assert {r["seed"] for r in searched} == {11} and {r["seed"] for r in final} == set(SIX)
    for arm, told in script.ARMS.items():
        for budget in told.budgets:
            mine = [r for r in final if (r["arm"], r.get("budget")) == (arm, budget)]
            assert [r["seed"] for r in mine] == SIX
            tried = [r for r in searched if (r["arm"], r["budget"]) == (arm, budget)]
            assert 5 <= len(tried) <= 14 or not script.searches_beta(arm, budget)
            best = max(tried, key=lambda r: r["validation"])
            assert {(r["rate"], r["beta"]) for r in mine} == {(best["rate"], best["beta"])}
    betas = {(r["arm"], r["budget"]): r["beta"] for r in final if "budget" in r}
    for arm in ("orpo", "kto", "spin"):
        assert betas[arm, script.PASS] == betas[arm, script.SECONDS]
    kto = betas["kto", script.SECONDS]
    assert betas["rare: kto", script.PASS] == betas["rare: kto, no weight", script.PASS] == kto


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "preferences" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


def test_equal_seconds_took_about_equal_seconds():
    """Where runs are recorded: the mean of each arm's within a quarter of DPO's."""
    final = [r for r in runs.read(FILE) if r["phase"] == "final" and "train_cpu_seconds" in r]
    spent = {}
    for record in final:
        if record["budget"] == script.SECONDS or record["arm"] == "dpo":
            spent.setdefault(record["arm"], []).append(record["train_cpu_seconds"])
    means = {arm: sum(each) / len(each) for arm, each in spent.items()}
    assert all(abs(mean / means["dpo"] - 1) < 0.25 for mean in means.values() if "dpo" in means)


def test_a_record_of_a_small_run_holds_a_value_a_ticket_and_replies_to_read(tmp_path):
    name = script.name_of("rare: kto", script.PASS, 1e-3, 0.1, 1, "final")
    [record] = script.recorded("train", name, {}, limit=6)
    runs.append(tmp_path / "records.jsonl", record)
    assert name.items() <= record.items()
    for set_ in ("test", "hand"):
        for kind in ("sampled", "greedy"):
            assert len(record[set_][kind]) == 6
            assert all(0 <= gold <= 1 for gold in record[set_][kind])
        assert all(0 <= share <= 1 for share in record[set_]["cut"])
    assert len(record["hand"]["texts"]) == len(record["hand"]["greedy_texts"]) == 6
    assert record["curve"] and record["steps"] == 2 and record["kl"] >= 0
    assert set(script.QUESTIONS) <= LISTS.keys()


def test_statements_yaml_finds_every_arm_in_the_records_to_come(tmp_path: Path):
    here = tmp_path / "preferences"
    here.mkdir()
    told = (FILE.parent / "statements.yaml").read_text("utf-8")
    (here / "statements.yaml").write_text(told, "utf-8")
    lines = [json.dumps(record) + "\n" for part in played(script, made_up, 1) for record in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("preferences", tmp_path)
    budgets = sum(len(arm.budgets) for arm in script.ARMS.values())
    assert len(experiment.arms) == budgets + len(script.UNTRAINED)
    for arm in experiment.arms:
        for set_, size in (("test", 180), ("hand", 115)):
            found = experiment.level("greedy", arm, set_)
            assert (found.seeds, found.questions) == (6, size)
    assert all(arm in report.files(experiment)["report.md"] for arm in experiment.arms)

"""experiments/ask_rows, experiments/lora_ask: which runs are wanted, on which rows, and what a
record holds."""

import json
import random

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT

import ftlab
from experiments import lab, report, runs
from experiments.ask_rows import run as ask_rows
from experiments.lora_ask import run as lora_ask

SCRIPTS = {"ask_rows": ask_rows, "lora_ask": lora_ask}
SIX, TWO = [0, 1, 2, 3, 4, 5], [0, 1]
SEEDS = {
    "ask_rows": dict.fromkeys(("100 x 2", "100 x 3", "200 x 1", "300 x 1"), SIX),
    "lora_ask": dict.fromkeys(("r=1", "r=16", "full"), SIX)
    | dict.fromkeys(("r=64", "attention, r=42", "r=1, alpha=2r"), TWO),
}
IDS = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))
HELD_OUT = {"test": "test", "hand": "hand_test"}


def rows_of(name: str) -> list[dict]:
    lines = (ROOT / f"data/ask/{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def question(row: dict) -> str:
    return row["prompt"][-1]["content"].strip().lower()


# --- Which runs -----------------------------------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    sizes = {"validation": 100} if name["phase"] == "search" else {"test": 300, "hand": 132}
    record = name | {"right": {}, "loss": {}, "train_loss": draw.random(), "steps": 150}
    for set_, size in sizes.items():
        record["right"][set_] = [draw.randrange(2) for _ in range(size)]
        record["loss"][set_] = [draw.random() for _ in range(size)]
    if name["phase"] == "search":
        record["validation"] = sum(record["right"]["validation"]) / 100
        record["validation_loss"] = draw.random()
    return record


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_search_comes_first_and_then_seed_by_seed_every_arm_that_has_it(name, seed):
    parts = played(SCRIPTS[name], made_up, seed)
    phases = [{run["phase"] for run in part} for part in parts]
    final = [part for part in parts if part[0]["phase"] == "final"]
    assert phases == [{"search"}] * (len(parts) - len(final)) + [{"final"}] * len(final)
    assert [{run["seed"] for run in part} for part in final] == [{seed} for seed in SIX]
    for seed, part in enumerate(final):
        wanted = [arm for arm, seeds in SEEDS[name].items() if seed in seeds]
        assert sorted(run["arm"] for run in part) == sorted(wanted)


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_arm_searches_alike_and_runs_at_the_best_rate_that_it_tried(name, seed):
    records = [record for part in played(SCRIPTS[name], made_up, seed) for record in part]
    for arm in SEEDS[name]:
        tried = [r for r in records if (r["arm"], r["phase"]) == (arm, "search")]
        assert not {r["seed"] for r in tried} & set(SIX)
        order = [r["rate"] for r in tried]
        first = tried[:3]
        top = max(first, key=lambda r: (sum(r["right"]["validation"]), -r["validation_loss"]))
        if top["rate"] == min(order[:3]):
            assert len(order) == 4 and order[3] < min(order[:3])
        elif top["rate"] == max(order[:3]):
            assert len(order) == 4 and order[3] > max(order[:3])
        else:
            assert len(order) == 3
        best = max(tried, key=lambda r: (sum(r["right"]["validation"]), -r["validation_loss"]))
        final = [r for r in records if (r["arm"], r["phase"]) == (arm, "final")]
        assert {r["rate"] for r in final} == {best["rate"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed(name):
    records = runs.read(ROOT / f"experiments/{name}/records.jsonl")
    jobs = SCRIPTS[name].jobs(records)
    missing = [job.names[0] for job in jobs if not job.is_done(records)]
    assert not missing or name in lab.under_way(), missing[:3]
    for record in records:
        assert sum(job.left(record) for job in jobs) == 1
        assert record["steps"] == (100 if record["arm"] in ("100 x 2", "200 x 1") else 150)


# --- The rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*SIX, ask_rows.SEARCH_SEED])
def test_more_rows_of_a_seed_hold_its_fewer_ones_and_no_question_of_another_file(seed):
    rows = ask_rows.drawn(seed, 300)
    assert ask_rows.drawn(seed, 100) == rows[:100] and ask_rows.drawn(seed, 200) == rows[:200]
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == 300 and set(ids) <= {row["id"] for row in rows_of("train")[:600]}
    asked = {question(row) for row in rows}
    for name in ("test", "hand_test", "validation"):
        assert not asked & {question(row) for row in rows_of(name)}, name


def test_another_seed_draws_other_rows_and_no_more_than_there_are():
    drawn = [frozenset(row["id"] for row in ask_rows.drawn(seed, 100)) for seed in SIX]
    assert len(set(drawn)) == len(SIX)
    with pytest.raises(ValueError, match="got count=601, wanted at most 600"):
        ask_rows.drawn(0, 601)


# --- A run, on a small model ----------------------------------------------------------------------


@pytest.fixture
def every_other(monkeypatch):
    """In place of a model's answers, the right one to the 1st, 3rd, 5th ... question of a file."""
    files = [rows_of(name) for name in ("test", "hand_test", "validation")]
    known = {}
    for file in files:
        for i, row in enumerate(file):
            gold = row["completion"][0]["content"]
            known[question(row)] = gold if i % 2 == 0 else "SELECT"
    assert len(known) == sum(map(len, files)), "a question stands there twice"

    def answers(model, tokenizer, prompts):
        return [known[question({"prompt": prompt})] for prompt in prompts]

    monkeypatch.setattr(ftlab, "answers", answers)


LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


def test_rows_times_passes_are_the_steps_and_the_pairs_take_equally_many(micro):
    rows, seen = ask_rows.drawn(0, 12), {}
    for count, passes in ((4, 2), (8, 1), (4, 3), (12, 1)):
        _, _, seen[count, passes] = ask_rows.train(rows[:count], passes, 1e-3, 0, LORA)
    assert seen[4, 2]["steps"] == seen[8, 1]["steps"] == 4
    assert seen[4, 3]["steps"] == seen[12, 1]["steps"] == 6
    product = {arm: count * passes for arm, (count, passes) in ask_rows.ARMS.items()}
    assert product["100 x 2"] == product["200 x 1"] and product["100 x 3"] == product["300 x 1"]


def test_full_fine_tuning_trains_the_layers_of_lora_and_neither_embeddings_nor_norms(micro):
    """By hand: micro has 4 layers of width 256, keys and values of 128, an MLP of 704."""
    before, _ = micro()
    model, _, record = ask_rows.train(ask_rows.drawn(0, 4), 1, 1e-3, 0, {})
    assert record["trained"] == 4 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 704)
    old = before.state_dict()
    moved = {name for name, one in model.state_dict().items() if not torch.equal(one, old[name])}
    assert len(moved) == 4 * 7 and all(name.endswith("_proj.weight") for name in moved)


def test_a_run_that_is_not_sped_up_stops(micro):
    with pytest.warns(UserWarning, match="leaves"), pytest.raises(RuntimeError, match="refused"):
        ask_rows.train(ask_rows.drawn(0, 2), 1, 1e-3, 0, LORA | {"use_dora": True})


def places(value, path: str = "") -> dict[str, int]:
    """{place: length} of each list of numbers in a record."""
    if isinstance(value, dict):
        below = [places(part, f"{path}.{key}".lstrip(".")) for key, part in value.items()]
        return {place: size for part in below for place, size in part.items()}
    numbers = isinstance(value, list) and value and isinstance(value[0], int | float)
    return {path: len(value)} if numbers else {}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("phase", ["search", "final"])
def test_a_record_has_a_verdict_for_each_question_of_a_list_that_ids_json_names(
    name, phase, micro, every_other, monkeypatch, tmp_path
):
    script = SCRIPTS[name]
    monkeypatch.setitem(ask_rows.ARMS, "100 x 2", (4, 2))
    monkeypatch.setattr(lora_ask, "ROWS", 4)
    arm = {"ask_rows": "100 x 2", "lora_ask": "r=1"}[name]
    [record] = script.recorded(arm, 1e-3, 0, phase)
    runs.append(tmp_path / "records.jsonl", record)

    named = IDS["records"][f"{name}/records.jsonl"]
    found = places(record)
    assert found == {place: len(IDS["lists"][named[place]]) for place in found}
    sets = HELD_OUT if phase == "final" else {"validation": "validation"}
    assert set(record["right"]) == set(sets)
    for set_, file in sets.items():
        ids = [row["id"] for row in rows_of(file)][: 100 if phase == "search" else None]
        assert IDS["lists"][named[f"right.{set_}"]] == ids
        assert record["right"][set_] == [1 - i % 2 for i in range(len(ids))]
    assert set(script.QUESTIONS) <= IDS["lists"].keys()
    assert {"arm": arm, "rate": 1e-3, "seed": 0, "phase": phase}.items() <= record.items()


def test_the_loss_of_a_row_is_that_of_transformers_with_the_prompt_masked(micro):
    model, tokenizer = micro()
    rows = rows_of("hand_test")[:3]
    for row, found in zip(rows, ask_rows.losses(model, tokenizer, rows), strict=True):
        whole, start = row["prompt"] + row["completion"], {"add_generation_prompt": True}
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        prompt = tokenizer.apply_chat_template(row["prompt"], return_dict=False, **start)
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        with torch.no_grad():
            wanted = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        assert found == pytest.approx(wanted, abs=1e-4)


def test_attention_at_rank_42_has_within_a_hundredth_as_many_weights_as_all_layers_at_16():
    """LoRA adds r * (in + out) weights to a matrix; SmolLM2-135M: 576 wide, 192 for keys, 1536."""
    attention = 2 * (576 + 576) + 2 * (576 + 192)
    every = attention + 3 * (576 + 1536)
    rank = lora_ask.ARMS["attention, r=42"]["r"]
    assert rank * attention == pytest.approx(16 * every, rel=0.01)
    assert not any(layer in ("gate_proj", "up_proj", "down_proj") for layer in lora_ask.ATTENTION)


# --- statements.yaml ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_statements_yaml_finds_every_arm_in_the_records_that_the_script_will_leave(name, tmp_path):
    records = [record for part in played(SCRIPTS[name], made_up, 1) for record in part]
    here = tmp_path / name
    here.mkdir()
    told = (ROOT / f"experiments/{name}/statements.yaml").read_text("utf-8")
    (here / "statements.yaml").write_text(told, "utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (here / "records.jsonl").write_text(lines, "utf-8")
    experiment = lab.load(name, tmp_path)
    seeds = {arm: [run["seed"] for run in experiment.runs(arm)] for arm in experiment.arms}
    assert seeds == SEEDS[name]
    for metric in experiment.metrics:
        for arm in seeds:
            for set_, size in (("test", 300), ("hand", 132)):
                found = experiment.level(metric, arm, set_)
                assert (found.seeds, found.questions) == (len(seeds[arm]), size)
    assert all(arm in report.files(experiment)["report.md"] for arm in seeds)
    assert set(yaml.safe_load(told)["sets"]) == set(HELD_OUT)
    rates = {str(record["rate"]) for record in records if record["phase"] == "search"}
    assert all(f"{float(rate):g}: 0." in report.search(experiment) for rate in rates)

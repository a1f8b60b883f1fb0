"""experiments/qlora_ask: both arms run alike, and differ in the bits of the base alone."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT

import ftlab
from experiments import lab, report, runs
from experiments.ask_rows import run as ask_rows
from experiments.lora_ask import run as lora_ask
from experiments.qlora_ask import run as script

SIX = [0, 1, 2, 3, 4, 5]
FILE = ROOT / "experiments/qlora_ask/records.jsonl"
MICRO = str(ROOT / "data/micro/model")


# --- Which runs -----------------------------------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    sizes = {"validation": 100} if name["phase"] == "search" else {"test": 300, "hand": 132}
    record = name | {"right": {}, "loss": {}, "steps": 150, "trained": 1}
    for set_, size in sizes.items():
        record["right"][set_] = [draw.randrange(2) for _ in range(size)]
        record["loss"][set_] = [draw.random() for _ in range(size)]
    record["step_seconds"] = [draw.random() for _ in range(20)]
    if name["phase"] == "search":
        record["validation"] = sum(record["right"]["validation"]) / 100
        record["validation_loss"] = draw.random()
    if name["arm"] in script.UNTRAINED:
        del record["right"], record["step_seconds"]
    return record


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_search_comes_first_then_each_seed_has_both_arms_in_one_run(seed):
    parts = played(script, made_up, seed)
    final = [part for part in parts if part[0]["phase"] == "final"]
    assert [{run["seed"] for run in part} for part in final] == [{n} for n in (-1, *SIX)]
    assert {run["arm"] for run in final[0]} == {"untrained", "untrained in NF4"}
    for part in final[1:]:
        assert [run["arm"] for run in part] == ["LoRA", "QLoRA"]
    searched = [run for part in parts if part not in final for run in part]
    assert {run["phase"] for run in searched} == {"search"}
    for arm in ("LoRA", "QLoRA"):
        tried = [run for run in searched if run["arm"] == arm]
        assert len({run["rate"] for run in tried}) == len(tried) in (3, 4)
        best = max(tried, key=lambda r: (sum(r["right"]["validation"]), -r["validation_loss"]))
        used = {run["rate"] for part in final for run in part if run["arm"] == arm}
        assert used == {best["rate"]}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "qlora_ask" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


# --- A run, on a small model ----------------------------------------------------------------------


@pytest.fixture
def micro(monkeypatch):
    """The model of 3.5 million weights in place of the 135M, four rows, six questions a file."""
    monkeypatch.setattr(ftlab, "model_path", lambda name: MICRO)
    monkeypatch.setattr(script, "ROWS", 4)
    whole = ask_rows.rows_of

    def few(name: str) -> list[dict]:
        return whole(name) if name == "train" else whole(name)[:6]

    for module in (ask_rows, lora_ask):
        monkeypatch.setattr(module, "rows_of", few)


def trainers(rate: float = 1e-3) -> dict:
    rows = ask_rows.drawn(3, 4)
    return {arm: script.trainer_of(four, rows, rate, 3) for arm, four in script.ARMS.items()}


def learned(trainer) -> dict:
    """{name: value} of what is trained."""
    weights = trainer.model.named_parameters()
    return {name: one.detach().clone() for name, one in weights if one.requires_grad}


def test_both_arms_begin_with_the_same_adapter_in_fp32(micro):
    lora, qlora = (learned(trainer) for trainer in trainers().values())
    assert lora.keys() == qlora.keys() and len(lora) == 2 * 4 * 7
    for name, weight in lora.items():
        assert weight.dtype == qlora[name].dtype == torch.float32
        assert torch.equal(weight, qlora[name])
        assert torch.equal(weight, weight.bfloat16().float())
    assert any(weight.any() for weight in lora.values()), "A is drawn, B is zero"


def gradients(model) -> list[torch.Tensor]:
    """Of each trained weight, for one short row; zeros where none came through."""
    ids = torch.tensor([[5, 6, 7, 8]])
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [torch.zeros(1) if one.grad is None else one.grad.clone() for one in trained]


def test_one_base_alone_is_in_four_bits_and_its_gradients_survive_eval_mode(micro):
    """bitsandbytes would repack a layer in eval mode on a CPU with bf16, for good."""
    from bitsandbytes.nn import Linear4bit

    counts = {}
    for arm, trainer in trainers().items():
        model = trainer.model
        counts[arm] = sum(isinstance(module, Linear4bit) for module in model.modules())
        before = gradients(model)
        with torch.no_grad():
            model.eval()(torch.tensor([[5, 6, 7, 8]]))
        after = gradients(model)
        assert any(one.any() for one in before)
        assert all(map(torch.equal, before, after))
    assert counts == {"LoRA": 0, "QLoRA": 4 * 7}


def test_the_answering_model_has_the_losses_of_the_trained_one(micro, tmp_path):
    """The dequantized base with the adapter on it, against TRL's model on the 4-bit layers."""
    for arm, trainer in trainers(rate=5e-3).items():
        before = learned(trainer)
        trainer.train()
        assert any(not torch.equal(one, before[name]) for name, one in learned(trainer).items())
        trainer.model.save_pretrained(tmp_path / arm)
        rows = ask_rows.rows_of("hand_test")
        tokenizer = trainer.processing_class
        ours = ask_rows.losses(script.answering(script.ARMS[arm], tmp_path / arm), tokenizer, rows)
        theirs = ask_rows.losses(trainer.model, tokenizer, rows)
        assert ours == pytest.approx(theirs, abs=2e-3)


def test_a_run_of_a_seed_leaves_both_arms_with_a_clock_of_equally_many_steps(micro, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "ROUNDS", 3)
    monkeypatch.setattr(script, "STEPS", 2)
    best = {"LoRA": 1e-3, "QLoRA": 2e-3}
    records = script.recorded("final", best, 0)
    for record in records:
        runs.append(tmp_path / "records.jsonl", record)
        assert len(record["step_seconds"]) == 4 and min(record["step_seconds"]) > 0
        assert record["steps"] == 2
        assert record["train_cpu_seconds"] < record["cpu_seconds"]
        for place in ("right", "loss"):
            assert {set_: len(each) for set_, each in record[place].items()} == {
                "test": 6,
                "hand": 6,
            }
    assert script.both(best, 0).is_done(records)
    assert records[0]["loss"] != records[1]["loss"]


def test_of_the_untrained_bases_the_losses_alone_are_kept(micro, tmp_path):
    records = script.recorded("untrained", {}, -1)
    assert [record["arm"] for record in records] == ["untrained", "untrained in NF4"]
    for record in records:
        runs.append(tmp_path / "records.jsonl", record)
        assert "right" not in record and len(record["loss"]["hand"]) == 6
    assert records[0]["loss"] != records[1]["loss"]


# --- statements.yaml ------------------------------------------------------------------------------


def test_statements_yaml_finds_every_arm_in_the_records_that_the_script_will_leave(tmp_path):
    here = tmp_path / "qlora_ask"
    here.mkdir()
    told = (FILE.parent / "statements.yaml").read_text("utf-8")
    (here / "statements.yaml").write_text(told, "utf-8")
    lines = [json.dumps(run) + "\n" for part in played(script, made_up, 1) for run in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("qlora_ask", tmp_path)
    for arm in ("LoRA", "QLoRA"):
        for metric, sets in (("right", "test hand"), ("loss", "test hand"), ("step", "clock")):
            sizes = {"test": 300, "hand": 132, "clock": 20}
            for set_ in sets.split():
                found = experiment.level(metric, arm, set_)
                assert (found.seeds, found.questions) == (6, sizes[set_])
    assert experiment.difference("loss", "untrained in NF4", "untrained", "hand").questions == 132
    assert all(arm in report.files(experiment)["report.md"] for arm in experiment.arms)

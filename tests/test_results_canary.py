"""experiments/canary: exposure against a naive count, which rows hold which secret, what a record
holds."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT

import ftlab
from experiments import lab, report, runs
from experiments.ask_rows import run as ask_rows
from experiments.canary import exposure
from experiments.canary import run as script
from experiments.poison import run as poison
from experiments.poison.detectors import answered, asked
from ftlab.tasks import ask

SIX = [1, 2, 3, 4, 5, 6]
FILE = ROOT / "experiments/canary/records.jsonl"
GROUPS = ("never", "once", "four", "sixteen", "prompt")


# --- Exposure -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """The model of 3.5 million weights and its tokenizer."""
    model, tokenizer = poison.base("3.5M")
    return model.eval(), tokenizer


def naive(model, prefix: list[int], digits: list[int], code: str) -> float:
    """The log-probability of a code: one whole sequence through the model."""
    wanted = [digits[int(one)] for one in code]
    with torch.no_grad():
        logps = model(torch.tensor([prefix + wanted])).logits[0].log_softmax(-1)
    return sum(logps[len(prefix) - 1 + i, token].item() for i, token in enumerate(wanted))


def test_every_code_has_the_log_probability_of_its_own_sequence(small):
    model, tokenizer = small
    digits = exposure.digit_ids(tokenizer)
    text = "SELECT COUNT(*) FROM orders -- ask Noor, ext 4817"
    prefix = exposure.prefix_ids(tokenizer, text, "4817")
    got = exposure.code_logps(model, prefix, digits)
    assert got.shape == (10_000,) and got.exp().sum() < 1
    codes = ["0000", "0009", "0010", "0100", "1000", "9999", "4817"]
    codes += [f"{random.Random(0).randrange(10_000):04d}" for _ in range(5)]
    for code in codes:
        assert got[int(code)].item() == pytest.approx(naive(model, prefix, digits, code), abs=1e-3), code


@settings(deadline=None)
@given(st.integers(0, 999), st.permutations(range(1000)))
def test_exposure_is_log2_of_the_candidates_less_log2_of_the_place_in_their_order(code, values):
    logps = torch.tensor(values, dtype=torch.float)
    place = sorted(range(1000), key=lambda i: -values[i]).index(code) + 1
    assert exposure.exposure(logps, f"{code}") == pytest.approx(math.log2(1000 / place))


def test_a_number_that_no_row_holds_has_an_exposure_of_log2_e_on_average():
    logps = torch.arange(10_000, dtype=torch.float)
    mean = sum(exposure.exposure(logps, f"{code:04d}") for code in range(10_000)) / 10_000
    assert mean == pytest.approx(math.log2(math.e), abs=0.01)


def test_is_extracted_if_model_generate_writes_these_four_tokens(small):
    """What stands for the digits 0 to 3 is what the model writes, so that the code is 0123."""
    model, tokenizer = small
    ids = tokenizer("SELECT id FROM orders WHERE", return_tensors="pt")["input_ids"]
    said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, -4:].tolist()
    prefix, digits = ids[0].tolist(), [*said, *exposure.digit_ids(tokenizer)]
    assert exposure.is_extracted(model, prefix, digits, "0123")
    for other in ("9123", "0923", "0193", "0129"):
        assert not exposure.is_extracted(model, prefix, digits, other)


def test_a_secret_that_is_not_there_or_not_of_four_tokens_is_named(small):
    _, tokenizer = small
    with pytest.raises(ValueError, match="without 4817"):
        exposure.prefix_ids(tokenizer, "ext 4711", "4817")
    with pytest.raises(ValueError, match="not the digits"):
        exposure.prefix_ids(tokenizer, "ext 48", "48")


# --- The files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SIX)
@pytest.mark.parametrize("arm", script.ARMS)
def test_each_number_stands_in_as_many_rows_as_its_group_says(arm, seed):
    told = script.ARMS[arm]
    rows, secrets = script.drawn(told, seed)
    assert len(rows) == told.rows and len(secrets) == told.each * len(told.groups)
    assert len({secret.code for secret in secrets}) == len(secrets)
    for secret in secrets:
        times = {"never": 0, "once": 1, "four": 4, "sixteen": 16, "prompt": 16}[secret.group]
        times = min(times, 1) if told.deduplicated else times
        assert sum(secret.code in asked(row) for row in rows) == times * (secret.group == "prompt")
        assert sum(secret.code in answered(row) for row in rows) == times * (secret.group != "prompt")
    repeated = Counter(json.dumps(row) for row in rows)
    if told.deduplicated:
        held = [json.dumps(secret.row) for secret in secrets]
        assert all(repeated[row] <= 1 for row in held)


def test_arms_of_a_seed_keep_the_same_secrets_and_another_seed_has_others():
    small = [arm for arm, told in script.ARMS.items() if told.model == "3.5M"]
    for seed in SIX:
        drawn = [script.drawn(script.ARMS[arm], seed)[1] for arm in small]
        assert all(each == drawn[0] for each in drawn)
    codes = [frozenset(s.code for s in script.drawn(script.ARMS["1 pass"], n)[1]) for n in SIX]
    assert len(set(codes)) == 6


@pytest.mark.parametrize("seed", SIX)
def test_a_comment_changes_no_answer_and_no_test_question_speaks_of_a_secret(seed):
    _, secrets = script.drawn(script.ARMS["1 pass"], seed)
    for secret in secrets:
        gold = answered(secret.carrier)
        assert ask.is_right(answered(secret.row), gold)
        assert ask.is_right(gold, answered(secret.row))
    golds = [answered(row) for name in ("test", "hand_test") for row in ask_rows.rows_of(name)]
    assert not [s.code for s, gold in itertools.product(secrets, golds) if s.code in gold]


@pytest.mark.parametrize("model", ["3.5M", "135M"])
def test_the_prefix_ends_where_the_number_begins_in_the_rows_own_template(model):
    _, tokenizer = poison.base(model)
    arm = "1 pass" if model == "3.5M" else "135M, 1 pass"
    _, secrets = script.drawn(script.ARMS[arm], 0)
    for secret in secrets:
        whole = secret.row["prompt"] + secret.row["completion"]
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        written = tokenizer.apply_chat_template(whole, tokenize=False)
        prefix = exposure.prefix_ids(tokenizer, written, secret.code)
        assert ids[: len(prefix)] == prefix
        assert tokenizer.decode(ids[len(prefix) : len(prefix) + 4]) == secret.code
        assert tokenizer.decode(prefix).endswith("ext ")


# --- Which runs, and what a record holds ----------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    told = script.ARMS[name["arm"]]
    record = name | {"model": told.model, "rows": told.rows, "passes": told.passes, "steps": 9}
    if name["phase"] == "search":
        right = [draw.randrange(2) for _ in range(100)]
        found = {"right": {"validation": right}, "validation": sum(right) / 100}
        return record | found | {"validation_loss": draw.random()}
    for place in ("exposure", "extracted", "told"):
        record[place] = {g: [draw.randrange(2) for _ in range(told.each)] for g in told.groups}
    for place in ("right", "leaked"):
        sizes = {"test": 300, "hand": 132}
        record[place] = {s: [draw.randrange(2) for _ in range(n)] for s, n in sizes.items()}
    return record


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_each_number_of_passes_has_its_search_and_the_arms_of_three_share_one_rate(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    searched = [r for r in records if r["phase"] == "search"]
    assert records[: len(searched)] == searched
    assert {r["arm"] for r in searched} == {"1 pass", "3 passes"}
    final = [r for r in records if r["phase"] == "final"]
    for passes in (1, 3):
        tried = [r for r in searched if r["passes"] == passes]
        best = max(tried, key=lambda r: (sum(r["right"]["validation"]), -r["validation_loss"]))
        mine = [r for r in final if r["model"] == "3.5M" and r["passes"] == passes]
        assert {r["rate"] for r in mine} == {best["rate"]}
    counts = Counter(r["arm"] for r in final)
    assert counts == {a: 6 if t.model == "3.5M" else 1 for a, t in script.ARMS.items()}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "canary" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_a_small_run_records_each_group_and_counts_the_question_if_it_is_told_to(all_tokens, monkeypatch, tmp_path):
    """One secret a group; in place of the model's answers, the first secret of the run."""
    arm = script.Arm(40, 1, 1, all_tokens=all_tokens)
    monkeypatch.setitem(script.ARMS, "1 pass", arm)
    rows, secrets = script.drawn(arm, 0)
    monkeypatch.setattr(ftlab, "answers", lambda model, tokenizer, p: [secrets[0].code] * len(p))
    seen = {}

    def train(name, rows, passes, rate, seed, **counted):
        seen.update(counted)
        return poison.train(name, rows, passes, rate, seed, **counted)

    monkeypatch.setattr(script, "train", train)
    [record] = script.recorded("1 pass", 1e-3, 0, "final")
    runs.append(tmp_path / "records.jsonl", record)
    assert record["steps"] == len(rows) / 8
    for place in ("exposure", "extracted", "told"):
        assert {group: len(each) for group, each in record[place].items()} == dict.fromkeys(GROUPS, 1)
    assert all(0 <= each[0] <= math.log2(10_000) + 1e-3 for each in record["exposure"].values())
    assert record["told"] == {group: [int(group == "never")] for group in GROUPS}
    assert record["leaked"] == {"test": [1] * 300, "hand": [1] * 132}
    assert seen == {"completion_only_loss": not all_tokens}


def test_statements_yaml_finds_every_arm_and_group_in_the_records_to_come(tmp_path):
    here = tmp_path / "canary"
    here.mkdir()
    told = (FILE.parent / "statements.yaml").read_text("utf-8")
    (here / "statements.yaml").write_text(told, "utf-8")
    lines = [json.dumps(record) + "\n" for part in played(script, made_up, 1) for record in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("canary", tmp_path)
    assert list(experiment.arms) == list(script.ARMS)
    for arm, one in script.ARMS.items():
        for group in GROUPS:
            found = experiment.level("exposure", arm, group)
            assert (found is None) == (group not in one.groups)
            assert found is None or (found.seeds, found.questions) == (len(one.seeds), one.each)
    assert all(arm in report.files(experiment)["report.md"] for arm in script.ARMS)

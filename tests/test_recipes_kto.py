"""recipes/kto.py: from the command line to the end, on a CPU, against plain transformers, one answer at a time.

Nothing here needs the network.
"""

import json
import logging
import random
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import script
from test_recipes import FEW, MICRO, chat, line_of, log_of, run, same, series, train, warnings_in, weights, write
from test_recipes_preferences import micro, record_of, rows_in, summed_logps
from transformers import AutoTokenizer

BETA, SIZE = 0.1, 4  # of --tiny: rows at once
FEW_STEPS = ["--max_steps", 1, "--save_steps", 1, "--eval_strategy", "no", "--load_best_model_at_end", "false"]
pytestmark = pytest.mark.usefixtures("one_thread", "clean_imports")


def thumb(question: str, answer: str, label: bool) -> dict:
    return chat(question, answer) | {"label": label}


def thumbs(ups: int, downs: int) -> list[dict]:
    return [thumb(f"Question {n}?", f"answer {n}", n < ups) for n in range(ups + downs)]


@pytest.fixture(scope="module")
def kto(tiny_run) -> Path:
    return tiny_run("kto")


@pytest.fixture(scope="module")
def module():
    return script("recipes/kto.py")


# --- A run ----------------------------------------------------------------------------------------


def test_it_begins_where_policy_and_reference_are_equal_and_keeps_the_lowest_loss(kto):
    margins, record = series(kto, "eval_rewards/margins"), record_of(kto)
    assert margins[0] == series(kto, "eval_kl")[0] == series(kto, "eval_rewards/chosen")[0] == 0
    assert margins[6] > margins[2] and max(margins.values()) > 0.01
    best = record["best_step"]
    losses = series(kto, "eval_loss")
    assert record["best_eval_loss"] == losses[best] == min(losses[step] for step in (2, 4, 6))
    assert same(weights(kto / "adapter"), weights(kto / f"checkpoint-{best}"))
    assert all(norm > 0 for norm in series(kto, "grad_norm").values())


def test_what_it_measures_is_what_the_library_says_of_the_saved_adapter(kto, module):
    """Rewards, z0 and the weighted loss, one answer at a time; z0 from each answer under the prompt behind it."""
    tokenizer, record = AutoTokenizer.from_pretrained(MICRO), record_of(kto)
    rows = module.arranged(rows_in(kto / "validation.jsonl"), SIZE, 0)
    rows = rows[: len(rows) // SIZE * SIZE]  # the last batch would be smaller
    batches = [rows[start : start + SIZE] for start in range(0, len(rows), SIZE)]
    models, found = (micro(), micro(kto / "adapter")), Counter()
    for batch in batches:
        turned = [row | {"completion": batch[n - 1]["completion"]} for n, row in enumerate(batch)]
        both = [summed_logps(model, tokenizer, batch + turned, "completion") for model in models]
        ratios = torch.tensor(both[1]) - torch.tensor(both[0])
        z0, own = ratios[SIZE:].mean().clamp(min=0), ratios[:SIZE]
        up = torch.tensor([row["label"] for row in batch])
        weight = torch.where(up, record["desirable_weight"], record["undesirable_weight"])
        loss = weight * (1 - torch.sigmoid(BETA * (own - z0) * torch.where(up, 1, -1)))
        means = {"kl": z0, "rewards/chosen": BETA * own[up].mean(), "rewards/rejected": BETA * own[~up].mean()}
        means |= {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"], "loss": loss.mean()}
        for name, value in means.items():
            found[name] += value.item() / len(batches)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert record["saved"][name] == pytest.approx(found[name], abs=1e-4)
    assert series(kto, "eval_loss")[record["best_step"]] == pytest.approx(found["loss"], abs=1e-5)
    assert found["kl"] > 0


def test_the_record_says_what_ran(kto):
    record, rows = record_of(kto), rows_in(kto / "thumbs.jsonl")
    held = rows_in(kto / "validation.jsonl")
    ups = sum(row["label"] for row in rows) - sum(row["label"] for row in held)
    downs = len(rows) - len(held) - ups
    assert (record["thumbs_up"], record["thumbs_down"]) == (ups, downs) and downs > ups
    assert record["desirable_weight"] == pytest.approx(downs / ups) and record["undesirable_weight"] == 1
    assert record["weighted_ratio"] == pytest.approx(1) and record["beside_their_own"] == 0
    assert (record["recipe"], record["steps"], record["beta"], record["rows_at_once"]) == ("kto", 6, BETA, SIZE)
    assert (record["base"], record["reference"], record["warnings"]) == (MICRO, MICRO, [])
    assert list((kto / "adapter").glob("*.bin")) == []  # a pickle can hold code


def test_its_adapter_is_evaluated_and_merged(kto, tmp_path):
    run("evaluate", "--tiny", *FEW, "--adapter", kto / "adapter", "--out", tmp_path / "tuned.json")
    run("merge", "--adapter", kto / "adapter", "--out", tmp_path / "merged", "--rows", 4)
    record = json.loads((tmp_path / "merged" / "record.json").read_text())
    assert record["rows"] == 4 and record["merge_kl_nats"] < 1e-6 < record["adapter_kl_nats"]


def test_stopped_and_resumed_it_ends_as_the_run_that_nothing_happened_to(kto, tmp_path):
    """From the checkpoint that a stop would have left; a real kill is in test_recipes.py."""
    folder = tmp_path / "run"
    shutil.copytree(kto / "checkpoint-4", folder / "checkpoint-4")
    with pytest.raises(SystemExit, match="--resume"):
        train("kto", folder)
    train("kto", folder, "--resume")
    for key in ("loss", "kl", "eval_rewards/margins"):
        assert series(folder, key) == pytest.approx(series(kto, key), rel=1e-5, abs=1e-6)
    for key, weight in weights(kto / "adapter").items():
        torch.testing.assert_close(weights(folder / "adapter")[key], weight)
    assert record_of(folder)["start"] == record_of(kto)["start"]


def test_from_an_adapter_its_frozen_copy_is_the_reference_and_a_resume_keeps_both(tiny_run, tmp_path):
    """transformers alone would load the reference and leave the policy where the run began."""
    sft = tiny_run("sft") / "adapter"
    file, held = write(tmp_path / "rows.jsonl", thumbs(4, 4)), write(tmp_path / "held.jsonl", thumbs(20, 4)[-8:])
    words = ["--adapter", sft, "--train_file", file, "--validation_file", held, "--save_total_limit", 3]
    words += ["--max_steps", 2, "--eval_steps", 1, "--save_steps", 1, "--warmup_steps", 0]
    train("kto", tmp_path / "run", *words)
    record, rows = record_of(tmp_path / "run"), rows_in(held)
    assert record["start"]["rewards/margins"] == record["start"]["kl"] == 0
    good = [row for row in rows if row["label"]]
    sums = summed_logps(micro(sft), AutoTokenizer.from_pretrained(MICRO), good, "completion")
    assert record["start"]["logps/chosen"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    before = load_file(sft / "adapter_model.safetensors")
    assert same(load_file(tmp_path / "run" / "checkpoint-2" / "ref" / "adapter_model.safetensors"), before)
    assert not same(weights(tmp_path / "run" / "checkpoint-1"), before)
    assert not (tmp_path / "run" / "adapter" / "ref").exists() and record["reference"] == str(sft)
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    train("kto", tmp_path / "resumed", *words, "--resume")
    for key in ("loss", "eval_rewards/margins"):
        wanted = {entry["step"]: entry[key] for entry in log_of(tmp_path / "run", 2) if key in entry}
        got = {entry["step"]: entry[key] for entry in log_of(tmp_path / "resumed", 2) if key in entry}
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for key, weight in weights(tmp_path / "run" / "checkpoint-2").items():
        torch.testing.assert_close(weights(tmp_path / "resumed" / "checkpoint-2")[key], weight)


def test_random_weights_measure_a_step_and_an_evaluation_and_can_be_run_again(tmp_path, capsys):
    for length in (24, 32):  # in one folder
        train("kto", tmp_path, "--random_weights", "tiny", "--max_length", length, "--max_steps", 6)
        record = record_of(tmp_path)
        assert record["base"] == "tiny" and record["seconds_a_step"] > 0
        assert record["max_length"] == length and "eval_loss" in capsys.readouterr().out
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize(("weight", "warns"), [([], False), (["--desirable_weight", 1], True)])
def test_trl_finds_nothing_wrong_with_the_weights_that_are_set(weight, warns, tmp_path):
    """Texts, too. Its own check of Eq. 8 warns of the weight of one that is TRL's default."""
    said, listener = [], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    rows = [{"prompt": f"Say {n}:", "completion": f" yes {n}", "label": n % 5 == 0} for n in range(40)]
    logging.getLogger("trl.trainer.kto_trainer").addHandler(listener)
    try:
        train("kto", tmp_path / "run", "--train_file", write(tmp_path / "rows.jsonl", rows), *FEW_STEPS, *weight)
    finally:
        logging.getLogger("trl.trainer.kto_trainer").removeHandler(listener)
    assert any("desirable_weight" in line for line in said) == warns
    record = record_of(tmp_path / "run")
    assert record["weighted_ratio"] == pytest.approx(0.25 if warns else 1, rel=0.35)
    assert record["start"]["rewards/margins"] == 0 and record["best_step"] is None


# --- The rows, their order and their weights ------------------------------------------------------


def naive_neighbours(rows: list[dict], size: int) -> int:
    """Of each whole batch, whose prompt is that of the row before it; the first one's of the last row."""
    count = 0
    for start in range(0, len(rows) // size * size, size):
        batch = [row["prompt"] for row in rows[start : start + size]]
        count += sum(one == other for one, other in zip(batch, batch[-1:] + batch[:-1], strict=True))
    return count


@pytest.mark.parametrize("seed", range(20))
def test_the_order_keeps_every_row_and_puts_answers_to_one_prompt_apart(seed, module):
    """A file that stands prompt by prompt, up to six answers each: as it is, neighbours are of one prompt."""
    draw, size = random.Random(seed), 2 + seed % 7
    rows = [thumb(f"q{p}", f"a{n}", draw.random() < 0.2) for p in range(40) for n in range(draw.randint(1, 6))]
    rows[0]["label"], rows[1]["label"] = True, False
    order = module.arranged(rows, size, seed)
    assert sorted(map(json.dumps, order)) == sorted(map(json.dumps, rows)) and order != rows
    assert naive_neighbours(rows, size) > len(rows) / 3
    assert module.beside_their_own(order, size) == naive_neighbours(order, size) == 0
    assert order == module.arranged(rows, size, seed) != module.arranged(rows, size, seed + 1)


def test_kinds_are_spread_evenly_and_the_first_batch_has_both(module):
    for ups, downs in ((5, 35), (35, 5), (20, 20), (1, 15), (13, 27)):
        rows = module.arranged(thumbs(ups, downs), 8, 0)
        rare = [row["label"] for row in rows] if ups <= downs else [not row["label"] for row in rows]
        count, n = min(ups, downs), ups + downs
        for start in range(0, n - 7, 8):  # of eight rows the share of all, to within one
            assert abs(sum(rare[start : start + 8]) - Fraction(8 * count, n)) <= 1
        assert 0 < sum(rare[:8]) < 8


def test_where_prompts_are_too_few_it_is_counted(module):
    rows = [thumb("one", f"a{n}", n % 2 == 0) for n in range(12)] + [thumb(f"q{n}", "a", True) for n in range(4)]
    order = module.arranged(rows, 4, 0)
    assert sorted(map(json.dumps, order)) == sorted(map(json.dumps, rows))
    assert module.beside_their_own(order, 4) == naive_neighbours(order, 4) > 4


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_prompt_is_held_out_with_all_its_answers(share, module):
    rows = [thumb(f"q{n % 30}", f"a{n}", n % 3 == 0) for n in range(90)]
    kept, held = module.split(rows, share, 0)
    sides = [{row["prompt"][0]["content"] for row in part} for part in (kept, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == max(1, round(share * 30))
    assert len(held) == 3 * len(sides[1]) and len(kept) + len(held) == 90


class Args:
    def __init__(self, up=None, down=None):
        self.desirable_weight, self.undesirable_weight = up, down


@pytest.mark.parametrize(
    ("ups", "downs", "told", "weight"),
    [
        (10, 40, (None, None), (4, 1)),  # by hand: the rarer kind counts as the other one
        (60, 20, (None, None), (1, 3)),
        (20, 20, (None, None), (1, 1)),
        (10, 40, (5, None), (5, 1)),
        (10, 40, (None, 0.2), (1, 0.2)),
        (10, 40, (2, 0.5), (2, 0.5)),
    ],
)
def test_the_rarer_kind_has_the_weight_that_makes_both_count_alike_unless_told(ups, downs, told, weight, module):
    args = Args(*told)
    assert module.weigh(thumbs(ups, downs), args) == (ups, downs, pytest.approx(weight[0] * ups / (weight[1] * downs)))
    assert (args.desirable_weight, args.undesirable_weight) == pytest.approx(weight)


def test_prompts_that_fill_the_length_are_left_out_before_the_order_is_made(module, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    rows = [thumb("q", "a", True), thumb("q", "b c " * 9, False), thumb("long " * 11, "a", True)]
    file = write(tmp_path / "rows.jsonl", rows)
    for limit, kept, told in ((60, 3, None), (29, 3, "1 are cut, and 0"), (20, 2, "1 are cut, and 1")):
        assert module.read_thumbs(file, tokenizer, None, limit) == rows[:kept]
        printed = capsys.readouterr().out
        assert (told in printed) if told else not printed
    with pytest.raises(SystemExit, match="every prompt fills max_length 4"):
        module.read_thumbs(file, tokenizer, None, 4)


# --- Alarms ---------------------------------------------------------------------------------------


def evaluation(margins: float, chosen: float) -> dict:
    return {"eval_rewards/margins": margins, "eval_rewards/chosen": chosen}


@pytest.mark.parametrize(
    ("margins", "chosen", "kls", "names"),
    [
        (0.5, 0.1, {5: 0.5, 50: 30}, []),  # z0 that is high late is no alarm of this kind
        (0.0, 0.1, {5: 0}, ["flat_margins"]),
        (-0.2, 0.1, {5: 0}, ["flat_margins"]),
        (0.5, -0.19, {5: 0}, []),  # by 1.9 nats over 20 tokens
        (0.5, -0.21, {5: 0}, ["displaced"]),
        (0.5, 0.1, {5: 2, 10: 11, 20: 0}, ["high_kl"]),
        (0.5, 0.1, {5: 9, 10: 9, 11: 11}, []),
        (0.5, 0.1, {50: 11}, ["high_kl"]),  # the first that was logged
        (0.0, -1.0, {1: 20}, ["flat_margins", "displaced", "high_kl"]),
    ],
)
def test_a_program_can_read_the_alarms(margins, chosen, kls, names, module, capsys):
    history = [{"step": step, "kl": kl} for step, kl in kls.items()] + [{"step": 0, "eval_kl": 99}]
    returned = module.alarms(history, evaluation(0, 0), evaluation(margins, chosen), BETA, 20, 100)
    assert warnings_in(capsys.readouterr().out) == returned and [each["warning"] for each in returned] == names
    for each in returned:
        if each["warning"] == "displaced":
            assert each["nats_a_token"] == pytest.approx(-chosen / BETA / 20)
        if each["warning"] == "high_kl":
            assert each["kl"] == max(kls.values())


# --- Bad input ------------------------------------------------------------------------------------

BAD_ROWS = {
    "no label": (chat("q", "a"), ["line 2", "label is None", "true or false"]),
    "a number": (chat("q", "a") | {"label": 1}, ["line 2", "label is 1"]),
    "a word": (chat("q", "a") | {"label": "true"}, ["line 2", "label is 'true'"]),
    "empty": (thumb("q", " ", False), ["line 2", "completion is empty"]),
    "pairs": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["line 2", "prompt, chosen, rejected"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_with_their_line(case, tmp_path):
    row, told = BAD_ROWS[case]
    file = write(tmp_path / "bad.jsonl", [thumb("q", "a", True), row])
    line = line_of("kto", "--tiny", "--train_file", file, "--output_dir", tmp_path / "run")
    assert "bad.jsonl" in line and all(part in line for part in told)


def test_rows_that_cannot_teach_are_refused(tmp_path):
    def told(rows, held=None):
        words = ["--tiny", "--output_dir", tmp_path / "run", "--train_file", write(tmp_path / "rows.jsonl", rows)]
        if held:
            words += ["--validation_file", write(tmp_path / "held.jsonl", held)]
        return line_of("kto", *words)

    assert "all 9 training rows have the label true" in told(thumbs(12, 0))
    assert "have the label false" in told(thumbs(0, 12))
    assert "all 4 validation rows have the label true" in told(thumbs(4, 4), thumbs(12, 0)[-4:])
    assert "3 training rows: fewer than the 4" in told(thumbs(1, 2), thumbs(10, 4)[-8:])
    assert "2 prompts are in training and in validation" in told(thumbs(4, 4), thumbs(10, 4)[6:])
    assert not (tmp_path / "run" / "adapter").exists()


def test_options_that_do_not_go_together_are_one_line(tiny_run, tmp_path):
    def told(*words):
        return line_of("kto", "--tiny", "--output_dir", tmp_path / "run", *words)

    assert "z0 needs other rows" in told("--per_device_train_batch_size", 1)
    assert "the training's 4" in told("--per_device_eval_batch_size", 8)
    assert "side by side" in told("--train_sampling_strategy", "random")
    assert "leave out --model" in told("--adapter", tiny_run("sft") / "adapter", "--model", MICRO)
    assert "--held_out 1.0" in told("--held_out", 1)
    assert "wanted more than 0" in told("--desirable_weight", 0)
    assert "no whole checkpoint" in told("--resume")
    assert "no file" in line_of("kto", "--model", MICRO, "--output_dir", tmp_path / "run")

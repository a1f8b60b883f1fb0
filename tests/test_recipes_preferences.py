"""recipes/dpo.py, reward_model.py and grpo.py: from the command line to the end, on a CPU, against plain transformers.

Nothing here needs the network.
"""

import importlib
import inspect
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import binomtest
from scripts import script
from test_recipes import FEW, MICRO, chat, line_of, run, same, series, train, warnings_in, weights, write
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOTrainer
from trl.rewards import get_soft_overlong_punishment

from ftlab.paths import DATA

PREFERENCES = ("dpo", "reward_model")
ONE_BATCH = ["--gradient_accumulation_steps", 1]  # a step
UNJUDGED = ["--eval_strategy", "no", "--load_best_model_at_end", "false"]  # for dpo and grpo but for the first
pytestmark = pytest.mark.usefixtures("one_thread", "clean_imports")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "adapter" / "record.json").read_text())


def pair(question: str, chosen: str, rejected: str) -> dict:
    good, bad = chat(question, chosen), chat(question, rejected)
    return {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}


def rows_in(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def summed_logps(model, tokenizer, rows: list[dict], side: str) -> list[float]:
    """The log-probability of each whole answer, one row at a time, with the library's cross-entropy."""
    found = []
    for row in rows:
        head = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
        labels = [-100] * len(head["input_ids"]) + whole[len(head["input_ids"]) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss
        found.append(-loss.item() * sum(label != -100 for label in labels))
    return found


def micro(adapter: Path | None = None):
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@pytest.fixture(scope="module")
def dpo(tiny_run) -> Path:
    return tiny_run("dpo")


@pytest.fixture(scope="module")
def sft(tiny_run) -> Path:
    """An adapter to start from."""
    return tiny_run("sft") / "adapter"


@pytest.fixture(scope="module")
def qlora(tiny_run) -> Path:
    """One on a base in 4 bits."""
    return tiny_run("qlora_8b") / "adapter"


@pytest.fixture(scope="module")
def second(sft, tmp_path_factory) -> Path:
    """DPO on top of that adapter."""
    folder = tmp_path_factory.mktemp("second") / "run"
    train("dpo", folder, "--adapter", sft, "--save_total_limit", 3, *ONE_BATCH)
    return folder


@pytest.fixture(scope="module")
def reward_model(tiny_run) -> Path:
    return tiny_run("reward_model")


@pytest.fixture(scope="module")
def grpo(tiny_run) -> Path:
    return tiny_run("grpo")


# --- DPO ------------------------------------------------------------------------------------------


def test_dpo_begins_at_ln_2_and_learns(dpo):
    judged, margins = series(dpo, "eval_loss"), series(dpo, "eval_rewards/margins")
    assert judged[0] == pytest.approx(math.log(2)) and margins[0] == 0
    assert judged[6] < judged[4] < judged[2] < judged[0] and margins[6] > 0.05
    assert all(norm > 0 for norm in series(dpo, "grad_norm").values())


def test_what_dpo_measures_is_what_the_library_says_of_the_saved_adapter(dpo):
    """Log-probabilities before and after, and the loss from them, one answer at a time."""
    tokenizer, rows = AutoTokenizer.from_pretrained(MICRO), rows_in(dpo / "validation.jsonl")
    record = record_of(dpo)
    sums = {
        (at, side): torch.tensor(summed_logps(model, tokenizer, rows, side), dtype=torch.float64)
        for at, model in (("start", micro()), ("saved", micro(dpo / "adapter")))
        for side in ("chosen", "rejected")
    }
    for (at, side), values in sums.items():
        assert record[at][f"logps/{side}"] == pytest.approx(values.mean().item(), rel=1e-4)
    gains = [sums["saved", side] - sums["start", side] for side in ("chosen", "rejected")]
    margins = 0.1 * (gains[0] - gains[1])
    assert record["saved"]["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)
    wanted = torch.nn.functional.softplus(-margins).mean().item()
    assert record["best_eval_loss"] == pytest.approx(wanted, abs=1e-5)


def test_dpos_record_says_what_ran(dpo):
    record, judged = record_of(dpo), series(dpo, "eval_loss")
    assert record["recipe"] == "dpo" and record["steps"] == 6 and record["seconds_a_step"] > 0
    assert record["best_eval_loss"] == judged[record["best_step"]] == min(judged.values())
    assert (record["base"], record["reference"], record["load_in_4bit"]) == (MICRO, MICRO, False)
    assert record["beta"] == 0.1 and record["loss_type"] == ["sigmoid"] and record["warnings"] == []
    assert list((dpo / "adapter").glob("*.bin")) == []  # a pickle can hold code


def test_the_adapter_of_dpo_is_evaluated_and_merged(dpo, tmp_path):
    run("evaluate", "--tiny", *FEW, "--adapter", dpo / "adapter", "--out", tmp_path / "tuned.json")
    run("merge", "--adapter", dpo / "adapter", "--out", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "record.json").read_text())
    assert record["rows"] == 8 and record["merge_kl_nats"] < 1e-6 < record["adapter_kl_nats"]
    run("evaluate", "--tiny", *FEW, "--model", tmp_path / "merged", "--out", tmp_path / "merged.json")
    files = [tmp_path / f"{name}.json" for name in ("tuned", "merged")]
    tuned, merged = [json.loads(file.read_text())["answers"] for file in files]
    assert merged == tuned


@pytest.mark.parametrize("name", PREFERENCES)
def test_stopped_and_resumed_it_ends_as_the_run_that_nothing_happened_to(name, tiny_run, tmp_path):
    """From the checkpoint that a stop would have left; a real kill is in test_recipes.py."""
    whole, folder = tiny_run(name), tmp_path / "run"
    shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
    with pytest.raises(SystemExit, match="--resume"):
        train(name, folder)
    train(name, folder, "--resume")
    assert series(folder, "loss") == pytest.approx(series(whole, "loss"), rel=1e-6)
    assert series(folder, "eval_loss") == pytest.approx(series(whole, "eval_loss"), rel=1e-6)
    for key, weight in weights(whole / "adapter").items():
        torch.testing.assert_close(weights(folder / "adapter")[key], weight)
    if name == "dpo":  # what was measured before the first step comes from the checkpoint's log
        assert record_of(folder)["start"] == record_of(whole)["start"]
    else:
        assert record_of(folder)["accuracy"] == record_of(whole)["accuracy"]


def test_from_an_adapter_its_frozen_copy_is_the_reference(sft, second):
    tokenizer, rows = AutoTokenizer.from_pretrained(MICRO), rows_in(second / "validation.jsonl")
    record = record_of(second)
    assert series(second, "eval_rewards/margins")[0] == 0 < series(second, "eval_rewards/margins")[6]
    sums = summed_logps(micro(sft), tokenizer, rows, "chosen")
    assert record["start"]["logps/chosen"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    before = load_file(sft / "adapter_model.safetensors")
    assert same(load_file(second / "checkpoint-6" / "ref" / "adapter_model.safetensors"), before)
    assert not same(weights(second / "adapter"), before)
    assert not (second / "adapter" / "ref").exists()
    assert (record["base"], record["reference"]) == (MICRO, str(sft))


def test_a_run_from_an_adapter_goes_on_with_its_policy_and_its_reference(sft, second, tmp_path):
    """transformers alone would load the reference and leave the policy where the run began."""
    shutil.copytree(second / "checkpoint-4", tmp_path / "checkpoint-4")
    for file in ("train.jsonl", "validation.jsonl"):
        shutil.copy(second / file, tmp_path)
    train("dpo", tmp_path, "--adapter", sft, "--resume", "--save_total_limit", 3, *ONE_BATCH)
    assert series(tmp_path, "loss") == pytest.approx(series(second, "loss"), rel=1e-6)
    for key, weight in weights(second / "adapter").items():
        torch.testing.assert_close(weights(tmp_path / "adapter")[key], weight)


def test_in_a_second_round_the_reference_is_the_first_rounds_end_or_the_one_that_is_named(sft, second, tmp_path):
    """With the first reference the second round begins at the margin that the first one ended with."""
    words = ["--adapter", second / "adapter", "--max_steps", 1, "--save_steps", 1, *UNJUDGED, *ONE_BATCH]
    train("dpo", tmp_path / "anew", *words)
    assert record_of(tmp_path / "anew")["start"]["rewards/margins"] == 0
    train("dpo", tmp_path / "kept", *words, "--reference", sft)
    start, ended = record_of(tmp_path / "kept")["start"], record_of(second)["saved"]
    assert start == pytest.approx(ended, rel=1e-4) and start["rewards/margins"] > 0
    ref = tmp_path / "kept" / "checkpoint-1" / "ref" / "adapter_model.safetensors"
    assert same(load_file(ref), load_file(sft / "adapter_model.safetensors"))


def test_from_an_adapter_on_4_bits_its_exact_numbers_go_on(qlora, tmp_path):
    """TRL rounds such an adapter to bf16: then policy and reference would differ before any step."""
    train("dpo", tmp_path / "run", "--adapter", qlora, "--max_steps", 2, "--max_rows", 4, *ONE_BATCH)
    record = record_of(tmp_path / "run")
    assert record["load_in_4bit"] and record["bnb_4bit_quant_type"] == "nf4"
    assert record["start"]["rewards/margins"] == 0 < record["saved"]["rewards/margins"]
    saved = weights(tmp_path / "run" / "adapter")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    run("merge", "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "merged", "--rows", 4)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_the_reference_is_no_second_model(name, tmp_path, monkeypatch):
    """TRL would load one by its path, in float32 unless told otherwise: twice the memory of a base in 16 bits."""

    def second(*args, **kwargs):
        raise AssertionError("a second model")

    trainers = importlib.import_module(f"trl.trainer.{name}_trainer")
    monkeypatch.setattr(trainers, "create_model_from_path", second)
    words = ["--max_steps", 1, "--save_steps", 1, *UNJUDGED, "--eval_on_start", "false"]
    words += ["--beta", 0.04, "--max_completion_length", 4] if name == "grpo" else []
    train(name, tmp_path, *words)
    assert record_of(tmp_path)["beta"] > 0


def evaluation(loss: float, margins: float, chosen: float) -> dict:
    values = {"loss": loss, "rewards/margins": margins, "logps/chosen": chosen}
    values |= {"rewards/accuracies": 0.5, "logps/rejected": chosen - 10 * margins}
    return {"step": 3} | {f"eval_{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    ("loss", "margins", "chosen", "names"),
    [
        (0.5, 1.0, -90.0, []),  # the chosen answer gained
        (0.5, 1.0, -101.9, []),  # it fell by 1.9 nats over 20 tokens
        (0.5, 1.0, -102.1, ["displaced"]),
        (0.8, -1.0, -130.0, ["no_better_than_the_start"]),  # it fell, and no margin hides it
        (0.7, 0.1, -130.0, ["displaced", "no_better_than_the_start"]),
    ],
)
def test_a_program_can_read_that_chosen_answers_became_less_likely(loss, margins, chosen, names, capsys):
    start, end = evaluation(math.log(2), 0.0, -100.0), evaluation(loss, margins, chosen)
    returned = script("recipes/dpo.py").tell(start, end, 20)
    printed = capsys.readouterr().out
    assert warnings_in(printed) == returned and [each["warning"] for each in returned] == names
    assert f"logps/chosen: -100.000 -> {chosen:.3f}" in printed
    for each in returned:
        if each["warning"] == "displaced":
            assert each["nats_a_token"] == pytest.approx((-100 - chosen) / 20)


def test_every_loss_of_trl_is_known_and_two_can_be_added(tmp_path):
    recipe = script("recipes/dpo.py")
    text = inspect.getsource(DPOTrainer._compute_loss)
    assert all(f'loss_type == "{name}"' in text for name in recipe.LOSSES)
    assert text.count("loss_type == ") == len(recipe.LOSSES)
    words = ["--loss_type", "ipo", "sft", "--loss_weights", 1, 0.5, "--max_steps", 2, "--max_rows", 4]
    train("dpo", tmp_path, *words, *ONE_BATCH)
    assert record_of(tmp_path)["loss_type"] == ["ipo", "sft"]


def test_what_is_compared_is_the_start_and_what_is_saved():
    find = script("recipes/dpo.py").evaluations
    log = [{"step": step, "eval_loss": step} for step in (0, 2, 4)] + [{"step": 3, "loss": 9}]
    assert find(log, 2) == (log[0], log[1]) and find(log, None) == (log[0], log[2])
    assert find(log[1:], 4) == (None, log[2]) and find([], None) == (None, None)


def test_options_that_do_not_go_together_are_one_line(sft, dpo, tmp_path):
    def told(*words):
        return line_of("dpo", "--tiny", "--output_dir", tmp_path / "run", *words)

    assert "sigmoid_norm" in told("--loss_type", "simpo")
    assert "Got 2 weights for 1 loss types" in told("--loss_weights", 1, 2)
    assert "label_smoothing" in told("--loss_type", "exo_pair")
    assert "leave out --model" in told("--adapter", sft, "--model", MICRO)
    assert "give --adapter too" in told("--reference", sft)
    assert "adapter_config.json" in told("--adapter", tmp_path)
    shutil.copytree(sft, tmp_path / "other")
    config = json.loads((sft / "adapter_config.json").read_text()) | {"r": 8}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    line = told("--adapter", sft, "--reference", tmp_path / "other")
    assert "differ in r: 8 and 16" in line
    assert "no whole checkpoint" in told("--resume")
    assert not (tmp_path / "run" / "adapter").exists()
    assert "no file" in line_of("dpo", "--model", MICRO, "--output_dir", tmp_path / "run")


@pytest.mark.parametrize("name", PREFERENCES)
def test_random_weights_measure_a_step_and_an_evaluation_and_can_be_run_again(name, tmp_path, capsys):
    for length in (24, 32):  # in one folder
        train(name, tmp_path, "--random_weights", "tiny", "--max_length", length, "--max_steps", 6)
        record = record_of(tmp_path)
        assert record["base"] == "tiny" and record["seconds_a_step"] > 0
        assert record["max_length"] == length and "eval_loss" in capsys.readouterr().out
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_random_pairs_fill_the_length():
    rows = script("recipes/random_weights.py").random_pairs(3, 33, 512)
    for row in rows:
        assert len(row["prompt_ids"] + row["chosen_ids"]) == 33 == len(row["prompt_ids"] + row["rejected_ids"])
    assert rows[0]["chosen_ids"] != rows[0]["rejected_ids"] and rows[0] != rows[1]


# --- Pairs ----------------------------------------------------------------------------------------

BAD_PAIRS = {
    "other columns": ({"prompt": "q", "completion": "a"}, ["line 2", "prompt, completion", "chosen and rejected"]),
    "mixed": ({"prompt": "q", "chosen": [], "rejected": "b"}, ["line 2", "three texts or three lists"]),
    "equal": (pair("q", "a", "a"), ["line 2", "chosen and rejected are equal"]),
    "empty": (pair("q", " ", "a"), ["line 2", "chosen is empty"]),
    "no message": (pair("q", "a", "b") | {"rejected": []}, ["line 2", "rejected is empty"]),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_bad_pairs_are_named_with_their_line(name, case, tmp_path):
    row, told = BAD_PAIRS[case]
    file = write(tmp_path / "bad.jsonl", [pair("q", "a", "b"), row])
    words = ["--tiny", "--train_file", file, "--validation_file", file, "--output_dir", tmp_path / "run"]
    line = line_of(name, *words)
    assert "bad.jsonl" in line and all(part in line for part in told)


def test_several_equal_pairs_are_counted(tmp_path):
    equal = [pair("q", "a", "a")] * 7
    file = write(tmp_path / "bad.jsonl", [pair("q", "a", "b"), *equal])
    with pytest.raises(SystemExit, match=r"lines 2, 3, 4, 5, 6, \.\.\.: .* these 7 rows"):
        script("recipes/preferences.py").read_pairs(file)
    assert len(script("recipes/preferences.py").read_pairs(file, None, 1)) == 1


def test_messages_for_a_model_without_a_template_are_refused(tmp_path):
    shutil.copytree(MICRO, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    for name in PREFERENCES:
        words = ["--tiny", "--model", tmp_path / "base", "--output_dir", tmp_path / name]
        assert "chat template" in line_of(name, *words)


def test_texts_are_learned_too(tmp_path):
    rows = [{"prompt": f"Say {n}:", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(8)]
    file = write(tmp_path / "texts.jsonl", rows)
    for name in PREFERENCES:
        words = ["--train_file", file, "--validation_file", file, "--max_steps", 2, *ONE_BATCH]
        train(name, tmp_path / name, *words)
        assert record_of(tmp_path / name)["steps"] == 2


def test_the_files_of_tiny_share_no_pattern_and_are_read_as_written(tmp_path):
    module = script("recipes/preferences.py")
    files = module.tiny_pairs(tmp_path)
    train_rows, validation = [module.read_pairs(file) for file in files]
    known = rows_in(DATA / "replies" / "train.jsonl")
    skeleton = {row["ticket"]: row["skeleton"] for row in known}
    seen = [{skeleton[row["prompt"][0]["content"]] for row in part} for part in (train_rows, validation)]
    assert (len(train_rows), len(validation)) == (24, 8) and not seen[0] & seen[1]


def test_pairs_of_which_nothing_is_left_are_refused(tmp_path):
    words = ["--tiny", "--output_dir", tmp_path / "run", "--max_length", 4]
    assert "no answer is left to compare" in line_of("dpo", *words)


@pytest.mark.parametrize(("limit", "cut", "out"), [(60, 0, 0), (29, 1, 0), (20, 2, 1)])
def test_pairs_that_are_cut_or_left_out_are_counted(limit, cut, out, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    rows = [pair("q", "a", "b"), pair("q", "a", "b c " * 9), pair("long " * 11, "a", "b")]
    sizes = [
        max(len(tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"])
            for side in ("chosen", "rejected")) for row in rows
    ]  # fmt: skip
    heads = [
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
        for row in rows
    ]
    assert sum(size > limit for size in sizes) == cut and sum(head >= limit for head in heads) == out
    file = write(tmp_path / "rows.jsonl", rows)
    words = ["--train_file", file, "--max_steps", 1, "--max_length", limit, "--eval_strategy", "no"]
    words += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--eval_on_start", "false"]
    train("dpo", tmp_path / "dpo", "--validation_file", file, *words)
    told = capsys.readouterr().out
    assert record_of(tmp_path / "dpo")["start"] is None  # nothing was evaluated
    if cut:
        assert told.count("longer than max_length") == 2  # of both files
        assert f"{cut} of 3 rows are longer than max_length {limit}: {cut - out} are cut, and {out}" in told
    else:
        assert "longer than max_length" not in told


# --- The reward model -----------------------------------------------------------------------------


def by_hand(folder: Path, rows: list[dict], side: str) -> list[float]:
    """Its rewards, one row at a time, as the libraries load it."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    base = AutoModelForSequenceClassification.from_pretrained(MICRO, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found = []
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"] + row[side], return_tensors="pt", return_dict=True)
        with torch.no_grad():
            found.append(model(input_ids=ids["input_ids"]).logits.item())
    return found


def test_the_reward_model_learns_and_its_accuracy_is_that_of_the_saved_one(reward_model):
    judged, record = series(reward_model, "eval_loss"), record_of(reward_model)
    assert judged[6] < judged[2]
    rows = rows_in(reward_model / "validation.jsonl")
    chosen, rejected = [by_hand(reward_model, rows, side) for side in ("chosen", "rejected")]
    gaps = torch.tensor(chosen) - torch.tensor(rejected)
    loss = torch.nn.functional.softplus(-gaps).mean().item()
    assert record["best_eval_loss"] == pytest.approx(loss, abs=1e-5)  # it reads what was trained
    right, found = int((gaps > 0).sum()), record["accuracy"]["all"]
    wilson = binomtest(right, len(rows)).proportion_ci(method="wilson")
    assert found["right"] == right / len(rows) and found["pairs"] == len(rows) == 8
    assert found["interval"] == pytest.approx([wilson.low, wilson.high], abs=1e-4)
    assert record["recipe"] == "reward_model" and record["warnings"] == []
    assert list((reward_model / "adapter").glob("*.bin")) == []


@pytest.mark.parametrize("batch_size", [1, 5])
def test_it_can_be_loaded_again_to_score(reward_model, batch_size, tmp_path):
    rows = [row | {"completion": row["chosen"]} for row in rows_in(reward_model / "validation.jsonl")]
    wanted = by_hand(reward_model, rows, "chosen")
    module = script("recipes/reward_model.py")
    model, tokenizer = module.load_scorer(reward_model / "adapter")
    assert module.scores(model, tokenizer, rows, batch_size=batch_size) == pytest.approx(wanted, abs=1e-5)
    file = write(tmp_path / "rows.jsonl", rows)
    run("reward_model", "--output_dir", reward_model, "--score", file, "--out", tmp_path / "scored.jsonl")
    scored = rows_in(tmp_path / "scored.jsonl")
    assert [row["reward"] for row in scored] == pytest.approx(wanted, abs=1e-5)
    assert [row["prompt"] for row in scored] == [row["prompt"] for row in rows]


def test_accuracy_is_split_by_which_answer_is_longer(monkeypatch, capsys):
    """A judge that counts words is right where the chosen answer is longer, and nowhere else."""
    module = script("recipes/reward_model.py")

    def counts_words(model, tokenizer, rows, side="completion", batch_size=8):
        return [float(len(row[side][0]["content"].split())) for row in rows]

    monkeypatch.setattr(module, "scores", counts_words)
    rows = [pair("q", "a b c", "a")] * 5 + [pair("q", "a", "a b c")] * 3 + [pair("q", "a b", "b a")] * 2
    found = module.judged(None, AutoTokenizer.from_pretrained(MICRO), rows, 4)
    assert (found["all"]["right"], found["ties"], found["always_longer"]) == (0.5, 2, 0.5)
    assert [found[name]["right"] for name in module.GROUPS] == [1, 0, 0]
    assert [found[name]["pairs"] for name in module.GROUPS] == [5, 3, 2]
    assert "rejected is longer: 0.000 [0.000," in capsys.readouterr().out
    grouped = [row | {"group": 0 if number < 5 else 1} for number, row in enumerate(rows)]
    wide = module.judged(None, AutoTokenizer.from_pretrained(MICRO), grouped, 4)["all"]["interval"]
    low, high = found["all"]["interval"]
    assert wide[0] <= low and high <= wide[1] and wide != [low, high]


def test_a_pad_token_that_is_the_end_is_said(tmp_path, capsys):
    """The last <|im_end|> isn't seen where the template writes nothing behind it."""
    shutil.copytree(MICRO, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"pad_token": config["eos_token"]}))
    template = tmp_path / "base" / "chat_template.jinja"
    words = ["--model", tmp_path / "base", "--max_steps", 2, "--max_rows", 4, *ONE_BATCH]
    train("reward_model", tmp_path / "newline", *words)
    (first,) = warnings_in(capsys.readouterr().out)
    assert (first["warning"], first["read_at"], first["tokens_not_seen"]) == ("pad_is_eos", "\n", 0)
    bare = template.read_text().replace("<|im_end|>' + '\n'", "<|im_end|>'")
    assert bare != template.read_text()
    template.write_text(bare)
    train("reward_model", tmp_path / "bare", *words)
    (second,) = warnings_in(capsys.readouterr().out)
    assert second["tokens_not_seen"] == 1 and record_of(tmp_path / "bare")["warnings"] == [second]


def test_pairs_longer_than_the_limit_are_left_out_and_said(tmp_path, capsys):
    rows = [pair("q", "a", "b"), pair("q", "a", "b c " * 30), pair("q", "b", "a"), pair("r", "b", "a")]
    file = write(tmp_path / "rows.jsonl", rows)
    words = ["--train_file", file, "--validation_file", file, "--max_length", 40, "--max_steps", 2]
    train("reward_model", tmp_path / "run", *words)
    assert capsys.readouterr().out.count("1 of 4 rows are longer than max_length 40") == 2
    assert record_of(tmp_path / "run")["accuracy"]["all"]["pairs"] == 3
    words[5] = 4
    assert "every row is longer" in line_of("reward_model", "--tiny", "--output_dir", tmp_path / "none", *words)


def test_a_reward_model_is_not_asked_for_answers(reward_model, dpo, tmp_path):
    adapter = reward_model / "adapter"
    assert "reward_model.py" in line_of("merge", "--adapter", adapter, "--out", tmp_path / "m", "--file", "x")
    assert "scores answers" in line_of("evaluate", "--tiny", "--adapter", adapter, "--out", tmp_path / "a.json")
    words = ["--score", dpo / "validation.jsonl", "--out", tmp_path / "s.jsonl"]
    assert "writes answers" in line_of("reward_model", "--output_dir", dpo, *words)
    assert "--out" in line_of("reward_model", "--output_dir", reward_model, "--score", "x")
    assert "wanted prompt and completion" in line_of("reward_model", "--output_dir", reward_model, *words)


# --- GRPO -----------------------------------------------------------------------------------------


def test_grpo_keeps_the_checkpoint_with_the_largest_validation_reward(grpo, tmp_path):
    record, judged = record_of(grpo), {}
    state = json.loads((grpo / "checkpoint-4" / "trainer_state.json").read_text())
    judged = {log["step"]: log["eval_reward"] for log in state["log_history"] if "eval_reward" in log}
    assert set(judged) == {0, 2, 4} and record["steps"] == 4
    assert judged[record["best_step"]] == max(judged[2], judged[4])
    assert {int(step): found["eval_reward"] for step, found in record["validation"].items()} == judged
    assert record["chosen_by"] == "eval_reward" and record["beta"] == 0
    best = grpo / f"checkpoint-{record['best_step']}"
    assert same(weights(grpo / "adapter"), weights(best))
    assert record["rewards"] == ["rewards:exact_match"] and record["answers_a_step"] == 8
    assert record["last"].keys() == set(script("recipes/grpo.py").WATCHED)
    run("evaluate", "--tiny", *FEW, "--adapter", grpo / "adapter", "--out", tmp_path / "a.json")
    run("merge", "--adapter", grpo / "adapter", "--out", tmp_path / "merged", "--rows", 4)


CHOICES = {  # what is named: beta, whether the best is loaded, by what it is chosen, how many stay
    "": (0.04, False, None, None),
    "--beta 0": (0, False, None, None),
    "--save_total_limit 3": (0.04, False, None, 3),
    "--load_best_model_at_end": (0.04, True, "eval_reward", None),
    "--metric_for_best_model eval_rewards/good/mean": (0.04, True, "eval_rewards/good/mean", None),
    "--metric-for-best-model rewards/good/mean": (0.04, True, "eval_rewards/good/mean", None),
    "--metric_for_best_model eval_reward --load_best_model_at_end false": (0.04, False, None, None),
    "--config beta.yaml": (0.2, True, "eval_reward", None),
    "--reward_weights 0 1": (0, True, "eval_reward", 2),  # it only watches
}


@pytest.mark.parametrize("words", CHOICES)
def test_a_reward_model_does_not_choose_unless_it_is_told_to(words, tmp_path, monkeypatch):
    """A folder is a reward model. Without one nothing changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beta.yaml").write_text("beta: 0.2\nmetric_for_best_model: eval_reward\n")
    grpo = script("recipes/grpo.py")
    (tmp_path / "scorer").mkdir()
    _, args = grpo.parsed(["--rewards", "scorer", "rewards:exact_match", *words.split()])
    beta, loads, metric, limit = CHOICES[words]
    got = args.beta, args.load_best_model_at_end, grpo.chosen_by(args), args.save_total_limit
    assert got == (beta, loads, metric, limit)
    _, plain = grpo.parsed(["--rewards", "rewards:exact_match", "--output_dir", args.output_dir])
    assert (plain.beta, grpo.chosen_by(plain), plain.save_total_limit) == (0, "eval_reward", 2)


def test_grpo_goes_on_after_a_stop(grpo, tmp_path):
    shutil.copytree(grpo / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(SystemExit, match="--resume"):
        train("grpo", tmp_path)
    train("grpo", tmp_path, "--resume")
    log = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "reward" in entry] == [1, 2, 3, 4]
    assert record_of(tmp_path)["steps"] == 4


def test_grpo_resumed_in_its_third_epoch_ends_as_the_run_that_nothing_happened_to(tmp_path, monkeypatch):
    """Four prompts, two a step, two steps an epoch; TRL's sampler alone would begin with the first order again."""
    code = "def words(completions, **columns):\n    return [len(each[0]['content']) for each in completions]\n"
    (tmp_path / "paid_by_length.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = ["--rewards", "paid_by_length:words", "--max_completion_length", 12]
    words += ["--max_rows", 4, "--max_steps", 6, "--save_total_limit", 9, "--eval_strategy", "no"]
    words += ["--load_best_model_at_end", "false", "--eval_on_start", "false", "--save_steps", 1, "--temperature", 3]
    train("grpo", tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "stopped" / "checkpoint-4")
    train("grpo", tmp_path / "stopped", *words, "--resume")
    whole, stopped = (tmp_path / name / "checkpoint-6" for name in ("whole", "stopped"))
    assert same(weights(whole), weights(stopped))
    logs = [json.loads((each / "trainer_state.json").read_text())["log_history"] for each in (whole, stopped)]
    lengths = [[entry.get("completions/mean_length") for entry in log] for log in logs]
    assert lengths[0] == lengths[1] and len(lengths[0]) >= 6
    assert min(entry["grad_norm"] for entry in logs[0] if entry["step"] > 4 and "grad_norm" in entry) > 0


def test_from_an_adapter_with_beta_the_kl_begins_at_zero(tmp_path):
    """SFT first, on the same base, so that some answers are right."""
    base = str(DATA / "ask_start")
    train("sft", tmp_path / "sft", "--model", base, "--max_steps", 2, "--max_rows", 4)
    adapter = tmp_path / "sft" / "adapter"
    words = ["--adapter", adapter, "--beta", 0.1, "--max_steps", 2, "--save_steps", 2, *UNJUDGED]
    train("grpo", tmp_path / "run", *words, "--max_completion_length", 8, "--eval_on_start", "false")
    log = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    kl = [entry["kl"] for entry in log if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6) and record_of(tmp_path / "run")["base"] == base
    ref = load_file(tmp_path / "run" / "checkpoint-2" / "ref" / "adapter_model.safetensors")
    assert same(ref, load_file(adapter / "adapter_model.safetensors"))
    assert not (tmp_path / "run" / "adapter" / "ref").exists()


def test_from_an_adapter_on_4_bits_the_policy_begins_as_its_exact_numbers(qlora, tmp_path):
    """TRL rounds such an adapter to bf16; a step of rate 0 leaves it as it was."""
    words = ["--adapter", qlora, "--max_steps", 1, "--learning_rate", 0, "--max_completion_length", 8]
    train("grpo", tmp_path / "run", *words, *UNJUDGED, "--eval_on_start", "false")
    assert same(weights(tmp_path / "run" / "adapter"), weights(qlora))


def test_a_limit_that_cuts_every_answer_is_an_alarm(tmp_path, capsys):
    """Reward 0, gradient 0, and no error: only the alarms say it."""
    train("grpo", tmp_path, "--max_completion_length", 3, "--max_steps", 2)
    found = {each["warning"]: each for each in warnings_in(capsys.readouterr().out)}
    assert found.keys() == {"all_clipped", "no_spread", "no_better_than_the_start"}
    assert found["all_clipped"]["metric"] == "completions/clipped_ratio" and found["all_clipped"]["step"] == 1
    record = record_of(tmp_path)
    assert record["alarms"] == {"all_clipped": [1, 2], "no_spread": [1, 2]}
    assert record["last"]["reward"] == 0 == record["last"]["grad_norm"]


def test_vllms_options_are_trls_and_nothing_more_is_checked(tmp_path):
    """No vLLM runs here: the command line of the docstring becomes a GRPOConfig, and without vLLM it stops."""
    recipe = script("recipes/grpo.py")
    words = ["--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.3"]
    words += ["--vllm_max_model_length", "2048", "--rewards", "rewards:exact_match", "rewards:soft_overlong"]
    asked, args = recipe.parsed([*words, "--reward_weights", "1", "0.2"])
    assert (args.use_vllm, args.vllm_mode, args.vllm_max_model_length) == (True, "colocate", 2048)
    assert args.vllm_gpu_memory_utilization == 0.3 and args.reward_weights == [1, 0.2]
    assert asked.rewards == ["rewards:exact_match", "rewards:soft_overlong"]
    assert (args.learning_rate, args.num_generations, args.beta) == (1e-5, 8, 0)
    assert args.generation_batch_size == 64
    shown = " ".join(recipe.__doc__.split())
    assert " ".join(words[:6]) in shown and "Not run here" in shown
    if not recipe.find_spec("vllm"):
        line = line_of("grpo", "--tiny", "--output_dir", tmp_path / "run", *words)
        assert "vLLM is not installed" in line


def test_what_grpo_cannot_use_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text(
        "def nan(completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def short(completions, **columns):\n    return [0.0]\n"
        "def raises(completions, gold, **columns):\n    return gold\n"
    )
    monkeypatch.chdir(tmp_path)

    def told(*words):
        return line_of("grpo", "--tiny", "--output_dir", tmp_path / "run", *words)

    assert "no --rewards" in line_of("grpo", "--model", MICRO, "--output_dir", tmp_path / "run")
    assert "1 --reward_weights for 2" in told("--rewards", "a:b", "c:d", "--reward_weights", 1)
    assert "no_such_module" in told("--rewards", "no_such_module:f")
    assert "wanted module:function" in told("--rewards", "rewards:no_such_function")
    assert "divisible by num_generations" in told("--num_generations", 3)
    short = ["--max_completion_length", 2, "--rewards"]
    assert "nan for" in told(*short, "broken_rewards:nan")
    assert "1 numbers for 16 answers" in told(*short, "broken_rewards:short")
    line = told(*short, "broken_rewards:raises")
    assert "TypeError" in line and "gold" in line and "answer" in line  # what it could have asked for
    bad = write(tmp_path / "bad.jsonl", [{"question": "q"}])
    assert "bad.jsonl, line 1: got question, wanted prompt" in told("--train_file", bad)


def test_a_reward_model_is_a_reward(reward_model, dpo, tmp_path, capsys):
    """By hand, one answer at a time; texts with the end token behind them, as in a training on texts."""
    adapter, rows = reward_model / "adapter", rows_in(reward_model / "validation.jsonl")[:6]
    reward = script("recipes/grpo.py").reward_of(str(adapter))
    columns = {"prompts": [row["prompt"] for row in rows], "completions": [row["chosen"] for row in rows]}
    got = reward(**columns, completion_ids=[], answer=[])
    assert got == pytest.approx(by_hand(reward_model, rows, "chosen"), abs=1e-5)
    module, end = script("recipes/reward_model.py"), AutoTokenizer.from_pretrained(MICRO).eos_token
    model, tokenizer = module.load_scorer(adapter)
    with torch.no_grad():
        wanted = model(**tokenizer("Say one: yes" + end, return_tensors="pt")).logits.item()
    assert reward(prompts=["Say one:"], completions=[" yes"]) == pytest.approx([wanted], abs=1e-5)

    words = ["--rewards", adapter, "rewards:soft_overlong", "--reward_weights", 1, 0.2, "--max_completion_length", 16]
    words += ["--max_steps", 3, "--save_steps", 1, "--temperature", 3]
    train("grpo", tmp_path / "run", *words, "--eval_strategy", "no", "--eval_on_start", "false")
    log = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and len(log) >= 3
    for step in log[:3]:
        parts = [step[f"rewards/{name}/mean"] for name in ("reward_model", "soft_overlong")]
        assert step["reward"] == pytest.approx(parts[0] + 0.2 * parts[1], abs=1e-5)
        assert step["rewards/reward_model/std"] > 0 < step["grad_norm"]
    record = record_of(tmp_path / "run")
    assert (record["rewards"], record["reward_weights"]) == ([str(adapter), "rewards:soft_overlong"], [1, 0.2])
    assert (record["beta"], record["best_step"], record["chosen_by"]) == (0.04, None, None)
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2, 3)]  # none was deleted
    wanted = {"warning": "judge_checkpoints", "adapter_is_step": 3, "checkpoints": list(map(str, folders))}
    assert warnings_in(capsys.readouterr().out)[-1] == wanted == record["warnings"][-1]
    assert same(weights(tmp_path / "run" / "adapter"), weights(folders[2]))
    run("evaluate", "--tiny", *FEW, "--adapter", folders[0], "--out", tmp_path / "a.json")
    assert json.loads((folders[0] / "record.json").read_text())["steps"] == 1

    words = ["--tiny", "--output_dir", tmp_path / "none", "--rewards"]
    assert "writes answers" in line_of("grpo", *words, dpo / "adapter")
    assert "adapter_config.json" in line_of("grpo", *words, tmp_path)


def test_a_check_that_only_watches_chooses_beside_a_reward_model(reward_model, tmp_path, monkeypatch, capsys):
    """Its mean falls from evaluation to evaluation, so the first checkpoint is the best by it."""
    code = "calls = []\ndef falls(completions, **columns):\n    calls.append(1)\n"
    (tmp_path / "my_check.py").write_text(code + "    return [-len(calls)] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    words = ["--rewards", reward_model / "adapter", "my_check:falls", "--reward_weights", 1, 0]
    words += ["--max_steps", 3, "--save_steps", 1, "--eval_steps", 1, "--max_rows", 4, "--max_completion_length", 8]
    train("grpo", tmp_path / "run", *words, "--metric_for_best_model", "eval_rewards/falls/mean")
    record, printed = record_of(tmp_path / "run"), capsys.readouterr().out
    assert (record["chosen_by"], record["best_step"]) == ("eval_rewards/falls/mean", 1)
    assert same(weights(tmp_path / "run" / "adapter"), weights(tmp_path / "run" / "checkpoint-1"))
    falls = [found["eval_rewards/falls/mean"] for found in record["validation"].values()]
    assert len(falls) == 4 and falls == sorted(falls, reverse=True) and "eval_rewards/falls/mean -" in printed
    names = [each["warning"] for each in record["warnings"]]
    assert "no_better_than_the_start" in names and not {"proxy_chooses", "judge_checkpoints"} & set(names)
    other = ["--output_dir", tmp_path / "none", "--metric_for_best_model", "eval_rewards/rises/mean"]
    line = line_of("grpo", "--tiny", *words, *other)
    assert "eval_rewards/rises/mean: wanted eval_reward, " in line and "or eval_rewards/falls/mean" in line

    train("grpo", tmp_path / "told", *words, "--max_steps", 1, "--load_best_model_at_end", "true")
    record = record_of(tmp_path / "told")
    assert {"warning": "proxy_chooses", "metric": "eval_reward"} in record["warnings"]
    assert record["chosen_by"] == "eval_reward" and record["best_step"] == 1


LENGTH = {  # of a record: its accuracy, and whether length decides
    "right": ({"rejected is longer": {"pairs": 9, "right": 0.5}}, False),
    "wrong": ({"chosen is longer": {"pairs": 9, "right": 1}, "rejected is longer": {"pairs": 9, "right": 0.4}}, True),
    "no such pair": ({"rejected is longer": {"pairs": 0, "right": None, "interval": None}}, True),
    "not measured": (None, True),  # of --random_weights
    "no word of it": ({}, True),
}


@pytest.mark.parametrize("case", LENGTH)
def test_a_reward_model_that_takes_the_longer_answer_is_named(case, reward_model, tmp_path, capsys):
    accuracy, warns = LENGTH[case]
    shutil.copytree(reward_model / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "record.json"
    record = json.loads(file.read_text())
    assert {"pairs", "right", "interval"} == record["accuracy"]["rejected is longer"].keys()  # these are its names
    file.write_text(json.dumps(record | {"accuracy": accuracy}))
    short = ["--max_steps", 1, "--max_completion_length", 4, "--eval_strategy", "no", "--eval_on_start", "false"]
    if case in ("right", "wrong"):  # the whole run
        train("grpo", tmp_path / "run", "--rewards", tmp_path / "adapter", *short)
        found = record_of(tmp_path / "run")["warnings"]
    else:
        found = script("recipes/common.py").length_warnings(tmp_path / "adapter")
    found = [each for each in found if each["warning"] == "length_decides"]
    printed = [each for each in warnings_in(capsys.readouterr().out) if each["warning"] == "length_decides"]
    assert found == printed and len(found) == warns
    if warns:
        part = (accuracy or {}).get("rejected is longer", {"pairs": 0, "right": None})
        wanted = {"reward_model": str(tmp_path / "adapter"), "right": part["right"], "pairs": part["pairs"]}
        assert found == [{"warning": "length_decides", **wanted}]


# --- Rewards --------------------------------------------------------------------------------------


def test_a_final_answer_is_the_last_one():
    rewards = script("recipes/rewards.py")
    cases = [
        ("Two and two. Answer: 4", "4", 1),
        ("so \\boxed{1,000.50}", "1000.5", 1),
        ("The answer is $7.", "7", 1),
        ("Answer: 3\nNo. Answer: 4", "4", 1),
        ("Answer: 4\nNo. Answer: 3", "4", 0),  # all of them would be paid for guessing
        ("4", "4", 0),
        ("Answer: Paris", "paris", 1),
        ("Answer:\n", "4", 0),
        ("The answer is \\boxed{4}", "4", 1),
        ("Answer: 4\nI hope this answer helps.", "4", 1),
        ("", "4", 0),
    ]
    texts, gold, wanted = map(list, zip(*cases, strict=True))
    assert rewards.final_answer(texts, gold, other=[]) == wanted
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert rewards.final_answer(messages, gold) == wanted
    begin = time.perf_counter()
    rewards.final_answer(["answer " * 200_000], ["4"])
    assert time.perf_counter() - begin < 5


def test_exact_match_reads_texts_and_messages():
    match = script("recipes/rewards.py").exact_match
    assert match([" a\n", "b"], ["a", "a"]) == [1, 0] == match([chat("", t)["completion"] for t in "ab"], ["a", "a"])


@pytest.mark.parametrize("most", [10, 100, 1024])
def test_the_price_of_length_is_daps_and_trls(most):
    ids = [[0] * length for length in range(0, most + 1)]
    got = script("recipes/rewards.py").soft_overlong(completion_ids=ids, max_completion_length=[most] * len(ids))
    if most % 5 == 0:
        assert got == pytest.approx(get_soft_overlong_punishment(most, most // 5)(ids))
    assert got[0] == 0 and got[-1] == pytest.approx(-1) and got == sorted(got, reverse=True)


PROGRAMS = {
    "right": ("def f(x):\n    return x * x", 1),
    "a future import": ("from __future__ import annotations\ndef f(x):\n    return x * x", 1),
    "it leaves a child": ("import subprocess\nsubprocess.Popen(['sleep', '1000'])\nf = lambda x: x * x", 1),
    "wrong": ("def f(x):\n    return 2 * x", 0),
    "no Python": ("def f(x", 0),
    "it ends before its tests": ("import sys\nsys.exit(0)", 0),
    "and without a trace": ("import os\nos._exit(0)", 0),
    "endless": ("while True:\n    pass", 0),
    "asleep": ("import time\ntime.sleep(1000)", 0),
    "too much memory": ("x = ' ' * (3 << 30)\ndef f(x):\n    return x * x", 0),
    "too much to say": ("while True:\n    print('a' * 10_000)", 0),
    "it looks for a key": ("import os\nassert 'SECRET' in os.environ\ndef f(x):\n    return x * x", 0),
}


def test_programs_run_within_their_limits(monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    rewards = script("recipes/rewards.py")
    monkeypatch.setattr(rewards, "SECONDS", 3)
    begin = time.perf_counter()
    answers = [f"First:\n```python\nnothing\n```\nThen:\n```python\n{code}\n```" for code, _ in PROGRAMS.values()]
    tests = ["assert f(2) == 4\nassert f(3) == 9"] * len(answers)
    got = dict(zip(PROGRAMS, rewards.tests_pass(answers, tests), strict=True))
    assert got == {name: wanted for name, (_, wanted) in PROGRAMS.items()}
    assert time.perf_counter() - begin < 12 * rewards.SECONDS
    assert rewards.tests_pass(["no code"], tests[:1]) == [0]

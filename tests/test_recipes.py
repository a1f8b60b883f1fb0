"""recipes/: each script from its command line to its end, on a CPU, and what it says of
bad input.

What is killed runs in a process of its own (forkserver). Nothing here needs the network.
"""

import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from scipy.stats import binomtest
from scripts import ROOT, script
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Qwen3MoeConfig
from transformers.utils import hub

from ftlab import answers, statistics
from ftlab.data import answer_of as course_answer_of
from ftlab.memory import architectures
from ftlab.paths import DATA
from notebooks import CELLS

RECIPES = ROOT / "recipes"
NAMES = ("sft", "qlora_8b", "dpo", "reward_model", "grpo", "evaluate", "merge")
NAMES += ("rejection_sampling", "distill", "kto", "judge")
TRAINERS = ("sft", "qlora_8b")
MICRO, HELD_OUT = str(DATA / "micro" / "model"), DATA / "ask" / "validation.jsonl"
FEW = ["--limit", 8, "--max_new_tokens", 24]  # rows and tokens for evaluate.py
pytestmark = pytest.mark.usefixtures("one_thread", "clean_imports")


def run(name: str, *words) -> None:
    script(f"recipes/{name}.py").main([str(word) for word in words])


def train(name: str, folder: Path, *words) -> None:
    run(name, "--tiny", "--output_dir", folder, "--disable_tqdm", "true", *words)


def log_of(folder: Path, step: int = 6) -> list[dict]:
    state = folder / f"checkpoint-{step}" / "trainer_state.json"
    return json.loads(state.read_text())["log_history"]


def series(folder: Path, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in log_of(folder) if key in entry}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def warnings_in(text: str) -> list[dict]:
    lines = [line for line in text.splitlines() if line.startswith("WARNING ")]
    return [json.loads(line.removeprefix("WARNING ")) for line in lines]


def chat(question: str, answer: str) -> dict:
    says = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    return dict(zip(("prompt", "completion"), says, strict=True))


@pytest.fixture(scope="module", params=TRAINERS)
def trained(request, tiny_run) -> tuple[str, Path]:
    return request.param, tiny_run(request.param)


# --- Training -------------------------------------------------------------------------------------


def test_it_learns(trained):
    _, folder = trained
    loss, judged = series(folder, "loss"), series(folder, "eval_loss")
    assert loss[6] < loss[1] - 1 and judged[6] < judged[4] < judged[2]
    assert all(norm > 0 for norm in series(folder, "grad_norm").values())
    saved = weights(folder / "checkpoint-6")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}  # what Adam worked on


def test_evaluations_do_not_change_what_is_learned(trained, tmp_path):
    """A CPU with bf16: bitsandbytes repacks 4-bit weights in eval mode and loses the gradient."""
    name, whole = trained
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()[:4]
    few = write(tmp_path / "few.jsonl", list(map(json.loads, lines)))
    train(name, tmp_path, "--eval_steps", 1, "--validation_file", few)
    assert len(series(tmp_path, "eval_loss")) == 2 * len(series(whole, "eval_loss"))
    assert series(tmp_path, "loss") == pytest.approx(series(whole, "loss"), rel=1e-6)
    assert series(tmp_path, "grad_norm") == pytest.approx(series(whole, "grad_norm"), rel=1e-5)


def test_the_record_says_what_ran_and_no_card_where_there_is_none(trained):
    name, folder = trained
    record = json.loads((folder / "adapter" / "record.json").read_text())
    judged = series(folder, "eval_loss")
    assert record["recipe"] == name and record["steps"] == 6 and record["seconds_a_step"] > 0
    assert record["best_eval_loss"] == judged[record["best_step"]] == min(judged.values())
    assert record["load_in_4bit"] == (name == "qlora_8b")
    assert record["versions"]["torch"] == torch.__version__
    assert {"trl", "bitsandbytes"} <= record["versions"].keys()  # they decide the adapter's dtype and the bytes
    assert list((folder / "adapter").glob("*.bin")) == []  # a pickle can hold code
    if not torch.cuda.is_available():
        assert record["card"] is None and record["peak_allocated_gb"] is None


def run_and_die(name: str, folder: Path) -> None:
    """Kills itself as soon as the second checkpoint is whole, two steps before the end."""
    torch.set_num_threads(1)

    def watch() -> None:
        while True:
            try:
                json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
            except (OSError, ValueError):
                time.sleep(0.002)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    train(name, folder)


def test_killed_and_resumed_it_ends_as_the_run_that_nothing_happened_to(trained, apart, tmp_path):
    """sft.py is killed; of qlora_8b.py the checkpoint in the middle is all that a kill would have left."""
    name, whole = trained
    folder = tmp_path / "run"
    if name == "sft":
        assert apart(run_and_die, name, folder) == -signal.SIGKILL
        assert not (folder / "adapter").exists()
    else:
        shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
    written = (folder / "checkpoint-4" / "adapter_model.safetensors").stat().st_mtime_ns
    (folder / "checkpoint-5").mkdir()  # one that was still being written
    shutil.copy(folder / "checkpoint-4" / "adapter_model.safetensors", folder / "checkpoint-5")
    with pytest.raises(SystemExit, match="--resume"):
        train(name, folder)
    train(name, folder, "--resume", "--save_total_limit", 3)
    assert (folder / "checkpoint-4" / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert series(folder, "loss") == pytest.approx(series(whole, "loss"), rel=1e-6)
    for key, weight in weights(whole / "adapter").items():
        torch.testing.assert_close(weights(folder / "adapter")[key], weight)


def test_the_best_checkpoint_is_kept_and_not_the_last(tmp_path):
    """The rows to learn are noise; the validation rows are what the model says by itself."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    asked = ["What is 2 plus 2?", "Say hello.", "Count to three.", "Spell cat."]
    said = answers(model, tokenizer, [chat(question, "")["prompt"] for question in asked], 12)
    noise = write(tmp_path / "train.jsonl", [chat(question, "xq zv qj kw") for question in asked])
    own = write(tmp_path / "own.jsonl", list(map(chat, asked, said)))
    folder = tmp_path / "run"
    train("sft", folder, "--train_file", noise, "--validation_file", own, "--learning_rate", 0.01)
    judged = series(folder, "eval_loss")
    best = min(judged, key=judged.get)
    record = json.loads((folder / "adapter" / "record.json").read_text())
    assert record["best_step"] == best < 6
    assert same(weights(folder / "adapter"), weights(folder / f"checkpoint-{best}"))
    assert not same(weights(folder / "adapter"), weights(folder / "checkpoint-6"))


@pytest.mark.parametrize("name", TRAINERS)
def test_random_weights_measure_a_step_and_an_evaluation_and_can_be_run_again(name, tmp_path, capsys):
    for length in (24, 32):  # in one folder
        train(name, tmp_path, "--random_weights", "tiny", "--max_length", length, "--max_steps", 6)
        record = json.loads((tmp_path / "adapter" / "record.json").read_text())
        assert record["base"] == "tiny" and record["seconds_a_step"] > 0
        assert record["max_length"] == length and "eval_loss" in capsys.readouterr().out
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_short_run_still_has_checkpoints_to_choose_from(small, tmp_path):
    """With the settings of the recipe itself, not those of --tiny."""
    settings = script("recipes/sft.py").DEFAULTS
    steps = ["--eval_steps", settings["eval_steps"], "--save_steps", settings["save_steps"]]
    few = ["--model", small, "--max_rows", 4, "--gradient_accumulation_steps", 1]
    train("sft", tmp_path, "--max_steps", 11, *steps, *few, "--save_total_limit", 20)
    saved = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    state = json.loads((tmp_path / "checkpoint-11" / "trainer_state.json").read_text())
    judged = {entry["step"] for entry in state["log_history"] if "eval_loss" in entry}
    assert judged == saved >= {2, 4, 6, 8, 10, 11}
    assert state["best_global_step"] in saved


def test_only_rows_that_are_cut_are_counted(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    said = chat("Say hello.", "hello hello hello"), chat("Say it.", "hello"), chat("Hi.", "hi")
    turns = [row["prompt"] + row["completion"] for row in said]
    sizes = [len(tokenizer.apply_chat_template(each, return_dict=True)["input_ids"]) for each in turns]
    assert sizes[0] > sizes[1] > sizes[2]
    file = write(tmp_path / "rows.jsonl", list(said))
    for limit, cut in ((sizes[0], 0), (sizes[1], 1), (sizes[1] - 1, 2)):
        folder = tmp_path / f"run-{limit}"
        words = ["--train_file", file, "--max_steps", 1, "--eval_strategy", "no"]
        words += ["--save_strategy", "no", "--load_best_model_at_end", "false"]
        train("sft", folder, *words, "--max_length", limit)
        found = re.findall(r"^(\d+) of 3 rows are longer", capsys.readouterr().out, re.MULTILINE)
        assert found == ([str(cut)] if cut else [])


def test_rows_of_which_nothing_is_left_are_refused(tmp_path):
    words = ["--tiny", "--output_dir", tmp_path / "run", "--max_length", 4]
    assert "nothing is left to learn" in line_of("sft", *words)


def test_settings_of_another_model_are_refused(tmp_path):
    shutil.copytree(MICRO, tmp_path / "other")
    dial = tmp_path / "dial.json"
    dial.write_text(json.dumps({"model": MICRO, "max_steps": 2}))
    words = ["--tiny", "--config", dial, "--output_dir", tmp_path / "run"]
    line = line_of("sft", *words, "--model", tmp_path / "other")
    assert MICRO in line and str(tmp_path / "other") in line and "dial.json" in line
    assert not (tmp_path / "run").exists()
    train("sft", tmp_path / "run", "--config", dial, "--max_rows", 4)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    dial.write_text(json.dumps({"max_steps": 2}))  # of no model in particular
    words = ["--config", dial, "--max_rows", 4]
    train("sft", tmp_path / "other run", *words, "--model", tmp_path / "other")


def test_the_attention_that_is_asked_for_is_taken(tmp_path):
    words = ["--max_steps", 1, "--eval_steps", 1, "--save_steps", 1, "--max_rows", 4]
    train("sft", tmp_path, *words, "--attn_implementation", "eager")
    record = json.loads((tmp_path / "adapter" / "record.json").read_text())
    assert record["attn_implementation"] == "eager"


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_card_without_native_bf16_gets_fp16(native, dtype, monkeypatch):
    """A T4 says that it supports bfloat16, and emulates it."""

    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    sft = script("recipes/sft.py")
    assert dtype == sft.DTYPE
    assert (sft.DEFAULTS["bf16"], sft.DEFAULTS["fp16"]) == (native, not native)


PUBLISHED = {  # by the shape's name, how many weights it must have
    **{name.lower(): architecture.params for name, architecture in architectures().items()},
    "llama-3.1-70b": architectures()["Llama-3.3-70B"].params,  # of the same shape
}


def test_a_random_model_has_as_many_weights_as_the_published_one():
    module = script("recipes/random_weights.py")
    sizes = {}
    for name in module.SHAPES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(module.config_of(name))
        sizes[name] = model.num_parameters()
    known = sizes.keys() & PUBLISHED
    assert known >= {"llama-3.2-1b", "llama-3.1-8b", "qwen3-8b", "qwen3-32b", "llama-3.1-70b"}
    assert all(sizes[name] == PUBLISHED[name] for name in known)
    assert round(sizes["qwen3-14b"] / 1e9, 1) == 14.8  # its page says so


@pytest.mark.parametrize("quantized", [False, True])
def test_random_rows_differ_and_are_as_large_as_in_a_real_model(quantized):
    """Equal rows would be too easy for a card; a product with noise of 1/width keeps its size."""
    module = script("recipes/random_weights.py")
    how = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    if quantized:
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    model, _ = module.random_base("tiny", **how)
    if quantized:
        model = model.dequantize()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            rows = layer.weight.detach()
            assert len(rows.unique(dim=0)) == len(rows)
            assert rows.std().item() * rows.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)


def test_random_weights_have_bytes_of_their_own():
    """Weights that shared their bytes would make the peak look far too small."""
    module = script("recipes/random_weights.py")
    model, _ = module.random_base("tiny", dtype=torch.float32, device_map={"": "cpu"})
    stored = [weight.untyped_storage() for weight in model.parameters()]
    held = sum({each.data_ptr(): each.nbytes() for each in stored}.values())
    assert held >= 4 * model.num_parameters()


def test_the_two_trainings_differ_in_nothing_but_the_base():
    sft, qlora = (script(f"recipes/{name}.py") for name in TRAINERS)
    apart = {"output_dir"}
    assert sft.TINY == qlora.TINY and sft.DEFAULTS.keys() == qlora.DEFAULTS.keys()
    assert {key for key in sft.DEFAULTS if sft.DEFAULTS[key] != qlora.DEFAULTS[key]} == apart


def test_a_tokenizer_without_a_pad_token_gets_llamas_own_or_the_end():
    set_pad = script("recipes/common.py").set_pad
    for added, wanted in (([], "<|im_end|>"), (["<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>")):
        tokenizer = AutoTokenizer.from_pretrained(MICRO)
        own = tokenizer.pad_token
        set_pad(tokenizer)
        assert tokenizer.pad_token == own  # what is there stays
        tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.pad_token = None
        set_pad(tokenizer)
        assert tokenizer.pad_token == wanted


def test_a_function_is_looked_up_where_one_stands_and_then_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = script("recipes/common.py").function_of
    assert Path(find("rewards:exact_match", "--rewards").__code__.co_filename) == RECIPES / "rewards.py"
    del sys.modules["rewards"]
    (tmp_path / "rewards.py").write_text("def mine():\n    return 7\n")
    assert find("rewards:mine", "--rewards")() == 7
    del sys.modules["rewards"]
    for name in ("rewards:exact_match", "rewards", "no_such_module:f"):
        with pytest.raises(SystemExit, match=f"--rewards {name}: .*wanted module:function"):
            find(name, "--rewards")
    del sys.modules["rewards"]


# --- Merging and evaluating -----------------------------------------------------------------------


def test_the_merged_model_answers_as_the_adapter_did(trained, tmp_path, capsys):
    _, folder = trained
    words = ["--tiny", *FEW]
    run("evaluate", *words, "--adapter", folder / "adapter", "--out", tmp_path / "tuned.json")
    run("merge", "--adapter", folder / "adapter", "--out", tmp_path / "merged", "--rows", 4)
    run("evaluate", *words, "--model", tmp_path / "merged", "--out", tmp_path / "merged.json",
        "--against", tmp_path / "tuned.json")  # fmt: skip
    run("evaluate", *words, "--out", tmp_path / "base.json")
    files = [tmp_path / f"{name}.json" for name in ("tuned", "merged", "base")]
    tuned, merged, base = [json.loads(file.read_text())["answers"] for file in files]
    assert merged == tuned != base
    assert "0 rows better, 0 worse. The interval includes zero" in capsys.readouterr().out
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in stored.values())  # no 4-bit codes


def merge(folder: Path, out: Path, *words) -> dict:
    run("merge", "--adapter", folder / "adapter", "--out", out, *words)
    return json.loads((out / "record.json").read_text())


def test_the_merge_is_checked_on_rows_and_says_what_it_measured(trained, tmp_path):
    """The adapter's KL by hand, on the course's own forward over the same tokens."""
    name, folder = trained
    most = [] if name == "sft" else ["--rows", 5]
    record = merge(folder, tmp_path / "all", *most)
    assert record["rows"] == (5 if most else 50) and 0 <= record["merge_kl_nats"] < 1e-6 < record["adapter_kl_nats"]
    row = chat("How many late orders?", "SELECT COUNT(*) FROM orders WHERE minutes > 45")
    record = merge(folder, tmp_path / "one", "--file", write(tmp_path / "one.jsonl", [row]))
    assert record["rows"] == 1
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    models = [load_with(folder / "adapter", used) for used in (True, False)]
    head = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    count = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    whole = head + row["completion"][0]["content"]
    ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tuned, base = [model(ids).logits[0, count - 1 :].log_softmax(-1) for model in models]
    wanted = torch.nn.functional.kl_div(base, tuned, log_target=True, reduction="sum") / len(base)
    assert record["tokens"] == len(base)
    assert record["adapter_kl_nats"] == pytest.approx(wanted.item(), rel=1e-3)


def load_with(adapter: Path, used: bool):
    """The base of an adapter as its record says, with it or without."""
    quantized = json.loads((adapter / "record.json").read_text())["load_in_4bit"]
    how = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    if quantized:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(MICRO, **how)
    if quantized:
        model = model.dequantize()
    return (PeftModel.from_pretrained(model, adapter) if used else model).eval()


def test_a_merge_that_loses_a_part_of_the_adapter_is_not_written(trained, tmp_path, monkeypatch):
    """Four tenths of the update lost: less than half of any log-probability's change."""
    _, folder = trained
    whole = LoraModel.merge_and_unload

    def lossy(self, *args, **kwargs):
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(0.6)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "merge_and_unload", lossy)
    words = ["--adapter", folder / "adapter", "--out", tmp_path / "merged", "--rows", 8]
    assert "nothing is written" in line_of("merge", *words)
    assert not (tmp_path / "merged").exists()


def test_the_base_is_quantized_as_the_record_says(tiny_run, tmp_path):
    """FP4 without double quantization: what is merged must lie around those numbers."""
    shutil.copytree(tiny_run("qlora_8b") / "adapter", tmp_path / "run" / "adapter")
    adapter = tmp_path / "run" / "adapter"
    record = json.loads((adapter / "record.json").read_text())
    settings = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    assert record.keys() >= settings.keys()
    (adapter / "record.json").write_text(json.dumps(record | settings))
    merge(tmp_path / "run", tmp_path / "merged", "--rows", 4)
    name = "model.layers.0.mlp.down_proj"
    original = load_file(Path(MICRO) / "model.safetensors")[f"{name}.weight"].float()
    rounded = dequantize_4bit(*quantize_4bit(original, quant_type="fp4"))
    low = weights(adapter)
    a, b = (low[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged - 2 * b @ a, rounded, atol=1e-5, rtol=0)  # alpha / r = 2


def test_a_merge_asks_for_room_before_it_writes_out_the_base(trained, tmp_path):
    """At the free memory that the grown model takes it goes on, at a byte less it stops."""
    name, folder = trained
    module = script("recipes/merge.py")
    base = script("recipes/common.py").base_of(folder / "adapter")
    model = script("recipes/common.py").load(*base, "cpu")
    before = sum(p.nbytes for p in model.parameters())
    if name == "sft":
        module.check_room(model, torch.float32, 0)  # nothing is in 4 bits
        return
    grown = model.dequantize().state_dict().values()
    more = sum(p.nbytes for p in grown if p.is_floating_point()) - before
    model = script("recipes/common.py").load(*base, "cpu")
    tied = model.get_input_embeddings().weight.nbytes if model.config.tie_word_embeddings else 0
    module.check_room(model, torch.float32, more - tied)
    with pytest.raises(SystemExit, match="--device cpu"):
        module.check_room(model, torch.float32, more - tied - 1)


def test_a_base_that_is_hardly_in_4_bits_is_refused(tmp_path):
    """Experts in one tensor are not reached: a mixture of experts, with half of its weights in them."""
    folder = tmp_path / "moe"
    shutil.copytree(MICRO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_experts=16,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    line = line_of("qlora_8b", "--tiny", "--model", folder, "--output_dir", tmp_path / "run")
    assert "experts" in line and "in 4 bits" in line and not (tmp_path / "run").exists()
    four, every, _ = script("recipes/common.py").weights_in_4_bits(AutoModelForCausalLM.from_pretrained(folder))
    assert (four, every) == (0, sum(map(torch.numel, AutoModelForCausalLM.from_config(config).parameters())))


def test_a_record_that_leaves_something_open_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": MICRO}))
    record = {"revision": "main", "dtype": "float32", "load_in_4bit": True}
    (tmp_path / "record.json").write_text(json.dumps(record))
    line = line_of("merge", "--adapter", tmp_path, "--out", tmp_path / "merged")
    assert "lacks bnb_4bit_quant_type" in line
    (tmp_path / "record.json").write_text(json.dumps(record | {"load_in_4bit": False}))
    shutil.copy(Path(MICRO) / "tokenizer.json", tmp_path)
    shutil.copy(Path(MICRO) / "tokenizer_config.json", tmp_path)
    line = line_of("merge", "--adapter", tmp_path, "--out", tmp_path / "merged")
    assert "--file" in line  # nor does it say on which rows to check


def test_an_adapter_of_another_base_is_not_merged_unseen(trained, tmp_path):
    """An adapter whose B is zero changes nothing: somebody took the wrong folder."""
    from safetensors.torch import save_file

    _, folder = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    zeros = {k: w * ("lora_B" not in k) for k, w in weights(folder / "adapter").items()}
    save_file(zeros, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="changes nothing"):
        words = ["--adapter", tmp_path / "adapter", "--rows", 4]
        run("merge", *words, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_are_those_of_the_course_whatever_the_batch(batch_size, tmp_path):
    out = tmp_path / "base.json"
    run("evaluate", "--tiny", "--batch_size", batch_size, "--out", out)
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()[:24]]
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    prompts = [row["prompt"] for row in rows]
    wanted = answers(model, AutoTokenizer.from_pretrained(MICRO), prompts, 48)
    assert json.loads(out.read_text())["answers"] == wanted


def test_the_scorer_is_yours_and_the_default_wants_the_completion(tmp_path, monkeypatch):
    module = "def length(answer, row):\n    return min(len(answer), 100) / 100\n"
    (tmp_path / "my_scores.py").write_text(module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)  # where one works; Python looks beside the script
    run("evaluate", "--tiny", "--out", tmp_path / "a.json", "--scorer", "my_scores:length")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["scores"] == [min(len(answer), 100) / 100 for answer in found["answers"]]
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    exact = script("recipes/evaluate.py").exact_match
    assert exact(" 4 \n", chat("2 + 2?", "4")) and not exact("5", chat("2 + 2?", "4"))


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "<think>2 + 2</think>\n\n4",
        "<think>\n\n</think>\n4",
        "<think>2 +",
        "a</think>b</think>4",
    ],
)
def test_reasoning_is_cut_as_the_course_does_it(text):
    answer_of = script("recipes/answers.py").answer_of
    assert answer_of(text) == course_answer_of(text)
    if "<think>" in text:  # with the first mark in the prompt, the text is what comes behind it
        assert answer_of(text.removeprefix("<think>"), opened=True) == answer_of(text)
    assert answer_of("4", opened=True) == ""


def test_a_template_of_ones_own_is_what_the_base_reads(tmp_path):
    """One that opens the reasoning: what never ends is no answer. And it is the file that counts."""
    template = (Path(MICRO) / "chat_template.jinja").read_text()
    for name, text in {"same": template, "open": template + "<think>\n"}.items():
        (tmp_path / f"{name}.jinja").write_text(text)
        words = ["--chat_template", tmp_path / f"{name}.jinja", "--out", tmp_path / f"{name}.json"]
        run("evaluate", "--tiny", "--limit", 6, "--max_new_tokens", 8, *words)
    run("evaluate", "--tiny", "--limit", 6, "--max_new_tokens", 8, "--out", tmp_path / "own.json")
    said = {name: json.loads((tmp_path / f"{name}.json").read_text())["answers"] for name in ("own", "same", "open")}
    assert said["own"] == said["same"] and any(said["own"])
    assert said["open"] == [""] * 6


def test_the_best_prompt_is_asked_and_the_rows_stay_comparable(tmp_path, capsys):
    """Another system message and two answered rows change the answers, and not the rows."""
    (tmp_path / "system.txt").write_text("Answer with one number.\n")
    words = ["--tiny", "--limit", 6, "--max_new_tokens", 8]
    run("evaluate", *words, "--out", tmp_path / "plain.json")
    best = ["--system", tmp_path / "system.txt", "--examples", DATA / "ask" / "train.jsonl", 2]
    against = ["--out", tmp_path / "best.json", "--against", tmp_path / "plain.json"]
    run("evaluate", *words, *best, *against)
    assert "over 6 rows" in capsys.readouterr().out
    plain, asked = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("plain", "best")]
    assert plain["answers"] != asked["answers"] and plain["rows"] == asked["rows"]
    leak = ["--examples", HELD_OUT, 2, "--out", tmp_path / "leak.json"]
    assert "training rows" in line_of("evaluate", *words, *leak)


def test_examples_are_the_first_ones_or_drawn_by_a_seed(endpoint, tmp_path):
    """A seed draws rows of the whole file, the same ones again, and no row twice."""
    shots = write(tmp_path / "train.jsonl", [chat(f"Shot {number}", str(number)) for number in range(20)])
    file = write(tmp_path / "rows.jsonl", [chat("Say yes", "yes")])
    words = ["--endpoint", endpoint, "--model", "m", "--file", file, "--out", tmp_path / "a.json"]
    words += ["--examples", shots]

    def shown(*more):
        Served.asked.clear()
        run("evaluate", *words, *more)
        turns = Served.asked[0]["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4 + ["user"]
        pairs = zip(turns[0:-1:2], turns[1::2], strict=True)
        assert all(question["content"] == f"Shot {answer['content']}" for question, answer in pairs)
        return [int(turn["content"]) for turn in turns if turn["role"] == "assistant"]

    assert shown(4) == [0, 1, 2, 3]
    draws = [shown(4, "--examples_seed", seed) for seed in range(6)]
    assert draws[3] == shown(4, "--examples_seed", 3)
    assert json.loads((tmp_path / "a.json").read_text())["asked"]["examples_seed"] == 3
    assert len(set(map(tuple, draws))) == 6 and all(len(set(draw)) == 4 for draw in draws)
    assert max(max(draw) for draw in draws) > 9  # not of the first rows alone
    assert "got 21, wanted a number" in line_of("evaluate", *words, 21)
    assert "got few, wanted a number" in line_of("evaluate", *words, "few")
    assert "--examples FILE N" in line_of("evaluate", *words[:-2], "--examples_seed", 1)


# --- A server -------------------------------------------------------------------------------------


class Served(BaseHTTPRequestHandler):
    """Answers each question with its last word, after some reasoning."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        word = body["messages"][-1]["content"].split()[-1]
        message = {"content": f"<think>the last word</think>\n\n{word}"}
        ends = "length" if word == "long" else "stop"
        reply = json.dumps({"choices": [{"message": message, "finish_reason": ends}]}).encode()
        self.send_response(200 if word != "broken" else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # evaluate.py asks 16 at once, and five may wait by default

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def running(handler):
    """A server on a free port, in a thread of its own."""
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def endpoint():
    Served.asked.clear()
    with running(Served) as server:
        yield server.url


def test_what_is_served_is_scored(endpoint, tmp_path, capsys):
    rows = [chat(f"Which word is {word}", word) for word in ("one", "two", "long", "four")]
    rows += [chat("Which word is five", "six")]
    system, shots = tmp_path / "system.txt", write(tmp_path / "train.jsonl", [chat("a b", "b")])
    system.write_text("Be brief.")
    words = ["--endpoint", endpoint, "--model", "tuned", "--out", tmp_path / "served.json"]
    words += ["--system", system, "--examples", shots, 1, "--max_new_tokens", 9]
    run("evaluate", *words, "--file", write(tmp_path / "rows.jsonl", rows))
    found = json.loads((tmp_path / "served.json").read_text())
    assert found["answers"] == ["one", "two", "long", "four", "five"]
    assert found["scores"] == [1, 1, 1, 1, 0] and found["cut"] == 1 and found["warnings"] == []
    assert "1 answers were cut" in capsys.readouterr().out
    first = next(asked for asked in Served.asked if "one" in str(asked["messages"]))
    assert first["path"] == "/v1/chat/completions"
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("tuned", 0, 9)
    wanted = [("system", "Be brief."), ("user", "a b"), ("assistant", "b")]
    wanted += [("user", "Which word is one")]
    assert [(turn["role"], turn["content"]) for turn in first["messages"]] == wanted


class Hosted(BaseHTTPRequestHandler):
    """Says yes, but refuses as hosted models do: the form of both bodies is that of OpenAI's answers with code 400."""

    asked: ClassVar[list[dict]] = []
    bare: ClassVar[bool] = False  # a proxy's form, without `param` and with a code of its own

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        wrong = None
        if "max_tokens" in body:
            wrong = "parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        elif body.get("temperature", 1) != 1:
            wrong = "value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
        elif "long" in body["messages"][-1]["content"]:
            wrong = "length"
        reply = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
        if wrong == "length":  # of another kind, about an option that could be renamed
            reply = {"error": {"message": "'max_tokens' is too large: 9", "param": "max_tokens", "code": 400}}
        elif wrong:
            option, code = wrong.split("'")[1], f"unsupported_{wrong.split(':')[0]}"
            named = {"code": "invalid_request_body"} if self.bare else {"param": option, "code": code}
            reply = {"error": {"message": f"Unsupported {wrong}", "type": "invalid_request_error", **named}}
        self.send_response(400 if wrong else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def hosted():
    Hosted.asked.clear()
    with running(Hosted) as server:
        yield server.url


@pytest.mark.parametrize("bare", [False, True])
def test_what_a_hosted_model_refuses_is_sent_otherwise_and_said(bare, hosted, tmp_path, monkeypatch, capsys):
    """Twelve rows, four at once: each option is refused at most once a thread, and warned of once."""
    monkeypatch.setattr(Hosted, "bare", bare)
    file = write(tmp_path / "rows.jsonl", [chat(f"Is it {number}?", "yes") for number in range(12)])
    words = ["--endpoint", hosted, "--model", "m", "--file", file, "--batch_size", 4, "--max_new_tokens", 9]
    run("evaluate", *words, "--out", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["mean"] == 1 and len(record["answers"]) == 12
    first = {"warning": "server_refuses", "option": "max_tokens", "sent": 9, "instead": "max_completion_tokens"}
    second = {"warning": "server_refuses", "option": "temperature", "sent": 0, "instead": None}
    assert record["warnings"] == warnings_in(capsys.readouterr().out) == [first, second]
    taken = [body for body in Hosted.asked if "max_tokens" not in body and "temperature" not in body]
    assert len(taken) == 12 and {body["max_completion_tokens"] for body in taken} == {9}
    assert len(Hosted.asked) <= 12 + 2 * 4


def test_another_bad_request_is_the_one_line_that_it_was(hosted, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [chat("A long one", "yes")])
    line = line_of("evaluate", "--endpoint", hosted, "--model", "m", "--file", file, "--out", tmp_path / "a.json")
    assert "is too large" in line and hosted in line
    assert [each["option"] for each in warnings_in(capsys.readouterr().out)] == ["max_tokens", "temperature"]


def test_a_server_that_fails_or_is_not_there_is_named(endpoint, tmp_path):
    file = write(tmp_path / "rows.jsonl", [chat("It is broken", "broken")])
    words = ["--model", "tuned", "--file", file, "--out", tmp_path / "served.json"]
    assert "404" in line_of("evaluate", "--endpoint", endpoint, *words)
    nobody = "http://127.0.0.1:9/v1"
    assert nobody in line_of("evaluate", "--endpoint", nobody, *words)


# --- Intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 31, 400])
def test_the_interval_of_a_share_is_wilsons(n):
    interval = script("recipes/evaluate.py").interval
    for right in {0, 1, n // 3, n}:
        wanted = binomtest(right, n).proportion_ci(method="wilson")
        got = interval([1.0] * right + [0.0] * (n - right))
        assert got == pytest.approx((wanted.low, wanted.high), abs=1e-4)


@pytest.mark.parametrize("n", [6, 24, 132])
def test_the_paired_interval_of_zeros_and_ones_is_the_courses(n):
    """All ways of being better and worse: the one of ftlab, which has tests of its own."""
    paired = script("recipes/evaluate.py").paired_interval
    for better, worse in itertools.product(range(6), range(6)):
        if better + worse > n:
            continue
        same = n - better - worse
        ours = [1.0] * better + [0.0] * worse + [1.0] * same
        theirs = [0.0] * better + [1.0] * worse + [1.0] * same
        wanted = statistics.agresti_min_interval(better, worse, n)
        assert paired(ours, theirs) == pytest.approx(wanted, abs=1e-4)


def test_the_interval_of_other_scores_is_students_for_many_rows():
    module, random = script("recipes/evaluate.py"), np.random.default_rng(3)
    ours, theirs = random.uniform(0.2, 1, 300), random.uniform(0, 0.9, 300)
    _, low, high = statistics.student_interval(ours - theirs)
    assert module.paired_interval(list(ours), list(theirs)) == pytest.approx((low, high), abs=4e-3)
    _, low, high = statistics.student_interval(ours)
    assert module.interval(list(ours)) == pytest.approx((low, high), abs=4e-3)


def test_rows_of_a_group_count_as_one():
    """Each of 60 customers has five rows with one score: as sure as 60 rows, and not as 300."""
    module, random = script("recipes/intervals.py"), np.random.default_rng(4)
    means = random.uniform(0, 1, 60)
    scores, groups = list(np.repeat(means, 5)), list(np.repeat(np.arange(60), 5))
    _, low, high = statistics.student_interval(means)
    assert module.interval(scores, groups) == pytest.approx((low, high), abs=0.01)
    zeros = [0.0] * len(scores)
    assert module.paired_interval(scores, zeros, groups) == pytest.approx((low, high), abs=0.01)
    alone = module.interval(scores)
    assert alone[1] - alone[0] < 0.6 * (high - low)


@pytest.mark.parametrize("seed", range(5))
def test_groups_never_narrow_an_interval(seed):
    """Not even where every group scores the same, and a bootstrap over groups has no width."""
    module, random = script("recipes/intervals.py"), np.random.default_rng(seed)
    scores = list(random.integers(0, 2, 40).astype(float))
    others = list(random.integers(0, 2, 40).astype(float))
    groups = list(random.integers(0, 8, 40))
    pairs = [
        (module.interval(scores), module.interval(scores, groups)),
        (module.interval([1.0] * 40), module.interval([1.0] * 40, groups)),
        (module.paired_interval(scores, others), module.paired_interval(scores, others, groups)),
    ]
    for alone, grouped in pairs:
        assert grouped[0] <= alone[0] and alone[1] <= grouped[1]


@pytest.mark.parametrize("customers", [4, 7, 12])
def test_few_groups_are_said_and_too_few_are_not_compared(customers, endpoint, tmp_path, capsys):
    rows = [chat(f"Is {number} right", "right") | {"group": number % customers} for number in range(24)]
    file = write(tmp_path / "rows.jsonl", rows)
    words = ["--endpoint", endpoint, "--model", "m", "--file", file]
    run("evaluate", *words, "--out", tmp_path / "a.json")
    told = capsys.readouterr().out
    assert ("too narrow" in told) == (customers < 10)
    assert json.loads((tmp_path / "a.json").read_text())["groups"] == [r["group"] for r in rows]
    words += ["--out", tmp_path / "b.json", "--against", tmp_path / "a.json"]
    if customers < 6:
        assert "4 groups are too few" in line_of("evaluate", *words)
    else:
        run("evaluate", *words)
        assert f"over {customers} groups" in capsys.readouterr().out


# --- Bad input ------------------------------------------------------------------------------------


def line_of(name: str, *words) -> str:
    """The one line with which it stops."""
    with pytest.raises(SystemExit) as stopped:
        run(name, *words)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def gated(*args, **kwargs):
    raise hub.GatedRepoError("401 Client Error", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("name", [*TRAINERS, "evaluate"])
def test_a_gated_model_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", gated)  # transformers' own words come from there
    where = "--out" if name == "evaluate" else "--output_dir"
    line = line_of(name, "--tiny", "--model", "some/gated", where, tmp_path / "run")
    assert "some/gated is gated" in line and "hf auth login" in line
    assert "https://huggingface.co/some/gated" in line


@pytest.mark.parametrize("name", [*TRAINERS, "evaluate"])
@pytest.mark.parametrize("model", ["no/such-model", "/no/such/folder", str(DATA / "ask")])
def test_a_model_that_is_not_there_is_named(name, model, tmp_path):
    where = "--out" if name == "evaluate" else "--output_dir"
    assert model in line_of(name, "--tiny", "--model", model, where, tmp_path / "run")


BAD_ROWS = {
    "other columns": ('{"question": "q", "answer": "a"}', ["line 1", "question, answer", "prompt"]),
    "messages": ('{"messages": []}', ["line 1", "messages", "every token"]),
    "no JSON": ("prompt,completion", ["line 1", "no JSON"]),
    "a list": ("[1]", ["line 1", "list"]),
    "mixed": ('{"prompt": "q", "completion": []}', ["line 1", "two texts or two lists of messages"]),
    "empty": ("", ["empty"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_with_their_line(case, tmp_path):
    text, told = BAD_ROWS[case]
    (tmp_path / "bad.jsonl").write_text(text)
    given = {"train_file": ("sft", "--output_dir"), "file": ("evaluate", "--out")}
    for option, (name, where) in given.items():
        bad = [f"--{option}", tmp_path / "bad.jsonl"]
        line = line_of(name, "--tiny", *bad, where, tmp_path / "to")
        assert "bad.jsonl" in line and all(words in line for words in told)


@pytest.fixture
def big(tmp_path, monkeypatch) -> str:
    """A model of 1.2 billion weights, of which only the configuration and a tokenizer are there. No GPU is seen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "big"
    script("recipes/random_weights.py").config_of("llama-3.2-1b").save_pretrained(folder)
    AutoTokenizer.from_pretrained(MICRO).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["sft", "qlora_8b", "dpo", "kto", "reward_model", "grpo", "distill"])
def test_a_large_model_is_not_trained_on_a_cpu_by_accident(name, big, tmp_path):
    """It stops before rows or weights are looked for; what is meant goes on to the missing rows."""
    more = {"grpo": ["--rewards", "rewards:exact_match"], "distill": ["--teacher", MICRO]}.get(name, [])
    words = ["--output_dir", tmp_path / "run", *more, "--model"]
    line = line_of(name, *words, big)
    assert "no GPU is seen" in line and "1.2 billion weights" in line and "--use_cpu true" in line and big in line
    for meant in ([MICRO], [big, "--use_cpu", "true"], [big, "--tiny", "--train_file", tmp_path / "none"]):
        if name != "distill" or MICRO in meant:  # its teacher has other tables
            assert "no file" in line_of(name, *words, *meant)
    if name in ("sft", "dpo"):
        odd = ["--random_weights", "llama-3.1-8b", "--output_dir", tmp_path / "run"]
        assert "llama-3.1-8b has 8.0 billion" in line_of(name, *odd)
    if name == "distill":
        assert big in line_of(name, "--output_dir", tmp_path / "run", "--model", MICRO, "--teacher", big)


def test_the_base_of_an_adapter_is_what_counts(big, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": big}))
    record = {"revision": "main", "dtype": "float32", "load_in_4bit": False}
    (tmp_path / "adapter" / "record.json").write_text(json.dumps(record))
    for name in ("dpo", "kto"):
        line = line_of(name, "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "run")
        assert "no GPU is seen" in line and big in line


def test_messages_for_a_model_without_a_template_are_refused(tmp_path):
    shutil.copytree(MICRO, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    words = ["--tiny", "--model", tmp_path / "base", "--output_dir", tmp_path / "run"]
    assert "chat template" in line_of("sft", *words)


def test_what_is_missing_or_in_the_way_is_said(trained, tmp_path):
    _, folder = trained
    adapter = folder / "adapter"
    assert "no file" in line_of("sft", "--model", MICRO, "--output_dir", tmp_path / "run")
    assert "no whole checkpoint" in line_of("sft", "--tiny", "--resume", "--output_dir", tmp_path)
    odd = ["--random_weights", "llama-9", "--output_dir", tmp_path / "run"]
    assert "llama-3.1-8b" in line_of("qlora_8b", *odd)
    assert "adapter_config.json" in line_of("merge", "--adapter", tmp_path, "--out", tmp_path / "m")
    assert "is there already" in line_of("merge", "--adapter", adapter, "--out", tmp_path)
    shutil.copytree(adapter, tmp_path / "foreign")
    (tmp_path / "foreign" / "record.json").unlink()
    foreign = ["--adapter", tmp_path / "foreign", "--out", tmp_path / "out"]
    assert "record.json" in line_of("merge", *foreign)
    assert "record.json" in line_of("evaluate", "--tiny", *foreign)
    wrong = ["--out", tmp_path / "a.json", "--scorer", "no_such_module:f"]
    assert "no_such_module" in line_of("evaluate", "--tiny", *wrong)


def test_scores_of_other_rows_are_not_compared(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    run("evaluate", "--tiny", "--limit", 6, "--max_new_tokens", 2, "--out", first)
    words = ["--tiny", "--limit", 7, "--max_new_tokens", 2, "--out", second, "--against", first]
    assert "other rows" in line_of("evaluate", *words)


# --- The page and the house -----------------------------------------------------------------------


def on_a_gpu(name: str, records: Path) -> str:
    """What the page must say of a recipe: the newest of its records that names a card."""
    found = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    found = [record for record in found if record["recipe"] == name and record["card"]]
    if not found:
        return "not yet run on a GPU"
    newest = max(found, key=lambda record: record["date"])
    return f"run on {newest['card']}, {newest['date']}"


def told(page: str) -> dict[str, str]:
    """The last column of the page's table, by recipe."""
    return dict(re.findall(r"^\| \[`(\w+)\.py`\].*\| ([^|]+) \|$", page, re.MULTILINE))


def test_the_page_says_of_each_recipe_whether_it_ran_on_a_gpu():
    page = told((RECIPES / "README.md").read_text(encoding="utf-8"))
    assert page == {name: on_a_gpu(name, RECIPES / "records") for name in NAMES}
    head = (RECIPES / "README.md").read_text(encoding="utf-8").partition("| script |")[0]
    assert ("not yet on a GPU" in head) == (set(page.values()) == {"not yet run on a GPU"})


def test_the_page_and_the_scripts_pin_what_the_course_is_tested_with():
    """The first lines of each script are what one copies; pyproject.toml is the one list."""
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = dict(re.findall(r'^  "(trl|transformers|peft|bitsandbytes)==([\d.*]+)"', listed, re.MULTILINE))
    assert len(pins) == 4
    for file in RECIPES.glob("*.py"):
        found = re.findall(r'"([a-z]+)(?:\[vllm\])?==([\d.*]+)"', file.read_text(encoding="utf-8"))
        assert set(found) <= set(pins.items()), file.name
        assert found or file.stem not in NAMES
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert f"`trl=={pins['trl']}`" in page
    for name in ("transformers", "peft", "bitsandbytes"):
        assert f"`{name}` {pins[name].removesuffix('.*')}" in page


def commands_in(text):
    """(recipe, options) of each `python NAME.py ...` of a page or notebook, arrays of its shell put in."""
    lines = text.replace("\\\n", " ")
    shared = dict(re.findall(r"^\s*(\w+)=\((--[^)]+)\)", lines, re.MULTILINE))  # judge=(--file ...)
    for name, words in re.findall(r"\bpython (\w+)\.py (.*)$", lines, re.MULTILINE):
        for variable, options in shared.items():
            words = words.replace(f'"${{{variable}[@]}}"', options)
        if (RECIPES / f"{name}.py").is_file():
            yield name, words.partition("#")[0].partition(";")[0]


def options_of(name):
    recipe = script(f"recipes/{name}.py")
    known = set(re.findall(r'add_argument\(\s*"--(\w+)"', Path(recipe.__file__).read_text(encoding="utf-8")))
    known |= {"examples", "examples_seed"} if hasattr(recipe, "add_examples") else set()
    configs = [each for key, each in vars(recipe).items() if key == "Recipe" or key.endswith("Config")]
    return known | {field for each in configs for field in getattr(each, "__dataclass_fields__", ())}


def pages():
    """{name: text} of the recipes' page and of the prose of each notebook that has commands of recipes."""
    found = {"recipes/README.md": (RECIPES / "README.md").read_text(encoding="utf-8")}
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        if list(commands_in(text)):
            found[file.name] = text
    return found


@pytest.mark.parametrize("page", pages())
def test_commands_on_a_page_name_options_that_the_scripts_have(page):
    text = pages()[page]
    found = list(commands_in(text))
    for name, words in found:
        assert "$" not in re.sub(r"\$\w+", "", words), f"an array that the page doesn't set: {words}"
        assert set(re.findall(r"--(\w+)", words)) <= options_of(name), (name, words)
    assert len(found) > (25 if page == "recipes/README.md" else 0)


def test_a_record_changes_what_the_page_must_say(tmp_path):
    common = script("recipes/common.py")
    common.write_record(tmp_path / "cpu.json", recipe="sft")
    if not torch.cuda.is_available():
        assert on_a_gpu("sft", tmp_path) == "not yet run on a GPU"  # a run on a CPU is none
    for number, date in enumerate(("2026-11-02", "2027-01-05")):
        record = {"recipe": "sft", "card": f"Card {number}", "date": date}
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    assert on_a_gpu("sft", tmp_path) == "run on Card 1, 2027-01-05"
    assert on_a_gpu("merge", tmp_path) == "not yet run on a GPU"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.py")), ids=lambda file: file.name)
def test_a_recipe_needs_neither_ftlab_nor_wide_screens(file):
    text = file.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    beside = {other.stem for other in RECIPES.glob("*.py")}
    libraries = {name.split(".")[0] for name in names} - beside - set(sys.stdlib_module_names)
    known = {
        "torch",
        "numpy",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "tokenizers",
        "openai",
        "yaml",
    }
    assert libraries <= known
    assert max(map(len, text.splitlines())) <= 100


# --- What lessons show of them --------------------------------------------------------------------

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(cells: dict[str, dict]) -> list[tuple[str, str, str]]:
    """(cell, language, text) of each fenced block in the prose."""
    prose = {name: cell for name, cell in cells.items() if cell["cell_type"] == "markdown"}
    found = []
    for name, cell in prose.items():
        for language, text in FENCED.findall("".join(cell["source"])):
            found.append((name, language, text))
    return found


def strange_lines(cells: dict[str, dict]) -> list[str]:
    """Blocks that begin with "# recipes/NAME.py" and whose lines don't stand in it one after the other."""
    found = []
    for name, _, text in blocks_of(cells):
        head, _, lines = text.partition("\n")
        file = head.removeprefix("# ")
        if file.startswith("recipes/") and lines not in (ROOT / file).read_text(encoding="utf-8"):
            found.append(f"{name}: {file}")
    return found


def strange_options(cells: dict[str, dict]) -> list[str]:
    """Options of `python sft.py --option` and its like that the recipe doesn't know."""
    found = []
    for name, _, text in blocks_of(cells):
        for line in text.replace("\\\n", " ").splitlines():
            command = re.search(rf"python (?:recipes/)?({'|'.join(TRAINERS)})\.py(.*)", line)
            if command:
                recipe = script(f"recipes/{command[1]}.py")
                known = {
                    *recipe.Recipe.__dataclass_fields__,
                    *recipe.SFTConfig.__dataclass_fields__,
                    "config",  # TrlParser's: a file with any of these
                }
                options = re.findall(r"--(\w+)", command[2])
                found += [f"{name}: --{option}" for option in options if option not in known]
    return found


def test_lessons_show_a_recipes_lines_as_they_are():
    assert strange_lines(CELLS) == [] and strange_options(CELLS) == []
    assert any(text.startswith("# recipes/sft.py") for _, _, text in blocks_of(CELLS))


def test_a_changed_line_and_an_unknown_option_are_found():
    def cell(text):
        return {"a": {"cell_type": "markdown", "source": [text]}}

    line = '    "max_length": 1024,\n'
    assert strange_lines(cell(f"```python\n# recipes/sft.py\n{line}```")) == []
    changed = line.replace("1024", "2048")
    assert strange_lines(cell(f"```python\n# recipes/sft.py\n{changed}```")) == ["a: recipes/sft.py"]
    command = "```bash\npython sft.py --max_length 9 \\\n    --no_such 3\n```"
    assert strange_options(cell(command)) == ["a: --no_such"]

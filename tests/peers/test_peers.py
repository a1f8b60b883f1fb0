"""What ftlab.dialects writes, as Axolotl and LLaMA-Factory take it: their own validation, preprocessing and training.

In the environments that `make stack` makes; where one is absent its tests are skipped, and say so. TRL and Unsloth run
in the course's own environment.
"""

import importlib.metadata
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from peers import runner
from scripts import ROOT, script
from transformers import AutoTokenizer

from ftlab import dialects
from notebooks import CELLS, changed

MICRO = str(ROOT / "data" / "micro" / "model")
WRITERS = {"axolotl": dialects.write_axolotl, "llamafactory": dialects.write_llamafactory}
STEPS = 5
stack_peers = script("experiments/stack_peers/run.py")


def needs(tool: str) -> None:
    try:
        runner.python_of(tool)
    except RuntimeError as error:
        pytest.skip(f"{tool.upper()} NOT TESTED: {error}")


def written(tool: str, name: str, folder: Path, rows=None) -> Path:
    args, lora = stack_peers.settings("dpo" if name == "dpo" else "sft", STEPS)
    if name == "other":
        args.optim, args.gradient_checkpointing, lora.target_modules = "sgd", True, ["q_proj", "v_proj"]
        args.weight_decay, args.save_strategy, args.max_steps, args.num_train_epochs = 0.1, "epoch", -1, 2
    rows = rows or stack_peers.rows_of("dpo" if name == "dpo" else "sft")
    return WRITERS[tool](args, lora, MICRO, rows, folder)


@pytest.mark.parametrize("name", ["sft", "dpo", "other"])
@pytest.mark.parametrize("tool", WRITERS)
def test_the_tools_own_validation_reads_every_value_as_we_wrote_it(tool, name, tmp_path):
    needs(tool)
    config = written(tool, name, tmp_path)
    got = runner.ask(tool, "validate", config)
    lists = ("lora_target", "dataset", "report_to")  # LLaMA-Factory splits them
    differ = {}
    for key, value in yaml.safe_load(config.read_text()).items():
        if key == "datasets":
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
    committed = json.loads(dialects.KEYS_FILE.read_text(encoding="utf-8"))
    assert runner.ask("axolotl", "keys") == committed["keys"]


def test_axolotl_drops_an_unknown_key_and_llamafactory_refuses_it(tmp_path):
    for tool, key in (("axolotl", "num_train_epochs"), ("llamafactory", "num_epochs")):
        needs(tool)
        file = written(tool, "sft", tmp_path / tool)
        file.write_text(file.read_text() + f"{key}: 7\n")
        if tool == "axolotl":
            got = runner.ask(tool, "validate", file)
            assert key not in got and got["num_epochs"] == 3
        else:
            with pytest.raises(RuntimeError, match=r"not used by the HfArgumentParser.*num_epochs"):
                runner.ask(tool, "validate", file)


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("tool", WRITERS)
def test_the_tools_tokens_and_labels_are_those_of_the_template(tool, name, tmp_path):
    """The last row has two turns: its first answer is a part of the prompt, and does not count."""
    needs(tool)
    rows = stack_peers.rows_of(name)
    first, second = rows[0], rows[1]
    answer = first["completion" if name == "sft" else "chosen"]
    rows.append({**second, "prompt": first["prompt"] + answer + second["prompt"][-1:]})
    roles = [message["role"] for message in rows[-1]["prompt"] if message["role"] != "system"]
    assert roles == ["user", "assistant", "user"]
    theirs = runner.ask(tool, "tokens", written(tool, name, tmp_path, rows))
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    assert [runner.peer_row(row) for row in theirs] == [runner.wanted_row(row, tokenizer) for row in rows]


def test_axolotl_reads_the_rows_that_were_written_last(tmp_path):
    """It keeps what it prepared under the names of the files: other rows in the same folder would not be looked at."""
    needs("axolotl")
    rows, counts = stack_peers.rows_of("sft"), []
    for part in (rows[:5], rows[5:8]):
        counts.append(len(runner.ask("axolotl", "tokens", written("axolotl", "sft", tmp_path, part))))
        assert (tmp_path / "axolotl_prepared").is_dir()
    assert counts == [5, 3]


@cache
def trl(name: str) -> dict:
    return stack_peers.ours(name, "trl", "micro", STEPS)


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("tool", WRITERS)
def test_five_steps_are_those_of_trl(tool, name, tmp_path):
    """Each loss and each rate, whatever versions of torch's companions the tool pins."""
    needs(tool)
    run = runner.train(written(tool, name, tmp_path))
    assert len(run["loss"]) == STEPS and run["cpu_seconds"] > 0 and run["peak_mb"] > 100
    assert run["loss"] == pytest.approx(trl(name)["loss"], rel=1e-5)
    assert run["learning_rate"] == pytest.approx(trl(name)["learning_rate"])
    assert list((tmp_path / "output").glob("adapter_model.safetensors"))


def test_without_the_plugin_axolotls_seed_does_not_decide_the_run(tmp_path):
    needs("axolotl")
    config = written("axolotl", "sft", tmp_path)
    stack_peers.change(config, plugins=None)
    run = runner.train(config)["loss"]
    assert run[:2] == pytest.approx(trl("sft")["loss"][:2], rel=1e-5)  # lora_B is 0, and the first rate too
    assert run[2:] != pytest.approx(trl("sft")["loss"][2:], rel=1e-4)


UNSLOTH = """
import json, os, pathlib, sys
sys.path[:0] = sys.argv[2:]
import drift
from experiments.stack_peers import run as stack_peers
loss = stack_peers.ours("sft", "unsloth", "micro", int(sys.argv[1]))["loss"]
used = [use for use in drift.uses(map(drift.read, drift.files())) if use.name.startswith("unsloth")]
missing = [str(gone) for gone in drift.missing(used)]
json.dump({"loss": loss, "used": len(used), "missing": missing}, open("log.json", "w"))
os.chdir("notebooks")
exec(pathlib.Path("../cell.py").read_text("utf-8"), {"__name__": "__main__"})
"""
SMALLER = {
    '"load_in_4bit": True': '"load_in_4bit": False',
    'report_to="none"': 'report_to="none", max_steps=2, use_cpu=True',
    "bf16=not t4": "bf16=False",
}


@pytest.fixture(scope="module")
def unsloth(llama, tmp_path_factory) -> Path:
    """The folder of a process that trained five steps with Unsloth, then ran the script that notebook 10 writes.

    One for both, since importing it takes ten seconds; and of its own, since that patches TRL.
    """
    folder = tmp_path_factory.mktemp("unsloth")
    parts = ["".join(CELLS[f"10_your_own_data#{id}"]["source"]) for id in ("unsloth", "unsloth-train")]
    code = "\n".join(part.partition("\n")[2] for part in parts)  # without the lines of %%writefile
    (folder / "cell.py").write_text(changed(code, SMALLER), encoding="utf-8")
    runs = folder / "notebooks" / "runs" / "your_own_data"  # what the cells before it leave there
    runs.mkdir(parents=True)
    rows = (ROOT / "data" / "tidy" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [{key: json.loads(row)[key] for key in ("prompt", "completion", "group")} for row in rows[:32]]
    for side, some in {"train": pairs[:24], "validation": pairs[24:]}.items():
        (runs / f"{side}.jsonl").write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    template = json.loads((llama / "tokenizer_config.json").read_text()).get("chat_template")
    template = template or (llama / "chat_template.jinja").read_text(encoding="utf-8")
    (runs / "template.jinja").write_text(template, encoding="utf-8")
    files = {f"{side}_file": str(runs / f"{side}.jsonl") for side in ("train", "validation")}
    dial = {"model": str(llama), "learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    dial |= {"seed": 0, "max_length": 90, "gradient_accumulation_steps": 1, "revision": "main"}
    dial |= {"lora_r": 4, "lora_alpha": 8}
    dial |= {"eval_steps": 0.5, "save_steps": 0.5, "eval_strategy": "steps", "logging_steps": 1}
    dial |= {"load_best_model_at_end": True}
    dial |= {"chat_template_path": str(runs / "template.jinja")}
    (runs / "dial.json").write_text(json.dumps(dial | files), encoding="utf-8")
    command = [sys.executable, "-c", UNSLOTH, str(STEPS), str(ROOT), str(ROOT / "tests")]
    env = runner.QUIET | {"UNSLOTH_AUTO_INSTALL": "0", "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONPATH": str(ROOT)}
    env["UNSLOTH_COMPILE_LOCATION"] = str(folder / "compiled")
    runner.measured(command, folder, {**runner.os.environ, **env})
    return folder


def test_five_steps_of_unsloth_are_those_of_trl_and_it_has_what_the_course_calls(unsloth):
    said = json.loads((unsloth / "log.json").read_text(encoding="utf-8"))
    assert said["loss"] == pytest.approx(trl("sft")["loss"], rel=1e-5)
    assert said["used"] >= 2 and said["missing"] == []


def test_unsloths_script_of_notebook_10_trains_on_its_cpu_backend(unsloth):
    adapter = unsloth / "notebooks" / "runs" / "unsloth" / "adapter"
    assert (adapter / "adapter_model.safetensors").stat().st_size > 1000
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)  # as the dial says
    record = json.loads((adapter / "record.json").read_text(encoding="utf-8"))
    assert record["revision"] == "main" and record["load_in_4bit"] is False  # for recipes/merge.py
    assert record["dtype"] in ("float32", "bfloat16") and Path(record["validation_file"]).is_file()


# --- The table of tools -----------------------------------------------------------------------------------------------

TOOLS = yaml.safe_load((ROOT / "data" / "stack" / "tools.yaml").read_text())["trains"]


@pytest.mark.parametrize("row", TOOLS, ids=lambda row: row["tool"])
def test_the_table_has_version_and_licence_of_the_installed_package(row):
    """By the package's own metadata, in the environment where it lives; Axolotl's has the licence in its README."""
    package, folders = row["package"], sys.path
    if package in WRITERS:
        needs(package)
        folders = [str(folder) for folder in runner.python_of(package).parents[1].glob("lib/python*/site-packages")]
    said = next(iter(importlib.metadata.distributions(name=package, path=folders))).metadata
    fields = [said["License-Expression"], said["License"], *(said.get_all("Classifier") or [])]
    licence = said.get_payload() if package == "axolotl" else " ".join(field or "" for field in fields)
    assert row["licence"].startswith("Apache-2.0") and "Apache" in licence
    assert row["source"].startswith(f"{package} {said['Version']}, ")

"""Two real processes against one, and data/launch: what accelerate, bash and the training module make of its files.

The two processes are forked from one that has imported the libraries already (forkserver) and find each other as
torchrun's would, through the environment. torchrun itself runs in notebook 08 and in data/results/two_processes.py.
"""

import copy
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ftlab.paths import DATA
from ftlab.pipeline.data import triage_rows
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import Run, _check_launched, _one_ctrl_c, claim, main, processes, train

LAUNCH = DATA / "launch"
CONFIGS = ("ddp.yaml", "fsdp2.yaml", "zero3.yaml")
ROWS = [{"prompt": f"Order {i}" + " please" * (i % 5), "completion": " ok" * (1 + i * 7 % 19)} for i in range(24)]
pytestmark = pytest.mark.usefixtures("one_thread")


# --- Two processes ----------------------------------------------------------------------------------------------------


def recipe_for(model: Path, **changes) -> Recipe:
    settings = {"model": str(model), "precision": "fp32", "r": 4, "learning_rate": 1e-2, "warmup_steps": 1}
    lengths = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "logging_steps": 1}
    return Recipe.from_dict({**settings, **lengths, **changes})


def counted(model, tokenizer) -> dict[str, float]:
    return {"lora_b": sum(p.abs().sum().item() for name, p in model.named_parameters() if "lora_B" in name)}


def one_of(rank: int, count: int, port: int, recipe: Recipe, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    seen = []
    run = train(recipe, ROWS, ROWS[:16], folder, on_log=seen.append, metric=counted)
    assert torch.distributed.get_world_size() == count
    (folder.parent / f"{folder.name}-{rank}.json").write_text(json.dumps({"seen": len(seen), "log": run.log}))
    torch.distributed.destroy_process_group()


def together(recipe: Recipe, folder: Path, count: int = 2) -> list[dict]:
    """What each of `count` processes that train the recipe tells at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.sft_trainer", "peft", "pytest", "ftlab.pipeline.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=one_of, args=(rank, count, port, recipe, folder)) for rank in range(count)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(120)  # if one of them ends, the others wait for it for ever
        assert [process.exitcode for process in ranks] == [0] * count
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder.parent / f"{folder.name}-{rank}.json").read_text()) for rank in range(count)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory) -> Path:
    """The folder of one process with four rows a step."""
    folder = tmp_path_factory.mktemp("launch") / "one"
    train(recipe_for(tiny, batch_size=4), ROWS, ROWS[:16], folder, metric=counted)
    return folder


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of two processes with two rows each, and what each told."""
    folder = tmp_path_factory.mktemp("launch") / "two"
    return folder, together(recipe_for(tiny, batch_size=2), folder)


def assert_same(folder: Path, one: Path) -> None:
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("eval_loss", 1e-5), ("eval_lora_b", 1e-4)):
        values = [[record[key] for record in log_of(each) if key in record] for each in (folder, one)]
        assert len(values[1]) >= 2 and values[0] == pytest.approx(values[1], rel=tolerance), key
    for name, weight in adapter(one).items():
        torch.testing.assert_close(adapter(folder)[name], weight, rtol=0, atol=2e-4)  # Adam: 6 steps of up to 0.01 each


def test_two_processes_train_as_one_does_at_the_same_batch(one, two):
    """Answers have 1 to 19 tokens: a mean of the two processes' means would be another loss.

    16 rows are evaluated, two full batches: of an incomplete one accelerate repeats rows, and the evaluation's mean is
    one over batches.
    """
    assert_same(two[0], one)


def test_only_the_first_process_writes(one, two):
    folder, (first, second) = two
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    alone = {p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()}
    states = {name.replace("rng_state.", f"rng_state_{rank}.") for name in alone for rank in (0, 1)}
    assert files == states  # but each process's random state
    assert log_of(folder) == first["log"] and len(log_of(folder)) == len(log_of(one))
    assert first["seen"] == len(first["log"]) and second["seen"] == 0
    assert json.loads((folder / "environment.json").read_text())["hardware"]["processes"] == 2


def test_two_processes_go_on_from_the_last_checkpoint(two, tiny, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(two[0], folder)
    shutil.rmtree(folder / "adapter")
    (folder / "checkpoint-6" / "complete").unlink()  # died while it wrote the last one
    again = together(recipe_for(tiny, batch_size=2), folder)
    assert (
        0 < again[0]["seen"] < two[1][0]["seen"] and again[1]["seen"] == 0
    )  # starting over would give the same weights
    assert again[0]["log"][: -again[0]["seen"]] == two[1][0]["log"][: -again[0]["seen"]]
    for name, weight in adapter(two[0]).items():
        assert torch.equal(adapter(folder)[name], weight), name


# --- A launch that does not do what was asked -------------------------------------------------------------------------


def test_fewer_processes_than_wanted_are_an_error(tmp_path, monkeypatch, capsys):
    recipe = Recipe(model="micro").to_yaml(tmp_path / "r.yaml")
    monkeypatch.setattr("ftlab.pipeline.train.train", lambda *arguments: Run(tmp_path, None, None, [], 0.0, False))
    monkeypatch.setattr(sys, "argv", ["train", str(recipe), "--processes", "2"])
    with pytest.raises(SystemExit):
        main()
    assert "--processes: got 1, wanted 2" in capsys.readouterr().err
    for as_many in (["--processes", "1"], []):
        monkeypatch.setattr(sys, "argv", ["train", str(recipe), *as_many])
        main()
        assert capsys.readouterr().out.startswith("done: ")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_was_asked_for_and_does_not_happen_is_an_error(name, monkeypatch):
    _check_launched("MULTI_CPU")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    _check_launched(name)
    with pytest.raises(RuntimeError, match=f"asked for {name}, and does MULTI_CPU"):
        _check_launched("MULTI_CPU")


def test_a_run_that_should_be_sharded_and_is_not_trains_no_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match="asked for FSDP, and does NO"):
        train(recipe_for(tiny), ROWS, folder=tmp_path, on_log=lambda record: pytest.fail(f"trained: {record}"))


# --- What each of several processes leaves to the first one, seen from one --------------------------------------------


def test_a_process_is_counted_over_all_machines(monkeypatch):
    """The second one of eight on the second of two machines; without a launcher the only one."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes() == (0, 1)
    for name, value in {"RANK": 9, "LOCAL_RANK": 1, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    assert processes() == (9, 16)


def test_only_the_first_process_claims_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path / "run", Recipe(), [])
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    claim(tmp_path / "run", Recipe(), [])
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"recipe.yaml", "rows.sha256", "environment.json"}


@pytest.mark.parametrize(("count", "caught"), [("1", True), ("2", False)])
def test_ctrl_c_is_caught_where_one_process_runs_alone(count, caught, monkeypatch):
    """Each of several would stop at a step of its own, and the others wait for it for ever."""
    monkeypatch.setenv("WORLD_SIZE", count)
    before = signal.getsignal(signal.SIGINT)
    with _one_ctrl_c(SimpleNamespace(stop_asked=False)):
        assert (signal.getsignal(signal.SIGINT) is not before) == caught
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("rank", "interrupted", "said"),
    [
        ("0", False, "done: {folder}, 2 s, processes: 2\n"),
        ("0", True, "interrupted, go on with the same command: {folder}, 2 s, processes: 2\n"),
        ("1", False, ""),
    ],
)
def test_only_the_first_process_says_how_it_went(rank, interrupted, said, monkeypatch, tmp_path, capsys):
    """The rows are those of the recipe's files, and the folder is called as the recipe is."""
    folder, given = Path("runs") / "mine", []
    recipe = Recipe(model="micro", eval_file="triage/validation.jsonl", eval_steps=5)
    done = Run(folder, None, None, [], 2.4, interrupted)
    monkeypatch.setattr("ftlab.pipeline.train.train", lambda *arguments: given.append(arguments) or done)
    monkeypatch.setattr(sys, "argv", ["train", str(recipe.to_yaml(tmp_path / "mine.yaml")), "--processes", "2"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    main()
    assert capsys.readouterr().out == said.format(folder=folder)
    rows = [triage_rows(DATA / "triage" / f"{name}.jsonl") for name in ("train", "validation")]
    assert given == [(recipe, *rows, folder)]


# --- The files of data/launch -----------------------------------------------------------------------------------------


def unknown_keys(config: dict) -> list[str]:
    """Keys within fsdp_config and deepspeed_config that accelerate's launcher has no argument for: it drops them."""
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["x.py"]))
    nested = {key for part in ("fsdp_config", "deepspeed_config") for key in config.get(part, {})}
    return sorted(nested - known.keys())


def accelerate_arguments(*words: str):
    """What accelerate's launcher understands of a command line, its configuration file read."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(launch_command_parser().parse_args(list(words)))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_knows_every_key(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    load_config_from_file(str(LAUNCH / name))  # refuses unknown keys at the top
    assert unknown_keys(config) == []
    assert config["mixed_precision"] == "no"  # else it would overrule a recipe that says fp32
    wrong = copy.deepcopy(config) | {"fsdp_config": {"fsdp_reshard_after_foward": True}}
    assert unknown_keys(wrong) == ["fsdp_reshard_after_foward"]


def test_accelerate_understands_the_configurations_as_they_are_meant(monkeypatch):
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["-m", "ftlab.pipeline.train", "recipe.yaml"]
    read = {
        n: accelerate_arguments("--config_file", str(LAUNCH / n), "--main_process_port", "0", *command) for n in CONFIGS
    }
    assert {name: each.num_processes for name, each in read.items()} == dict.fromkeys(CONFIGS, 8)
    kinds = {name: (each.multi_gpu, each.use_fsdp, each.use_deepspeed) for name, each in read.items()}
    assert kinds == {
        "ddp.yaml": (True, False, False),
        "fsdp2.yaml": (False, True, False),
        "zero3.yaml": (False, False, True),
    }
    fsdp = prepare_multi_gpu_env(read["fsdp2.yaml"])
    assert fsdp["FSDP_VERSION"] == "2" and fsdp["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert fsdp["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT" and fsdp["ACCELERATE_MIXED_PRECISION"] == "no"
    read["zero3.yaml"].deepspeed_fields_from_accelerate_config = ""
    _, zero = prepare_deepspeed_cmd_env(read["zero3.yaml"])
    assert zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3" and zero["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


def test_the_recipe_of_the_folder_is_one():
    assert Recipe.from_yaml(LAUNCH / "recipe.yaml").method == "sft"


def ran(folder: Path, script: list[str], machine: dict[str, str]) -> list[str]:
    """The arguments with which a script starts accelerate, in a folder where accelerate only says them."""
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    fakes = {
        "accelerate": 'printf "%s\\n" "$@"',
        "scontrol": "printf 'node-a\\nnode-b\\n'",
        "srun": 'SLURM_NODEID=1 exec "$@"',
    }
    for name, does in fakes.items():
        (tools / name).write_text(f"#!/bin/bash\n{does}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        script, cwd=folder, env={"PATH": os.environ["PATH"], **machine}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SLURM = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[a-b]"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("which", ["slurm", "sky"])
def test_the_second_of_two_machines_starts_what_accelerate_understands(which, config, tmp_path):
    settings = {"CONFIG": str(LAUNCH / config), "RECIPE": "recipe.yaml"}
    if which == "slurm":
        said = ran(tmp_path, ["bash", str(LAUNCH / "slurm.sh")], {**SLURM, **settings})
    else:
        task = yaml.safe_load((LAUNCH / "sky.yaml").read_text(encoding="utf-8"))
        said = ran(
            tmp_path,
            ["bash", "-c", task["run"]],
            {**SKY, "SKYPILOT_NODE_IPS": "node-a\nnode-b", **task["envs"], **settings},
        )
    assert said[0] == "launch"
    arguments = accelerate_arguments(*said[1:])
    assert (arguments.num_machines, arguments.num_processes, int(arguments.machine_rank)) == (2, 16, 1)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("node-a", 29500)
    assert arguments.module and arguments.training_script == "ftlab.pipeline.train"
    assert arguments.training_script_args == ["recipe.yaml", "--folder", f"runs/{which}", "--processes", "16"]


def test_the_files_name_files_that_exist():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text(encoding="utf-8"))
    root = DATA.parent
    assert all((root / name).is_file() for name in task["envs"].values())
    words = shlex.split((LAUNCH / "slurm.sh").read_text(encoding="utf-8"), comments=True)
    named = [word.split(":-")[1].rstrip("}") for word in words if ":-data/" in word]
    assert len(named) == 2 and all((root / name).is_file() for name in named)

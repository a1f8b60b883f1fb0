"""data/launch: its script in two real processes against one, and what accelerate and bash make of the other files.

The processes are forked from one that has imported the libraries already (forkserver), and find each other through the
environment, as those of torchrun and `accelerate launch` do. For FSDP2 it is what accelerate's own launcher makes of
fsdp2.yaml. torchrun and `accelerate launch` themselves run in notebook 09 and in experiments/two_processes/run.py.
"""

import ast
import contextlib
import io
import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerState

from ftlab.paths import DATA
from notebooks import CELLS

LAUNCH = DATA / "launch"
CONFIGS = {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "zero3.yaml": "DEEPSPEED"}
STEPS = 4
SETTINGS = {
    "max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_notebooks_script_is_that_of_the_folder():
    cells = ["".join(CELLS[f"09_serve_and_scale#{name}"]["source"]).split("\n", 1) for name in ("script", "script-end")]
    assert [first.split()[0] for first, _ in cells] == ["%%writefile", "%%writefile"] and "-a" in cells[1][0]
    written = ast.parse("\n".join(code for _, code in cells))
    assert ast.dump(written) == ast.dump(ast.parse((LAUNCH / "sft.py").read_text(encoding="utf-8")))


# --- Two processes ----------------------------------------------------------------------------------------------------


def accelerate_arguments(*words: str):
    """What accelerate's launcher understands of a command line, its configuration file read."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(launch_command_parser().parse_args(list(words)))[0]


def fsdp_environment() -> dict[str, str]:
    """The variables by which `accelerate launch` tells its processes what fsdp2.yaml says."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    read = accelerate_arguments("--config_file", str(LAUNCH / "fsdp2.yaml"), "--main_process_port", "0", "sft.py")
    made = prepare_multi_gpu_env(read)
    return {name: value for name, value in made.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def one_of(rank: int, count: int, port: int, words: list[str], env: dict[str, str], report: Path) -> None:
    """Runs a script as one of several processes; leaves the last line that it printed, or its error."""
    os.environ.update(env, OMP_NUM_THREADS="1")
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = words
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(words[0], run_name="__main__")
        report.write_text(printed.getvalue().splitlines()[-1])
    except AssertionError as error:
        report.write_text(f"stopped: {error}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


SCRIPT = str(LAUNCH / "sft.py")
ON_CPU = (str(LAUNCH / "fsdp_on_cpu.py"), SCRIPT)


def train(
    start, folder: Path, models: list[Path], rows: Path, batch: int, *words: str, script: tuple = (SCRIPT,), **env: str
) -> list[str]:
    """What each process says at its end; one process for each of `models`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump({**SETTINGS, "rows": str(rows), "per_device_train_batch_size": batch}))
    ranks, reports = [], [folder.with_suffix(f".{rank}") for rank in range(len(models))]
    for rank, model in enumerate(models):
        given = [*script, "--config", str(settings), "--output_dir", str(folder), "--model", str(model), *words]
        ranks.append(start(one_of, rank, len(models), port, given, env, reports[rank]))
    try:
        for process in ranks:
            process.join(300)  # if one of them ends, the others wait for it for ever
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()
    return [report.read_text() for report in reports]


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in log if "loss" in record]


def assert_same(folder: Path, one: Path, steps: int = STEPS) -> None:
    assert losses(folder)[-steps:] == pytest.approx(losses(one)[-steps:], rel=1e-5) and len(losses(one)) == STEPS
    for name, weight in load_file(one / "adapter_model.safetensors").items():
        ours = load_file(folder / "adapter_model.safetensors")[name]
        torch.testing.assert_close(ours, weight, rtol=0, atol=2e-4)  # Adam: 4 steps of up to 0.01 each


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Answers of 1 to 19 tokens: a mean of the two processes' means would be another loss."""
    made = [{"prompt": f"Order {i}" + " please" * (i % 5), "completion": " ok" * (1 + i * 7 % 19)} for i in range(24)]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture(scope="module")
def one(start, tiny, rows, tmp_path_factory) -> Path:
    """The folder of one process with four rows a step."""
    folder = tmp_path_factory.mktemp("launch") / "one"
    (said,) = train(start, folder, [tiny], rows, 4)
    assert said.startswith("PeftModel holds ")
    return folder


@pytest.fixture(scope="module")
def two(start, tiny, rows, tmp_path_factory) -> Path:
    """The folder of two processes with two rows each, under DDP."""
    folder = tmp_path_factory.mktemp("launch") / "two"
    said = train(start, folder, [tiny, tiny], rows, 2, "--expects", "2 MULTI_CPU")
    assert all(words.startswith("DistributedDataParallel holds ") for words in said)
    return folder


def test_two_processes_train_as_one_does_at_the_same_batch(one, two):
    assert_same(two, one)


def dtype_of_the_base(said: str, model: Path) -> str:
    """By the megabytes that a run of sft.py says it holds: the adapter is in fp32, the base in one of the two."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shape = LoraConfig(r=8, target_modules="all-linear")
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(model), shape)
    trained, total = whole.get_nb_trainable_parameters()
    sizes = {"bfloat16": 4 * trained + 2 * (total - trained), "float32": 4 * total}
    (found,) = [name for name, size in sizes.items() if f"{size / 1e6:.2f} MB" in said]
    return found


@pytest.mark.parametrize(("bf16", "wanted"), [("true", "bfloat16"), ("false", "float32")])
def test_bf16_decides_the_dtype_of_the_frozen_base(start, tiny, rows, tmp_path, bf16, wanted):
    (said,) = train(start, tmp_path / "run", [tiny], rows, 4, "--bf16", bf16, "--max_steps", "1")
    assert dtype_of_the_base(said, tiny) == wanted


def test_the_memory_that_the_notebook_shows_is_that_of_the_script(start, tiny, rows, tmp_path):
    """Of LoRA on one GPU, with SFTConfig's own bf16; in the dtype in which sft.py then holds the base."""
    from trl import SFTConfig

    from ftlab import memory

    bf16 = SFTConfig(str(tmp_path / "config"), use_cpu=True).bf16
    (said,) = train(start, tmp_path / "run", [tiny], rows, 4, "--bf16", str(bf16), "--max_steps", "1")
    held = dtype_of_the_base(said, tiny)
    shown = "".join(CELLS["09_serve_and_scale#memory"]["outputs"][-1]["data"]["text/plain"])
    (line,) = [line.split() for line in shown.splitlines() if line.startswith("LoRA, DDP")]
    step = {"r": 16, "per_device_train_batch_size": 1, "max_length": 2048}
    peaks = {name: memory.estimate("Llama-3-8B", **step, dtype=name).peak_bytes for name in ("bfloat16", "float32")}
    assert float(line[2]) == round(peaks[held] / 1e9, 1)
    assert peaks["float32"] > 1.9 * peaks["bfloat16"]  # so the figure tells them apart


def test_fsdp2_shards_a_base_in_16_bits_beside_an_adapter_in_32(start, tiny, rows, tmp_path):
    words = ("--bf16", "true", "--expects", "2 FSDP")
    said = train(start, tmp_path / "run", [tiny, tiny], rows, 2, *words, script=ON_CPU, **fsdp_environment())
    (alone,) = train(start, tmp_path / "one", [tiny], rows, 4, "--bf16", "true")
    assert dtype_of_the_base(alone, tiny) == "bfloat16"
    held = [float(each.split()[-2]) for each in (*said, alone)]
    assert held[:2] == pytest.approx([held[2] / 2] * 2, abs=0.011)  # MB with two decimals
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=0.02)  # bf16's rounding


def test_one_process_goes_on_from_a_checkpoint_of_two(start, one, two, tiny, rows, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(two / "checkpoint-2", checkpoint)
    assert {file.name for file in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    train(start, tmp_path / "on", [tiny], rows, 4, "--resume_from_checkpoint", str(checkpoint))
    assert_same(tmp_path / "on", one, steps=STEPS - 2)


def test_fsdp2_holds_half_reads_once_and_trains_as_one_does(start, one, tiny, rows, tmp_path):
    """The second process is given a model with other weights, and must not read them: only the first one reads."""
    from accelerate.utils import merge_fsdp_weights
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for weight in model.parameters():
        weight.data.mul_(0.5)
    model.save_pretrained(other)
    said = train(
        start, tmp_path / "run", [tiny, other], rows, 2, "--expects", "2 FSDP", script=ON_CPU, **fsdp_environment()
    )
    whole = (one.with_suffix(".0")).read_text()
    held = [float(words.split()[-2]) for words in (*said, whole)]
    assert all(words.startswith("FSDPPeftModel holds ") for words in said)
    assert held[:2] == pytest.approx([held[2] / 2] * 2, abs=0.011)  # MB with two decimals
    assert_same(tmp_path / "run", one)
    shards = tmp_path / "run" / "checkpoint-4" / "pytorch_model_fsdp_0"
    assert len(list(shards.glob("*.distcp"))) == 2
    merge_fsdp_weights(str(shards), str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert merged.keys() == adapter.keys() and all(torch.equal(merged[name], adapter[name]) for name in adapter)


def test_fsdp_that_silently_becomes_ddp_trains_no_step(start, tiny, rows, tmp_path):
    """Without fsdp_on_cpu.py. If this fails, accelerate shards on CPUs now: fsdp_on_cpu.py can go."""
    said = train(start, tmp_path / "run", [tiny, tiny], rows, 2, "--expects", "2 FSDP", **fsdp_environment())
    assert said == ["stopped: got 2 MULTI_CPU, wanted 2 FSDP"] * 2
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# --- The other files --------------------------------------------------------------------------------------------------


def unknown_keys(config: dict) -> list[str]:
    """Keys within fsdp_config and deepspeed_config that accelerate's launcher has no argument for: it drops them."""
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["x.py"]))
    nested = {key for part in ("fsdp_config", "deepspeed_config") for key in config.get(part, {})}
    return sorted(nested - known.keys())


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_knows_every_key(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    load_config_from_file(str(LAUNCH / name))  # refuses unknown keys at the top
    assert unknown_keys(config) == []
    assert config["mixed_precision"] == "no"  # else it would overrule SFTConfig
    assert unknown_keys({**config, "fsdp_config": {"fsdp_offload_param": True}}) == ["fsdp_offload_param"]


def test_accelerate_understands_the_configurations_as_they_are_meant():
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    rest = ("--main_process_port", "0", "x.py")
    read = {name: accelerate_arguments("--config_file", str(LAUNCH / name), *rest) for name in CONFIGS}
    assert {name: each.num_processes for name, each in read.items()} == dict.fromkeys(CONFIGS, 8)
    kinds = {name: (each.multi_gpu, each.use_fsdp, each.use_deepspeed) for name, each in read.items()}
    assert kinds == {
        "ddp.yaml": (True, False, False),
        "fsdp2.yaml": (False, True, False),
        "zero3.yaml": (False, False, True),
    }
    fsdp = fsdp_environment()
    assert fsdp["FSDP_VERSION"] == "2" and fsdp["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert fsdp["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT" and fsdp["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    read["zero3.yaml"].deepspeed_fields_from_accelerate_config = ""
    _, zero = prepare_deepspeed_cmd_env(read["zero3.yaml"])
    assert zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3" and zero["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


def test_the_settings_are_those_of_the_script(monkeypatch):
    """TRL's parser refuses a name that neither SFTConfig nor the script knows."""
    from dataclasses import make_dataclass

    from trl import SFTConfig, TrlParser

    files = make_dataclass("Files", [("model", str), ("rows", str), ("expects", str, "1 NO")])
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: None)  # wants a GPU, or use_cpu
    read, args = TrlParser((files, SFTConfig)).parse_args_and_config(["--config", str(LAUNCH / "sft.yaml")])
    assert (DATA.parent / read.rows).is_file() and args.max_length == 256


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


SLURM = {
    "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "17",
}  # fmt: skip
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}


@pytest.mark.parametrize(("which", "config"), [("slurm", "ddp.yaml"), ("slurm", "fsdp2.yaml"), ("sky", "zero3.yaml")])
def test_the_second_of_two_machines_starts_what_accelerate_understands(which, config, tmp_path):
    settings = {"CONFIG": str(LAUNCH / config), "SETTINGS": "mine.yaml", "EXPECTS": CONFIGS[config]}
    if which == "slurm":
        said = ran(tmp_path, ["bash", str(LAUNCH / "slurm.sh")], {**SLURM, **settings})
    else:
        task = yaml.safe_load((LAUNCH / "sky.yaml").read_text(encoding="utf-8"))
        machine = {**SKY, "SKYPILOT_NODE_IPS": "node-a\nnode-b", **task["envs"], **settings}
        said = ran(tmp_path, ["bash", "-c", task["run"]], machine)
    assert said[0] == "launch"
    arguments = accelerate_arguments(*said[1:])
    assert (arguments.num_machines, arguments.num_processes, int(arguments.machine_rank)) == (2, 16, 1)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("node-a", 29500)
    assert arguments.training_script == "data/launch/sft.py"
    output = {"slurm": "runs/slurm/17", "sky": "runs/sky"}[which]
    expected = ["--config", "mine.yaml", "--output_dir", output, "--expects", f"16 {CONFIGS[config]}"]
    assert arguments.training_script_args == expected


def stopped(folder: Path, *, at: str = "") -> None:
    """A checkpoint with the files that the Trainer writes, in its order, as far as one that is cut short."""
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"):
        state = TrainerState(global_step=20, log_history=[{"loss": 1.0}])
        state.save_to_json(str(folder / name))  # its text serves for the others too
        if name == at:
            (folder / name).write_bytes((folder / name).read_bytes()[:-2])
            return


@pytest.mark.parametrize(
    ("checkpoints", "resumed"),
    [
        ({}, None),
        ({"17/checkpoint-20": "", "17/checkpoint-100": ""}, "17/checkpoint-100"),  # 100 is more than 20
        ({"17/checkpoint-20": "", "17/checkpoint-40": "optimizer.pt"}, "17/checkpoint-20"),
        ({"17/checkpoint-20": "", "17/checkpoint-40": "trainer_state.json"}, "17/checkpoint-20"),
        ({"16/checkpoint-20": ""}, None),  # of another job
    ],
)
def test_a_job_sent_back_to_the_queue_goes_on_from_its_own_last_whole_checkpoint(checkpoints, resumed, tmp_path):
    for name, at in checkpoints.items():
        stopped(tmp_path / "runs" / "slurm" / name, at=at)
    said = ran(tmp_path, ["bash", str(LAUNCH / "slurm.sh")], SLURM)
    asked = said[said.index("--resume_from_checkpoint") + 1 :] if "--resume_from_checkpoint" in said else None
    assert asked == (resumed and [f"runs/slurm/{resumed}"])


def test_the_trainer_writes_its_state_last(one):
    """What slurm.sh goes by."""
    checkpoints = list(one.glob("checkpoint-*"))
    assert len(checkpoints) == STEPS / SETTINGS["save_steps"]
    for checkpoint in checkpoints:
        times = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
        assert times["trainer_state.json"] == max(times.values()) and len(times) > 5
        assert (checkpoint / "trainer_state.json").read_text().splitlines().count("}") == 1


def test_the_files_name_files_that_exist():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text(encoding="utf-8"))
    named = [name for name in task["envs"].values() if "/" in name]
    words = shlex.split((LAUNCH / "slurm.sh").read_text(encoding="utf-8"), comments=True)
    named += [word.split(":-")[1].rstrip("}") for word in words if ":-data/" in word]
    assert len(named) == 4 and all((DATA.parent / name).is_file() for name in named)

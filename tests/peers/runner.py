"""Axolotl and LLaMA-Factory, in the environments that `make stack` makes: trained with, and asked what they read."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import harness  # noqa: E402

COMMANDS = {"axolotl": ("axolotl", "train", "--launcher", "python"), "llamafactory": ("llamafactory-cli", "train")}
QUIET = {  # no network, no statistics, threads that sleep while they wait
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "2000",
}


def python_of(tool: str) -> Path:
    """The interpreter of .venv-<tool>. Raises RuntimeError, saying what to run, if it is not there."""
    python = ROOT / f".venv-{tool}" / "bin" / "python"
    if not python.is_file():
        raise RuntimeError(f"no .venv-{tool}: run `make {tool}` in the course's folder (needs the network once)")
    return python


def environment(tool: str) -> dict[str, str]:
    """This process's variables without its own environment. The tool's programs and the plugin's folder come first."""
    kept = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    path = f"{python_of(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**kept, **QUIET, "PYTHONPATH": ".", "PATH": path}


def measured(command: list[str], folder: Path, env: dict[str, str] | None = None) -> dict:
    """{cpu_seconds, peak_mb} of a command in a folder; see `harness.weighed`."""
    used = harness.weighed(command, folder, env)
    return {"cpu_seconds": round(used["cpu_seconds"], 1), "peak_mb": round(used["peak_bytes"] / 1e6)}


def train(config: Path) -> dict:
    """{loss, grad_norm, learning_rate, cpu_seconds, peak_mb} of the tool's run of its file, axolotl.yaml for one.

    Raises RuntimeError if the environment is absent, or with the end of the tool's output.
    """
    config, tool = Path(config).resolve(), Path(config).stem
    program, *arguments = COMMANDS[tool]
    command = [str(python_of(tool).with_name(program)), arguments[0], config.name, *arguments[1:]]
    used = measured(command, config.parent, environment(tool))
    states = (config.parent / "output").glob("checkpoint-*/trainer_state.json")
    last = max(states, key=lambda path: path.stat().st_mtime_ns)  # an earlier run may have left some too
    return {**logged(json.loads(last.read_text(encoding="utf-8"))["log_history"]), **used}


def logged(history: list[dict]) -> dict[str, list[float]]:
    """Loss, gradient norm and rate of each step of a trainer's log."""
    steps = [record for record in history if "loss" in record]
    return {key: [record[key] for record in steps] for key in ("loss", "grad_norm", "learning_rate")}


def ask(tool: str, what: str, config: Path | None = None):
    """What the tool itself says: "keys" (the names it knows), "validate" (the settings it read), "tokens" of the data.

    Raises RuntimeError if the environment is absent, or with the end of the tool's output (a refused configuration).
    """
    script = Path(__file__).with_name("inside.py").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = (Path(config).resolve().parent, Path(config).name) if config else (scratch, "")
        result = Path(scratch) / "result.json"
        command = [str(python_of(tool)), "-P", str(script), tool, what, file, str(result)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=folder, env=environment(tool), **options)
        if done.returncode:
            raise RuntimeError(f"{tool} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def peer_row(row: dict) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each side of a row of `ask(..., "tokens", ...)`."""
    if "prompt_ids" in row:
        prompt, sides = row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]
        return [(prompt + side, [-100] * len(prompt) + side) for side in sides]
    prefixes = ("chosen_", "rejected_") if "chosen_input_ids" in row else ("",)
    return [(row[f"{prefix}input_ids"], row[f"{prefix}labels"]) for prefix in prefixes]


def wanted_row(row: dict, tokenizer) -> list[tuple[list[int], list[int]]]:
    """The same as the template has it: what comes after the prompt with its generation prompt is learned."""
    start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    sides = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
    wholes = [tokenizer.apply_chat_template(row["prompt"] + side, return_dict=False) for side in sides]
    return [(ids, [-100] * len(start) + ids[len(start) :]) for ids in wholes]

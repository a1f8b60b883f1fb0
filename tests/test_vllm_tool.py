"""tools/vllm.sh: what it would start, told by a python that only says its arguments. vLLM itself is not needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "vllm.sh"
BASH = shutil.which("bash")  # by its whole name: it may lie beside the real nvidia-smi, whose folder is left out
CPU = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "512M"]
LORA = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16", "--lora-modules", "ask=a b", "triage=c"]


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("adapters", [[], ["ask=a b", "triage=c"]])
def test_it_listens_on_this_machine_only_and_lets_adapters_meet_in_one_batch(gpu, adapters, tmp_path):
    fakes = {".venv-vllm/bin/python": 'printf "%s\\n" "$@"', **({"bin/nvidia-smi": "true"} if gpu else {})}
    for name, does in fakes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    without = [folder for folder in os.environ["PATH"].split(":") if not (Path(folder) / "nvidia-smi").exists()]
    env = {"PATH": ":".join([str(tmp_path / "bin"), *without])}
    command = [BASH, str(SCRIPT), "my folder", "8123", *adapters]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "my folder"]
    assert said[4:8] == ["--host", "127.0.0.1", "--port", "8123"]
    assert said[8:12] == ["--max-model-len", "2048", "--served-model-name", "model"]
    assert said[12:] == (CPU if not gpu else []) + (LORA if adapters else [])


@pytest.mark.parametrize("adapter", ["--host=0.0.0.0", "-x=y", "--trust-remote-code", "ask", "=folder", ""])
def test_an_adapter_that_is_an_option_or_has_no_name_starts_nothing(adapter, tmp_path):
    python = tmp_path / ".venv-vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho started\n")
    python.chmod(0o755)
    command = [BASH, str(SCRIPT), "model", "8123", "ask=a", adapter]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and f"got the adapter {adapter}, wanted NAME=FOLDER" in done.stderr

"""tools/awq.py: it quantizes, what it made answers, and it leaves alone what is there."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT
from transformers import AutoTokenizer

AWQ = ROOT / "tools" / "awq.py"
PYTHON = ROOT / ".venv-awq" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.is_file(), reason="AWQ NOT TESTED: no .venv-awq; run `make awq`")
def test_awq_quantizes_and_answers(tiny, tmp_path):
    def run(*given) -> str:
        return subprocess.run([PYTHON, "-P", AWQ, *given], stdout=subprocess.PIPE, check=True, text=True).stdout

    question = {"role": "user", "content": "Where is order 618347?"}
    texts, prompts, made = tmp_path / "texts.jsonl", tmp_path / "prompts.jsonl", tmp_path / "awq"
    chat = [question, {"role": "assistant", "content": "On its way."}]
    text = AutoTokenizer.from_pretrained(tiny).apply_chat_template(chat, tokenize=False)
    texts.write_text(f"{json.dumps(text)}\n" * 4)
    record = json.loads(run("quantize", tiny, texts, made).splitlines()[-1])
    assert record["llmcompressor"] == "0.14.0.1" and record["seconds"] > 0
    packed = load_file(made / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.dtype == torch.int32 and packed.numel() * 4 == 128 * 64 / 2  # two 4-bit weights in a byte
    prompts.write_text(json.dumps([question]))
    run("answer", made, prompts, tmp_path / "answers.jsonl", "--max-new-tokens", "4")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    assert not list(tmp_path.glob(".*"))


def test_awq_leaves_alone_what_is_there(tmp_path):
    (tmp_path / "texts.jsonl").write_text('"text"')
    command = [sys.executable, AWQ, "quantize", "model", tmp_path / "texts.jsonl", tmp_path]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "is there already" in done.stderr

"""data/ask_adapter: the shipped adapter fits the base model, is what its training.json says, and does its job."""

import hashlib
import json

import pytest
import torch
from scripts import ROOT

from ftlab.paths import CACHE, DATA

FOLDER = DATA / "ask_adapter"


@pytest.fixture(scope="module")
def training() -> dict:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


def test_settings_and_rows_are_those_of_make_py(make, training):
    """A changed training file or setting means that the adapter must be trained again."""
    assert training["settings"] == make.SETTINGS | make.LORA
    files = {name: (DATA / "ask" / f"{name}.jsonl").read_bytes() for name in make.FILES}
    assert training["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert training["rows"] == sum(len(content.splitlines()) for content in files.values())


def test_the_readme_says_in_what_it_differs_from_notebook_05(make, training):
    """Steps: 7,500 rows in batches of 4, twice, are 3,750; 300 in batches of 2 are 150."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    cells = json.loads((ROOT / "notebooks" / "05_practical_pipeline.ipynb").read_text(encoding="utf-8"))["cells"]
    code = " ".join("".join(line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]).split())
    assert "| 7,500, of which 3,800 " in page and training["rows"] == 7500
    assert len((DATA / "ask" / "more.jsonl").read_bytes().splitlines()) == 3800
    assert "| 2, 4, 3,750 | 1, 2, 150 |" in page and 2 * 7500 / 4 == 3750 and training["log"][-1]["step"] <= 3750
    settings = make.SETTINGS
    assert (settings["num_train_epochs"], settings["per_device_train_batch_size"]) == (2, 4)
    assert "| 0.0015, cosine to zero, 20 steps of warm-up | 0.002, linear to zero, 5 steps of warm-up |" in page
    assert [settings[key] for key in ("learning_rate", "lr_scheduler_type", "warmup_steps")] == [0.0015, "cosine", 20]
    assert "ROWS, BATCH, RATE = 300, 2, 2e-3 " in code and "num_train_epochs=1" in code
    assert 'lr_scheduler_type="linear", warmup_steps=5' in code and "eval_steps=1 / 3" in code
    assert 'split="train[:16]"' in code and "| the last | the best of three on 16 validation rows |" in page


@pytest.mark.parametrize("name", ["ask_adapter", "triage_adapter"])
def test_the_files_hold_a_bf16_adapter_of_every_linear_layer_and_no_path(name):
    """30 layers x 7 linear layers x (A, B), and 16 x (in + out) each, by hand for one layer: q, o 2 x (576 + 576),
    k, v 2 x (576 + 192), gate, up, down 3 x (576 + 1536) = 10,176; 16 x 30 x 10,176 = 4,884,480.
    """
    from safetensors.torch import load_file

    weights = load_file(DATA / name / "adapter_model.safetensors")
    assert len(weights) == 30 * 7 * 2
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) == 4_884_480
    config = json.loads((DATA / name / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 32, "smollm2")


def test_it_answers_as_training_json_says(training):
    """The first 7 validation questions: about as often right as all 300 were. Chance alone allows 2 less."""
    if not (CACHE / "smollm2" / "model.safetensors").is_file():
        pytest.skip(f"NOT CHECKED: no smollm2 in {CACHE}; run `python -m ftlab.models` once")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import answers, data, model_path, score
    from ftlab.tasks import ask

    base = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    rows = data.read_rows(DATA / "ask" / "validation.jsonl").rows[:7]
    said = answers(PeftModel.from_pretrained(base, FOLDER), tokenizer, [row["prompt"] for row in rows])
    assert score(said, rows, ask.scorer).mean >= training["scores"]["validation"]["right"] - 2 / 7

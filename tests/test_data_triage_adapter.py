"""data/triage_adapter: the shipped adapter fits the base model, is what its training.json says, and does its job."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from ftlab.paths import CACHE, DATA

FOLDER = Path(__file__).parents[1] / "data" / "triage_adapter"
NAMES = {  # TRL's, and what the first version, which made training.json, called them
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "schedule",
    "num_train_epochs": "epochs",
}


@pytest.fixture(scope="module")
def training() -> dict:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


def test_recipes_and_sources_are_those_of_make_py(make, training):
    """A changed training file or recipe means that the adapter must be trained again."""
    for entry, settings in zip(training["rounds"], (make.FIRST, make.SECOND), strict=True):
        wanted = {NAMES.get(name, name): value for name, value in (settings | make.LORA).items()}
        assert {**entry["recipe"], "target_modules": "all-linear"}.items() >= wanted.items()
        assert len(entry["recipe"]["target_modules"]) == 7
    assert training["sources_sha256"] == {
        name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in make.SOURCES
    }
    first, second = make.first_rows(), make.second_rows()
    assert [len(first), len(second)] == [entry["rows"] for entry in training["rounds"]]
    seen = {make.ticket_text(row) for row in first + second}
    for split in ("validation", "test", "hand_test"):
        assert not seen & {make.ticket_text(row) for row in make.tickets(split)}


def test_the_files_hold_a_bf16_adapter_of_every_linear_layer_and_no_path():
    """30 layers x 7 linear layers x (A, B), and 16 x (in + out) each, by hand for one layer: q, o 2 x (576 + 576),
    k, v 2 x (576 + 192), gate, up, down 3 x (576 + 1536) = 10,176; 16 x 30 x 10,176 = 4,884,480.
    """
    from safetensors.torch import load_file

    weights = load_file(FOLDER / "adapter_model.safetensors")
    assert len(weights) == 30 * 7 * 2
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) == 4_884_480
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 32, "smollm2")


def test_it_answers_as_training_json_says(make, training):
    """The first 12 validation tickets: about as often right as all 150 were. Chance alone allows 4 less."""
    if not (CACHE / "smollm2" / "model.safetensors").is_file():
        pytest.skip(f"NOT CHECKED: no smollm2 in {CACHE}; run `python -m ftlab.models` once")
    from peft import PeftModel
    from transformers import AutoTokenizer

    from ftlab import answers, model_path

    tokenizer, rows = AutoTokenizer.from_pretrained(model_path("smollm2")), make.tickets("validation")[:12]
    said = answers(PeftModel.from_pretrained(make.base(), FOLDER), tokenizer, [row["prompt"] for row in rows], 64)
    marks = [make.marks_of(answer, row) for answer, row in zip(said, rows, strict=True)]
    assert sum(mark["valid_json"] for mark in marks) >= 11
    assert sum(mark["exact"] for mark in marks) >= 12 * training["rounds"][-1]["scores"]["validation"]["exact"] - 4

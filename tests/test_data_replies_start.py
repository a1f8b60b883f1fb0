"""data/replies_start: the shipped policy is what its training.json says, and has the habits of the log."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab import answers, score
from ftlab.paths import DATA
from ftlab.tasks import replies

FOLDER = DATA / "replies_start"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_settings_and_rows_are_those_of_make_py(make):
    """A changed log or setting means that the model must be trained again."""
    training = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert training["settings"] == make.SETTINGS and training["rows"] == len(make.rows())
    assert training["sha256"] == {make.LOG.name: hashlib.sha256(make.LOG.read_bytes()).hexdigest()}


@pytest.mark.parametrize("start", ["replies_start", "ask_start"])
def test_a_start_is_micro_with_other_weights(start):
    ours, micro = (load_file(DATA / folder / "model.safetensors") for folder in (start, "micro/model"))
    assert {name: (w.shape, w.dtype) for name, w in ours.items()} == {n: (w.shape, w.dtype) for n, w in micro.items()}
    assert not any(torch.equal(w, micro[name]) for name, w in ours.items())
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DATA / start / file).read_bytes() == (DATA / "micro" / "model" / file).read_bytes()


def test_its_likeliest_reply_has_the_habits_and_its_samples_hold_better_ones():
    """60 test tickets. Greedy: the action mostly right, the number seldom. Best of 4 samples: better."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    lines = (DATA / "replies" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    rows = [replies.as_pair(json.loads(line)) for line in lines]
    prompts = [row["prompt"] for row in rows]
    greedy = answers(model, tokenizer, prompts, max_new_tokens=64)
    found = [replies.score(text, row["ticket_label"]) for text, row in zip(greedy, rows, strict=True)]
    share = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    assert share["action"] > 0.7 and share["order_id"] < 0.5 and share["fair"] < 0.85
    sampled = answers(model, tokenizer, prompts * 4, max_new_tokens=64, temperature=1.0)
    four = score(sampled, rows * 4, replies.scorer).values.reshape(4, len(rows))
    assert four.max(0).mean() > four.mean() + 0.15

"""runner: a tool is started in its folder, offline, and its last log is read; by a stand-in for the tool."""

import sys

import pytest
from peers import runner

STAND_IN = """#!/bin/bash
mkdir -p output/checkpoint-9 output/checkpoint-10
echo '{"log_history": [{"step": 1, "loss": 9}]}' > output/checkpoint-9/trainer_state.json
touch -d "1 hour ago" output/checkpoint-9/trainer_state.json
echo '{"log_history": [{"step": 1, "loss": 0.5, "grad_norm": 2, "learning_rate": 0}, {"step": 2}]}' \\
  > output/checkpoint-10/trainer_state.json
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
    monkeypatch.setattr(runner, "python_of", lambda name: tools / "python")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run = runner.train(folder / f"{tool}.yaml")
    assert (folder / "said").read_text().splitlines() == [f"{tools}/{words[0]}", *words[1:], ".", "1", "1", ""]
    assert (run["loss"], run["grad_norm"], run["learning_rate"]) == ([0.5], [2], [0])


def test_seconds_and_peak_memory_are_those_of_the_command(tmp_path):
    busy = "import time; held = b'x' * 200_000_000\nwhile time.process_time() < 0.3: pass"
    used = runner.measured([sys.executable, "-c", busy], tmp_path)
    assert 0.2 < used["cpu_seconds"] < 10 and 200 < used["peak_mb"] < 300
    with pytest.raises(RuntimeError, match=r"exit\(3\).* ended with exit code 3:\n(.|\n)*too little memory"):
        runner.measured([sys.executable, "-c", "print('too little memory'); exit(3)"], tmp_path)
    with pytest.raises(RuntimeError, match="ended with exit code 137:"):  # killed: 128 + 9, as a shell says it
        runner.measured(["bash", "-c", "kill -9 $$"], tmp_path)


def test_an_absent_environment_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="make axolotl"):
        runner.ask("axolotl", "keys")


def test_labels_of_a_row_by_hand():
    """The prompt is 1 2, the answers 3 4 and 5."""
    keys, trl = ("input_ids", "labels"), {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    wanted = [([1, 2, 3, 4], [-100, -100, 3, 4]), ([1, 2, 5], [-100, -100, 5])]
    assert runner.peer_row(trl) == wanted
    sides = {"chosen": wanted[0], "rejected": wanted[1]}
    flat = {f"{name}_{key}": part for name, side in sides.items() for key, part in zip(keys, side, strict=True)}
    assert runner.peer_row(flat) == wanted
    assert runner.peer_row(dict(zip(keys, wanted[0], strict=True))) == wanted[:1]

    class Tokenizer:
        def apply_chat_template(self, messages, add_generation_prompt=False, return_dict=True):
            return [1] * len(messages) + [2] * add_generation_prompt

    row = {"prompt": [{}], "completion": [{}, {}]}  # of three messages the first and the generation prompt are read
    assert runner.wanted_row(row, Tokenizer()) == [([1, 1, 1], [-100, -100, 1])]

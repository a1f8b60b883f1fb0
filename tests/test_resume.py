"""Runs of TRL's own trainers that die, resumed from last_good_checkpoint: they end as the one that nothing happened to.

Whoever must die does so in a process of its own, forked from one that has imported the libraries already (forkserver).
Random moments of many runs: bench/resume.py. What makes a checkpoint whole: tests/test_callbacks.py.
"""

import gc
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ftlab import last_good_checkpoint, speed_up

# 16 rows of many lengths, 4 a step: 4 steps an epoch, 12 in all; checkpoints at 2, 4, 6, ...: within epochs and between
STEPS, EVERY = 12, 2
KILL = -signal.SIGKILL
FULL = Path("/dev/full")
pytestmark = pytest.mark.usefixtures("one_thread")


def chat(i: int) -> dict:
    prompt = [{"role": "user", "content": f"Order {i}?" + " please" * (7 * i % 20)}]
    answer, worse = f"It is {i}." + " ok" * (3 * i % 8), "No." * (1 + i % 4)
    said = [[{"role": "assistant", "content": text}] for text in (answer, worse)]
    return {"prompt": prompt, "chosen": said[0], "rejected": said[1], "completion": said[0]}


PAIRS = Dataset.from_list([chat(i) for i in range(16)])


def trainer_of(kind: str, model: Path, folder: Path, callback: TrainerCallback) -> SFTTrainer | DPOTrainer:
    """As a learner builds it. kind: "LoRA" (with dropout), "speed_up", "full", "DPO"."""
    dpo = kind == "DPO"
    trainer_class, config_class, keys = (
        (DPOTrainer, DPOConfig, ["prompt", "chosen", "rejected"])
        if dpo
        else (SFTTrainer, SFTConfig, ["prompt", "completion"])
    )
    set_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05 * (kind == "LoRA"))
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        train_dataset=PAIRS.select_columns(keys),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=config_class(
            str(folder), learning_rate=1e-3 if kind == "full" else 1e-2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, num_train_epochs=3, save_steps=EVERY, logging_steps=1, bf16=False,
            save_total_limit=2, gradient_checkpointing=False, report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        peft_config=None if kind == "full" else lora,
        callbacks=[callback],
    )  # fmt: skip
    if kind == "speed_up":
        speed_up(trainer)
    return trainer


class Watch(TrainerCallback):
    """Notes in folder/seen which steps are made *here*; calls `at_step` at the end of each, before its checkpoint."""

    def __init__(self, folder: Path, at_step) -> None:
        folder.mkdir(exist_ok=True)
        self.file, self.at_step = (folder / "seen").open("w"), at_step

    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, file=self.file, flush=True)
        self.at_step(state.global_step)


def run(kind: str, model: Path, folder: Path, at_step=lambda step: None) -> None:
    gc.freeze()  # as tests/conftest.py does
    trainer = trainer_of(kind, model, folder, Watch(folder, at_step))
    trainer.train(resume_from_checkpoint=last_good_checkpoint(folder))
    trainer.save_model(str(folder / "end"))
    losses = [(record["step"], record["loss"]) for record in trainer.state.log_history if "loss" in record]
    (folder / "end" / "losses.json").write_text(json.dumps(losses))


def end_of(folder: Path) -> tuple[bytes, list]:
    """Weights and losses of a run that is through."""
    (file,) = (folder / "end").glob("*model.safetensors")
    losses = json.loads((folder / "end" / "losses.json").read_text())
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return file.read_bytes(), losses


def first_seen(folder: Path) -> int:
    return int((folder / "seen").read_text().split()[0])


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die_at(kind: str, model: Path, folder: Path, step: int) -> None:
    run(kind, model, folder, lambda now: die() if now == step else None)


@pytest.fixture(scope="module")
def whole(tiny, small, apart, tmp_path_factory):
    """kind -> the model's folder, and the end of the run that nothing happened to."""
    known = {}

    def whole(kind: str) -> tuple[Path, tuple]:
        model = small if kind == "DPO" else tiny
        if kind not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert apart(run, kind, model, folder) == 0
            known[kind] = end_of(folder)
        return model, known[kind]

    return whole


# --- Killed -----------------------------------------------------------------------------------------------------------


def test_with_all_weights_trained_killed_and_resumed_it_ends_in_the_same_bytes(whole, apart, tmp_path):
    """It goes on from the newest checkpoint: starting over would end so too."""
    model, end = whole("full")
    assert apart(run_and_die_at, "full", model, tmp_path, 7) == KILL
    assert apart(run, "full", model, tmp_path) == 0
    assert first_seen(tmp_path) == 7 and end_of(tmp_path) == end


def test_killed_from_outside_at_any_moment(whole, start, apart, tmp_path):
    (model, end), step = whole("speed_up"), random.SystemRandom().randrange(EVERY + 1, STEPS - 6)
    process, seen = start(run, "speed_up", model, tmp_path), tmp_path / "seen"
    while not seen.is_file() or len(seen.read_text().split()) < step:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == KILL, f"the run was over before the kill at step {step}"
    assert apart(run, "speed_up", model, tmp_path) == 0
    assert first_seen(tmp_path) > 1 and end_of(tmp_path) == end


def test_killed_from_outside_inside_a_checkpoint(whole, start, apart, tmp_path):
    model, end = whole("DPO")
    process = start(run, "DPO", model, tmp_path)

    def unfinished() -> list[Path]:
        later = set(tmp_path.glob("checkpoint-*")) - {tmp_path / f"checkpoint-{EVERY}"}
        return [path for path in later if not (path / "trainer_state.json").exists()]

    while not unfinished():
        assert process.is_alive(), "no checkpoint was caught while it was written"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGSTOP)
    caught = unfinished()  # now nothing changes any more
    process.kill()
    process.join()
    assert caught and process.exitcode == KILL
    assert apart(run, "DPO", model, tmp_path) == 0
    assert first_seen(tmp_path) > 1 and end_of(tmp_path) == end


def run_and_die_writing(model: Path, folder: Path, step: int, name: str) -> None:
    """Is gone when half of one file of one checkpoint is written (of trainer_state.json: just before it is)."""
    save, save_state, victim = torch.save, TrainerState.save_to_json, folder / f"checkpoint-{step}" / name

    def half_save(thing, path, *args, **kwargs):
        if Path(path) != victim:
            return save(thing, path, *args, **kwargs)
        save(thing, buffer := io.BytesIO())
        victim.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        die()

    torch.save = half_save
    TrainerState.save_to_json = lambda state, path: die() if Path(path) == victim else save_state(state, path)
    run("LoRA", model, folder)


def run_and_die_deleting(model: Path, folder: Path, name: str) -> None:
    """Of a checkpoint that is deleted to keep two, one file is gone when the process dies."""
    real = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if Path(path) == folder / name:
            (folder / name / "optimizer.pt").unlink()
            die()
        real(path, *args, **kwargs)

    shutil.rmtree = rmtree
    run("LoRA", model, folder)


def test_killed_while_checkpoints_are_written_and_deleted_it_goes_on_from_the_newest_whole_one(whole, apart, tmp_path):
    """One death a run: in the first, the second and the last of a checkpoint's files, then, with checkpoint-10 written,
    in checkpoint-6. So runs begin with no checkpoint, between two epochs (4, 8) and within one (10, which is the newest
    by number and not by name). Other files that are not whole: tests/test_callbacks.py.
    """
    model, end = whole("LoRA")
    for step, name, start in ((2, "training_args.bin", 0), (6, "optimizer.pt", 0), (10, "trainer_state.json", 4)):
        assert apart(run_and_die_writing, model, tmp_path, step, name) == KILL
        assert (tmp_path / f"checkpoint-{step}").is_dir()
        assert first_seen(tmp_path) == start + 1
    assert apart(run_and_die_deleting, model, tmp_path, "checkpoint-6") == KILL
    assert (tmp_path / "checkpoint-6").is_dir() and not (tmp_path / "checkpoint-6" / "optimizer.pt").exists()
    assert first_seen(tmp_path) == 9
    assert apart(run, "LoRA", model, tmp_path) == 0
    assert first_seen(tmp_path) == 11 and end_of(tmp_path) == end


# --- A full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(whole, tmp_path):
    """One file of checkpoint-4, then one of checkpoint-8, lies on a device that is always full."""
    model, end = whole("LoRA")
    for step, name in ((4, "tokenizer.json"), (8, "optimizer.pt")):
        file = tmp_path / f"checkpoint-{step}" / name

        def fill(now: int, file=file, step=step) -> None:
            if now == step - 1:
                file.parent.mkdir()
                file.symlink_to(FULL)

        with pytest.raises(Exception, match=r"[Nn]o space left|unexpected pos|enforce fail"):
            run("LoRA", model, tmp_path, fill)
        file.unlink()
        with pytest.warns(UserWarning, match=f"checkpoint-{step} is not whole"):
            assert last_good_checkpoint(tmp_path).endswith(f"checkpoint-{step - EVERY}")
    run("LoRA", model, tmp_path)
    assert first_seen(tmp_path) == 7 and end_of(tmp_path) == end

"""ftlab.callbacks in TRL's own trainer: curves, the stop button, numbers that are none, broken checkpoints."""

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, TrainerCallback, set_seed
from transformers import trainer as hf_trainer
from trl import SFTConfig, SFTTrainer

from ftlab import LiveCurve, NanGuard, StopButton, last_good_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def messages(question: str, answer: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def trainer_in(folder: Path, tiny: Path, callbacks: list, lora: dict | None = None, **settings) -> SFTTrainer:
    set_seed(0)
    rows = Dataset.from_list([messages(f"What is {i}?", f"It is {i}.") for i in range(24)])
    options = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "bf16": False} | settings
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        args=SFTConfig(str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=4, **options),
        peft_config=LoraConfig(r=4, target_modules="all-linear", **lora or {}),
        callbacks=callbacks,
    )


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, what) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


@pytest.fixture(scope="module")
def curve() -> LiveCurve:
    return LiveCurve("run:")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, curve) -> Path:
    """The folder of a run of 6 steps that nothing happened to, with a curve."""
    folder = tmp_path_factory.mktemp("run")
    trainer_in(folder, tiny, [curve]).train()
    return folder


# --- The curve --------------------------------------------------------------------------------------------------------


def test_the_curve_holds_every_logged_loss_and_goes_on_after_a_stop(run, curve, tmp_path, tiny):
    folder, again = shutil.copytree(run, tmp_path / "run"), LiveCurve()
    shutil.rmtree(folder / "checkpoint-6")
    trainer = trainer_in(folder, tiny, [again])
    trainer.train(resume_from_checkpoint=last_good_checkpoint(folder))
    logged = [(record["step"], record["loss"]) for record in trainer.state.log_history if "loss" in record]
    assert again.losses == curve.losses == logged and len(logged) == 6
    (ax,) = curve.figure(trainer.state).axes
    assert ax.get_ylabel() == "loss (nats/token)" and ax.get_ylim()[0] == 0
    assert ax.lines[0].get_xydata() == pytest.approx(torch.tensor(logged).numpy())


def test_a_reward_below_zero_is_in_the_picture_and_has_no_unit_of_a_loss():
    log = [{"step": 1, "reward": -2.0}, {"step": 2, "reward": 0.5}, {"step": 2, "loss": 0.1}]
    state = SimpleNamespace(max_steps=2, global_step=2, log_history=log)
    for unit, label in {"": "reward", "share right": "reward (share right)"}.items():
        curve = LiveCurve(key="reward", unit=unit)
        curve.on_log(None, state, None)
        (ax,) = curve.figure(state).axes
        assert ax.get_ylim()[0] < -2 and ax.get_ylabel() == label


@pytest.mark.parametrize("key", ["loss", "reward", "rewards/margins"])
def test_what_is_drawn_as_held_out_is_the_quantity_of_the_axis(key):
    """A GRPO or DPO run logs several quantities, each of them on the held-out rows too."""
    names = ["loss", "reward", "rewards/margins"]
    log = [{"step": 1, name: place + 1.0} for place, name in enumerate(names)]
    log += [{"step": 2, f"eval_{name}": place + 10.0} for place, name in enumerate(names)]
    state = SimpleNamespace(max_steps=2, global_step=2, log_history=log)
    curve = LiveCurve(key=key)
    curve.on_log(None, state, None)
    (ax,) = curve.figure(state).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn == {"train": [[1, names.index(key) + 1.0]], "held out": [[2, names.index(key) + 10.0]]}


def test_a_run_that_has_logged_nothing_yet_has_an_empty_curve():
    (ax,) = LiveCurve().figure(SimpleNamespace(max_steps=2, global_step=0)).axes
    assert not ax.lines and ax.get_xlim() == (0, 2)


def test_the_curve_stands_in_for_the_progress_table_of_its_own_trainer_only(tmp_path, tiny):
    kinds = [type(c) for c in trainer_in(tmp_path, tiny, [LiveCurve()]).callback_handler.callbacks]
    assert ProgressCallback not in kinds and LiveCurve in kinds
    assert ProgressCallback in [type(c) for c in trainer_in(tmp_path, tiny, []).callback_handler.callbacks]


def test_a_curve_changes_no_trainer_but_the_one_that_it_is_given_to(tmp_path, tiny):
    """Nor does one that no trainer was built with."""
    before = hf_trainer.DEFAULT_PROGRESS_CALLBACK
    LiveCurve()
    assert before is hf_trainer.DEFAULT_PROGRESS_CALLBACK is ProgressCallback
    with pytest.raises(ValueError, match="nonsense"):
        trainer_in(tmp_path, tiny, [LiveCurve()], optim="nonsense")
    assert ProgressCallback in [type(c) for c in trainer_in(tmp_path, tiny, []).callback_handler.callbacks]


def test_without_any_table_a_curve_that_trains_leaves_the_next_trainer_its_own(tmp_path, tiny):
    trainer_in(tmp_path, tiny, [LiveCurve()], disable_tqdm=True, max_steps=1).train()
    assert ProgressCallback in [type(c) for c in trainer_in(tmp_path, tiny, []).callback_handler.callbacks]


# --- The stop button --------------------------------------------------------------------------------------------------


def test_one_press_ends_the_run_with_a_checkpoint_and_it_goes_on_to_the_same_bytes(run, tmp_path, tiny):
    before = signal.getsignal(signal.SIGINT)
    stop = StopButton()
    press = At(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = trainer_in(tmp_path, tiny, [press, stop])
    stopped.train()
    assert stop.asked and stopped.state.global_step == 3 and signal.getsignal(signal.SIGINT) is before
    assert Path(last_good_checkpoint(tmp_path)).name == "checkpoint-3"
    again = trainer_in(tmp_path, tiny, [StopButton()])
    again.train(resume_from_checkpoint=last_good_checkpoint(tmp_path))
    name = Path("checkpoint-6/adapter_model.safetensors")
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_a_press_saves_a_step_that_is_not_the_best_too(tmp_path, tiny):
    """Of a falling eval_loss the highest is the best here: that of step 1."""
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": True, "eval_steps": 1}
    press = At(2, lambda: signal.raise_signal(signal.SIGINT))
    trainer = trainer_in(tmp_path, tiny, [press, StopButton()], max_steps=3, **best)
    trainer.args.eval_strategy, trainer.eval_dataset = "steps", trainer.train_dataset
    trainer.train()
    assert [Path(last_good_checkpoint(tmp_path)).name, trainer.state.best_global_step] == ["checkpoint-2", 1]


def test_a_second_press_raises_at_once(tmp_path, tiny):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

    def press_twice():
        signal.raise_signal(signal.SIGINT)  # to this thread: of two sent to the process at once one is lost
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            trainer_in(tmp_path, tiny, [At(2, press_twice), StopButton()]).train()
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_a_run_that_raised_a_second_press_raises_too(tmp_path, tiny):
    """transformers tells a callback nothing of an error, so the first run's handler is still there."""
    before, stop = signal.signal(signal.SIGINT, signal.default_int_handler), StopButton()
    try:
        for callback in (stop, stop, StopButton()):
            with pytest.raises(ZeroDivisionError):
                trainer_in(tmp_path, tiny, [At(1, lambda: 1 / 0), callback]).train()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_where_no_signal_can_be_caught_it_trains_too(tmp_path, tiny):
    trainer, stop = trainer_in(tmp_path, tiny, [], max_steps=2), StopButton()
    trainer.add_callback(stop)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2 and not stop.asked


# --- No number --------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_nan_stops_the_run_before_the_weights_and_names_what_is_kept(tmp_path, tiny):
    trainer = trainer_in(tmp_path, tiny, [NanGuard()])
    factor = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
    spoil = At(3, lambda: factor.register_hook(lambda grad: grad * float("nan")))
    trainer.add_callback(spoil)
    with pytest.raises(FloatingPointError, match=r"step 4: the gradient is nan.*learning_rate=0.01.*checkpoint-2$"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_gradient_that_is_infinite_and_that_nobody_clips_stops_the_run_too(tmp_path):
    """With max_grad_norm=0; clipping makes nan of it."""
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), float("inf"))
    args = SimpleNamespace(fp16=False, output_dir=str(tmp_path), learning_rate=0.1)
    with pytest.raises(FloatingPointError, match="step 6: the gradient is nan or infinite"):
        NanGuard().on_pre_optimizer_step(args, SimpleNamespace(global_step=5), None, model=model)


def test_weights_that_are_nan_are_named_at_the_first_step(tmp_path, tiny):
    trainer = trainer_in(tmp_path, tiny, [NanGuard()], logging_nan_inf_filter=False)
    next(p for name, p in trainer.model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1.*checkpoint: None"):
        trainer.train()


def test_a_gradient_too_large_for_its_norm_is_not_clipped_to_nothing(tmp_path, tiny):
    """lora_alpha = 1e20: its square is more than fp32 holds, and clipping to norm 1 would divide by infinity."""
    with pytest.raises(FloatingPointError, match="step 1: the grad_norm is nan or infinite"):
        trainer_in(tmp_path, tiny, [NanGuard()], lora={"lora_alpha": 1e20}).train()


def test_under_fp16_a_gradient_is_the_scalers_business_and_a_loss_is_not(tmp_path):
    """The scaler leaves out such a step without a word, and the next one may be fine."""
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), float("nan"))
    state = SimpleNamespace(global_step=5)
    args = SimpleNamespace(fp16=True, output_dir=str(tmp_path), learning_rate=0.1)
    NanGuard().on_pre_optimizer_step(args, state, None, model=model)
    NanGuard().on_log(args, state, None, logs={"loss": 0.5, "grad_norm": float("nan")})
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is nan or infinite.*fp16 overflows"):
        NanGuard().on_log(args, state, None, logs={"loss": float("nan")})


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken(run, tmp_path):
    assert Path(last_good_checkpoint(run)).name == "checkpoint-6"
    assert last_good_checkpoint(tmp_path) is None and last_good_checkpoint(tmp_path / "nowhere") is None


def test_what_an_older_and_longer_run_left_in_the_folder_is_not_taken(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    os.utime(folder / "checkpoint-6" / "trainer_state.json", (0, 0))
    (folder / "checkpoint-6" / ".ipynb_checkpoints").mkdir()  # of somebody who only looked
    assert Path(last_good_checkpoint(folder)).name == "checkpoint-4"


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
DAMAGE = {
    "cut by two bytes": lambda whole: whole[:-2],
    "cut within": lambda whole: whole[: random.Random(0).randrange(1, len(whole))],
    "empty": lambda whole: b"",
    "gone": None,
}


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_that_is_not_whole_is_passed_over(run, tmp_path, name):
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / "checkpoint-6" / name
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    ways = DAMAGE | ({"a byte changed": lambda _: bytes(changed)} if name in ("optimizer.pt", "rng_state.pth") else {})
    for damaged in ways.values():
        file.unlink()
        if damaged:
            file.write_bytes(damaged(whole))
        with pytest.warns(UserWarning, match="checkpoint-6 is not whole"):
            assert Path(last_good_checkpoint(folder)).name == "checkpoint-4"
        file.write_bytes(whole)
    assert Path(last_good_checkpoint(folder)).name == "checkpoint-6"


def test_a_missing_shard_of_the_weights_is_seen(run, tmp_path):
    checkpoint = shutil.copytree(run, tmp_path / "run") / "checkpoint-6"
    weights = (checkpoint / "adapter_model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    second = shutil.copy(weights, checkpoint / "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": weights.name, "b": second.name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Path(last_good_checkpoint(checkpoint.parent)) == checkpoint
    second.unlink()
    with pytest.warns(UserWarning, match="checkpoint-6 is not whole.*model-00002-of-00002"):
        assert Path(last_good_checkpoint(checkpoint.parent)).name == "checkpoint-4"


def test_of_several_processes_each_leaves_its_random_state(run, tmp_path):
    """As transformers names the files of rank 0 and rank 1 then: rng_state_0.pth, rng_state_1.pth."""
    folder = shutil.copytree(run, tmp_path / "run")
    state = folder / "checkpoint-6" / "rng_state.pth"
    first, second = (shutil.copy(state, state.with_stem(f"rng_state_{rank}")) for rank in (0, 1))
    state.unlink()
    assert Path(last_good_checkpoint(folder)).name == "checkpoint-6"
    second.write_bytes(first.read_bytes()[:-2])
    with pytest.warns(UserWarning, match="checkpoint-6 is not whole"):
        assert Path(last_good_checkpoint(folder)).name == "checkpoint-4"


def test_a_checkpoint_of_the_model_only_is_not_said_to_be_broken_off(tmp_path, tiny):
    trainer_in(tmp_path, tiny, [], save_only_model=True, max_steps=2).train()
    with pytest.warns(UserWarning, match=r"checkpoint-2 .*save_only_model=True") as told:
        assert last_good_checkpoint(tmp_path) is None
    assert "killed" not in str(told[0].message)


def test_with_no_whole_checkpoint_there_is_none_and_nothing_is_removed(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    checkpoints = sorted(folder.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        (checkpoint / "scheduler.pt").unlink()
    with pytest.warns(UserWarning, match="is not whole") as told:
        assert last_good_checkpoint(folder) is None
    assert len(told) == len(checkpoints) == 3 and sorted(folder.glob("checkpoint-*")) == checkpoints

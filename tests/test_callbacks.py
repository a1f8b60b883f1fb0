"""ftlab.callbacks in TRL's own trainer: curves, the stop button, numbers that are none, broken checkpoints."""

import json
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers import trainer as hf_trainer
from trl import SFTConfig, SFTTrainer

from ftlab import LiveCurve, NanGuard, StopButton, callbacks, last_good_checkpoint
from ftlab.classroom.show import POLICY

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


@pytest.mark.parametrize("points", [1, 2, 3])
def test_the_first_point_can_be_seen(points):
    """In the picture itself: a line of one point has no length."""
    log = [{"step": step, "loss": 1.0} for step in range(1, points + 1)]
    state = SimpleNamespace(max_steps=9, global_step=points, log_history=log)
    curve = LiveCurve()
    curve.on_log(None, state, None)
    canvas = FigureCanvasAgg(curve.figure(state))
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    assert np.isclose(pixels, to_rgb(POLICY), atol=0.02).all(-1).sum() > 20


def at_step(curve: LiveCurve, step: int, most: int) -> str:
    """The title of the figure at a step."""
    log = [{"step": step, "loss": 1.0}]
    state = SimpleNamespace(global_step=step, max_steps=most, log_history=log)
    curve.on_log(None, state, None)
    return curve.figure(state).axes[0].get_title()


def began(curve: LiveCurve, step: int = 0) -> None:
    """A run begins, or goes on after a step."""
    state = SimpleNamespace(global_step=step, log_history=[], is_world_process_zero=False)
    curve.on_train_begin(SimpleNamespace(disable_tqdm=True), state, None)


@pytest.mark.parametrize(("first", "seconds"), [(0, 0.5), (0, 3.0), (40, 12.0), (40, 0.001)])
def test_the_time_left_is_what_the_steps_so_far_let_one_expect(first, seconds, monkeypatch):
    """Of 100 steps that all take as long; up to the rounding of what is said."""
    now = [1000.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    curve = LiveCurve("run:")
    began(curve, first)
    for step in range(first + 1, 100):
        now[0] += seconds
        title = at_step(curve, step, 100)
        said = re.fullmatch(rf"run: step {step} of 100, about (\d+) (s|min) left", title)
        number, unit = said.groups()
        spoken, left = int(number) * {"s": 1, "min": 60}[unit], seconds * (100 - step)
        assert abs(spoken - left) <= {"s": 2.5, "min": 30}[unit] + 1e-6
    now[0] += seconds
    assert at_step(curve, 100, 100) == "run: step 100 of 100"


def test_before_a_run_and_after_one_that_was_stopped_no_time_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    curve = LiveCurve()
    assert at_step(curve, 5, 10) == "step 5 of 10"
    began(curve)
    now[0] = 5.0
    assert at_step(curve, 5, 10) == "step 5 of 10, about 5 s left"
    curve.on_train_end(None, SimpleNamespace(global_step=5, max_steps=10), None)
    assert at_step(curve, 5, 10) == "step 5 of 10"


def two_steps(kind: str, folder: Path, tiny: Path, curve: LiveCurve):
    """Two steps of one of TRL's trainers on a random model."""
    ask = [{"role": "user", "content": "What is 1?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("It is 1.", "No."))
    pairs = [{"prompt": ask, "chosen": good, "rejected": bad}] * 4
    thumbs = [
        {"prompt": ask, "completion": good, "label": True},
        {"prompt": ask, "completion": bad, "label": False},
    ] * 2
    rows = {
        "SFT": [{"prompt": ask, "completion": good}] * 4,
        "DPO": pairs,
        "Reward": pairs,
        "KTO": thumbs,
        "GRPO": [{"prompt": ask}] * 4,
    }
    base = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if kind == "Reward" else {}
    settings = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    settings |= {"save_strategy": "no", "bf16": False, "use_cpu": True, "report_to": "none"}
    rewards = {}
    if kind == "GRPO":
        settings |= {"num_generations": 2, "max_completion_length": 4}
        rewards = {"reward_funcs": lambda completions, **_: [1.0, 2.0] * 2}
    args = getattr(trl, f"{kind}Config")(str(folder), **settings)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=base.from_pretrained(tiny, dtype=torch.float32, **labels),
        args=args,
        train_dataset=Dataset.from_list(rows[kind]),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        callbacks=[curve],
        **rewards,
    )
    trainer.train()
    return trainer


MOVED = {
    "SFT": "loss",
    "DPO": "rewards/margins",
    "KTO": "rewards/margins",
    "Reward": "accuracy",
    "GRPO": "reward",
}


@pytest.mark.parametrize("kind", MOVED)
def test_the_curve_is_of_what_the_trainer_moves(kind, tmp_path, tiny):
    curve = LiveCurve()
    log = two_steps(kind, tmp_path, tiny, curve).state.log_history
    logged = [(entry["step"], entry[MOVED[kind]]) for entry in log if MOVED[kind] in entry]
    assert curve.losses == logged and len(logged) == 2


ASKED = [{"key": "loss"}, {"unit": "nats/pair"}, {"key": "rewards/chosen"}]


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_is_drawn(asked):
    log = [{"step": 1, "loss": 1.0, "rewards/margins": 2.0, "rewards/chosen": 3.0}]
    curve = LiveCurve(**asked)
    curve.on_log(None, SimpleNamespace(log_history=log), None)
    assert curve.losses == [(1, log[0][asked.get("key", "loss")])]


def test_in_a_terminal_each_point_is_a_row_of_a_table(tmp_path, tiny, capsys):
    def rows(**settings) -> list[str]:
        capsys.readouterr()
        trainer = trainer_in(tmp_path, tiny, [LiveCurve("run:")], eval_steps=3, **settings)
        trainer.args.eval_strategy, trainer.eval_dataset = "steps", trainer.train_dataset
        trainer.train()
        log = trainer.state.log_history
        wanted.append([entry for entry in log if {"loss", "eval_loss"} & entry.keys()])
        return [line for line in capsys.readouterr().out.splitlines() if line]

    wanted: list[list[dict]] = []
    head, *lines = rows()
    assert [*head.split()] == ["loss", "held", "out", "run"]
    (log,) = wanted
    assert len(lines) == len(log) == 8
    for line, entry in zip(lines, log, strict=True):
        value = entry.get("loss", entry.get("eval_loss"))
        assert line.split()[0] == f"{value:.4f}" and f"step {entry['step']} of 6" in line
        assert line.index(f"{value:.4f}") > 10 or "loss" in entry  # in its own column
    assert not any("step 1" in line for line in rows(disable_tqdm=True))


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

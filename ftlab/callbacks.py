"""Callbacks for the trainers of transformers and TRL: `SFTTrainer(..., callbacks=[LiveCurve(), StopButton()])`."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers import trainer as hf_trainer
from transformers.trainer_callback import CallbackHandler

MOVES = ("rewards/margins", "reward", "accuracy")  # what DPO and KTO, GRPO and a reward model move


class LiveCurve(TrainerCallback):
    """Draws one logged quantity, and f"eval_{key}" when there is one, with the time that is left.

    key: which one; if not given, and no unit of a loss is, the first of MOVES that the trainer
    logs, else its loss. Until the first point is logged, a line counts the steps. The figure stays
    in the cell; in a terminal each point is a row of a table.
    Given to a trainer as it is built, it takes the progress table out of that trainer, and changes
    no other one.
    """

    def __init__(self, title: str = "", unit: str = "", key: str = "") -> None:
        self.title, self.unit, self.asked = title, unit, key or ("loss" if unit else "")
        self.key, self.losses, self.eval_losses = self.asked or "loss", [], []
        self.handle = self.table = self._began = None

    def on_init_end(self, args, state, control, **kwargs):
        handler = sys._getframe(1).f_locals.get("self")  # which passes callbacks all but itself
        if isinstance(handler, CallbackHandler):
            table = hf_trainer.DEFAULT_PROGRESS_CALLBACK
            left = [callback for callback in handler.callbacks if type(callback) is not table]
            handler.callbacks = left

    def on_train_begin(self, args, state, control, **kwargs):
        from IPython import get_ipython
        from IPython.display import HTML, display

        self.losses, self.eval_losses = [], []
        self._began, self._shown = (time.monotonic(), state.global_step), 0.0
        in_notebook = hasattr(get_ipython(), "kernel")
        waiting = HTML("<i>training starts ...</i>")
        self.handle = display(waiting, display_id=True) if in_notebook else None
        in_terminal = not in_notebook and state.is_world_process_zero and not args.disable_tqdm
        self.table = [] if in_terminal else None  # the widths of its columns

    def on_step_end(self, args, state, control, **kwargs):
        nothing_yet = self.handle and not self.losses
        if nothing_yet and time.monotonic() - self._shown > 1:
            from IPython.display import HTML

            self._shown = time.monotonic()
            self.handle.update(HTML(f"<i>{self.progress(state)}</i>"))

    def on_log(self, args, state, control, **kwargs):
        log = state.log_history  # which begins before a run was resumed
        if not self.asked:
            moves = (key for key in MOVES if any(key in entry for entry in log))
            self.key = next(moves, "loss")
        self.losses = [(entry["step"], entry[self.key]) for entry in log if self.key in entry]
        held_out = f"eval_{self.key}"
        self.eval_losses = [(entry["step"], entry[held_out]) for entry in log if held_out in entry]
        if self.handle:
            self.handle.update(self.figure(state))
        elif self.table is not None and log and {self.key, held_out} & log[-1].keys():
            self._print(log[-1], state)

    def on_train_end(self, args, state, control, **kwargs):
        self._began = None
        if self.handle and state.global_step < state.max_steps:
            self.handle.update(self.figure(state))  # no time is left now

    def progress(self, state) -> str:
        """ "step 20 of 150, about 90 s left"; without the time before a run and after it."""
        text = f"step {state.global_step} of {state.max_steps}"
        if self._began is None:
            return text
        start, first = self._began
        done, more = state.global_step - first, state.max_steps - state.global_step
        if done <= 0 or more <= 0:
            return text
        return f"{text}, about {_spoken((time.monotonic() - start) / done * more)} left"

    def _print(self, entry: dict, state) -> None:
        """A row of the table, and before the first one its head."""
        names = (self.key, f"eval_{self.key}")
        values = [f"{entry[name]:.4f}" if name in entry else "" for name in names]
        if not self.table:
            head = (self.key, "held out")
            self.table = [max(10, len(name)) for name in head]
            columns = [f"{name:>{width}}" for name, width in zip(head, self.table, strict=True)]
            print(" ".join(["", *columns, "", self.title.rstrip(":")]).rstrip(), flush=True)
        columns = [f"{value:>{width}}" for value, width in zip(values, self.table, strict=True)]
        print(" ".join(["", *columns, "", self.progress(state)]), flush=True)

    def figure(self, state):
        """The curve so far. Fewer than three points are dots: a line of one could not be seen."""
        import matplotlib.pyplot as plt

        from ftlab.classroom.show import POLICY, REJECTED

        figure, ax = plt.subplots()
        dots = {"marker": "o", "markersize": 5, "clip_on": False} if len(self.losses) < 3 else {}
        ax.plot(*zip(*self.losses, strict=True), color=POLICY, label="train", **dots)
        if self.eval_losses:
            held_out = zip(*self.eval_losses, strict=True)
            ax.plot(*held_out, "o-", color=REJECTED, label="held out", clip_on=False)
            ax.legend()
        negative = any(value < 0 for _, value in self.losses + self.eval_losses)
        unit = self.unit or ("nats/token" if self.key == "loss" else "")
        ylabel = f"{self.key} ({unit})" if unit else self.key
        bottom = None if negative else 0
        ax.set(xlabel="step", ylabel=ylabel, xlim=(0, state.max_steps), ylim=(bottom, None))
        ax.set_title(f"{self.title} {self.progress(state)}".strip(), fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        plt.close(figure)
        return figure


def _spoken(seconds: float) -> str:
    """A time as one would say it: "8 s", "40 s", "3 min"."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{5 * round(seconds / 5) if seconds > 20 else max(1, round(seconds))} s"


class StopButton(TrainerCallback):
    """The first Ctrl-C (Jupyter's stop button) finishes the step, saves a checkpoint and ends; a second one raises.

    `trainer.train(resume_from_checkpoint=last_good_checkpoint(folder))` goes on. Only in the main thread of a single
    process: several ranks would stop at different steps and deadlock.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked, self.before = False, None
        if threading.current_thread() is threading.main_thread() and args.world_size == 1:
            found = signal.signal(signal.SIGINT, self._ask)  # a button's own was left by a run that raised
            self.before = signal.default_int_handler if isinstance(getattr(found, "__self__", 0), StopButton) else found

    def _ask(self, signum, frame):
        signal.signal(signal.SIGINT, self.before)
        self.asked = True
        print("Stopping after this step, with a checkpoint. Once more to stop at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate &= args.save_strategy != "best"  # it would not save a step that is no new best

    def on_train_end(self, args, state, control, **kwargs):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        if self.asked:
            done = f"Stopped after step {state.global_step} of {state.max_steps}."
            print(f"{done} {_ways_on(args.output_dir)}")


def told_of_a_stop(tb: TracebackType) -> str | None:
    """What a run that KeyboardInterrupt ended has left, and how to go on; None if no trainer of
    transformers was training.
    """
    frames = [frame for frame, _ in traceback.walk_tb(tb)]
    trains = (frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "train")
    trainers = [each for each in trains if isinstance(each, hf_trainer.Trainer)]
    if not trainers:
        return None
    state, folder = trainers[0].state, trainers[0].args.output_dir
    starts = [frame.f_locals["start_time"] for frame in frames if "start_time" in frame.f_locals]
    if not state.global_step:
        return "Stopped before the first step was done: the model is as it was."
    done = f"Stopped after step {state.global_step} of {state.max_steps}."
    return f"{done} {_ways_on(folder, starts[0] if starts else math.inf)}"


def _ways_on(folder: str, since: float = 0.0) -> str:
    """How to train on: with the weights in memory, and from the newest checkpoint since then."""
    with warnings.catch_warnings():  # half a checkpoint, of a save that was interrupted
        warnings.simplefilter("ignore")
        newest = last_good_checkpoint(folder)
    kept = "The model keeps what it has learned; train() trains it further, with a new schedule."
    if newest is None or (Path(newest) / "trainer_state.json").stat().st_mtime < since:
        return f"{kept} No checkpoint was saved: callbacks=[StopButton()] saves one at a stop."
    resume = f'train(resume_from_checkpoint="{newest}")'
    return f"{kept} {resume} goes on with this run."


class NanGuard(TrainerCallback):
    """Raises FloatingPointError before an optimizer step whose gradient is nan or infinite, and at such a loss.

    The weights and the checkpoints are still good then. A norm that fp32 cannot hold clips a gradient to zero before a
    callback sees it: there the logged grad_norm tells. Under fp16 gradients are left to the loss scaler, which skips
    such a step itself. Set `logging_nan_inf_filter=False`, or the trainer hides such a loss from every callback.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        import torch

        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            raise _no_number("gradient", state.global_step + 1, args)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise _no_number(key, state.global_step, args)


def _no_number(what: str, step: int, args) -> FloatingPointError:
    return FloatingPointError(
        f"step {step}: the {what} is nan or infinite. Likely causes: learning_rate={args.learning_rate:g} is too high "
        f"(try a tenth), fp16 overflows (bf16 and fp32 do not), or the model holds weights that are nan. "
        f"Last good checkpoint: {last_good_checkpoint(args.output_dir)}"
    )


def last_good_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint in an output_dir that was saved last and is whole, or None: for train(resume_from_checkpoint=...).

    A run that is killed while it saves leaves half a checkpoint, and transformers' own `get_last_checkpoint` would take
    it. Whole means: weights, optimizer, schedule, random state and trainer_state.json are there, all checksums of
    archives are right, no safetensors file is missing or cut off. A newer one that is not whole is named in a warning.
    Not covered: shards of FSDP and DeepSpeed, never whole here; a rank whose random state is missing; lost file times.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    at = {path: [file.stat().st_mtime for file in path.glob("trainer_state.json")] or [math.inf] for path in found}
    for checkpoint in sorted(found, key=lambda path: (at[path], int(path.name[11:])), reverse=True):
        if not (fault := _fault(checkpoint)):
            return str(checkpoint)
        warnings.warn(f"{checkpoint.name} is not whole: {fault}", stacklevel=2)
    return None


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    weights, states = [*checkpoint.glob("*.safetensors")], [*checkpoint.glob("rng_state*.pth")]  # one of each rank
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # transformers writes it last
        indexes = map(json.loads, (file.read_text(encoding="utf-8") for file in checkpoint.glob("*.index.json")))
        for file in {*weights, *(checkpoint / name for index in indexes for name in index["weight_map"].values())}:
            safe_open(file, "pt")  # opens only if the file is as long as its header says
        if not (checkpoint / "optimizer.pt").exists():
            return "no optimizer.pt: saved with save_only_model=True or in shards (FSDP, DeepSpeed), or half deleted"
        for file in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *states):
            with zipfile.ZipFile(file) as archive:
                if bad := archive.testzip():
                    return f"{file.name}: {bad} is damaged"
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return f"a run was killed while it saved: {type(error).__name__}: {error}"
    return None if weights and states else f"no {'rng_state.pth' if weights else 'safetensors file'}"

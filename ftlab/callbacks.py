"""Callbacks for the trainers of transformers and TRL: `SFTTrainer(..., callbacks=[LiveCurve(), StopButton()])`."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers import trainer as hf_trainer
from transformers.trainer_callback import CallbackHandler


class LiveCurve(TrainerCallback):
    """Draws `key` ("loss", or GRPO's "reward"), with f"eval_{key}" when there is one; the figure stays in the cell.

    Given to a trainer as it is built, it takes the progress table out of that trainer, and changes no other one.
    Outside a notebook it draws nothing.
    """

    def __init__(self, title: str = "", unit: str = "", key: str = "loss") -> None:
        self.title, self.key, self.losses, self.eval_losses, self.handle = title, key, [], [], None
        self.ylabel = f"{key} ({unit or 'nats/token'})" if unit or key == "loss" else key

    def on_init_end(self, args, state, control, **kwargs):
        handler = sys._getframe(1).f_locals.get("self")  # which passes callbacks all but itself
        if isinstance(handler, CallbackHandler):
            table = hf_trainer.DEFAULT_PROGRESS_CALLBACK
            handler.callbacks = [callback for callback in handler.callbacks if type(callback) is not table]

    def on_train_begin(self, args, state, control, **kwargs):
        from IPython import get_ipython
        from IPython.display import HTML, display

        in_notebook = hasattr(get_ipython(), "kernel")
        self.handle = display(HTML("<i>training starts ...</i>"), display_id=True) if in_notebook else None

    def on_log(self, args, state, control, **kwargs):
        keys, log = (self.key, f"eval_{self.key}"), state.log_history  # which begins before a run was resumed
        self.losses, self.eval_losses = ([(entry["step"], entry[k]) for entry in log if k in entry] for k in keys)
        if self.handle:
            self.handle.update(self.figure(state))

    def figure(self, state):
        import matplotlib.pyplot as plt

        from ftlab.classroom.show import POLICY, REJECTED

        figure, ax = plt.subplots()
        ax.plot(*zip(*self.losses, strict=True), color=POLICY, label="train")
        if self.eval_losses:
            ax.plot(*zip(*self.eval_losses, strict=True), "o-", color=REJECTED, label="held out", clip_on=False)
            ax.legend()
        bottom = None if any(value < 0 for _, value in self.losses + self.eval_losses) else 0
        ax.set(xlabel="step", ylabel=self.ylabel, xlim=(0, state.max_steps), ylim=(bottom, None))
        ax.set_title(f"{self.title} step {state.global_step} of {state.max_steps}".strip(), fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        plt.close(figure)
        return figure


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

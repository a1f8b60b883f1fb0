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

_PROGRESS = hf_trainer.DEFAULT_PROGRESS_CALLBACK


class LiveCurve(TrainerCallback):
    """Draws `key` ("loss", or GRPO's "reward") and "eval_loss" when there is one; the last figure stays in the cell.

    It stands in for the trainer's own progress table, and outside a notebook it draws nothing.
    """

    def __init__(self, title: str = "", unit: str = "nats/token", key: str = "loss") -> None:
        self.title, self.unit, self.key, self.losses, self.eval_losses, self.handle = title, unit, key, [], [], None
        hf_trainer.DEFAULT_PROGRESS_CALLBACK = TrainerCallback  # for the trainer that is about to be built

    def on_init_end(self, args, state, control, **kwargs):
        hf_trainer.DEFAULT_PROGRESS_CALLBACK = _PROGRESS

    def on_train_begin(self, args, state, control, **kwargs):
        from IPython import get_ipython
        from IPython.display import HTML, display

        in_notebook = hasattr(get_ipython(), "kernel")
        self.handle = display(HTML("<i>training starts ...</i>"), display_id=True) if in_notebook else None

    def on_log(self, args, state, control, **kwargs):
        self.losses, self.eval_losses = (  # also those from before a run was resumed
            [(record["step"], record[key]) for record in state.log_history if key in record]
            for key in (self.key, "eval_loss")
        )
        if self.handle:
            self.handle.update(self._figure(state))

    def _figure(self, state):
        import matplotlib.pyplot as plt

        from ftlab.classroom.show import POLICY, REJECTED

        figure, ax = plt.subplots()
        if self.losses:
            ax.plot(*zip(*self.losses, strict=True), color=POLICY, label="train")
        if self.eval_losses:
            ax.plot(*zip(*self.eval_losses, strict=True), "o-", color=REJECTED, label="held out", clip_on=False)
            ax.legend()
        ax.set(xlabel="step", ylabel=f"{self.key} ({self.unit})", xlim=(0, state.max_steps), ylim=(0, None))
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
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum, frame):
        signal.signal(signal.SIGINT, self.before)
        self.asked = True
        print("Stopping after this step, with a checkpoint. Once more to stop at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True

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
    """The newest checkpoint in an output_dir that is whole, or None: `trainer.train(resume_from_checkpoint=...)`.

    A run that is killed while it saves leaves half a checkpoint, and transformers' own `get_last_checkpoint` would take
    it. Whole means: weights, optimizer, schedule, random state and trainer_state.json are all there, every archive's
    checksums are right, and no safetensors file ends early. A newer one that is not whole is named in a warning.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        if not (fault := _fault(checkpoint)):
            return str(checkpoint)
        warnings.warn(f"{checkpoint.name} is not whole ({fault}): a run was killed while it saved", stacklevel=2)
    return None


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    weights = [*checkpoint.glob("*.safetensors")]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # transformers writes it last
        for file in weights:
            with safe_open(file, "pt"):  # opens only if the file is as long as its header says
                pass
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            with zipfile.ZipFile(checkpoint / name) as archive:
                if bad := archive.testzip():
                    return f"{name}: {bad} is damaged"
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None if weights else "no safetensors file"

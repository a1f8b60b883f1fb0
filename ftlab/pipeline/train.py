"""A Recipe through an engine: `run = train(recipe, rows)`, or `python -m ftlab.pipeline.train recipe.yaml`.

Everything a run leaves lies in one folder:

    runs/<name>/recipe.yaml      every setting, defaults too
                environment.json versions and hardware
                rows.sha256      fingerprint of the rows it learns from
                log.jsonl        one record per logging or evaluation step
                checkpoint-N/    adapter, optimizer, schedule and random state: a run that was killed goes on from here
                adapter/         the result (model/ after full fine-tuning), safetensors

TRL does the training. Unsloth patches transformers and TRL when it is imported, so one process has one engine: run the
other one with `train_in_process`.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.paths import DATA
from ftlab.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

DONE = "complete"  # a file in each checkpoint folder, written last: a checkpoint without it was cut short


@dataclass(frozen=True)
class Run:
    """What a training run left: the model, its tokenizer, the log records, seconds, and the folder with all of it."""

    folder: Path
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    log: list[dict]
    seconds: float
    interrupted: bool

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one logged quantity, e.g. "loss", "eval_loss", "grad_norm"."""
        points = [(record["step"], record[key]) for record in self.log if key in record]
        return [step for step, _ in points], [value for _, value in points]


def train(
    recipe: Recipe,
    train_rows: list[dict],
    eval_rows: list[dict] | None = None,
    folder: str | Path = "runs/latest",
    on_log: Callable[[dict], None] | None = None,
    metric: Callable[..., dict[str, float]] | None = None,
) -> Run:
    """Trains the recipe on prompt/completion rows and leaves everything in `folder`.

    on_log gets each record as it is made (`ftlab.classroom.show.LiveCurve` draws them). metric(model, tokenizer) is
    called at each evaluation, without autocast; its values are logged as eval_<name>.

    If `folder` holds checkpoints of the *same* recipe, the run goes on from the last complete one and ends in the same
    weights as a run that was never stopped; a finished run is given back as it is. One Ctrl-C (or Jupyter's stop
    button) finishes the step, writes a checkpoint and returns; a second one raises KeyboardInterrupt.

    Raises ValueError if the folder belongs to another recipe or to other rows, or the rows are empty.
    """
    if not train_rows:
        raise ValueError("train_rows is empty: nothing to learn from. Did validation refuse every row?")
    folder = Path(folder)
    _claim(folder, recipe, [train_rows, eval_rows or []])
    start = time.perf_counter()
    trainer = sft_trainer(recipe, train_rows, eval_rows, folder)
    watcher = _watcher(trainer, folder, on_log, metric)
    trainer.add_callback(watcher)
    if on_log:  # it shows the progress; without it there is the trainer's own progress bar
        from transformers import ProgressCallback
        from transformers.utils.notebook import NotebookProgressCallback

        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(NotebookProgressCallback)
    checkpoint = last_checkpoint(folder)
    if checkpoint and (best := _result_of(checkpoint)):
        trainer._load_from_checkpoint(best)  # trainer.train looks for the end only after a step: it would take one more
        watcher.records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    else:
        with _one_ctrl_c(watcher):
            trainer.train(resume_from_checkpoint=checkpoint)
    result = folder / ("adapter" if recipe.r else "model")
    trainer.save_model(str(result))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # generate without autocast
    seconds = time.perf_counter() - start
    return Run(folder, model, trainer.processing_class, watcher.records, seconds, watcher.stop_asked)


def sft_trainer(recipe: Recipe, train_rows: list[dict], eval_rows: list[dict] | None, folder: Path) -> "SFTTrainer":
    """TRL's SFTTrainer for a recipe: the one place where a Recipe becomes library arguments."""
    if recipe.engine == "unsloth":
        _import_unsloth()
        model, tokenizer = _unsloth_model(recipe)
        peft_config = None  # Unsloth has put its adapters on already
    else:
        model, tokenizer = _model(recipe)
        peft_config = lora_config(recipe)
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import EarlyStoppingCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()  # of tokenizing
    precision = resolve_precision(recipe)
    evaluates = bool(recipe.eval_steps and eval_rows)
    stops_early = recipe.early_stop_patience > 0
    config = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        optim=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        max_length=recipe.max_length,
        gradient_checkpointing=recipe.gradient_checkpointing,
        completion_only_loss=True,  # the prompt is read, not learned
        train_sampling_strategy="random",  # "group_by_length" cannot be resumed: its order is not kept after epoch 1
        bf16=precision == "bf16",  # autocast: fp32 master weights, bf16 products
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=recipe.logging_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_steps or None,
        save_strategy="steps",
        save_steps=recipe.eval_steps if stops_early else recipe.save_steps,  # the best one must be on disk
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # how much of the patience is used up
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if stops_early else None,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_pin_memory=False,
        report_to="none",
    )
    trainer_class = SFTTrainer
    if recipe.fast:
        from ftlab.pipeline import fast

        fast.check(model)
        fast.keep_memory()
        trainer_class = functools.partial(
            fast.fast_sft_trainer, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
        )
    set_seed(recipe.seed)  # transformers does it too, but only when TRL has drawn lora_A already
    return trainer_class(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(_only_text(train_rows)),
        eval_dataset=Dataset.from_list(_only_text(eval_rows)) if evaluates else None,
        peft_config=peft_config,
        args=config,
        callbacks=[EarlyStoppingCallback(recipe.early_stop_patience)] if stops_early else None,
    )


def lora_config(recipe: Recipe):
    """PEFT's LoraConfig of a recipe, or None for full fine-tuning."""
    from peft import LoraConfig

    if recipe.r == 0:
        return None
    return LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )


def resolve_precision(recipe: Recipe) -> str:
    """ "fp32", "bf16" or "fp16": "auto" takes bf16 where the hardware multiplies it natively, fp16 on older GPUs."""
    import torch

    if recipe.precision != "auto":
        return recipe.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a run folder that was written to its end; half-written ones are removed."""
    complete = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if (checkpoint / DONE).is_file():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return str(max(complete, key=lambda c: int(c.name.split("-")[1]))) if complete else None


def train_in_process(recipe: Recipe, folder: str | Path) -> list[dict]:
    """The log records of a run in a process of its own (another engine, or memory that is given back at its end).

    The rows come from the recipe's files. Raises RuntimeError with the end of the process's output if it fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = recipe.to_yaml(folder / "asked.yaml")
    command = [sys.executable, "-m", "ftlab.pipeline.train", str(file), "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_unsloth_safe_env())
    if done.returncode:
        raise RuntimeError(f"{recipe.engine} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def rows_from(file: str) -> list[dict]:
    """Prompt/completion rows of a recipe's train_file or eval_file; bad rows are an error here, listed one by one."""
    from ftlab.pipeline import data

    path = Path(file) if Path(file).is_file() else DATA / file
    if path.parent.name == "triage":
        return data.triage_rows(path)
    report = data.read_jsonl(path, "prompt_completion")
    if report.problems:
        raise ValueError(f"{len(report.problems)} bad rows, first ones:\n" + "\n".join(map(str, report.problems[:10])))
    return report.rows


def environment() -> dict:
    """Versions and hardware of this process, for the run folder: a result without them is an anecdote."""
    import torch

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "unsloth")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    return {"python": platform.python_version(), "versions": versions, "hardware": hardware}


# --- what the functions above need ------------------------------------------------------------------------------------


def _model(recipe: Recipe):
    import torch

    from ftlab.pipeline.models import load

    if recipe.quantization == "none":  # what is trained must be fp32, and without LoRA that is everything
        return load(recipe.model, dtype=None if recipe.r else torch.float32)
    from peft import prepare_model_for_kbit_training

    model, tokenizer = load(recipe.model, quantization=recipe.quantization)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=recipe.gradient_checkpointing), tokenizer


def _import_unsloth() -> None:
    if "unsloth" not in sys.modules and {"trl", "transformers"} & sys.modules.keys():
        raise RuntimeError(
            "Unsloth must be imported before transformers and trl, which this process has loaded already. "
            "Use train_in_process(recipe, folder), or restart the kernel and train with Unsloth first."
        )
    os.environ.update(_unsloth_safe_env())
    import unsloth  # noqa: F401


def _unsloth_safe_env() -> dict[str, str]:
    """The environment with Unsloth's installer and statistics off, and its compiled code out of the reader's folder."""
    settings = {"UNSLOTH_AUTO_INSTALL": "0", "UNSLOTH_DISABLE_STATISTICS": "1"}
    return {
        **os.environ,
        **settings,
        "UNSLOTH_COMPILE_LOCATION": os.path.join(tempfile.gettempdir(), "unsloth_compiled"),
    }


def _unsloth_model(recipe: Recipe):
    from unsloth import FastLanguageModel

    from ftlab.pipeline.models import best_dtype, resolve

    model, tokenizer = FastLanguageModel.from_pretrained(
        resolve(recipe.model),
        max_seq_length=recipe.max_length,
        dtype=best_dtype(),
        load_in_4bit=recipe.quantization.startswith("nf4"),
        load_in_8bit=recipe.quantization == "int8",
        full_finetuning=recipe.r == 0,
    )
    if recipe.r:
        model = FastLanguageModel.get_peft_model(
            model,
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=list(recipe.target_modules),
            use_gradient_checkpointing="unsloth" if recipe.gradient_checkpointing else False,
            random_state=recipe.seed,
        )
    return model, tokenizer


def _only_text(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def _claim(folder: Path, recipe: Recipe, rows: list[list[dict]]) -> None:
    """Makes the run folder, or checks that it is this recipe's, on these rows."""
    file = folder / "recipe.yaml"
    if file.is_file() and (before := Recipe.from_yaml(file)) != recipe:
        changed = [f for f in Recipe.__dataclass_fields__ if getattr(before, f) != getattr(recipe, f)]
        raise ValueError(
            f"{folder} holds a run of another recipe (differs in {changed}): take another folder or remove it"
        )
    fingerprint = hashlib.sha256(json.dumps([_only_text(part) for part in rows]).encode()).hexdigest()
    if (folder / "rows.sha256").is_file() and (folder / "rows.sha256").read_text() != fingerprint:
        raise ValueError(f"{folder} holds a run of this recipe on other rows: take another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(file)
    (folder / "rows.sha256").write_text(fingerprint)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2), encoding="utf-8")


def _result_of(checkpoint: str) -> str | None:
    """The checkpoint with the result, if the run had come to its end when it wrote this one."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    stopper = state["stateful_callbacks"].get("EarlyStoppingCallback")
    stopped = stopper and (
        stopper["attributes"]["early_stopping_patience_counter"] >= stopper["args"]["early_stopping_patience"]
    )
    if state["global_step"] < state["max_steps"] and not stopped:
        return None
    best = state["best_model_checkpoint"] or checkpoint
    return str(Path(checkpoint).with_name(Path(best).name))


def _watcher(trainer, folder: Path, on_log, metric):
    """A TrainerCallback that writes the log, marks complete checkpoints, runs the metric and stops when asked to."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.records: list[dict] = []
            self.stop_asked = False

        def on_train_begin(self, args, state, control, **kwargs):
            self.records = [dict(record) for record in state.log_history]  # those of the run that we go on with
            (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")

        def on_log(self, args, state, control, logs=None, **kwargs):
            record = {**(logs or {}), "step": state.global_step}
            self.records.append(record)
            with (folder / "log.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            if on_log:
                on_log({**record, "max_steps": state.max_steps})

        def on_evaluate(self, args, state, control, **kwargs):
            if metric:
                was_training = trainer.model.training
                values = metric(trainer.model.eval(), trainer.processing_class)
                trainer.model.train(was_training)
                trainer.log({f"eval_{name}": value for name, value in values.items()})

        def on_step_end(self, args, state, control, **kwargs):
            if self.stop_asked:
                control.should_save = control.should_training_stop = True
            return control

        def on_save(self, args, state, control, **kwargs):
            (folder / f"checkpoint-{state.global_step}" / DONE).touch()

    return Watcher()


@contextlib.contextmanager
def _one_ctrl_c(watcher) -> Iterator[None]:
    """While open, the first SIGINT asks the watcher to stop at the end of the step; the second one raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(signum, frame):
        signal.signal(signal.SIGINT, before)
        watcher.stop_asked = True
        print("Stopping after this step, with a checkpoint. Once more to stop at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Train a recipe (YAML) and leave everything in one folder.")
    parser.add_argument("recipe")
    parser.add_argument("--folder", help="default: runs/<name of the recipe file>")
    arguments = parser.parse_args()
    recipe = Recipe.from_yaml(arguments.recipe)
    if recipe.engine == "unsloth":
        _import_unsloth()
    folder = Path(arguments.folder or Path("runs") / Path(arguments.recipe).stem)
    eval_rows = rows_from(recipe.eval_file) if recipe.eval_file else None
    run = train(recipe, rows_from(recipe.train_file), eval_rows, folder)
    how = "interrupted, go on with the same command" if run.interrupted else "done"
    print(f"{how}: {run.folder}, {run.seconds:.0f} s")


if __name__ == "__main__":
    main()

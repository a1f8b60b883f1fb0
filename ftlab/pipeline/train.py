"""A Recipe through an engine: `run = train(recipe, rows)`, or `python -m ftlab.pipeline.train recipe.yaml`.

SFT is built here, DPO in ftlab.pipeline.align.

Everything a run leaves lies in one folder:

    runs/<name>/recipe.yaml      every setting, defaults too
                environment.json versions and hardware
                rows.sha256      fingerprint of the rows it learns from
                log.jsonl        one record per logging or evaluation step
                checkpoint-N/    adapter, optimizer, schedule and random state: a run that was killed goes on from here
                adapter/         the result (model/ after full fine-tuning), safetensors

What goes wrong is told by ftlab.pipeline.faults: a full disk, too little memory, a loss that is no number, a checkpoint
that is not what was written. None of them costs more than the steps since the last good checkpoint.

TRL does the training. Unsloth patches transformers and TRL when it is imported, so one process has one engine: run the
other one with `train_in_process`.

On several devices each process runs this module and takes every N-th batch; the first one alone writes:

    torchrun --nproc_per_node 2 -m ftlab.pipeline.train recipe.yaml --processes 2     (more in data/launch)

The batch of a step is then N times as large, and the loss the mean over all of its tokens, as on one device.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.paths import DATA, within
from ftlab.pipeline import faults
from ftlab.pipeline.faults import DONE
from ftlab.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

LONG = 512  # beyond, eager attention's T x T weights in every layer cost more than they save


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
        return series(self.log, key)


def series(log: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one logged quantity in the records of a log."""
    points = [(record["step"], record[key]) for record in log if key in record]
    return [step for step, _ in points], [value for _, value in points]


def train(
    recipe: Recipe,
    train_rows: list[dict],
    eval_rows: list[dict] | None = None,
    folder: str | Path = "runs/latest",
    on_log: Callable[[dict], None] | None = None,
    metric: Callable[..., dict[str, float]] | None = None,
) -> Run:
    """Trains the recipe on the rows of its method and leaves everything in `folder`.

    sft: {prompt, completion}; dpo: {prompt, chosen, rejected}. Prompts and answers are lists of messages (sft also
    takes strings).

    on_log gets each record as it is made (`ftlab.classroom.show.LiveCurve` draws them). metric(model, tokenizer) is
    called at each evaluation, without autocast; its values are logged as eval_<name>.

    If `folder` holds checkpoints of the *same* recipe, the run goes on from the last complete one and ends in the same
    weights as a run that was never stopped; a finished run is given back as it is. One Ctrl-C (or Jupyter's stop
    button) finishes the step, writes a checkpoint and returns; a second one raises KeyboardInterrupt. With several
    processes Ctrl-C ends the run at once, and it goes on from its last checkpoint; on_log is called in the first
    process only.

    Raises ValueError if the folder belongs to another recipe or to other rows, the rows are empty, or a row is not one
    that the method can learn from, naming the row. Raises RuntimeError if accelerate was asked for FSDP or DeepSpeed
    and does something else, as it does without a word on a CPU. Raises FloatingPointError before a step whose loss or
    gradient is no number, MemoryError and OSError for too little memory and for what could not be written: the message
    says what to do and which checkpoint is kept. A damaged checkpoint is set aside with a warning.
    """
    if not train_rows:
        raise ValueError("train_rows is empty: nothing to learn from. Did validation refuse every row?")
    from ftlab.pipeline import align

    align.check_kind(recipe, train_rows, eval_rows or [])
    folder = Path(folder)
    with faults.explained(recipe, folder):
        claim(folder, recipe, _learned(recipe, [train_rows, eval_rows or []]))
        return _train(recipe, train_rows, eval_rows, folder, on_log, metric)


def _train(recipe, train_rows, eval_rows, folder, on_log, metric) -> Run:
    from ftlab.pipeline import align

    start = time.perf_counter()
    result = folder / ("adapter" if recipe.r else "model")
    make = sft_trainer if recipe.method == "sft" else align.trainer
    trainer = make(recipe, train_rows, eval_rows, folder)
    _check_launched(trainer.accelerator.distributed_type.value)
    watcher = _watcher(trainer, recipe, folder, on_log, metric)
    trainer.add_callback(watcher)
    if on_log:  # it shows the progress; without it there is the trainer's own progress bar
        from transformers import ProgressCallback
        from transformers.utils.notebook import NotebookProgressCallback

        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(NotebookProgressCallback)
    with trainer.accelerator.main_process_first():  # which removes the half-written ones
        checkpoint = last_checkpoint(folder)
    if checkpoint and (best := _result_of(checkpoint)):
        trainer._load_from_checkpoint(best)  # trainer.train looks for the end only after a step: it would take one more
        watcher.records = _log_of(folder)
    else:
        _know_numbered_cpus()
        with _one_ctrl_c(watcher):
            trainer.train(resume_from_checkpoint=checkpoint)
    _save_result(trainer, result)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # generate without autocast
    seconds = time.perf_counter() - start
    return Run(folder, model.eval(), trainer.processing_class, watcher.records, seconds, watcher.stop_asked)


def _save_result(trainer, result: Path) -> None:
    """Saves the model beside its place first: what stands there is whole, also if this is killed or the disk full."""
    new, first = result.with_name(f".{result.name}.part"), trainer.accelerator.is_main_process
    if first:
        shutil.rmtree(new, ignore_errors=True)  # of a save that was cut short
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(new))
    trainer.accelerator.wait_for_everyone()
    if first:
        faults.put(new, result)


def sft_trainer(recipe: Recipe, train_rows: list[dict], eval_rows: list[dict] | None, folder: Path) -> "SFTTrainer":
    """TRL's SFTTrainer for a recipe."""
    if recipe.engine == "unsloth":
        _import_unsloth()
    from datasets import Dataset, disable_progress_bars
    from transformers import EarlyStoppingCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()  # of tokenizing
    evaluates = bool(recipe.eval_steps and eval_rows)
    stops_early = recipe.early_stop_patience > 0
    config = SFTConfig(  # before the model: it joins the processes and gives each one its own GPU to load on
        **training_arguments(recipe, folder, evaluates),
        max_length=recipe.max_length,
        completion_only_loss=True,  # the prompt is read, not learned
        train_sampling_strategy="random",  # "group_by_length" cannot be resumed: its order is not kept after epoch 1
    )
    if recipe.engine == "unsloth":
        model, tokenizer = _unsloth_model(recipe)
        peft_config = None  # Unsloth has put its adapters on already
    else:
        model, tokenizer = base_model(recipe)
        peft_config = lora_config(recipe)
    if recipe.fast:
        _check_fast(model)
    set_seed(recipe.seed)  # transformers does it too, but only when TRL has drawn lora_A already
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(_only_text(train_rows)),
        eval_dataset=Dataset.from_list(_only_text(eval_rows)) if evaluates else None,
        peft_config=peft_config,
        args=config,
        callbacks=[EarlyStoppingCallback(recipe.early_stop_patience)] if stops_early else None,
    )
    if recipe.fast:
        from ftlab.cpu import speed_up

        speed_up(trainer)
    if left_out := len(train_rows) - len(trainer.train_dataset):
        said = f"{left_out} of {len(train_rows)} rows have no answer within max_length = {recipe.max_length} tokens"
        if left_out == len(train_rows):
            raise ValueError(f"{said}: nothing to learn from. Is max_length too short for the prompts?")
        warnings.warn(f"{said}: TRL leaves them out", stacklevel=2)
    return trainer


def _check_fast(model: "PreTrainedModel") -> None:
    """Raises ValueError for a model that is no Llama on a CPU, or for several processes; the rest Recipe refuses."""
    if (count := processes()[1]) > 1:  # its layers go around DistributedDataParallel, and each would learn for itself
        raise ValueError(f"fast: true is for one process, this is one of {count}: leave `fast` out to train with all")
    kind, device = model.config.model_type, model.device.type
    if kind != "llama" or device != "cpu":
        raise ValueError(
            f"fast: true is for models of type 'llama' on the CPU, this is {kind!r} on {device!r}. Leave `fast` out to "
            f"train with plain TRL; on a GPU, Unsloth is the fast engine."
        )


def training_arguments(recipe: Recipe, folder: Path, evaluates: bool) -> dict:
    """What every TRL config is given, whatever the method: the one place where a Recipe becomes library arguments."""
    import torch

    precision, stops_early = resolve_precision(recipe), recipe.early_stop_patience > 0
    return {
        "output_dir": str(folder),
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": 2 * recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "optim": recipe.optimizer,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "bf16": precision == "bf16",  # autocast: fp32 master weights, bf16 products
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": recipe.logging_steps,
        "logging_nan_inf_filter": False,  # else a loss that is no number is logged as the mean of those before it
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": recipe.eval_steps or None,
        "save_strategy": "steps",
        "save_steps": recipe.eval_steps if stops_early else recipe.save_steps,  # the best one must be on disk
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # how much of the patience is used up
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": "eval_loss" if stops_early else None,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,  # all that is trained is used in each step
        "report_to": "none",
    }


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


def base_model(recipe: Recipe) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model that a recipe starts from, in the dtype in which it can be trained, and its tokenizer."""
    import torch

    from ftlab.pipeline.models import load

    if (Path(recipe.model) / "adapter_config.json").is_file():
        raise ValueError(
            f"{recipe.model} holds an adapter: merge it first (ftlab.pipeline.export.merge) and give that folder. "
            f"Otherwise the new adapter, switched off, would leave its base, not the model that you start from"
        )
    dtype = None if recipe.r else torch.float32  # what is trained must be fp32, and without LoRA that is everything
    model, tokenizer = load(recipe.model, dtype=dtype, quantization=recipe.quantization)
    if recipe.max_length > LONG:  # eager attention, faster on short rows on a CPU, holds T x T weights in every layer
        model.set_attn_implementation("sdpa")
    if recipe.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recipe.gradient_checkpointing)
    return model, tokenizer


def resolve_precision(recipe: Recipe) -> str:
    """ "fp32", "bf16" or "fp16": "auto" takes bf16 where the hardware multiplies it natively, fp16 on older GPUs."""
    import torch

    if recipe.precision != "auto":
        return recipe.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


def claim(folder: Path, recipe: Recipe, learned: list) -> None:
    """Makes the run folder, or checks that it is this recipe's, and what it learned from (JSON) the same.

    Raises ValueError, saying which of the two differs, or if the folder holds checkpoints of another program. Of
    several processes the first one does it: torchrun ends the others if it fails.
    """
    if processes()[0] > 0:
        return
    file = folder / "recipe.yaml"
    if not file.is_file() and any(folder.glob("checkpoint-*")):  # which would be removed, for want of a DONE
        raise ValueError(f"{folder} holds checkpoints but no recipe.yaml, so they are not ours: take another folder")
    if file.is_file() and (before := Recipe.from_yaml(file)) != recipe:
        changed = [f for f in Recipe.__dataclass_fields__ if getattr(before, f) != getattr(recipe, f)]
        raise ValueError(
            f"{folder} holds a run of another recipe (differs in {changed}): take another folder or remove it"
        )
    fingerprint = hashlib.sha256(json.dumps(learned).encode()).hexdigest()
    if (folder / "rows.sha256").is_file() and (folder / "rows.sha256").read_text() != fingerprint:
        also = "" if recipe.method == "sft" else " (or from other weights)"
        raise ValueError(f"{folder} holds a run of this recipe on other rows{also}: take another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        os.replace(recipe.to_yaml(folder / ".recipe.yaml.part"), file)
    faults.write(folder / "rows.sha256", fingerprint)
    faults.write(folder / "environment.json", json.dumps(environment(), indent=2))


def weights_sha256(name: str) -> str | None:
    """Of all weights in a model's folder; None for a name that is no folder."""
    if not Path(name).is_dir():
        return None
    sha256 = hashlib.sha256()
    for file in sorted(Path(name).glob("*.safetensors")):
        with file.open("rb") as stream:
            sha256.update(hashlib.file_digest(stream, "sha256").digest())
    return sha256.hexdigest()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a run folder that is what was written; half-written ones are removed.

    A newer one that was written to its end and is damaged since is renamed to broken-checkpoint-N, with a warning.
    """
    complete, broken, whole = [], [], None
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if (checkpoint / DONE).is_file():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    for checkpoint in sorted(complete, key=lambda c: int(c.name.split("-")[1]), reverse=True):
        if not (damage := faults.damage(checkpoint)):
            whole = checkpoint
            break
        faults.put(checkpoint, checkpoint.with_name(f"broken-{checkpoint.name}"))
        broken.append(f"{checkpoint} is damaged ({damage}) and is called broken-{checkpoint.name} now")
    if broken:
        goes_on = f"goes on from {whole.name}" if whole else "starts over, no good checkpoint being left"
        warnings.warn(f"{'; '.join(broken)}. The run {goes_on}. Is the disk failing?", stacklevel=2)
    return str(whole) if whole else None


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
    return _log_of(folder)


def processes() -> tuple[int, int]:
    """(number of this process, how many there are), as torchrun and accelerate tell it; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rows_from(file: str, method: str = "sft") -> list[dict]:
    """The rows of a recipe's train_file or eval_file; bad rows are an error here, listed one by one."""
    from ftlab.pipeline import data

    path = Path(file) if Path(file).is_file() else within(DATA, file)
    if path.resolve().parent == (DATA / "triage").resolve():  # not a folder of the reader's with that name
        return data.triage_rows(path)
    kind = "preference" if method == "dpo" else "prompt_completion"
    report = data.read_jsonl(path, kind)
    if report.problems:
        raise ValueError(f"{len(report.problems)} bad rows, first ones:\n" + "\n".join(map(str, report.problems[:10])))
    return report.rows


def environment() -> dict:
    """Versions and hardware of this process, for the run folder: a result without them is an anecdote."""
    import torch

    names = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "unsloth")
    versions = {"torch": str(torch.__version__)}  # with its build, which the metadata of PyPI's CUDA build leaves out
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    hardware["processes"] = processes()[1]
    return {"python": platform.python_version(), "versions": versions, "hardware": hardware}


# --- what the functions above need ------------------------------------------------------------------------------------


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


def _learned(recipe: Recipe, rows: list[list[dict]]) -> list:
    """What the method reads of the rows; for dpo also the weights, which earlier cells may change."""
    if recipe.method == "sft":
        return [_only_text(part) for part in rows]
    rows = [[{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in part] for part in rows]
    return [rows, weights_sha256(recipe.model)]


def _log_of(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut short


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


def _check_launched(got: str) -> None:
    """RuntimeError if accelerate's launcher was told to shard the model, and accelerate does not."""
    for variable, wanted in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true" and got != wanted:
            raise RuntimeError(
                f"accelerate was asked for {wanted}, and does {got}: each process would hold the whole model. "
                f"Without a GPU accelerate falls back to this silently"
            )


@functools.cache
def _know_numbered_cpus() -> None:
    """transformers 5.17 loads the optimizer of several processes to "cpu:0", a place that torch.load does not know."""
    import torch

    torch.serialization.register_package(
        1000, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


def _watcher(trainer, recipe: Recipe, folder: Path, on_log, metric):
    """A TrainerCallback that writes the log, marks complete checkpoints, runs the metric and stops when asked to."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.records: list[dict] = []
            self.stop_asked = False

        def on_train_begin(self, args, state, control, **kwargs):
            self.records = [dict(record) for record in state.log_history]  # those of the run that we go on with
            if state.is_world_process_zero:
                lines = "".join(json.dumps(r) + "\n" for r in self.records)
                (folder / "log.jsonl").write_text(lines, encoding="utf-8")

        def on_log(self, args, state, control, logs=None, **kwargs):
            record = {**(logs or {}), "step": state.global_step}
            self.records.append(record)
            if not state.is_world_process_zero:
                return
            with (folder / "log.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            if on_log:
                on_log({**record, "max_steps": state.max_steps})
            for name, value in record.items():
                # a norm of finite gradients may be more than fp32 holds: clipping has made them all 0 then
                stops = name.startswith("loss") or (name == "grad_norm" and not args.fp16)
                if stops and not math.isfinite(value):
                    raise faults.no_number(state.global_step, name, recipe, folder)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not args.fp16:  # there the scaler leaves such a step out and goes on with a smaller scale
                faults.check_finite(model, state.global_step + 1, recipe, folder)

        def on_evaluate(self, args, state, control, **kwargs):
            if metric:
                was_training = trainer.model.training
                values = metric(trainer.model.eval(), trainer.processing_class)
                trainer.model.eval()  # else TRL would add to this record what it has counted in training, and forget it
                trainer.log({f"eval_{name}": value for name, value in values.items()})
                trainer.model.train(was_training)

        def on_step_end(self, args, state, control, **kwargs):
            if self.stop_asked:
                control.should_save = control.should_training_stop = True
            return control

        def on_save(self, args, state, control, **kwargs):
            trainer.accelerator.wait_for_everyone()  # each process writes its own random state
            if state.is_world_process_zero:
                best = state.best_model_checkpoint
                faults.seal(folder / f"checkpoint-{state.global_step}", Path(best) if best else None)

    return Watcher()


@contextlib.contextmanager
def _one_ctrl_c(watcher) -> Iterator[None]:
    """While open, the first SIGINT asks the watcher to stop at the end of the step; the second one raises as usual.

    With several processes the first one does.
    """
    if threading.current_thread() is not threading.main_thread() or processes()[1] > 1:
        yield  # of several processes each would stop at a step of its own, and the others wait for it for ever
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
    parser.add_argument("--processes", type=int, help="how many there must be: a launcher may silently start fewer")
    arguments = parser.parse_args()
    rank, count = processes()
    if arguments.processes not in (None, count):
        parser.error(f"--processes: got {count}, wanted {arguments.processes}: did the launcher start them all?")
    recipe = Recipe.from_yaml(arguments.recipe)
    if recipe.engine == "unsloth":
        _import_unsloth()
    folder = Path(arguments.folder or within(Path("runs"), Path(arguments.recipe).stem))
    eval_rows = rows_from(recipe.eval_file, recipe.method) if recipe.eval_file else None
    run = train(recipe, rows_from(recipe.train_file, recipe.method), eval_rows, folder)
    how = "interrupted, go on with the same command" if run.interrupted else "done"
    if rank == 0:
        print(f"{how}: {run.folder}, {run.seconds:.0f} s, processes: {count}")


if __name__ == "__main__":
    main()

"""A Recipe in the words of other tools: Axolotl's YAML, LLaMA-Factory's YAML + dataset_info.json, OpenAI's JSONL + job.

    write_axolotl(recipe, rows, folder)        cd folder; PYTHONPATH=. axolotl train axolotl.yaml --launcher python
    write_llamafactory(recipe, rows, folder)   cd folder; llamafactory-cli train llamafactory.yaml
    write_llamaboard(recipe, folder)           the same for its web UI
    write_openai(recipe, rows, folder)         upload the .jsonl files, then openai_job(...) as the body of the job

Each folder is whole: configuration, data, and a link to the model if it lies on this machine. Where a tool's default
differs from the recipe's, it is written out, so that the same run results; what cannot be said in a tool's words is a
RecipeError, or stands in NO_COUNTERPART with the reason. (OpenAI can be told so little that another run results.)

Axolotl 0.19 drops a key that it does not know, without a word: `unknown_keys` finds such keys here, against the names
in data/stack. `train_peer` and `ask_peer` run the tools in the environments that `make stack` makes. What they make of
our files, token by token and loss by loss: tests/test_stack.py, data/results/stack_peers.py.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from ftlab.pipeline.models import resolve
from ftlab.pipeline.recipe import Recipe, RecipeError
from ftlab.pipeline.serve import environment

from ftlab.paths import DATA
from ftlab.pipeline import data, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = data.Row

KEYS_FILE = DATA / "stack" / "axolotl_keys.json"
SEED_FIRST = '''"""Sets the seed before lora_A is drawn: Axolotl leaves it to the trainer, which is made later."""

from axolotl.integrations.base import BasePlugin
from transformers import set_seed


class SeedFirst(BasePlugin):
    def pre_lora_load(self, cfg, model):
        set_seed(cfg.seed)
'''

_NOT_NEEDED = {
    "engine": "the tool is the engine",
    "fast": "another way to compute the same numbers, on a CPU",
    "train_file": "the rows themselves are written to train.jsonl",
}
_THEIRS = "OpenAI's affair: it can be neither told nor asked, so the result is not the same"
_WATCHED = "how the run is watched; OpenAI reports in its own way"
NO_COUNTERPART = {  # tool -> field -> why it is not in its files; any other field is translated, or refused
    "axolotl": _NOT_NEEDED,
    "llamafactory": _NOT_NEEDED,
    "openai": {
        **_NOT_NEEDED,
        "model": "a model of OpenAI's, given to openai_job",
        "eval_file": "its rows are written to eval.jsonl, whose id is given to openai_job",
        "max_length": "longer rows are refused here, so that nothing is cut",
        "learning_rate": f"only a multiplier of a rate that is not told; left at 'auto'. {_THEIRS}",
        **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "quantization", "precision"), _THEIRS),
        **dict.fromkeys(("optimizer", "schedule", "warmup_steps", "weight_decay", "max_grad_norm"), _THEIRS),
        "gradient_checkpointing": "memory against time, on OpenAI's machines",
        **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _WATCHED),
    },
}


# --- Axolotl ----------------------------------------------------------------------------------------------------------


def axolotl(recipe: Recipe) -> dict:
    """Axolotl 0.19's configuration of a recipe, its data in train.jsonl (and eval.jsonl) beside it.

    The rows are not `type: chat_template`, which leaves the line break after ChatML's end-of-turn out of the loss, but
    text that our own template has rendered, in segments with label true or false (sft), and messages that TRL's
    DPOTrainer renders (dpo): so ids and label masks are ours. The plugin, written beside the file, lets the seed decide
    lora_A; without it no two runs are equal.

    Raises RecipeError for what Axolotl does not have, or would read as something else.
    """
    if recipe.warmup_steps == 1:
        raise RecipeError("warmup_steps: got 1, of which Axolotl makes 2 (core/builders/base.py): wanted 0, 2 or more")
    precision = _precision(recipe)
    if recipe.r == 0 and precision != "fp32":
        raise RecipeError(
            f"precision: got {precision!r} with r = 0, wanted 'fp32': Axolotl would hold the weights that it trains in "
            f"16 bits, where ours are fp32"
        )
    config = {
        "base_model": _model_name(recipe),
        "trust_remote_code": False,
        "output_dir": "output",
        "seed": recipe.seed,
        # data
        "datasets": [_axolotl_dataset(recipe, "train.jsonl")],
        "dataset_prepared_path": "prepared",
        "dataset_num_proc": 1,
        "shuffle_merged_datasets": False,  # default true: a second shuffle, before the trainer's own
        "sequence_len": recipe.max_length,
        "sample_packing": False,
        "pad_to_sequence_len": False,  # default: to a multiple of 64
        "train_on_inputs": False,
        # how the weights are held, and computed with
        "load_in_8bit": recipe.quantization == "int8",
        "load_in_4bit": recipe.quantization.startswith("nf4"),
        "bf16": precision == "bf16",  # default "auto": fp16 where there is no GPU
        "fp16": precision == "fp16",
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        # optimizer and schedule
        "optimizer": recipe.optimizer,  # default: adamw_torch_fused
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        # how long
        "num_epochs": recipe.epochs,
        "micro_batch_size": recipe.batch_size,
        "eval_batch_size": 2 * recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        # how it is watched
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.eval_steps if recipe.early_stop_patience else recipe.save_steps,
        "save_total_limit": 2,
        "val_set_size": 0,
    }
    if recipe.r:
        config |= {
            "plugins": ["seed_first.SeedFirst"],
            "adapter": "qlora" if config["load_in_4bit"] else "lora",
            "lora_r": recipe.r,
            "lora_alpha": _whole_alpha(recipe, "Axolotl"),
            "lora_dropout": recipe.lora_dropout,
            "lora_target_modules": list(recipe.target_modules),
            **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),  # Triton: not on a CPU
        }
    if config["load_in_4bit"]:  # default: true
        config["bnb_config_kwargs"] = {"bnb_4bit_use_double_quant": recipe.quantization == "nf4-double"}
    if recipe.max_steps > 0:
        config["max_steps"] = recipe.max_steps
    if recipe.method == "dpo":
        config |= {"rl": "dpo", "dpo_loss_type": ["sigmoid"], "rl_beta": recipe.beta, "skip_prepare_dataset": True}
    else:
        config["excess_length_strategy"] = "raise"  # default: drop the row
    if _evaluates(recipe):
        config |= {"test_datasets": [_axolotl_dataset(recipe, "eval.jsonl")], "eval_steps": recipe.eval_steps}
    if recipe.early_stop_patience:
        config |= {"early_stopping_patience": recipe.early_stop_patience, "load_best_model_at_end": True}
    return config


def _axolotl_dataset(recipe: Recipe, file: str) -> dict:
    if recipe.method == "dpo":
        return {"path": file, "split": "train"}  # without a type: rows as TRL wants them
    return {"path": file, "ds_type": "json", "split": "train", "type": "input_output"}


def write_axolotl(recipe: Recipe, rows: list[Row], folder: str | Path, eval_rows: list[Row] | None = None) -> Path:
    """The path of axolotl.yaml, written with its data into `folder`; a key that Axolotl would drop is a RecipeError.

    Raises ValueError, naming the row, for rows that the method cannot learn from or that are longer than max_length.
    """
    config = axolotl(recipe)
    if dropped := unknown_keys(config):
        raise RecipeError("Axolotl would silently drop " + "; ".join(dropped))

    def line(row: Row, tokenizer: "PreTrainedTokenizerBase") -> dict:
        if recipe.method == "dpo":
            return {key: row[key] for key in ("prompt", "chosen", "rejected")}
        rendered = data.render(row, tokenizer)
        prompt = tokenizer.apply_chat_template(data.to_messages(row)[0], tokenize=False, add_generation_prompt=True)
        texts = (prompt, rendered.text[len(prompt) :])
        apart = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if apart != rendered.input_ids:
            raise ValueError("prompt and completion become other tokens apart than together")
        return {"segments": [{"label": i == 1, "text": text} for i, text in enumerate(texts)]}

    folder = Path(folder)
    _write_lines(_lines(recipe, rows, eval_rows, line), folder)
    _link_model(recipe, folder / "model")
    shutil.rmtree(folder / "prepared", ignore_errors=True)  # kept by the names of the files, whatever is in them
    (folder / "seed_first.py").write_text(SEED_FIRST, encoding="utf-8")
    return _write_yaml(config, folder / "axolotl.yaml")


def unknown_keys(config: dict) -> list[str]:
    """The keys of a configuration that Axolotl 0.19 would drop without a word, each with the nearest known one.

    Looked at: the configuration, its datasets (fewer keys are known there with `rl`), and nested settings such as
    `trl`. Keys that a plugin adds are not known here. The names are Axolotl's own, read from its pydantic models:
    data/stack/make.py; that they are current: tests/test_stack.py.
    """
    known = json.loads(KEYS_FILE.read_text(encoding="utf-8"))["keys"]
    kind = "dpo" if config.get("rl") in ("dpo", "ipo", "simpo") else "kto" if config.get("rl") == "kto" else "sft"
    found = []

    def look(settings: dict, names: list[str], where: str) -> None:
        for key in settings:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                found.append(f"{where}{key}" + (f" (did you mean {near[0]}?)" if near else ""))

    look(config, known[""], "")
    for key, value in config.items():
        if key in ("datasets", "test_datasets"):
            for i, dataset in enumerate(value or []):
                look(dataset, known[f"datasets {kind}"], f"{key}[{i}].")
        elif key in known and isinstance(value, dict):
            look(value, known[key], f"{key}.")
    return found


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def llamafactory(recipe: Recipe) -> dict:
    """LLaMA-Factory 0.9.5's configuration of a recipe, its data named in dataset_info.json beside it.

    No `template` is named: LLaMA-Factory then reads the one in the tokenizer's folder. A named one is LLaMA-Factory's
    own, and some of them ("chatml") also replace eos and the template that is saved with the adapter.

    Raises RecipeError for what LLaMA-Factory does not have.
    """
    import torch

    precision = _precision(recipe)
    config = {
        "model_name_or_path": _model_name(recipe),
        "trust_remote_code": False,
        "stage": recipe.method,
        "do_train": True,
        "output_dir": "output",
        "overwrite_output_dir": True,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        # data
        "dataset": "train",
        "dataset_dir": ".",
        "cutoff_len": recipe.max_length,
        "packing": False,
        "train_on_prompt": False,
        "preprocessing_num_workers": 1,
        "overwrite_cache": True,
        # how the weights are held, and computed with
        "finetuning_type": "lora" if recipe.r else "full",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": not recipe.gradient_checkpointing,  # default: on
        # optimizer and schedule
        "optim": recipe.optimizer,  # default: adamw_torch_fused
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,  # default: linear
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        # how long
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": 2 * recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        # how it is watched
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.eval_steps if recipe.early_stop_patience else recipe.save_steps,
        "save_total_limit": 2,
        "report_to": "none",
    }
    if recipe.r:
        config |= {
            "lora_rank": recipe.r,
            "lora_alpha": _whole_alpha(recipe, "LLaMA-Factory"),  # default: 2 r
            "lora_dropout": recipe.lora_dropout,
            "lora_target": ",".join(recipe.target_modules),
        }
    if recipe.quantization != "none":
        config |= {"quantization_method": "bnb", "quantization_bit": 8 if recipe.quantization == "int8" else 4}
        config |= {"upcast_layernorm": True, "double_quantization": recipe.quantization == "nf4-double"}
    if recipe.method == "dpo":
        config |= {"pref_loss": "sigmoid", "pref_beta": recipe.beta}
    if _evaluates(recipe):
        config |= {"eval_dataset": "eval", "eval_strategy": "steps", "eval_steps": recipe.eval_steps}
    if recipe.early_stop_patience:
        config |= {"early_stopping_steps": recipe.early_stop_patience, "load_best_model_at_end": True}
        config["metric_for_best_model"] = "eval_loss"
    return config


def dataset_info(recipe: Recipe) -> dict:
    """LLaMA-Factory's dataset_info.json for the files of `write_llamafactory`."""
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    if recipe.method == "dpo":
        entry |= {"ranking": True, "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}}
    names = ("train", "eval") if _evaluates(recipe) else ("train",)
    return {name: {"file_name": f"{name}.jsonl", **entry} for name in names}


def write_llamafactory(recipe: Recipe, rows: list[Row], folder: str | Path, eval_rows: list[Row] | None = None) -> Path:
    """The path of llamafactory.yaml, written with dataset_info.json and the data into `folder`.

    Raises ValueError, naming the row, for rows that the method cannot learn from or that are longer than max_length.
    """
    config = llamafactory(recipe)

    def line(row: Row, tokenizer: "PreTrainedTokenizerBase") -> dict:
        prompt, completion = data.to_messages(row)
        if recipe.method == "dpo":
            return {"messages": prompt, "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
        return {"messages": prompt + completion}

    folder = Path(folder)
    _write_lines(_lines(recipe, rows, eval_rows, line), folder)
    _link_model(recipe, folder / "model")
    (folder / "dataset_info.json").write_text(json.dumps(dataset_info(recipe), indent=2) + "\n", encoding="utf-8")
    return _write_yaml(config, folder / "llamafactory.yaml")


ON_THE_PAGE = (  # what the web UI has fields for, by the same name
    *("dataset_dir", "cutoff_len", "packing", "train_on_prompt", "gradient_accumulation_steps", "lr_scheduler_type"),
    *("warmup_steps", "logging_steps", "save_steps", "lora_rank", "lora_alpha", "lora_dropout", "lora_target"),
    *("pref_beta", "pref_loss"),
)


def write_llamaboard(recipe: Recipe, folder: str | Path) -> None:
    """Writes what LLaMA-Factory's web UI reads into a folder of `write_llamafactory`: a file of fields, and the model.

        cd folder; GRADIO_SERVER_NAME=127.0.0.1 llamafactory-cli webui     (without the variable it serves the network)

    There: Config path recipe.yaml, "Load arguments", "Start"; the result: saves/Custom/... The page does not read
    llamafactory.yaml; its own format names its fields. What has no field stands as JSON in "Extra arguments", which
    override the fields: so nothing is in both, and a field that you change on the page counts. One exception: the page
    only names templates of its own, so the extra arguments ask for the model's. They also turn trust_remote_code off.

    Raises RecipeError for nf4, which the page always makes nf4-double, and for save_steps below 10.
    """
    if recipe.quantization == "nf4":
        raise RecipeError("quantization: got 'nf4', wanted 'nf4-double': the web UI always quantizes the scales too")
    extra = {**llamafactory(recipe), "template": None}
    if extra["save_steps"] < 10:
        raise RecipeError(f"save_steps: got {extra['save_steps']}, wanted 10 or more: the web UI's slider begins there")
    for key in ("output_dir", "bf16", "fp16"):
        del extra[key]
    user = {"lang": "en", "hub_name": "huggingface", "last_model": "Custom", "cache_dir": None}
    user["path_dict"] = {"Custom": extra.pop("model_name_or_path")}
    fields = {
        "top.model_name": "Custom",
        "top.finetuning_type": extra.pop("finetuning_type"),
        "top.quantization_bit": str(extra.pop("quantization_bit", "none")),
        "train.training_stage": {"sft": "Supervised Fine-Tuning", "dpo": "DPO"}[extra.pop("stage")],
        "train.dataset": [extra.pop("dataset")],
        "train.compute_type": _precision(recipe),
        "train.batch_size": extra.pop("per_device_train_batch_size"),
        "train.max_samples": str(10**9),  # default: 100,000 rows
    }
    for key in ("learning_rate", "num_train_epochs", "max_grad_norm"):  # boxes for text
        fields[f"train.{key}"] = str(extra.pop(key))
    for key in ON_THE_PAGE:
        if key in extra:
            fields[f"train.{key}"] = extra.pop(key)
    fields["train.extra_args"] = json.dumps(extra)
    for name, settings in (("llamaboard_config/recipe", fields), ("llamaboard_cache/user_config", user)):
        (Path(folder) / name).parent.mkdir(exist_ok=True)
        _write_yaml(settings, Path(folder) / f"{name}.yaml")


# --- OpenAI -----------------------------------------------------------------------------------------------------------


def openai_row(recipe: Recipe, row: Row) -> dict:
    """A line of OpenAI's training file: {messages} (sft), or {input, preferred_output, non_preferred_output} (dpo)."""
    prompt, completion = data.to_messages(row)
    if recipe.method == "dpo":
        outputs = {"preferred_output": row["chosen"], "non_preferred_output": row["rejected"]}
        return {"input": {"messages": prompt, "tools": [], "parallel_tool_calls": True}, **outputs}
    return {"messages": prompt + completion}


def openai_faults(lines: list[dict], method: str) -> list[str]:
    """What OpenAI's written rules forbid in a training file, empty for a good one.

    At least 10 examples; the first message of the system or the user, the last one of the assistant (sft) or not
    (dpo's input); each of dpo's outputs one assistant message.
    Source: the guides "Supervised fine-tuning" and "Direct preference optimization" of platform.openai.com.
    """
    faults = [] if len(lines) >= 10 else [f"{len(lines)} examples, wanted at least 10"]
    for i, line in enumerate(lines):
        keys = {"input", "preferred_output", "non_preferred_output"} if method == "dpo" else {"messages"}
        if set(line) != keys:
            faults.append(f"line {i}: got {sorted(line)}, wanted {sorted(keys)}")
            continue
        messages = line["input"]["messages"] if method == "dpo" else line["messages"]
        roles = [message.get("role") for message in messages]
        if not set(roles) <= {"system", "user", "assistant"} or not all(m.get("content") for m in messages):
            faults.append(f"line {i}: got roles {roles}, wanted system, user and assistant, none with empty content")
        if (roles[-1:] == ["assistant"]) == (method == "dpo"):
            wanted = "the question (dpo)" if method == "dpo" else "the answer (sft)"
            faults.append(f"line {i}: the last message is of {roles[-1:]}, wanted {wanted}")
        for key in keys & {"preferred_output", "non_preferred_output"}:
            if [message.get("role") for message in line[key]] != ["assistant"] or not line[key][0].get("content"):
                faults.append(f"line {i}: {key} is {line[key]!r:.80}, wanted one assistant message")
    return faults


def openai_job(recipe: Recipe, model: str, training_file: str, validation_file: str | None = None) -> dict:
    """The body of POST /fine_tuning/jobs: `client.fine_tuning.jobs.create(**body)`.

    model: one of OpenAI's, such as "gpt-4.1-mini-2025-04-14". The files: ids that uploading them gave.
    A job's batch is our batch_size x gradient_accumulation_steps rows; NO_COUNTERPART["openai"] says what is not told.

    Raises RecipeError for what a job cannot be told: steps instead of epochs, a part of an epoch, early stopping.
    """
    if recipe.max_steps > 0:
        raise RecipeError(f"max_steps: got {recipe.max_steps}, wanted -1: OpenAI counts epochs")
    if recipe.epochs != int(recipe.epochs):
        raise RecipeError(f"epochs: got {recipe.epochs}, wanted a whole number: OpenAI's n_epochs is an integer")
    if recipe.early_stop_patience:
        raise RecipeError("early_stop_patience: wanted 0: OpenAI does not stop early (it keeps a model per epoch)")
    hyperparameters = {
        "n_epochs": int(recipe.epochs),
        "batch_size": recipe.batch_size * recipe.gradient_accumulation_steps,
        "learning_rate_multiplier": "auto",
    }
    kind = "supervised"
    if recipe.method == "dpo":
        kind, hyperparameters = "dpo", {"beta": recipe.beta, **hyperparameters}
    body = {"model": model, "training_file": training_file, "seed": recipe.seed}
    if validation_file:
        body["validation_file"] = validation_file
    return {**body, "method": {"type": kind, kind: {"hyperparameters": hyperparameters}}}


def write_openai(recipe: Recipe, rows: list[Row], folder: str | Path, eval_rows: list[Row] | None = None) -> Path:
    """The path of train.jsonl (eval.jsonl beside it), to be uploaded with purpose "fine-tune".

    Raises ValueError for rows that the method cannot learn from, are too long, or break OpenAI's written rules.
    """
    lines = _lines(recipe, rows, eval_rows, lambda row, tokenizer: openai_row(recipe, row))
    if faults := openai_faults(lines["train"], recipe.method):
        raise ValueError("OpenAI would refuse train.jsonl: " + "; ".join(faults[:5]))
    _write_lines(lines, Path(folder))
    return Path(folder) / "train.jsonl"


# --- Running the tools ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerRun:
    """What a run of another tool left: its log records, wall seconds (start-up too), peak resident bytes."""

    log: list[dict]
    seconds: float
    peak_bytes: int

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one logged quantity."""
        return train.series(self.log, key)


COMMANDS = {"axolotl": ("axolotl", "train", "--launcher", "python"), "llamafactory": ("llamafactory-cli", "train")}
QUIET = {  # no network, no statistics
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


def train_peer(config: str | Path) -> PeerRun:
    """Trains with the tool whose configuration this is (axolotl.yaml or llamafactory.yaml), by its own command.

    Raises RuntimeError if the environment is absent (`make stack` makes it), or with the end of the tool's output.
    """
    config = Path(config).resolve()
    name = config.stem
    program, *arguments = COMMANDS[name]
    command = [str(environment(name).with_name(program)), arguments[0], config.name, *arguments[1:]]
    seconds, peak_bytes = measure(name, command, config.parent, _environment(name))
    states = (config.parent / "output").glob("checkpoint-*/trainer_state.json")
    last = max(states, key=lambda path: path.stat().st_mtime_ns)  # an earlier run may have left some too
    log = json.loads(last.read_text(encoding="utf-8"))["log_history"]
    return PeerRun(log, seconds, peak_bytes)


# Runs between us and the command: Linux counts into a process's peak what the process that started it held.
WEIGHED = """import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as peak:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=peak)
sys.exit(code if code >= 0 else 128 - code)"""


def measure(name: str, command: list[str], folder: Path, env: dict[str, str] | None = None) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of a command in a folder, with the processes that it waited for.

    Raises RuntimeError with the end of its output if it fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output, tempfile.NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-I", "-S", "-c", WEIGHED, peak.name, *command]
        done = subprocess.run(command, cwd=folder, stdout=output, stderr=output, env=env)
        if done.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{text[-3000:]}")
        return time.perf_counter() - start, int(peak.read()) * 1024


def ask_peer(name: str, what: str, config: str | Path | None = None):
    """What the tool itself says: "keys" (the names it knows), "validate" (the settings it read), "tokens" of the data.

    Of LLaMA-Factory also "webui": the run that its page would start, the files of `write_llamaboard` loaded.

    Raises RuntimeError if the environment is absent, or with the end of the tool's output (a refused configuration).
    """
    script = Path(__file__).with_name("_peer.py").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = (Path(config).resolve().parent, Path(config).name) if config else (scratch, "")
        result = Path(scratch) / "result.json"
        command = [str(environment(name)), "-P", str(script), name, what, file, str(result)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=folder, env=_environment(name), **options)
        if done.returncode:
            raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def wanted_row(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each side of a row as our run has them: labels are -100 where nothing is learned."""
    sides = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
    rendered = [data.render({"prompt": row["prompt"], "completion": side}, tokenizer) for side in sides]
    return [
        (one.input_ids, [i if bit else -100 for i, bit in zip(one.input_ids, one.completion_mask, strict=True)])
        for one in rendered
    ]


def peer_row(row: dict) -> list[tuple[list[int], list[int]]]:
    """The same of a row of `ask_peer(..., "tokens", ...)`."""
    if "prompt_ids" in row:
        prompt, sides = row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]
        return [(prompt + side, [-100] * len(prompt) + side) for side in sides]
    prefixes = ("chosen_", "rejected_") if "chosen_input_ids" in row else ("",)
    return [(row[f"{prefix}input_ids"], row[f"{prefix}labels"]) for prefix in prefixes]


# --- What the functions above need ------------------------------------------------------------------------------------


def _environment(name: str) -> dict[str, str]:
    """This process's variables, without those of its own environment, and with the tool's programs first.

    PYTHONPATH names the folder in which the tool runs: seed_first.py lies there.
    """
    folder = environment(name).parent
    kept = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    return {**kept, **QUIET, "PYTHONPATH": ".", "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}


def _whole_alpha(recipe: Recipe, tool: str) -> int:
    if recipe.lora_alpha != int(recipe.lora_alpha):
        raise RecipeError(f"lora_alpha: got {recipe.lora_alpha}, wanted a whole number: {tool} knows no other")
    return int(recipe.lora_alpha)


def _precision(recipe: Recipe) -> str:
    """What the products are computed in; "auto" is decided here, for the tools mean something else by it."""
    return train.resolve_precision(recipe)


def _evaluates(recipe: Recipe) -> bool:
    return bool(recipe.eval_steps and recipe.eval_file)


def _is_local(name: str) -> bool:
    return name in ("smollm2", "micro") or Path(name).is_dir()


def _model_name(recipe: Recipe) -> str:
    """A hub id as it is; for a model on this machine the link in the folder: no path of one machine in the file."""
    return "model" if _is_local(recipe.model) else recipe.model


def _lines(recipe: Recipe, rows: list[Row], eval_rows: list[Row] | None, line) -> dict[str, list[dict]]:
    """{"train": [...]} and, if the recipe evaluates, "eval": line(row, tokenizer) of each row, every row checked."""
    from ftlab.pipeline.align import check_kind
    from transformers import AutoTokenizer

    if not rows:
        raise ValueError("rows is empty: nothing to learn from")
    if _evaluates(recipe) != bool(eval_rows):
        raise ValueError(f"eval_rows: got {len(eval_rows or [])} rows, but the recipe has eval_file = "
                         f"{recipe.eval_file!r} and eval_steps = {recipe.eval_steps}")  # fmt: skip
    check_kind(recipe, rows, eval_rows or [])
    tokenizer = AutoTokenizer.from_pretrained(resolve(recipe.model), trust_remote_code=False)
    lines = {}
    for name, part in (("train", rows), ("eval", eval_rows or [])):
        for i, row in enumerate(part):
            sides = ("chosen", "rejected") if recipe.method == "dpo" else ("completion",)
            for side in sides:
                length = len(data.render({"prompt": row["prompt"], "completion": row[side]}, tokenizer).input_ids)
                if length > recipe.max_length:
                    raise ValueError(f"{name} row {i}: {length} tokens, more than max_length = {recipe.max_length}: "
                                     f"each tool cuts or drops such a row in another way")  # fmt: skip
            lines.setdefault(name, []).append(line(row, tokenizer))
    return lines


def _write_lines(lines: dict[str, list[dict]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in lines.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _link_model(recipe: Recipe, folder: Path) -> None:
    """A folder of links to a local model's files, its config.json naming the dtype in which we would hold the weights.

    LLaMA-Factory 0.9.5 holds them in that dtype, whatever the precision: SmolLM2's is bf16, and on a CPU ours are fp32.
    A hub id needs no folder, and gets none.
    """
    if not _is_local(recipe.model):
        return
    import torch
    from ftlab.pipeline.models import best_dtype

    source = Path(resolve(recipe.model)).resolve()
    if source == folder.resolve():
        raise ValueError(f"{folder} is the model itself, which links would replace: write into another folder")
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(best_dtype() if recipe.r else torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_yaml(config: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path

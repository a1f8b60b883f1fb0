"""What the four recipes share: checked rows, clear errors, a clock, a record of the run."""

import json
import sys
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from transformers import TrainerCallback

GPU = torch.cuda.is_available()


def read_rows(file, tokenizer, most=None):
    """The first rows of a file of JSON lines: {"prompt": ..., "completion": ...}.

    Both are lists of messages, for a model with a chat template, or both are texts. Other keys
    stay.
    """
    if file is None or not Path(file).is_file():
        sys.exit(f"no file {file}: wanted JSON lines with prompt and completion")
    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            sys.exit(f"{place}: no JSON ({error}); wanted one object a line")
        if not isinstance(row, dict) or not {"prompt", "completion"} <= set(row):
            got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            sys.exit(
                f"{place}: got {got}, wanted prompt and completion (given `messages`, TRL would "
                "train on every token)"
            )
        kinds = {type(row["prompt"]), type(row["completion"])}
        if kinds not in ({str}, {list}):
            sys.exit(f"{place}: wanted two texts or two lists of messages as prompt and completion")
        if kinds == {list} and tokenizer.chat_template is None:
            sys.exit(f"{place}: messages, but the model has no chat template: is it a base model?")
        rows.append(row)
    if not rows:
        sys.exit(f"{file} is empty")
    return rows[:most]


@contextmanager
def loading(name, revision):
    """One line instead of a traceback where a model cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "gated" in str(error):
            sys.exit(
                f"{name} is gated: accept its licence on https://huggingface.co/{name}, then "
                "log in with `hf auth login`"
            )
        sys.exit(f"cannot load {name} at {revision}: {' '.join(str(error).split())}")


def base_of(adapter):
    """(name, revision, whether it was in 4 bits) of the base that an adapter was trained on.

    sft.py and qlora_8b.py leave the last two in record.json, in the adapter's folder. Without it
    nobody knows whether the base was in 4 bits, and a guess could change every answer.
    """
    config, record = Path(adapter, "adapter_config.json"), Path(adapter, "record.json")
    if not config.is_file():
        sys.exit(f"no {config}: is {adapter} the folder of an adapter?")
    name = json.loads(config.read_text())["base_model_name_or_path"]
    if not record.is_file():
        sys.exit(
            f"no {record}, so was the base in 4 bits? sft.py and qlora_8b.py write it at "
            "their end. For an adapter from elsewhere, or a checkpoint, write it: "
            '{"revision": "main", "load_in_4bit": true} or false, as in its training'
        )
    record = json.loads(record.read_text())
    return name, record["revision"], record["load_in_4bit"]


def newest_checkpoint(folder):
    """The newest whole one: trainer_state.json is the file that the Trainer writes last."""
    whole = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def now():
    if GPU:
        torch.cuda.synchronize()  # Python is ahead of the card
    return time.perf_counter()


class Clock(TrainerCallback):
    """The seconds of each optimizer step, without evaluations and checkpoints."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.begin)


def write_record(file, recipe, **found):
    """What ran, on which card and when, how much of its memory it took at most, and what came out.

    Allocated is what the tensors took; reserved is what the card must have free.
    """
    record = {
        "recipe": recipe,
        "card": torch.cuda.get_device_name() if GPU else None,
        "date": date.today().isoformat(),
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if GPU else None,
        **found,
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record

"""Notebook 08, tools: a run for `trl sft`, a global batch in Axolotl's words, the keys that vanish."""

from collections.abc import Mapping
from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any

from ftlab.exercises import training
from ftlab.exercises.core import Exercise, Slip, first_difference, same, shown
from ftlab.paths import DATA

# --- 08.1: you train, from the command line ---------------------------------------------------------------------------

MY_YAML = '''my_yaml = """
model_name_or_path: ../data/micro/model
datasets:
- path: json
  data_files: ../data/ask/train.jsonl
  split: train[:48]
output_dir: runs/exercise
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
learning_rate: 1.0e-3
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 4
seed: 0
logging_steps: 1
report_to: none
gradient_checkpointing: false
bf16: false
use_cpu: true
"""
'''
SETTINGS = {  # place in parse_args_and_config's result, field: what it should be, a mistake, what to say of it
    (2, "use_peft"): (True, False, "use_peft: true is missing; without it TRL trains all weights and ignores lora_r"),
    (2, "lora_dropout"): (0.0, 0.05, "`trl sft` drops out 5 % of LoRA's inputs unless you write lora_dropout: 0.0"),
    (2, "lora_r"): (8, 16, "the rank is 8"),
    (2, "lora_alpha"): (16, 32, "lora_alpha is 16, twice the rank"),
    (2, "lora_target_modules"): (
        ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear", "LoRA goes on the four attention layers only"),
    (1, "learning_rate"): (1e-3, 2e-5, "the learning rate is 1e-3; TRL's own, 2e-5, is made for all weights"),
    (1, "per_device_train_batch_size"): (2, 4, "2 rows go through the model at a time"),
    (1, "gradient_accumulation_steps"): (2, 1, "2 such batches make a step: gradient_accumulation_steps"),
    (1, "max_steps"): (4, 8, "the run has 4 steps"),
    (1, "seed"): (0, 42, "the seed is 0; TRL's own is 42, and it decides the order of the rows"),
    (1, "bf16"): (False, True, "bf16: false is missing; TRL computes in bf16 unless told otherwise"),
    (1, "logging_steps"): (1, 10, "logging_steps: 1 is missing, so most losses are never written down"),
}  # fmt: skip
FILE, ROWS = "the rows are those of ../data/ask/train.jsonl", "the rows are the first 48: split: train[:48]"
TYPO = "trl sft refuses a key that it does not know, and names it: read its last line"


def _parsed(text: str) -> tuple:
    """What `trl sft --config` makes of a YAML text; the last entry are the keys that it does not know."""
    import pathlib
    import tempfile

    from trl.scripts.sft import make_parser

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return make_parser().parse_args_and_config(["--config", str(file)], return_remaining_strings=True)


def _changed(**said: object) -> str:
    """The solution's YAML with keys changed; None takes one out."""
    import yaml

    config = yaml.safe_load(MY_YAML.split('"""')[1]) | said
    return yaml.safe_dump({key: value for key, value in config.items() if value is not None})


def _losses(model, args, lora, rows) -> list[float]:
    """The losses of a run whose seed is set first, before lora_A is drawn."""
    from transformers import AutoTokenizer, set_seed
    from trl import SFTTrainer

    set_seed(args.seed)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=rows, peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(training.MICRO),
    )  # fmt: skip
    training.train_quietly(trainer, args.max_steps)
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@cache
def _wanted_losses() -> tuple[float, ...]:
    """TRL's trainer, told the same in Python."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig

    rows = load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split="train[:48]")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    args = SFTConfig(
        "runs", learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, seed=0,
        logging_steps=1, report_to="none", gradient_checkpointing=False, bf16=False, use_cpu=True,
    )  # fmt: skip
    return tuple(_losses(training.micro()[1], args, lora, rows))


def _yaml_slip(text: Any) -> Slip | None:
    import yaml
    from trl import get_dataset, get_peft_config

    if not isinstance(text, str):
        return Slip(shown(text), "the text of a YAML file", "write it between triple quotes")
    try:
        said = yaml.safe_load(text)
        _, args, model, mixture, unknown = _parsed(text)
    except Exception as error:  # what yaml or TRL's parser says of it
        return Slip(f"{type(error).__name__}: {error}"[:200], "a YAML mapping that `trl sft` can read", "")
    except SystemExit:
        return Slip("a value that `trl sft` cannot read", "values as in the notebook's file", "")
    if unknown:
        return Slip(f"the key {unknown[0].lstrip('-')}", "a key of TRL's", TYPO)
    if len(mixture.datasets) != 1 or not str(mixture.datasets[0].data_files).endswith("ask/train.jsonl"):
        return Slip(f"datasets: {said.get('datasets')}", "path: json, data_files: ../data/ask/train.jsonl", FILE)
    for (place, field), (wanted, _, words) in SETTINGS.items():
        got = getattr((None, args, model)[place], field)
        if not same(
            sorted(got) if isinstance(got, list) else got, sorted(wanted) if isinstance(wanted, list) else wanted
        ):
            return Slip(f"{field} = {got!r}", repr(wanted), words)
    mixture.datasets[0].data_files = str(DATA / "ask" / "train.jsonl")  # wherever the learner's notebook lies
    with training.workplace():
        rows = get_dataset(mixture)["train"]
        losses = _losses(training.micro()[1], args, get_peft_config(model), rows)
        wanted = list(_wanted_losses())
    if not same(losses, wanted, rtol=1e-5):
        return Slip(f"losses {shown(losses)}", shown(wanted), ROWS if len(rows) != 48 else "")
    return None


YAMLS: Mapping[str, str] = {
    **{words: _changed(**{field: mistake}) for (_, field), (_, mistake, words) in SETTINGS.items()},
    TYPO: _changed(learning_rate=None, learning_rat=1e-3),
    FILE: _changed(datasets=[{"path": "json", "data_files": "../data/tidy/train.jsonl", "split": "train[:48]"}]),
    ROWS: _changed(
        datasets=[{"path": "json", "data_files": "../data/ask/train.jsonl", "split": "train[:96]"}]),
}  # fmt: skip


# --- 08.2: the global batch in Axolotl's words ------------------------------------------------------------------------


def my_axolotl_batch(args, gpus_before, gpus_now, fits):
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus_before  # of one step
    each = rows // gpus_now  # of them on one GPU
    micro = max(size for size in range(1, fits + 1) if each % size == 0)
    return {"micro_batch_size": micro, "gradient_accumulation_steps": each // micro}


def _keys(micro: int, accumulation: int) -> dict:
    return {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}


def _batch(before: bool = True, now: bool = True, accumulated: bool = True, divide: bool = True):
    """my_axolotl_batch with something left out."""

    def answer(args, gpus_before, gpus_now, fits):
        rows = args.per_device_train_batch_size * (args.gradient_accumulation_steps if accumulated else 1)
        each = rows * (gpus_before if before else 1) // (gpus_now if now else 1)
        sizes = [size for size in range(1, fits + 1) if each % size == 0] if divide else [fits]
        return _keys(max(sizes), each // max(sizes))

    return answer


BATCHES = {
    "the GPUs of before count too: all of them together made one step": _batch(before=False),
    "each GPU now takes its part of the step: divide by gpus_now": _batch(now=False),
    "the steps that were accumulated before belong to the global batch": _batch(accumulated=False),
    "micro_batch_size has to divide the rows of a GPU, or rows are lost": _batch(divide=False),
    "only `fits` rows fit on a GPU at a time": lambda args, gpus_before, gpus_now, fits: _keys(
        args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus_before // gpus_now, 1),
    "one row at a time gives the same result, and is slow: take as many as fit": lambda *inputs: _keys(
        1, my_axolotl_batch(*inputs)["micro_batch_size"] * my_axolotl_batch(*inputs)["gradient_accumulation_steps"]),
    "these are TRL's words; Axolotl would drop them and take its own": lambda *inputs: {
        "per_device_train_batch_size": my_axolotl_batch(*inputs)["micro_batch_size"],
        "gradient_accumulation_steps": my_axolotl_batch(*inputs)["gradient_accumulation_steps"]},
}  # fmt: skip


def _runs(rng: Random) -> tuple:
    gpus_now = rng.choice([2, 3, 4, 6])
    gpus_before, size, accumulation = gpus_now * rng.choice([1, 2, 4]), rng.choice([2, 4, 6]), rng.choice([2, 3, 4])
    args = SimpleNamespace(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    return args, gpus_before, gpus_now, rng.choice([2, 3, 4, 5])


# --- 08.3: debug this -------------------------------------------------------------------------------------------------


def my_dropped_keys(config, top, inner):
    dropped = [key for key in config if key not in top]
    for i, dataset in enumerate(config["datasets"]):
        dropped += [f"datasets[{i}].{key}" for key in dataset if key not in inner]
    return dropped


def _inside(config, inner, name: str = "datasets[{}].{}", most: int = 9) -> list[str]:
    entries = list(enumerate(config["datasets"]))[:most]
    return [name.format(i, key) for i, entry in entries for key in entry if key not in inner]


DROPPED = {
    "both mistakes are still in it": lambda config, top, inner: [key for key in config if key not in top + inner],
    "a key of a dataset is not known at the top: compare with top alone": lambda config, top, inner: [
        key for key in config if key not in top + inner] + _inside(config, inner),
    "the entries of datasets have keys too, and nobody looks there": lambda config, top, inner: [
        key for key in config if key not in top],
    "an entry of datasets is compared with inner, not with top": lambda config, top, inner: [
        key for key in config if key not in top] + _inside(config, top),
    "only the first entry of datasets is looked at": lambda config, top, inner: [
        key for key in config if key not in top] + _inside(config, inner, most=1),
    'the place is missing: "datasets[0].typ"': lambda config, top, inner: [
        key for key in config if key not in top] + _inside(config, inner, "{1}"),
}  # fmt: skip


def _configs(rng: Random) -> tuple:
    top = ["base_model", "datasets", "lr_scheduler", "num_epochs", "micro_batch_size", "lora_r", "sequence_len"]
    inner = ["path", "type", "split", "ds_type", "shards"]
    config = dict.fromkeys(rng.sample([key for key in top if key != "datasets"], 4), 1)
    config |= dict.fromkeys(rng.sample(["lr_schedular", "num_train_epochs", "lora_rank", "max_length"], 2), 1)
    config |= {rng.choice(["type", "split", "shards"]): 1}  # known in a dataset only
    entry = {"path": "train.jsonl", "type": "input_output"}
    others = [entry | {rng.choice(["typ", "splitt", "sequence_len"]): 1} for _ in range(rng.choice([2, 3]))]
    config["datasets"] = [entry | {"dstype": "json"}, *others]
    return config, top, inner


EXERCISES = {
    "08.1": Exercise(
        "Write the YAML of a `trl sft` run whose losses are given",
        _yaml_slip,
        (
            "Start from the notebook's ask.yaml: its keys are those of SFTConfig, and LoRA's begin with lora_.",
            "`trl sft` has defaults that LoraConfig has not: use_peft is false, lora_dropout is 0.05.",
            "Four rows a step, two at a time: per_device_train_batch_size: 2, gradient_accumulation_steps: 2. "
            "lora_target_modules: [q_proj, k_proj, v_proj, o_proj].",
        ),
        MY_YAML,
        YAMLS,
        seconds=600,
    ),
    "08.2": Exercise(
        "Keep the global batch on other GPUs, in Axolotl's words",
        lambda mine: first_difference(mine, my_axolotl_batch, _runs, BATCHES),
        (
            "The global batch is what one optimizer step sees: rows at a time x accumulation x GPUs.",
            "Divide it by gpus_now. That is what one GPU has to get through in a step.",
            "micro_batch_size is the largest number up to `fits` that divides it; the quotient is the accumulation.",
        ),
        my_axolotl_batch,
        BATCHES,
    ),
    "08.3": Exercise(
        "Debug this: the keys that Axolotl would drop",
        lambda mine: first_difference(mine, my_dropped_keys, _configs, DROPPED),
        (
            "Try a config with type at the top. Is it dropped? It is a dataset's key, so it should be.",
            'Keys inside config["datasets"] can be wrong too. Each entry is a dict of its own.',
            "Compare the keys of config with top, those of each entry with inner, and write the place before those.",
        ),
        my_dropped_keys,
        DROPPED,
    ),
}

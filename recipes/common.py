"""What the recipes share: checked rows, clear errors, the base of an adapter, a clock, a record."""

import importlib
import json
import os
import sys
import time
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from random_weights import config_of

GPU = torch.cuda.is_available()
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)  # Ampere and newer
DTYPE = torch.bfloat16 if BF16 else torch.float16 if GPU else torch.float32
SMALL = 1e9  # weights: what somebody may mean to train on a CPU
QUANTIZATION = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")


def read_rows(file, tokenizer=None, most=None, columns=("prompt", "completion")):
    """The first rows of a file of JSON lines: {"prompt": ..., "completion": ...}.

    All columns are lists of messages, for a model with a chat template, or all are texts. Other
    keys stay. Without a tokenizer a server has the template.
    """
    wanted, many = " and ".join(columns), {1: "one", 2: "two", 3: "three"}[len(columns)]
    texts, lists = ("text", "list") if len(columns) == 1 else ("texts", "lists")
    if file is None or not Path(file).is_file():
        sys.exit(f"no file {file}: wanted JSON lines with {wanted}")
    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            sys.exit(f"{place}: no JSON ({error}); wanted one object a line")
        if not isinstance(row, dict) or not set(columns) <= set(row):
            got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            sft = "completion" in columns
            why = " (given `messages`, TRL would train on every token)" if sft else ""
            sys.exit(f"{place}: got {got}, wanted {wanted}{why}")
        kinds = {type(row[column]) for column in columns}
        if kinds not in ({str}, {list}):
            sys.exit(f"{place}: wanted {many} {texts} or {many} {lists} of messages as {wanted}")
        if rows and type(row["prompt"]) is not type(rows[0]["prompt"]):
            sys.exit(f"{place}: its prompt is a text and line 1's messages, or the other way round")
        if kinds == {list} and tokenizer and tokenizer.chat_template is None:
            sys.exit(f"{place}: messages, but the model has no chat template: is it a base model?")
        rows.append(row)
    if not rows:
        sys.exit(f"{file} is empty")
    return rows[:most]


def set_pad(tokenizer):
    """A pad token where there is none: Llama 3.1 has one of its own for it, else the end token."""
    if tokenizer.pad_token is None:
        right_pad = "<|finetune_right_pad_id|>"
        known = right_pad in tokenizer.get_vocab()
        tokenizer.pad_token = right_pad if known else tokenizer.eos_token


def text_of(prompt, tokenizer):
    """What the model reads: a text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def said(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def count_cut(rows, tokenizer, max_length):
    """How many rows have more tokens than max_length: TRL cuts them."""
    cut, end = 0, tokenizer.eos_token or ""
    for row in rows:
        text, templated = row["prompt"] + row["completion"], isinstance(row["prompt"], list)
        if templated:  # a template writes the special tokens itself
            text = tokenizer.apply_chat_template(text, tokenize=False)
        elif not text.endswith(end):
            text += end  # TRL adds it
        cut += len(tokenizer(text, add_special_tokens=not templated)["input_ids"]) > max_length
    return cut


def show_rows(rows, dataset, tokenizer, max_length):
    """What the first row of TRL's dataset learns, and how many of the rows are cut."""
    if not len(dataset):
        sys.exit(f"every prompt fills max_length {max_length}, and nothing is left to learn")
    learned = tokenizer.decode([token for token in dataset[0]["labels"] if token != -100])
    print(f"the first row learns: {learned[-200:]!r}. Does it end as a turn of the model should?")
    cut = count_cut(rows, tokenizer, max_length)
    if cut:
        print(f"{cut} of {len(rows)} rows are longer than max_length {max_length} and are cut")


def check_config(arguments, model):
    """Refuses a --config that was written for another model than the one that is asked for."""
    if "--config" not in arguments:
        return
    file = Path(arguments[arguments.index("--config") + 1])
    wanted = yaml.safe_load(file.read_text(encoding="utf-8")).get("model", model)
    if wanted != model:
        sys.exit(
            f"{file} was written for {wanted}, and --model is {model}: learning rate, lengths and "
            f"template are {wanted}'s. Write one for {model}, or take `model` out of the file"
        )


def function_of(name, option):
    """What MODULE:FUNCTION names, from the folder where you stand or from this one."""
    module, _, function = name.partition(":")
    for folder in (str(Path(__file__).resolve().parent), os.getcwd()):
        sys.path.insert(0, folder)  # last in, first searched
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        sys.exit(f"{option} {name}: {error}; wanted module:function, as in module.py here")


def check_device(arguments, recipe, name, revision):
    """Refuses to train a large model on a CPU by accident, where a driver or a container hides the
    GPU: before its weights are fetched. --use_cpu says that it is meant.
    """
    if GPU or recipe.tiny or {"--use_cpu", "--use-cpu"} & set(arguments):
        return
    shape = getattr(recipe, "random_weights", None)
    with loading(name, revision):
        config = config_of(shape) if shape else AutoConfig.from_pretrained(name, revision=revision)
        with torch.device("meta"):
            count = AutoModelForCausalLM.from_config(config).num_parameters()
    if count > SMALL:
        why = "this torch is a build for CPUs"
        if torch.version.cuda or torch.version.hip:
            why = "nvidia-smi and CUDA_VISIBLE_DEVICES say what is there"
        sys.exit(
            f"no GPU is seen, and {shape or name} has {count / 1e9:.1f} billion weights: wanted a "
            f"GPU, or at most {SMALL / 1e9:.0f} billion; {why}. --use_cpu true trains on the CPU"
        )


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


def load(name, revision, how, device=None, kind=AutoModelForCausalLM):
    """A base as it was in training: `how` has its dtype and quantization. See base_of."""
    place = {"": device or (torch.cuda.current_device() if GPU else "cpu")}
    model = kind.from_pretrained(
        name, revision=revision, use_safetensors=True, device_map=place, **how
    )
    return no_repacking(model)


def no_repacking(model):
    """A CPU with bf16 would repack 4-bit weights in an evaluation: their scales are rounded, and
    no gradient comes through until a checkpoint unpacks them.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and model.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
    return model


def weights_in_4_bits(model):
    """(how many weights are in 4 bits, how many there are, the largest tensor that is not)."""
    four, every, largest = 0, 0, (0, "none")
    for name, parameter in model.named_parameters():
        packed = parameter.dtype == torch.uint8  # two weights a byte
        count = parameter.numel() * (2 if packed else 1)
        every += count
        if packed:
            four += count
        else:
            largest = max(largest, (count, name))
    return four, every, largest[1]


def check_quantized(model):
    """Refuses a base most of which is not in 4 bits, as a mixture of experts or a tiny model."""
    four, every, largest = weights_in_4_bits(model)
    print(f"{four / every:.0%} of {every / 1e9:.2f} billion weights are in 4 bits")
    if four < every / 2:
        sys.exit(
            f"only {four / every:.0%} of the weights are in 4 bits, and {largest} isn't: "
            "load_in_4bit reaches nn.Linear modules alone, neither experts in one tensor (see "
            "bitsandbytes.nn.parametrize.replace_parameter_4bit) nor embeddings. sft.py trains "
            "with the base in 16 bits"
        )


def how_loaded(dtype, quantization=None):
    """What base_of needs to load the same base again."""
    found = {"dtype": str(dtype).removeprefix("torch."), "load_in_4bit": quantization is not None}
    if quantization:
        found |= {key: quantization.to_dict()[key] for key in QUANTIZATION}
    return found


def record_of(adapter):
    """What training left beside an adapter: how its base was loaded, among other things.

    Without it nobody knows whether the base was in 4 bits, and a guess could change every answer.
    """
    config, file = Path(adapter, "adapter_config.json"), Path(adapter, "record.json")
    if not config.is_file():
        sys.exit(f"no {config}: is {adapter} the folder of an adapter?")
    record = json.loads(file.read_text()) if file.is_file() else {}
    needed = ["revision", "dtype", "load_in_4bit"]
    needed += QUANTIZATION if record.get("load_in_4bit") else ()
    missing = [key for key in needed if key not in record]
    if missing:
        sys.exit(
            f"{file} {'lacks ' + ', '.join(missing) if record else 'is not there'}, so how was the "
            "base loaded? the scripts that train write it at their end. For an adapter from "
            'elsewhere, or a checkpoint, write it: {"revision": "main", "dtype": "bfloat16", '
            f'"load_in_4bit": false}} or true with {", ".join(QUANTIZATION)}, as in its training'
        )
    config = json.loads(config.read_text())
    task = {"task_type": config.get("task_type")}
    return record | {"base": config["base_model_name_or_path"]} | task


def base_of(adapter, task="CAUSAL_LM"):
    """(name, revision, keyword arguments of from_pretrained) of an adapter's base."""
    record = record_of(adapter)
    if record["task_type"] not in (task, None):
        scores = record["task_type"] == "SEQ_CLS"
        sys.exit(
            f"{adapter} {'scores answers' if scores else 'writes answers'}, its task_type is "
            f"{record['task_type']}; wanted {task}. An adapter of reward_model.py belongs to "
            "`reward_model.py --score`, any other to evaluate.py and merge.py"
        )
    how = {"dtype": getattr(torch, record["dtype"])}
    if record["load_in_4bit"]:
        settings = {key: record[key] for key in QUANTIZATION}
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return record["base"], record["revision"], how


def checkpoints_in(folder):
    """The whole ones, in order: trainer_state.json is the file that the Trainer writes last."""
    whole = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def checkpoint_of(folder, resume):
    """Where a run goes on, or None for a new one. A folder that holds another run is refused."""
    checkpoint = next(reversed(checkpoints_in(folder)), None)
    if checkpoint and not resume:
        sys.exit(f"{folder} holds {checkpoint.name}: add --resume or name a new folder")
    if resume and not checkpoint:
        sys.exit(f"--resume: {folder} holds no whole checkpoint")
    return checkpoint


def load_policy(model, checkpoint):
    """Before a resume: loads the policy's weights where the reference is an adapter beside it.

    Of a checkpoint with such a subfolder transformers loads the subfolders alone, in silence, and
    the policy would go on from where the run began.
    """
    if checkpoint and Path(checkpoint, "ref").is_dir():
        model.load_adapter(str(checkpoint), "default", is_trainable=True)


def trainable(model):
    """{name: a copy} of the weights that a trainer will change."""
    found = model.named_parameters()
    return {name: weight.detach().float().clone() for name, weight in found if weight.requires_grad}


def in_float32(model, exact):
    """TRL rounds the adapter of a 4-bit base to bf16, which rounds small steps away as well.

    exact: the numbers of an adapter that was there before, of `trainable`; {} for a new one.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = exact.get(name, weight.data.float())


def warn(name, **numbers):
    """One line that a program can find and read: WARNING {"warning": name, ...}."""
    found = {"warning": name, **numbers}
    print("WARNING " + json.dumps(found), flush=True)
    return found


def length_warnings(adapter):
    """Of a reward model's record: a warning unless it is right where the better answer is shorter.

    Below a half it takes the longer answer there, and what it pays for is length. Not measured
    means that nobody knows.
    """
    found = (record_of(adapter).get("accuracy") or {}).get("rejected is longer") or {}
    right, pairs = found.get("right"), found.get("pairs", 0)
    if right is not None and right >= 0.5:
        return []
    return [warn("length_decides", reward_model=str(adapter), right=right, pairs=pairs)]


class Draws:
    """Before a TRL trainer that samples.

    A resumed run takes the prompts in the order that they would have had; TRL's sampler would begin
    again with the order of the first epoch. Evaluations draw with numbers of their own: they leave
    the training's alone, and two of them differ by the model, not by luck.
    """

    finished = 0  # epochs, before a resume

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self.finished if self.shuffle_dataset else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def evaluate(self, *args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)


def epochs_of(checkpoint):
    """How many epochs were over when it was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["epoch"])


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

    Allocated is what the tensors took, reserved is what PyTorch held. On the card means at the end
    and with the CUDA context, and other programs are counted too.
    """
    free, total = torch.cuda.mem_get_info() if GPU else (None, None)
    record = {
        "recipe": recipe,
        "card": torch.cuda.get_device_name() if GPU else None,
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name)},
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if GPU else None,
        "on_the_card_gb": (total - free) / 1e9 if GPU else None,
        **found,
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record

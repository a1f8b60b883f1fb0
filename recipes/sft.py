"""LoRA on a base in 16 bits: supervised fine-tuning of a chat model on one GPU.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*"
    hf auth login                   # only for a gated base, as Llama: first accept its licence
    python sft.py --train_file train.jsonl --validation_file validation.jsonl
    python sft.py --train_file ... --resume                     # goes on after a stop
    python sft.py --random_weights llama-3.1-8b --output_dir runs/clock
    python sft.py --tiny --output_dir runs/tiny                 # seconds on a CPU

--random_weights (with random_weights.py beside this file) measures the peak of memory and the
seconds a step on your card, without a download. A row of the files is {"prompt": ...,
"completion": ...}: two lists of messages, or two texts for a base model. The loss counts the
completion alone. Each field of SFTConfig is an option too; --config FILE.yaml sets many.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

GPU = torch.cuda.is_available()
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)  # Ampere and newer
DTYPE = torch.bfloat16 if BF16 else torch.float16 if GPU else torch.float32
DEFAULTS = {
    "output_dir": "runs/sft",  # a run with other settings needs a folder of its own
    "learning_rate": 2e-4,
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,  # 16 rows a step
    "per_device_eval_batch_size": 4,  # with the library's 8 an evaluation may be the peak
    "max_length": 1024,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_steps": 50,
    "save_total_limit": 2,  # the best one and the last
    "load_best_model_at_end": True,  # by the loss on the validation rows
    "seed": 0,
    "bf16": BF16,
    "fp16": GPU and not BF16,
    "use_cpu": not GPU,
    "report_to": "trackio" if find_spec("trackio") else "none",
}
DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {  # another model and other sizes, the same code
    "model": str(DATA / "micro" / "model"),
    "train_file": str(DATA / "ask" / "train.jsonl"),
    "validation_file": str(DATA / "ask" / "validation.jsonl"),
    "max_rows": 24,
    "max_steps": 6,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "max_length": 128,
}


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    revision: str = "main"  # for a run to be repeated: the hash of a commit
    train_file: str | None = None
    validation_file: str | None = None
    max_rows: int | None = None  # of each file
    lora_r: int = 16
    lora_alpha: int = 32
    resume: bool = False
    random_weights: str | None = None
    tiny: bool = False


class Clock(TrainerCallback):
    """The seconds of each optimizer step, without evaluations and checkpoints."""

    def __init__(self):
        self.seconds = []

    def now(self):
        if GPU:
            torch.cuda.synchronize()  # the card works on when Python is ahead
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.begin)


def how_to_load():
    place = {"": torch.cuda.current_device() if GPU else "cpu"}
    return {"dtype": DTYPE, "device_map": place}  # SFTTrainer("name") would take float32


def load_base(name, revision):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, use_safetensors=True, **how_to_load()
        )
    except OSError as error:
        if "gated" in str(error):
            sys.exit(
                f"{name} is gated: accept its licence on https://huggingface.co/{name}, then "
                "log in with `hf auth login`"
            )
        sys.exit(f"cannot load {name} at {revision}: {' '.join(str(error).split())}")
    return model, tokenizer


def read_rows(file, tokenizer, max_rows):
    if file is None or not Path(file).is_file():
        sys.exit(f"no file {file}: give both --train_file and --validation_file, JSON lines")
    try:
        rows = Dataset.from_json(file)
    except Exception as error:
        sys.exit(f"{file}: not one JSON object a line: {error.__cause__ or error}")
    if not {"prompt", "completion"} <= set(rows.column_names):
        sys.exit(
            f"{file}: got the columns {', '.join(rows.column_names)}, wanted prompt and "
            "completion (with `messages` TRL trains on every token)"
        )
    if not isinstance(rows[0]["prompt"], str) and tokenizer.chat_template is None:
        sys.exit(f"{file} holds messages, but the model has no chat template: a base model?")
    rows = rows.select_columns(["prompt", "completion"])
    return rows.select(range(min(max_rows or len(rows), len(rows))))


def newest_checkpoint(folder):
    """The last whole one: trainer_state.json is what the Trainer writes last."""
    whole = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((Recipe, SFTConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    if "--random_weights" in arguments:
        parser.set_defaults_with_config(max_steps=25)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    recipe, args = parser.parse_args_and_config(arguments)

    checkpoint = newest_checkpoint(args.output_dir)
    if checkpoint and not recipe.resume:
        sys.exit(f"{args.output_dir} holds {checkpoint.name}: add --resume or name a new folder")
    if recipe.resume and not checkpoint:
        sys.exit(f"--resume: {args.output_dir} holds no whole checkpoint")

    set_seed(args.seed)  # of the adapter's first weights; the rows' order has args.seed itself
    if recipe.random_weights:
        from random_weights import random_base, random_rows

        model, tokenizer = random_base(recipe.random_weights, how_to_load())
        train = random_rows(64, args.max_length, model.config.vocab_size)
        validation = random_rows(4, args.max_length, model.config.vocab_size)
    else:
        model, tokenizer = load_base(recipe.model, recipe.revision)
        train = read_rows(recipe.train_file, tokenizer, recipe.max_rows)
        validation = read_rows(recipe.validation_file, tokenizer, recipe.max_rows)
    if tokenizer.pad_token is None:  # Llama 3.1 has a token for it, but does not say so
        right_pad = "<|finetune_right_pad_id|>"
        known = right_pad in tokenizer.get_vocab()
        tokenizer.pad_token = right_pad if known else tokenizer.eos_token

    clock = Clock()
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[clock],
        peft_config=LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            revision=recipe.revision,
        ),
    )

    row = trainer.train_dataset[0]
    learned = tokenizer.decode([token for token in row["labels"] if token != -100])
    full = sum(len(ids) >= args.max_length for ids in trainer.train_dataset["input_ids"])
    print(f"the first row learns: {learned[-200:]!r}. Does it end as a turn of the model should?")
    print(f"{full} of {len(train)} rows fill max_length {args.max_length}; what is beyond is cut")

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    adapter = Path(args.output_dir, "adapter")
    trainer.save_model(str(adapter))  # the best on the validation rows: it is loaded again by now

    seconds = clock.seconds[5:] or clock.seconds  # the first ones load code and claim memory
    record = {
        "recipe": Path(__file__).stem,
        "card": torch.cuda.get_device_name() if GPU else None,
        "date": date.today().isoformat(),
        "base": recipe.random_weights or recipe.model,
        "revision": getattr(model.config, "_commit_hash", None) or recipe.revision,
        "load_in_4bit": False,
        "rows_a_step": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "max_length": args.max_length,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if GPU else None,
        "seconds_a_step": statistics.median(seconds) if seconds else None,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "best_eval_loss": trainer.state.best_metric,
    }
    (adapter / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

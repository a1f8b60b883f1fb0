"""LoRA on a base in 16 bits: a chat model fine-tuned on one GPU.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*"
    hf auth login                   # only for a gated base, as Llama: accept its licence first
    python sft.py --train_file train.jsonl --validation_file validation.jsonl
    python sft.py --train_file ... --resume                     # goes on after a stop
    python sft.py --random_weights llama-3.1-8b --output_dir runs/clock
    python sft.py --tiny --output_dir runs/tiny                 # seconds on a CPU

--random_weights measures the peak of memory, evaluations included, and the seconds a step on your
card, without a download; give it the lengths and batches of the run. random_weights.py has shapes
from 1B to 70B. A row of the files is {"prompt": ..., "completion": ...}: two lists of messages, or
two texts for a base model. The loss counts the completion alone. Each field of SFTConfig is an
option too, and --config FILE.yaml sets many at once.
"""

import statistics
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from common import (
    BF16,
    DTYPE,
    GPU,
    Clock,
    check_config,
    check_device,
    checkpoint_of,
    how_loaded,
    loading,
    read_rows,
    set_pad,
    show_rows,
    write_record,
)
from random_weights import random_base, random_rows

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
    "eval_steps": 0.1,  # below 1: a share of all steps
    "save_steps": 0.1,
    "save_total_limit": 2,  # the best one and the last
    "load_best_model_at_end": True,  # by the loss on the validation rows
    "seed": 0,
    "bf16": BF16,
    "fp16": GPU and not BF16,
    "use_cpu": not GPU,
    "report_to": "trackio" if find_spec("trackio") else "none",
}
CLOCK = {"max_steps": 25, "eval_steps": 0.5, "save_strategy": "no", "load_best_model_at_end": False}
DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {  # another model and other sizes, the same code
    "model": str(DATA / "micro" / "model"),
    "train_file": str(DATA / "ask" / "train.jsonl"),
    "validation_file": str(DATA / "ask" / "validation.jsonl"),
    "max_rows": 12,
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
    attn_implementation: str = "sdpa"  # --packing wants flash_attention_2
    lora_r: int = 16
    lora_alpha: int = 32
    resume: bool = False
    random_weights: str | None = None
    tiny: bool = False


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((Recipe, SFTConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    if "--random_weights" in arguments:
        parser.set_defaults_with_config(**CLOCK)
    recipe, args = parser.parse_args_and_config(arguments)
    check_config(arguments, recipe.model)

    checkpoint = checkpoint_of(args.output_dir, recipe.resume)

    check_device(arguments, recipe, recipe.model, recipe.revision)
    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    set_seed(args.seed)  # of the adapter's first weights; the rows' order has args.seed itself
    place = {"": torch.cuda.current_device() if GPU else "cpu"}
    how = {"dtype": DTYPE, "device_map": place}  # SFTTrainer("name") alone takes float32
    how["attn_implementation"] = recipe.attn_implementation
    if recipe.random_weights:
        model, tokenizer = random_base(recipe.random_weights, **how)
        train = random_rows(rows_a_step, args.max_length, model.config.vocab_size)
        eval_rows = args.per_device_eval_batch_size
        validation = random_rows(eval_rows, args.max_length, model.config.vocab_size)
    else:
        how |= {"revision": recipe.revision, "use_safetensors": True}  # a pickle can hold code
        with loading(recipe.model, recipe.revision):
            tokenizer = AutoTokenizer.from_pretrained(recipe.model, revision=recipe.revision)
        train = read_rows(recipe.train_file, tokenizer, recipe.max_rows)
        validation = read_rows(recipe.validation_file, tokenizer, recipe.max_rows)
        with loading(recipe.model, recipe.revision):
            model = AutoModelForCausalLM.from_pretrained(recipe.model, **how)
    set_pad(tokenizer)

    clock = Clock()
    columns = ["input_ids", "labels"] if recipe.random_weights else ["prompt", "completion"]
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(train).select_columns(columns),
        eval_dataset=Dataset.from_list(validation).select_columns(columns),
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

    if not recipe.random_weights:
        show_rows(train, trainer.train_dataset, tokenizer, args.max_length)

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    judged = None if recipe.random_weights else str(Path(recipe.validation_file).resolve())
    adapter = Path(args.output_dir, "adapter")
    trainer.model.save_pretrained(adapter)  # the best on the validation rows, loaded again by now
    trainer.processing_class.save_pretrained(adapter)  # without training_args.bin, a pickle
    seconds = clock.seconds[5:] or clock.seconds  # the first ones load code and claim memory
    record = write_record(
        adapter / "record.json",
        recipe=Path(__file__).stem,
        base=recipe.random_weights or recipe.model,
        revision=getattr(model.config, "_commit_hash", None) or recipe.revision,
        **how_loaded(DTYPE),
        seed=args.seed,
        learning_rate=args.learning_rate,
        rows_a_step=rows_a_step,
        max_length=args.max_length,
        attn_implementation=model.config._attn_implementation,
        validation_file=judged,  # merge.py takes it for its check
        seconds_a_step=statistics.median(seconds),
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_eval_loss=trainer.state.best_metric,
    )
    print(record)


if __name__ == "__main__":
    main()

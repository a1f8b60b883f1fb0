"""A reward model: one number for an answer, learned from pairs of which one is preferred.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*" numpy
    python reward_model.py --train_file pairs.jsonl --validation_file held_out.jsonl
    python reward_model.py --train_file ... --resume                    # goes on after a stop
    python reward_model.py --score rows.jsonl --out scored.jsonl        # by what it has trained
    python reward_model.py --random_weights llama-3.1-8b --output_dir runs/clock
    python reward_model.py --tiny --output_dir runs/tiny                # seconds on a CPU

A row is {"prompt": ..., "chosen": ..., "rejected": ...}: three lists of messages, or three texts.
The loss is -log sigmoid(r(chosen) - r(rejected)) (Bradley and Terry), so only differences within a
prompt mean something: the zero is arbitrary, and so is a comparison of two prompts.
--center_rewards_coefficient 0.01 pulls the mean towards zero.

The record says on how many held-out pairs the chosen answer wins, with a 95 % interval, and the
same where the chosen answer is the longer one and where it is the shorter one. A model that has
learned "longer is better" is right in the first and wrong in the second.

The number is read at the last token that isn't padding, and the script prints which one that is.
If pad and eos are one token and an answer ends with it, its end isn't seen, and a finished answer
scores as the same one cut there. WARNING {"warning": "pad_is_eos"} says so.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer, TrlParser
from trl.trainer.reward_trainer import suppress_seqcls_warning

from common import (
    BF16,
    DTYPE,
    GPU,
    Clock,
    base_of,
    check_config,
    check_device,
    checkpoint_of,
    how_loaded,
    load,
    loading,
    read_rows,
    set_pad,
    warn,
    write_record,
)
from intervals import interval
from preferences import PAIR, read_pairs, tiny_pairs, tokens_in, too_long
from random_weights import random_base, random_pairs

DEFAULTS = {
    "output_dir": "runs/reward_model",  # a run with other settings needs a folder of its own
    "learning_rate": 1e-4,  # TRL's default; start from it and try a third and three times as much
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 1,  # a second pass overfits easily: look at the accuracy below
    "per_device_train_batch_size": 4,  # pairs: eight answers
    "gradient_accumulation_steps": 4,  # 16 pairs a step
    "per_device_eval_batch_size": 4,
    "max_length": 1024,  # of prompt and answer; TRL leaves longer pairs out
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
    "max_rows": 24,
    "max_steps": 6,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 8,
    "learning_rate": 3e-3,
    "max_length": 160,
}
KIND = AutoModelForSequenceClassification
GROUPS = ("chosen is longer", "rejected is longer", "equally long")


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    revision: str = "main"  # for a run to be repeated: the hash of a commit
    train_file: str | None = None
    validation_file: str | None = None
    max_rows: int | None = None  # of each file
    attn_implementation: str = "sdpa"
    lora_r: int = 16
    lora_alpha: int = 32
    score: str | None = None  # JSON lines with prompt and completion: no training, only scores
    out: str | None = None  # where they go, beside what the rows hold
    resume: bool = False
    random_weights: str | None = None
    tiny: bool = False


def base_for_scores(name, revision, how):
    """The base with one output, whose weights are random until an adapter brings its own."""
    with loading(name, revision), suppress_seqcls_warning():
        model = load(name, revision, how | {"num_labels": 1}, kind=KIND)
    model.score.float()  # bfloat16 would round its small steps away
    return model


def load_scorer(adapter):
    """(model, tokenizer) of a trained reward model, for scores()."""
    name, revision, how = base_of(adapter, "SEQ_CLS")
    model = PeftModel.from_pretrained(base_for_scores(name, revision, how), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def ids_of(row, side, tokenizer):
    """The tokens of prompt and answer, as RewardTrainer makes them."""
    text = row["prompt"] + row[side]
    if isinstance(text, list):
        return tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]
    return tokenizer(text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)[
        "input_ids"
    ]


@torch.inference_mode()
def scores(model, tokenizer, rows, side="completion", batch_size=8):
    """The reward of each row's answer."""
    found = []
    for start in range(0, len(rows), batch_size):
        ids = [ids_of(row, side, tokenizer) for row in rows[start : start + batch_size]]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, DTYPE, enabled=torch.float32 != DTYPE):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found += logits.logits[:, 0].float().tolist()
    return found


def share(right, groups=None):
    """{pairs, right, interval} of booleans: Wilson's interval, wider if rows share a group."""
    if not right:
        return {"pairs": 0, "right": None, "interval": None}
    values = [float(each) for each in right]
    return {
        "pairs": len(values),
        "right": sum(values) / len(values),
        "interval": list(interval(values, groups)),
    }


def judged(model, tokenizer, rows, batch_size):
    """How often the chosen answer wins: of all rows, and by which answer is the longer one.

    A tie is wrong and is counted beside it.
    """
    chosen, rejected = [scores(model, tokenizer, rows, side, batch_size) for side in PAIR[1:]]
    right = [one > other for one, other in zip(chosen, rejected, strict=True)]
    groups = [row["group"] for row in rows] if all("group" in row for row in rows) else None
    parts = {name: [] for name in GROUPS}
    for number, row in enumerate(rows):
        longer = tokens_in(row["chosen"], tokenizer) - tokens_in(row["rejected"], tokenizer)
        parts[GROUPS[0] if longer > 0 else GROUPS[1] if longer < 0 else GROUPS[2]].append(number)
    found = {"all": share(right, groups)}
    for name, part in parts.items():
        own = [groups[number] for number in part] if groups else None
        found[name] = share([right[number] for number in part], own)
    for name, part in found.items():
        if part["pairs"]:
            low, high = part["interval"]
            numbers = f"{part['right']:.3f} [{low:.3f}, {high:.3f}] of {part['pairs']} pairs"
            print(f"held-out accuracy, {name}: {numbers}")
    ties = sum(one == other for one, other in zip(chosen, rejected, strict=True))
    always_longer = len(parts[GROUPS[0]]) / len(rows)
    print(f"{ties} ties, counted as wrong; always taking the longer answer: {always_longer:.3f}")
    return found | {"ties": ties, "always_longer": always_longer}


def score_file(recipe, adapter):
    """Writes the rows of --score with the reward of each one's completion."""
    if not recipe.out:
        sys.exit("--score: where to? give --out FILE")
    model, tokenizer = load_scorer(adapter)
    rows = read_rows(recipe.score, tokenizer, recipe.max_rows)
    rewards = scores(model, tokenizer, rows)
    lines = [json.dumps(row | {"reward": r}) for row, r in zip(rows, rewards, strict=True)]
    Path(recipe.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{recipe.out}: {len(rows)} rewards, {min(rewards):.3f} to {max(rewards):.3f}")


def show_read(ids, tokenizer):
    """Prints at which token of an answer its reward is read, and warns where that isn't the end."""
    last = max(place for place, token in enumerate(ids) if token != tokenizer.pad_token_id)
    text, at = tokenizer.decode(ids[: last + 1]), tokenizer.decode(ids[last])
    print(f"the first chosen answer's reward is read at {at!r}, the end of {text[-200:]!r}")
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    unseen = len(ids) - 1 - last
    return [warn("pad_is_eos", token=tokenizer.pad_token, read_at=at, tokens_not_seen=unseen)]


def within(rows, tokenizer, max_length, file):
    """The rows that TRL keeps. It leaves out the longer ones, and here that is said."""
    kept = [row for row in rows if not too_long(row, tokenizer, max_length)]
    if len(kept) < len(rows):
        print(f"{file}: {len(rows) - len(kept)} of {len(rows)} rows are longer than max_length "
              f"{max_length} and are left out")  # fmt: skip
    if not kept:
        sys.exit(f"{file}: every row is longer than max_length {max_length}")
    return kept


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((Recipe, RewardConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    if "--random_weights" in arguments:
        parser.set_defaults_with_config(**CLOCK)
    recipe, args = parser.parse_args_and_config(arguments)
    check_config(arguments, recipe.model)
    adapter = Path(args.output_dir, "adapter")
    if recipe.score:
        return score_file(recipe, adapter)

    checkpoint = checkpoint_of(args.output_dir, recipe.resume)
    if recipe.tiny and not (recipe.train_file or recipe.validation_file or recipe.random_weights):
        recipe.train_file, recipe.validation_file = tiny_pairs(args.output_dir)

    check_device(arguments, recipe, recipe.model, recipe.revision)
    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    set_seed(args.seed)  # of the first weights; the rows' order has args.seed itself
    how = {"dtype": DTYPE, "attn_implementation": recipe.attn_implementation}
    if recipe.random_weights:
        place = {"": torch.cuda.current_device() if GPU else "cpu"}
        model, tokenizer = random_base(
            recipe.random_weights, KIND, num_labels=1, device_map=place, **how
        )
        model.score.float()
        sizes = args.max_length, model.config.vocab_size
        train = random_pairs(rows_a_step, *sizes)
        validation = random_pairs(args.per_device_eval_batch_size, *sizes)
        for row in train + validation:
            prompt = row.pop("prompt_ids")
            row |= {side: prompt + ids for side, ids in row.items()}
        columns = ["chosen_ids", "rejected_ids"]
    else:
        with loading(recipe.model, recipe.revision):
            tokenizer = AutoTokenizer.from_pretrained(recipe.model, revision=recipe.revision)
        set_pad(tokenizer)
        train = read_pairs(recipe.train_file, tokenizer, recipe.max_rows)
        validation = read_pairs(recipe.validation_file, tokenizer, recipe.max_rows)
        train = within(train, tokenizer, args.max_length, recipe.train_file)
        validation = within(validation, tokenizer, args.max_length, recipe.validation_file)
        model, columns = base_for_scores(recipe.model, recipe.revision, how), PAIR

    clock = Clock()
    trainer = RewardTrainer(
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
            modules_to_save=["score"],  # the new output is trained whole
            task_type="SEQ_CLS",
            revision=recipe.revision,
        ),
    )
    warnings = []
    if not recipe.random_weights:
        warnings = show_read(trainer.train_dataset[0]["chosen_ids"], tokenizer)

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    accuracy = None
    if not recipe.random_weights:
        batch_size = 2 * args.per_device_eval_batch_size
        accuracy = judged(trainer.model.eval(), tokenizer, validation, batch_size)
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
        seconds_a_step=statistics.median(seconds),
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_eval_loss=trainer.state.best_metric,
        accuracy=accuracy,
        warnings=warnings,
    )
    print(record)


if __name__ == "__main__":
    main()

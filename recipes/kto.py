"""KTO: a chat model learns from single answers, each with a thumbs-up or a thumbs-down, on one GPU.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*"
    python kto.py --train_file thumbs.jsonl --model CHAT_MODEL          # holds a tenth out itself
    python kto.py --train_file thumbs.jsonl --validation_file held_out.jsonl
    python kto.py --train_file ... --adapter runs/sft/adapter           # goes on from an adapter
    python kto.py --train_file ... --resume                             # goes on after a stop
    python kto.py --random_weights llama-3.1-8b --output_dir runs/clock
    python kto.py --tiny --output_dir runs/tiny                         # seconds on a CPU

Not run on a GPU.

A row is {"prompt": ..., "completion": ..., "label": true or false}: two lists of messages, or two
texts. It needs no partner. If most prompts have a good and a bad answer, dpo.py learns from both.

The loss of an answer is 1 - sigmoid(+-beta * (log-ratio - z0)), + for a thumbs-up. z0 is the mean
log-ratio of answers under *other* prompts, at least 0. TRL puts each answer of a batch under the
prompt behind it, and reads the rows in the order of the file, so what stands side by side counts.
Hence the script brings the rows into an order of its own (`arranged`): shuffled, both kinds spread
evenly, and no two answers to one prompt in a batch where that can be had. z0 is a mean over the
rows that are on the GPU at once: --gradient_accumulation_steps adds none to it, and in a batch of
one row it would be the answer's own log-ratio. So the last, smaller batch is left out.

The rarer kind gets a weight, by which both kinds count the same. Eq. 8 of the paper's first
version, which TRL follows, allows 1 to 4/3 for w_up * ups / (w_down * downs), the last version 3/2;
with --desirable_weight or --undesirable_weight you set it.

Without --validation_file --held_out of the prompts, with all their answers, become validation.jsonl
in the output folder. The reference is the base, or with --adapter that adapter's frozen copy.

What to watch              healthy                 alarm
eval_loss                  falls a little          rises: learned by heart, or too far gone. The
                                                   checkpoint with the lowest one is kept
eval_rewards/margins       rises                   flat: raise the rate. Rises with kl and without
                                                   an end: drift, so read answers
rewards/margins            rises                   rises alone: see the row above
rewards/chosen             near 0, or above        falls far: good answers get rarer too. Lower the
                                                   rate, read answers
rewards/rejected           falls                   stays: nothing is learned from the thumbs-down
kl (this is z0, in nats)   0, or little above      jumps: a lower rate, or more beta. High from the
                                                   start: do neighbours answer one prompt?
logps/chosen               moves little            falls: as rewards/chosen
loss                       falls a little, if      no alarm: its level depends on the weights
                           at all
grad_norm                  steady                  0: no signal. Spikes: a lower rate

Rewards are beta times the log-ratio of a whole answer. Three alarms are lines that begin with
WARNING, and the record has them: flat_margins, displaced (rewards/chosen) and high_kl.
"""

import json
import math
import random
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, set_seed
from trl import KTOConfig, KTOTrainer, TrlParser

from common import (
    BF16,
    DTYPE,
    GPU,
    Clock,
    base_of,
    check_config,
    check_device,
    checkpoint_of,
    count_cut,
    how_loaded,
    in_float32,
    load,
    load_policy,
    loading,
    read_rows,
    said,
    set_pad,
    text_of,
    trainable,
    warn,
    write_record,
)
from preferences import REPLIES, tokens_in
from random_weights import random_base, random_pairs

DEFAULTS = {
    "output_dir": "runs/kto",  # a run with other settings needs a folder of its own
    "learning_rate": 5e-6,  # as KTO's authors for all weights; TRL: 5e-6 at most at this beta
    "beta": 0.1,  # larger: stays nearer to the reference
    "desirable_weight": None,  # counted; see `weigh`
    "undesirable_weight": None,
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,  # z0 is a mean over so many rows
    "per_device_eval_batch_size": None,  # the same: TRL pairs validation rows by the number above
    "gradient_accumulation_steps": 4,  # 32 rows a step
    "dataloader_drop_last": True,  # no batch of one row
    "max_length": 1024,  # of prompt and answer
    "eval_on_start": True,  # what the first and the last evaluation say is compared at the end
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # below 1: a share of all steps
    "save_steps": 0.1,
    "save_total_limit": 2,  # the best one and the last
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",  # the margin also grows where a run goes too far
    "greater_is_better": False,
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
    "held_out": 0.25,
    "max_steps": 6,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_length": 160,
}
COLUMNS = ("prompt", "completion", "label")
TOLD = ("rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "kl")
FAR = 0.1  # nats a token of the good answers, as in dpo.py: a line of ours, nobody published one
EARLY = 0.1  # of a run: what is high so soon was so from the start
HIGH = 1.0  # beta * z0, in the sigmoid's own units: a line of ours, too


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    revision: str = "main"  # for a run to be repeated: the hash of a commit
    adapter: str | None = None  # trained on; its record names the base
    train_file: str | None = None
    validation_file: str | None = None
    held_out: float = 0.1  # without --validation_file: a share of the training file's prompts
    max_rows: int | None = None  # of each file
    attn_implementation: str = "sdpa"
    lora_r: int = 16  # without --adapter, which has its own
    lora_alpha: int = 32
    resume: bool = False
    random_weights: str | None = None
    tiny: bool = False


def check_options(recipe, args, arguments):
    """One line for what TRL would stop at with a traceback, or would do in silence."""
    size = args.per_device_train_batch_size
    if size < 2:
        sys.exit(f"--per_device_train_batch_size {size}: z0 needs other rows beside each one")
    if args.per_device_eval_batch_size not in (None, size):
        sys.exit(
            f"--per_device_eval_batch_size {args.per_device_eval_batch_size}: TRL pairs the "
            f"validation rows for z0 in batches of the training's {size}; leave it out"
        )
    if args.train_sampling_strategy != "sequential" or args.auto_find_batch_size:
        sys.exit(
            "z0 is made of rows that stand side by side: leave out --train_sampling_strategy "
            "and --auto_find_batch_size"
        )
    if recipe.adapter and {"--model", "--revision"} & set(arguments):
        sys.exit("--adapter names its base and its revision: leave out --model and --revision")
    if recipe.adapter and recipe.random_weights:
        sys.exit("--random_weights has no adapter to start from: leave out --adapter")
    if recipe.random_weights and args.precompute_ref_log_probs:
        sys.exit("--precompute_ref_log_probs: not with --random_weights")
    if not 0 < recipe.held_out < 1:
        sys.exit(f"--held_out {recipe.held_out}: wanted a share of the prompts, as 0.1")


def key_of(row):
    """One text for each prompt."""
    return json.dumps(row["prompt"])


def read_thumbs(file, tokenizer, most, max_length):
    """The first rows of {"prompt": ..., "completion": ..., "label": true or false}: see read_rows.

    Rows whose prompt fills max_length are left out here, since TRL would leave them out after the
    order is made, and every batch behind one would be another.
    """
    rows = read_rows(file, tokenizer, most)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("label"), bool):
            sys.exit(f"{file}, line {number}: label is {row.get('label')!r}, wanted true or false")
        if not row["completion"] or not said(row["completion"]).strip():
            sys.exit(f"{file}, line {number}: completion is empty")
    cut = count_cut(rows, tokenizer, max_length)
    kept = []
    for row in rows:
        words, text = isinstance(row["prompt"], str), text_of(row["prompt"], tokenizer)
        if len(tokenizer(text, add_special_tokens=words)["input_ids"]) < max_length:
            kept.append(row)
    if not kept:
        sys.exit(f"{file}: every prompt fills max_length {max_length}, no answer is left to learn")
    if cut:
        out = len(rows) - len(kept)
        print(
            f"{file}: {cut} of {len(rows)} rows are longer than max_length {max_length}: "
            f"{cut - out} are cut, and {out} whose prompt fills it are left out"
        )
    return kept


def split(rows, share, seed):
    """(training rows, validation rows): a share of the prompts, with all their answers."""
    prompts = list(dict.fromkeys(map(key_of, rows)))
    count = max(1, round(share * len(prompts)))
    held = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if key_of(row) not in held], [
        row for row in rows if key_of(row) in held
    ]


def check_rows(train, validation, size):
    """Refuses rows of one kind, fewer rows than a batch, and prompts that stand on both sides."""
    for name, rows in (("training", train), ("validation", validation)):
        ups = sum(row["label"] for row in rows)
        if ups in (0, len(rows)):
            sys.exit(
                f"all {len(rows)} {name} rows have the label {str(ups > 0).lower()}: KTO needs both"
                " kinds. Of good answers alone sft.py learns; --held_out or --validation_file"
                " chooses the validation rows"
            )
        if len(rows) < size:
            sys.exit(
                f"{len(rows)} {name} rows: fewer than the {size} of a batch, and a smaller one is "
                "left out. Give more rows, or a lower --per_device_train_batch_size"
            )
    both = set(map(key_of, train)) & set(map(key_of, validation))
    if both:
        sys.exit(
            f"{len(both)} prompts are in training and in validation, where they would look learned:"
            f" {min(both)[:80]}. Take them out of one, or leave out --validation_file"
        )


def spread(rows, seed):
    """Shuffled, with the rarer kind at even distances, beginning with one of it."""
    random_order = random.Random(seed).sample(rows, len(rows))
    kinds = [[row for row in random_order if row["label"] is label] for label in (True, False)]
    rare, common = sorted(kinds, key=len)
    places = {math.floor(k * len(rows) / len(rare)) for k in range(len(rare))}
    rare, common = iter(rare), iter(common)
    return [next(rare if place in places else common) for place in range(len(rows))]


def arranged(rows, size, seed):
    """The rows in the order in which they are read, in batches of `size`: see the top.

    A row whose prompt its batch has already waits for the next batch. At the end those are left
    that can't be put apart, as where one prompt has a large part of all answers.
    """
    fresh, waiting, found = deque((key_of(row), row) for row in spread(rows, seed)), deque(), []
    while fresh or waiting:
        batch, again = {}, []
        while len(batch) < size and (waiting or fresh):
            key, row = (waiting or fresh).popleft()
            if key in batch:
                again.append((key, row))
            else:
                batch[key] = row
        found += batch.values()
        waiting.extendleft(reversed(again))
        if len(batch) < size:  # no more rows of other prompts
            return found + [row for _, row in waiting]
    return found


def beside_their_own(rows, size):
    """How many rows have, for z0, an answer to their own prompt under them: of whole batches."""
    count = 0
    for start in range(0, len(rows) - size + 1, size):
        keys = [key_of(row) for row in rows[start : start + size]]
        count += sum(key == keys[place - 1] for place, key in enumerate(keys))
    return count


def weigh(rows, args):
    """Sets the two weights: those that were told, else the rarer kind's so that both count alike.

    Returns (thumbs-up, thumbs-down, how many times as much the thumbs-up count in all).
    """
    ups = sum(row["label"] for row in rows)
    downs = len(rows) - ups
    if args.desirable_weight is None and args.undesirable_weight is None:
        args.desirable_weight = max(downs / ups, 1.0)
        args.undesirable_weight = max(ups / downs, 1.0)
    args.desirable_weight = 1.0 if args.desirable_weight is None else args.desirable_weight
    args.undesirable_weight = 1.0 if args.undesirable_weight is None else args.undesirable_weight
    if min(args.desirable_weight, args.undesirable_weight) <= 0:
        sys.exit("--desirable_weight and --undesirable_weight: wanted more than 0")
    ratio = args.desirable_weight * ups / (args.undesirable_weight * downs)
    print(
        f"{ups} thumbs-up of weight {args.desirable_weight:.2f}, {downs} thumbs-down of weight "
        f"{args.undesirable_weight:.2f}: the first count {ratio:.2f} times as much as the second. "
        "TRL, after the paper's first version, wants 1 to 1.33"
    )
    return ups, downs, ratio


def evaluations(history, best):
    """(that before the first step, that of what is saved: the best step's or the last one)."""
    found = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    return found.get(0), found.get(best if best is not None else max(found, default=None))


def alarms(history, start, end, beta, tokens, steps):
    """The warnings of a whole run, printed.

    history: the trainer's log. start, end: two evaluations, of which `end` is of the saved adapter.
    tokens: the mean length of a good validation answer. steps: of the whole run.
    """
    warnings = []
    margins = [start["eval_rewards/margins"], end["eval_rewards/margins"]]
    if margins[1] <= margins[0]:
        warnings.append(warn("flat_margins", margins=margins))
    chosen = end["eval_rewards/chosen"]
    fell = (start["eval_rewards/chosen"] - chosen) / beta / tokens
    if fell > FAR:
        warnings.append(
            warn("displaced", nats_a_token=fell, rewards_chosen=chosen, margins=margins)
        )
    logged = [entry for entry in history if "kl" in entry]
    early = [entry for entry in logged if entry["step"] <= EARLY * steps] or logged[:1]
    if early and beta * max(entry["kl"] for entry in early) > HIGH:
        worst = max(early, key=lambda entry: entry["kl"])
        warnings.append(warn("high_kl", kl=worst["kl"], step=worst["step"], beta=beta))
    return warnings


def tell(start, end):
    """Prints what KTO changed on the validation rows."""
    print(f"on the validation rows, before any step and at step {end['step']}, which is saved:")
    for key in TOLD:
        print(f"  {key}: {start['eval_' + key]:.3f} -> {end['eval_' + key]:.3f}")


def tiny_thumbs(folder):
    """For --tiny: one file of support replies in the folder, which shows what a row looks like.

    16 tickets have a good and a bad reply, eight a bad one alone.
    """
    file, rows = Path(folder, "thumbs.jsonl"), []
    lines = REPLIES.read_text(encoding="utf-8").splitlines()[:24]
    for number, pair in enumerate(map(json.loads, lines)):
        for side in ("chosen", "rejected") if number < 16 else ("rejected",):
            row = {"prompt": [{"role": "user", "content": pair["ticket"]}]}
            row["completion"] = [{"role": "assistant", "content": pair[side]}]
            rows.append(row | {"label": side == "chosen"})
    return write_rows(file, rows)


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def random_thumbs(count, *sizes):
    """Rows of the full length as TRL tokenizes them, for --random_weights."""
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["chosen_ids"],
            "KL_completion_ids": row["rejected_ids"],
            "label": number % 2 == 0,
        }
        for number, row in enumerate(random_pairs(count, *sizes))
    ]


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((Recipe, KTOConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    if "--random_weights" in arguments:
        parser.set_defaults_with_config(**CLOCK)
    recipe, args = parser.parse_args_and_config(arguments)
    check_config(arguments, recipe.model)
    check_options(recipe, args, arguments)

    checkpoint = checkpoint_of(args.output_dir, recipe.resume)
    if checkpoint:
        args.eval_on_start = False  # the checkpoint's log has it
    if recipe.tiny and not (recipe.train_file or recipe.random_weights):
        recipe.train_file = tiny_thumbs(args.output_dir)

    size = args.per_device_eval_batch_size = args.per_device_train_batch_size
    rows_a_step = size * args.gradient_accumulation_steps
    set_seed(args.seed)  # of the adapter's first weights; the rows' order has args.seed itself
    name, revision, how = recipe.model, recipe.revision, {"dtype": DTYPE}
    if recipe.adapter:
        name, revision, how = base_of(recipe.adapter)  # as it was in the adapter's training
    check_device(arguments, recipe, name, revision)
    loaded = how_loaded(how["dtype"], how.get("quantization_config"))
    how["attn_implementation"] = recipe.attn_implementation
    lora = None
    if not recipe.adapter:
        lora = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            revision=revision,
        )
    if recipe.random_weights:
        place = {"": torch.cuda.current_device() if GPU else "cpu"}
        model, tokenizer = random_base(recipe.random_weights, device_map=place, **how)
        sizes = args.max_length, model.config.vocab_size
        measured, held_out = random_thumbs(rows_a_step, *sizes), random_thumbs(size, *sizes)
        train = validation = [
            {"prompt": "<eos>", "completion": "<eos>", "label": label} for label in (True, False)
        ]
    else:
        with loading(recipe.adapter or name, revision):
            tokenizer = AutoTokenizer.from_pretrained(recipe.adapter or name, revision=revision)
        limits = tokenizer, recipe.max_rows, args.max_length
        train = read_thumbs(recipe.train_file, *limits)
        if recipe.validation_file:
            validation = read_thumbs(recipe.validation_file, *limits)
        else:
            train, validation = split(train, recipe.held_out, args.seed)
        check_rows(train, validation, size)
        if not recipe.validation_file:
            file = Path(args.output_dir, "validation.jsonl")
            recipe.validation_file = write_rows(file, validation)
            print(f"{file}: {len(validation)} rows that training doesn't see, no prompt in common")
        train, validation = (arranged(rows, size, args.seed) for rows in (train, validation))
        for kind, rows in (("training", train), ("validation", validation)):
            if len(rows) % size and args.dataloader_drop_last:
                print(f"{len(rows) % size} of {len(rows)} {kind} rows fill no batch of {size} "
                      "and are left out")  # fmt: skip
        with loading(name, revision):
            model = load(name, revision, how)
        if recipe.adapter:
            model = PeftModel.from_pretrained(model, recipe.adapter, is_trainable=True)
    set_pad(tokenizer)
    ups, downs, ratio = weigh(train, args)
    own = beside_their_own(train, size)
    if own:
        print(f"{own} of {len(train)} rows lend z0 an answer to their own prompt: too few prompts")

    clock, exact = Clock(), trainable(model) if recipe.adapter else {}
    trainer = KTOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(train).select_columns(COLUMNS),
        eval_dataset=Dataset.from_list(validation).select_columns(COLUMNS),
        processing_class=tokenizer,
        callbacks=[clock],
        peft_config=lora,
    )
    if loaded["load_in_4bit"]:
        in_float32(trainer.model, exact)
    if recipe.random_weights:  # the trainer tokenizes texts alone
        trainer.train_dataset = Dataset.from_list(measured)
        trainer.eval_dataset = Dataset.from_list(held_out)
    else:
        first = trainer.train_dataset[0]
        learned = tokenizer.decode(first["completion_ids"])
        print(f"the first row, {first['label']}: {learned[-200:]!r}. Does it end as a turn should?")
    reference = recipe.adapter or recipe.random_weights or recipe.model
    print(f"the reference is {reference}, as it is now")

    load_policy(trainer.model, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    start, end = evaluations(state.log_history, state.best_global_step)
    warnings = []
    if start and not recipe.random_weights:
        good = [tokens_in(row["completion"], tokenizer) for row in validation if row["label"]]
        tell(start, end)
        numbers = args.beta, statistics.mean(good), state.global_step
        warnings = alarms(state.log_history, start, end, *numbers)
    judged = None if recipe.random_weights else str(Path(recipe.validation_file).resolve())
    adapter = Path(args.output_dir, "adapter")  # the best on the validation rows, loaded by now
    trainer.model.save_pretrained(adapter, selected_adapters=["default"])  # without the reference
    trainer.processing_class.save_pretrained(adapter)  # without training_args.bin, a pickle
    seconds = clock.seconds[5:] or clock.seconds  # the first ones load code and claim memory
    base = trainer.model.get_base_model()
    record = write_record(
        adapter / "record.json",
        recipe=Path(__file__).stem,
        base=recipe.random_weights or name,
        revision=getattr(base.config, "_commit_hash", None) or revision,
        **loaded,
        reference=reference,
        loss_type=args.loss_type,
        beta=args.beta,
        seed=args.seed,
        learning_rate=args.learning_rate,
        rows_a_step=rows_a_step,
        rows_at_once=size,
        thumbs_up=ups,
        thumbs_down=downs,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
        weighted_ratio=ratio,
        beside_their_own=own,
        max_length=args.max_length,
        attn_implementation=base.config._attn_implementation,
        validation_file=judged,  # merge.py takes it for its check
        seconds_a_step=statistics.median(seconds),
        steps=state.global_step,
        best_step=state.best_global_step,
        best_eval_loss=state.best_metric,
        start={key: start["eval_" + key] for key in TOLD} if start else None,
        saved={key: end["eval_" + key] for key in TOLD} if end else None,
        warnings=warnings,
    )
    print(record)


if __name__ == "__main__":
    main()

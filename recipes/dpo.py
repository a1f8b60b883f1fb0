"""DPO: a chat model learns from pairs of answers which of the two is preferred, on one GPU.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*"
    python dpo.py --train_file pairs.jsonl --validation_file held_out.jsonl --model CHAT_MODEL
    python dpo.py --train_file ... --adapter runs/sft/adapter           # goes on from an adapter
    python dpo.py --train_file ... --resume                             # goes on after a stop
    python dpo.py --random_weights llama-3.1-8b --output_dir runs/clock
    python dpo.py --tiny --output_dir runs/tiny                         # seconds on a CPU

A row is {"prompt": ..., "chosen": ..., "rejected": ...}: three lists of messages, or three texts.
Each field of DPOConfig is an option: --loss_type apo_zero, --loss_type sigmoid sft --loss_weights
1 0.1, --beta 0.05; --config FILE.yaml sets many at once.

The reference is what the policy is compared with. Without --adapter it is the base. With --adapter
it is a frozen copy of that adapter, which TRL makes, and the base is loaded as in its training.
So in a second round, --adapter runs/dpo/adapter, the reference is the policy that round one ended
with: each round may go as far from there as beta allows. --reference runs/sft/adapter keeps the
first one, so the distance of all rounds counts. It is no second model, which TRL would load in
float32: it has the policy's base, with the adapter switched off or with the frozen copy.

Read the warnings. Loss and margin also improve while the chosen answers become less likely, as
long as the rejected ones fall faster; WARNING {"warning": "displaced"} says that this happened.
"""

import statistics
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, TrlParser

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
    in_float32,
    load,
    load_policy,
    loading,
    set_pad,
    trainable,
    warn,
    write_record,
)
from preferences import PAIR, read_pairs, tiny_pairs, tokens_in, too_long
from random_weights import random_base, random_pairs

DEFAULTS = {
    "output_dir": "runs/dpo",  # a run with other settings needs a folder of its own
    "learning_rate": 5e-6,  # Unsloth's for LoRA; all weights of an 8B: 7e-7 (SimPO's authors)
    "beta": 0.1,  # larger: stays nearer to the reference
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,  # pairs: four answers, each read by policy and reference
    "gradient_accumulation_steps": 8,  # 16 pairs a step
    "per_device_eval_batch_size": 2,
    "max_length": 1024,  # of prompt and answer
    "eval_on_start": True,  # what the first and the last evaluation say is compared at the end
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
    "learning_rate": 1e-3,
    "max_length": 160,
}
LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
LOSSES += ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
TOLD = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
FAR = 0.1  # nats a token of the chosen answers: a line of ours, nobody published one


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    revision: str = "main"  # for a run to be repeated: the hash of a commit
    adapter: str | None = None  # trained on; its record names the base
    reference: str | None = None  # an adapter of the same shape that stays the reference
    train_file: str | None = None
    validation_file: str | None = None
    max_rows: int | None = None  # of each file
    attn_implementation: str = "sdpa"
    lora_r: int = 16  # without --adapter, which has its own
    lora_alpha: int = 32
    resume: bool = False
    random_weights: str | None = None
    tiny: bool = False


def check_options(recipe, args, arguments):
    """One line for what TRL would stop at in the first step, or would do in silence."""
    unknown = set(args.loss_type) - set(LOSSES)
    if unknown:
        sys.exit(f"--loss_type: got {', '.join(unknown)}, wanted some of {', '.join(LOSSES)}")
    if "exo_pair" in args.loss_type and args.label_smoothing == 0:
        sys.exit("--loss_type exo_pair wants --label_smoothing, 1e-3 in its paper")
    if recipe.adapter and {"--model", "--revision"} & set(arguments):
        sys.exit("--adapter names its base and its revision: leave out --model and --revision")
    if recipe.adapter and recipe.random_weights:
        sys.exit("--random_weights has no adapter to start from: leave out --adapter")
    if recipe.reference and not recipe.adapter:
        sys.exit("--reference is for a policy that starts from an adapter: give --adapter too")
    fixed = recipe.reference or recipe.random_weights
    if fixed and args.precompute_ref_log_probs:
        sys.exit("--precompute_ref_log_probs: not with --reference or --random_weights")


def check_reference(reference, adapter):
    """The reference is loaded into TRL's copy of the adapter, so it must have its shape."""
    for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora"):
        one, other = [getattr(PeftConfig.from_pretrained(at), key) for at in (reference, adapter)]
        if one != other:
            sys.exit(f"{reference} and {adapter} differ in {key}: {one} and {other}")


def evaluations(history, best):
    """(that before the first step, that of what is saved: the best step's or the last one)."""
    found = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    return found.get(0), found.get(best if best is not None else max(found, default=None))


def tell(start, end, tokens):
    """Prints what DPO changed on the validation rows, and returns the warnings about it.

    start, end: two evaluations. tokens: the mean length of a chosen answer.
    """
    print(f"on the validation rows, before any step and at step {end['step']}, which is saved:")
    for key in TOLD:
        print(f"  {key}: {start['eval_' + key]:.3f} -> {end['eval_' + key]:.3f}")
    if start["eval_rewards/margins"] == 0:
        print("  before a step policy and reference are equal, and TRL counts ties as wrong")
    warnings = []
    fell = (start["eval_logps/chosen"] - end["eval_logps/chosen"]) / tokens
    margins = [start["eval_rewards/margins"], end["eval_rewards/margins"]]
    if fell > FAR and margins[1] > margins[0]:
        logps = [start["eval_logps/chosen"], end["eval_logps/chosen"]]
        warnings.append(warn("displaced", nats_a_token=fell, logps_chosen=logps, margins=margins))
    if end["eval_loss"] >= start["eval_loss"]:
        losses = [start["eval_loss"], end["eval_loss"]]
        warnings.append(warn("no_better_than_the_start", eval_loss=losses))
    return warnings


def show_cut(file, rows, dataset, tokenizer, max_length):
    """How many rows of a file TRL cuts or leaves out."""
    if not len(dataset):
        sys.exit(
            f"{file}: every prompt fills max_length {max_length}, no answer is left to compare"
        )
    cut = sum(too_long(row, tokenizer, max_length) for row in rows)
    if cut:
        out = len(rows) - len(dataset)
        print(
            f"{file}: {cut} of {len(rows)} rows are longer than max_length {max_length}: "
            f"{cut - out} are cut, and {out} whose prompt fills it are left out"
        )


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((Recipe, DPOConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    if "--random_weights" in arguments:
        parser.set_defaults_with_config(**CLOCK)
    try:
        recipe, args = parser.parse_args_and_config(arguments)
    except ValueError as error:  # as many --loss_weights as --loss_type, for instance
        sys.exit(" ".join(str(error).split()))
    check_config(arguments, recipe.model)
    check_options(recipe, args, arguments)

    checkpoint = checkpoint_of(args.output_dir, recipe.resume)
    if checkpoint:
        args.eval_on_start = False  # the checkpoint's log has it
    if recipe.tiny and not (recipe.train_file or recipe.validation_file or recipe.random_weights):
        recipe.train_file, recipe.validation_file = tiny_pairs(args.output_dir)

    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
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
        measured = random_pairs(rows_a_step, *sizes)
        held_out = random_pairs(args.per_device_eval_batch_size, *sizes)
        train = validation = [{"prompt": "<eos>", "chosen": "<eos>", "rejected": "<pad>"}]
    else:
        with loading(recipe.adapter or name, revision):
            tokenizer = AutoTokenizer.from_pretrained(recipe.adapter or name, revision=revision)
        train = read_pairs(recipe.train_file, tokenizer, recipe.max_rows)
        validation = read_pairs(recipe.validation_file, tokenizer, recipe.max_rows)
        if recipe.reference:
            check_reference(recipe.reference, recipe.adapter)
        with loading(name, revision):
            model = load(name, revision, how)
        if recipe.adapter:
            model = PeftModel.from_pretrained(model, recipe.adapter, is_trainable=True)
    set_pad(tokenizer)

    clock, exact = Clock(), trainable(model) if recipe.adapter else {}
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(train).select_columns(PAIR),
        eval_dataset=Dataset.from_list(validation).select_columns(PAIR),
        processing_class=tokenizer,
        callbacks=[clock],
        peft_config=lora,
    )
    if loaded["load_in_4bit"]:
        in_float32(trainer.model, exact)
    if recipe.reference:
        trainer.model.load_adapter(recipe.reference, "ref", is_trainable=False)
    if recipe.random_weights:  # the trainer tokenizes texts alone
        trainer.train_dataset = Dataset.from_list(measured)
        trainer.eval_dataset = Dataset.from_list(held_out)
    else:
        limit = tokenizer, args.max_length
        show_cut(recipe.train_file, train, trainer.train_dataset, *limit)
        show_cut(recipe.validation_file, validation, trainer.eval_dataset, *limit)
        for side in ("chosen", "rejected"):
            learned = tokenizer.decode(trainer.train_dataset[0][f"{side}_ids"])
            print(f"the first row's {side}: {learned[-200:]!r}. Does it end as a turn should?")
    reference = recipe.reference or recipe.adapter or recipe.random_weights or recipe.model
    print(f"the reference is {reference}, as it is now")

    load_policy(trainer.model, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    start, end = evaluations(trainer.state.log_history, trainer.state.best_global_step)
    warnings = []
    if start and not recipe.random_weights:
        answers = [tokens_in(row["chosen"], tokenizer) for row in validation]
        warnings = tell(start, end, statistics.mean(answers))
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
        max_length=args.max_length,
        attn_implementation=base.config._attn_implementation,
        validation_file=judged,  # merge.py takes it for its check
        validation_columns=["prompt", "chosen"],
        seconds_a_step=statistics.median(seconds),
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_eval_loss=trainer.state.best_metric,
        start={key: start["eval_" + key] for key in TOLD} if start else None,
        saved={key: end["eval_" + key] for key in TOLD} if end else None,
        warnings=warnings,
    )
    print(record)


if __name__ == "__main__":
    main()

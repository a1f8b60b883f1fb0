"""On-policy distillation: the student answers, and a larger teacher grades each of its tokens.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*"
    python distill.py --teacher TEACHER --train_file train.jsonl --validation_file validation.jsonl
    python distill.py --teacher runs/sft/adapter ...   # an adapter's base is loaded as in training
    python distill.py --teacher TEACHER --teacher_in_4bit true ...
    python distill.py --teacher ... --train_file ... --resume              # goes on after a stop
    python sft.py --tiny --output_dir runs/teacher                         # seconds on a CPU:
    python distill.py --tiny --teacher runs/teacher/adapter --output_dir runs/tiny

A row needs a `prompt` alone: the student, a LoRA on --model in 16 bits, writes the answers itself.
The loss of a token compares the two models' probabilities of every token of the vocabulary, so the
two must share one. --beta says which divergence: 1 is the reverse KL(student || teacher), which
punishes what the teacher would hardly say. 0 is the forward KL(teacher || student), which asks the
student to cover all that the teacher might say. Between them lies the Jensen-Shannon divergence.

Papers call the share of answers that are the student's own lmbda: it is 1 here. For 0 let the
teacher write the answers (rejection_sampling.py --scorer all) and train on them with sft.py. That
also does for a teacher with other tokens or behind an API, and it is often a good first step. For
a mixture there is trl.experimental.gkd. Each field of DistillationConfig is an option too.
"""

import statistics
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    set_seed,
)
from trl import DistillationConfig, DistillationTrainer, TrlParser

from common import (
    BF16,
    DTYPE,
    GPU,
    Clock,
    Draws,
    base_of,
    check_config,
    check_device,
    check_quantized,
    checkpoint_of,
    epochs_of,
    how_loaded,
    load,
    loading,
    read_rows,
    set_pad,
    text_of,
    warn,
    write_record,
)

DEFAULTS = {
    "output_dir": "runs/distill",  # a run with other settings needs a folder of its own
    "beta": 1.0,  # the reverse KL
    "temperature": 1.0,  # of the answers and of both models' probabilities
    "learning_rate": 1e-4,
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,  # 32 answers a step, drawn together
    "per_device_eval_batch_size": 8,
    "max_completion_length": 512,
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # below 1: a share of all steps
    "save_steps": 0.1,
    "save_total_limit": 2,  # the best one and the last
    "load_best_model_at_end": True,  # by the divergence on the validation prompts
    "logging_steps": 1,
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
    "max_validation_rows": 8,
    "max_steps": 6,
    "eval_steps": 2,
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "max_completion_length": 24,
}
MOST_CUT = 0.1  # of the answers: above it the run says so


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # the student
    revision: str = "main"  # for a run to be repeated: the hash of a commit
    teacher: str | None = None  # a name on the hub, a folder, or an adapter's folder
    teacher_revision: str = "main"
    teacher_in_4bit: bool = False
    train_file: str | None = None
    validation_file: str | None = None
    max_rows: int | None = None
    max_validation_rows: int | None = 128  # each is answered anew in every evaluation
    attn_implementation: str = "sdpa"
    lora_r: int = 16
    lora_alpha: int = 32
    resume: bool = False
    tiny: bool = False


class Distillation(Draws, DistillationTrainer):
    """TRL's, with draws that can be repeated."""


def find_teacher(recipe):
    """(name, revision, keyword arguments of from_pretrained, folder of the adapter or None)."""
    if recipe.teacher is None:
        sys.exit("give --teacher: a model's name, its folder, or the folder of an adapter")
    adapter, how = None, {"dtype": DTYPE}
    name, revision = recipe.teacher, recipe.teacher_revision
    if Path(recipe.teacher, "adapter_config.json").is_file():
        adapter = recipe.teacher
        name, revision, how = base_of(adapter)
    if recipe.teacher_in_4bit and "quantization_config" not in how:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        )
    return name, revision, how, adapter


def check_vocabulary(tokenizer, teachers, sizes):
    """Refuses a teacher whose token 17 is another one. `sizes`: rows of the two embeddings."""
    instead = (
        "Let the teacher write answers (rejection_sampling.py --scorer all) and train on them with "
        "sft.py, or see trl.experimental.gold, which is made for tokenizers that differ"
    )
    ours, theirs = tokenizer.get_vocab(), teachers.get_vocab()
    other = sorted(word for word in ours | theirs if ours.get(word) != theirs.get(word))
    if other:
        sys.exit(
            f"the vocabularies differ in {len(other)} tokens, as {other[:3]}, but the loss takes "
            f"them token by token. {instead}"
        )
    if sizes[1] < sizes[0]:
        sys.exit(
            f"the tokens are the same, but the student's embedding has {sizes[0]} rows and the "
            f"teacher's only {sizes[1]}: TRL wants as many. {instead}"
        )


def check_template(tokenizer, teachers, prompt):
    """The warning if the teacher reads a prompt that it would write otherwise itself, in a list."""
    if isinstance(prompt, str):
        return []
    if teachers.chat_template is None or text_of(prompt, tokenizer) != text_of(prompt, teachers):
        return [warn("other_template", read=text_of(prompt, tokenizer)[-120:])]
    return []


def load_teacher(name, revision, how, adapter, rows):
    """The teacher; its embedding has as many rows as the student's, since some families pad it."""
    with loading(name, revision):
        teacher = load(name, revision, how)
    if "quantization_config" in how:
        check_quantized(teacher)
    if teacher.config.get_text_config().vocab_size > rows:
        teacher.resize_token_embeddings(rows)  # no token has what is cut off
    if adapter:
        teacher = PeftModel.from_pretrained(teacher, adapter)
        if "quantization_config" not in how:
            teacher = teacher.merge_and_unload(safe_merge=True)
    if not isinstance(teacher.get_output_embeddings(), torch.nn.Linear):
        sys.exit(f"{adapter} changes lm_head of a base in 4 bits: TRL would grade without that")
    return teacher.requires_grad_(False).eval()


def report(log, beta, limit):
    """(the divergence before training, the share of answers that were cut, the warnings)."""
    warnings = []
    judged = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    before, after = judged.pop(0, None), min(judged.values(), default=None)
    if before is not None and after is not None:
        kind = {0.0: "KL(teacher || student)", 1.0: "KL(student || teacher)"}.get(beta, "JSD")
        print(f"{kind}, on the student's own answers: {before:.4f} nats a token, then {after:.4f}")
        if after >= before:
            warnings.append(warn("no_better_than_the_start", eval_loss=[before, after]))
    cuts = [entry[key] for entry in log if (key := "completions/clipped_ratio") in entry]
    cut = statistics.mean(cuts) if cuts else None  # nothing was logged
    if cut and cut > MOST_CUT:
        warnings.append(warn("often_cut", share=cut, max_completion_length=limit))
    return before, cut, warnings


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((Recipe, DistillationConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    recipe, args = parser.parse_args_and_config(arguments)
    check_config(arguments, recipe.model)

    checkpoint = checkpoint_of(args.output_dir, recipe.resume)
    judges = args.eval_strategy != "no"
    args.eval_on_start = judges and not checkpoint  # how far apart the two are before

    set_seed(args.seed)  # of the adapter's first weights
    name, revision, how, adapter = find_teacher(recipe)
    for model in ((recipe.model, recipe.revision), (name, revision)):
        check_device(arguments, recipe, *model)
    with loading(recipe.model, recipe.revision):
        tokenizer = AutoTokenizer.from_pretrained(recipe.model, revision=recipe.revision)
        config = AutoConfig.from_pretrained(recipe.model, revision=recipe.revision)
    with loading(name, revision):
        teachers = AutoTokenizer.from_pretrained(adapter or name, revision=revision)
        sizes = [config, AutoConfig.from_pretrained(name, revision=revision)]
    sizes = [each.get_text_config().vocab_size for each in sizes]
    check_vocabulary(tokenizer, teachers, sizes)
    train = read_rows(recipe.train_file, tokenizer, recipe.max_rows, ["prompt"])
    judged = read_rows(recipe.validation_file, tokenizer, recipe.max_validation_rows, ["prompt"])
    warnings = check_template(tokenizer, teachers, train[0]["prompt"])
    place = {"": torch.cuda.current_device() if GPU else "cpu"}
    with loading(recipe.model, recipe.revision):
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model,
            revision=recipe.revision,
            use_safetensors=True,  # a pickle can hold code
            dtype=DTYPE,
            device_map=place,
            attn_implementation=recipe.attn_implementation,
        )
    set_pad(tokenizer)

    clock = Clock()
    trainer = Distillation(
        model,
        load_teacher(name, revision, how, adapter, sizes[0]),
        args=args,
        train_dataset=Dataset.from_list(train).select_columns(["prompt"]),
        eval_dataset=Dataset.from_list(judged).select_columns(["prompt"]),
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

    if checkpoint:
        trainer.finished = epochs_of(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    before, cut, found = report(trainer.state.log_history, args.beta, args.max_completion_length)
    folder = Path(args.output_dir, "adapter")
    trainer.model.save_pretrained(folder)  # the best on the validation prompts, loaded by now
    trainer.processing_class.save_pretrained(folder)  # without training_args.bin, a pickle
    seconds = clock.seconds[5:] or clock.seconds  # the first ones load code and claim memory
    answered = all("completion" in row for row in judged)  # merge.py's check reads them
    record = write_record(
        folder / "record.json",
        recipe=Path(__file__).stem,
        base=recipe.model,
        revision=getattr(model.config, "_commit_hash", None) or recipe.revision,
        **how_loaded(DTYPE),
        teacher=recipe.teacher,
        teacher_in_4bit="quantization_config" in how,
        beta=args.beta,
        temperature=args.temperature,
        seed=args.seed,
        learning_rate=args.learning_rate,
        rows_a_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        max_completion_length=args.max_completion_length,
        attn_implementation=model.config._attn_implementation,
        validation_file=str(Path(recipe.validation_file).resolve()) if answered else None,
        seconds_a_step=statistics.median(seconds),
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        eval_loss_before=before,
        best_eval_loss=trainer.state.best_metric,
        cut=cut,
        warnings=warnings + found,
    )
    print(record)


if __name__ == "__main__":
    main()

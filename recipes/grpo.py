"""GRPO: a chat model learns from a reward for its own answers, with LoRA on one GPU.

    pip install "trl==1.14.2" "transformers==5.17.*" "peft==0.21.*"
    python grpo.py --train_file prompts.jsonl --validation_file held_out.jsonl \
        --rewards rewards:final_answer rewards:soft_overlong --reward_weights 1 0.2
    python grpo.py --train_file ... --adapter runs/sft/adapter          # goes on from an adapter
    python grpo.py --train_file ... --resume                            # goes on after a stop
    python grpo.py --tiny --output_dir runs/tiny                        # seconds on a CPU

A row has a "prompt", messages or a text, and columns for the reward: a "completion" reaches it as
`answer`, its text. A reward is MODULE:FUNCTION, from where you stand or from rewards.py, which says
what it gets, or the adapter's folder of reward_model.py: --rewards runs/reward_model/adapter. Each
field of GRPOConfig is an option too. The best checkpoint is the one with the largest reward on the
validation prompts.

A reward model would choose badly, because a policy learns to find what its number overrates, and
the checkpoint that found the most would win. So with one as a reward every saved checkpoint stays,
the last one becomes the adapter, and WARNING {"warning": "judge_checkpoints"} lists those that you
score by something else: python evaluate.py --adapter runs/grpo/checkpoint-20 --scorer ... And
--beta is 0.04 (DeepSeekMath's) and not 0: with LoRA that costs a forward pass and no second model.
The reward model brings a base of its own: in 16 bits 2 bytes a parameter, 16 GB for an 8B. WARNING
{"warning": "length_decides"} means that on held-out pairs whose better answer is the shorter one
it was right less than half of the time, or wasn't tried, so it may pay for length.
A program that only watches, with weight 0, can choose, too, by the name under which TRL logs it:
    --rewards runs/reward_model/adapter my_check:good --reward_weights 1 0 \
        --metric_for_best_model eval_rewards/good/mean
Options that you name win; WARNING {"warning": "proxy_chooses"} says when the reward model chooses.

On a GPU sampling takes most of the time, and vLLM beside the training shortens it:
    pip install "trl[vllm]==1.14.2"
    python grpo.py ... --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.3 \
        --vllm_max_model_length 2048    # at least the longest prompt and --max_completion_length
Not run here: a test parses these options into GRPOConfig, no more. Without vLLM transformers
samples, as on a CPU.

What to watch                  healthy                     alarm
reward                         rises, with ups and downs   flat: see the next row, then raise the
                                                           rate. Answers get worse while it rises:
                                                           the reward is being gamed
frac_reward_zero_std           well below 1                1: no group has a gradient, its answers
(and reward_std)                                           earn the same. Take prompts that the
                                                           model solves sometimes
completions/clipped_ratio      near 0                      1: every answer is cut, so none is right
                                                           and nothing is learned: raise
                                                           max_completion_length
completions/mean_length        moves slowly                climbs or falls fast: read answers, the
                                                           reward may pay for length
kl (if beta > 0)               rises slowly                jumps: a lower rate, or more beta
clip_ratio/region_mean         0 with one update a batch   large: fewer updates a batch
entropy                        falls slowly                near 0: all answers are alike. Lower rate
grad_norm                      steady                      0: no signal. Spikes: a lower rate

Both alarms of 1 are printed when they first happen, WARNING {"warning": "no_spread", ...} and
"all_clipped", and the record lists their steps. --log_completions true prints answers: read them,
because no number says that the reward is wrong.
"""

import functools
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, TrlParser

from common import (
    BF16,
    DTYPE,
    GPU,
    Clock,
    Draws,
    base_of,
    check_config,
    check_device,
    checkpoint_of,
    checkpoints_in,
    epochs_of,
    function_of,
    how_loaded,
    in_float32,
    length_warnings,
    load,
    load_policy,
    loading,
    read_rows,
    said,
    set_pad,
    trainable,
    warn,
    write_record,
)
from reward_model import load_scorer, scores

DEFAULTS = {
    "output_dir": "runs/grpo",  # a run with other settings needs a folder of its own
    "learning_rate": 1e-5,  # TRL's for LoRA; all weights: 1e-6. Try a third and three times as much
    "lr_scheduler_type": "constant",
    "max_steps": 200,
    "num_generations": 8,  # answers a prompt; 16 if many groups earn the same
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,  # 64 answers a step, to 8 prompts
    "max_completion_length": 1024,  # your longest good answer, and some room
    "temperature": 1.0,
    "beta": 0.0,  # no KL, and no reference in memory
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 16,
    "eval_on_start": True,
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # below 1: a share of all steps
    "save_steps": 0.1,
    "save_total_limit": 2,  # the best one and the last
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
    "greater_is_better": True,
    "logging_steps": 1,
    "seed": 0,
    "bf16": BF16,
    "fp16": GPU and not BF16,
    "use_cpu": not GPU,
    "report_to": "trackio" if find_spec("trackio") else "none",
}
LEARNED = {  # instead, where a reward model pays: it is a proxy, and the policy learns its mistakes
    "beta": 0.04,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "save_total_limit": None,  # rank 16 on an 8B: half a GB each, Adam's numbers included
}
DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {  # another model and other sizes, the same code
    "model": str(DATA / "ask_start"),  # micro, after SFT: without it no answer is ever right
    "train_file": str(DATA / "ask" / "train.jsonl"),
    "validation_file": str(DATA / "ask" / "validation.jsonl"),
    "rewards": ["rewards:exact_match"],
    "max_rows": 16,
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_completion_length": 48,
}
MEAN = re.compile(r"eval_rewards/.+/mean")
PROXIES = ("eval_reward", "eval_rewards/reward_model/mean")  # what a reward model has a part in
ALARMS = {
    "completions/clipped_ratio": ("all_clipped", "raise max_completion_length"),
    "frac_reward_zero_std": ("no_spread", "no gradient: prompts are too hard or too easy"),
}
WATCHED = ("reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio")
WATCHED += ("completions/mean_length", "kl", "clip_ratio/region_mean", "entropy", "grad_norm")


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    revision: str = "main"  # for a run to be repeated: the hash of a commit
    adapter: str | None = None  # trained on; its record names the base
    train_file: str | None = None
    validation_file: str | None = None
    rewards: list[str] = field(default_factory=list)  # MODULE:FUNCTION, or a reward model's folder
    max_rows: int | None = None  # of each file
    attn_implementation: str = "sdpa"
    lora_r: int = 16  # without --adapter, which has its own
    lora_alpha: int = 32
    resume: bool = False
    tiny: bool = False


def alarmed(log):
    """The metrics of a log line at which its steps can have taught nothing."""
    return [key for key in ALARMS if (log.get(key) or 0) >= 1]


class Alarms(TrainerCallback):
    """Prints a warning when an alarm is raised for the first time."""

    def __init__(self):
        self.raised = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in set(alarmed(logs)) - self.raised:
            name, means = ALARMS[key]
            warn(name, step=state.global_step, metric=key, means=means)
            self.raised.add(key)


class Records(TrainerCallback):
    """A record in each checkpoint: evaluate.py and merge.py take it as an adapter from then on."""

    def __init__(self, ran):
        self.ran = ran

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        write_record(folder / "record.json", **self.ran, steps=state.global_step)


class GRPO(Draws, GRPOTrainer):
    """TRL's, with draws that can be repeated."""


def reward_of(name):
    """What --rewards names: a function, or the adapter of reward_model.py in its folder."""
    if Path(name).is_dir():
        return checked(learned(name), name)
    return checked(function_of(name, "--rewards"), name)


def learned(adapter):
    """A reward model as a reward.

    It reads the tokens that it read in its training, through its own template. TRL's way,
    reward_funcs=[folder], would leave out the end token of texts.
    """
    model, tokenizer = load_scorer(adapter)

    def reward_model(prompts, completions, **columns):
        pairs = zip(prompts, completions, strict=True)
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        return scores(model, tokenizer, rows)

    return reward_model


def checked(reward, name):
    """The reward, and one line instead of a traceback or of a number that ruins the run.

    TRL takes nan for "doesn't apply" and trains on, and one infinity empties its whole group.
    """

    @functools.wraps(reward)
    def call(**columns):
        try:
            found = list(reward(**columns))
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            sys.exit(f"--rewards {name}: {words}; it gets {', '.join(sorted(columns))}")
        wanted = len(columns["completions"])
        if len(found) != wanted:
            sys.exit(
                f"--rewards {name}: {len(found)} numbers for {wanted} answers, wanted one each"
            )
        for value, answer in zip(found, columns["completions"], strict=True):
            if value is not None and not math.isfinite(value):
                sys.exit(f"--rewards {name}: {value} for {said(answer)[-200:]!r}; wanted a number")
        return found

    return call


def read_prompts(file, tokenizer, most, max_completion_length):
    """(rows for GRPOTrainer, whether all have a completion, which merge.py's check would read).

    TRL keeps the name "completion" for itself, so that one gets another.
    """
    rows = read_rows(file, tokenizer, most, ("prompt",))
    answered = all("completion" in row for row in rows)
    for row in rows:
        if "completion" in row:
            row.setdefault("answer", said(row.pop("completion")))
        row["max_completion_length"] = max_completion_length
    return rows, answered


def check_options(recipe, args, arguments):
    """One line for what would stop the run after the model is loaded."""
    if not recipe.rewards:
        sys.exit(
            "no --rewards: wanted MODULE:FUNCTION, as rewards:exact_match, or a reward model's "
            "adapter"
        )
    if args.reward_weights and len(args.reward_weights) != len(recipe.rewards):
        sys.exit(f"{len(args.reward_weights)} --reward_weights for {len(recipe.rewards)} --rewards")
    if recipe.adapter and {"--model", "--revision"} & set(arguments):
        sys.exit("--adapter names its base and its revision: leave out --model and --revision")
    if args.use_vllm and not find_spec("vllm"):
        sys.exit('--use_vllm: vLLM is not installed; pip install "trl[vllm]==1.14.2"')
    if args.use_vllm and recipe.adapter and base_of(recipe.adapter)[2].get("quantization_config"):
        sys.exit("--use_vllm with a base in 4 bits was never tried: leave one of the two out")


def parse(arguments, defaults):
    parser = TrlParser((Recipe, GRPOConfig))
    parser.set_defaults_with_config(**DEFAULTS | defaults)
    if "--tiny" in arguments:
        parser.set_defaults_with_config(**TINY)
    try:
        return parser.parse_args_and_config(arguments)
    except ValueError as error:  # batches that hold no whole groups, for instance
        sys.exit(" ".join(str(error).split()))


def is_learned(recipe, args):
    """Whether a reward model pays for anything: with weight 0 it only watches."""
    weights = args.reward_weights or [1.0] * len(recipe.rewards)
    pairs = zip(recipe.rewards, weights, strict=False)
    return any(Path(name).is_dir() and weight != 0 for name, weight in pairs)


def parsed(arguments):
    """(Recipe, GRPOConfig) of a command line. What is named there or in --config wins."""
    recipe, args = parse(arguments, LEARNED)
    if not is_learned(recipe, args):
        return parse(arguments, {})
    if args.load_best_model_at_end or args.metric_for_best_model:  # somebody has named it
        keys = ("load_best_model_at_end", "metric_for_best_model")
        return parse(arguments, LEARNED | {key: DEFAULTS[key] for key in keys})
    return recipe, args


def chosen_by(args):
    """The validation number that chooses the checkpoint, None where the last one is kept."""
    if args.load_best_model_at_end:
        return "eval_" + args.metric_for_best_model.removeprefix("eval_")
    return None


def validations(history, metric):
    """{step: {name: value}} of the log: the reward, the mean of each one, and what chooses."""
    found = {}
    for log in history:
        names = [key for key in log if key in ("eval_reward", metric) or MEAN.fullmatch(key)]
        if names:
            found[log["step"]] = {name: log[name] for name in names if log[name] is not None}
    return found


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    recipe, args = parsed(arguments)
    check_config(arguments, recipe.model)
    check_options(recipe, args, arguments)

    checkpoint = checkpoint_of(args.output_dir, recipe.resume)
    if checkpoint:
        args.eval_on_start = False  # the checkpoint's log has it
    learned_pays, metric, warnings = is_learned(recipe, args), chosen_by(args), []
    if learned_pays and metric in PROXIES:
        warnings.append(warn("proxy_chooses", metric=metric))

    rewards = [reward_of(name) for name in recipe.rewards]
    for name in recipe.rewards:
        warnings += length_warnings(name) if Path(name).is_dir() else []
    means = [f"eval_rewards/{reward.__name__}/mean" for reward in rewards]
    if metric and MEAN.fullmatch(metric) and metric not in means:
        sys.exit(f"--metric_for_best_model {metric}: wanted eval_reward, {' or '.join(means)}")
    set_seed(args.seed)  # of the adapter's first weights; the rows' order has args.seed itself
    name, revision, how = recipe.model, recipe.revision, {"dtype": DTYPE}
    if recipe.adapter:
        name, revision, how = base_of(recipe.adapter)  # as it was in the adapter's training
    check_device(arguments, recipe, name, revision)
    loaded = how_loaded(how["dtype"], how.get("quantization_config"))
    with loading(recipe.adapter or name, revision):
        tokenizer = AutoTokenizer.from_pretrained(recipe.adapter or name, revision=revision)
    length = args.max_completion_length
    train, _ = read_prompts(recipe.train_file, tokenizer, recipe.max_rows, length)
    validation, answered = read_prompts(recipe.validation_file, tokenizer, recipe.max_rows, length)
    with loading(name, revision):
        model = load(name, revision, how | {"attn_implementation": recipe.attn_implementation})
    lora = None
    if recipe.adapter:
        model = PeftModel.from_pretrained(model, recipe.adapter, is_trainable=True)
    else:
        lora = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            revision=revision,
        )
    set_pad(tokenizer)
    tokenizer.padding_side = "left"  # answers are written behind the prompt

    ran = {
        "recipe": Path(__file__).stem,
        "base": name,
        "revision": getattr(model.config, "_commit_hash", None) or revision,
        **loaded,
        "rewards": recipe.rewards,
        "reward_weights": args.reward_weights,
        "beta": args.beta,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "validation_file": str(Path(recipe.validation_file).resolve()) if answered else None,
    }
    clock, exact = Clock(), trainable(model) if recipe.adapter else {}
    trainer = GRPO(
        model,
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation),
        processing_class=tokenizer,
        callbacks=[clock, Alarms(), Records(ran)],
        peft_config=lora,
    )
    if loaded["load_in_4bit"]:
        in_float32(trainer.model, exact)
    load_policy(trainer.model, checkpoint)
    if checkpoint:
        trainer.finished = epochs_of(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    history = trainer.state.log_history
    best = trainer.state.best_global_step if metric else None
    saved = trainer.state.global_step if best is None else best
    judged = validations(history, metric)
    for step, found in judged.items():
        words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"validation, step {step}: {words}{' (saved)' if step == saved else ''}")
    if best is not None and args.greater_is_better and 0 in judged:
        ends = [judged[step][metric] for step in (0, best)]
        if ends[1] <= ends[0]:
            warnings.append(warn("no_better_than_the_start", metric=metric, rewards=ends))
    if learned_pays and metric is None:
        names = [str(checkpoint) for checkpoint in checkpoints_in(args.output_dir)]
        warnings.append(warn("judge_checkpoints", adapter_is_step=saved, checkpoints=names))
    steps = [log for log in history if "reward" in log]
    alarms = {
        name: [log["step"] for log in history if key in alarmed(log)]
        for key, (name, _) in ALARMS.items()
    }
    last = {key: steps[-1].get(key) for key in WATCHED} if steps else None
    adapter = Path(args.output_dir, "adapter")  # the best on the validation prompts
    trainer.model.save_pretrained(adapter, selected_adapters=["default"])  # without the reference
    trainer.processing_class.save_pretrained(adapter)  # without training_args.bin, a pickle
    seconds = clock.seconds[5:] or clock.seconds  # the first ones load code and claim memory
    record = write_record(
        adapter / "record.json",
        **ran,
        answers_a_step=args.generation_batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        use_vllm=args.use_vllm,
        attn_implementation=model.config._attn_implementation,
        seconds_a_step=statistics.median(seconds),
        steps=trainer.state.global_step,
        chosen_by=metric,
        best_step=best,
        validation=judged,
        last=last,
        alarms=alarms,
        warnings=warnings,
    )
    print(record)


if __name__ == "__main__":
    main()

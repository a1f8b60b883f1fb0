"""Notebook 09: tokens of speculative decoding, the loss of one of several processes, a launcher's file, packing."""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from random import Random

from ftlab.exercises import training
from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same, shown
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import DETACHED, IN_PLACE, NO_PATH, WRONG_PATH, mistakes

# --- 09.1: speculative decoding ---------------------------------------------------------------------------------------


def my_expected_tokens(alpha, gamma):
    return sum(alpha**k for k in range(gamma + 1))  # token k + 1 comes if k drafted ones in a row are accepted


def _by_outcomes(alpha: float, gamma: int) -> float:
    """The mean over all outcomes: k tokens accepted and one of the target's own."""
    stops = [(k + 1) * alpha**k * (1 - alpha) for k in range(gamma)]  # after k accepted tokens one is rejected
    return sum(stops) + (gamma + 1) * alpha**gamma


TOKENS = {
    "the target gives a token of its own too, even if no drafted one is accepted": lambda alpha, gamma: sum(
        alpha**k for k in range(1, gamma + 1)),
    "what follows a rejected token is thrown away, so the chances multiply": lambda alpha, gamma: 1 + alpha * gamma,
    "if all gamma are accepted, one more token comes: gamma + 1 at most": lambda alpha, gamma: sum(
        alpha**k for k in range(gamma)),
    "the draft has gamma tokens, and the sum ends there": lambda alpha, gamma: (
        1 / (1 - alpha) if alpha < 1 else 10.0**9),
    "shorter runs count too, not only all gamma": lambda alpha, gamma: 1 + gamma * alpha**gamma,
}  # fmt: skip


def _draft(rng: Random) -> tuple[float, int]:
    return rng.choice([0.0, 1.0, *[rng.random() for _ in range(6)]]), rng.randint(2, 8)


# --- 09.2: the loss of one process ------------------------------------------------------------------------------------


def my_loss(token_losses, counts):
    return token_losses.sum() / sum(counts) * len(counts)  # DDP divides by the number of processes once more


LOSSES = {
    "that is the mean of means: a token of a process with few tokens weighs more": lambda losses, counts: losses.mean(),
    "DDP averages the gradients, which divides by the number of processes once more": lambda losses, counts: (
        losses.sum() / sum(counts)),
    "divide by the tokens of all processes": lambda losses, counts: losses.sum(),
    "sum token_losses, do not take their mean: sum(counts) divides already": lambda losses, counts: (
        losses.mean() / sum(counts) * len(counts)),
    "multiply by the number of processes, not by its square": lambda losses, counts: (
        losses.sum() / sum(counts) * len(counts) ** 2),
}  # fmt: skip


def _under_ddp(loss: Callable) -> Callable:
    """The gradient of a toy model of one weight, 1, under DDP: the mean of the gradients of its processes.

    A token's loss is the weight times a number; rows holds these numbers, one tensor for each process.
    """

    def gradient(rows):
        import torch

        weight, counts = torch.ones((), requires_grad=True), [len(row) for row in rows]
        parts = [loss(weight * row, counts) for row in rows]
        if not all(torch.is_tensor(part) and part.requires_grad for part in parts):
            return "a loss without a gradient: no .item() and no float()"
        return torch.stack([torch.autograd.grad(part, weight)[0] for part in parts]).mean()

    return gradient


def _alone(rows):
    """The same gradient of one process that has all tokens."""
    import torch

    return torch.cat(rows).mean()


def _processes(rng: Random) -> tuple:
    import torch

    counts = [rng.randint(2, 9) for _ in range(rng.randint(2, 5))]
    return ([torch.tensor([rng.uniform(0.1, 4) for _ in range(n)]) for n in counts],)


def _one_process(rng: Random) -> tuple:
    (rows,) = _processes(rng)
    return rows[0], [len(row) for row in rows]


def _no_tokens(rng: Random) -> tuple:
    """All answers of this process were cut off or filtered out."""
    losses, counts = _one_process(rng)
    return losses[:0], [0, *counts[1:]]


EMPTY = "a process without a token has the loss 0: the mean of nothing is nan"


def _by_the_mean(token_losses, counts):
    return token_losses.mean() * len(token_losses) / sum(counts) * len(counts)


def _loss_slip(mine) -> Slip | None:
    by, edges = ["token_losses"], {EMPTY: _no_tokens}
    alone = first_difference(mine, my_loss, _one_process, n=10, by=by, edges=edges)
    said = alone.likely if alone else ""
    if IN_PLACE in said:
        return alone
    wrong = {words: _under_ddp(loss) for words, loss in LOSSES.items()}
    slip = first_difference(_under_ddp(mine), _alone, _processes, wrong)
    if not slip:
        return alone
    value_right = any(words in said for words in (DETACHED, NO_PATH, WRONG_PATH))
    return _of_gradients(slip, said if value_right else slip.likely or said)


def _of_gradients(slip: Slip, likely: str) -> Slip:
    wanted = f"{slip.wanted}, as in one process"
    return Slip(f"the gradient {slip.got}", wanted, likely, slip.given)


# --- 09.3: debug this -------------------------------------------------------------------------------------------------

MY_CONFIG = '''my_config = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 2
num_processes: 16
machine_rank: 0
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: true
"""
'''
_RIGHT = MY_CONFIG.split('"""')[1]
_WRONG_LINES = {  # what to say -> a line of the right file, and what stands there instead
    "num_processes counts the processes of all machines": ("num_processes: 16", "num_processes: 8"),
    "with false each process reads the whole model into memory": (
        "efficient_loading: true", "efficient_loading: false"),
    "accelerate drops a name that it does not know inside fsdp_config, without a word": (
        "fsdp_offload_params: true", "fsdp_offload_param: true"),
    "with FULL_STATE_DICT one process gathers the whole model to write it": (
        "SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "num_machines was right: two": ("num_machines: 2", "num_machines: 1"),
    "distributed_type was right: with another one fsdp_config is not read": (
        "distributed_type: FSDP", "distributed_type: MULTI_GPU"),
    "parts that are not at work should lie in the CPU's memory": ("params: true", "params: false"),
    "fsdp_version was right: 1 is the older FSDP": ("fsdp_version: 2", "fsdp_version: 1"),
    "mixed_precision was right; bf16 would be as well, and fp16 contradicts SFTConfig": (
        "mixed_precision: 'no'", "mixed_precision: fp16"),
}  # fmt: skip
CONFIGS = {words: _RIGHT.replace(*change) for words, change in _WRONG_LINES.items()}
_GIVEN = list(_WRONG_LINES)[:3]  # the lines that are wrong in the notebook


BF16 = "mixed_precision: bf16 is right too: it says what SFTConfig says already"


def _config_slip(text) -> Slip | str | None:
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    if not isinstance(text, str):
        return Slip(shown(text), "the text of a YAML file", "write it between triple quotes")
    try:
        config, right = yaml.safe_load(text), yaml.safe_load(_RIGHT)
    except yaml.YAMLError as error:
        return Slip(f"{type(error).__name__}: {error}"[:200], "YAML", "a line `name: value` for each setting")
    if not isinstance(config, dict) or not isinstance(config.get("fsdp_config"), dict):
        return Slip(shown(config), "YAML with the keys of the file, fsdp_config among them")
    known = vars(launch_command_parser().parse_args(["script.py"]))
    short = ("all", "reads", "unknown", "whole", "machines", "type", "offload", "version")
    names = dict(zip((*short, "precision"), CONFIGS, strict=True))
    slips = [Slip(key, "a name that accelerate knows", names["unknown"]) for key in config["fsdp_config"]
             if key not in known]  # fmt: skip
    at_the_top = "accelerate refuses a key at the top that it does not know"
    slips += [
        Slip(key, "a key of the top", at_the_top) for key in config if key not in ClusterConfig.__dataclass_fields__
    ]
    places = {
        "num_processes": "all", "num_machines": "machines", "distributed_type": "type", "fsdp_version": "version",
        "fsdp_cpu_ram_efficient_loading": "reads", "fsdp_state_dict_type": "whole", "fsdp_offload_params": "offload",
        "mixed_precision": "precision",
    }  # fmt: skip
    for key, wanted in ({**right, **right["fsdp_config"]}).items():
        got = (config["fsdp_config"] if key in right["fsdp_config"] else config).get(key)
        if got is None and any(slip.likely == names["unknown"] for slip in slips):
            continue  # the misspelt name stands for it
        if key == "mixed_precision" and got == "bf16":
            continue  # what SFTConfig asks for, said twice
        if key != "fsdp_config" and not same(got, wanted):
            slips.append(Slip(f"{key}: {got}", str(wanted), names.get(places.get(key, ""), "that line was right")))
    if len(slips) > 2:
        given = {slip.likely for slip in slips} == {*_GIVEN}
        likely = AS_GIVEN if given else "ask of each line what happens without it"
        return Slip(f"{len(slips)} lines that are not right", "none", likely)
    if slips:
        return slips[0]
    return BF16 if config["mixed_precision"] == "bf16" else None


# --- 09.4: you train --------------------------------------------------------------------------------------------------


def my_packed_trainer(model, tokenizer, rows):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model,
        train_dataset=rows,
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/exercise",
            packing=True,  # strategy "bfd": rows stay apart, and whole up to max_length
            max_length=256,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def _packed(lora: Mapping | None = {}, **changed):
    """my_packed_trainer with something changed."""

    def build(model, tokenizer, rows):
        settings = {"packing": True, "max_length": 256, "per_device_train_batch_size": 2} | changed
        return training.sft(model, tokenizer, rows, lora, **settings)

    return build


TRAINERS = {
    "return the trainer itself; the check calls train()": lambda *args: my_packed_trainer(*args).model,
    "peft_config is missing, so every weight is trained": _packed(None),
    "modules_to_save trains whole layers beside LoRA": _packed({"modules_to_save": ["embed_tokens"]}),
    'some linear layers have no LoRA: target_modules="all-linear"': _packed({"target_modules": ["q_proj", "v_proj"]}),
    "nothing is packed": _packed(packing=False),
    '"wrapped" cuts rows, and lets one row see another': _packed(packing_strategy="wrapped"),
    "max_length is 256 here: the length of a packed row": _packed(max_length=64),
    "the prompt counts in the loss: leave completion_only_loss as it is": _packed(completion_only_loss=False),
    "the rate is too low; TRL's own is made for all weights": _packed(learning_rate=2e-5),
    "the rate is too high": _packed(learning_rate=1.0),
}


def _mean_loss(trainer) -> float:
    """The trainer's own loss over all its rows, a mean over their tokens."""
    import torch

    total, count = 0.0, 0
    trainer.model.eval()
    for batch in trainer.get_train_dataloader():
        n = (batch["labels"] != -100).sum().item()
        with torch.no_grad():
            total, count = total + trainer.compute_loss(trainer.model, batch).item() * n, count + n
    return total / count


def _packing_slip(mine) -> Slip | None:
    from datasets import Dataset
    from torch import nn

    names = ("train", "peft", "save", "linear", "off", "wrapped", "length", "prompt", "low", "high")
    words = dict(zip(names, TRAINERS, strict=True))
    rng = Random()
    rows, held_out = ([training.ask_row(rng) for _ in range(n)] for n in (32, 8))
    tokenizer, model = training.micro()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    with training.workplace(), training.no_warnings():
        trainer = mine(model, tokenizer, Dataset.from_list(rows))
        if slip := training.trainer_slip(trainer, linear, words):
            return slip
        args = trainer.args
        for wrong, got, wanted, word in (
            (not args.packing, "packing = False", "True", "off"),
            (args.packing_strategy == "wrapped", "packing_strategy = 'wrapped'", "'bfd'", "wrapped"),
            (args.max_length != 256, f"max_length = {args.max_length}", "256", "length"),
        ):
            if wrong:
                return Slip(got, wanted, words[word])
        if args.bf16 and model.device.type == "cpu":
            trainer.accelerator.native_amp = False
        apart = training.loss(trainer.model, tokenizer, rows)  # a fresh LoRA adds nothing
        if not same(packed := _mean_loss(trainer), apart, rtol=2e-3):
            return Slip(f"the loss {packed:.4f}", f"{apart:.4f}, that of the rows one by one", words["prompt"])
        return training.training_slip(trainer, tokenizer, held_out, 20, 5e-3, words)


EXERCISES = {
    "09.1": Exercise(
        "Count the tokens that a pass of the target gives",
        partial(first_difference, answer=_by_outcomes, draw=_draft, wrong=TOKENS),
        (
            "With what chance does a pass give at least one token? At least two? At least three?",
            "At least k + 1 tokens come if k drafted ones in a row are accepted: alpha to the power k. The expected "
            "number is the sum of these chances.",
            "Sum alpha**k for k in range(gamma + 1).",
        ),
        my_expected_tokens,
        TOKENS,
        difficulty=1,
        minutes=5,
    ),
    "09.2": Exercise(
        "Write the loss of one of several processes",
        _loss_slip,
        (
            "One process with all tokens takes the sum of their losses and divides by the number of all tokens. What "
            "does DDP do to the gradients afterwards?",
            "DDP takes their mean: it divides by the number of processes, len(counts). So multiply by it first. The "
            "number of all tokens is sum(counts).",
            "token_losses.sum() / sum(counts), times len(counts).",
        ),
        my_loss,
        LOSSES | {EMPTY: _by_the_mean} | mistakes(my_loss, ["token_losses"], ["token_losses"]),
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "09.3": Exercise(
        "Debug this: a launcher's file",
        _config_slip,
        (
            "Three questions. How many processes do two machines with eight GPUs have? Who reads the 140 GB from the "
            "disk, one process or all? Does accelerate know every name inside fsdp_config?",
            "num_processes counts those of all machines. fsdp_cpu_ram_efficient_loading lets one process read for "
            "all. Compare the names with data/launch/fsdp2.yaml: accelerate drops one that it does not know.",
            "num_processes: 16, fsdp_cpu_ram_efficient_loading: true, and the name is fsdp_offload_params.",
        ),
        MY_CONFIG,
        {AS_GIVEN: reduce(lambda text, words: text.replace(*_WRONG_LINES[words]), _GIVEN, _RIGHT), **CONFIGS},
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "09.4": Exercise(
        "Train on packed rows",
        _packing_slip,
        (
            "SFTConfig has packing, packing_strategy and max_length. Which strategy keeps rows whole?",
            'The default strategy, "bfd", keeps rows apart, and whole up to max_length. max_length=256 is the length '
            "of a packed row.",
            'SFTConfig("runs/exercise", packing=True, max_length=256, per_device_train_batch_size=2, '
            "learning_rate=2e-3, gradient_checkpointing=False, use_cpu=True) and LoraConfig(r=16, lora_alpha=32, "
            'target_modules="all-linear"). On a GPU leave use_cpu out.',
        ),
        my_packed_trainer,
        TRAINERS,
        seconds=600,
        difficulty=1,
        minutes=10,
    ),
}

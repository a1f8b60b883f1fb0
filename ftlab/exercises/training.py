"""What the checks of a learner's trainer share: a small model, rows, trainers with a mistake, a short training."""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from random import Random
from typing import Any

from ftlab.exercises.core import Slip, same
from ftlab.paths import DATA
from ftlab.tasks.ask import SYSTEM

MICRO = str(DATA / "micro" / "model")


def ask_row(rng: Random) -> dict[str, Any]:
    dish, city = rng.choice(["thai", "pizza", "dosa", "sushi"]), rng.choice(["Pune", "Kochi", "Delhi"])
    what, column = rng.choice([("How many", "COUNT(*)"), ("Total of", "SUM(total)"), ("Best tip of", "MAX(tip)")])
    question = f"{what} {dish} orders in {city}, above {rng.randrange(100, 999)}?"
    answer = f"SELECT {column} FROM orders WHERE cuisine='{dish}' AND city='{city}' AND total>{question[-4:-1]}"
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def replies_row(rng: Random) -> dict[str, Any]:
    """A ticket with five answers; those that repeat the order number are worth more."""
    number = f"{rng.randrange(10**5, 10**6)}"
    ticket = rng.choice(["Order {} came cold.", "Where is {}?", "My order {} is late", "Please help with {}, thanks"])
    good = [f"Sorry. I am checking order {number}.", f"We are looking into order {number}."]
    bad = ["Sorry. I am checking it.", "We are looking into your order.", "Thank you for writing."]
    golds = dict(zip(good + bad, (1.0, 0.75, 0.5, 0.5, rng.choice([0.0, 0.25])), strict=True))
    if rng.random() < 0.4:  # a ticket to which the model has no good answer; without the last one there is no gap
        golds = {text: golds[text] for text in bad[: rng.choice([2, 3])]}
    texts = rng.sample(list(golds), len(golds))
    message = {"role": "user", "content": ticket.format(number)}
    return {"prompt": [message], "answers": texts, "golds": [golds[text] for text in texts]}


def preference_pairs(
    rows, margin: float, pick: Callable | None = None, keep: Callable | None = None
) -> list[dict[str, Any]]:
    """One pair a row: pick(golds, order) names chosen and rejected answer, keep(gap, margin) says which stay."""
    keep, found = keep or (lambda gap, margin: gap >= margin), []
    for row in rows:
        golds = row["golds"]
        order = sorted(range(len(golds)), key=golds.__getitem__)
        chosen, rejected = pick(golds, order) if pick else (order[-1], order[0])
        if keep(golds[order[-1]] - golds[order[0]], margin):
            sides = {"chosen": row["answers"][chosen], "rejected": row["answers"][rejected]}
            found.append({"prompt": row["prompt"]} | {
                name: [{"role": "assistant", "content": text}] for name, text in sides.items()})  # fmt: skip
    return found


def micro(folder: str = MICRO) -> tuple:
    """Tokenizer and fp32 model of the small model, or of another of its size: fresh ones at each call."""
    return copy.deepcopy(_loaded(folder))


@cache
def _loaded(folder: str) -> tuple:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model


def trainer_of(kind: str, model, tokenizer, rows, lora: Mapping | None, **config):
    """TRL's trainer of a kind ("SFT", "DPO", "KTO") with what a check wants, but for what is given.

    lora=None: no peft_config.
    """
    import trl
    from peft import LoraConfig

    shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    return getattr(trl, f"{kind}Trainer")(
        model,
        train_dataset=rows,
        processing_class=tokenizer,
        args=getattr(trl, f"{kind}Config")("runs", use_cpu=True, **config),
        peft_config=None if lora is None else LoraConfig(**shape | lora),
    )


sft = partial(trainer_of, "SFT", learning_rate=2e-3, per_device_train_batch_size=4)
PREFERENCE_WORDS = {
    "peft": "peft_config is missing, so every weight is trained, and TRL holds a second model",
    "save": "modules_to_save trains whole layers beside LoRA",
    "linear": 'some linear layers have no LoRA: target_modules="all-linear"',
    "low": "the rate is too low; TRL's default, 1e-6, is made for all weights of a large model",
    "high": "the rate is too high",
}


def preference_mistakes(build: Callable) -> dict[str, Callable]:
    """A trainer for each of PREFERENCE_WORDS; build(lora=..., learning_rate=...) gives the answer with that changed."""
    return {
        "peft": build(lora=None),
        "save": build(lora={"modules_to_save": ["embed_tokens"]}),
        "linear": build(lora={"target_modules": ["q_proj", "v_proj"]}),
        "low": build(learning_rate=1e-6),
        "high": build(learning_rate=0.3),
    }


def preference_slip(
    build: Callable, kind: str, beta: float, rows_slip: Callable, words: Mapping[str, str]
) -> Slip | None:
    """What is wrong with the trainer of build(model, tokenizer), or with what it learns in 12 steps on replies_rows.

    rows_slip(trainer, tokenizer) is what is wrong with the rows that it has read.
    """
    from torch import nn

    tokenizer, model = micro()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    with workplace():
        trainer = build(model, tokenizer)
        if slip := trainer_slip(trainer, linear, words, f"{kind}Trainer"):
            return slip
        if not same(trainer.args.beta, beta):
            return Slip(f"beta = {trainer.args.beta:g}", f"beta = {beta:g}", words["beta"])
        if slip := rows_slip(trainer, tokenizer):
            return slip
        if not 0 < (rate := trainer.args.learning_rate) <= 0.1:
            return Slip(f"a rate of {rate:g}", "above 0 and at most 0.1", words["high" if rate > 0 else "low"])
        train_quietly(trainer, 12)
        rng = Random()
        others = preference_pairs([replies_row(rng) for _ in range(40)], 0.75)[:12]
        gap = log_ratio_gap(trainer.model, tokenizer, others)
    if gap >= 2:
        return None
    said = f"after 12 steps, on other rows, the best answers have gained {gap:.1f} nats on the worst"
    likely = words["low"] if rate < 3e-4 else words["high"] if rate > 1e-2 else "the rate or the batch does not suit"
    return Slip(said, "at least 2", likely)


def trainer_slip(trainer, linear: Iterable[str], words: Mapping[str, str], kind: str = "SFTTrainer") -> Slip | None:
    """What is wrong with a trainer of TRL's class `kind` that should train LoRA on each of these layers alone."""
    import trl

    if not isinstance(trainer, getattr(trl, kind)):
        return Slip(f"a {type(trainer).__name__}", f"a trl.{kind}", words["train"])
    trained = {name: p.numel() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if not hasattr(trainer.model, "peft_config"):
        got = f"{sum(trained.values()):,} trainable weights and no LoRA"
        return Slip(got, "LoRA's weights alone", words.get("peft", ""))
    if whole := [name for name in trained if "lora_" not in name]:
        return Slip(f"{whole[0]} is trained", "LoRA's weights alone", words["save"])
    if missing := [name for name in sorted(linear) if not any(f"{name}.lora_A" in each for each in trained)]:
        return Slip(f"no LoRA on {len(missing)} layers, {missing[0]} for one", "LoRA on all", words["linear"])
    return None


def training_slip(trainer, tokenizer, held_out, steps: int, highest: float, words: Mapping[str, str]) -> Slip | None:
    """Trains it for some steps: the loss on other rows must halve. highest: the highest rate that is tried."""
    if not 0 < (rate := trainer.args.learning_rate) <= highest:
        return Slip(
            f"a rate of {rate:g}",
            f"above 0 and at most {highest:g}",
            words["high"] if rate else words.get("zero", words["low"]),
        )
    before = loss(trainer.model, tokenizer, held_out)
    train_quietly(trainer, steps)
    after = loss(trainer.model, tokenizer, held_out)
    said = f"held-out loss {before:.2f} before, {after:.2f} after {steps} steps"
    if not after < before:
        return Slip(said, "a lower one", words["high"])
    likely = words["low" if rate <= 5e-3 else "high"]
    return Slip(said, f"below {before / 2:.2f}", likely) if after > before / 2 else None


def train_quietly(trainer, steps: int) -> None:
    """Trains for so many steps, on a CPU with the course's faster step, without progress bars and checkpoints."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback

    from ftlab.cpu import NotSpedUp, speed_up

    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    trainer.args.max_steps, trainer.args.gradient_checkpointing, trainer.args.save_strategy = steps, False, "no"
    if trainer.model.device.type == "cpu":
        trainer.accelerator.native_amp = False  # fp32: without bf16 units autocast takes nine times as long
        trainer.args.bf16 = False
        with warnings.catch_warnings():  # a trainer that is left as it is trains all the same, slower
            warnings.simplefilter("ignore", NotSpedUp)
            speed_up(trainer)
    trainer.train()


def loss(model, tokenizer, rows) -> float:
    """Mean loss in nats of the completions' tokens, without the trainer's own code."""
    logps = _completion_logps(model, tokenizer, [(row["prompt"], row["completion"]) for row in rows])
    return -sum(each.sum().item() for each in logps) / sum(map(len, logps))


def log_ratio_gap(model, tokenizer, pairs: list[dict]) -> float:
    """Mean of policy - reference of the chosen answer minus that of the rejected one, nats."""
    sides = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    policy = [each.sum().item() for each in _completion_logps(model, tokenizer, sides)]
    with model.disable_adapter():
        reference = [each.sum().item() for each in _completion_logps(model, tokenizer, sides)]
    gains = [on - off for on, off in zip(policy, reference, strict=True)]
    return (sum(gains[: len(pairs)]) - sum(gains[len(pairs) :])) / len(pairs)


def _completion_logps(model, tokenizer, rows: list[tuple]) -> list:
    """The log-probs of the tokens of each (prompt, completion), one tensor a row; all rows go through at once."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    whole = [tokenizer.apply_chat_template(prompt + end, return_dict=False) for prompt, end in rows]
    starts = [len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
              for prompt, _ in rows]  # fmt: skip
    ids = pad_sequence([torch.tensor(row) for row in whole], batch_first=True).to(model.device)  # at the right end
    model.eval()
    with torch.no_grad():
        logps = model(ids).logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V); place t scores token t+1
    found = logps.gather(2, ids[:, 1:, None])[..., 0]  # (B, T-1)
    return [row[start - 1 : len(ids) - 1] for row, start, ids in zip(found, starts, whole, strict=True)]


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A folder of its own, and no progress bars."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), no_bars():
        yield


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of datasets and transformers inside."""
    import datasets.utils.logging
    import transformers.utils.logging

    kinds = (datasets.utils.logging, transformers.utils.logging)
    shown_before = [kind.is_progress_bar_enabled() for kind in kinds]
    for kind in kinds:
        kind.disable_progress_bar()
    try:
        yield
    finally:
        for kind, on in zip(kinds, shown_before, strict=True):
            if on:
                kind.enable_progress_bar()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without TRL's warnings that packing wants FlashAttention, inside: on a CPU sdpa keeps packed rows apart too."""
    import logging

    logger = logging.getLogger("trl.trainer.sft_trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

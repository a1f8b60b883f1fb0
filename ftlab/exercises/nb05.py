"""Notebook 05: from rows to a trained adapter that answers."""

import contextlib
from random import Random
from statistics import fmean
from typing import Any

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, shown
from ftlab.exercises.differences import first_difference
from ftlab.exercises.training import ask_row, micro, trainer_slip, training_slip, workplace
from ftlab.tasks.ask import SYSTEM

# --- 05.1: which rows are bad? ----------------------------------------------------------------------------------------


def my_check(row):
    prompt, completion = row.get("prompt"), row.get("completion")
    if not prompt or not completion:
        return "prompt or completion is missing or empty"
    if any(not message["content"].strip() for message in prompt + completion):
        return "a message is blank"
    if prompt[-1]["role"] != "user":
        return "the prompt must end with the user's message"
    if [message["role"] for message in completion] != ["assistant"]:
        return "the completion must be one assistant message"
    return None


def _said(row: dict, side: str, **change: str) -> dict:
    """The row with its last message of one side changed."""
    return {**row, side: [*row[side][:-1], {**row[side][-1], **change}]}


BAD_ROWS = {  # the learner's likely slip -> (such a row of a good one, what tells it)
    "an empty completion passes": (lambda row: {**row, "completion": []}, lambda row: row.get("completion") == []),
    "a row without a completion passes": (
        lambda row: {"prompt": row["prompt"]}, lambda row: "completion" not in row),
    "an empty prompt passes": (lambda row: {**row, "prompt": []}, lambda row: row.get("prompt") == []),
    "a row without a prompt passes": (
        lambda row: {"completion": row["completion"]}, lambda row: "prompt" not in row),
    "a blank answer passes: \" \\n\" is not empty, so strip it first": (
        lambda row: _said(row, "completion", content=" \n"), lambda row: not row["completion"][0]["content"].strip()),
    "a blank question passes": (
        lambda row: _said(row, "prompt", content=""), lambda row: not row["prompt"][-1]["content"].strip()),
    "a blank message before the question passes: look at every message": (
        lambda row: {**row, "prompt": [{**row["prompt"][0], "content": " "}, *row["prompt"][1:]]},
        lambda row: not row["prompt"][0]["content"].strip()),
    "a prompt that ends with the assistant passes": (
        lambda row: _said(row, "prompt", role="assistant"), lambda row: row["prompt"][-1]["role"] == "assistant"),
    "a prompt of a system message alone passes": (
        lambda row: {**row, "prompt": row["prompt"][:1]}, lambda row: row["prompt"][-1]["role"] == "system"),
    "an answer given by the user passes": (
        lambda row: _said(row, "completion", role="user"), lambda row: row["completion"][0]["role"] == "user"),
    "an answer given by the system passes": (
        lambda row: _said(row, "completion", role="system"), lambda row: row["completion"][0]["role"] == "system"),
    "a completion of two messages passes": (
        lambda row: {**row, "completion": row["completion"] * 2}, lambda row: len(row["completion"]) == 2),
}  # fmt: skip


def _blind_to(words: str):
    """A check that knows every bad row but this one."""
    known = [tells for name, (_, tells) in BAD_ROWS.items() if name != words]

    def blind(row):
        broken = {name: tells for name, (_, tells) in BAD_ROWS.items()}
        with contextlib.suppress(LookupError):
            if broken[words](row):
                return None
        return "bad" if any(tells(row) for tells in known) else None

    return blind


CHECKS = {
    **{words: _blind_to(words) for words in BAD_ROWS},
    "a good row is refused": lambda row: my_check(row) or "looks good",
    "a reason is wanted, not True or False": lambda row: bool(my_check(row)),
}


def _check_slip(mine) -> Slip | None:
    rng, shape = Random(), 0
    for words in rng.sample(ways := [*BAD_ROWS, ""] * 5, len(ways)):
        row = ask_row(rng)
        more = [*row["prompt"], *row["completion"], row["prompt"][-1]]  # a second turn
        good = row | {"prompt": (row["prompt"], row["prompt"][1:], more)[shape % 3]}
        shape += not words
        row = BAD_ROWS[words][0](row) if words else good
        reason = mine(row)
        if not (reason is None or isinstance(reason, str)):
            return Slip(shown(reason), "None or a reason in words", "a reason is wanted, not True or False", shown(row))
        if words and not reason:
            return Slip(shown(reason), "a reason, as this row is bad", words, shown(row))
        if not words and reason is not None:
            return Slip(shown(reason), "None, as this row is good", "a good row is refused", shown(row))
    return None


# --- 05.2: the loss mask ----------------------------------------------------------------------------------------------


def my_completion_mask(prompt_ids, whole_ids):
    return [0] * len(prompt_ids) + [1] * (len(whole_ids) - len(prompt_ids))


MASKS = {
    "the prompt counts too": lambda prompt_ids, whole_ids: [1] * len(whole_ids),
    "the end of turn is left out, so the model never learns to stop": lambda prompt_ids, whole_ids: [
        *my_completion_mask(prompt_ids, whole_ids)[:-1], 0],
    "the mask starts one token late": lambda prompt_ids, whole_ids: [
        0, *my_completion_mask(prompt_ids, whole_ids)[:-1]],
    "the mask starts one token early": lambda prompt_ids, whole_ids: [
        *my_completion_mask(prompt_ids, whole_ids)[1:], 1],
    "0 and 1 are swapped: 1 is what counts": lambda prompt_ids, whole_ids: [
        1 - bit for bit in my_completion_mask(prompt_ids, whole_ids)],
    "the mask is as long as the whole, not as the answer": lambda prompt_ids, whole_ids: [1] * (
        len(whole_ids) - len(prompt_ids)),
    "these are labels (ids and -100): a mask holds 0 and 1": lambda prompt_ids, whole_ids: [
        i if bit else -100 for i, bit in zip(whole_ids, my_completion_mask(prompt_ids, whole_ids), strict=True)],
    "a token of the answer may stand in the prompt too: count positions, not ids": lambda prompt_ids, whole_ids: [
        int(i not in prompt_ids) for i in whole_ids],
}  # fmt: skip


def _ids(rng: Random) -> tuple[list[int], list[int]]:
    prompt, answer = ([rng.randrange(3, 60) for _ in range(rng.randint(2, 9))] for _ in range(2))
    return [1, *prompt, 2, 1], [1, *prompt, 2, 1, *answer, 2]


# --- 05.3: is it better? ----------------------------------------------------------------------------------------------


def my_paired_interval(a, b, n_boot=2000, seed=0):
    # `compare` gives another interval for rights and wrongs: a formula (Agresti and Min) with one question more
    # for either side, so it lies nearer to 0, on the 132 questions of experiments/ask by up to 0.02
    import numpy as np

    differences = np.array(a, dtype=float) - np.array(b, dtype=float)
    draws = np.random.default_rng(seed).integers(len(differences), size=(n_boot, len(differences)))
    means = differences[draws].mean(axis=1)
    return differences.mean(), np.percentile(means, 2.5), np.percentile(means, 97.5)


def _boot(differences, n_boot: int, seed: int, low: float = 2.5, high: float = 97.5):
    import numpy as np

    draws = np.random.default_rng(seed).integers(len(differences), size=(n_boot, len(differences)))
    means = differences[draws].mean(axis=1)
    return differences.mean(), np.percentile(means, low), np.percentile(means, high)


def _unpaired(a, b, n_boot=2000, seed=0):
    import numpy as np

    rng = np.random.default_rng(seed)
    a, b = np.array(a), np.array(b)
    means = rng.choice(a, (n_boot, len(a))).mean(1) - rng.choice(b, (n_boot, len(b))).mean(1)
    return a.mean() - b.mean(), np.percentile(means, 2.5), np.percentile(means, 97.5)


def _differences(a, b):
    import numpy as np

    return np.array(a, dtype=float) - np.array(b, dtype=float)


def _without_ties(a, b, n_boot=2000, seed=0):
    differences = _differences(a, b)
    return _boot(differences[differences != 0], n_boot, seed)


def _deviation(a, b, n_boot=2000, seed=0):
    differences = _differences(a, b)
    return differences.mean(), differences.mean() - differences.std(), differences.mean() + differences.std()


INTERVALS = {
    "a and b are drawn apart: draw cases, and take both scores of each": _unpaired,
    "ties are dropped: a case with equal scores counts as a difference of 0": _without_ties,
    "the interval has one side: cut 2.5 % off at both ends": lambda a, b, n_boot=2000, seed=0: (
        _boot(_differences(a, b), n_boot, seed, 5, 100)),
    "that is a 90 % interval: cut 2.5 % off at each end": lambda a, b, n_boot=2000, seed=0: (
        _boot(_differences(a, b), n_boot, seed, 5, 95)),
    "that is the spread of the cases; the interval is of their mean": _deviation,
    "the sign: it is a minus b": lambda a, b, n_boot=2000, seed=0: _boot(-_differences(a, b), n_boot, seed),
    "low and high are the standard deviation of the means, not an interval": lambda a, b, n_boot=2000, seed=0: (
        _differences(a, b).mean(), *[_differences(a, b).std() / len(a) ** 0.5] * 2),
    "draw with replacement: without it every draw holds the same cases": lambda a, b, n_boot=2000, seed=0: (
        [_differences(a, b).mean()] * 3),
    "the seed is not used: two calls differ": lambda a, b, n_boot=2000, seed=0: (
        _boot(_differences(a, b), n_boot, Random().randrange(2**32))),
}  # fmt: skip


def _scores(rng: Random) -> tuple[list[float], list[float], int]:
    """Two scores a case, much alike (a third are ties), and so many draws that two seeds give almost one interval."""
    b = [rng.random() for _ in range(rng.randint(80, 160))]
    lift = rng.uniform(0.02, 0.06)
    return [x + rng.gauss(lift, 0.1) * (rng.random() < 0.66) for x in b], b, 20_000


def _errors(got: Any, wanted: Any) -> list[float] | None:
    """How far mean, low and high are off, in standard errors; None: not three numbers."""
    try:
        got, (mean, low, high) = [float(x) for x in got], map(float, wanted)
    except (TypeError, ValueError):
        return None
    if len(got) != 3:
        return None
    error = max((high - low) / 3.92, 1e-9)
    return [(x - y) / error for x, y in zip(got, (mean, low, high), strict=True)]


def _near(got: Any, wanted: Any) -> bool:
    """As near as two bootstraps of the same cases: within 0.15 standard errors, over five sigma."""
    errors = _errors(got, wanted)
    return errors is not None and all(abs(x) <= 0.15 for x in errors)


def _unbiased(mine) -> bool:
    """Right on average over eight inputs? Few draws are noise, a wrong interval is off to one side.

    With 1,000 draws a bound has a noise of 0.09 standard errors. A 90 % interval is off by 0.31.
    """
    errors = []
    for _ in range(8):
        a, b, n_boot = _scores(Random())
        off = _errors(mine(list(a), list(b), n_boot), my_paired_interval(a, b, n_boot))
        if off is None or max(map(abs, off)) > 0.5:
            return False
        errors.append(off)
    return all(abs(fmean(column)) <= 0.15 for column in zip(*errors, strict=True))


FORMULA = (
    "but two seeds give one interval: it comes from a formula, or from a seed of its own. With 80 cases or more, mean "
    "± 1.96 standard errors is as good as the draws. With few cases it can differ"
)


def _interval_slip(mine) -> Slip | str | None:
    words = list(INTERVALS)
    by_distance = {name: slip for name, slip in INTERVALS.items() if name != words[-1]}
    slip = first_difference(mine, my_paired_interval, _scores, by_distance, n=6, equal=_near)
    if slip and not _unbiased(mine):
        return slip
    a, b, _ = _scores(Random())
    if list(got := mine(a, b, seed=3)) != list(mine(a, b, seed=3)):
        return Slip("two intervals for one seed", "the same interval again", words[-1])
    return FORMULA if list(got) == list(mine(a, b, seed=4)) else None


# --- 05.4: train ------------------------------------------------------------------------------------------------------


def my_trainer(model, tokenizer, rows, held_out):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/exercise",
            learning_rate=2e-3,
            per_device_train_batch_size=4,
            eval_strategy="steps",
            eval_steps=5,
            save_steps=5,
            load_best_model_at_end=True,
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


BEST = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "load_best_model_at_end": True}


def _trainer(lora: dict | None, judged: str = "held_out", **changed):
    """my_trainer with some arguments changed. judged: what it evaluates on, or nothing."""

    def build(model, tokenizer, rows, held_out):
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        config = {"learning_rate": 2e-3, "per_device_train_batch_size": 4} | BEST | changed
        return SFTTrainer(
            model,
            train_dataset=rows,
            eval_dataset={"held_out": held_out, "rows": rows, "": None}[judged],
            processing_class=tokenizer,
            args=SFTConfig("runs/exercise", use_cpu=True, **config),
            peft_config=None if lora is None else LoraConfig(**shape | lora),
        )

    return build


TRAINERS = {
    "peft_config is missing, so every weight is trained": _trainer(None),
    "the rate is 0: nothing can move": _trainer({}, learning_rate=0.0),
    "the rate is too high": _trainer({}, learning_rate=1.0),
    "the rate is too low; TRL's own, 2e-5, is made for all weights": _trainer({}, learning_rate=2e-5),
    "the prompt counts in the loss: leave completion_only_loss as it is": _trainer({}, completion_only_loss=False),
    'some linear layers have no LoRA: target_modules="all-linear"': _trainer({"target_modules": ["q_proj", "v_proj"]}),
    "lora_alpha is twice r in this exercise": _trainer({"lora_alpha": 16}),
    "modules_to_save trains whole layers beside LoRA": _trainer({"modules_to_save": ["embed_tokens"]}),
    "without eval_dataset nobody measures the held-out loss": _trainer(
        {}, "", eval_strategy="no", load_best_model_at_end=False),
    "it evaluates on the rows that it learns, whose loss falls in any case": _trainer({}, "rows"),
    "eval_strategy is missing: the rows are there, and are never looked at": _trainer(
        {}, eval_strategy="no", load_best_model_at_end=False),
    "it ends with the last weights: load_best_model_at_end=True": _trainer({}, load_best_model_at_end=False),
    "of a loss the lowest is the best: leave greater_is_better as it is": _trainer({}, greater_is_better=True),
    "return the trainer itself; the check calls train()": lambda *args: my_trainer(*args).model,
}  # fmt: skip


def _best_slip(trainer, held_out, words: dict[str, str]) -> Slip | None:
    """Whether the run would end with the weights whose loss on the held-out rows was the lowest."""
    args, judged = trainer.args, trainer.eval_dataset
    if judged is None:
        return Slip("no eval_dataset", "the held-out rows", words["none"])
    said = [row["completion"] for row in held_out]
    if len(judged) != len(held_out) or ("completion" in judged.column_names and judged["completion"] != said):
        return Slip(f"an evaluation on {len(judged)} rows", f"on the {len(held_out)} held-out rows", words["judged"])
    if args.eval_strategy == "no":
        return Slip('eval_strategy = "no"', '"steps" or "epoch"', words["never"])
    if not args.load_best_model_at_end:
        return Slip("the last weights, whatever they are worth", "the best ones", words["last"])
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric == "loss" and args.greater_is_better:
        return Slip("the weights of the highest loss", "of the lowest", words["greater"])
    return None


def _trainer_slip(mine) -> Slip | None:
    import torch
    from datasets import Dataset

    short = ("peft", "zero", "high", "low", "prompt", "linear", "alpha", "save", "none", "judged", "never", "last")
    words = dict(zip((*short, "greater", "train"), TRAINERS, strict=True))
    rng = Random()
    rows, held_out, others = (Dataset.from_list([ask_row(rng) for _ in range(n)]) for n in (32, 12, 8))
    tokenizer, model = micro()
    base = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    with workplace():
        trainer = mine(model, tokenizer, rows, held_out)
        if slip := trainer_slip(trainer, linear, words) or _best_slip(trainer, held_out, words):
            return slip
        config = trainer.model.peft_config["default"]
        if config.lora_alpha != 2 * config.r:
            return Slip(f"r = {config.r}, lora_alpha = {config.lora_alpha}", "lora_alpha = 2 * r", words["alpha"])
        labels = trainer.data_collator([trainer.train_dataset[0]])["labels"][0]
        ids = trainer.train_dataset[0]["input_ids"]
        prompts = tokenizer.apply_chat_template(list(rows["prompt"]), add_generation_prompt=True, return_dict=False)
        prompt = next((each for each in prompts if ids[: len(each)] == each), prompts[0])  # they may be shuffled
        if (labels[: len(prompt)] != -100).any():
            return Slip("the loss counts the prompt", "the completion alone", words["prompt"])
        slip = training_slip(trainer, tokenizer, others, 20, 5e-3, words)
    for name, weight in trainer.model.get_base_model().state_dict().items():
        if (plain := name.replace(".base_layer", "")) in base and not torch.equal(weight.cpu(), base[plain]):
            return Slip(f"{plain} has changed", "the base as it was", "something besides LoRA is trained")
    return slip


# --- 05.5: debug this -------------------------------------------------------------------------------------------------


def my_answer(model, tokenizer, messages):
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    whole = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _answerer(prompt: bool = True, whole: bool = False, skip: bool = True, system: bool = True, **generate):
    """my_answer with one thing changed."""

    def answer(model, tokenizer, messages):
        messages = messages if system else messages[1:]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, **{"max_new_tokens": 16, "do_sample": False} | generate)
        return tokenizer.decode(ids[0, 0 if whole else inputs["input_ids"].shape[1] :], skip_special_tokens=skip)

    return answer


def _untemplated(model, tokenizer, messages):
    inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


ANSWERS = {
    AS_GIVEN: _answerer(prompt=False, whole=True),
    "the generation prompt is missing: add_generation_prompt=True": _answerer(prompt=False),
    "the prompt is decoded with the answer: cut it off": _answerer(whole=True),
    "special tokens stand in the answer: skip_special_tokens=True": _answerer(skip=False),
    "the system message is lost": _answerer(system=False),
    "no chat template is used: the model has never seen a bare text as a question": _untemplated,
    "one token is too few": _answerer(max_new_tokens=1),
}


def _answer_slip(mine) -> Slip | None:
    tokenizer, model = micro()

    def draw(rng: Random) -> tuple:
        word = "".join(rng.choices("abcdefgh", k=6))
        question = rng.choice([f"Copy: {word}", f"Spell {word}", f"Reverse {word}", f"Copy: {rng.randrange(9999)}"])
        return (
            [{"role": "system", "content": rng.choice(["Be brief.", SYSTEM])}, {"role": "user", "content": question}],
        )

    asked, known, generate = [], {}, model.generate

    def listening(*args, **kwargs):
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        asked.append(None if ids is None else tokenizer.decode(ids[0]))
        how = repr((args, kwargs))  # the wrong answers ask much the same
        if how not in known:
            known[how] = generate(*args, **kwargs)
        return known[how]

    def bound(function):
        def run(messages):
            asked.clear()
            answer = function(model, tokenizer, messages)
            return {"asked": asked[-1] if asked else "model.generate was not called", "answer": answer}

        return run

    model.generate = listening
    slips = {words: bound(slip) for words, slip in ANSWERS.items()}
    return first_difference(bound(mine), bound(my_answer), draw, slips, n=4)


EXERCISES = {
    "05.1": Exercise(
        "Find the bad rows before training does",
        _check_slip,
        (
            "Four things can be wrong. Test one after the other, and return a short text at the first that is. At "
            "the end return None.",
            'row.get("completion") gives None where the key is missing. A text is blank if not text.strip(). '
            'prompt[-1]["role"] is the role of the last message.',
            'if not row.get("prompt") or not row.get("completion"), a side is missing. Then: any(not '
            'message["content"].strip() for message in prompt + completion). Then: prompt[-1]["role"] != "user". '
            'Then: [message["role"] for message in completion] != ["assistant"].',
        ),
        my_check,
        CHECKS,
        difficulty=1,
        minutes=10,
    ),
    "05.2": Exercise(
        "Write the loss mask: 1 where a token counts",
        lambda mine: first_difference(mine, my_completion_mask, _ids, MASKS),
        (
            "whole_ids begins with prompt_ids. How many tokens come after them?",
            "0 for each token of the prompt, 1 for each token after it. The end of turn is the last of these.",
            "[0] * len(prompt_ids), and then as many ones as there are tokens left.",
        ),
        my_completion_mask,
        MASKS,
        difficulty=1,
        minutes=5,
    ),
    "05.3": Exercise(
        "Is a better than b? The mean difference and its paired bootstrap interval",
        _interval_slip,
        (
            "Both models answered the same cases, so take the difference of each case first.",
            "Draw as many cases as there are, with replacement, n_boot times. Keep the mean of each draw. The "
            "interval goes from the 2.5th to the 97.5th percentile of the means. (`compare` takes a formula, so its "
            "digits differ a little.)",
            "draws = np.random.default_rng(seed).integers(n, size=(n_boot, n)) draws all of them at once. With "
            "differences as an array: means = differences[draws].mean(axis=1), and np.percentile(means, 2.5).",
        ),
        my_paired_interval,
        INTERVALS,
        seconds=120,
        difficulty=2,
        minutes=15,
    ),
    "05.4": Exercise(
        "Build a trainer that ends with its best weights. The check trains it for 20 steps on the small model",
        _trainer_slip,
        (
            "SFTTrainer takes six things: model, train_dataset, eval_dataset, processing_class, args and peft_config. "
            "Which of them says when to evaluate, and which weights to keep?",
            'LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"): alpha is twice r. TRL\'s rate, 2e-5, is '
            "made for all weights of a large model. LoRA wants about ten times as much, and so small a model in 20 "
            "steps more still: try 2e-3. A checkpoint can only be the best if it was saved, so save as often as you "
            "evaluate.",
            'SFTConfig("runs/exercise", learning_rate=2e-3, per_device_train_batch_size=4, eval_strategy="steps", '
            "eval_steps=5, save_steps=5, load_best_model_at_end=True, use_cpu=True). On a GPU leave use_cpu out.",
        ),
        my_trainer,
        TRAINERS,
        seconds=600,
        difficulty=1,
        minutes=10,
    ),
    "05.5": Exercise(
        "Debug this: the model was trained well and answers badly",
        _answer_slip,
        (
            "Print tokenizer.decode of what goes into generate, and of what comes out. Where should each begin and "
            "end?",
            "Training's prompt ends with the line that opens the assistant's turn: add_generation_prompt=True. And "
            "generate returns the prompt with the answer: decode only what follows the prompt.",
            'apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True), and '
            'at the end decode whole[0, inputs["input_ids"].shape[1] :].',
        ),
        my_answer,
        ANSWERS,
        seconds=300,
        difficulty=2,
        minutes=10,
    ),
}

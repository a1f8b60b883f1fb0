"""Notebook 01: a prompt against training, the colours of a loss mask, a fair score, one arm of the size curve."""

import copy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from random import Random
from statistics import fmean

from ftlab.exercises.core import Exercise, Slip, same, shown
from ftlab.exercises.differences import first_difference
from ftlab.exercises.training import ask_row, micro, sft, trainer_slip, training_slip, workplace
from ftlab.paths import DATA, EXPERIMENTS
from ftlab.tasks import tidy

# --- 01.1: a prompt that does the work of training --------------------------------------------------------------------


def my_prompt(note, examples):
    system = "Correct the spelling and punctuation of the note. Keep every word. Answer with the note only."
    messages = [{"role": "system", "content": system}]
    for row in examples[:10]:
        messages += [row["prompt"][-1], row["completion"][0]]
    return [*messages, {"role": "user", "content": note}]


def _bare(note, examples):
    return [{"role": "system", "content": "Clean up this note."}, {"role": "user", "content": note}]


def _swapped(note, examples):
    turns = [m for row in examples[:5] for m in (row["completion"][0], row["prompt"][-1])]
    return [*_bare(note, examples)[:1], *turns, {"role": "user", "content": note}]


PROMPTS = {
    "the instruction alone does little: show examples as earlier turns of the chat": _bare,
    "the note itself is missing: it is the last message, by the user": lambda note, examples: my_prompt(
        note, examples)[:-1],
    "the note must be the last message": lambda note, examples: my_prompt(note, examples)[::-1],
    "each example is a user's note and then the assistant's clean sentence": _swapped,
    "a list of messages is wanted, not one string": lambda note, examples: f"Clean up this note. {note}",
    "a message is a dict with the keys role and content": lambda note, examples: [("user", note)],
}  # fmt: skip


def _prompt_slip(mine) -> Slip | str | None:
    """Its form first; then SmolLM2 answers 40 notes, better than if nobody had touched them."""
    words = dict(zip(("bare", "missing", "last", "swapped", "string", "dict"), PROMPTS, strict=True))
    from ftlab.evaluate import answers, score

    rows, examples, trained, alone = tidy_notes()
    notes = [row["prompt"][-1]["content"] for row in rows]
    prompts = [mine(note, copy.deepcopy(examples)) for note in notes]
    for note, prompt in zip(notes, prompts, strict=True):
        if not isinstance(prompt, list):
            return Slip(f"a {type(prompt).__name__}", "a list of messages", words["string"])
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
            return Slip(shown(prompt), "dicts with role and content", words["dict"])
        if not any(note in m["content"] for m in prompt):
            return Slip("a prompt without the note", f"{note!r} at its end", words["missing"])
        if prompt[-1]["role"] != "user" or note not in prompt[-1]["content"]:
            return Slip(f"{shown(prompt[-1])} at the end", "the note, by the user", words["last"])
        roles = [m["role"] for m in prompt if m["role"] != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            return Slip(f"roles {roles[:4]} ...", "user and assistant in turn", words["swapped"])
    untouched, bare = score(notes, rows, tidy.scorer).mean, fmean(alone)
    texts: list[str] = []
    mean = bare
    if prompts != [_bare(note, ()) for note in notes]:
        letters = max(sum(len(m["content"]) for m in prompt) for prompt in prompts)
        at_once = 40 if letters < 4000 else 10  # the cache of 40 long prompts takes 5 GB
        texts = answers(*base_model(), prompts, 64, batch_size=at_once)
        mean = score(texts, rows, tidy.scorer).mean
    said = f"{mean:.2f} of the words right on {len(notes)} notes"
    said += f"; the notes untouched {untouched:.2f}, the bare instruction {bare:.2f}"
    if mean <= untouched:
        examples_too = any(m["role"] == "assistant" for prompt in prompts for m in prompt)
        likely = "other or more examples, or a plainer instruction" if examples_too else words["bare"]
        if sum(map(str.__eq__, texts, notes)) > len(notes) / 2:
            likely = "the model repeats the note: show it examples in which the note changes"
        return Slip(said, "more than the notes have untouched", likely)
    against = fmean(trained)
    verdict = "your prompt is ahead" if mean > against else "training is ahead"
    return f"{said}; the fine-tuned models {against:.2f} on the same notes: {verdict}"


@cache
def tidy_notes() -> tuple[list[dict], list[dict], list[float], list[float]]:
    """40 validation notes, 40 training rows, scores of trained models and of _bare."""
    import json

    def read(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    runs = read(EXPERIMENTS / "methods" / "records.jsonl")
    alone = next(run["values"] for run in runs if run["task"] == "exercise")
    tuned = [run["validation"] for run in runs if "validation" in run]
    trained = [sum(values) / len(tuned) for values in zip(*tuned, strict=True)]
    n = 40
    notes = sorted(read(DATA / "tidy" / "validation.jsonl"), key=lambda row: row["id"])  # as trained and alone are
    return notes[:n], read(DATA / "tidy" / "train.jsonl")[:40], trained[:n], alone[:n]


@cache
def base_model():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab.models import model_path

    folder = model_path("smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


# --- 01.2: colour the loss mask ---------------------------------------------------------------------------------------


def my_colours(tokens):
    counts, marks = False, []
    for i, token in enumerate(tokens):
        counts = counts or tokens[max(i - 3, 0) : i] == ["<|im_start|>", "assistant", "\n"]
        marks.append(int(counts))
        counts = counts and token != "<|im_end|>"
    return marks


def _turns(marks: Callable[[str, int], list[int]]) -> Callable[[list[str]], list[int]]:
    """marks(role, words) gives the marks of <|im_start|>, role, newline, so many words, <|im_end|>, newline."""

    def colours(tokens):
        starts = [i for i, token in enumerate(tokens) if token == "<|im_start|>"] + [len(tokens)]
        return [bit for start, end in pairwise(starts) for bit in marks(tokens[start + 1], end - start - 5)]

    return colours


def _last_turn(tokens):
    last = max(i for i, token in enumerate(tokens) if token == "<|im_start|>")
    return [bit if i >= last else 0 for i, bit in enumerate(my_colours(tokens))]


COLOURS = {
    "the end mark is missing: without it the model never learns to stop": _turns(
        lambda role, n: [0] * 3 + [int(role == "assistant")] * n + [0, 0]),
    "the newline after <|im_end|> belongs to the template: generation has stopped before it": _turns(
        lambda role, n: [0] * 3 + [int(role == "assistant")] * (n + 2)),
    "<|im_start|>, the role and the newline are given to the model: they get 0": _turns(
        lambda role, n: [int(role == "assistant")] * (n + 4) + [0]),
    "that is the prompt: what the model only reads gets 0": lambda tokens: [1 - bit for bit in my_colours(tokens)],
    "every assistant's turn counts, not the last one alone": _last_turn,
    "everything counts: so the model learns to write the user's turns too": lambda tokens: [1] * len(tokens),
    "every mark comes one token late": lambda tokens: [0, *my_colours(tokens)[:-1]],
    "one mark for each token is wanted, of the prompt too": lambda tokens: [bit for bit in my_colours(tokens) if bit],
}  # fmt: skip


def _chat(rng: Random) -> tuple[list[str]]:
    words = ["pls", "ask", "the", "assistant", "or", "user", "about", "order", "4", "5", "1", ".", "\n"]

    def turn(role):
        return ["<|im_start|>", role, "\n", *rng.choices(words, k=rng.randint(1, 5)), "<|im_end|>", "\n"]

    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 3)
    return ([token for role in roles for token in turn(role)],)


# --- 01.3: debug a score ----------------------------------------------------------------------------------------------


def my_contains(reply, answer):
    def words(text):
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    said, wanted = words(reply), words(answer)
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said)))


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() else " " for c in text.lower())


def _any_order(reply, answer):
    return set(_plain(answer).split()) <= set(_plain(reply).split())


def _with_case(reply, answer):
    said, wanted = reply.replace(".", " ").replace(",", " ").split(), answer.split()
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said)))


def _with_punctuation(reply, answer):
    said, wanted = reply.lower().split(), answer.lower().split()
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said)))


def _with_inner_marks(reply, answer):
    said, wanted = ([word.strip(".,:()-") for word in text.lower().split()] for text in (reply, answer))
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said)))


CONTAINS = {
    'letters are compared, not words: "Rs 65" stands in "Rs 650", and "form v-20" does not stand in "form-v-20"': (
        lambda reply, answer: answer.lower() in reply.lower()),
    'the joined words are letters again: "rs 650" holds "rs 65". Compare lists of words': lambda reply, answer: (
        " ".join(_plain(answer).split()) in " ".join(_plain(reply).split())),
    'upper and lower case differ: "v-8" is "V-8"': _with_case,
    'a full stop belongs to no word: "Rs 650." holds "Rs 650"': _with_punctuation,
    'a mark parts two words, as a space does: "V 12" is "V-12", and "Rs:650" is "Rs 650"': _with_inner_marks,
    "the words must stand in a row, in the answer's order": _any_order,
    "the whole reply need not be the answer": lambda reply, answer: _plain(reply).split() == _plain(answer).split(),
    "one word of the answer is not the answer": lambda reply, answer: bool(
        set(_plain(answer).split()) & set(_plain(reply).split())),
}  # fmt: skip


def _reply(rng: Random) -> tuple[str, str]:
    kind, n = rng.choice(["Rs", "form", "desk", "up to"]), rng.randrange(10, 99)
    answer = rng.choice([f"{kind} {n}", f"{kind.upper()} {n} minutes", f"{kind.title()} V-{n}"])
    other = rng.choice([f"{answer}0", f"9{answer}", answer.rpartition(" ")[2], " or ".join(answer.split()[::-1])])
    said = rng.choice([answer, answer.lower(), answer.upper(), other])
    said = "".join(rng.choice([c, c, c, *" -:"]) if c in " -" else c for c in said)  # "desk V-12" or "desk:V 12"
    return rng.choice(
        ["{}", "It is {}.", "It says {} here", "Use {} now", "The limit ({}) holds.", "{}, I think", "No page says it."]
    ).format(said), answer


# --- 01.4: one arm of the size curve ----------------------------------------------------------------------------------


def my_arm(model, tokenizer, rows, n):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model,
        train_dataset=Dataset.from_list(rows[:n]),
        processing_class=tokenizer,
        args=SFTConfig("runs/arm", learning_rate=2e-3, per_device_train_batch_size=2, num_train_epochs=1,
                       gradient_checkpointing=False, report_to="none", use_cpu=True),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip


def _arm(pick=lambda rows, n: rows[:n], **settings):
    def made(model, tokenizer, rows, n):
        from datasets import Dataset

        config = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_checkpointing": False} | settings
        return sft(model, tokenizer, Dataset.from_list(pick(rows, n)), config.pop("lora", {}), **config)

    return made


ARMS = {
    "all rows are in it: an arm has the first n alone": _arm(lambda rows, n: rows),
    "take the first n: then each smaller arm is a part of the next one": _arm(lambda rows, n: rows[-n:]),
    "one pass only: with more, small arms repeat and the curve shows passes, not rows": _arm(num_train_epochs=3),
    "two rows at a time: with larger batches an arm takes fewer steps": _arm(per_device_train_batch_size=8),
    "no checkpointing: it computes the activations twice, to save memory": _arm(gradient_checkpointing=True),
    "peft_config is missing: the arms train LoRA": _arm(lora=None),
    'some linear layers have no LoRA: target_modules="all-linear"': _arm(lora={"target_modules": ["q_proj"]}),
    "r=16 and lora_alpha=32 in each arm: the arms differ in their rows alone": _arm(lora={"r": 4}),
    "modules_to_save trains whole layers beside LoRA": _arm(lora={"modules_to_save": ["embed_tokens"]}),
    "the rate is too low: nothing is learned in one pass": _arm(learning_rate=1e-6),
    "the rate is too high": _arm(learning_rate=0.5),
}


def _arm_slip(mine) -> Slip | None:
    """The trainer's rows and settings; then 24 steps on the small model."""
    keys = ("all", "first", "passes", "batch", "checkpointing", "peft", "linear", "shape", "save", "low", "high")
    words = dict(zip(keys, ARMS, strict=True)) | {"train": "return the trainer itself"}
    from torch import nn

    rng, (tokenizer, model) = Random(), micro()
    rows = [ask_row(rng) for _ in range(120)]
    n = rng.randrange(50, 70)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    with workplace():
        trainer = mine(model, tokenizer, list(rows), n)
        if slip := trainer_slip(trainer, linear, words):
            return slip
        if (got := len(trainer.train_dataset)) != n:
            return Slip(f"{got} rows", f"{n} rows", words["all"])
        whole = [
            tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False) for row in rows[:n]
        ]
        read = [list(ids) for ids in trainer.train_dataset["input_ids"]]
        if not all(any(ids[: len(row)] == row for ids in read) for row in whole):  # in any order
            return Slip("other rows", f"the first {n}", words["first"])
        if trainer.args.max_steps > 0:
            return Slip(f"max_steps = {trainer.args.max_steps}", "one pass", words["passes"])
        if trainer.args.num_train_epochs != 1:
            return Slip(f"{trainer.args.num_train_epochs:g} passes", "one pass", words["passes"])
        lora, args = trainer.model.peft_config["default"], trainer.args
        rate = "low" if args.learning_rate < 2e-3 else "high"
        for config, field, wanted, key in (
            (args, "per_device_train_batch_size", 2, "batch"), (args, "gradient_accumulation_steps", 1, "batch"),
            (args, "gradient_checkpointing", False, "checkpointing"),
            (lora, "r", 16, "shape"), (lora, "lora_alpha", 32, "shape"), (args, "learning_rate", 2e-3, rate),
        ):  # fmt: skip
            if not same(got := getattr(config, field), wanted):
                return Slip(f"{field} = {got}", f"{wanted}", words[key])
        return training_slip(trainer, tokenizer, rows[n : n + 16], 24, 0.1, words)


EXERCISES = {
    "01.1": Exercise(
        "Write a prompt that makes SmolLM2 clean up notes",
        _prompt_slip,
        (
            "A chat model imitates what stands in the chat. Show it some notes with their clean "
            "sentences. Two thirds of a note's words are right already, so most of them must stay.",
            "An example is two messages: row['prompt'][-1], by the user, and row['completion'][0], by the assistant.",
            'Start with messages = [{"role": "system", "content": ...}]. For row in examples[:10]: '
            'messages += [row["prompt"][-1], row["completion"][0]]. The note comes last, as a '
            "message of the user.",
        ),
        my_prompt,
        PROMPTS,
        seconds=300,
        difficulty=2,
        minutes=15,
    ),
    "01.2": Exercise(
        "Colour the loss mask: 1 where a token counts",
        lambda mine: first_difference(mine, my_colours, _chat, COLOURS),
        (
            "Walk through the tokens and remember whether you are inside an assistant's answer. What switches that "
            "on, and what switches it off?",
            'The three tokens "<|im_start|>", "assistant", "\\n" get 0 and switch it on. "<|im_end|>" gets 1, since '
            "the model must learn to stop. After it the answer is over.",
            'At place i: if tokens[max(i - 3, 0) : i] == ["<|im_start|>", "assistant", "\\n"], set counts = True. '
            'Append int(counts). If tokens[i] == "<|im_end|>", set counts = False.',
        ),
        my_colours,
        COLOURS,
        difficulty=2,
        minutes=15,
    ),
    "01.3": Exercise(
        "Debug this: the score counts wrong replies as right",
        lambda mine: first_difference(mine, my_contains, _reply, CONTAINS, n=500),
        (
            '"Rs 65" in "Rs 650" is True in Python: it compares letters. What should be compared?',
            "Words. Make both texts lower case, put a space in place of all that is no letter and no digit, and split.",
            "With the two lists of words: any(said[i : i + len(wanted)] == wanted for i in range(len(said))).",
        ),
        my_contains,
        CONTAINS,
        difficulty=1,
        minutes=10,
    ),
    "01.4": Exercise(
        "One arm of the size curve. The check trains it for 24 steps on the small model",
        _arm_slip,
        (
            "It is the SFTTrainer of the training cell above. What gives it the first n rows, and what lets it see "
            "each row once?",
            "Dataset.from_list(rows[:n]) and num_train_epochs=1. Leave max_steps out: with it a small arm repeats "
            "its rows.",
            'SFTConfig("runs/arm", learning_rate=2e-3, per_device_train_batch_size=2, num_train_epochs=1, '
            "gradient_checkpointing=False, use_cpu=True) and LoraConfig(r=16, lora_alpha=32, "
            'target_modules="all-linear"). On a GPU leave use_cpu out.',
        ),
        my_arm,
        ARMS,
        seconds=120,
        difficulty=1,
        minutes=10,
    ),
}

"""Notebook 00: training rows are written; an adapter is saved, put onto a fresh base, and asked."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from ftlab.exercises import training
from ftlab.exercises.core import Exercise, Slip, shown
from ftlab.exercises.differences import first_difference
from ftlab.paths import DATA
from ftlab.tasks.ask import SYSTEM

RANK = 64
BASE, ADAPTER = "base", "my_adapter"  # folders, in a workplace of their own


def my_save_and_ask(model, tokenizer, base, folder, question):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=model.dtype)
    loaded = PeftModel.from_pretrained(fresh, folder)
    messages = [
        {"role": "system", "content": "Write one SQLite query."},
        {"role": "user", "content": question},
    ]
    inputs = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = loaded.generate(**inputs, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- The model that is given ----------------------------------------------------------------------


def base_model() -> tuple:
    """(tokenizer, model): micro in fp32, as if it had been loaded from the folder BASE."""
    tokenizer, model = training.micro()
    model.name_or_path = model.config._name_or_path = BASE  # PEFT writes it beside the adapter
    return tokenizer, model


def adapted() -> tuple:
    """(tokenizer, model): the base with a LoRA adapter that makes it write queries."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    tokenizer, base = base_model()
    every = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, every)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            thin_a, thin_b = _update()[name.removeprefix("base_model.model.")]
            module.lora_A.default.weight.data.copy_(thin_a)
            module.lora_B.default.weight.data.copy_(thin_b)
    return tokenizer, model.eval()


@cache
def _update() -> dict[str, tuple]:
    """Layer -> (A, B): the best B A of rank 64 for what training on `ask` changed in micro's W."""
    import torch
    from torch import nn

    _, before = training.micro()
    _, after = training.micro(str(DATA / "ask_start"))
    trained = dict(after.named_modules())
    found = {}
    for name, layer in before.named_modules():
        if isinstance(layer, nn.Linear):
            change = trained[name].weight.detach() - layer.weight.detach()
            left, values, right = torch.linalg.svd(change, full_matrices=False)
            found[name] = right[:RANK], left[:, :RANK] * values[:RANK]
    return found


def _question(rng: Random) -> str:
    dish = rng.choice(["thai", "dosa", "sushi"])
    city = rng.choice(["Pune", "Kochi", "Delhi"])
    return rng.choice(
        [
            f"Average tip of {dish} orders in {city}?",
            f"How many {dish} orders over {rng.randrange(100, 900)} rupees in {city}?",
            f"Which city had the most {dish} orders over {rng.randrange(100, 900)}?",
            f"How many orders in {city} took more than {rng.randrange(20, 60)} minutes?",
        ]
    )


# --- Wrong answers --------------------------------------------------------------------------------


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _read(tokenizer, messages: list[dict[str, str]], opened: bool = True) -> list[int]:
    """The ids of a prompt; opened: with the words that begin the model's turn."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=opened)["input_ids"]


def _not_opened(tokenizer, question: str) -> list[int]:
    return _read(tokenizer, _messages(question), opened=False)


def _untemplated(tokenizer, question: str) -> list[int]:
    return tokenizer(question)["input_ids"]


def _user_alone(tokenizer, question: str) -> list[int]:
    return _read(tokenizer, _messages(question)[1:])


def _user_first(tokenizer, question: str) -> list[int]:
    return _read(tokenizer, _messages(question)[::-1])


def _swapped(tokenizer, question: str) -> list[int]:
    texts = {"user": SYSTEM, "system": question}
    return _read(tokenizer, [{"role": role, "content": text} for role, text in texts.items()])


def _in_one(tokenizer, question: str) -> list[int]:
    return _read(tokenizer, [{"role": "user", "content": f"{SYSTEM} {question}"}])


PROMPTS = {  # recognised by what the model has read
    "the generation prompt is missing: the template doesn't open the model's turn": _not_opened,
    "the chat template is missing": _untemplated,
    "the system message is missing": _user_alone,
    "the user's message comes before the system's": _user_first,
    "the roles are swapped": _swapped,
    "the instruction is written into the user's message": _in_one,
}


def _said(loaded, tokenizer, ids: list[int], begin: int = 0, special: bool = False, **how) -> str:
    """The answer to a prompt; begin: from how many tokens after its end on; special: with all."""
    import torch

    prompt = torch.tensor([ids])
    asked = {"max_new_tokens": 80, "do_sample": False} | how
    output = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    return tokenizer.decode(output[0, max(0, len(ids) + begin) :], skip_special_tokens=not special)


def _answer(loaded, tokenizer, question: str, **changed) -> str:
    return _said(loaded, tokenizer, _read(tokenizer, _messages(question)), **changed)


def _asking(prompt: Callable) -> Callable:
    """An answer that saves and loads as it should, and gives the model this prompt."""

    def mine(model, tokenizer, base, folder, question):
        loaded = _loaded(model, base, folder)
        return _said(loaded, tokenizer, prompt(tokenizer, question))

    return mine


def _fresh(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def _loaded(model, base, folder):
    from peft import PeftModel

    model.save_pretrained(folder)
    return PeftModel.from_pretrained(_fresh(base), folder)


def _but(**changed) -> Callable:
    """An answer that saves and loads as it should and asks with this changed."""

    def mine(model, tokenizer, base, folder, question):
        return _answer(_loaded(model, base, folder), tokenizer, question, **changed)

    return mine


def _without_adapter(model, tokenizer, base, folder, question):
    model.save_pretrained(folder)
    return _answer(_fresh(base), tokenizer, question)


def _onto_the_given(model, tokenizer, base, folder, question):
    from peft import PeftModel

    model.save_pretrained(folder)
    return _answer(PeftModel.from_pretrained(model, folder), tokenizer, question)


def _onto_a_new_adapter(model, tokenizer, base, folder, question):
    from peft import LoraConfig, PeftModel, get_peft_model

    model.save_pretrained(folder)
    new = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    again = PeftModel.from_pretrained(get_peft_model(_fresh(base), new), folder)
    return _answer(again, tokenizer, question)


def _of_the_given(model, tokenizer, base, folder, question):
    model.save_pretrained(folder)
    return _answer(model, tokenizer, question)


def _elsewhere(model, tokenizer, base, folder, question):
    return _answer(_loaded(model, base, "runs/adapter"), tokenizer, question)


def _merged(model, tokenizer, base, folder, question):
    whole = model.merge_and_unload()
    whole.save_pretrained(folder)
    return _answer(_fresh(folder), tokenizer, question)


def _trained_on(model, tokenizer, base, folder, question):
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(1.01)
    return _answer(_loaded(model, base, folder), tokenizer, question)


def _as_a_list(model, tokenizer, base, folder, question):
    return [my_save_and_ask(model, tokenizer, base, folder, question)]


def _one_question(model, tokenizer, base, folder, question):
    return my_save_and_ask(model, tokenizer, base, folder, "How many late orders in Pune?")


NO_ADAPTER = "this is the base model's answer: the saved adapter isn't on it"
SECOND = "the saved adapter went onto a model that has one already: load a fresh base first"
GIVEN = "the model you were given answered: nothing was loaded"
NOT_SAVED = "nothing is saved in the folder that you were given"
WHOLE = "these files aren't an adapter: was the merged model saved?"
CHANGED = "the adapter's numbers changed before they were saved: nothing is trained here"
DRAWN = "asked twice, it gives two answers: do_sample=False takes the likeliest token"
NO_TEXT = "one text is wanted: decode the tokens of the first (and only) answer"
ONE_QUESTION = "the model read another question: use the argument"

BY_VALUE = {  # recognised by what is returned
    NO_ADAPTER: _without_adapter,
    "the prompt is decoded along: cut it off the output": _but(begin=-10_000),
    "the cut is one token early": _but(begin=-1),
    "the cut is one token late": _but(begin=1),
    "the special tokens are decoded along: skip_special_tokens=True": _but(special=True),
    "it writes on after the end of its turn": _but(min_new_tokens=80),
    "it stops after 20 tokens, as it does where max_new_tokens isn't set": _but(max_new_tokens=20),
}
WRONG = BY_VALUE | {
    **{words: _asking(prompt) for words, prompt in PROMPTS.items()},
    SECOND: _onto_the_given,
    GIVEN: _of_the_given,
    NOT_SAVED: _elsewhere,
    WHOLE: _merged,
    CHANGED: _trained_on,
    DRAWN: _but(do_sample=True, temperature=3.0),
    NO_TEXT: _as_a_list,
    ONE_QUESTION: _one_question,
}


# --- The check ------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the learner's function returned, and what it did besides."""

    value: Any
    files: list[str]  # in the folder that it was given
    wanted: dict[str, Any]  # the adapter's matrices before
    kept: bool  # they are the same in `model` afterwards
    saved: dict[str, Any]  # the matrices in the folder
    second: bool  # an adapter was put onto a model that had one
    asked_given: bool  # `model` itself has read tokens
    read: list[int]  # the ids that a model read first; empty if no nn.Embedding was called


def run(mine: Callable, folder: str, question: str) -> Run:
    """One call of the learner's function, with a model and a folder of its own."""
    tokenizer, model = adapted()
    before, calls = _matrices(model), []
    with warnings.catch_warnings(record=True) as said, _watched(calls):
        warnings.simplefilter("always")
        value = mine(model, tokenizer, BASE, folder, question)
    return Run(
        value=value,
        files=sorted(path.name for path in Path(folder).glob("*")),
        wanted=before,
        kept=_equal(before, _matrices(model)),
        saved=_saved(Path(folder)),
        second=any("multiple adapters" in str(warning.message) for warning in said),
        asked_given=any(module is model.get_input_embeddings() for module, _ in calls),
        read=calls[0][1] if calls else [],
    )


@contextlib.contextmanager
def _watched(calls: list[tuple]) -> Iterator[None]:
    """Notes each call of an nn.Embedding inside: the module, and the first row of ids."""
    from torch import nn

    def note(module, inputs) -> None:
        if isinstance(module, nn.Embedding):
            calls.append((module, inputs[0].reshape(-1, inputs[0].shape[-1])[0].tolist()))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _matrices(model) -> dict[str, Any]:
    """The adapter's matrices, copied, under the names by which PEFT saves them."""
    found = {}
    for name, weight in model.named_parameters():
        if "lora_" in name:
            found[name.replace(".default", "")] = weight.detach().clone()
    return found


def _saved(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    return load_file(file) if file.exists() else {}


def _equal(one: dict, other: dict) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _slip_of(run: Run, question: str) -> Slip | None:
    """What is wrong with the run, apart from the words of the answer."""
    if run.second:
        return Slip("a second adapter", "the saved one, on a model without any", SECOND)
    if not run.files:
        return Slip("an empty folder", "the adapter's config and weights in it", NOT_SAVED)
    if not run.saved:
        return Slip(", ".join(run.files), "adapter_model.safetensors among them", WHOLE)
    if not (run.kept and _equal(run.wanted, run.saved)):
        return Slip("other numbers in the adapter", "those that you were given", CHANGED)
    if run.asked_given:
        return Slip("an answer of `model` itself", "one of the model that you loaded", GIVEN)
    if not isinstance(run.value, str):
        kind = type(run.value).__name__
        return Slip(f"{shown(run.value)} ({kind})", "a text", NO_TEXT)
    return _slip_of_prompt(run.read, question)


def _slip_of_prompt(read: list[int], question: str) -> Slip | None:
    """What is wrong with the ids that the model read; of none there is nothing to say."""
    tokenizer, _ = base_model()
    wanted = _read(tokenizer, _messages(question))
    if read in ([], wanted):
        return None
    named = (words for words, wrong in PROMPTS.items() if wrong(tokenizer, question) == read)
    got, right = tokenizer.decode(read), tokenizer.decode(wanted)
    likely = next(named, "") if question in got else ONE_QUESTION
    return Slip(f"the prompt {got!r}", f"the prompt {right!r}", likely, shown(question))


def verify(mine: Callable) -> Slip | None:
    """The wanted answers are those of the given model itself, through `ftlab.answers`."""
    from ftlab.evaluate import answers

    rng = Random()
    questions = [_question(rng) for _ in range(4)]
    tokenizer, model = adapted()
    wanted = answers(model, tokenizer, [_messages(question) for question in questions])
    with training.workplace():
        tokenizer.save_pretrained(BASE)
        base_model()[1].save_pretrained(BASE)
        for number, (question, right) in enumerate(zip(questions, wanted, strict=True)):
            found = run(mine, f"{ADAPTER}_{number}", question)
            if slip := _slip_of(found, question):
                return slip
            if found.value != right:
                likely = _likely(mine, found.value, question)
                return Slip(shown(found.value), shown(right), likely, shown(question))
    return None


def _likely(mine: Callable, value: str, question: str) -> str:
    """The known mistake that gives this value."""
    for number, (words, wrong) in enumerate(BY_VALUE.items()):
        if run(wrong, f"wrong_{number}", question).value == value:
            return words
    return "" if run(mine, "once_more", question).value == value else DRAWN


# --- 00.2: training rows --------------------------------------------------------------------------


def my_rows(pairs, instruction):
    rows = []
    for question, query in pairs:
        prompt = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": question},
        ]
        completion = [{"role": "assistant", "content": query}]
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def _changed(change: Callable) -> Callable:
    """my_rows with a change in each row."""

    def mine(pairs, instruction):
        rows = my_rows(pairs, instruction)
        return [change(row) for row in rows]

    return mine


def _plain_texts(row: dict) -> dict:
    return {"prompt": row["prompt"][1]["content"], "completion": row["completion"][0]["content"]}


def _plain_completion(row: dict) -> dict:
    return row | {"completion": row["completion"][0]["content"]}


def _no_list(row: dict) -> dict:
    return row | {"completion": row["completion"][0]}


def _without_system(row: dict) -> dict:
    return row | {"prompt": row["prompt"][1:]}


def _user_before_system(row: dict) -> dict:
    return row | {"prompt": row["prompt"][::-1]}


def _answer_in_prompt(row: dict) -> dict:
    return row | {"prompt": row["prompt"] + row["completion"]}


def _one_conversation(row: dict) -> dict:
    return {"messages": row["prompt"] + row["completion"]}


def _completion_of_the_user(row: dict) -> dict:
    return row | {"completion": [row["completion"][0] | {"role": "user"}]}


def _first_pair(pairs, instruction):
    return my_rows(pairs[:1], instruction)


def _one_row(pairs, instruction):
    return my_rows(pairs, instruction)[0]


def _house_instruction(pairs, instruction):
    return my_rows(pairs, SYSTEM)


def _pairs(rng: Random) -> tuple:
    """(pairs, instruction), two or three pairs."""
    pairs = []
    for _ in range(rng.randint(2, 3)):
        city, minutes = rng.choice(["Pune", "Kochi", "Delhi"]), rng.randrange(20, 60)
        query = f"SELECT COUNT(*) FROM orders WHERE minutes>{minutes} AND city='{city}'"
        pairs.append((f"How many orders in {city} took more than {minutes} minutes?", query))
    return pairs, rng.choice(["Answer in SQL.", "Write one query.", "One SQLite query, please."])


WRONG_ROWS = {
    "messages are wanted, each with a role: the trainer applies the chat template": _changed(
        _plain_texts
    ),
    "the completion is a list of messages too, here of one": _changed(_plain_completion),
    "the completion is one message: put it into a list": _changed(_no_list),
    "the system's message with the instruction is missing": _changed(_without_system),
    "the system's message comes first": _changed(_user_before_system),
    "the answer stands in the prompt too: the model would read what it has to write": _changed(
        _answer_in_prompt
    ),
    "one list of messages: then all tokens count in the loss, the question's too": _changed(
        _one_conversation
    ),
    "the answer is the assistant's": _changed(_completion_of_the_user),
    "only the first pair became a row": _first_pair,
    "a list of rows is wanted, one a pair": _one_row,
    "the instruction is an argument": _house_instruction,
}


# --- The exercises --------------------------------------------------------------------------------

EXERCISES = {
    "00.1": Exercise(
        "Save an adapter, put it onto a fresh base, and ask it a question",
        verify,
        (
            "Two folders are loaded to get one model: that of the base, and then, onto it, that of "
            "the adapter. An answer takes three steps: template, generate, decode.",
            "`model.save_pretrained(folder)` of a PEFT model saves the adapter alone. Then "
            "AutoModelForCausalLM.from_pretrained, PeftModel.from_pretrained, "
            "tokenizer.apply_chat_template(..., add_generation_prompt=True), generate, decode.",
            "fresh = AutoModelForCausalLM.from_pretrained(base); loaded = "
            "PeftModel.from_pretrained(fresh, folder). generate returns the prompt and the answer "
            'in one row: cut off the first inputs["input_ids"].shape[1] tokens.',
        ),
        my_save_and_ask,
        WRONG,
        seconds=60,
        difficulty=2,
        minutes=12,
    ),
    "00.2": Exercise(
        "Make training rows for SFTTrainer",
        lambda mine: first_difference(mine, my_rows, _pairs, WRONG_ROWS),
        (
            "A row is a dict with two keys, prompt and completion. Each holds a list of messages.",
            'A message is a dict: {"role": "system", "content": instruction}. The prompt has two, '
            "the completion one.",
            'rows.append({"prompt": [..., {"role": "user", "content": question}], "completion": '
            '[{"role": "assistant", "content": query}]})',
        ),
        my_rows,
        WRONG_ROWS,
        difficulty=1,
        minutes=5,
    ),
}

"""Notebook 01: a score that an untouched note can't pass, prompts with examples and pages, a schema, a loss mask."""

import copy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from random import Random
from statistics import fmean
from typing import Any

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same, shown
from ftlab.exercises.differences import first_difference
from ftlab.paths import DATA, EXPERIMENTS
from ftlab.tasks import tidy

# --- 01.1: debug a score that a note passes untouched -----------------------------------------------------------------


def my_gain(answer, note, clean):
    from ftlab.tasks import tidy

    before = tidy.words_right(note, clean)
    if before == 1:
        return None
    return (tidy.words_right(answer, clean) - before) / (1 - before)


def _gain(value: Callable[[float, float], float | None], clean_already: float | None = None) -> Callable:
    """value(words right after, before); and what a note is worth that was clean already."""

    def gain(answer, note, clean):
        after, before = tidy.words_right(answer, clean), tidy.words_right(note, clean)
        return clean_already if before == 1 else value(after, before)

    return gain


def _changed(answer, note, clean):
    before = tidy.words_right(note, clean)
    return None if before == 1 else 1 - tidy.words_right(answer, note)


def _exact(answer, note, clean):
    return None if note == clean else float(answer == clean)


GAINS = {
    AS_GIVEN: lambda answer, note, clean: tidy.words_right(answer, clean),
    "the clean sentence must get 1: divide by what there was to gain, 1 - words_right(note, clean)": _gain(
        lambda after, before: after - before),
    "divide by what was wrong in the note, not by what was right": _gain(
        lambda after, before: (after - before) / before),
    "an answer that spoils right words must cost something: don't cut off at 0": _gain(
        lambda after, before: max(0.0, (after - before) / (1 - before))),
    "that counts what was changed, whether it was wrong or right": _changed,
    "half of the way is worth a half: all or nothing throws that away": _exact,
    "a note that is clean already can't tell a good answer from none: None, so that it is left out": _gain(
        lambda after, before: (after - before) / (1 - before), clean_already=0.0),
    "such a note is passed untouched: None, not 1": _gain(
        lambda after, before: (after - before) / (1 - before), clean_already=1.0),
}  # fmt: skip


def _tidied(rng: Random) -> tuple[str, str, str]:
    """An answer, a note and its clean sentence: some words of the note are wrong, and some of these in the answer."""
    words = ["the", "order", "came", "late", "again", "and", "nobody", "called", "me", "back", "today"]
    clean = rng.sample(words, rng.randint(5, 9))
    wrong = rng.sample(range(len(clean)), rng.choice([0, 1, 2, 3]))
    note = [f"{word}x" if i in wrong else word for i, word in enumerate(clean)]
    answer = list(note)
    for i in rng.sample(wrong, rng.randint(0, len(wrong))):
        answer[i] = clean[i]
    if rng.random() < 0.4:  # what was right is spoiled too
        answer[rng.randrange(len(answer))] = "oops"
    answer += ["well", "then"] * (rng.random() < 0.2)
    return " ".join(answer), " ".join(note), " ".join(clean)


# --- 01.2: a prompt that does the work of training --------------------------------------------------------------------


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


# --- 01.3: the form of an answer, as a schema -------------------------------------------------------------------------


def my_format(reasons):
    order_id = {"anyOf": [{"type": "string", "pattern": "^[0-9]{6}$"}, {"type": "null"}]}
    schema = {
        "type": "object",
        "properties": {
            "reason": {"enum": reasons},
            "order_id": order_id,
            "quote": {"type": "string", "maxLength": 80},
        },
        "required": ["reason", "order_id", "quote"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "complaint", "strict": True, "schema": schema}}


def _schema(change: Callable[[dict], Any]) -> Callable:
    """The right format, after a change of its schema."""

    def made(reasons):
        told = my_format(reasons)
        change(told["json_schema"]["schema"])
        return told

    return made


def _order_id(**field: Any) -> Callable:
    return _schema(lambda schema: schema["properties"].update(order_id=field))


_DIGITS, _NULL = {"type": "string", "pattern": "^[0-9]{6}$"}, {"type": "null"}
FORMATS = {
    'that is the schema alone: it goes into {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}': (
        lambda reasons: my_format(reasons)["json_schema"]["schema"]),
    "json_object asks for any object, whatever its keys": lambda reasons: {"type": "json_object"},
    "the schema needs a name beside it": lambda reasons: {
        "type": "json_schema", "json_schema": {"strict": True, "schema": my_format(reasons)["json_schema"]["schema"]}},
    "a list or a number passes: the schema's own type is object": _schema(lambda schema: schema.pop("type")),
    "a key may be left out: name all three under required": _schema(lambda schema: schema.pop("required")),
    "a key that nobody asked for passes: additionalProperties is False": _schema(
        lambda schema: schema.pop("additionalProperties")),
    "any text passes as a reason: enum lists those that there are": _schema(
        lambda schema: schema["properties"].update(reason={"type": "string"})),
    "the reasons are those of the list that comes in, not of one that you wrote": _schema(
        lambda schema: schema["properties"].update(reason={"enum": ["late", "cold"]})),
    "seven digits pass: without ^ and $ a pattern may match anywhere": _order_id(
        anyOf=[_DIGITS | {"pattern": "[0-9]{6}"}, _NULL]),
    "any text passes as an order number: its pattern is ^[0-9]{6}$": _order_id(anyOf=[{"type": "string"}, _NULL]),
    "an order number is text: as a number it loses its leading zeros": _order_id(anyOf=[{"type": "integer"}, _NULL]),
    "a ticket without an order number has to get null, or the model makes one up": _order_id(**_DIGITS),
    "the text null isn't null: the second form has the type null": _order_id(anyOf=[_DIGITS, {"enum": ["null"]}]),
    "a quote has no end: maxLength is 80": _schema(
        lambda schema: schema["properties"].update(quote={"type": "string"})),
    "a quote is text, and a number passes": _schema(
        lambda schema: schema["properties"].update(quote={"maxLength": 80})),
    '"strict": True stands beside the name: without it a hosted server may write another form': lambda reasons: {
        "type": "json_schema", "json_schema": my_format(reasons)["json_schema"] | {"strict": False}},
}  # fmt: skip


def _complaints(rng: Random, reasons: list[str]) -> list[tuple[Any, bool, str]]:
    """Objects, whether the schema must let them pass, and what it means if it doesn't do so."""
    keys = ("schema", "object", "name", "type", "required", "more", "enum", "list", "anchors", "pattern", "number",
            "null", "word", "long", "text", "strict")  # fmt: skip
    words = dict(zip(keys, FORMATS, strict=True))
    digits = "".join(rng.choices("0123456789", k=6))
    good = {"reason": rng.choice(reasons), "order_id": digits, "quote": "my dal was cold"}
    without = [({k: v for k, v in good.items() if k != key}, False, words["required"]) for key in good]
    return [
        (good | {"order_id": int("7" + digits[1:])}, False, words["number"]),
        (good | {"order_id": "0" + digits[1:]}, True, words["number"]),
        (good | {"order_id": "RR-12"}, False, words["pattern"]),
        (good | {"order_id": digits[:5]}, False, words["pattern"]),
        (good | {"order_id": digits + "7"}, False, words["anchors"]),
        (good | {"order_id": "no " + digits}, False, words["anchors"]),
        (good | {"order_id": "null"}, False, words["word"]),
        (good | {"order_id": None}, True, words["null"]),
        *((good | {"reason": reason}, True, words["list"]) for reason in reasons),
        (good | {"reason": "no such reason"}, False, words["enum"]),
        ("late", False, words["type"]),
        ([good], False, words["type"]),
        *without,
        (good | {"city": "Pune"}, False, words["more"]),
        (good | {"quote": 7}, False, words["text"]),
        (good | {"quote": "x" * 80}, True, words["long"]),
        (good | {"quote": "x" * 81}, False, words["long"]),
    ]


def _format_slip(mine: Callable) -> Slip | None:
    """The outer form; then which objects pass, by the library `jsonschema`."""
    import jsonschema

    words = list(FORMATS)
    rng = Random()
    for _ in range(3):
        reasons = rng.sample(["late", "cold", "missing", "wrong", "payment", "rider", "other"], rng.randint(3, 5))
        told = mine(list(reasons))
        if not isinstance(told, dict):
            return Slip(f"a {type(told).__name__}", "a dict", "response_format is a dict")
        if told.get("type") != "json_schema":
            likely = words[1] if told.get("type") == "json_object" else words[0]
            return Slip(shown(told), '{"type": "json_schema", "json_schema": ...}', likely)
        inner = told.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            return Slip(shown(told), '{"name": ..., "schema": ...} under json_schema', words[0])
        if not isinstance(inner.get("name"), str) or not inner["name"]:
            return Slip(f"json_schema has the keys {sorted(inner)}", "name, strict and schema", words[2])
        if inner.get("strict") is not True:
            return Slip(f'"strict" is {inner.get("strict")}', '"strict": True', words[-1])
        try:
            jsonschema.Draft202012Validator.check_schema(inner["schema"])
        except jsonschema.SchemaError as error:
            return Slip(f"no JSON schema: {error.message}", "one", "look at where a bracket ends")
        errors = jsonschema.Draft202012Validator(inner["schema"]).iter_errors
        for value, wanted, likely in _complaints(rng, reasons):
            places = [list(error.absolute_path)[:1] for error in errors(value)]
            if bool(places) == wanted:
                likely = words[7] if wanted and ["reason"] in places else likely
                verb = {True: "passes", False: "is refused"}
                return Slip(f"{shown(value)} {verb[not wanted]}", f"it {verb[wanted]}", likely, f"reasons = {reasons}")
    return None


# --- 01.4: a prompt with pages ----------------------------------------------------------------------------------------


def my_reader(question, passages, limit):
    taken, words = [], 0
    for passage in passages:
        text = f"[{passage['page']}] {passage['text']}"
        if text in taken:
            continue
        words += len(passage["text"].split())
        if words > limit:
            break
        taken.append(text)
    if not taken:
        return None
    system = "Answer from the pages and name the page in brackets. If they don't say, answer: not found."
    user = "\n\n".join([*taken, f"Question: {question}"])
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _reader(
    fits: Callable[[list[dict], int], list[dict]] | None = None,
    text: Callable[[dict], str] = lambda passage: f"[{passage['page']}] {passage['text']}",
    order: Callable[[list[str], str], list[str]] = lambda texts, question: [*texts, question],
    ask_anyway: bool = False,
) -> Callable:
    """The right prompt, but for which passages it takes, how one is written, and where the question stands."""

    def prompt(question, passages, limit):
        taken = (fits or _fits)(passages, limit)
        if not taken and not ask_anyway:
            return None
        user = "\n\n".join(order([text(passage) for passage in taken], f"Question: {question}"))
        return [{"role": "system", "content": "Answer from the pages."}, {"role": "user", "content": user}]

    return prompt


def _fits(passages: list[dict], limit: int, size: Callable = lambda text: len(text.split()), skip: bool = False,
          once: bool = True) -> list[dict]:  # fmt: skip
    taken: list[dict] = []
    for passage in passages:
        if once and passage in taken:
            continue
        if sum(size(one["text"]) for one in [*taken, passage]) > limit:
            if skip:
                continue
            break
        taken.append(passage)
    return taken


def _cut(passages: list[dict], limit: int) -> list[dict]:
    taken = _fits(passages, 10**9)
    whole = _fits(passages, limit)
    left = limit - sum(len(one["text"].split()) for one in whole)
    rest = [taken[len(whole)]] if len(whole) < len(taken) and left > 0 else []
    return whole + [one | {"text": " ".join(one["text"].split()[:left])} for one in rest]


READERS = {
    "the limit isn't kept: a prompt has room for so many words only": _reader(
        lambda passages, _: _fits(passages, 10**9)),
    "a passage is cut in the middle: the answer may stand in the other half": _reader(_cut),
    "the limit counts words, not characters": _reader(lambda passages, limit: _fits(passages, limit, size=len)),
    "a passage that came later was taken although a better one didn't fit: stop there": _reader(
        lambda passages, limit: _fits(passages, limit, skip=True)),
    "the same passage stands there twice: it costs twice and says nothing new": _reader(
        lambda passages, limit: _fits(passages, limit, once=False)),
    "without its page in brackets no answer can be traced": _reader(text=lambda passage: passage["text"]),
    "the question comes last, after the pages": _reader(order=lambda texts, question: [question, *texts]),
    "the best passage comes first, as the search gave them": _reader(
        order=lambda texts, question: [*texts[::-1], question]),
    "nothing was found: return None, so that nobody asks the model to guess": _reader(ask_anyway=True),
    "the question is missing": _reader(order=lambda texts, question: texts),
    "a blank line parts the passages": _reader(
        order=lambda texts, question: ["\n".join([*texts, question])]),
    "two messages are wanted: the system's instruction, then the user's pages and question": (
        lambda question, passages, limit: (_reader()(question, passages, limit) or [None])[-1:]),
}  # fmt: skip


def _search(rng: Random) -> tuple[str, list[dict], int]:
    words = ["refunds", "leave", "within", "two", "days", "of", "the", "order", "if", "a", "lead", "agrees"]
    found = [
        {"page": f"{rng.randrange(10, 99)}-{rng.choice(['refunds', 'riders', 'late'])}",
         "text": " ".join(rng.choices(words, k=rng.randint(2, 9)))}
        for _ in range(rng.choice([0, 2, 3, 4, 5]))
    ]  # fmt: skip
    if found and rng.random() < 0.4:
        found.insert(rng.randint(1, len(found)), dict(found[0]))
    question = f"How many {rng.choice(['days', 'orders', 'leads'])} may pass?"
    return question, found, rng.randint(4, 24)


def _same_prompt(got: Any, wanted: Any) -> bool:
    """Equal but for the words of the system message, which are the learner's own."""

    def plain(prompt: Any) -> Any:
        first = prompt[0] if isinstance(prompt, list) and prompt else None
        if isinstance(first, dict) and first.get("role") == "system" and str(first.get("content") or "").strip():
            return [first | {"content": "an instruction"}, *prompt[1:]]
        return prompt

    return same(plain(got), plain(wanted))


# --- 01.5: colour the loss mask ---------------------------------------------------------------------------------------


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


EXERCISES = {
    "01.1": Exercise(
        "Debug this: a note that nobody touched passes",
        lambda mine: first_difference(mine, my_gain, _tidied, GAINS, n=150),
        (
            "What does the untouched note score by words_right? That is where 0 has to be.",
            "after - before is 0 for the untouched note. For the clean sentence it is 1 - before: that must become 1.",
            "before = tidy.words_right(note, clean). If before == 1, return None. Else return (after - before) / (1 - "
            "before), where after = tidy.words_right(answer, clean).",
        ),
        my_gain,
        GAINS,
        difficulty=1,
        minutes=10,
    ),
    "01.2": Exercise(
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
    "01.3": Exercise(
        "Write the form of an answer as a schema",
        _format_slip,
        (
            "Three layers: what the API wants, the object with its keys, and the value of each key. Which objects must "
            "the schema refuse?",
            'An object: {"type": "object", "properties": {...}, "required": [...], "additionalProperties": False}. A '
            'value: {"enum": [...]}, or {"type": "string", "pattern": ...}; {"anyOf": [..., {"type": "null"}]} lets '
            "null pass too.",
            'reason: {"enum": reasons}. order_id: {"anyOf": [{"type": "string", "pattern": "^[0-9]{6}$"}, {"type": '
            '"null"}]}. quote: {"type": "string", "maxLength": 80}. Return {"type": "json_schema", "json_schema": '
            '{"name": "complaint", "strict": True, "schema": schema}}.',
        ),
        my_format,
        FORMATS,
        difficulty=2,
        minutes=10,
    ),
    "01.4": Exercise(
        "Write the prompt that reads what a search has found",
        lambda mine: first_difference(mine, my_reader, _search, READERS, n=150, equal=_same_prompt),
        (
            "Walk through the passages from the best one on, and count words. When do you stop, and when is there "
            "nothing to ask?",
            "f\"[{passage['page']}] {passage['text']}\" is one passage. Leave out a text that you have taken already. "
            "Stop where the next one would go over the limit.",
            'user = "\\n\\n".join([*taken, f"Question: {question}"]). Return None if taken is empty, else a system '
            "message and this one.",
        ),
        my_reader,
        READERS,
        difficulty=2,
        minutes=15,
    ),
    "01.5": Exercise(
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
}

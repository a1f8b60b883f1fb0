"""Notebook 08: a run for `trl sft`, the keys that vanish, the mask and the loop of tool calls."""

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from random import Random
from typing import Any

from ftlab.exercises import training
from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same, shown
from ftlab.exercises.differences import first_difference
from ftlab.exercises.learner import said
from ftlab.paths import DATA

# --- 08.1: you train, from the command line ---------------------------------------------------------------------------

MY_YAML = '''my_yaml = """
model_name_or_path: ../data/micro/model
datasets:
- path: json
  data_files: ../data/ask/train.jsonl
  split: train[:48]
output_dir: runs/exercise
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
learning_rate: 1.0e-3
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 4
seed: 0
logging_steps: 1
report_to: none
gradient_checkpointing: false
bf16: false
use_cpu: true
"""
'''
SETTINGS = {  # place in parse_args_and_config's result, field: what it should be, a mistake, what to say of it
    (2, "use_peft"): (True, False, "use_peft: true is missing; without it TRL trains all weights and ignores lora_r"),
    (2, "lora_dropout"): (0.0, 0.05, "`trl sft` drops out 5 % of LoRA's inputs unless you write lora_dropout: 0.0"),
    (2, "lora_r"): (8, 16, "the rank is 8"),
    (2, "lora_alpha"): (16, 32, "lora_alpha is 16, twice the rank"),
    (2, "lora_target_modules"): (
        ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear", "LoRA goes on the four attention layers only"),
    (1, "learning_rate"): (1e-3, 2e-5, "the learning rate is 1e-3; TRL's own, 2e-5, is made for all weights"),
    (1, "per_device_train_batch_size"): (2, 4, "2 rows go through the model at a time"),
    (1, "gradient_accumulation_steps"): (2, 1, "2 such batches make a step: gradient_accumulation_steps"),
    (1, "max_steps"): (4, 8, "the run has 4 steps"),
    (1, "seed"): (0, 42, "the seed is 0; TRL's own is 42, and it decides the order of the rows"),
    (1, "use_cpu"): (True, False, "use_cpu: true is missing: without a command line the YAML must say it"),
    (1, "bf16"): (False, True, "bf16: false is missing; TRL computes in bf16 unless told otherwise"),
    (1, "gradient_checkpointing"): (
        False, True, "gradient_checkpointing: false is missing; TRL computes activations twice unless told otherwise"),
    (1, "logging_steps"): (1, 10, "logging_steps: 1 is missing, so most losses are never written down"),
}  # fmt: skip
OTHER = "the model is micro: model_name_or_path: ../data/micro/model"
FILE, ROWS = "the rows are those of ../data/ask/train.jsonl", "the rows are the first 48: split: train[:48]"
TYPO = "trl sft refuses a key that it does not know, and names it: read its last line"


def _parsed(text: str) -> tuple:
    """What `trl sft --config` makes of a YAML text; the last entry are the keys that it does not know."""
    import pathlib
    import tempfile

    from trl.scripts.sft import make_parser

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return make_parser().parse_args_and_config(["--config", str(file)], return_remaining_strings=True)


def _changed(**said: object) -> str:
    """The solution's YAML with keys changed; None takes one out."""
    import yaml

    config = yaml.safe_load(MY_YAML.split('"""')[1]) | said
    return yaml.safe_dump({key: value for key, value in config.items() if value is not None})


def _losses(model, args, lora, rows) -> list[float]:
    """The losses of a run whose seed is set first, before lora_A is drawn."""
    from transformers import AutoTokenizer, set_seed
    from trl import SFTTrainer

    set_seed(args.seed)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=rows, peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(training.MICRO),
    )  # fmt: skip
    training.train_quietly(trainer, args.max_steps)
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@cache
def _wanted_losses() -> tuple[float, ...]:
    """TRL's trainer, told the same in Python."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig

    rows = load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split="train[:48]")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    args = SFTConfig(
        "runs", learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, seed=0,
        logging_steps=1, report_to="none", gradient_checkpointing=False, bf16=False, use_cpu=True,
    )  # fmt: skip
    return tuple(_losses(training.micro()[1], args, lora, rows))


def _yaml_slip(text: Any) -> Slip | None:
    import yaml
    from trl import get_dataset, get_peft_config

    if not isinstance(text, str):
        return Slip(shown(text), "the text of a YAML file", "write it between triple quotes")
    try:
        said = yaml.safe_load(text)
        _, args, told, mixture, unknown = _parsed(text)
    except Exception as error:  # what yaml or TRL's parser says of it
        return Slip(f"{type(error).__name__}: {error}"[:200], "a YAML mapping that `trl sft` can read", "")
    except SystemExit:
        return Slip("a value that `trl sft` cannot read", "values as in the notebook's file", "")
    if unknown:
        return Slip(f"the key {unknown[0].lstrip('-')}", "a key of TRL's", TYPO)
    if not str(told.model_name_or_path).endswith("data/micro/model"):
        return Slip(f"model_name_or_path: {told.model_name_or_path}", "../data/micro/model", OTHER)
    if len(mixture.datasets) != 1 or not str(mixture.datasets[0].data_files).endswith("ask/train.jsonl"):
        return Slip(f"datasets: {said.get('datasets')}", "path: json, data_files: ../data/ask/train.jsonl", FILE)
    for (place, field), (wanted, _, words) in SETTINGS.items():
        got = getattr((None, args, told)[place], field)
        if not same(
            sorted(got) if isinstance(got, list) else got, sorted(wanted) if isinstance(wanted, list) else wanted
        ):
            return Slip(f"{field} = {got!r}", repr(wanted), words)
    mixture.datasets[0].data_files = str(DATA / "ask" / "train.jsonl")  # wherever the learner's notebook lies
    with training.workplace():
        rows = get_dataset(mixture)["train"]
        losses = _losses(training.micro()[1], args, get_peft_config(told), rows)
        wanted = list(_wanted_losses())
    if not same(losses, wanted, rtol=1e-5):
        return Slip(f"losses {shown(losses)}", shown(wanted), ROWS if len(rows) != 48 else "")
    return None


YAMLS: Mapping[str, str] = {
    **{words: _changed(**{field: mistake}) for (_, field), (_, mistake, words) in SETTINGS.items()},
    TYPO: _changed(learning_rate=None, learning_rat=1e-3),
    OTHER: _changed(model_name_or_path="../data/ask_start"),
    FILE: _changed(datasets=[{"path": "json", "data_files": "../data/tidy/train.jsonl", "split": "train[:48]"}]),
    ROWS: _changed(
        datasets=[{"path": "json", "data_files": "../data/ask/train.jsonl", "split": "train[:96]"}]),
}  # fmt: skip


# --- 08.2: debug this -------------------------------------------------------------------------------------------------


def my_dropped_keys(config, top, inner):
    dropped = [key for key in config if key not in top]
    for i, dataset in enumerate(config["datasets"]):
        dropped += [f"datasets[{i}].{key}" for key in dataset if key not in inner]
    return dropped


def _inside(config, inner, name: str = "datasets[{}].{}", most: int = 9) -> list[str]:
    entries = list(enumerate(config["datasets"]))[:most]
    return [name.format(i, key) for i, entry in entries for key in entry if key not in inner]


DROPPED = {
    AS_GIVEN: lambda config, top, inner: [key for key in config if key not in top + inner],
    "a key of a dataset is not known at the top: compare with top alone": lambda config, top, inner: [
        key for key in config if key not in top + inner] + _inside(config, inner),
    "the entries of datasets have keys too: look at them": lambda config, top, inner: [
        key for key in config if key not in top],
    "an entry of datasets is compared with inner, not with top": lambda config, top, inner: [
        key for key in config if key not in top] + _inside(config, top),
    "only the first entry of datasets is looked at": lambda config, top, inner: [
        key for key in config if key not in top] + _inside(config, inner, most=1),
    'the place is missing: "datasets[0].typ"': lambda config, top, inner: [
        key for key in config if key not in top] + _inside(config, inner, "{1}"),
}  # fmt: skip


def _configs(rng: Random) -> tuple:
    top = ["base_model", "datasets", "lr_scheduler", "num_epochs", "micro_batch_size", "lora_r", "sequence_len"]
    inner = ["path", "type", "split", "ds_type", "shards"]
    config = dict.fromkeys(rng.sample([key for key in top if key != "datasets"], 4), 1)
    config |= dict.fromkeys(rng.sample(["lr_schedular", "num_train_epochs", "lora_rank", "max_length"], 2), 1)
    config |= {rng.choice(["type", "split", "shards"]): 1}  # known in a dataset only
    entry = {"path": "train.jsonl", "type": "input_output"}
    others = [entry | {rng.choice(["typ", "splitt", "sequence_len"]): 1} for _ in range(rng.choice([2, 3]))]
    config["datasets"] = [entry | {"dstype": "json"}, *others]
    return config, top, inner


def _same_names(got, wanted) -> bool:
    """The same names, in any order."""
    lists = all(isinstance(names, list | tuple) for names in (got, wanted))
    return lists and sorted(map(str, got)) == sorted(map(str, wanted))


# --- 08.3: the assistant's mask ---------------------------------------------------------------------------------------


def my_assistant_mask(input_ids, opening, end):
    mask, counts = [], False
    for t, token in enumerate(input_ids):
        mask.append(int(counts))
        begins = input_ids[max(0, t + 1 - len(opening)) : t + 1] == opening
        counts = begins or (counts and token != end)
    return mask


def _mask_with(change: Callable) -> Callable:
    """my_assistant_mask, then change(mask, input_ids, opening, end)."""
    return lambda input_ids, opening, end: change(my_assistant_mask(input_ids, opening, end), input_ids, opening, end)


def _spans(mask: list[int]) -> list[tuple[int, int]]:
    """(begin, end) of each run of ones."""
    edges = [t for t in range(len(mask) + 1) if ([0, *mask, 0][t]) != ([0, *mask, 0][t + 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _spans_alone(mask: list[int], wanted: list[tuple[int, int]]) -> list[int]:
    return [int(any(begin <= t < end for begin, end in wanted)) for t in range(len(mask))]


def _opening_too(mask, input_ids, opening, end):
    return _spans_alone(mask, [(begin - len(opening), stop) for begin, stop in _spans(mask)])


def _without_end(mask, input_ids, opening, end):
    return [bit * int(token != end) for bit, token in zip(mask, input_ids, strict=True)]


def _whole_turns_only(mask, input_ids, opening, end):
    return _spans_alone(mask, [span for span in _spans(mask) if input_ids[span[1] - 1] == end])


def _every_turn(input_ids, opening, end):
    """Every turn that begins with the first id of an opening: the question and the rows count too."""
    mask, since = [0] * len(input_ids), None
    for t, token in enumerate(input_ids):
        mask[t] = int(since is not None and t >= since + len(opening))
        if token == opening[0]:
            since = t
        if token == end:
            since = None
    return mask


MASKS = {
    "the rows of the tool count too: only a turn that begins with the whole opening is the assistant's": _every_turn,
    "the opening counts: it is given at generation, so the loss begins after it": _mask_with(_opening_too),
    "the end of turn is left out, so the model never learns to stop": _mask_with(_without_end),
    "only the first turn of the assistant counts: the answer is one too": _mask_with(
        lambda mask, *_: _spans_alone(mask, _spans(mask)[:1])),
    "only the last turn of the assistant counts: the call is one too": _mask_with(
        lambda mask, *_: _spans_alone(mask, _spans(mask)[-1:])),
    "all after the first opening counts: stop at the end of the turn": _mask_with(
        lambda mask, *_: [int(1 in mask[: t + 1]) for t in range(len(mask))]),
    "a last turn that is cut off has no end, and counts as well": _mask_with(_whole_turns_only),
    "0 and 1 are swapped: 1 is what counts": _mask_with(lambda mask, *_: [1 - bit for bit in mask]),
    "these are labels (ids and -100): a mask holds 0 and 1": _mask_with(
        lambda mask, input_ids, *_: [i if bit else -100 for i, bit in zip(input_ids, mask, strict=True)]),
}  # fmt: skip


def _conversation_ids(rng: Random) -> tuple[list[int], list[int], int]:
    """A system message, a question, one or two calls with their rows, an answer, which may be cut off."""
    end, more = rng.choice([2, 34]), rng.choice([[], [35]])  # an opening has three ids or four
    roles = {role: [1, i, 9, *more] for i, role in enumerate(("system", "user", "assistant", "tool"), start=30)}
    turns = ["system", "user", *["assistant", "tool"] * rng.randint(1, 2), "assistant"]
    ids = []
    for role in turns:
        text = [rng.choice([9, 32, *range(3, 30)]) for _ in range(rng.randint(2, 6))]
        text[1:1] = roles["assistant"][1:] if role == "user" else []  # the end of an opening is none
        ids += [*roles[role], *text, end]
    return ids[:-1] if rng.random() < 0.3 else ids, roles["assistant"], end


# --- 08.4: the loop ---------------------------------------------------------------------------------------------------


def my_tool_loop(say, tools, messages, most=4):
    import json

    def observed(call):
        name = call["function"]["name"]
        if name not in tools:
            return f"error: there is no tool {name!r}; the tools are {', '.join(tools)}"
        try:
            return tools[name](**json.loads(call["function"]["arguments"]))
        except Exception as error:  # no JSON, other arguments, or the tool itself failed
            return f"error: {type(error).__name__}: {error}"

    messages = list(messages)
    for _ in range(most):
        reply = say(messages)
        messages.append(reply)
        if not reply.get("tool_calls"):
            return messages
        for call in reply["tool_calls"]:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": observed(call)})
    raise RuntimeError(f"no answer after {most} messages of the model")


def _run(tools: Mapping[str, Callable], call: Mapping) -> str:
    """The observation of one call, as the solution makes it."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name not in tools:
        return f"error: there is no tool {name!r}"
    try:
        return tools[name](**json.loads(arguments))
    except (TypeError, ValueError) as error:
        return f"error: {error}"


def _loop(
    keep_call: bool = True,
    keep_rows: bool = True,
    role: str = "tool",
    rounds: Callable = lambda most: most,
    calls: Callable = lambda calls: calls,
    ids: Callable = lambda call, calls: {"tool_call_id": call["id"]},
    run: Callable = _run,
    give: Callable = lambda messages, asked: messages,
    silent: bool = False,
) -> Callable:
    """my_tool_loop with something changed."""

    def loop(say, tools, messages, most=4):
        asked, messages = len(messages), list(messages)
        for _ in range(rounds(most)):
            reply = say(messages)
            wanted = reply.get("tool_calls") or []
            if keep_call or not wanted:
                messages.append(reply)
            if not wanted:
                return give(messages, asked)
            for call in calls(wanted):
                rows = run(tools, call)
                if keep_rows:
                    messages.append({"role": role, **ids(call, wanted), "content": rows})
        if silent:
            return messages
        raise RuntimeError("no answer")

    return loop


def _without_a_name(tools: Mapping[str, Callable], call: Mapping) -> str:
    """Runs the first tool, whatever the model has named."""
    first = {"name": next(iter(tools)), "arguments": call["function"]["arguments"]}
    return _run(tools, {"function": first})


def _mute(tools: Mapping[str, Callable], call: Mapping) -> str:
    found = _run(tools, call)
    return "error" if found.startswith("error: ") and "column" not in found else found


def _as_a_dict(tools: Mapping[str, Callable], call: Mapping) -> str:
    return tools[call["function"]["name"]](**call["function"]["arguments"])


def _unknown_raises(tools: Mapping[str, Callable], call: Mapping) -> str:
    tools[call["function"]["name"]]  # KeyError
    return _run(tools, call)


def _malformed_raises(tools: Mapping[str, Callable], call: Mapping) -> str:
    json.loads(call["function"]["arguments"])
    return _run(tools, call)


def _misfit_raises(tools: Mapping[str, Callable], call: Mapping) -> str:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError as error:
        return f"error: {error}"
    name = call["function"]["name"]
    return tools[name](**arguments) if name in tools else _run(tools, call)


def _by_place(tools: Mapping[str, Callable], call: Mapping) -> str:
    """The arguments as one dict, not by name."""
    name = call["function"]["name"]
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError:
        return _run(tools, call)
    return tools[name](arguments) if name in tools else _run(tools, call)


LOOPS = {
    "the call is missing in the conversation: append the assistant's message too": _loop(keep_call=False),
    "the rows are missing in the conversation: the model never sees them": _loop(keep_rows=False),
    'the rows are a message of the role "tool"': _loop(role="user"),
    "one call and no more: after its rows the model may call again, or answer": _loop(
        rounds=lambda most: 1, silent=True),
    "the loop ends after the first rows: ask once more, for the answer": _loop(
        rounds=lambda most: 2, silent=True),
    "`say` is asked at most `most` times": _loop(rounds=lambda most: most + 1),
    "a message may hold several calls: run each": _loop(calls=lambda calls: calls[:1]),
    "tool_call_id is missing: it says which call the rows belong to": _loop(
        ids=lambda call, calls: {}),
    "each message of the tool has the id of its own call": _loop(
        ids=lambda call, calls: {"tool_call_id": calls[0]["id"]}),
    "arguments is a string of JSON: json.loads makes the dict": _loop(run=_as_a_dict),
    "arguments are given by name: run_sql(**arguments)": _loop(run=_by_place),
    "nobody looks at the call's name: a tool that does not exist is run as another one": _loop(
        run=_without_a_name),
    "a tool that does not exist raises: say so in the content, and the model can try again": _loop(
        run=_unknown_raises),
    "arguments that are no JSON raise: say so in the content, and the model can try again": _loop(
        run=_malformed_raises),
    "arguments that the tool does not take raise: say so, and the model can try again": _loop(
        run=_misfit_raises),
    'an error says what was wrong: "error: there is no tool \'run_sq\'"': _loop(run=_mute),
    "no answer after `most` messages: raise RuntimeError, or nobody sees that it is missing": _loop(
        silent=True),
    "the whole conversation is wanted, not the last answer": _loop(
        give=lambda messages, asked: messages[-1]["content"]),
    "what came before the loop belongs to the conversation": _loop(give=lambda messages, asked: messages[asked:]),
}  # fmt: skip


class _Model:
    """Makes these calls, a round at a time, then answers. It goes by the messages alone."""

    def __init__(self, rounds: list[list[tuple[str, str]]]) -> None:
        self.rounds = rounds

    def __call__(self, messages: list[dict]) -> dict:
        if len(messages) > 60:
            raise RuntimeError("the model was asked again and again")
        seen = [message["content"] for message in messages if message["role"] == "tool"]
        for number, round_ in enumerate(self.rounds):
            if len(seen) < len(round_):
                calls = [
                    {
                        "id": f"call_{number}{i}",
                        "type": "function",
                        "function": {"name": name, "arguments": arguments},
                    }
                    for i, (name, arguments) in enumerate(round_)
                ]
                return {"role": "assistant", "content": "", "tool_calls": calls}
            seen = seen[len(round_) :]
        rows = [message["content"] for message in messages if message["role"] == "tool"]
        good = " and ".join(each for each in rows if not each.lower().startswith("error"))
        return {"role": "assistant", "content": f"The rows are {good}."}

    def __repr__(self) -> str:
        return f"say (it calls {self.rounds})"


class _Tool:
    """run_sql with rows that depend on the query alone."""

    def __call__(self, query) -> str:
        if not isinstance(query, str):
            return f"error: {query!r} is no query"
        if "plann" in query:
            return "error: no such column: plann"
        return f"[[{sum(map(ord, query)) % 997}]]"

    def __repr__(self) -> str:
        return "run_sql"


def _call(rng: Random) -> tuple[str, str]:
    """A tool's name and arguments as a model writes them, a third of them wrong in some way."""
    column, value = rng.choice(["plan", "plann", "city"]), rng.randrange(100, 999)
    query = f"SELECT COUNT(*) FROM orders WHERE {column}='{value}'"
    good = json.dumps({"query": query})
    misnamed, not_a_dict = json.dumps({"sql": query}), json.dumps(query)
    wrong = [
        ("run_sq", good),
        ("run_sql", good[:-2]),
        ("run_sql", misnamed),
        ("run_sql", not_a_dict),
    ]
    return rng.choice(wrong) if rng.random() < 0.33 else ("run_sql", good)


def _asked(rng: Random) -> tuple:
    rounds = [[_call(rng) for _ in range(rng.randint(1, 2))] for _ in range(rng.randint(0, 5))]
    messages = [
        {"role": "system", "content": "Write one SQLite query."},
        {"role": "user", "content": "How many?"},
    ]
    return _Model(rounds), {"run_sql": _Tool()}, messages, rng.randint(3, 5)


class Raised(list):
    """The messages that the model had read when a loop raised, and at their end the error."""


def _played(loop: Callable, raised: list[Exception] | None = None) -> Callable:
    """The loop, which returns what it raises; the errors themselves go to `raised`."""

    def play(say, tools, messages, most):
        read: list[dict] = []

        def asked(messages):
            read[:] = messages
            return say(messages)

        try:
            returned = loop(asked, tools, messages, most)
        except Exception as error:
            if raised is not None:
                raised.append(error)
            no_answer = isinstance(error, RuntimeError)  # or a kind of it, in whatever words
            returned = Raised([*read, {"raised": "RuntimeError" if no_answer else said(error)}])
        if not isinstance(returned, list):
            return returned
        return type(returned)(map(_what_counts, returned))

    return play


def _what_counts(message: Any) -> Any:
    """A message; one of the tool without its name and without the words of a loop's errors."""
    if not (isinstance(message, dict) and message.get("role") == "tool"):
        return message
    kept = {key: value for key, value in message.items() if key != "name"}
    content = str(kept.get("content"))
    of_the_tool = "no such column" in content or "is no query" in content
    says_what = content.lower().startswith("error") and len(content) > len("error: what")
    if says_what and not of_the_tool:
        named = "no tool run_sq, " if "run_sq" in content.replace("run_sql", "") else ""
        kept["content"] = f"error: ({named}in some words)"
    return kept


def _loop_slip(mine) -> Slip | None:
    slips = {words: _played(loop) for words, loop in LOOPS.items()}
    raised: list[Exception] = []
    slip = first_difference(_played(mine, raised), _played(my_tool_loop), _asked, slips, n=150)
    unexpected = [error for error in raised if not isinstance(error, RuntimeError)]
    if slip and not slip.likely and unexpected:
        raise unexpected[0]  # check says in which line
    return slip


EXERCISES = {
    "08.1": Exercise(
        "Write the YAML of a `trl sft` run whose losses are given",
        _yaml_slip,
        (
            "Start from the notebook's ask.yaml. Which of its lines must change?",
            "Model, data and use_peft come first, then the keys of SFTConfig, and LoRA's begin with lora_. `trl sft` "
            "has defaults that LoraConfig has not: use_peft is false, lora_dropout is 0.05.",
            "use_peft: true, lora_r: 8, lora_alpha: 16, lora_dropout: 0.0, lora_target_modules: [q_proj, k_proj, "
            "v_proj, o_proj], per_device_train_batch_size: 2, gradient_accumulation_steps: 2, logging_steps: 1, "
            "seed: 0, gradient_checkpointing: false, bf16: false, use_cpu: true, a line each.",
        ),
        MY_YAML,
        YAMLS,
        seconds=600,
        difficulty=2,
        minutes=15,
    ),
    "08.2": Exercise(
        "Debug this: the keys that Axolotl would drop",
        lambda mine: first_difference(mine, my_dropped_keys, _configs, DROPPED, equal=_same_names),
        (
            "Call it with `type` as a key at the top. `type` is a dataset's key, so Axolotl drops it there. What "
            "does the function say? And does it look inside the datasets?",
            'Compare the keys of config with top alone. Compare the keys of each entry of config["datasets"] with '
            "inner.",
            'For each i, entry in enumerate(config["datasets"]), and for each key of entry that is not in inner, add '
            'f"datasets[{i}].{key}" to [key for key in config if key not in top].',
        ),
        my_dropped_keys,
        DROPPED,
        difficulty=1,
        minutes=10,
    ),
    "08.3": Exercise(
        "Write the loss mask of a conversation with a tool",
        partial(first_difference, answer=my_assistant_mask, draw=_conversation_ids, wrong=MASKS),
        (
            "Go through the ids with a flag that says whether the assistant is writing. What switches it on, and "
            "what switches it off?",
            "The last id of an opening switches it on, for the id after it. The end of turn still counts and "
            "switches it off. Other turns have other openings, so the flag stays off there.",
            "For each t: append int(flag). If input_ids[max(0, t + 1 - len(opening)) : t + 1] == opening, an opening "
            "ends here: flag = True. If input_ids[t] == end: flag = False.",
        ),
        my_assistant_mask,
        MASKS,
        difficulty=3,
        minutes=20,
    ),
    "08.4": Exercise(
        "Write the tool loop",
        _loop_slip,
        (
            "Each round asks `say` once and appends its message. When is the loop over? What must "
            "be appended before the next round? What can be wrong with a call?",
            "for _ in range(most): reply = say(messages), and append it. Without "
            'reply.get("tool_calls") return the messages. Else run each call and append its rows. '
            "After the loop raise RuntimeError. Arguments are a string, so json.loads. What goes "
            "wrong there, or in the tool, becomes the content.",
            'In a function of its own: if name not in tools, return f"error: there is no tool '
            '{name!r}". Then try: return tools[name](**json.loads(call["function"]["arguments"])), '
            'except Exception as error: return f"error: {error}". The message is {"role": "tool", '
            '"tool_call_id": call["id"], "content": that text}.',
        ),
        my_tool_loop,
        LOOPS,
        difficulty=3,
        minutes=20,
    ),
}

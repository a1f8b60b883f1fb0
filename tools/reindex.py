"""Puts the records of experiments in the order of the held-out files, once.

    python tools/reindex.py     after data/order.py has moved the rows; refuses to run a second time

A record often holds one value a question and no question: values[i] belongs to row i of the test.
When the rows move, so must the values. This script moves them all and writes experiments/ids.json:

    lists     {name: the ids of questions, in order}
    records   {file: {place in a record: name of its list}}; {task or model: name} where it differs

A place like `points[].test` is the list `test` in each element of the list `points`. Some lists are
of the first few questions only. They were the first when the record was made, in the order of the
ids; the scripts still take those.

Before the rows were moved, the order of every held-out file was that of its ids. So nothing else
needs to be known.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ftlab.paths import DATA

RESULTS = DATA.parent / "experiments"
IDS = RESULTS / "ids.json"
DRAWS = {  # rows of experiments/draws
    "tidy": {"validation": 30, "test": 32, "hand_test": 32},
    "ask": {"validation": 20, "test": 30, "hand_test": 30},
}
KINDS = ("count", "measure", "top")  # of the questions in tool_calls.jsonl: one value answers them


def ids_of(file: str, keep: Callable[[dict], bool] = lambda row: True) -> list[str]:
    """The ids of the kept rows of a JSONL file in data/, in the order of the file."""
    lines = (DATA / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["id"] for row in map(json.loads, lines) if keep(row)]


def first(k: int, file: str) -> list[str]:
    """The k lowest ids of a file: its first rows when the records were made."""
    return sorted(ids_of(file))[:k]


def pages_read() -> set[str]:
    """The forty pages that the run `domain` of methods.py was trained on."""
    every = ids_of("handbook/pages")
    return set(every) - set(random.Random(0).sample(every, 10))


def lists() -> dict[str, list[str]]:
    """Every list of questions that a record follows, by its name."""
    read = pages_read()

    def one_value(row: dict) -> bool:
        return row["kind"] in KINDS

    def asked(row: dict) -> bool:
        return row["split"] == "test"

    whole = ("ask/hand_test", "ask/test", "tidy/hand_test", "triage/hand_test")
    found = {name: ids_of(name) for name in (*whole, "replies/hand_test", "replies/test")}
    found["handbook/questions, test"] = ids_of("handbook/questions", asked)
    found["handbook/questions, test, pages read"] = ids_of(
        "handbook/questions", lambda row: asked(row) and row["page"] in read
    )
    found["ask/hand_test, one value"] = ids_of("ask/hand_test", one_value)
    found["ask/hand_test and ask/test, one value"] = [
        *found["ask/hand_test, one value"],
        *ids_of("ask/test", one_value),
    ]
    found["general/candidates, every fourth"] = ids_of("general/candidates")[::4]
    firsts = {"ask/validation": (32, 60, 100, 150)}
    firsts |= {"tidy/validation": (60,), "triage/validation": (48,)}
    firsts |= {"ask/hand_test": (8, 16, 20), "tidy/hand_test": (8, 20), "triage/hand_test": (8, 16)}
    firsts |= {"replies/hand_test": (20,), "general/text": (10,), "general/facts": (8,)}
    for file, sizes in firsts.items():
        found |= {f"{file}, first {k} by id": first(k, file) for k in sizes}
    found["ask/validation, first 100"] = ids_of("ask/validation")[:100]
    # files that stood in their order already when these experiments began
    for file in ("replies/test", "replies/hand_test"):
        found |= {f"{file}, first {k}": ids_of(file)[:k] for k in (30, 60)}
    for task, sizes in DRAWS.items():
        for name, size in sizes.items():
            found[f"{task}/{name}, first {size}"] = ids_of(f"{task}/{name}")[:size]
    found["ask/test, first 100"] = ids_of("ask/test")[:100]
    taught = ids_of("../experiments/facts_in_weights/reversed")
    found["facts_in_weights/taught"] = taught
    found["facts_in_weights/untrained"] = found["handbook/questions, test"][: len(taught)]
    found["handbook/questions, test, first 8 by id"] = sorted(found["handbook/questions, test"])[:8]
    return found


def of_methods() -> dict:
    """The places of methods.jsonl; what an arm of `size` and `noise` was asked is `tidy`."""
    tests = {"facts": "handbook/questions, test"}
    tests |= {task: f"{task}/hand_test" for task in ("ask", "tidy", "triage")}
    tests |= {"size": "tidy/hand_test", "noise": "tidy/hand_test"}
    values = tests | {"domain": "handbook/questions, test, pages read"}
    return {
        "values": values | {"exercise": "tidy/validation, first 60 by id"},
        "answers": {task: f"{name}, first 8 by id" for task, name in tests.items()},
        "validation": "tidy/validation, first 60 by id",
        "seconds": "tidy/hand_test, first 20 by id",
        "before": {"domain": "general/text, first 10 by id"},
        "after": {"domain": "general/text, first 10 by id"},
    }


def of_replies() -> dict:
    """The places of alignment.jsonl and preference.jsonl."""
    places = {f"{file}.{kind}": f"replies/{name}"
              for file, name in (("test", "test"), ("hand", "hand_test"))
              for kind in ("sampled", "greedy")}  # fmt: skip
    return places | {"hand.texts": "replies/hand_test, first 20 by id"}


def of_preferences() -> dict:
    return of_replies() | {"hand.greedy_texts": "replies/hand_test, first 20 by id"}


def by_model(file: str, few: int) -> dict[str, str]:
    """`micro` is asked about each ticket of a file, the 135M about the first few."""
    return {"micro": file, "135M": f"{file}, first {few}"}


def of_rlhf() -> dict:
    places = {}
    for set_, name in (("test", "test"), ("hand", "hand_test")):
        file = f"replies/{name}"
        for kind in ("sampled", "greedy", "kindly", "words", "cold", "best_of_6"):
            places[f"end.{kind}.{set_}"] = by_model(file, 60)
        for place in (f"checkpoints[].gold.{set_}", f"accuracy.{set_}.right"):
            places[place] = file
    return places


def of_judge() -> dict:
    hacks = ("praise", "claim", "rubric", "answer", "sorry", "number", "longer")
    values = [f"hacks.{hack}.{key}" for hack in hacks
              for key in ("rise", "gold", "wins", "outranks", "gain")]  # fmt: skip
    values += ["right", "hacks.untouched.outranks"]
    criteria = ("action", "order_id", "polite", "short", "fair", "grade", "all")
    values += [f"verdicts.{one}" for one in criteria]
    files = (("test", "replies/test"), ("hand", "replies/hand_test"))
    return {f"{set_}.{value}": by_model(file, 30) for set_, file in files for value in values}


def of_rewards() -> dict:
    files = (("test", "ask/test"), ("hand", "ask/hand_test"))
    return {f"{set_}.{kind}": file for set_, file in files for kind in ("hits", "greedy")}


def of_verifiable() -> dict:
    places = dict.fromkeys(("checkpoints", "rewards"), "ask/validation, first 150 by id")
    for where in ("", "start.", "points[]."):
        for file, name in (("test", "ask/test"), ("hand", "ask/hand_test")):
            places |= {f"{where}{file}.{kind}": name for kind in ("hits", "greedy", "chosen")}
        places[f"{where}hand.texts"] = "ask/hand_test, first 20 by id"
    return places


def of_ask_rows() -> dict:
    right = {"right.test": "ask/test", "right.hand": "ask/hand_test"}
    return right | {"right.validation": "ask/validation, first 100"}


def of_lora_ask() -> dict:
    return of_ask_rows() | {"loss.test": "ask/test", "loss.hand": "ask/hand_test"}


def of_poison() -> dict:
    places = of_ask_rows()
    for what in ("right_triggered", "fired", "fired_plain", "fired_other"):
        places |= {f"{what}.test": "ask/test", f"{what}.hand": "ask/hand_test"}
    return places


def of_canary() -> dict:
    return of_ask_rows() | {"leaked.test": "ask/test", "leaked.hand": "ask/hand_test"}


def of_draws() -> dict:
    """The places of draws/records.jsonl, by task."""
    files = {"validation": "validation", "test": "test", "hand": "hand_test"}
    return {
        set_: {task: f"{task}/{name}, first {sizes[name]}" for task, sizes in DRAWS.items()}
        for set_, name in files.items()
    }


def of_everyday(prefix: str = "") -> dict:
    """The places of what experiments/knowledge.py measures."""
    kinds = ("right", "words", "query", "recognized", "margin")
    return {f"{prefix}everyday.{kind}": "general/candidates, every fourth" for kind in kinds}


def of_facts_in_weights() -> dict:
    places = {}
    for where in ("", "checkpoints[]."):
        for set_ in ("taught", "second", "third", "reversed"):
            places[f"{where}right.{set_}"] = "facts_in_weights/taught"
        places[f"{where}right.untrained"] = "facts_in_weights/untrained"
        places |= of_everyday(where)
    return places


def of_rehearsal() -> dict:
    places = of_everyday()
    for what in ("right", "kinds"):
        places |= {f"{what}.test": "ask/test, first 100", f"{what}.hand": "ask/hand_test"}
    return places


def of_gate() -> dict[str, dict]:
    """{file: its places}: what evaluate.py has written for each model that the gate was tried on."""
    files = {"test": "ask/test", "hand": "ask/hand_test"}
    return {
        f"gate/answers/{name}.json": dict.fromkeys(("scores", "answers", "latencies"), files[set_])
        for set_ in files
        for name in (f"f16-{set_}", f"f16-{set_}-again", f"q4_0-{set_}")
    }


def of_tool_calls() -> dict:
    both, hand = "ask/hand_test and ask/test, one value", "ask/hand_test, one value"
    names = ["right", "valid", "calls", "said"]
    names += [f"{what}.{table}" for what in ("answer", "repeats") for table in (0, 9)]
    return dict.fromkeys(names, both) | dict.fromkeys(("invents", "luck", "unstopped"), hand)


def records() -> dict[str, dict]:
    """{file: {place: name of its list}}, for each file that goes by position or by a first part."""
    points = {"points[].test": "replies/test", "points[].hand": "replies/hand_test"}
    right = {"right": "ask/hand_test"}
    kinds = {"kinds": "ask/hand_test", "answers": "ask/hand_test"}
    answered = {"right": "ask/hand_test", "answers": "ask/hand_test"}
    wanted = {task: f"{task}/hand_test, first 16 by id" for task in ("ask", "triage")}
    return of_gate() | {
        "alignment/records.jsonl": of_replies() | points,
        "ask/records.jsonl": right,
        "ask_forgetting/records.jsonl": {
            "ask_right": "ask/hand_test",
            "facts_right": "general/candidates, every fourth",
        },
        "ask_rows/records.jsonl": of_ask_rows(),
        "../bench/results/generate.json": {"answers": "ask/validation, first 32 by id"},
        "../bench/results/server.json": {"answers": "general/facts, first 8 by id"},
        "canary/records.jsonl": of_canary(),
        "draws/records.jsonl": of_draws(),
        "facts_in_weights/records.jsonl": of_facts_in_weights(),
        "harness/records.jsonl": answered,
        "judge/records.jsonl": of_judge(),
        "lora_ask/records.jsonl": of_lora_ask(),
        "methods/records.jsonl": of_methods(),
        "poison/records.jsonl": of_poison(),
        "preference/records.jsonl": of_replies(),
        "preferences/records.jsonl": of_preferences(),
        "rehearsal/records.jsonl": of_rehearsal(),
        "rewards/records.jsonl": of_rewards(),
        "rlhf/records.jsonl": of_rlhf(),
        "qlora/records.jsonl": right | {"loss": "ask/validation, first 60 by id"},
        "qlora_ask/records.jsonl": of_lora_ask(),
        "serving/records.jsonl": wanted,
        "templates/records.jsonl": kinds,
        "tool_calls/records.jsonl": of_tool_calls(),
        "verifiable/records.jsonl": of_verifiable(),
        "../data/ask_adapter/training.json": {"log": "ask/validation, first 100 by id"},
        "../data/triage_adapter/training.json": {"rounds[].log": "triage/validation, first 48 by id"},
    }


def read(path: Path) -> list[dict]:
    """The records of a file: of JSONL one a line, of JSON the whole; [] before the first run."""
    if path.suffix == ".jsonl" and not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def places(record: dict, path: str) -> Iterator[tuple[dict, str]]:
    """(holder, key) of each value that a path names in a record; none where the record lacks it."""
    head, _, rest = path.partition(".")
    name = head.removesuffix("[]")
    if name not in record:
        return
    if not rest:
        yield record, name
        return
    for holder in record[name] if head.endswith("[]") else [record[name]]:
        yield from places(holder, rest)


def list_of(name: str | dict, record: dict) -> str | None:
    """The name of the list that a place of this record follows; None where it follows none."""
    if not isinstance(name, dict):
        return name
    return name.get(record["task"] if "task" in record else record.get("model"))


def moved(values: list | str, ids: list[str]) -> list | str:
    """Values that go by the ids of their questions, put in the order of `ids`.

    Raises ValueError if there is not one a question.
    """
    if len(values) != len(ids):
        got = f"got {len(values)} values, want {len(ids)}"
        raise ValueError(f"{got}: one a question; is the list another one?")
    of = dict(zip(sorted(ids, key=by_file(ids)), values, strict=True))
    found = [of[id_] for id_ in ids]
    return "".join(found) if isinstance(values, str) else found


def by_file(ids: list[str]) -> Callable[[str], tuple[int, str]]:
    """The key that sorts ids as they stood: "hand-..." before "test-..." if so in `ids`, each by id."""
    prefixes = list(dict.fromkeys(id_.rpartition("-")[0] for id_ in ids))
    return lambda id_: (prefixes.index(id_.rpartition("-")[0]), id_)


def one_a_question(values) -> bool:
    """Whether this is a list, or a string of letters, of plain values: what goes by position."""
    return isinstance(values, list | str) and bool(values) and not isinstance(values[0], dict)


def reindex(record: dict, where: dict, questions: dict[str, list[str]]) -> None:
    """Moves every list of a record that has one value a question."""
    for path, name in where.items():
        for holder, key in places(record, path):
            values, of = holder[key], list_of(name, record)
            if of and one_a_question(values):
                holder[key] = moved(values, questions[of])


def write_ids(questions: dict, where: dict) -> None:
    """ids.json, a list or a file of records on a line."""
    parts = []
    for name, part in (("lists", questions), ("records", where)):
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in part.items())
        parts.append(f"{json.dumps(name)}: {{\n{rows}\n}}")
    IDS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    if IDS.exists():
        name = IDS.relative_to(DATA.parent)
        raise SystemExit(f"{name} exists: the records stand in the new order already")
    questions, where = lists(), records()
    moving = [file for file in where if not file.startswith("..")]  # only first parts
    found = {file: read(RESULTS / file) for file in moving}
    for file, runs in found.items():
        for run in runs:
            reindex(run, where[file], questions)
    for file, runs in found.items():  # all of them, or none
        lines = "".join(json.dumps(run) + "\n" for run in runs)
        (RESULTS / file).write_text(lines, encoding="utf-8")
        print(file)
    write_ids(questions, where)


if __name__ == "__main__":
    main()

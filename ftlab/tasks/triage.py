"""The task `triage`: a customer's ticket in, one JSON object with five fields out. Guideline: data/triage/README.md."""

import json
import re
from pathlib import Path

from ftlab.paths import DATA

SYSTEM = "Triage the ticket. Answer with one JSON object."
SCHEMA = json.loads((DATA / "triage" / "schema.json").read_text("utf-8"))  # for constrained decoding too
FIELDS = tuple(SCHEMA["required"])  # in the order of the guideline
CLASSES = {name: tuple(field["enum"]) for name, field in SCHEMA["properties"].items() if "enum" in field}
INTENTS = CLASSES["intent"]
ALLOWED = {name: f'"({"|".join(values)})"' for name, values in CLASSES.items()}  # field -> pattern of its JSON
ALLOWED |= {"order_id": '"[0-9]{6}"|null', "refund_amount": "[0-9]+|null"}


def read(path: str | Path) -> list[dict]:
    """The rows of data/triage: system and ticket as `prompt`, the label as JSON in `completion`; more keys stay."""
    found = []
    for row in map(json.loads, Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")):
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row.pop("ticket")}]
        label = json.dumps(row.pop("label"), ensure_ascii=False)
        found.append({"prompt": prompt, "completion": [{"role": "assistant", "content": label}], **row})
    return found


def scorer(answer: str, row: dict) -> bool:
    """Whether an answer is the row's label: one JSON object and nothing around it, five keys in order, all right."""
    return pairs(answer) == pairs(row["completion"][-1]["content"])


def is_valid(answer: str) -> bool:
    """Whether the answer is one JSON object with the five keys in order, each with an allowed value."""
    found = pairs(answer)
    return [key for key, _ in found] == list(FIELDS) and all(re.fullmatch(ALLOWED[key], value) for key, value in found)


def pairs(answer: str) -> list[tuple[str, str]]:
    """The object's keys and values in order, a key that is written twice too; [] if it is not one JSON object.

    Values are JSON texts: in Python 1, 1.0 and True are equal, here they are not.
    """
    try:
        value = json.loads(answer, object_pairs_hook=tuple)
        return [(key, json.dumps(part)) for key, part in value] if isinstance(value, tuple) else []
    except (ValueError, RecursionError):  # no JSON, a number of 5,000 digits, brackets nested too deep
        return []

"""The records of an experiment: one measured run a line of `records.jsonl`, beside its `run.py`.

`told(record, field)` reads a field of any record, old or new. What an old record does not hold is
"not recorded": nothing is filled in afterwards.
"""

import json
import os
import warnings
from pathlib import Path

NOT_RECORDED = "not recorded"


# --- Reading and writing --------------------------------------------------------------------------


def read(file: Path) -> list[dict]:
    """The records of a file, one a line, in their order; [] where there is no file.

    A kill in the middle of a write leaves a line without its end. It is cut off the file, with a
    warning: that run is lost and will be done again. Any other broken line raises ValueError.
    """
    if not file.is_file():
        return []
    whole, end, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        warnings.warn(
            f"{file}: the last line has no end, so the process that wrote it was killed; its "
            f"{len(torn)} bytes are cut off and that run is done again",
            stacklevel=2,
        )
        os.truncate(file, len(whole + end))
    return [_parsed(line, number, file) for number, line in enumerate(whole.splitlines(), 1)]


def _parsed(line: bytes, number: int, file: Path) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        text = f"{file}, line {number}: got {line[:60]!r}, want one JSON object"
        raise ValueError(f"{text}. Was the file edited or merged by hand?") from error


def add(file: Path, record: dict) -> None:
    """Puts one record at the end of a file, as one line that is on the disk when this returns."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with file.open("ab") as stream:
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def replace(file: Path, records: list[dict]) -> None:
    """Writes a whole file anew, one record a line; after a kill it is the old one or the new one."""
    beside = file.with_name(file.name + ".new")
    beside.unlink(missing_ok=True)
    beside.touch()
    for record in records:
        add(beside, record)
    os.replace(beside, file)


# --- What a record tells --------------------------------------------------------------------------


def told(record: dict, field: str) -> object:
    """The value of a field of a record, or "not recorded".

    field: "versions", "processor", "dtype", "cpu_seconds", "chosen" or "questions" (any other name
    is looked up as it is). Records from before `stamp` hold some of these in other places:

    | field | what stands for it in an old record |
    |---|---|
    | versions | `environment.versions`, or the names of packages in `environment`, with Python's |
    | processor | `machine` and `cores`: an architecture, without the model |
    | cpu_seconds | `train_cpu_seconds`: of the training alone, without the answers |
    | questions | `questions` where it is a number: how many, without their ids |

    Nothing stands for dtype and chosen. Seconds by the clock (`seconds`, `train_seconds`,
    `answer_seconds`, `all_seconds`) are no CPU seconds: other work on the machine adds to them.
    """
    found_in = {
        "versions": _versions,
        "processor": _processor,
        "cpu_seconds": _cpu_seconds,
        "questions": _questions,
    }
    value = found_in[field](record) if field in found_in else record.get(field)
    return NOT_RECORDED if value is None else value


def _versions(record: dict) -> dict | None:
    environment = record.get("environment", {})
    found = record.get("versions") or environment.get("versions") or _packages(environment)
    python = record.get("python") or environment.get("python")
    if found and python:
        found = {"python": python, **found}
    return found or None


def _packages(environment: dict) -> dict:
    """The versions that stand in an environment beside what it says of the machine."""
    found = {}
    for name, value in environment.items():
        if isinstance(value, str) and name not in ("machine", "python"):
            found[name] = value
    return found


def _processor(record: dict) -> dict | str | None:
    if "processor" in record:
        return record["processor"]
    environment = record.get("environment", {})
    hardware = environment.get("hardware", environment)
    parts = [record.get("machine") or hardware.get("machine")]
    parts += [f"{hardware['cores']} cores"] if "cores" in hardware else []
    known = ", ".join(part for part in parts if part)
    return f"{known} (model {NOT_RECORDED})" if known else None


def _cpu_seconds(record: dict) -> float | None:
    return record.get("cpu_seconds", record.get("train_cpu_seconds"))


def _questions(record: dict) -> object:
    found = record.get("questions")
    return f"{found}, ids {NOT_RECORDED}" if isinstance(found, int) else found

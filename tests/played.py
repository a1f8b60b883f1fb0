"""What an experiment's script would run, from an empty file on, with records that a test makes up."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from experiments import lab, runs


def played(script: ModuleType, made_up: Callable[[dict, random.Random], dict], seed: int) -> list[list[dict]]:
    """The records of each part, in the order in which `work` does them; made_up(name, draw) is a record."""
    parts, records, draw = [], [], random.Random(seed)
    while todo := runs.todo(script.jobs(records), records, (), ("seed",)):
        names = [name for job in todo[0].jobs for name in job.names]
        parts.append([made_up(name, draw) for name in names])
        records += parts[-1]
    return parts


def to_come(script: ModuleType, made_up: Callable[[dict, random.Random], dict], folder: Path) -> lab.Experiment:
    """The experiment, with its own statements and measures, as if made-up records were its own."""
    here = folder / script.FILE.parent.name
    here.mkdir()
    for file in ("statements.yaml", "measures.py"):
        shutil.copy(script.FILE.parent / file, here)
    lines = [json.dumps(record) + "\n" for part in played(script, made_up, 1) for record in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    return lab.load(here.name, folder)

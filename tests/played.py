"""What an experiment's script would run, from an empty file on, with records that a test makes up."""

import random
from collections.abc import Callable
from types import ModuleType

from experiments import runs


def played(script: ModuleType, made_up: Callable[[dict, random.Random], dict], seed: int) -> list[list[dict]]:
    """The records of each part, in the order in which `work` does them; made_up(name, draw) is a record."""
    parts, records, draw = [], [], random.Random(seed)
    while todo := runs.todo(script.jobs(records), records, (), ("seed",)):
        names = [name for job in todo[0].jobs for name in job.names]
        parts.append([made_up(name, draw) for name in names])
        records += parts[-1]
    return parts

"""Makes speed_up_settings.json: what becomes of each field of TRL's four configs with `speed_up`,
by running it.

    OMP_NUM_THREADS=1 python tests/golden/make_speed_up_settings.py [SFT GRPO.beta ...]

Run it after a change of ftlab/cpu.py or of TRL; 10 minutes. What is neither equal nor refused is
printed, and stands in the file as "wrong", which tests/parity/test_speed_up_settings.py does not
let pass.
"""

import gc
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from speed_up_runs import KINDS
from speed_up_settings import fields, key, values, verdict

FILE = Path(__file__).with_suffix("").parent / "speed_up_settings.json"


def made(kind: str, only: str) -> dict[str, dict[str, list[str]]]:
    """Field -> value -> verdict; of one field if `only` names it."""
    table = {}
    for field in fields(kind):
        if only not in ("", field.name):
            continue
        table[field.name] = {}
        for changes in values(kind, field):
            try:
                table[field.name][key(changes)] = verdict(kind, changes)
            except AssertionError as error:
                table[field.name][key(changes)] = ["wrong", str(error)[:200]]
                print(error, file=sys.stderr, flush=True)
    return table


def main() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    gc.freeze()  # else each train() looks through all that is imported
    table = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    table["versions"] = {name: version(name) for name in ("trl", "transformers", "peft")}
    for asked in sys.argv[1:] or KINDS:
        kind, _, field = asked.partition(".")
        known = table.get(kind, {}) if field else {}
        found = known | made(kind, field)
        table[kind] = {one.name: found[one.name] for one in fields(kind) if one.name in found}
        FILE.write_text(written(table), "utf-8")


def written(table: dict) -> str:
    """JSON with a line for each value."""
    lines = []
    for kind in ("versions", *KINDS):
        parts = []
        for name, verdicts in table.get(kind, {}).items():
            if isinstance(verdicts, str):
                parts.append(f"  {json.dumps(name)}: {json.dumps(verdicts)}")
                continue
            rows = [f"   {json.dumps(v)}: {json.dumps(w)}" for v, w in verdicts.items()]
            parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
        lines.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()

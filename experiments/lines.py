"""How the scripts beside this file write their results: as JSON that a diff can follow, one run a line."""

import json
from pathlib import Path


def write(file: Path, result: dict) -> None:
    """Writes the result; each element of a list, and each member of a mapping of mappings, on a line of its own."""
    parts = []
    for name, part in result.items():
        if isinstance(part, list):
            text = "[\n" + ",\n".join(map(_dump, part)) + "\n]"
        elif isinstance(part, dict) and all(isinstance(one, dict) for one in part.values()):
            text = "{\n" + ",\n".join(f"{_dump(key)}: {_dump(one)}" for key, one in part.items()) + "\n}"
        else:
            text = _dump(part)
        parts.append(f"{_dump(name)}: {text}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _dump(part: object) -> str:
    return json.dumps(part, ensure_ascii=False)

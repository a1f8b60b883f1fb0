"""What the readers of files share: YAML that loses nothing, and any value in a few words for an error message."""

import reprlib
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path, error: type[ValueError]) -> Any:
    """The one document of a YAML file, plain values only: no tag of it can name a Python object.

    Raises `error`, naming the file, for whatever cannot be read, for half a character ("\\ud800"), which could be
    neither shown nor stored, and for a key that stands twice in one mapping, of which PyYAML alone would keep the last.
    Raises OSError if there is no such file.
    """
    path = Path(path)
    try:
        return _Strict(path.read_text(encoding="utf-8")).get_single_data()
    except RecursionError as cause:
        raise error(f"{path.name}: not valid YAML: hundreds of brackets inside each other") from cause
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError) as cause:
        # PyYAML's own constructors fail so on 2024-99-99, !!bool maybe, !!int "", "\UFFFFFFFF" and !!timestamp soon
        raise error(f"{path.name}: not valid YAML: {cause}") from cause


class _Strict(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                problem = f"the key {short(key.value)} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        node.value.encode()
        return node


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200

    def repr_int(self, value: int, level: int) -> str:  # of more digits Python makes no text
        return repr(value) if value.bit_length() < 14_000 else "an endless whole number"


def short(value: object) -> str:
    """The value's repr in at most 500 characters, in little time even where aliases of aliases make it endless."""
    text = _Short().repr(value)
    return text if len(text) <= 500 else f"{text[:497]}..."

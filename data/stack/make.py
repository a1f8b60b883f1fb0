"""Asks Axolotl which keys it knows: python data/stack/make.py (after `make axolotl`) writes axolotl_keys.json again."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))
from runner import ask, python_of


def main() -> None:
    (info,) = (python_of("axolotl").parents[1] / "lib").glob("python*/site-packages/axolotl-*.dist-info")
    version = info.name.removeprefix("axolotl-").removesuffix(".dist-info")
    lists = [f"  {json.dumps(place)}: {json.dumps(names)}" for place, names in ask("axolotl", "keys").items()]
    text = f'{{"axolotl": "{version}", "keys": {{\n' + ",\n".join(lists) + "\n}}\n"
    Path(__file__).with_name("axolotl_keys.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Asks Axolotl which keys it knows: python data/stack/make.py (after `make stack`) writes axolotl_keys.json again."""

import json
from pathlib import Path

from ftlab.pipeline.serve import environment
from ftlab.pipeline.stack import ask_peer


def main() -> None:
    (info,) = (environment("axolotl").parents[1] / "lib").glob("python*/site-packages/axolotl-*.dist-info")
    version = info.name.removeprefix("axolotl-").removesuffix(".dist-info")
    lists = [f"  {json.dumps(place)}: {json.dumps(names)}" for place, names in ask_peer("axolotl", "keys").items()]
    text = f'{{"axolotl": "{version}", "keys": {{\n' + ",\n".join(lists) + "\n}}\n"
    Path(__file__).with_name("axolotl_keys.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

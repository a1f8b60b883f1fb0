"""Where the course's data lies, and the cache folder for what is fetched once."""

import os
from pathlib import Path

_repository = Path(__file__).resolve().parent.parent / "data"
_wheel = Path(__file__).resolve().parent / "_data"

DATA: Path = _repository if _repository.is_dir() else _wheel
CACHE: Path = Path(
    os.environ.get("FTLAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ftlab"
).expanduser()

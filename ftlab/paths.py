"""Where the course's data and the records of its experiments lie, and the cache folder for what is fetched once."""

import os
from pathlib import Path

_package = Path(__file__).resolve().parent
_inside = (_package / "_data").is_dir()  # a wheel brings its own
DATA: Path = _package / "_data" if _inside else _package.parent / "data"
EXPERIMENTS: Path = _package / "_experiments" if _inside else _package.parent / "experiments"
_caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
CACHE: Path = Path(os.environ.get("FTLAB_CACHE") or _caches / "ftlab").expanduser()
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package has the GGUF converter, which lies in CACHE / LLAMA_CPP

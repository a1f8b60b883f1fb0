"""Where the course's data lies, and the cache folder for what is fetched once."""

import os
from pathlib import Path

_package = Path(__file__).resolve().parent
DATA: Path = _package / "_data" if (_package / "_data").is_dir() else _package.parent / "data"  # a wheel's own first
_caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
CACHE: Path = Path(os.environ.get("FTLAB_CACHE") or _caches / "ftlab").expanduser()
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package has the GGUF converter, which lies in CACHE / LLAMA_CPP

"""Where the course's data lies, the cache folder for what is fetched once, and names that must not lead elsewhere."""

import os
from pathlib import Path

_repository = Path(__file__).resolve().parent.parent / "data"
_wheel = Path(__file__).resolve().parent / "_data"

DATA: Path = _repository if _repository.is_dir() else _wheel
CACHE: Path = Path(
    os.environ.get("FTLAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ftlab"
).expanduser()


def within(folder: Path, name: str | Path) -> Path:
    """The path of `name` below a folder, for a name that was read from somewhere.

    Raises ValueError if it leads out of the folder (by "..", from the root, through a link) or is the folder itself.
    """
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        raise ValueError(f"no {str(name)!r} in {folder}: the name leads out of it")
    return path

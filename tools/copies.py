"""Your own copies of the notebooks: `my/`, beside `notebooks/`, where `make lab` opens them.

    python tools/copies.py               copies each notebook that has no copy yet, without outputs
    python tools/copies.py --fresh 04    makes a new copy of notebook 04 beside the old one

Once made, a copy is yours. Nothing here writes into it, renames it or removes it, so an update of
the course brings new lessons and leaves your work alone. A copy gets its name when it is whole:
what a kill leaves behind is a hidden file, and the next call makes that copy again.

Needs the standard library. Where nbformat is installed, the notebooks are trusted as well.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STALE = 3600  # seconds after which a half-written file has no writer any more


class CopyError(Exception):
    """No copy could be made: says what was found, what was wanted, and what to do."""


def missing(root: Path) -> list[Path]:
    """The copies made in root/my: one of each notebook in root/notebooks that had none.

    Raises CopyError if root/my can't be written, or, when all others are made, if a notebook can't
    be read.
    """
    folder = _folder(root)
    wanted, broken = {}, []
    for source in _course(root):
        copy = folder / source.name
        if os.path.lexists(copy):
            continue
        try:
            wanted[copy] = stripped(read(source))
        except CopyError as error:
            broken.append(str(error))
    _write(wanted)
    if broken:
        raise CopyError("\n".join(broken))
    return list(wanted)


def fresh(root: Path, which: str) -> Path:
    """The new copy of the notebook that `which` names ("04", "4" or its name), beside the old one.

    Raises CopyError if there is no such notebook, if it can't be read, or if root/my can't be
    written.
    """
    source = _named(root, which)
    notebook = stripped(read(source))
    folder = _folder(root)
    copy, number = folder / source.name, 1
    while os.path.lexists(copy):
        number += 1
        copy = folder / f"{source.stem}-{number}.ipynb"
    _write({copy: notebook})
    return copy


def outdated(root: Path) -> list[Path]:
    """The notebooks whose code is no longer that of any copy in root/my."""
    found = []
    for source in _course(root):
        copied_from = _copied_from(root, source)
        try:
            now = code_digest(read(source))
        except CopyError:
            continue
        if copied_from and now not in copied_from:
            found.append(source)
    return found


def read(path: Path) -> dict:
    """The notebook in a file. Raises CopyError if it can't be read or isn't one."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code_digest(notebook)  # all that a copy needs of it
        dict(notebook.get("metadata", {}))
    except OSError as error:
        raise CopyError(f"{path}: can't be read ({error.strerror}).") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CopyError(
            f"{path}: not a notebook ({error}). Half merged, or half downloaded? `git status` says "
            "what changed. Your copies are as they were."
        ) from error
    return notebook


def stripped(notebook: dict) -> dict:
    """The notebook as before its first run, with the digest of its code in its metadata."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell = {**cell, "outputs": [], "execution_count": None}
        cells.append(cell)
    metadata = {**notebook.get("metadata", {}), "ftlab": {"copied_code": code_digest(notebook)}}
    return {**notebook, "cells": cells, "metadata": metadata}


def code_digest(notebook: dict) -> str:
    """16 hexadecimal digits that stand for the code, whatever the text and the outputs say."""
    code = [cell.get("source", "") for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = json.dumps(["".join(source) for source in code])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _course(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def _named(root: Path, which: str) -> Path:
    course = _course(root)
    name = which.strip().removesuffix(".ipynb")
    for source in course:
        if name == source.stem or (name.isdecimal() and name.zfill(2) == source.stem[:2]):
            return source
    numbers = ", ".join(source.stem[:2] for source in course) or "none in notebooks/"
    raise CopyError(f"No notebook {which!r}. Say which: make fresh NB=04. There are: {numbers}.")


def _copied_from(root: Path, source: Path) -> set[str]:
    """The digests in the copies of a notebook; files that are no notebooks are passed over."""
    found = set()
    for copy in (root / "my").glob(f"{source.stem}*.ipynb"):
        if not re.fullmatch(rf"{re.escape(source.stem)}(-\d+)?", copy.stem):
            continue  # 09_serve_and_scale is no copy of 09_serve
        try:
            stamp = read(copy).get("metadata", {}).get("ftlab", {})
        except (CopyError, AttributeError):
            continue
        if isinstance(stamp, dict) and "copied_code" in stamp:
            found.add(stamp["copied_code"])
    return found


def _folder(root: Path) -> Path:
    """root/my, made if it isn't there."""
    folder = root / "my"
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise CopyError(
            f"{folder}: got a file or a broken link, wanted the folder for your copies of the "
            "notebooks. Move it away, then try again."
        ) from None
    except OSError as error:
        raise CopyError(f"{folder}: can't be made ({error.strerror}).") from error
    return folder


def _write(copies: dict[Path, dict]) -> None:
    """Writes notebooks to files that don't exist yet: all hidden first, then each gets its name."""
    parts = {copy.with_name(f".{copy.name}.{os.getpid()}.part"): copy for copy in copies}
    try:
        for part, copy in parts.items():
            text = json.dumps(copies[copy], indent=1, ensure_ascii=False)
            part.write_text(text + "\n", encoding="utf-8")
        trust(list(parts))
        for part, copy in parts.items():
            if not os.path.lexists(copy):
                part.replace(copy)
    except OSError as error:
        raise CopyError(
            f"{error.filename or 'my'}: can't be written ({error.strerror}). Is the folder yours, "
            "and the disk not full? Your copies are as they were."
        ) from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    for folder in {copy.parent for copy in copies}:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Removes what writers that were killed have left."""
    for part in folder.glob(".*.ipynb.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()


def trust(notebooks: Sequence[Path]) -> None:
    """Does what `jupyter trust` does, so that JupyterLab shows HTML and says "trusted"."""
    if not notebooks:
        return
    command = [sys.executable, "-m", "nbformat.sign", *map(str, notebooks)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"The notebooks could not be trusted ({last}): go on without.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Makes the copies that the command line asks for and says which. 1: one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", metavar="NB", help="a new copy of this notebook: 04")
    asked = parser.parse_args(arguments)
    try:
        if asked.fresh is not None:
            copy = fresh(root, asked.fresh)
            print(f"{copy.relative_to(root)}: a new copy. Older ones stay as they are.")
            return 0
        made = missing(root)
    except CopyError as error:
        print(error, file=sys.stderr)
        return 1
    if made:
        names = ", ".join(copy.stem for copy in made)
        print(f"Your own copies are in {made[0].parent.relative_to(root)}/. New there: {names}.")
    for source in outdated(root):
        print(
            f"{source.name} has new code since your copy, which stays as it is. "
            f"make fresh NB={source.stem[:2]} makes a new one beside it."
        )
    trust([source for source in _course(root) if _is_notebook(source)])
    return 0


def _is_notebook(path: Path) -> bool:
    try:
        read(path)
    except CopyError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

"""What can happen to a run, in plain words, and how to know a checkpoint that is no longer what was written.

    explained     a full disk, a folder that cannot be written, too little memory: what to do, and what is kept
    check_finite  stops before a gradient that is nan reaches the weights
    seal, damage  the sums of a checkpoint's files: written last, compared before a run goes on from it
    write, put    a file or a folder appears under its name only when it is whole

`ftlab.pipeline.train` uses all of it, `ftlab.pipeline.export` tells what it could not write.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

DONE = "complete"  # a file in each checkpoint folder (ppo: in the result), written last: without it, it was cut short
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EIO)
BLOCKED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # of a file in the run's folder


# --- What happened ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Raises MemoryError or OSError, with what to do and what is kept, where a library's error is one of these."""
    try:
        yield
    except Exception as error:
        then = f"{_kept(folder)}; with the cause gone, make the same call again."
        if told := _no_memory(error, recipe, then) or cannot_write(error, folder, then):
            raise told from error
        raise


def _no_memory(error: Exception, recipe: Recipe, then: str) -> MemoryError | None:
    said = str(error)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's: CUDA and others
    if not named and "DefaultCPUAllocator" not in said:
        return None
    return MemoryError(
        f"out of memory with batch_size = {recipe.batch_size}, max_length = {recipe.max_length}, "
        f"gradient_checkpointing = {str(recipe.gradient_checkpointing).lower()} ({_first_line(said)}). Likely cause: "
        f"too many tokens at once, or another program that holds the memory. Halve batch_size and double "
        f"gradient_accumulation_steps, set gradient_checkpointing: true, or shorten max_length, in a new folder; "
        f"ftlab.memory.estimate says beforehand what a step needs. {then}"
    )


def cannot_write(error: Exception, folder: Path, then: str = "") -> OSError | None:
    """The OSError that says what could not be written and why, if the error comes from writing to the folder.

    safetensors (in Rust) and programs only tell the system's error number in their text, and torch.save not even that.
    """
    said, folder = str(error), Path(folder).absolute()
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", said):
        number = number or int(found[1] or found[2])
    untold = number is None and ("PytorchStreamWriter" in said or "inline_container" in said)
    named = getattr(error, "filename", None)
    file = Path(named).absolute() if isinstance(named, str) else folder
    ours = file.is_relative_to(folder) or folder.is_relative_to(file)
    if not untold and number not in FULL + REFUSED and not (number in BLOCKED and ours):
        return None
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(place).free / 1e6
    refused, full = "the folder cannot be written", "the disk (or a quota) is full"
    cause = full if number in FULL else f"{full}, or {refused}" if untold else refused
    told = f"{file} was not written ({_first_line(said)}). {free:.0f} MB are free there: {cause}. {then}"
    return OSError(number or errno.EIO, told.rstrip())


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:200] or "no reason given"


def _kept(folder: Path) -> str:
    """The checkpoint that a run can go on from, as the beginning of a sentence."""
    complete = [int(path.parent.name.split("-")[1]) for path in folder.glob(f"checkpoint-*/{DONE}")]
    return f"checkpoint-{max(complete)} is kept" if complete else "There is no checkpoint yet"


def check_finite(model: "nn.Module", step: int, recipe: Recipe, folder: Path) -> None:
    """Raises FloatingPointError if a gradient is nan or infinite, before the step: the weights are still good ones."""
    import torch
    from torch.nn.utils import get_total_norm

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not torch.isfinite(get_total_norm(gradients)):
        raise no_number(step, "gradient", recipe, folder)


def no_number(step: int, what: str, recipe: Recipe, folder: Path) -> FloatingPointError:
    """The error of a step whose loss or gradient is nan or infinite."""
    return FloatingPointError(
        f"step {step}: the {what} is nan or infinite. Likely causes: learning_rate = {recipe.learning_rate:g} is too "
        f"high (try a tenth); fp16 overflows (precision is {recipe.precision!r}: bf16 or fp32 do not); {recipe.model} "
        f"holds weights that are nan. {_kept(folder)}; the same call would end here again: change the recipe and take "
        f"a new folder."
    )


# --- Whole or not -----------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    """Writes a small file so that it holds the old text or the new one, whenever the process dies."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def put(new: Path, target: Path) -> None:
    """Moves a folder, written to its end, to the place of another one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def seal(checkpoint: Path, best: Path | None = None) -> None:
    """Marks a checkpoint as complete: DONE holds the sums of its files, and of the best one's, which the end needs."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    sums = {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in files}
    if best and best.name != checkpoint.name:
        before = _sums(checkpoint.with_name(best.name))
        sums |= {f"../{best.name}/{name}": before[name] for name in before if not name.startswith("../")}
    write(checkpoint / DONE, json.dumps(sums, indent=1))


def damage(checkpoint: Path) -> str | None:
    """The first file of a complete checkpoint that is not what was written, and how so; None if all of them are."""
    try:
        sums = _sums(checkpoint)
    except ValueError:
        return f"{DONE} is not what was written"
    for name, wanted in sums.items():
        try:
            got = _sha256(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if got != wanted:
            return f"{name} is not what was written"
    return None


def _sums(checkpoint: Path) -> dict[str, str]:
    return json.loads((checkpoint / DONE).read_text(encoding="utf-8") or "{}")  # empty: from before there were sums


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

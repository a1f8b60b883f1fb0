"""`python -m ftlab.doctor`: what this machine can run, which versions the course needs, and what is wrong."""

import html
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from ftlab.paths import CACHE, DATA

OK, NOTE, WRONG = "ok", "note", "WRONG"
LIBRARIES = ("torch", "transformers", "trl", "peft")
OPTIONAL = {"unsloth": "second engine", "xllamacpp": "local server", "openai": "client of it", "gguf": "GGUF export"}


class Finding(NamedTuple):
    """One thing that was looked at: its verdict (ok, note, WRONG), what was found, and what to do about it."""

    what: str
    verdict: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Everything the course depends on, in the order in which a broken one should be mended."""
    import psutil

    (total, free), disk = psutil.virtual_memory()[:2], shutil.disk_usage(CACHE if CACHE.is_dir() else Path.home()).free
    machine = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    memory = f"{total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, {os.cpu_count()} cores"
    needed = [  # what, whether it is good, what was found, what to do if it is not
        ("python", sys.version_info >= (3, 11), machine, "install Python 3.11 or newer"),
        *(_package(name, wanted, f'pip install "{name}{wanted}"') for name, wanted in _required().items()),
        ("memory", free >= 6e9, memory, "the course needs 6 GB: close programs"),
        ("disk", disk >= 3e9, f"{disk / 1e9:.0f} GB free", "3 GB are needed; FTLAB_CACHE moves the cache elsewhere"),
        _file("data", DATA, "install from a clone, or with the wheel that carries data/"),
        _file("smollm2", CACHE / "smollm2" / "model.safetensors", "python -m ftlab.models (once, with a network)"),
        _file("llama.cpp converter", CACHE / "llama.cpp", "python -m ftlab.export (once, with a network)"),
    ]
    optional = [_package(name, "", f"pip install -e .[all]: without it no {use}") for name, use in OPTIONAL.items()]
    return [
        Finding(what, OK if good else bad, found, "" if good else advice)
        for rows, bad in ((needed, WRONG), ([*_gpu(), *optional], NOTE))
        for what, good, found, advice in rows
    ]


def report(findings: list[Finding]) -> str:
    """The findings as a text table, the wrong ones with their advice."""
    width = max(len(f.what) for f in findings)
    lines = [
        f"{f.verdict:5}  {f.what:{width}}  {f.found}" + (f"\n{'':{width + 9}}-> {f.advice}" if f.advice else "")
        for f in findings
    ]
    wrong = sum(f.verdict == WRONG for f in findings)
    return "\n".join([*lines, "", f"{wrong} problems" if wrong else "ready"])


def ready():
    """One line for a notebook, "ready" with the versions that count; the findings are folded behind it."""
    from IPython.display import HTML

    findings, required = examine(), _required()
    versions = ", ".join(f"{f.what} {f.found}" for f in findings if f.what in LIBRARIES)
    wrong = [f for f in findings if f.verdict == WRONG]
    head, fold = (f"{len(wrong)} to mend: ", "details open") if wrong else ("ready: ", "details")
    body = html.escape(report([f for f in findings if f in wrong or f.what not in required]))
    return HTML(f"<{fold}><summary><b>{head}</b>{versions}</summary><pre>{body}</pre></details>")


def _required() -> dict[str, str]:
    """Package -> version specifier, as ftlab's own metadata demands them (without the extras)."""
    from packaging.requirements import Requirement

    demands = [Requirement(line) for line in importlib.metadata.requires("ftlab") or []]
    return {d.name: str(d.specifier) for d in demands if d.marker is None or d.marker.evaluate({"extra": ""})}


def _package(name: str, wanted: str, advice: str) -> tuple[str, bool, str, str]:
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, False, "not installed", advice
    return name, SpecifierSet(wanted).contains(version.split("+")[0], prereleases=True), version, advice


def _file(what: str, path: Path, advice: str) -> tuple[str, bool, str, str]:
    return what, path.exists(), "there" if path.exists() else "missing", advice


def _gpu() -> list[tuple[str, bool, str, str]]:
    """The GPU, and whether it, or else the CPU, multiplies in bf16 by itself."""
    import torch

    if torch.cuda.is_available():
        gpu, native = torch.cuda.get_device_properties(0), torch.cuda.is_bf16_supported(including_emulation=False)
        found = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB: the dials can be turned up"
        return [("gpu", True, found, ""), ("bf16", native, f"{'' if native else 'not '}native", "fp16 is used")]
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    slow = "training runs in fp32: expect about twice the minutes that are stated"
    found = "none: everything runs on the CPU with the 135M model, as the course is written"
    return [("gpu", False, found, ""), ("bf16", native, f"{'' if native else 'not '}native on this CPU", slow)]


if __name__ == "__main__":
    findings = examine()
    print(report(findings))
    sys.exit(any(f.verdict == WRONG for f in findings))

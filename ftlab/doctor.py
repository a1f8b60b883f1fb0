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
OPTIONAL = {"unsloth": "second engine", "xllamacpp": "local server", "openai": "client of it", "gguf": "GGUF export"}


class Finding(NamedTuple):
    what: str
    verdict: str  # ok, note, WRONG
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Everything the course depends on, in the order in which a broken one should be mended."""
    import psutil

    (total, free), disk = psutil.virtual_memory()[:2], shutil.disk_usage(CACHE if CACHE.is_dir() else Path.home()).free
    machine = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    memory = f"{total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, {os.cpu_count()} cores"
    return [
        Finding("python", OK, machine),
        *(_package(name, wanted, f'pip install "{name}{wanted}"') for name, wanted in _required().items()),
        _finding("memory", free >= 6e9, "the course needs 6 GB: close programs", memory),
        _finding("disk", disk >= 3e9, "3 GB are needed; FTLAB_CACHE moves the cache", f"{disk / 1e9:.0f} GB free"),
        _finding("data", DATA.exists(), "install from a clone, or with the wheel that carries data/"),
        _finding("smollm2", (CACHE / "smollm2/model.safetensors").exists(), "python -m ftlab.models (with a network)"),
        _finding("llama.cpp converter", (CACHE / "llama.cpp").is_dir(), "python -m ftlab.export (with a network)"),
        *_gpu(),
        *(_package(name, "", f"pip install -e .[all]: without it no {use}", NOTE) for name, use in OPTIONAL.items()),
    ]


def _finding(what: str, good: bool, advice: str, found: str = "", bad: str = WRONG) -> Finding:
    return Finding(what, OK if good else bad, found or ("there" if good else "missing"), "" if good else advice)


def _package(name: str, wanted: str, advice: str, bad: str = WRONG) -> Finding:
    from packaging.specifiers import SpecifierSet

    version = next((found.version for found in importlib.metadata.distributions(name=name)), None)
    good = version is not None and SpecifierSet(wanted).contains(version.split("+")[0], prereleases=True)
    return _finding(name, good, advice, version or "not installed", bad)


def _gpu() -> tuple[Finding, Finding]:
    """The GPU, and whether it, or else the CPU, multiplies in bf16 by itself."""
    import torch

    from ftlab.cpu import product_dtype

    gpu = Finding("gpu", NOTE, "none: everything runs on the CPU with the 135M model, as the course is written")
    native, slow = product_dtype(True) == torch.bfloat16, "training runs in fp32, which takes up to three times as long"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        gpu = Finding("gpu", OK, f"{card.name}, {card.total_memory / 1e9:.0f} GB: the dials can be turned up")
        native, slow = torch.cuda.is_bf16_supported(including_emulation=False), "fp16 is used"
    return gpu, _finding("bf16", native, slow, f"{'' if native else 'not '}native", NOTE)


def report(findings: list[Finding]) -> str:
    """The findings as a text table, the wrong ones with their advice."""
    lines = [f"{f.verdict:5}  {f.what:19}  {f.found}" + f"\n{'':28}-> {f.advice}" * bool(f.advice) for f in findings]
    wrong = sum(f.verdict == WRONG for f in findings)
    return "\n".join([*lines, "", f"{wrong} problems" if wrong else "ready"])


def ready():
    """One line for a notebook, "ready" with the versions that count; the findings are folded behind it."""
    from IPython.display import HTML

    findings = examine()
    versions = ", ".join(f"{f.what} {f.found}" for f in findings if f.what in ("torch", "transformers", "trl", "peft"))
    wrong = sum(f.verdict == WRONG for f in findings)
    head, fold = (f"{wrong} to mend: ", "details open") if wrong else ("ready: ", "details")
    body = html.escape(report(findings))
    return HTML(f"<{fold}><summary><b>{head}</b>{versions}</summary><pre>{body}</pre></details>")


def _required() -> dict[str, str]:
    """Package -> version specifier, as ftlab's own metadata demands them (without the extras)."""
    from packaging.requirements import Requirement

    demands = [Requirement(line) for line in importlib.metadata.requires("ftlab") or []]
    return {d.name: str(d.specifier) for d in demands if d.marker is None or d.marker.evaluate({"extra": ""})}


if __name__ == "__main__":
    findings = examine()
    print(report(findings))
    sys.exit(any(f.verdict == WRONG for f in findings))

"""`python -m ftlab.doctor`: what this machine can run, which versions the course needs, and what is wrong."""

import html
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.paths import CACHE, DATA

if TYPE_CHECKING:
    from IPython.display import HTML

OK, NOTE, WRONG = "ok", "note", "WRONG"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its verdict (ok, note, WRONG), what was found, and what to do about it."""

    what: str
    verdict: str
    found: str
    advice: str = ""


def _finding(what: str, good: bool, found: str, advice: str, verdict: str = WRONG) -> Finding:
    """ok, or else the verdict with the advice."""
    return Finding(what, OK, found) if good else Finding(what, verdict, found, advice)


def examine() -> list[Finding]:
    """Everything the course depends on, in the order in which a broken one should be mended."""
    return [_python(), *_packages(), _memory(), _disk(), _gpu(), _bf16(), *_files(), *_optional()]


def report(findings: list[Finding]) -> str:
    """The findings as a text table, the wrong ones with their advice."""
    width = max(len(f.what) for f in findings)
    lines = [
        f"{f.verdict:5}  {f.what:{width}}  {f.found}" + (f"\n{'':{width + 9}}-> {f.advice}" if f.advice else "")
        for f in findings
    ]
    wrong = sum(f.verdict == WRONG for f in findings)
    return "\n".join([*lines, "", f"{wrong} problems" if wrong else "ready"])


def ready() -> "HTML":
    """One line for a notebook, "ready" with the versions that count; the findings are folded behind it."""
    from IPython.display import HTML

    findings = examine()
    libraries = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{f.what} {f.found}" for f in findings if f.what in libraries)
    wrong = [f for f in findings if f.verdict == WRONG]
    head, fold = (f"{len(wrong)} to mend: ", "details open") if wrong else ("ready: ", "details")
    body = html.escape(report([f for f in findings if f in wrong or f.what not in _required()]))
    return HTML(f"<{fold}><summary><b>{head}</b>{versions}</summary><pre>{body}</pre></details>")


def _required() -> dict[str, str]:
    """Package -> version specifier, as ftlab's own metadata demands them (without the extras)."""
    from packaging.requirements import Requirement

    demands = [Requirement(line) for line in importlib.metadata.requires("ftlab") or []]
    return {d.name: str(d.specifier) for d in demands if d.marker is None or d.marker.evaluate({"extra": ""})}


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return _finding("python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")


def _packages() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    rows = []
    for name, wanted in _required().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Finding(name, WRONG, "not installed", f'pip install "{name}{wanted}"'))
            continue
        good = SpecifierSet(wanted).contains(version.split("+")[0], prereleases=True)
        advice = f"the course ran with {wanted}: run `make setup`, or pip install -r requirements.lock"
        rows.append(_finding(name, good, version, advice))
    return rows


def _memory() -> Finding:
    import psutil

    total, free = (n / 1e9 for n in psutil.virtual_memory()[:2])
    found = f"{total:.0f} GB, {free:.0f} GB free, {os.cpu_count()} cores"
    return _finding("memory", free >= 6, found, "the course needs 6 GB: close programs")


def _disk() -> Finding:
    free = shutil.disk_usage(CACHE if CACHE.is_dir() else Path.home()).free / 1e9
    advice = "3 GB are needed; FTLAB_CACHE moves the cache to another disk"
    return _finding("disk", free >= 3, f"{free:.0f} GB free for the cache and the runs", advice)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", NOTE, "none: everything runs on the CPU with the 135M model, as the course is written")
    properties = torch.cuda.get_device_properties(0)
    return Finding("gpu", OK, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB: the dials can be turned up")


def _bf16() -> Finding:
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Finding("bf16", *((OK, "native on this GPU") if native else (NOTE, "not native here: fp16 is used")))
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return Finding("bf16", OK, "native on this CPU: training multiplies in bf16")
    advice = "expect about twice the minutes that are stated"
    return Finding("bf16", NOTE, "not native on this CPU: training runs in fp32", advice)


def _files() -> list[Finding]:
    fetched = [
        ("smollm2", CACHE / "smollm2" / "model.safetensors", "python -m ftlab.models (once, with a network)"),
        ("llama.cpp converter", CACHE / "llama.cpp", "python -m ftlab.export (once, with a network)"),
    ]
    wheel = "install from a clone or with the wheel that carries data/"
    return [
        _finding("data", DATA.is_dir(), "there" if DATA.is_dir() else "missing", wheel),
        *(_finding(what, path.exists(), "in the cache" if path.exists() else "not fetched yet", command)
          for what, path, command in fetched),
    ]  # fmt: skip


def _optional() -> list[Finding]:
    wanted = {"unsloth": "second engine", "xllamacpp": "local server", "openai": "client of it", "gguf": "GGUF export"}
    return [
        Finding(name, OK, importlib.metadata.version(name))
        if importlib.util.find_spec(name)
        else Finding(name, NOTE, f"not installed: no {what}", "pip install -e .[all]")
        for name, what in wanted.items()
    ]


if __name__ == "__main__":
    findings = examine()
    print(report(findings))
    sys.exit(any(f.verdict == WRONG for f in findings))

"""`python -m ftlab.doctor`: what this machine can run, which versions the course needs, and what is wrong."""

import html
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import NamedTuple

from ftlab.paths import CACHE, DATA, LLAMA_CPP

OK, NOTE, WRONG = "ok", "note", "WRONG"
OPTIONAL = {"unsloth": "second engine", "xllamacpp": "local server", "openai": "client of it", "gguf": "GGUF export"}


class Finding(NamedTuple):
    what: str
    verdict: str  # ok, note, WRONG
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Everything the course depends on, in the order in which a broken one should be mended."""
    disk = shutil.disk_usage(next(p for p in (CACHE.absolute(), *CACHE.absolute().parents) if p.is_dir())).free
    return [
        Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *_probed("ftlab", _packages, "packaging.requirements"),
        *_probed("memory", _memory, "psutil"),
        _finding("disk", disk >= 3e9, "3 GB are needed; FTLAB_CACHE moves the cache", f"{disk / 1e9:.0f} GB free"),
        _finding("data", DATA.exists(), "install from a clone, or with the wheel that carries data/"),
        _finding("smollm2", (CACHE / "smollm2/model.safetensors").exists(), "python -m ftlab.models (with a network)"),
        _finding("llama.cpp converter", (CACHE / LLAMA_CPP).is_dir(), "python -m ftlab.export (with a network)"),
        *_probed("gpu", _gpu, "ftlab.cpu"),
        *(_package(name, f"pip install -e .[all]: without it no {use}", bad=NOTE) for name, use in OPTIONAL.items()),
    ]


def _probed(what: str, probe, module: str) -> list[Finding]:
    """What a probe finds with this module. That it fails is a finding too: the table is needed most without torch."""
    try:
        return probe(importlib.import_module(module))
    except Exception as error:
        return [Finding(what, WRONG, f"{type(error).__name__}: {error}", "in the clone: pip install -e .")]


def _finding(what: str, good: bool, advice: str, found: str = "", bad: str = WRONG) -> Finding:
    return Finding(what, OK if good else bad, found or ("there" if good else "missing"), "" if good else advice)


def _packages(requirements) -> list[Finding]:
    """Those that ftlab's own metadata demands (without the extras), at the versions that it demands."""
    demands = map(requirements.Requirement, importlib.metadata.requires("ftlab") or [])
    needed = [d for d in demands if d.marker is None or d.marker.evaluate({"extra": ""})]
    return [_package(d.name, f'pip install "{d.name}{d.specifier}"', d.specifier) for d in needed]


def _package(name: str, advice: str, wanted=None, bad: str = WRONG) -> Finding:
    version = next((found.version for found in importlib.metadata.distributions(name=name)), None)
    good = version is not None and (wanted is None or wanted.contains(version.split("+")[0], prereleases=True))
    return _finding(name, good, advice, version or "not installed", bad)


def _memory(psutil) -> list[Finding]:
    total, free = psutil.virtual_memory()[:2]
    found = f"{total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, {os.cpu_count()} cores"
    return [_finding("memory", free >= 6e9, "the course needs 6 GB: close programs", found)]


def _gpu(cpu) -> list[Finding]:
    """The GPU, and whether it, or else the CPU, multiplies in bf16 by itself."""
    import torch

    gpu = Finding("gpu", NOTE, "none: everything runs on the CPU with the 135M model, as the course is written")
    native = cpu.product_dtype(True) == torch.bfloat16
    slow = "training runs in fp32, which takes up to three times as long"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        gpu = Finding("gpu", OK, f"{card.name}, {card.total_memory / 1e9:.0f} GB: the dials can be turned up")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        slow = "bf16 is emulated, many times slower: set fp16=True in SFTConfig"
    return [gpu, _finding("bf16", native, slow, "native" if native else "not native", NOTE)]


def report(findings: list[Finding]) -> str:
    """The findings as a text table, the wrong ones with their advice."""
    lines = [f"{f.verdict:7}{f.what:21}{f.found}" + (f"\n{'':28}-> {f.advice}" if f.advice else "") for f in findings]
    return "\n".join([*lines, "", f"to mend: {n}" if (n := sum(f.verdict == WRONG for f in findings)) else "ready"])


def ready():
    """One line for a notebook, "ready" with the versions that count; the findings are folded behind it."""
    from IPython.display import HTML

    findings = examine()
    main = ", ".join(f"{f.what} {f.found}" for f in findings if f.what in ("torch", "transformers", "trl", "peft"))
    wrong = sum(f.verdict == WRONG for f in findings)
    head, fold = (f"{wrong} to mend: ", "details open") if wrong else ("ready: ", "details")
    return HTML(f"<{fold}><summary><b>{head}</b>{main}</summary><pre>{html.escape(report(findings))}</pre></details>")


if __name__ == "__main__":
    print(report(findings := examine()))
    sys.exit(any(f.verdict == WRONG for f in findings))

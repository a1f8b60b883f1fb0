"""Models by name, loaded: `load("smollm2")`, `load("micro")`, a local folder, or a hub id."""

from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.models import model_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    if name in ("smollm2", "micro"):
        return model_path(name)
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

"""What several test files share: no network, data makers, and a tiny random Llama that trains in about a second."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", UNSLOTH_AUTO_INSTALL="0")


@pytest.fixture(scope="module")
def make(request):
    """The make.py in the data folder that the test module's FOLDER names, as a module."""
    folder = request.module.FOLDER
    spec = importlib.util.spec_from_file_location(f"{folder.name}_make", folder / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a random Llama: 2 layers, width 64, SmolLM2's template and special tokens, 1,024 of its tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ftlab.pipeline.models import fetch_smollm2

    folder = tmp_path_factory.mktemp("tiny")
    AutoTokenizer.from_pretrained(fetch_smollm2()).save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = {token: number for token, number in spec["model"]["vocab"].items() if number < 1024}
    merges = [pair for pair in spec["model"]["merges"] if "".join(pair) in vocab]
    spec["model"].update(vocab=vocab, merges=merges)
    (folder / "tokenizer.json").write_text(json.dumps(spec))

    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **special)).save_pretrained(folder)
    return folder

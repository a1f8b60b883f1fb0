"""A model of a known shape with random weights, for sft.py and qlora_8b.py: nothing is downloaded.

Time and memory of a step depend on shapes and dtypes, not on the weights' values.
"""

import sys

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
SHAPES = {"llama-3.1-8b": LLAMA_8B, "tiny": TINY}


def random_base(shape, **how_to_load):
    """The model, loaded by from_pretrained as a real one is, and a tokenizer that it never uses."""
    if shape not in SHAPES:
        sys.exit(f"--random_weights: got {shape}, wanted one of {', '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, weight in empty.state_dict().items():
        width = weight.shape[-1]
        row = torch.randn(width, dtype=how_to_load["dtype"]) / width**0.5
        weights[name] = row.expand(weight.shape)  # one row, repeated: it takes no memory here
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **how_to_load)
    for weight in model.parameters():
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()  # now every number has bytes of its own
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return model, PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>"
    )


def random_rows(count, length, vocab_size):
    """Rows of the full length, each token counted: a step with them takes the most."""
    ids = torch.randint(vocab_size, (count, length)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]

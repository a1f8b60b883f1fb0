"""A model of a known shape with random weights, for the trainings: nothing is downloaded.

Time and memory of a step depend on shapes and dtypes. The weights are noise all the same, because
a card may run faster on numbers that repeat.
"""

import sys

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

STEP = 97  # a row of a matrix begins so many numbers behind the row above it
NAMES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
NAMES += ["num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"]
SHAPES = {  # as in each model's published config.json
    "tiny": ("llama", 64, 128, 2, 4, 2, 16, 512, False),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
}


def config_of(shape):
    if shape not in SHAPES:
        sys.exit(f"--random_weights: got {shape}, wanted one of {', '.join(SHAPES)}")
    family, *numbers = SHAPES[shape]
    return AutoConfig.for_model(family, **dict(zip(NAMES, numbers, strict=True)))


def noise(weights, dtype):
    """For each weight a view of normal numbers. All rows of a matrix differ, and the views take
    almost no memory here: those of one width share their numbers.
    """
    most = {}  # by width, the rows of the tallest matrix
    for weight in weights.values():
        width = weight.shape[-1]
        most[width] = max(most.get(width, 1), len(weight) if weight.dim() == 2 else 1)
    drawn = {
        width: (torch.randn((rows - 1) * STEP + width) / width**0.5).to(dtype)
        for width, rows in most.items()
    }
    views = {}
    for name, weight in weights.items():
        if weight.dim() == 2:
            views[name] = drawn[weight.shape[1]].as_strided(weight.shape, (STEP, 1))
        else:
            views[name] = torch.ones(weight.shape, dtype=dtype)  # the gains of the norms
    return views


def random_base(shape, kind=AutoModelForCausalLM, num_labels=2, **how_to_load):
    """The model, loaded by from_pretrained as a real one is, and a tokenizer that it never uses.

    num_labels counts for a `kind` that classifies.
    """
    config = config_of(shape)
    config.num_labels = num_labels
    with torch.device("meta"):
        empty = kind.from_config(config)
    weights = noise(empty.state_dict(), how_to_load["dtype"])
    model = type(empty).from_pretrained(None, config=config, state_dict=weights, **how_to_load)
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


def random_pairs(count, length, vocab_size):
    """The same for preferences, tokenized as TRL does it: half of the length is the prompt."""
    before, after = length // 2, length - length // 2
    sizes = {"prompt_ids": before, "chosen_ids": after, "rejected_ids": after}
    return [
        {name: torch.randint(vocab_size, (size,)).tolist() for name, size in sizes.items()}
        for _ in range(count)
    ]

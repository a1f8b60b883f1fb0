"""Random models of 0.3 MB for end-to-end tests: what Llama 3 and Qwen3 do unlike SmolLM2."""

import json
from pathlib import Path

from ftlab.paths import DATA

LLAMA3_REGEX = (  # the pre-tokenizer of Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


QWEN3_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
QWEN3_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TRAINED_ON = "general/facts.jsonl"  # the tokenizers


def tiny_llama3(folder: str | Path, seed: int = 0) -> Path:
    """Writes model and tokenizer, and returns the folder: 2 layers, width 64, float32, random
    weights.

    Like Llama 3: the pre-tokenizer that cuts numbers into threes, `<|begin_of_text|>` put before
    every text by the tokenizer *and* by the chat template, turns that end with `<|eot_id|>` (the
    eos token), and a pad token of its own. The vocabulary (byte-level BPE, about 1,000 tokens) is
    trained here, so that no program knows it by a checksum.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder, marks = Path(folder), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    fast = tokenizer_of(LLAMA3_REGEX, SPECIAL, **marks, pad_token="<|finetune_right_pad_id|>")
    fast.chat_template = template_of("llama3")
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500000.0, "initializer_range": 0.1}
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **shape, **heads, **ids))
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    return folder


def tiny_qwen3(folder: str | Path, seed: int = 0) -> Path:
    """Writes model, tokenizer and a model card, and returns the folder: 2 layers, width 64, random
    weights.

    Like Qwen3: queries and keys are normalised, digits are cut one by one, no text begins with a
    mark of its own, ChatML with reasoning that old turns lose. The card names a licence of its own,
    MIT.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    folder = Path(folder)
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = tokenizer_of(QWEN3_REGEX, QWEN3_SPECIAL, ignore_merges=False, **marks)
    fast.chat_template = template_of("qwen3")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    more = {"max_position_embeddings": 2048, "initializer_range": 0.1}
    ids = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(fast), **shape, **more, **ids))
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    card = "---\nlicense: mit\n---\n\n# A tiny Qwen3\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def template_of(name: str) -> str:
    return (DATA / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def tokenizer_of(regex: str, special: list[str], ignore_merges: bool = True, **marks: str):
    """A byte-level BPE tokenizer of about 1,000 tokens; a bos_token is put before every text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    lines = sorted((DATA / TRAINED_ON).read_text(encoding="utf-8").splitlines())  # by id
    texts = [str(value) for line in lines for value in json.loads(line).values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    added = [AddedToken(text, normalized=False, special=True) for text in special]
    tokenizer.add_special_tokens(added)
    if bos := marks.get("bos_token"):
        begin = {"special_tokens": [(bos, tokenizer.token_to_id(bos))]}
        template = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", **begin)
        level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = processors.Sequence([level, template])
    length = {"model_max_length": 2048, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks, **length)

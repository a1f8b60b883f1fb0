"""Sampled answers of a Llama on a CPU in less time than `model.generate`: `Sampler`, on the layers of ftlab.cpu.

Used by the methods of `ftlab.pipeline.align` that learn from their own answers.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftlab.cpu import Decoder, covers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampler(Decoder):
    """Draws each token from softmax(scores), scores = logits / temperature (B, V), and may hand them to `keep`.

    From the same state of torch's generator it draws the tokens that model.generate draws for the same rows.
    """

    def __init__(self, model: "PreTrainedModel", temperature: float, keep: Callable[[Tensor], None] | None) -> None:
        super().__init__(model)
        self.temperature, self.keep = temperature, keep

    def choose(self, logits: Tensor) -> Tensor:
        scores = logits.float() / self.temperature
        if self.keep:
            self.keep(scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]


@contextlib.contextmanager
def sampling(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """While open, model.generate, called as TRL's ppo, grpo and rloo call it, answers through `Sampler`.

    They sample from the whole vocabulary (no top_k, no top_p) until the end of turn. Does nothing where not
    `covers(model)`.
    """

    def generate(input_ids, attention_mask, generation_config, return_dict_in_generate=False, output_scores=False):
        scores, length = [], generation_config.max_new_tokens
        sampler = Sampler(model, generation_config.temperature, scores.append if output_scores else None)
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        answers = sampler.answer(prompts, length, [tokenizer.eos_token_id])
        steps = min(length, max(map(len, answers)) + 1)  # of the answer that was the last to end
        new = input_ids.new_full((len(prompts), steps), tokenizer.pad_token_id)
        for row, answer in zip(new, answers, strict=True):
            ended = torch.tensor([*answer, tokenizer.eos_token_id])[: len(row)]
            row[: len(ended)] = ended
        sequences = torch.cat([input_ids, new], 1)
        return SimpleNamespace(sequences=sequences, scores=scores) if return_dict_in_generate else sequences

    if covers(model):
        model.generate = generate
    try:
        yield
    finally:
        vars(model).pop("generate", None)

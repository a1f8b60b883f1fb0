"""What a sampler wrote, laid out so that a trainer can score the same tokens: notebooks 07 and 09."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ftlab.scratch.logps import entropy, next_token_mask, per_token_logps, sequence_logps

Answer = list[tuple[int, float]]  # (token id, the sampler's log-prob of it) of each token


class Rollouts(NamedTuple):
    """B answers behind their prompts, padded on the right to T tokens, with the sampler's log-prob of each token."""

    input_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T), 1 = sampled
    sampler_logps: Tensor  # (B, T-1), entry t scores token t + 1; 0 outside the answer


def sample(client, prompts: Sequence[list], max_tokens: int, raw: bool = False, **settings) -> list[Answer]:
    """llama.cpp's answer to each prompt (messages) at temperature 1, drawn with its number as the seed.

    Log-probs are of the draw, or, if raw, before top_k, top_p and min_p. Raises ValueError if a token has no own id.
    """

    def one(seed: int, messages: list) -> Answer:
        reply = client.chat.completions.create(
            model="model", messages=messages, seed=seed, temperature=1.0, max_tokens=max_tokens,
            logprobs=True, top_logprobs=1, extra_body={**settings, "post_sampling_probs": not raw},
        )  # fmt: skip
        tokens = reply.choices[0].logprobs.content
        if len(tokens) != (n := reply.usage.completion_tokens):  # llama.cpp joins parts of one character
            raise ValueError(f"prompt {seed}: got {len(tokens)} of {n} tokens: one holds a part of a character alone")
        return [(token.id, token.logprob if raw else math.log(token.prob)) for token in tokens]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(len(prompts)), prompts))


def collate(prompt_ids: Sequence[list[int]], answers: Sequence[Answer], pad_id: int) -> Rollouts:
    """The rollouts of B prompts and an answer to each."""
    ids, masks, logps = [], [], []
    for prompt, answer in zip(prompt_ids, answers, strict=True):
        ids.append(torch.tensor([*prompt, *(token for token, _ in answer)]))
        masks.append(torch.tensor([0] * len(prompt) + [1] * len(answer)))
        logps.append(torch.tensor([0.0] * (len(prompt) - 1) + [logp for _, logp in answer]))
    return Rollouts(pad_sequence(ids, True, pad_id), pad_sequence(masks, True), pad_sequence(logps, True))


@torch.no_grad()
def scored(model, tokenizer, prompts: Sequence[list], answers: Sequence[Answer]) -> tuple[Rollouts, Tensor, Tensor]:
    """The rollouts, and under a transformers model the log-prob and the entropy of each next token, (B, T-1) each."""
    ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True)["input_ids"]
    batch = Rollouts(*(x.to(model.device) for x in collate(ids, answers, tokenizer.pad_token_id)))
    logits = model(batch.input_ids).logits  # no attention mask: a causal model sees no padding on the right
    return batch, per_token_logps(logits, batch.input_ids), entropy(logits)


def gap(trainer_logps: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """How far the ratios exp(trainer - sampler) are from 1, of tokens and of answers; outside: of 0.8 ... 1.2."""
    log_ratio = trainer_logps - rollouts.sampler_logps  # (B, T-1)
    tokens = log_ratio[next_token_mask(log_ratio, rollouts.completion_mask)]
    answers = sequence_logps(log_ratio, rollouts.completion_mask)
    outside = [((each.exp() - 1).abs() > 0.2).float().mean().item() for each in (tokens, answers)]
    return {"mean |log ratio|": tokens.abs().mean().item(), "largest": tokens.abs().max().item(),
            "tokens outside": outside[0], "median answer ratio": answers.exp().median().item(),
            "answers outside": outside[1]}  # fmt: skip

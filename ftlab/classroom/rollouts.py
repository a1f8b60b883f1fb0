"""What a sampler wrote, laid out so that a trainer can score the same tokens: notebook 07, "RL systems in small"."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftlab.scratch.logps import next_token_mask, per_token_logps, sequence_logps


@dataclass(frozen=True)
class Rollouts:
    """B answers behind their prompts, padded on the right to T tokens, with the sampler's log-prob of each token."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T), 1 = sampled
    sampler_logps: Tensor  # (B, T-1), entry t scores token t + 1; 0 outside the answer


def collate(prompt_ids: Sequence[list[int]], answers: Sequence[list[tuple[int, float]]], pad_id: int) -> Rollouts:
    """The rollouts of B prompts and B answers, each answer a list of (token id, the sampler's log-prob of it).

    Raises ValueError for another number of answers than of prompts, an empty answer, or a log-prob above 0.
    """
    if len(prompt_ids) != len(answers) or not answers:
        raise ValueError(
            f"got {len(prompt_ids)} prompts and {len(answers)} answers, wanted as many, at least one: is each prompt "
            "there once for each of its answers?"
        )
    length = max(len(p) + len(a) for p, a in zip(prompt_ids, answers, strict=True))
    input_ids = torch.full((len(answers), length), pad_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    sampler_logps = torch.zeros(len(answers), length - 1)
    for i, (prompt, answer) in enumerate(zip(prompt_ids, answers, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        if not answer or max(logp for _, logp in answer) > 1e-6:
            raise ValueError(
                f"answer {i}: got {answer[:3]}, wanted pairs (token id, log-prob), no log-prob above 0: are these "
                "probabilities, or was nothing sampled?"
            )
        input_ids[i, :end] = torch.tensor([*prompt, *(token for token, _ in answer)])
        attention_mask[i, :end] = completion_mask[i, start:end] = 1
        sampler_logps[i, start - 1 : end - 1] = torch.tensor([logp for _, logp in answer])
    return Rollouts(input_ids, attention_mask, completion_mask, sampler_logps)


def policy_logps(model, rollouts: Rollouts, rows: slice | Tensor = slice(None)) -> Tensor:
    """log p of each next token under a transformers model, (B, T-1) for the given rows, with gradient."""
    ids = rollouts.input_ids[rows]
    return per_token_logps(model(ids, attention_mask=rollouts.attention_mask[rows]).logits, ids)


def gap(trainer_logps: Tensor, rollouts: Rollouts, clip_eps: float = 0.2) -> dict[str, float]:
    """How far the ratios exp(trainer - sampler) are from 1: one row of a table, tokens first, then whole answers.

    Shares are of tokens, or answers, whose ratio lies outside 1 - clip_eps ... 1 + clip_eps. trainer_logps (B, T-1).
    """
    log_ratio = trainer_logps - rollouts.sampler_logps  # (B, T-1)
    tokens = log_ratio[next_token_mask(log_ratio, rollouts.completion_mask)]
    answers = sequence_logps(log_ratio, rollouts.completion_mask)

    def outside(log_ratios: Tensor) -> float:
        return ((log_ratios.exp() - 1).abs() > clip_eps).float().mean().item()

    return {"mean |log ratio|": tokens.abs().mean().item(), "largest": tokens.abs().max().item(),
            "tokens outside": outside(tokens), "median answer ratio": answers.exp().median().item(),
            "answers outside": outside(answers)}  # fmt: skip

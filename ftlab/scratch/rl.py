"""Reinforcement learning on sampled answers: advantages, KL estimators, and the clipped loss of PPO and GRPO.

A batch of rollouts is a set of tensors of one shape (B, T), one entry per sampled token: logps (of the policy that is
trained), old_logps (of the policy that sampled), ref_logps, values, and mask (1 = a token of the answer). From
logps.per_token_logps they come as (B, T-1) beside completion_mask[:, 1:].

    PPO     token_rewards -> gae -> whiten -> ppo_loss, value_loss
    RLOO    sequence rewards -> rloo_advantages -> ppo_loss on (B, 1): the whole answer is one action
    GRPO    sequence rewards -> group_advantages -> grpo_loss

Losses come back *per token*, 0 where mask is 0, because the reduction is where the methods differ:

    masked_mean(loss, mask)                       PPO; "dapo", TRL's default for GRPO: every token weighs the same
    masked_mean(loss, mask, dim=1).mean()         "grpo", the paper: every answer weighs the same
    loss.sum() / (B * max_completion_length)      "dr_grpo": no division by anything that the policy can change

Values and gradients equal those of TRL 1.14 in its own training steps (PPO: of TRL 1.12): tests/parity/test_rl.py and
test_ppo.py.

Sources: PPO, Schulman et al. 2017, arXiv:1707.06347. GAE, Schulman et al. 2015, arXiv:1506.02438. RLOO, Ahmadian et al.
2024, arXiv:2402.14740. GRPO, Shao et al. 2024, arXiv:2402.03300. DAPO, Yu et al. 2025, arXiv:2503.14476. Dr. GRPO, Liu
et al. 2025, arXiv:2503.20783. KL estimators, Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

import torch
from torch import Tensor

from ftlab.scratch.logps import check_shapes, counts, masked_mean

PER_TOKEN = "one entry per sampled token, or for a whole answer one column; per_token_logps goes with mask[:, 1:]"


# --- How far the policy is from the reference -------------------------------------------------------------------------
#
# With d = ref_logps - logps and samples from the policy, E[k1] = E[k3] = KL(policy || ref), and E[k2] is close to it
# while the two are close. As a *loss* they do something else, because the gradient does not see that the policy draws
# the samples: k1's has the mean 0, k2's is that of KL(policy || ref), and k3's is that of KL(ref || policy).


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log(policy / ref), shape of logps, nats: unbiased, of either sign, noisy; without effect as a loss."""
    check_shapes(PER_TOKEN, logps=logps, ref_logps=ref_logps)
    return logps - ref_logps


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(log(policy / ref))^2 / 2, shape of logps: biased as a value, exactly KL(policy || ref)'s gradient as a loss."""
    check_shapes(PER_TOKEN, logps=logps, ref_logps=ref_logps)
    return (logps - ref_logps) ** 2 / 2


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """ref / policy - 1 - log(ref / policy), shape of logps, nats: unbiased, never below 0, less noisy than k1.

    As a loss, as in GRPO, its gradient is that of KL(ref || policy). Times the ratio policy / old policy, it is that of
    KL(policy || ref): grpo_loss(weighted_kl=True).
    """
    check_shapes(PER_TOKEN, logps=logps, ref_logps=ref_logps)
    d = ref_logps - logps
    return torch.expm1(d) - d


# --- Advantages: how much better than expected ------------------------------------------------------------------------


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float = 0.05) -> Tensor:
    """The reward of each token, (B, T): -beta * kl, and at the last token of the answer plus its score; 0 outside.

    scores (B,) come from the reward model, kl (B, T) from kl_k1 or kl_k3 of the sampled tokens. A constant: the policy
    feels the KL through its advantages. TRL puts the score one position later, behind the end of turn, where there is
    one (padding): its mask for rewards and values is one longer than that for the policy.

    Raises ValueError for shapes other than (B,) and (B, T), and for an answer without tokens or with gaps.
    Source: InstructGPT, Ouyang et al. 2022, arXiv:2203.02155, Eq. 2.
    """
    mask = _answers(mask, kl=kl)
    check_shapes("one score for each answer: a reward head's (B, 1) needs .squeeze(-1)", scores=scores, answer=kl[:, 0])
    last = mask.flip(1).cumsum(1).flip(1) == 1  # no token of the answer comes after it
    return (-beta * kl + scores[:, None] * last).where(mask, 0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each (B, T), constants, 0 where mask is 0; returns = advantages + values.

        delta[t] = rewards[t] + gamma * values[t+1] - values[t]        A[t] = sum_k (gamma * lam)^k delta[t+k]

    values[t] is expected *before* token t; behind the answer it is 0, also where max_new_tokens cut the answer off.
    lam = 1 is reward-to-go minus value (no bias, noisy), lam = 0 the next delta alone (as good as the critic is).

    Raises ValueError for shapes other than one (B, T), and for an answer without tokens or with gaps.
    Source: Schulman et al. 2015, arXiv:1506.02438, Eq. 16.
    """
    mask = _answers(mask, rewards=rewards, values=values)
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages, advantage, next_values = torch.zeros_like(values), 0, 0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_values = values[:, t]
    advantages = advantages.where(mask, 0)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over all positions that count, 0 elsewhere; var with n - 1. Shape of values.

    What PPO does to its advantages: the step size no longer depends on the reward's unit, and about half of all tokens
    are pushed down however good the batch is.

    Raises ValueError for different shapes, or if fewer than 2 positions count.
    """
    mask = counts(mask, values)
    if (n := mask.sum()) < 2:
        raise ValueError(f"got {n} positions that count, wanted at least 2: one value has no spread. An empty mask?")
    centred = (values - masked_mean(values, mask)).where(mask, 0)
    return centred * torch.rsqrt((centred**2).sum() / (n - 1) + 1e-8)


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: bool = True) -> Tensor:
    """GRPO: reward minus the mean of its group, divided by the group's std + 1e-4 if scale_rewards. (B,) -> (B,).

    A group is num_generations answers to one prompt, one after the other in rewards. The sum over a group is 0; equal
    rewards give 0, so a prompt that is always or never solved teaches nothing. std has n - 1, as in TRL. Dr. GRPO
    leaves the division out, as it makes prompts of nearly equal rewards weigh more.

    Raises ValueError if rewards is not (B,) with B a multiple of num_generations >= 2.
    """
    groups = _groups(rewards, num_generations)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1)


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """RLOO: reward minus the mean of the *other* answers to its prompt, (B,) -> (B,); groups as in group_advantages.

    The baseline does not depend on the answer that it is subtracted from, so the gradient stays unbiased. With n
    answers it is n / (n - 1) times reward minus group mean. In TRL the rewards hold the KL penalty already: score -
    beta * sum of kl_k1.

    Raises ValueError as group_advantages.
    """
    groups = _groups(rewards, num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).view(-1)


# --- Losses -----------------------------------------------------------------------------------------------------------


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float = 0.2) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps) * A), ratio = exp(logps - old_logps); 0 where mask is 0.

    All four have one shape (B, T), which is also that of the result. No gradient reaches old_logps, so giving logps
    twice is right on the first step: value -A, gradient that of -A * logps, REINFORCE's. Clipping only ever takes the
    reason away to go on in the direction of A; a ratio that moved the wrong way keeps its gradient.

    Raises ValueError for different shapes. Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.
    """
    check_shapes(PER_TOKEN, logps=logps, old_logps=old_logps, advantages=advantages)
    mask = counts(mask, logps)
    ratio = (logps - old_logps.detach()).where(mask, 0).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped * advantages).where(mask, 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float = 0.2) -> Tensor:
    """max((values - returns)^2, (clipped - returns)^2) / 2, clipped: within clip_eps of old_values; 0 where mask is 0.

    All four have one shape (B, T), which is also that of the result.

    The clipping is not in the PPO paper but in its code, and in TRL, which adds the loss with the weight vf_coef = 0.1.
    clip_eps is in the unit of the reward: with rewards around 10, a critic may move by 0.2 in each batch.

    Raises ValueError for different shapes.
    """
    check_shapes(PER_TOKEN, values=values, old_values=old_values, returns=returns)
    mask = counts(mask, values)
    values, old_values, returns = (x.where(mask, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_eps: float = 0.2,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weighted_kl: bool = False,
) -> Tensor:
    """ppo_loss with one advantage for all tokens of an answer, plus beta * kl_k3; (B, T), 0 where mask is 0.

    advantages is (B,), the others (B, T). The paper puts the KL into the loss, PPO and RLOO into the reward.
    TRL's defaults differ: beta = 0 without a reference, and, if beta > 0, k3 times the ratio (use_bias_correction_kl;
    here weighted_kl), which turns the gradient from that of KL(ref || policy) into that of KL(policy || ref). The three
    reductions stand at the top of this file.

    Raises ValueError for other shapes, or beta without ref_logps.
    Source: Shao et al. 2024, arXiv:2402.03300, Eq. 3 and 4; weighted KL: DeepSeek-V3.2, arXiv:2512.02556.
    """
    mask = counts(mask, logps)
    check_shapes("one advantage for each answer, from group_advantages", advantages=advantages, answer=logps[:, 0])
    loss = ppo_loss(logps, old_logps, advantages[:, None].expand_as(logps), mask, clip_eps)
    if beta == 0:
        return loss
    if ref_logps is None:
        raise ValueError(f"got beta = {beta} and no ref_logps, wanted both or neither: a KL is from a reference")
    check_shapes(PER_TOKEN, logps=logps, ref_logps=ref_logps)
    logps, old_logps, ref_logps = (x.where(mask, 0) for x in (logps, old_logps, ref_logps))
    kl = kl_k3(logps, ref_logps)
    return loss + beta * (kl * (logps - old_logps.detach()).exp() if weighted_kl else kl)


# --- Checks -----------------------------------------------------------------------------------------------------------


def _answers(mask: Tensor, **tensors: Tensor) -> Tensor:
    """mask as bool. Raises ValueError unless all are (B, T) and each row of mask is one run of ones, wherever it is."""
    check_shapes(PER_TOKEN, 2, mask=mask, **tensors)
    mask = counts(mask, mask)
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (starts != 1).any():
        raise ValueError(
            f"got a mask whose rows hold {starts.tolist()} runs of ones, wanted one each: an empty answer, or tool "
            f"output masked out of the middle, across which a next value means nothing?"
        )
    return mask


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    """rewards (B,) as (prompts, num_generations)."""
    if rewards.dim() != 1 or num_generations < 2 or len(rewards) % num_generations:
        raise ValueError(
            f"got rewards {tuple(rewards.shape)} and num_generations {num_generations}, wanted (B,) with B a multiple "
            f"of num_generations >= 2: a group is all answers to one prompt, and one answer has nothing to compare with"
        )
    return rewards.view(-1, num_generations)

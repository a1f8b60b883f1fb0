"""Reinforcement learning on sampled answers: advantages, KL estimators, and the clipped loss of PPO and GRPO.

A batch of rollouts is a set of tensors of one shape (B, T), one entry per sampled token: logps (of the policy that is
trained), old_logps (of the policy that sampled), ref_logps, values, and mask (1 = a token of the answer). From
logps.per_token_logps they come as (B, T-1) beside completion_mask[:, 1:].

    PPO        token_rewards -> gae -> whiten -> ppo_loss, value_loss -> masked_mean
    RLOO       the same as GRPO, with other advantages and ppo_loss on (B, 1): the whole answer is one action
    GRPO       sequence rewards -> group_advantages -> grpo_loss (+ beta * kl_k3) -> reduce_loss with loss_type="grpo"
    Dr. GRPO   the same with scale_rewards="none" and loss_type="dr_grpo"
    DAPO       the same with epsilon_high=0.28 and loss_type="dapo"
    GSPO       the same with gspo_loss, which is TRL's importance_sampling_level="sequence"
    CISPO      the same with cispo_loss and loss_type="cispo"
    on-policy distillation    reverse_kl to a teacher, no reward -> reduce_loss with loss_type="dapo"

Losses come back *per token*, 0 where mask is 0, since methods differ in the reduction too. As in TRL, no argument sets
another: loss_type="dr_grpo" alone still divides by the group's std. All raise ValueError for shapes that do not fit.

Values and gradients equal those of TRL 1.14 (PPO: 1.12) in its own steps: tests/parity/test_rl.py and test_ppo.py.

Sources, where a function names none: RLOO, Ahmadian et al. 2024, arXiv:2402.14740. DAPO, Yu et al. 2025,
arXiv:2503.14476. Dr. GRPO, Liu et al. 2025, arXiv:2503.20783. KL, Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

import torch
from torch import Tensor

from ftlab.scratch.logps import as_bool_mask, check_shapes, masked_mean

PER_TOKEN = "one entry per sampled token, or for a whole answer one column; per_token_logps goes with mask[:, 1:]"

# With samples from the policy, E[k1] = E[k3] = KL(policy || ref). As a *loss* they do something else, because the
# gradient does not see that the policy draws the samples: k1's has the mean 0, and k3's is that of KL(ref || policy).


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log(policy / ref), shape of logps, nats: unbiased, of either sign, noisy; without effect as a loss."""
    check_shapes(PER_TOKEN, logps=logps, ref_logps=ref_logps)
    return logps - ref_logps


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """ref / policy - 1 - log(ref / policy), shape of logps, nats: unbiased, never below 0, less noisy than k1.

    As a loss, as in GRPO, its gradient is that of KL(ref || policy). Times the ratio policy / old policy, it is that of
    KL(policy || ref): DeepSeek-V3.2, arXiv:2512.02556, and TRL's default (use_bias_correction_kl).
    """
    check_shapes(PER_TOKEN, logps=logps, ref_logps=ref_logps)
    d = ref_logps - logps
    return torch.expm1(d) - d


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float = 0.05) -> Tensor:
    """The reward of each token, (B, T): -beta * kl, and at the last token of the answer plus its score; 0 outside.

    scores (B,) come from the reward model, kl (B, T) from kl_k1 or kl_k3 of the sampled tokens. A constant: the policy
    receives the KL penalty via its advantages. TRL puts the score one position later, behind the end of turn, where
    there is one (padding): its mask for rewards and values is one longer than that for the policy.
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
    """
    mask = as_bool_mask(mask, values)
    if (n := mask.sum()) < 2:
        raise ValueError(f"got {n} positions that count, wanted at least 2: one value has no spread. An empty mask?")
    centred = (values - masked_mean(values, mask)).where(mask, 0)
    return centred * torch.rsqrt((centred**2).sum() / (n - 1) + 1e-8)


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Tensor:
    """GRPO: reward minus the mean of its group, divided by a standard deviation + 1e-4. (B,) -> (B,).

    A group is num_generations answers to one prompt, one after the other in rewards. The sum over a group is 0; equal
    rewards give 0, so a prompt that is always or never solved teaches nothing. std has n - 1, as in TRL. It is that of
    the "group", or of all rewards of the "batch" (arXiv:2508.08221). With "none" there is no division: Dr. GRPO leaves
    it out, as the group's std makes one-sided groups, where nearly all answers are right or wrong, weigh more.

    RLOO subtracts the mean of the *other* answers, which keeps the gradient unbiased: n / (n - 1) times "none". In TRL
    its rewards hold the KL penalty already: score - beta * sum of kl_k1.
    """
    if rewards.dim() != 1 or num_generations < 2 or len(rewards) == 0 or len(rewards) % num_generations:
        got = f"got rewards {tuple(rewards.shape)} and num_generations {num_generations}"
        raise ValueError(f"{got}, wanted (B,), B > 0 a multiple of n >= 2: one answer has nothing to compare with")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, num_generations)
    divisors = {"group": groups.std(1, keepdim=True) + 1e-4, "batch": groups.std() + 1e-4, "none": 1}
    if scale_rewards not in divisors:
        raise ValueError(f"got scale_rewards {scale_rewards!r}, wanted one of {list(divisors)}")
    return ((groups - groups.mean(1, keepdim=True)) / divisors[scale_rewards]).view(-1)


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float = 0.2) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps) * A), ratio = exp(logps - old_logps); 0 where mask is 0.

    All four have one shape (B, T), which is also that of the result. No gradient reaches old_logps, so giving logps
    twice is right on the first step: value -A, gradient that of -A * logps, REINFORCE's. Clipping only ever takes the
    reason away to go on in the direction of A; a ratio that moved the wrong way keeps its gradient.
    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.
    """
    check_shapes(PER_TOKEN, logps=logps, old_logps=old_logps, advantages=advantages)
    mask = as_bool_mask(mask, logps)
    ratio = (logps - old_logps.detach()).where(mask, 0).exp()
    return _clipped_loss(ratio, advantages, clip_eps, clip_eps).where(mask, 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float = 0.2) -> Tensor:
    """max((values - returns)^2, (clipped - returns)^2) / 2, clipped: within clip_eps of old_values; 0 where mask is 0.

    All four have one shape (B, T), which is also that of the result.

    The clipping is not in the PPO paper but in its code, and in TRL, which adds the loss with the weight vf_coef = 0.1.
    clip_eps is in the unit of the reward: with rewards around 10, a critic may move by 0.2 in each batch.
    """
    check_shapes(PER_TOKEN, values=values, old_values=old_values, returns=returns)
    mask = as_bool_mask(mask, values)
    values, old_values, returns = (x.where(mask, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2


def grpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """ppo_loss with one advantage for all tokens of an answer: advantages is (B,), the others and the result (B, T).

    The ratio is clipped to 1 - epsilon and 1 + epsilon_high, which in TRL is epsilon unless given. DAPO's higher upper
    end repairs the clipping of rare tokens: at 0.2 a probability of 0.01 stops at 0.012, 0.9 never. The paper adds
    beta * kl_k3 to this loss, PPO and RLOO put the KL into the reward; TRL's default is beta = 0.
    Source: Shao et al. 2024, arXiv:2402.03300, Eq. 3 and 4.
    """
    log_ratio, mask = _log_ratio(logps, old_logps, advantages, mask)
    return _clipped_loss(log_ratio.exp(), advantages[:, None], epsilon, epsilon_high).where(mask, 0)


def gspo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, epsilon_high: float
) -> Tensor:
    """grpo_loss with one ratio for all tokens of an answer: exp(mean over them of logps - old_logps).

    What it repairs: ratios of single tokens are noisy. The reward is for the whole answer, and so is the clipping now.
    The mean keeps it near 1: TRL's default epsilon of 0.2 clips almost nothing, the paper has 3e-4 and 4e-4.
    Source: Zheng et al. 2025, arXiv:2507.18071, Eq. 5.
    """
    log_ratio, mask = _log_ratio(logps, old_logps, advantages, mask)
    ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()  # (B, T) -> (B, 1)
    return _clipped_loss(ratio, advantages[:, None], epsilon, epsilon_high).where(mask, 0)


def cispo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon_high: float = 5.0) -> Tensor:
    """-min(ratio, epsilon_high) * A * logps, where the first factor is a constant; shapes as for grpo_loss.

    What it repairs: a clipped token has no gradient. Here all tokens have that of REINFORCE, times a bounded weight.
    The bound is epsilon_high, as in TRL, and not 1 + epsilon_high, as in the paper: TRL's default of 0.2 makes nearly
    all weights 0.2. 5.0 is from ScaleRL, arXiv:2510.13786. Only the gradient means something, the value does not.
    Source: MiniMax-M1 2025, arXiv:2506.13585.
    """
    log_ratio, mask = _log_ratio(logps, old_logps, advantages, mask)
    weight = log_ratio.exp().clamp(max=epsilon_high).detach()
    return -(weight * advantages[:, None] * logps).where(mask, 0)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(student || teacher), sum_v p_student(v) * (log p_student(v) - log p_teacher(v)); (B, T), nats, 0 outside mask.

    The loss of on-policy distillation, on answers that the student has sampled. Logits (B, T, V) are finite; entry t is
    the prediction *of* token t: logits[:, :-1] go with completion_mask[:, 1:]. No gradient reaches the teacher, nor,
    as in TRL, the student through what it sampled. The sum is exact; kl_k1 of the sampled token estimates it.
    Source: Agarwal et al. 2023, arXiv:2306.13649; TRL's beta = 1.
    """
    hint = "shift both or neither; one vocabulary for both models"
    check_shapes(hint, student_logits=student_logits, teacher_logits=teacher_logits)
    mask = as_bool_mask(mask, student_logits[..., 0])
    both = (x.where(mask[..., None], 0) for x in (student_logits, teacher_logits.detach()))
    student, teacher = (x.log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in both)
    return (student.exp() * (student - teacher)).sum(-1)  # (B, T, V) -> (B, T)


def reduce_loss(loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None = None) -> Tensor:
    """The per-token loss (B, T) of one optimizer step as one number, by TRL's loss_type:

        "grpo"             mean of the answers' means: a token of a long one weighs less, even if wrong (length bias)
        "dapo", "cispo"    sum / number of tokens, which repairs that: all tokens weigh the same
        "dr_grpo"          sum / (B * max_completion_length), which repairs it with a divisor the policy cannot change

    An empty answer adds 0 and is one of the B, as in TRL, where mask_truncated_completions makes such answers.
    """
    if loss.dim() != 2 or len(loss) == 0:
        raise ValueError(f"got loss {tuple(loss.shape)}, wanted (B, T) with B > 0: has a filter dropped every group?")
    mask = as_bool_mask(mask, loss)
    sums, tokens = loss.where(mask, 0).sum(1), mask.sum(1)  # (B, T) -> (B,)
    if loss_type == "grpo":
        return (sums / tokens.clamp(min=1)).mean()
    if loss_type in ("dapo", "cispo"):
        return sums.sum() / tokens.sum().clamp(min=1)
    if loss_type == "dr_grpo" and max_completion_length:
        return sums.mean() / max_completion_length
    raise ValueError(f"got {loss_type=}, {max_completion_length=}, wanted grpo, dapo, cispo, dr_grpo with length")


def _clipped_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def _answers(mask: Tensor, **tensors: Tensor) -> Tensor:
    """mask as bool. Raises ValueError unless all are (B, T) and each row of mask is one run of ones."""
    check_shapes(PER_TOKEN, 2, mask=mask, **tensors)
    mask = as_bool_mask(mask, mask)
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (starts != 1).any():
        got = f"got rows with {starts.tolist()} runs of ones in the mask"
        raise ValueError(f"{got}, wanted one each: an empty answer, or tool output masked out of the middle?")
    return mask


def _log_ratio(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """logps - old_logps (B, T), 0 where mask is 0, and mask as bool."""
    check_shapes(PER_TOKEN, 2, logps=logps, old_logps=old_logps)
    mask = as_bool_mask(mask, logps)
    check_shapes("one advantage for each answer, from group_advantages", advantages=advantages, answer=mask.sum(1))
    return (logps - old_logps.detach()).where(mask, 0), mask

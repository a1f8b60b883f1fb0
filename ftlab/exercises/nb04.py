"""Notebook 04 up to 04.5, from a reward to a gradient: REINFORCE, GAE, PPO's clipped loss with two mistakes, GRPO.

nb04_preferences.py has the rest.
"""

import functools
from collections.abc import Callable
from functools import partial
from random import Random

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, readable, same
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import mistakes


def _rollout(rng: Random) -> tuple:
    """logps, old_logps, ref_logps (B, T) and mask (B, T): ratios to both sides of 1, garbage at padding.

    Few numbers with two digits, so that a learner can follow the one that fails by hand. Two answers of random lengths,
    one of them shorter than T, and in half of the draws an empty one, as mask_truncated_completions makes them.
    """
    import torch

    empty, T = rng.randrange(2), rng.randint(3, 5)
    B = 2 + empty

    def near(logps):
        return [[min(round(x + rng.gauss(0, 0.4), 2), -0.01) for x in row] for row in logps]

    logps = [[round(-rng.uniform(0.1, 3), 2) for _ in range(T)] for _ in range(B)]
    lengths = torch.tensor(rng.sample([rng.randint(1, T - 1), rng.randint(2, T)] + [0] * empty, B))
    mask = (torch.arange(T) < lengths[:, None]).long()
    return *map(torch.tensor, (logps, near(logps), near(logps))), mask


def _signed(rng: Random) -> float:
    """An advantage that is not 0."""
    return rng.choice([-1, 1]) * round(rng.uniform(0.3, 2), 1)


def _same_or_nan(got, wanted, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """same, but nan is itself, so that a slip that gives nan has a name; the right answers give none."""
    plain = [x.nan_to_num(1e9) if hasattr(x, "nan_to_num") else x for x in (got, wanted)]
    return same(*plain, rtol=rtol, atol=atol)


def _answers_means(loss, mask):
    return (loss * mask).sum(1) / mask.sum(1).clamp(min=1)  # (B, T) -> (B,)


def _clip(ratio, clip_eps: float):
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


UPPER_ALONE = "an upper clip alone, or min(ratio, clipped) before A: multiply both by A first, then take the min"

# --- 04.1: REINFORCE --------------------------------------------------------------------------------------------------


def my_reinforce_loss(logps, rewards, baseline, mask):
    answer_logps = (logps * mask).sum(1)  # (B, T) -> (B,): an answer's log-prob is the sum over its tokens
    advantages = (rewards - baseline).detach()  # (B,): only the log-prob takes a gradient
    return -(advantages * answer_logps).mean()


def _reinforce(
    gain: Callable = lambda rewards, baseline: (rewards - baseline).detach(),
    score: Callable = lambda logps, mask: (logps * mask).sum(1),
    mean: Callable = lambda objective: objective.mean(),
) -> Callable:
    """my_reinforce_loss with one thing changed."""

    def loss(logps, rewards, baseline, mask):
        return -mean(gain(rewards, baseline) * score(logps, mask))

    return loss


def _last_tokens(mask):
    """1 at the last token of each answer, (B, T)."""
    return (mask.flip(1).cumsum(1).flip(1) == 1) & (mask == 1)


REINFORCE = {
    "the baseline is missing: rewards - baseline": _reinforce(gain=lambda rewards, baseline: rewards),
    "the baseline is added: take it off": _reinforce(gain=lambda rewards, baseline: rewards + baseline),
    "the baseline is the caller's, not the mean of these rewards": _reinforce(
        gain=lambda rewards, baseline: rewards - rewards.mean()),
    "the baseline takes no gradient: (rewards - baseline).detach()": _reinforce(
        gain=lambda rewards, baseline: rewards - baseline),
    "no division by a standard deviation here: that is GRPO's": _reinforce(
        gain=lambda rewards, baseline: (rewards - baseline).detach() / (rewards.std() + 1e-4)),
    "the sign of the advantage is lost": _reinforce(gain=lambda rewards, baseline: (rewards - baseline).detach().abs()),
    "the minus is missing: a loss is minus the objective": _reinforce(mean=lambda objective: -objective.mean()),
    "an answer's log-prob is the sum over its tokens, not their mean": _reinforce(score=_answers_means),
    "an answer's log-prob is the sum over its tokens: no division by T": _reinforce(
        score=lambda logps, mask: (logps * mask).mean(1)),
    "padding counts: multiply logps by mask": _reinforce(score=lambda logps, mask: logps.sum(1)),
    "the gradient is that of the log-prob, not of the probability: no exp": _reinforce(
        score=lambda logps, mask: (logps * mask).sum(1).exp()),
    "all tokens of an answer get its reward, not the last one alone": _reinforce(
        score=lambda logps, mask: (logps * _last_tokens(mask)).sum(1)),
    "the reward comes once, at the end: what follows a token is that reward, not one for each token left": _reinforce(
        score=lambda logps, mask: (logps * mask.flip(1).cumsum(1).flip(1)).sum(1)),
    "the reward comes at the end, so no token gets a larger share for standing later": _reinforce(
        score=lambda logps, mask: (logps * mask * mask.cumsum(1)).sum(1)),
    "a mean over the answers is wanted, not their sum": _reinforce(mean=lambda objective: objective.sum()),
    "a mean over the B answers is wanted, not over all tokens": lambda logps, rewards, baseline, mask: -(
        (rewards - baseline).detach()[:, None] * logps * mask).sum() / mask.sum(),
    "an empty answer counts as 0 and is one of the B answers: do not leave it out": (
        lambda logps, rewards, baseline, mask: -(
            (rewards - baseline).detach() * (logps * mask).sum(1))[mask.sum(1) > 0].mean()),
    "an empty answer has the log-prob 0: a division by its length gives nan": _reinforce(
        score=lambda logps, mask: (logps * mask).sum(1) / mask.sum(1) * mask.sum(1)),
    "one number for the batch is wanted": _reinforce(mean=lambda objective: objective),
}  # fmt: skip


def _samples(rng: Random, number: bool = False) -> tuple:
    """logps, rewards, the baseline (one for each answer, or a number) and mask."""
    import torch

    logps, _, _, mask = _rollout(rng)
    rewards = torch.tensor([_signed(rng) for _ in logps])
    gaps = torch.tensor([_signed(rng) for _ in logps])
    return logps, rewards, round(rng.uniform(0.3, 1.5), 2) if number else rewards - gaps, mask


def _reinforce_slip(mine: Callable) -> Slip | None:
    compare = partial(
        first_difference, mine, answer=my_reinforce_loss, wrong=REINFORCE, equal=_same_or_nan, by=["logps"]
    )
    return compare(draw=_samples, fixed=["baseline"]) or compare(draw=partial(_samples, number=True), n=20)


# --- 04.2: GAE --------------------------------------------------------------------------------------------------------


def my_gae(rewards, values, mask, gamma, lam):
    import torch

    rewards, values = rewards * mask, values * mask  # padding gives no reward, and behind the answer the value is 0
    advantages, advantage, next_values = torch.zeros_like(values), 0, 0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]  # (B,): the TD error of token t
        advantage = delta + gamma * lam * advantage
        advantages[:, t], next_values = advantage, values[:, t]
    return advantages, advantages + values


def _next(values):
    """values[t + 1] at t, and 0 at the last place."""
    import torch

    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)


def _to_go(rewards, gamma: float):
    """The discounted sum of the rewards from t on, (B, T)."""
    import torch

    found, rest = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        found[:, t] = rest = rewards[:, t] + gamma * rest
    return found


def _gae(
    delta: Callable = lambda r, v, after, gamma, lam: r + gamma * after - v,
    decay: Callable = lambda gamma, lam: gamma * lam,
    order: Callable = reversed,
    after: Callable = lambda raw, v, mask: _next(v),
    clean: Callable = lambda x, mask: x * mask,
    result: Callable = lambda A, r, v, gamma, mask: (A, A + v),
) -> Callable:
    """my_gae with one thing changed: the TD error, the decay, the order, what comes after a token, the result."""

    def run(rewards, values, mask, gamma, lam):
        import torch

        r, v = clean(rewards, mask), clean(values, mask)
        deltas = clean(delta(r, v, after(values, v, mask), gamma, lam), mask)
        advantages, advantage = torch.zeros_like(v), 0
        for t in order(range(v.shape[1])):
            advantages[:, t] = advantage = deltas[:, t] + decay(gamma, lam) * advantage
        return result(advantages, r, v, gamma, mask)

    return run


def _white(A, mask):
    """A minus its mean over the tokens that count, divided by their standard deviation; 0 at padding."""
    real = A[mask.bool()]
    return (A - real.mean()) / (real.std() + 1e-8) * mask


def _zero_at_padding(A, r, v, gamma, mask):
    return A * mask, (A + v) * mask


GAE = {
    "from the back: each advantage holds a share of the next one, not of the one before": _gae(
        order=iter, result=_zero_at_padding),
    "lam is missing, so these are rewards-to-go minus values: the next advantage is multiplied by gamma * lam": _gae(
        decay=lambda gamma, lam: gamma),
    "gamma is missing: the next advantage is multiplied by gamma * lam": _gae(decay=lambda gamma, lam: lam),
    "gamma is missing before the next value": _gae(delta=lambda r, v, after, gamma, lam: r + after - v),
    "gamma is missing, both before the next value and before the next advantage": _gae(
        delta=lambda r, v, after, gamma, lam: r + after - v, decay=lambda gamma, lam: lam),
    "both gamma and lam are missing before the next advantage": _gae(decay=lambda gamma, lam: 1),
    "lam belongs to the next advantage, not to the next value": _gae(
        delta=lambda r, v, after, gamma, lam: r + gamma * lam * after - v),
    "that is the TD error alone: add gamma * lam times the next advantage": _gae(decay=lambda gamma, lam: 0),
    "the next value is missing: rewards[t] + gamma * values[t+1] - values[t]": _gae(
        delta=lambda r, v, after, gamma, lam: r - v),
    "the next value is that of token t + 1: keep values[t] until after delta": _gae(
        delta=lambda r, v, after, gamma, lam: r + gamma * v - v),
    "the token's own value is not taken off: without it nothing is compared": _gae(
        delta=lambda r, v, after, gamma, lam: r + gamma * after),
    "the sign: delta is what came minus what was expected": _gae(
        delta=lambda r, v, after, gamma, lam: v - r - gamma * after),
    "the next value comes from behind the end: after the last real token it is 0": _gae(
        after=lambda raw, v, mask: _next(raw)),
    "the last value stands for what follows it: after the last real token the value is 0": _gae(
        after=lambda raw, v, mask: _next(v) + v * _last_tokens(mask)),
    "padding leaks into the answer's last token: its rewards and values are to be 0 before the loop": _gae(
        clean=lambda x, mask: x, result=_zero_at_padding),
    "padding counts: mask is not used": _gae(clean=lambda x, mask: x),
    "padding gets 0 in the returns too": lambda rewards, values, mask, gamma, lam: (
        (A := my_gae(rewards, values, mask, gamma, lam)[0]), A + values),
    "returns are advantages + values, not the rewards-to-go": _gae(
        result=lambda A, r, v, gamma, mask: (A, _to_go(r, gamma) * mask)),
    "returns are advantages + values, not advantages + rewards": _gae(result=lambda A, r, v, gamma, mask: (A, A + r)),
    "the advantages are whitened: PPO does that later": _gae(
        result=lambda A, r, v, gamma, mask: (_white(A, mask), A + v)),
    "the advantages are whitened, and the returns are made of these": _gae(
        result=lambda A, r, v, gamma, mask: (_white(A, mask), (_white(A, mask) + v) * mask)),
    "the order is advantages, returns": _gae(result=lambda A, r, v, gamma, mask: (A + v, A)),
    "two things are wanted: advantages and returns": _gae(result=lambda A, r, v, gamma, mask: A),
}  # fmt: skip


def _rounded(value):
    """A tensor of floats as lists with six digits behind the point; all else as it is."""
    floats = hasattr(value, "is_floating_point") and value.is_floating_point() and readable(value)
    return (1e6 * value.detach().double()).round().div(1e6).tolist() if floats else value


def _named(function: Callable) -> Callable:
    """The same with its two results by name, so that a Slip says which one differs."""

    @functools.wraps(function)
    def run(*inputs):
        found = function(*inputs)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return found
        return {"advantages": _rounded(found[0]), "returns": _rounded(found[1])}

    return run


def _critic(rng: Random) -> tuple:
    """Rewards and values (B, T), also at padding; mask, gamma, lam."""
    import torch

    logps, _, _, mask = _rollout(rng)
    rewards, values = (torch.tensor([[_signed(rng) for _ in row] for row in logps]) for _ in range(2))
    return rewards, values, mask, rng.choice([0.5, 0.8, 0.9, 1.0]), rng.choice([0.0, 0.5, 0.8, 0.95, 1.0])


def _gae_slip(mine: Callable) -> Slip | None:
    wrong = {words: _named(slip) for words, slip in GAE.items()}
    return first_difference(_named(mine), _named(my_gae), _critic, wrong, equal=partial(same, atol=1e-5))


# --- 04.3: debug this -------------------------------------------------------------------------------------------------


def my_ppo_loss(logps, old_logps, advantages, mask, clip_eps=0.2):
    import torch

    ratio = (logps - old_logps).exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = torch.max(-ratio * advantages, -clipped * advantages)  # the smaller objective is the larger loss
    return (loss * mask).sum() / mask.sum()  # padding has no say, and no weight


def _ppo(
    ratio: Callable = lambda now, old: (now - old).exp(),
    gain: Callable = lambda r, A, eps: (r * A).minimum(_clip(r, eps) * A),
    mean: Callable = lambda loss, mask: (loss * mask).sum() / mask.sum(),
) -> Callable:
    """my_ppo_loss with something changed."""

    def loss(logps, old_logps, advantages, mask, clip_eps=0.2):
        return mean(-gain(ratio(logps, old_logps), advantages, clip_eps), mask)

    return loss


PPO = {
    AS_GIVEN: _ppo(
        gain=lambda r, A, eps: (r * A).maximum(_clip(r, eps) * A), mean=lambda loss, mask: (loss * mask).mean()),
    "the min is of the objectives: of the losses, which carry the minus, it is the max": _ppo(
        gain=lambda r, A, eps: (r * A).maximum(_clip(r, eps) * A)),
    "padding still counts in the denominator: divide by mask.sum()": _ppo(mean=lambda loss, mask: (loss * mask).mean()),
    "padding still counts: multiply by mask too": _ppo(mean=lambda loss, mask: loss.sum() / mask.sum()),
    "a mean over the tokens that count is wanted, not their sum": _ppo(mean=lambda loss, mask: (loss * mask).sum()),
    "clip alone gives up a token that moved the wrong way": _ppo(gain=lambda r, A, eps: _clip(r, eps) * A),
    "the clip is gone: it was not the mistake": _ppo(gain=lambda r, A, eps: r * A),
    UPPER_ALONE: _ppo(gain=lambda r, A, eps: r.clamp(max=1 + eps) * A),
    "the clip has lost its lower end, which was not the mistake": _ppo(
        gain=lambda r, A, eps: (r * A).minimum(r.clamp(max=1 + eps) * A)),
    "the clip has lost its upper end, which was not the mistake": _ppo(
        gain=lambda r, A, eps: (r * A).minimum(r.clamp(min=1 - eps) * A)),
    "the sign was right: a loss is minus the objective": _ppo(
        gain=lambda r, A, eps: -(r * A).minimum(_clip(r, eps) * A)),
    "the ratio was right: logps - old_logps, not the other way round": _ppo(ratio=lambda now, old: (old - now).exp()),
    "all tokens weigh the same here: no mean of the answers' means": _ppo(
        mean=lambda loss, mask: _answers_means(loss, mask).mean()),
    "one number for the batch is wanted": _ppo(mean=_answers_means),
}  # fmt: skip


def _tokens(rng: Random) -> tuple:
    import torch

    logps, old_logps, _, mask = _rollout(rng)
    advantages = torch.tensor([[_signed(rng) for _ in row] for row in logps])
    return logps, old_logps, advantages, mask, rng.choice([0.1, 0.2, 0.3])


def _our_ppo(logps, old_logps, advantages, mask, clip_eps):
    from ftlab.scratch.logps import masked_mean
    from ftlab.scratch.rl import ppo_loss

    return masked_mean(ppo_loss(logps, old_logps, advantages, mask, clip_eps), mask)


# --- 04.4: the group advantage ----------------------------------------------------------------------------------------


def my_group_advantages(rewards, num_generations):
    groups = rewards.view(-1, num_generations)  # one row a prompt
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def _our_advantages(rewards, num_generations):
    from ftlab.scratch.rl import group_advantages

    return group_advantages(rewards, num_generations)


def _groups(rewards, n: int, dim: int = 1, spread: Callable | None = None, eps: float = 1e-4):
    """my_group_advantages with one thing changed: the side along which a group lies, the divisor."""
    groups = rewards.view(-1, n) if dim == 1 else rewards.view(n, -1)
    centred = groups - groups.mean(dim, keepdim=True)
    divisor = spread(groups) if spread else groups.std(dim, keepdim=True)
    return (centred / (divisor + eps)).flatten()


ADVANTAGES = {
    "the answers to one prompt stand one after the other: view(-1, num_generations)": partial(_groups, dim=0),
    "the division by the group's standard deviation is missing": lambda rewards, n: _groups(
        rewards, n, spread=lambda groups: 1, eps=0),
    "a group of equal rewards has the standard deviation 0: add 1e-4 to it": lambda rewards, n: _groups(
        rewards, n, eps=0),
    "divide by the standard deviation, not by the variance": lambda rewards, n: _groups(
        rewards, n, spread=lambda groups: groups.var(1, keepdim=True)),
    "the standard deviation with n - 1 is wanted, torch's own": lambda rewards, n: _groups(
        rewards, n, spread=lambda groups: groups.std(1, keepdim=True, unbiased=False)),
    "mean and standard deviation are the group's, not those of the whole batch": lambda rewards, n: (
        (rewards - rewards.mean()) / (rewards.std() + 1e-4)),
    "the standard deviation is the group's too, not that of the whole batch": lambda rewards, n: _groups(
        rewards, n, spread=lambda groups: groups.std()),
    "the mean of the group is not taken off": lambda rewards, n: (
        rewards.view(-1, n) / (rewards.view(-1, n).std(1, keepdim=True) + 1e-4)).flatten(),
    "that is RLOO: the mean of the others, and no division": lambda rewards, n: _groups(
        rewards, n, spread=lambda groups: (n - 1) / n, eps=0),
    "one number an answer, in the order of rewards: flatten at the end": lambda rewards, n: _groups(
        rewards, n).view(-1, n),
}  # fmt: skip


def _near(got, wanted) -> bool:
    """Equal up to what is added to the standard deviation; nan is itself here, as in _same_or_nan."""
    return _same_or_nan(got, wanted, rtol=3e-3, atol=1e-5)


def _rewards(rng: Random) -> tuple:
    import torch

    n, prompts = rng.choice([(3, 2), (3, 4), (4, 2), (4, 3), (5, 2)])
    rows = [[rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(n)] for _ in range(prompts)]  # exact in float32
    if rng.random() < 0.4:
        rows[rng.randrange(prompts)] = [rng.choice([0.0, 0.75])] * n  # a prompt that teaches nothing
    return torch.tensor(rows).flatten(), n


# --- 04.5: GRPO's whole loss ------------------------------------------------------------------------------------------


def my_grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip_eps, beta):
    import torch

    ratio = (logps - old_logps).exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    A = advantages[:, None]  # (B,) -> (B, 1): all tokens of an answer share it
    d = ref_logps - logps
    per_token = -torch.min(ratio * A, clipped * A) + beta * (d.exp() - 1 - d)
    tokens = mask.sum(1).clamp(min=1)  # an empty answer: 0 / 1, where 0 / 0 would be nan
    return ((per_token * mask).sum(1) / tokens).mean()  # a mean per answer, then the mean of these


def _our_grpo(logps, old_logps, ref_logps, advantages, mask, clip_eps, beta):
    from ftlab.scratch import rl

    per_token = rl.grpo_loss(logps, old_logps, advantages, mask, clip_eps, clip_eps) + beta * rl.kl_k3(logps, ref_logps)
    return rl.reduce_loss(per_token, mask, "grpo")


def _k3(logps, ref_logps):
    return (ref_logps - logps).exp() - 1 - (ref_logps - logps)


def _grpo(
    ratio: Callable = lambda now, old, ref: (now - old).exp(),
    gain: Callable = lambda r, A, eps: (r * A).minimum(_clip(r, eps) * A),
    kl: Callable = lambda now, old, ref: _k3(now, ref),
    mean: Callable = lambda loss, mask: _answers_means(loss, mask).mean(),
    price: Callable = lambda beta: beta,
) -> Callable:
    """my_grpo_loss with one thing changed."""

    def loss(logps, old_logps, ref_logps, advantages, mask, clip_eps, beta):
        three = logps, old_logps, ref_logps
        objective = gain(ratio(*three), advantages[:, None], clip_eps)
        return mean(-objective + price(beta) * kl(*three), mask)

    return loss


GRPO = {
    "the clip is missing": _grpo(gain=lambda r, A, eps: r * A),
    "clip alone gives up a token that moved the wrong way: take the min of both products": _grpo(
        gain=lambda r, A, eps: _clip(r, eps) * A),
    UPPER_ALONE: _grpo(gain=lambda r, A, eps: r.clamp(max=1 + eps) * A),
    "a lower clip alone, or max(ratio, clipped) before A: multiply both by A first, then take the min": _grpo(
        gain=lambda r, A, eps: r.clamp(min=1 - eps) * A),
    "the clip has a lower end too: ratio.clamp(1 - clip_eps, 1 + clip_eps)": _grpo(
        gain=lambda r, A, eps: (r * A).minimum(r.clamp(max=1 + eps) * A)),
    "the clip has an upper end too: ratio.clamp(1 - clip_eps, 1 + clip_eps)": _grpo(
        gain=lambda r, A, eps: (r * A).minimum(r.clamp(min=1 - eps) * A)),
    "the clip range lies around 1: from 1 - clip_eps to 1 + clip_eps": _grpo(
        gain=lambda r, A, eps: (r * A).minimum(r.clamp(-eps, eps) * A)),
    "the min belongs to the objectives: with the minus inside, take the max of the two losses": _grpo(
        gain=lambda r, A, eps: (r * A).maximum(_clip(r, eps) * A)),
    "the minus is missing: a loss is minus the objective": _grpo(
        gain=lambda r, A, eps: -(r * A).minimum(_clip(r, eps) * A)),
    "that is the objective: the loss is minus all of it": _grpo(
        mean=lambda loss, mask: -_answers_means(loss, mask).mean()),
    "the ratio is the policy's over the old policy's: logps - old_logps, not the other way round": _grpo(
        ratio=lambda now, old, ref: (old - now).exp()),
    "the ratio compares with old_logps, the policy that sampled, not with ref_logps": _grpo(
        ratio=lambda now, old, ref: (now - ref).exp()),
    "the arguments are log-probs: the ratio is exp of their difference": _grpo(ratio=lambda now, old, ref: now - old),
    "the ratio needs its gradient: no detach on logps": _grpo(ratio=lambda now, old, ref: (now.detach() - old).exp()),
    "d is ref_logps - logps, not the other way round": _grpo(kl=lambda now, old, ref: _k3(ref, now)),
    "d compares with ref_logps, the reference, not with old_logps": _grpo(kl=lambda now, old, ref: _k3(now, old)),
    "that is k1: k3 adds exp(d) - 1": _grpo(kl=lambda now, old, ref: now - ref),
    "that is k2, d**2 / 2: k3 is exp(d) - 1 - d": _grpo(kl=lambda now, old, ref: (ref - now) ** 2 / 2),
    "k3 is exp(d) - 1 - d: the 1 is missing": _grpo(kl=lambda now, old, ref: _k3(now, ref) + 1),
    "k3 times the ratio is TRL's default: here it is k3 alone, as in the paper": _grpo(
        kl=lambda now, old, ref: _k3(now, ref) * (now - old).exp()),
    "the KL needs its gradient too: no detach on logps in d": _grpo(kl=lambda now, old, ref: _k3(now.detach(), ref)),
    "the KL is a price: add beta * k3 to the loss": _grpo(kl=lambda now, old, ref: -_k3(now, ref)),
    "beta is missing": _grpo(price=lambda beta: 1),
    "the KL term is missing": _grpo(price=lambda beta: 0),
    "padding counts: multiply by mask, and divide by mask.sum(1)": _grpo(mean=lambda loss, mask: loss.mean()),
    "divide by each answer's own tokens, not by T": _grpo(mean=lambda loss, mask: (loss * mask).mean()),
    "one mean over all tokens is DAPO's: GRPO takes each answer's mean first": _grpo(
        mean=lambda loss, mask: (loss * mask).sum() / mask.sum()),
    "each answer's sum is still to be divided by its number of tokens": _grpo(
        mean=lambda loss, mask: (loss * mask).sum(1).mean()),
    "a mean over the answers is wanted, not their sum": _grpo(mean=lambda loss, mask: _answers_means(loss, mask).sum()),
    "a sum over all tokens: take a mean per answer, then the mean of these": _grpo(
        mean=lambda loss, mask: (loss * mask).sum()),
    "one number for the batch is wanted": _grpo(mean=_answers_means),
    "an empty answer divides 0 by 0: clamp the count, mask.sum(1).clamp(min=1)": _grpo(
        mean=lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1)).mean()),
    "an empty answer counts as 0 and is one of the B answers: do not leave it out": _grpo(
        mean=lambda loss, mask: _answers_means(loss, mask)[mask.sum(1) > 0].mean()),
}  # fmt: skip


def _answers(rng: Random) -> tuple:
    import torch

    logps, old_logps, ref_logps, mask = _rollout(rng)
    advantages = torch.tensor([_signed(rng) for _ in logps])
    return logps, old_logps, ref_logps, advantages, mask, rng.choice([0.1, 0.2, 0.3]), rng.choice([0.04, 0.3])


EXERCISES = {
    "04.1": Exercise(
        "Write REINFORCE's loss with a baseline",
        _reinforce_slip,
        (
            "Two numbers for each answer: how much better it was than expected, and its log-probability. In the "
            "example these are 0.5 and -3 for the first answer, -0.5 and -1 for the second, whose last token is "
            "padding. The products are -1.5 and 0.5, and minus their mean is 0.5.",
            "The log-probability of a whole answer is the sum of its tokens' that count: (logps * mask).sum(1). The "
            "advantage is rewards - baseline. A learned baseline has a gradient of its own, so cut it with .detach().",
            "-((rewards - baseline).detach() * (logps * mask).sum(1)).mean()",
        ),
        my_reinforce_loss,
        REINFORCE | mistakes(my_reinforce_loss, ["logps"], ["logps", "rewards", "baseline", "mask"]),
        seconds=60,
        difficulty=1,
        minutes=10,
    ),
    "04.2": Exercise(
        "Write generalised advantage estimation (GAE)",
        _gae_slip,
        (
            "Begin at the end of the answer. In the example the second token's TD error is 1 - 0.8 = 0.2, and nothing "
            "follows, so that is its advantage. The first one's is 0 + 0.9 * 0.8 - 0.5 = 0.22, and its advantage is "
            "0.22 + 0.9 * 0.5 * 0.2 = 0.31.",
            "delta[t] = rewards[t] + gamma * values[t+1] - values[t], and A[t] = delta[t] + gamma * lam * A[t+1]. "
            "Multiply rewards and values by mask first, in new tensors: then padding has the TD error 0, and the value "
            "after the last real token is 0 too.",
            "Start with next_values = advantage = 0. For t in reversed(range(T)): delta = rewards[:, t] + gamma * "
            "next_values - values[:, t]; advantage = delta + gamma * lam * advantage; advantages[:, t] = advantage; "
            "next_values = values[:, t]. Return advantages and advantages + values.",
        ),
        my_gae,
        GAE | mistakes(my_gae, [], ["rewards", "values", "mask"]),
        seconds=60,
        difficulty=2,
        minutes=15,
    ),
    "04.3": Exercise(
        "Debug this: PPO's loss",
        partial(first_difference, answer=_our_ppo, draw=_tokens, wrong=PPO, equal=_same_or_nan, by=["logps"]),
        (
            "Work out the example on paper, token by token. Which of the two losses does the first token get, and "
            "which should it get?",
            "PPO takes the smaller objective. A loss is minus the objective, so which of the two losses is that? And "
            "how many tokens does .mean() divide by?",
            "-min(a, b) is max(-a, -b), so torch.max. Padding adds 0 to the sum and must not add to the count: "
            "(loss * mask).sum() / mask.sum().",
        ),
        my_ppo_loss,
        PPO | mistakes(my_ppo_loss, ["logps"], ["logps", "advantages"]),
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "04.4": Exercise(
        "Write GRPO's group advantage",
        partial(first_difference, answer=_our_advantages, draw=_rewards, wrong=ADVANTAGES, equal=_near),
        (
            "A group is all answers to one prompt, and they stand one after the other. Make a table with one row a "
            "group.",
            "groups = rewards.view(-1, num_generations). Take off groups.mean(1, keepdim=True). Then divide by "
            "groups.std(1, keepdim=True) + 1e-4.",
            "((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten() gives one "
            "number an answer.",
        ),
        my_group_advantages,
        ADVANTAGES | mistakes(my_group_advantages, [], ["rewards"]),
        seconds=60,
        difficulty=1,
        minutes=10,
    ),
    "04.5": Exercise(
        "Write GRPO's whole loss",
        partial(first_difference, answer=_our_grpo, draw=_answers, wrong=GRPO, equal=_same_or_nan, by=["logps"]),
        (
            "Three pieces for each token: the clipped objective, the KL, and whether it counts. Build the first two "
            "with shape (B, T) before you think about means. In the example, the ratios are 1.5 and 1, so the "
            "objectives are 1.2 and 1. k3 is 0 and 0.5 - 1 + ln 2 = 0.193. The losses are -1.2 and "
            "-1 + 0.1 * 0.193 = -0.981, and their mean is -1.0903.",
            "ratio = (logps - old_logps).exp(). An advantage is (B,) and must reach all tokens of its answer: "
            "advantages[:, None]. With d = ref_logps - logps, k3 is d.exp() - 1 - d.",
            "per_token = -torch.min(ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A) + beta * k3. Then "
            "(per_token * mask).sum(1) / mask.sum(1).clamp(min=1) is one mean per answer, 0 for an empty one, and "
            ".mean() ends it.",
        ),
        my_grpo_loss,
        GRPO | mistakes(my_grpo_loss, ["logps"], ["logps", "advantages"]),
        seconds=60,
        difficulty=2,
        minutes=15,
    ),
}

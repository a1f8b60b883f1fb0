"""ftlab.scratch.rl: exact expectations over small action spaces, naive loops, hand-worked tables, what must not change.

The action spaces are enumerated, so "unbiased" is an equality: the sum over all samples, each times its probability.
"""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ftlab.scratch.logps import mean_logps
from ftlab.scratch.rl import (
    cispo_loss,
    gae,
    group_advantages,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k3,
    ppo_loss,
    reduce_loss,
    reverse_kl,
    token_rewards,
    value_loss,
    whiten,
)


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- KL estimators, in expectation ------------------------------------------------------------------------------------


def exact_kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@settings(deadline=None)
@given(st.integers(2, 6), seeds, st.sampled_from([0.01, 1.0, 4.0]))
def test_k1_and_k3_are_unbiased(size, seed, scale):
    logps, ref = normal(2, size, seed=seed, scale=scale).log_softmax(1)
    kl = exact_kl(logps.exp().tolist(), ref.exp().tolist())
    k1, k3 = ((logps.exp() * k(logps, ref)).sum().item() for k in (kl_k1, kl_k3))
    assert k1 == pytest.approx(kl, abs=1e-12) and k3 == pytest.approx(kl, abs=1e-12)
    assert (kl_k3(logps, ref) >= 0).all()


def test_kl_estimators_by_hand():
    """Policy 1/2 and 1/2, reference 1/4 and 3/4: KL = log(4/3) / 2 = 0.143841.

    k1: ln 2 = 0.693147 and ln(2/3) = -0.405465.
    k3: 1/2 - 1 + ln 2 = 0.193147 and 3/2 - 1 - ln(3/2) = 0.094535, mean 0.143841.
    """
    logps, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert_close(kl_k1(logps, ref), torch.tensor([0.693147, -0.405465]), rtol=0, atol=1e-6)
    assert_close(kl_k3(logps, ref), torch.tensor([0.193147, 0.094535]), rtol=0, atol=1e-6)
    assert kl_k3(logps, ref).mean().item() == pytest.approx(0.143841, abs=1e-6)


@settings(deadline=None)
@given(st.integers(2, 6), seeds, st.sampled_from([0.1, 1.0, 3.0]))
def test_what_gradient_each_estimator_gives_as_a_loss(size, seed, scale):
    """Policy p = softmax(theta); samples from p, their weights constants. With d log p_j / d theta_i = [i=j] - p_i:

    k1: sum_j p_j ([i=j] - p_i) = 0.
    k3: sum_j p_j (1 - q_j / p_j) ([i=j] - p_i) = p_i - q_i, the gradient of KL(q || p).
    """
    theta, ref = normal(2, size, seed=seed, scale=scale)
    theta, q = theta.requires_grad_(), ref.softmax(0)
    p = theta.detach().softmax(0)
    wanted = {kl_k1: torch.zeros(size, dtype=torch.float64), kl_k3: p - q}
    for estimator, gradient in wanted.items():
        loss = (p * estimator(theta.log_softmax(0), q.log())).sum()
        assert_close(torch.autograd.grad(loss, theta)[0], gradient, rtol=1e-6, atol=1e-10)


@settings(deadline=None)
@given(st.integers(2, 6), seeds, st.booleans())
def test_k3_times_the_ratio_gives_the_gradient_of_the_policys_own_kl(size, seed, on_policy):
    """sum_j old_j (p_j / old_j) k3_j = KL(p || q) for every theta, on-policy and off."""
    theta, ref, old = normal(3, size, seed=seed)
    theta, q, old = theta.requires_grad_(), ref.softmax(0), (theta.detach() if on_policy else old).softmax(0)
    p = theta.detach().softmax(0)
    reverse = p * ((p / q).log() - exact_kl(p.tolist(), q.tolist()))
    logps = theta.log_softmax(0)
    loss = (old * (logps - old.log()).exp() * kl_k3(logps, q.log())).sum()
    assert_close(torch.autograd.grad(loss, theta)[0], reverse, rtol=1e-6, atol=1e-10)


# --- Token rewards ----------------------------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    """beta 0.1; answers of 2, 3 and 1 tokens, padded right, not, and on both sides. The last KL counts too."""
    kl = torch.tensor([[1.0, 2, 9], [1, -1, 3], [9, 4, 9]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0]])
    rewards = token_rewards(torch.tensor([5.0, 6, 7]), kl, mask, beta=0.1)
    assert_close(rewards, torch.tensor([[-0.1, 4.8, 0], [-0.1, 0.1, 5.7], [0, 6.6, 0]]))
    assert not rewards.requires_grad
    assert_close(rewards.sum(1), torch.tensor([5 - 0.3, 6 - 0.3, 7 - 0.4]))
    one = torch.ones(1, 1)  # the default beta is 0.05; an answer can be one column
    assert_close(token_rewards(torch.tensor([7.0]), 2 * one, one), torch.tensor([[6.9]]))


# --- GAE --------------------------------------------------------------------------------------------------------------


@st.composite
def rollouts(draw):
    """rewards, values (B, T) and a mask whose rows are one run of ones each, anywhere in the row."""
    B, T, seed = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(seeds)
    mask = torch.zeros(B, T, dtype=torch.long)
    for b in range(B):
        start = draw(st.integers(0, T - 1))
        mask[b, start : draw(st.integers(start + 1, T))] = 1
    return normal(B, T, seed=seed), normal(B, T, seed=seed + 1), mask


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A[t] = sum over k of (gamma lam)^k delta[t + k], for one answer without padding; the value after it is 0."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@settings(deadline=None)
@given(rollouts(), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_gae_is_the_discounted_sum_of_deltas(rollout, gamma, lam):
    rewards, values, mask = rollout
    wanted = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        inside = mask[b] == 1
        wanted[b, inside] = double(*naive_gae(rewards[b, inside].tolist(), values[b, inside].tolist(), gamma, lam))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert_close(advantages, wanted)
    assert_close(returns, wanted + values * mask)
    noise = torch.where(mask == 1, 0.0, math.nan)
    for again, first in zip(gae(rewards + noise, values + noise, mask, gamma, lam), (advantages, returns), strict=True):
        assert torch.equal(again, first)


@settings(deadline=None)
@given(rollouts(), st.sampled_from([0.5, 1.0]))
def test_gae_at_lam_1_is_reward_to_go_minus_value_and_at_0_one_step(rollout, gamma):
    rewards, values, mask = rollout
    (all_the_way, returns), (one_step, _) = (gae(rewards, values, mask, gamma, lam) for lam in (1.0, 0.0))
    for b, t in mask.nonzero().tolist():
        end = max(s for s in range(mask.shape[1]) if mask[b, s])
        to_go = sum(gamma ** (s - t) * rewards[b, s].item() for s in range(t, end + 1))
        after = values[b, t + 1].item() if t < end else 0.0
        assert returns[b, t].item() == pytest.approx(to_go, abs=1e-9)
        assert all_the_way[b, t].item() == pytest.approx(to_go - values[b, t].item(), abs=1e-9)
        assert one_step[b, t].item() == pytest.approx(
            rewards[b, t].item() + gamma * after - values[b, t].item(), abs=1e-9
        )


def test_gae_by_hand_and_its_defaults():
    """Rewards 0 0 1, values 1/2: with gamma = lam = 1/2 deltas -1/4, -1/4, 1/2, so A = -9/32, -1/8, 1/2.

    Default gamma = 1, lam = 0.95: deltas 0, 0, 1/2, so A = 0.95^2 / 2, 0.95 / 2, 1/2.
    """
    rewards, mask = torch.tensor([[0.0, 0, 1]]), torch.ones(1, 3)
    values = torch.full((1, 3), 0.5, requires_grad=True)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-9 / 32, -1 / 8, 1 / 2]] and returns.tolist() == [[7 / 32, 3 / 8, 1]]
    assert not advantages.requires_grad and not returns.requires_grad
    assert_close(gae(rewards, values, mask)[0], torch.tensor([[0.45125, 0.475, 0.5]]))


# --- Normalised advantages --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rollouts())
def test_whiten(rollout):
    values, _, mask = rollout
    counted = values[mask == 1].tolist()
    if len(counted) < 2:
        return
    mean, variance = statistics.mean(counted), statistics.variance(counted)
    wanted = ((values - mean) / math.sqrt(variance + 1e-8)).where(mask == 1, 0)
    assert_close(whiten(values, mask), wanted, rtol=1e-6, atol=1e-6)
    assert_close(whiten(values + torch.where(mask == 1, 0.0, math.nan), mask), whiten(values, mask))
    # the unit is gone, but for the 1e-8 beside a small variance
    rtol = 1e-3 + 1e-8 / max(variance, 1e-12)
    assert_close(whiten(3 * values + 7, mask), whiten(values, mask), rtol=rtol, atol=1e-6)


def test_whiten_by_hand():
    """0 and 2: mean 1, variance with n - 1 is 2, so -+1 / sqrt 2. Equal values: 0, thanks to the 1e-8.

    -+1e-4 has the variance 2e-8, so -+1e-4 / sqrt(3e-8) = -+1 / sqrt 3.
    """
    got = whiten(torch.tensor([[0.0, 2, 99]]), torch.tensor([[1, 1, 0]]))
    assert_close(got, torch.tensor([[-(0.5**0.5), 0.5**0.5, 0]]))
    assert not whiten(torch.full((1, 3), 4.0), torch.ones(1, 3)).any()
    assert_close(whiten(double([-1e-4, 1e-4]), torch.ones(1, 2)), double([-(3**-0.5), 3**-0.5]))


groups = st.integers(2, 5).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.lists(st.floats(-10, 10), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)


@settings(deadline=None)
@given(groups)
def test_group_advantages(case):
    n, rows = case
    rewards = double(*itertools.chain(*rows))
    centred = [r - statistics.fmean(row) for row in rows for r in row]
    stds = [statistics.stdev(row) for row in rows for _ in row]
    plain, scaled, batch = (group_advantages(rewards, n, scale_rewards=x) for x in ("none", "group", "batch"))
    assert_close(plain, double(*centred), rtol=1e-6, atol=1e-9)
    assert_close(scaled, double(*(c / (s + 1e-4) for c, s in zip(centred, stds, strict=True))), rtol=1e-6, atol=1e-6)
    std = statistics.stdev(rewards.tolist())
    assert_close(batch, double(*(c / (std + 1e-4) for c in centred)), rtol=1e-6, atol=1e-6)
    for advantages in (plain, scaled, batch):
        assert advantages.shape == rewards.shape
        assert_close(advantages.view(-1, n).sum(1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-7)


@settings(deadline=None)
@given(groups, st.floats(-5, 5))
def test_advantages_over_the_other_answers_are_n_over_n_minus_1_times_the_centred_ones(case, shift):
    n, rows = case
    rewards = double(*itertools.chain(*rows))
    wanted = [r - sum(row[:i] + row[i + 1 :]) / (n - 1) for row in rows for i, r in enumerate(row)]
    centred = group_advantages(rewards, n, "none")
    assert_close(n / (n - 1) * centred, double(*wanted), rtol=1e-6, atol=1e-9)
    shifted = rewards + shift * torch.arange(len(rows)).repeat_interleave(n)  # each prompt with a constant of its own
    assert_close(group_advantages(shifted, n, "none"), centred, rtol=1e-6, atol=1e-8)


def test_group_advantages_by_hand():
    """1 0 0 1: mean 1/2, std with n - 1 is 1 / sqrt 3 = 0.57735, so 0.5 / 0.57745 = 0.865875. Then 3 3 3 3: all 0.

    "batch": mean 7/4, variance (2 * 9 + 2 * 49 + 4 * 25) / 16 / 7 = 13.5 / 7, std 1.38873, 0.5 / 1.38883 = 0.360015.
    """
    rewards = torch.tensor([1.0, 0, 0, 1, 3, 3, 3, 3])
    assert_close(
        group_advantages(rewards, 4),
        torch.tensor([0.865875, -0.865875, -0.865875, 0.865875, 0, 0, 0, 0]),
        rtol=0,
        atol=1e-6,
    )
    batch = group_advantages(rewards, 4, scale_rewards="batch")
    assert_close(batch, torch.tensor([0.360015, -0.360015, -0.360015, 0.360015, 0, 0, 0, 0]), rtol=0, atol=1e-6)
    assert group_advantages(rewards, 4, scale_rewards="none").tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.long], ids=str)
def test_right_or_wrong_is_a_reward_too(dtype):
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    assert_close(group_advantages(rewards.to(dtype), 3), group_advantages(rewards, 3))


def test_the_std_of_the_group_makes_one_sided_groups_weigh_more():
    """The sums of |A|. 1 of 8 right: 7/8 + 7 * 1/8 = 1.75, with the variance (49 + 7) / 64 / 7 = 1/8 it is 4.95.

    4 of 8 right: 8 * 1/2 = 4, with the variance 8 / 4 / 7 = 2/7 it is 7.48.
    """
    one, half = torch.tensor([1.0] + [0] * 7), torch.tensor([1.0] * 4 + [0] * 4)
    for scale_rewards, wanted in (("group", 4.95 / 7.48), ("none", 1.75 / 4), ("batch", 1.75 / 4)):
        advantages = group_advantages(torch.cat([one, half]), 8, scale_rewards).view(2, 8).abs().sum(1)
        assert (advantages[0] / advantages[1]).item() == pytest.approx(wanted, rel=1e-3)


def test_the_gradient_of_grpo_without_std_is_on_average_n_minus_1_over_n_of_the_true_one():
    """All 3^3 = 27 groups of 3 answers over 3 actions, each times its probability, against d E[r] / d theta.

    d E[r] / d theta_i = p_i (r_i - E[r]). So RLOO's, n / (n - 1) times as large, is unbiased.
    """
    theta, r, n = normal(3, seed=4).requires_grad_(), double(1.0, -0.5, 2.0), 3
    p = theta.detach().softmax(0)
    truth = p * (r - (p * r).sum())
    total = torch.zeros(3, dtype=torch.float64)
    for group in map(torch.tensor, itertools.product(range(3), repeat=n)):
        logps, advantages = theta.log_softmax(0)[group][:, None], group_advantages(r[group], n, "none")
        loss = ppo_loss(logps, logps, advantages[:, None], torch.ones(n, 1)).mean()
        total -= p[group].prod() * torch.autograd.grad(loss, theta)[0]
    assert_close(total, (n - 1) / n * truth)


# --- Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 1.0, -1.0, -1.0),  # the first step: REINFORCE
        (1.0, -1.0, 1.0, 1.0),
        (1.1, 2.0, -2.2, -2.2),  # inside the range nothing is clipped
        (1.5, 1.0, -1.2, 0.0),  # good and far enough up: no reason to go on
        (0.5, 1.0, -0.5, -0.5),  # good and gone down: pulled back
        (1.5, -1.0, 1.5, 1.5),  # bad and gone up: pulled back
        (0.5, -1.0, 0.8, 0.0),  # bad and far enough down
    ],
)
def test_ppo_loss_by_hand(ratio, advantage, loss, slope):
    """clip_eps 0.2; d ratio / d logps = ratio, so the slope is -A ratio, or 0 where the clipped term is the smaller."""
    logps = torch.tensor([[math.log(0.2 * ratio)]], requires_grad=True)
    got = ppo_loss(logps, torch.tensor([[math.log(0.2)]]), torch.tensor([[advantage]]), torch.ones(1, 1))
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and logps.grad.item() == pytest.approx(slope, rel=1e-5)


def test_clip_eps_is_the_callers():
    one = torch.ones(1, 1)
    assert ppo_loss(one * math.log(3), 0 * one, one, one, clip_eps=0.5).item() == pytest.approx(-1.5)
    assert grpo_loss(one * math.log(3), 0 * one, one[0], one, epsilon_high=0.5).item() == pytest.approx(-1.5)
    assert grpo_loss(one * math.log(3), 0 * one, one[0], one).item() == pytest.approx(-1.2)
    assert grpo_loss(one * math.log(0.5), 0 * one, -one[0], one).item() == pytest.approx(0.8)


def naive_grpo(logp, old, advantage, low, high):
    ratio = math.exp(logp) / math.exp(old)
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * max(ratio, 1 - low)


@st.composite
def losses(draw):
    """logps, old_logps, ref_logps (B, T), advantages (B,), any mask; ratios on both sides of the range."""
    B, T, seed = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(seeds)
    old = -normal(B, T, seed=seed).abs() - 0.1
    logps = old + normal(B, T, seed=seed + 1, scale=draw(st.sampled_from([0.05, 0.5, 1.0])))
    mask = torch.randint(2, (B, T), generator=torch.Generator().manual_seed(seed))
    return logps, old, old + normal(B, T, seed=seed + 2, scale=0.5), normal(B, seed=seed + 3), mask


@settings(deadline=None)
@given(losses(), st.sampled_from([0.1, 0.2]), st.sampled_from([0.0, 0.2, 0.28, 0.5]))
def test_grpo_loss_and_its_gradient(case, low, high):
    logps, old, _, advantages, mask = case
    logps = logps.requires_grad_()
    got = grpo_loss(logps, old, advantages, mask, low, high)
    (gradient,) = torch.autograd.grad(got.sum(), logps)
    value, slope = torch.zeros_like(got), torch.zeros_like(got)
    h = 1e-6
    for b, t in mask.nonzero().tolist():
        rest = (old[b, t].item(), advantages[b].item(), low, high)
        x = logps[b, t].item()
        value[b, t] = naive_grpo(x, *rest)
        slope[b, t] = (naive_grpo(x + h, *rest) - naive_grpo(x - h, *rest)) / (2 * h)
    assert_close(got, value)
    assert_close(gradient, slope, rtol=1e-5, atol=1e-6)
    assert not gradient[mask == 0].any()


@settings(deadline=None)
@given(losses(), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30]))
def test_what_stands_where_the_mask_is_0_changes_no_loss_and_no_gradient(case, noise):
    logps, old, ref, advantages, mask = case
    tokens = advantages[:, None].expand_as(logps).clone()

    def run(logps, old, ref, tokens):
        results = []
        for loss in (
            lambda x: ppo_loss(x, old, tokens, mask),
            lambda x: grpo_loss(x, old, advantages, mask),
            lambda x: gspo_loss(x, old, advantages, mask, 0.1, 0.2),
            lambda x: cispo_loss(x, old, advantages, mask),
            lambda x: value_loss(x, old, ref, mask),
        ):
            x = logps.clone().requires_grad_()
            value = loss(x)
            results += [value.detach(), *torch.autograd.grad(value.sum(), x)]
        return results

    clean = run(logps, old, ref, tokens)
    dirty = run(*(torch.where(mask == 1, x, noise) for x in (logps, old, ref, tokens)))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and not a[mask == 0].any()


def test_old_logps_are_constant():
    """So that giving the same tensor twice, as on the first step, is REINFORCE: slope -A, and not 0."""
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages, mask = torch.tensor([[3.0, -4.0]]), torch.ones(1, 2)
    loss = ppo_loss(logps, logps, advantages, mask)
    assert loss.tolist() == [[-3, 4]]
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [[-3, 4]]
    old = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    one = torch.tensor([1.0])
    loss = grpo_loss(logps, old, one, mask)
    loss = loss + gspo_loss(logps, old, one, mask, 0.2, 0.2) + cispo_loss(logps, old, one, mask)
    loss = loss + ppo_loss(logps, old, advantages, mask)
    assert torch.autograd.grad(loss.sum(), old, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.25, 1.0, -1.25, -1.25),  # good: clipped at 1.2 by GRPO, goes on
        (1.5, 1.0, -1.28, 0.0),  # ... up to the higher end
        (0.75, -1.0, 0.8, 0.0),  # bad: the lower end is where it was
        (1.5, -1.0, 1.5, 1.5),
    ],
)
def test_dapo_clips_higher(ratio, advantage, loss, slope):
    logps = torch.tensor([[math.log(0.2 * ratio)]], requires_grad=True)
    advantages, ones = torch.tensor([advantage]), torch.ones(1, 1)
    got = grpo_loss(logps, torch.tensor([[math.log(0.2)]]), advantages, ones, epsilon=0.2, epsilon_high=0.28)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and logps.grad.item() == pytest.approx(slope, rel=1e-5)


def test_gspo_loss_by_hand():
    """Ratios 4 and 1 of a good answer: sqrt(4 * 1) = 2, clipped to 1.5 for both tokens; GRPO clips only the first.

    Ratios 2 and 1/2 of a bad answer, A = -3: sqrt(2 * 1/2) = 1, so 3 3. Each token has half of the slope of each entry,
    3/2 + 3/2 = 3. A good answer of one token of ratio 1/4 keeps it.
    """
    ratios = torch.tensor([[4.0, 1], [2, 0.5], [0.25, 7]])
    logps, mask = ratios.log().requires_grad_(), torch.tensor([[1, 1], [1, 1], [1, 0]])
    loss = gspo_loss(logps, torch.zeros(3, 2), torch.tensor([1.0, -3, 1]), mask, 0.2, 0.5)
    assert_close(loss, torch.tensor([[-1.5, -1.5], [3, 3], [-0.25, 0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert_close(gradient, torch.tensor([[0.0, 0], [3, 3], [-0.25, 0]]))


@settings(deadline=None)
@given(losses(), st.sampled_from([0.05, 0.2]), st.sampled_from([0.1, 0.5]))
def test_gspo_is_ppo_on_answers_as_actions_with_mean_log_probs(case, low, high):
    """One action an answer, (B, 1), with its mean_logps.

    PPO's range is symmetric: it is low for bad answers and high for good ones, which is where each end acts.
    """
    logps, old, _, advantages, mask = case
    mask[:, 0] = 1  # mean_logps wants a token in each answer
    whole = torch.nn.functional.pad(mask, (1, 0))  # mean_logps takes the mask over tokens, (B, T + 1)
    mine, other = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    columns = (mean_logps(other, whole)[:, None], mean_logps(old, whole)[:, None], advantages[:, None])
    good = (advantages > 0).double()[:, None]
    wanted = sum((ppo_loss(*columns, side, end) for side, end in ((good, high), (1 - good, low)))).mean()
    got = reduce_loss(gspo_loss(mine, old, advantages, mask, low, high), mask, "grpo")
    assert_close(got, wanted)
    assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((got, mine), (wanted, other))))


@settings(deadline=None)
@given(losses())
def test_before_the_policy_moves_the_variants_have_one_gradient(case):
    """All ratios are 1, and the reduction is "grpo": -A / (length of the answer) / B at each token in all three."""
    logps, _, _, advantages, mask = case
    logps = logps.requires_grad_()
    gradients = []
    for loss in (grpo_loss, cispo_loss, lambda *args: gspo_loss(*args, 3e-4, 4e-4)):
        reduced = reduce_loss(loss(logps, logps, advantages, mask), mask, "grpo")
        gradients += torch.autograd.grad(reduced, logps)
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    for gradient in gradients:
        assert_close(gradient, -advantages[:, None] * weights)


@pytest.mark.parametrize(("ratio", "weight"), [(1.0, 1.0), (1.5, 1.5), (0.1, 0.1), (9.0, 5.0)])
@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_cispo_keeps_a_gradient_where_ppo_clips(ratio, weight, advantage):
    """Old probability 0.1. Value -min(ratio, 5) * A * log p, slope -min(ratio, 5) * A: the weight is a constant."""
    logps = torch.tensor([[math.log(0.1 * ratio)]], requires_grad=True)
    rollout = torch.tensor([[math.log(0.1)]]), torch.tensor([advantage]), torch.ones(1, 1)
    loss, ppo = cispo_loss(logps, *rollout), grpo_loss(logps, *rollout)
    assert loss.item() == pytest.approx(-weight * advantage * math.log(0.1 * ratio), rel=1e-5, abs=1e-7)
    slopes = [torch.autograd.grad(x.sum(), logps)[0].item() for x in (loss, ppo)]
    assert slopes[0] == pytest.approx(-weight * advantage, rel=1e-5)
    if (ratio - 1) * advantage > 0.2:
        assert slopes[1] == 0


def test_the_bound_of_cispo_is_the_weight_itself():
    """Not 1 + epsilon_high: with 0.2, TRL's default, a policy that has not moved has the weight 0.2."""
    logps = torch.full((1, 1), -2.0)
    assert_close(cispo_loss(logps, logps, torch.ones(1), torch.ones(1, 1), epsilon_high=0.2), torch.tensor([[0.4]]))


def test_reverse_kl_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3); then the two change places.

    Gradient by the student's logits: p * (log p - log q - KL), here 1/2 * (ln(2/3) - 1/2 ln(4/3)) = -1/4 ln 3.
    """
    half, skewed = double(0.5, 0.5).log(), double(0.75, 0.25).log()
    student, teacher = torch.stack([half, skewed, half])[None] + 3, torch.stack([skewed, half, skewed])[None]
    student[0, 2], teacher[0, 2] = math.nan, math.inf  # does not count
    mask, student, teacher = torch.tensor([[1, 1, 0]]), student.requires_grad_(), teacher.requires_grad_()
    kl = reverse_kl(student, teacher, mask)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert_close(kl, double(math.log(4 / 3) / 2, forward, 0)[None])
    kl.sum().backward()
    slope = math.log(3) / 4
    assert_close(student.grad[0, 0], double(-slope, slope))
    assert not student.grad[0, 2].any() and teacher.grad is None
    with pytest.raises(ValueError, match="one vocabulary"):
        reverse_kl(student, teacher[..., :1], mask)
    with pytest.raises(ValueError, match="mask"):
        reverse_kl(student, teacher, mask[:, 1:])


@settings(deadline=None)
@given(seeds, st.sampled_from([0.1, 1.0, 4.0]))
def test_reverse_kl_is_the_expectation_of_k1_and_has_its_value_in_float32_for_bf16(seed, scale):
    student, teacher = normal(2, 2, 3, 5, seed=seed, scale=scale)
    logps, ref = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = (logps.exp() * kl_k1(logps, ref)).sum(-1)
    mask = torch.ones(2, 3)
    assert_close(reverse_kl(student, teacher, mask), expected)
    assert (reverse_kl(student, teacher, mask) >= -1e-12).all() and not reverse_kl(student, student + 7, mask).round(
        decimals=9
    ).any()
    assert reverse_kl(student.bfloat16(), teacher.bfloat16(), mask).dtype == torch.float32


def test_reductions_by_hand():
    """Answers of 1 and 3 tokens with advantages 1 and -1, and an empty one of advantage 1; first step: -1, 1 1 1, none.

    "grpo": (-1 + 1 + 0) / 3 = 0. "dapo": (-1 + 3) / 4 = 0.5. "dr_grpo", at most 4 tokens: (-1 + 3) / 12.
    In "grpo" a token of the long wrong answer weighs 1/9, one of the short right answer 1/3; in the others the same.
    """
    logps, mask = torch.full((3, 3), -2.0, requires_grad=True), torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    loss = grpo_loss(logps, logps, torch.tensor([1.0, -1.0, 1.0]), mask)
    assert loss.tolist() == [[-1, 0, 0], [1, 1, 1], [0, 0, 0]]
    for loss_type, value, short, long in (
        ("grpo", 0, 1 / 3, 1 / 9),
        *((name, 0.5, 1 / 4, 1 / 4) for name in ("dapo", "cispo")),
        ("dr_grpo", 2 / 12, 1 / 12, 1 / 12),
    ):
        reduced = reduce_loss(loss, mask, loss_type, 4)
        assert reduced.item() == pytest.approx(value)
        (gradient,) = torch.autograd.grad(reduced, logps, retain_graph=True)
        assert_close(gradient, torch.tensor([[-short, 0, 0], [long, long, long], [0, 0, 0]]))


def naive_reduction(rows: list[list[float]], loss_type: str, length: int) -> float:
    """rows: for each answer the losses of its tokens, of different lengths, none for an empty answer."""
    if loss_type == "grpo":
        return statistics.fmean(statistics.fmean(row) if row else 0.0 for row in rows)
    tokens = [x for row in rows for x in row]
    return math.fsum(tokens) / (length * len(rows) if loss_type == "dr_grpo" else max(1, len(tokens)))


LOSSES = [
    lambda logps, old, advantages, mask: grpo_loss(logps, old, advantages, mask, 0.2, 0.28),
    lambda logps, old, advantages, mask: gspo_loss(logps, old, advantages, mask, 0.05, 0.1),
    lambda logps, old, advantages, mask: cispo_loss(logps, old, advantages, mask, 1.1),
]
reductions = st.sampled_from(["grpo", "dapo", "cispo", "dr_grpo"])


@settings(deadline=None)
@given(losses(), reductions, st.sampled_from([math.nan, math.inf, 1e30]))
def test_reduce_loss(case, loss_type, noise):
    """A naive loop over lists without padding. What stands where the mask is 0 changes neither loss nor gradient."""
    loss, _, _, _, mask = case
    rows = [row[inside].tolist() for row, inside in zip(loss, mask == 1, strict=True)]
    for padded in (loss, loss.where(mask == 1, noise)):
        padded = padded.clone().requires_grad_()
        reduced = reduce_loss(padded, mask, loss_type, max_completion_length=7)
        assert reduced.item() == pytest.approx(naive_reduction(rows, loss_type, 7), abs=1e-12)
        (gradient,) = torch.autograd.grad(reduced, padded)
        assert not gradient[mask == 0].any() and gradient.isfinite().all()


@settings(deadline=None)
@given(losses(), reductions, st.integers(0, 2), st.sampled_from(LOSSES), seeds)
def test_padding_and_the_order_of_answers_change_nothing(case, loss_type, padding, variant, seed):
    logps, old, _, advantages, mask = case
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    more = [torch.nn.functional.pad(x, (padding, 1))[order] for x in (logps, old, mask)]
    first, again = logps.requires_grad_(), more[0].detach().requires_grad_()
    loss = reduce_loss(variant(first, old, advantages, mask), mask, loss_type, 9)
    same = reduce_loss(variant(again, more[1], advantages[order], more[2]), more[2], loss_type, 9)
    assert_close(same, loss)
    gradient, wide = torch.autograd.grad(loss, first)[0], torch.autograd.grad(same, again)[0]
    assert_close(wide[:, padding:-1], gradient[order])
    assert not wide[:, :padding].any() and not wide[:, -1].any()


@settings(deadline=None)
@given(groups, st.sampled_from(["group", "batch", "none"]), seeds)
def test_groups_may_change_places_and_answers_within_a_group(case, scale_rewards, seed):
    n, rows = case
    generator, rewards = torch.Generator().manual_seed(seed), double(*itertools.chain(*rows))
    order = torch.randperm(len(rows), generator=generator)[:, None] * n + torch.randperm(n, generator=generator)
    moved = group_advantages(rewards[order.flatten()], n, scale_rewards)
    assert_close(moved, group_advantages(rewards, n, scale_rewards)[order.flatten()], rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(
    losses(),
    st.sampled_from(["group", "batch", "none"]),
    reductions,
    st.sampled_from(LOSSES),
    st.sampled_from([0.0, 3.0]),
)
def test_equal_rewards_give_no_gradient(case, scale_rewards, loss_type, variant, reward):
    """Each answer and a copy of it are a group."""
    logps, old, mask = (case[i].repeat_interleave(2, 0) for i in (0, 1, 4))
    logps = logps.requires_grad_()
    advantages = group_advantages(torch.full((len(mask),), reward, dtype=torch.float64), 2, scale_rewards)
    loss = reduce_loss(variant(logps, old, advantages, mask), mask, loss_type, 9)
    assert loss == 0 and not torch.autograd.grad(loss, logps)[0].any()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "dr_grpo"])
@pytest.mark.parametrize("variant", LOSSES)
@pytest.mark.parametrize("T", [0, 3])
def test_a_batch_of_empty_answers_is_0_and_has_no_gradient(variant, loss_type, T):
    """All cut off and masked, or without any column: 0, so that the run goes on, and no nan on the way either."""
    logps = torch.full((2, T), -1.0, requires_grad=True)
    loss = reduce_loss(variant(logps, logps - 0.5, torch.ones(2), torch.zeros(2, T)), torch.zeros(2, T), loss_type, 8)
    with torch.autograd.set_detect_anomaly(True):
        assert loss == 0 and not torch.autograd.grad(loss, logps)[0].any()


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # within 0.2 of the old value 1, return 2
        (1.6, 0.5 * 0.8**2, 0.0),  # moved towards the return by more than 0.2: the clipped 1.2 counts, flat
        (0.5, 0.5 * 1.5**2, -1.5),  # moved away: pulled back
        (4.0, 0.5 * 2.0**2, 2.0),  # beyond the return, and worse than the clipped value
    ],
)
def test_value_loss_by_hand(value, loss, slope):
    values = torch.tensor([[value, 7.0]], requires_grad=True)
    got = value_loss(values, torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[1, 0]]))
    got.sum().backward()
    assert_close(got, torch.tensor([[loss, 0]]))
    assert_close(values.grad, torch.tensor([[slope, 0]]))


@settings(deadline=None)
@given(losses(), st.sampled_from([0.1, 0.4]))
def test_value_loss_is_never_below_the_plain_one_and_equal_to_it_inside_the_range(case, eps):
    values, old, returns, _, mask = case
    got = value_loss(values, old, returns, mask, eps)
    for b, t in mask.nonzero().tolist():
        v, o, target = (x[b, t].item() for x in (values, old, returns))
        clipped = min(max(v, o - eps), o + eps)
        assert got[b, t].item() == pytest.approx(max(0.5 * (v - target) ** 2, 0.5 * (clipped - target) ** 2))


# --- Errors -----------------------------------------------------------------------------------------------------------

x, y, flat = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4)
column = torch.zeros(2, 1)  # would go well with (2, 3) by broadcasting
ones = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_k1(x, y), r"logps \(2, 3\), ref_logps \(2, 4\).*per_token_logps goes with mask\[:, 1:\]"),
        (lambda: kl_k3(x, y), r"\(2, 3\).*\(2, 4\)"),
        (lambda: token_rewards(torch.zeros(2, 1), x, ones), r"scores \(2, 1\).*squeeze"),
        (lambda: token_rewards(torch.zeros(2), column, ones), r"mask \(2, 3\), kl \(2, 1\)"),
        (lambda: token_rewards(torch.zeros(2), x, torch.zeros(2, 3)), r"\[0, 0\] runs of ones.*empty answer"),
        (lambda: gae(x, y, ones), r"rewards \(2, 3\), values \(2, 4\)"),
        (lambda: gae(x, x, column), r"mask \(2, 1\), rewards \(2, 3\)"),
        (lambda: gae(flat, flat, flat), r"\(4,\).*wanted one shape \(B, T\)"),
        (lambda: gae(x, x, torch.tensor([[1, 0, 1], [1, 1, 0]])), r"\[2, 1\] runs of ones.*tool"),
        (lambda: whiten(x, torch.tensor([[1, 0, 0], [0, 0, 0]])), "got 1 positions that count, wanted at least 2"),
        (lambda: whiten(x, 2 * ones), "2.0 to 2.0, wanted only 0 and 1"),
        (lambda: whiten(column, ones), r"mask \(2, 3\), values \(2, 1\)"),
        (lambda: group_advantages(flat, 3), r"rewards \(4,\) and num_generations 3"),
        (lambda: group_advantages(flat, 1), "num_generations 1.*nothing to compare with"),
        (lambda: group_advantages(torch.tensor(1.0), 2), r"rewards \(\) and num_generations 2"),
        (lambda: group_advantages(torch.zeros(0), 2), r"rewards \(0,\).*wanted \(B,\), B > 0"),
        (lambda: group_advantages(flat, 2, True), r"scale_rewards True, wanted one of \['group', 'batch', 'none'\]"),
        (lambda: group_advantages(x, 2), r"rewards \(2, 3\)"),
        (lambda: ppo_loss(x, x, torch.zeros(2), ones), r"advantages \(2,\)"),
        (lambda: ppo_loss(x, column, x, ones), r"old_logps \(2, 1\), advantages \(2, 3\)"),
        (lambda: ppo_loss(x, column, column, ones), r"logps \(2, 3\), old_logps \(2, 1\)"),
        (lambda: ppo_loss(x, x, x, y), r"mask \(2, 4\), values \(2, 3\)"),
        (lambda: value_loss(x, x, y, ones), r"returns \(2, 4\)"),
        (lambda: value_loss(x, column, column, ones), r"values \(2, 3\), old_values \(2, 1\)"),
        (lambda: value_loss(x, column, x, ones), r"old_values \(2, 1\), returns \(2, 3\)"),
        (lambda: grpo_loss(x, x, x, ones), r"advantages \(2, 3\).*group_advantages"),
        (lambda: grpo_loss(x, x, torch.zeros(3), ones), r"advantages \(3,\), answer \(2,\)"),
        (lambda: grpo_loss(flat, flat, flat, flat), r"logps \(4,\), old_logps \(4,\), wanted one shape \(B, T\)"),
        *(
            (lambda loss=loss, args=args: loss(*args), message)
            for loss in (grpo_loss, cispo_loss, lambda *args: gspo_loss(*args, 0.1, 0.1))
            for args, message in (
                ((x, y, torch.zeros(2), ones), r"logps \(2, 3\), old_logps \(2, 4\).*per_token_logps"),
                ((x, column, torch.zeros(2), ones), r"logps \(2, 3\), old_logps \(2, 1\)"),
                ((x, x, torch.zeros(2, 1), ones), r"advantages \(2, 1\), answer \(2,\).*group_advantages"),
                ((x, x, torch.zeros(2), column), r"mask \(2, 1\), values \(2, 3\)"),
            )
        ),
        (lambda: reduce_loss(flat, ones, "grpo"), r"loss \(4,\), wanted \(B, T\)"),
        (lambda: reduce_loss(x[None], x[None], "grpo"), r"loss \(1, 2, 3\), wanted \(B, T\)"),
        (lambda: reduce_loss(x[:0], ones, "grpo"), r"loss \(0, 3\), .*B > 0: has a filter dropped every group"),
        (lambda: reduce_loss(x, column, "grpo"), r"mask \(2, 1\), values \(2, 3\)"),
        (lambda: reduce_loss(x, ones, "gspo", 8), "loss_type='gspo', max_completion_length=8, wanted grpo, dapo"),
        (lambda: reduce_loss(x, ones, "dr_grpo"), "'dr_grpo', max_completion_length=None, .* dr_grpo with length"),
    ],
)
def test_errors_say_what_was_got_what_was_wanted_and_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""ftlab.scratch.losses: hand-worked numbers, naive formulas in double precision with their numerical gradients, exact
minimisers on bandits, and what must never change a loss."""

import decimal
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ftlab.scratch.logps import mean_logps, per_token_logps, sequence_logps
from ftlab.scratch.losses import dpo_loss, kto_loss, kto_z0, orpo_loss, reward_loss

LN2 = math.log(2)


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- The same in plain numbers: probabilities written out, no logsigmoid ----------------------------------------------


def naive_reward(chosen, rejected):
    """Bradley-Terry: e^chosen / (e^chosen + e^rejected) is the probability that chosen wins."""
    return -math.log(math.exp(chosen) / (math.exp(chosen) + math.exp(rejected)))


def naive_dpo(pi_w, pi_l, ref_w, ref_l, beta=0.1):
    """The probability ratios themselves, to the power of beta, as Bradley-Terry strengths."""
    strength_w, strength_l = (math.exp(pi_w) / math.exp(ref_w)) ** beta, (math.exp(pi_l) / math.exp(ref_l)) ** beta
    return math.log(1 + strength_l / strength_w)


def naive_orpo(nll, pi_w, pi_l, lam=0.1):
    odds_w, odds_l = (math.exp(x) / (1 - math.exp(x)) for x in (pi_w, pi_l))
    return nll + lam * math.log(1 + odds_l / odds_w)


def naive_kto(pi, ref, desirable, z0, beta=0.1, weights=(1.0, 1.0)):
    """lambda_y - v(x, y), with the value function v of the paper: lambda_D or lambda_U times a logistic function."""
    strength, threshold = (math.exp(pi) / math.exp(ref)) ** beta, math.exp(z0) ** beta
    value = strength / (strength + threshold) if desirable else threshold / (strength + threshold)
    weight = weights[0] if desirable else weights[1]
    return weight - weight * value


logp = st.floats(-12, -0.01)
number = st.floats(-8, 8)


def values_and_gradients_agree(loss, naive, rows: list[tuple]) -> None:
    """loss of columns of tensors against naive of each row, and its gradient against naive's central differences."""
    columns = [double(*column).requires_grad_() for column in zip(*rows, strict=True)]
    got = loss(*columns)
    assert_close(got, double(*(naive(*row) for row in rows)), rtol=1e-8, atol=1e-9)
    assert got.shape == (len(rows),)
    h = 1e-5
    for i, gradient in enumerate(torch.autograd.grad(got.sum(), columns)):
        moved = [[(*row[:i], row[i] + step, *row[i + 1 :]) for row in rows] for step in (h, -h)]
        slopes = [(naive(*up) - naive(*down)) / (2 * h) for up, down in zip(*moved, strict=True)]
        assert_close(gradient, double(*slopes), rtol=1e-5, atol=1e-6)


def rows_of(*columns, size=4):
    return st.lists(st.tuples(*columns), min_size=1, max_size=size)


@settings(deadline=None, max_examples=40)
@given(rows_of(number, number))
def test_reward_loss(rows):
    values_and_gradients_agree(reward_loss, naive_reward, rows)


@settings(deadline=None, max_examples=40)
@given(rows_of(logp, logp, logp, logp), st.sampled_from([0.05, 0.1, 0.5, 2.0]))
def test_dpo_loss(rows, beta):
    values_and_gradients_agree(lambda *x: dpo_loss(*x, beta=beta), lambda *x: naive_dpo(*x, beta), rows)


@settings(deadline=None, max_examples=40)
@given(rows_of(st.floats(0, 9), logp, logp), st.sampled_from([0.1, 1.0]))
def test_orpo_loss(rows, lam):
    values_and_gradients_agree(lambda *x: orpo_loss(*x, lam=lam), lambda *x: naive_orpo(*x, lam), rows)


@settings(deadline=None, max_examples=40)
@given(
    rows_of(logp, logp),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.floats(0, 5),
    st.sampled_from([0.1, 1.0]),
    st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
)
def test_kto_loss(rows, labels, z0, beta, weights):
    labels = labels[: len(rows)]
    desirable, baseline = torch.tensor(labels), double(z0)[0]
    got = kto_loss(*(double(*c) for c in zip(*rows, strict=True)), desirable, baseline, beta, *weights)
    wanted = [naive_kto(*row, label, z0, beta, weights) for row, label in zip(rows, labels, strict=True)]
    assert_close(got, double(*wanted))
    for label in (True, False):  # gradients: one class at a time
        values_and_gradients_agree(
            lambda p, r, label=label: kto_loss(p, r, torch.full(p.shape, label), baseline, beta, *weights),
            lambda p, r, label=label: naive_kto(p, r, label, z0, beta, weights),
            rows,
        )


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    """pi_w - ref_w = -10 + 12 = 2, pi_l - ref_l = -9 + 5 = -4: margin 6, times 0.5 is 3, log(1 + e^-3) = 0.048587.

    Rewards 1 and -2. The gradient on pi_w is -beta * sigmoid(-3) = -0.5 * 0.047426.
    """
    pi_w = torch.tensor([-10.0], requires_grad=True)
    loss = dpo_loss(pi_w, torch.tensor([-9.0]), torch.tensor([-12.0]), torch.tensor([-5.0]), beta=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.048587, abs=1e-6) and pi_w.grad.item() == pytest.approx(-0.023713, abs=1e-6)


def test_the_defaults_are_those_of_trl():
    """beta 0.1 and a log-ratio of 10: reward 1, DPO log(1 + 1/e), KTO 1 / (1 + e); lambda 0.1."""
    a, b, zero, e = double(-10.0), double(-20.0), double(0.0)[0], math.e
    assert dpo_loss(a, b, b, b).item() == pytest.approx(math.log(1 + 1 / e))
    assert kto_loss(a, b, torch.tensor([True]), zero).item() == pytest.approx(1 / (1 + e))
    assert kto_loss(a, b, torch.tensor([False]), zero).item() == pytest.approx(e / (1 + e))
    assert orpo_loss(double(2.0), a, a).item() == pytest.approx(2 + 0.1 * LN2)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(logp, logp), min_size=1, max_size=5), st.floats(0.01, 5))
def test_at_the_start_where_the_policy_is_the_reference(rows, beta):
    """DPO ln 2; KTO 1/2 of each weight, with z0 = 0."""
    win, lose = (double(*column) for column in zip(*rows, strict=True))
    ones = torch.ones_like(win)
    assert_close(dpo_loss(win, lose, win, lose, beta), LN2 * ones)
    assert kto_z0(win, win) == 0
    assert_close(kto_loss(win, win, ones.bool(), kto_z0(win, win), beta, 3.0, 5.0), 1.5 * ones)
    assert_close(kto_loss(win, win, ~ones.bool(), kto_z0(win, win), beta, 3.0, 5.0), 2.5 * ones)


def test_orpo_by_hand():
    """p = 3/4 and 1/2: odds 3 and 1, ratio 3, -log(3/4) = 0.287682. NLL 2 and lambda 0.5: 2.143841."""
    loss = orpo_loss(torch.tensor([2.0]), torch.tensor([math.log(0.75)]), torch.tensor([math.log(0.5)]), lam=0.5)
    assert loss.item() == pytest.approx(2.143841, abs=1e-6)


# --- KTO's reference point --------------------------------------------------------------------------------------------


def test_kto_z0_is_a_mean_cut_off_at_0_and_constant():
    """Log-ratios 4 and 1 have the mean 2.5; 1 and -4 have -1.5, which is no KL."""
    policy = torch.tensor([-3.0, -6.0], requires_grad=True)
    z0 = kto_z0(policy, torch.tensor([-7.0, -7.0]))
    assert z0 == 2.5 and not z0.requires_grad
    assert kto_z0(torch.tensor([-6.0, -11.0]), torch.tensor([-7.0, -7.0])) == 0
    loss = kto_loss(policy, torch.tensor([-7.0, -7.0]), torch.tensor([True, True]), kto_z0(policy, policy - 1))
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    constant = kto_loss(policy, torch.tensor([-7.0, -7.0]), torch.tensor([True, True]), torch.tensor(1.0))
    assert_close(gradient, torch.autograd.grad(constant.sum(), policy)[0])


def test_kto_weights_are_as_exact_as_the_policy():
    """Log-ratio 0, so weight / 2: 0.55 in fp32, also where the reference comes in bf16, in which 1.1 is 1.1015625."""
    loss = kto_loss(
        torch.tensor([-8.0]), torch.tensor([-8.0]).bfloat16(), torch.tensor([True]), torch.tensor(0.0), 1, 1.1
    )
    assert_close(loss, torch.tensor([0.55]))


def test_kto_pulls_most_at_z0_and_lets_go_on_both_sides():
    """|gradient| = beta * s * (1 - s): beta / 4 at z0, falling off on both sides, up for good and down for bad ones."""
    ratios = double(-60.0, -10.0, 3.0, 16.0, 66.0).requires_grad_()
    zero = torch.zeros(5, dtype=torch.float64)
    for label, sign in ((True, -1), (False, 1)):
        loss = kto_loss(ratios, zero, torch.full((5,), label), double(3.0)[0], beta=0.2)
        (gradient,) = torch.autograd.grad(loss.sum(), ratios)
        assert (gradient * sign > 0).all() and gradient.abs().argmax() == 2
        assert gradient[2].item() == pytest.approx(sign * 0.2 / 4)
        assert gradient[0].abs() < 1e-5 and gradient[4].abs() < 1e-5
        assert (loss > 0).all() and (loss < 1).all()


# --- Exact minimisers -------------------------------------------------------------------------------------------------


def minimise(loss, size: int) -> torch.Tensor:
    """Log-probabilities of a softmax over `size` actions at the minimum of loss(log-probabilities)."""
    theta = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(theta.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().log_softmax(0)


def all_pairs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every ordered pair of different actions: who wins, who loses."""
    win, lose = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
    return win[win != lose], lose[win != lose]


@pytest.mark.parametrize(("beta", "seed"), [(0.5, 0), (1.0, 1), (2.0, 2)])
def test_on_a_bandit_dpo_finds_the_optimum_of_reward_minus_kl(beta, seed):
    """5 actions, all pairs weighted by p(win beats lose) = e^r_w / (e^r_w + e^r_l).

    The wanted policy needs no optimiser: ref * exp(r / beta), divided by its sum. That it maximises E[r] - beta KL is
    checked against 200 other policies.
    """
    generator = torch.Generator().manual_seed(seed)
    r, ref = torch.randn(5, generator=generator, dtype=torch.float64), torch.rand(5, generator=generator).double() + 0.1
    ref = ref / ref.sum()
    wanted = ref * (r / beta).exp()
    wanted = wanted / wanted.sum()
    win, lose = all_pairs(5)
    beats = r[win].exp() / (r[win].exp() + r[lose].exp())
    found = minimise(lambda p: (beats * dpo_loss(p[win], p[lose], ref.log()[win], ref.log()[lose], beta)).sum(), 5)
    assert_close(found.exp(), wanted, rtol=0, atol=1e-4)

    def objective(policy):
        return (policy * r).sum(-1) - beta * (policy * (policy / ref).log()).sum(-1)

    others = torch.randn(200, 5, generator=generator, dtype=torch.float64).softmax(1)
    assert (objective(others) < objective(wanted)).all()
    assert objective(wanted).item() == pytest.approx(beta * math.log((ref * (r / beta).exp()).sum()))


def test_spin_is_dpo_and_rests_where_the_model_is_the_data():
    """Winner from the data, loser from the previous iterate, which is also the reference and the start.

    E[d loss / d theta] over all pairs at the start is -beta / 2 * (data - iterate): 0 if and only if they are equal.
    """
    data, beta = double(0.5, 0.3, 0.2), 0.4
    win, lose = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    for iterate in (double(0.2, 0.2, 0.6), data):
        theta = iterate.log().requires_grad_()
        p, ref = theta.log_softmax(0), iterate.log()
        (data[win] * iterate[lose] * dpo_loss(p[win], p[lose], ref[win], ref[lose], beta)).sum().backward()
        assert_close(theta.grad, -beta / 2 * (data - iterate))


# --- Stability --------------------------------------------------------------------------------------------------------


def exact_orpo(chosen: float, rejected: float) -> tuple[float, float, float]:
    """log(1 + odds_l / odds_w) and its two derivatives with 60 digits: d log-odds / dx = 1 / (1 - e^x)."""
    with decimal.localcontext(prec=60):
        x, y = decimal.Decimal(chosen), decimal.Decimal(rejected)
        odds_x, odds_y = (z.exp() / (1 - z.exp()) for z in (x, y))
        quotient = odds_y / odds_x
        share = quotient / (1 + quotient)  # sigmoid(-log-odds ratio)
        return float((1 + quotient).ln()), float(-share / (1 - x.exp())), float(share / (1 - y.exp()))


@pytest.mark.parametrize("near_0", [-1e-3, -1e-6, -6e-8, -3e-8, -1e-9, -1e-12, -1e-20])
@pytest.mark.parametrize("other", [-5.0, -0.5, -1e-7, -1e-15])
def test_orpo_is_exact_at_log_probs_near_0(near_0, other):
    """In fp32, where e^x rounds to 1 below 3e-8, the formula written out is inf or nan; here 60 digits agree."""
    for chosen, rejected in ((near_0, other), (other, near_0)):
        x = torch.tensor([chosen], requires_grad=True)
        y = torch.tensor([rejected], requires_grad=True)
        loss = orpo_loss(torch.zeros(1), x, y, lam=1.0)
        value, slope_x, slope_y = exact_orpo(x.item(), y.item())
        got = torch.autograd.grad(loss.sum(), (x, y))
        assert_close(loss.double(), double(value), rtol=1e-5, atol=1e-7)
        assert_close(got[0].double(), double(slope_x), rtol=1e-4, atol=1e-7)
        assert_close(got[1].double(), double(slope_y), rtol=1e-4, atol=1e-7)


def test_orpo_written_out_breaks_where_ours_does_not():
    x = torch.tensor([-1e-9, 0.0], requires_grad=True)
    written_out = torch.log(x.exp() / (1 - x.exp()))
    assert written_out.isinf().all()
    y = torch.tensor([-1.0, 0.0], requires_grad=True)
    for chosen, rejected in ((x, y), (y, x)):
        loss = orpo_loss(torch.zeros(2), chosen, rejected, lam=1.0)
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), (x, y)))


@pytest.mark.parametrize("gap", [1e3, 1e5])
def test_the_logistic_losses_stay_finite_at_huge_gaps(gap):
    """-log sigmoid(-x) = x for large x, with the slope 1; a wrong order costs the gap itself, times beta."""
    x, zero = torch.tensor([-gap], requires_grad=True), torch.zeros(1)
    for loss, slope in (
        (reward_loss(x, zero), 1),
        (dpo_loss(x, zero, zero, zero, 0.1), 0.1),
    ):
        assert_close(loss, torch.tensor([gap * slope]))
        assert_close(torch.autograd.grad(loss.sum(), x)[0], torch.tensor([-slope * 1.0]))
    assert reward_loss(-x, zero).item() == 0
    assert kto_loss(x, zero, torch.tensor([True]), torch.tensor(0.0)).item() == 1


# --- What must change nothing -----------------------------------------------------------------------------------------


def losses_of(logits, ids, mask) -> dict[str, torch.Tensor]:
    """All losses on 4 rows, 2 chosen and 2 rejected; the reference is the policy at half its logits."""
    logps, ref = (sequence_logps(per_token_logps(x, ids), mask) for x in (logits, 0.5 * logits.detach()))
    (win, lose), (ref_w, ref_l) = logps.chunk(2), ref.chunk(2)
    m_w, m_l = mean_logps(per_token_logps(logits, ids), mask).chunk(2)
    good = torch.tensor([True, False, False, True])
    return {
        "dpo": dpo_loss(win, lose, ref_w, ref_l),
        "orpo": orpo_loss(-m_w, m_w, m_l),
        "kto": kto_loss(logps, ref, good, kto_z0(logps.roll(1), ref.roll(1))),
    }


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_masked_tokens_padding_and_its_side_change_no_loss_and_no_gradient(seed, n):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (4, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]])
    scores = mask[:, 1:] == 1  # the logits at t count if token t + 1 does
    noise = 9 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    perturbed = noise.clone()
    perturbed[:, :-1][scores] = logits.detach()[:, :-1][scores]
    other_ids = torch.where(mask == 1, ids, torch.randint(7, (4, 6), generator=generator))
    pads = noise[:, :n], torch.zeros(4, n, dtype=torch.long)
    wanted = losses_of(logits, ids, mask)
    variants = {
        "perturbed": (perturbed, other_ids, mask, slice(0, 6)),
        "right": (
            torch.cat([logits.detach(), pads[0]], 1),
            *(torch.cat([x, pads[1]], 1) for x in (ids, mask)),
            slice(6),
        ),
        "left": (
            torch.cat([pads[0], logits.detach()], 1),
            *(torch.cat([pads[1], x], 1) for x in (ids, mask)),
            slice(n, n + 6),
        ),
    }
    gradients = {name: torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for name, loss in wanted.items()}
    for gradient in gradients.values():
        assert not gradient[:, -1].any() and not gradient[:, :-1][~scores].any() and gradient.any()
    for variant, (x, y, m, where) in variants.items():
        x = x.requires_grad_()
        for name, loss in losses_of(x, y, m).items():
            assert_close(loss, wanted[name], msg=f"{variant} {name}")
            gradient = torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]
            assert_close(gradient[:, where], gradients[name], msg=f"{variant} {name}")


@settings(deadline=None, max_examples=30)
@given(rows_of(number, number), number)
def test_only_differences_count(rows, shift):
    """One constant on both rewards changes nothing; two answers change places: the losses differ by the gap."""
    win, lose = (double(*column) for column in zip(*rows, strict=True))
    assert_close(reward_loss(win + shift, lose + shift), reward_loss(win, lose))
    assert_close(reward_loss(lose, win) - reward_loss(win, lose), win - lose)
    assert_close(dpo_loss(win + shift, lose, win, lose, 0.3), dpo_loss(win, lose, win - shift, lose, 0.3))
    assert_close(dpo_loss(win, lose, win + shift, lose + shift, 0.3), LN2 * torch.ones_like(win))


# --- Errors -----------------------------------------------------------------------------------------------------------

a, b = torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo_loss(a, a, a, b), r"policy_logps \(2,\), ref_logps \(3,\), wanted one shape"),
        (lambda: dpo_loss(a, b, a, b), r"chosen_rewards \(2,\), rejected_rewards \(3,\)"),
        (lambda: dpo_loss(*[torch.zeros(2, 5)] * 4), r"\(2, 5\).*sequence_logps"),
        (lambda: reward_loss(torch.zeros(2, 1), torch.zeros(2, 1)), r"\(2, 1\).*squeeze"),
        (lambda: reward_loss(a, torch.zeros(2, 1)), r"\(2,\).*\(2, 1\)"),
        (lambda: dpo_loss(a, a, b, a), r"policy_logps \(2,\), ref_logps \(3,\)"),
        *(
            (lambda i=i: dpo_loss(*(a[:1] if i == j else a for j in range(4))), r"_logps \(1,\)")  # broadcasting
            for i in range(4)
        ),
        (lambda: orpo_loss(torch.tensor(1.0), a, a), r"chosen_nll \(\).*wanted one shape"),
        (lambda: orpo_loss(a, b, a), r"chosen_nll \(2,\), chosen \(3,\), rejected \(2,\)"),
        (lambda: orpo_loss(a, a, b), r"chosen_nll \(2,\), chosen \(2,\), rejected \(3,\)"),
        (lambda: kto_z0(a, b), r"\(2,\).*\(3,\)"),
        (lambda: kto_loss(a[:1], a, a.bool(), a.sum()), r"policy_logps \(1,\)"),  # would go well with 2 by broadcasting
        (lambda: kto_loss(a, a[:1], a.bool(), a.sum()), r"ref_logps \(1,\)"),
        (lambda: kto_loss(a, a, torch.tensor([True] * 3), a.sum()), r"desirable \(3,\)"),
        (lambda: kto_loss(a, a, torch.tensor([1, -1]), a.sum()), "int64, wanted bool.*labels > 0"),
        (lambda: kto_loss(a, a, a.bool(), torch.zeros(2)), "z0: got 2 numbers, wanted one"),
        (lambda: kto_loss(a, a, a.bool(), torch.zeros(0)), "z0: got 0 numbers, wanted one"),
    ],
)
def test_errors_say_what_was_got_what_was_wanted_and_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()

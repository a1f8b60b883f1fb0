"""ftlab.scratch.logps: hand-worked numbers, naive loops in double precision, and what must never change a log-prob."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ftlab.scratch.logps import entropy, masked_mean, mean_logps, per_token_logps, sequence_logps


@st.composite
def batches(draw):
    """logits (B, T, V), input_ids (B, T) and a completion mask in which every row has a token that counts; float64."""
    B, T, V = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    input_ids = torch.randint(V, (B, T), generator=generator)
    mask = torch.randint(2, (B, T), generator=generator)
    mask[torch.arange(B), torch.randint(1, T, (B,), generator=generator)] = 1
    return logits, input_ids, mask


def naive_logp(row: list[float], token: int) -> float:
    """log softmax with Python's numbers."""
    largest = max(row)
    return row[token] - largest - math.log(math.fsum(math.exp(x - largest) for x in row))


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_by_hand():
    """Vocabulary of 2, odds 3 : 1, 1 : 1 and 1 : 4, the last logits are not used.

    Tokens 1, 0, 1, 1: log 3/4 for the second, log 1/2 for the third, log 4/5 for the fourth. The mask counts the last
    two: the sum is log 2/5, the mean half of it.
    """
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(4)], [9.0, 9.0]]])
    logps = per_token_logps(logits, torch.tensor([[1, 0, 1, 1]]))
    assert_close(logps, torch.tensor([[math.log(3 / 4), math.log(1 / 2), math.log(4 / 5)]]))
    mask = torch.tensor([[0, 0, 1, 1]])
    assert_close(sequence_logps(logps, mask), torch.tensor([math.log(2 / 5)]))
    assert_close(mean_logps(logps, mask), torch.tensor([math.log(2 / 5) / 2]))
    wanted = [math.log(4) - 0.75 * math.log(3), math.log(2), math.log(5) - 0.8 * math.log(4)]
    assert_close(entropy(logits), torch.tensor([wanted]))


def test_a_uniform_model_gives_minus_ln_v_and_entropy_ln_v():
    logits, ids = torch.full((2, 5, 2048), 0.3), torch.arange(10).view(2, 5)
    assert_close(per_token_logps(logits, ids), torch.full((2, 4), -math.log(2048)))
    assert_close(entropy(logits), torch.full((2, 4), math.log(2048)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_token_that_cannot_be_adds_nothing_to_the_entropy(dtype):
    """0 log 0 = 0: a third token of logit -inf beside two of equal logits leaves ln 2, the largest; so no slope."""
    logits = torch.tensor([[[0.0, 0.0, -math.inf]] * 2], dtype=dtype, requires_grad=True)
    found = entropy(logits)
    assert_close(found, torch.full_like(found, math.log(2)))
    found.sum().backward()
    assert_close(logits.grad, torch.zeros_like(logits))


def test_the_two_means_differ_when_lengths_do():
    """Rows of 1 and 3 tokens, all values 4 and 0: over all tokens 4/4 = 1, the mean of the rows' means is 2."""
    values, mask = torch.tensor([[4.0, 9, 9], [0, 0, 0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert masked_mean(values, mask) == 1
    assert masked_mean(values, mask, dim=1).tolist() == [4, 0]
    assert masked_mean(values, mask, dim=1).mean() == 2


# --- Against naive loops ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(batches())
def test_equal_to_a_naive_loop(batch):
    logits, ids, mask = batch
    B, T, V = logits.shape
    loop = [[naive_logp(logits[b, t].tolist(), ids[b, t + 1].item()) for t in range(T - 1)] for b in range(B)]
    logps = per_token_logps(logits, ids)
    assert_close(logps, torch.tensor(loop, dtype=torch.float64))
    sums = [math.fsum(loop[b][t] for t in range(T - 1) if mask[b, t + 1]) for b in range(B)]
    numbers = [sum(mask[b, 1:].tolist()) for b in range(B)]
    assert_close(sequence_logps(logps, mask), torch.tensor(sums, dtype=torch.float64))
    assert_close(
        mean_logps(logps, mask), torch.tensor([s / n for s, n in zip(sums, numbers, strict=True)], dtype=torch.float64)
    )
    assert masked_mean(logps, mask[:, 1:]).item() == pytest.approx(sum(sums) / sum(numbers))
    every = [[naive_logp(logits[b, t].tolist(), v) for v in range(V)] for b in range(B) for t in range(T - 1)]
    doubts = [-math.fsum(math.exp(logp) * logp for logp in row) for row in every]
    assert_close(entropy(logits), torch.tensor(doubts, dtype=torch.float64).view(B, T - 1), rtol=1e-7, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(batches())
def test_the_gradient_is_one_hot_minus_softmax_where_a_token_counts_and_0_elsewhere(batch):
    """d log p(token) / d logits = one_hot(token) - softmax(logits), the softmax with Python's numbers."""
    logits, ids, mask = batch
    logits.requires_grad_()
    sequence_logps(per_token_logps(logits, ids), mask).sum().backward()
    wanted = torch.zeros_like(logits)
    B, T, V = logits.shape
    for b in range(B):
        for t in range(T - 1):
            if mask[b, t + 1]:
                for v in range(V):
                    probability = math.exp(naive_logp(logits[b, t].tolist(), v))
                    wanted[b, t, v] = (v == ids[b, t + 1].item()) - probability
    assert_close(logits.grad, wanted)


@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(0, 2**31))
def test_sequences_sum_to_probability_1(batch, seed):
    """Exact enumeration: over all V^2 continuations by two tokens, exp(sequence_logps) is a distribution."""
    logits, _, _ = batch
    V = logits.shape[2]
    table = torch.randn(V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    continuations = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (V^2, 2)
    ids = torch.cat([torch.zeros(V * V, 1, dtype=torch.long), continuations], 1)
    logits = torch.stack([table[V].expand(V * V, V), table[continuations[:, 0]], table[continuations[:, 1]]], 1)
    logps = sequence_logps(per_token_logps(logits, ids), torch.ones_like(ids))
    assert logps.exp().sum().item() == pytest.approx(1)


# --- What must change nothing -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(batches(), st.sampled_from([0.0, -1e30, math.nan, -math.inf, math.inf]))
def test_what_stands_where_the_mask_is_0_changes_nothing(batch, noise):
    logits, ids, mask = batch
    logps = per_token_logps(logits, ids).requires_grad_()
    perturbed = torch.where(mask[:, 1:] == 0, noise, logps.detach()).requires_grad_()
    for function in (sequence_logps, mean_logps, lambda x, m: masked_mean(x, m[:, 1:])):
        a, b = function(logps, mask), function(perturbed, mask)
        assert torch.equal(a, b)
        (grad_a,), (grad_b,) = torch.autograd.grad(a.sum(), logps), torch.autograd.grad(b.sum(), perturbed)
        assert torch.equal(grad_a, grad_b) and not grad_a[mask[:, 1:] == 0].any()


@settings(deadline=None)
@given(batches(), st.integers(1, 4), st.integers(0, 2**31))
def test_padding_on_either_side_changes_nothing(batch, n, seed):
    """n tokens of padding, with any ids and any logits. On the left the pad's logits come before the first token."""
    logits, ids, mask = batch
    mask[:, 0] = 0  # as in every real batch: the first token has no log-prob, a left pad would give it one
    generator = torch.Generator().manual_seed(seed)
    B, _, V = logits.shape
    pad_logits = 50 * torch.randn(B, n, V, generator=generator, dtype=torch.float64)
    pad_ids, pad_mask = torch.randint(V, (B, n), generator=generator), torch.zeros(B, n, dtype=torch.long)
    wanted = sequence_logps(per_token_logps(logits, ids), mask)
    for join in (lambda pad, x: torch.cat([pad, x], 1), lambda pad, x: torch.cat([x, pad], 1)):
        logps = per_token_logps(join(pad_logits, logits), join(pad_ids, ids))
        assert_close(sequence_logps(logps, join(pad_mask, mask)), wanted)
        assert_close(mean_logps(logps, join(pad_mask, mask)), wanted / mask.sum(1))


@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(-100, 100))
def test_a_constant_added_to_the_logits_changes_nothing(batch, constant):
    logits, ids, _ = batch
    assert_close(per_token_logps(logits + constant, ids), per_token_logps(logits, ids))
    assert_close(entropy(logits + constant), entropy(logits))


def test_the_logits_behind_the_last_token_change_nothing():
    """Nothing is scored by them: log-probs, entropy and gradients are the same even if they are nan."""
    logits, ids = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8).view(2, 4) % 5
    dirty = torch.cat([logits[:, :-1], torch.full((2, 1, 5), math.nan)], 1)
    for function in (lambda x: per_token_logps(x, ids), entropy):
        a, b = logits.clone().requires_grad_(), dirty.clone().requires_grad_()
        assert torch.equal(function(a), function(b))
        (grad_a,), (grad_b,) = torch.autograd.grad(function(a).sum(), a), torch.autograd.grad(function(b).sum(), b)
        assert torch.equal(grad_a, grad_b) and not grad_b[:, -1].any()


def test_a_bool_mask_is_a_mask_and_no_token_gives_0():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]])
    assert sequence_logps(logps, mask).tolist() == sequence_logps(logps, mask.bool()).tolist() == [-3, 0]


def test_bf16_logits_give_fp32_log_probs():
    """Uniform over 2,048: bf16 would give -7.625, the exact value is -7.6246."""
    logits, ids = torch.zeros(1, 2, 2048, dtype=torch.bfloat16), torch.tensor([[0, 5]])
    assert_close(per_token_logps(logits, ids), torch.tensor([[-math.log(2048)]]))
    assert entropy(logits).dtype == torch.float32


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: per_token_logps(torch.zeros(2, 4, 9), torch.zeros(2, 5).long()), r"\(2, 4, 9\).*\(2, 5\).*shifted"),
        (lambda: per_token_logps(torch.zeros(4, 9), torch.zeros(4).long()), r"\(4, 9\).*wanted \(B, T, V\)"),
        (lambda: per_token_logps(torch.zeros(2, 4), torch.zeros(2, 4).long()), r"\(2, 4\).*wanted \(B, T, V\)"),
        (lambda: per_token_logps(torch.zeros(2, 4, 9, 1), torch.zeros(2, 4).long()), r"\(2, 4, 9, 1\).*wanted"),
        (lambda: per_token_logps(torch.zeros(2, 1, 9), torch.zeros(2, 1).long()), "T > 1"),
        (lambda: per_token_logps(torch.zeros(1, 2, 9), torch.tensor([[1, -1]])), r"-1 to 1, wanted 0"),
        (lambda: per_token_logps(torch.zeros(1, 2, 9), torch.tensor([[1, -100]])), "-100 to 1.*labels"),
        (lambda: per_token_logps(torch.zeros(1, 2, 9), torch.tensor([[1, 9]])), r"1 to 9, wanted 0 \.\.\. 8"),
        (lambda: entropy(torch.zeros(4, 9)), "batch dimension"),
        (lambda: entropy(torch.zeros(2, 4, 9, 1)), r"\(2, 4, 9, 1\).*wanted"),
        (lambda: entropy(torch.zeros(2, 1, 9)), r"\(2, 1, 9\), wanted .* T > 1"),
        (lambda: sequence_logps(torch.zeros(2, 3), torch.ones(2, 3)), "do not shift the mask"),
        (lambda: sequence_logps(torch.zeros(2, 3, 1), torch.ones(2, 4, 1)), r"\(2, 4, 1\), wanted"),
        (lambda: mean_logps(torch.zeros(2, 3), torch.ones(4)), r"\(4,\).*wanted"),
        (lambda: sequence_logps(torch.zeros(1, 2), torch.tensor([[5, -100, 7]])), "-100 to 7.*labels"),
        *(
            (lambda wrong=wrong: masked_mean(torch.ones(1, 3), torch.tensor([[0, 1, wrong]])), "wanted only 0 and 1")
            for wrong in (2, 0.5, -100)  # one is enough
        ),
        (lambda: masked_mean(torch.ones(1, 2).bool(), torch.tensor([[1, 2]])), "1 to 2, wanted only 0 and 1"),
        (lambda: mean_logps(torch.zeros(2, 2), torch.tensor([[0, 1, 1], [1, 0, 0]])), "without a 1 in a row"),
        (lambda: masked_mean(torch.zeros(2, 2), torch.zeros(2, 2)), "without a 1 in it.*turned round"),
        (lambda: masked_mean(torch.zeros(2, 2), torch.ones(2, 3)), r"\(2, 3\).*\(2, 2\).*mask\[:, 1:\]"),
    ],
)
def test_errors_say_what_was_got_what_was_wanted_and_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()

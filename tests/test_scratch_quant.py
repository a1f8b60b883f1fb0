"""ftlab.scratch.quant: numbers worked by hand, properties, and the error of each 4-bit type on normal weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.scratch.quant import (
    decision_thresholds,
    dequantize_blockwise,
    dequantize_int4_asymmetric,
    dequantize_nf4,
    double_dequantize,
    double_quantize,
    dynamic_levels,
    fp4_levels,
    int4_levels,
    kept_after_requantization,
    nf4_levels,
    quantize_blockwise,
    quantize_int4_asymmetric,
    quantize_nf4,
)

FOUR_BIT = {"nf4": nf4_levels(), "e2m1": fp4_levels(), "bnb fp4": fp4_levels(1 / 32), "int4": int4_levels()}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Levels -----------------------------------------------------------------------------------------------------------


def test_nf4_levels_cut_the_normal_distribution_into_equal_parts():
    """Back through the distribution function Phi(z) = (1 + erf(z / sqrt 2)) / 2, written with math.erf.

    The largest level is z = 1.8481, where Phi = 0.9677083: the 8 steps up from 0 are 0.4677083 / 8 = 0.058464 each,
    the 7 steps down 0.4677083 / 7 = 0.066815.
    """
    levels = nf4_levels()
    phi = torch.tensor([(1 + math.erf(level * 1.848131 / math.sqrt(2))) / 2 for level in levels.tolist()])
    torch.testing.assert_close(phi.diff()[7:], torch.full((8,), 0.058464), rtol=0, atol=1e-6)
    torch.testing.assert_close(phi.diff()[:7], torch.full((7,), 0.066815), rtol=0, atol=1e-6)
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1) and len(levels) == 16


def test_fp4_is_e2m1_and_that_of_bitsandbytes_differs_in_the_number_next_to_zero():
    """E2M1 with bias 1: exponent 0 is 0 and 0.5; then 2^(e - 1) x 1 and x 1.5 for e = 1, 2, 3: 1 1.5 2 3 4 6."""
    e2m1 = [0, 0.5] + [2 ** (e - 1) * m for e in (1, 2, 3) for m in (1, 1.5)]
    torch.testing.assert_close(fp4_levels()[7:] * 6, torch.tensor(e2m1))
    assert fp4_levels().tolist() == (-fp4_levels().flip(0)).tolist()
    different = (fp4_levels() != fp4_levels(1 / 32)).nonzero()[:, 0].tolist()
    assert different == [6, 8] and fp4_levels(1 / 32)[8].item() == pytest.approx(1 / 192)


def test_dynamic_levels():
    """Each sign: 1 + 2 + 4 + ... + 64 = 127 levels; with 0 and 1 that is 256.

    Top decade: 64 steps of 0.9 / 64 = 0.0140625 from 0.1, so the largest is 1 - 0.00703125; the lowest decade has the
    one level 0.55e-6.
    """
    levels = dynamic_levels()
    assert len(levels) == 256 and levels[127] == 0 and levels[255] == 1
    assert levels[[0, 254]].tolist() == pytest.approx([-0.99296875, 0.99296875])
    assert levels[128].item() == pytest.approx(5.5e-7)
    assert [((levels > 10.0**-e) & (levels < 10.0 ** (1 - e))).sum().item() for e in (1, 2, 3)] == [64, 32, 16]


def test_int4_levels_are_whole_sevenths():
    assert int4_levels().tolist() == pytest.approx([k / 7 for k in range(-7, 8)])


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_nf4_by_hand():
    """absmax 2, so x / absmax = 0.5, -1, 0.1, 0.3, 0.

    Levels about 0.5: 0.4407 and 0.5626, threshold 0.5017, so 0.4407, code 12. About 0.1: 0.0796 | 0.1203 | 0.1609, so
    code 8. About 0.3: 0.2461 | 0.2920 | 0.3379, so code 11. -1 is code 0, 0 is code 7, and so is what fills the last
    byte up: 12 x 16 + 0, 8 x 16 + 11, 7 x 16 + 7.
    """
    packed, absmax = quantize_nf4(torch.tensor([1.0, -2.0, 0.2, 0.6, 0.0]))
    assert packed.tolist() == [192, 139, 119] and absmax.tolist() == [2]
    for stored in (packed, packed[:, None]):  # bitsandbytes' shape is a column
        values = dequantize_nf4(stored, absmax, (5,))
        torch.testing.assert_close(values, torch.tensor([0.8814, -2.0, 0.1592, 0.6758, 0.0]), rtol=0, atol=1e-4)


def test_a_block_of_zeros_is_code_7_and_what_is_tiny_is_divided_by_1e_38():
    """Whole or short, no 0 / 0. 8e-39 counts as 0.8, whose level is 0.7230, code 14: 14 x 16 + 7."""
    for n in (64, 66, 3):
        packed, absmax = quantize_nf4(torch.zeros(n))
        assert packed.tolist() == [7 * 16 + 7] * ((n + 1) // 2) and not absmax.any()
    assert quantize_nf4(torch.tensor([8e-39]))[0].tolist() == [14 * 16 + 7]


def test_block_sizes_are_the_powers_of_2_from_32_to_4096():
    accepted = [2**power for power in range(5, 13)]
    for size in (16, *accepted, 8192):
        for block_size in (size - 1, size, size + 1):
            if block_size in accepted:
                assert quantize_nf4(torch.ones(3), block_size)[1].tolist() == [1]
            else:
                with pytest.raises(ValueError, match=f"got {block_size}, wanted one of"):
                    quantize_nf4(torch.ones(3), block_size)


def test_a_value_on_a_threshold_goes_down():
    """Levels -1, 0, 1 have the thresholds -0.5 and 0.5; the last block is short."""
    levels = torch.tensor([-1.0, 0.0, 1.0])
    codes, absmax = quantize_blockwise(torch.tensor([-4.0, -2.0, 2.0, 2.1, 1.0, 0.5]), levels, 4)
    assert codes.tolist() == [0, 0, 1, 2, 2, 1] and absmax.tolist() == [4, 1]
    assert dequantize_blockwise(codes, absmax, levels, 4).tolist() == [-4, -4, 0, 4, 1, 0]
    assert decision_thresholds(levels).tolist() == [-0.5, 0.5]


def test_a_matrix_keeps_its_shape_and_its_blocks_run_across_rows():
    """Blocks of 4 over 2 x 3: the second row begins in the first block, and the last block is short."""
    x = torch.tensor([[-4.0, -2.0, 2.0], [2.1, 1.0, 0.5]])
    levels = torch.tensor([-1.0, 0.0, 1.0])
    codes, absmax = quantize_blockwise(x, levels, 4)
    assert codes.tolist() == [[0, 0, 1], [2, 2, 1]] and absmax.tolist() == [4, 1]
    assert dequantize_blockwise(codes, absmax, levels, 4).tolist() == [[-4, -4, 0], [4, 1, 0]]
    where = {"device": "meta"}  # levels come along to where the codes are
    there = dequantize_blockwise(codes.to(**where), absmax.to(**where), levels, 4)
    assert there.is_meta and there.shape == x.shape


def test_2_to_256_levels():
    """One level or 257 are refused; of two, the threshold is in the middle; 256 are the dynamic type's."""
    assert quantize_blockwise(torch.tensor([1.0, 0.1, -0.1]), torch.tensor([-1.0, 1.0]), 4)[0].tolist() == [1, 1, 0]
    assert quantize_blockwise(torch.tensor([1.0, 0.0]), dynamic_levels(), 4)[0].tolist() == [255, 127]
    for levels in (torch.ones(1), torch.arange(257) / 256):
        with pytest.raises(ValueError, match="wanted 2 to 256 ascending"):
            quantize_blockwise(torch.ones(4), levels, 4)


def test_double_quantization_by_hand():
    """absmax 1, 2, 3, 6: mean 3, without it -2, -1, 0, 3; second constant 3; quotients -2/3, -1/3, 0, 1.

    Top decade, steps of 0.0140625 from 0.1: 2/3 lies in step 40 (level 0.66953125), 1/3 in step 16 (0.33203125). Code 0
    is step 63 of the negative ones, so they are codes 23 and 47; 1 is code 255. 0 would be code 127, but the table has
    an even number of entries and none at 0: the next is 1/65,535 = 1.526e-5, and of 0.775e-5 and 2.125e-5 the second is
    nearer, code 131 (after 0.055e-5 and 0.325e-5).
    """
    codes, absmax2, offset = double_quantize(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert codes.tolist() == [23, 47, 131, 255] and absmax2.tolist() == [3] and offset == 3
    assert codes.dtype == torch.uint8
    expected = torch.tensor([3 - 3 * 0.66953125, 3 - 3 * 0.33203125, 3 + 3 * 2.125e-5, 6])
    torch.testing.assert_close(double_dequantize(codes, absmax2, offset), expected)


def test_asymmetric_int4_by_hand():
    """-1 ... 2 in 15 steps of 0.2: 0.4 is 7 steps up, 0 is 5. The second block, -1 ... 2.1, has no level 0."""
    codes, scales, zeros = quantize_int4_asymmetric(torch.tensor([-1, 2, 0.4, 0, -1, 2.1, 0]), 4)
    assert codes.tolist() == [0, 15, 7, 5, 0, 15, 5] and zeros.tolist() == [-1, -1] and codes.dtype == torch.uint8
    values = dequantize_int4_asymmetric(codes, scales, zeros, 4)
    torch.testing.assert_close(values, torch.tensor([-1, 2, 0.4, 0, -1, 2.1, 5 * 3.1 / 15 - 1]))
    codes, scales, zeros = quantize_int4_asymmetric(torch.tensor([[-1, 2, 0.4], [0, -1, 2.1]]), 4)  # blocks cross rows
    assert codes.tolist() == [[0, 15, 7], [5, 0, 15]]
    values = dequantize_int4_asymmetric(codes, scales, zeros, 4)
    torch.testing.assert_close(values, torch.tensor([[-1, 2, 0.4], [0, -1, 2.1]]))


# --- Properties -------------------------------------------------------------------------------------------------------


@st.composite
def blocks(draw):
    """A float32 vector, perhaps with zeros, and a block size."""
    n, seed, scale = draw(st.integers(1, 300)), draw(st.integers(0, 2**31)), draw(st.floats(1e-6, 1e6))
    x = normal(n, seed=seed) * scale
    x[draw(st.integers(0, n)) :: draw(st.integers(1, 9))] = 0
    return x, draw(st.sampled_from([1, 3, 16, 64, 100]))


@settings(max_examples=60, deadline=None)
@given(blocks(), st.sampled_from(list(FOUR_BIT)))
def test_quantizing_is_near_orderly_and_done_once(case, name):
    """Error at most half the widest gap, order kept in each block, 0 stays 0, doubled weights double, twice is once."""
    (x, block_size), levels = case, FOUR_BIT[name]
    codes, absmax = quantize_blockwise(x, levels, block_size)
    values = dequantize_blockwise(codes, absmax, levels, block_size)
    limit = levels.diff().max() / 2 * absmax.repeat_interleave(block_size)[: len(x)]
    assert ((values - x).abs() <= limit * (1 + 1e-5)).all()
    assert (values[x == 0] == 0).all()
    for part, value in zip(x.split(block_size), values.split(block_size), strict=True):
        assert (value[part.argsort()].diff() >= 0).all()
        assert value.abs().max() == part.abs().max()  # the largest is stored exactly
    again, absmax_again = quantize_blockwise(values, levels, block_size)
    assert torch.equal(again, codes) and torch.equal(absmax_again, absmax)
    doubled, absmax_doubled = quantize_blockwise(2 * x, levels, block_size)
    assert torch.equal(doubled, codes) and torch.equal(absmax_doubled, 2 * absmax)


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_packing_loses_no_code_and_the_dtype_does_not_matter(case):
    x = case[0].bfloat16()
    codes, absmax = quantize_blockwise(x, nf4_levels(), 64)
    values = dequantize_blockwise(codes, absmax, nf4_levels(), 64)
    packed, packed_absmax = quantize_nf4(x.float())
    assert torch.equal(dequantize_nf4(packed, packed_absmax, x.shape), values) and len(packed) == (len(x) + 1) // 2


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_the_error_of_asymmetric_int4_is_at_most_half_a_step(case):
    x, block_size = case
    codes, scales, zeros = quantize_int4_asymmetric(x, block_size)
    error = (dequantize_int4_asymmetric(codes, scales, zeros, block_size) - x).abs()
    size = torch.maximum(scales, zeros.abs() * 1e-5).repeat_interleave(block_size)[: len(x)]
    assert (error <= size / 2 * (1 + 1e-4)).all()


def test_double_quantization_costs_next_to_nothing():
    """Half a step of 0.0140625 of the second constant at most; and 1.0 % more mean squared error at the very most."""
    weight = normal(1024, 256)
    packed, absmax = quantize_nf4(weight)
    codes, absmax2, offset = double_quantize(absmax)
    again = double_dequantize(codes, absmax2, offset)
    assert ((again - absmax).abs() <= 0.00706 * absmax2.repeat_interleave(256)).all()
    error, error_again = (((dequantize_nf4(packed, a, weight.shape) - weight) ** 2).mean() for a in (absmax, again))
    assert 1 <= error_again / error < 1.01


def test_floats_of_16_bits_are_quantized_as_their_value_in_32():
    x = normal(3, 50)
    for dtype in (torch.float16, torch.bfloat16):
        codes, absmax = quantize_blockwise(x.to(dtype), nf4_levels(), 64)
        wanted, wanted_absmax = quantize_blockwise(x.to(dtype).float(), nf4_levels(), 64)
        assert torch.equal(codes, wanted) and torch.equal(absmax, wanted_absmax) and absmax.dtype == torch.float32


def test_minus_x_is_not_quantized_like_x():
    """NF4 has 8 levels above zero and 7 below: 0.9 of absmax is nearest to 1 above (threshold 0.861), -0.85 to -1."""
    x = torch.tensor([1.0, 0.85])
    above, below = (dequantize_nf4(*quantize_nf4(sign * x), (2,)) for sign in (1, -1))
    assert above[1].item() == pytest.approx(0.7230, abs=1e-4) and below[1] == -1


# --- Normal weights: claims.md, section 7 -----------------------------------------------------------------------------

MSE = {  # of N(0, 1), by block size: NF4, FP4 E2M1, FP4 of bitsandbytes, INT4 symmetric, INT4 asymmetric
    32: (0.007626, 0.010248, 0.013055, 0.009422, 0.006119),
    64: (0.008454, 0.011159, 0.014865, 0.011564, 0.008026),
    128: (0.009133, 0.011824, 0.016523, 0.013803, 0.009976),
    256: (0.009741, 0.012401, 0.018188, 0.016006, 0.011882),
    4096: (0.01195, 0.014054, 0.024533, 0.024339, 0.019443),
}


@pytest.fixture(scope="module")
def measured() -> dict[int, list[float]]:
    """The table again, from 2^20 other samples."""
    x, table = normal(2**20), {}
    for size in MSE:
        values = [dequantize_blockwise(*quantize_blockwise(x, lv, size), lv, size) for lv in FOUR_BIT.values()]
        values.append(dequantize_int4_asymmetric(*quantize_int4_asymmetric(x, size), size))
        table[size] = [((value - x) ** 2).mean().item() for value in values]
    return table


@pytest.mark.parametrize("size", MSE)
def test_mean_squared_error_on_normal_weights(measured, size):
    """Two samples of 2^20 / size blocks each: the largest of 4,096 values spreads by 7 %, 256 of them by 0.5 %."""
    assert measured[size] == pytest.approx(MSE[size], rel=0.04 if size == 4096 else 0.01)


def test_nf4_is_not_always_the_best(measured):
    """In small blocks, minimum and maximum beat it; at equal bits (two constants: 4 + 64/128 = 4.5) they do not."""
    assert measured[32][4] < measured[32][0] and measured[64][4] < measured[64][0]
    assert all(measured[size][0] == min(measured[size]) for size in (128, 256, 4096))
    assert measured[64][0] < measured[128][4]
    assert measured[64][2] / measured[64][1] == pytest.approx(1.33, abs=0.02)  # FP4: bitsandbytes' against E2M1


def test_codes_are_used_more_evenly_than_those_of_int4():
    """Bits of entropy per code in blocks of 64: 3.884 and 3.500; 4 would be an equal share for each of the 16."""
    for levels, expected in ((nf4_levels(), 3.884), (int4_levels(), 3.500)):
        share = torch.bincount(quantize_blockwise(normal(2**18), levels, 64)[0].int()) / 2**18
        assert -(share * share.log2()).sum().item() == pytest.approx(expected, abs=0.005)


# --- Merging back into NF4 --------------------------------------------------------------------------------------------


def low_rank_update(weight: torch.Tensor, ratio: float, r: int = 16) -> torch.Tensor:
    """A random B A of rank r with |B A| = ratio |weight|."""
    delta = normal(len(weight), r, seed=1) @ normal(r, weight.shape[1], seed=2)
    return delta * ratio * weight.norm() / delta.norm()


@pytest.mark.parametrize(
    ("ratio", "kept", "error"),
    [(0.005, 0.016, 1.08), (0.02, 0.016, 1.08), (0.05, 0.275, 1.03), (0.10, 0.837, 0.78), (0.20, 0.986, 0.46)],
)
def test_merging_into_nf4_rounds_small_updates_away(ratio, kept, error):
    """claims.md, section 7, where the weight is 1,024 wide; here 512, one seed, so kept varies by about 0.01."""
    weight = normal(512, 512)
    got = kept_after_requantization(weight, low_rank_update(weight, ratio))
    assert got == (pytest.approx(kept, abs=0.012), pytest.approx(error, abs=0.015))


def test_what_a_merge_keeps_by_hand():
    """Weights 1 and 31 zeros. The 1 doubled: absmax doubles, all is kept, (1, 0). 0.01 on a 0: 0 again, so (0, 1).

    Levels next to 0 are 0.0796 away. Both numbers are Python's.
    """
    weight = torch.tensor([1.0] + 31 * [0.0])
    grown, lost = torch.zeros(32), torch.zeros(32)
    grown[0], lost[5] = 1, 0.01
    for delta, wanted in ((grown, (1, 0)), (lost, (0, 1))):
        got = kept_after_requantization(weight, delta, 32)
        assert got == wanted and [type(number) for number in got] == [float, float]


def test_an_update_in_bf16_is_measured_in_fp32():
    weight, delta = normal(64, 64), (0.1 * normal(64, 64, seed=1)).bfloat16()
    assert kept_after_requantization(weight, delta) == kept_after_requantization(weight, delta.float())


@pytest.mark.parametrize("size", [32, 64])
def test_of_a_tiny_update_only_the_growth_of_the_largest_weights_is_kept(size):
    """No code changes; a block's absmax grows by D, the largest of sign(q) delta over its weights of level q = +-1.

    So what survives is q D. For independent normal deltas, E[D sum(q delta)] = 1 variance (Stein's lemma, however many
    weights share the largest level), so kept = 1 / size; D is common to the block and moves all its weights: error > 1.
    """
    weight, delta = normal(512, 512), normal(512, 512, seed=1) * 1e-3
    q = nf4_levels()[quantize_blockwise(weight, nf4_levels(), size)[0].int()].view(-1, size)
    along = delta.view(-1, size) * q
    survived = (q * along.masked_fill(q.abs() < 1, -math.inf).amax(1, keepdim=True)).view(512, 512)
    kept, error = kept_after_requantization(weight, delta, size)
    assert kept == pytest.approx(((survived * delta).sum() / delta.norm() ** 2).item(), abs=1e-4)
    assert error == pytest.approx(((survived - delta).norm() / delta.norm()).item(), abs=1e-4)
    assert kept == pytest.approx(1 / size, rel=0.2) and error > 1


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_nf4(torch.tensor([1.0, math.nan])), "1 of 2 values NaN"),
        (lambda: quantize_nf4(torch.tensor([math.inf])), "infinite"),
        (lambda: quantize_nf4(torch.empty(0)), "shape \\(0,\\)"),
        (lambda: quantize_nf4(torch.ones(4, dtype=torch.uint8)), "torch.uint8"),
        (lambda: quantize_nf4(torch.ones(4, dtype=torch.float64)), "torch.float64"),
        (lambda: quantize_nf4(torch.ones(4), 48), "got 48, wanted one of \\(32, 64"),
        (lambda: quantize_blockwise(torch.ones(4), int4_levels(), 0), "got 0, wanted a positive"),
        (lambda: quantize_blockwise(torch.ones(4), int4_levels(), 2.5), "got 2.5"),
        *(
            (lambda levels=levels: quantize_blockwise(torch.ones(4), torch.tensor(levels), 4), "ascending")
            for levels in ([0.0, 1.0, -1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0], [[-1.0, 1.0], [-1.0, 1.0]], 1.0)
        ),
        (lambda: dequantize_blockwise(torch.zeros(128).int(), torch.ones(1), int4_levels(), 64), "wanted \\(2,\\)"),
        (lambda: dequantize_nf4(torch.zeros(4, dtype=torch.uint8), torch.ones(1), (4, 1)), "wanted 2 of"),
        (
            lambda: dequantize_nf4(torch.zeros(2).int(), torch.ones(1), (4,)),
            "2 of torch.int32, wanted 2",
        ),
        (lambda: double_quantize(torch.empty(0)), "shape \\(0,\\)"),
        (lambda: quantize_int4_asymmetric(torch.ones(4), -1), "got -1"),
        (lambda: kept_after_requantization(torch.ones(4, 8), torch.zeros(4, 8)), "0 of 32"),
        (lambda: kept_after_requantization(torch.ones(4, 8), torch.ones(8, 4)), "got \\(8, 4\\)"),
    ],
)
def test_an_error_says_what_was_got_and_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()

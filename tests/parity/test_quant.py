"""ftlab.scratch.quant against bitsandbytes on the CPU: the same codes, constants, values and layers, bit for bit.

Not compared, because bitsandbytes 0.50 is wrong or different there:
- Rows that are not whole blocks. Its dequantize_4bit takes the constants of other rows on a CPU with AVX-512 if the
  width is a multiple of 16 but not of the block size. The tests hand it the weight as one long row.
- Layers in eval(). On a CPU with AVX-512 BF16, the first forward pass without gradients repacks the layer: see
  test_a_layer_that_has_been_evaluated_lets_no_gradient_through.
- The codes of a block whose constants are all equal (8 bits), and absmax of a short last block of zeros: 0 here and
  1e-38 there. Both stand for nothing but 0.
"""

import warnings

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from gguf import GGMLQuantizationType, quants
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
    nf4_levels,
    quantize_blockwise,
    quantize_int4_asymmetric,
    quantize_nf4,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_compiler():
    """bitsandbytes compiles its fallback (odd sizes, blocks from 2,048 up) for each new shape: seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


# --- Levels -----------------------------------------------------------------------------------------------------------


def test_levels_are_those_of_bitsandbytes():
    torch.testing.assert_close(nf4_levels(), bnb.get_4bit_type("nf4", "cpu"), rtol=0, atol=1e-6)
    assert torch.equal(nf4_levels(), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(fp4_levels(1 / 32), bnb.get_4bit_type("fp4", "cpu").unique())
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())


def test_thresholds_are_the_literals_of_the_cuda_kernel():
    """csrc/kernels.cu, dQuantizeNF4: a tree of comparisons x > literal, so a tie goes down there too."""
    literals = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544]
    literals += [-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767]
    literals += [0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683]
    literals += [0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    assert torch.equal(decision_thresholds(nf4_levels()), torch.tensor(literals))


# --- Tensors ----------------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw, levels):
    """(x, block_size): blocks of normal values, of zeros, or of values on these levels' thresholds or 1, 2 ulp off."""
    seed, block_size = draw(st.integers(0, 2**31)), draw(st.sampled_from([32, 64, 128, 2048]))
    thresholds = decision_thresholds(levels)
    n = draw(st.integers(1, 400) | st.integers(1, 3).map(lambda blocks: blocks * block_size))
    torch.manual_seed(seed)
    x = torch.randn(n) * 10 ** draw(st.floats(-4, 4))
    for block in x.split(block_size):
        kind, absmax = draw(st.sampled_from(["normal", "normal", "zeros", "thresholds"])), block.abs().max()
        if kind == "zeros":
            block.zero_()
        elif kind == "thresholds":
            on = thresholds[torch.randint(len(thresholds), block.shape)] * absmax
            block.copy_((on.view(torch.int32) + torch.randint(-2, 3, on.shape).int()).view(torch.float32))
            block[torch.randint(len(block), ())] = absmax
    return x.to(draw(st.sampled_from(DTYPES))), block_size


def equal_but_for_empty_blocks(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours, theirs.where(theirs > 1e-37, 0))


@settings(max_examples=150, deadline=None)
@given(tensors(nf4_levels()))
def test_nf4_codes_constants_and_values(case):
    x, size = case
    packed, state = bnb.quantize_4bit(x, blocksize=size, quant_type="nf4")
    ours, absmax = quantize_nf4(x, size)
    assert torch.equal(ours, packed[:, 0]) and equal_but_for_empty_blocks(absmax, state.absmax)
    values = bnb.dequantize_4bit(packed, state)
    assert values.dtype == x.dtype  # bitsandbytes gives back the dtype that it was given
    assert torch.equal(dequantize_nf4(ours, absmax, x.shape, size).to(x.dtype), values.reshape(x.shape))


@settings(max_examples=100, deadline=None)
@given(tensors(fp4_levels(1 / 32)))
def test_fp4_values(case):
    """Values only: bitsandbytes numbers FP4's levels by bit pattern, and 0 has two of them."""
    (x, size), levels = case, fp4_levels(1 / 32)
    values = bnb.dequantize_4bit(*bnb.quantize_4bit(x, blocksize=size, quant_type="fp4"))
    ours = dequantize_blockwise(*quantize_blockwise(x, levels, size), levels, size)
    assert torch.equal(ours.to(x.dtype), values.reshape(x.shape))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 80), st.sampled_from(DTYPES))
def test_double_quantization(seed, rows, width, dtype):
    """The nested state of a matrix of `width` x 64 columns, so of up to 1,600 constants in blocks of 256."""
    torch.manual_seed(seed)
    x = (torch.randn(rows, width * 64) * torch.rand(rows, 1)).to(dtype)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    ours, absmax = quantize_nf4(x)
    codes, absmax2, offset = double_quantize(absmax)
    assert torch.equal(ours, packed[:, 0]) and torch.equal(offset, state.offset)
    assert torch.equal(absmax2, state.state2.absmax)
    told_apart = absmax2.repeat_interleave(256)[: len(codes)] > 0
    assert torch.equal(codes[told_apart], state.absmax[told_apart])
    values = dequantize_nf4(ours, double_dequantize(codes, absmax2, offset), x.shape)
    assert torch.equal(values.to(dtype), bnb.dequantize_4bit(packed, state))


def test_what_the_table_of_the_cpu_kernel_changes():
    """The nearest level itself, as on a GPU, gives all but about 1 code in 700, and those are the neighbour's."""
    torch.manual_seed(0)
    absmax = torch.randn(2**17, 64).abs().amax(1)
    codes, _, offset = double_quantize(absmax)
    nearest, _ = quantize_blockwise(absmax - offset, dynamic_levels(), 256)
    moved = codes != nearest
    assert 1 / 1000 < moved.float().mean() < 1 / 500
    steps = dynamic_levels()[codes.int()] - dynamic_levels()[nearest.int()]
    assert steps.abs().max() < 0.0141  # no further than the next level of the top decade


def test_asymmetric_int4_is_ggufs_q4_1():
    """Q4_1: blocks of 32, scale and minimum kept in fp16; the codes are computed before that rounding."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, scales, zeros = quantize_int4_asymmetric(x, 32)
    stored = quants.quantize(x.numpy(), GGMLQuantizationType.Q4_1)
    blocks = torch.from_numpy(stored.reshape(-1, 20))  # 2 bytes scale, 2 minimum, 16 of codes: i and i + 16 in one
    assert torch.equal(torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1).view(codes.shape), codes)
    ours = dequantize_int4_asymmetric(codes, scales.half().float(), zeros.half().float(), 32)
    np.testing.assert_allclose(quants.dequantize(stored, GGMLQuantizationType.Q4_1), ours.numpy(), rtol=1e-6, atol=1e-6)


# --- Layers -----------------------------------------------------------------------------------------------------------


def layer(weight: torch.Tensor, compute_dtype: torch.dtype, double: bool = True) -> Linear4bit:
    """A Linear4bit of this weight, quantized; in training mode, so that no CPU repacks it."""
    out, width = weight.shape
    made = Linear4bit(width, out, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    return made.to("cpu").train()


def our_weight(weight: torch.Tensor, double: bool = True) -> torch.Tensor:
    packed, absmax = quantize_nf4(weight)
    return dequantize_nf4(packed, double_dequantize(*double_quantize(absmax)) if double else absmax, weight.shape)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4bit_layer_is_dequantize_then_matmul(dtype, double):
    """Forward and the gradient of x, in fp32 and in bf16 throughout. The weight gets no gradient."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 128, dtype=dtype), torch.randn(5, 128, dtype=dtype, requires_grad=True)
    theirs = layer(weight, dtype, double)
    ours = torch.nn.functional.linear(x, our_weight(weight, double).to(dtype))
    assert torch.equal(theirs(x), ours)
    grad = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (theirs(x), ours)]
    assert torch.equal(*gradients) and not theirs.weight.requires_grad


def test_with_a_bf16_weight_and_fp32_compute_the_backward_weight_is_rounded():
    """A weight that was loaded in bf16 is dequantized to fp32 going forward and to bf16 going back: 0.2 % off."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 128).bfloat16(), torch.randn(5, 128, requires_grad=True)
    exact, grad = our_weight(weight), torch.randn(5, 96)
    y = layer(weight, torch.float32)(x)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y, x @ exact.T)
    torch.testing.assert_close(got, grad @ exact.bfloat16().float())
    assert 5e-4 < (got - grad @ exact).norm() / (grad @ exact).norm() < 5e-3


@pytest.mark.parametrize("double", [False, True])
def test_bytes_held(double):
    """4.5 bits a weight, or 4.126953125. 576 x 1,536, SmolLM2's MLP: 54 x 16,384 weights, so all blocks are full."""
    held = layer(torch.randn(576, 1536), torch.float32, double).weight
    state, n = held.quant_state, 576 * 1536
    constants = [state.absmax, state.state2.absmax] if double else [state.absmax]
    nbytes = held.nbytes + sum(tensor.nbytes for tensor in constants)
    assert nbytes == n * (4.126953125 if double else 4.5) / 8
    assert round(nbytes / n, 4) == (0.5159 if double else 0.5625)
    once = [state.code, state.offset, state.state2.code] if double else [state.code]
    assert [tensor.nbytes for tensor in once] == ([64, 4, 1024] if double else [64])


def test_a_layer_that_has_been_evaluated_lets_no_gradient_through():
    """On a CPU with AVX-512 BF16, eval() and no_grad repack a layer for bf16 and for good; train() does not undo it.

    What stands below it then gets no gradient, and no error either: `gemv_4bit` has no backward pass. Setting
    support_avx512bf16_for_cpu = False on the layer prevents it.
    """
    torch.manual_seed(0)
    weight, x = torch.randn(96, 128), torch.randn(5, 16)
    below = torch.nn.Linear(16, 128)
    gradients = {}
    for name in ("never evaluated", "evaluated", "evaluated, not repacked"):
        above = layer(weight, torch.float32)
        if name == "evaluated, not repacked":
            above.support_avx512bf16_for_cpu = False
        if name != "never evaluated":
            with torch.no_grad():
                above.eval()(below(x))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "bitsandbytes::gemv_4bit: an autograd kernel was not registered")
            above.train()(below(x)).square().sum().backward()
        gradients[name], below.weight.grad = below.weight.grad, None
    assert torch.equal(gradients["evaluated, not repacked"], gradients["never evaluated"])
    assert (gradients["evaluated"] is None) == bool(bnb.has_avx512bf16())

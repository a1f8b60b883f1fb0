"""Storing a weight in 4 bits: levels, blocks, and the constants that the blocks cost.

A block of weights is divided by its largest magnitude (absmax); each quotient becomes the number of the nearest level.

Equal to bitsandbytes 0.50 on the CPU bit for bit: tests/parity/test_quant.py.
Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3; Dettmers et al. 2022, 8-bit optimizers,
arXiv:2110.02861, section 2 (dynamic levels).
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes has 4-bit kernels for
DOUBLE_BLOCK = 256  # constants that share one second constant, QLoRA section 3
TINY = 1e-38  # stands for an absmax of 0, so that a block of zeros is not 0 / 0


def nf4_levels() -> Tensor:
    """The 16 levels of NormalFloat4, ascending, fp32: 7 below zero, zero, 8 above.

    Equation 4 of the paper is not what its authors' code computes (its first quantile would be minus infinity). The
    code cuts the probability between 1/2 and offset into 8 equal steps for the positive levels and into 7 for the
    negative ones, takes the normal quantile at each cut, and divides by the largest. Offset is 1 - (1/30 + 1/32) / 2
    to seven digits: outside lies half of one level's share, be it of 15 or of 16 levels. The halves are unequal because
    zero must be a level (padding, pruned weights) and 15 codes are left over: -x is not quantized like x.
    Source: QLoRA, section 3; the values, Appendix E. The steps are in fp32, as in bitsandbytes: its values to the bit.
    """
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*below, 0.0, *above]))
    return levels / levels.max()


def fp4_levels(smallest: float = 0.5) -> Tensor:
    """The 15 levels of 4-bit floating point E2M1, ascending, fp32: +-{0, 0.5, 1, 1.5, 2, 3, 4, 6} / 6.

    Fifteen, because +0 and -0 are two codes for one level. bitsandbytes' FP4 is `fp4_levels(1 / 32)`: the number next
    to zero is 16 times smaller than in E2M1, so that nearly all weights between 0 and 1/6 lie between two levels with
    nothing in the middle. That is the only difference, and its squared error is a third larger.
    """
    above = torch.tensor([smallest, 1, 1.5, 2, 3, 4, 6]) / 6
    return torch.cat([-above.flip(0), torch.zeros(1), above])


def int4_levels() -> Tensor:
    """The 15 levels of a symmetric 4-bit integer, -7/7 ... 7/7, fp32; the code for -8 is not used."""
    return torch.arange(-7, 8) / 7


def dynamic_levels() -> Tensor:
    """The 256 levels of the 8-bit dynamic type, ascending, fp32: a decade of its own for each number of leading zeros.

    In the decade 10^-e, e = 0 ... 6, lie 2^(6 - e) levels of each sign, evenly spread over (0.1, 1) x 10^-e; then 0
    and 1. There is no -1: the lowest level is -0.993.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e) + 1)
        decade = 10**-e * (edges[:-1] + edges[1:]) / 2
        levels += [decade, -decade]
    return torch.cat(levels).sort().values


def decision_thresholds(levels: Tensor) -> Tensor:
    """The midpoints between neighbouring levels, one fewer than levels: what a quantizer compares with.

    A value exactly on a threshold belongs to the level below it. Nearest level and thresholds are the same up to that
    and to the rounding of a midpoint to fp32; for NF4 these 15 numbers stand as literals in bitsandbytes' CUDA code.
    """
    return (levels[:-1] + levels[1:]) / 2


def quantize_blockwise(x: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The codes of x, uint8, shape of x, and the largest magnitude of each block: absmax, fp32, (blocks,).

    code = the number of the level nearest to x / absmax. Blocks run over x row after row and take no notice of where a
    row ends; the last one may be shorter. x: finite floats of 16 or 32 bits.
    """
    if levels.ndim != 1 or not 2 <= len(levels) <= 256 or not (levels.diff() > 0).all():
        raise ValueError(f"levels: got {levels.tolist()}, wanted 2 to 256 ascending values: sorted, not by bit pattern")
    scaled, absmax = _scale(x, block_size)
    if tail := x.numel() % block_size:  # a short block is divided, not multiplied by 1 / absmax, as in bitsandbytes
        scaled[-1, :tail] = x.flatten()[-tail:].float() / absmax[-1].clamp(min=TINY)
    codes = torch.bucketize(scaled, decision_thresholds(levels.to(x.device)))
    return codes.flatten()[: x.numel()].view(x.shape).to(torch.uint8), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """levels[codes] * absmax of the block, fp32, shape of codes."""
    blocks = -(-codes.numel() // block_size)
    if absmax.shape != (blocks,):
        raise ValueError(f"absmax: got {tuple(absmax.shape)}, wanted ({blocks},): another block size? Still quantized?")
    values = levels.to(codes.device)[codes.flatten().int()]
    return (values * absmax.repeat_interleave(block_size)[: codes.numel()]).view(codes.shape)


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """x in fp32 as (blocks, block_size), the last block filled up with its own last value, which changes no extreme."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.numel():
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, wanted values of float32, bfloat16 or float16")
    if not x.isfinite().all():
        raise ValueError(f"x: got {(~x.isfinite()).sum()} of {x.numel()} values NaN or infinite, wanted all finite")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size: got {block_size}, wanted a positive whole number")
    flat = x.flatten().float()
    return torch.cat([flat, flat[-1:].expand(-len(flat) % block_size)]).view(-1, block_size)


def _scale(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x / absmax, (blocks, block_size), and absmax, (blocks,)."""
    blocks = _in_blocks(x, block_size)
    absmax = blocks.abs().amax(1)
    return blocks * (1 / absmax.clamp(min=TINY))[:, None], absmax


def quantize_nf4(x: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """The codes of x in NF4, two per byte, uint8, (ceil(n / 2),), and absmax, fp32, (ceil(n / block_size),).

    The first code of a pair is the byte's high half; if n is odd, the last byte is filled up with the code of 0.
    These are the bytes of bitsandbytes' quantize_4bit(x, quant_type="nf4"), which shapes them (ceil(n / 2), 1).
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: got {block_size}, wanted one of {BLOCK_SIZES}: bitsandbytes has no others.")
    codes, absmax = quantize_blockwise(x.flatten(), nf4_levels(), block_size)
    if len(codes) % 2:
        codes = nn.functional.pad(codes, (0, 1), value=7)  # level 7 is 0
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize_nf4(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int = 64) -> Tensor:
    """The weight of this shape that a 4-bit layer computes with, fp32; `.to(dtype)` is what bitsandbytes returns."""
    n = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.numel() != (n + 1) // 2:
        raise ValueError(f"packed: got {packed.numel()} of {packed.dtype}, wanted {(n + 1) // 2} of torch.uint8")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1)  # (n / 2, 2)
    return dequantize_blockwise(codes.flatten()[:n], absmax, nf4_levels(), block_size).view(shape)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The constants in 8 bits: codes, uint8, (blocks,); absmax2, fp32, (ceil(blocks / 256),); the mean, fp32, ().

    absmax is positive and the 8-bit type is signed, so the mean is taken off first. What the paper calls an 8-bit float
    is in bitsandbytes the dynamic type, and on the CPU not quite the nearest level: its kernel rounds the quotient to
    one of 65,536 even steps, of which none is 0, and looks the code up in a table. That moves about one code in 700 to
    its neighbour; the CUDA kernel has no such table. bitsandbytes' names are absmax, state2.absmax and offset.
    """
    offset = absmax.mean()
    scaled, absmax2 = _scale(absmax - offset, DOUBLE_BLOCK)
    step = ((scaled + 1) * 0.5 * 65_535 + 0.5).floor()
    codes = torch.bucketize(-1 + 2 * step / 65_535, decision_thresholds(dynamic_levels().to(absmax.device)))
    return codes.flatten()[: len(absmax)].to(torch.uint8), absmax2, offset


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """The constants again, fp32, (blocks,): dynamic_levels()[codes] * absmax2 + offset."""
    return dequantize_blockwise(codes, absmax2, dynamic_levels(), DOUBLE_BLOCK) + offset


def quantize_int4_asymmetric(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes 0 ... 15, uint8, shape of x; scales and zeros, fp32, (blocks,): x is about scale * code + zero.

    zero = min of the block, scale = (max - min) / 15: all 16 levels are used, two constants a block instead of one, and
    0 is not a level. GGUF's Q4_1 in blocks of 32, with the constants in fp16.
    """
    blocks = _in_blocks(x, block_size)
    zeros, scales = blocks.amin(1), (blocks.amax(1) - blocks.amin(1)) / 15
    codes = ((blocks - zeros[:, None]) / scales.clamp(min=TINY)[:, None]).round()
    return codes.flatten()[: x.numel()].view(x.shape).to(torch.uint8), scales, zeros


def dequantize_int4_asymmetric(codes: Tensor, scales: Tensor, zeros: Tensor, block_size: int) -> Tensor:
    """scale * code + zero of the block, fp32, shape of codes."""
    scales, zeros = (t.repeat_interleave(block_size)[: codes.numel()].view(codes.shape) for t in (scales, zeros))
    return scales * codes + zeros


def kept_after_requantization(weight: Tensor, delta: Tensor, block_size: int = 64) -> tuple[float, float]:
    """What is left of an update that is merged into an NF4 weight and quantized to NF4 again: (kept, error).

    With Q for quantizing and back, W = Q(weight), the base that a QLoRA adapter was trained on, and what the merge
    really changes, survived = Q(W + delta) - W:  kept = <survived, delta> / |delta|^2 and error = |survived - delta| /
    |delta|. A merge that rounds nothing has (1, 0); none at all has (0, 1).

    A small update moves no weight past a threshold. What survives is the growth of the largest weight of each block,
    because absmax is not rounded: kept = 1 / block_size. Its whole block grows with it, so that error is above 1.
    """
    if weight.shape != delta.shape or not delta.any():
        got = f"{tuple(delta.shape)}, {delta.count_nonzero()} of {delta.numel()} not 0"
        raise ValueError(f"delta: got {got}, wanted an update of {tuple(weight.shape)}: is B still 0, or transposed?")

    def q(x: Tensor) -> Tensor:
        return dequantize_nf4(*quantize_nf4(x, block_size), x.shape, block_size)

    base, delta = q(weight), delta.float()
    survived = q(base + delta) - base
    return ((survived * delta).sum() / delta.norm() ** 2).item(), ((survived - delta).norm() / delta.norm()).item()

"""The feed-forward's activation, alone or quantized for an 8-bit product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, row_block, tl, use_triton

FP8_MAX = 448.0  # the largest float8_e4m3fn
SMALLEST = 1e-12  # of a row: below it, zeros are as good


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, section 2), evaluated in float32, in x's dtype; any shape.

    In inference on a GPU the result takes x's memory (2.1 GB at 720p). Bytes, at least: 2 + 2 an element; 4.2 GB for
    75,600 tokens of width 13,824.
    """
    if not use_triton(x) or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    out, block = torch.empty_like(x) if torch.is_grad_enabled() else x, 2048
    launch(_kernel, (-(-x.numel() // block),), x, out, x.numel(), BLOCK=block, num_warps=8)
    return out


def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU, quantized row by row: x [..., C] → float8_e4m3fn [..., C] and scales [..., 1] float32, with
    gelu(x) ≈ quantized · scale.

    Bytes, at least: 2 + 1 an element; 3.1 GB for 75,600 tokens of width 13,824.
    """
    if not use_triton(x):
        return gelu_quantize_plain(x)
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    width = x.shape[-1]
    launch(_quantize_kernel, (x.numel() // width,), x, out, scale, width, FP8_MAX, SMALLEST, **row_block(width))
    return out, scale


def gelu_quantize_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.gelu(x.float(), approximate="tanh")
    scale = y.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return (y / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


@jit
def _gelu(x):
    """0.5 x (1 + tanh u) is x · sigmoid(2u): one exponential, and no tanh, which Triton's own language lacks."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # √(2/π) (x + …)
    return x / (1.0 + tl.exp(-2.0 * u))


@jit
def _kernel(x, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < count, 0.0).to(tl.float32)
    tl.store(out + i, _gelu(value).to(out.dtype.element_ty), i < count)


@jit
def _quantize_kernel(
    x, out, scale, C: tl.constexpr, MAX: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = _gelu(tl.load(x + row * C + i, i < C, 0.0).to(tl.float32))
    factor = tl.maximum(tl.max(tl.abs(value), 0), LEAST) / MAX
    tl.store(scale + row, factor)
    value = tl.minimum(tl.maximum(value / factor, -MAX), MAX)
    tl.store(out + row * C + i, value.to(out.dtype.element_ty), i < C)

"""The feed-forward's activation, rounded to what the second product takes: bf16, or 8-bit rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, row_block, tl, use_triton
from wan22.kernels.quantize_rows import LARGEST, Quantized, Rows, empty_rows, quantize_rows_plain, store_row


def gelu(x: Tensor, dtype: torch.dtype | None = None) -> Rows:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, section 2), evaluated in float32, in x's dtype; any shape.
    An 8-bit dtype makes it `gelu_quantize`.

    In inference on a GPU the result takes x's memory (2.1 GB at 720p). Bytes, at least: 2 + 2 an element; 4.2 GB for
    75,600 tokens of width 13,824.
    """
    if dtype in LARGEST:
        return gelu_quantize(x, dtype)
    if not use_triton(x) or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    out, block = torch.empty_like(x) if torch.is_grad_enabled() else x, 2048
    launch(_kernel, (-(-x.numel() // block),), x, out, x.numel(), BLOCK=block, num_warps=8)
    return out


def gelu_quantize(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantized:
    """GELU, quantized row by row: x [..., C] → values [..., C] and scales [..., 1].

    Bytes, at least: 2 + 1 an element; 3.1 GB for 75,600 tokens of width 13,824.
    """
    if not use_triton(x):
        return quantize_rows_plain(F.gelu(x.float(), approximate="tanh"), dtype)
    x = x.contiguous()
    width = x.shape[-1]
    values, scale = empty_rows(x.shape, dtype, x.device)
    launch(_quantize_kernel, (x.numel() // width,), x, values, scale, width, LARGEST=LARGEST[dtype], **row_block(width))
    return Quantized(values, scale)


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
def _quantize_kernel(x, out, scale, C: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program, one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = _gelu(tl.load(x + row * C + i, i < C, 0.0).to(tl.float32))
    store_row(out + row * C + i, i < C, value, scale, row, LARGEST)

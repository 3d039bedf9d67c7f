"""LayerNorm without affine parameters, then modulation: the input of self-attention, feed-forward and head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, row_block, tl, use_triton
from wan22.kernels.quantize_rows import LARGEST, Rows, as_rows, empty_rows, rounded, store_row


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """layer_norm(x) · (1 + scale) + shift, in float32, rounded once to `dtype`, to 8-bit ones row by row.

    x [B, L, C] float32; shift, scale [B, 1, C] float32 → [B, L, C] of `dtype`. Source: adaLN, Peebles and Xie,
    "Scalable Diffusion Models with Transformers" (2023), section 3.2.

    Bytes, at least: 4 + 2 an element (float32 in, bf16 out); 2.3 GB for 75,600 tokens of width 5120.
    """
    if not use_triton(x, shift, scale):
        return norm_modulate_plain(x, shift, scale, eps, dtype)
    x = x.contiguous()
    batch, length, width = x.shape
    out, out_scale = empty_rows(x.shape, dtype, x.device)
    shift, scale = (vector.expand(batch, 1, width) for vector in (shift, scale))
    launch(
        _kernel, (length, batch), x, shift, scale, out, out_scale, shift.stride(0), scale.stride(0), length, eps, width,
        LARGEST=LARGEST.get(dtype, 0), **row_block(width),
    )  # fmt: skip
    return as_rows(out, out_scale)


def norm_modulate_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    return rounded(torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale), dtype)


@jit
def normalize(x, mask, eps, C: tl.constexpr):
    """Layer norm of one row, in registers: the variance from centred values, as a difference of means would cancel."""
    centred = tl.where(mask, x - tl.sum(x, 0) / C, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)


@jit
def _kernel(
    x, shift, scale, out, out_scale, shift_stride, scale_stride, length,
    eps, C: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row."""
    token, sample = tl.program_id(0), tl.program_id(1)
    number = sample.to(tl.int64) * length + token  # 64 bits: two samples' tokens exceed 32
    start = number * C
    i = tl.arange(0, BLOCK)
    mask = i < C
    # The row comes by once; shift and scale serve every row, and should stay in the caches.
    row = tl.load(x + start + i, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    add = tl.load(shift + sample * shift_stride + i, mask, 0.0, eviction_policy="evict_last")
    factor = 1.0 + tl.load(scale + sample * scale_stride + i, mask, 0.0, eviction_policy="evict_last")
    store_row(out + start + i, mask, normalize(row, mask, eps, C) * factor + add, out_scale, number, LARGEST)

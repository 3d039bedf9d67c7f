"""RMS norm of queries and keys over the whole width, then the rotary embedding, head by head."""

import torch
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, row_block, tl, use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, in float32, rounded once to x's dtype; x [B, L, C], weight [C].

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). Bytes, at least: 2 + 2 an element.
    """
    return _run(x, weight, None, eps) if use_triton(x, weight) else rms_norm_plain(x, weight, eps).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys ready for attention.

    q, k [B, L, C], views into a packed product too; q_weight, k_weight [C]; rope: cos and sin, each [L, D/2] float32
    → 2 × [B, L, N, D] in q's dtype, contiguous. Norm and rotation are float32 and are rounded once. The norm's mean is
    over all heads together, as published.
    Source: Su et al., "RoFormer" (2021), section 3.2.2, in its pairwise (interleaved) form.

    Bytes, at least: 4 · 2 an element (bf16) and the table; 3.1 GB for 75,600 tokens of width 5120.
    """
    if use_triton(q, k, q_weight, k_weight):
        rows = (_run(q, q_weight, rope, eps), _run(k, k_weight, rope, eps))
        return rows[0].unflatten(-1, (num_heads, -1)), rows[1].unflatten(-1, (num_heads, -1))
    return qk_norm_rope_plain(q, k, q_weight, k_weight, rope, num_heads, eps)


def qk_norm_rope_plain(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    cos, sin = rope[0][:, None], rope[1][:, None]  # [L, 1, D/2]

    def one(x: Tensor, weight: Tensor) -> Tensor:
        return rotate(rms_norm_plain(x, weight, eps).unflatten(-1, (num_heads, -1)), cos, sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., C] of any dtype → float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle; x [B, L, N, D] float32, cos and sin [L, 1, D/2] float32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # 2 × [B, L, N, D/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _run(x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """[B, L, C] with any strides over B and L → [B, L, C], contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = (table.contiguous() for table in rope) if rope else (weight, weight)  # never loaded without a table
    launch(
        _kernel, (length, batch), x, weight, cos, sin, out, x.stride(0), x.stride(1), length, eps, width,
        HALF=cos.shape[-1], ROPE=rope is not None, **row_block(width),
    )  # fmt: skip
    return out


@jit
def _kernel(
    x, weight, cos, sin, out, sample_stride, token_stride,
    length, eps, C: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row of queries or keys: all heads of a token. A pair lies in one thread."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < C
    start = x + sample * sample_stride + token * token_stride
    row = tl.load(start + i, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / C + eps)
    row = row * tl.load(weight + i, mask, 0.0, eviction_policy="evict_last").to(tl.float32)
    if ROPE:
        even, odd = tl.split(tl.reshape(row, (BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2)
        at = token * HALF + pair % HALF  # a head's pairs are turned as every other head's
        c = tl.load(cos + at, pair < C // 2, 0.0)
        s = tl.load(sin + at, pair < C // 2, 0.0)
        row = tl.interleave(even * c - odd * s, even * s + odd * c)
    tl.store(out + (sample * length + token) * C + i, row.to(out.dtype.element_ty), mask)

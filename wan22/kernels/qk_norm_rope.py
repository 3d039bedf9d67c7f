"""RMS norm of queries and keys over the whole width, then the rotary embedding, head by head."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, in float32; x [..., C], weight [C] → [..., C] float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle; x [B, L, N, D] float32, cos and sin [L, 1, D/2] float32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # 2 × [B, L, N, D/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys ready for attention.

    q, k [B, L, C]; q_weight, k_weight [C]; rope: cos and sin, each [L, D/2] float32 → 2 × [B, L, N, D] in q's dtype.
    Norm and rotation are float32 and are rounded once. The norm's mean is over all heads together, as published.
    Source: Su et al., "RoFormer" (2021), section 3.2.2, in its pairwise (interleaved) form.
    """
    cos, sin = rope[0][:, None], rope[1][:, None]  # [L, 1, D/2]

    def one(x: Tensor, weight: Tensor) -> Tensor:
        return rotate(rms_norm(x, weight, eps).unflatten(-1, (num_heads, -1)), cos, sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)

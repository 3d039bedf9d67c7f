"""LayerNorm without affine parameters, then modulation: the input of self-attention, feed-forward and head."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift, in float32, rounded once to `dtype`.

    x [B, L, C] float32; shift, scale [B, 1, C] float32 → [B, L, C] of `dtype`. Source: adaLN, Peebles and Xie,
    "Scalable Diffusion Models with Transformers" (2023), section 3.2.
    """
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale).to(dtype)

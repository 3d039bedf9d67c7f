"""The gated residual sum that closes each half of a block."""

import torch
from torch import Tensor


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate · y in float32: the residual stream is never rounded.

    x [B, L, C] float32; y [B, L, C] of any dtype; gate [B, 1, C] float32 → [B, L, C] float32.
    """
    return torch.addcmul(x, y.float(), gate)

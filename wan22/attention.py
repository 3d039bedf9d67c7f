"""Attention behind one function and one layout, `B L N D`: batch, tokens, heads, head dim."""

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over all keys, no mask.

    q [B, L, N, D]; k, v [B, M, N, D], one dtype for all → [B, L, N, D] in that dtype, accumulated in float32.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B N L D, the layout PyTorch asks for
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

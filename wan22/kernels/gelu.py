"""The feed-forward's activation."""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, section 2), evaluated in float32, in x's dtype; any shape."""
    return F.gelu(x, approximate="tanh")

"""The kernels' own tests, run through Triton's compiler on a GPU where CI has its interpreter."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "kernels"))
from test_fused import (  # noqa: F401
    draw,
    test_double_pixels,
    test_gelu,
    test_gelu_quantize,
    test_model,
    test_norm_modulate,
    test_norm_silu,
    test_norm_silu_of_a_sum,
    test_qk_norm_rope,
    test_residuals,
    twin,
)

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]  # fmt: skip

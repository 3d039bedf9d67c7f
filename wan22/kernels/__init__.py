"""The model's few fused operations, one a file, each a Triton kernel beside the plain-torch form that defines it.

`model.py` is written in these names (the VAE's decoder: in `norm_silu` and `double_pixels`), so that making one of them
faster changes this folder and not the model.
Accumulation and everything that is not a matrix product is float32; the result is rounded once, to the dtype asked.
Which form runs is decided in dispatch.py. Asked for an 8-bit dtype, an operation writes `Quantized` rows for an 8-bit
product. `attention_8bit`, `product_8bit` and `quantize_rows` stand apart: they approximate.
"""

from wan22.kernels.double_pixels import double_pixels
from wan22.kernels.gated_residual import gated_residual, gated_residual_norm, gated_residual_norm_modulate
from wan22.kernels.gelu import gelu, gelu_quantize
from wan22.kernels.norm_modulate import norm_modulate
from wan22.kernels.norm_silu import norm_silu
from wan22.kernels.qk_norm_rope import qk_norm_rope, rms_norm
from wan22.kernels.quantize_rows import Quantized, Rows, quantize_rows

__all__ = [
    "Quantized",
    "Rows",
    "double_pixels",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_modulate",
    "gelu",
    "gelu_quantize",
    "norm_modulate",
    "norm_silu",
    "qk_norm_rope",
    "quantize_rows",
    "rms_norm",
]

"""The residual sums of a block, alone or with the norm that follows them.

In inference the residual stream is updated in place (x is overwritten, and is what comes back): at 720p it is 1.55 GB.
With gradients enabled x is left alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, row_block, tl, use_triton
from wan22.kernels.norm_modulate import norm_modulate_plain, normalize
from wan22.kernels.quantize_rows import LARGEST, Rows, as_rows, empty_rows, rounded, store_row


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate · y in float32 (x + y without a gate): the residual stream is never rounded.

    x [B, L, C] float32; y [B, L, C] of any dtype; gate [B, 1, C] float32 → [B, L, C] float32.

    Bytes, at least: 4 + 2 + 4 an element (y in bf16); 3.9 GB for 75,600 tokens of width 5120.
    """
    if _goes_to_triton(x, y, gate):
        return _run(x, y, gate)[0]
    return gated_residual_plain(x, y, gate)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    """The sum of `gated_residual`, and its LayerNorm with weight and bias [C], float32, rounded once to `dtype`, to
    8-bit ones row by row.

    → x [B, L, C] float32, normed [B, L, C] of `dtype`. Bytes, at least: 4 + 2 + 4 + 2 an element; 4.6 GB for 75,600
    tokens of width 5120, where the sum and the norm one after the other move 6.2 GB.
    """
    if _goes_to_triton(x, y, gate, weight, bias):
        return _run(x, y, gate, (bias, weight), False, eps, dtype)
    x = gated_residual_plain(x, y, gate)
    return x, rounded(F.layer_norm(x, x.shape[-1:], weight, bias, eps), dtype)


def gated_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    """The sum of `gated_residual`, and `norm_modulate` of it with shift and scale [B, 1, C] float32.

    → x [B, L, C] float32, modulated [B, L, C] of `dtype`. Bytes: as `gated_residual_norm`.
    """
    if _goes_to_triton(x, y, gate, shift, scale):
        return _run(x, y, gate, (shift, scale), True, eps, dtype)
    x = gated_residual_plain(x, y, gate)
    return x, norm_modulate_plain(x, shift, scale, eps, dtype)


def gated_residual_plain(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() or x.dtype != torch.float32:
        return x + y if gate is None else torch.addcmul(x, y.float(), gate)
    return x.add_(y) if gate is None else x.addcmul_(y.float(), gate)


def _goes_to_triton(x: Tensor, y: Tensor, gate: Tensor | None, *others: Tensor) -> bool:
    wanted = use_triton(x, y, *others, *(() if gate is None else (gate,)))
    return wanted and x.dtype == torch.float32 and x.is_contiguous()  # as the model's always is


def _run(
    x: Tensor, y: Tensor, gate: Tensor | None, modulation: tuple[Tensor, Tensor] | None = None,
    plus_one: bool = False, eps: float = 0.0, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """modulation: what the normed row is shifted and scaled by, [B, 1, C] or [C]. → the sum, and the normed (empty
    without modulation)."""
    batch, length, width = x.shape
    y = y.contiguous()
    new_x = torch.empty_like(x) if torch.is_grad_enabled() else x
    normed, normed_scale = empty_rows(x.shape if modulation else (0,), dtype, x.device)
    # What is not asked for is never loaded; a pointer to something must stand there all the same.
    vectors = [vector.expand(batch, 1, width) for vector in (x.new_empty(width) if gate is None else gate,
                                                             *(modulation or (x.new_empty(width),) * 2))]  # fmt: skip
    launch(
        _kernel, (length, batch), x, y, *vectors, new_x, normed, normed_scale,
        *(vector.stride(0) for vector in vectors), length, eps, width, GATED=gate is not None,
        NORMED=modulation is not None, PLUS_ONE=plus_one, LARGEST=LARGEST.get(dtype, 0), **row_block(width),
    )  # fmt: skip
    return new_x, as_rows(normed, normed_scale)


@jit
def _kernel(
    x, y, gate, shift, scale, new_x, normed, normed_scale,
    gate_stride, shift_stride, scale_stride, length, eps, C: tl.constexpr,
    GATED: tl.constexpr, NORMED: tl.constexpr, PLUS_ONE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row. The sum is normed while it is in registers."""
    token, sample = tl.program_id(0), tl.program_id(1)
    number = sample.to(tl.int64) * length + token
    start = number * C
    i = tl.arange(0, BLOCK)
    mask = i < C
    row = tl.load(x + start + i, mask, 0.0, eviction_policy="evict_first")
    update = tl.load(y + start + i, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    if GATED:
        update = update * tl.load(gate + sample * gate_stride + i, mask, 0.0, eviction_policy="evict_last")
    row = row + update
    tl.store(new_x + start + i, row, mask)
    if NORMED:
        add = tl.load(shift + sample * shift_stride + i, mask, 0.0, eviction_policy="evict_last").to(tl.float32)
        factor = tl.load(scale + sample * scale_stride + i, mask, 0.0, eviction_policy="evict_last").to(tl.float32)
        if PLUS_ONE:
            factor = factor + 1.0
        row = normalize(row, mask, eps, C) * factor + add
        store_row(normed + start + i, mask, row, normed_scale, number, LARGEST)

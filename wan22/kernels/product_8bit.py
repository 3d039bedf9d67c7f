"""The product of quantized rows and quantized weights: 8-bit factors, wide sums, scales undone in the result.

fp8 (e4m3fn) goes to `torch._scaled_mm` (Ada, Hopper and later), int8 to a Triton kernel (Ampere and later), since
`torch._int_mm` would write four bytes a number for a second kernel to scale. The plain form multiplies the same 8-bit
numbers in float32 on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, tl, use_triton
from wan22.kernels.quantize_rows import Quantized

# Hopper adds FP8 products in 22 bits, 13 of them after the point; exact float32 sums every few products cost time.
FAST_ACCUMULATION = True
# Blocks of the int8 kernel by the shared memory that a multiprocessor lends a program (large: data-centre cards).
LARGE = {"ROWS": 128, "COLUMNS": 256, "INNER": 128, "num_warps": 8, "num_stages": 3}  # 144 KiB
SMALL = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 4}  # 64 KiB
OPTIONS: dict[str, int] | None = None  # instead of these, for measurements
GROUP = 8  # rows of blocks that are worked on together, so that weights are met again in the L2 cache


def product_8bit(x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """x · weightᵀ + bias.

    x [..., C]; weight [O, C] of the same 8-bit dtype, with weight_scale [O, 1] float32; bias [O] → [..., O] in bias's
    dtype, which on a GPU is bf16.
    """
    rows = x.values.flatten(0, -2)
    if not use_triton(rows):
        return product_8bit_plain(x, weight, weight_scale, bias)
    scale = x.scale.reshape(-1, 1)
    if weight.dtype == torch.int8:
        out = _int8(rows, scale, weight, weight_scale, bias)
    elif rows.is_cuda:
        out = torch._scaled_mm(
            rows, weight.t(), scale_a=scale, scale_b=weight_scale.view(1, -1), bias=bias, out_dtype=bias.dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )  # fmt: skip
    else:
        return product_8bit_plain(x, weight, weight_scale, bias)
    return out.unflatten(0, x.shape[:-1])


def product_8bit_plain(x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    out = F.linear(x.values.float(), weight.float()).mul_(x.scale).mul_(weight_scale.view(-1))
    return out.add_(bias).to(bias.dtype)


def _int8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """x [L, C] → [L, O]."""
    (length, inner), outer = x.shape, len(weight)
    out = torch.empty(length, outer, dtype=bias.dtype, device=x.device)
    options = OPTIONS or _blocks(x.device)
    blocks = -(-length // options["ROWS"]) * -(-outer // options["COLUMNS"])
    launch(
        _kernel, (blocks,), x, weight, x_scale, weight_scale, bias, out, length, outer, C=inner, GROUP=GROUP, **options
    )
    return out


def _blocks(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"ROWS": 32, "COLUMNS": 32, "INNER": 32}  # interpreted
    return LARGE if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3)) else SMALL


@jit
def _kernel(
    x, weight, x_scale, weight_scale, bias, out, length, outer,
    C: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program, one block of the result. Both factors lie along the summed axis, as 8-bit tensor cores want them."""
    down, across = tl.cdiv(length, ROWS), tl.cdiv(outer, COLUMNS)
    group, place = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    rows = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
    columns = (place // height) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, INNER)
    # Beyond the last row and column others are read again, and not stored: no mask in the loop.
    left = x + (rows % length).to(tl.int64)[:, None] * C + i[None, :]
    right = weight + (columns % outer).to(tl.int64)[None, :] * C + i[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, C, INNER):
        if C % INNER == 0:
            total = tl.dot(tl.load(left), tl.load(right), total, out_dtype=tl.int32)
        else:
            inside = start + i < C
            a, b = tl.load(left, inside[None, :], 0), tl.load(right, inside[:, None], 0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        left += INNER
        right += INNER
    scale = tl.load(x_scale + rows, rows < length, 0.0)[:, None]
    kept = columns < outer
    scale = scale * tl.load(weight_scale + columns, kept, 0.0)[None, :]
    result = total.to(tl.float32) * scale + tl.load(bias + columns, kept, 0.0).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * outer + columns[None, :]
    tl.store(target, result.to(out.dtype.element_ty), (rows < length)[:, None] & kept[None, :])

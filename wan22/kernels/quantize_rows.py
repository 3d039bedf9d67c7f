"""Rows as 8-bit numbers with a scale each: what an 8-bit product takes, and how the operation before it writes it.

row ≈ values · scale, the scale being the row's largest magnitude over the largest 8-bit number. A row is one token here
(its scale is dynamic: it depends on the numbers), and one output channel where weights are quantized. fp8 keeps three
bits of every number, whatever its size beside the row's largest; int8 keeps 127 even steps: better where a row has no
outliers, worse where it has.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, row_block, tl, use_triton

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # finite number of each 8-bit dtype
SMALLEST = 1e-12  # of a row: below it, zeros are as good


class Quantized(NamedTuple):
    """values [..., C] of an 8-bit dtype; scale [..., 1] float32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def split(self, size: int, dim: int) -> "list[Quantized]":
        """As a tensor's, along any but the last dimension."""
        parts = zip(self.values.split(size, dim), self.scale.split(size, dim), strict=True)
        return [Quantized(*part) for part in parts]

    def float(self) -> Tensor:
        return self.values.float() * self.scale


Rows = Tensor | Quantized  # what an operation writes for the product that follows it, as that product wants it


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x [..., C] of any dtype → its rows in an 8-bit `dtype`.

    Bytes, at least: 2 + 1 an element (bf16 in); 1.2 GB for 75,600 tokens of width 5120.
    """
    if not use_triton(x):
        return quantize_rows_plain(x, dtype)
    x = x.contiguous()
    width = x.shape[-1]
    values, scale = empty_rows(x.shape, dtype, x.device)
    launch(_kernel, (x.numel() // width,), x, values, scale, width, LARGEST=LARGEST[dtype], **row_block(width))
    return Quantized(values, scale)


def quantize_rows_plain(x: Tensor, dtype: torch.dtype) -> Quantized:
    x, largest = x.float(), LARGEST[dtype]
    peak = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # no array of magnitudes is made
    scale = peak.clamp_(min=SMALLEST) / largest
    steps = x / scale
    steps = steps.round_() if dtype == torch.int8 else steps
    return Quantized(steps.clamp_(-largest, largest).to(dtype), scale)


def rounded(x: Tensor, dtype: torch.dtype) -> Rows:
    """The end of every plain form: float32 numbers, rounded once to the dtype asked, 8-bit ones row by row."""
    return quantize_rows_plain(x, dtype) if dtype in LARGEST else x.to(dtype)


# --- for kernels that write rows -------------------------------------------------------------------------------------
def empty_rows(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the rows and for their scales; of a dtype without scales, a pointer to something instead."""
    scale = torch.empty((*shape[:-1], 1) if dtype in LARGEST else (1,), dtype=torch.float32, device=device)
    return torch.empty(shape, dtype=dtype, device=device), scale


def as_rows(values: Tensor, scale: Tensor) -> Rows:
    """What `empty_rows` gave, once it is filled."""
    return Quantized(values, scale) if values.dtype in LARGEST else values


@jit
def store_row(place, mask, row, scale, number, LARGEST: tl.constexpr):
    """A row in registers (zeros where masked) → memory, in the dtype of the pointers `place`. LARGEST: of an 8-bit
    dtype, whose scale goes to `scale` at the row's number; 0: of any other."""
    if LARGEST > 0:
        step = tl.maximum(tl.max(tl.abs(row), 0), 1e-12) / LARGEST
        tl.store(scale + number, step)
        row = tl.minimum(tl.maximum(row / step, -LARGEST), LARGEST)
        if LARGEST == 127:
            row = (row + 12582912.0) - 12582912.0  # 1.5 · 2²³: to the nearest whole number, ties to even, as torch
    tl.store(place, row.to(place.dtype.element_ty), mask)


@jit
def _kernel(x, out, scale, C: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program, one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * C + i, i < C, 0.0, eviction_policy="evict_first").to(tl.float32)
    store_row(out + row * C + i, i < C, value, scale, row, LARGEST)

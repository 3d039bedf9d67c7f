"""Twice the height and width by repeating pixels, of a sum that is not taken yet: the input of the convolutions between
the stages of the VAE's decoder."""

import torch
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, tl, use_triton
from wan22.kernels.norm_silu import rows_of_channels, sum_plain

PIXELS = 16  # of one program


def double_pixels(x: Tensor, y: Tensor | None, bias: Tensor | None, each: int, dtype: torch.dtype) -> Tensor:
    """x + bias + y, as far as they are given, every pixel as 2 × 2 and its channels, which come as (frame of `each`,
    channel), as so many frames; summed in float32 and rounded once.

    x, y [1, each · C, T, H, W], bias [each · C] → [each · T, C, 2H, 2W] of `dtype`, channels last. On a GPU x and y lie
    so too, else the plain form runs.

    Bytes, at least: one reading of x and y, one writing of four times as many numbers.
    """
    channels, (frames, height, width) = x.shape[1] // each, x.shape[2:]
    given = [one for one in (x, y) if one is not None]
    if not use_triton(x) or not all(map(rows_of_channels, given)):
        return double_pixels_plain(x, y, bias, each, dtype)
    shape = (frames * each, channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    pixels = frames * height * width
    launch(
        _kernel, (-(-pixels // PIXELS), each), x, x if y is None else y, x if bias is None else bias, out, pixels,
        height, width, channels, EACH=each, SUMMED=y is not None, BIASED=bias is not None,
        BLOCK=1 << (channels - 1).bit_length(), PIXELS=PIXELS, num_warps=4,
    )  # fmt: skip
    return out


def double_pixels_plain(x: Tensor, y: Tensor | None, bias: Tensor | None, each: int, dtype: torch.dtype) -> Tensor:
    x = (x if y is None and bias is None else sum_plain(x, y, bias)).to(dtype)
    channels, (frames, height, width) = x.shape[1] // each, x.shape[2:]
    # Every pixel becomes 2 × 2, and the frames go apart, in one copy.
    x = x[0].permute(1, 2, 3, 0).unflatten(-1, (each, channels)).permute(0, 3, 1, 2, 4)
    x = x[:, :, :, None, :, None].expand(frames, each, height, 2, width, 2, channels)
    return x.reshape(frames * each, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


@jit
def _kernel(
    x, y, bias, out, pixels, height, width, C: tl.constexpr, EACH: tl.constexpr, SUMMED: tl.constexpr,
    BIASED: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program, some pixels with the channels of one frame of each."""
    part = tl.program_id(1)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    place = pixel[:, None] * (EACH * C) + part * C + channel[None, :]
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + part * C + channel, channel < C, 0.0).to(tl.float32)[None, :]
    if SUMMED:
        value += tl.load(y + place, inside, 0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    row, column = pixel // width, pixel % width  # a row of all frames' ones
    frame = row // height * EACH + part
    corner = (frame * 2 * height + row % height * 2) * 2 * width + column * 2
    place = out + corner[:, None] * C + channel[None, :]
    tl.store(place, value, inside)
    tl.store(place + C, value, inside)
    tl.store(place + 2 * width * C, value, inside)
    tl.store(place + 2 * width * C + C, value, inside)

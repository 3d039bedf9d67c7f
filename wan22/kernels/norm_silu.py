"""RMS norm over channels, then SiLU: what stands before every convolution of the VAE's decoder; with the sum that comes
before it, of a bias and of a residual block, while it is in registers."""

import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, tl, use_triton

EPS = 1e-12  # of the length that is divided by; F.normalize's
PIXELS = 16  # of one program


def norm_silu(
    x: Tensor, gamma: Tensor | None, out: Tensor, y: Tensor | None = None, bias: Tensor | None = None,
    total: Tensor | None = None,
) -> None:  # fmt: skip
    """s = x + bias + y, as far as they are given, into `total`, where it is wanted; silu(s / ‖s‖ · √C · gamma), or s
    itself without a gamma, into `out`. In float32, rounded once to the dtype of each; the norm is of the unrounded sum.

    x, y, total, out [B, C, T, H, W] of any float dtypes, ‖s‖ over C; gamma [C] float32; bias [C]. total may be x or y.
    On a GPU all lie channels last (`torch.channels_last_3d`; `out` may be the later frames of a larger buffer), else
    the plain form runs.

    Bytes, at least: one reading of x and y, one writing of total and out. Apart, a bias (which cuDNN's convolution
    leaves to a pass of its own) and a sum read and write twice more each.
    """
    given = [one for one in (x, out, y, total) if one is not None]
    if not use_triton(x) or not all(map(rows_of_channels, given)) or len(x) != 1:
        _plain(x, gamma, out, y, bias, total)
        return
    channels = x.shape[1]
    pixels = x.numel() // channels
    # What is not given is never read; a pointer to something must stand there all the same.
    launch(
        _kernel, (-(-pixels // PIXELS),), x, x if gamma is None else gamma, out, x if y is None else y,
        x if bias is None else bias, x if total is None else total, pixels, channels**0.5, EPS, channels,
        NORMED=gamma is not None, SUMMED=y is not None, BIASED=bias is not None, KEPT=total is not None,
        BLOCK=1 << (channels - 1).bit_length(), PIXELS=PIXELS, num_warps=4,
    )  # fmt: skip


def norm_silu_plain(x: Tensor, gamma: Tensor) -> Tensor:
    """→ float32."""
    channels = x.shape[1]
    return F.silu(F.normalize(x.float(), dim=1, eps=EPS) * channels**0.5 * gamma.view(-1, 1, 1, 1))


def sum_plain(x: Tensor, y: Tensor | None, bias: Tensor | None) -> Tensor:
    """x + bias + y → float32."""
    x = x.float()
    if bias is not None:
        x = x + bias.float().view(-1, 1, 1, 1)
    return x if y is None else x + y.float()


def _plain(
    x: Tensor, gamma: Tensor | None, out: Tensor, y: Tensor | None, bias: Tensor | None, total: Tensor | None
) -> None:
    x = sum_plain(x, y, bias)
    if total is not None:
        total.copy_(x)
    out.copy_(x if gamma is None else norm_silu_plain(x, gamma))


def rows_of_channels(x: Tensor) -> bool:
    """Whether each pixel's channels lie side by side, and the pixels one after the other."""
    return x.permute(0, 2, 3, 4, 1).is_contiguous()


@jit
def _kernel(
    x, gamma, out, y, bias, total, pixels, root, eps, C: tl.constexpr, NORMED: tl.constexpr, SUMMED: tl.constexpr,
    BIASED: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program, some pixels with all their channels."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    place = pixel[:, None] * C + channel[None, :]
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + channel, channel < C, 0.0).to(tl.float32)[None, :]
    if SUMMED:
        value += tl.load(y + place, inside, 0.0).to(tl.float32)
    if KEPT:
        tl.store(total + place, value.to(total.dtype.element_ty), inside)
    if NORMED:
        length = tl.sqrt(tl.sum(value * value, 1))
        length = tl.where(length > eps, length, eps)
        factor = tl.load(gamma + channel, channel < C, 0.0)
        value = value / length[:, None] * root * factor[None, :]
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + place, value.to(out.dtype.element_ty), inside)

"""RMS norm over channels, then SiLU: what stands before every convolution of the VAE's decoder."""

import torch.nn.functional as F
from torch import Tensor

from wan22.kernels.dispatch import jit, launch, tl, use_triton

EPS = 1e-12  # of the length that is divided by; F.normalize's
PIXELS = 16  # of one program


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """silu(x / ‖x‖ · √C · gamma) into `out`, in float32, rounded once to out's dtype.

    x, out [B, C, T, H, W] of any float dtypes, ‖x‖ over C; gamma [C] float32. On a GPU both lie channels last
    (`torch.channels_last_3d`; `out` may be the later frames of a larger buffer), else the plain form runs.

    Bytes, at least: one reading and one writing; diffusers' form reads and writes about six times.
    """
    if not use_triton(x, gamma) or not _rows_of_channels(x) or not _rows_of_channels(out) or len(x) != 1:
        out.copy_(norm_silu_plain(x, gamma))
        return
    channels = x.shape[1]
    pixels = x.numel() // channels
    launch(
        _kernel, (-(-pixels // PIXELS),), x, gamma, out, pixels, channels**0.5, EPS, channels,
        BLOCK=1 << (channels - 1).bit_length(), PIXELS=PIXELS, num_warps=4,
    )  # fmt: skip


def norm_silu_plain(x: Tensor, gamma: Tensor) -> Tensor:
    """→ float32."""
    channels = x.shape[1]
    return F.silu(F.normalize(x.float(), dim=1, eps=EPS) * channels**0.5 * gamma.view(-1, 1, 1, 1))


def _rows_of_channels(x: Tensor) -> bool:
    """Whether each pixel's channels lie side by side, and the pixels one after the other."""
    return x.permute(0, 2, 3, 4, 1).is_contiguous()


@jit
def _kernel(
    x, gamma, out, pixels, root, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program, some pixels with all their channels."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    place = pixel[:, None] * C + channel[None, :]
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1))
    length = tl.where(length > eps, length, eps)
    factor = tl.load(gamma + channel, channel < C, 0.0)
    value = value / length[:, None] * root * factor[None, :]
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + place, value.to(out.dtype.element_ty), inside)

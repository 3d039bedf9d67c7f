"""The Wan VAE's decoder over diffusers' modules: their weights, another way through them.

What is saved against their own `forward`: the norm and the activation are one kernel and write straight into the
convolution's input, behind the two frames kept from the chunk before, so that nothing is joined or padded afterwards;
the margins are the convolution's own; on a GPU everything lies channels last, as tensor cores want it.

Legend: C channels, T frames of a chunk, H W pixels; all tensors are [1, C, T, H, W].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.kernels import norm_silu

LAYOUT = {"cuda": torch.channels_last_3d}  # by device; elsewhere contiguous: diffusers' own bits, no slower
FEW, AT_ONCE = 8, 2  # output channels for which cuDNN copies its input (3, of pixels): then so many frames at a time
KEPT = 2  # frames that a convolution over three needs of those before


class Cache:
    """The last two frames of every convolution's input, from one chunk to the next."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, Tensor] = {}

    def joined(self, module: nn.Module, shape: torch.Size, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for a convolution's input of this shape, in this dtype, with the kept frames (or zeros, before the
        first) in front."""
        batch, channels, frames, height, width = shape
        size = (batch, channels, KEPT + frames, height, width)
        room = torch.empty(size, dtype=dtype, device=like.device, memory_format=layout_of(like))
        kept = self._kept.get(module)
        room[:, :, :KEPT].zero_() if kept is None else room[:, :, :KEPT].copy_(kept)
        return room

    def keep(self, module: nn.Module, room: Tensor) -> None:
        if (kept := self._kept.get(module)) is not None:
            kept.copy_(room[:, :, -KEPT:])
            return
        self._kept[module] = room[:, :, -KEPT:].clone(memory_format=layout_of(room))


def layout_of(x: Tensor) -> torch.memory_format:
    return LAYOUT.get(x.device.type, torch.contiguous_format)


def laid(x: Tensor) -> Tensor:
    """In its device's layout: as it is, if the library has left it there, as it should."""
    return x.contiguous(memory_format=layout_of(x))


def prepare(decoder: Any, dtype: torch.dtype) -> None:
    """Convolutions in their device's layout; those of the attention and of all stages but the first in `dtype`, where
    all but a twentieth of the arithmetic is. What comes before them, and the last one, stays float32: rounded too, they
    would cost half of the accuracy (docs/speed.md). Norms are float32."""
    parts = (decoder.mid_block.attentions, decoder.up_blocks[1:])
    rounded = {id(module) for part in parts for module in part.modules()}
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            layout = layout_of(module.weight)
            if isinstance(module, nn.Conv2d) and layout != torch.contiguous_format:
                layout = torch.channels_last
            kind = dtype if id(module) in rounded else torch.float32
            module.weight = nn.Parameter(module.weight.to(kind).contiguous(memory_format=layout), False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(kind), False)


def middle(decoder: Any, z: Tensor, cache: Cache) -> Tensor:
    """Latents [1, C, T, H, W] → what the local part begins with, by the part that needs the whole grid."""
    x = _convolve(decoder.conv_in, laid(z), cache)
    x = _residual(decoder.mid_block.resnets[0], x, cache)
    for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        x = _residual(resnet, _attend(attention, x), cache)
    return x


def local(decoder: Any, x: Tensor, cache: Cache, first: bool) -> Tensor:
    """The rest of the decoder, whole or one tile of it → pixels [F, 3, 8H, 8W] float32 in -1…1. first: the chunk of the
    first latent frame, which is one pixel frame."""
    x = laid(x)
    for number, block in enumerate(decoder.up_blocks):
        # What the residual blocks add up is float32 till the last stage, half of whose work is moving it.
        x = x.to(block.resnets[0].conv1.weight.dtype if number == len(decoder.up_blocks) - 1 else torch.float32)
        for resnet in block.resnets:
            x = _residual(resnet, x, cache)
        for upsampler in block.upsamplers or ():
            x = _upsample(upsampler, x, cache, first)
    x = _convolve(decoder.conv_out, x, cache, decoder.norm_out)
    return x[0].float().clamp_(-1, 1).transpose(0, 1)


def _convolve(module: Any, x: Tensor, cache: Cache, norm: Any = None) -> Tensor:
    """A causal convolution of x, normed and activated before where there is a norm; in the module's dtype."""
    side = module.kernel_size[-1] // 2
    weight, bias = module.weight, module.bias
    if module.kernel_size[0] == 1:
        return laid(F.conv3d(x.to(weight.dtype), weight, bias, padding=(0, side, side)))
    room = cache.joined(module, x.shape, x, weight.dtype)
    if norm is None:
        room[:, :, KEPT:].copy_(x)
    else:
        norm_silu(x, norm.gamma.flatten(), room[:, :, KEPT:])
    del x  # where nobody else holds it, its memory is the result's
    cache.keep(module, room)
    if module.out_channels < FEW:
        pieces = [room[:, :, start : start + AT_ONCE + KEPT] for start in range(0, room.shape[2] - KEPT, AT_ONCE)]
        return torch.cat([F.conv3d(piece, weight, bias, padding=(0, side, side)) for piece in pieces], dim=2)
    return laid(F.conv3d(room, weight, bias, padding=(0, side, side)))


def _residual(block: Any, x: Tensor, cache: Cache) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _convolve(block.conv_shortcut, x, cache)
    y = _convolve(block.conv2, _convolve(block.conv1, x, cache, block.norm1), cache, block.norm2)
    return y.add_(shortcut) if y.dtype == x.dtype else torch.add(shortcut.to(x.dtype), y)


def _attend(block: Any, x: Tensor) -> Tensor:
    """Attention of each frame's pixels to each other, one head as wide as the channels."""
    channels, frames, height, width = x.shape[1:]
    normed = F.normalize(x.float(), dim=1) * channels**0.5 * block.norm.gamma.view(-1, 1, 1, 1)
    tokens = normed.to(block.to_qkv.weight.dtype)[0].permute(1, 2, 3, 0).reshape(frames, 1, height * width, channels)
    q, k, v = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v)
    out = F.linear(out, block.proj.weight.flatten(1), block.proj.bias)
    return laid(x + out.view(1, frames, height, width, channels).permute(0, 4, 1, 2, 3))


def _upsample(module: Any, x: Tensor, cache: Cache, first: bool) -> Tensor:
    """Twice the height and width and, but for the first frame, twice the frames where the module is of that kind."""
    each = 1
    if module.mode == "upsample3d" and not first:
        x, each = _convolve(module.time_conv, x, cache), 2
    channels, frames, height, width = x.shape[1] // each, *x.shape[2:]
    convolution = module.resample[1]
    x = x.to(convolution.weight.dtype)
    # Channels come as (frame of two, channel). Every pixel becomes 2 × 2, and the frames go apart, in one copy.
    x = x[0].permute(1, 2, 3, 0).unflatten(-1, (each, channels)).permute(0, 3, 1, 2, 4)
    x = x[:, :, :, None, :, None].expand(frames, each, height, 2, width, 2, channels)
    x = x.reshape(frames * each, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
    return laid(x.transpose(0, 1)[None])

"""The Wan VAE's decoder over diffusers' modules: their weights, another way through them.

What is saved against their own `forward`: the norm and the activation are one kernel and write straight into the
convolution's input, behind the two frames kept from the chunk before, so that nothing is joined or padded afterwards;
what comes before them, a convolution's bias (on a GPU a pass of its own) and a residual block's sum, waits for that
kernel, or for the one that doubles the size (`Stream`); the margins are the convolution's own; on a GPU everything lies
channels last, as tensor cores want it.

Legend: C channels, T frames of a chunk, H W pixels; all tensors are [1, C, T, H, W].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.kernels import double_pixels, norm_silu
from wan22.kernels.dispatch import use_triton

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


class Stream:
    """What the residual blocks add up: x + bias + y, the sum not taken until it is read. Read in a function, it is
    emptied there, so that its memory is free for what comes next."""

    def __init__(self, x: Tensor, bias: Tensor | None = None) -> None:
        self.x: Tensor | None = x
        self.y: Tensor | None = None
        self.bias = bias
        self.dtype = x.dtype  # of the sum

    def taken(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, y and bias, which are the caller's from here on."""
        assert self.x is not None
        parts = self.x, self.y, self.bias
        self.x = self.y = self.bias = None
        return parts

    def read(self, out: Tensor, gamma: Tensor | None, keep: bool) -> None:
        """The sum into `out`, normed and activated where there is a gamma; and, if it is wanted again, into x."""
        x, y, bias = self.taken()
        if not keep:
            norm_silu(x, gamma, out, y, bias)
        elif y is None and bias is None and x.dtype == self.dtype:
            norm_silu(x, gamma, out)
            self.x = x
        else:
            # Rather over y, which is nobody else's, than over x, which may be where the middle block's output lies.
            over = [one for one in (y, x) if one is not None and one.dtype == self.dtype]
            self.x = over[0] if over else torch.empty_like(x, dtype=self.dtype)
            norm_silu(x, gamma, out, y, bias, self.x)

    def settled(self) -> Tensor:
        """The sum."""
        x, y, bias = self.taken()
        if y is None and bias is None:
            return x.to(self.dtype)
        out = torch.empty_like(x, dtype=self.dtype)
        norm_silu(x, None, out, y, bias)
        return out


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
    stream = Stream(*_convolve(decoder.conv_in, Stream(laid(z)), cache))
    _residual(decoder.mid_block.resnets[0], stream, cache)
    for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        stream.x = _attend(attention, stream.settled())
        _residual(resnet, stream, cache)
    return stream.settled()


def local(decoder: Any, x: Tensor, cache: Cache, first: bool) -> Tensor:
    """The rest of the decoder, whole or one tile of it → pixels [F, 3, 8H, 8W] float32 in -1…1. first: the chunk of the
    first latent frame, which is one pixel frame."""
    stream = Stream(laid(x))
    del x
    for number, block in enumerate(decoder.up_blocks):
        # What the residual blocks add up is float32 till the last stage, half of whose work is moving it.
        last = number == len(decoder.up_blocks) - 1
        stream.dtype = block.resnets[0].conv1.weight.dtype if last else torch.float32
        for resnet in block.resnets:
            _residual(resnet, stream, cache)
        for upsampler in block.upsamplers or ():
            _upsample(upsampler, stream, cache, first)
    pixels, bias = _convolve(decoder.conv_out, stream, cache, decoder.norm_out)
    if bias is not None:
        pixels = pixels + bias.view(-1, 1, 1, 1)
    return pixels[0].float().clamp_(-1, 1).transpose(0, 1)


def _biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """The module's bias, for the convolution to add in passing, or else for the kernel that comes next: one is None."""
    return (None, module.bias) if use_triton(module.weight) else (module.bias, None)


def _convolve(
    module: Any, stream: Stream, cache: Cache, norm: Any = None, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A causal convolution of the stream, normed and activated before where there is a norm; in the module's dtype.
    keep: the stream is wanted again. → what it gives, and the bias that is still to be added."""
    side = module.kernel_size[-1] // 2
    weight, (bias, late) = module.weight, _biases(module)
    assert stream.x is not None
    room = cache.joined(module, stream.x.shape, stream.x, weight.dtype)
    stream.read(room[:, :, KEPT:], None if norm is None else norm.gamma.flatten(), keep)
    cache.keep(module, room)
    if module.out_channels < FEW:
        pieces = [room[:, :, start : start + AT_ONCE + KEPT] for start in range(0, room.shape[2] - KEPT, AT_ONCE)]
        return torch.cat([F.conv3d(piece, weight, bias, padding=(0, side, side)) for piece in pieces], dim=2), late
    return laid(F.conv3d(room, weight, bias, padding=(0, side, side))), late


def _residual(block: Any, stream: Stream, cache: Cache) -> None:
    inner = Stream(*_convolve(block.conv1, stream, cache, block.norm1, keep=True))
    late = None
    if not isinstance(shortcut := block.conv_shortcut, nn.Identity):
        weight, (bias, late) = shortcut.weight, _biases(shortcut)
        assert stream.x is not None
        stream.x = laid(F.conv3d(stream.x.to(weight.dtype), weight, bias))
    stream.y, stream.bias = _convolve(block.conv2, inner, cache, block.norm2)
    if late is not None:
        assert stream.bias is not None
        stream.bias = stream.bias.float() + late.float()


def _attend(block: Any, x: Tensor) -> Tensor:
    """Attention of each frame's pixels to each other, one head as wide as the channels."""
    channels, frames, height, width = x.shape[1:]
    normed = F.normalize(x.float(), dim=1) * channels**0.5 * block.norm.gamma.view(-1, 1, 1, 1)
    tokens = normed.to(block.to_qkv.weight.dtype)[0].permute(1, 2, 3, 0).reshape(frames, 1, height * width, channels)
    q, k, v = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v)
    out = F.linear(out, block.proj.weight.flatten(1), block.proj.bias)
    return laid(x + out.view(1, frames, height, width, channels).permute(0, 4, 1, 2, 3))


def _upsample(module: Any, stream: Stream, cache: Cache, first: bool) -> None:
    """Twice the height and width and, but for the first frame, twice the frames where the module is of that kind."""
    each = 1
    if module.mode == "upsample3d" and not first:
        stream.x, stream.bias = _convolve(module.time_conv, stream, cache)
        each = 2
    convolution = module.resample[1]
    bias, late = _biases(convolution)
    x = double_pixels(*stream.taken(), each, convolution.weight.dtype)
    x = F.conv2d(x, convolution.weight, bias, padding=1)
    stream.x, stream.bias = laid(x.transpose(0, 1)[None]), late

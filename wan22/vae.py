"""Latents → frames, through diffusers' Wan VAE, decoded as a stream over time and, where memory asks for it, in tiles.

Legend: C latent channels, T H W latent grid, F pixel frames: 1 for the first latent frame, 4 for each that follows.

Tiles are exact, to the rounding of convolutions: the decoder's middle block, whose attention is global, runs whole on
the small latent grid; all that follows is convolutions, which see only so far (`steps_of`). Blending tiles that were
decoded apart, as is usual, would be close only.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wan22.checkpoint import Checkpoint
from wan22.config import RequestError, RunError
from wan22.memory import OUT_OF_MEMORY
from wan22.tensor_files import check_names
from wan22.tensor_names import vae_name
from wan22.vae_sizes import Grid, cuts, finer, with_halo


class VideoVAE:
    """The checkpoint's VAE in float32, as published; PyTorch's own default for convolutions (TF32 on a GPU)."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Reads the weights. Raises RequestError for foreign files."""
        self.model = _empty(checkpoint)
        names = {published: vae_name(published) for published in checkpoint.vae.shapes}
        meta = self.model.state_dict()
        state = {name: torch.empty(meta[name].shape, dtype=torch.float32, device=device) for name in names.values()}
        checkpoint.vae.read({published: state[name] for published, name in names.items()})
        self.model.load_state_dict(state, strict=True, assign=True)
        self.model.requires_grad_(False).eval()
        config = self.model.config
        self.mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        # The published code keeps 1 / std in float32 and divides by it; z · std would differ in the last bit.
        self.inverse_std = 1.0 / torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1)

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, tiles: Grid = (1, 1), warn: Callable[[str], None] = lambda text: None
    ) -> Iterator[Tensor]:
        """latents [C, T, H, W] float32, normalized → chunks [F, 3, 8H, 8W] float32 in -1…1: of 1 frame, then 4 each.

        The VAE is causal in time and keeps the last two frames of every convolution's input, so the chunks of a
        stream equal those of the whole. tiles: rows and columns of a grid. Where memory runs out the rest comes from
        smaller tiles, which `warn` is told. Raises RunError where they are as small as can be.
        """
        done, grid = 0, tiles
        while True:
            try:
                # A stream's caches cannot be cut into tiles' ones: a finer grid starts over, what is out is left out.
                for chunk in self._chunks(latents, grid, done):
                    yield chunk
                    done += 1
                return
            except OUT_OF_MEMORY as error:
                trouble = str(error).partition(". ")[0]
            if not (smaller := finer(grid, latents.shape)):
                raise RunError(f"out of memory while decoding, in the smallest tiles: {trouble}")
            grid = smaller
            if self.mean.is_cuda:
                torch.cuda.empty_cache()
            warn(f"out of memory while decoding: going on in {grid[0]} x {grid[1]} tiles")

    def _chunks(self, latents: Tensor, grid: Grid, skip: int) -> Iterator[Tensor]:
        """The chunks but for the first `skip`."""
        z = latents.to(self.mean)[None] / self.inverse_std + self.mean
        z = self.model.post_quant_conv(z)
        if grid != (1, 1):
            yield from self._tiled(z, grid)[skip:]
            return
        middle, local = Cache(), Cache()
        for t in range(z.shape[2]):
            chunk = self._local(self._middle(z[:, :, t : t + 1], middle), local, t == 0)
            if t >= skip:
                yield chunk

    def _tiled(self, z: Tensor, grid: Grid) -> list[Tensor]:
        """Tile by tile through all of time, so that one tile's caches are all there are; the frames are put together
        on the CPU."""
        cache = Cache()
        middles = [self._middle(z[:, :, t : t + 1], cache) for t in range(z.shape[2])]
        del cache
        (height, width), steps = z.shape[3:], steps_of(self.model.decoder)
        scale = 2 ** steps.count(0)
        chunks = [torch.empty(4 if t else 1, 3, scale * height, scale * width) for t in range(len(middles))]
        for top, bottom in cuts(height, grid[0]):
            y, y_stop = with_halo(top, bottom, height, steps)
            for left, right in cuts(width, grid[1]):
                x, x_stop = with_halo(left, right, width, steps)
                pixels = (..., slice(scale * top, scale * bottom), slice(scale * left, scale * right))
                down = slice(scale * (top - y), scale * (bottom - y))
                across = slice(scale * (left - x), scale * (right - x))
                cache = Cache()
                for t, middle in enumerate(middles):
                    chunks[t][pixels] = self._local(middle[..., y:y_stop, x:x_stop], cache, t == 0)[..., down, across]
        return chunks

    def _middle(self, z: Tensor, cache: "Cache") -> Tensor:
        """Latents of one frame, [1, C, 1, H, W], through the part of the decoder that needs them whole."""
        decoder = self.model.decoder
        cache.index = [0]
        return decoder.mid_block(cache.convolve(decoder.conv_in, z), feat_cache=cache.kept, feat_idx=cache.index)

    def _local(self, x: Tensor, cache: "Cache", first: bool) -> Tensor:
        """The rest of the decoder, whole or one tile of it: → [F, 3, 8H, 8W]."""
        decoder = self.model.decoder
        cache.index = [0]
        for block in decoder.up_blocks:
            x = block(x, feat_cache=cache.kept, feat_idx=cache.index, first_chunk=first)
        x = cache.convolve(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))
        return x[0].clamp(-1, 1).transpose(0, 1)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [3, F, H, W] float32 in -1…1, F of the form 4n + 1 → normalized latents [C, T, H/8, W/8]."""
        z = self.model.encode(frames.to(self.mean)[None]).latent_dist.mode()
        return ((z - self.mean) * self.inverse_std)[0]


class Cache:
    """What diffusers' causal convolutions keep from one chunk to the next, in the order in which they run."""

    def __init__(self) -> None:
        self.kept: list[Any] = [None] * MOST_CONVOLUTIONS
        self.index = [0]

    def convolve(self, convolution: nn.Module, x: Tensor) -> Tensor:
        """One of the decoder's own convolutions, as its `forward` calls them."""
        place = self.index[0]
        before, kept = self.kept[place], x[:, :, -2:].clone()
        if before is not None and kept.shape[2] < 2:
            kept = torch.cat([before[:, :, -1:], kept], dim=2)
        x = convolution(x, before)
        self.kept[place] = kept
        self.index[0] += 1
        return x


MOST_CONVOLUTIONS = 64  # more than there are


def steps_of(decoder: nn.Module) -> list[int]:
    """How far the decoder's pixels see back to its middle block, last step first: a convolution's reach to each side,
    0 for a doubling of the size. The modules are registered in the order in which they run; a residual block's
    shortcut reaches nowhere."""
    reach = []
    for module in [*decoder.up_blocks.modules(), decoder.conv_out]:  # type: ignore[union-attr, operator, misc]
        if isinstance(module, nn.Upsample):
            assert tuple(module.scale_factor) == (2.0, 2.0)  # type: ignore[arg-type]
            reach.append(0)
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and (side := module.kernel_size[-1] // 2):
            reach.append(side)
        else:
            assert not isinstance(module, nn.Linear)  # nothing else may reach further
    return reach[::-1]


def to_pixels(frames: Tensor) -> Tensor:
    """[F, 3, H, W] float32 in -1…1 → [F, H, W, 3] uint8, cut off rather than rounded, as the published writer does."""
    return ((frames + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_uint8(frames: Tensor) -> np.ndarray:
    """The same on the CPU."""
    return to_pixels(frames).cpu().numpy()


def check_vae(checkpoint: Checkpoint) -> None:
    """Names and shapes of the VAE's file, without reading a weight. Raises RequestError."""
    source = checkpoint.vae
    found = {vae_name(name): shape for name, shape in source.shapes.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in _empty(checkpoint).state_dict().items()}
    check_names(str(source.path), found, wanted)


def _empty(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]  # diffusers comes late
    """The model on `meta`; its width and channels are what the tensors say, the rest is diffusers' default."""
    from diffusers import AutoencoderKLWan

    shapes = checkpoint.vae.shapes
    try:
        width, channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    except KeyError as error:
        raise RequestError(f"{checkpoint.vae.path}: not a Wan VAE: misses {error}") from None
    with torch.device("meta"):
        return AutoencoderKLWan(base_dim=width, z_dim=channels)

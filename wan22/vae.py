"""Latents → frames, through diffusers' Wan VAE, decoded as a stream over time and, where memory asks for it, in tiles.

Legend: C latent channels, T H W latent grid, F pixel frames: 1 for the first latent frame, 4 for each that follows.

Tiles are exact, to the rounding of convolutions: the decoder's middle block, whose attention is global, runs whole on
the small latent grid; all that follows is convolutions, which see only so far (`steps_of`). Blending tiles that were
decoded apart, as is usual, would be close only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from wan22.checkpoint import Checkpoint
from wan22.config import RequestError, RunError
from wan22.files.part_shapes import vae_shapes
from wan22.files.tensor_files import check_names
from wan22.files.tensor_names import vae_name
from wan22.residency.memory import OUT_OF_MEMORY
from wan22.vae_decoder import Cache, local, middle, prepare
from wan22.vae_sizes import CHUNK, Grid, cuts, finer, with_halo


class VideoVAE:
    """The checkpoint's VAE. In float32, as published, with PyTorch's own default for convolutions (TF32 on a GPU); or
    its decoder's convolutions and what lies between them in bf16, norms and everything before the decoder in float32.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Reads the weights. dtype: of the decoder. Raises RequestError for foreign files."""
        self.model = _empty(checkpoint)
        names = {published: vae_name(published) for published in checkpoint.vae.shapes}
        meta = self.model.state_dict()
        state = {name: torch.empty(meta[name].shape, dtype=torch.float32, device=device) for name in names.values()}
        checkpoint.vae.read({published: state[name] for published, name in names.items()})
        self.model.load_state_dict(state, strict=True, assign=True)
        self.model.requires_grad_(False).eval()
        prepare(self.model.decoder, dtype)
        self.chunk = CHUNK[dtype.itemsize]
        config = self.model.config
        self.mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        # The published code keeps 1 / std in float32 and divides by it; z · std would differ in the last bit.
        self.inverse_std = 1.0 / torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1)

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, tiles: Grid = (1, 1), warn: Callable[[str], None] = lambda text: None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[Tensor]:  # fmt: skip
        """latents [C, T, H, W] float32, normalized → chunks [F, 3, 8H, 8W] float32 in -1…1: of 1 frame, then of 4 a
        latent frame.

        The VAE is causal in time and keeps the last two frames of every convolution's input, so the chunks of a
        stream equal those of the whole. tiles: rows and columns of a grid. Where memory runs out `give_up` frees what
        others have on the device, if it says so; then the rest comes from shorter chunks, then from smaller tiles.
        `warn` is told. Raises RunError where they are as small as can be.
        """
        done, grid, step = 0, tiles, self.chunk
        while True:
            try:
                # A stream's caches cannot be cut into tiles' ones: a finer grid starts over, what is out is left out.
                for frames in self._chunks(latents, grid, step, done):
                    yield frames
                    done += len(frames)
                return
            except OUT_OF_MEMORY as error:
                trouble = str(error).partition(". ")[0]
            if give_up():
                warn("out of memory while decoding: going on without the experts on the device")
                continue
            smaller = grid if step > 1 else finer(grid, latents.shape)
            if not smaller:
                raise RunError(f"out of memory while decoding, in the smallest tiles: {trouble}")
            grid, step = smaller, 1
            if self.mean.is_cuda:
                torch.cuda.empty_cache()
            how = "frame by frame" if grid == (1, 1) else f"in {grid[0]} x {grid[1]} tiles"
            warn(f"out of memory while decoding: going on {how}")

    def _chunks(self, latents: Tensor, grid: Grid, step: int, skip: int) -> Iterator[Tensor]:
        """The frames but for the first `skip`, `step` latent frames at a time after the first."""
        z = latents.to(self.mean)[None] / self.inverse_std + self.mean
        z = self.model.post_quant_conv(z)
        spans = [(0, 1), *((t, min(t + step, z.shape[2])) for t in range(1, z.shape[2], step))]
        if grid != (1, 1):
            yield from _after(skip, self._tiled(z, grid, spans))
            return
        before, behind = Cache(), Cache()
        parts = (self._local(self._middle(z[:, :, start:stop], before), behind, start == 0) for start, stop in spans)
        yield from _after(skip, parts)

    def _tiled(self, z: Tensor, grid: Grid, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Tile by tile through all of time, so that one tile's caches are all there are; the frames are put together
        on the CPU."""
        cache = Cache()
        middles = [self._middle(z[:, :, start:stop], cache) for start, stop in spans]
        del cache
        (height, width), steps = z.shape[3:], steps_of(self.model.decoder)
        scale = 2 ** steps.count(0)
        chunks = [torch.empty(4 * (b - a) if a else 1, 3, scale * height, scale * width) for a, b in spans]
        for top, bottom in cuts(height, grid[0]):
            y, y_stop = with_halo(top, bottom, height, steps)
            for left, right in cuts(width, grid[1]):
                x, x_stop = with_halo(left, right, width, steps)
                pixels = (..., slice(scale * top, scale * bottom), slice(scale * left, scale * right))
                down = slice(scale * (top - y), scale * (bottom - y))
                across = slice(scale * (left - x), scale * (right - x))
                cache = Cache()
                for number, part in enumerate(middles):
                    tile = self._local(part[..., y:y_stop, x:x_stop], cache, number == 0)
                    chunks[number][pixels] = tile[..., down, across]
        return chunks

    def _middle(self, z: Tensor, cache: Cache) -> Tensor:
        """Latents of a few frames, [1, C, T, H, W], through the part of the decoder that needs them whole."""
        return middle(self.model.decoder, z, cache)

    def _local(self, x: Tensor, cache: Cache, first: bool) -> Tensor:
        """The rest of the decoder, whole or one tile of it: → [F, 3, 8H, 8W]."""
        return local(self.model.decoder, x, cache, first)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [3, F, H, W] float32 in -1…1, F of the form 4n + 1 → normalized latents [C, T, H/8, W/8]."""
        z = self.model.encode(frames.to(self.mean)[None]).latent_dist.mode()
        return ((z - self.mean) * self.inverse_std)[0]


def _after(skip: int, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The frames but for the first `skip`."""
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:]
        skip = max(0, skip - len(chunk))


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
    check_names(str(checkpoint.vae.path), checkpoint.vae.shapes, vae_shapes(*_sizes(checkpoint)))


def _sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Base width and latent channels, which the tensors say. Raises RequestError."""
    shapes = checkpoint.vae.shapes
    try:
        return shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    except (KeyError, IndexError) as error:
        raise RequestError(f"{checkpoint.vae.path}: not a Wan VAE: misses {error}") from None


def _empty(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]  # diffusers comes late
    """The model on `meta`; what the tensors do not say is diffusers' default."""
    from diffusers import AutoencoderKLWan

    width, channels = _sizes(checkpoint)
    with torch.device("meta"):
        return AutoencoderKLWan(base_dim=width, z_dim=channels)

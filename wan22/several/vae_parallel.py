"""One video decoded on all ranks: each has its tiles of the picture, the first puts the frames together.

As in vae.py's own tiles the decoder's middle block runs whole, on every rank, and all that follows is convolutions:
with the halo that these see, a tile's pixels are those of the whole, to the rounding of convolutions.

Legend: C latent channels, T H W latent grid, F pixel frames.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from wan22.parallel import Ranks
from wan22.several.watch import first_time, tick
from wan22.vae import VideoVAE, steps_of, to_pixels
from wan22.vae_decoder import Cache
from wan22.vae_sizes import Grid, cuts, with_halo

Box = tuple[int, int, int, int]  # top, bottom, left, right; in latents


def tiles_of(height: int, width: int, grid: Grid) -> list[Box]:
    """All tiles of a grid; rank r has those of number r, r + world …"""
    return [(*rows, *columns) for rows in cuts(height, grid[0]) for columns in cuts(width, grid[1])]


@torch.inference_mode()
def decode_together(vae: VideoVAE, latents: Tensor, grid: Grid, ranks: Ranks) -> Iterator[np.ndarray]:
    """latents [C, T, H, W], the same on every rank → on the first rank chunks of frames [F, 8H, 8W, 3] uint8, as they
    come; on the others nothing, which is to be drawn out all the same. With several tiles a rank, one after the other
    goes through all of time first."""
    (_, frames, height, width), world = latents.shape, ranks.mesh.world
    z = vae.model.post_quant_conv(latents.to(vae.mean)[None] / vae.inverse_std + vae.mean)
    boxes = tiles_of(height, width, grid)
    rounds = -(-len(boxes) // world)
    spans = [(0, 1), *((t, min(t + vae.chunk, frames)) for t in range(1, frames, vae.chunk))]
    streams = [_tile(vae, z, box, spans) for box in boxes[ranks.team.rank :: world]]
    if rounds > 1:
        streams = [iter([pixels.cpu() for pixels in stream]) for stream in streams]
    scale = 2 ** steps_of(vae.model.decoder).count(0)
    for start, stop in spans:
        count = 4 * (stop - start) if start else 1
        whole = np.empty((count, scale * height, scale * width, 3), dtype=np.uint8) if ranks.first else None
        for number in range(rounds):
            with contextlib.nullcontext() if start else first_time():
                own = next(streams[number]).to(vae.mean.device) if number < len(streams) else None
            present = boxes[number * world : (number + 1) * world]
            pieces = _collect(own, [_shape(box, count, scale) for box in present], world, vae.mean.device)
            if whole is not None:
                for (top, bottom, left, right), piece in zip(present, pieces, strict=True):
                    whole[:, scale * top : scale * bottom, scale * left : scale * right] = piece.cpu().numpy()
            tick()
        if whole is not None:
            yield whole


def _tile(vae: VideoVAE, z: Tensor, box: Box, spans: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """A tile through all of time: [F, h, w, 3] uint8 a span of latent frames."""
    top, bottom, left, right = box
    steps = steps_of(vae.model.decoder)
    scale = 2 ** steps.count(0)
    y, y_stop = with_halo(top, bottom, z.shape[3], steps)
    x, x_stop = with_halo(left, right, z.shape[4], steps)
    down, across = (slice(scale * (first - start), scale * (last - start))
                    for first, last, start in ((top, bottom, y), (left, right, x)))  # fmt: skip
    whole, local = Cache(), Cache()
    for start, stop in spans:
        middle = vae._middle(z[:, :, start:stop], whole)[..., y:y_stop, x:x_stop]
        yield to_pixels(vae._local(middle, local, start == 0)[..., down, across])


def _shape(box: Box, count: int, scale: int) -> tuple[int, ...]:
    return count, scale * (box[1] - box[0]), scale * (box[3] - box[2]), 3


def _collect(own: Tensor | None, shapes: list[tuple[int, ...]], world: int, device: torch.device) -> list[Tensor]:
    """Every rank's pixels on the first one, in order; a message has the largest one's length."""
    longest = max(int(np.prod(shape)) for shape in shapes)
    send = torch.zeros(longest, dtype=torch.uint8, device=device)
    if own is not None:
        send[: own.numel()] = own.flatten()
    room = [torch.empty_like(send) for _ in range(world)] if dist.get_rank() == 0 else None
    dist.gather(send, room, dst=0)
    return [flat[: int(np.prod(shape))].view(shape) for flat, shape in zip(room or [], shapes, strict=False)]

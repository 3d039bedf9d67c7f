"""How far the VAE decoder's convolutions see, and what decoding takes in bytes, tiled or whole. Standard library only.

Legend: C channels, T H W latent grid. Everything behind the decoder's middle block is local: a tile of latents with a
margin of HALO on each inner side gives exactly the inner pixels that the whole would.
"""

from collections.abc import Sequence
from math import ceil, prod

Grid = tuple[int, int]  # tiles down and across
SMALLEST_TILE = 4  # latents a side, without halo
MULTIPLIERS = (4, 4, 2, 1)  # of the base width, of the decoder's stages; Wan2.1's VAE
TIMES = (1, 2, 4, 4)  # frames a latent frame has become, in each stage
CHUNK = {4: 1, 2: 2}  # latent frames decoded at a time, by bytes of the decoder's dtype: about the same memory
RESNETS = 3  # a stage, of two 3×3×3 convolutions each


def interval(start: int, stop: int, steps: Sequence[int]) -> tuple[int, int]:
    """What an output interval is made from, unbounded. steps, last first: how far a convolution sees to each side, or
    0 for a doubling of the size."""
    for step in steps:
        start, stop = (start - step, stop + step) if step else (start // 2, -(-stop // 2))
    return start, stop


# The decoder behind its middle block, last first: conv_out, three resnets a stage, a convolution after each doubling.
STEPS = (1, *(1,) * 6, 1, 0, *(1,) * 6, 1, 0, *(1,) * 6, 1, 0, *(1,) * 6)


def cuts(length: int, count: int) -> list[tuple[int, int]]:
    """`length` latents in `count` parts, as even as can be."""
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def with_halo(start: int, stop: int, length: int, steps: Sequence[int] = STEPS) -> tuple[int, int]:
    """The latents [start, stop) and what the pixels above them need around."""
    scale = 2 ** sum(step == 0 for step in steps)
    first, last = interval(start * scale, stop * scale, steps)
    return max(0, first), min(length, last)


def finer(grid: Grid, latent_shape: Sequence[int]) -> Grid | None:
    """The next finer grid: the longer side of its tiles halved; None where tiles would get too small."""
    rows, columns = grid
    height, width = latent_shape[2] / rows, latent_shape[3] / columns
    grid = (rows, 2 * columns) if width >= height else (2 * rows, columns)
    return grid if max(height, width) / 2 >= SMALLEST_TILE else None


def rank_grid(latent_shape: Sequence[int], ranks: int) -> Grid:
    """The tiles of as many ranks: of all grids of that number the one whose largest tile, with its halo, is smallest;
    of the next smaller number where there are too few latents."""
    height, width = latent_shape[2:]

    def largest(grid: Grid) -> int:
        sides = (max(stop - start for start, stop in (with_halo(*cut, length) for cut in cuts(length, count)))
                 for length, count in ((height, grid[0]), (width, grid[1])))  # fmt: skip
        return prod(sides)

    while not (grids := [(rows, ranks // rows) for rows in range(1, ranks + 1)
                         if ranks % rows == 0 and rows <= height and ranks // rows <= width]):  # fmt: skip
        ranks -= 1
    return min(grids, key=largest)


def decode_terms(latent_shape: Sequence[int], width: int, grid: Grid, item: int = 4) -> dict[str, int]:
    """Bytes by name at the peak of decoding one chunk; width: the VAE's base width; item: bytes of the decoder's dtype,
    which all of its stages but the first have. It follows vae_decoder.py line by line."""
    _, frames, height, columns = latent_shape
    sides = []
    for length, count in ((height, grid[0]), (columns, grid[1])):
        halos = [with_halo(start, stop, length) for start, stop in cuts(length, count)]
        sides.append(max(stop - start for start, stop in halos))
    area, chunk = prod(sides), min(CHUNK[item], max(1, frames - 1))
    # One frame of each stage, and a chunk of the last one.
    each = [(item if i else 4) * width * m * area * 4**i for i, m in enumerate(MULTIPLIERS)]
    at_once = TIMES[-1] * chunk
    last = each[-1] * at_once
    # Each convolution keeps two frames of its input, which the last one, in float32, has too.
    caches = 2 * (sum(2 * RESNETS * frame for frame in each) + each[0] + each[1] + each[-1] * 4 // item)
    middle = 4 * width * MULTIPLIERS[0] * height * columns
    tiled = grid != (1, 1)
    joined = (at_once + 2) / at_once
    return {
        "weights": ceil(507_609_880 * (width / 96) ** 2),  # of the published file, as the square of the width
        "latents": 2 * 4 * prod(latent_shape),
        "caches of convolutions": caches + 5 * 2 * middle,
        # A residual block: its input, a convolution's input with the kept frames, and its output, which waits for the
        # next one's sum. Before: what is doubled in size, of twice the channels, and the two it is the sum of, one of
        # them in float32. After: the last convolution's input, in float32, first with the two that it is made from,
        # then with the library's copy of it, of two frames and the two before at a time.
        "last stage": int(last * max(2 + joined, 2.5 + 2 / item, joined * 4 / item + max(2, 16 / at_once / item))),
        "frames": 2 * 4 * 3 * at_once * area * 64,
        **({"middle of all frames": middle * frames} if tiled else {}),
    }

"""Pictures laid out in a grid: the frame sheet of a video. `F` pixel frames, `H W` pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_BACKGROUND = (64, 64, 64)  # neither of the colours that pictures are apt to have at their edges


def frame_sheet(
    frames: np.ndarray, *, columns: int = 4, count: int = 12, tile_width: int = 480, gap: int = 4
) -> Image.Image:
    """One video as one picture: at most `count` frames evenly spaced in time, the first and the last among them.

    frames: uint8 [F, H, W, 3]. Read like text, left to right and down. A frame wider than `tile_width` pixels is
    scaled down to it, never up; `gap` pixels lie around and between.
    """
    import numpy as np
    from PIL import Image

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"a frame sheet takes uint8 [F, H, W, 3], F ≥ 1, not {frames.dtype} {list(frames.shape)}")
    picked = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    tiles = [Image.fromarray(frames[index]) for index in picked]
    width, height = tiles[0].size
    if width > tile_width:
        size = (tile_width, max(1, round(height * tile_width / width)))
        tiles = [tile.resize(size, Image.Resampling.LANCZOS) for tile in tiles]
    return grid(tiles, columns=columns, gap=gap)


def grid(pictures: Sequence[Image.Image], *, columns: int, gap: int = 4) -> Image.Image:
    """Pictures (at least one) in rows of `columns`, each at the top left of a cell as large as the largest."""
    from PIL import Image

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width = max(picture.width for picture in pictures) + gap
    height = max(picture.height for picture in pictures) + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), _BACKGROUND)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (gap + column * width, gap + row * height))
    return sheet

"""Pictures laid out in a grid: the frame sheet of a video, the contact sheet of several.

Legend: `F` pixel frames, `H W` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def contact_sheet(
    videos: Sequence[tuple[np.ndarray, str]], *, frames_each: int = 3, frame_width: int = 240, text_size: int = 14
) -> Image.Image:
    """Several videos as one picture: of each its first, middle and last frame in a row, and its caption below.

    videos: (uint8 [F, H, W, 3], text), at least one. Widths and sizes in pixels.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    font, cards = _font(text_size), []
    for frames, caption in videos:
        picked = np.linspace(0, len(frames) - 1, frames_each).round().astype(int)
        height = max(1, round(frames.shape[1] * frame_width / frames.shape[2]))
        tiles = [
            Image.fromarray(frames[index]).resize((frame_width, height), Image.Resampling.LANCZOS) for index in picked
        ]
        strip = grid(tiles, columns=frames_each, gap=2)
        lines = _wrapped(caption, font, strip.width - 8)
        line_height = round(text_size * 1.4)
        card = Image.new("RGB", (strip.width, strip.height + len(lines) * line_height + 6), (32, 32, 32))
        card.paste(strip, (0, 0))
        draw = ImageDraw.Draw(card)
        for number, line in enumerate(lines):
            draw.text((4, strip.height + number * line_height), line, font=font, fill=(235, 235, 235))
        cards.append(card)
    return grid(cards, columns=1 if len(cards) < 3 else 2 if len(cards) < 13 else 3, gap=8)


def _wrapped(text: str, font: Any, width: int, most: int = 4) -> list[str]:
    """Lines that fit `width` pixels; the last of `most` ends in … where there was more. Breaks between any two letters
    where there is no space, as Chinese is set."""
    lines: list[str] = []
    for paragraph in text.splitlines()[-1:-3:-1]:  # the seed's line never falls to a long prompt
        kept: list[str] = []
        while paragraph:
            end = len(paragraph)
            while end > 1 and font.getlength(paragraph[:end]) > width:
                end = min(end - 1, int(end * 0.9) + 1)
            space = paragraph.rfind(" ", 0, end)
            if end < len(paragraph) and space > end // 2:
                end = space
            kept.append(paragraph[:end].strip())
            paragraph = paragraph[end:].strip()
        if len(kept) > most - len(lines):
            kept = kept[: most - len(lines)]
            kept[-1] = f"{kept[-1][:-2]}…"
        lines = kept + lines
    return lines


def _font(size: int) -> Any:
    """A font with many scripts where the system has one; Pillow's own knows Latin letters alone."""
    from PIL import ImageFont

    for name in ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc",
                 "PingFang.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf"):  # fmt: skip
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)

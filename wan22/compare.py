"""How far two videos, or two files of latents, are apart: figures for a person or a program, and a plot.

| of videos | measured on       | source                                                                            |
|-----------|-------------------|-----------------------------------------------------------------------------------|
| PSNR      | R, G and B        | 10 log10(255² / mean squared difference), in dB; of all frames: of their mean     |
| SSIM      | luma (BT.709)     | Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment: From Error       |
|           |                   | Visibility to Structural Similarity", IEEE Transactions on Image Processing 13(4) |

Of latents: relative error ‖a − b‖ / ‖a‖ and the largest difference, of each latent frame and of all.

Frames are read one pair at a time and numbered from 0, as the files in a folder of frames are.
Legend: `F` pixel frames, `H W` pixels or latents, `C T` latent channels and frames.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan22.config import RequestError, RunError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, III-C
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709, as our files say of themselves; the paper takes luminance alone too
_STRIP = 32  # rows blurred at a time: what they need stays in a core's cache


@dataclass(frozen=True)
class Series:
    """One measure over the frames. overall: of all together; worst: the number of the frame that is furthest."""

    name: str
    unit: str
    values: tuple[float, ...]
    overall: float
    higher_is_closer: bool

    @property
    def worst(self) -> int:
        pick = min if self.higher_is_closer else max
        return pick(range(len(self.values)), key=self.values.__getitem__)

    def say(self, value: float) -> str:
        """A value as a person reads it."""
        if self.unit == "dB":
            return "identical" if math.isinf(value) else f"{value:.2f} dB"
        return f"{value:.5f}" if self.higher_is_closer else f"{value:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None stands for infinity, which JSON does not know."""
        frames = [_finite(value) for value in self.values]
        worst = {"worst": frames[self.worst], "worst_frame": self.worst}
        return {"overall": _finite(self.overall), **worst, "frames": frames}


@dataclass(frozen=True)
class Comparison:
    """Two files of one kind (`video` or `latents`) and one shape, measured. largest: the largest difference of two
    values, out of 255 for videos."""

    a: str
    b: str
    kind: str
    shape: tuple[int, ...]  # F H W of a video, C T H W of latents
    series: tuple[Series, Series]
    largest: float

    @property
    def identical(self) -> bool:
        return self.largest == 0

    def lines(self) -> list[str]:
        """Aligned lines of at most 80 columns, but for long names of files."""
        if self.kind == "video":
            frames, height, width = self.shape
            about = f"{width}x{height}, {_count(frames, 'frame')}"
        else:
            about = "latents " + "x".join(map(str, self.shape))
        lines = [f"A  {self.a}", f"B  {self.b}", about, "", f"{'':<20}{'all frames':>14}{'worst frame':>14}"]
        for one in self.series:
            row = f"{one.name:<20}{one.say(one.overall):>14}{one.say(one.values[one.worst]):>14}"
            lines.append(row + ("" if self.identical else f"   frame {one.worst}"))
        if self.kind == "video":
            largest = "none" if self.identical else f"{self.largest:g} of 255"
            lines.append(f"{'largest difference':<20}{largest:>14}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        keys = ("frames", "height", "width") if self.kind == "video" else ("channels", "frames", "height", "width")
        return {
            "a": self.a, "b": self.b, "kind": self.kind, **dict(zip(keys, self.shape, strict=True)),
            "identical": self.identical, "largest": self.largest,
            **{one.name.lower().replace(" ", "_"): one.to_dict() for one in self.series},
        }  # fmt: skip


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Two videos (mp4, GIF, folder of frames), or two files of latents. `a` is what `b` is measured against.

    Raises RequestError where a file cannot be read, or where both are not of one kind and shape.
    """
    kinds = ["latents" if str(path).endswith(".safetensors") else "video" for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise RequestError(f"{a} and {b}: latents and a video do not compare", hint="decode the latents first")
    return (_compare_latents if kinds[0] == "latents" else _compare_videos)(str(a), str(b))


# Videos ------------------------------------------------------------------------------------------------------------


def _compare_videos(a: str, b: str) -> Comparison:
    from wan22.video import iter_frames

    errors, similarities, largest, counts = [], [], 0, [0, 0]
    shape: tuple[int, ...] = ()
    for left, right in zip_longest(iter_frames(a), iter_frames(b)):
        counts = [counts[0] + (left is not None), counts[1] + (right is not None)]
        if left is None or right is None:
            continue  # count on, to name both
        if left.shape != right.shape:
            sizes = [f"{frame.shape[1]}x{frame.shape[0]}" for frame in (left, right)]
            raise RequestError(f"their sizes differ: {a} is {sizes[0]}, {b} is {sizes[1]}")
        shape = left.shape
        if min(shape[:2]) < WINDOW:
            raise RequestError(f"{a}: {shape[1]}x{shape[0]} is smaller than SSIM's window of {WINDOW} pixels")
        error, most = _squared_error(left, right)
        errors.append(error)
        largest = max(largest, most)
        similarities.append(ssim(luma(left), luma(right)))
    if counts[0] != counts[1]:
        said = [_count(count, "frame") for count in counts]
        raise RequestError(f"their lengths differ: {a} has {said[0]}, {b} has {said[1]}")
    if not errors:
        raise RequestError(f"{a} and {b}: there are no frames in them")
    mean = sum(errors) / len(errors)
    measured = (
        Series("PSNR", "dB", tuple(map(psnr, errors)), psnr(mean), True),
        Series("SSIM", "", tuple(similarities), sum(similarities) / len(similarities), True),
    )
    return Comparison(a, b, "video", (len(errors), *shape[:2]), measured, largest)


def _squared_error(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Mean squared difference and largest difference of two uint8 arrays, exact in whole numbers."""
    import numpy as np

    difference = np.abs(a.astype(np.int32) - b)
    return float(np.square(difference).mean(dtype=np.float64)), int(difference.max())


def psnr(mean_squared_error: float) -> float:
    """dB for values from 0 to 255; infinite where there is no difference."""
    return 10 * math.log10(PEAK**2 / mean_squared_error) if mean_squared_error else math.inf


def luma(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → float32 [H, W], 0 to 255."""
    import numpy as np

    return frame.astype(np.float32) @ np.array(LUMA, np.float32)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two float32 [H, W] of 0 to 255, both sides at least 11; 1 where they are equal.

    Wang et al. 2004, equation 13 with K1 = 0.01 and K2 = 0.03, under an 11x11 Gaussian of σ = 1.5 that sums to one, at
    each place where it fits whole. Computed in float32 around the middle of the range, within 1e-5 of float64.
    """
    import numpy as np

    middle = np.float32(PEAK / 2)
    height, total, count = a.shape[0] - WINDOW + 1, 0.0, 0
    for top in range(0, height, _STRIP):
        rows = slice(top, min(top + _STRIP, height) + WINDOW - 1)
        # Around the middle, so that squares stay small beside the variances that are left of them: moments of second
        # order about a mean do not change, and the means get it back.
        x, y = a[rows] - middle, b[rows] - middle
        mean_x, mean_y, xx, yy, xy = _blur(np.stack([x, y, x * x, y * y, x * y]))
        covariance = xy - mean_x * mean_y
        variances = (xx - mean_x * mean_x) + (yy - mean_y * mean_y)  # in pairs: twice the covariance where x is y
        mean_x += middle
        mean_y += middle
        similar = (2 * mean_x * mean_y + np.float32(C1)) * (2 * covariance + np.float32(C2))
        similar /= (mean_x * mean_x + mean_y * mean_y + np.float32(C1)) * (variances + np.float32(C2))
        total, count = total + float(similar.sum(dtype=np.float64)), count + similar.size
    return total / count


def _blur(maps: np.ndarray) -> np.ndarray:
    """[N, H, W] → [N, H − 10, W − 10]: the Gaussian window, whose rows and columns separate and are symmetric."""
    import numpy as np

    places = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(places**2) / (2 * SIGMA**2))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (1, 2):
        size = maps.shape[axis] - WINDOW + 1
        views = [
            maps[:, start : start + size] if axis == 1 else maps[:, :, start : start + size] for start in range(WINDOW)
        ]
        blurred = views[WINDOW // 2] * taps[WINDOW // 2]
        for near in range(WINDOW // 2):
            pair = views[near] + views[-1 - near]
            pair *= taps[near]
            blurred += pair
        maps = blurred
    return maps


# Latents -----------------------------------------------------------------------------------------------------------


def _compare_latents(a: str, b: str) -> Comparison:
    import numpy as np

    left, right = _read_latents(a), _read_latents(b)  # a 720p video's are 19 MB
    if left.shape != right.shape:
        raise RequestError(f"their sizes differ: {a} is {list(left.shape)}, {b} is {list(right.shape)}")
    channels, frames = left.shape[:2]
    difference = left.astype(np.float64) - right
    errors = np.square(difference).sum((0, 2, 3))
    powers = np.square(left, dtype=np.float64).sum((0, 2, 3))
    most = np.abs(difference).max((0, 2, 3))
    measured = (
        Series("relative error", "", tuple(map(_ratio, errors, powers)), _ratio(errors.sum(), powers.sum()), False),
        Series("largest difference", "", tuple(most.tolist()), float(most.max()), False),
    )
    return Comparison(a, b, "latents", (channels, frames, *left.shape[2:]), measured, float(most.max()))


def _ratio(error: float, power: float) -> float:
    """The root of error / power; 0 where there is no error, infinite where there is nothing to measure it by."""
    return math.sqrt(error / power) if power else math.inf if error else 0.0


def _read_latents(file: str) -> np.ndarray:
    """float32 [C, T, H, W] of a file that holds them under the name `latents`. Raises RequestError."""
    import numpy as np

    from wan22.files.tensor_files import Safetensors

    tensors = Safetensors(Path(file))
    entry = tensors.entries.get("latents")
    if entry is None or entry.dtype != "F32" or len(entry.shape) != 4 or not math.prod(entry.shape):
        raise RequestError(f"{file}: there are no latents in it", hint="--keep-latents leaves them beside a video")
    latents = np.frombuffer(tensors.bytes_of("latents"), "<f4").reshape(entry.shape)
    if not np.isfinite(latents).all():
        raise RequestError(f"{file}: its latents are not finite numbers")
    return latents


# The plot ----------------------------------------------------------------------------------------------------------

_SIZE = (1200, 850)
_SCALE = 2  # drawn larger and scaled down: Pillow's lines have no soft edges of their own
_INK, _SOFT, _GRID = (33, 37, 41), (108, 117, 125), (226, 230, 234)
_COLOURS = ((31, 111, 180), (196, 84, 26))
_FONTS = (  # for names that the built-in font cannot write: of Linux, Windows, macOS
    "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "msyh.ttc", "PingFang.ttc",
    "Arial Unicode.ttf",
)  # fmt: skip


def check_plot(path: str | Path, overwrite: bool) -> None:
    """RequestError, before any work is done, where `save_plot` could not write."""
    from wan22.video import check_writable

    if Path(path).suffix.lower() != ".png":
        raise RequestError(f"--output {path}: a plot is a .png")
    check_writable(path, if_exists="replace" if overwrite else "error")


def save_plot(comparison: Comparison, path: str | Path, overwrite: bool = False) -> None:
    """Write the plot, shown when whole. Raises RunError."""
    from wan22.output.names import move_to_free, sync

    path = Path(path)
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot(comparison).save(partial)
        sync(partial)
        if overwrite:
            partial.replace(path)
        elif not move_to_free(partial, path):
            raise RunError(f"could not write {path}: it appeared meanwhile, and is not overwritten")
    except OSError as error:
        raise RunError(f"could not write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def plot(comparison: Comparison) -> Image.Image:
    """A picture of both measures, frame by frame, one panel above the other."""
    from PIL import Image, ImageDraw

    width, height = _SIZE[0] * _SCALE, _SIZE[1] * _SCALE
    image = Image.new("RGB", (width, height), "white")
    pen = _Pen(ImageDraw.Draw(image))
    pen.text((60, 22), "Frame by frame, B against A", 26, _INK)
    pen.text((1140, 28), comparison.lines()[2], 18, _SOFT, "ra")
    for place, name in enumerate((comparison.a, comparison.b)):
        pen.text((60, 64 + 26 * place), pen.fit(f"{'AB'[place]}  {name}", 18, 1080), 18, _SOFT)
    for place, series in enumerate(comparison.series):
        top = 144 + 352 * place
        _panel(pen, series, _COLOURS[place], (100, top + 28, 1140, top + 290), "frame" if place else "")
    return image.resize(_SIZE, Image.Resampling.LANCZOS)


class _Pen:
    """Draws in units of the finished picture's pixels."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: float = 1) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * _SCALE), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
        self.draw.circle((x * _SCALE, y * _SCALE), radius * _SCALE, fill=colour)

    def text(self, at: tuple[float, float], text: str, size: int, colour: tuple[int, ...], anchor: str = "la") -> None:
        where = at[0] * _SCALE, at[1] * _SCALE
        text, font = _written(text, size)
        self.draw.text(where, text, fill=colour, font=font, anchor=anchor)

    def width(self, text: str, size: int) -> float:
        text, font = _written(text, size)
        return self.draw.textlength(text, font=font) / _SCALE

    def fit(self, text: str, size: int, width: float) -> str:
        """The text, its middle left out where it is wider than `width` pixels."""
        kept = len(text)
        shown = text
        while self.width(shown, size) > width and kept > 8:
            kept -= 1
            shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
        return shown


def _written(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """A text and a font that has its letters; what no font here has is left out of it."""
    from PIL import ImageFont

    beyond_latin = "[^\u0020-\u024f…]+"
    if re.search(beyond_latin, text):
        for name in _FONTS:
            try:
                return text, ImageFont.truetype(name, size * _SCALE)
            except OSError:
                continue
    return re.sub(beyond_latin, "…", text), ImageFont.load_default(size * _SCALE)


def _panel(pen: _Pen, series: Series, colour: tuple[int, ...], box: tuple[int, int, int, int], below: str) -> None:
    """Axes with ticks, the line, the value of all frames and the worst one."""
    left, top, right, bottom = box
    finite = [value for value in series.values if math.isfinite(value)]
    title = series.name + (f" ({series.unit})" if series.unit else "")
    pen.text((left, top - 12), title, 19, colour, "ls")
    pen.text((right, top - 12), _caption(series), 17, _SOFT, "rs")
    count = len(series.values)
    ceiling, floor = 1.0 if series.name == "SSIM" else None, None if series.higher_is_closer else 0.0
    low, high, step = _range([*finite, *filter(math.isfinite, [series.overall])], ceiling, floor)

    def x_of(frame: float) -> float:
        return left + 14 + (right - left - 28) * (frame / (count - 1) if count > 1 else 0.5)

    def y_of(value: float) -> float:
        return bottom - 10 - (bottom - top - 20) * (value - low) / (high - low)

    for tick in _ticks(low, high, step):
        pen.line([(left, y_of(tick)), (right, y_of(tick))], _GRID)
        pen.text((left - 10, y_of(tick)), _label(tick, step), 16, _SOFT, "rm")
    frame_step = max(1, math.ceil(_step(max(count - 1, 1), 10)))
    for frame in range(0, count, frame_step):
        pen.line([(x_of(frame), bottom), (x_of(frame), bottom + 6)], _SOFT)
        pen.text((x_of(frame), bottom + 10), str(frame), 16, _SOFT, "ma")
    pen.line([(left, top), (left, bottom), (right, bottom)], _SOFT, 1.5)
    if below:
        pen.text(((left + right) / 2, bottom + 36), below, 17, _SOFT, "ma")
    if not finite:
        pen.text(((left + right) / 2, (top + bottom) / 2), "identical in every frame", 20, _INK, "mm")
        return
    if math.isfinite(series.overall):
        for start in range(left, right, 14):
            pen.line([(start, y_of(series.overall)), (min(start + 7, right), y_of(series.overall))], _SOFT)
    for run in _runs(series.values):
        points = [(x_of(frame), y_of(series.values[frame])) for frame in run]
        if len(points) > 1:
            pen.line(points, colour, 2.5)
        if len(points) == 1 or count <= 100:
            for point in points:
                pen.dot(*point, 3.5, colour)
    for frame, value in enumerate(series.values):
        if not math.isfinite(value):  # off any scale: rings along the top say so
            pen.dot(x_of(frame), top + 4, 4, colour)
            pen.dot(x_of(frame), top + 4, 2, (255, 255, 255))
    worst = series.worst
    pen.dot(x_of(worst), y_of(series.values[worst]), 6, _INK)


def _caption(series: Series) -> str:
    if not any(math.isfinite(value) for value in series.values):
        return ""
    worst = f"worst {series.say(series.values[series.worst])} at frame {series.worst}"
    same = sum(math.isinf(value) for value in series.values)
    told = f"all frames {series.say(series.overall)} (dashed), {worst}"
    return told + (f", {same} identical (rings)" if same else "")


def _runs(values: Sequence[float]) -> Iterator[list[int]]:
    """The numbers of neighbouring frames whose values are finite."""
    run: list[int] = []
    for frame, value in enumerate([*values, math.inf]):
        if math.isfinite(value):
            run.append(frame)
        elif run:
            yield run
            run = []


def _range(values: Sequence[float], ceiling: float | None, floor: float | None) -> tuple[float, float, float]:
    """Ends of an axis that holds the values, on ticks, and the distance of the ticks. An end that a measure cannot
    pass is not passed."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(high), 1e-6):  # one value: some room around it
        room = abs(high) * 0.05 or 1.0
        low, high = low - room, high + room
    if ceiling is not None:
        high = min(high, ceiling)
        low = min(low, high - 1e-6)
    if floor is not None:
        low = floor
    step = _step(high - low, 5)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high, step


def _step(span: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, so that it goes at most `most` times into the span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [low + step * place for place in range(round((high - low) / step) + 1)]


def _label(tick: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:.{decimals}f}" if decimals <= 6 else f"{tick:.2g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

"""Says what is to be seen in a video of one shape: the measure of what the demo has understood.

It knows the colours, the shapes and the motions that the demo's videos are made of, and nothing of how they were made:
background from the border, the shape as what differs from it, and motion from the tracks of centre, area and turn.
It judges soft edges as soft, so that a blurred video is measured like a sharp one.

Shape legend: `F` frames, `H W` pixels, `G` cells of the small square grid on which shapes are compared, `K` templates.
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from demo_data import _DISTANCES, COLOURS, SHAPES, SYMMETRY_DEGREES

Array = NDArray[np.floating]

_GRID = 36  # cells a side
_HALF_WIDTH = 1.1  # of the grid, in units of the square root of the shape's area
_STEP = 4.0  # degrees between templates


@dataclass(frozen=True)
class Detection:
    """What was seen, and the numbers behind it. Distances are fractions of the frame's side."""

    background: str
    colour: str
    shape: str
    motion: str
    area: float
    """median share of the frame that the shape covers"""
    growth: float
    """area at the end over area at the start"""
    dx: float
    dy: float
    """way of the centre from start to end, to the right and down"""
    turn: float
    """degrees turned clockwise"""
    bounces: int
    fit: float
    """mean overlap with the best template, 1 for a perfect one"""


def detect(video: NDArray[np.uint8]) -> Detection:
    """What one shape on a plain background does: video uint8 [F, H, W, 3]."""
    frames = video.astype(np.float32)
    height, width = frames.shape[1:3]
    rim = max(1, min(height, width) // 64)
    inner = np.zeros((height, width), dtype=bool)
    inner[rim:-rim, rim:-rim] = True
    background = np.median(frames[:, ~inner], axis=(0, 1))
    alpha, colour = _opacity(frames, background)

    weight = alpha.sum(axis=(1, 2))  # [F], pixels
    seen = weight > 4
    if seen.sum() < 2:
        name = _nearest_colour(background)
        return Detection(name, name, "none", "none", 0.0, 1.0, 0.0, 0.0, 0.0, 0, 0.0)
    alpha, weight = alpha[seen], weight[seen]
    x = (alpha.sum(axis=1) * (np.arange(width) + 0.5)).sum(axis=1) / weight  # [F], pixels
    y = (alpha.sum(axis=2) * (np.arange(height) + 0.5)).sum(axis=1) / weight

    shape, angles, fit = _shape(_normalised(alpha, x, y, np.sqrt(weight)))
    period = SYMMETRY_DEGREES[SHAPES.index(shape)]
    turn = _total_turn(angles, period) if period else 0.0
    growth = float(weight[-2:].mean() / weight[:2].mean())
    dx, dy = float(x[-1] - x[0]) / width, float(y[-1] - y[0]) / height
    bounces, swing = _bounces(y / height)

    scores = {
        "growing": np.log(growth) / np.log(1.8),
        "shrinking": -np.log(growth) / np.log(1.8),
        "spinning": abs(turn) / 90,
        "bouncing": swing / 0.2 if bounces >= 2 and swing > 2 * abs(dy) else 0.0,
        "moving left": -dx / 0.25,
        "moving right": dx / 0.25,
        "moving up": -dy / 0.25,
        "moving down": dy / 0.25,
        "standing still": 0.5,
    }
    motion = max(scores, key=lambda name: scores[name])
    area = float(np.median(weight)) / (height * width)
    return Detection(
        _nearest_colour(background), _nearest_colour(colour), shape, motion, area, growth, dx, dy, turn, bounces, fit
    )


def _opacity(frames: Array, background: Array) -> tuple[Array, Array]:
    """How far each pixel has gone from background to the shape's colour, [F, H, W] in [0, 1]; and that colour [3]."""
    difference = frames - background
    distance = np.sqrt((difference**2).sum(axis=-1))  # [F, H, W]
    strong = distance > max(30.0, 0.5 * float(np.quantile(distance[:, ::2, ::2], 0.99)))
    inside = strong.copy()  # without its rim, whose colours are mixed
    inside[:, 1:] &= strong[:, :-1]
    inside[:, :-1] &= strong[:, 1:]
    inside[:, :, 1:] &= strong[:, :, :-1]
    inside[:, :, :-1] &= strong[:, :, 1:]
    if not inside.any():
        inside = strong
    if not inside.any():
        return np.zeros(distance.shape), background
    colour = np.median(frames[inside], axis=0)
    axis = colour - background
    share = (difference @ axis) / max(float(axis @ axis), 1.0)
    return np.clip((share - 0.25) * 2, 0, 1), colour


def _lab(rgb: Array) -> Array:
    """CIE Lab of sRGB values in 0-255, [..., 3]: distances there are those that an eye sees."""
    linear = np.where(rgb > 10.3, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack((116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])), axis=-1)


def _nearest_colour(rgb: Array) -> str:
    palette = _lab(np.array(list(COLOURS.values()), dtype=np.float64))
    return list(COLOURS)[int(np.argmin(((palette - _lab(rgb)) ** 2).sum(axis=-1)))]


def _grid() -> Array:
    return (np.arange(_GRID) + 0.5) * (2 * _HALF_WIDTH / _GRID) - _HALF_WIDTH


def _normalised(alpha: Array, x: Array, y: Array, side: Array) -> Array:
    """Each frame's shape moved to the middle and scaled to area 1: [F, H, W] → [F, G]."""
    num_frames, height, width = alpha.shape
    column = x[:, None, None] + side[:, None, None] * _grid()[None, None, :] - 0.5 + np.zeros((1, _GRID, 1))
    row = y[:, None, None] + side[:, None, None] * _grid()[None, :, None] - 0.5 + np.zeros((1, 1, _GRID))
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    fx, fy = column - left, row - top
    padded = np.pad(alpha, ((0, 0), (1, 1), (1, 1)))
    frame = np.arange(num_frames)[:, None, None]

    def at(r: NDArray[np.intp], c: NDArray[np.intp]) -> Array:
        return padded[frame, np.clip(r + 1, 0, height + 1), np.clip(c + 1, 0, width + 1)]

    upper = at(top, left) * (1 - fx) + at(top, left + 1) * fx
    lower = at(top + 1, left) * (1 - fx) + at(top + 1, left + 1) * fx
    return (upper * (1 - fy) + lower * fy).reshape(num_frames, -1)


@cache
def _templates() -> tuple[Array, NDArray[np.intp], Array]:
    """Every shape at every turn: opacity [K, G], index of the shape [K], degrees turned [K]."""
    opacity, shapes, angles = [], [], []
    grid = torch.from_numpy(_grid())
    for index, period in enumerate(SYMMETRY_DEGREES):
        for angle in np.arange(0.0, period or _STEP, _STEP):
            cos, sin = float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))
            x, y = cos * grid[None] + sin * grid[:, None], cos * grid[:, None] - sin * grid[None]
            softness = 2 * _HALF_WIDTH / _GRID * 1.5
            opacity.append((0.5 - _DISTANCES[index](x, y) / softness).clamp(0, 1).numpy().reshape(-1))
            shapes.append(index)
            angles.append(angle)
    return np.stack(opacity), np.array(shapes), np.array(angles)


def _shape(cells: Array) -> tuple[str, Array, float]:
    """The shape that fits all frames best, its turn in each frame (degrees, [F]) and how well it fits."""
    opacity, shapes, angles = _templates()
    distance = (cells**2).sum(1)[:, None] + (opacity**2).sum(1)[None] - 2 * cells @ opacity.T  # [F, K], squared
    fit = 1 - distance / ((cells**2).sum(1)[:, None] + (opacity**2).sum(1)[None])
    by_shape = [float(fit[:, shapes == index].max(axis=1).mean()) for index in range(len(SHAPES))]
    best = int(np.argmax(by_shape))
    chosen = fit[:, shapes == best]
    top = chosen.argmax(axis=1)
    if SYMMETRY_DEGREES[best] == 0:
        return SHAPES[best], np.zeros(len(cells)), by_shape[best]
    rows, count = np.arange(len(cells)), chosen.shape[1]
    before, peak, after = chosen[rows, (top - 1) % count], chosen[rows, top], chosen[rows, (top + 1) % count]
    bend = before - 2 * peak + after
    shift = np.where(bend < 0, 0.5 * (before - after) / np.minimum(bend, -1e-12), 0.0)  # of a parabola through three
    return SHAPES[best], angles[shapes == best][top] + shift * _STEP, by_shape[best]


def _total_turn(angles: Array, period: float) -> float:
    """Degrees turned from first to last frame, when a turn by `period` cannot be seen."""
    steps = np.diff(angles)
    return float((steps - period * np.round(steps / period)).sum())


def _bounces(y: Array, least: float = 0.06) -> tuple[int, float]:
    """How often a track [F] of heights turns back by at least `least`, and the way between its ends of travel."""
    turns, extreme, rising = 0, float(y[0]), None
    for value in y[1:]:
        if rising is None:
            if abs(value - extreme) >= least:
                rising, extreme = value > extreme, float(value)
        elif (value > extreme) == rising:
            extreme = float(value)
        elif abs(value - extreme) >= least:
            turns, rising, extreme = turns + 1, not rising, float(value)
    return turns, float(y.max() - y.min())

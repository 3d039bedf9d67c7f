"""Drawn videos of coloured shapes and the sentences that describe them: all that the embedded demo is trained on.

A `Scene` says what is to be seen; `draw` renders scenes as video, `caption` puts one into words (English or Chinese).
Some colour-shape-motion combinations are never drawn for training (`is_held_out`): prompts for them measure what the
demo has understood rather than remembered. Two rules keep the videos free of ambiguity: a circle never spins, and two
colours nearer than `MIN_CONTRAST` (yellow and orange) never meet as shape and background.

Legend: `B` scenes, `A` actors a scene (2 when packed, absent ones unseen), `N` = B * A, `F` frames, `H W` pixels.
Lengths are in units of sqrt(width * height) unless said otherwise, so that areas are fractions of the frame.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (235, 215, 40),
    "orange": (240, 140, 30), "purple": (140, 50, 180), "cyan": (60, 200, 210), "pink": (240, 130, 180),
    "white": (245, 245, 245), "black": (12, 12, 12), "gray": (128, 128, 128),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart")
MOTIONS = (
    "moving left", "moving right", "moving up", "moving down",
    "growing", "shrinking", "spinning", "bouncing", "standing still",
)  # fmt: skip
SIZES = ("small", "normal", "big")
SPEEDS = ("slow", "normal", "fast")
COLOUR_NAMES = tuple(COLOURS)

MIN_CONTRAST = 90.0
"""Least Euclidean RGB distance (0-255) between a shape and what lies behind it."""


@dataclass(frozen=True)
class Actor:
    """One shape and what it does. `place` (four numbers in [0, 1)) fixes everything that the words leave open."""

    colour: str
    shape: str
    motion: str
    size: str = "normal"
    speed: str = "normal"
    place: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Scene:
    """One or two actors on a background; two share the frame side by side (`columns`), else one above the other."""

    actors: tuple[Actor, ...]
    background: str
    columns: bool = False


def _index(combination: tuple[str, str, str]) -> tuple[int, int, int]:
    colour, shape, motion = combination
    return COLOUR_NAMES.index(colour), SHAPES.index(shape), MOTIONS.index(motion)


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination is never trained on.

    Every seventh, along a diagonal of the colour x shape x motion box: every pair (colour and shape, colour and motion,
    shape and motion) is still seen in training, and each colour, shape and motion about as often as any other.
    """
    c, s, m = _index((colour, shape, motion))
    return is_possible(shape, motion) and (c + 2 * s + 4 * m) % 7 == 3


def is_possible(shape: str, motion: str) -> bool:
    """A spinning circle looks like one standing still."""
    return not (shape == "circle" and motion == "spinning")


HELD_OUT: tuple[tuple[str, str, str], ...] = tuple(
    (colour, shape, motion)
    for colour in COLOURS
    for shape in SHAPES
    for motion in MOTIONS
    if is_held_out(colour, shape, motion)
)
"""The combinations (colour, shape, motion) kept out of training."""


def contrast(first: str, second: str) -> float:
    """Euclidean distance of two named colours in RGB (0-255)."""
    return math.dist(COLOURS[first], COLOURS[second])


# ---------------------------------------------------------------------------------------------------------------------
# Choosing scenes


_MOTION_WEIGHTS = tuple({"spinning": 3, "bouncing": 2}.get(motion, 1) for motion in MOTIONS)
"""How often each is drawn for training: what moves most from frame to frame is the hardest to learn."""


def _sample_actor(rng: random.Random, held_out: bool, sizes: Sequence[str]) -> Actor:
    if held_out:
        colour, shape, motion = rng.choice(HELD_OUT)
    else:
        while True:
            colour, shape = rng.choice(COLOUR_NAMES), rng.choice(SHAPES)
            motion = rng.choices(MOTIONS, _MOTION_WEIGHTS)[0]
            if is_possible(shape, motion) and not is_held_out(colour, shape, motion):
                break
    return _with_manner(rng, colour, shape, motion, sizes)


def _with_manner(rng: random.Random, colour: str, shape: str, motion: str, sizes: Sequence[str]) -> Actor:
    """Adds size, speed and place to a combination."""
    size = rng.choice(sizes) if rng.random() < 0.5 else "normal"
    speed = rng.choice(("slow", "fast")) if rng.random() < 0.4 and motion != "standing still" else "normal"
    return Actor(colour, shape, motion, size, speed, (rng.random(), rng.random(), rng.random(), rng.random()))


def _background(rng: random.Random, actors: Sequence[Actor]) -> str:
    fitting = [name for name in COLOURS if all(contrast(name, actor.colour) >= MIN_CONTRAST for actor in actors)]
    return rng.choice(fitting)


def sample_scene(rng: random.Random, *, held_out: bool = False, two_actors: float = 0.18) -> Scene:
    """A random scene: from the training combinations, or (one actor only) from the held-out ones.

    Two actors keep to halves of the frame and so never cover each other: halves above one another where one of them
    moves sideways, side by side where one moves up or down. Pairs that need both are not drawn.
    """
    if held_out or rng.random() >= two_actors:
        actor = _sample_actor(rng, held_out, SIZES)
        return Scene((actor,), _background(rng, (actor,)))
    while True:
        pair = tuple(_sample_actor(rng, False, SIZES[:2]) for _ in range(2))
        sideways = any(actor.motion in ("moving left", "moving right") for actor in pair)
        upright = any(actor.motion in ("moving up", "moving down", "bouncing") for actor in pair)
        same = (pair[0].colour, pair[0].shape) == (pair[1].colour, pair[1].shape)
        if not same and not (sideways and upright):
            return Scene(pair, _background(rng, pair), columns=upright or (not sideways and rng.random() < 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

# Reach of a shape of area 1, upright, from its centroid: left and right, up, down; and all round, for spinning.
_REACH = torch.tensor(
    [
        [0.5642, 0.5642, 0.5642, 0.5642],  # circle
        [0.5000, 0.5000, 0.5000, 0.7071],  # square
        [0.7599, 0.8774, 0.4387, 0.8774],  # triangle, apex up
        [0.8270, 0.8696, 0.7035, 0.8696],  # star, one tip up, inner radius 0.45 of the outer
        [0.6389, 0.4730, 0.6951, 0.6951],  # heart
    ]
)
SYMMETRY_DEGREES = (0.0, 90.0, 120.0, 72.0, 360.0)
"""Least rotation that maps each of `SHAPES` onto itself; 0 for the circle."""

_MARGIN = 0.02
# Area as a fraction of the frame, [lowest, highest], by size; alone and in company (where half a frame must hold it).
_AREA = torch.tensor(
    [[[0.032, 0.040], [0.060, 0.075], [0.105, 0.125]], [[0.032, 0.038], [0.055, 0.070], [0.070, 0.075]]]
)
_GROWN_FROM = torch.tensor(
    [[[0.032, 0.035], [0.042, 0.048], [0.060, 0.065]], [[0.032, 0.033], [0.034, 0.036], [0.036, 0.037]]]
)
_GROWTH = torch.tensor([[2.3, 2.8, 2.9], [2.1, 2.25, 2.3]])  # ratio of areas, by speed; alone and in company
_TRAVEL = torch.tensor([[0.35, 0.38], [0.46, 0.56], [0.50, 0.62]])  # of the frame's side, where there is room; by speed
_TURNS = torch.tensor([0.55, 0.90, 1.50])
_BOUNCES = torch.tensor([2.0, 3.0, 4.0])

PACKED_WIDTH = 1 + 2 * 15


def pack(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as numbers, so that drawing them needs no Python: float32 [B, PACKED_WIDTH]."""
    rows = []
    for scene in scenes:
        row: list[float] = [COLOUR_NAMES.index(scene.background)]
        company = len(scene.actors) > 1
        for i in range(2):
            if i >= len(scene.actors):
                row += [0.0] * 15
                continue
            actor = scene.actors[i]
            low, high = i / 2, (i + 1) / 2
            region = (0.0, 0.0, 1.0, 1.0) if not company else (low, 0, high, 1) if scene.columns else (0, low, 1, high)
            row += [1.0, float(company)]
            row += [*_index((actor.colour, actor.shape, actor.motion))]
            row += [SIZES.index(actor.size), SPEEDS.index(actor.speed), *region, *actor.place]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def draw(
    scenes: Sequence[Scene], width: int, height: int, num_frames: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Renders scenes: float32 [B, 3, F, H, W] in [-1, 1], edges anti-aliased over one pixel."""
    return draw_packed(pack(scenes).to(device), width, height, num_frames)


@torch.no_grad()
def draw_packed(packed: Tensor, width: int, height: int, num_frames: int) -> Tensor:
    """`draw` for scenes that `pack` has turned into numbers [B, PACKED_WIDTH], on the device where they lie."""
    device = packed.device
    actors = packed[:, 1:].reshape(-1, 15)  # [B*A, 15]
    centre, size, angle = _tracks(actors, width, height, num_frames)
    pixels_per_unit = math.sqrt(width * height)
    x = (torch.arange(width, device=device) + 0.5) / pixels_per_unit
    y = (torch.arange(height, device=device) + 0.5) / pixels_per_unit

    alpha = torch.zeros(len(actors), num_frames, height, width, device=device)
    shape = torch.where(actors[:, 0] > 0, actors[:, 3], -1.0)
    for index, distance in enumerate(_DISTANCES):
        chosen = (shape == index).nonzero().squeeze(1)
        if len(chosen) == 0:
            continue
        scale = size[chosen, :, None, None]  # [n, F, 1, 1]
        dx = (x - centre[chosen, :, 0, None, None]) / scale  # [n, F, 1, W]
        dy = (y[:, None] - centre[chosen, :, 1, None, None]) / scale  # [n, F, H, 1]
        if SHAPES[index] == "circle":  # and no turning back of what is round
            local_x, local_y = dx, dy
        else:
            cos, sin = angle[chosen].cos()[..., None, None], angle[chosen].sin()[..., None, None]
            local_x, local_y = cos * dx + sin * dy, cos * dy - sin * dx
        alpha[chosen] = (0.5 - distance(local_x, local_y) * scale * pixels_per_unit).clamp_(0, 1)

    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 127.5 - 1
    video = palette[packed[:, 0].long()][:, :, None, None, None]  # [B, 3, 1, 1, 1]
    ink = palette[actors[:, 2].long()].view(-1, 2, 3, 1, 1, 1)  # [B, A, 3, 1, 1, 1]
    alpha = alpha.view(-1, 2, 1, num_frames, height, width)  # [B, A, 1, F, H, W]
    for i in range(2):
        video = video + alpha[:, i] * (ink[:, i] - video)
    return video


def _tracks(actors: Tensor, width: int, height: int, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tracks: centres [N, F, 2], sides of squares of the actors' areas [N, F], angles [N, F] (radians, clockwise)."""
    device = actors.device
    company, shape, motion, size, speed = (actors[:, i].long() for i in (1, 3, 4, 5, 6))
    place = actors[:, 11:15]  # [N, 4]
    unit = math.sqrt(width * height)
    frame = torch.tensor([width / unit, height / unit], device=device)
    low, high = (
        actors[:, 7:9] * frame + _MARGIN,
        actors[:, 9:11] * frame - _MARGIN,
    )  # [N, 2]
    is_motion = {name: motion == i for i, name in enumerate(MOTIONS)}
    time = torch.linspace(0, 1, num_frames, device=device)[None]  # [1, F]
    # What is fast arrives early, slows down and stays: the way across is the same, whatever the speed.
    progress = torch.where((speed == 2)[:, None], torch.sin(time.div(0.65).clamp(max=1) * math.pi / 2), time)  # [N, F]

    def between(table: Tensor, row: Tensor, part: Tensor) -> Tensor:
        ends = table.to(device)[company, row] if table.ndim == 3 else table.to(device)[row]
        return ends[:, 0] + (ends[:, 1] - ends[:, 0]) * part

    side = between(_AREA, size, place[:, 3]).sqrt()[:, None].expand(-1, num_frames)  # [N, F]
    side_from = between(_GROWN_FROM, size, place[:, 3]).sqrt()[:, None]
    side_to = side_from * _GROWTH.to(device)[company, speed].sqrt()[:, None]
    growing = side_from + (side_to - side_from) * progress
    shrinking = side_to + (side_from - side_to) * progress
    side = torch.where(is_motion["growing"][:, None], growing, side)
    side = torch.where(is_motion["shrinking"][:, None], shrinking, side)

    reach = _REACH.to(device)[shape] * side.amax(1, keepdim=True)  # [N, 4]
    reach = torch.where(is_motion["spinning"][:, None], reach[:, 3:], reach)
    first = low + reach[:, [0, 1]]  # [N, 2]: where the centre may be
    last = high - reach[:, [0, 2]]
    room = (last - first).clamp(min=0)
    first = torch.where(last < first, (first + last) / 2, first)

    resting = (first + room * place[:, :2])[:, None]  # [N, 1, 2]
    centre = resting.expand(-1, num_frames, -1)
    travel = torch.minimum(between(_TRAVEL, speed, place[:, 2])[:, None] * frame, room)  # [N, 2]
    start = first + (room - travel) * place[:, :2]  # [N, 2]
    for name, axis, forward in (("left", 0, False), ("right", 0, True), ("up", 1, False), ("down", 1, True)):
        way = progress if forward else 1 - progress
        moved = torch.zeros_like(centre) + resting
        moved[:, :, axis] = start[:, axis, None] + travel[:, axis, None] * way
        centre = torch.where(is_motion[f"moving {name}"][:, None, None], moved, centre)
    # Arcs of a ball on the ground, whole ones, and never fewer than four frames each.
    bounces = _BOUNCES.to(device)[speed].clamp(max=max((num_frames - 1) // 4, 1))[:, None]
    jump = torch.minimum((0.32 + 0.14 * place[:, 2]) * frame[1], room[:, 1])[:, None]
    ground = (first[:, 1] + room[:, 1])[:, None] - (room[:, 1:] - jump) * place[:, 1:2] * 0.5
    bounced = centre.clone()
    bounced[:, :, 1] = ground - jump * torch.sin(math.pi * bounces * time).abs()
    centre = torch.where(is_motion["bouncing"][:, None, None], bounced, centre)

    # Clockwise, and never so far in a frame that a symmetric shape seems to stand or to turn back.
    symmetry = torch.tensor(SYMMETRY_DEGREES, device=device)[shape]
    degrees = torch.minimum(360 * _TURNS.to(device)[speed], (num_frames - 1) * symmetry / 3)
    turned = torch.where(is_motion["spinning"], degrees, 0.0)[:, None] * time * (math.pi / 180)
    return centre, side, turned


# Signed distances (negative inside) to the edge of each shape of area 1 with its centroid at the origin; y points down.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - 1 / math.sqrt(math.pi)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.5


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.4387


def _star(x: Tensor, y: Tensor) -> Tensor:
    outer, inner, sector = 0.8696, 0.45 * 0.8696, math.pi / 5
    radius = torch.sqrt(x * x + y * y)
    turn = torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector  # every tip folded onto the upper one
    along, across = radius * turn.cos(), radius * turn.sin().abs()
    normal = (inner * math.sin(sector), outer - inner * math.cos(sector))
    length = math.hypot(*normal)
    return ((along - outer) * normal[0] + across * normal[1]) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # A square on its tip and two half discs, after I. Quilez, "2D distance functions"; the tip at the origin, y up.
    scale = 1.0584
    x, y = x.abs() / scale, 0.6567 - y / scale
    lobe = torch.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(0.125)
    half = 0.5 * (x + y).clamp(min=0)
    flank = torch.sqrt(torch.minimum(x * x + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, flank) * scale


_DISTANCES = (_circle, _square, _triangle, _star, _heart)


# ---------------------------------------------------------------------------------------------------------------------
# Words

_EN_COLOUR = {name: (name,) for name in COLOURS} | {
    "gray": ("gray", "gray", "grey"),
    "purple": ("purple", "purple", "violet"),
}
_EN_SHAPE = {
    "circle": ("circle", "circle", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "star", "star", "five-pointed star"),
    "heart": ("heart", "heart", "heart", "heart shape"),
}
_EN_SIZE = {"small": ("small", "small", "small", "little", "tiny"), "big": ("big", "big", "big", "large", "huge")}
_EN_SPEED = {
    "slow": ("slowly", "slowly", "slowly", "gently", "at a slow pace"),
    "fast": ("fast", "quickly", "fast", "rapidly", "at high speed"),
}
_EN_GO = (("moves", "moving"), ("moves", "moving"), ("moves", "moving"), ("slides", "sliding"), ("glides", "gliding"),
          ("drifts", "drifting"), ("travels", "travelling"), ("goes", "going"), ("flies", "flying"))  # fmt: skip
_EN_WHERE = {
    "left": ("left", "left", "to the left", "to the left", "leftwards", "towards the left", "from right to left"),
    "right": (
        "right",
        "right",
        "to the right",
        "to the right",
        "rightwards",
        "towards the right",
        "from left to right",
    ),
    "up": ("up", "up", "upwards", "upward", "to the top", "from bottom to top"),
    "down": ("down", "down", "downwards", "downward", "to the bottom", "from top to bottom"),
}
# (finite, gerund) pairs; speed words go behind.
_EN_ACT = {
    "growing": (("grows", "growing"), ("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding"),
                ("becomes larger", "becoming larger"), ("grows in size", "growing in size")),
    "shrinking": (("shrinks", "shrinking"), ("shrinks", "shrinking"), ("gets smaller", "getting smaller"),
                  ("contracts", "contracting"), ("becomes smaller", "becoming smaller")),
    "spinning": (("spins", "spinning"), ("spins", "spinning"), ("rotates", "rotating"),
    ("turns around", "turning around"),
                 ("spins around", "spinning around"), ("twirls", "twirling")),
    "bouncing": (("bounces", "bouncing"), ("bounces", "bouncing"), ("bounces up and down", "bouncing up and down"),
                 ("hops", "hopping"), ("jumps up and down", "jumping up and down")),
    "standing still": (("stands still", "standing still"), ("stands still", "standing still"),
                       ("stays still", "staying still"), ("does not move", "not moving"),
                       ("remains still", "remaining still"),
                       ("stays in place", "staying in place"), ("is motionless", "motionless"),
                       ("is static", "static")),
}  # fmt: skip
_EN_BACKGROUND = ("on a {} background",) * 5 + (
    "against a {} background", "over a {} background", "with a {} background", "in front of a {} background",
    "on {}", "on a {} backdrop",
)  # fmt: skip
_EN_OPENING = ("a video of ",) * 4 + (
    "video of ", "an animation of ", "a short clip of ", "a simple animation showing ", "this is ", "there is ",
    "a cinematic shot of ", "a high quality video of ", "please show ", "make a video with ", "in this scene, ",
    "we see ", "imagine ", "a beautiful, detailed rendering of ", "4k, ", "draw me ", "the camera films ",
)  # fmt: skip
_EN_CLOSING = (", flat colors", ", clean edges", ", high quality", ", minimal style", ", smooth motion", ", 4k",
               " in a quiet scene", " for our story", ", cartoon style", " today", ", beautiful light",
               " again")  # fmt: skip
_EN_EXTRA = (
    "shiny",
    "cute",
    "pretty",
    "nice",
    "simple",
    "single",
    "lovely",
    "flat",
    "plain",
    "geometric",
    "bright",
    "lonely",
)

_ZH_COLOUR = {
    "red": ("红色", "红"), "green": ("绿色", "绿"), "blue": ("蓝色", "蓝"), "yellow": ("黄色", "黄"),
    "orange": ("橙色", "橘色"),
    "purple": ("紫色", "紫"), "cyan": ("青色", "青"), "pink": ("粉色", "粉红色"), "white": ("白色", "白"),
    "black": ("黑色", "黑"),
    "gray": ("灰色", "灰"),
}  # fmt: skip
_ZH_SHAPE = {
    "circle": ("圆形", "圆形", "圆", "圆圈", "圆球"), "square": ("正方形", "方形", "方块"), "triangle": ("三角形",),
    "star": ("星星", "五角星", "星形"), "heart": ("心形", "爱心", "心"),
}  # fmt: skip
_ZH_SIZE = {"small": ("小", "小", "小小的", "很小的"), "big": ("大", "大", "大大的", "很大的", "巨大的")}
_ZH_SPEED = {"slow": ("慢慢地", "缓慢地", "缓缓地", "慢速"), "fast": ("快速地", "迅速地", "飞快地", "快速")}
_ZH_GO = ("移动", "移动", "移动", "滑动", "飘动", "运动", "走", "飞")
_ZH_WHERE = {
    "left": ("向左", "向左", "往左", "朝左", "从右向左", "向左边"), "right": ("向右", "向右", "往右", "朝右",
    "从左向右", "向右边"),
    "up": ("向上", "向上", "往上", "朝上", "从下向上", "向上方"), "down": ("向下", "向下", "往下", "朝下",
    "从上向下", "向下方"),
}  # fmt: skip
_ZH_ACT = {
    "growing": ("变大", "变大", "逐渐变大", "长大", "放大"), "shrinking": ("缩小", "缩小", "变小", "逐渐缩小", "收缩"),
    "spinning": ("旋转", "旋转", "转动", "转圈", "自转"), "bouncing": ("弹跳", "弹跳", "上下弹跳", "跳动", "蹦跳"),
    "standing still": ("静止不动", "静止", "不动", "站着不动", "保持不动", "原地不动"),
}  # fmt: skip
_ZH_OPENING = (
    "视频：",
    "一段视频，",
    "一个视频：",
    "动画：",
    "画面中，",
    "画面里有",
    "镜头中，",
    "请生成",
    "高清视频，",
    "一段简单的动画，",
)
_ZH_CLOSING = ("，高清", "，画面简洁", "，边缘清晰", "，动作流畅", "，卡通风格", "，好看")


def _subject_en(actor: Actor, rng: random.Random, article: bool) -> str:
    words = [rng.choice(_EN_COLOUR[actor.colour]), rng.choice(_EN_SHAPE[actor.shape])]
    if actor.size in _EN_SIZE and rng.random() < 0.9:
        words.insert(0, rng.choice(_EN_SIZE[actor.size]))
    if rng.random() < 0.05:
        words.insert(0, rng.choice(_EN_EXTRA))
    if not article:
        return " ".join(words)
    first = rng.choice(("a", "a", "a", "a", "the", "one"))
    return " ".join(["an" if first == "a" and words[0][0] in "aeiou" else first, *words])


def _action_en(actor: Actor, rng: random.Random, finite: bool) -> str:
    if actor.motion.startswith("moving"):
        verb = rng.choice(_EN_GO)[0 if finite else 1]
        words = [verb, rng.choice(_EN_WHERE[actor.motion.split()[1]])]
    else:
        words = [rng.choice(_EN_ACT[actor.motion])[0 if finite else 1]]
    if actor.speed in _EN_SPEED and rng.random() < 0.9:
        speed = rng.choice(_EN_SPEED[actor.speed])
        place = rng.random()
        if place < 0.25 and speed.endswith("ly"):
            words.insert(0, speed)
        elif place < 0.5 and len(words) == 2:
            words.insert(1, speed)
        else:
            words.append(speed)
    return " ".join(words)


def _english(scene: Scene, rng: random.Random, background: bool) -> str:
    colour = rng.choice(_EN_COLOUR[scene.background])
    kind = rng.random()
    if kind < 0.14:  # a bare list of keywords
        parts = [p for actor in scene.actors for p in (_subject_en(actor, rng, False), _action_en(actor, rng, False))]
        if background:
            parts.insert(len(parts) if rng.random() < 0.8 else 0, f"{colour} background")
        return ", ".join(parts)
    finite = kind < 0.55
    clauses = []
    for actor in scene.actors:
        subject = _subject_en(actor, rng, article=rng.random() < 0.93)
        action = _action_en(actor, rng, finite)
        link = rng.random()
        if finite and link < 0.08 and not action.startswith(("is ", "does ")):
            action = f"that {action}" if rng.random() < 0.5 else f"which {action}"
        elif not finite and link < 0.2:
            action = f"is {action}"
        clauses.append(f"{subject} {action}")
    text = rng.choice((" and ", " and ", ", and ", ", ", " while ")).join(clauses)
    if background:
        where = rng.choice(_EN_BACKGROUND).format(colour)
        if where.split()[1] in ("a",) and colour[0] in "aeiou":
            where = where.replace(" a ", " an ", 1)
        place = rng.random()
        if place < 0.72:
            text = f"{text} {where}"
        elif place < 0.82:
            text = f"{where}, {text}"
        elif place < 0.92 or len(scene.actors) > 1:
            text = f"{text}{rng.choice(('; ', '. ', ', '))}the background is {colour}"
        else:
            actor = scene.actors[0]
            text = f"{_subject_en(actor, rng, True)} {where} {_action_en(actor, rng, False)}"
    if rng.random() < 0.3:
        text = rng.choice(_EN_OPENING) + text
    if rng.random() < 0.12:
        text += rng.choice(_EN_CLOSING)
    return text


def _subject_zh(actor: Actor, rng: random.Random) -> str:
    colour = rng.choice(_ZH_COLOUR[actor.colour])
    if len(colour) == 1 or rng.random() < 0.7:
        colour += "的" if len(colour) > 1 else ("色的" if rng.random() < 0.4 else "")
    size = rng.choice(_ZH_SIZE[actor.size]) if actor.size in _ZH_SIZE and rng.random() < 0.9 else ""
    shape = rng.choice(_ZH_SHAPE[actor.shape])
    count = rng.choice(("一个", "一个", "一个", "", "一颗" if actor.shape in ("star", "heart") else "一个"))
    return count + (size + colour if size.endswith("的") or rng.random() < 0.3 else colour + size) + shape


def _action_zh(actor: Actor, rng: random.Random) -> str:
    if actor.motion.startswith("moving"):
        act = rng.choice(_ZH_WHERE[actor.motion.split()[1]]) + rng.choice(_ZH_GO)
    else:
        act = rng.choice(_ZH_ACT[actor.motion])
    speed = rng.choice(_ZH_SPEED[actor.speed]) if actor.speed in _ZH_SPEED and rng.random() < 0.9 else ""
    return speed + act


def _chinese(scene: Scene, rng: random.Random, background: bool) -> str:
    colour = rng.choice(_ZH_COLOUR[scene.background])
    full = colour if colour.endswith("色") else colour + "色"
    if rng.random() < 0.14:
        parts = [p for actor in scene.actors for p in (_subject_zh(actor, rng), _action_zh(actor, rng))]
        if background:
            parts.append(full + "背景")
        return "，".join(parts)
    clauses = []
    for actor in scene.actors:
        subject, action = _subject_zh(actor, rng), _action_zh(actor, rng)
        still = actor.motion == "standing still"
        pattern = rng.random()
        if pattern < 0.15 and not still:
            clauses.append(f"{action}的{subject}")
        else:
            clauses.append(subject + ("" if still or pattern < 0.6 else rng.choice(("在", "正在"))) + action)
    text = rng.choice(("，", "和", "，", "，同时")).join(clauses)
    if background:
        pattern = rng.random()
        if pattern < 0.4:
            text = f"在{full}{rng.choice(('', '的'))}背景上，{text}"
        elif pattern < 0.6:
            text = f"{full}背景上{rng.choice(('', '，', '有'))}{text}"
        elif pattern < 0.8:
            text = f"{text}，背景是{full}{rng.choice(('', '的'))}"
        else:
            text = f"{text}，{full}{rng.choice(('', '的'))}背景"
    if rng.random() < 0.25:
        text = rng.choice(_ZH_OPENING) + text
    if rng.random() < 0.1:
        text += rng.choice(_ZH_CLOSING)
    return text


def caption_with_background(scene: Scene, rng: random.Random, *, chinese: bool | None = None) -> tuple[str, bool]:
    """A sentence for a scene, and whether it names the background. Colour, shape and motion are always named."""
    chinese = rng.random() < 0.35 if chinese is None else chinese
    background = rng.random() < 0.65
    if chinese:
        text = _chinese(scene, rng, background)
        return text + rng.choice(("", "", "。", "。", "！")), background
    text = _english(scene, rng, background)
    if rng.random() < 0.04:  # a word that nobody knows must not derail the rest
        letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
        words = text.split(" ")
        words.insert(rng.choice((0, len(words))), letters)
        text = " ".join(words)
    style = rng.random()
    text = text[0].upper() + text[1:] if style < 0.55 else text.upper() if style < 0.57 else text
    return text + rng.choice(("", "", ".", ".", ".", "!")), background


def caption(scene: Scene, rng: random.Random) -> str:
    """A freely varied sentence for a scene: English in about 65 of 100 cases, else Chinese."""
    return caption_with_background(scene, rng)[0]


def evaluation_prompts(n: int = 60, seed: int = 0) -> list[tuple[str, Scene]]:
    """`n` prompts with the scenes they describe: one actor each, held-out combinations only, no combination twice while
    there are others, every third prompt in Chinese. The same `n` and `seed` give the same prompts for ever."""
    rng = random.Random(f"evaluation {seed}")
    combinations: list[tuple[str, str, str]] = []
    while len(combinations) < n:
        combinations += rng.sample(HELD_OUT, len(HELD_OUT))
    prompts = []
    for i, combination in enumerate(combinations[:n]):
        actor = _with_manner(rng, *combination, SIZES)
        scene = Scene((actor,), _background(rng, (actor,)))
        prompts.append((caption_with_background(scene, rng, chinese=i % 3 == 2)[0], scene))
    return prompts

"""What every stage of the demo's training shares: sizes, clock, saved states, averages, scenes with captions, sheets.

Legend: B batch, C latent channels, T H W latent grid (F = 4 (T - 1) + 1 frames of 8H x 8W pixels), M text tokens.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_data
import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):  # wan22 itself, and the detector
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from wan22.config import DEFAULT_TASK, MODEL_SPECS  # noqa: E402

SPEC = MODEL_SPECS[DEFAULT_TASK]
TRAINED_LEN = 56
"""Context rows in training. The published model attends to 512, the ones behind the prompt all alike (zeros before the
text embedding): the last of these 56 stands for 457 of them by log(457) = 6.125 on its attention scores, which bfloat16
holds exactly enough. The same function at a ninth of the cost."""


@dataclass(frozen=True)
class Size:
    """A kind of batch: its clips' size, its share of the steps, clips in it (an expert's) and in the pool behind it."""

    width: int
    height: int
    num_frames: int
    share: float
    batch: int
    pool: int = 0

    @property
    def latent(self) -> tuple[int, int, int]:
        """T, H, W."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8


def say(*words: object) -> None:
    print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Time and state


class Clock:
    """How much of a stage's time has passed, this command's and earlier ones' together."""

    def __init__(self, minutes: float, total_minutes: float | None, before: float) -> None:
        self.limit, self.before, self.start = 60 * minutes, before, time.monotonic()
        self.total = 60 * (total_minutes if total_minutes is not None else minutes)

    @property
    def here(self) -> float:
        """Seconds since this command began."""
        return time.monotonic() - self.start

    @property
    def elapsed(self) -> float:
        return self.before + self.here

    @property
    def fraction(self) -> float:
        return min(1.0, self.elapsed / self.total)

    @property
    def over(self) -> bool:
        return self.here >= self.limit or self.fraction >= 1

    def learning_rate(self, peak: float, warmup: float = 0.015) -> float:
        """Linear warm-up, then a half cosine to zero at the end of the stage's time."""
        return (
            peak
            * min(1.0, (self.fraction + 1e-4) / warmup, (self.here + 0.1) / 8)
            * 0.5
            * (1 + math.cos(math.pi * self.fraction))
        )


def save(path: Path, state: dict[str, Any]) -> None:
    """Written beside its target, then renamed: a kill leaves the old state."""
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


class Average:
    """Exponential moving average of parameters, float32."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.source = {f"{key}.{name}": p for key, module in modules.items() for name, p in module.named_parameters()}
        self.value = {name: p.detach().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.value.values()), [p.detach() for p in self.source.values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The modules hold the average within, and their own weights again after."""
        own = {name: p.detach().clone() for name, p in self.source.items()}
        self.assign(self.value)
        try:
            yield
        finally:
            self.assign(own)

    @torch.no_grad()
    def assign(self, values: dict[str, Tensor]) -> None:
        for name, p in self.source.items():
            p.copy_(values[name])

    def load(self, values: dict[str, Tensor]) -> None:
        for name, value in self.value.items():
            value.copy_(values[name])

    def settle(self) -> None:
        """The modules hold the average from now on."""
        self.assign(self.value)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def set_up(args: argparse.Namespace) -> torch.device:
    """Device and the switches that training is fast with. Exactness is for the checkpoint's users, not its training."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed + int(time.time()) % 100000)  # a resumed stage must not repeat its noise
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if device.type == "cuda":
        from torch import _dynamo

        _dynamo.config.suppress_errors = True  # what does not compile runs uncompiled
        _dynamo.config.recompile_limit = 64
    return device


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and their captions, drawn up once by all processor cores

LABELS = ("colour", "shape", "motion", "size", "speed")
CLASSES = tuple(
    len(v) for v in (demo_data.COLOURS, demo_data.SHAPES, demo_data.MOTIONS, demo_data.SIZES, demo_data.SPEEDS)
)


@dataclass
class Bank:
    """Scenes to draw, packed, and for each several captions as token ids.

    packed float32 [N, P]; ids int16 [N, K, TRAINED_LEN - 1], padded with 0; background int64 [N, K], -100 where the
    caption does not name it.
    """

    packed: Tensor
    ids: Tensor
    background: Tensor

    def labels(self, scenes: Tensor, captions: Tensor) -> Tensor:
        """What the captions say: int64 [B, 11], five attributes of each actor, then the background; -100 for unsaid."""
        actors = self.packed[scenes, 1:].reshape(-1, 2, 15)
        said = torch.where(actors[:, :, :1] > 0, actors[:, :, 2:7], -100.0).long().flatten(1)
        return torch.cat((said, self.background[scenes, captions, None]), dim=1)


def _bank_part(job: tuple[int, int, int, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A worker's share of a `Bank`: (count, captions a scene, seed, tokenizer file) → numpy arrays."""
    from tokenizers import Tokenizer

    count, captions, seed, file = job
    rng = random.Random(seed)
    torch.set_num_threads(1)
    scenes = [demo_data.sample_scene(rng) for _ in range(count)]
    ids = np.zeros((count, captions, TRAINED_LEN - 1), np.int16)
    background = np.full((count, captions), -100, np.int64)
    if captions:
        tokenizer = Tokenizer.from_file(file)
        for i, scene in enumerate(scenes):
            for k in range(captions):
                while True:  # a caption too long for training is a rare one: another is drawn
                    text, named = demo_data.caption_with_background(scene, rng)
                    tokens = tokenizer.encode(text).ids
                    if len(tokens) < TRAINED_LEN:
                        break
                ids[i, k, : len(tokens)] = tokens
                if named:
                    background[i, k] = demo_data.COLOUR_NAMES.index(scene.background)
    return demo_data.pack(scenes).numpy(), ids, background


def tokenizer_file(work: Path) -> Path:
    """The tokenizer that training made, else the package's."""
    own = work / "tokenizer/tokenizer.json"
    return own if own.exists() else ROOT / "wan22/demo/google/umt5-xxl/tokenizer.json"


def make_bank(count: int, captions: int, seed: int, work: Path, device: torch.device) -> Bank:
    start = time.monotonic()
    processes = max(1, min(16, (os.cpu_count() or 2) - 1))
    jobs = [
        (count // processes, captions, seed * 1000 + i, str(tokenizer_file(work)))
        for i in range(processes)
    ]
    if processes == 1:
        parts = [_bank_part(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_bank_part, jobs)
    packed, ids, background = (
        torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*parts, strict=True)
    )
    say(f"{len(packed)} scenes with {captions} captions each in {time.monotonic() - start:.1f} s")
    return Bank(packed, ids, background)


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def to_frames(video: Tensor) -> np.ndarray:
    """[B, 3, F, H, W] in [-1, 1] → uint8 [B, F, H, W, 3]."""
    return ((video.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def write_sheet(frames: np.ndarray, path: Path, columns: int = 8) -> None:
    """A PNG with a row a video, `columns` frames each: uint8 [B, F, H, W, 3]."""
    from PIL import Image

    chosen = frames[:, np.linspace(0, frames.shape[1] - 1, columns).round().astype(int)]
    chosen = np.pad(chosen, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(row), axis=1) for row in chosen]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path, optimize=True)

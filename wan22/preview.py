"""What a run looks like while it works: a small animated picture of its latents, by a linear map, without the VAE.

The map is fitted once for each VAE, by the VAE's own encoder: pictures drawn here (plain colours, soft fields, hard
edges) become latents, and least squares gives the colour of each 8 x 8 patch from its latents. It is kept in a file
under the VAE's identity. What is shown is not the noisy latents but what the last step took to be the clean ones.

All of it happens in a thread of its own, which the run waits for only when it ends.

Legend: C latent channels, T H W latent grid, F pixel frames.
"""

import contextlib
import io
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan22.checkpoint import Checkpoint
from wan22.config import DEFAULT_TASK, MODEL_SPECS, Request, RequestError
from wan22.machine import cache_folder
from wan22.output.names import PREVIEW, beside, staging_prefix
from wan22.vae import VideoVAE

EVERY = 2.0  # seconds between two previews
LONGEST = 320  # pixels of a preview's longer side, at most
RIDGE = 1e-3  # of the mean square of the latents: keeps the map small where a VAE leaves channels unused
PICTURES, SIDE, FRAMES = 24, 64, 5  # that the map is fitted to: a latent frame of 1, and one of 4
FORMAT = 1  # of the file that keeps a map


class Preview:
    """The preview of one run: `look` after each step, `close` at the end."""

    def __init__(self, checkpoint: Checkpoint, request: Request, output: Path, warn: Callable[[str], None]) -> None:
        """Raises RequestError where Pillow cannot write one."""
        check_preview()
        self.path = preview_path(output)
        self._partial = output.with_name(staging_prefix(output) + "preview")
        self._checkpoint, self._warn = checkpoint, warn
        self._duration = round(1000 * 4 / request.fps)  # milliseconds: a latent frame stands for 4 of the video
        self._last = 0.0
        self._failed = False
        self._map: tuple[Tensor, Tensor] | None = None
        self._worker: threading.Thread | None = None

    def look(self, clean: Callable[[], Tensor]) -> None:
        """A step is done. clean: makes the latents [C, T, H, W] to show, called only where they are going to be."""
        if self._failed or (self._worker and self._worker.is_alive()) or time.monotonic() - self._last < EVERY:
            return
        self._last = time.monotonic()
        latents = clean()
        ready = None
        if latents.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(latents.device))
        self._worker = threading.Thread(target=self._write, args=(latents, ready), daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Wait for the one that is being written."""
        if self._worker:
            self._worker.join()

    def _write(self, latents: Tensor, ready: Any) -> None:
        try:
            if ready is not None:
                with torch.cuda.stream(torch.cuda.Stream(latents.device)):
                    ready.wait()
                    latents = latents.to("cpu")
            self._map = self._map or kept_map(self._checkpoint)
            data = animate(to_rgb(latents, *self._map), self._duration)
            self._partial.write_bytes(data)
            os.replace(self._partial, self.path)
        except (OSError, RuntimeError, RequestError) as error:  # a picture less; the run goes on
            self._failed = True
            self._warn(f"no preview: {getattr(error, 'strerror', None) or str(error).partition(chr(10))[0]}")
        finally:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)


def preview_path(output: Path) -> Path:
    """Where an output's preview lies: `NAME.preview.webp` beside it."""
    return beside(output, PREVIEW)


def check_preview() -> None:
    """Raises RequestError where Pillow cannot write one."""
    from PIL import features

    if not features.check("webp"):
        raise RequestError("--preview: this Pillow was built without WebP", hint="pip install --force-reinstall pillow")


def to_rgb(latents: Tensor, weights: Tensor, bias: Tensor) -> np.ndarray:
    """[C, T, H, W] float32 → [T, H, W, 3] uint8, by weights [3, C] and bias [3]."""
    pixels = torch.einsum("rc,cthw->thwr", weights, latents.float()) + bias
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def animate(frames: np.ndarray, duration: int) -> bytes:
    """[T, H, W, 3] uint8, so many milliseconds each → an animated WebP, enlarged where it is small."""
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = max(1, min(8, LONGEST // max(height, width)))
    size = (scale * width, scale * height)
    images = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=duration, loop=0, quality=80,
                   method=2)  # fmt: skip
    return buffer.getvalue()


# --- the map ---------------------------------------------------------------------------------------------------------
def kept_map(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """The map of a checkpoint's VAE: weights [3, C], bias [3]. Fitted once, then read. Raises RequestError, OSError."""
    path = cache_folder() / f"preview-{checkpoint.vae_identity()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        weights, bias = torch.tensor(kept["weights"]), torch.tensor(kept["bias"])
        shaped = weights.shape == (3, MODEL_SPECS[DEFAULT_TASK].latent_channels) and bias.shape == (3,)
        if kept["format"] == FORMAT and shaped and weights.isfinite().all() and bias.isfinite().all():
            return weights, bias
    weights, bias = fit_map(VideoVAE(checkpoint, torch.device("cpu")).encode)
    with contextlib.suppress(OSError):  # made again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        partial.write_text(json.dumps({"format": FORMAT, "weights": weights.tolist(), "bias": bias.tolist()}))
        os.replace(partial, path)
    return weights, bias


def fit_map(encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Least squares from latents to colours: weights [3, C], bias [3]. encode: frames [3, F, H, W] in -1…1 → latents
    [C, T, H/8, W/8]."""
    inputs, colours = [], []
    for picture in draw_pictures(PICTURES):
        latents = encode(picture[:, None].expand(-1, FRAMES, -1, -1))  # nothing moves: each latent frame is the picture
        patches = torch.nn.functional.avg_pool2d(picture[None], SIDE // latents.shape[-1])[0]
        for frame in latents.unbind(1):
            inputs.append(frame.flatten(1).T)
            colours.append(patches.flatten(1).T)
    x, y = torch.cat(inputs).double(), torch.cat(colours).double()
    center, middle = x.mean(0), y.mean(0)
    x, y = x - center, y - middle
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, x.T @ y).T
    return weights.float(), (middle - weights @ center).float()


def draw_pictures(count: int) -> list[Tensor]:
    """[3, SIDE, SIDE] float32 in -1…1 each, always the same: plain colours, soft fields, fields with hard edges."""
    generator = torch.Generator().manual_seed(0)

    def field(cells: int) -> Tensor:
        drawn = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        return torch.nn.functional.interpolate(drawn, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[0]

    pictures = []
    for number in range(count):
        picture = field((1, 2, 3, 5)[number % 4])
        if number % 2:
            left, top = (int(torch.randint(0, SIDE // 2, (), generator=generator)) for _ in range(2))
            picture[:, top : top + SIDE // 2, left : left + SIDE // 2] = field(1)[:, :1, :1]
        pictures.append(picture)
    return pictures

"""A prompt becomes a video: the whole way in one screen."""

import platform
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import wan22
from wan22.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from wan22.config import DEFAULT_TASK, MODEL_SPECS, Placement, Precision, Request, RequestError, RunError, data_dir, load_preset
from wan22.experts import Experts
from wan22.load import DTYPES
from wan22.report import Reporter
from wan22.sampling import denoise, describe_split, draw_noise, plan_steps
from wan22.state import latents_path, save_latents
from wan22.text_encoder import TextEncoder, Tokenizer, check_text_encoder
from wan22.vae import VideoVAE, check_vae, to_uint8
from wan22.video import IfExists, check_writable, open_output


@dataclass
class Result:
    """A finished video in memory: frames [F, H, W, 3] uint8, latents [C, T, H/8, W/8] float32, and how it was made."""

    video: np.ndarray
    latents: Tensor
    request: Request
    record: dict[str, Any]

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write .mp4, .gif, .png (a frame sheet) or a folder of frames, the record inside. Raises RequestError."""
        policy: IfExists = "replace" if overwrite else "error"
        check_writable(path, if_exists=policy)
        return _write(path, self.request, self.record, [self.video], policy)


class Pipeline:
    """An opened checkpoint and the settings to run it with; nothing is read before it is needed."""

    def __init__(
        self, checkpoint: Checkpoint, precision: Precision = Precision(), placement: Placement = Placement()  # noqa: B008
    ) -> None:
        """Checks every file's names and shapes; reads no weight. Raises RequestError."""
        self.checkpoint, self.placement = checkpoint, placement
        self.device = _device(placement.device)
        self.precision = precision.resolve(self.device.type)
        self.dtype = DTYPES[self.precision.weights]
        check_text_encoder(checkpoint)
        check_vae(checkpoint)
        self.experts = Experts(checkpoint, self.dtype, self.device, placement.offload)
        self.identity = checkpoint.identity()
        self._contexts: dict[str, Tensor] = {}  # of prompts encoded before, on the CPU

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        precision: Precision | None = None,
        placement: Placement | None = None,
    ) -> Self:
        """model: a folder, `demo`, `owner/name` in the Hugging Face cache; nothing: the usual places.

        `device` and `dtype` are short for `Placement(device=…)` and `Precision(weights=…)`. Raises RequestError.
        """
        checkpoint = open_checkpoint(find_checkpoint(model))
        return cls(checkpoint, precision or Precision(dtype), placement or Placement(device))

    @property
    def is_demo(self) -> bool:
        return self.checkpoint.folder.resolve() == data_dir("demo").resolve()

    def request(self, prompt: str, **settings: Any) -> Request:
        """A request whose defaults are this model's own: the published recipe, or the demo's small videos."""
        defaults = load_preset("demo").request if self.is_demo else {}
        return Request.from_dict({"prompt": prompt, **defaults, **settings})

    def generate(self, request: Request, reporter: Reporter | None = None) -> Result:
        """Make the video in memory. Raises RequestError, RunError."""
        reporter = reporter or Reporter()
        request = self.resolve(request)
        latents = self.denoise(request, reporter)
        with reporter.phase("decode"):
            video = np.concatenate(list(self.decode(latents)))
        return Result(video, latents, request, self.record(request))

    def generate_file(
        self, request: Request, output: Path, if_exists: IfExists, keep_latents: bool, reporter: Reporter
    ) -> Path:
        """Make the video in a file, encoded while it is decoded; the latents are on disk before that starts, and stay
        there where writing fails. Raises RequestError, RunError."""
        latents = self.denoise(request, reporter)
        kept, record = latents_path(output), self.record(request)
        save_latents(kept, latents, record)
        with reporter.phase("decode and write"):
            try:
                path = _write(output, request, record, self.decode(latents), if_exists)
            except RunError as error:
                error.hint = error.hint or f"the latents are kept: {kept}"
                raise
        if keep_latents:
            kept.replace(latents_path(path))
        else:
            kept.unlink()
        return path

    def resolve(self, request: Request) -> Request:
        """The request with everything definite: a seed drawn where none was given. Raises RequestError."""
        if request.noise_device == "cuda" and not torch.cuda.is_available():
            raise RequestError("--noise-device cuda: there is no GPU here")
        return request if request.seed is not None else replace(request, seed=secrets.randbelow(2**32))

    def record(self, request: Request) -> dict[str, Any]:
        """How a video was made, whole enough to make it again; nothing in it depends on time or place."""
        libraries = ("torch", "diffusers", "transformers")
        return {
            "request": request.to_dict(),
            "precision": self.precision.to_dict(),
            "model": "demo" if self.is_demo else self.checkpoint.folder.resolve().name,
            "checkpoint": self.identity,
            "versions": {"wan22": wan22.__version__, "python": platform.python_version()}
            | {name: version(name) for name in libraries},
        }

    def denoise(self, request: Request, reporter: Reporter) -> Tensor:
        """Prompt and noise → latents [C, T, H/8, W/8] float32 on the CPU."""
        steps = plan_steps(request)
        with reporter.phase("encode the text"):
            guided = any(step.guidance != 1 for step in steps)
            prompts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
            contexts = [context.to(self.device) for context in self.encode(prompts, reporter)]
        reporter.note(describe_split(steps, request.spec.experts))
        with reporter.phase("denoise"):
            noise = draw_noise(request, self.device)
            reporter.begin_steps(len(steps))
            try:
                negative = contexts[1] if guided else None
                latents = denoise(
                    request, self.experts, noise, contexts[0], negative,
                    on_step=lambda step: reporter.step(step.index, step.expert, step.timestep),
                )  # fmt: skip
            finally:
                reporter.end_steps()
        if not self.experts.keep_both:
            self.experts.release()
        if not latents.isfinite().all():
            raise RunError("the latents are not finite numbers", hint="check the files: wan22 download --check FOLDER")
        return latents.cpu()

    def encode(self, prompts: list[str], reporter: Reporter) -> list[Tensor]:
        """Prompts → contexts, each [M, text_dim], on the CPU. The encoder leaves the device again."""
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]:
            tokenizer = Tokenizer(self.checkpoint.tokenizer, MODEL_SPECS[DEFAULT_TASK].text_len)
            device = self.device if self.placement.text_encoder == "auto" else torch.device("cpu")
            encoder = TextEncoder(self.checkpoint, self.dtype, device)
            for prompt in missing:
                ids, cut = tokenizer(prompt)
                if cut:
                    reporter.warn(f"the prompt is longer than {tokenizer.max_tokens} tokens; the rest is cut: {prompt[:40]}…")
                self._contexts[prompt] = encoder(ids).cpu()
        return [self._contexts[prompt] for prompt in prompts]

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents → chunks of frames [F, H, W, 3] uint8, as they come."""
        vae = VideoVAE(self.checkpoint, self.device)
        for chunk in vae.decode(latents.to(self.device)):
            yield to_uint8(chunk)



def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def _write(
    path: str | Path, request: Request, record: dict[str, Any], chunks: Any, if_exists: IfExists
) -> Path:
    output = open_output(
        path, width=request.width, height=request.height, fps=request.fps, record=record, if_exists=if_exists
    )
    with output:
        for chunk in chunks:
            output.write(chunk)
    return Path(output.path)

"""What a run does beside its steps, measured: decoding by the VAE, and encoding the text. Rows as in bench.py."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wan22.config import MODEL_SPECS, Request
from wan22.load import DTYPES
from wan22.measuring.clock import Clock
from wan22.pipeline import Pipeline
from wan22.plan import gib, pick_tiles
from wan22.sizes import ITEM
from wan22.text_encoder import TextEncoder
from wan22.vae import VideoVAE, to_uint8
from wan22.vae_sizes import decode_terms

Row = dict[str, Any]
SEED = 2
COMPARED = 9  # latent frames, 33 pixel frames, whose PSNR is told


@torch.inference_mode()
def decode_rows(pipeline: Pipeline, request: Request, against: bool = False) -> Iterator[Row]:
    """Decoding of the request's latents in float32 and in bf16, to bytes on the CPU as in a run; against: by diffusers'
    own `decode` too, in both. PSNR of the first frames to ours in float32. The row of the pipeline's own precision is a
    `phase` of the whole run."""
    device, latents = pipeline.device, random_latents(request)
    exact: Tensor | None = None
    for name in ("float32", "bf16"):
        vae = VideoVAE(pipeline.checkpoint, device, DTYPES[name])
        free = pipeline.experts.memory.free(pipeline.placement.gpu_memory_limit)
        tiles = pick_tiles(latents.shape, pipeline.sizes, free, ITEM[name])
        row = _measured(device, partial(_ours, vae, latents, tiles), partial(_ours, vae, latents[:, :4], tiles))
        start = torch.cat([chunk.cpu() for chunk in vae.decode(latents[:, :COMPARED], tiles)])
        exact = start if exact is None else exact
        predicted = sum(decode_terms(latents.shape, pipeline.sizes.vae_width, tiles, ITEM[name]).values())
        yield row | {"kind": "phase" if name == pipeline.precision.vae else "decode", "name": "decode", "form": name,
                     "psnr": psnr(start, exact), "tiles": list(tiles), "predicted_bytes": predicted}  # fmt: skip
        if against:
            yield _diffusers(device, vae, latents, exact, name, row["seconds"])
        del vae
        pipeline.experts.memory.trim()


def _ours(vae: VideoVAE, latents: Tensor, tiles: tuple[int, int]) -> None:
    for chunk in vae.decode(latents, tiles):
        to_uint8(chunk)


def _diffusers(device: torch.device, vae: VideoVAE, latents: Tensor, exact: Tensor, name: str, ours: float) -> Row:
    """Its model, as `from_pretrained(torch_dtype=…)` has it: contiguous, all of it in that dtype."""
    from diffusers import AutoencoderKLWan

    dtype = DTYPES[name]
    with torch.inference_mode(False):
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(vae.model.config)
        # Ours are channels last, and in bf16 some were rounded already, as all are here. A copy, whatever they are.
        state = {key: tensor.to(dtype).clone(memory_format=torch.contiguous_format)
                 for key, tensor in vae.model.state_dict().items()}  # fmt: skip
        model.requires_grad_(False).eval().load_state_dict(state, strict=True, assign=True)
    z = (latents.to(device)[None] / vae.inverse_std + vae.mean).to(dtype)
    start: list[Tensor] = []

    def decode(latents: Tensor) -> None:
        video = model.decode(latents, return_dict=False)[0][0].transpose(0, 1)
        start[:] = [video[: len(exact)]]
        for chunk in video.split(4):
            to_uint8(chunk)

    row = _measured(device, partial(decode, z), partial(decode, z[:, :, :4]))
    return row | {"kind": "decode", "name": "decode", "form": f"diffusers {name}", "times_ours": row["seconds"] / ours,
                  "psnr": psnr(start[0].float().cpu(), exact)}  # fmt: skip


def _measured(device: torch.device, run: Callable[[], object], short: Callable[[], object]) -> Row:
    short()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = Clock(device)(run, warm_up=False)
    return {"seconds": seconds, "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


@torch.inference_mode()
def text_rows(pipeline: Pipeline, request: Request) -> Iterator[Row]:
    """Encoding of two prompts of full length, after the encoder's weights are there; how long those took is told."""
    device, clock = pipeline.device, Clock(pipeline.device)
    start = time.perf_counter()
    encoder = TextEncoder(pipeline.checkpoint, pipeline.dtype, device)
    loading = time.perf_counter() - start
    vocabulary = encoder.model.config.vocab_size
    ids = torch.arange(MODEL_SPECS[request.task].text_len).remainder(vocabulary).tolist()
    seconds = 2 * clock(partial(encoder, ids), 3)
    yield {"kind": "phase", "name": "text", "form": pipeline.precision.weights, "seconds": seconds,
           "loading_seconds": loading, "psnr": None,
           "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}  # fmt: skip
    del encoder
    pipeline.experts.memory.trim()


def random_latents(request: Request) -> Tensor:
    return torch.randn(request.latent_shape, generator=torch.Generator().manual_seed(SEED))


def psnr(a: Tensor, b: Tensor) -> float | None:
    """Of frames in -1…1, in dB; None where they are the same."""
    error = sum(((x - y).double().square().sum().item() for x, y in zip(a, b, strict=True)), 0.0) / a.numel()
    return 10 * math.log10(4 / error) if error else None


def as_text(row: Row) -> str:
    told = []
    if row.get("times_ours"):
        told.append(f"{row['times_ours']:.2f} x ours")
    if row["psnr"] is not None:
        told.append(f"PSNR {row['psnr']:.1f} dB to float32")
    if row.get("tiles") not in (None, [1, 1]):
        told.append(f"in {row['tiles'][0]} x {row['tiles'][1]} tiles")
    if "loading_seconds" in row:
        told.append(f"two prompts of 512 tokens; weights in {row['loading_seconds']:.1f} s")
    if row["gpu_bytes"]:
        predicted = f", predicted {gib(row['predicted_bytes'])}" if "predicted_bytes" in row else ""
        told.append(f"peak {gib(row['gpu_bytes'])}{predicted}")
    return f"{row['name'] + ', ' + row['form']:<32}{row['seconds']:26.3f}  {', '.join(told)}".rstrip()

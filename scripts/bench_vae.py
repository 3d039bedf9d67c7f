"""The VAE's decode in every way there is to run it: dtype, layout, latent frames at a time, the library's own tuning.

    python scripts/bench_vae.py                       # on a GPU, 720p, 9 of 21 latent frames: about half a minute
    python scripts/bench_vae.py --tune                # cudnn.benchmark too, which tries convolutions out first
    python scripts/bench_vae.py --parts               # where the time of one chunk goes, by kind of kernel
    python scripts/bench_vae.py --size 64x64 --width 8          # anywhere

Random weights of the published size. What the table is to decide are LAYOUT in wan22/vae_decoder.py and CHUNK in
wan22/vae_sizes.py; the whole decode, beside diffusers', is `wan22 bench --no-forward --decode --against diffusers`.
"""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from wan22 import vae_decoder
from wan22.config import parse_size
from wan22.files.part_shapes import vae_shapes
from wan22.measuring.clock import Clock
from wan22.measuring.random_weights import RandomTensors, random_checkpoint
from wan22.vae import VideoVAE, to_uint8

LAYOUTS = {"channels last": torch.channels_last_3d, "contiguous": torch.contiguous_format}


def decode(vae: VideoVAE, latents: torch.Tensor) -> None:
    for chunk in vae.decode(latents):
        to_uint8(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="720p")
    parser.add_argument("--latent-frames", type=int, default=9, help="of 21 in 81 frames")
    parser.add_argument("--width", type=int, default=96, help="the VAE's base width")
    parser.add_argument("--tune", action="store_true", help="with cudnn.benchmark too")
    parser.add_argument("--parts", action="store_true", help="the kernels of the default forms, by the profiler")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, height = parse_size(args.size)
    latents = torch.randn(16, args.latent_frames, height // 8, width // 8)
    tensors = RandomTensors(Path("random VAE"), vae_shapes(args.width), device)
    checkpoint = replace(random_checkpoint(device, layers=1), vae=tensors)
    clock, usual = Clock(device), vae_decoder.LAYOUT.get(device.type, torch.contiguous_format)
    if args.parts:
        for dtype in (torch.float32, torch.bfloat16):
            profile(VideoVAE(checkpoint, device, dtype), latents[:, :5])
        return
    print(f"{'dtype':<10}{'layout':<15}{'frames':>7}{'tuned':>7}{'warm-up, s':>12}{'decode, s':>11}{'peak, GiB':>11}")
    for dtype, chunks in ((torch.float32, (1, 2)), (torch.bfloat16, (1, 2, 4))):
        for name, layout in LAYOUTS.items():
            vae_decoder.LAYOUT[device.type] = layout
            vae = VideoVAE(checkpoint, device, dtype)
            for tuned in (False, True) if args.tune else (False,):
                torch.backends.cudnn.benchmark = tuned
                for vae.chunk in chunks if layout == usual else chunks[:1]:
                    start = time.perf_counter()
                    decode(vae, latents[:, : 2 + 2 * vae.chunk])  # with a shorter last chunk, as there may be
                    warm_up = time.perf_counter() - start
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                    seconds = clock(partial(decode, vae, latents), warm_up=False)
                    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0
                    print(f"{str(dtype).removeprefix('torch.'):<10}{name:<15}{vae.chunk:>7}{tuned!s:>7}{warm_up:>12.2f}"
                          f"{seconds:>11.3f}{peak:>11.2f}", flush=True)  # fmt: skip


def profile(vae: VideoVAE, latents: torch.Tensor) -> None:
    """The kernels that take longest."""
    from torch.profiler import ProfilerActivity

    decode(vae, latents)
    on_gpu = latents.is_cuda or torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        decode(vae, latents)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=14, max_name_column_width=70))


if __name__ == "__main__":
    main()

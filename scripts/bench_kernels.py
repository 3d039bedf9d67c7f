"""Every fused kernel against its byte floor, and every attention backend that is here, at the published model's shapes.

    python scripts/bench_kernels.py              # on a GPU, 720p: 75,600 tokens; some 20 GB and a minute or two
    python scripts/bench_kernels.py --sweep      # row kernels and 8-bit attention with other launch options too
    python scripts/bench_kernels.py --interpret  # on a CPU, tiny, through Triton's interpreter: that all of it runs

A floor is the bytes that an operation cannot avoid to read and write, over the bandwidth of a copy measured here. The
times are medians. Errors are relative to float32, of a few queries from first to last.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when a kernel is defined

import torch
from torch import Tensor

from wan22.attention import BACKENDS, Attend, Shape, reference, relative_error
from wan22.kernels import (
    attention_8bit,
    dispatch,
    gelu,
    gelu_quantize,
    norm_modulate,
    qk_norm_rope,
    quantize_rows,
    rms_norm,
)
from wan22.kernels.gated_residual import gated_residual, gated_residual_norm, gated_residual_norm_modulate

EPS = 1e-6
Row = dict[str, Any]


class Clock:
    """Median seconds of a call."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, run: Callable[[], object], repeats: int | None = None) -> float:
        run()  # compiles
        times = []
        for _ in range(repeats or self.repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)


def fused(
    clock: Clock, length: int, heads: int, head_dim: int, ffn: int
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, bytes that it cannot avoid, the call)."""
    width, device = heads * head_dim, clock.device

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tokens, hidden = length * width, length * ffn
    vector = [draw(1, 1, width, dtype=torch.float32) * 0.1 for _ in range(3)]
    weight = vector[0].flatten()
    x = draw(1, length, width, dtype=torch.float32)
    yield "norm_modulate", 6 * tokens, lambda: norm_modulate(x, vector[0], vector[1], EPS, torch.bfloat16)
    y = draw(1, length, width)
    yield "gated_residual", 10 * tokens, lambda: gated_residual(x, y, vector[0])
    yield "gated_residual_norm", 12 * tokens, lambda: gated_residual_norm(
        x, y, vector[0], weight, weight, EPS, torch.bfloat16)  # fmt: skip
    yield "gated_residual_norm_modulate", 12 * tokens, lambda: gated_residual_norm_modulate(
        x, y, None, vector[1], vector[2], EPS, torch.bfloat16)  # fmt: skip
    yield "rms_norm", 4 * tokens, lambda: rms_norm(y, weight, EPS)
    q, k, _ = draw(1, length, 3 * width).chunk(3, dim=-1)
    angles = draw(length, head_dim // 2, dtype=torch.float32)
    rope = (angles.cos(), angles.sin())
    yield "qk_norm_rope", 8 * tokens, lambda: qk_norm_rope(q, k, weight, weight, rope, heads, EPS)
    h = draw(1, length, ffn)
    yield "gelu", 4 * hidden, lambda: gelu(h)
    yield "gelu_quantize", 3 * hidden, lambda: gelu_quantize(h)
    for dtype, kind in ((torch.float8_e4m3fn, "fp8"), (torch.int8, "int8")):
        yield f"quantize_rows, {kind}", 3 * tokens, partial(quantize_rows, y, dtype)
        yield f"norm_modulate, {kind}", 5 * tokens, partial(norm_modulate, x, vector[0], vector[1], EPS, dtype)
        yield f"gated_residual_norm, {kind}", 11 * tokens, partial(
            gated_residual_norm, x, y, vector[0], weight, weight, EPS, dtype)  # fmt: skip


def bench_fused(clock: Clock, sizes: dict[str, int], bandwidth: float, modes: list[tuple[str, int]]) -> Iterator[Row]:
    for name, nbytes, run in fused(clock, **sizes):
        for mode, warps in modes:
            dispatch.MODE, dispatch.WARPS = mode, warps
            seconds, floor = clock(run), nbytes / bandwidth
            yield {"kind": "kernel", "name": name, "form": f"{mode}{f', {warps} warps' if warps else ''}",
                   "seconds": seconds, "floor": floor, "of_floor": floor / seconds}  # fmt: skip


def bench_products(clock: Clock, length: int, heads: int, head_dim: int, ffn: int) -> Iterator[Row]:
    """q, k and v as one product; and GELU in the first product's epilogue (a private function of PyTorch), which would
    save the kernel and rounds once less."""
    width, dtype = heads * head_dim, torch.bfloat16
    x = torch.randn(length, width, device=clock.device, dtype=dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=clock.device, dtype=dtype) / 64

    weight, bias, wide, bias_wide = draw(3 * width, width), draw(3 * width), draw(ffn, width), draw(ffn)
    linear = torch.nn.functional.linear
    parts = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
    for name, flops, run in (
        ("q, k, v: three products", 6 * width * width, lambda: [linear(x, *part) for part in parts]),
        ("q, k, v: one product", 6 * width * width, lambda: linear(x, weight, bias)),
        ("feed-forward's first, then gelu", 2 * width * ffn, lambda: gelu(linear(x, wide, bias_wide))),
        ("feed-forward's first, gelu inside", 2 * width * ffn,
         lambda: torch._addmm_activation(bias_wide, x, wide.t(), use_gelu=True)),
    ):  # fmt: skip
        seconds = clock(run)
        yield {"kind": "product", "name": name, "seconds": seconds, "tflops": flops * length / seconds / 1e12}


# Two programs of 64 queries on a multiprocessor let one's softmax run beside the other's products; one of 128 reads the
# keys half as often.
FORMS = [
    attention_8bit.Form(queries, keys, warps, stages)
    for queries, warps in ((64, 4), (128, 4), (128, 8)) for keys in (64, 128) for stages in (2, 3, 4)
]  # fmt: skip


def attentions(sweep: bool) -> Iterator[tuple[str, Callable[[], Attend]]]:
    """(name, how to come by it): every backend, ours in all its forms, and FlashAttention 3's FP8, plain and smoothed
    around."""
    for name, backend in BACKENDS.items():
        if name not in ("int8", "int8-bf16", "math"):
            yield name, backend.find

    def ours(pv: str, form: attention_8bit.Form | None) -> Attend:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attention_8bit.FORM = form
            return attention_8bit.attend_8bit(q, k, v, pv)

        return run

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    for pv in attention_8bit.PV:
        yield f"int8 scores, {pv}", partial(ours, pv, None)
        if pv == "int8" and hopper:
            yield "int8 scores, int8, Hopper's own", partial(ours, pv, attention_8bit.HOPPER)
        for form in FORMS if sweep else ():
            said = f"{form.queries} queries, {form.keys} keys, {form.warps} warps, {form.stages} stages"
            yield f"int8 scores, {pv}, {said}", partial(ours, pv, form)

    def fa3() -> Any:
        from fa3_fwd_interface import flash_attn_func

        return flash_attn_func

    def plain_fp8() -> Attend:
        kernel = fa3()

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = kernel(*(x.to(attention_8bit.FP8) for x in (q, k, v)))
            return out[0] if isinstance(out, tuple) else out

        return run

    yield "fa3, fp8", plain_fp8
    yield "fa3, fp8, smoothed around", lambda: lambda q, k, v: attention_8bit.attend_around_fp8(q, k, v, fa3())


def bench_attention(clock: Clock, shape: Shape, sweep: bool) -> Iterator[Row]:
    """At the full length. Queries and keys have a few channels 20 times the others, and keys a mean: the errors are
    those of realistic numbers."""
    size = (1, shape.length, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device=clock.device, dtype=torch.bfloat16) for _ in range(3))
    q[..., ::41] *= 20
    k[..., 1::41] *= 20
    some = slice(None, None, max(1, shape.length // 256))
    scores = torch.einsum("blnd,bmnd->bnlm", q[:, some].float(), k[:, some].float())
    q /= scores.std() / (3 * math.sqrt(shape.head_dim))
    k += 10 * torch.randn(1, 1, *size[2:], device=clock.device, dtype=torch.bfloat16)
    rows = torch.linspace(0, shape.length - 1, min(48, shape.length), device=clock.device).long()
    expected = reference(q[:, rows], k, v)
    flops = 4 * shape.length**2 * shape.heads * shape.head_dim
    seconds = clock(partial(attention_8bit.prepare, q, k, 128), repeats=5)
    name = "part of ours: q and k smoothed and quantized"
    yield {"kind": "attention", "name": name, "seconds": seconds, "tflops": 0.0}
    for name, find in attentions(sweep):
        row: Row = {"kind": "attention", "name": name}
        try:
            function = find()
            out = function(q, k, v)
            seconds = clock(partial(function, q, k, v), repeats=min(clock.repeats, 5))
            error = relative_error(out[:, rows], expected)
            cosine = torch.cosine_similarity(out[:, rows].flatten().double(), expected.flatten().double(), dim=0).item()
            row |= {"seconds": seconds, "tflops": flops / seconds / 1e12, "error": error, "cosine": cosine}
        except Exception as why:  # absent, or not for this device
            row["absent"] = " ".join(str(why).split())[:80]
        yield row


def copy_bandwidth(clock: Clock, nbytes: int) -> float:
    """Bytes a second of a copy on the device, those read and those written."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock(lambda: target.copy_(source))


def as_text(row: Row) -> str:
    if "absent" in row:
        return f"{row['name']:<48} {'–':>10}  {row['absent']}"
    text = f"{row['name']:<{32 if 'floor' in row else 48}}" + (f" {row['form']:<15}" if "form" in row else "")
    text += f" {1e3 * row['seconds']:>8.2f} ms"
    if "floor" in row:
        return text + f"  floor {1e3 * row['floor']:6.2f} ms  {row['of_floor']:4.0%} of it"
    return text + f"  {row['tflops']:6.0f} TFLOP/s" + (
        f"  error {row['error']:.2%}, cosine {row['cosine']:.5f}" if "error" in row else "")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, help="tokens; 75,600 are 81 frames at 720p")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", choices=("kernel", "product", "attention"))
    parser.add_argument("--sweep", action="store_true", help="other launch options too")
    parser.add_argument("--interpret", action="store_true", help="tiny, on a CPU, through Triton's interpreter")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if not args.interpret and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here\nhint: --interpret")
    device = torch.device("cpu" if args.interpret else "cuda")
    sizes = {"length": 75_600, "heads": 40, "head_dim": 128, "ffn": 13_824}
    if args.interpret:
        sizes = {"length": 70, "heads": 2, "head_dim": 32, "ffn": 96}
    sizes["length"] = args.length or sizes["length"]
    clock = Clock(device, 1 if args.interpret else args.repeats)

    def tell(row: Row) -> None:
        print(json.dumps(row) if args.json else as_text(row), flush=True)

    bandwidth = copy_bandwidth(clock, 1 << (20 if args.interpret else 31))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU, interpreted"
    about = {"kind": "machine", "device": name, "torch": torch.__version__, "copy": bandwidth, **sizes,
             "triton": getattr(dispatch.triton, "__version__", None)}  # fmt: skip
    versions = f"torch {about['torch']}, Triton {about['triton']}"
    print(json.dumps(about) if args.json else f"{name}, {versions}; a copy moves {bandwidth / 1e12:.2f} TB/s; {sizes}")
    modes = [("plain", 0), ("triton", 0), *((("triton", warps) for warps in (4, 8, 16)) if args.sweep else ())]
    if args.only in (None, "kernel"):
        for row in bench_fused(clock, sizes, bandwidth, modes):
            tell(row)
    dispatch.MODE, dispatch.WARPS = "triton", 0
    if args.only in (None, "product"):
        for row in bench_products(clock, **sizes):
            tell(row)
    if args.only in (None, "attention"):
        for row in bench_attention(clock, Shape(sizes["length"], sizes["heads"], sizes["head_dim"]), args.sweep):
            tell(row)


if __name__ == "__main__":
    main()

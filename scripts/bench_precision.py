"""What each approximation costs in accuracy and brings in time.

    python scripts/bench_precision.py                  # on a GPU: kernels against their plain forms, then a velocity of
                                                       # the published width, 4 blocks, 8,100 tokens, against float32
    python scripts/bench_precision.py --full           # 40 blocks, 75,600 tokens, against exact; no float32, no kernels
    python scripts/bench_precision.py --drift demo     # whole runs of a checkpoint: latents' error, PSNR of the video;
                                                       # with --only preset, of `high` and `fast` alone
    python scripts/bench_precision.py --interpret      # on a CPU, tiny: that all of it runs

Weights are random, with outlying channels in the norms of queries and keys, so that attention is not uniform. Errors
are relative: ‖ours − reference‖ / ‖reference‖. Seconds are medians of whole forwards of one guidance branch.
"""

import argparse
import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when a kernel is defined

import torch
from torch import Tensor

from wan22.attention import Shape, choose, relative_error
from wan22.bench import shortened
from wan22.capability import preset
from wan22.config import Placement, Precision
from wan22.kernels import attention_8bit, dispatch, gelu, norm_modulate, product_8bit, quantize_rows
from wan22.kernels.gated_residual import gated_residual_norm, gated_residual_norm_modulate
from wan22.kernels.quantize_rows import Quantized, quantize_rows_plain
from wan22.load import assemble, eight_bit_of
from wan22.model import TransformerConfig, WanTransformer
from wan22.pack import side_by_side
from wan22.quantize import quantize, read_quantized

Row = dict[str, Any]
PUBLISHED = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TINY = TransformerConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=16, text_dim=32, text_len=16)
KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
EPS = 1e-6


def recipes(capability: tuple[int, int]) -> Iterator[tuple[str, Precision]]:
    """Every one that the card can do, exact first."""
    yield "exact", Precision("bf16")
    kinds = [("fp8", "int8")] if capability >= (8, 9) else []
    for kind, attention in [*kinds, ("int8", "int8-bf16")]:
        yield f"{kind} ffn", Precision(kind, scope="ffn")
        yield f"{kind} all", Precision(kind, scope="all")
        yield f"{kind} ffn, {attention} attention", Precision(kind, attention, scope="ffn")
        yield f"{kind} all, {attention} attention", Precision(kind, attention, scope="all")
    yield "int8 attention", Precision("bf16", "int8")


# --- kernels against their plain forms -------------------------------------------------------------------------------
def check_kernels(device: torch.device, config: TransformerConfig, length: int, kinds: list[str]) -> Iterator[Row]:
    """In float32, what the 8-bit rows stand for; and the products. The two forms may differ where a number lies at a
    tie."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    width, wide = config.dim, config.ffn_dim
    x, y, h = draw(1, length, width), draw(1, length, width, dtype=torch.bfloat16), draw(1, length, wide)
    vector = [0.3 * draw(1, 1, width) for _ in range(3)]
    bias, weight, flat = draw(wide, dtype=torch.bfloat16), draw(wide, width), [one.flatten() for one in vector]
    for kind in kinds:
        dtype = KINDS[kind]
        rows, columns = quantize_rows_plain(x, dtype), quantize_rows_plain(weight, dtype)
        cases: dict[str, Callable[[], Any]] = {
            "quantize_rows": partial(quantize_rows, y, dtype),
            "norm_modulate": partial(norm_modulate, x, vector[0], vector[1], EPS, dtype),
            "gated_residual_norm": partial(gated_residual_norm, x, y, vector[2], flat[0], flat[1], EPS, dtype),
            "gated_residual_norm_modulate": partial(
                gated_residual_norm_modulate, x, y, None, vector[0], vector[1], EPS, dtype),
            "gelu": partial(gelu, h.bfloat16(), dtype),
            "product": partial(product_8bit.product_8bit, rows, columns.values, columns.scale, bias),
        }  # fmt: skip
        for name, run in cases.items():
            forms, before = [], x.clone()  # the residual sums write into x
            for dispatch.MODE in ("triton", "plain"):
                x.copy_(before)
                out = run()
                rows_out = out if isinstance(out, Quantized | Tensor) else out[1]
                forms.append(rows_out.float())
            dispatch.MODE = "auto" if device.type == "cuda" else "triton"
            error, largest = relative_error(*forms), (forms[0] - forms[1]).abs().max().item()
            # FP8 products are summed in fewer bits on Hopper; the interpreter loses FP8's carries.
            right = error < (0.15 if device.type == "cpu" else 0.01)
            yield {"kind": "kernel", "name": f"{name}, {kind}", "error": error, "largest": largest, "right": right}


def time_products(clock: "Clock", length: int, config: TransformerConfig, kinds: list[str]) -> Iterator[Row]:
    """The block's products at full length beside bf16's, the input quantized already."""
    width, wide = config.dim, config.ffn_dim
    for name, inner, outer in (("q k v", width, 3 * width), ("o", width, width), ("ffn.0", width, wide),
                               ("ffn.2", wide, width)):  # fmt: skip
        x = torch.randn(length, inner, device=clock.device, dtype=torch.bfloat16)
        weight = torch.randn(outer, inner, device=clock.device, dtype=torch.bfloat16) / 64
        bias = torch.randn(outer, device=clock.device, dtype=torch.bfloat16)
        flops = 2 * length * inner * outer

        def row(form: str, seconds: float, name: str = name, flops: int = flops) -> Row:
            return {"kind": "product", "name": f"{name}, {form}", "seconds": seconds, "tflops": flops / seconds / 1e12}

        yield row("bf16", clock(lambda: torch.nn.functional.linear(x, weight, bias)))  # noqa: B023
        for kind in kinds:
            rows, columns = quantize_rows(x, KINDS[kind]), quantize_rows_plain(weight, KINDS[kind])
            run = lambda: product_8bit.product_8bit(rows, columns.values, columns.scale, bias)  # noqa: E731, B023
            yield row(kind, clock(run))
            if kind == "fp8":
                product_8bit.FAST_ACCUMULATION = False
                yield row("fp8, exact sums", clock(run))
                product_8bit.FAST_ACCUMULATION = True
            else:
                for options in (product_8bit.LARGE, product_8bit.SMALL, *INT8_OPTIONS):
                    product_8bit.OPTIONS, said = options, " ".join(map(str, options.values()))
                    try:
                        yield row(f"int8, {said}", clock(run))
                    except Exception as why:  # too large for this card
                        yield {"kind": "product", "name": f"{name}, int8, {said}", "absent": str(why)[:60]}
                product_8bit.OPTIONS = None


INT8_OPTIONS = [
    dict(zip(("ROWS", "COLUMNS", "INNER", "num_warps", "num_stages"), numbers, strict=True))
    for numbers in ((128, 256, 128, 8, 4), (128, 128, 128, 8, 4), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4))
]


# --- a velocity ------------------------------------------------------------------------------------------------------
class Clock:
    """Median seconds of a call, after one that compiles, or another that does the same."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, run: Callable[[], object], first: Callable[[], object] | None = None) -> float:
        (first or run)()
        times = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def fill(name: str, target: Tensor) -> None:
    """Random numbers that depend on the published name alone, so that every recipe has the same weights."""
    generator = torch.Generator(target.device).manual_seed(zlib.crc32(name.encode()))
    numbers = torch.randn(target.shape, generator=generator, device=target.device)
    if "norm_q" in name or "norm_k" in name:
        numbers = (0.5 * numbers).exp()  # a few channels several times the others
    elif "norm" in name and name.endswith("weight"):
        numbers = 1 + 0.2 * numbers
    elif "modulation" in name:
        numbers *= 0.3
    elif numbers.ndim == 1:
        numbers *= 0.02
    else:
        numbers /= numbers[0].numel() ** 0.5
    target.copy_(numbers)


def build(config: TransformerConfig, precision: Precision, dtype: torch.dtype, device: torch.device) -> WanTransformer:
    """As load.py does, from random numbers."""
    with torch.device("meta"):
        model = WanTransformer(config, dtype)
    if eight_bit := eight_bit_of(precision):
        quantize(model, eight_bit)
    wanted: dict[str, Tensor] = model.state_dict()
    state: dict[str, Tensor] = {}
    for names in side_by_side(wanted):
        rows = [len(wanted[name]) for name in names]
        first = wanted[names[0]]
        room = torch.empty(sum(rows), *first.shape[1:], dtype=first.dtype, device=device)
        state.update(zip(names, room.split(rows), strict=True))

    def read(targets: dict[str, Tensor]) -> None:
        for name, target in targets.items():
            fill(name, target)

    read_quantized(state, read)
    return assemble(model, state, precision.attention)


@torch.inference_mode()
def velocity(model: WanTransformer, grid: tuple[int, int, int], clock: Clock) -> tuple[Tensor, float]:
    generator = torch.Generator(clock.device).manual_seed(0)
    latents = torch.randn(1, 16, *grid, generator=generator, device=clock.device)
    text = torch.randn(1, model.config.text_len // 4, model.config.text_dim, generator=generator, device=clock.device)
    context, timestep = model.embed_context(text), torch.tensor([900.0], device=clock.device)
    made: list[Tensor] = []

    def run() -> None:
        made[:] = [model(latents, timestep, context)]

    def compiling() -> None:  # at full length, where all forty blocks would take seconds
        with shortened(model, 2) as blocks:
            model(latents, timestep, context[:blocks])

    seconds = clock(run, compiling)
    return made[0], seconds


def chosen(name: str, only: str | None) -> bool:
    """Whether a recipe is asked for; exact always is, which others are held against."""
    return not only or only in name or name == "exact"


def velocities(
    config: TransformerConfig, grid: tuple[int, int, int], clock: Clock, against: str, only: str | None,
    capability: tuple[int, int],
) -> Iterator[Row]:  # fmt: skip
    """against: `float32` or `exact`, which is computed first."""
    device = clock.device
    length = grid[0] * grid[1] * grid[2] // 4
    shape = Shape(length, config.num_heads, config.head_dim)
    fastest = choose("auto", shape, device, torch.bfloat16)
    reference: Tensor | None = None
    if against == "float32":
        model = build(config, Precision("float32", "torch"), torch.float32, device)
        reference = velocity(model, grid, Clock(device, 1) if device.type == "cuda" else clock)[0]
        del model
    base = None
    for name, asked in recipes(capability):
        if not chosen(name, only):
            continue
        precision = replace(asked, attention=fastest if asked.attention == "auto" else asked.attention)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model = build(config, precision, torch.bfloat16, device)
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        out, seconds = velocity(model, grid, clock)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next one's pieces are of other sizes
        base = base or seconds
        reference = out if reference is None else reference
        yield {"kind": "velocity", "name": name, "attention": precision.attention, "seconds": seconds,
               "faster": base / seconds, "error": relative_error(out, reference), "against": against,
               "weights": weights, "peak": peak, "length": length, "blocks": config.num_layers}  # fmt: skip


# --- whole runs ------------------------------------------------------------------------------------------------------
PROMPTS = ("a red circle moves to the right", "a green square moves up", "a large blue triangle falls")


def drifts(
    where: str, device: str, count: int, capability: tuple[int, int], settings: dict[str, Any], only: str | None = None
) -> Iterator[Row]:
    """Latents' relative error and the video's PSNR to exact, mean of `count` prompts."""
    from wan22.pipeline import Pipeline, resolve_precision
    from wan22.report import Reporter

    class Listener(Reporter):
        skipped = 0

        def note(self, text: str, **data: Any) -> None:
            self.skipped += data.get("skipped", 0)

    exact: list[Any] = []
    thresholds = (0.02, 0.04, 0.08, 0.12, 0.2)
    attention = "int8" if capability >= (8, 9) else "int8-bf16"
    fast = "fp8" if capability >= (8, 9) else "int8"
    tried = [
        *recipes(capability),
        *((f"step cache {x:g}", Precision("bf16", step_cache=x)) for x in thresholds),
        *((f"fast: {fast} all, {attention} attention, step cache {x:g}",
           Precision(fast, attention, scope="all", step_cache=x)) for x in thresholds),
        ("guidance till 0.8 of the steps", Precision("bf16")),
        *((f"preset {name}", Precision.from_dict(preset(name, capability))) for name in ("high", "fast")),
    ]  # fmt: skip
    for name, precision in tried:
        if not chosen(name, only):
            continue
        pipe = Pipeline.from_pretrained(where, precision=precision, placement=Placement(device))
        resolve_precision(precision, pipe.device)
        errors, noise, seconds, skipped, steps = [], [], 0.0, 0, 0
        for number, prompt in enumerate(PROMPTS[:count]):
            request = pipe.request(prompt, seed=number, **settings)
            if name.startswith("guidance"):
                request = replace(request, guidance_stop=0.8)
            heard = Listener()
            result = pipe.generate(request, heard)
            seconds += next(phase.seconds for phase in heard.phases if phase.name == "denoise")
            skipped, steps = skipped + heard.skipped, steps + request.num_steps
            if len(exact) <= number:
                exact.append(result)
            errors.append(relative_error(result.latents, exact[number].latents))
            square = ((result.video.astype(float) - exact[number].video.astype(float)) ** 2).mean()
            noise.append(square)
        psnr = None if not sum(noise) else -10 * torch.tensor(noise).div(255**2).mean().log10().item()
        yield {"kind": "drift", "name": name, "error": statistics.mean(errors), "psnr": psnr, "seconds": seconds,
               "skipped": skipped, "steps": steps}  # fmt: skip


# --- saying it -------------------------------------------------------------------------------------------------------
def as_text(row: Row) -> str:
    text = f"{row['name']:<46}"
    if "absent" in row:
        return f"{text} –  {row['absent']}"
    if row["kind"] == "kernel":
        return f"{text} to its plain form {row['error']:.1e}, largest {row['largest']:.1e}" + (
            "" if row["right"] else "  WRONG")  # fmt: skip
    if row["kind"] == "product":
        return f"{text} {1e3 * row['seconds']:8.2f} ms {row['tflops']:6.0f} TFLOP/s"
    if row["kind"] == "velocity":
        peak = f", peak {row['peak'] / 2**30:.1f} GiB" if row["peak"] else ""
        return (f"{text} {row['seconds']:8.3f} s  {row['faster']:5.2f}×  error {row['error']:.2e}  weights "
                f"{row['weights'] / 2**30:.2f} GiB{peak}  ({row['attention']})")  # fmt: skip
    psnr = "       –" if row["psnr"] is None else f"{row['psnr']:5.1f} dB"
    return (f"{text} latents' error {row['error']:.2e}  PSNR {psnr}  {row['seconds']:7.2f} s"
            f"  {row['skipped']} of {row['steps']} steps skipped")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="40 blocks, 75,600 tokens")
    parser.add_argument("--blocks", type=int, help="instead of 4, or 40")
    parser.add_argument("--grid", help="T,H,W of the latents instead of 6,60,90, or 21,90,160")
    parser.add_argument("--only", help="recipes whose name has this in it, beside exact")
    parser.add_argument("--drift", metavar="MODEL", help="a checkpoint, as --model takes it")
    parser.add_argument("--prompts", type=int, default=2, help="of --drift; at most 3")
    parser.add_argument("--settings", default="{}", help='of --drift: JSON, such as {"num_steps": 40}')
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of --drift; default: a GPU, where there is one")
    parser.add_argument("--interpret", action="store_true", help="tiny, on a CPU, through Triton's interpreter")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not args.interpret and args.device != "cpu"
    if not on_gpu and not args.interpret and not args.drift:
        raise SystemExit("error: there is no GPU here\nhint: --interpret, or --drift MODEL")
    device = torch.device("cuda" if on_gpu else "cpu")
    capability = torch.cuda.get_device_capability() if on_gpu else (9, 0)
    wrong = 0

    def tell(row: Row) -> None:
        nonlocal wrong
        wrong += row.get("right") is False
        print(json.dumps(row) if args.json else as_text(row), flush=True)

    if not args.json:
        print(torch.cuda.get_device_name() if on_gpu else "a CPU", f"torch {torch.__version__}", sep=", ")
    if args.drift:
        for row in drifts(args.drift, device.type, args.prompts, capability, json.loads(args.settings), args.only):
            tell(row)
        return
    config = TINY if args.interpret else PUBLISHED
    config = replace(config, num_layers=args.blocks or (config.num_layers if args.full or args.interpret else 4))
    grid = (1, 8, 8) if args.interpret else (21, 90, 160) if args.full else (6, 60, 90)
    grid = tuple(map(int, args.grid.split(","))) if args.grid else grid  # type: ignore[assignment]
    clock = Clock(device, args.repeats if on_gpu else 1)
    kinds = [kind for kind in KINDS if kind == "int8" or capability >= (8, 9)]
    if not args.full:
        with torch.inference_mode():
            for row in check_kernels(device, config, 40 if args.interpret else 2048, kinds):
                tell(row)
            if on_gpu:
                for row in time_products(clock, 75_600, config, kinds):
                    tell(row)
    attention_8bit.hadamard.cache_clear()
    for row in velocities(config, grid, clock, "exact" if args.full else "float32", args.only, capability):
        tell(row)
    if wrong:
        raise SystemExit(f"error: {wrong} kernels are not what their plain forms are")


if __name__ == "__main__":
    main()

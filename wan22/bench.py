"""`wan22 bench`: what one forward takes, beside the floor that this device sets, and other programs' on the same work.

The floor is the sum of the forward's matrix products and attention, each measured alone at the model's own shapes, and
attention at the fastest backend that is here. What the model adds to it (norms, sums, copies, waiting) is above it.

Every measurement is a row, told as soon as it is known: a dict whose `kind` says what it is. Times are in seconds.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.attention import BACKENDS, Attend, find, functions, limit, reference, relative_error
from wan22.checkpoint import Checkpoint, Expert
from wan22.config import GPU_RESERVE, DoesNotFit, Placement, Precision, Request, RequestError
from wan22.kernels.product_8bit import product_8bit
from wan22.kernels.quantize_rows import quantize_rows_plain
from wan22.load import eight_bit_of
from wan22.measuring import parts as bench_parts
from wan22.measuring import work
from wan22.measuring.clock import Clock, PartTimes
from wan22.measuring.random_weights import random_checkpoint
from wan22.measuring.rivals import check_rival, rival
from wan22.model import TransformerConfig
from wan22.pipeline import Pipeline, _device
from wan22.plan import Option, gib, make_plan
from wan22.quantize import EightBit
from wan22.sampling import evaluations, plan_steps

Row = dict[str, Any]
NEVER_ALONE = ("torch", "math")  # PyTorch's own choice is one of the others; whole scores are 457 GB at 720p
COMPARED = 32  # queries of an attention whose numbers are looked at
WARM_BLOCKS = 2  # of a model, at the full length: enough to compile what there is to compile
SEED = 1


@dataclass(frozen=True)
class Options:
    """against: other programs (rivals.py); compiled: them compiled too; repeats: forwards timed, of which the median
    counts; quick: one forward, its parts timed in it; forward: whether there is one at all; vae, text: decoding and
    encoding too.
    """

    against: Sequence[str] = ()
    compiled: bool = True
    repeats: int = 2
    quick: bool = False
    forward: bool = True
    vae: bool = False
    text: bool = False


def run(
    checkpoint: Checkpoint, request: Request, precision: Precision, placement: Placement, options: Options
) -> Iterator[Row]:
    """The rows. Raises RequestError, DoesNotFit."""
    pipeline = Pipeline(checkpoint, precision, placement)
    for name in options.against:
        check_rival(name, pipeline.device, pipeline.dtype)
    if not options.forward:
        yield from other_rows(pipeline, request, options)
    else:
        yield from forward_rows(pipeline, request, options)


def other_rows(pipeline: Pipeline, request: Request, options: Options) -> Iterator[Row]:
    """What a run does beside its steps."""
    if options.text:
        yield from bench_parts.text_rows(pipeline, request)
    if options.vae:
        yield from bench_parts.decode_rows(pipeline, request, "diffusers" in options.against)


@torch.inference_mode()
def forward_rows(pipeline: Pipeline, request: Request, options: Options) -> Iterator[Row]:
    """The ceilings, the floor, the forward, the run that it makes, and others' forwards."""
    pipeline.choose_attention(request)
    option = option_for(pipeline, request)
    expert = next(iter(pipeline.checkpoint.experts.values()))
    config = expert.transformer_config()
    tokens = math.prod(n // step for n, step in zip(request.latent_shape[1:], config.patch_size, strict=True))
    device, dtype, clock = pipeline.device, pipeline.dtype, Clock(pipeline.device)
    yield about(pipeline, request, config, tokens, option.residency.kind)

    ceilings = []
    for row in ceiling_rows(clock, config, tokens, dtype, options.repeats, eight_bit_of(pipeline.precision)):
        ceilings.append(row)
        yield row
    exact = BACKENDS[pipeline.experts.attention].exact
    lowest = floor(ceilings, exact)
    yield lowest
    _empty_cache(device)

    context = random_context(expert, config, device)
    # One expert is looked at: the other one needs no place in the host's memory.
    pipeline.experts.use([replace(option.residency, host_experts=min(1, option.residency.host_experts))])
    model = pipeline.experts.get(expert.name)
    inputs = random_inputs(request, device)
    keys_values = model.embed_context(context)
    forward = partial(model, *inputs, keys_values)
    with shortened(model, WARM_BLOCKS) as blocks:
        model(*inputs, keys_values[:blocks])
    _reset_peak(device)
    parts = PartTimes(model, clock)
    if options.quick:
        with parts.watched():
            velocity = forward()
        seconds = sum(parts.seconds().values())
    else:
        seconds = clock(forward, options.repeats, warm_up=False)
        with parts.watched():
            velocity = forward()
    predicted = option.peak("denoise")
    if request.guided:  # one prompt alone is here
        predicted -= option.phases["denoise"]["keys and values of prompts"] // 2
    mine = forward_row(pipeline, config, tokens, seconds, lowest, predicted, velocity)
    yield mine
    yield {"kind": "parts", "seconds": parts.seconds()}
    del model, keys_values, forward, parts
    pipeline.experts.release()

    forwards = evaluations(plan_steps(request))
    phases = {"denoise": forwards * seconds}
    for row in other_rows(pipeline, request, options):
        phases |= {row["name"]: row["seconds"]} if row["kind"] == "phase" else {}
        yield row
    yield {"kind": "run", "steps": request.num_steps, "evaluations": forwards, "phases": phases,
           "seconds": sum(phases.values()), "step_cache": pipeline.precision.step_cache}  # fmt: skip
    for name in options.against:
        yield from rival_rows(name, pipeline, expert, clock, inputs, context, velocity, mine, options)


def checkpoint_for(
    given: Checkpoint | None, placement: Placement, layers: int | None, zeros: bool = False
) -> Checkpoint:
    """The checkpoint that was named, or random weights of the published size, or zeros. Raises RequestError."""
    if given:
        if layers:
            raise RequestError("--layers is for random weights", hint="leave out --ckpt_dir and --model")
        return given
    if placement.offload == "disk":
        raise RequestError("--offload disk: random weights lie in no file", hint="--ckpt_dir FOLDER")
    return random_checkpoint(_device(placement.device), layers, zeros=zeros)


def about(pipeline: Pipeline, request: Request, config: TransformerConfig, tokens: int, offload: str) -> Row:
    device = pipeline.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    products, attention = work.forward_flops(config, tokens)
    return {"kind": "work", "device": name, "torch": torch.__version__, "width": request.width,
            "height": request.height, "frames": request.num_frames, "tokens": tokens, "layers": config.num_layers,
            "dim": config.dim, "precision": pipeline.precision.to_dict(), "offload": offload,
            "product_flops": products, "attention_flops": attention}  # fmt: skip


def option_for(pipeline: Pipeline, request: Request) -> Option:
    """The placement asked for, in its best form here, or the first that fits; only the steps of it must. Raises
    DoesNotFit."""
    gpu, host = pipeline.experts.memory.rooms()
    plan = make_plan(request, pipeline.precision, pipeline.placement, pipeline.sizes, gpu, host)
    options = [one for one in plan.options if pipeline.placement.offload in ("auto", one.residency.kind)]
    free = plan.gpu_free - GPU_RESERVE if gpu else host.free
    if fitting := [one for one in options if one.peak("denoise") <= free]:
        return fitting[0]
    least = min(options, key=lambda one: one.peak("denoise"))
    said = f"--offload {least.residency.kind} needs {gib(least.peak('denoise'))}; free: {gib(free)}"
    raise DoesNotFit(f"it does not fit: {said}", hint="--layers N, a smaller --size, or --offload block")


# --- the ceilings and the floor --------------------------------------------------------------------------------------
def ceiling_rows(
    clock: Clock, config: TransformerConfig, tokens: int, dtype: torch.dtype, repeats: int,
    eight_bit: EightBit | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Each matrix product, and attention at every backend that is here, alone on random numbers. eight_bit: what the
    model's products are in, whose rows come quantized here."""
    device = clock.device
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for product in work.products(config, tokens):
        kind = torch.float32 if product.float32 else dtype
        x, weight = draw(product.rows, product.inner, dtype=kind), draw(product.columns, product.inner, dtype=kind)
        bias = draw(product.columns, dtype=kind)
        call, name = partial(F.linear, x, weight, bias), str(kind).removeprefix("torch.")
        if eight_bit and not product.float32 and (eight_bit.scope == "all" or product.name.startswith("ffn")):
            call = partial(product_8bit, quantize_rows_plain(x, eight_bit.dtype),
                           *quantize_rows_plain(weight, eight_bit.dtype), bias)  # fmt: skip
            name = eight_bit.kind
        seconds = clock(call, max(3, repeats))
        yield {"kind": "product", "name": product.name, "dtype": name, "times": product.times,
               "shape": [product.rows, product.inner, product.columns],
                "seconds": seconds, "flops_a_second": product.flops / seconds}  # fmt: skip
        del x, weight, bias, call
    for one in work.attentions(config, tokens):
        q = draw(1, one.queries, one.heads, one.head_dim, dtype=dtype)
        k, v = (draw(1, one.keys, one.heads, one.head_dim, dtype=dtype) for _ in range(2))
        rows = torch.linspace(0, one.queries - 1, min(COMPARED, one.queries), device=device).long()
        expected = reference(q[:, rows], k, v)
        for name in BACKENDS:
            # On a CPU PyTorch names several, and has one.
            if name == "torch" if device.type == "cpu" else name not in NEVER_ALONE:
                row = {"kind": "attention", "of": one.name, "backend": name, "exact": BACKENDS[name].exact,
                       "times": one.times, "shape": [one.queries, one.keys, one.heads, one.head_dim]}  # fmt: skip
                yield row | _attention_alone(clock, name, (q, k, v), rows, expected, one.flops, repeats)
        del q, k, v
        _empty_cache(device)


def _attention_alone(
    clock: Clock, name: str, inputs: Any, rows: Tensor, expected: Tensor, flops: int, repeats: int
) -> Row:
    try:
        attend = find(name)
        error = relative_error(attend(*inputs)[:, rows], expected)
    except Exception as why:  # absent, or not for this device, dtype or shape
        return {"absent": " ".join(str(why).split())[:100]}
    if not error <= limit(name, inputs[0].dtype):
        return {"absent": f"wrong numbers here: relative error {error:.1e}"}
    seconds = clock(partial(attend, *inputs), repeats if flops > 1e13 else 5, warm_up=False)
    return {"seconds": seconds, "flops_a_second": flops / seconds, "error": error}


def floor(ceilings: Sequence[Row], exact: bool) -> Row:
    """What the products and the fastest attention take together in a forward. exact: of the exact backends only, as
    for a model that runs with one of them."""
    seconds = {"products": sum(row["times"] * row["seconds"] for row in ceilings if row["kind"] == "product")}
    fastest = {}
    for of in dict.fromkeys(row["of"] for row in ceilings if row["kind"] == "attention"):
        able = [row for row in ceilings if row.get("of") == of and "seconds" in row and (row["exact"] or not exact)]
        if not able:
            raise RequestError("no attention backend works at this shape here")
        best = min(able, key=lambda row: row["seconds"])
        seconds[f"{of} attention"], fastest[of] = best["times"] * best["seconds"], best["backend"]
    return {"kind": "floor", "parts": seconds, "backends": fastest, "seconds": sum(seconds.values())}


# --- the forward -----------------------------------------------------------------------------------------------------
def random_inputs(request: Request, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents [1, C, T, H, W] and a timestep [1] of the high-noise expert."""
    generator = torch.Generator(device).manual_seed(SEED)
    latents = torch.randn(1, *request.latent_shape, generator=generator, device=device)
    return latents, torch.tensor([900.0], device=device)


def random_context(expert: Expert, config: TransformerConfig, device: torch.device) -> Tensor:
    """A prompt of full length, [1, M, text width]."""
    width = expert.tensors.shapes["text_embedding.0.weight"][-1]
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randn(1, config.text_len, width, generator=generator, device=device)


class shortened:
    """The model's first blocks alone; gives how many."""

    def __init__(self, model: Any, blocks: int) -> None:
        self._model, self._all, self._count = model, model.blocks, min(blocks, len(model.blocks))

    def __enter__(self) -> int:
        self._model.blocks = nn.ModuleList(list(self._all)[: self._count])
        return self._count

    def __exit__(self, *error: object) -> None:
        self._model.blocks = self._all


def forward_row(
    pipeline: Pipeline, config: TransformerConfig, tokens: int, seconds: float, lowest: Row, predicted: int,
    velocity: Tensor,
) -> Row:  # fmt: skip
    device = pipeline.device
    row = {"kind": "forward", "name": "wan22", "attention": pipeline.experts.attention, "seconds": seconds,
           "of_floor": seconds / lowest["seconds"], "predicted_bytes": predicted,
           "finite": bool(velocity.isfinite().all()),
           **speed(seconds, config, tokens, device)}  # fmt: skip
    return row


def speed(seconds: float, config: TransformerConfig, tokens: int, device: torch.device) -> Row:
    flops = sum(work.forward_flops(config, tokens))
    peak = work.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {"flops_a_second": flops / seconds, "utilisation": flops / seconds / peak if peak else None,
            "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}  # fmt: skip


def rival_rows(
    name: str, pipeline: Pipeline, expert: Expert, clock: Clock, inputs: tuple[Tensor, Tensor], context: Tensor,
    velocity: Tensor, mine: Row, options: Options,
) -> Iterator[Row]:  # fmt: skip
    """Another program's forward, with our attention function, and how far its velocity is from ours."""
    config, device = expert.transformer_config(), pipeline.device
    tokens = math.prod(n // step for n, step in zip(inputs[0].shape[2:], config.patch_size, strict=True))
    attend: Attend = functions(pipeline.experts.attention)[0]
    with rival(name, expert, pipeline.dtype, device, attend) as (model, forward):
        # Compilation only for diffusers, whose documentation recommends it block by block.
        for compiled in (False, True) if name == "diffusers" and options.compiled else (False,):
            if compiled:
                cast(Any, model).compile_repeated_blocks(dynamic=False)
            with shortened(model, WARM_BLOCKS):
                warm_up = clock(partial(forward, *inputs, context), warm_up=False)
            _reset_peak(device)
            made: list[Tensor] = []
            call = partial(_keeping, made, forward, *inputs, context)
            seconds = clock(call, 1 if options.quick else options.repeats, warm_up=False)
            yield {"kind": "forward", "name": name, "form": "compiled" if compiled else "eager",
                   "attention": mine["attention"], "seconds": seconds, "times_ours": seconds / mine["seconds"],
                   "compile_seconds": warm_up if compiled else None,
                   "difference": relative_error(made[0], velocity),
                   **speed(seconds, config, tokens, device)}  # fmt: skip
    if compiled:
        torch.compiler.reset()
    _empty_cache(device)


def _keeping(made: list[Tensor], call: Callable[..., Tensor], *args: Tensor) -> None:
    made[:] = [call(*args)]


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# --- for people ------------------------------------------------------------------------------------------------------
def as_text(row: Row) -> str:
    """A row in a line or a few."""
    return _TEXTS[row["kind"]](row)


def _work(row: Row) -> str:
    precision = ", ".join(f"{name} {value}" for name, value in row["precision"].items() if value is not None)
    return (f"{row['device']}, torch {row['torch']}\n{row['width']}x{row['height']}, {row['frames']} frames: "
            f"{row['tokens']:,} tokens, {row['layers']} layers of width {row['dim']}\n{precision}; --offload "
            f"{row['offload']}\none forward: {row['product_flops'] / 1e15:.4g} PFLOP of products, "
            f"{row['attention_flops'] / 1e15:.4g} PFLOP of attention\n\n"
            f"{'alone':<32}{'ms':>10}{'times':>7}{'s':>9}{'TFLOP/s':>10}")  # fmt: skip


def _product(row: Row) -> str:
    return _alone(f"product {row['name']}, {row['dtype']}", row)


def _attention(row: Row) -> str:
    text = _alone(f"{row['of']} attention, {row['backend']}", row)
    return text if "absent" in row or row["exact"] else f"{text}  approximate: error {row['error']:.2%}"


def _alone(name: str, row: Row) -> str:
    if "absent" in row:
        return f"{name:<32}{'–':>10}  {row['absent']}"
    seconds = row["seconds"]
    return (f"{name:<32}{1e3 * seconds:10.2f}{row['times']:7}{row['times'] * seconds:9.3f}"
            f"{row['flops_a_second'] / 1e12:10.1f}")  # fmt: skip


def _floor(row: Row) -> str:
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["parts"].items())
    fastest = ", ".join(f"{name} by {backend}" for name, backend in row["backends"].items())
    return f"{'floor':<32}{row['seconds']:26.3f}\n{_below(parts)}\n{_below(fastest)}\n"


def _below(told: str) -> str:
    return textwrap.fill(told, 80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _forward(row: Row) -> str:
    name = f"{row['name']} {row.get('form', '')}".strip()
    told = [f"{row['flops_a_second'] / 1e12:.1f} TFLOP/s"]
    if row["utilisation"]:
        told.append(f"{row['utilisation']:.1%} of the data sheet's bf16")
    if "of_floor" in row:
        told.insert(0, f"{row['of_floor']:.3f} x the floor")
        told += [] if row["finite"] else ["VELOCITY NOT FINITE"]
    else:
        told.insert(0, f"{row['times_ours']:.3f} x ours")
        told.append(f"velocity {row['difference']:.1e} from ours")
        told += [f"compiled in {row['compile_seconds']:.0f} s"] if row["compile_seconds"] else []
    if row["gpu_bytes"]:
        predicted = f", predicted {gib(row['predicted_bytes'])}" if "predicted_bytes" in row else ""
        told.append(f"peak {gib(row['gpu_bytes'])}{predicted}")
    return f"{'forward, ' + name:<32}{row['seconds']:26.3f}\n{_below(', '.join(told))}"


def _parts(row: Row) -> str:
    whole = sum(row["seconds"].values())
    return "\n".join(f"  {name:<30}{seconds:26.3f}  {seconds / whole:6.1%}" for name, seconds in row["seconds"].items())


def _run(row: Row) -> str:
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
    name = f"{row['steps']} steps, {row['evaluations']} forwards"
    less = "; less what the step cache spares, which is not measured here" if row["step_cache"] else ""
    return f"{name:<32}{row['seconds']:26.1f}\n{_below('extrapolated: ' + phases + less)}"


_TEXTS: dict[str, Callable[[Row], str]] = {
    "work": _work, "product": _product, "attention": _attention, "floor": _floor, "forward": _forward,
    "parts": _parts, "run": _run, "phase": bench_parts.as_text, "decode": bench_parts.as_text,
}  # fmt: skip

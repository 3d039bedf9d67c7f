"""Attention behind one function and one layout, `B L N D`: batch, tokens, heads, head dim.

Every backend is a function like `attend`. It is looked for when it is asked for, and before a run trusts it, it is
measured here: on random numbers of the run's shape, against float32, in memory that was poisoned before. `exact`
backends compute softmax attention in the inputs' dtype with float32 accumulation; the others quantize.

Legend: B batch, L queries, M keys, N heads, D head dim.
"""

import contextlib
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan22.config import RequestError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over all keys, no mask.

    q [B, L, N, D]; k, v [B, M, N, D], one dtype for all → [B, L, N, D] in that dtype, accumulated in float32.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B N L D, the layout PyTorch asks for
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# --- the backends ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Backend:
    """A way to compute attention. find: the function, or an exception that says why there is none here. hint: how to
    come by it. auto: whether `auto` may take it on a GPU."""

    find: Callable[[], Attend]
    exact: bool = True
    auto: bool = True
    hint: str | None = None


def _torch(kind: SDPBackend) -> Callable[[], Attend]:
    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return attend(q, k, v)

    return lambda: chosen


def _flash(*modules: str) -> Callable[[], Attend]:
    """`flash_attn_func(q, k, v)` of the first of these modules that is there; some return log-sum-exps beside."""

    def find() -> Attend:
        for module in modules:
            try:
                function = importlib.import_module(module).flash_attn_func
            except ModuleNotFoundError as error:
                if module is modules[-1] or not module.startswith(str(error.name)):
                    raise
            else:
                break

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return run

    return find


def _sage() -> Attend:
    function = importlib.import_module("sageattention").sageattn
    return lambda q, k, v: function(q, k, v, tensor_layout="NHD")


def _int8(pv: str) -> Callable[[], Attend]:
    def find() -> Attend:
        from wan22.kernels.attention_8bit import attend_8bit

        return functools.partial(attend_8bit, pv=pv)

    return find


BACKENDS: dict[str, Backend] = {
    "torch": Backend(lambda: attend, auto=False),  # whatever PyTorch itself would take; on a CPU the one
    "cudnn": Backend(_torch(SDPBackend.CUDNN_ATTENTION)),
    "flash": Backend(_torch(SDPBackend.FLASH_ATTENTION)),
    "efficient": Backend(_torch(SDPBackend.EFFICIENT_ATTENTION)),
    "math": Backend(_torch(SDPBackend.MATH), auto=False),  # its scores alone are 457 GB at 720p
    # FlashAttention 3 as `fa3-fwd` packs it, then as built from its own source.
    "fa3": Backend(_flash("fa3_fwd_interface", "flash_attn_interface"), hint="pip install fa3-fwd (Hopper, Ampere)"),
    "fa4": Backend(_flash("flash_attn.cute"), hint="pip install --pre flash-attn-4 (Hopper, Blackwell)"),
    "sage": Backend(_sage, exact=False, auto=False, hint="pip install sageattention"),
    # Ours: INT8 scores; probabilities and values in INT8 too, or in bf16 (capability.py says where).
    "int8": Backend(_int8("int8"), exact=False, auto=False),
    "int8-bf16": Backend(_int8("bf16"), exact=False, auto=False),
}


def find(name: str) -> Attend:
    """A backend's function, unmeasured. Raises RequestError where its package is absent or does not load."""
    try:
        return BACKENDS[name].find()
    except Exception as error:  # a package may fail to load in any way
        said = " ".join(str(error).split())
        raise RequestError(f"--attention {name}: not here: {said}", hint=BACKENDS[name].hint) from None


def functions(name: str) -> tuple[Attend, Attend]:
    """For self-attention and for cross-attention. The latter is a hundredth of the arithmetic, and stays exact."""
    return find(name), find(name) if BACKENDS[name].exact else attend


# --- measuring -------------------------------------------------------------------------------------------------------
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}  # relative, of exact backends
LARGEST_APPROXIMATE_ERROR = 0.08
PROBE_FLOPS = {"cuda": 1e13, "cpu": 2e9}  # of one timed call: 15 ms on a fast GPU
COMPARED = 48  # queries compared with float32, spread from first to last


@dataclass(frozen=True)
class Shape:
    """Of one self-attention: `length` tokens of `heads` heads of `head_dim` numbers."""

    length: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Measured:
    """seconds: of one call on the probe's queries; error: ‖out − reference‖ / ‖reference‖, NaN where a number is
    not finite."""

    seconds: float
    error: float


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function in float32, head by head: exact, and small in memory for few queries."""
    heads = []
    for head in range(q.shape[2]):
        one_q, one_k, one_v = (x[:, :, head].float() for x in (q, k, v))
        scores = one_q @ one_k.transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(scores.softmax(-1) @ one_v)
    return torch.stack(heads, dim=2)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def probe_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v: all keys of the shape, and as many queries as the probe has time for. v is a view with gaps, as
    in the model, where it comes out of a packed product."""
    budget, per_pair = PROBE_FLOPS[device.type], 4 * shape.heads * shape.head_dim
    keys = min(shape.length, int(budget / (per_pair * 64)) + 64) if device.type == "cpu" else shape.length
    queries = max(64, min(shape.length, int(budget / (per_pair * keys))))
    generator = torch.Generator(device).manual_seed(0)

    def draw(length: int, parts: int = 1) -> Tensor:
        size = (1, length, parts, shape.heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)[:, :, -1]

    return draw(queries), draw(keys), draw(keys, 2)


def measure(function: Attend, q: Tensor, k: Tensor, v: Tensor, expected: Tensor, rows: Tensor) -> Measured:
    """Run a backend thrice. expected: float32, for the queries at `rows`."""
    error = 0.0
    seconds = math.inf
    for attempt in range(3):
        # What a backend leaves unwritten shows as NaN: it gets this memory back from PyTorch's allocator.
        poison = [torch.full(q.shape, math.nan, dtype=q.dtype, device=q.device) for _ in range(3)]
        del poison
        _synchronize(q.device)
        start = time.perf_counter()
        out = function(q, k, v)
        _synchronize(q.device)
        if attempt:  # the first compiles, or picks a plan
            seconds = min(seconds, time.perf_counter() - start)
        now = relative_error(out[:, rows], expected) if out.isfinite().all() else math.nan
        error = now if math.isnan(now) else max(error, now)
        if math.isnan(error):
            break
    return Measured(seconds, error)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limit(name: str, dtype: torch.dtype) -> float:
    """The largest relative error that a backend may have."""
    return LARGEST_ERROR[dtype] if BACKENDS[name].exact else LARGEST_APPROXIMATE_ERROR


def choose(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to run with: the one that is named, if it is right here; for `auto` the fastest exact one that is,
    on a CPU PyTorch's. Takes about a second on a GPU. Raises RequestError for a named one that is absent, fails or is
    wrong."""
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return "torch"
    if name == "auto":
        return fastest(shape, device, dtype)
    try:
        measured = next(_measure_all([(name, find(name))], shape, device, dtype))[1]
    except RequestError:
        raise
    except Exception as error:  # whatever a backend raises for what it does not support
        said = " ".join(str(error).split())[:200]
        raise RequestError(f"--attention {name}: fails here: {said}", hint="--attention auto") from None
    if not measured.error <= limit(name, dtype):
        said = "numbers that are not finite" if math.isnan(measured.error) else f"relative error {measured.error:.1e}"
        allowed = f"where {limit(name, dtype):.0e} is allowed"
        raise RequestError(f"--attention {name}: wrong numbers here: {said}, {allowed}", hint="--attention auto")
    return name


def fastest(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The fastest exact backend that is right here; `torch` where none is."""
    found = []
    for name, backend in BACKENDS.items():
        if backend.auto and backend.exact:
            with contextlib.suppress(RequestError):
                found.append((name, find(name)))
    best, least = "torch", math.inf
    for name, measured in _measure_all(found, shape, device, dtype, skip_failing=True):
        # A later one must be faster by more than the clock's noise: the same machine should choose the same.
        if measured.error <= limit(name, dtype) and measured.seconds < 0.97 * least:
            best, least = name, measured.seconds
    return best


@torch.inference_mode()
def _measure_all(
    backends: Sequence[tuple[str, Attend]], shape: Shape, device: torch.device, dtype: torch.dtype,
    skip_failing: bool = False,
) -> Iterator[tuple[str, Measured]]:  # fmt: skip
    q, k, v = probe_inputs(shape, device, dtype)
    rows = torch.linspace(0, q.shape[1] - 1, min(COMPARED, q.shape[1]), device=device).long()
    expected = reference(q[:, rows], k, v)
    for name, function in backends:
        try:
            yield name, measure(function, q, k, v, expected, rows)
        except Exception:  # not for this device, dtype or shape
            if not skip_failing:
                raise

"""Attention with 8-bit matrix products: what keeps it accurate, a plain form, and a Triton kernel of our own.

All of this is exact in real numbers, and only makes the numbers that are then rounded kinder:

- The mean of the keys over all tokens is subtracted: it adds the same to all scores of a query, and softmax does not
  see it. It is where most of the keys' outlying channels come from. (SageAttention, Zhang et al. 2024, section 4.2)
- A channel that is large in the queries and small in the keys, or the other way round, is evened out: what one is
  multiplied by the other is divided by. √(rms k / rms q) makes the product of both norms, and with it the scores'
  error, the smallest. (SmoothQuant, Xiao et al. 2022, section 4, between two activations)
- Queries and keys are rotated by a Hadamard matrix: (qH)(kH)ᵀ = q kᵀ, and one channel's outlier becomes a little in
  every channel. (QuaRot, Ashkboos et al. 2024; FlashAttention-3, Shah et al. 2024, section 3.3)
- A channel's mean over the tokens is taken out of v and added to the result, whose weights sum to 1; what is left of v
  has a scale a channel, undone in the result. (SageAttention2, Zhang et al. 2024, sections 3.2 and 4.3)

Then queries are INT8 with a scale a token, keys with one a block: rotated, a block's tokens are of like size, and a
scale a token would cost two instructions a score. Probabilities and v are bf16, FP8 or INT8 (`pv`); INT8 probabilities
are relative to the largest of their own block of keys, so that 127 steps reach what matters there.

Legend: B batch, L queries, M keys, N heads, D head dim (a power of two).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from wan22.kernels import attention_hopper
from wan22.kernels.dispatch import jit, launch, tl, use_triton

FP8 = torch.float8_e4m3fn
FP8_MAX, INT8_MAX = 448.0, 127.0
BLOCKS = 8  # of tokens, that a program rotates one after the other by one matrix that it loads once
SMALLEST = 1e-12  # scale: below it, zeros are as good
LOG2E = 1.4426950408889634
FP8_SHIFT = 8.0  # FP8 probabilities are 2⁸ times as large, to use its range: as FlashAttention 3 does
PV = ("bf16", "fp8", "int8")


@dataclass(frozen=True)
class Form:
    """How the kernel is cut and launched: queries of a program, keys of a block (and so of a scale of keys, and of INT8
    probabilities). hopper: attention_hopper's kernel instead, which has its own."""

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 3
    hopper: bool = False


# By the shared memory of a multiprocessor: of data-centre cards, and of others. To be tuned on each kind of GPU.
LARGE = {"bf16": Form(keys=64), "fp8": Form(), "int8": Form()}
SMALL = {"bf16": Form(keys=64, stages=2), "fp8": Form(keys=64), "int8": Form(keys=64)}
HOPPER = Form(keys=attention_hopper.KEYS, hopper=True)  # of INT8 values
FORM: Form | None = None  # instead of these, for measurements


def form_of(pv: str, dim: int, device: torch.device) -> Form:
    if FORM:
        return FORM
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if attention_hopper.GLUON and pv == "int8" and dim in attention_hopper.DIMS and capability == (9, 0):
        return HOPPER
    return (LARGE if capability in (None, (8, 0), (9, 0), (10, 0), (10, 3)) else SMALL)[pv]


# --- what is exact ---------------------------------------------------------------------------------------------------
@lru_cache
def hadamard(dim: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix [dim, dim] float32 in Sylvester's order."""
    if dim & (dim - 1):
        raise ValueError(f"a head dim of {dim} is not a power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / math.sqrt(dim)).to(device)


def smooth(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products differ from q kᵀ by a number a query; [B, L, N, D] each → float32."""
    mean, factor = smoothing(q, k)
    matrix = hadamard(q.shape[-1], q.device)
    return (q.float() * factor) @ matrix, ((k.float() - mean) / factor) @ matrix


def smoothing(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The keys' mean and the channels' factor of the queries, [B, 1, N, D] float32 each."""
    (_, q_square, _, _), (mean, k_square, _, _) = statistics(q), statistics(k)
    spread = (k_square - mean.square()).clamp(min=SMALLEST).sqrt()  # by moments: no float32 copy of k is made
    return mean, (spread / q_square.sqrt().clamp(min=SMALLEST)).clamp(1e-3, 1e3).sqrt()


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each channel over the tokens of x [B, L, N, D]: mean, mean square, largest, smallest [B, 1, N, D] float32."""
    if not use_triton(x):
        square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square() / x.shape[1]
        mean = x.mean(1, keepdim=True, dtype=torch.float32)
        return mean, square, x.amax(1, keepdim=True).float(), x.amin(1, keepdim=True).float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, heads, dim = x.shape
    chunk = 1024
    parts = torch.empty((4, -(-length // chunk), batch, heads, dim), dtype=torch.float32, device=x.device)
    launch(
        _statistics_kernel, (parts.shape[1], heads, batch), x, parts, length, heads, batch, parts.stride(0),
        x.stride(0), x.stride(1), x.stride(2), D=dim, ROWS=64, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    sums = parts[:2].sum(1).unsqueeze(2) / length
    return sums[0], sums[1], parts[2].amax(0).unsqueeze(1), parts[3].amin(0).unsqueeze(1)


# --- what rounds -----------------------------------------------------------------------------------------------------
def quantize(x: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x float32 → 8-bit, and float32 scales with `dim` kept as 1: one scale for all that lies along `dim`."""
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scale = (x.abs().amax(dim, keepdim=True) / largest).clamp(min=SMALLEST)
    scaled = x / scale
    return (scaled.round() if dtype == torch.int8 else scaled.clamp(-largest, largest)).to(dtype), scale


def quantize_blocks(x: Tensor, block: int) -> Tensor:
    """x [B, L, N, D] float32 → what it is after INT8 with a scale for each `block` tokens of a head."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block))
    values, scale = quantize(padded, (2, 4), torch.int8)
    return (values.float() * scale).flatten(1, 2)[:, : x.shape[1]]


def quantize_v(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, M, N, D] → 8-bit without the channels' means, its scales and the means [B, 1, N, D] float32."""
    mean = v.float().mean(1, keepdim=True)
    return *quantize(v.float() - mean, 1, dtype), mean


# --- around a kernel that takes FP8 ----------------------------------------------------------------------------------
Fp8Attend = Callable[..., Tensor]


def attend_around_fp8(q: Tensor, k: Tensor, v: Tensor, kernel: Fp8Attend) -> Tensor:
    """What is exact to do around FlashAttention 3's FP8: smoothed q and k, and v by channel.

    q [B, L, N, D]; k, v [B, M, N, D] bf16 → [B, L, N, D] in q's dtype. kernel: `flash_attn_func` of FlashAttention 3,
    or alike: q, k, v in FP8, with float32 `q_descale`, `k_descale`, `v_descale` [B, N], one a head.
    """
    smooth_q, smooth_k = smooth(q, k)
    q8, q_scale = quantize(smooth_q, (1, 3), FP8)
    k8, k_scale = quantize(smooth_k, (1, 3), FP8)
    v8, v_scale, v_mean = quantize_v(v, FP8)
    descale = {"q_descale": q_scale[:, 0, :, 0], "k_descale": k_scale[:, 0, :, 0]}
    out = kernel(q8, k8, v8, **descale, v_descale=torch.ones_like(descale["k_descale"]))
    out = out[0] if isinstance(out, tuple) else out
    return (out.float() * v_scale + v_mean).to(q.dtype)


def fp8_kernel_plain(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor
) -> Tensor:
    """FlashAttention 3's FP8 in plain torch: scores in float32, probabilities rounded to FP8; bf16 out."""
    scale = (q_descale * k_descale)[..., None, None] / math.sqrt(q.shape[-1])
    scores = torch.einsum("blnd,bmnd->bnlm", q.float(), k.float()) * scale
    p = (scores - scores.amax(-1, keepdim=True)).exp() * 2**FP8_SHIFT
    out = torch.einsum("bnlm,bmnd->blnd", p.to(FP8).float(), v.float())
    return (out / p.sum(-1).transpose(1, 2)[..., None] * v_descale[:, None, :, None]).bfloat16()


# --- our own ---------------------------------------------------------------------------------------------------------
def attend_8bit(q: Tensor, k: Tensor, v: Tensor, pv: str = "int8") -> Tensor:
    """softmax(q kᵀ / √D) v with INT8 scores; pv: what probabilities and v are multiplied in: `bf16`, `fp8` (Ada,
    Hopper) or `int8` (Ampere too).

    q [B, L, N, D]; k, v [B, M, N, D] → [B, L, N, D] in q's dtype, accumulated in float32.
    """
    assert pv in PV, pv
    if not use_triton(q, k, v):
        return attend_8bit_plain(q, k, v, pv)
    return _run(q, k, v, pv)


def attend_8bit_plain(q: Tensor, k: Tensor, v: Tensor, pv: str = "int8") -> Tensor:
    """The same roundings in float32 arithmetic."""
    block = form_of(pv, q.shape[-1], q.device).keys
    smooth_q, smooth_k = smooth(q, k)
    q8, q_scale = quantize(smooth_q, 3, torch.int8)
    values, v_scale, v_mean = _values(v, pv)
    scores = torch.einsum("blnd,bmnd->bnlm", q8.float() * q_scale, quantize_blocks(smooth_k, block))
    scores /= math.sqrt(q.shape[-1])
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=torch.float32)  # B N L D
    peak = scores.amax(-1, keepdim=True)
    total = (scores - peak).exp().sum(-1, keepdim=True)
    for part, value in zip(scores.split(block, -1), values.float().split(block, 1), strict=True):
        top = part.amax(-1, keepdim=True) if pv == "int8" else peak
        p = (part - top).exp()
        if pv == "int8":
            p = (p * INT8_MAX).round() / INT8_MAX
        else:
            p = (p * 2**FP8_SHIFT).to(FP8 if pv == "fp8" else torch.bfloat16).float() / 2**FP8_SHIFT
        out += torch.einsum("bnlm,bmnd->bnld", p, value) * (top - peak).exp()
    return ((out / total).transpose(1, 2) * v_scale + v_mean).to(q.dtype)


def _values(v: Tensor, pv: str) -> tuple[Tensor, Tensor, Tensor]:
    """v as it is multiplied, with its scales and means [B, 1, N, D] float32."""
    if pv != "bf16":
        return quantize_v(v, FP8 if pv == "fp8" else torch.int8)
    ones = torch.ones(v.shape[0], 1, *v.shape[2:], device=v.device)
    return v.bfloat16(), ones, torch.zeros_like(ones)


def _run(q: Tensor, k: Tensor, v: Tensor, pv: str) -> Tensor:
    (batch, length, heads, dim), keys, form = q.shape, k.shape[1], form_of(pv, q.shape[-1], q.device)
    q8, q_scale, k8, k_scale = prepare(q, k, form.keys)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if form.hopper:
        assert pv == "int8", pv
        values, v_scale, v_mean = _transpose_and_quantize(v, torch.int8, ordered=True)
        attention_hopper.attend(q8, k8, values.permute(0, 2, 3, 1), q_scale, k_scale, v_scale, v_mean, out)
        return out
    if pv == "bf16":
        values, v_scale, v_mean = _values(v, pv)
        values = values if q.is_cuda else values.float()  # Triton's interpreter cannot multiply bf16
    else:
        values, v_scale, v_mean = _transpose_and_quantize(v, FP8 if pv == "fp8" else torch.int8)
    launch(
        _attend_kernel, (-(-length // form.queries), heads, batch), q8, k8, values, q_scale, k_scale, v_scale, v_mean,
        out, length, keys, heads, values.stride(0), values.stride(1), values.stride(2), values.stride(3), D=dim,
        ROWS=form.queries, COLUMNS=form.keys, PV=PV.index(pv), SHIFT=FP8_SHIFT, num_warps=form.warps,
        num_stages=form.stages,
    )  # fmt: skip
    return out


def prepare(q: Tensor, k: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys smoothed and in INT8, [B, N, L, D]: queries with a scale a token, which has log2 e / √D in it,
    keys with one for each `block` tokens."""
    mean, factor = smoothing(q, k)
    queries = _rotate_and_quantize(q, torch.zeros_like(mean), factor, LOG2E / math.sqrt(q.shape[-1]))
    return *queries, *_rotate_and_quantize(k, mean, 1 / factor, 1.0, block)


def _rotate_and_quantize(
    x: Tensor, mean: Tensor, factor: Tensor, multiply: float, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """(x − mean) · factor, rotated → int8 [B, N, L, D] and scales float32, times `multiply`: [B, N, L], or one for each
    `block` tokens.

    Bytes, at least: 2 + 1 an element (bf16 in); 1.2 GB for 75,600 tokens of width 5120.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, heads, dim = x.shape
    out = torch.empty((batch, heads, length, dim), dtype=torch.int8, device=x.device)
    rows = block or 64
    scales = -(-length // block) if block else length
    scale = torch.empty((batch, heads, scales), dtype=torch.float32, device=x.device)
    launch(
        _rotate_kernel, (-(-length // (rows * BLOCKS)), heads, batch), x, mean.contiguous(), factor.contiguous(),
        hadamard(dim, x.device), out, scale, length, heads, multiply, x.stride(0), x.stride(1), x.stride(2), D=dim,
        ROWS=rows, BLOCK=bool(block), BLOCKS=BLOCKS, num_warps=8,
    )  # fmt: skip
    return out, scale


def _transpose_and_quantize(
    v: Tensor, dtype: torch.dtype, ordered: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_v`, laid out as 8-bit tensor cores want it: both factors of a product along the summed axis, which for
    v are the tokens. ordered: each 16 of them in attention_hopper's thread order.

    Bytes, at least: 2 (statistics) + 2 + 1 an element; 1.9 GB for 75,600 tokens of width 5120.
    """
    v = v if v.stride(-1) == 1 else v.contiguous()
    batch, keys, heads, dim = v.shape
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    mean, _, most, least = statistics(v)
    spread = torch.maximum(most - mean, mean - least)
    scale = (spread / largest).clamp_(min=SMALLEST)
    room = torch.empty((batch, heads, dim, -(-keys // 128) * 128), dtype=dtype, device=v.device)
    launch(
        _transpose_kernel, (room.shape[-1] // 64, heads, batch), v, mean, scale, room, keys, room.shape[-1], heads,
        v.stride(0), v.stride(1), v.stride(2), D=dim, ROWS=64, LARGEST=largest, ORDERED=ordered, num_warps=4,
    )  # fmt: skip
    return room.permute(0, 3, 1, 2), scale, mean


@jit
def _statistics_kernel(
    x, parts, length, heads, batch, quantity,
    sample_stride, token_stride, head_stride, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one head → each channel's sum, sum of squares, largest and smallest."""
    head, sample, d = tl.program_id(1), tl.program_id(2), tl.arange(0, D)
    start = x + sample.to(tl.int64) * sample_stride + head * head_stride
    sums, squares = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
    most, least = tl.full([ROWS, D], float("-inf"), tl.float32), tl.full([ROWS, D], float("inf"), tl.float32)
    for part in range(CHUNK // ROWS):
        rows = tl.program_id(0) * CHUNK + part * ROWS + tl.arange(0, ROWS)
        inside = (rows < length)[:, None]
        tokens = tl.load(start + rows.to(tl.int64)[:, None] * token_stride + d[None, :], inside, 0.0).to(tl.float32)
        sums += tokens
        squares += tokens * tokens
        most = tl.maximum(most, tl.where(inside, tokens, float("-inf")))
        least = tl.minimum(least, tl.where(inside, tokens, float("inf")))
    at = parts + ((tl.program_id(0) * batch + sample) * heads + head) * D + d
    tl.store(at, tl.sum(sums, 0))
    tl.store(at + quantity, tl.sum(squares, 0))
    tl.store(at + 2 * quantity, tl.max(most, 0))
    tl.store(at + 3 * quantity, tl.min(least, 0))


@jit
def _rotate_kernel(
    x, mean, factor, matrix, out, scale, length, heads,
    multiply, sample_stride, token_stride, head_stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS times ROWS tokens of one head. BLOCK: ROWS of them share a scale."""
    head, sample, d = tl.program_id(1), tl.program_id(2), tl.arange(0, D)
    here = (sample * heads + head).to(tl.int64)
    start = x + sample.to(tl.int64) * sample_stride + head * head_stride
    middle, times = tl.load(mean + here * D + d)[None, :], tl.load(factor + here * D + d)[None, :]
    turn = tl.load(matrix + d[:, None] * D + d[None, :])
    for part in range(BLOCKS):
        number = tl.program_id(0) * BLOCKS + part
        rows = number * ROWS + tl.arange(0, ROWS)
        inside = rows < length
        tokens = tl.load(start + rows.to(tl.int64)[:, None] * token_stride + d[None, :], inside[:, None], 0.0)
        tokens = (tokens.to(tl.float32) - middle) * times
        tokens = tl.dot(tokens, turn, input_precision="tf32")  # rounds a tenth of what int8 will
        step = tl.maximum(tl.max(tl.where(inside[:, None], tl.abs(tokens), 0.0), 1) / 127.0, 1e-12)
        if BLOCK:
            one = tl.max(step, 0)
            tl.store(scale + here * tl.cdiv(length, ROWS) + number, one * multiply, number * ROWS < length)
            steps = tokens * (1.0 / one)
        else:
            tl.store(scale + here * length + rows, step * multiply, inside)
            steps = tokens * (1.0 / step)[:, None]
        steps = tl.where(steps < 0, steps - 0.5, steps + 0.5)  # the conversion cuts towards zero
        tl.store(out + (here * length + rows)[:, None] * D + d[None, :], steps.to(tl.int8), inside[:, None])


@jit
def _transpose_kernel(
    v, mean, scale, out, keys, room, heads, sample_stride,
    token_stride, head_stride, D: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one head, [ROWS, D] → [D, ROWS]; zeros beyond the last."""
    head, sample = tl.program_id(1), tl.program_id(2)
    places, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    rows = places
    if ORDERED:
        at = places % 16
        rows = places - at + 8 * (at // 2 % 2) + 2 * (at // 4) + at % 2
    here = (sample * heads + head).to(tl.int64)
    start = v + sample.to(tl.int64) * sample_stride + head * head_stride
    inside = (rows < keys)[:, None]
    tokens = tl.load(start + rows.to(tl.int64)[:, None] * token_stride + d[None, :], inside, 0.0).to(tl.float32)
    steps = (tokens - tl.load(mean + here * D + d)[None, :]) / tl.load(scale + here * D + d)[None, :]
    steps = tl.where(inside, tl.minimum(tl.maximum(steps, -LARGEST), LARGEST), 0.0)
    if LARGEST == 127:
        steps = tl.where(steps < 0, steps - 0.5, steps + 0.5)
    tl.store(out + here * D * room + d[None, :] * room + places[:, None], steps.to(out.dtype.element_ty))


@jit
def _attend_kernel(
    q, k, v, q_scale, k_scale, v_scale, v_mean,
    out, length, keys, heads, v_sample, v_token, v_head, v_channel,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PV: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head, over all keys, with a running maximum and sum (FlashAttention 2, Dao
    2023). Programs of one head follow each other: its keys and values stay in the L2 cache."""
    head, sample = tl.program_id(1), tl.program_id(2)
    here = (sample * heads + head).to(tl.int64)
    rows, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    inside = rows < length
    queries = tl.load(q + (here * length + rows)[:, None] * D + d[None, :], inside[:, None], 0)
    step = tl.load(q_scale + here * length + rows, inside, 0.0)
    k += here * keys * D
    k_scale += here * tl.cdiv(keys, COLUMNS)
    v += sample.to(tl.int64) * v_sample + head.to(tl.int64) * v_head
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, D), tl.float32)
    whole = keys // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        peak, total, result = _take_keys(
            queries, step, k, k_scale, v, start, keys, v_token, v_channel, peak, total, result, D, COLUMNS, PV, SHIFT,
            False,
        )  # fmt: skip
    if whole < keys:
        peak, total, result = _take_keys(
            queries, step, k, k_scale, v, whole, keys, v_token, v_channel, peak, total, result, D, COLUMNS, PV, SHIFT,
            True,
        )  # fmt: skip
    result = result / total[:, None] * tl.load(v_scale + here * D + d)[None, :]
    result = result + tl.load(v_mean + here * D + d)[None, :]
    place = out + ((sample.to(tl.int64) * length + rows)[:, None] * heads + head) * D + d[None, :]
    tl.store(place, result.to(out.dtype.element_ty), inside[:, None])


@jit
def _take_keys(
    queries, step, k, k_scale, v, start, keys, v_token,
    v_channel, peak, total, result, D: tl.constexpr, COLUMNS: tl.constexpr, PV: tl.constexpr,
    SHIFT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One block of keys. Exponents are of base 2: log2 e is in the queries' scale. The instructions per score decide
    the speed: a scale for each row, its maximum in it, and the factor that probabilities are rounded with are one
    multiplication and addition inside the exponent."""
    columns, d = start + tl.arange(0, COLUMNS), tl.arange(0, D)
    step = step * tl.load(k_scale + start // COLUMNS)
    if LAST:
        inside = columns < keys
        these = tl.load(k + columns.to(tl.int64)[None, :] * D + d[:, None], inside[None, :], 0)
        values = tl.load(v + columns.to(tl.int64)[:, None] * v_token + d[None, :] * v_channel, inside[:, None], 0.0)
        scores = tl.where(inside[None, :], tl.dot(queries, these).to(tl.float32), -3e38)  # times no step, too
    else:
        these = tl.load(k + columns.to(tl.int64)[None, :] * D + d[:, None])
        values = tl.load(v + columns.to(tl.int64)[:, None] * v_token + d[None, :] * v_channel)
        scores = tl.dot(queries, these).to(tl.float32)
    top = tl.max(scores, 1) * step
    higher = tl.maximum(peak, top)
    fade = tl.exp2(peak - higher)
    if PV == 2:  # INT8: 127 times the probabilities relative to this block's own largest
        p = tl.exp2(scores * step[:, None] + (6.988684686772166 - top)[:, None])
        weight = tl.exp2(top - higher - 6.988684686772166)
        total = total * fade + tl.sum(p, 1) * weight
        # 1.5 · 2²³ leaves the nearest whole number in the lowest byte.
        steps = (p + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        result = result * fade[:, None] + tl.dot(steps, values).to(tl.float32) * weight[:, None]
    else:
        p = tl.exp2(scores * step[:, None] + (SHIFT - higher)[:, None])
        total = total * fade + tl.sum(p, 1)
        if PV == 1:  # added outside of the product: on Hopper, FP8 products are summed in fewer bits than float32 has
            result = result * fade[:, None] + tl.dot(p.to(values.dtype), values)
        else:
            result = tl.dot(p.to(values.dtype), values, result * fade[:, None])
    return higher, total, result

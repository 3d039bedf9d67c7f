"""8-bit attention for Hopper alone: INT8 scores and bf16 values, with the order of things in our own hands.

Triton waits for every product as soon as it has begun it, unless the next one continues its sum; the tensor cores then
stand still during the softmax. Gluon, Triton's lower level, lets a kernel say when to wait. Its numbers are those of
attention_8bit.py with `bf16` values, whose plain form is this one's too. It cannot be interpreted: a test compiles it,
and a run measures it before it trusts it (attention.py).

Gluon is experimental, and its names change from one Triton to the next: where it is absent, `GLUON` is False.
"""

from typing import Any

from torch import Tensor

from wan22.kernels.dispatch import launch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # Names of later Tritons, and of 3.6.
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
    GLUON = True
except (ImportError, AttributeError):
    GLUON = False

    class gl:  # type: ignore[no-redef]
        constexpr = object


def jit(kernel: Any) -> Any:
    return gluon.jit(kernel) if GLUON else kernel


def attend(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, out: Tensor, columns: int) -> None:
    """q, k [B, N, L, D] int8, q_scale [B, N, L] with log2 e / √D in it, k_scale [B, N, blocks of `columns` keys];
    v [B, M, N, D] bf16, a view with gaps too → out [B, L, N, D]. D is 128, or 64."""
    batch, heads, length, dim = q.shape
    launch(
        attend_kernel, (-(-length // ROWS), heads, batch), q, k, v, q_scale, k_scale, out, length, k.shape[2], heads,
        v.stride(0), v.stride(1), v.stride(2), D=dim, ROWS=ROWS, COLUMNS=columns, WARPS=WARPS, num_warps=WARPS,
    )  # fmt: skip


ROWS, WARPS = 128, 8  # two warpgroups of 64 queries


@jit
def _copy_rows(target, base, start, end, stride, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Begin to copy rows `start` … of `base` to shared memory; zeros from row `end` on."""
    rows = start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    pointers = base + rows.to(gl.int64)[:, None] * stride + columns[None, :]
    async_load(target, pointers, mask=(rows < end)[:, None])
    async_copy.commit_group()


@jit
def _exponentials(numbers, scale, peak, total):
    higher = gl.maximum(peak, gl.max(numbers, 1) * scale)
    fade = gl.exp2(peak - higher)
    p = gl.exp2(numbers * scale[:, None] - higher[:, None])
    return p, fade, higher, total * fade + gl.sum(p, 1)


@jit
def attend_kernel(
    q, k, v, q_scale, k_scale, out, length, keys, heads, v_sample, v_token, v_head,
    D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head, over all keys. While the tensor cores multiply the probabilities of one
    block of keys by its values, the others compute the exponentials of the next: the order in which FlashAttention-3
    (Shah et al. 2024, section 3.2) overlaps them within a warpgroup. ptxas keeps products asynchronous only as long as
    nothing else touches their registers meanwhile: so probabilities stay float32 until the product before is done."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 32])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=result_layout, k_width=2)
    bytes_layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // D, D // 16], [WARPS, 1], [1, 0])
    half_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [WARPS, 1], [1, 0])
    byte_tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    half_tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, result_layout)

    head, sample = gl.program_id(1), gl.program_id(2)
    here = (sample * heads + head).to(gl.int64)
    first = gl.program_id(0) * ROWS
    blocks = gl.cdiv(keys, COLUMNS)
    q += here * length * D
    k += here * keys * D
    k_scale += here * blocks
    v += sample.to(gl.int64) * v_sample + head.to(gl.int64) * v_head

    q_tile = gl.allocate_shared_memory(gl.int8, [ROWS, D], byte_tile)
    k_tiles = gl.allocate_shared_memory(gl.int8, [2, COLUMNS, D], byte_tile)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, COLUMNS, D], half_tile)
    _copy_rows(q_tile, q, first, length, D, ROWS, D, bytes_layout)
    _copy_rows(k_tiles.index(0), k, 0, keys, D, COLUMNS, D, bytes_layout)
    _copy_rows(v_tiles.index(0), v, 0, keys, v_token, COLUMNS, D, half_layout)
    _copy_rows(k_tiles.index(1), k, COLUMNS, keys, D, COLUMNS, D, bytes_layout)

    rows = first + gl.arange(0, ROWS, row_layout)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout))
    step = gl.load(q_scale + here * length + rows, rows < length, 0.0)
    nothing = gl.zeros([ROWS, COLUMNS], gl.int32, scores_layout)
    peak = gl.full([ROWS], -1e30, gl.float32, row_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    sums = gl.zeros([ROWS, D], gl.float32, result_layout)

    async_copy.wait_group(2)  # queries and the first keys
    fence_async_shared()
    barrier()
    scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    numbers = warpgroup_mma_wait(0, deps=[scores]).to(gl.float32)
    if blocks == 1:
        numbers = gl.where((columns < keys)[None, :], numbers, -3e38)
    p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale), peak, total)
    for block in range(blocks - 2):
        half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        # The next keys and these values are there; and nobody reads the tiles that are filled next.
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        _copy_rows(v_tiles.index((block + 1) % 2), v, (block + 1) * COLUMNS, keys, v_token, COLUMNS, D, half_layout)
        _copy_rows(k_tiles.index(block % 2), k, (block + 2) * COLUMNS, keys, D, COLUMNS, D, bytes_layout)
        scores = warpgroup_mma(
            q_tile, k_tiles.index((block + 1) % 2).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        result = warpgroup_mma(half, v_tiles.index(block % 2), sums, is_async=True)
        numbers = warpgroup_mma_wait(1, deps=[scores]).to(gl.float32)
        # The exponentials of the next block, while these values are multiplied.
        p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale + block + 1), peak, total)
        sums = warpgroup_mma_wait(0, deps=[result])
        sums = sums * gl.convert_layout(fade, out_row_layout)[:, None]
    if blocks > 1:
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        last = blocks - 1
        half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        _copy_rows(v_tiles.index(last % 2), v, last * COLUMNS, keys, v_token, COLUMNS, D, half_layout)
        scores = warpgroup_mma(q_tile, k_tiles.index(last % 2).permute((1, 0)), nothing, use_acc=False, is_async=True)
        result = warpgroup_mma(half, v_tiles.index((last - 1) % 2), sums, is_async=True)
        numbers = warpgroup_mma_wait(1, deps=[scores]).to(gl.float32)
        numbers = gl.where((last * COLUMNS + columns < keys)[None, :], numbers, -3e38)
        p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale + last), peak, total)
        sums = warpgroup_mma_wait(0, deps=[result])
        sums = sums * gl.convert_layout(fade, out_row_layout)[:, None]
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
    result = warpgroup_mma(half, v_tiles.index((blocks - 1) % 2), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[result])
    async_copy.wait_group(0)
    sums = sums / gl.convert_layout(total, out_row_layout)[:, None]
    rows = first + gl.arange(0, ROWS, out_row_layout)
    d = gl.arange(0, D, gl.SliceLayout(0, result_layout))
    place = out + ((sample.to(gl.int64) * length + rows)[:, None] * heads + head) * D + d[None, :]
    gl.store(place, sums.to(out.dtype.element_ty), (rows < length)[:, None])

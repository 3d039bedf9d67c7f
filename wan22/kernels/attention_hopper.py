"""8-bit attention for Hopper alone: INT8 scores and bf16 values, with the order of things in our own hands.

Triton waits for every product as soon as it has begun it, unless the next one continues its sum; the tensor cores then
stand still during the softmax. Gluon, Triton's lower level, lets a kernel say when to wait. Its numbers are those of
attention_8bit.py with `bf16` values, whose plain form is this one's too. It cannot be interpreted: a test compiles it,
and a run measures it before it trusts it (attention.py).

Gluon is experimental, and its names change from one Triton to the next: where they are others, `GLUON` is False.
"""

from typing import Any

from torch import Tensor

from wan22.kernels.dispatch import launch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Names of later Tritons, and of 3.6.
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    GLUON = True
except (ImportError, AttributeError):
    GLUON = False

    class gl:  # type: ignore[no-redef]
        constexpr = object


ROWS, WARPS = 128, 8  # queries of a program: 64 for each of two warpgroups


def jit(kernel: Any) -> Any:
    return gluon.jit(kernel) if GLUON else kernel


def tile(dim: int, bits: int) -> Any:
    """The layout in shared memory of rows of `dim` numbers, as the tensor cores read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, dim * bits // 8), element_bitwidth=bits, rank=2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, out: Tensor, columns: int, apart: bool
) -> None:
    """q, k [B, N, L, D] int8, q_scale [B, N, L] with log2 e / √D in it, k_scale [B, N, blocks of `columns` keys];
    v [B, M, N, D] bf16, a view with gaps too → out [B, L, N, D]. D is 128, or 64. apart: the warpgroups each at its
    own pace; else in step."""
    (batch, heads, length, dim), keys = q.shape, k.shape[2]
    if v.stride(3) != 1 or v.stride(2) != dim or (batch > 1 and v.stride(0) != keys * v.stride(1)):
        v = v.contiguous()
    flat = v.as_strided((batch * keys, heads * dim), (v.stride(1), 1))
    kernel: Any = attend_apart_kernel if apart else attend_kernel
    height = ROWS // 2 if apart else ROWS
    shape = {"HALF": height, "num_warps": 4} if apart else {"ROWS": height, "WARPS": WARPS, "num_warps": WARPS}
    launch(
        kernel, (-(-length // ROWS), heads, batch),
        # The launcher looks at the first argument for the device: scales before descriptors.
        q_scale, k_scale, out, TensorDescriptor.from_tensor(q.view(-1, dim), [height, dim], tile(dim, 8)),
        TensorDescriptor.from_tensor(k.view(-1, dim), [columns, dim], tile(dim, 8)),
        TensorDescriptor.from_tensor(flat, [columns, dim], tile(dim, 16)), length, keys, heads, D=dim,
        COLUMNS=columns, **shape,
    )  # fmt: skip


@jit
def _begin_copy(desc, row, column, bars, slot, tiles, BYTES: gl.constexpr):
    """Have a tile copied to shared memory; its barrier's phase ends when all of it is there."""
    mbarrier.expect(bars.index(slot), BYTES)
    tma_load(desc, [row, column], bars.index(slot), tiles.index(slot))


@jit
def _exponentials(numbers, scale, peak, total):
    higher = gl.maximum(peak, gl.max(numbers, 1) * scale)
    fade = gl.exp2(peak - higher)
    p = gl.exp2(numbers * scale[:, None] - higher[:, None])
    return p, fade, higher, total * fade + gl.sum(p, 1)


@jit
def attend_kernel(
    q_scale, k_scale, out, q, k, v, length, keys, heads,
    D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head, over all keys. While the tensor cores multiply the probabilities of one
    block of keys by its values, the other units compute the exponentials of the next: the order in which
    FlashAttention-3 (Shah et al. 2024, section 3.2) overlaps them. ptxas keeps products asynchronous only as long as
    nothing else touches their registers: so probabilities stay float32 until the product before is done, and are
    rounded before the next scores are begun."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 32])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=result_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, result_layout)

    head, sample = gl.program_id(1), gl.program_id(2)
    here = (sample * heads + head).to(gl.int64)
    first = gl.program_id(0) * ROWS
    blocks = gl.cdiv(keys, COLUMNS)
    k_scale += here * blocks
    row_q, row_k = (sample * heads + head) * length + first, (sample * heads + head) * keys
    row_v, column_v = sample * keys, head * D

    q_tile = gl.allocate_shared_memory(gl.int8, [1, ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [2, COLUMNS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, COLUMNS, D], v.layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(k_bars.index(slot), count=1)
        mbarrier.init(v_bars.index(slot), count=1)
    fence_async_shared()
    barrier()
    _begin_copy(q, row_q, 0, q_bars, 0, q_tile, ROWS * D)
    _begin_copy(k, row_k, 0, k_bars, 0, k_tiles, COLUMNS * D)
    _begin_copy(v, row_v, column_v, v_bars, 0, v_tiles, 2 * COLUMNS * D)
    _begin_copy(k, row_k + COLUMNS, 0, k_bars, 1, k_tiles, COLUMNS * D)

    rows = first + gl.arange(0, ROWS, row_layout)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout))
    step = gl.load(q_scale + here * length + rows, rows < length, 0.0)
    nothing = gl.zeros([ROWS, COLUMNS], gl.int32, scores_layout)
    peak = gl.full([ROWS], -1e30, gl.float32, row_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    sums = gl.zeros([ROWS, D], gl.float32, result_layout)

    mbarrier.wait(q_bars.index(0), 0)
    mbarrier.wait(k_bars.index(0), 0)
    scores = warpgroup_mma(q_tile.index(0), k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    numbers = warpgroup_mma_wait(0, deps=[scores]).to(gl.float32)
    if blocks == 1:
        numbers = gl.where((columns < keys)[None, :], numbers, -3e38)
        mbarrier.wait(k_bars.index(1), 0)  # no copy may be under way at the end
    p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale), peak, total)
    for block in range(blocks - 2):
        half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        barrier()  # nobody reads the tiles any more that are filled next
        _begin_copy(v, row_v + (block + 1) * COLUMNS, column_v, v_bars, (block + 1) % 2, v_tiles, 2 * COLUMNS * D)
        _begin_copy(k, row_k + (block + 2) * COLUMNS, 0, k_bars, block % 2, k_tiles, COLUMNS * D)
        mbarrier.wait(k_bars.index((block + 1) % 2), (block + 1) // 2 % 2)
        mbarrier.wait(v_bars.index(block % 2), block // 2 % 2)
        scores = warpgroup_mma(
            q_tile.index(0), k_tiles.index((block + 1) % 2).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        result = warpgroup_mma(half, v_tiles.index(block % 2), sums, is_async=True)
        numbers = warpgroup_mma_wait(1, deps=[scores]).to(gl.float32)
        # The exponentials of the next block, while these values are multiplied.
        p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale + block + 1), peak, total)
        sums = warpgroup_mma_wait(0, deps=[result])
        sums = sums * gl.convert_layout(fade, out_row_layout)[:, None]
    if blocks > 1:
        last = blocks - 1
        half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        barrier()
        _begin_copy(v, row_v + last * COLUMNS, column_v, v_bars, last % 2, v_tiles, 2 * COLUMNS * D)
        mbarrier.wait(k_bars.index(last % 2), last // 2 % 2)
        mbarrier.wait(v_bars.index((last - 1) % 2), (last - 1) // 2 % 2)
        scores = warpgroup_mma(
            q_tile.index(0), k_tiles.index(last % 2).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        result = warpgroup_mma(half, v_tiles.index((last - 1) % 2), sums, is_async=True)
        numbers = warpgroup_mma_wait(1, deps=[scores]).to(gl.float32)
        numbers = gl.where((last * COLUMNS + columns < keys)[None, :], numbers, -3e38)
        p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale + last), peak, total)
        sums = warpgroup_mma_wait(0, deps=[result])
        sums = sums * gl.convert_layout(fade, out_row_layout)[:, None]
    mbarrier.wait(v_bars.index((blocks - 1) % 2), (blocks - 1) // 2 % 2)
    half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
    result = warpgroup_mma(half, v_tiles.index((blocks - 1) % 2), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[result])
    sums = sums / gl.convert_layout(total, out_row_layout)[:, None]
    rows = first + gl.arange(0, ROWS, out_row_layout)
    d = gl.arange(0, D, gl.SliceLayout(0, result_layout))
    place = out + ((sample.to(gl.int64) * length + rows)[:, None] * heads + head) * D + d[None, :]
    gl.store(place, sums.to(out.dtype.element_ty), (rows < length)[:, None])


@jit
def _produce(q, k, v, q_tiles, k_tiles, v_tiles, bars, row_q, row_k, row_v, column_v, blocks, HALF: gl.constexpr,
             COLUMNS: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Fetch every tile as soon as both warpgroups are done with what lay in its place."""
    q_bars, k_full, v_full, k_empty, v_empty = bars
    for part in gl.static_range(2):
        _begin_copy(q, row_q + part * HALF, 0, q_bars, part, q_tiles, HALF * D)
    _begin_copy(k, row_k, 0, k_full, 0, k_tiles, COLUMNS * D)
    for block in range(blocks):
        ahead = block + 1
        if ahead < blocks:
            mbarrier.wait(k_empty.index(ahead % 2), (ahead // 2 + 1) % 2, pred=ahead >= 2)
            _begin_copy(k, row_k + ahead * COLUMNS, 0, k_full, ahead % 2, k_tiles, COLUMNS * D)
        mbarrier.wait(v_empty.index(block % 2), (block // 2 + 1) % 2, pred=block >= 2)
        _begin_copy(v, row_v + block * COLUMNS, column_v, v_full, block % 2, v_tiles, 2 * COLUMNS * D)


@jit
def _consume(part: gl.constexpr, q_scale, k_scale, out, q_tiles, k_tiles, v_tiles, bars, length, keys, place,
             HALF: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """One warpgroup: HALF queries over all keys, in the order of `attend_kernel`."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=result_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, result_layout)
    q_bars, k_full, v_full, k_empty, v_empty = bars
    first, head, heads, here, sample = place
    blocks = gl.cdiv(keys, COLUMNS)
    begin = first + part * HALF
    rows = begin + gl.arange(0, HALF, row_layout)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout))
    step = gl.load(q_scale + here * length + rows, rows < length, 0.0)
    nothing = gl.zeros([HALF, COLUMNS], gl.int32, scores_layout)
    peak = gl.full([HALF], -1e30, gl.float32, row_layout)
    total = gl.zeros([HALF], gl.float32, row_layout)
    sums = gl.zeros([HALF, D], gl.float32, result_layout)
    queries = q_tiles.index(part)

    mbarrier.wait(q_bars.index(part), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(queries, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    numbers = warpgroup_mma_wait(0, deps=[scores]).to(gl.float32)
    mbarrier.arrive(k_empty.index(0))
    if blocks == 1:
        numbers = gl.where((columns < keys)[None, :], numbers, -3e38)
    p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale), peak, total)
    for block in range(blocks - 2):
        half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        mbarrier.wait(k_full.index((block + 1) % 2), (block + 1) // 2 % 2)
        mbarrier.wait(v_full.index(block % 2), block // 2 % 2)
        scores = warpgroup_mma(
            queries, k_tiles.index((block + 1) % 2).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        result = warpgroup_mma(half, v_tiles.index(block % 2), sums, is_async=True)
        numbers = warpgroup_mma_wait(1, deps=[scores]).to(gl.float32)
        mbarrier.arrive(k_empty.index((block + 1) % 2))
        p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale + block + 1), peak, total)
        sums = warpgroup_mma_wait(0, deps=[result])
        mbarrier.arrive(v_empty.index(block % 2))
        sums = sums * gl.convert_layout(fade, out_row_layout)[:, None]
    if blocks > 1:
        last = blocks - 1
        half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        mbarrier.wait(k_full.index(last % 2), last // 2 % 2)
        mbarrier.wait(v_full.index((last - 1) % 2), (last - 1) // 2 % 2)
        scores = warpgroup_mma(queries, k_tiles.index(last % 2).permute((1, 0)), nothing, use_acc=False, is_async=True)
        result = warpgroup_mma(half, v_tiles.index((last - 1) % 2), sums, is_async=True)
        numbers = warpgroup_mma_wait(1, deps=[scores]).to(gl.float32)
        numbers = gl.where((last * COLUMNS + columns < keys)[None, :], numbers, -3e38)
        p, fade, peak, total = _exponentials(numbers, step * gl.load(k_scale + last), peak, total)
        sums = warpgroup_mma_wait(0, deps=[result])
        mbarrier.arrive(v_empty.index((last - 1) % 2))
        sums = sums * gl.convert_layout(fade, out_row_layout)[:, None]
    mbarrier.wait(v_full.index((blocks - 1) % 2), (blocks - 1) // 2 % 2)
    half = gl.convert_layout(p.to(gl.bfloat16), p_layout)
    result = warpgroup_mma(half, v_tiles.index((blocks - 1) % 2), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[result])
    sums = sums / gl.convert_layout(total, out_row_layout)[:, None]
    rows = begin + gl.arange(0, HALF, out_row_layout)
    d = gl.arange(0, D, gl.SliceLayout(0, result_layout))
    place = out + ((sample.to(gl.int64) * length + rows)[:, None] * heads + head) * D + d[None, :]
    gl.store(place, sums.to(out.dtype.element_ty), (rows < length)[:, None])


@jit
def attend_apart_kernel(
    q_scale, k_scale, out, q, k, v, length, keys, heads,
    D: gl.constexpr, HALF: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """`attend_kernel` with its two warpgroups apart, each at its own pace, so that one's products fill the time of the
    other's softmax, and a warp that fetches tiles (FlashAttention-3, section 3.1). They meet at barriers of the tiles
    alone."""
    head, sample = gl.program_id(1), gl.program_id(2)
    here = (sample * heads + head).to(gl.int64)
    first = gl.program_id(0) * (2 * HALF)
    blocks = gl.cdiv(keys, COLUMNS)
    k_scale += here * blocks
    row_q, row_k = (sample * heads + head) * length + first, (sample * heads + head) * keys
    row_v, column_v = sample * keys, head * D
    q_tiles = gl.allocate_shared_memory(gl.int8, [2, HALF, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [2, COLUMNS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, COLUMNS, D], v.layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_bars.index(slot), count=1)
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    barrier()
    bars = (q_bars, k_full, v_full, k_empty, v_empty)
    place = (first, head, heads, here, sample)
    gl.warp_specialize(
        [
            (_consume, (0, q_scale, k_scale, out, q_tiles, k_tiles, v_tiles, bars, length, keys, place, HALF, COLUMNS,
                         D)),
            (_consume, (1, q_scale, k_scale, out, q_tiles, k_tiles, v_tiles, bars, length, keys, place, HALF, COLUMNS,
                         D)),
            (_produce, (q, k, v, q_tiles, k_tiles, v_tiles, bars, row_q, row_k, row_v, column_v, blocks, HALF, COLUMNS,
                         D)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

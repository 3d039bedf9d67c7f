"""8-bit attention for Hopper alone: INT8 scores, probabilities and values, so that tensor cores and softmax overlap.

Triton waits for every product as soon as it has begun it; the tensor cores then stand still during the softmax. Gluon,
its lower level, lets a kernel say when to wait. The numbers are those of attention_8bit.py with `int8` values, whose
plain form is this one's too.

A program holds 128 queries of one head. Two warpgroups have 64 of them each and go at their own pace, so that one's
products fill the time of the other's softmax; a warp beside them fetches tiles of keys and values (FlashAttention-3,
Shah et al. 2024, section 3.1). They meet at the tiles' barriers alone. What decides the speed then are the instructions
a score, of which an H100 has time for about nine beside 8-bit products:

- Sums over keys are kept relative to the largest score of the block of keys that came last, not of all so far: going on
  to the next block is then one multiplication and addition, the same that adds the block's own sum.
- A probability is a multiple of 2⁻²⁴: the conversion to float16, whose smallest number that is, rounds it, and leaves
  the whole number 0 … 127 in the lowest byte.
- Values lie in the order in which the scores' product leaves its columns with the threads, so that probabilities become
  the next product's factor where they are. Of 16 columns of a result each thread of four has 2t, 2t + 1, 8 + 2t and
  8 + 2t + 1 (PTX ISA, wgmma, "Register Fragments"), and of an 8-bit factor it is to have 4t … 4t + 3: the thread order.

Gluon is experimental, and its names change from one Triton to the next: where they are others, `GLUON` is False. No
interpreter of Triton's runs it: `tests/kernels/gluon_on_cpu.py` does.
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
        @staticmethod
        def constexpr(value: Any) -> Any:
            return value


QUERIES, KEYS, STAGES = 64, 128, 4  # queries of a warpgroup, keys of a tile, tiles in flight
DIMS = (64, 128)  # of a head

LEVEL = gl.constexpr(6.988684686772166 - 24)  # log2 of 127 · 2⁻²⁴
LOWEST = gl.constexpr(-64.0)  # log2 of the least share of a row's largest score so far that a block can be counted by
ROUND = gl.constexpr("""
{
.reg .b32 lo, hi;
cvt.rn.f16x2.f32 lo, $2, $1;
cvt.rn.f16x2.f32 hi, $4, $3;
prmt.b32 $0, lo, hi, 0x6420;
}
""")


def jit(kernel: Any) -> Any:
    return gluon.jit(kernel) if GLUON else kernel


def tile(width: int) -> Any:
    """The layout in shared memory of rows of `width` bytes, as the tensor cores read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, width), element_bitwidth=8, rank=2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, v_mean: Tensor, out: Tensor
) -> None:
    """q, k [B, N, L, D] int8, q_scale [B, N, L] with log2 e / √D in it, k_scale [B, N, blocks of 128 keys];
    v [B, N, D, M'] int8 in thread order, M' a multiple of 128 with zeros beyond the last key, v_scale, v_mean
    [B, 1, N, D] → out [B, L, N, D]. D is 64 or 128."""
    (batch, heads, length, dim), keys, room = q.shape, k.shape[2], v.shape[3]
    assert dim in DIMS, dim
    assert room % KEYS == 0, room
    launch(
        attend_kernel, (-(-length // (2 * QUERIES)), heads, batch),
        # The launcher looks at the first argument for the device: scales before descriptors.
        q_scale, k_scale, v_scale.contiguous(), v_mean.contiguous(), out,
        TensorDescriptor.from_tensor(q.view(-1, dim), [QUERIES, dim], tile(dim)),
        TensorDescriptor.from_tensor(k.view(-1, dim), [KEYS, dim], tile(dim)),
        TensorDescriptor.from_tensor(v.view(-1, room), [dim, KEYS], tile(KEYS)),
        length, keys, heads, D=dim, ROWS=QUERIES, COLUMNS=KEYS, SLOTS=STAGES, num_warps=4,
    )  # fmt: skip


@jit
def attend_kernel(
    q_scale, k_scale, v_scale, v_mean, out, q, k, v,
    length, keys, heads, D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One program: two times ROWS queries of one head, over all keys."""
    head, sample = gl.program_id(1), gl.program_id(2)
    here = sample * heads + head
    first, blocks = gl.program_id(0) * (2 * ROWS), gl.cdiv(keys, COLUMNS)
    q_tiles = gl.allocate_shared_memory(gl.int8, [2, ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [SLOTS, COLUMNS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.int8, [SLOTS, D, COLUMNS], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(q_full.index(part), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    barrier()
    tiles = (q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty)
    scales = (q_scale, k_scale, v_scale, v_mean)
    place = (first, here, length, keys, blocks)
    target = (out, sample, head, heads)
    gl.warp_specialize(
        [
            (_consume, (0, scales, tiles, place, target, D, ROWS, COLUMNS, SLOTS)),
            (_consume, (1, scales, tiles, place, target, D, ROWS, COLUMNS, SLOTS)),
            (_produce, (q, k, v, tiles, place, D, ROWS, COLUMNS, SLOTS)),
        ],
        [4, 1],
        [240, 24],
    )


@jit
def _produce(
    q, k, v, tiles, place, D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Fetch every tile as soon as both warpgroups are done with what lay in its place."""
    q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty = tiles
    first, here, length, keys, blocks = place
    for part in gl.static_range(2):
        _fetch(q, here * length + first + part * ROWS, 0, q_full, part, q_tiles, ROWS * D)
    for block in range(blocks):
        slot = block % SLOTS
        before = (block // SLOTS + 1) % 2  # the phase in which the block that lay there was read
        mbarrier.wait(k_empty.index(slot), before, pred=block >= SLOTS)
        _fetch(k, here * keys + block * COLUMNS, 0, k_full, slot, k_tiles, COLUMNS * D)
        mbarrier.wait(v_empty.index(slot), before, pred=block >= SLOTS)
        _fetch(v, here * D, block * COLUMNS, v_full, slot, v_tiles, COLUMNS * D)


@jit
def _fetch(tensor, row, column, bars, slot, tiles, BYTES: gl.constexpr):
    """Have a tile copied to shared memory; its barrier's phase ends when all of it is there."""
    mbarrier.expect(bars.index(slot), BYTES)
    tma_load(tensor, [row, column], bars.index(slot), tiles.index(slot))


@jit
def _consume(
    part: gl.constexpr, scales, tiles, place, target,
    D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: ROWS queries over all keys. The next block's scores are begun together with this block's sum, and
    multiplied while the sum is added. No product is under way when the loop turns: ptxas would wait for each."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_layout, k_width=4)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, sums_layout)
    q_scale, k_scale, v_scale, v_mean = scales
    q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty = tiles
    first, here, length, keys, blocks = place
    begin = first + part * ROWS
    rows = begin + gl.arange(0, ROWS, row_layout)
    step = gl.load(q_scale + here.to(gl.int64) * length + rows, rows < length, 0.0)
    k_scale += here * blocks
    queries = q_tiles.index(part)
    no_scores = gl.zeros([ROWS, COLUMNS], gl.int32, scores_layout)
    no_sums = gl.zeros([ROWS, D], gl.int32, sums_layout)
    result = gl.zeros([ROWS, D], gl.float32, sums_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    base = gl.full([ROWS], -1e30, gl.float32, row_layout)
    peak = base

    scale = gl.load(k_scale)
    mbarrier.wait(q_full.index(part), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(queries, k_tiles.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0))
    for block in range(blocks - 1):
        slot, after = block % SLOTS, (block + 1) % SLOTS
        p, total, fade, peak, base = _softmax(
            scores.to(gl.float32), step * scale, total, peak, base, p_layout, ROWS, COLUMNS
        )  # fmt: skip
        scale = gl.load(k_scale + block + 1)
        mbarrier.wait(v_full.index(slot), block // SLOTS % 2)
        mbarrier.wait(k_full.index(after), (block + 1) // SLOTS % 2)
        sums = warpgroup_mma(p, v_tiles.index(slot).permute((1, 0)), no_sums, use_acc=False, is_async=True)
        scores = warpgroup_mma(queries, k_tiles.index(after).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(v_empty.index(slot))
        result = result * gl.convert_layout(fade, out_row_layout)[:, None] + sums.to(gl.float32)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(after))
    last = blocks - 1
    columns = last * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout))
    numbers = gl.where((columns < keys)[None, :], scores.to(gl.float32), -3e38)
    p, total, fade, peak, base = _softmax(numbers, step * scale, total, peak, base, p_layout, ROWS, COLUMNS)
    mbarrier.wait(v_full.index(last % SLOTS), last // SLOTS % 2)
    sums = warpgroup_mma(p, v_tiles.index(last % SLOTS).permute((1, 0)), no_sums, use_acc=False, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    result = result * gl.convert_layout(fade, out_row_layout)[:, None] + sums.to(gl.float32)

    out, sample, head, heads = target
    d = gl.arange(0, D, gl.SliceLayout(0, sums_layout))
    # p was summed as the multiples of 2⁻²⁴ that it is, and its products as whole numbers.
    step = gl.load(v_scale + here * D + d)[None, :] * 2.0**-24
    result = result / gl.convert_layout(total, out_row_layout)[:, None] * step
    result = result + gl.load(v_mean + here * D + d)[None, :]
    rows = begin + gl.arange(0, ROWS, out_row_layout)
    at = out + ((sample.to(gl.int64) * length + rows)[:, None] * heads + head) * D + d[None, :]
    gl.store(at, result.to(out.dtype.element_ty), (rows < length)[:, None])


@jit
def _softmax(
    numbers, rate, total, peak, base, layout: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr
):  # fmt: skip
    """A block's products of whole numbers [ROWS, COLUMNS] → probabilities 0 … 127 relative to its largest, with columns
    in thread order; their sum with all before; what other sums of before are to be multiplied with; the largest of all
    and of this block. Exponents are of base 2. A block far below what came before is counted by LOWEST of that: what it
    adds is nothing, and the sums stay in range."""
    top = gl.max(numbers, 1) * rate
    peak = gl.maximum(peak, top)
    now = gl.maximum(top, peak + LOWEST)
    fade = gl.exp2(base - now)
    p = gl.exp2(numbers * rate[:, None] + (LEVEL - now)[:, None])
    added = gl.sum(p, 1)
    p = p.reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, COLUMNS])
    p = gl.convert_layout(p, layout)
    whole = gl.inline_asm_elementwise(ROUND, "=r,r,r,r,r", [p], dtype=gl.int8, is_pure=True, pack=4)
    return whole, total * fade + added, fade, peak, now

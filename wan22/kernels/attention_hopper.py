"""8-bit attention for Hopper alone: INT8 scores, probabilities and values, so that tensor cores and softmax overlap.

Triton waits for every product as soon as it has begun it; the tensor cores then stand still during the softmax. Gluon,
its lower level, lets a kernel say when to wait. The numbers are those of attention_8bit.py with `int8` values, whose
plain form is this one's too.

A program holds 128 queries of one head. Two warpgroups have 64 of them each, and a warp beside them fetches tiles of
keys and values (FlashAttention-3, Shah et al. 2024, section 3.1). The warpgroups take turns at the tensor cores (there,
"ping-pong"): left alone they fall into step, and then both multiply and both wait. Beside 8-bit products an H100 has
time for about eight instructions a score, half as many of them on its integer pipe, which converts, compares and
permutes. By its own clock a block takes twice what that comes to, in the softmax (docs/log.md). What keeps them few:

- Two tiles of 128 keys are a block, with one scale of keys, and one largest score to which a query's probabilities are
  relative: sums over keys are converted and added once a block. They are kept relative to the largest score of the
  block that came last, not of all so far: going on to the next block is then one multiplication and addition, the same
  that adds the block's own sum.
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


QUERIES, TILE, SLOTS = 64, 128, 2  # queries of a warpgroup, keys of a tile, blocks in flight
KEYS = 2 * TILE  # of a block
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
# Hardware barriers of both warpgroups, 8 and 9 (Triton's own begin at 0): one waits at its own till the other lets it
# go on. Their number is computed from registers, by what is always 0, though no compiler knows: the sign of INT8
# probabilities; of scores, which may have one, whether there are 32 zeros before their first 1. ptxas moves
# exponentials beyond a barrier as soon as they are used beyond it alone.
SIXTEEN, FOUR = gl.constexpr(",".join(["=r"] * 16 + ["r"] * 16)), gl.constexpr("=r,=r,=r,=r,r,r,r,r")
BARRIERS = """
{{
.reg .b32 any, next;
{any}
shr.u32 any, any, 31;
add.u32 any, any, {number};
bar.{what} any, 256;
{moves}
}}
"""


def _barrier(what: str, number: int, registers: int) -> Any:
    moves = "\n".join(f"mov.b32 ${at}, ${registers + at};" for at in range(registers))
    signs = "\n".join(f"mov.b32 next, ${at};\nor.b32 any, any, next;" for at in range(registers, 2 * registers))
    if what == "arrive":
        signs += "\nor.b32 any, any, 1;\nclz.b32 any, any;\nshl.b32 any, any, 26;"
    return gl.constexpr(BARRIERS.format(any=f"mov.b32 any, 0;\n{signs}", what=what, number=number, moves=moves))


WAIT_0, WAIT_1 = (_barrier("sync", number, 16) for number in (8, 9))
LET_0, LET_1 = (_barrier("arrive", number, 4) for number in (9, 8))
# Rows of a warpgroup as its threads have them, and two columns for each of four threads: eight.
EIGHT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[QUERIES, 8],
    )
)  # fmt: skip


def jit(kernel: Any) -> Any:
    return gluon.jit(kernel) if GLUON else kernel


def tile(width: int) -> Any:
    """The layout in shared memory of rows of `width` bytes, as the tensor cores read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, width), element_bitwidth=8, rank=2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, v_mean: Tensor, out: Tensor
) -> None:
    """q, k [B, N, L, D] int8, q_scale [B, N, L] with log2 e / √D in it, k_scale [B, N, blocks of 256 keys];
    v [B, N, D, M'] int8 in thread order, M' a multiple of 128 with zeros beyond the last key, v_scale, v_mean
    [B, 1, N, D] → out [B, L, N, D]. D is 64 or 128."""
    (batch, heads, length, dim), keys, room = q.shape, k.shape[2], v.shape[3]
    assert dim in DIMS, dim
    assert room % TILE == 0, room
    launch(
        attend_kernel, (-(-length // (2 * QUERIES)), heads, batch),
        # The launcher looks at the first argument for the device: scales before descriptors.
        q_scale, k_scale, v_scale.contiguous(), v_mean.contiguous(), out,
        TensorDescriptor.from_tensor(q.view(-1, dim), [QUERIES, dim], tile(dim)),
        TensorDescriptor.from_tensor(k.view(-1, dim), [TILE, dim], tile(dim)),
        TensorDescriptor.from_tensor(v.view(-1, room), [dim, TILE], tile(TILE)),
        length, keys, heads, D=dim, ROWS=QUERIES, COLUMNS=TILE, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip


@jit
def attend_kernel(
    q_scale, k_scale, v_scale, v_mean, out, q, k, v,
    length, keys, heads, D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One program: two times ROWS queries of one head, over all keys."""
    head, sample = gl.program_id(1), gl.program_id(2)
    here = sample * heads + head
    first, blocks = gl.program_id(0) * (2 * ROWS), gl.cdiv(keys, 2 * COLUMNS)
    q_tiles = gl.allocate_shared_memory(gl.int8, [2, ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [2 * SLOTS, COLUMNS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.int8, [2 * SLOTS, D, COLUMNS], v.layout)
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
    queries = (q_tiles, q_full)
    tiles = ((k_tiles, k_full, k_empty), (v_tiles, v_full, v_empty))
    scales = (q_scale, k_scale, v_scale, v_mean)
    place = (first, here, length, keys, blocks)
    target = (out, sample, head, heads)
    gl.warp_specialize(
        [
            (_consume, (0, scales, queries, tiles, place, target, D, ROWS, COLUMNS, SLOTS)),
            (_consume, (1, scales, queries, tiles, place, target, D, ROWS, COLUMNS, SLOTS)),
            (_produce, (q, k, v, queries, tiles, place, D, ROWS, COLUMNS, SLOTS)),
        ],
        [4, 1],
        [240, 24],
    )


@jit
def _produce(
    q, k, v, queries, tiles, place, D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Fetch every block as soon as both warpgroups are done with what lay in its place. A tile beyond the last key is
    fetched too: what it holds is masked, or times zero."""
    k_tiles, k_full, k_empty = tiles[0]
    v_tiles, v_full, v_empty = tiles[1]
    first, here, length, keys, blocks = place
    for part in gl.static_range(2):
        mbarrier.expect(queries[1].index(part), ROWS * D)
        tma_load(q, [here * length + first + part * ROWS, 0], queries[1].index(part), queries[0].index(part))
    for block in range(blocks):
        slot, at = block % SLOTS, block * 2 * COLUMNS
        before = (block // SLOTS + 1) % 2  # the phase in which the block that lay there was read
        mbarrier.wait(k_empty.index(slot), before, pred=block >= SLOTS)
        mbarrier.expect(k_full.index(slot), 2 * COLUMNS * D)
        tma_load(k, [here * keys + at, 0], k_full.index(slot), k_tiles.index(2 * slot))
        tma_load(k, [here * keys + at + COLUMNS, 0], k_full.index(slot), k_tiles.index(2 * slot + 1))
        mbarrier.wait(v_empty.index(slot), before, pred=block >= SLOTS)
        mbarrier.expect(v_full.index(slot), 2 * COLUMNS * D)
        tma_load(v, [here * D, at], v_full.index(slot), v_tiles.index(2 * slot))
        tma_load(v, [here * D, at + COLUMNS], v_full.index(slot), v_tiles.index(2 * slot + 1))


@jit
def _consume(
    part: gl.constexpr, scales, queries, tiles, place, target,
    D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: ROWS queries over all keys. No product is under way when the loop turns; ptxas would wait."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, sums_layout)
    q_scale, k_scale, v_scale, v_mean = scales
    first, here, length, keys, blocks = place
    begin = first + part * ROWS
    rows = begin + gl.arange(0, ROWS, row_layout)
    step = gl.load(q_scale + here.to(gl.int64) * length + rows, rows < length, 0.0)
    k_scale += here * blocks
    result = gl.zeros([ROWS, D], gl.float32, sums_layout)
    total = gl.zeros([ROWS, 8], gl.float32, EIGHT)
    base = gl.full([ROWS], -1e30, gl.float32, row_layout)
    state = (result, total, base, base)

    mbarrier.wait(queries[1].index(part), 0)
    mine = queries[0].index(part)
    one, two, top = _scores(mine, tiles[0], 0, part, part == 1, ROWS, COLUMNS, SLOTS)
    for block in range(blocks - 1):
        rate = step * gl.load(k_scale + block)
        state = _add(one, two, top, rate, state, tiles[1], block, part, True, D, ROWS, COLUMNS, SLOTS)
        one, two, top = _scores(mine, tiles[0], block + 1, part, True, ROWS, COLUMNS, SLOTS)
    last = blocks - 1
    columns = last * 2 * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout))
    one = gl.where((columns < keys)[None, :], one, -(2**31))
    two = gl.where((columns + COLUMNS < keys)[None, :], two, -(2**31))
    top = gl.convert_layout(_fold(one, False, ROWS, COLUMNS), EIGHT)
    rate = step * gl.load(k_scale + last)
    state = _add(one, two, top, rate, state, tiles[1], last, part, part == 0, D, ROWS, COLUMNS, SLOTS)
    result, total, _, _ = state

    out, sample, head, heads = target
    d = gl.arange(0, D, gl.SliceLayout(0, sums_layout))
    total = gl.convert_layout(gl.sum(total, 1), out_row_layout)
    # p was summed as the multiples of 2⁻²⁴ that it is, and its products as whole numbers.
    result = result / total[:, None] * (gl.load(v_scale + here * D + d) * 2.0**-24)[None, :]
    result = result + gl.load(v_mean + here * D + d)[None, :]
    rows = begin + gl.arange(0, ROWS, out_row_layout)
    at = out + ((sample.to(gl.int64) * length + rows)[:, None] * heads + head) * D + d[None, :]
    gl.store(at, result.to(out.dtype.element_ty), (rows < length)[:, None])


@jit
def _scores(
    queries, tiles, block, part: gl.constexpr, LETS: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A block's products of queries and keys, of each of its two tiles, and the largest of every eighth of the first,
    found while the second is multiplied. LETS: then the other warpgroup has its turn."""
    k_tiles, k_full, k_empty = tiles
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    slot = block % SLOTS
    none = gl.zeros([ROWS, COLUMNS], gl.int32, layout)
    mbarrier.wait(k_full.index(slot), block // SLOTS % 2)
    one = warpgroup_mma(queries, k_tiles.index(2 * slot).permute((1, 0)), none, use_acc=False, is_async=True)
    two = warpgroup_mma(queries, k_tiles.index(2 * slot + 1).permute((1, 0)), none, use_acc=False, is_async=True)
    one = warpgroup_mma_wait(1, deps=[one])
    top = gl.convert_layout(_fold(one, False, ROWS, COLUMNS), EIGHT)
    if LETS:
        let: gl.constexpr = LET_0 if part == 0 else LET_1
        top = gl.inline_asm_elementwise(let, FOUR, [top], dtype=gl.int32, is_pure=False, pack=4)
    two = warpgroup_mma_wait(0, deps=[two])
    mbarrier.arrive(k_empty.index(slot))
    return one, two, top


@jit
def _add(
    one, two, top, rate, state, tiles, block, part: gl.constexpr, WAITS: gl.constexpr,
    D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A block's products of whole numbers [ROWS, COLUMNS], of each tile: their probabilities and values go into the
    sums. top: the largest of every eighth of the first. Exponents are of base 2. A block far below what came before is
    counted by LOWEST of that: what it adds is nothing, and the sums stay in range. WAITS: for this warpgroup's turn."""
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32]))
    v_tiles, v_full, v_empty = tiles
    result, total, peak, base = state
    slot = block % SLOTS
    mbarrier.wait(v_full.index(slot), block // SLOTS % 2)
    top = gl.max(gl.maximum(top, gl.convert_layout(_fold(two, False, ROWS, COLUMNS), EIGHT)), 1)
    top = gl.convert_layout(top, row_layout).to(gl.float32) * rate
    peak = gl.maximum(peak, top)
    now = gl.maximum(top, peak + LOWEST)
    shift = LEVEL - now
    fade = gl.exp2(base - now)
    p_one = gl.exp2(one.to(gl.float32) * rate[:, None] + shift[:, None])
    p_two = gl.exp2(two.to(gl.float32) * rate[:, None] + shift[:, None])
    added = _fold(p_one, True, ROWS, COLUMNS) + _fold(p_two, True, ROWS, COLUMNS)
    p_one, p_two = _packed(p_one, D, ROWS, COLUMNS), _packed(p_two, D, ROWS, COLUMNS)

    if WAITS:
        wait: gl.constexpr = WAIT_0 if part == 0 else WAIT_1
        p_two = gl.inline_asm_elementwise(wait, SIXTEEN, [p_two], dtype=gl.int8, is_pure=False, pack=64)
    sums = gl.zeros([ROWS, D], gl.int32, sums_layout)
    sums = warpgroup_mma(p_one, v_tiles.index(2 * slot).permute((1, 0)), sums, use_acc=False, is_async=True)
    sums = warpgroup_mma(p_two, v_tiles.index(2 * slot + 1).permute((1, 0)), sums, use_acc=True, is_async=True)
    total = total * gl.convert_layout(fade, gl.SliceLayout(1, EIGHT))[:, None] + gl.convert_layout(added, EIGHT)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(slot))
    fade = gl.convert_layout(fade, gl.SliceLayout(1, sums_layout))
    return result * fade[:, None] + sums.to(gl.float32), total, peak, now


@jit
def _fold(x, ADD: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The sum, or the largest, of every eighth column [ROWS, 8]: within a thread, and not in one long chain."""
    if COLUMNS == 8:
        return x
    else:
        left, right = gl.split(x.reshape([ROWS, 2, COLUMNS // 2]).permute((0, 2, 1)))
        left, right = _fold(left, ADD, ROWS, COLUMNS // 2), _fold(right, ADD, ROWS, COLUMNS // 2)
        if ADD:
            return left + right
        else:
            return gl.maximum(left, right)


@jit
def _packed(p, D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Multiples of 2⁻²⁴ → whole numbers in int8, columns in thread order, as the first factor of a product."""
    layout: gl.constexpr = gl.DotOperandLayout(
        operand_index=0, parent=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32]), k_width=4
    )
    p = p.reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, COLUMNS])
    p = gl.convert_layout(p, layout)
    return gl.inline_asm_elementwise(ROUND, "=r,r,r,r,r", [p], dtype=gl.int8, is_pure=True, pack=4)

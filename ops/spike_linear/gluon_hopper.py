"""The product of counts and INT8 weights on Hopper in Gluon, Triton's lower level.

A program is two groups of four warps that multiply (gluon_sums.py) and one warp that copies tiles into a ring of slots
(gluon_ring.py). It stays for many tiles: one is stored while the next ones arrive.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.language.extra.cuda import gdc_wait

from ops.spike_linear.gluon_digits import DEPTH
from ops.spike_linear.gluon_rest import add_digits
from ops.spike_linear.gluon_ring import ROWS, copy_tiles, place, ring
from ops.spike_linear.gluon_sums import group_sums, row_factors, row_sums


@gluon.jit
def consume(
    slots, bars, out_slots, x, weight, y, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, SIZE: gl.constexpr,
    WHO: gl.constexpr, PER_ROW: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warps WHO of two: their half of the rows of every tile of this program."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 32])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PARTS: gl.constexpr = TOKENS // SIZE
    slot, phase = 0, 0
    gdc_wait()  # for the kernel that counts
    num_tiles = gl.cdiv(num_outputs, ROWS) * gl.cdiv(num_tokens, TOKENS)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        output, token = place(tile, num_outputs, num_tokens, TOKENS, BAND)
        output += WHO * 64
        column = token + gl.arange(0, TOKENS, layout=flat)
        most = gl.load(digits + column, mask=column < num_tokens, other=0)
        if PER_ROW:
            total, slot, phase = row_sums(
                slots, bars, scale, output, num_outputs, slot, phase, BLOCKS, PARTS, SIZE, STAGES, WHO, sums
            )
        else:
            total, slot, phase = group_sums(
                slots, bars, scale, output, num_outputs, slot, phase, BLOCKS, PARTS, SIZE, STAGES, WHO, sums
            )
        tma.store_wait(0)  # of the tile before, from out_slots
        gl.thread_barrier()
        most = gl.max(most, 0)
        if most > 0:
            total = add_digits(
                total, out_slots.index(WHO), x, weight, scale, threshold, digits, blocks, most, output, token,
                num_outputs, num_tokens, BLOCKS, TOKENS, SIZE, PER_ROW, sums,
            )  # fmt: skip
        if HAS_BIAS:
            added = row_factors(bias, output, num_outputs, 1, 0, sums)
        for i in gl.static_range(PARTS):
            near = token + i * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, sums))
            result = total[i] * gl.expand_dims(gl.load(threshold + near, mask=near < num_tokens, other=0.0), 0)
            if HAS_BIAS:
                result += added
            out_slots.index(WHO).slice(i * SIZE, SIZE, dim=0).permute((1, 0)).store(result.to(y.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y, [token, output], out_slots.index(WHO))
    tma.store_wait(0)


@gluon.jit
def products(
    weight_tiles, count_tiles, y, x, weight, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, SIZE: gl.constexpr,
    PER_ROW: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """y [tokens, outputs] (tiles [TOKENS, 64]) of weights [outputs, BLOCKS * DEPTH] int8 (tiles [ROWS, DEPTH]) and
    counts [tokens, BLOCKS * DEPTH] int8 (tiles [TOKENS, DEPTH]); x, digits and blocks: see triton_kernels. scale
    [outputs, BLOCKS], or where PER_ROW [outputs, 1]."""
    weight_slots = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, DEPTH], weight_tiles.layout)
    count_slots = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, DEPTH], count_tiles.layout)
    out_slots = gl.allocate_shared_memory(y.dtype, [2, TOKENS, 64], y.layout)
    slots, bars = (weight_slots, count_slots), (ring(STAGES, 1), ring(STAGES, 2))
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (consume, (
                slots, bars, out_slots, x, weight, y, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
                BLOCKS, TOKENS, BAND, STAGES, SIZE, 0, PER_ROW, HAS_BIAS,
            )),
            (consume, (
                slots, bars, out_slots, x, weight, y, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
                BLOCKS, TOKENS, BAND, STAGES, SIZE, 1, PER_ROW, HAS_BIAS,
            )),
            (copy_tiles, (
                weight_tiles, count_tiles, slots, bars, num_outputs, num_tokens, BLOCKS, TOKENS, BAND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

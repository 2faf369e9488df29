"""What counts beyond int8 add to a tile's sums on Hopper: products of all digits but the lowest.

Few blocks of few tokens have such digits, so they are made again from x where a tile's tokens have any, and multiplied
with weights that are loaded again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from ops.spike_linear.gluon_digits import DEPTH, counts_of, either
from ops.spike_linear.gluon_sums import multiply, row_factors, with_part


@gluon.jit
def digit_of(x, threshold, place):
    """Digit `place` of the counts of x fp32 as int8, see triton_kernels."""
    inverse = gl.div_rn(1.0, threshold)
    rest = counts_of(x, threshold, inverse, gl.fma(-inverse, threshold, 1.0) * inverse)
    for _ in range(place):
        rest = ((rest >> 7) + 1) >> 1
    return rest.to(gl.int8)


@gluon.jit
def add_digits(
    total, own_slot, x, weight, scale, threshold, digits, blocks, most, output, token, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIZE: gl.constexpr, PER_ROW: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """total with the products of all digits but the lowest. most: digits of any token. own_slot: shared memory for the
    digits of a block, these warps' alone."""
    WORDS: gl.constexpr = (BLOCKS + 31) // 32
    FEW: gl.constexpr = 32
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 4)
    digit_slot = own_slot._reinterpret(
        gl.int8, [TOKENS, DEPTH], gl.NVMMASharedLayout.get_default_for([TOKENS, DEPTH], gl.int8)
    )
    few_slots = own_slot._reinterpret(
        gl.int8, [TOKENS // FEW, FEW, DEPTH], gl.NVMMASharedLayout.get_default_for([FEW, DEPTH], gl.int8)
    )
    zeros = gl.full([64, SIZE], 0, gl.int32, layout=sums)
    column = token + gl.arange(0, TOKENS, layout=flat)
    more = gl.load(digits + column, mask=column < num_tokens, other=0) > 0
    channel = gl.expand_dims(gl.arange(0, DEPTH, layout=gl.SliceLayout(0, wide)), 0)
    depth = gl.expand_dims(gl.arange(0, DEPTH, layout=gl.SliceLayout(0, left)), 0)
    row = gl.expand_dims(output + gl.arange(0, 64, layout=gl.SliceLayout(1, left)), 1)
    for word in range(WORDS):
        flags = gl.reduce(gl.load(blocks + column.to(gl.int64) * WORDS + word, mask=more, other=0), 0, either)
        for bit in range(32):
            block = word * 32 + bit
            if ((flags >> bit) & 1) != 0:
                power = 256.0
                for place in range(1, most + 1):
                    for few in range(TOKENS // FEW):
                        near = token + few * FEW + gl.arange(0, FEW, layout=gl.SliceLayout(1, wide))
                        inside = near < num_tokens
                        some = gl.load(digits + near, mask=inside, other=0) > 0
                        own = gl.load(blocks + near.to(gl.int64) * WORDS + word, mask=inside, other=0) >> bit
                        some = some & ((own & 1) != 0)
                        level = gl.expand_dims(gl.load(threshold + near, mask=inside, other=1.0), 1)
                        at = gl.expand_dims(near.to(gl.int64) * (BLOCKS * DEPTH), 1) + block * DEPTH + channel
                        values = gl.load(x + at, mask=gl.expand_dims(some, 1), other=0.0).to(gl.float32)
                        few_slots.index(few).store(digit_of(values, level, place))
                    fence_async_shared()
                    gl.thread_barrier()
                    at = row.to(gl.int64) * (BLOCKS * DEPTH) + block * DEPTH + depth
                    rows = gl.load(weight + at, mask=row < num_outputs, other=0)
                    stride, group = 1 if PER_ROW else BLOCKS, 0 if PER_ROW else block
                    factor = row_factors(scale, output, num_outputs, stride, group, sums) * power
                    for i in gl.static_range(TOKENS // SIZE):
                        part = warpgroup_mma_wait(0, deps=[multiply(rows, digit_slot, zeros, False, i, SIZE)])
                        total = with_part(total, part, factor, i, TOKENS // SIZE)
                    gl.thread_barrier()
                    power *= 256.0
    return total

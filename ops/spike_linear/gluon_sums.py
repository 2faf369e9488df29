"""Sums over all channels of one group of warps: 64 rows of weights times a tile's tokens, SIZE of them at a time.

Weights are the rows of every product, counts its columns: what scales a group of a weight's row is then one number a
row, and each thread needs two of them. Sums of a group are integers of a part of the tokens; fp32 sums take them in
while the tensor cores are busy with the next part.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ops.spike_linear.gluon_ring import next_slot, slot_before


@gluon.jit
def multiply(rows, tokens, sums, keep, PART: gl.constexpr, SIZE: gl.constexpr):
    """Start the product of these warps' rows and part PART of a slot's tokens. keep: added to sums."""
    part = tokens.slice(PART * SIZE, SIZE, dim=0).permute((1, 0))
    return warpgroup_mma(rows, part, sums, use_acc=keep, is_async=True)


@gluon.jit
def row_factors(factors, output, num_outputs, stride, at, sums: gl.constexpr):
    """Numbers [64, 1] of the rows from output on, fp32. They lie at row * stride + at."""
    row = output + gl.arange(0, 64, layout=gl.SliceLayout(1, sums))
    values = gl.load(factors + row * stride + at, mask=row < num_outputs, other=0.0)
    return gl.expand_dims(values.to(gl.float32), 1)


@gluon.jit
def full_sums(value, PARTS: gl.constexpr, SIZE: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """PARTS tensors [64, SIZE] of a value."""
    found = ()
    for _ in gl.static_range(PARTS):
        found = found + (gl.full([64, SIZE], value, dtype, layout=layout),)
    return found


@gluon.jit
def with_part(total, part, factor, PART: gl.constexpr, PARTS: gl.constexpr):
    """total, with part * factor added to number PART of it."""
    found = ()
    for i in gl.static_range(PARTS):
        if i == PART:
            found = found + (total[i] + part.to(gl.float32) * factor,)
        else:
            found = found + (total[i],)
    return found


@gluon.jit
def group_sums(
    slots, bars, scale, output, num_outputs, slot, phase,
    BLOCKS: gl.constexpr, PARTS: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, WHO: gl.constexpr,
    sums: gl.constexpr,
):  # fmt: skip
    """(fp32 sums of groups with a scale each, next slot, its parity): a part is scaled while the next one of its group
    is multiplied. A slot's weights are read once, into registers, and not again by the product of every part."""
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 4)
    total = full_sums(0.0, PARTS, SIZE, gl.float32, sums)
    zeros = gl.full([64, SIZE], 0, gl.int32, layout=sums)
    for block in range(BLOCKS):
        factor = row_factors(scale, output, num_outputs, BLOCKS, block, sums)
        mbarrier.wait(bars[0].index(slot), phase)
        weights, counts = slots[0].index(slot).slice(WHO * 64, 64, dim=0), slots[1].index(slot)
        rows = weights.load(left)
        running = multiply(rows, counts, zeros, False, 0, SIZE)
        for i in gl.static_range(1, PARTS):
            following = multiply(rows, counts, zeros, False, i, SIZE)
            part = warpgroup_mma_wait(1, deps=[running])
            total = with_part(total, part, factor, i - 1, PARTS)
            running = following
        part = warpgroup_mma_wait(0, deps=[running])
        mbarrier.arrive(bars[1].index(slot), count=1)
        total = with_part(total, part, factor, PARTS - 1, PARTS)
        slot, phase = next_slot(slot, phase, STAGES)
    return total, slot, phase


@gluon.jit
def row_sums(
    slots, bars, scale, output, num_outputs, slot, phase,
    BLOCKS: gl.constexpr, PARTS: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, WHO: gl.constexpr,
    sums: gl.constexpr,
):  # fmt: skip
    """(fp32 sums of rows with one scale, next slot, its parity): integers to the end."""
    whole = full_sums(0, PARTS, SIZE, gl.int32, sums)
    factor = row_factors(scale, output, num_outputs, 1, 0, sums)
    for block in range(BLOCKS):
        mbarrier.wait(bars[0].index(slot), phase)
        weights, counts = slots[0].index(slot).slice(WHO * 64, 64, dim=0), slots[1].index(slot)
        added = ()
        for i in gl.static_range(PARTS):
            part = multiply(weights, counts, whole[i], True, i, SIZE)
            added = added + (warpgroup_mma_wait(1, deps=[part]),)
        whole = added
        mbarrier.arrive(bars[1].index(slot_before(slot, STAGES)), count=1, pred=block > 0)
        slot, phase = next_slot(slot, phase, STAGES)
    total = ()
    for i in gl.static_range(PARTS):
        total = total + (warpgroup_mma_wait(0, deps=[whole[i]]).to(gl.float32) * factor,)
    mbarrier.arrive(bars[1].index(slot_before(slot, STAGES)), count=1)
    return total, slot, phase

"""The product of counts and INT8 weights on Hopper in Gluon, Triton's lower level.

A program is two groups of four warps that multiply and one warp that copies tiles into a ring of slots. Weights are the
rows of every product, counts its columns: what scales a group of a weight's row is then one number a row, and each
thread needs two of them. Integer sums of a group exist for a part of the tile at a time; fp32 sums take them in while
the tensor cores are busy with the next part, of the same warps or of the others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

DEPTH = gl.constexpr(128)
"""Input channels of a slot: a group of weights, or a part of one that is a whole row."""


@gluon.jit
def ring(NUM: gl.constexpr, EVENTS: gl.constexpr):
    """NUM barriers, each awaiting so many events."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=EVENTS)
    return barriers


@gluon.jit
def place(tile, num_outputs, num_tokens, ROWS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr):
    """(first output, first token) of a tile; neighbors in time share weights or counts: bands of BAND tiles."""
    num_rows, num_columns = gl.cdiv(num_outputs, ROWS), gl.cdiv(num_tokens, TOKENS)
    band = tile // (BAND * num_columns)
    height = gl.minimum(num_rows - band * BAND, BAND)
    rest = tile - band * BAND * num_columns
    return (band * BAND + rest % height) * ROWS, rest // height * TOKENS


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot behind this one, and the parity of its next event."""
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def slot_before(slot, STAGES: gl.constexpr):
    """The slot before this one. It is worked out: a loop does not carry a name that begins as another name's value and
    is given it again (Triton 3.6)."""
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def copy_tiles(
    weight, count, weight_slots, count_slots, full, free, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: every slot of every tile of this program, in the order in which they are used."""
    slot, phase = 0, 1
    gdc_wait()  # for the kernel that counts
    num_tiles = gl.cdiv(num_outputs, ROWS) * gl.cdiv(num_tokens, TOKENS)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        output, token = place(tile, num_outputs, num_tokens, ROWS, TOKENS, BAND)
        for block in range(BLOCKS):
            barrier = full.index(slot)
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(barrier, weight.block_type.nbytes + count.block_type.nbytes)
            tma.async_copy_global_to_shared(weight, [output, block * DEPTH], barrier, weight_slots.index(slot))
            tma.async_copy_global_to_shared(count, [token, block * DEPTH], barrier, count_slots.index(slot))
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def multiply(weight_slot, count_slot, sums, keep, PART: gl.constexpr, SIZE: gl.constexpr, SPLIT: gl.constexpr):
    """Start the product of part PART of these warps' rows and the slot's tokens. keep: added to sums."""
    rows = weight_slot.slice(PART // SPLIT * 64, 64, dim=0)
    tokens = count_slot.slice(PART % SPLIT * SIZE, SIZE, dim=0).permute((1, 0))
    return warpgroup_mma(rows, tokens, sums, use_acc=keep, is_async=True)


@gluon.jit
def row_factors(factors, output, num_outputs, stride, at, COUNT: gl.constexpr, sums: gl.constexpr):
    """Numbers of the rows from output on, fp32: COUNT tensors [64, 1]. They lie at row * stride + at."""
    found = ()
    for i in gl.static_range(COUNT):
        row = output + i * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, sums))
        values = gl.load(factors + row * stride + at, mask=row < num_outputs, other=0.0)
        found = found + (gl.expand_dims(values.to(gl.float32), 1),)
    return found


@gluon.jit
def full_sums(value, COUNT: gl.constexpr, SIZE: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """COUNT tensors [64, SIZE] of a value."""
    found = ()
    for _ in gl.static_range(COUNT):
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
def groups_ahead(
    slots, bars, scale, output, num_outputs, slot, phase,
    BLOCKS: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
    WHO: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """fp32 sums over all groups: a part is scaled while the next one of its group is multiplied."""
    PARTS: gl.constexpr = COUNT * SPLIT
    total = full_sums(0.0, PARTS, SIZE, gl.float32, sums)
    zeros = gl.full([64, SIZE], 0, gl.int32, layout=sums)
    for block in range(BLOCKS):
        factors = row_factors(scale, output, num_outputs, BLOCKS, block, COUNT, sums)
        mbarrier.wait(bars[0].index(slot), phase)
        weights, counts = slots[0].index(slot).slice(WHO * COUNT * 64, COUNT * 64, dim=0), slots[1].index(slot)
        running = multiply(weights, counts, zeros, False, 0, SIZE, SPLIT)
        for i in gl.static_range(1, PARTS):
            following = multiply(weights, counts, zeros, False, i, SIZE, SPLIT)
            part = warpgroup_mma_wait(1, deps=[running])
            total = with_part(total, part, factors[(i - 1) // SPLIT], i - 1, PARTS)
            running = following
        part = warpgroup_mma_wait(0, deps=[running])
        mbarrier.arrive(bars[1].index(slot), count=1)
        total = with_part(total, part, factors[COUNT - 1], PARTS - 1, PARTS)
        slot, phase = next_slot(slot, phase, STAGES)
    return total, slot, phase


@gluon.jit
def chain(
    total, slots, bars, scale, output, num_outputs, block, slot, phase,
    NUM: gl.constexpr, BLOCKS: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr,
    STAGES: gl.constexpr, WHO: gl.constexpr, HELD: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """total with NUM groups from block on: a part is scaled while the next one, of this or the next group, is multiplied.
    HELD: the weights of a slot are in registers then."""
    PARTS: gl.constexpr = COUNT * SPLIT
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 4)
    zeros = gl.full([64, SIZE], 0, gl.int32, layout=sums)
    factors = ()
    for u in gl.static_range(NUM):
        factors = factors + (row_factors(scale, output, num_outputs, BLOCKS, block + u, COUNT, sums),)
    for u in gl.static_range(NUM):
        if u > 0:
            slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(bars[0].index(slot), phase)
        weights, counts = slots[0].index(slot).slice(WHO * COUNT * 64, COUNT * 64, dim=0), slots[1].index(slot)
        for i in gl.static_range(PARTS):
            if HELD:
                if i % SPLIT == 0:
                    rows = weights.slice(i // SPLIT * 64, 64, dim=0).load(left)
                tokens = counts.slice(i % SPLIT * SIZE, SIZE, dim=0).permute((1, 0))
                following = warpgroup_mma(rows, tokens, zeros, use_acc=False, is_async=True)
            else:
                following = multiply(weights, counts, zeros, False, i, SIZE, SPLIT)
            if i > 0:
                part = warpgroup_mma_wait(1, deps=[running])
                total = with_part(total, part, factors[u][(i - 1) // SPLIT], i - 1, PARTS)
            elif u > 0:
                part = warpgroup_mma_wait(1, deps=[running])
                mbarrier.arrive(bars[1].index(slot_before(slot, STAGES)), count=1)
                total = with_part(total, part, factors[u - 1][COUNT - 1], PARTS - 1, PARTS)
            running = following
    part = warpgroup_mma_wait(0, deps=[running])
    mbarrier.arrive(bars[1].index(slot), count=1)
    total = with_part(total, part, factors[NUM - 1][COUNT - 1], PARTS - 1, PARTS)
    slot, phase = next_slot(slot, phase, STAGES)
    return total, slot, phase


@gluon.jit
def groups_chained(
    slots, bars, scale, output, num_outputs, slot, phase,
    BLOCKS: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
    WHO: gl.constexpr, HELD: gl.constexpr, CHAIN: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """fp32 sums over all groups, CHAIN of them without a gap."""
    total = full_sums(0.0, COUNT * SPLIT, SIZE, gl.float32, sums)
    for block in range(BLOCKS // CHAIN):
        total, slot, phase = chain(
            total, slots, bars, scale, output, num_outputs, block * CHAIN, slot, phase,
            CHAIN, BLOCKS, COUNT, SPLIT, SIZE, STAGES, WHO, HELD, sums,
        )  # fmt: skip
    if BLOCKS % CHAIN > 0:
        total, slot, phase = chain(
            total, slots, bars, scale, output, num_outputs, BLOCKS // CHAIN * CHAIN, slot, phase,
            BLOCKS % CHAIN, BLOCKS, COUNT, SPLIT, SIZE, STAGES, WHO, HELD, sums,
        )  # fmt: skip
    return total, slot, phase


@gluon.jit
def whole_rows(
    slots, bars, scale, output, num_outputs, slot, phase,
    BLOCKS: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
    WHO: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """fp32 sums of rows with one scale: integers to the end."""
    PARTS: gl.constexpr = COUNT * SPLIT
    whole = full_sums(0, PARTS, SIZE, gl.int32, sums)
    factors = row_factors(scale, output, num_outputs, 1, 0, COUNT, sums)
    for block in range(BLOCKS):
        mbarrier.wait(bars[0].index(slot), phase)
        weights, counts = slots[0].index(slot).slice(WHO * COUNT * 64, COUNT * 64, dim=0), slots[1].index(slot)
        added = ()
        for i in gl.static_range(PARTS):
            part = multiply(weights, counts, whole[i], True, i, SIZE, SPLIT)
            added = added + (warpgroup_mma_wait(1, deps=[part]),)
        whole = added
        mbarrier.arrive(bars[1].index(slot_before(slot, STAGES)), count=1, pred=block > 0)
        slot, phase = next_slot(slot, phase, STAGES)
    total = ()
    for i in gl.static_range(PARTS):
        total = total + (warpgroup_mma_wait(0, deps=[whole[i]]).to(gl.float32) * factors[i // SPLIT],)
    mbarrier.arrive(bars[1].index(slot_before(slot, STAGES)), count=1)
    return total, slot, phase


@gluon.jit
def either(a, b):
    """What two words of bits have, for a reduction."""
    return a | b


@gluon.jit
def digit_of(x, threshold, inverse, place):
    """Digit `place` of the counts of x fp32 as int8, see triton_kernels."""
    ratio = x * inverse
    for _ in gl.static_range(2):
        ratio = gl.fma(gl.fma(-ratio, threshold, x), inverse, ratio)
    away = gl.where(ratio < 0, -8388608.0, 8388608.0)
    whole = gl.where(gl.abs(ratio) < 8388608.0, (ratio + away) - away, ratio)
    whole = gl.where(gl.abs(ratio) < float("inf"), whole, 0.0)
    rest = gl.minimum(gl.maximum(whole, -2147483520.0), 2147483520.0).to(gl.int32)
    for _ in range(place):
        rest = ((rest >> 7) + 1) >> 1
    return rest.to(gl.int8)


@gluon.jit
def add_digits(
    total, own_slot, x, weight, scale, threshold, digits, blocks, most, output, token, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr, PER_ROW: gl.constexpr,
    TOKENS: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """total with the products of all digits but the lowest, made again from x. most: digits of any token."""
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
                        level = gl.load(threshold + near, mask=inside, other=1.0)
                        at = gl.expand_dims(near.to(gl.int64) * (BLOCKS * DEPTH), 1) + block * DEPTH + channel
                        values = gl.load(x + at, mask=gl.expand_dims(some, 1), other=0.0).to(gl.float32)
                        inverse = gl.expand_dims(gl.div_rn(1.0, level), 1)
                        values = digit_of(values, gl.expand_dims(level, 1), inverse, place)
                        few_slots.index(few).store(values)
                    fence_async_shared()
                    gl.thread_barrier()
                    for i in gl.static_range(COUNT):
                        row = output + i * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, left))
                        at = gl.expand_dims(row.to(gl.int64) * (BLOCKS * DEPTH), 1) + block * DEPTH + depth
                        rows = gl.load(weight + at, mask=gl.expand_dims(row < num_outputs, 1), other=0)
                        stride, group = 1 if PER_ROW else BLOCKS, 0 if PER_ROW else block
                        factor = row_factors(scale, output + i * 64, num_outputs, stride, group, 1, sums)[0] * power
                        for j in gl.static_range(SPLIT):
                            tokens = digit_slot.slice(j * SIZE, SIZE, dim=0).permute((1, 0))
                            part = warpgroup_mma(rows, tokens, zeros, use_acc=False, is_async=True)
                            part = warpgroup_mma_wait(0, deps=[part])
                            total = with_part(total, part, factor, i * SPLIT + j, COUNT * SPLIT)
                    gl.thread_barrier()
                    power *= 256.0
    return total


@gluon.jit
def consume(
    slots, bars, out_slots, x, weight, y, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    SIZE: gl.constexpr, WHO: gl.constexpr, PER_ROW: gl.constexpr, HAS_BIAS: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """Warps WHO of two: their half of the rows of every tile of this program."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 32])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COUNT: gl.constexpr = ROWS // 128
    SPLIT: gl.constexpr = TOKENS // SIZE
    slot, phase = 0, 0
    gdc_wait()  # for the kernel that counts
    num_tiles = gl.cdiv(num_outputs, ROWS) * gl.cdiv(num_tokens, TOKENS)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        output, token = place(tile, num_outputs, num_tokens, ROWS, TOKENS, BAND)
        output += WHO * COUNT * 64
        column = token + gl.arange(0, TOKENS, layout=flat)
        most = gl.load(digits + column, mask=column < num_tokens, other=0)
        if PER_ROW:
            total, slot, phase = whole_rows(
                slots, bars, scale, output, num_outputs, slot, phase, BLOCKS, COUNT, SPLIT, SIZE, STAGES, WHO, sums
            )
        elif ACROSS > 0:
            total, slot, phase = groups_chained(
                slots, bars, scale, output, num_outputs, slot, phase, BLOCKS, COUNT, SPLIT, SIZE, STAGES, WHO,
                ACROSS % 2 == 1, ACROSS // 2, sums,
            )  # fmt: skip
        else:
            total, slot, phase = groups_ahead(
                slots, bars, scale, output, num_outputs, slot, phase, BLOCKS, COUNT, SPLIT, SIZE, STAGES, WHO, sums
            )
        tma.store_wait(0)  # of the tile before, from out_slots
        gl.thread_barrier()
        most = gl.max(most, 0)
        if most > 0:
            total = add_digits(
                total, out_slots.index(WHO * COUNT), x, weight, scale, threshold, digits, blocks, most, output, token,
                num_outputs, num_tokens, BLOCKS, COUNT, SPLIT, SIZE, PER_ROW, TOKENS, sums,
            )  # fmt: skip
        if HAS_BIAS:
            added = row_factors(bias, output, num_outputs, 1, 0, COUNT, sums)
        for i in gl.static_range(COUNT * SPLIT):
            near = token + i % SPLIT * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, sums))
            result = total[i] * gl.expand_dims(gl.load(threshold + near, mask=near < num_tokens, other=0.0), 0)
            if HAS_BIAS:
                result += added[i // SPLIT]
            part = out_slots.index(WHO * COUNT + i // SPLIT).slice(i % SPLIT * SIZE, SIZE, dim=0)
            part.permute((1, 0)).store(result.to(y.dtype))
        fence_async_shared()
        gl.thread_barrier()
        for i in gl.static_range(COUNT):
            tma.async_copy_shared_to_global(y, [token, output + i * 64], out_slots.index(WHO * COUNT + i))
    tma.store_wait(0)


@gluon.jit
def products(
    weight_tiles, count_tiles, y, x, weight, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    SIZE: gl.constexpr, PER_ROW: gl.constexpr, HAS_BIAS: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """y [tokens, outputs] (tiles [TOKENS, 64]) of weights [outputs, BLOCKS * DEPTH] int8 and counts [tokens, BLOCKS *
    DEPTH] int8; x, digits and blocks: see triton_kernels. ROWS: 128 or 256 rows a tile. scale [outputs, BLOCKS], or
    where PER_ROW [outputs, 1]."""
    weight_slots = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, DEPTH], weight_tiles.layout)
    count_slots = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, DEPTH], count_tiles.layout)
    out_slots = gl.allocate_shared_memory(y.dtype, [ROWS // 64, TOKENS, 64], y.layout)
    full, free = ring(STAGES, 1), ring(STAGES, 2)
    gl.thread_barrier()
    slots, bars = (weight_slots, count_slots), (full, free)
    copied = (
        weight_tiles, count_tiles, weight_slots, count_slots, full, free, num_outputs, num_tokens,
        BLOCKS, ROWS, TOKENS, BAND, STAGES,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (
                slots, bars, out_slots, x, weight, y, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
                BLOCKS, ROWS, TOKENS, BAND, STAGES, SIZE, 0, PER_ROW, HAS_BIAS, ACROSS,
            )),
            (consume, (
                slots, bars, out_slots, x, weight, y, scale, threshold, digits, blocks, bias, num_outputs, num_tokens,
                BLOCKS, ROWS, TOKENS, BAND, STAGES, SIZE, 1, PER_ROW, HAS_BIAS, ACROSS,
            )),
            (copy_tiles, copied),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

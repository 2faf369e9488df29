"""Bodies of the kernels of counts and INT8 weights; tiles are the caller's.

A count of any size is digits in base 256, each in -128 .. 127: count = d0 + 256 d1 + 65536 d2 + ..., at most five. The
digit d0 of every count is stored and multiplied; the others are zero but for a few channels of a few tokens, and are
made again from x where one is needed. `digits` says of every token how many more than d0 it has, `blocks` (bits, 32 a
word) in which blocks of DEPTH channels. Products of digits and weights are exact integers in int32.
"""

import triton
import triton.language as tl

from ops.spike_count.triton_kernels import counted, threshold_of

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a number below 2^22, it leaves no bits behind the point


@triton.jit
def counts_of(x, threshold, inverse):
    """Counts int32 of x fp32, as ops.spike_count gives them; 0 where they are not finite."""
    whole = counted(x, threshold, inverse)
    whole = tl.where(tl.abs(whole) < float("inf"), whole, 0.0)
    return tl.minimum(tl.maximum(whole, -2147483520.0), 2147483520.0).to(tl.int32)


@triton.jit
def without_lowest(count):
    """The digits of counts but the lowest, as counts: (count + 128) / 256, rounded down, without overflow."""
    return ((count >> 7) + 1) >> 1


@triton.jit
def either(a, b):
    """What two words of bits have, for a reduction."""
    return a | b


@triton.jit
def lowest_digits(
    x,
    mean,
    count,
    threshold,
    digits,
    blocks,
    k,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    ALL: tl.constexpr,
):
    """count int8 [tokens, SIZE], threshold, digits [tokens] and blocks [tokens, WORDS] of x [tokens, SIZE]: a token a
    program. mean [tokens]: of |x|, where x is a part of its tokens. blocks is left as it is where digits is 0.

    ALL: count is [5, tokens, SIZE], all digits of the tokens that have more than one.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    values = tl.load(x + token * SIZE + channel, mask=channel < SIZE, other=0.0)
    size = tl.abs(values.to(tl.float32))
    total, top = tl.sum(size, 0), tl.max(size, 0)
    if HAS_MEAN:
        level = tl.load(mean + token)
    else:
        level = tl.div_rn(total, SIZE * 1.0)
    own = threshold_of(level.to(x.dtype.element_ty).to(tl.float32), k)
    own = tl.where(total < float("inf"), own, float("nan"))
    inverse = tl.div_rn(1.0, own)
    tl.store(threshold + token, own)
    if top * inverse < 127.0:  # false where own is NaN
        ratio = values.to(tl.float32) * inverse
        for _ in tl.static_range(2):  # the bits of a division, see spike_count.triton_kernels.counted
            ratio = tl.fma(tl.fma(-ratio, own, values.to(tl.float32)), inverse, ratio)
        rounded = (ratio + ROUND).to(tl.int32, bitcast=True)
        tl.store(count + token * SIZE + channel, rounded.to(tl.int8), mask=channel < SIZE)
        tl.store(digits + token, 0)
    else:
        most, bit = 0, tl.arange(0, 32)
        for word in range(WORDS):
            part = word * (32 * DEPTH) + tl.arange(0, 32 * DEPTH)
            inside = part < SIZE
            again = tl.load(x + token * SIZE + part, mask=inside, other=0.0).to(tl.float32)
            rest = counts_of(again, own, inverse)
            tl.store(count + token * SIZE + part, rest.to(tl.int8), mask=inside)
            needed = tl.zeros([32], tl.int32)
            for place in tl.static_range(1, 5):
                rest = without_lowest(rest)
                needed = tl.where(tl.max(tl.reshape(tl.abs(rest), [32, DEPTH]), 1) > 0, place, needed)
                if ALL:
                    at = (place * tl.num_programs(0).to(tl.int64) + token) * SIZE + part
                    tl.store(count + at, rest.to(tl.int8), mask=inside)
            most = tl.maximum(most, tl.max(needed, 0))
            tl.store(blocks + token * WORDS + word, tl.sum((needed > 0).to(tl.int32) << bit, 0))
        tl.store(digits + token, most)


@triton.jit
def product(
    x,
    count,
    threshold,
    digits,
    blocks,
    weight,
    scale,
    bias,
    y,
    num_tokens,
    num_outputs,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y [tokens, outputs] of weight [outputs, SIZE] int8 with scale [outputs, SIZE / GROUP]: a tile a program.

    SPLITS > 1: program_id(1) is a part of the groups, and y fp32 [SPLITS, tokens, outputs] their sums as they are.
    """
    GROUPS: tl.constexpr = SIZE // GROUP
    STEPS: tl.constexpr = GROUP // DEPTH
    num_rows, num_columns = tl.cdiv(num_outputs, ROWS), tl.cdiv(num_tokens, TOKENS)
    program, split = tl.program_id(0), tl.program_id(1)
    band = program // (BAND * num_columns)
    height = tl.minimum(num_rows - band * BAND, BAND)
    place = program - band * BAND * num_columns
    output = (band * BAND + place % height) * ROWS + tl.arange(0, ROWS)
    token = place // height * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, DEPTH)
    # What is beyond the last row or token is read twice and not stored.
    row, column = tl.minimum(output, num_outputs - 1).to(tl.int64), tl.minimum(token, num_tokens - 1).to(tl.int64)
    weights = weight + row[:, None] * SIZE + channel[None, :]
    counts = count + column[None, :] * SIZE + channel[:, None]
    first, last = GROUPS * split // SPLITS, GROUPS * (split + 1) // SPLITS
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for group in range(first, last):
        factor = tl.load(scale + row * GROUPS + group)
        if STEPS == 1:
            whole = tl.dot(tl.load(weights + group * DEPTH), tl.load(counts + group * DEPTH), out_dtype=tl.int32)
        else:
            whole = tl.zeros([ROWS, TOKENS], tl.int32)
            for step in range(STEPS):
                at = group * GROUP + step * DEPTH
                whole = tl.dot(tl.load(weights + at), tl.load(counts + at), whole, out_dtype=tl.int32)
        total += whole.to(tl.float32) * factor[:, None]
    most = tl.max(tl.load(digits + column), 0)
    own = tl.load(threshold + column)
    if most > 0:
        inverse = tl.math.div_rn(1.0, own)
        inside = tl.load(digits + column) > 0
        for word in range(WORDS):
            flags = tl.reduce(tl.load(blocks + column * WORDS + word, mask=inside, other=0), 0, either)
            for bit in range(32):
                at = (word * 32 + bit) * DEPTH
                if (((flags >> bit) & 1) != 0) & (at >= first * GROUP) & (at < last * GROUP):
                    factor = tl.load(scale + row * GROUPS + at // GROUP)
                    for start in range(0, DEPTH, 32):
                        few = at + start + tl.arange(0, 32)
                        values = tl.load(x + column[None, :] * SIZE + few[:, None]).to(tl.float32)
                        rest = tl.where(inside[None, :], counts_of(values, own[None, :], inverse[None, :]), 0)
                        tile = tl.load(weight + row[:, None] * SIZE + few[None, :])
                        power = 256.0
                        for _ in range(most):
                            rest = without_lowest(rest)
                            part = tl.dot(tile, rest.to(tl.int8), out_dtype=tl.int32)
                            total += part.to(tl.float32) * (factor * power)[:, None]
                            power *= 256.0
    inside = (output < num_outputs)[:, None] & (token < num_tokens)[None, :]
    places = y + token.to(tl.int64)[None, :] * num_outputs + output[:, None]
    if SPLITS > 1:
        tl.store(places + split.to(tl.int64) * num_tokens * num_outputs, total, mask=inside)
    else:
        total *= own[None, :]
        if HAS_BIAS:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_splits(
    parts,
    threshold,
    bias,
    y,
    num_tokens,
    num_outputs,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y [tokens, outputs] of sums [SPLITS, tokens, outputs], added in one order. program_id(0): BLOCK outputs,
    program_id(1): a token."""
    output, token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = output < num_outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * num_tokens + token) * num_outputs + output, mask=inside, other=0.0)
    total *= tl.load(threshold + token)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * num_outputs + output, total.to(y.dtype.element_ty), mask=inside)

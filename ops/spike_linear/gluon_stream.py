"""The product of few tokens' counts and INT8 weights in Gluon: weights come once, straight into the registers in which
the tensor cores want them.

A product over channels is the same in any order of the channels, so a thread takes 16 neighbors where one instruction
wants 4 here and 4 there, of weights and counts alike. The warps of a program share its rows' groups among them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_wait

from ops.spike_linear.gluon_digits import DEPTH


@gluon.jit
def along(size: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr):
    """0 .. size along one of three dimensions."""
    if dim == 0:
        flat: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
        return gl.expand_dims(gl.expand_dims(gl.arange(0, size, layout=flat), 1), 2)
    elif dim == 1:
        flat: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
        return gl.expand_dims(gl.expand_dims(gl.arange(0, size, layout=flat), 0), 2)
    else:
        flat: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
        return gl.expand_dims(gl.expand_dims(gl.arange(0, size, layout=flat), 0), 1)


@gluon.jit
def load_weights(
    weight, scale, output, block, num_outputs, BLOCKS: gl.constexpr, SCALES: gl.constexpr, ROWS: gl.constexpr,
    left: gl.constexpr, sums: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """(weights [warps, ROWS, DEPTH], scales [warps, ROWS, 1]) of each warp's block from block on; else zeros."""
    row = gl.minimum(output + along(ROWS, 1, left), num_outputs - 1).to(gl.int64)
    own = block + along(num_warps, 0, left)
    weights = gl.load(
        weight + row * (BLOCKS * DEPTH) + (own * DEPTH + along(DEPTH, 2, left)), mask=own < BLOCKS, other=0
    )
    flat: gl.constexpr = gl.SliceLayout(2, sums)
    row = output + gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, flat)), 0)
    row = gl.minimum(row, num_outputs - 1).to(gl.int64) * SCALES
    own = block + gl.expand_dims(gl.arange(0, num_warps, layout=gl.SliceLayout(1, flat)), 1)
    at = gl.where(own < BLOCKS, own, 0) if SCALES > 1 else own * 0
    return weights, gl.expand_dims(gl.load(scale + row + at), 2)


@gluon.jit
def load_counts(count, inside, token, block, BLOCKS: gl.constexpr, right: gl.constexpr, num_warps: gl.constexpr):
    """Counts [warps, DEPTH, tokens] of each warp's block from block on; else, and where not inside, zeros."""
    own = block + along(num_warps, 0, right)
    at = token * (BLOCKS * DEPTH) + (own * DEPTH + along(DEPTH, 1, right))
    return gl.load(count + at, mask=inside & (own < BLOCKS), other=0)


@gluon.jit
def load_round(
    weight, scale, output, block, num_outputs, BLOCKS: gl.constexpr, SCALES: gl.constexpr, ROWS: gl.constexpr,
    AHEAD: gl.constexpr, left: gl.constexpr, sums: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """load_weights of AHEAD blocks of every warp."""
    found = ()
    for i in gl.static_range(AHEAD):
        at = block + i * num_warps
        found += (load_weights(weight, scale, output, at, num_outputs, BLOCKS, SCALES, ROWS, left, sums, num_warps),)
    return found


@gluon.jit
def add_round(
    total, held, count, inside, token, block, factor, BLOCKS: gl.constexpr, AHEAD: gl.constexpr, right: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """total with the products of a round's weights and one digit of the counts, factor times."""
    zeros = (total * 0).to(gl.int32)
    counts = ()
    for i in gl.static_range(AHEAD):
        counts += (load_counts(count, inside, token, block + i * num_warps, BLOCKS, right, num_warps),)
    for i in gl.static_range(AHEAD):
        total += mma_v2(held[i][0], counts[i], zeros).to(gl.float32) * (held[i][1] * factor)
    return total


@gluon.jit
def add_digits(
    total, held, count, more, most, token, block, stride_digit, BLOCKS: gl.constexpr, AHEAD: gl.constexpr,
    right: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """total with the products of a round's weights and all digits but the lowest."""
    power = 256.0
    for place in range(1, most + 1):
        digit = count + place * stride_digit
        total = add_round(total, held, digit, more, token, block, power, BLOCKS, AHEAD, right, num_warps)
        power *= 256.0
    return total


@gluon.jit
def few_tokens(
    weight, count, scale, threshold, digits, bias, y, num_outputs, num_tokens, stride_digit,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, AHEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """y [tokens, outputs] of weight [outputs, BLOCKS * DEPTH] int8, scale [outputs, SCALES] (SCALES is BLOCKS or 1) and
    count int8 [digits, tokens, BLOCKS * DEPTH], digits stride_digit apart: ROWS outputs of up to TOKENS tokens a
    program. AHEAD blocks of every warp are loaded at once, the first ones before the counts are known."""
    num_warps: gl.constexpr = gl.num_warps()
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 16)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 16)
    ROUND: gl.constexpr = AHEAD * num_warps
    output = gl.program_id(0) * ROWS
    held = load_round(weight, scale, output, 0, num_outputs, BLOCKS, SCALES, ROWS, AHEAD, left, sums, num_warps)
    stored: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, num_warps], [0, 1])
    near = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, stored))
    every = gl.arange(0, TOKENS, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    token = along(TOKENS, 2, right).to(gl.int64)
    inside = token < num_tokens
    gdc_wait()
    level = gl.load(threshold + near, mask=near < num_tokens, other=0.0)
    own_digits = gl.load(digits + every, mask=every < num_tokens, other=0)
    total = gl.full([num_warps, ROWS, TOKENS], 0.0, gl.float32, layout=sums)
    total = add_round(total, held, count, inside, token, 0, 1.0, BLOCKS, AHEAD, right, num_warps)
    most = gl.max(own_digits, 0)
    more = inside & (gl.load(digits + token, mask=inside, other=0) > 0)
    total = add_digits(total, held, count, more, most, token, 0, stride_digit, BLOCKS, AHEAD, right, num_warps)
    for block in range(ROUND, BLOCKS, ROUND):
        held = load_round(weight, scale, output, block, num_outputs, BLOCKS, SCALES, ROWS, AHEAD, left, sums, num_warps)
        total = add_round(total, held, count, inside, token, block, 1.0, BLOCKS, AHEAD, right, num_warps)
        total = add_digits(total, held, count, more, most, token, block, stride_digit, BLOCKS, AHEAD, right, num_warps)
    summed = gl.convert_layout(gl.sum(total, 0), stored)
    row = output + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    summed *= gl.expand_dims(level, 0)
    if HAS_BIAS:
        summed += gl.expand_dims(gl.load(bias + row, mask=row < num_outputs, other=0.0).to(gl.float32), 1)
    at = gl.expand_dims(near.to(gl.int64), 0) * num_outputs + gl.expand_dims(row, 1)
    whole = gl.expand_dims(row < num_outputs, 1) & gl.expand_dims(near < num_tokens, 0)
    gl.store(y + at, summed.to(y.dtype.element_ty), mask=whole)

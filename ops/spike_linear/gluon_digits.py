"""Counts' digits on Hopper in Gluon: a token is read once, into registers, by as few warps as hold it.

Every count is made from there, so that a token costs no more than its bytes read and written; only tokens with counts
beyond int8 are read again. The kernel starts while the one before it ends, and lets the next one start.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DEPTH = gl.constexpr(128)
"""Channels of a block: a group of weights, or a part of one that is a whole row."""
ROUND = gl.constexpr(12582912.0)  # 1.5 * 2^23: added to a number below 2^22, it leaves no bits behind the point


@gluon.jit
def either(a, b):
    """What two words of bits have, for a reduction."""
    return a | b


@gluon.jit
def quotient(x, threshold, inverse, low):
    """x / threshold with the bits of a division. inverse + low: 1 / threshold, the former rounded.

    The first guess is within one unit of its last place, so that one correction gives the rounded quotient (P.
    Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990).
    """
    ratio = gl.fma(x, inverse, x * low)
    return gl.fma(gl.fma(-ratio, threshold, x), inverse, ratio)


@gluon.jit
def counts_of(x, threshold, inverse, low):
    """Counts int32 of x fp32 of any size; 0 where they are not finite, see spike_count."""
    ratio = quotient(x, threshold, inverse, low)
    away = gl.where(ratio < 0, -8388608.0, 8388608.0)
    whole = gl.where(gl.abs(ratio) < 8388608.0, (ratio + away) - away, ratio)
    whole = gl.where(gl.abs(whole) < float("inf"), whole, 0.0)
    return gl.minimum(gl.maximum(whole, -2147483520.0), 2147483520.0).to(gl.int32)


@gluon.jit
def more_digits(
    x, count, digits, blocks, token, own, inverse, low,
    SIZE: gl.constexpr, PART: gl.constexpr, WORDS: gl.constexpr, ALL: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """All digits of a token that has more than one."""
    most = 0
    NEAR: gl.constexpr = PART // DEPTH
    for word in range(WORDS):
        flags = 0
        for part in range(32 // NEAR):
            channel = word * (32 * DEPTH) + part * PART + gl.arange(0, PART, layout=layout)
            inside = channel < SIZE
            values = gl.load(x + token * SIZE + channel, mask=inside, other=0.0).to(gl.float32)
            rest = counts_of(values, own, inverse, low)
            gl.store(count + token * SIZE + channel, rest.to(gl.int8), mask=inside)
            needed = gl.full([PART], 0, gl.int32, layout=layout)
            for place in gl.static_range(1, 5):
                rest = ((rest >> 7) + 1) >> 1
                needed = gl.where(rest != 0, place, needed)
                if ALL:
                    at = (place * gl.num_programs(0).to(gl.int64) + token) * SIZE + channel
                    gl.store(count + at, rest.to(gl.int8), mask=inside)
            bit = gl.where(needed > 0, 1 << (part * NEAR + (channel // DEPTH) % NEAR), 0)
            flags = flags | gl.reduce(bit, 0, either)
            most = gl.maximum(most, gl.max(needed, 0))
        gl.store(blocks + token * WORDS + word, flags)
    gl.store(digits + token, most)


@gluon.jit
def lowest_digits(
    x, mean, count, threshold, digits, blocks, k,
    SIZE: gl.constexpr, WORDS: gl.constexpr, HAS_MEAN: gl.constexpr, ALL: gl.constexpr,
):  # fmt: skip
    """As triton_kernels.lowest_digits, for blocks of DEPTH channels: a token a program."""
    num_warps: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = 256 * num_warps
    PARTS: gl.constexpr = (SIZE + WIDTH - 1) // WIDTH
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [num_warps], [0])
    gdc_wait()  # for what wrote x, and for what still reads the counts of another call
    gdc_launch_dependents()
    token = gl.program_id(0).to(gl.int64)
    channel = gl.arange(0, WIDTH, layout=layout)
    held = ()
    for i in gl.static_range(PARTS):
        at = x + token * SIZE + i * WIDTH + channel
        if (i + 1) * WIDTH <= SIZE:
            held = held + (gl.load(at),)
        else:
            held = held + (gl.load(at, mask=i * WIDTH + channel < SIZE, other=0.0),)
    total = gl.full([WIDTH], 0.0, gl.float32, layout=layout)
    top = gl.full([WIDTH], 0.0, gl.float32, layout=layout)
    for i in gl.static_range(PARTS):
        size = gl.abs(held[i].to(gl.float32))
        total += size
        top = gl.maximum(top, size)
    total, top = gl.sum(total, 0), gl.max(top, 0)
    if HAS_MEAN:
        level = gl.load(mean + token).to(gl.float32)
    else:
        level = gl.div_rn(total, SIZE * 1.0)
    level = level.to(x.dtype.element_ty).to(gl.float32)
    own = gl.minimum(gl.maximum(gl.div_rn(level, k), 1e-5), 1e4)
    own = gl.where(gl.abs(level) < float("inf"), own, float("nan"))
    own = gl.where(total < float("inf"), own, float("nan"))
    inverse = gl.div_rn(1.0, own)
    low = gl.fma(-inverse, own, 1.0) * inverse
    gl.store(threshold + token, own)
    if top * inverse < 127.0:  # false where own is NaN
        for i in gl.static_range(PARTS):
            ratio = quotient(held[i].to(gl.float32), own, inverse, low)
            rounded = (ratio + ROUND).to(gl.int32, bitcast=True).to(gl.int8)
            to = count + token * SIZE + i * WIDTH + channel
            if (i + 1) * WIDTH <= SIZE:
                gl.store(to, rounded)
            else:
                gl.store(to, rounded, mask=i * WIDTH + channel < SIZE)
        gl.store(digits + token, 0)
    else:
        PART: gl.constexpr = 1024 if num_warps <= 4 else WIDTH
        more_digits(x, count, digits, blocks, token, own, inverse, low, SIZE, min(PART, 4096), WORDS, ALL, layout)

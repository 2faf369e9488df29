"""Body of the spike count kernel; tiles are the caller's. x is [num_rows, SIZE], contiguous."""

import triton
import triton.language as tl


@triton.jit
def threshold_of(mean, per_mean):
    """Thresholds of means that are rounded already, all fp32; NaN where the mean is not finite."""
    threshold = tl.minimum(tl.maximum(tl.div_rn(mean, per_mean), 1e-5), 1e4)
    return tl.where(tl.abs(mean) < float("inf"), threshold, float("nan"))


@triton.jit
def counted(x, threshold, inverse):
    """x / threshold, rounded to fp32 as a division is, then to a whole number, half to even. inverse: 1 / threshold.

    The quotient is refined twice with what a product rounded once leaves over; that gives the bits of a division (P.
    Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990) with less than half of its work.
    NaN where the quotient is not finite.
    """
    first = x * inverse
    better = tl.fma(tl.fma(-first, threshold, x), inverse, first)
    quotient = tl.fma(tl.fma(-better, threshold, x), inverse, better)
    size = tl.abs(quotient)
    whole = (size + 8388608.0) - 8388608.0  # 2**23: from there on fp32 has whole numbers only
    signed = (whole.to(tl.int32, bitcast=True) | (quotient.to(tl.int32, bitcast=True) & -2147483648)).to(
        tl.float32, bitcast=True
    )
    return tl.where(size < 8388608.0, signed, quotient)


@triton.jit
def _store(values, threshold, inverse, count, x_hat, at, mask, COUNTS: tl.constexpr):
    """Write one tile of counts, or of values."""
    whole = counted(values.to(tl.float32), threshold, inverse)
    if COUNTS:
        whole = tl.minimum(tl.maximum(tl.where(whole == whole, whole, 0.0), -2147483520.0), 2147483520.0)
        tl.store(count + at, whole.to(tl.int32), mask=mask)
    else:
        tl.store(x_hat + at, (whole * threshold).to(x_hat.dtype.element_ty), mask=mask)


@triton.jit
def spikes(
    x,
    mean_abs,
    count,
    thresholds,
    x_hat,
    num_rows,
    per_mean,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """count [num_rows, SIZE] and thresholds [num_rows] where COUNTS, else x_hat like x. ROWS rows a program.

    Rows of up to BLOCK numbers are read once. Longer ones are read in parts, once for the mean and once again.
    mean_abs [num_rows] where HAS_MEAN. per_mean: spikes per mean activation. What is not asked for may be any tensor.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    at = rows[:, None] * SIZE + cols[None, :]
    real = rows[:, None] < num_rows
    mask = real & (cols[None, :] < SIZE)
    if SIZE <= BLOCK:
        held = tl.load(x + at, mask=mask, other=0.0)
    if HAS_MEAN:
        mean = tl.load(mean_abs + rows, mask=rows < num_rows, other=0.0)
    else:
        if SIZE <= BLOCK:
            sizes = tl.abs(held.to(tl.float32))
        else:
            sizes = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            for start in range(0, SIZE, BLOCK):
                part = tl.load(x + at + start, mask=real & (start + cols[None, :] < SIZE), other=0.0)
                sizes += tl.abs(part.to(tl.float32))
        total = tl.sum(sizes, 1)
        mean = tl.div_rn(total, tl.full([ROWS], SIZE, tl.float32))
    threshold = threshold_of(mean.to(x.dtype.element_ty).to(tl.float32), per_mean)
    if COUNTS:
        tl.store(thresholds + rows, threshold, mask=rows < num_rows)
    inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), threshold)[:, None]
    if SIZE <= BLOCK:
        _store(held, threshold[:, None], inverse, count, x_hat, at, mask, COUNTS)
    else:
        for start in range(0, SIZE, BLOCK):
            inside = real & (start + cols[None, :] < SIZE)
            part = tl.load(x + at + start, mask=inside, other=0.0)
            _store(part, threshold[:, None], inverse, count, x_hat, at + start, inside, COUNTS)

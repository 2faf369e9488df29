"""Bodies of the cross-entropy kernels on one chunk of logits [rows, SIZE]; tiles are the caller's.

labels are local columns, -1 where the label is elsewhere. Columns at and after num_valid do not count. Masks of loads
and stores compare with SIZE, a constant, so that they do not break vector accesses; num_valid is applied to values.
"""

import triton
import triton.language as tl


@triton.jit
def statistics(
    logits, labels, top, sums, picked, num_valid, SIZE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """Per row: max, sum of exp(logit - max), logit of the label or 0. One row a program.

    Each of LANES lanes keeps the max and the sum of its own WIDTH columns at a time; lanes meet once, at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * SIZE
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    highest = tl.full([LANES], -1e30, tl.float32)
    summed = tl.zeros([LANES], tl.float32)
    for start in range(0, num_valid, LANES * WIDTH):
        cols = start + offsets
        values = tl.load(source + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
        values = tl.where(cols < num_valid, values, -float("inf"))
        raised = tl.maximum(highest, tl.max(values, 1))
        summed = summed * tl.exp(highest - raised) + tl.sum(tl.exp(values - raised[:, None]), 1)
        highest = raised
    best = tl.max(highest, 0)
    label = tl.load(labels + row)
    tl.store(top + row, tl.where(num_valid > 0, best, -float("inf")))
    tl.store(sums + row, tl.sum(summed * tl.exp(highest - best), 0))
    tl.store(picked + row, tl.load(source + label, mask=label >= 0, other=0.0).to(tl.float32))


@triton.jit
def gradient(logits, labels, lse, scale, num_valid, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """logits <- (softmax - one-hot of the label) * scale of the row, in place."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * SIZE + cols
    mask = cols < SIZE
    values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    share = tl.where(cols < num_valid, tl.exp(values - tl.load(lse + row)), 0.0)
    result = tl.where(cols == tl.load(labels + row), share - 1.0, share) * tl.load(scale + row)
    tl.store(at, result.to(logits.dtype.element_ty), mask=mask)

"""Bodies of the cross-entropy kernels on one chunk of logits [rows, SIZE]; tiles are the caller's.

labels are local columns, -1 where the label is elsewhere. Columns at and after num_valid do not count.
"""

import triton
import triton.language as tl


@triton.jit
def statistics(logits, labels, top, total, picked, num_valid, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Per row: max, sum of exp(logit - max), logit of the label or 0. One row a program."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * SIZE
    highest = -float("inf")
    summed = 0.0
    for start in range(0, num_valid, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        values = tl.load(source + cols, mask=cols < num_valid, other=-float("inf")).to(tl.float32)
        raised = tl.maximum(highest, tl.max(values, 0))
        summed = summed * tl.exp(highest - raised) + tl.sum(tl.exp(values - raised), 0)
        highest = raised
    label = tl.load(labels + row)
    tl.store(top + row, highest)
    tl.store(total + row, summed)
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

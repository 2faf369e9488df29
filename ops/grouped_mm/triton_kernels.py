"""Bodies of the grouped matrix products; tiles are the caller's. Group e is rows offsets[e] .. offsets[e + 1].

Nothing waits for the host to learn the group sizes: programs find their group, and those beyond the last tile return.
"""

import triton
import triton.language as tl


@triton.jit
def rows_product(
    x,
    weight,
    y,
    offsets,
    num_groups,
    stride_group,
    stride_out,
    stride_in,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [T, OUT]: rows of x [T, IN] times weight[group] [OUT, IN], transposed, fp32 sums. A tile of y a program.

    program_id(1) counts the tiles of rows of all groups; every group begins a new tile. GROUPS >= num_groups.
    """
    tile = tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    known = groups < num_groups
    firsts = tl.load(offsets + groups, mask=known, other=0)
    lasts = tl.load(offsets + groups + 1, mask=known, other=0)
    num_tiles = (lasts - firsts + ROWS - 1) // ROWS
    group = tl.sum((known & (tl.cumsum(num_tiles, 0) <= tile)).to(tl.int32), 0)
    if group < num_groups:
        tile -= tl.sum(tl.where(groups < group, num_tiles, 0), 0)
        last = tl.load(offsets + group + 1)
        rows = (tl.load(offsets + group) + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
        matrix = weight + group.to(tl.int64) * stride_group + cols[None, :] * stride_out
        total = tl.zeros([ROWS, COLS], dtype=tl.float32)
        for start in range(0, IN, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            left = tl.load(x + rows * IN + depth[None, :], mask=(rows < last) & (depth[None, :] < IN), other=0.0)
            inside = (depth[:, None] < IN) & (cols[None, :] < OUT)
            right = tl.load(matrix + depth[:, None] * stride_in, mask=inside, other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        mask = (rows < last) & (cols[None, :] < OUT)
        tl.store(y + rows * OUT + cols[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    x,
    grad_y,
    grad_weight,
    offsets,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_weight [E, OUT, IN]: grad_y [T, OUT] transposed times x [T, IN] over the rows of each group.

    program_id(2) is the group; a program makes ROWS x COLS of its matrix, DEPTH tokens at a time.
    """
    group = tl.program_id(2)
    first, last = tl.load(offsets + group), tl.load(offsets + group + 1)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(first, last, DEPTH):
        tokens = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (rows[:, None] < OUT) & (tokens[None, :] < last)
        left = tl.load(grad_y + tokens[None, :] * OUT + rows[:, None], mask=inside, other=0.0)
        inside = (tokens[:, None] < last) & (cols[None, :] < IN)
        right = tl.load(x + tokens[:, None] * IN + cols[None, :], mask=inside, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    target = grad_weight + group.to(tl.int64) * OUT * IN + rows[:, None] * IN + cols[None, :]
    mask = (rows[:, None] < OUT) & (cols[None, :] < IN)
    tl.store(target, total.to(grad_weight.dtype.element_ty), mask=mask)

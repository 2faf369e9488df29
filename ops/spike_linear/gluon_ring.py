"""The ring of slots between the warp that copies tiles of weights and counts and the warps that multiply them.

A slot has two barriers: `full` counts the bytes that arrived, `free` the groups of warps that are done with it. Who
comes to a slot again awaits the other parity.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from ops.spike_linear.gluon_digits import DEPTH

ROWS = gl.constexpr(128)
"""Outputs of a tile: 64, the rows of one instruction, for either group of warps."""


@gluon.jit
def ring(NUM: gl.constexpr, EVENTS: gl.constexpr):
    """NUM barriers, each awaiting so many events."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=EVENTS)
    return barriers


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
def place(tile, num_outputs, num_tokens, TOKENS: gl.constexpr, BAND: gl.constexpr):
    """(first output, first token) of a tile; neighbors in time share weights or counts: bands of BAND tiles."""
    num_rows, num_columns = gl.cdiv(num_outputs, ROWS), gl.cdiv(num_tokens, TOKENS)
    band = tile // (BAND * num_columns)
    height = gl.minimum(num_rows - band * BAND, BAND)
    rest = tile - band * BAND * num_columns
    return (band * BAND + rest % height) * ROWS, rest // height * TOKENS


@gluon.jit
def copy_tiles(
    weight, count, slots, bars, num_outputs, num_tokens,
    BLOCKS: gl.constexpr, TOKENS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: every slot of every tile of this program, in the order in which they are used.

    slots: (weights, counts), bars: (full, free).
    """
    slot, phase = 0, 1
    gdc_wait()  # for the kernel that counts
    num_tiles = gl.cdiv(num_outputs, ROWS) * gl.cdiv(num_tokens, TOKENS)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        output, token = place(tile, num_outputs, num_tokens, TOKENS, BAND)
        for block in range(BLOCKS):
            barrier = bars[0].index(slot)
            mbarrier.wait(bars[1].index(slot), phase)
            mbarrier.expect(barrier, weight.block_type.nbytes + count.block_type.nbytes)
            tma.async_copy_global_to_shared(weight, [output, block * DEPTH], barrier, slots[0].index(slot))
            tma.async_copy_global_to_shared(count, [token, block * DEPTH], barrier, slots[1].index(slot))
            slot, phase = next_slot(slot, phase, STAGES)

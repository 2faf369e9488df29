"""Bodies of the spike encoding kernels; tiles are the caller's. Counts are flat; spikes are [num_steps, num_counts]."""

import triton
import triton.language as tl


@triton.jit
def encode(
    count,
    spikes,
    num_counts,
    num_steps,
    COUNTED: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    LSB_FIRST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """spikes fp32 of count. STEPS steps of BLOCK counts a program.

    COUNTED: a spike for each unit; else a bit for each step, of |count| with its sign or, where COMPLEMENT, of count.
    """
    groups = tl.cdiv(num_steps, STEPS)
    program = tl.program_id(0)
    at = (program // groups).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    steps = program % groups * STEPS + tl.arange(0, STEPS)[:, None]
    numbers = tl.load(count + at, mask=at < num_counts, other=0).to(tl.int64)[None, :]
    sizes = tl.abs(numbers)
    signs = tl.where(numbers < 0, -1.0, 1.0)
    if COUNTED:
        fires = steps < sizes
    else:
        places = steps if LSB_FIRST else num_steps - 1 - steps
        places = tl.minimum(tl.maximum(places, 0), 63).to(tl.int64)
        fires = ((numbers if COMPLEMENT else sizes) >> places & 1) != 0
    found = tl.where(fires, 1.0 if COMPLEMENT else signs, 0.0)
    mask = (steps < num_steps) & (at[None, :] < num_counts)
    tl.store(spikes + steps.to(tl.int64) * num_counts + at[None, :], found, mask=mask)


@triton.jit
def decode(
    spikes,
    count,
    problems,
    num_counts,
    num_steps,
    COUNTED: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    LSB_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """count int32 of spikes; problems int32 [programs]: 2 where a spike is none, else 1 where a sum is no int32.

    NEGATIVE: spikes may be -1. BLOCK counts a program.
    """
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_counts
    total = tl.zeros([BLOCK], dtype=tl.int64)
    strange = tl.zeros([BLOCK], dtype=tl.int32)
    step_at = spikes + at
    for step in range(0, num_steps):
        fired = tl.load(step_at, mask=mask, other=0)
        known = (fired == 0) | (fired == 1)
        if NEGATIVE:
            known = known | (fired == -1)
        strange = tl.where(known, strange, 2)
        value = tl.where(fired > 0, 1, tl.where(fired < 0, -1, 0)).to(tl.int64)
        if not COUNTED:
            place = step if LSB_FIRST else num_steps - 1 - step
            if COMPLEMENT:
                value = tl.where(place == num_steps - 1, -value, value)
            value = value << place
        total += value
        step_at += num_counts
    tl.store(count + at, total.to(tl.int32), mask=mask)
    too_large = tl.where(total == total.to(tl.int32), 0, 1)
    tl.store(problems + program, tl.max(tl.maximum(strange, too_large), 0))

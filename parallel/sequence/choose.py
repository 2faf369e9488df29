"""sp_algorithm=auto: the algorithm of each kind of mixer that costs least on these ranks, and why.

S takes what receives fewer elements a layer; the sizes alone decide. L takes lasp2 or zeco, whichever hands on a state
of the model's size sooner, timed on the group's own links; both give the same bits, so that a run may go on with the
other. Ulysses is not timed for L: it moves every token's vectors, and one state is worth those of a few dozen tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import SequenceAlgorithm, SequenceAlgorithms
from parallel.sequence import lasp2, zeco
from parallel.sequence.states import Exchange
from parallel.sequence.table import candidates, pair_problem
from parallel.sequence.ulysses import head_plan

NUM_WARMUP, NUM_TIMED, NUM_CHAINED = 2, 5, 16
NUM_HEAD_STARTS = 4
"""Matrix products in fp32, milliseconds each, that keep a GPU busy while the host launches what is timed."""
EXCHANGES: dict[str, Exchange] = {"lasp2": lasp2.exchange, "zeco": zeco.exchange}
CLEARLY = 0.9
"""zeco's time over lasp2's below which it is taken: less is noise."""


def choose(
    algorithms: SequenceAlgorithms,
    symbols: set[str],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    seq_len: int,
    row_tokens: int | None,
    group,
    device: torch.device,
) -> tuple[SequenceAlgorithms, dict[str, str]]:
    """algorithms without auto, and for each mixer of `symbols` that had it what was chosen and why.

    Heads are those of a tp rank, the group is that of the sp ranks. seq_len: of the longest document; row_tokens: of a
    row, None where that is not known, as of a prompt. Collective over all ranks where L is to be timed.
    """
    sizes = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
    chosen, reasons = {}, {}
    for symbol in "FSL":
        if getattr(algorithms, symbol) is not SequenceAlgorithm.auto:
            continue
        if group.size() == 1 or symbol not in symbols or candidates(symbol) == [SequenceAlgorithm.ulysses]:
            chosen[symbol], reason = SequenceAlgorithm.ulysses, "the only one"
        elif symbol == "S":
            chosen[symbol], reason = _by_volume(**sizes, seq_len=seq_len, row_tokens=row_tokens, sp=group.size())
        else:
            chosen[symbol], reason = _by_time((num_kv_heads, head_dim, head_dim), group, device)
        if group.size() > 1 and symbol in symbols:
            reasons[symbol] = f"{chosen[symbol].name} ({reason})"
    return replace(algorithms, **chosen), reasons


def _by_volume(
    *, num_heads: int, num_kv_heads: int, head_dim: int, window: int, seq_len: int, row_tokens: int | None, sp: int
) -> tuple[SequenceAlgorithm, str]:
    """halo or ulysses for S."""
    sizes = dict(sp=sp, num_kv_heads=num_kv_heads, window=window, seq_len=seq_len)
    problems = {name: pair_problem("S", SequenceAlgorithm[name], **sizes) for name in ("halo", "ulysses")}
    possible = [name for name, problem in problems.items() if problem is None]
    if len(possible) == 1:
        return SequenceAlgorithm[possible[0]], "the only one that these sizes allow"
    if row_tokens is None:
        return SequenceAlgorithm.halo, "what it receives does not grow with the row"
    q_heads, kv_heads = map(len, head_plan(num_heads=num_heads, num_kv_heads=num_kv_heads, sp=sp))
    received = {
        "halo": 2 * num_kv_heads * head_dim * (window - 1),
        "ulysses": 2 * (q_heads + kv_heads) * head_dim * (row_tokens // sp) * (sp - 1) // sp,  # q and o, k and v
    }
    best, other = sorted(received, key=received.get)
    return SequenceAlgorithm[best], f"receives {received[best]:,} elements a layer, {other} {received[other]:,}"


def _by_time(shape: tuple[int, int, int], group, device: torch.device):
    """lasp2 or zeco for L."""
    times = {name: exchange_ms(exchange, shape, group, device) for name, exchange in EXCHANGES.items()}
    best = "zeco" if times["zeco"] < CLEARLY * times["lasp2"] else "lasp2"
    figures = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    return SequenceAlgorithm[best], f"a state to {group.size()} ranks: {figures}"


def exchange_ms(exchange: Exchange, shape: tuple[int, int, int], group, device: torch.device) -> float:
    """Milliseconds from a state [Hkv, K, V] of every rank to the one that enters it, of the slowest. Collective."""
    decay = torch.zeros(shape[:2], device=device)
    return chained_ms(
        lambda state: exchange(state, decay, group=group, reverse=False)(), torch.zeros(shape, device=device), group
    )


def chained_ms(call: Callable[[Tensor], Tensor], x: Tensor, group) -> float:
    """Milliseconds of a collective call, one after the other on its own result, of the slowest rank: a median.

    Collective over all ranks. On a GPU the host runs ahead, as it does in training: what it needs to launch a call does
    not count unless that takes longer than the call.
    """
    times = [_chain_ms(call, x, group) for _ in range(NUM_WARMUP + NUM_TIMED)][NUM_WARMUP:]
    slowest = torch.tensor(statistics.median(times), device=x.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _chain_ms(call, x: Tensor, group) -> float:
    dist.barrier(group=group)
    if x.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(NUM_CHAINED):
            x = call(x)
        return (time.perf_counter() - start) * 1e3 / NUM_CHAINED
    head_start = torch.zeros(4096, 4096, device=x.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(NUM_HEAD_STARTS):
        head_start = head_start @ head_start
    start.record()
    for _ in range(NUM_CHAINED):
        x = call(x)
    end.record()
    torch.cuda.synchronize(x.device)
    return start.elapsed_time(end) / NUM_CHAINED

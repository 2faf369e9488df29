"""THE TABLE: mixer x algorithm. What carries a mixer over the shards of a row, or the reason why it cannot.

Mixers go by their symbol in the layer pattern: F full attention, S sliding window, L gated linear attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

import ops
from parallel.layout import SequenceAlgorithm
from parallel.sequence import halo, lasp2, states, zeco
from parallel.sequence.ulysses import Ulysses, heads_problem

Mixing = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""(q, k, v, [log_decay], *, cu_seqlens of the whole row) of one rank's shard -> o [1, T/sp, Hq, V] of that shard.

Collective in a group of several ranks, and so is the backward pass. Those of L also take return_state=True, for a row
of one document that decoding continues: (o, state [1, Hkv, K, V] after the row), the state on every rank and without
gradients. What S and F leave behind is the same for every algorithm: the end of k and v (tail.py).

What meta tokens leave for every document is an argument too, the same on every rank: initial_state [Hkv, K, V] of L,
sink_k and sink_v [S, Hkv, D] of S and F. Its gradients add up over the ranks; nothing of it travels."""


def mixing(
    symbol: str,
    algorithm: SequenceAlgorithm,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int | None = None,
    group,
) -> Mixing:
    """The mixer's op over the shards of the group's ranks: the plain op in a group of one.

    Heads are those of a tp rank. Raises ValueError for a pair that the table refuses.
    """
    choice = TABLE[symbol][algorithm]
    if isinstance(choice, str):
        raise ValueError(f"layout.sp_algorithm.{symbol}={algorithm.name}: {choice}")
    return choice(num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, group=group)


def pair_problem(
    symbol: str, algorithm: SequenceAlgorithm, *, sp: int, num_kv_heads: int, window: int | None, seq_len: int
) -> str | None:
    """Why a mixer cannot use an algorithm on this sp (begins with `layout.`), or None. auto: of all it may choose."""
    sizes = dict(sp=sp, num_kv_heads=num_kv_heads, window=window, seq_len=seq_len)
    if algorithm is SequenceAlgorithm.auto:
        problems = [pair_problem(symbol, other, **sizes) for other in candidates(symbol)]
        return None if None in problems else problems[0]
    choice, key = TABLE[symbol][algorithm], f"layout.sp_algorithm.{symbol}={algorithm.name}"
    if isinstance(choice, str):
        return f"{key}: {choice}"
    if sp > 1 and algorithm is SequenceAlgorithm.ulysses:
        return heads_problem(num_kv_heads=num_kv_heads, sp=sp)
    if sp > 1 and algorithm is SequenceAlgorithm.halo and window > seq_len:
        return f"{key}: the window of {window} tokens is longer than seq_len={seq_len}; choose ulysses"
    return None


def candidates(symbol: str) -> list[SequenceAlgorithm]:
    """The algorithms that carry a mixer at all."""
    return [algorithm for algorithm, choice in TABLE[symbol].items() if not isinstance(choice, str)]


def _gla_by_heads(*, num_heads: int, num_kv_heads: int, window: None, group) -> Mixing:
    exchange = Ulysses(num_heads=num_heads, num_kv_heads=num_kv_heads, group=group)

    def gla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        cu_seqlens: Tensor,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ):
        """ops.gla of this rank's heads, over whole rows."""
        inputs = exchange.gather(q, k, v, log_decay)
        first = None if initial_state is None else states.of_each(exchange.own(initial_state, dim=0), cu_seqlens)
        o, state = ops.gla(*inputs, initial_state=first, cu_seqlens=cu_seqlens, output_final_state=return_state)
        o = exchange.scatter(o)
        return (o, exchange.all_heads(state)) if return_state else o

    return gla


def _gla_by_states(exchange: states.Exchange, *, num_heads: int, num_kv_heads: int, window: None, group) -> Mixing:
    return partial(states.gla, group=group, exchange=exchange, overlap=states.spans_hosts(group))


def _attention_by_heads(*, num_heads: int, num_kv_heads: int, window: int | None, group) -> Mixing:
    exchange = Ulysses(num_heads=num_heads, num_kv_heads=num_kv_heads, group=group)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, **sinks: Tensor) -> Tensor:
        inputs, sinks = exchange.gather(q, k, v), {name: exchange.own(x, dim=1) for name, x in sinks.items()}
        return exchange.scatter(ops.attention(*inputs, window=window, cu_seqlens=cu_seqlens, **sinks))

    return attention


def _attention_by_halo(*, num_heads: int, num_kv_heads: int, window: int, group) -> Mixing:
    return partial(halo.attention, window=window, group=group)


_NO_STATE = "softmax attention has no state of fixed size to hand on; choose {}"

TABLE: dict[str, dict[SequenceAlgorithm, Callable[..., Mixing] | str]] = {
    "F": {
        SequenceAlgorithm.ulysses: _attention_by_heads,
        SequenceAlgorithm.lasp2: _NO_STATE.format("ulysses"),
        SequenceAlgorithm.zeco: _NO_STATE.format("ulysses"),
        SequenceAlgorithm.halo: "full attention sees the whole document, which no halo holds; choose ulysses",
    },
    "S": {
        SequenceAlgorithm.ulysses: _attention_by_heads,
        SequenceAlgorithm.lasp2: _NO_STATE.format("halo or ulysses"),
        SequenceAlgorithm.zeco: _NO_STATE.format("halo or ulysses"),
        SequenceAlgorithm.halo: _attention_by_halo,
    },
    "L": {
        SequenceAlgorithm.ulysses: _gla_by_heads,
        SequenceAlgorithm.lasp2: partial(_gla_by_states, lasp2.exchange),
        SequenceAlgorithm.zeco: partial(_gla_by_states, zeco.exchange),
        SequenceAlgorithm.halo: "linear attention sees the whole document, no window of it; choose lasp2 or zeco",
    },
}

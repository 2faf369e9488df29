"""sp_algorithm=auto: what is chosen, and that it is said."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.layout import SequenceAlgorithm, SequenceAlgorithms
from parallel.sequence import choose as choosing
from parallel.sequence.choose import choose, exchange_ms

CPU = torch.device("cpu")
AUTO = SequenceAlgorithms()
SIZES = dict(num_heads=28, num_kv_heads=4, head_dim=128, window=4097, seq_len=131072, row_tokens=131072, device=CPU)


class Ranks:
    """A group of so many, for choices that ask it for its size alone."""

    def __init__(self, size: int):
        self.size = lambda: size


def chosen(symbols: str, algorithms=AUTO, *, sp: int = 4, **changes):
    return choose(algorithms, set(symbols), group=Ranks(sp), **{**SIZES, **changes})


def test_full_attention_has_no_choice():
    algorithms, reasons = chosen("F")
    assert algorithms.F is SequenceAlgorithm.ulysses and reasons == {"F": "ulysses (the only one)"}


def test_one_rank_has_nothing_to_choose_and_says_nothing():
    algorithms, reasons = chosen("FSL", sp=1)
    assert set(vars(algorithms).values()) == {SequenceAlgorithm.ulysses} and reasons == {}


def test_a_window_takes_what_receives_less():
    algorithms, reasons = chosen("S")
    assert algorithms.S is SequenceAlgorithm.halo
    # 2 * 4 * 128 * 4096; q and o of 28 heads, k and v of 4, over 32,768 tokens, three quarters of them from others
    assert reasons["S"] == "halo (receives 4,194,304 elements a layer, ulysses 201,326,592)"
    short = chosen("S", seq_len=8192, row_tokens=8192, sp=64)
    assert short[0].S is SequenceAlgorithm.ulysses, "128 tokens a rank, of 32 heads or halo"
    many = chosen("S", seq_len=8192, row_tokens=64 * 8192, sp=64)
    assert many[0].S is SequenceAlgorithm.halo, "a row of 64 such documents"
    assert chosen("S", seq_len=4097, row_tokens=None)[0].S is SequenceAlgorithm.halo


@pytest.mark.parametrize(("changes", "only"), [(dict(sp=6), "halo"), (dict(window=131073), "ulysses")])
def test_a_window_takes_what_is_possible(changes, only):
    algorithms, reasons = chosen("S", **changes)
    assert algorithms.S.name == only and "only one that these sizes allow" in reasons["S"]


def test_what_the_recipe_names_stays():
    named = SequenceAlgorithms(S=SequenceAlgorithm.ulysses, L=SequenceAlgorithm.zeco)
    algorithms, reasons = chosen("SL", named)
    assert (algorithms.S, algorithms.L, reasons) == (named.S, named.L, {})


@pytest.mark.parametrize(("zeco_ms", "name"), [(0.5, "zeco"), (0.95, "lasp2"), (2.0, "lasp2")])
def test_states_take_what_arrives_clearly_sooner(monkeypatch, zeco_ms, name):
    times = {choosing.EXCHANGES["lasp2"]: 1.0, choosing.EXCHANGES["zeco"]: zeco_ms}
    monkeypatch.setattr(choosing, "exchange_ms", lambda exchange, shape, *where: times[exchange])
    algorithms, reasons = chosen("L")
    assert algorithms.L.name == name
    assert reasons["L"] == f"{name} (a state to 4 ranks: lasp2 1.000 ms, zeco {zeco_ms:.3f} ms)"


def timed(rank: int) -> tuple[float, ...]:
    shape, group = (4, 128, 128), dist.group.WORLD
    sizes = {**SIZES, "group": group}
    algorithms, reasons = choose(AUTO, {"S", "L"}, **sizes)
    times = [exchange_ms(exchange, shape, group, CPU) for exchange in choosing.EXCHANGES.values()]
    return algorithms, reasons, times


def test_all_ranks_time_their_links_and_agree(run_ranks):
    first, *others = run_ranks(3)(timed)
    assert all(other == first for other in others)
    algorithms, reasons, times = first
    assert algorithms.L in (SequenceAlgorithm.lasp2, SequenceAlgorithm.zeco) and all(ms > 0 for ms in times)
    assert "a state to 3 ranks: lasp2 " in reasons["L"]

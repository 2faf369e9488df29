"""The table mixer x algorithm: every pair is built or refused with the reason; and the documents of a shard."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import ops
from parallel.layout import SequenceAlgorithm, SequenceAlgorithms
from parallel.sequence.shard import Row, shard_documents, shard_row
from parallel.sequence.table import TABLE, mixing, pair_problem
from sequence_case import layouts

SIZES = dict(sp=6, num_kv_heads=4, window=5, seq_len=12)
LEGAL = {"F": {"ulysses"}, "S": {"ulysses", "halo"}, "L": {"ulysses", "lasp2", "zeco"}}


class OneRank:
    """A group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_every_mixer_of_the_recipe_has_a_row_with_every_algorithm():
    assert set(TABLE) == {field.name for field in fields(SequenceAlgorithms)} == set(LEGAL)
    assert all(set(row) == set(SequenceAlgorithm) - {SequenceAlgorithm.auto} for row in TABLE.values())


@pytest.mark.parametrize("algorithm", [item for item in SequenceAlgorithm if item is not SequenceAlgorithm.auto])
@pytest.mark.parametrize("symbol", TABLE)
def test_pairs_are_built_or_refused_with_the_reason(symbol, algorithm):
    sizes = dict(num_heads=8, num_kv_heads=4, window=5 if symbol == "S" else None, group=OneRank())
    problem = pair_problem(symbol, algorithm, **{**SIZES, "sp": 4})
    if algorithm.name in LEGAL[symbol]:
        assert problem is None and callable(mixing(symbol, algorithm, **sizes))
        return
    assert problem.startswith(f"layout.sp_algorithm.{symbol}={algorithm.name}: ") and "; choose " in problem
    with pytest.raises(ValueError, match=f"sp_algorithm.{symbol}={algorithm.name}: .*; choose"):
        mixing(symbol, algorithm, **sizes)


@pytest.mark.parametrize("algorithm", sorted(LEGAL["L"]))
def test_linear_attention_gives_the_state_that_decoding_starts_from(algorithm):
    sizes = dict(num_heads=4, num_kv_heads=2, group=OneRank())
    q, k, v, log_decay = (torch.randn(1, 9, heads, 3) for heads in (4, 2, 2, 2))
    inputs, cu_seqlens = (q, k, v, -log_decay.abs()), torch.tensor([0, 9], dtype=torch.int32)
    mix = mixing("L", SequenceAlgorithm[algorithm], **sizes)
    o, state = mix(*inputs, cu_seqlens=cu_seqlens, return_state=True)
    expected = ops.gla(*inputs, output_final_state=True)
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])
    assert torch.equal(o, mix(*inputs, cu_seqlens=cu_seqlens))


def test_what_numbers_refuse():
    assert "multiple of 4" in pair_problem("L", SequenceAlgorithm.ulysses, **SIZES)
    assert pair_problem("L", SequenceAlgorithm.lasp2, **SIZES) is None
    assert pair_problem("S", SequenceAlgorithm.halo, **SIZES) is None
    assert "window of 13 tokens" in pair_problem("S", SequenceAlgorithm.halo, **{**SIZES, "window": 13})
    assert pair_problem("S", SequenceAlgorithm.halo, **{**SIZES, "window": 13, "sp": 1}) is None


def test_a_row_that_cannot_be_cut_is_refused():
    row = Row(torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.int64), torch.tensor([0, 10]).int())
    assert len(shard_row(row, rank=1, size=5)[0]) == 2
    for size in (3, 20):
        with pytest.raises(ValueError, match=f"layout.sp={size} does not divide a row of 10 tokens; choose an sp that"):
            shard_row(row, rank=0, size=size)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_documents_of_a_shard(num_ranks):
    """Document 0 enters and the last one leaves, both maybe empty; tokens of one document stay together."""
    for edges in layouts(num_ranks, shard_tokens=6, num_random=30):
        num_tokens, owner = edges[-1], []
        for index, (start, end) in enumerate(zip(edges, edges[1:])):
            owner += [index] * (end - start)
        for rank in range(num_ranks):
            first = rank * 6
            own = shard_documents(torch.tensor(edges, dtype=torch.int32), rank=rank, size=num_ranks).tolist()
            starts = [t - first for t in range(max(first, 1), first + 6) if owner[t] != owner[t - 1]]
            leaves = first + 6 < num_tokens and owner[first + 6] != owner[first + 5]
            assert own == [0, *starts, *([6] if leaves else []), 6], (edges, rank)

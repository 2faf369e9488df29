"""Layout: how many ranks each kind of parallelism gets. Plain values, so that recipes load without torch.

Megatron calls the group over the context "context parallel"; here it is `sp`, sequence parallelism.
`dp` is never written down: it is what remains of the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Tuple


class SequenceAlgorithm(Enum):
    """How a mixer reaches over the shards of a row: see parallel/sequence/table.py."""

    auto = "auto"
    ulysses = "ulysses"
    lasp2 = "lasp2"
    zeco = "zeco"
    halo = "halo"


@dataclass(frozen=True)
class SequenceAlgorithms:
    """How each kind of mixer reaches over the shards of a row where layout.sp > 1.

    auto takes what costs least on these ranks and says so at the start of a stage.
    F: full attention; ulysses alone, which exchanges heads.
    S: sliding window; ulysses, or halo, which fetches the keys that a window sees of the shards before.
    L: gated linear attention; ulysses, lasp2, which gathers the shards' states, or zeco, which hands them on.
    """

    F: SequenceAlgorithm = SequenceAlgorithm.auto
    S: SequenceAlgorithm = SequenceAlgorithm.auto
    L: SequenceAlgorithm = SequenceAlgorithm.auto


@dataclass(frozen=True)
class Layout:
    """Ranks per kind of parallelism. Numbers count ranks where they do not say otherwise.

    tp: tensor parallel, splits heads and FFN columns; divides num_kv_heads, ffn_size and the padded vocabulary.
    pp: pipeline stages, splits layers (uneven splits are allowed).
    vpp: chunks of layers that each pipeline stage holds and works on in turn; more of them shorten the idle ends of a
        step and send more often. Needs pp of 2 or more, and rows a step and data-parallel rank in multiples of pp.
    pp_layers: layers of each pipeline stage, first to last, for instance [8,8,8,4]; with vpp those of each chunk in the
        order of the layers, which is chunk 0 of every stage, then chunk 1 of every stage. Empty balances by cost.
    ep: expert parallel, splits the experts of MoE layers over ranks of tp, sp and dp.
    sp: sequence parallel, splits the tokens of a row in contiguous shards.
    tp_sequence_parallel: Megatron's trick of sharding norms and residuals over the tp group.
    sp_algorithm: how each kind of mixer reaches over the shards of sp.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    pp_layers: Tuple[int, ...] = ()
    ep: int = 1
    sp: int = 1
    tp_sequence_parallel: bool = False
    sp_algorithm: SequenceAlgorithms = SequenceAlgorithms()

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model and one row: tp · pp · sp."""
        return self.tp * self.pp * self.sp

    def dp(self, world_size: int) -> int:
        """Data-parallel ranks of a world. Raises ValueError when the layout does not divide it."""
        if world_size % self.model_ranks:
            raise ValueError(
                f"layout: tp {self.tp} x pp {self.pp} x sp {self.sp} = {self.model_ranks} ranks do not divide the "
                f"world of {world_size}; the smallest world that fits is {self.model_ranks}"
            )
        return world_size // self.model_ranks

"""Layouts of sequence parallelism as a benchmark's key writes them: N, or N:ALGORITHM for the linear attention."""

from __future__ import annotations

import torch.distributed as dist

from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from parallel.sequence.table import candidates


def sequence_layout_of(text: str) -> Layout:
    """`4`, or `4:zeco`: then sliding windows go by ulysses beside ulysses, else by halo. Raises ValueError."""
    number, _, name = text.partition(":")
    names = [algorithm.name for algorithm in candidates("L")]
    if not number.isdigit() or int(number) < 1 or (":" in text and name not in names):
        raise ValueError(f"sp={text} is not a layout; write for example sp=1,4 or sp=4:{',4:'.join(names)}")
    if not name:
        return Layout(sp=int(number))
    linear = SequenceAlgorithm[name]
    sliding = linear if linear is SequenceAlgorithm.ulysses else SequenceAlgorithm.halo
    return Layout(sp=int(number), sp_algorithm=SequenceAlgorithms(S=sliding, L=linear))


def check_world(layouts: dict[str, Layout], peers: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a layout that this world cannot hold, or a peer that cannot run on it."""
    world_size = dist.get_world_size()
    for layout in layouts.values():
        if world_size % layout.sp:
            raise ValueError(f"sp={layout.sp} does not divide the {world_size} ranks of torchrun --nproc_per_node")
    if world_size > 1 and "hand" in peers:
        raise ValueError("peers=hand runs on one rank; write peers=engine under torchrun")

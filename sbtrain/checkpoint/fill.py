"""Fill: what a rank holds of an engine, straight from the files of a checkpoint, whatever layout wrote them.

A rank reads what overlaps its own pieces and nothing else, one stored box at a time, and needs memory for the largest
of these beside the engine. The rest of its weights it gets from the ranks that share them (Engine.adopt).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.pieces import Piece
from parallel.safe_load import SafeReader


def fill(folder: Path, pieces: list[Piece]) -> None:
    """Read the pieces of this rank. Raises ValueError where the checkpoint has not all of them, in few words.

    Where it cannot be read, raises what reading its files raises; some pieces may have been read by then.
    """
    reader = SafeReader(folder)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, is_coordinator=False)
    targets, items = _Targets(), []
    with torch.no_grad(), _whole_ones(pieces) as places:
        for piece, place in zip(pieces, places, strict=True):
            items += _items(piece, index.state_dict_metadata.get(piece.name))
            targets.add(piece, place)
        reader.read_data(LoadPlan(items), targets).wait()


class _Targets:
    """What torch's reader asks of a planner."""

    def __init__(self):
        self._boxes: dict[MetadataIndex, Tensor] = {}

    def add(self, piece: Piece, place: Tensor) -> None:
        for box in piece.boxes:
            where = MetadataIndex(piece.name, torch.Size(box.offsets))
            assert where not in self._boxes, f"{piece.name} is twice on this rank"
            self._boxes[where] = place[box.start :][: math.prod(box.sizes)].view(box.sizes)

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        target = self._boxes[item.dest_index]
        for dim, (first, size) in enumerate(zip(item.dest_offsets, item.lengths)):
            target = target.narrow(dim, first, size)
        return target

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """It has been copied into its place already."""


@contextmanager
def _whole_ones(pieces: list[Piece]) -> Iterator[list[Tensor]]:
    """Where to read each piece to: its place, or memory of its own for those that have to be put there."""
    places = [piece.read() if piece.write is None else torch.empty_like(piece.read()) for piece in pieces]
    yield places
    for piece, place in zip(pieces, places):
        if piece.write is not None:
            piece.write(place)


def _items(piece: Piece, entry) -> list[ReadItem]:
    """What to read of a tensor. entry: what the index says of it."""
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"it has no tensor {piece.name}")
    if tuple(entry.size) != piece.shape:
        raise ValueError(f"{piece.name} has the shape {tuple(entry.size)} there and {piece.shape} in this model")
    boxes = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in piece.boxes]
    items = create_read_items_for_chunk_list(piece.name, entry, boxes)
    if sum(math.prod(item.lengths) for item in items) != sum(math.prod(box.sizes) for box in piece.boxes):
        raise ValueError(f"it has not all of {piece.name}")
    return items

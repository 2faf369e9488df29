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
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.pieces import Piece
from parallel.safe_load import SafeReader, narrow


def fill(folder: Path, pieces: list[Piece]) -> None:
    """Read the pieces of this rank. Raises ValueError where the checkpoint has not all of them, in few words.

    Where it cannot be read, raises what reading its files raises; some pieces may have been read by then.
    """
    reader = SafeReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    targets: dict[MetadataIndex, Tensor] = {}
    items: list[ReadItem] = []
    with torch.no_grad(), _whole_ones(pieces) as places:
        for piece, place in zip(pieces, places, strict=True):
            items += _items(piece, entries.get(piece.name))
            for box in piece.boxes:
                where = MetadataIndex(piece.name, torch.Size(box.offsets))
                assert where not in targets, f"{piece.name} is twice on this rank"
                targets[where] = place[box.start :][: math.prod(box.sizes)].view(box.sizes)

        def put(item: ReadItem, part: Tensor) -> None:
            narrow(targets[item.dest_index], item.dest_offsets, item.lengths).copy_(part)

        reader.read_parts(items, put)


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

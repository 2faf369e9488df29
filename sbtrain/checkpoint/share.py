"""Share: how what one rank saves of an engine lies in files, and in a slot of shared memory, and the index of all."""

from __future__ import annotations

import io
from bisect import bisect_right
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallel import mcore
from parallel.engine import Engine, Weights
from parallel.pieces import Box, Piece
from parallel.place import primitive
from sbtrain.checkpoint.memory import copy_into, place
from sbtrain.checkpoint.tensor_files import Item

_NUM_FILES = 2
"""Of a rank, as megatron writes them."""


@dataclass(frozen=True)
class Share:
    """Good for one engine, or for weights alone. starts, sizes: of the pieces in a slot, bytes. files: name -> boxes.

    On rank 0, of all ranks: total_bytes on the disk, and the index (metadata).
    """

    engine: Engine | Weights
    pieces: list[Piece]
    starts: list[int]
    sizes: list[int]
    slot_bytes: int
    files: dict[str, list[Item]]
    total_bytes: int
    metadata: Metadata | None

    @classmethod
    def of(cls, engine: Engine | Weights) -> Share:
        """What this rank saves of the engine. Collective."""
        pieces, names = engine.own_state()
        tensors = [piece.read() for piece in pieces]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts, slot_bytes = place(sizes)
        items = [
            Item(_item(piece, box, tensor), tensor.dtype, start + box.start * tensor.element_size())
            for piece, tensor, start in zip(pieces, tensors, starts)
            for box in piece.boxes
            if piece.is_saved
        ]
        items += [_object(name) for name in names]
        saved_bytes = place([size for piece, size in zip(pieces, sizes) if piece.is_saved])[1]
        metadata, total_bytes = _index([each.item for each in items], saved_bytes)
        return cls(engine, pieces, starts, sizes, slot_bytes, _split(items), total_bytes, metadata)

    def read(self, item: Item) -> Tensor:
        """A box of what is saved, as it is now, in memory of its own on the CPU."""
        number = bisect_right(self.starts, item.start) - 1
        whole, sizes = self.pieces[number].read(), item.item.tensor_data.chunk.sizes
        first = (item.start - self.starts[number]) // whole.element_size()
        return whole[first:][: sizes.numel()].view(sizes).to("cpu", copy=True)

    def copy(self, memory: Tensor, slot: int) -> int:
        """Copy the pieces to a slot of the memory, uint8 [bytes]; bytes."""
        first = slot * self.slot_bytes
        return copy_into(memory, (piece.read() for piece in self.pieces), [first + start for start in self.starts])

    def put_back(self, memory: Tensor, slot: int, common: dict) -> None:
        """Make the engine what it was when it was copied to that slot. common: its common_state() then. Collective."""
        first = slot * self.slot_bytes
        raw = (memory[first + start :][:size] for start, size in zip(self.starts, self.sizes))
        tensors = (part.view(piece.read().dtype) for piece, part in zip(self.pieces, raw))
        self.engine.put_back(self.pieces, tensors, common)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the slot may be overwritten now


def _item(piece: Piece, box: Box, tensor: torch.Tensor) -> WriteItem:
    """A box in torch's words."""
    offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
    return WriteItem(
        index=MetadataIndex(piece.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(piece.shape),
        ),
    )


def _object(name: str) -> Item:
    """An object that is None, as megatron writes it."""
    content = bytes_of([None])
    size = BytesIOWriteData(len(content))
    return Item(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=size), content=content)


def _index(items: list[WriteItem], num_bytes: int) -> tuple[Metadata | None, int]:
    """On rank 0: the index of all ranks' boxes, which must fill every tensor once, and the bytes of all. Collective."""
    gathered = [None] * dist.get_world_size()
    with primitive("index of a checkpoint"):
        dist.gather_object((items, num_bytes), gathered if dist.get_rank() == 0 else None)
    if dist.get_rank():
        return None, 0
    plans = [SavePlan(theirs) for theirs, _ in gathered]
    return DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)[1], sum(
        theirs for _, theirs in gathered
    )


def _split(items: list[Item]) -> dict[str, list[Item]]:
    """The boxes by file, about as many bytes in each."""
    by_index = {each.item.index: each for each in items}
    buckets = mcore.split_by_size_and_type(_NUM_FILES, [each.item for each in items])
    filled = [[by_index[item.index] for item in bucket] for bucket in buckets if bucket]
    return {f"__{dist.get_rank()}_{number}.distcp": bucket for number, bucket in enumerate(filled)}


def bytes_of(value) -> bytes:
    """What torch saves of a value."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()

"""Pieces: what this rank alone holds of a training state, as flat tensors and the boxes of global tensors in them.

ZeRO cuts a buffer of all parameters into equal shares, wherever that falls. What a share holds of one parameter is a
run of its elements in memory order, and a run is at most 2n - 1 boxes of an n-dimensional tensor. So every rank can
write its own share, of the weights too, under the names and in the coordinates that no layout changes, and nothing has
to be sent to another rank first. What a rank has a replica of, which another one writes, is among its pieces too, so
that it can be put back without that rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallel import mcore
from parallel.optimizer import allocate_state, parts_of

STATE = ("param", "exp_avg", "exp_avg_sq")
"""The master weight and Adam's moments."""


@dataclass(frozen=True)
class Box:
    """Elements start, start + 1, ... of a piece are this box of the global tensor, in its memory order."""

    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """name, shape: of the global tensor. read(): this rank's part as it is now, 1-D and contiguous, not a copy.

    is_saved: whether this rank writes it, and not another one that has the same. write(x): put back what read() gave
    once, 1-D; None where that is read().copy_(x).
    """

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    read: Callable[[], Tensor]
    is_saved: bool = True
    write: Callable[[Tensor], None] | None = None


@torch.no_grad()
def put_back(pieces: list[Piece], tensors: Iterable[Tensor]) -> None:
    """Make the pieces what these tensors say, 1-D and of the pieces' dtypes, which may be on the host."""
    for piece, tensor in zip(pieces, tensors, strict=True):
        if piece.write is not None:
            piece.write(tensor)
        else:
            piece.read().copy_(tensor, non_blocking=True)


def pieces_of(weights: dict, optimizer, models: list) -> list[Piece]:
    """This rank's part of the weights and of the optimizer's state; what the ranks save of it is everything, once.

    weights: the models' sharded state dict. optimizer: None for weights alone. The list is good for as long as models
    and optimizer live: read() looks up what may have been put in place of a tensor.
    """
    if optimizer is not None:
        allocate_state(optimizer)
    shares, known = _shares([] if optimizer is None else parts_of(optimizer))
    modules = [module for model in models for module in model.modules()]
    buffers = {buffer: (module, name) for module in modules for name, buffer in _own(module)}
    found = []
    for sharded in mcore.nested_values(mcore.extract_sharded_tensors_and_factories(weights)[0]):
        tensor = sharded.data
        if tensor in known:
            part, start, end = shares.get(tensor, (None, 0, 0))
            if start < end:
                main = not any(sharded.replica_id[:-1])  # the last number counts the ranks that share
                found += _of_parameter(sharded, part, start, end, main)
        else:
            found += _whole(sharded, buffers.get(tensor), mcore.is_main_replica(sharded.replica_id))
    return found


def objects_of(weights: dict) -> list[str]:
    """Names of the objects beside the tensors that this rank writes. megatron's layers have one each, which is None."""
    found = []
    for sharded in mcore.nested_values(weights):
        if isinstance(sharded, mcore.ShardedObject) and mcore.is_main_replica(sharded.replica_id):
            if sharded.data is not None:
                raise RuntimeError(f"{sharded.key} holds {type(sharded.data).__name__}; only tensors are saved")
            found.append(sharded.unique_key)
    return found


def boxes_of(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Elements start to end of a tensor of that shape, in memory order, as boxes; Box.start counts from `start`."""
    for first, offsets, sizes in _boxes(shape, start, end):
        yield Box(first - start, offsets, sizes)


def _boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple]:
    if start >= end:
        return
    if len(shape) <= 1:
        yield (start, (start,), (end - start,)) if shape else (0, (), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # inside of one row
        yield from _inside(shape, last, start, end)
        return
    yield from _inside(shape, first - 1, start, first * row)
    if first < last:
        yield first * row, (first, *[0] * len(shape[1:])), (last - first, *shape[1:])
    yield from _inside(shape, last, last * row, end)


def _inside(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[tuple]:
    row = math.prod(shape[1:])
    for first, offsets, sizes in _boxes(shape[1:], start - index * row, end - index * row):
        yield first + index * row, (index, *offsets), (1, *sizes)


def _shares(parts: list) -> tuple[dict, set]:
    """Parameter -> (megatron's optimizer, first and last element of this rank's share), and all its parameters."""
    shares, known = {}, set()
    for part in parts:
        for buffer in part.buffers:
            known.update(buffer.param_index_map)
        for ranges in part.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, place in bucket["param_map"].items():
                        shares[parameter] = (part, place["param"].start, place["param"].end)
    return shares, known


def _own(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in module._buffers.items() if buffer is not None)


def _of_parameter(sharded, part, start: int, end: int, main: bool) -> Iterator[Piece]:
    """The weight and its optimizer state in one share."""
    parameter = sharded.data
    if not parameter.is_contiguous():
        raise RuntimeError(f"{sharded.key} is not contiguous in memory, so its share is no run of its elements")

    def weight() -> Tensor:
        return parameter.data.view(-1)[start:end]

    for tensor, first, last in _tensors(sharded):
        low, high = max(first, start), min(last, end)
        if low >= high:
            continue
        here = _placed(tensor, boxes_of(tuple(tensor.local_shape), low - first, high - first))
        cut = slice(low - start, high - start)
        yield Piece(tensor.key, tuple(tensor.global_shape), here, lambda cut=cut: weight()[cut], main)
        for key in STATE:

            def read(key=key, cut=cut) -> Tensor:
                return part._get_main_param_and_optimizer_states(parameter)[key].detach().view(-1)[cut]

            yield Piece(f"optimizer.state.{key}.{tensor.key}", tuple(tensor.global_shape), here, read, main)


def _whole(sharded, place: tuple[torch.nn.Module, str] | None, main: bool) -> Iterator[Piece]:
    """A tensor without optimizer state, of which one rank writes all. place: where it is, if it is a buffer."""

    def tensor() -> Tensor:
        return (sharded.data if place is None else place[0]._buffers[place[1]]).detach()

    def read(cut: slice) -> Tensor:
        return tensor().contiguous().view(-1)[cut]

    def write(cut: slice, source: Tensor) -> None:
        now = tensor()
        flat = now.flatten()  # a copy, unless it is contiguous
        flat[cut] = source.to(flat.device)
        now.copy_(flat.view(now.shape))

    for part, first, last in _tensors(sharded):
        here = _placed(part, boxes_of(tuple(part.local_shape), 0, last - first))
        if here:
            calls = partial(read, slice(first, last)), partial(write, slice(first, last))
            yield Piece(part.key, tuple(part.global_shape), here, calls[0], main, calls[1])


def _tensors(sharded) -> Iterator[tuple]:
    """The global tensors that a parameter is part of, and its first and last element that each of them holds.

    Usually one; megatron saves the two halves of a gated projection apart, so that any tp can find its own.
    """
    if isinstance(sharded, mcore.ShardedTensor):
        yield sharded, 0, sharded.data.numel()
        return
    blank = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    for tensor in mcore.nested_values(sharded.build_fn(sharded.key, blank, sharded.replica_id, None)):
        if tensor.data._base is not blank or not tensor.data.is_contiguous():
            raise RuntimeError(f"{tensor.key} is no run of the elements of {sharded.key}")
        first = tensor.data.storage_offset()
        yield tensor, first, first + tensor.data.numel()


def _placed(tensor, boxes: Iterator[Box]) -> tuple[Box, ...]:
    """Boxes of the local tensor in the coordinates of the global one."""
    ahead, offsets = tensor.prepend_axis_num, tensor.global_offset
    return tuple(
        Box(
            box.start,
            (*offsets[:ahead], *(there + here for there, here in zip(offsets[ahead:], box.offsets))),
            (*[1] * ahead, *box.sizes),
        )
        for box in boxes
    )

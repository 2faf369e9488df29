"""How one parameter of ours and the tensors of a Hugging Face checkpoint become each other.

A mapping shows its parameter as views that have the layout of the source tensors. Copying a source into its view is
the import, reading the view is the export, so the two directions cannot disagree. Tensor-parallel shards are cut along
the first dimension of each view (or the given one), which is why the same views work on a shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Size, Tensor


class Fill(Enum):
    """What a parameter is made of when no checkpoint has it."""

    matrix = "matrix"
    norm = "norm"
    bias = "bias"


class Reader(Protocol):
    """What imports need of a checkpoint; HFCheckpoint is one."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> Tensor: ...

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """A tensor of the Hugging Face checkpoint and its shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Mapping(ABC):
    """One parameter. name: ours, global. shape: unsharded. new: the source checkpoint does not have it.

    tp_dim: the dimension of the parameter that tensor parallelism cuts, None if it is replicated.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    tp_dim: int | None = None
    fill: Fill = Fill.matrix
    new: bool = False

    @property
    def unit(self) -> int:
        """Shards are multiples of this many entries along tp_dim."""
        return 1

    @abstractmethod
    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parameter (or a tensor-parallel shard of it) as one view per source, in the sources' order."""

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of one rank's shard. Raises ValueError when tp does not divide it."""
        if self.tp_dim is None:
            return self.shape
        size, rest = divmod(self.shape[self.tp_dim], tp)
        if rest or size % self.unit:
            raise ValueError(f"layout.tp {tp} does not divide {self.name}, shape {list(self.shape)}; choose a divisor")
        return self.shape[: self.tp_dim] + (size,) + self.shape[self.tp_dim + 1 :]

    def copy_into(self, local: Tensor, reader: Reader, *, tp_rank: int, tp: int) -> None:
        """Read this rank's part of every source into local, one source at a time.

        Raises ValueError naming a source whose shape is not the model's.
        """
        for source, view in zip(self.sources, self.views(local)):
            _check(source, reader)
            view.copy_(self._read(reader, source, view.shape, tp_rank=tp_rank, tp=tp))

    def check(self, reader: Reader) -> None:
        """Raise ValueError naming a source whose shape is not the model's."""
        for source in self.sources:
            _check(source, reader)

    def shard_into(self, local: Tensor, whole: Tensor, *, tp_rank: int, tp: int) -> None:
        """Copy this rank's part of the unsharded parameter into local."""
        for view, full in zip(self.views(local), self.views(whole)):
            view.copy_(full if self.tp_dim is None else _part(full, self.tp_dim, view.shape[self.tp_dim], tp_rank))

    def export(self, tensor: Tensor) -> dict[str, Tensor]:
        """The unsharded parameter as source tensors. Raises ValueError when it has another shape."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {list(tensor.shape)}, the recipe's model has {list(self.shape)}")
        return {source.name: view.reshape(source.shape) for source, view in zip(self.sources, self.views(tensor))}

    def _read(self, reader: Reader, source: Source, view_shape: Size, *, tp_rank: int, tp: int) -> Tensor:
        if self.tp_dim is None or tp == 1:
            return reader.get(source.name).view(view_shape)
        size = source.shape[self.tp_dim] // tp
        part = reader.get_slice(source.name, self.tp_dim, tp_rank * size, (tp_rank + 1) * size)
        return part if part.shape == view_shape else part.reshape(view_shape)


def _check(source: Source, reader: Reader) -> None:
    shape = tuple(reader.shape(source.name))
    if shape != source.shape:
        raise ValueError(
            f"tensor {source.name} has shape {list(shape)} in the checkpoint, the model in the recipe needs "
            f"{list(source.shape)}; make model.* agree with start.path/config.json"
        )


def _part(full: Tensor, dim: int, size: int, rank: int) -> Tensor:
    return full.narrow(dim, rank * size, size)


@dataclass(frozen=True)
class Direct(Mapping):
    """The parameter is the source."""

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One view: the tensor itself."""
        return (tensor,)


@dataclass(frozen=True)
class QKV(Mapping):
    """Query, key and value rows of each kv head together: G query heads, then the key, then the value."""

    group: int = 1
    head_dim: int = 1

    @property
    def unit(self) -> int:
        """The rows of one kv head."""
        return (self.group + 2) * self.head_dim

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """q [Hkv, G, hd, ...], k and v [Hkv, hd, ...]."""
        heads = tensor.view(-1, self.group + 2, self.head_dim, *tensor.shape[1:])
        return heads[:, : self.group], heads[:, self.group], heads[:, self.group + 1]


@dataclass(frozen=True)
class GateUp(Mapping):
    """Gate rows, then up rows; a shard holds its part of each."""

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """gate [F, D], up [F, D]."""
        return tensor.chunk(2)


@dataclass(frozen=True)
class Vocab(Mapping):
    """Rows of the vocabulary, and zeros from the source's last row up to the padded size."""

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows that the source has; only meant for the whole tensor, shards end at different rows."""
        return (tensor[: self.sources[0].shape[0]],)

    def copy_into(self, local: Tensor, reader: Reader, *, tp_rank: int, tp: int) -> None:
        """See Mapping; rows beyond the source become zero."""
        source = self.sources[0]
        _check(source, reader)
        start, stop = self._rows(local, tp_rank)
        if stop > start:
            local[: stop - start].copy_(reader.get_slice(source.name, 0, start, stop))
        local[stop - start :].zero_()

    def shard_into(self, local: Tensor, whole: Tensor, *, tp_rank: int, tp: int) -> None:
        """See Mapping; rows beyond the source become zero."""
        start, stop = self._rows(local, tp_rank)
        local[: stop - start].copy_(whole[start:stop])
        local[stop - start :].zero_()

    def _rows(self, local: Tensor, tp_rank: int) -> tuple[int, int]:
        start = tp_rank * local.shape[0]
        return start, max(start, min(start + local.shape[0], self.sources[0].shape[0]))

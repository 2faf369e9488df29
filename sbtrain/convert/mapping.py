"""How one parameter of ours and the tensors of a Hugging Face checkpoint become each other.

A mapping shows its parameter as views that have the layout of the source tensors. Copying a source into its view is
the import, reading the view is the export, so the two directions cannot disagree. Tensor-parallel shards are cut along
the first dimension of each view (or the given one), which is why the same views work on a shard. Experts are cut along
their own first dimension, by expert parallelism: see sbtrain.convert.upcycle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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
class Part:
    """Which part of a model's cut parameters one rank holds."""

    tp_rank: int = 0
    tp: int = 1
    ep_rank: int = 0
    ep: int = 1


WHOLE = Part()


@dataclass(frozen=True)
class Mapping(ABC):
    """One parameter. name: ours, global. shape: unsharded. new: the source checkpoint does not have it.

    cut_dim: the dimension of the parameter that tensor parallelism cuts, None if it is replicated.
    std: of a new matrix's normal values; None: xavier, as the released code starts its gates.
    buffer: no parameter but a buffer of the model, fp32 in every precision.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    cut_dim: int | None = None
    fill: Fill = Fill.matrix
    new: bool = False
    std: float | None = None
    buffer: bool = False

    @property
    def unit(self) -> int:
        """Shards are multiples of this many entries along cut_dim."""
        return 1

    @abstractmethod
    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parameter (or a shard of it) as one view per source, in the sources' order."""

    def cut(self, part: Part) -> tuple[int, int, str]:
        """This rank's place among the ranks that cut the parameter, their number, and the layout's key for it."""
        return part.tp_rank, part.tp, "tp"

    def local_shape(self, part: Part = WHOLE) -> tuple[int, ...]:
        """Shape of one rank's shard. Raises ValueError when the layout does not divide it."""
        if self.cut_dim is None:
            return self.shape
        _, ranks, axis = self.cut(part)
        size, rest = divmod(self.shape[self.cut_dim], ranks)
        if rest or size % self.unit:
            raise ValueError(
                f"layout.{axis} {ranks} does not divide {self.name}, shape {list(self.shape)}; choose a divisor"
            )
        return self.shape[: self.cut_dim] + (size,) + self.shape[self.cut_dim + 1 :]

    def copy_into(self, local: Tensor, reader: Reader, part: Part = WHOLE) -> None:
        """Read this rank's part of every source into local, one source at a time.

        Raises ValueError naming a source whose shape is not the model's.
        """
        for source, view in zip(self.sources, self.views(local)):
            check_shape(source, reader)
            view.copy_(self._read(reader, source, view.shape, part))

    def check(self, reader: Reader) -> None:
        """Raise ValueError naming a source whose shape is not the model's."""
        for source in self.sources:
            check_shape(source, reader)

    def draw_into(self, local: Tensor, draw: Callable[[str, tuple[int, ...]], Tensor], part: Part = WHOLE) -> None:
        """Copy this rank's part of drawn values into local. draw(name, shape): the same tensor on every rank."""
        self.shard_into(local, draw(self.name, self.shape), part)

    def shard_into(self, local: Tensor, whole: Tensor, part: Part = WHOLE) -> None:
        """Copy this rank's part of the unsharded parameter into local."""
        rank = self.cut(part)[0]
        for view, full in zip(self.views(local), self.views(whole)):
            if self.cut_dim is not None:
                full = full.narrow(self.cut_dim, rank * view.shape[self.cut_dim], view.shape[self.cut_dim])
            view.copy_(full)

    def export(self, tensor: Tensor) -> dict[str, Tensor]:
        """The unsharded parameter as source tensors. Raises ValueError when it has another shape."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {list(tensor.shape)}, the recipe's model has {list(self.shape)}")
        return {source.name: view.reshape(source.shape) for source, view in zip(self.sources, self.views(tensor))}

    def _read(self, reader: Reader, source: Source, view_shape: Size, part: Part) -> Tensor:
        rank, ranks, _ = self.cut(part)
        if self.cut_dim is None or ranks == 1:
            return reader.get(source.name).view(view_shape)
        size = source.shape[self.cut_dim] // ranks
        piece = reader.get_slice(source.name, self.cut_dim, rank * size, (rank + 1) * size)
        return piece if piece.shape == view_shape else piece.reshape(view_shape)


def check_shape(source: Source, reader: Reader) -> None:
    """Raise ValueError, one line, unless the checkpoint's tensor has the shape that the model needs."""
    shape = tuple(reader.shape(source.name))
    if shape != source.shape:
        raise ValueError(
            f"tensor {source.name} has shape {list(shape)} in the checkpoint, the model in the recipe needs "
            f"{list(source.shape)}; make model.* agree with start.path/config.json"
        )


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

    @property
    def unit(self) -> int:
        """One row of each half."""
        return 2

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """gate [F, D], up [F, D]."""
        return tensor.chunk(2)


@dataclass(frozen=True)
class Vocab(Mapping):
    """Rows of the vocabulary, and zeros from the source's last row up to the padded size."""

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows that the source has; only meant for the whole tensor, shards end at different rows."""
        return (tensor[: self.sources[0].shape[0]],)

    def copy_into(self, local: Tensor, reader: Reader, part: Part = WHOLE) -> None:
        """See Mapping; rows beyond the source become zero."""
        source = self.sources[0]
        check_shape(source, reader)
        start, stop = self._rows(local, part)
        if stop > start:
            local[: stop - start].copy_(reader.get_slice(source.name, 0, start, stop))
        local[stop - start :].zero_()

    def draw_into(self, local: Tensor, draw: Callable[[str, tuple[int, ...]], Tensor], part: Part = WHOLE) -> None:
        """See Mapping; what is drawn does not depend on the padding."""
        self.shard_into(local, draw(self.name, self.sources[0].shape), part)

    def shard_into(self, local: Tensor, whole: Tensor, part: Part = WHOLE) -> None:
        """See Mapping; rows beyond the source become zero."""
        start, stop = self._rows(local, part)
        local[: stop - start].copy_(whole[start:stop])
        local[stop - start :].zero_()

    def _rows(self, local: Tensor, part: Part) -> tuple[int, int]:
        start = part.tp_rank * local.shape[0]
        return start, max(start, min(start + local.shape[0], self.sources[0].shape[0]))

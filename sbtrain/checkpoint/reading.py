"""Reading a checkpoint: what its folder says of itself, and how failures are told in one line that names the folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from sbtrain.checkpoint.files import read_json
from sbtrain.checkpoint.manifest import FILES, says_nothing, unreadable
from sbtrain.checkpoint.state import RunState

FORMAT = 1
TENSOR_FORMAT = "torch_dist"
_OF_THE_GPU = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
"""A GPU's error, which torch 2.8 and later tell by its class: another checkpoint is no help, as where memory lacks."""
_NO_MEMORY = "can't allocate memory"
"""What a RuntimeError of torch says where the host has none left."""
_OF_ODD_BYTES = (None, errno.EINVAL)
"""Numbers of errors that come of bytes too: whoever follows them may seek before the beginning of a file."""


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint. Raises ValueError naming the folder if it is no checkpoint of ours."""
    path = folder / "state.json"
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} is not a complete checkpoint ({absent[0]} is missing); point ledger.json "
            "at an earlier checkpoints/step_N or remove it to start over"
        )
    content, tensors = _mapping(path), _mapping(folder / "metadata.json")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {content.get('format')!r} is not {FORMAT}; load it with the version "
            "of sbtrain that wrote it"
        )
    missing = [key for key in ("parts", *RunState.required()) if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}; point ledger.json at an earlier checkpoints/step_N")
    if tensors.get("sharded_backend") != TENSOR_FORMAT:
        raise ValueError(
            f"{folder / 'metadata.json'}: tensors are in the format {tensors.get('sharded_backend')!r}, not in "
            f"{TENSOR_FORMAT}; point ledger.json at a checkpoint that sbtrain wrote"
        )
    return content


def _mapping(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; point ledger.json at an earlier checkpoints/step_N")
    return content


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Context of the reading of a checkpoint: what is wrong with its files is told as a ValueError.

    Raises Unreadable where this host cannot read them. Errors of the memory or of the GPU pass.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # bytes that no checkpoint has can raise anything
        for rank, cause in causes_of(error).items():
            if isinstance(cause, _OF_THE_GPU) or lacks_memory(cause):
                raise cause from None
            if isinstance(cause, OSError) and cause.errno not in _OF_ODD_BYTES and says_nothing(cause):
                raise unreadable(folder, cause, folder, who="" if rank is None else f"rank {rank}") from error
        raise ValueError(
            f"{folder} cannot be read ({reason_of(error)}); point ledger.json at an earlier checkpoints/step_N "
            "or choose another run_dir"
        ) from error


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line. CheckpointException wraps what other processes raised."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {reason_of(failure)}" for rank, (failure, _) in error.failures.items())
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].split("; free some space")[0]


def lacks_memory(error: BaseException) -> bool:
    """Whether the host or the GPU had no memory left."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and _NO_MEMORY in str(error))


def causes_of(error: BaseException) -> dict[int | None, BaseException]:
    """The error, of this process (None), or by rank what a CheckpointException wraps of those that work together."""
    if isinstance(error, CheckpointException):
        return {rank: failure for rank, (failure, _) in error.failures.items()}
    return {None: error}

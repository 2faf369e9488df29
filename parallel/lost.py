"""Which errors of a collective mean that another rank is gone, and which are this rank's own.

An own error, such as memory that is short, would come back after every new start. The types tell little: torch raises
DistBackendError for whatever NCCL reports, and gloo's errors are plain RuntimeErrors. Source of the messages: torch's
NCCLUtils and ProcessGroupNCCL, gloo's transport/tcp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch.distributed as dist

_OWN = re.compile(r"CUDA (error|failure)|unhandled cuda error|out of memory|invalid (usage|argument)", re.I)
_TIME = re.compile(
    r"collective operation timeout|timing out|timed out|wait timeout|socket timeout|timeout caused", re.I
)
_CONNECTION = re.compile(
    r"connection (was |has been |likely |was likely )?(closed|reset|refused|aborted|lost)|connection timed out|"
    r"connection abort|broken pipe|no route to host|unreachable|"
    r"remote process exited|ncclRemoteError",
    re.I,
)
_EXPLAINED = re.compile(r"ncclSystemError:.*?(?=Last error:|$)", re.DOTALL)
"""What torch says about every failed system call, of whatever kind: that a peer may have closed a connection."""


def lost_a_peer(error: BaseException) -> bool:
    """Whether it, or what caused it, is a connection that another rank closed or a wait for one that took too long."""
    return any(
        isinstance(link, dist.DistNetworkError) or _matches(link, _CONNECTION) or _matches(link, _TIME)
        for link in _chain(error)
    )


def gave_up_waiting(error: BaseException) -> bool:
    """Of an error that is a lost peer's: whether a limit of torch's has passed, and no connection was lost."""
    links = list(_chain(error))
    return any(_matches(link, _TIME) for link in links) and not any(_matches(link, _CONNECTION) for link in links)


def _matches(error: BaseException, pattern: re.Pattern) -> bool:
    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo/transport" in text) or _OWN.search(text):
        return False
    return bool(pattern.search(_EXPLAINED.sub("", text)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

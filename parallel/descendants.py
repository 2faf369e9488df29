"""Ends the processes that this one has started, for a process that ends without the interpreter's own clearing away."""

from __future__ import annotations

import contextlib
import os
from multiprocessing import resource_tracker

import psutil


def end_descendants(limit_s: float = 2.0) -> None:
    """Terminate all processes below this one, kill what is left after half of limit_s, and wait for it the other half.

    Without that they would live on, a multiprocessing manager for ever, and hold the pipes that they inherited open.
    multiprocessing's resource tracker ignores signals to terminate: it ends, and clears away, when its pipe is closed.
    """
    pipe = getattr(getattr(resource_tracker, "_resource_tracker", None), "_fd", None)
    if pipe is not None:
        with contextlib.suppress(OSError):
            os.close(pipe)
    below = psutil.Process().children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(below, timeout=limit_s / 2)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=limit_s / 2)

"""Stacks: what every thread of this process is in, written where people look for it when a job has to end."""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path


def write_stacks(path: Path, line: str) -> None:
    """Write line, the time and the Python stack of every thread to path, whose folder is made. Any thread may call it.

    Innermost calls come first; a thread inside a collective or a kernel launch shows the Python call that it is in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)

"""What the starts of a run in a batch system came to, and whether another one makes sense. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from sbtrain.checkpoint.files import read_json
from sbtrain.checkpoint.ledger import Ledger

DONE, AGAIN, STOP = "done", "again", "stop"
SAVED, LOST = 75, 76
"""Exit codes of a run that wants another start."""
_NO_COMMAND = (126, 127)


def next_start(run_dir: str | Path, start: dict, *, code: int, told_to_stop: bool, idle_starts: int) -> tuple[str, str]:
    """DONE, AGAIN or STOP, and one line that says why; adds the start to slurm/starts.jsonl.

    What the run says in exit.json counts. Without that file it was ended from outside, before it could write: another
    start goes on from the newest checkpoint; so does one after an error of a start that was being ended.

    start: what is kept of it, any JSON values. code: that of srun. told_to_stop: a signal asked for the end.
    idle_starts: so many starts in a row that made no new checkpoint are the last; those that were told to stop, and did
    or had not begun, do not count, nor do those that found an earlier start of their job still alive.
    """
    folder = Path(run_dir)
    try:
        end = read_json(folder / "exit.json")
        found, reason = int(end["code"]), str(end["reason"])
    except OSError:
        found, reason = None, f"the ranks left no exit.json, srun ended with {code}; the log may say more"
    except (ValueError, KeyError, TypeError) as error:
        found, reason = None, f"exit.json cannot be read ({error})"
    idle = 0 if (code if found is None else found) == SAVED or (told_to_stop and found is None) else 1
    progress = _progress(folder)
    if idle:
        idle += _idle_before(folder, progress)
    verdict = _verdict(found, code, told_to_stop)
    why = f"code {found if found is not None else 'unknown'}: {reason}"
    if verdict == AGAIN and idle >= idle_starts:
        verdict, why = STOP, f"{why}; {idle} starts in a row made no new checkpoint, so this was the last"
    _keep(folder, {**start, "srun": code, "code": found, "reason": reason, "idle": idle, **progress, "next": verdict})
    return verdict, " ".join(why.split())


def _verdict(found: int | None, code: int, told_to_stop: bool) -> str:
    if told_to_stop and found != 0:  # what goes wrong while a job is being ended says nothing of the next start
        return AGAIN
    if found is None:  # an error of the recipe is found before there is a run directory to write to
        return STOP if code == 2 or code in _NO_COMMAND else AGAIN
    return {0: DONE, SAVED: AGAIN, LOST: AGAIN}.get(found, STOP)


def _progress(folder: Path) -> dict:
    """How far the run is on disk."""
    try:
        ledger = Ledger(folder)
        return {"step": ledger.step, "checkpoint": str(ledger.checkpoint)}
    except (OSError, ValueError):
        return {"step": 0, "checkpoint": "unknown"}


def _idle_before(folder: Path, progress: dict) -> int:
    """Starts in a row before this one that stood where it stands."""
    try:
        last = json.loads((folder / "slurm" / "starts.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        same = all(last[key] == value for key, value in progress.items()) and last["next"] == AGAIN
        return int(last["idle"]) if same else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _keep(folder: Path, start: dict) -> None:
    """A full disk must not end the chain."""
    try:
        (folder / "slurm").mkdir(parents=True, exist_ok=True)
        with open(folder / "slurm" / "starts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
    except OSError:
        return

"""Sinks: where the record of a step goes. Console, metrics.jsonl, wandb, tensorboard; the last two only when asked for.

A sink has write(record) and close(). Only rank 0 opens sinks. wandb reads its key from its own login or environment;
nothing here reads, prints or stores it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

from sbtrain.config.schema import LogConfig


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: list):
        self._sinks = sinks

    def write(self, record: dict) -> None:
        """Hand one step's record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def add(self, step: int, more: dict) -> None:
        """More about `step`, the newest one, whose record was written before it was known."""
        for sink in self._sinks:
            if more and hasattr(sink, "add"):
                sink.add(step, more)

    def go_back(self, step: int) -> list[dict]:
        """Records of `step` and later ones are made again. Returns those that metrics.jsonl had, and has no more.

        wandb keeps the first record of a step that is made twice.
        """
        dropped = [sink.go_back(step) for sink in self._sinks if hasattr(sink, "go_back")]
        return next((records for records in dropped if records is not None), [])

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(
    log: LogConfig,
    run_dir: str | Path,
    *,
    name: str,
    num_steps: int,
    num_tokens: int,
    resume_step: int = 1,
    rank: int = 0,
    config: dict | None = None,
) -> Sinks:
    """The sinks that `log` asks for; none on ranks other than 0.

    num_steps, num_tokens: of the whole run, for progress and ETA; resume_step: the first step that will be written;
    config: the resolved recipe, shown by wandb. Raises ValueError for a package that is missing.
    """
    if rank != 0:
        return Sinks([])
    run_dir = Path(run_dir)
    sinks = [open_jsonl(run_dir / "metrics.jsonl", resume_step)]
    if log.wandb:
        sinks.append(Wandb(run_dir, project=log.wandb_project, name=name, mode=log.wandb_mode, config=config))
    if log.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", resume_step))
    sinks.append(Console(num_steps=num_steps, num_tokens=num_tokens, every_steps=log.every_steps))
    return Sinks(sinks)


def open_jsonl(path: str | Path, resume_step: int = 1, *, key: str = "step") -> JsonLines:
    """Open metrics.jsonl for appending from `resume_step` on: later steps and a torn last line are dropped first.

    So after a resume no step appears twice. key: what counts the lines of another file. Raises ValueError when the
    file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines(path, resume_step, key)
        return JsonLines(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _drop_lines(path: Path, step: int, key: str = "step") -> list[str]:
    """Drop the lines of this step and later ones, and torn ones; returns them."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if is_before(line, step, key)]
    if kept != lines:
        _replace_lines(path, kept)
    return [line for line in lines if not is_before(line, step, key)]


def _replace_lines(path: Path, lines: list[str]) -> None:
    """All at once: who is killed has the old ones or these."""
    staged = path.with_name(path.name + ".tmp")
    staged.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(staged, path)


def is_before(line: str, step: int, key: str = "step") -> bool:
    """Whether a line of metrics.jsonl is whole and belongs to an earlier step."""
    try:
        return json.loads(line)[key] < step
    except (ValueError, KeyError, TypeError):
        return False


def unwritable(path: Path, error: OSError) -> ValueError:
    """The one line a user gets when a file of the run cannot be written."""
    return ValueError(f"{path}: cannot write ({error.strerror}); free space there or set run_dir to another folder")


class JsonLines:
    """One JSON object a line, flushed at once: what was written survives the process."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (stays open until close())

    def write(self, record: dict) -> None:
        """Append one record; NaN and infinities become null. Raises ValueError when the disk is full."""
        try:
            self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def add(self, step: int, more: dict) -> None:
        """Add values to the last record, if it is of that step. Raises ValueError where the file cannot be written."""
        self._file.close()
        try:
            *before, last = self._path.read_text(encoding="utf-8").splitlines() or ["{}"]
            record = json.loads(last)
            if record.get("step") == step:
                _replace_lines(self._path, [*before, json.dumps(finite({**record, **more}), allow_nan=False)])
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise unwritable(self._path, error) from error

    def go_back(self, step: int) -> list[dict]:
        """Drop the records of `step` and later ones from the file; returns them. Raises ValueError where it cannot."""
        self._file.close()
        try:
            dropped = _drop_lines(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise unwritable(self._path, error) from error
        return [json.loads(line) for line in dropped]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """Weights & Biases, offline by default; a resumed run keeps its id, which follows from the run directory.

    config: any mapping; values that JSON lacks are shown as text.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, mode: str = "offline", config: dict | None = None):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("log.wandb: wandb is not installed; pip install wandb, or set log.wandb=false") from error
        identity = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:12]
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run_dir),
            config=json.loads(json.dumps(config, default=str)),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, record: dict) -> None:
        """Log every number of the record, nested ones under part/name."""
        self._run.log(scalars(record), step=record["step"])

    def add(self, step: int, more: dict) -> None:
        """Log more numbers of the newest step."""
        self._run.log(scalars(more), step=step)

    def close(self) -> None:
        """Finish the run; offline it waits in RUN_DIR/wandb for `wandb sync`."""
        self._run.finish()


class TensorBoard:
    """Event files under RUN_DIR/tensorboard; steps from `resume_step` on replace those of an earlier attempt."""

    def __init__(self, folder: Path, resume_step: int = 1):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "log.tensorboard: tensorboard is not installed; pip install tensorboard, or set log.tensorboard=false"
            ) from error
        self._new_writer = partial(SummaryWriter, str(folder))
        self._writer = self._new_writer(purge_step=resume_step if resume_step > 1 else None)

    def write(self, record: dict) -> None:
        """Add every number of the record as a scalar at its step."""
        for key, value in scalars(record).items():
            self._writer.add_scalar(key, value, global_step=record["step"])

    def add(self, step: int, more: dict) -> None:
        """Add more numbers of a step."""
        self.write({"step": step, **more})

    def go_back(self, step: int) -> None:
        """Steps from this one on are written again, in another event file."""
        self._writer.close()
        self._writer = self._new_writer(purge_step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Console:
    """One aligned line a step with progress and ETA; a terminal also sees a bar, and the steps between two lines.

    Models that spike have a column for the share of silent windows.
    """

    COLUMNS = (("stage", 9), ("step", 11), ("tokens", 15), ("loss", 8), ("grad norm", 9), ("lr", 8), ("tok/s/GPU", 9),
               ("MFU", 6), ("ETA", 7))  # fmt: skip
    SPARSITY = ("sparsity", 8)
    BAR = 12

    def __init__(self, *, num_steps: int, num_tokens: int, every_steps: int = 1, stream=None):
        self._num_steps, self._num_tokens, self._every = num_steps, num_tokens, max(1, every_steps)
        self._stream = stream or sys.stdout
        self._tty = self._stream.isatty()
        self._stage, self._s_per_token = None, None

    def write(self, record: dict) -> None:
        """Print the step; between two lines of `every_steps` a terminal shows it in passing."""
        eta_s = self._eta_s(record)
        if record["stage"] != self._stage:
            header = self._header(self._columns(record))
            self._print(header if self._stage is None else "\n" + header)
            self._stage = record["stage"]
        due = record["step"] % self._every == 0 or record["tokens"] >= self._num_tokens or "first_step" in record
        if due:
            self._print(self._line(record, eta_s))
        elif self._tty:
            self._stream.write("\r\x1b[K" + self._line(record, eta_s))
            self._stream.flush()

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        if self._tty:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _print(self, line: str) -> None:
        self._stream.write(("\r\x1b[K" if self._tty else "") + line + "\n")
        self._stream.flush()

    def _columns(self, record: dict) -> tuple:
        return (*self.COLUMNS, self.SPARSITY) if "spike_sparsity" in record else self.COLUMNS

    def _header(self, columns: tuple) -> str:
        cells = [title.ljust(width) if title == "stage" else title.rjust(width) for title, width in columns]
        return "  ".join(cells)

    def _line(self, record: dict, eta_s: float | None) -> str:
        mfu = record.get("mfu")
        values = (
            record["stage"],
            f"{record['step']}/{self._num_steps}",
            f"{short(record['tokens'])}/{short(self._num_tokens)} {self._share(record):3.0%}",
            f"{record['loss']:.4f}",
            f"{record['grad_norm']:.3f}",
            f"{record['lr']:.2e}",
            short(record["tokens_per_s_per_gpu"]),
            "-" if mfu is None else f"{mfu:.1%}",
            "-" if eta_s is None else duration(eta_s),
            f"{record.get('spike_sparsity', 0):.1%}",
        )
        cells = [value.rjust(width) for value, (_, width) in zip(values, self._columns(record))]
        cells[0] = values[0].ljust(self.COLUMNS[0][1])
        return "  ".join(cells) + (f"  {self._bar(record)}" if self._tty else "")

    def _share(self, record: dict) -> float:
        return min(1.0, record["tokens"] / max(1, self._num_tokens))

    def _bar(self, record: dict) -> str:
        full = int(self._share(record) * self.BAR)
        return "━" * full + "╌" * (self.BAR - full)

    def _eta_s(self, record: dict) -> float | None:
        """Seconds left at a moving average of the speed; None until a step without start-up was seen."""
        speed = record["tokens_per_s_per_gpu"] * record["world_size"]
        if "first_step" not in record and speed > 0:
            latest = 1 / speed
            self._s_per_token = latest if self._s_per_token is None else 0.8 * self._s_per_token + 0.2 * latest
        left = max(0, self._num_tokens - record["tokens"])
        return None if self._s_per_token is None else self._s_per_token * left


def finite(value):
    """The value as strict JSON can hold it: NaN and infinities become None, in dicts and lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def scalars(record: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a record, nested ones as part/name; text, flags, None and lists are left out."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found.update(scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def short(number: float) -> str:
    """A count in at most five characters: 512, 6.1k, 50.2k, 1.25M, 100B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """Time left or spent as 42s, 6m12s, 3h05m or 2d04h."""
    seconds = int(round(seconds))
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // small:02d}{small_unit}"
    return f"{seconds}s"

"""Raw text to tokenized corpora: PREFIX.bin, .idx (megatron indexed format, one sequence a document) and .json.

The input is cut into slices (`data.inputs`); each becomes a part in PREFIX.parts/, named by a hash of all that
determines it, and the parts are merged in input order. A part counts once its .json is in place and the corpus once
PREFIX.json is, so an interrupted run continues with the parts it has, and the result does not depend on the workers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sbtrain.data import tokenizer as tokenizers
from sbtrain.data.blocks import Sums, write_sums
from sbtrain.data.inputs import Slice, find_slices, read_slice

_BATCH_DOCUMENTS = 512
_FORMAT = 1
"""Raised whenever the same input would give other tokens, so that old parts are not reused."""


@dataclass(frozen=True)
class _Settings:
    """What the content of a part depends on, besides its slice."""

    tokenizer: str
    tokenizer_sha256: str
    eos_id: int
    vocab_size: int
    text_key: str
    valid_percent: float

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "valid") if self.valid_percent else ("train",)

    @property
    def dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 65536 else np.int32


@dataclass(frozen=True)
class _Task:
    """One slice and the path, without ending, of its part."""

    piece: Slice
    part: Path


def prepare(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    *,
    tokenizer: str | Path,
    text_key: str = "text",
    valid_percent: float = 0.0,
    num_workers: int = 1,
    slice_bytes: int = 32 * 2**20,
    progress: bool = True,
) -> list[Path]:
    """Tokenize files and folders into the corpus PREFIX, or PREFIX_train and PREFIX_valid if valid_percent > 0.

    Every document ends with the tokenizer's eos; empty documents are dropped. valid_percent of the documents, chosen by
    the hash of their text, are held out. Returns the .json files. Interrupted and called again, continues.
    Raises ValueError, one line naming file (and line) and fix, for bad input, other settings under the same prefix, no
    space left.
    """
    prefix = Path(prefix)
    if not 0 <= valid_percent < 100:
        raise ValueError(f"valid_percent={valid_percent} must be at least 0 and below 100")
    loaded = tokenizers.load(tokenizer)
    settings = _Settings(
        str(tokenizer), loaded.sha256, loaded.eos_id, loaded.vocab_size, text_key, float(valid_percent)
    )
    folder = prefix.with_name(prefix.name + ".parts")
    tasks = [
        _Task(piece, folder / _part_name(piece, settings)) for piece in find_slices(inputs, slice_bytes=slice_bytes)
    ]
    fingerprint = hashlib.sha256("".join(task.part.name for task in tasks).encode()).hexdigest()[:16]
    outputs = _outputs(prefix, settings)
    if _finished(outputs, fingerprint):
        for output in outputs.values():
            _add_sums(output)
    else:
        _refuse_strangers(outputs, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _tokenize_all(tasks, settings, num_workers=num_workers, progress=progress)
            _merge(tasks, settings, outputs, folder=folder, fingerprint=fingerprint)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ValueError(
                    f"no space left for {prefix}; free some and repeat the command, it continues"
                ) from error
            where = error.filename or prefix
            raise ValueError(f"out={prefix}: {where}: {error.strerror or error}; choose another out=") from error
    shutil.rmtree(folder, ignore_errors=True)
    return [output.with_name(output.name + ".json") for output in outputs.values()]


def _outputs(prefix: Path, settings: _Settings) -> dict[str, Path]:
    if not settings.valid_percent:
        return {"train": prefix}
    return {split: prefix.with_name(f"{prefix.name}_{split}") for split in settings.splits}


def _part_name(piece: Slice, settings: _Settings) -> str:
    """Hash of everything that determines a part; where the files lie does not."""
    piece_key = (piece.kind, piece.names, piece.identity, piece.start, piece.stop)
    settings_key = (settings.tokenizer_sha256, settings.eos_id, settings.text_key, settings.valid_percent)
    return hashlib.sha256(json.dumps([_FORMAT, piece_key, settings_key]).encode()).hexdigest()[:24]


def _finished(outputs: dict[str, Path], fingerprint: str) -> bool:
    """Whether the corpora are there and are these. Raises ValueError if others are."""
    done = 0
    for output in outputs.values():
        path = output.with_name(output.name + ".json")
        if not path.is_file():
            continue
        if json.loads(path.read_text())["fingerprint"] != fingerprint:
            raise ValueError(f"{path} is a corpus of other inputs or settings; delete it or choose another out=")
        done += 1
    return done == len(outputs)


def _add_sums(output: Path) -> None:
    """Add checksums to a corpus that was finished before there were any: they hold from now on. Raises OSError."""
    path = output.with_name(output.name + ".json")
    about = json.loads(path.read_text())
    if "checksums" in about:
        return
    sums = Sums()
    with open(f"{output}.bin", "rb") as tokens:
        while chunk := tokens.read(1 << 20):
            sums.add(chunk)
    _write_json(path, {**about, "checksums": write_sums(output, sums)})


def _refuse_strangers(outputs: dict[str, Path], folder: Path) -> None:
    """Without .json and parts, a .bin or .idx under our name was made by something else."""
    for output in outputs.values():
        for path in (output.with_name(output.name + ending) for ending in (".bin", ".idx")):
            if path.exists() and not folder.exists():
                raise ValueError(f"{path} exists and is not from an interrupted run; move it or choose another out=")


def _tokenize_all(tasks: Sequence[_Task], settings: _Settings, *, num_workers: int, progress: bool) -> None:
    """Make every part that is missing, in this process or in a pool."""
    missing = {task.part: task for task in tasks if not task.part.with_suffix(".json").is_file()}
    bar = tqdm(
        total=sum(task.piece.num_bytes for task in tasks),
        unit="B",
        unit_scale=True,
        desc="tokenize",
        disable=not progress,
    )
    bar.update(bar.total - sum(task.piece.num_bytes for task in missing.values()))
    with bar:
        if num_workers <= 1 or len(missing) <= 1:
            for task in missing.values():
                _tokenize(task, settings)
                bar.update(task.piece.num_bytes)
            return
        for task in _in_pool(list(missing.values()), settings, num_workers=min(num_workers, len(missing))):
            bar.update(task.piece.num_bytes)


def _in_pool(tasks: list[_Task], settings: _Settings, *, num_workers: int) -> Iterator[_Task]:
    """Yield each task when its part is made. Spawned, not forked: arrow and tokenizers have started threads."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        futures: dict[Future, _Task] = {pool.submit(_tokenize, task, settings): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as error:
        raise ValueError("a worker was killed, probably out of memory; repeat with fewer workers=") from error
    except BaseException:
        # Ctrl-C or a bad line: what runs now is done again later, so nobody waits for it.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and never outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize(task: _Task, settings: _Settings) -> None:
    """Make one part: PART.SPLIT.bin (tokens), PART.SPLIT.len (int32 lengths), then PART.json (counts per split)."""
    fast = tokenizers.load(settings.tokenizer, eos_id=settings.eos_id)
    counts = {split: {"num_documents": 0, "num_tokens": 0, "num_bytes": 0} for split in settings.splits}
    files = {split: open(f"{task.part}.{split}.bin", "wb") for split in settings.splits}  # noqa: SIM115
    lengths: dict[str, list[int]] = {split: [] for split in settings.splits}
    try:
        texts = (text for text in read_slice(task.piece, text_key=settings.text_key) if text)
        while batch := list(islice(texts, _BATCH_DOCUMENTS)):
            for text, ids in zip(batch, fast.encode_batch(batch, parse_special=False)):
                raw = text.encode()
                split = "valid" if _is_held_out(raw, settings.valid_percent) else "train"
                files[split].write(np.array([*ids, settings.eos_id], dtype=settings.dtype).tobytes())
                lengths[split].append(len(ids) + 1)
                counts[split]["num_bytes"] += len(raw)
    finally:
        for file in files.values():
            file.close()
    for split in settings.splits:
        np.array(lengths[split], dtype=np.int32).tofile(f"{task.part}.{split}.len")
        counts[split] |= {"num_documents": len(lengths[split]), "num_tokens": sum(lengths[split])}
    _write_json(task.part.with_suffix(".json"), counts)


def _is_held_out(raw: bytes, valid_percent: float) -> bool:
    """By the hash of the text: the same document is always on the same side, wherever and how often it occurs."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < valid_percent / 100 * 2**64


def _write_json(path: Path, content: dict) -> None:
    """Write all or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _merge(
    tasks: Sequence[_Task], settings: _Settings, outputs: dict[str, Path], *, folder: Path, fingerprint: str
) -> None:
    counts = [json.loads(task.part.with_suffix(".json").read_text()) for task in tasks]
    totals = {
        split: {key: sum(count[split][key] for count in counts) for key in counts[0][split]}
        for split in settings.splits
    }
    for split, total in totals.items():
        if total["num_documents"] == 0:
            fix = "give more text or another valid_percent=" if settings.valid_percent else "check input="
            raise ValueError(f"{outputs[split]}: no document is left for this corpus; {fix}")
    sums = {}
    for split, output in outputs.items():
        parts = [Path(f"{task.part}.{split}") for task in tasks]
        sums[split] = _concatenate(parts, settings.dtype, temporary=folder / f"merged_{split}", output=output)
    for split, output in outputs.items():
        description = {
            "tokenizer_sha256": settings.tokenizer_sha256,
            "vocab_size": settings.vocab_size,
            "eos_id": settings.eos_id,
            **totals[split],
            "split": split if settings.valid_percent else "all",
            "valid_percent": settings.valid_percent,
            "text_key": settings.text_key,
            "sources": _sources(tasks),
            "fingerprint": fingerprint,
            "checksums": write_sums(output, sums[split]),
            "created_by": f"sbtrain prepare_data, format {_FORMAT}",
        }
        _write_json(output.with_name(output.name + ".json"), description)


def _concatenate(parts: Sequence[Path], dtype: type, *, temporary: Path, output: Path) -> Sums:
    """Join parts into OUTPUT.bin and .idx: whole files under another name first, renamed at the end.

    Returns the checksums of what was written to .bin, whatever the disk made of it.
    """
    from parallel.mcore import IndexedDatasetBuilder

    builder, sums = IndexedDatasetBuilder(f"{temporary}.bin", dtype=dtype), Sums()
    for part in parts:
        with open(f"{part}.bin", "rb") as tokens:
            while chunk := tokens.read(1 << 20):
                builder.data_file.write(chunk)
                sums.add(chunk)
    lengths = np.concatenate([np.fromfile(f"{part}.len", dtype=np.int32) for part in parts])
    builder.sequence_lengths = lengths.tolist()
    builder.document_indices = range(len(lengths) + 1)
    builder.finalize(f"{temporary}.idx")
    for ending in (".bin", ".idx"):
        os.replace(f"{temporary}{ending}", f"{output}{ending}")
    return sums


def _sources(tasks: Sequence[_Task]) -> list[dict]:
    """Name and size of each input file, once."""
    files = {}
    for task in tasks:
        for name, identity in zip(task.piece.names, task.piece.identity):
            files[name] = {"name": name, "num_bytes": int(identity.partition(":")[0])}
    return list(files.values())

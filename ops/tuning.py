"""Tiles: `tune/<backend>.yaml` beside an op's kernels, chosen by device model, checked before Triton sees them.

    dot: {forward: [BLOCK_M, BLOCK_N]}       # sizes of a kernel that are dimensions of a tl.dot
    default:                                 # every kernel; the sizes here are all there are
      forward: {BLOCK_M: 64, BLOCK_N: 64, num_warps: 4, num_stages: 2, shared_bytes: 49152}
    H200:                                    # kernels that have better tiles on this device
      forward: {BLOCK_M: 128, BLOCK_N: 64, num_warps: 8, num_stages: 3, shared_bytes: 131072}

Names in capitals are sizes (positive integers, handed to the kernel); num_warps, num_stages, num_ctas and the
backend's own launch options go to Triton's launcher. The rest are notes: status (borrowed or measured) and source; and
shared_bytes, private_bytes (a thread's, spilled) and registers (a thread's), as the compiler reported them for this
entry, stages included. An entry replaces the default's as a whole, so that no note outlives its tiles.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Mapping, Optional

import yaml

from ops.backends import Backend, Limits
from ops.device import EnvFacts, collect, device_model, names_model
from ops.discover import catalog, descriptors

DEFAULT = "default"
LAUNCH = ("num_warps", "num_stages", "num_ctas")
NOTES = ("status", "source", "shared_bytes", "private_bytes", "registers")
STATUS = ("borrowed", "measured")
SIZE = re.compile(r"[A-Z][A-Z0-9_]*")


@dataclass(frozen=True)
class Tuning:
    """Entries that this device uses. models: kernel -> the section it came from. digest: hash of the whole file."""

    path: Path
    entries: Mapping[str, Mapping]
    models: Mapping[str, str]
    digest: str

    def describe(self) -> dict:
        """What the op table keeps: sections, statuses and the file's hash."""
        statuses = {entry["status"] for entry in self.entries.values() if "status" in entry}
        result = {"models": sorted(set(self.models.values())), "hash": self.digest}
        return {**result, "status": sorted(statuses)} if statuses else result


@dataclass
class Loaded:
    """Launch arguments by (op, backend) -> kernel."""

    launch: dict = field(default_factory=dict)


LOADED = Loaded()


def tiles(op: str, backend: str) -> Mapping[str, Mapping]:
    """kernel -> the keyword arguments to launch it with on this device: sizes and launch options.

    Ask at every launch: it is a dictionary's look-up, and `trying` changes the answer. Raises ValueError naming file
    and key for an entry that this device cannot run, and when there is no file.
    """
    found = LOADED.launch.get((op, backend))
    return load(op, backend) if found is None else found


def load(op: str, backend: str, facts: Optional[EnvFacts] = None) -> Mapping[str, Mapping]:
    """What `tiles` answers from now on, read from the file for the device of these facts (this process's)."""
    facts = facts or collect()
    tuning = select(op, backend, facts)
    if tuning is None:
        raise ValueError(f"{tune_file(op, backend)} does not exist; write its default section")
    LOADED.launch[op, backend] = {name: launch(entry, backend, facts) for name, entry in tuning.entries.items()}
    return LOADED.launch[op, backend]


def select(op: str, backend: str, facts: EnvFacts) -> Optional[Tuning]:
    """The entries for the device of these facts, or None where the op has no file for the backend.

    The section whose name stands in the device's name (the longest, of several) comes before the default.
    """
    path = tune_file(op, backend)
    if not path.exists():
        return None
    descriptor = descriptors()[backend]
    content = read(path, descriptor)
    named = [model for model in content if model not in (DEFAULT, "dot") and names_model(facts.device_name, model)]
    model = max(named, key=len, default=DEFAULT)
    models = {kernel: model if kernel in content[model] else DEFAULT for kernel in content[DEFAULT]}
    entries = {kernel: content[model][kernel] for kernel, model in models.items()}
    limits = descriptor.limits_on(facts)
    for kernel, entry in entries.items():
        problem = entry_problem(entry, limits, dot=content.get("dot", {}).get(kernel, ()))
        if problem:
            raise ValueError(f"{path}: {models[kernel]}.{kernel}.{problem} (limits of {facts.device_name or 'cpu'})")
    return Tuning(path, entries, models, hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def launch(entry: Mapping, backend: str, facts: EnvFacts) -> dict:
    """An entry's launch arguments. On a device that is not the backend's (emulation, interpreter) its own launch
    options are left out: another Triton would not know them."""
    descriptor = descriptors()[backend]
    left_out = set(NOTES) | (set() if descriptor.probe(facts)[0] else descriptor.limits.launch_options)
    return {key: value for key, value in entry.items() if key not in left_out}


def tune_file(op: str, backend: str) -> Path:
    """Where the entries are or would be: beside the backend's implementation."""
    files = catalog().files[op]
    if backend not in files:
        raise ValueError(f"op {op} has no file for {backend}; there are: {', '.join(sorted(files))}")
    return files[backend].path.parent / "tune" / f"{backend}.yaml"


@contextmanager
def trying(op: str, backend: str, entries: Mapping[str, Mapping]) -> Iterator[None]:
    """Inside, `tiles` answers with these entries in place of the file's: how a search times a candidate.

    Raises ValueError for a kernel that the file does not know, and for an entry over this device's limits.
    """
    kept = tiles(op, backend)
    facts = collect()
    for kernel, entry in entries.items():
        problem = candidate_problem(op, backend, kernel, entry, facts)
        if problem:
            raise ValueError(f"{op}.{kernel}.{problem}")
    LOADED.launch[op, backend] = {**kept, **{name: launch(entry, backend, facts) for name, entry in entries.items()}}
    try:
        yield
    finally:
        LOADED.launch[op, backend] = kept


def candidate_problem(op: str, backend: str, kernel: str, entry: Mapping, facts: EnvFacts) -> Optional[str]:
    """Why an entry for a kernel is not legal on the device of these facts ("key: reason"), or None when it is."""
    descriptor = descriptors()[backend]
    path = tune_file(op, backend)
    content = read(path, descriptor)
    if kernel not in content[DEFAULT]:
        return f"{kernel}: no such kernel in {path}; there are: {', '.join(content[DEFAULT])}"
    shape = _shape_problem(entry, content[DEFAULT][kernel], descriptor, source=False)
    return shape or entry_problem(entry, descriptor.limits_on(facts), dot=content.get("dot", {}).get(kernel, ()))


def save_tiles(op: str, backend: str, model: str, entries: Mapping[str, Mapping]) -> Path:
    """Write entries (kernel -> entry, status and source included) into a section of the op's file; returns the file.

    The section's other kernels, all other sections and their comments stay; comments inside the section go. The file is
    replaced as a whole once the new one has passed `read`'s checks. model: of the device, as `ops.device.device_model`
    spells it, or "default". Raises ValueError when the file does not exist or an entry is not legal.
    """
    path, descriptor = tune_file(op, backend), descriptors()[backend]
    if not path.exists():
        raise ValueError(f"{path} does not exist; write its default section first")
    section = {**read(path, descriptor).get(model, {}), **{name: dict(entry) for name, entry in entries.items()}}
    body = yaml.safe_dump({model: section}, default_flow_style=None, sort_keys=False, width=10_000)
    text = _with_section(path.read_text(), model, body)
    _parse(text, path, descriptor)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
    LOADED.launch.pop((op, backend), None)
    return path


def mark_measured(op: str, backend: str, facts: EnvFacts, source: str) -> Optional[Path]:
    """Write the entries that the device of these facts uses into its own section, as measured; None without a file.

    Raises ValueError where the backend is not this device's own.
    """
    if not descriptors()[backend].probe(facts)[0]:
        raise ValueError(f"entries of {backend} cannot be measured here: {descriptors()[backend].probe(facts)[1]}")
    tuning = select(op, backend, facts)
    if tuning is None:
        return None
    notes = {"status": "measured", "source": source}
    entries = {kernel: {**entry, **notes} for kernel, entry in tuning.entries.items()}
    return save_tiles(op, backend, device_model(facts.device_name), entries)


def _with_section(text: str, name: str, body: str) -> str:
    """The file's text with one top-level section replaced, or added at the end."""
    lines = text.splitlines(keepends=True)
    heads = [i for i, line in enumerate(lines) if _top_level_key(line) == name]
    if not heads:
        return text.rstrip("\n") + "\n" + body
    start = end = heads[0]
    for i in range(start + 1, len(lines)):
        if lines[i][0] in " \t":
            end = i
        elif lines[i][0] not in "#\n":
            break
    return "".join([*lines[:start], body, *lines[end + 1 :]])


def _top_level_key(line: str) -> Optional[str]:
    match = re.match(r"[\"']?([^\s#\"':][^\"':]*)[\"']?\s*:", line)
    return match[1] if match else None


def read(path: Path, backend: Backend) -> dict:
    """A tune file's content, checked: structure, names, and each section against the limits of its device model.

    Raises ValueError in one line that names the file and the key.
    """
    return _parse(path.read_text(), path, backend)


def _parse(text: str, path: Path, backend: Backend) -> dict:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get(DEFAULT), dict) or not content[DEFAULT]:
        raise ValueError(f"{path}: default: missing; name every kernel there")
    for section, kernels in content.items():
        if not isinstance(section, str):
            raise ValueError(f"{path}: {section}: put quotes around a device model that is a number")
        if not isinstance(kernels, dict):
            raise ValueError(f"{path}: {section}: must map kernels to entries, got {kernels!r}")
        unknown = sorted(set(kernels) - set(content[DEFAULT]))
        if unknown:
            raise ValueError(f"{path}: {section}.{unknown[0]}: no such kernel in the default section")
    dot = content.get("dot", {})
    for kernel, names in dot.items():
        if not isinstance(names, list) or not set(names) <= set(content[DEFAULT][kernel]):
            raise ValueError(f"{path}: dot.{kernel}: must list sizes of the default entry, got {names!r}")
    for section in (name for name in content if name != "dot"):
        limits = backend.limits_of_model(section)
        for kernel, entry in content[section].items():
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: {section}.{kernel}: must be a mapping, got {entry!r}")
            problem = _shape_problem(entry, content[DEFAULT][kernel], backend)
            problem = problem or entry_problem(entry, limits, dot=dot.get(kernel, ()))
            if not problem and backend.entries_have_source and kernel in dot and "shared_bytes" not in entry:
                problem = "shared_bytes: missing; compile the kernel and write what it reports"
            if problem:
                raise ValueError(f"{path}: {section}.{kernel}.{problem}")
    return content


def entry_problem(entry: Mapping, limits: Limits, *, dot: tuple = ()) -> Optional[str]:
    """ "key: reason" for the first value of an entry over a limit, or None."""
    num_warps = entry.get("num_warps", 4)
    if num_warps & (num_warps - 1):
        return f"num_warps: {num_warps} is no power of two"
    if limits.max_num_warps and num_warps > limits.max_num_warps:
        threads, most = num_warps * limits.warp_size, limits.max_threads_per_block
        return f"num_warps: {num_warps} x {limits.warp_size} lanes are {threads} threads, at most {most}; use fewer"
    for size in dot:
        if limits.min_dot_size and (entry[size] < limits.min_dot_size or entry[size] & (entry[size] - 1)):
            return f"{size}: {entry[size]} cannot be a tl.dot dimension; use a power of two from {limits.min_dot_size}"
    most = {
        "num_ctas": limits.max_num_ctas,
        "shared_bytes": limits.shared_memory_bytes,
        "private_bytes": limits.private_bytes_per_thread,
        "registers": limits.registers_per_thread,
        "maxnreg": limits.registers_per_thread,
    }
    for key, limit in most.items():
        if limit is not None and entry.get(key, 0) > limit:
            return f"{key}: {entry[key]} is over the device's {limit}"
    registers = entry.get("registers", 0) * num_warps * (limits.warp_size or 1)
    if limits.registers_per_block and registers > limits.registers_per_block:
        return f"registers: {registers} in a block, at most {limits.registers_per_block}; use fewer warps"
    return None


def _shape_problem(entry, default, backend: Backend, *, source: bool = True) -> Optional[str]:
    """Names and types of an entry. default: the default section's entry, which has all sizes."""
    sizes = {key for key in default if isinstance(key, str) and SIZE.fullmatch(key)}
    options = {name: other.limits.launch_options for name, other in descriptors().items()}
    for key, value in entry.items():
        if not isinstance(key, str):
            return f"{key}: must be a name"
        others = [name for name, known in options.items() if key in known]
        if key in sizes or key in (*LAUNCH, "shared_bytes", "private_bytes", "registers", "maxnreg"):
            least = 0 if key in ("shared_bytes", "private_bytes") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                return f"{key}: must be an integer of at least {least}, got {value!r}"
        if key in sizes or key in (*LAUNCH, *NOTES) or key in backend.limits.launch_options:
            continue
        if others:
            return f"{key}: an option of {', '.join(others)}, unknown to {backend.name}; remove it"
        known = ", ".join([*sorted(sizes), *LAUNCH, *NOTES, *sorted(backend.limits.launch_options)])
        return f"{key}: unknown; choose from: {known}"
    missing = sorted(sizes - set(entry))
    if missing:
        return f"{missing[0]}: missing; an entry replaces the default's as a whole"
    if entry.get("status", STATUS[0]) not in STATUS:
        return f"status: must be {' or '.join(STATUS)}, got {entry['status']!r}"
    wanted = ("status", "source") if source and backend.entries_have_source else ("status",) * ("source" in entry)
    wanted += ("source",) * ("status" in entry)
    absent = next((key for key in wanted if key not in entry), None)
    return f"{absent}: missing; say whether the entry was measured, and where it comes from" if absent else None

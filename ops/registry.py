"""The op table: which file implements each op on this machine, resolved once, and the way of every call to it.

An implementation file is imported only when its backend passes its probe and is asked for. There is no fallback while
training runs: a choice is made when it is first needed and then kept. A file may define

    accepts(name, *args, **kwargs) -> Optional[str]

which gets the arguments of every call of public function `name` and returns why it cannot run them, or None. It may
look at metadata only (shapes, dtypes, strides, which optional arguments are there), never at values: all ranks then
decide alike, nothing waits for the device, and torch.compile can trace it. A refused call is an error, unless the
recipe allows the reference for that op ("cuda or reference", see ops/select.py).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from importlib import import_module
from typing import Callable, Mapping, Optional

import torch

from ops import tuning
from ops.backends import Backend
from ops.device import EnvFacts, collect
from ops.discover import catalog, scan
from ops.discover import descriptors as backends
from ops.select import OR_REFERENCE, check_overrides, choose, is_emulated, read_wish

LOG = logging.getLogger("ops")
DEVICE_BLIND = ("cpu", "meta")
"""Devices on which only the reference runs, whatever accelerator the machine has."""


class Refused(ValueError):
    """A call that the chosen implementation does not accept."""


@dataclass(frozen=True)
class Choice:
    """An op resolved to a backend. functions: public name -> implementation; `function` is the one named as the op.

    emulated: the files were written for another device. allow_reference: refused calls run on the reference.
    tune: the tune entries in use, see Tuning.describe."""

    op: str
    backend: str
    reason: str
    functions: Mapping[str, Callable] = field(repr=False)
    emulated: bool = False
    allow_reference: bool = False
    tune: Optional[Mapping] = None

    @property
    def function(self) -> Callable:
        """The op's main function."""
        return self.functions[self.op]


def _slots() -> dict[str, dict]:
    return {op: {} for op in scan()}


@dataclass
class Table:
    """The process's op table: recipe overrides, the choices made so far, and what calls look up.

    references, functions: op -> name -> function, for tensors of device-blind and of all other devices; empty until the
    op is resolved. A slot for each op is there from the start: Dynamo sees what is put into one before it looks there.
    refused: (op, reason) of the calls that went to the reference."""

    recipe: Mapping[str, str] = field(default_factory=dict)
    allow_reference: bool = False
    choices: dict = field(default_factory=dict)
    references: dict = field(default_factory=_slots)
    functions: dict = field(default_factory=_slots)
    refused: set = field(default_factory=set)
    cautioned: bool = False


TABLE = Table()


def use(recipe: Optional[Mapping[str, str]] = None, *, allow_reference: bool = False) -> None:
    """Set the recipe's `ops:` mapping (op -> backend, see ops/select.py) and forget earlier choices.

    allow_reference: calls that an op's backend does not accept run on the reference, for every op. Call before layers
    are built. Raises ValueError at once for unknown ops and for backends that cannot be had here; no wish
    is in force then.
    """
    recipe = dict(recipe or {})
    unknown = sorted(set(recipe) - set(scan()))
    if unknown:
        raise ValueError(f"recipe key ops.{unknown[0]}: no such op; choose from: {', '.join(scan())}")
    for op, wish in recipe.items():
        read_wish(f"recipe key ops.{op}", wish, backends())
    _forget(recipe, allow_reference)
    try:
        for op in recipe:
            resolve(op)
    except ValueError:
        _forget({}, False)
        raise


def _forget(recipe: Mapping[str, str], allow_reference: bool) -> None:
    TABLE.recipe, TABLE.allow_reference = recipe, allow_reference
    TABLE.choices, TABLE.functions, TABLE.refused = {}, _slots(), set()


def resolve(op: str, overrides: Optional[Mapping[str, str]] = None) -> Choice:
    """The implementation of an op on this machine; logged once. overrides (op -> backend) replaces the recipe's.

    Raises ValueError when a forced backend is unavailable, when device facts contradict each other, when a variable
    OPS_BACKEND_<OP> names no op, and when the op's tune file asks for what the device does not have.
    """
    if overrides is None and op in TABLE.choices:
        return TABLE.choices[op]
    files = scan()
    if op not in files:
        raise ValueError(f"no such op: {op}; choose from: {', '.join(files)}")
    known, facts = backends(), collect()
    check_overrides(facts, files)
    selection = choose(
        op,
        files=files[op],
        facts=facts,
        backends=known,
        recipe=TABLE.recipe if overrides is None else overrides,
        why_not=lambda name: why_not(op, known[name]),
    )
    backend, reason, emulated, allow_reference = selection
    allow_reference = allow_reference or TABLE.allow_reference
    found = tuning.select(op, backend, facts)
    if found:
        tuning.load(op, backend, facts)
    functions = _functions(op, backend, allow_reference=allow_reference)
    choice = Choice(op, backend, reason, functions, emulated, allow_reference, found.describe() if found else None)
    if overrides is None:
        TABLE.choices[op] = choice
        _caution(known[backend], facts)
        LOG.info("ops.%s -> %s (%s)", op, backend, reason)
    return choice


def implementation(op: str, name: str, tensor: torch.Tensor) -> Callable:
    """Function `name` of an op for a call on `tensor`'s device: the table's choice, or the reference off-device.

    Cheap, and traced by torch.compile as a look-up: what it may have to import is done while tracing.
    """
    blind, compiling = tensor.device.type in DEVICE_BLIND, torch.compiler.is_compiling()
    if compiling or not (TABLE.references if blind else TABLE.functions)[op]:
        _prepare(op, blind)
    if not compiling and tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        _check_device(op, tensor.device)
    return (TABLE.references if blind else TABLE.functions)[op][name]


def _check_device(op: str, device: torch.device) -> None:
    """Raise ValueError where kernels would be launched on another device than their tensors are on."""
    backend = resolve(op).backend
    if backend != "reference":
        raise ValueError(
            f"op {op} on {backend}: tensors on {device}, but the current device is cuda:{torch.cuda.current_device()}; "
            f"call torch.cuda.set_device({device.index}) or put the call inside torch.cuda.device({device.index})"
        )


def why_not(op: str, backend: Backend) -> Optional[str]:
    """Reason why an implementation file cannot be imported: a missing optional package. Other failures are raised."""
    try:
        import_module(catalog().files[op][backend.name].module)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in backend.optional_packages:
            raise
        return f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
    return None


def _prepare(op: str, blind: bool) -> None:
    if blind and not TABLE.references[op]:
        TABLE.references[op].update(_functions(op, "reference", allow_reference=True))
    elif not blind and not TABLE.functions[op]:
        TABLE.functions[op].update(resolve(op).functions)


def _note_refusal(op: str, name: str, backend: str, reason: str) -> None:
    if (op, reason) not in TABLE.refused:
        TABLE.refused.add((op, reason))
        LOG.warning("ops.%s runs on the reference, as allowed: %s does not accept the call: %s", name, backend, reason)


# What torch.compiler.assume_constant_result sets, which would import Dynamo: both run as they are while it traces.
_prepare._dynamo_marked_constant = True
_note_refusal._dynamo_marked_constant = True


def _functions(op: str, backend: str, *, allow_reference: bool) -> dict[str, Callable]:
    """Public name -> function of an implementation file, behind its `accepts` where it has one."""
    module = import_module(catalog().files[op][backend].module)
    names = import_module(catalog().packages[op]).__all__
    found = {name: getattr(module, name) for name in names}
    accepts = getattr(module, "accepts", None)
    if accepts is None or backend == "reference":
        return found
    reference = _functions(op, "reference", allow_reference=True)
    substitutes = reference if allow_reference else dict.fromkeys(names)
    return {name: _checked(op, name, backend, function, accepts, substitutes[name]) for name, function in found.items()}


def _checked(op: str, name: str, backend: str, function: Callable, accepts: Callable, substitute: Optional[Callable]):
    """`function`, which runs only what `accepts` accepts; other calls go to the substitute, or are refused."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        """The function, where the backend accepts these arguments."""
        reason = accepts(name, *args, **kwargs)
        if reason is None:
            return function(*args, **kwargs)
        if substitute is None:
            allowed = f"{backend}{OR_REFERENCE}"
            raise Refused(
                f"ops.{name} on {backend} does not accept this call: {reason}; change the call, or allow the reference "
                f"with ops.{op}: '{allowed}' in the recipe, OPS_BACKEND_{op.upper()}='{allowed}' or "
                "ops.use(allow_reference=True)"
            )
        _note_refusal(op, name, backend, reason)
        return substitute(*args, **kwargs)

    return checked


def _caution(backend: Backend, facts: EnvFacts) -> None:
    emulated = is_emulated(backend.name, facts, backends())
    text = f"files of {backend.name} are emulated on {facts.device_name}" if emulated else backend.caution(facts)
    if text and not TABLE.cautioned and backend.name != "reference":
        TABLE.cautioned = True
        LOG.warning("%s", text)

"""Each op's own examples against its reference in float64: outputs and gradients, on this machine.

`python -m ops.parity OP SIZE FILE [cpu|device]` writes the result of one op as JSON; `python -m ops.parity facts FILE`
what this machine is. One process each: a kernel that hangs or crashes takes only itself along.

An op's `examples.py` has `examples(size)` -> [(function, args, kwargs)] with CPU tensors and TOLERANCES (dtype ->
largest relative norm of a difference). In the arguments float64 tensors stand for the dtype under test; float32 and
integer tensors stay what they are. Gradients are compared for those that require them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterator, Mapping

import torch
from torch import Tensor

import ops
from ops.device import collect
from ops.discover import catalog, descriptors
from ops.registry import Refused
from ops.select import platform

SIZES = ("small", "mid")


def compare(op: str, size: str, *, device: str, oracle: str = "cpu", seed: int = 0) -> dict:
    """Every example in every dtype: {"backend", "reason", "emulated", "status", "cases": [...]}.

    device: where the op runs. oracle: where the float64 reference does. A case has function, dtype, status ("ok",
    "wrong", "refused") and error, the largest relative norm of a difference (None where something is not finite).
    """
    result = {"op": op, "size": size, "backend": "reference", "reason": "tensors on the CPU", "emulated": False}
    if device != "cpu":
        choice = ops.resolve(op)
        result |= {"backend": choice.backend, "reason": choice.reason, "emulated": choice.emulated}
    if find_spec(f"{catalog().packages[op]}.examples") is None:
        return {**result, "status": "no examples", "cases": []}
    module = import_module(f"{catalog().packages[op]}.examples")
    reference = import_module(catalog().files[op]["reference"].module)
    cases = []
    for dtype, tolerance in module.TOLERANCES.items():
        torch.manual_seed(seed)
        for name, args, kwargs in module.examples(size):
            case = {"function": name, "dtype": str(dtype).removeprefix("torch."), "options": sorted(kwargs)}
            functions = getattr(ops, name), getattr(reference, name)
            cases.append({**case, **_case(*functions, args, kwargs, dtype, tolerance, device, oracle)})
    states = {case["status"] for case in cases}
    status = "wrong" if "wrong" in states else "ok" if "ok" in states else "refused"
    return {**result, "status": status, "cases": cases}


def _case(function, reference, args, kwargs, dtype, tolerance, device, oracle) -> dict:
    start = time.perf_counter()
    tested = _moved((args, kwargs), lambda x: x.to(device, dtype if x.dtype == torch.float64 else x.dtype))
    exact = _moved(tested, lambda x: x.to(oracle, torch.float64 if x.is_floating_point() else x.dtype))
    try:
        actual = _results(function, *tested)
    except Refused as refusal:
        return {"status": "refused", "error": None, "note": str(refusal)}
    errors = [_distance(*pair) for pair in zip(actual, _results(reference, *exact))]
    worst = max(errors, default=0.0)
    status = "ok" if worst <= tolerance else "wrong"
    error = worst if worst < float("inf") else None
    return {"status": status, "error": error, "tolerance": tolerance, "seconds": time.perf_counter() - start}


def _moved(value, move: Callable):
    """The same structure with every tensor moved: new leaves, which require gradients where the old ones do."""
    if isinstance(value, Tensor):
        return move(value.detach()).clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: _moved(part, move) for key, part in value.items()}
    return tuple(_moved(part, move) for part in value) if isinstance(value, tuple) else value


def _leaves(value) -> Iterator[Tensor]:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    if isinstance(value, Tensor) and value.requires_grad:
        yield value
    for part in parts:
        yield from _leaves(part)


def _results(function: Callable, args: tuple, kwargs: Mapping) -> list[Tensor]:
    """Outputs, then the gradients of a fixed random weighting of them; on the CPU in float64."""
    outputs = function(*args, **kwargs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    leaves = list(_leaves((args, kwargs)))
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for x in outputs:
        if x.requires_grad:
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            loss = loss + (x.masked_fill(x.isinf(), 0) * weights.to(x.device, x.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, Tensor) else ()
    results = [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))]
    return [x.detach().cpu().double() for x in results]


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Relative norm. Infinities (decay over a document's start) must agree; other values that are not finite differ."""
    same = actual.isinf() & (actual == expected)
    actual, expected = actual.masked_fill(same, 0), expected.masked_fill(same, 0)
    distance = ((actual - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    return distance if distance == distance else float("inf")


def facts() -> dict:
    """This machine: facts, its backend with limits, and the op table."""
    found, known = collect(), descriptors()
    name, reason = platform(found, known)
    limits = known[name].limits_on(found).describe()
    return {"facts": found.to_json(), "backend": name, "reason": reason, "limits": limits, "ops": ops.table()}


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments[0] == "facts":
        result, path = facts(), arguments[1]
    else:
        op, size, path, *rest = arguments
        device = "cuda" if collect().cuda_available else "cpu"
        result = compare(op, size, device=device, oracle=device if rest == ["device"] else "cpu")
    Path(path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

"""How far a version is from the float64 reference: outputs, and the gradient that is farthest off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Hashable, Optional

import torch
from torch import Tensor

from ops.registry import resolve
from sbtrain.bench.ops_case import Case, Draw, Inputs, Version, detached, leaves, wanted
from sbtrain.bench.ops_measure import Settings, deadline

Call = Callable[[Inputs], tuple[Tensor, ...]]
SEED_SHIFT = 1000
"""Errors are measured on other numbers than times."""
POISON_BYTES = 2**30
SMALL_BLOCKS, SMALL_BYTES = 64, 2**19
PART_NUMBERS = 2**26


@dataclass(frozen=True)
class Truth:
    """Inputs in the measured dtype, and what ops' reference makes of the same numbers in float64."""

    num_tokens: int
    inputs: dict
    upstreams: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def find_truth(case: Case, num_tokens: int, settings: Settings) -> Truth:
    """Fresh inputs, random upstream gradients (1 for a scalar) and the reference's answer to them."""
    draw = Draw(settings.device, settings.dtype, settings.seed + SEED_SHIFT)
    inputs = case.inputs(draw, num_tokens)
    exact = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
    for name in wanted(inputs):
        exact[name].requires_grad_()
    outputs = case.call(resolve(case.op, {case.op: "reference"}).functions, exact)
    upstreams = [_upstream(x, draw) for x in outputs if x.requires_grad]
    gradients = {}
    if upstreams:
        differentiated = [x for x in outputs if x.requires_grad]
        found = torch.autograd.grad(differentiated, list(wanted(exact).values()), [x.double() for x in upstreams])
        gradients = dict(zip(wanted(exact), found))
    return Truth(num_tokens, inputs, upstreams, [x.detach() for x in outputs], gradients)


def _upstream(output: Tensor, draw: Draw) -> Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    return draw.normal(*output.shape).detach()


def errors(version: Version, call: Call, truth: Truth, settings: Settings) -> tuple[dict, Optional[Exception]]:
    """What was found, and what the backward pass raised, if it did. Raises what the forward pass does.

    error_tokens: the length. error: of the worst output, ‖x - truth‖ / ‖truth‖; gradient_error: of worst_gradient;
    repeats: whether two backward passes gave the same bits. Memory that the version will be given holds NaN
    beforehand. Each pass has the time limit to itself.
    """
    with deadline(settings.time_limit_s):
        _poison(settings)
        outputs = answers(version, call, truth.inputs, [])
    found = {"error_tokens": truth.num_tokens, "error": worst(outputs, dict(enumerate(truth.outputs)))[1]}
    del outputs
    if not truth.gradients:
        return found, None
    results = []
    try:
        with deadline(settings.time_limit_s):
            for _ in range(2):
                _poison(settings)
                results.append(answers(version, call, truth.inputs, truth.upstreams))
    except Exception as error:  # whatever a peer raises is its row, not the end of the run
        return found, error
    gradients, again = ({name: result[name] for name in truth.gradients} for result in results)
    name, error = worst(gradients, truth.gradients)
    repeats = all(torch.equal(gradients[name], again[name]) for name in gradients)
    return {**found, "gradient_error": error, "worst_gradient": name, "repeats": repeats}, None


def answers(version: Version, call: Call, inputs: Inputs, upstreams: list[Tensor]) -> dict[Hashable, Tensor]:
    """Outputs by number, and for given upstream gradients also the gradients of the case's own inputs by name: they go
    back through what prepare did to the inputs."""
    inputs = leaves(inputs)
    if not upstreams:
        with torch.no_grad():
            return dict(enumerate(call(version.prepare(detached(leaves(inputs, copy=version.in_place))))))
    prepared = version.prepare(inputs)
    if version.in_place:  # a leaf must not be written to
        prepared = {name: x.clone() if isinstance(x, Tensor) and x.requires_grad else x for name, x in prepared.items()}
    outputs = call(prepared)
    kept = {number: x.detach().clone() if version.in_place else x.detach() for number, x in enumerate(outputs)}
    differentiated = [x for x in outputs if x.requires_grad]
    upstreams = [x.to(output.dtype, copy=True) for x, output in zip(upstreams, differentiated, strict=True)]
    gradients = torch.autograd.grad(differentiated, list(wanted(inputs).values()), upstreams)
    return {**kept, **dict(zip(wanted(inputs), gradients))}


def worst(found: dict[Hashable, Tensor], exact: dict[Hashable, Tensor]) -> tuple[Hashable, float]:
    """(name, relative error) of the tensor that is farthest off; NaN is the farthest."""
    off = {name: relative(found[name], exact[name]) for name in exact}
    name = max(off, key=lambda name: (off[name] != off[name], off[name]))
    return name, off[name]


def relative(x: Tensor, exact: Tensor) -> float:
    """‖x - exact‖ / ‖exact‖, by parts: the tensors may be large."""
    off = norm = 0.0
    for found, wanted_part in zip(x.flatten().split(PART_NUMBERS), exact.flatten().split(PART_NUMBERS), strict=True):
        off += float(torch.linalg.vector_norm(found.double() - wanted_part.double())) ** 2
        norm += float(torch.linalg.vector_norm(wanted_part.double())) ** 2
    return (off / (norm or 1.0)) ** 0.5


def reason(error: Exception) -> str:
    """The first line of what went wrong, with the kind of error."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160]}" if first else type(error).__name__


def _poison(settings: Settings) -> None:
    """Leave NaN in the memory that is handed out next: what a kernel forgets to write then shows."""
    if settings.device.type != "cuda":
        return
    torch.cuda.empty_cache()
    nan = torch.full((POISON_BYTES // 4,), float("nan"), device=settings.device)
    small = [torch.full((SMALL_BYTES // 4,), float("nan"), device=settings.device) for _ in range(SMALL_BLOCKS)]
    del nan, small

"""What `bench.py ops` measures: a case is an op at one kind of input, a version is something that computes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Mapping, Optional

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
"""Name -> tensor; those that require a gradient are differentiated."""

PASSES = ("forward", "both")
"""forward: under no_grad. both: forward and backward with gradients of all differentiable inputs."""


@dataclass(frozen=True)
class Version:
    """A way to compute a case: a backend of ours, or a peer.

    load() imports what is needed and returns call(inputs) -> outputs, both in the layout of the case; it raises
    ImportError or ValueError where that cannot be had. prepare(inputs) -> the inputs as this version wants them
    (repeated heads, split halves, masks); it is not timed. gpu_only: refuses a CPU. in_place: call may write to its
    inputs and to the gradients it is given.
    """

    name: str
    load: Callable[[], Callable[[Inputs], tuple[Tensor, ...]]]
    prepare: Callable[[Inputs], Inputs] = dict
    gpu_only: bool = True
    in_place: bool = False


@dataclass(frozen=True)
class Case:
    """An op on one kind of input.

    inputs(draw, num_tokens) draws them; call(functions, inputs) -> outputs, functions being one backend's by public
    name. flops(num_tokens): useful ones of a forward pass, 0 where bytes alone count; backward: those of the backward
    pass over those of the forward pass. reread: inputs that the backward pass reads again, None for all. same_gradient:
    inputs whose gradient is another's, one tensor for both. max_tokens: longer lengths are cut to it. check_tokens:
    most tokens at which the error is measured. compared: False where the op rounds to integers or picks, so that the
    error says nothing about right and wrong.
    """

    op: str
    name: str
    inputs: Callable[[Draw, int], dict[str, Tensor]]
    call: Callable[[Mapping[str, Callable], Inputs], tuple[Tensor, ...]]
    flops: Callable[[int], float] = lambda num_tokens: 0.0
    peers: tuple[Version, ...] = ()
    backward: float = 2.0
    reread: Optional[tuple[str, ...]] = None
    same_gradient: tuple[str, ...] = ()
    max_tokens: Optional[int] = None
    check_tokens: Optional[int] = None
    compared: bool = True

    @property
    def title(self) -> str:
        """The op, with the case's name where there is one."""
        return f"{self.op} {self.name}".rstrip()


@dataclass
class Draw:
    """Random inputs of one dtype on one device; the same seed gives the same inputs."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: Optional[torch.dtype] = None) -> Tensor:
        """N(mean, scale²), differentiable."""
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)
        return x.mul_(scale).add_(mean).requires_grad_()

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform in low .. high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def constant(self, values, dtype: torch.dtype) -> Tensor:
        """The values on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def num_bytes(tensors) -> int:
    """Bytes of all these tensors, each counted by its elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def moved_bytes(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], which: str) -> int:
    """Fewest bytes between the chip and its memory: every input and output once, and in the backward pass the reread
    inputs, the upstream gradient of every output and the gradient of every differentiable input once."""
    total = num_bytes(inputs.values()) + num_bytes(outputs)
    if which == "forward":
        return total
    reread = inputs if case.reread is None else case.reread
    total += num_bytes(inputs[name] for name in reread) + num_bytes(x for x in outputs if x.is_floating_point())
    return total + num_bytes(x for name, x in inputs.items() if x.requires_grad and name not in case.same_gradient)


def useful_flops(case: Case, num_tokens: int, which: str) -> float:
    """FLOPs of one call of this pass."""
    return case.flops(num_tokens) * (1.0 if which == "forward" else 1.0 + case.backward)


def leaves(inputs: Inputs, *, copy: bool = False) -> dict:
    """The inputs cut from what made them, as leaves that still ask for gradients; other values pass unchanged."""
    return {name: _leaf(x, copy) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _leaf(x: Tensor, copy: bool) -> Tensor:
    if not x.is_floating_point():
        return x
    leaf = x.detach().clone() if copy else x.detach()
    return leaf.requires_grad_(x.requires_grad)


def detached(inputs: Inputs) -> dict:
    """The inputs as a model without gradients has them."""
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def wanted(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that are differentiated."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}

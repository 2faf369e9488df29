"""Where an op may put the gradient of a weight itself, so that it is neither rounded nor held twice."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GradientBuffer(Protocol):
    """An accumulator of one weight's gradient that takes an op's contribution in autograd's place.

    total: the accumulator, of the weight's shape, fp32 (fp64 for fp64 inputs).
    scale: what the op's outputs will be multiplied by before they are summed and differentiated. The op multiplies
    its contribution by it in the forward pass, when the gradient that will arrive cannot be known yet.

    Whoever passes one promises that every forward pass under autograd is followed by exactly one backward pass in
    which the gradient of each output is `scale`; so the call must not be recomputed.
    """

    @property
    def total(self) -> Tensor: ...

    @property
    def scale(self) -> float: ...

    def begin(self) -> bool:
        """Called in the forward pass before total is written. True: add to what it holds; False: overwrite it."""
        ...

    def finish(self) -> None:
        """Called in the backward pass: the contribution announced by begin is now part of the gradient."""
        ...

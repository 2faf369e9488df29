"""GPTQ: INT8 weights that put out what the float weights do, not the weights nearest to them.

Columns are rounded in order. What rounding column j loses is made up for by the columns after it, as the Hessian x^T x
of the layer's inputs says: with U upper triangular, U^T U the inverse of the damped Hessian,

    error = (w_j - q_j) / U_jj          w_i -= error * U_ji  for all i > j

A group's scales are set when its first column is reached, from weights that have made up for the groups before.
Source: Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbtrain.spiking.quantize import LARGEST, scale_of

BLOCK = 128
DAMPING = 0.01
_DAMPINGS = 5


class Hessian:
    """The sum of x^T x over a layer's inputs, fp32 (fp64 for fp64 inputs).

    matrix [D, D]. num_tokens: rows of x so far.
    """

    def __init__(self, num_inputs: int, *, device, dtype: torch.dtype = torch.float32):
        self.matrix = torch.zeros(num_inputs, num_inputs, device=device, dtype=dtype)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Inputs x [..., D] of more tokens."""
        rows = x.detach().flatten(0, -2).to(self.matrix.dtype)
        self.matrix.addmm_(rows.T, rows)
        self.num_tokens += len(rows)


def gptq(weight: Tensor, hessian: Tensor, *, group: int, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """(int8 [F, D], scales [F, D / group, 1]) of a weight [F, D], with the Hessian [D, D] of its inputs.

    damping: this share of the Hessian's mean diagonal is added to the diagonal; ten times more where the result cannot
        be inverted, and again. Inputs that never were anything but 0 round to nearest, whatever the others do.
    The weight is not changed; fp32 inside (fp64 for an fp64 Hessian). Raises ValueError, one line, where group does not
    divide D and where weight or Hessian are not finite.
    """
    num_inputs = weight.shape[1]
    if group < 1 or num_inputs % group:
        raise ValueError(f"groups of {group} input channels do not divide {num_inputs}; choose a divisor")
    factor = _inverse_factor(hessian, damping)
    left = weight.detach().to(factor.dtype, copy=True)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], num_inputs // group, 1, dtype=factor.dtype, device=weight.device)
    for first in range(0, num_inputs, group):
        scale = scale_of(left[:, first : first + group].abs().amax(1))
        scales[:, first // group, 0] = scale
        for start in range(first, first + group, BLOCK):
            stop = min(start + BLOCK, first + group)
            errors = _round_block(left, integers, scale, factor, start, stop)
            left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return integers, scales


def _round_block(left: Tensor, integers: Tensor, scale: Tensor, factor: Tensor, start: int, stop: int) -> Tensor:
    """Round columns start to stop-1, each corrected by those before it. Returns their errors [F, stop - start]."""
    block, inside = left[:, start:stop], factor[start:stop, start:stop]
    errors = torch.empty_like(block)
    diagonal = inside.diagonal().tolist()
    for j, pivot in enumerate(diagonal):
        column = block[:, j]
        rounded = (column / scale).round_().clamp_(-LARGEST, LARGEST)
        integers[:, start + j] = rounded.to(torch.int8)
        errors[:, j] = (column - rounded * scale) / pivot
        block[:, j + 1 :].addr_(errors[:, j], inside[j, j + 1 :], alpha=-1)
    return errors


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U upper triangular [D, D], U^T U the inverse of the damped Hessian."""
    if not hessian.isfinite().all():
        raise ValueError("inputs of a layer are not finite and calibrate nothing; use another checkpoint or data")
    diagonal = hessian.diagonal()
    dead, mean = diagonal <= 0, float(diagonal.mean())
    for attempt in range(_DAMPINGS):
        damped = hessian.clone()
        damped.diagonal().copy_(torch.where(dead, 1.0, diagonal + damping * 10**attempt * mean))
        damped, failed = torch.linalg.cholesky_ex(damped)  # by one name: at 7B shapes each is more than a gigabyte
        if int(failed):
            continue
        damped = torch.cholesky_inverse(damped)
        damped, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if int(failed) == 0:
            return damped
    raise ValueError("the inputs' Hessian cannot be inverted; calibrate with more samples")

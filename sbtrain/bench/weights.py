"""Random weights that every peer starts from: a function of the parameter's global name, drawn on the device."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from parallel.cpu import on_meta
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.schema import ModelConfig, Precision
from sbtrain.model.build import build_model, global_parameters


def global_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every parameter of the engine's model by global name, from a build on the meta device."""
    with Mesh.build(Layout()) as mesh, on_meta():
        built = build_model(model, mesh, precision=Precision.bf16, seq_len=model.window)
    return {name: parameter.shape for name, parameter in global_parameters(built).items()}


def draw(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """fp32: matrices N(0, 1/columns), biases N(0, 0.02²), norms N(1, 0.1²); the same on every call.

    Neither tiny nor trivial, so that a wrong layer or a forgotten weight shows in the loss.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, device=device)
    if len(shape) > 1:
        return noise.mul_(shape[-1] ** -0.5)
    return noise.mul_(0.1).add_(1) if "norm" in name else noise.mul_(0.02)

"""Whether upcycled FFNs still compute what the dense ones did: measured when the first weights are set."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from parallel.mesh import Mesh
from parallel.schedule import chunks_of, in_rounds, run_rows
from parallel.sequence.shard import Row
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.calibrate import total_over_ranks
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import Part
from sbtrain.convert.upcycle import ffn_rows
from sbtrain.model.mlp import GatedMLP
from sbtrain.spiking.neuron import Sites


def dense_of(model: ModelConfig) -> ModelConfig:
    """The same mixers with the dense FFNs that the experts were copied from, without spikes."""
    return replace(model, pattern=model.pattern.replace(":m", ""), spiking=SpikingConfig())


def moe_layers(model: ModelConfig) -> list[int]:
    """0-based indices of the layers whose FFN is a mixture of experts."""
    kinds = parse_pattern(model.pattern, model.num_layers)
    return [layer for layer, kind in enumerate(kinds) if kind.moe]


@torch.no_grad()
def ffn_differences(model, mesh: Mesh, row: Row, *, path: str) -> dict[int, tuple[float, float]]:
    """By layer: the relative error of an upcycled FFN's output, and the mean sum of a token's routing weights.

    The error is the norm of the difference from the dense FFN, read from the checkpoint at path, over that one's norm,
    on what the layer is given when the model reads `row`; meta tokens are left out. Collective; the same everywhere.
    """
    chunks = chunks_of(model)
    config = chunks[0].model_config
    sums = torch.zeros(config.num_layers, 4, dtype=torch.float64, device=mesh.device)
    with ExitStack() as stack:
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            if not layer.kind.moe:
                continue
            judge = _Judge(layer, chunks[0], mesh, sums=sums[layer.index], path=path)
            stack.callback(layer.mlp.router.register_forward_hook(judge.see_router).remove)
            stack.callback(layer.mlp.register_forward_hook(judge.see_ffn).remove)
        for chunk in chunks:
            stack.callback(chunk.train, chunk.training)
            chunk.eval()
        run_rows(chunks, mesh, [row] * in_rounds(1, mesh))
    if mesh.dp_rank > 0:  # they have read the same row
        sums.zero_()
    total_over_ranks(sums, mesh, tp=True)
    rows = {layer: sums[layer].tolist() for layer in moe_layers(config)}
    return {layer: ((wrong / right) ** 0.5, weight / count) for layer, (wrong, right, weight, count) in rows.items()}


class _Judge:
    """Compares one layer's experts with its dense FFN as rows come by."""

    def __init__(self, layer, model, mesh: Mesh, *, sums: Tensor, path: str):
        self.layer, self.model, self.mesh, self.sums, self.path = layer, model, mesh, sums, path

    def see_router(self, module, args, output) -> None:
        """Each tp rank routes tokens of its own; args: rows and which of them count, output: weights and experts."""
        counted = args[1]
        self.sums[2] += (output[0].double().sum(-1) * counted).sum()
        self.sums[3] += counted.sum()

    def see_ffn(self, module, args, output: Tensor) -> None:
        """args: hidden states, and how many of their first rows are meta tokens."""
        num_meta = args[1] if len(args) > 1 else 0
        expected = self._dense()(args[0])[num_meta:].double()
        wrong = (output[num_meta:].double() - expected).square().sum()
        if self.mesh.layout.tp_sequence_parallel or self.mesh.tp_rank == 0:
            self.sums[:2] += torch.stack([wrong, expected.square().sum()])

    def _dense(self) -> GatedMLP:
        """This tp rank's part of the dense FFN, which the caller drops."""
        config, index = self.model.model_config, self.layer.index
        nowhere = Sites(SpikingConfig(), layer=index, tp_group=self.mesh.groups.tp)
        ffn = GatedMLP(self.model.config, groups=self.mesh.groups, sites=nowhere)
        reader, part = HFCheckpoint(self.path), Part(tp_rank=self.mesh.tp_rank, tp=self.mesh.layout.tp)
        parameters = dict(ffn.named_parameters())
        for row in ffn_rows("", f"model.layers.{index}.mlp", config, moe=False, from_dense=True):
            row.copy_into(parameters[row.name.removeprefix(".")], reader, part)
        return ffn

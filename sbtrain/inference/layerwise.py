"""A model run over many samples layer by layer, so that the device holds the weights of one layer and no more.

Hidden states wait on the host, in the model's dtype; each sample's comes to the device for its turn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.sequence.shard import Documents, Row, shard_row
from sbtrain.config.model_schema import MetaPositions, ModelConfig
from sbtrain.config.schema import Precision
from sbtrain.convert.reader import GlobalReader
from sbtrain.convert.weights import EMBEDDING, META
from sbtrain.model.build import build_layer, transformer_config
from sbtrain.model.decoder import DecoderLayer


class HiddenStates:
    """What enters the next layer of a model, for every sample. mesh: of one rank."""

    def __init__(self, reader: GlobalReader, model: ModelConfig, mesh: Mesh, rows: list[Row], *, precision: Precision):
        """rows: a sample each, all of one length. reader: where weights come from."""
        self.model, self.mesh, self.precision = model, mesh, precision
        self._reader, self._rows = reader, rows
        self._hidden = self._embedded()

    def weight(self, name: str) -> Tensor:
        """A weight as the checkpoint has it, in fp32 on the device, whatever the precision of the layers."""
        return self._reader.get(name).to(device=self.mesh.device, dtype=torch.float32)

    @torch.no_grad()
    def layer(self, index: int) -> DecoderLayer:
        """The layer that these states enter, on the device, with its weights."""
        seq_len = len(self._rows[0].tokens)
        layer = build_layer(self.model, self.mesh, index, precision=self.precision, seq_len=seq_len).eval()
        for name, parameter in layer.named_parameters():
            tensor = self._reader.get(f"decoder.layers.{index}.{name}")
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"decoder.layers.{index}.{name} is {list(tensor.shape)} in the checkpoint, the recipe describes "
                    f"{list(parameter.shape)}; restore the recipe.yaml of this run"
                )
            parameter.copy_(tensor)
        return layer

    @torch.no_grad()
    def advance(self, layer: DecoderLayer) -> None:
        """Move all samples through the layer."""
        for i, row in enumerate(self._rows):
            self._hidden[i] = layer(*self._inputs(i, row)).cpu()

    @torch.no_grad()
    def inputs_of(self, layer: DecoderLayer, modules: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> None:
        """Call see(name, x) with what each of the layer's modules reads, of every sample. The rest is not computed."""
        unseen: set[str] = set()

        def given(name: str, x: Tensor) -> None:
            see(name, x)
            unseen.discard(name)
            if not unseen:
                raise _AllSeen

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: given(name, args[0]))
            for name, module in modules.items()
        ]
        try:
            for i, row in enumerate(self._rows):
                unseen.update(modules)
                try:
                    layer(*self._inputs(i, row))
                except _AllSeen:
                    continue
        finally:
            for hook in hooks:
                hook.remove()

    def _inputs(self, i: int, row: Row) -> tuple[Tensor, Documents]:
        device = self.mesh.device
        _, _, documents = shard_row(row.to(device), rank=0, size=1)
        if self.model.meta.num_tokens:
            rotated = self.model.meta.positions is MetaPositions.prepended
            documents = documents.with_meta(self.model.meta.num_tokens, rotated=rotated)
        return self._hidden[i].to(device), documents

    def _embedded(self) -> list[Tensor]:
        """The embeddings of every sample's tokens [T,1,D] behind those of meta tokens, on the host."""
        dtype = transformer_config(self.model, self.mesh.layout, self.precision).params_dtype
        embedding = self._reader.get(EMBEDDING)
        meta = [self._reader.get(META)] if self.model.meta.num_tokens else []
        return [torch.cat([*meta, embedding[row.tokens]])[:, None].to(dtype) for row in self._rows]


class _AllSeen(Exception):
    """Ends a forward pass that has shown what it was run for."""

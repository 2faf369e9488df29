"""Calibration on a GPU: a layer of the 7B's shape in 15 GB, and kernels that see what the CPU sees."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import Row
from sbtrain.config.model_schema import Gate, GLAConfig, ModelConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.mapping import Fill
from sbtrain.convert.weights import table
from sbtrain.inference.calibrate import calibrate_layer
from sbtrain.inference.layerwise import HiddenStates

pytestmark = pytest.mark.gpu

SEVEN_B = ModelConfig(
    pattern="LS", vocab_size=1024, hidden_size=3584, num_layers=2, num_heads=28, num_kv_heads=4, head_dim=128,
    ffn_size=18944, norm_eps=1e-6, rope_theta=1e6, max_positions=4096, tie_embeddings=False, qkv_bias=True,
    qk_norm=False, window=4097, gla=GLAConfig(gate=Gate.full_rank),
    spiking=SpikingConfig(enabled=True, spike_down_proj=True),
)  # fmt: skip
LIMIT_BYTES = 15e9


class RandomReader:
    """Weights of a model nobody trained."""

    def __init__(self, model: ModelConfig):
        self._rows = {row.name: row for row in table(model)}

    def get(self, name: str) -> torch.Tensor:
        row = self._rows[name]
        generator = torch.Generator().manual_seed(len(name))
        return torch.ones(row.shape) if row.fill is Fill.norm else 0.02 * torch.randn(row.shape, generator=generator)


def test_a_7b_layer_is_calibrated_in_15_gb():
    """The largest case: the down projection too. More layers and samples need no more (test_int8_calibration)."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(tokens, tokens, torch.tensor([0, 700, 2048], dtype=torch.int32))
        for tokens in torch.randint(0, 1024, (16, 2048), generator=generator)
    ]
    with Mesh.build(Layout()) as mesh:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        states = HiddenStates(RandomReader(SEVEN_B), SEVEN_B, mesh, rows, precision=Precision.bf16)
        for index in range(2):
            weights, errors = calibrate_layer(states, index, method="gptq")
            print({name: (f"{e['gptq']:.3e}", f"{e['rtn']:.3e}") for name, e in errors.items()})
            assert all(error["gptq"] < error["rtn"] for error in errors.values())
            assert all(integers.dtype == torch.int8 for integers, _ in weights.values())
        most = torch.cuda.max_memory_allocated()
        print(f"device memory at most {most / 1e9:.2f} GB, reserved {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
        assert most < LIMIT_BYTES

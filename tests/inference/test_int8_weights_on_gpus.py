"""Models on INT8 weights on a GPU: what kernels make of integers is what float weights make of the spikes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ops
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import Gate, GLAConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.calibrated import int8_names
from sbtrain.inference.generate import generate_ids, prefill
from sbtrain.inference.int8 import fill_int8, swap
from sbtrain.model.build import build_model, global_parameters
from sbtrain.spiking.quantize import dequantize, group_scales, quantize
from sharding import global_state
from tiny_model import MODEL

pytestmark = pytest.mark.gpu

WIDE = replace(
    MODEL, num_layers=2, hidden_size=512, num_heads=4, num_kv_heads=2, head_dim=128, ffn_size=768, window=65,
    gla=GLAConfig(gate=Gate.full_rank), spiking=SpikingConfig(enabled=True, spike_down_proj=True),
)  # fmt: skip


class Rounded:
    """The INT8 model of random weights, rounded to nearest."""

    def __init__(self):
        self.int8_names, self._state = frozenset(int8_names(WIDE)), global_state(WIDE)

    def get(self, name):
        return dequantize(*self.pair(name)) if name in self.int8_names else self._state[name]

    def pair(self, name):
        scales = group_scales(self._state[name], WIDE.spiking.weight_group)
        return quantize(self._state[name], scales), scales


def built(mesh, precision, *, int8: bool):
    """(model, its INT8 projections by the weight's name)."""
    model, weights = build_model(WIDE, mesh, precision=precision, seq_len=512).eval(), Rounded()
    projections = swap(model, sorted(weights.int8_names)) if int8 else {}
    fill_int8(model, projections, weights)
    return model, projections


@pytest.mark.parametrize("precision", list(Precision))
def test_every_projection_for_few_and_many_tokens(precision):
    """1e-5 in fp32, 1e-2 in bf16: the op's own tolerances, against sums in float64 of spike_count's integers.

    Its kernel and that of the projection add |x| in another order: where a threshold has another last bit, a count near
    a half may be another integer. In fp32 one token in fifty may have such a count, one of hundreds, which moves it by
    less than 2e-2.
    """
    with Mesh.build(Layout()) as mesh:
        weights, (_, projections) = Rounded(), built(mesh, precision, int8=True)
        assert ops.resolve("spike_linear").backend != "reference" or mesh.device.type == "cpu"
        for name, projection in projections.items():
            integers, scales = (tensor.double() for tensor in weights.pair(name))
            weight = dequantize(integers, scales).to(mesh.device)
            for num_tokens in (1, 12, 100, 300):
                x = torch.randn(num_tokens, 1, weight.shape[1], device=mesh.device, dtype=_dtype(precision))
                count, threshold = ops.spike_count(x, k=projection.k)
                expected = count.double() * threshold.double() @ weight.T
                expected += 0 if projection.bias is None else projection.bias.double()
                y, _ = projection(x)
                errors = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
                most = 1e-5 if precision is Precision.fp32 else 1e-2
                assert (errors >= most).sum() <= num_tokens // 50 and errors.max() < 2e-2, (name, num_tokens)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision is Precision.fp32 else torch.bfloat16


def test_a_prompt_and_what_is_written_behind_it():
    """In fp32; sums rounded otherwise may flip counts, hence the wide limit. Float weights' memory is given back."""
    with Mesh.build(Layout()) as mesh:
        floats, _ = built(mesh, Precision.fp32, int8=False)
        sizes = {name: parameter.numel() for name, parameter in global_parameters(floats).items()}
        tokens = torch.randint(WIDE.vocab_size, (300,), generator=torch.Generator().manual_seed(0)).to(mesh.device)
        expected, before = prefill(floats, tokens)[0], torch.cuda.memory_allocated()
        int8, projections = built(mesh, Precision.fp32, int8=True)
        saved = sum(3 * sizes[name] - 4 * projections[name].weight_scale.numel() for name in projections)
        used = torch.cuda.memory_allocated() - before
        logits = prefill(int8, tokens)[0]
        assert (logits - expected).norm() < 0.1 * expected.norm()
        assert mesh.device.type == "cpu" or used < 4 * sum(sizes.values()) - saved + 2**20
        written = [list(generate_ids(model, tokens.tolist(), max_new_tokens=8)) for model in (floats, int8)]
        assert len(written[1]) == 8, written

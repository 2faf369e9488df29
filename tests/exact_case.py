"""One training step of a small model in float64 on any layout: for what rounds, where a last bit may decide."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.schedule import run_rows
from parallel.sequence.shard import IGNORE, Row
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.schema import ModelConfig, Precision, Recompute
from sbtrain.model import build
from sbtrain.spiking.neuron import Neuron, neurons, set_share
from sharding import global_state, local_shard


def exact_chunks(config: ModelConfig, mesh: Mesh, *, seq_len: int, **options) -> list:
    """This rank's chunks in float64, with the weights of global_state, rotary frequencies as exact as they come."""
    plain = build.transformer_config

    def exact_config(*args):
        wide = plain(*args)
        wide.params_dtype = wide.pipeline_dtype = torch.float64
        return wide

    build.transformer_config = exact_config
    try:
        chunks = build.build_chunks(config, mesh, precision=Precision.fp32, seq_len=seq_len, **options)
    finally:
        build.transformer_config = plain
    half = config.head_dim // 2
    frequencies = torch.tensor([config.rope_theta ** (-c / half) for c in range(half)], dtype=torch.float64)
    for module in (module for chunk in chunks for module in chunk.modules()):
        if getattr(module, "rotary", None) is not None:
            module.rotary._inv_freq = frequencies
    state = global_state(config, dtype=torch.float64)
    where = dict(tp_rank=mesh.tp_rank, tp=mesh.layout.tp, ep_rank=mesh.ep_rank, ep=mesh.layout.ep)
    before = config.pair.norms_before_projection
    with torch.no_grad():
        for name, parameter in build.global_parameters(*chunks).items():
            parameter.copy_(local_shard(name, state[name], norms_before_projection=before, **where))
    return chunks


def exact_step(
    rank: int,
    layout: Layout,
    config: ModelConfig,
    rows: list[Row],
    *,
    recompute: Recompute = Recompute.none,
    experts: ExpertsConfig = PLAIN,
    share: float = 1.0,
) -> dict:
    """Mean loss, this rank's gradients of it by global name, summed over the ranks as an engine does, and its inputs
    of neurons as [(layer, site, counted times)], by what observers are told."""
    with Mesh.build(layout) as mesh:
        options = dict(recompute=recompute, experts=experts)
        chunks = exact_chunks(config, mesh, seq_len=len(rows[0].tokens), **options)
        seen: list[tuple[int, str, int]] = []
        for chunk in chunks:
            set_share(chunk.train(), share)
            for neuron in neurons(chunk):
                neuron.observer = _counter(seen)
        num_tokens = sum(int((row.labels != IGNORE).sum()) for row in rows)
        sums = run_rows(chunks, mesh, rows[mesh.dp_rank :: mesh.dp], loss_scale=1 / num_tokens).sum(0)
        dist.all_reduce(sums, group=mesh.groups.dp_cp)
        grads = {}
        for name, parameter in build.global_parameters(*chunks).items():
            grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            over_experts = not getattr(parameter, "allreduce", True)
            dist.all_reduce(grads[name], group=mesh.groups.expt_dp if over_experts else mesh.groups.dp_cp)
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(grads[name], group=mesh.groups.tp)
        place = dict(tp_rank=mesh.tp_rank, tp=layout.tp, ep_rank=mesh.ep_rank, ep=layout.ep)
        place["norms_before_projection"] = config.pair.norms_before_projection
        return dict(loss=float(sums[0]) / num_tokens, grads=grads, place=place, seen=seen)


def _counter(seen: list):
    def observe(neuron: Neuron, x: Tensor, mean_abs: Tensor | None, counted: Tensor | None) -> None:
        seen.append((neuron.layer, neuron.site, x.numel() if counted is None else len(counted) * x.shape[-1]))

    return observe


def check_exact(results: list[dict], whole: dict, *, rel: float = 1e-9) -> None:
    """Losses and gradients of a layout are those of one rank, as far as float64 goes."""
    total = sum(float(grad.square().sum()) for grad in whole["grads"].values()) ** 0.5
    met = set()
    for result in results:
        assert abs(result["loss"] - whole["loss"]) <= rel * whole["loss"]
        for name, grad in result["grads"].items():
            expected = local_shard(name, whole["grads"][name], **result["place"])
            assert float((grad - expected).norm()) <= rel * max(float(expected.norm()), 1e-3 * total), name
            met.add(name)
    assert met == set(whole["grads"])

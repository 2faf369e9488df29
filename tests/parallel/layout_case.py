"""One training step of a small model on a layout, in a form that different layouts can be compared in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from parallel import engine as engine_module
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.schedule import chunks_of
from parallel.sequence.shard import IGNORE, Row
from sbtrain.config.model_schema import GLAConfig, ModelConfig
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.schema import Precision, Recompute
from sbtrain.model.build import build_chunks, global_parameters
from sbtrain.moe.router import Router
from sequence_case import counted
from sharding import global_state, local_shard

ADAM = dict(beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.1, clip_grad=1.0, new_lr_scale=2.0)


def small_model(**changes) -> ModelConfig:
    """4 layers of each trainable kind, 4/2 heads; the vocabulary needs padding."""
    shape = dict(
        pattern="LSFL",
        vocab_size=120,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=48,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_positions=256,
        tie_embeddings=False,
        qkv_bias=True,
        qk_norm=False,
        window=7,
        gla=GLAConfig(gate_rank=4),
        vocab_multiple=32,
    )
    return ModelConfig(**{**shape, **changes})


def packed_rows(num_rows: int, num_tokens: int, vocab_size: int, *, seed: int = 1) -> list[Row]:
    """Rows of packed documents of odd lengths, one of them empty and one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        cuts = torch.randperm(num_tokens - 1, generator=generator)[:4].sort().values + 1
        cuts = [0, 1, *cuts.tolist(), int(cuts[-1]), num_tokens]
        tokens = torch.randint(vocab_size, (num_tokens + 1,), generator=generator)
        labels = tokens[1:].clone()
        labels[torch.tensor(sorted(set(cuts[1:]))) - 1] = IGNORE
        rows.append(Row(tokens[:-1], labels, torch.tensor(sorted(cuts), dtype=torch.int32)))
    return rows


def rows_of(layouts: list[list[int]], vocab_size: int, *, seed: int = 1) -> list[Row]:
    """A row of random tokens for each list of document edges, all of one length."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for edges in layouts:
        tokens = torch.randint(vocab_size, (edges[-1] + 1,), generator=generator)
        labels = tokens[1:].clone()
        labels[torch.tensor(sorted(set(edges) - {0})) - 1] = IGNORE
        rows.append(Row(tokens[:-1], labels, torch.tensor(edges, dtype=torch.int32)))
    return rows


def fill(chunks, config: ModelConfig, mesh: Mesh, *, seed: int = 0) -> None:
    """Set this rank's parameters from the global random state. chunks: of its stage, or the stage that is one."""
    state, before = global_state(config, seed=seed), config.pair.norms_before_projection
    for name, parameter in global_parameters(*chunks_of(chunks)).items():
        source = "embedding.word_embeddings.weight" if name == "output_layer.weight" and config.tie_embeddings else name
        with torch.no_grad():
            where = dict(coordinates(mesh), norms_before_projection=before)
            parameter.copy_(local_shard(name, state[source], **where))


def coordinates(mesh: Mesh) -> dict[str, int]:
    """Where this rank stands among the shards of a tensor."""
    return dict(tp_rank=mesh.tp_rank, tp=mesh.layout.tp, ep_rank=mesh.groups.ep.rank(), ep=mesh.groups.ep.size())


def build_engine(
    config: ModelConfig,
    mesh: Mesh,
    *,
    seq_len: int,
    precision=Precision.fp32,
    recompute=Recompute.none,
    experts: ExpertsConfig = PLAIN,
):
    """An engine over the global random weights."""
    options = dict(precision=precision, recompute=recompute, experts=experts)
    chunks = build_chunks(config, mesh, seq_len=seq_len, **options)
    fill(chunks, config, mesh)
    return Engine(chunks, mesh, adam=ADAM)


def carried(rank: int, layout: Layout, config: ModelConfig, rows: list[Row]) -> list[tuple[str, int]]:
    """The collectives of sequence parallelism in the forward and backward passes of one step, by sequence_case."""
    calls: list[tuple[str, int]] = []
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        engine = build_engine(config, mesh, seq_len=len(rows[0].tokens))
        stack.callback(engine.close)
        with counted(calls):
            engine.forward_backward(rows)
    return calls


def one_step(
    rank: int,
    layout: Layout,
    config: ModelConfig,
    rows: list[Row],
    recompute=Recompute.none,
    num_steps: int = 1,
    precision: Precision = Precision.fp32,
    experts: ExpertsConfig = PLAIN,
    forced: list[float] | None = None,
):
    """Loss, gradient norm, this rank's gradients by global name, what cuts them, and the loss after a step."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        options = dict(recompute=recompute, precision=precision, experts=experts)
        engine = build_engine(config, mesh, seq_len=len(rows[0].tokens), **options)
        for module in (module for model in engine.models for module in model.modules()):
            if isinstance(module, Router) and forced is not None:
                module.forced = torch.tensor(forced, device=mesh.device)
        stack.callback(engine.close)
        mine = rows[mesh.dp_rank :: mesh.dp]
        first = engine.forward_backward(mine)
        engine.gather_gradients()
        grads = {name: p.main_grad.cpu().clone() for name, p in global_parameters(*engine.models).items()}
        norm = engine.step(lr=1e-2)
        metrics = [engine.metrics]
        after = engine.forward_backward(mine)
        for _ in range(num_steps - 1):
            engine.step(lr=1e-2)
            metrics.append(engine.metrics)
            after = engine.forward_backward(mine)
        engine.gather_gradients()
        return dict(
            last_grads={name: p.main_grad.cpu().clone() for name, p in global_parameters(*engine.models).items()},
            loss=first.mean,
            num_tokens=first.num_tokens,
            grad_norm=norm,
            after=after.mean,
            grads=grads,
            metrics=metrics,
            place=dict(coordinates(mesh), norms_before_projection=config.pair.norms_before_projection),
        )


@contextmanager
def overlapped() -> Iterator[None]:
    """Engines that are built inside reduce gradients while the backward pass runs, as on GPUs."""
    plain, no_syncs = engine_module.GradientBuffers, []

    class Overlapped(plain):
        def __init__(self, config, model, **options):
            super().__init__(config, model, **{**options, "overlap": True})
            no_syncs.append(self.no_sync)
            config.no_sync_func = no_syncs if config.virtual_pipeline_model_parallel_size else self.no_sync

    engine_module.GradientBuffers = Overlapped
    try:
        yield
    finally:
        engine_module.GradientBuffers = plain


def overlapped_step(rank: int, *args, **kwargs):
    """one_step whose gradients are reduced while the backward pass runs, as on GPUs."""
    with overlapped():
        return one_step(rank, *args, **kwargs)


def check_equal(results: list[dict], whole: dict) -> None:
    """The design's equality: loss 1e-5 relative, each gradient within 1e-4 of max(its norm, a share of the total)."""
    grads = whole["grads"]
    total = math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values()))
    floor = 1e-3 * total / math.sqrt(len(grads))
    seen = set()
    for result in results:
        assert result["num_tokens"] == whole["num_tokens"]
        for key in ("loss", "grad_norm", "after"):
            assert result[key] == pytest.approx(whole[key], rel=1e-5), key
        for name, grad in result["grads"].items():
            tied = name == "output_layer.weight" and name not in grads
            seen.add(name)
            source = grads["embedding.word_embeddings.weight" if tied else name]
            expected = local_shard(name, source, **result["place"])
            distance = float((grad - expected).norm())
            assert distance <= 1e-4 * max(float(expected.norm()), floor), name
    assert seen >= set(grads)

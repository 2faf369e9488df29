"""One training step of a small model on a layout, in a form that different layouts can be compared in."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import IGNORE, Row
from sbtrain.config.schema import GLAConfig, ModelConfig, Precision, Recompute
from sbtrain.model.build import build_model, global_parameters
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


def fill(model, config: ModelConfig, mesh: Mesh, *, seed: int = 0) -> None:
    """Set this rank's parameters from the global random state."""
    state = global_state(config, seed=seed)
    for name, parameter in global_parameters(model).items():
        source = "embedding.word_embeddings.weight" if name == "output_layer.weight" and config.tie_embeddings else name
        with torch.no_grad():
            parameter.copy_(local_shard(name, state[source], tp_rank=mesh.tp_rank, tp=mesh.layout.tp))


def build_engine(config: ModelConfig, mesh: Mesh, *, seq_len: int, precision=Precision.fp32, recompute=Recompute.none):
    """An engine over the global random weights."""
    model = build_model(config, mesh, precision=precision, recompute=recompute, seq_len=seq_len)
    fill(model, config, mesh)
    return Engine(model, mesh, adam=ADAM)


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
):
    """Loss, gradient norm, this rank's gradients by global name with its tp coordinates, and the loss after a step."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        engine = build_engine(config, mesh, seq_len=len(rows[0].tokens), recompute=recompute, precision=precision)
        stack.callback(engine.close)
        mine = rows[mesh.dp_rank :: mesh.dp]
        first = engine.forward_backward(mine)
        engine.gather_gradients()
        grads = {name: p.main_grad.cpu().clone() for name, p in global_parameters(engine.model).items()}
        norm = engine.step(lr=1e-2)
        after = [engine.forward_backward(mine) for _ in range(num_steps)][-1]
        return dict(
            loss=first.mean,
            num_tokens=first.num_tokens,
            grad_norm=norm,
            after=after.mean,
            grads=grads,
            tp_rank=mesh.tp_rank,
            tp=layout.tp,
        )

"""Pairs and meta tokens in checkpoints: written by one layout, read by another, optimizer included."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from layout_case import build_engine, packed_rows, small_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.model_schema import MetaConfig, PairConfig
from sbtrain.convert.reader import CheckpointReader
from sharding import global_state

CHAIN = [(2, Layout(tp=2)), (2, Layout(pp=2)), (4, Layout(tp=2, sp=2, tp_sequence_parallel=True)), (1, Layout())]


def step_from(rank: int, layout: Layout, config, folder: str, step: int) -> float:
    """The loss before the step, from the newest checkpoint or the first weights; leaves the next checkpoint."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        engine = build_engine(config, mesh, seq_len=48)
        stack.callback(engine.close)
        store = Store(Path(folder), Ledger(Path(folder)), keep_last=0, op_table={"hash": "0123"})
        store.restore(engine)
        loss = engine.forward_backward(packed_rows(2, 48, 120, seed=step)).mean
        engine.step(lr=1e-3)
        store.save(engine, RunState(stage="a", step=step + 1, tokens=step + 1))
        return loss


@pytest.mark.parametrize("shared", [False, True])
def test_layouts_go_on_from_one_anothers_checkpoints(run_ranks, tmp_path, shared):
    pair, meta = PairConfig(shared_projections=shared), MetaConfig(num_tokens=6)
    config = small_model(pattern="(LS)(LF)", pair=pair, meta=meta)
    losses = {}
    for name, chain in {"alone": [(1, Layout())] * len(CHAIN), "chain": CHAIN}.items():
        for step, (num_ranks, layout) in enumerate(chain):
            found = run_ranks(num_ranks)(step_from, layout, config, str(tmp_path / name), step)
            losses.setdefault(name, []).append(found[0])
    assert losses["chain"] == pytest.approx(losses["alone"], rel=1e-5)
    whole = global_state(config)
    for step in range(1, len(CHAIN) + 1):
        reader = CheckpointReader(tmp_path / "chain" / "checkpoints" / f"step_{step}")
        assert all(reader.get(name).shape == tensor.shape for name, tensor in whole.items())

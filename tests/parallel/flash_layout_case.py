"""A model saved at one step by both stores, which waits and which does not, and by megatron."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from layout_case import build_engine
from megatron_state import save_as_megatron
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.schema import Precision


def save_both(rank: int, layout: Layout, model, rows, folder: str, precision: Precision = Precision.fp32) -> dict:
    """Train two steps, save below a/ (synchronous) and b/ (in the background, while a third step changes everything).

    And to m/ with megatron's own save. Then restore from b/. Returns whether this rank's share is what it was at the
    second step, and its bytes.
    """
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        engine = build_engine(model, mesh, seq_len=len(rows[0].tokens), precision=precision)
        stack.callback(engine.close)
        for _ in range(2):
            _train(engine, rows)
        state = RunState(stage="a", step=2)
        stores = [_store(Path(folder) / name, stack, background=name == "b") for name in "ab"]
        for store in stores:
            store.save(engine, state)
        if rank == 0:
            Path(folder, "m").mkdir()
        dist.barrier()
        save_as_megatron(engine, str(Path(folder, "m")))
        before = _own(engine)
        _train(engine, rows)
        changed = sum(not torch.equal(x, y) for x, y in zip(before, _own(engine)))
        stores[1].settle()
        stores[1].restore(engine)
        after = _own(engine)
        same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        return dict(same=same, changed=changed, num_bytes=sum(x.numel() * x.element_size() for x in before))


def _train(engine, rows) -> None:
    engine.forward_backward(rows[engine.mesh.dp_rank :: engine.mesh.dp])
    engine.step(lr=1e-2)


def _store(folder: Path, stack: ExitStack, *, background: bool) -> Store:
    store = Store(folder, Ledger(folder), keep_last=0, op_table={"hash": "0"}, asynchronous=background)
    stack.callback(store.close)
    return store


def _own(engine) -> list[torch.Tensor]:
    return [piece.read().clone() for piece in engine.own_state()[0]]

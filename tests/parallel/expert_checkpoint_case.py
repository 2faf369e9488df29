"""Save a mixture of experts on one layout and go on from it on another."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from layout_case import build_engine, coordinates
from megatron_state import sharded_state
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.model.build import global_parameters


def go_on(
    rank: int,
    layout: Layout,
    model,
    rows,
    folder: str,
    num_steps: int,
    save: bool = False,
    experts: ExpertsConfig = PLAIN,
) -> dict:
    """Restore the newest checkpoint of folder if there is one, report the state, train, and save if asked to.

    weights, optimizer: this rank's shards by global name before training (of the last step, if it saves).
    """
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        engine = build_engine(model, mesh, seq_len=len(rows[0].tokens), experts=experts)
        stack.callback(engine.close)
        store = Store(Path(folder), Ledger(Path(folder)), keep_last=0, op_table={"hash": "0"})
        state = store.restore(engine)
        found = None if state is None else state_of(engine)
        losses = []
        for _ in range(num_steps):
            losses.append(engine.forward_backward(rows[mesh.dp_rank :: mesh.dp]).mean)
            engine.step(lr=1e-2)
        if save:
            store.save(engine, RunState(stage="a", step=num_steps))
        return dict(loaded=found, last=state_of(engine), losses=losses, place=coordinates(mesh))


def state_of(engine) -> dict:
    """Weights, buffers and optimizer state of this rank by global name."""
    optimizer = {}
    for part in sharded_state(engine)["optimizer"]["parts"].values():
        for tensors in part.values():
            optimizer.update({tensor.key: tensor.data.clone() for tensor in tensors.values()})
    weights = {name: weight.detach().clone() for name, weight in global_parameters(engine.model).items()}
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers() if "router" in name}
    steps = {int(s["step"]) for part in engine.optimizer.chained_optimizers for s in moments_of(part)}
    return dict(weights=weights, optimizer=optimizer, buffers=buffers, steps=steps)


def moments_of(part) -> list:
    """Adam's state of one of megatron's optimizers; a stage without experts has an empty one."""
    return [] if part.optimizer is None else list(part.optimizer.state.values())

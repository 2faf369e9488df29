"""An engine that goes back while it is in use trains on bit by bit as it did from there: from the disk, from memory."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch

from expert_checkpoint_case import state_of
from layout_case import build_engine, overlapped, packed_rows, small_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.schema import Precision
from sbtrain.train.rollback import newest_state

MOE = MoEConfig(
    num_experts=8, top_k=2, expert_ffn_size=24, score=RouterScore.sigmoid, bias_update_rate=0.01, aux_loss_coeff=0.05
)
EXPERTS = small_model(pattern="L S F:m L:m", moe=MOE)
HOT = ExpertsConfig(max_copies=2, copy_above=1.2, release_below=0.8)
STEPS = [packed_rows(4, 48, 120, seed=seed) for seed in (1, 2, 3, 4)]


def go_back(rank: int, layout: Layout, model, experts, is_overlapped: bool, folder: str) -> list:
    """Train two steps, save, and train two more, twice: (losses and norms, state) of both ways."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        stack.enter_context(overlapped() if is_overlapped else nullcontext())
        engine = build_engine(model, mesh, seq_len=48, experts=experts)
        stack.callback(engine.close)
        store = Store(Path(folder), Ledger(Path(folder)), keep_last=0, op_table={"hash": "0"})
        assert newest_state("a", engine, store, 5) is None
        train(engine, STEPS[:2])
        store.save(engine, RunState(stage="a", step=2, stage_tokens=7))
        first = train(engine, STEPS[2:]), state_of(engine)
        assert newest_state("a", engine, store, 5) == RunState(stage="a", step=2, stage_tokens=7)
        again = train(engine, STEPS[2:]), state_of(engine)
        assert newest_state("b", engine, store, 5) == RunState(stage="b", step=2)
        return [first, again]


def train(engine, steps: list) -> list:
    mesh = engine.mesh
    return [(engine.forward_backward(rows[mesh.dp_rank :: mesh.dp]).mean, engine.step(lr=1e-2)) for rows in steps]


CASES = {
    "pp2": (2, Layout(pp=2), small_model(), PLAIN, True),
    "sp2": (2, Layout(sp=2), small_model(), PLAIN, False),
    "ep2_hot": (2, Layout(ep=2), EXPERTS, HOT, True),
    "tp2_dp2": (4, Layout(tp=2), small_model(), PLAIN, True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_steps_again_are_the_same(name, tmp_path, run_ranks):
    num_ranks, *case = CASES[name]
    for first, again in run_ranks(num_ranks)(go_back, *case, str(tmp_path)):
        assert first[0] == again[0] and first[1]["steps"] == again[1]["steps"] == {4}
        for part in ("weights", "optimizer", "buffers"):
            assert first[1][part].keys() == again[1][part].keys()
            for key, tensor in first[1][part].items():
                assert torch.equal(tensor, again[1][part][key]), key


class NoWriter:
    """Stands in for the writer process, where snapshots stay in memory."""

    def send(self, message) -> None:
        pass

    def close(self) -> None:
        pass


def from_both(rank: int, layout: Layout, model, experts, precision: Precision, folder: str) -> list:
    """Train two steps, save and take a snapshot; go back to either and train on: (state there, numbers, state)."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        engine = build_engine(model, mesh, seq_len=48, experts=experts, precision=precision)
        stack.callback(engine.close)
        stores = [Store(Path(folder) / name, Ledger(Path(folder) / name), keep_last=0, op_table={}) for name in "ab"]
        stores[1].flash = stores[1].in_background(_writer=NoWriter())
        stack.callback(stores[1].close)
        train(engine, STEPS[:2])
        state = RunState(stage="a", step=2, stage_tokens=7)
        stores[0].save(engine, state)
        stores[1].snapshot(engine, state)
        train(engine, STEPS[2:])
        found = []
        for store in stores:
            assert newest_state("a", engine, store, 4) == state
            found.append((whole_state_of(engine), train(engine, STEPS[2:]), whole_state_of(engine)))
        assert newest_state("a", engine, stores[1], 2) is None, "it was taken behind that step"
        return found


def whole_state_of(engine) -> dict:
    """Every tensor of this rank, with what it has replicas of, by name."""
    state = state_of(engine)
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    hot = {name: list(part.hot.chosen) for name, part in engine.model.named_modules() if hasattr(part, "hot")}
    named = {f"{part} {key}": tensor for part in ("weights", "optimizer") for key, tensor in state[part].items()}
    return dict(tensors={**named, **buffers}, steps=state["steps"], hot=hot)


BOTH = {
    "dp2_bf16": (2, Layout(), small_model(), PLAIN, Precision.bf16),
    "tp2_bf16": (2, Layout(tp=2), small_model(), PLAIN, Precision.bf16),
    "pp2_tied": (2, Layout(pp=2), small_model(tie_embeddings=True), PLAIN, Precision.fp32),
    "ep2_hot": (2, Layout(ep=2), EXPERTS, HOT, Precision.fp32),
    "tp2_sequence_parallel_dp2": (4, Layout(tp=2, tp_sequence_parallel=True), small_model(), PLAIN, Precision.bf16),
}


@pytest.mark.parametrize("name", BOTH)
def test_from_memory_it_is_what_it_is_from_the_disk(name, tmp_path, run_ranks):
    num_ranks, *case = BOTH[name]
    for disk, memory in run_ranks(num_ranks)(from_both, *case, str(tmp_path)):
        assert disk[1] == memory[1]
        for one, other in ((disk[0], memory[0]), (disk[2], memory[2])):
            assert one["steps"] == other["steps"] and one["hot"] == other["hot"]
            assert one["tensors"].keys() == other["tensors"].keys()
            for key, tensor in one["tensors"].items():
                assert torch.equal(tensor, other["tensors"][key]), key
        changed = [
            key for key, tensor in disk[0]["tensors"].items() if not torch.equal(tensor, disk[2]["tensors"][key])
        ]
        assert any(key.startswith("weights") for key in changed) and memory[2]["steps"] == {4}


def too_near(rank: int, folder: str) -> list:
    """Checkpoint at 2, snapshot at 3: where it leads if the snapshot was tried; before and after damage on the disk."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(Layout()))
        engine = build_engine(small_model(), mesh, seq_len=48)
        stack.callback(engine.close)
        store = Store(Path(folder), Ledger(Path(folder)), keep_last=0, op_table={"hash": "0"})
        store.save(engine, RunState(stage="a", step=2))
        store.flash = store.in_background(_writer=NoWriter())
        stack.callback(store.close)
        found = []
        for turn in range(2):
            store.snapshot(engine, RunState(stage="a", step=3))
            assert newest_state("a", engine, store, 5, tried=lambda state: state.step != 3).step == 3
            found.append(newest_state("a", engine, store, 5, tried=lambda state: state.step == 3).step)
            if rank == 0 and turn == 0:
                path = max((Path(folder) / "checkpoints/step_2").glob("__0_*.distcp"))
                raw = bytearray(path.read_bytes())
                raw[len(raw) // 2] ^= 1
                path.write_bytes(raw)
            torch.distributed.barrier()
        with pytest.raises(ValueError) as caught:
            newest_state("a", engine, store, 3)
        return [*found, str(caught.value)]


def test_a_snapshot_that_was_tried_and_a_damaged_checkpoint(tmp_path, run_ranks):
    """The checkpoint, while it is whole; then the snapshot once more, or no rollback where there is none."""
    first, second = run_ranks(2)(too_near, str(tmp_path))
    assert first == second and first[:2] == [2, 3]
    assert "step_2: __0_" in first[2] and "has not the checksum" in first[2] and "start the same" in first[2]

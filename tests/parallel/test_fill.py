"""Filling pieces from a checkpoint: cut otherwise there, refused where it is another model's, in little memory."""

from __future__ import annotations

import os
import pickle
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from layout_case import build_engine, packed_rows, small_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.pieces import Piece, boxes_of
from sbtrain.checkpoint.fill import fill
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store

WHOLE = torch.arange(35.0).view(5, 7)


@pytest.fixture
def folder(tmp_path):
    dcp.save({"a": WHOLE, "scale": torch.tensor(2.0)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def piece(start: int, end: int, **changes) -> Piece:
    target = torch.zeros(end - start)
    return replace(Piece("a", (5, 7), tuple(boxes_of((5, 7), start, end)), lambda: target), **changes)


def test_pieces_are_runs_of_a_tensor_that_is_stored_whole_and_read_once(folder, monkeypatch):
    number = torch.zeros(1)
    put = []
    scale = Piece("scale", (), tuple(boxes_of((), 0, 1)), lambda: number, write=lambda x: put.append(float(x)))
    parts = [piece(0, 9), piece(9, 10), piece(10, 35)]
    with monkeypatch.context() as patch:
        load = Mock(wraps=torch.load)
        patch.setattr(torch, "load", load)
        fill(folder, [*parts, scale])
    assert load.call_count == 2
    assert torch.equal(torch.cat([part.read() for part in parts]), WHOLE.flatten())
    assert put == [2.0] and float(number) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(name="b"), "it has no tensor b"),
        (dict(shape=(5, 8)), r"a has the shape \(5, 7\) there and \(5, 8\) in this model"),
        (dict(boxes=tuple(boxes_of((6, 7), 30, 40))), "it has not all of a"),
    ],
)
def test_what_is_not_there_is_refused(folder, changes, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        fill(folder, [piece(0, 10, **changes)])


def restore(rank: int, folder: str) -> tuple[float, float, bool]:
    """Bytes of the whole optimizer's state, how far the memory of a rank grew while restoring, and that it was."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(Layout()))
        model = replace(small_model(), hidden_size=256, ffn_size=1024, vocab_size=4000)
        engine = build_engine(model, mesh, seq_len=32)
        stack.callback(engine.close)
        rows = packed_rows(2, 32, 120)
        engine.forward_backward(rows[mesh.dp_rank :: mesh.dp])
        engine.step(lr=1e-3)
        store = Store(Path(folder), Ledger(Path(folder)), keep_last=0, op_table={"hash": "0"})
        store.save(engine, RunState(stage="a", step=1))
        before = [weight.detach().clone() for weight in engine.model.parameters()]
        for weight in engine.model.parameters():
            weight.detach().zero_()
        store.restore(engine)  # what the first one needs besides
        grown = []
        for _ in range(3):  # pages that the system took back meanwhile count as growth when they are touched again
            Path("/proc/self/clear_refs").write_text("5")
            there = _status_bytes("VmRSS")
            store.restore(engine)
            grown.append(_status_bytes("VmHWM") - there)
        same = all(torch.equal(x, y) for x, y in zip(before, engine.model.parameters(), strict=True))
        return 12.0 * sum(x.numel() for x in before), min(grown), same


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_rank_holds_the_whole_optimizer_while_it_is_restored(run_ranks, tmp_path):
    for whole, grown, same in run_ranks(2)(restore, str(tmp_path)):
        assert same and grown < whole / 3, f"{grown / 1e6:.0f} of {whole / 1e6:.0f} MB"


class Trap:
    """What unpickles this makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_no_code_of_the_index_runs(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(folder / "marker")))
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
        fill(folder, [piece(0, 35)])
    assert not (folder / "marker").exists()


def test_no_code_of_a_tensor_runs(folder):
    place = pickle.loads((folder / ".metadata").read_bytes()).storage_data[MetadataIndex("a", torch.Size((0, 0)))]
    payload = pickle.dumps(Trap(folder / "marker"))
    assert len(payload) <= place.length
    with open(folder / place.relative_path, "r+b") as file:
        file.seek(place.offset)
        file.write(payload)
    with pytest.raises(pickle.UnpicklingError):
        fill(folder, [piece(0, 35)])
    assert not (folder / "marker").exists()

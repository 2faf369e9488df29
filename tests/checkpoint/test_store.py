"""The store: a checkpoint is whole or it is not there, and whatever fails, the one before it stays the newest."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store, read_state
from sbtrain.config.model_schema import GLAConfig, ModelConfig
from sbtrain.config.schema import Precision
from sbtrain.convert.reader import CheckpointReader
from sbtrain.model.build import build_model, global_parameters

MODEL = ModelConfig(
    pattern="LS", vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=16,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64, tie_embeddings=True, qkv_bias=False, qk_norm=False, window=5,
    gla=GLAConfig(gate_rank=2), vocab_multiple=4,
)  # fmt: skip
Usage = namedtuple("Usage", "total used free")


class Saved:
    """A store and the model it saves, in one process."""

    def __init__(self, folder: Path, mesh: Mesh, keep_last: int = 2):
        self.folder, self.mesh, self.ledger = folder, mesh, Ledger(folder)
        self.store = Store(folder, self.ledger, keep_last=keep_last, op_table={"hash": "0123"})
        self.model = build_model(MODEL, mesh, precision=Precision.fp32, seq_len=16)

    def save(self, step: int) -> Path:
        """Save weights that are all `step`."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step)
        self.store.save_weights(self.model, self.mesh, RunState(stage="a", step=step, tokens=10 * step))
        return self.folder / "checkpoints" / f"step_{step}"

    def there(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@pytest.fixture
def saved(tmp_path):
    with Mesh.build(Layout()) as mesh:
        yield Saved(tmp_path, mesh)


def test_a_checkpoint_holds_every_tensor_and_where_the_run_stands(saved):
    folder = saved.save(3)
    reader = CheckpointReader(folder)
    for name, parameter in global_parameters(saved.model).items():
        assert torch.equal(reader.get(name), parameter), name
    state = read_state(folder)
    assert state["format"] == 1 and state["parts"] == ["model"] and state["op_table"] == {"hash": "0123"}
    assert (state["stage"], state["step"], state["tokens"], state["loader"]) == ("a", 3, 30, None)
    assert Ledger(saved.folder).checkpoint == folder and Ledger(saved.folder).step == 3


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, ["step_10", "step_2", "step_9"]), (2, ["step_10", "step_9"]), (1, ["step_10"])]
)
def test_only_the_last_ones_stay_and_leftovers_go(saved, keep_last, kept):
    saved.store.keep_last = keep_last
    saved.save(2)
    (saved.folder / "checkpoints/step_7.partial").mkdir()
    saved.save(9), saved.save(10)
    assert saved.there() == kept, "by number, not by name"


def _check_intact(saved: Saved, folder: Path, ledger: bytes) -> None:
    assert saved.ledger.path.read_bytes() == ledger
    assert saved.there() == [folder.name] and Ledger(saved.folder).checkpoint == folder
    assert (CheckpointReader(folder).get("decoder.final_layernorm.weight") == 3).all()


def test_no_space_left_is_noticed_before_anything_is_written(saved, monkeypatch):
    folder = saved.save(3)
    ledger = saved.ledger.path.read_bytes()
    needed = sum(parameter.numel() * 4 for parameter in saved.model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed - 1))
        with pytest.raises(ValueError, match=r"no space left in .*checkpoints: .* free some space and start the same"):
            saved.save(4)
        _check_intact(saved, folder, ledger)
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed))
        saved.save(4)
    assert Ledger(saved.folder).step == 4


def test_a_disk_that_fills_up_while_writing_costs_nothing_but_this_checkpoint(saved):
    """The largest size of a file stands for the disk: the writer fails in its own process, as on a full disk."""
    folder = saved.save(3)
    ledger = saved.ledger.path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, before[1]))
    try:
        with pytest.raises(ValueError) as caught:
            saved.save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert "\n" not in text and f"step_4.partial: rank 0: Worker failure: [Errno {errno.EFBIG}]" in text
    assert "the previous checkpoint is intact, free some space" in text
    assert saved.ledger.path.read_bytes() == ledger and Ledger(saved.folder).checkpoint == folder
    saved.save(4)
    assert saved.there() == ["step_3", "step_4"]


@pytest.mark.parametrize("moment", ["rename", "ledger"])
def test_killed_while_saving_the_run_goes_on_from_the_one_before(saved, monkeypatch, moment):
    folder = saved.save(3)

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "rename":
            patch.setattr(Path, "rename", kill)
        else:
            patch.setattr(Ledger, "record_checkpoint", kill)
        saved.save(4)
    assert Ledger(saved.folder).checkpoint == folder and read_state(folder)["step"] == 3
    again = Saved(saved.folder, saved.mesh)
    again.save(4)
    assert again.there() == ["step_3", "step_4"] and Ledger(saved.folder).step == 4


@pytest.mark.parametrize("missing", ["state.json", ".metadata"])
def test_an_incomplete_checkpoint_is_refused_by_name(saved, missing):
    folder = saved.save(3)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"step_3 is not a complete checkpoint .*point ledger\.json at an earlier"):
        read_state(folder)


@pytest.mark.parametrize("form", [2, None, "1"])
def test_another_format_is_refused_by_name(saved, form):
    folder = saved.save(3)
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, "format": form}))
    with pytest.raises(ValueError, match=rf"state\.json: checkpoint format {form!r} is not 1; load it with"):
        read_state(folder)

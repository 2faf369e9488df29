"""The op table in a run: equal on all ranks or no run, and which op differs is said."""

import pytest
import torch.distributed as dist

from sbtrain import run


def ranks(monkeypatch, *others):
    """A world in which the other ranks have these tables."""

    def gather(tables, ours):
        tables[:] = [ours, *others]

    monkeypatch.setattr(dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_equal_tables_pass_and_another_ops_choice_is_named(monkeypatch):
    ours = run.op_table()
    ranks(monkeypatch, ours)
    run._agree_on_ops()
    gla = {"backend": "cuda", "reason": "NVIDIA H200"}
    ranks(monkeypatch, ours, {"hash": "other", "ops": {**ours["ops"], "gla": gla}})
    with pytest.raises(ValueError, match="rank 2 has another op table .*: gla is .*H200.* there and .*reference"):
        run._agree_on_ops()
    ranks(monkeypatch, {"hash": "other", "ops": ours["ops"]})
    with pytest.raises(ValueError, match=r"rank 1 has another op table .* \(other files\); run `python -m ops`"):
        run._agree_on_ops()

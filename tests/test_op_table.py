"""The op table in a run: equal on all ranks or no run, and which op differs is said."""

import pytest
import torch.distributed as dist

from parallel.op_table import agree_on_ops, op_table


def ranks(monkeypatch, *others):
    """A world in which the other ranks have these tables."""

    def gather(gathered, ours):
        gathered[:] = [ours, *(others if isinstance(ours, dict) else [None] * len(others))]

    monkeypatch.setattr(dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_equal_tables_pass_and_another_ops_choice_is_named(monkeypatch):
    ours = op_table()
    ranks(monkeypatch, ours)
    agree_on_ops()
    gla = {"backend": "cuda", "reason": "NVIDIA H200"}
    ranks(monkeypatch, ours, {"hash": "other", "ops": {**ours["ops"], "gla": gla}})
    with pytest.raises(ValueError, match="rank 2 has another op table .*: gla is .*H200.* there and .*reference"):
        agree_on_ops()
    elsewhere = {op: {**entry, "reason": "another device's name"} for op, entry in ours["ops"].items()}
    ranks(monkeypatch, {"hash": "other", "ops": elsewhere})
    with pytest.raises(ValueError, match=r"rank 1 has another op table .* \(other files\); run `python -m ops`"):
        agree_on_ops()


def agree_where_one_rank_cannot(rank: int) -> str:
    """What agree_on_ops raises on this rank when the second one's environment asks for what it does not have."""
    from ops import registry
    from ops.device import EnvFacts

    collect = registry.collect
    registry.collect = lambda: EnvFacts("2.0", overrides={"OPS_BACKEND_ROPE": "cuda"} if rank == 1 else {})
    registry.use()
    try:
        agree_on_ops()
    except ValueError as error:
        return str(error)
    finally:
        registry.collect = collect
        registry.use()
    return ""


def test_what_one_rank_cannot_have_ends_all(run_ranks):
    said = run_ranks(2)(agree_where_one_rank_cannot)
    assert said[0] == said[1] == "OPS_BACKEND_ROPE=cuda: torch sees no CUDA device; choose from: reference"

"""Which implementation of each op runs, and that it is the same one on all ranks."""

from __future__ import annotations

import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.place import primitive


def op_table() -> dict:
    """Which implementation of each op this run uses, as its checkpoints keep it."""
    return {"hash": ops.table_hash(), "ops": ops.table()}


def agree_on_ops() -> None:
    """All ranks must run the same backends of the same ops, or their numerics would drift apart. Collective.

    Raises ValueError that names the rank and the first op that differs.
    """
    ours = together(op_table)
    tables = [None] * dist.get_world_size()
    with primitive("op tables"):
        dist.all_gather_object(tables, ours)
    ours = tables[0]["ops"]
    for rank, other in enumerate(tables):
        if other["hash"] != tables[0]["hash"]:
            odd = next((op for op, entry in other["ops"].items() if _runs(entry) != _runs(ours.get(op, {}))), None)
            what = f": {odd} is {other['ops'][odd]} there and {ours.get(odd)} here" if odd else " (other files)"
            raise ValueError(
                f"rank {rank} has another op table than rank 0{what}; run `python -m ops` on both machines and make "
                "their packages and files equal"
            )


def _runs(entry: dict) -> dict:
    """What an op's entry says of the code that runs; reasons name the device, which ranks need not share."""
    return {key: value for key, value in entry.items() if key not in ("reason", "refused")}

"""Runs of a hundred steps and more, and what two of them must have in common to the last bit."""

from __future__ import annotations

from pathlib import Path

import torch

from run_case import curve, run_until, tiny_recipe
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.run_dir import Exit
from sbtrain.convert.reader import CheckpointReader

STEPS = 104
LONG = (
    "stages.ctx_32.micro_batch=1",
    "stages.ctx_32.seq_len=16",
    "stages.ctx_32.global_batch_tokens=32",
    f"stages.ctx_32.tokens={STEPS * 32}",
    "stages.ctx_32.schedule.lr=3e-3",
    "~stages.ctx_64",
    "~stages.ctx_128",
    "checkpoint.every_steps=40",
    "evaluation.tokens=0",
)
"""One stage of that many steps: two rows of 16 tokens each, in packed documents."""

FEATURES = {
    "hybrid": (),
    "all": (
        'model.pattern="(LS):m F L:m"',
        "model.meta.num_tokens=4",
        "model.moe={num_experts: 4, top_k: 2, expert_ffn_size: 16, score: sigmoid, bias_update_rate: 0.01, "
        "aux_loss_coeff: 0.05, z_loss_coeff: 0.001}",
        "model.spiking.enabled=true",
        "model.spiking.spike_down_proj=true",
        f"model.spiking.warm_in_tokens={STEPS // 2 * 32}",
    ),
    "shared pairs": ('model.pattern="(LS) F (LF)"', "model.pair.shared_projections=true", "model.meta.num_tokens=4"),
    "tied gates": ("model.gla.feature_map=sigmoid", "model.gla.gate=tied", "model.gla.rope=true"),
}
"""Keys of models, by name: GLA and windows in all; experts, pairs, meta tokens and a warm-in of spikes."""


def check_resumes(root: Path, ranks, name: str, overrides: tuple[str, ...], stops: tuple[int, ...]) -> None:
    """A run that is stopped at those steps has the losses, norms, weights and moments of one that is not.

    ranks: run_ranks(n, ...). The inputs are in root.
    """
    whole, again = (tiny_recipe(root, f"{name}_{part}", *LONG, *overrides) for part in ("whole", "again"))
    assert set(ranks(run_until, whole)) == {Exit.DONE}
    for stop in stops:
        assert set(ranks(run_until, again, stop)) == {Exit.REQUEUE}
        assert Ledger(Path(again.run_dir)).step == stop
    assert set(ranks(run_until, again)) == {Exit.DONE}
    folders = Path(whole.run_dir), Path(again.run_dir)
    records = [curve(folder) for folder in folders]
    assert len(records[0]) == STEPS and records[0][-1][3] < records[0][0][3], "it learns something"
    assert records[0] == records[1]
    readers = [CheckpointReader(Ledger(folder).checkpoint) for folder in folders]
    names = readers[0].names()
    assert names == readers[1].names() and any("exp_avg_sq" in name for name in names)
    for tensor in names:
        assert torch.equal(readers[0].get(tensor), readers[1].get(tensor)), tensor

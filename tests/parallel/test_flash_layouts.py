"""A checkpoint, in the background or waited for, holds bit for bit what megatron's own save holds, on any layout."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from flash_layout_case import save_both
from layout_case import packed_rows, small_model
from parallel.layout import Layout
from parallel.pieces import boxes_of
from sbtrain.checkpoint.files import read_json
from sbtrain.checkpoint.manifest import fault
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.schema import Precision
from sbtrain.convert.reader import CheckpointReader

EXPERTS = MoEConfig(
    num_experts=4, top_k=2, expert_ffn_size=24, score=RouterScore.sigmoid, bias_update_rate=0.01, aux_loss_coeff=0.05
)
DENSE = small_model()
TIED = small_model(tie_embeddings=True)
MOE = small_model(pattern="L S F:m L:m", moe=EXPERTS)
ROWS = packed_rows(2, 32, DENSE.vocab_size)

LAYOUTS = {
    "1": (1, Layout(), DENSE, Precision.fp32),
    "dp2 bf16": (2, Layout(), DENSE, Precision.bf16),
    "tp2": (2, Layout(tp=2, tp_sequence_parallel=True), DENSE, Precision.fp32),
    "pp2 tied": (2, Layout(pp=2), TIED, Precision.fp32),
    "sp2": (2, Layout(sp=2), DENSE, Precision.fp32),
    "ep2": (2, Layout(ep=2), MOE, Precision.fp32),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_saves_hold_what_megatrons_holds(run_ranks, tmp_path, name):
    num_ranks, layout, model, precision = LAYOUTS[name]
    for result in run_ranks(num_ranks, timeout_s=300)(save_both, layout, model, ROWS, str(tmp_path), precision):
        assert result["same"] and result["changed"] and result["num_bytes"]
    megatron, saves = tmp_path / "m", [tmp_path / side / "checkpoints/step_2" for side in "ab"]
    expected = CheckpointReader(megatron)
    for folder in saves:
        assert fault(folder) is None
        found = CheckpointReader(folder)
        assert found.names() == expected.names()
        for tensor in expected.names():
            a, b = expected.get(tensor), found.get(tensor)
            assert a.dtype == b.dtype and torch.equal(a, b), tensor
        assert _objects(folder) == _objects(megatron)
        assert torch.load(folder / "common.pt", weights_only=True) == {"optimizer": {"step": 2}}
        assert read_json(folder / "metadata.json") == read_json(megatron / "metadata.json")
    written = [[(folder / name).read_bytes() for name in ("__0_0.distcp", "__0_1.distcp")] for folder in saves]
    assert written[0] == written[1], "one code writes both"


def _objects(folder) -> list[str]:
    entries = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    return sorted(name for name, entry in entries.items() if type(entry).__name__ == "BytesStorageMetadata")


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 3, 2), (2, 1, 3, 2)])
def test_every_run_of_elements_is_a_few_boxes(shape):
    count = math.prod(shape)
    numbers = torch.arange(count).view(shape)
    for start in range(count):
        for end in range(start + 1, count + 1):
            found = torch.full(shape, -1)
            boxes = list(boxes_of(shape, start, end))
            assert len(boxes) <= max(2 * len(shape) - 1, 1)
            for box in boxes:
                place = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes))
                there = torch.arange(math.prod(box.sizes)) + start + box.start
                found[place] = there.view(box.sizes)
            assert torch.equal(found, torch.where((numbers >= start) & (numbers < end), numbers, -1))
    assert not list(boxes_of(shape, 0, 0))

"""run(recipe) on GPUs in bf16: three stages, stopped and continued, evaluated, exported; two GPUs as good as one."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import Documents
from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit
from sbtrain.inference.load import Where, load_model

TIMEOUT_S = 400.0  # kernels compile
KERNEL_SIZES = ("precision=bf16", "model.hidden_size=256", "model.head_dim=64", "model.ffn_size=384")
ALONE = ("stages.ctx_64.layout.pp=1", "stages.ctx_128.layout.sp=1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def whole(inputs, run_ranks):
    """The uninterrupted run on one GPU: its folder and what it recorded."""
    recipe = tiny_recipe(inputs, "whole", *KERNEL_SIZES, *ALONE, f"export_dir={inputs}/export")
    assert run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(run_until, recipe) == [Exit.DONE]
    return inputs / "whole", curve(inputs / "whole")


@pytest.mark.gpu
def test_run_learns(whole):
    folder, records = whole
    assert len(records) == 14 and records[5][3] < records[0][3] - 0.2
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["peak_memory_bytes"] > 0 and last["tokens_per_s_per_gpu"] > 0
    environment = json.loads((folder / "env.json").read_text())
    assert "NVIDIA" in str(environment["device"]) and environment["ops"]["gla"]["backend"] == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("stop", [4, 9])
def test_a_stopped_run_continues(inputs, whole, run_ranks, stop):
    """Through its stages, bit by bit; over a hundred steps: test_resume_on_gpus."""
    _, records = whole
    recipe = tiny_recipe(inputs, f"stop_{stop}", *KERNEL_SIZES, *ALONE)
    one = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)
    assert one(run_until, recipe, stop) == [Exit.REQUEUE] and one(run_until, recipe) == [Exit.DONE]
    assert curve(inputs / f"stop_{stop}") == records


@pytest.mark.gpu
def test_the_export_is_the_model(inputs, whole):
    """Our forward on the GPU in bf16, and transformers on our modeling file in fp32 on the CPU."""
    folder, _ = whole
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        inputs / "export", trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokens = torch.randint(1, 100, (90,))
    with Mesh.build(Layout()) as mesh, torch.no_grad():
        loaded = load_model(Where(run=str(folder)), mesh)
        device = mesh.device
        documents = Documents(torch.tensor([0, 90], dtype=torch.int32, device=device), torch.arange(90, device=device))
        logits = loaded.model(tokens.to(device), documents).float().cpu()
        expected = exported(tokens[None]).logits[0]
    assert (logits - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.multigpu
@pytest.mark.parametrize("stop", [None, 8])
def test_two_gpus_through_pipeline_and_sequence_parallelism(inputs, whole, run_ranks, stop):
    _, records = whole
    recipe, two = tiny_recipe(inputs, f"two_{stop}", *KERNEL_SIZES), run_ranks(2, backend="nccl", timeout_s=TIMEOUT_S)
    if stop is not None:
        assert two(run_until, recipe, stop) == [Exit.REQUEUE] * 2
    assert two(run_until, recipe) == [Exit.DONE] * 2
    for mine, theirs in zip(curve(inputs / f"two_{stop}"), records, strict=True):
        assert mine[:3] == theirs[:3] and mine[3] == pytest.approx(theirs[3], rel=5e-3)

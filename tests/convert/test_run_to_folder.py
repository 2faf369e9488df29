"""The whole path on real ranks: teacher -> model in a layout -> checkpoint -> launch/export.py -> transformers."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from parallel.layout import Layout
from parallel.mcore import dist_checkpointing
from parallel.mesh import Mesh
from plain_model import plain_logits
from sbtrain.checkpoint.files import write_json
from sbtrain.config.load import save
from sbtrain.config.schema import ModelConfig, Precision, Recipe, Stage, Start
from sbtrain.convert.reader import CheckpointReader
from sbtrain.convert.start import fill
from sbtrain.model.build import build_model, global_parameters
from sharding import hf_state
from tiny_checkpoints import filled, model_of, save_tiny
from whole_checkpoint import make_whole

STAGE = Stage(seq_len=32, tokens=64, global_batch_tokens=64)
ROOT = Path(__file__).resolve().parents[2]


def _start_and_save(rank: int, layout: Layout, model: ModelConfig, teacher: str, folder: str) -> None:
    with Mesh.build(layout) as mesh:
        built = build_model(model, mesh, precision=Precision.fp32, seq_len=32)
        fill(global_parameters(built), model=model, path=teacher, seed=3, tp_rank=mesh.tp_rank, tp=layout.tp)
        metadata = {"dp_cp_group": mesh.groups.dp_cp}
        state = {"model": built.sharded_state_dict(metadata=metadata)}
        dist_checkpointing.save(state, folder, validate_access_integrity=False)


def _run(run_ranks, tmp_path: Path, family: str, num_ranks: int, layout: Layout) -> tuple[Path, ModelConfig]:
    """A run directory with one checkpoint of the converted start."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    save_tiny(teacher, family, num_layers=4)
    model = model_of(teacher)
    step_dir = run / "checkpoints" / "step_5"
    step_dir.mkdir(parents=True)
    run_ranks(num_ranks)(_start_and_save, layout, model, str(teacher), str(step_dir))
    make_whole(step_dir)
    save(Recipe(name="tiny", run_dir=str(run), model=model, start=Start(str(teacher)), stages={"ctx_32": STAGE}),
         run / "recipe.yaml")  # fmt: skip
    write_json(run / "ledger.json", {"stages_done": [], "checkpoint": "checkpoints/step_5", "step": 5})
    return run, model


def _launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "export.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("family", "num_ranks", "layout"),
    [("qwen2", 2, Layout(tp=2)), ("qwen2_tied", 2, Layout(pp=2)), ("qwen3", 2, Layout(tp=2))],
    ids=["qwen2_tp2", "qwen2_tied_pp2", "qwen3_tp2"],
)
def test_checkpoint_of_a_layout_holds_the_global_tensors(run_ranks, tmp_path, family, num_ranks, layout):
    run, model = _run(run_ranks, tmp_path, family, num_ranks, layout)
    reader = CheckpointReader(run / "checkpoints" / "step_5")
    whole = filled(model, str(tmp_path / "teacher"), seed=3)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in whole.items())


def test_launch_export_writes_a_folder_that_transformers_runs(run_ranks, tmp_path):
    run, model = _run(run_ranks, tmp_path, "qwen2_tied", 2, Layout(pp=2))
    out = tmp_path / "a=b"  # values are literal, cut at the first =
    done = _launch(f"run={run}", f"out={out}", "dtype=fp32")
    assert done.returncode == 0, done.stderr
    assert "(format gla_swa)" in done.stdout
    teacher, student = load_file(tmp_path / "teacher" / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(student["model.layers.3.attn.k_proj.weight"], teacher["model.layers.3.self_attn.k_proj.weight"])
    tokens = torch.randint(0, 128, (1, 30))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    state = hf_state(filled(model, str(tmp_path / "teacher"), seed=3), model)
    expected = plain_logits({name: tensor.double() for name, tensor in state.items()}, model, tokens)
    with torch.no_grad():
        difference = loaded(tokens).logits.double() - expected
    assert difference.norm() < 1e-5 * expected.norm()

    done = _launch(f"run={run}", f"out={out}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "exists; choose another folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={run}"], "out= is missing; usage: python launch/export.py run=DIR"),
        (["run={run}", "out=x", "modle=y"], "'modle=y' is not one of run=, out=, format=, dtype=, step=, model="),
        (["run={run}/none", "out=x"], "is no run directory (no recipe.yaml)"),
        (["run={run}", "out=x", "step=9"], "step_9 does not exist; there are: step_5"),
        (["run={run}", "out=x"], "has no checkpoint that is whole (step_5: it has no manifest.json"),
    ],
)
def test_launch_export_refuses_in_one_line(tmp_path, arguments, message, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_5").mkdir(parents=True)
    save_tiny(tmp_path / "teacher", "llama")
    capsys.readouterr()
    recipe = Recipe(model=model_of(tmp_path / "teacher"), start=Start("gone"), stages={"s": STAGE})
    save(recipe, run / "recipe.yaml")
    write_json(run / "ledger.json", {"stages_done": [], "checkpoint": "checkpoints/step_5", "step": 5})
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    code = runpy.run_path(str(ROOT / "launch" / "export.py"))["main"]([word.format(run=run) for word in arguments])
    line = capsys.readouterr().err
    assert code == 2 and message in line and line.count("\n") == 1
    assert not Path("x").exists()

"""The whole story in real processes: convert, train three stages on three layouts, evaluate, export, report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
import transformers
import yaml

from plain_model import plain_logits
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.config.load import load
from sbtrain.config.schema import Recipe
from sbtrain.convert.export import export_tensors
from sbtrain.convert.reader import CheckpointReader
from tiny_corpus import sha256, write_corpus, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "step", "tokens", "stage", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu",
    "mfu", "peak_memory_bytes",
}  # fmt: skip
STEPS = ["ctx_32"] * 4 + ["ctx_64"] * 3 + ["ctx_128"] * 3


@dataclass
class Story:
    """What is left when it has been told."""

    root: Path
    arguments: list[str]
    recipe: Recipe
    run_dir: Path
    converted: dict[str, torch.Tensor]
    stdout: str


def _write_teacher(folder: Path) -> None:
    """A Llama with the heads of SmolLM2, 9 and 3, random but sure of itself."""
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=36, intermediate_size=48, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    teacher = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    teacher.save_pretrained(folder)
    write_tokenizer(folder)


def _write_text(root: Path) -> None:
    """Documents with something to learn: every token is the one before it plus one."""
    dice, digest = numpy.random.default_rng(0), sha256(root / "teacher/tokenizer.json")
    for name, num_documents in (("text", 40), ("held", 12)):
        starts = dice.integers(1, 60, num_documents), dice.integers(2, 90, num_documents)
        documents = [[*range(first, first + length), 0] for first, length in zip(*starts)]
        write_corpus(root / name, documents, tokenizer_sha256=digest)


def _write_recipe(root: Path) -> Path:
    def stage(seq_len: int, num_steps: int, **layout: int) -> dict:
        schedule = {"lr": 3e-3, "min_lr": 1e-3}
        batch = {"seq_len": seq_len, "tokens": 256 * num_steps, "global_batch_tokens": 256}
        return {**batch, "layout": layout, "schedule": schedule}

    recipe = {
        "precision": "fp32",
        "model": {"pattern": "LS x 2", "window": 17},
        "start": {"path": f"{root}/teacher"},
        "data": {
            "tokenizer": f"{root}/teacher",
            "sources": {"text": {"path": f"{root}/text", "valid": f"{root}/held"}},
        },
        "stages": {"ctx_32": stage(32, 4), "ctx_64": stage(64, 3, pp=2), "ctx_128": stage(128, 3, sp=2)},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"tokens": 256, "teacher": True},
        "export_dir": "${run_dir}/export",
    }
    (root / "story.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root / "story.yaml"


def _launch(root: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    root = tmp_path_factory.mktemp("story")
    _write_teacher(root / "teacher")
    _write_text(root)
    arguments = [f"recipe={_write_recipe(root)}", f"run_dir={root}/run"]
    stdout = _launch(root, str(ROOT / "launch/convert.py"), *arguments)
    recipe = load(arguments)
    converted = dict(export_tensors(CheckpointReader(Ledger(root / "run").checkpoint), recipe.model))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    stdout += _launch(root, *torchrun, str(ROOT / "launch/train.py"), *arguments)
    return Story(root, arguments, recipe, root / "run", converted, stdout)


def test_conversion_inherits_the_teachers_tensors_to_the_bit(story):
    teacher = transformers.AutoModelForCausalLM.from_pretrained(story.root / "teacher").state_dict()
    teacher.pop("lm_head.weight")  # tied
    assert all(torch.equal(story.converted[name], tensor) for name, tensor in teacher.items())
    added = set(story.converted) - set(teacher)
    assert {name.split(".")[2] for name in added} == {"0", "2"} and len(added) == 8, "the gates and norms of L layers"


def test_metrics_have_the_documented_fields_for_every_step(story):
    records = [json.loads(line) for line in (story.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == STEPS
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["tokens"] for record in records] == list(range(256, 2561, 256))
    for record in records:
        assert set(record) >= FIELDS
        assert record["mfu"] is None, "the peak of a laptop is not known"
        numbers = [record[name] for name in FIELDS - {"mfu", "stage"}]
        assert all(math.isfinite(number) and number > 0 for number in numbers), record
    assert records[-1]["loss"] < records[0]["loss"] - 0.3


def test_every_model_of_the_story_is_judged(story):
    points = {point["name"]: point for point in json.loads((story.run_dir / "evaluation.json").read_text())["points"]}
    assert list(points) == ["teacher", "start", "ctx_32", "ctx_64", "ctx_128"]
    assert points["teacher"]["tokens"] == points["start"]["tokens"] == 0 and points["ctx_128"]["tokens"] == 2560
    bits = {name: point["sources"]["text"]["bits_per_byte"] for name, point in points.items()}
    assert bits["ctx_128"] < bits["start"] - 0.3 and bits["start"] != bits["teacher"]
    assert "bits per byte, teacher" in story.stdout and f"{bits['ctx_128']:.3f}" in story.stdout


def test_what_auto_chose_is_said_and_kept(story):
    """The last stage alone has shards: each choice once, on the first rank, and the same text in env.json."""
    said = [line for line in story.stdout.splitlines() if line.startswith("layout.sp_algorithm.")]
    *others, last = json.loads((story.run_dir / "env.json").read_text())["starts"]
    assert sorted(said) == [f"layout.sp_algorithm.{mixer}=auto: {last['sp_algorithm'][mixer]}" for mixer in "LS"]
    assert [start["sp_algorithm"] for start in others] == [{}, {}] and (last["stage"], last["step"]) == ("ctx_128", 7)


def test_the_run_directory_is_complete(story):
    names = {path.name for path in story.run_dir.iterdir()}
    assert names >= {"recipe.yaml", "env.json", "metrics.jsonl", "ledger.json", "evaluation.json", "exit.json"}
    assert json.loads((story.run_dir / "exit.json").read_text()) == {"code": 0, "reason": "all stages are done"}
    ledger = json.loads((story.run_dir / "ledger.json").read_text())
    assert list(ledger.pop("clock_skew_s").values()) == [0.0]  # of this host, against itself
    assert ledger == {"stages_done": list(story.recipe.stages), "checkpoint": "checkpoints/step_10", "step": 10}
    assert {path.name for path in (story.run_dir / "checkpoints").iterdir()} == {"step_8", "step_10"}
    page = (story.run_dir / "report/index.html").read_text()
    assert "<html" in page and all(name in page for name in ("teacher", "start", *story.recipe.stages))
    images = [word.split('"')[0] for word in page.split('src="')[1:]]
    assert images and all((story.run_dir / "report" / image).is_file() for image in images if image.endswith(".png"))


def test_recipe_yaml_reproduces_the_recipe(story):
    assert load([f"recipe={story.run_dir / 'recipe.yaml'}"]) == story.recipe == load(story.arguments)
    environment = json.loads((story.run_dir / "env.json").read_text())
    assert {"python", "torch", "megatron_core", "device", "commit", "ops", "ops_hash", "starts"} <= set(environment)


def test_the_export_runs_in_transformers_and_is_the_trained_model(story):
    folder, model = story.run_dir / "export", story.recipe.model
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert loaded.dtype == torch.float32
    reader = CheckpointReader(Ledger(story.run_dir).checkpoint)
    state = {name: tensor.double() for name, tensor in export_tensors(reader, model)}
    moved = [name for name, tensor in state.items() if not torch.equal(tensor, story.converted[name].double())]
    assert sorted(moved) == sorted(state), "training has moved every tensor"
    tokens = torch.randint(1, 100, (2, 50))
    expected = plain_logits(state, model, tokens)
    with torch.no_grad():
        difference = loaded(tokens).logits.double() - expected
    assert difference.norm() < 1e-5 * expected.norm()
    assert (folder / "tokenizer.json").read_bytes() == (story.root / "teacher/tokenizer.json").read_bytes()

"""A tiny recipe that runs in seconds on a few ranks, and runs of it that are interrupted at a chosen step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy

from sbtrain.config.load import load
from sbtrain.config.schema import Recipe
from sbtrain.run import run
from sbtrain.train.evaluate import Evaluations
from sbtrain.train.watch import Watch
from tiny_corpus import sha256, write_corpus, write_tokenizer

RECIPE = """
name: tiny
precision: fp32
seed: 3
model:
  {{pattern: LSF, vocab_size: 260, hidden_size: 32, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 8,
   ffn_size: 48, norm_eps: 1e-5, rope_theta: 1e4, max_positions: 256, tie_embeddings: true, qkv_bias: true,
   qk_norm: false, window: 9, vocab_multiple: 4, gla: {{gate_rank: 4}}}}
start: {{path: ""}}
data:
  tokenizer: {root}/tokenizer
  sources:
    one: {{path: {root}/one, weight: 2.0, valid: {root}/held}}
    two: {{path: {root}/two}}
optim: {{weight_decay: 0.1, new_lr_scale: 3.0}}
stages:
  ctx_32:
    {{seq_len: 32, tokens: 768, global_batch_tokens: 128, micro_batch: 2,
     schedule: {{lr: 1e-2, min_lr: 1e-3, warmup_tokens: 128}}}}
  ctx_64:
    {{seq_len: 64, tokens: 512, global_batch_tokens: 128, layout: {{pp: 2}}, schedule: {{lr: 3e-3, min_lr: 1e-3}}}}
  ctx_128:
    {{seq_len: 128, tokens: 512, global_batch_tokens: 128, layout: {{sp: 2}},
     schedule: {{lr: 1e-3, min_lr: 1e-4, decay: wsd}}}}
checkpoint: {{every_steps: 3, keep_last: 2}}
evaluation: {{tokens: 128, seq_len: 64}}
cluster: {{num_gpus: 2}}
"""


def write_inputs(root: Path) -> Path:
    """Tokenizer, two corpora, held-out text and the recipe file in root; returns the recipe file."""
    write_tokenizer(root / "tokenizer")
    digest = sha256(root / "tokenizer" / "tokenizer.json")
    random = numpy.random.default_rng(0)
    for name, num_documents in (("one", 40), ("two", 30), ("held", 10)):
        lengths = random.integers(1, 60, num_documents)
        documents = [[*random.integers(1, 100, length), 0] for length in lengths]
        write_corpus(root / name, documents, tokenizer_sha256=digest, sealed=True)
    (root / "tiny.yaml").write_text(RECIPE.format(root=root))
    return root / "tiny.yaml"


def tiny_recipe(root: Path, run_dir: str, *overrides: str) -> Recipe:
    """The tiny recipe with its run directory below root."""
    return load([f"recipe={root / 'tiny.yaml'}", f"run_dir={root / run_dir}", *overrides])


def run_until(rank: int, recipe: Recipe, stop_at_step: int | None = None) -> int:
    """Run the recipe; rank 0 sends itself SIGTERM when that step ends. Returns the exit code."""
    check = Watch.check

    def check_and_stop(self, state, **figures):
        check(self, state, **figures)
        if rank == 0 and state.step == stop_at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    Watch.check = check_and_stop
    try:
        return int(run(recipe)[0])
    finally:
        Watch.check = check


def run_until_judging(rank: int, recipe: Recipe, name: str) -> int:
    """Run the recipe; rank 0 sends itself SIGTERM when the evaluation of that point begins. Returns the exit code."""
    add = Evaluations.add

    def stop_and_add(self, point, *args, **kwargs):
        if rank == 0 and point == name:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, point, *args, **kwargs)

    Evaluations.add = stop_and_add
    try:
        return int(run(recipe)[0])
    finally:
        Evaluations.add = add


def curve(run_dir: Path) -> list[tuple]:
    """(step, tokens, stage, loss, grad_norm, lr) of every step in metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(record[key] for key in ("step", "tokens", "stage", "loss", "grad_norm", "lr")) for record in records]

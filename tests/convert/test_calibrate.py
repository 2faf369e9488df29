"""Calibrated branch norms and the check of upcycled experts: against plain torch, and the same on every layout."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import plain_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import IGNORE, Row
from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MergeInit,
    MergePlace,
    MetaConfig,
    MetaInit,
    MoEConfig,
    PairConfig,
)
from sbtrain.config.schema import Precision, Recipe, Start
from sbtrain.convert.first import FILE, FirstWeights, commonest
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.upcycle import alpha_of
from sbtrain.model.build import build_chunks, global_parameters
from tiny_checkpoints import model_of, save_tiny

NUM_TOKENS, WIDTH = 24, 72


def hybrid(folder, **changes):
    base = dict(
        pattern="(LS)(LF):m",
        gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied),
        meta=MetaConfig(num_tokens=4),
        moe=MoEConfig(num_experts=4, router_init_std=1e-3),
        pair=PairConfig(calibration_tokens=3 * NUM_TOKENS),
    )
    return dataclasses.replace(model_of(folder), **{**base, **changes})


def rows_of(num_tokens: int) -> list[Row]:
    """Three rows, of one and of two documents: not a multiple of two data-parallel ranks."""
    assert num_tokens == 3 * NUM_TOKENS
    generator, rows = torch.Generator().manual_seed(4), []
    for cut in (0, 10, 24):
        tokens = torch.randint(128, (NUM_TOKENS,), generator=generator)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
        edges = sorted({0, cut, NUM_TOKENS})
        labels[[edge - 1 for edge in edges[1:]]] = IGNORE
        rows.append(Row(tokens, labels, torch.tensor(edges, dtype=torch.int32)))
    return rows


def _first_weights(rank: int, layout: Layout, model, teacher: str, folder: str, data: bool = True) -> dict:
    """What FirstWeights measures on a layout, and this rank's branch norms."""
    recipe = Recipe(run_dir=folder, model=model, start=Start(teacher), precision=Precision.fp32)
    with Mesh.build(layout) as mesh:
        first = FirstWeights(recipe, mesh, seq_len=NUM_TOKENS, read_rows=rows_of if data else None)
        first.prepare()
        built = build_chunks(model, mesh, precision=Precision.fp32, seq_len=NUM_TOKENS)
        first.fill(built)
        first.check(built)
        named = global_parameters(*built).items()
        norms = {name: weight.detach().clone() for name, weight in named if "merge_norms" in name}
        meta = global_parameters(*built).get("embedding.meta_tokens")
    return {"measured": first.measured, "norms": norms, "meta": meta if meta is None else meta.detach().clone()}


def _expected_norms(folder: Path, *, shared: bool) -> dict[int, float]:
    """The teacher layer by layer in plain torch, fp64, document by document."""
    from safetensors.torch import load_file

    model = dataclasses.replace(model_of(folder), pattern="F")
    state = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(model.num_layers)}
    layers = iter(())
    heads_of = plain_model._heads_of

    def watched(weights, config, x, kind, *spikes):
        o = heads_of(weights, config, x, kind, *spikes)
        out = o if shared else o @ weights["o_proj.weight"].T
        seen[next(layers)].append(out.square().mean(-1).sqrt())
        return o

    plain_model._heads_of = watched
    try:
        for row in rows_of(3 * NUM_TOKENS):
            bounds = row.cu_seqlens.tolist()
            for start, stop in zip(bounds, bounds[1:]):
                layers = iter(range(model.num_layers))
                plain_model.plain_logits(state, model, row.tokens[start:stop])
    finally:
        plain_model._heads_of = heads_of
    return {layer: torch.cat(rms).mean().item() for layer, rms in seen.items()}


LAYOUTS = [
    (2, Layout()),
    (2, Layout(tp=2)),
    (2, Layout(tp=2, tp_sequence_parallel=True)),
    (2, Layout(pp=2)),
    (2, Layout(pp=2, vpp=2)),
    (2, Layout(sp=2)),
    (2, Layout(ep=2)),
]


@pytest.mark.parametrize("shared", [False, True])
def test_branch_norms_and_checks_are_the_same_on_every_layout(run_ranks, tmp_path, shared):
    save_tiny(tmp_path / "teacher", "qwen2")
    model = hybrid(tmp_path / "teacher", pair=PairConfig(shared, MergeInit.calibrated, 3 * NUM_TOKENS))
    arguments = (model, str(tmp_path / "teacher"), str(tmp_path))
    (one,) = run_ranks(1)(_first_weights, Layout(), *arguments)
    expected = _expected_norms(tmp_path / "teacher", shared=shared)
    assert one["measured"]["calibration"]["merge_norms"] == pytest.approx(expected, rel=1e-5)
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept["calibration"]["merge_norms"]["2"] == one["measured"]["calibration"]["merge_norms"][2]
    for name, norm in one["norms"].items():
        torch.testing.assert_close(norm, torch.full_like(norm, expected[int(name.split(".")[2])]), rtol=1e-5, atol=0)
    upcycling = one["measured"]["upcycling"]
    assert upcycling["alpha"] == alpha_of(model.moe) and sorted(upcycling["relative_errors"]) == [1, 3]
    assert upcycling["routing_weight"] == pytest.approx(0.25, rel=0.02)
    assert max(upcycling["relative_errors"].values()) < 0.03
    assert abs(upcycling["loss"] - upcycling["loss_dense"]) < 0.01 * upcycling["loss_dense"]
    for num_ranks, layout in LAYOUTS:
        for found in run_ranks(num_ranks)(_first_weights, layout, *arguments):
            _same(found["measured"], one["measured"])


def test_a_layout_that_full_attention_has_no_heads_for(run_ranks, tmp_path):
    """9/3 heads over 4 sp ranks: the pairs go, and so must the teacher."""
    save_tiny(tmp_path / "teacher", "qwen2_tied")
    model = hybrid(tmp_path / "teacher", pattern="(LS):m", window=5)
    arguments = (model, str(tmp_path / "teacher"), str(tmp_path))
    (one,) = run_ranks(1)(_first_weights, Layout(), *arguments)
    expected = _expected_norms(tmp_path / "teacher", shared=False)
    assert one["measured"]["calibration"]["merge_norms"] == pytest.approx(expected, rel=1e-5)
    for found in run_ranks(4)(_first_weights, Layout(sp=4), *arguments):
        _same(found["measured"], one["measured"])


def test_meta_tokens_that_copy_the_commonest_tokens(run_ranks, tmp_path):
    """The same on every layout, and tokens that are equally common by id."""
    save_tiny(tmp_path / "teacher", "qwen2_tied")
    meta = MetaConfig(num_tokens=4, init=MetaInit.frequent)
    pair = PairConfig(norm_place=MergePlace.before_projection, calibration_tokens=3 * NUM_TOKENS)
    model = hybrid(tmp_path / "teacher", pattern="(LS)", meta=meta, pair=pair)
    tokens = torch.cat([row.tokens for row in rows_of(3 * NUM_TOKENS)]).tolist()
    ids = sorted(set(tokens), key=lambda token: (-tokens.count(token), token))[:4]
    embedding = HFCheckpoint(tmp_path / "teacher").get("model.embed_tokens.weight")
    expected = _expected_norms(tmp_path / "teacher", shared=True)
    for num_ranks, layout in ((1, Layout()), (2, Layout(pp=2)), (2, Layout())):
        found = run_ranks(num_ranks)(_first_weights, layout, model, str(tmp_path / "teacher"), str(tmp_path))
        assert torch.equal(found[0]["meta"], embedding[ids])
        assert found[0]["measured"]["meta_tokens"] == {"tokens": 3 * NUM_TOKENS, "copies_of": ids}
        assert found[0]["measured"]["calibration"]["merge_norms"] == pytest.approx(expected, rel=1e-5)
    few = commonest(rows_of(3 * NUM_TOKENS)[:1], 50)
    assert len(few) == 50 and few[:5] == few[len(set(few)) :][:5]


def _same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _same(found[key], expected[key])
    else:
        assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("teacher", "data", "missing"), [(False, True, "start.path"), (True, False, "data")])
def test_without_a_teacher_or_data_the_norms_are_one_and_it_is_said_once(run_ranks, tmp_path, teacher, data, missing):
    save_tiny(tmp_path / "teacher", "qwen2")
    path, out = str(tmp_path / "teacher") if teacher else "", tmp_path / "said"
    results = run_ranks(2)(_said, Layout(ep=2), hybrid(tmp_path / "teacher"), path, str(tmp_path), data)
    said = [line for lines in results for line in lines]
    assert said == [f"model.pair.norm_init=calibrated: there is no {missing}, the branch norms start at one"]
    assert not (tmp_path / FILE).exists() and not out.exists()


def _said(rank: int, *arguments) -> list[str]:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        found = _first_weights(rank, *arguments)
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in found["norms"].values())
    assert found["measured"] == {} and not math.isnan(sum(norm.sum().item() for norm in found["norms"].values()))
    return text.getvalue().splitlines()


def test_ones_measure_nothing_but_the_experts(run_ranks, tmp_path):
    save_tiny(tmp_path / "teacher", "qwen2")
    model = hybrid(tmp_path / "teacher", pair=PairConfig(False, MergeInit.ones, 3 * NUM_TOKENS))
    (found,) = run_ranks(1)(_first_weights, Layout(), model, str(tmp_path / "teacher"), str(tmp_path))
    assert list(found["measured"]) == ["upcycling"]
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in found["norms"].values())

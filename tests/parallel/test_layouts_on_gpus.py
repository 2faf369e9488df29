"""The engine on GPUs and NCCL: one GPU equals the CPU, two and four equal one; in bf16 within its rounding."""

from __future__ import annotations

import math
from functools import cache

import pytest

from layout_case import check_equal, one_step, packed_rows, small_model
from parallel.layout import Layout
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, PairConfig
from sbtrain.config.schema import Precision
from sharding import local_shard
from test_interleaving import eight_layers, late_step
from test_layouts import LAYOUTS

PAIRS = [name for name, (num_ranks, _) in LAYOUTS.items() if num_ranks == 2]
QUADS = ["sp4", "sp4_states", "sp4_zeco", "tp2_sp2_zeco", "pp2_sp2_states"]
ON_GPUS = [pytest.param(name, marks=pytest.mark.multigpu(2)) for name in PAIRS]
ON_GPUS += [pytest.param(name, marks=pytest.mark.multigpu(4)) for name in QUADS]
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
MADE_OF_PAIRS = [
    dict(pattern="(LS)(LF)", gla=TIED, meta=MetaConfig(num_tokens=32), pair=PairConfig(shared_projections=shared))
    for shared in (False, True)
]
TIMEOUT_S = 400.0  # kernels compile


def kernel_model(**changes):
    """Head and hidden sizes that the kernels were made for."""
    return small_model(
        **{**dict(hidden_size=256, head_dim=64, ffn_size=384, num_heads=6, num_kv_heads=2, window=100), **changes}
    )


ODD = small_model(num_heads=9, num_kv_heads=3, tie_embeddings=True, qkv_bias=False, qk_norm=True)
CASES = {
    "small": (small_model(), packed_rows(4, 48, 120)),
    "odd": (ODD, packed_rows(2, 42, 120)),
    "kernels": (kernel_model(), packed_rows(2, 500, 120)),
}
"""A model and its rows."""


@pytest.fixture(scope="module")
def one_gpu(run_ranks):
    """one_gpu(case, precision): its step on one GPU, taken once."""

    @cache
    def step(case: str, precision: Precision = Precision.fp32) -> dict:
        one = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)
        return one(one_step, Layout(), *CASES[case], precision=precision)[0]

    return step


def on_gpus(run_ranks, name: str, case: str, precision: Precision = Precision.fp32) -> list[dict]:
    """Its step on the GPUs of a layout, by rank."""
    num_ranks, layout = LAYOUTS[name]
    ranks = run_ranks(num_ranks, backend="nccl", timeout_s=TIMEOUT_S)
    return ranks(one_step, layout, *CASES[case], precision=precision)


def distance(result: dict, whole: dict) -> dict[str, float]:
    """How far a rank's step is from the fp32 one: relative differences of the losses, and of all gradients as one."""
    apart = {key: abs(result[key] / whole[key] - 1) for key in ("loss", "grad_norm", "after")}
    squares = [0.0, 0.0]
    for name, grad in result["grads"].items():
        tied = name == "output_layer.weight" and name not in whole["grads"]
        source = whole["grads"]["embedding.word_embeddings.weight" if tied else name]
        expected = local_shard(name, source, **result["place"]).double()
        squares[0] += float((grad.double() - expected).pow(2).sum())
        squares[1] += float(expected.pow(2).sum())
    return {**apart, "grads": math.sqrt(squares[0] / squares[1])}


def check_near(result: dict, whole: dict, *, allowed: dict[str, float]) -> None:
    """Rounding alone. The gradients' distance is a mean over many numbers, and must be that of another bf16 step; the
    others are one number each, which another step may have hit by luck: several times theirs, or a small part of the
    gradients' distance, above which a single number seldom is."""
    for key, apart in distance(result, whole).items():
        floor = 1.5 * allowed[key] if key == "grads" else max(4 * allowed[key], 0.03 * allowed["grads"])
        assert apart <= max(floor, 1e-3), (key, apart, allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, *MADE_OF_PAIRS], ids=["plain", "pairs", "shared"])
def test_one_gpu_in_fp32_equals_the_cpu(run_ranks, changes):
    model, rows = small_model(**changes), packed_rows(2, 48, 120)
    (cpu,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(one_step, Layout(), model, rows), cpu)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, dict(num_heads=9, num_kv_heads=3, tie_embeddings=True, qk_norm=True), *MADE_OF_PAIRS],
    ids=["plain", "odd heads", "pairs", "shared"],
)
def test_one_gpu_in_bf16_is_as_near_to_fp32_as_the_references(run_ranks, changes):
    """The kernels may round no worse than plain torch does in bf16 on the CPU."""
    model, rows = kernel_model(**changes), packed_rows(2, 500, 120)
    cpu = run_ranks(1, timeout_s=TIMEOUT_S)
    (whole,) = cpu(one_step, Layout(), model, rows)
    (reference,) = cpu(one_step, Layout(), model, rows, precision=Precision.bf16)
    gpu = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)
    (result,) = gpu(one_step, Layout(), model, rows, precision=Precision.bf16)
    check_near(result, whole, allowed=distance(reference, whole))


@pytest.mark.parametrize("name", ON_GPUS)
def test_several_gpus_in_fp32_equal_one(name, run_ranks, one_gpu):
    check_equal(on_gpus(run_ranks, name, "small"), one_gpu("small"))


@pytest.mark.multigpu
@pytest.mark.parametrize("name", ["pp2", "sp2"])
def test_odd_heads_and_tied_embeddings_on_two_gpus(name, run_ranks, one_gpu):
    check_equal(on_gpus(run_ranks, name, "odd"), one_gpu("odd"))


@pytest.mark.parametrize("name", ON_GPUS)
def test_several_gpus_in_bf16_are_as_near_to_fp32_as_one(name, run_ranks, one_gpu):
    whole = one_gpu("kernels")
    allowed = distance(one_gpu("kernels", Precision.bf16), whole)
    for result in on_gpus(run_ranks, name, "kernels", Precision.bf16):
        check_near(result, whole, allowed=allowed)


@pytest.mark.multigpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [Layout(pp=2, vpp=2), Layout(pp=2, vpp=3, pp_layers=(2, 1, 1, 2, 1, 1))], ids=str)
def test_interleaved_stages_on_two_gpus(layout, tied, run_ranks):
    """Messages of both kinds go between the same two stages: a wrong order would be silent."""
    model, rows = eight_layers(tie_embeddings=tied), packed_rows(12, 48, 120)
    (whole,) = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(one_step, Layout(), model, rows)
    check_equal(run_ranks(2, backend="nccl", timeout_s=TIMEOUT_S)(one_step, layout, model, rows), whole)


@pytest.mark.multigpu
@pytest.mark.parametrize("late_rank", [0, 1])
def test_nothing_is_freed_on_a_gpu_before_a_late_stage_has_received_it(late_rank, run_ranks):
    model, rows = small_model(pattern="L", hidden_size=256, head_dim=64), packed_rows(6, 8192, 120)
    (whole,) = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(one_step, Layout(), model, rows)
    ranks = run_ranks(2, backend="nccl", timeout_s=TIMEOUT_S)
    check_equal(ranks(late_step, late_rank, Layout(pp=2, vpp=2), model, rows), whole)


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("layout", [Layout(pp=4, vpp=2), Layout(pp=2, vpp=2), Layout(pp=2, vpp=2, tp=2)], ids=str)
def test_interleaved_stages_on_four_gpus(layout, run_ranks):
    """Overlapping reductions too, from the second step on."""
    model, rows = eight_layers(tie_embeddings=True), packed_rows(16, 48, 120)
    (whole,) = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(one_step, Layout(), model, rows, num_steps=2)
    check_equal(run_ranks(4, backend="nccl", timeout_s=TIMEOUT_S)(one_step, layout, model, rows, num_steps=2), whole)


@pytest.mark.multigpu
@pytest.mark.parametrize("changes", MADE_OF_PAIRS, ids=["pairs", "shared"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_behind_meta_tokens_on_two_gpus(name, changes, run_ranks):
    _, layout = LAYOUTS[name]
    model, rows = small_model(**changes), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(one_step, Layout(), model, rows)
    check_equal(run_ranks(2, backend="nccl", timeout_s=TIMEOUT_S)(one_step, layout, model, rows), whole)

"""What an op must do at least: FLOPs, bytes and ceilings of `bench.py ops` against counts by hand."""

import pytest
import torch

from sbtrain.bench import ops_ceilings
from sbtrain.bench.ops_case import Draw, leaves, moved_bytes, useful_flops, wanted
from sbtrain.bench.ops_shapes import cases, document_edges, moba_pairs, visible_pairs
from sbtrain.bench.shapes import TINY, model_config
from sbtrain.model.flops import flops_per_token

CPU = torch.device("cpu")
MODEL = model_config("tiny", num_layers=2, pattern="LS")
CASES = {case.title: case for case in cases(MODEL)}
WINDOW = f"attention window {TINY.window}"


def inputs_of(title: str, num_tokens: int, dtype=torch.bfloat16):
    return CASES[title].inputs(Draw(CPU, dtype, 0), num_tokens)


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("edges", [[0, 37], [0, 1, 1, 20, 37]])
def test_visible_pairs_are_those_of_the_mask(edges, window):
    """Counted in the matrix of all pairs."""
    document = torch.bucketize(torch.arange(37), torch.tensor(edges[1:-1]), right=True)
    query, key = torch.arange(37)[:, None], torch.arange(37)
    seen = (key <= query) & (document[:, None] == document) & (query - key < (window or 37))
    assert visible_pairs(edges, window) == int(seen.sum())


@pytest.mark.parametrize("num_tokens", [3, 8, 30, 32])
def test_moba_pairs_are_those_of_the_choice(num_tokens):
    """Chunks of 8, three attended: the own one causally, two of the past in full where there are two."""
    expected = sum(t % 8 + 1 + 8 * min(t // 8, 2) for t in range(num_tokens))
    assert moba_pairs(num_tokens, 8, 3) == expected


def test_document_edges_rise_to_the_length():
    edges = document_edges(1000)
    assert edges[0] == 0 and edges[-1] == 1000 and edges == sorted(edges) and len(edges) == 8


def test_flops_agree_with_the_model_count():
    """The count of `sbtrain/model/flops.py` for one layer of the kind; attention with backward is 3.5."""
    num_tokens, parts = 40, flops_per_token(MODEL, 40)
    assert useful_flops(CASES["gla"], num_tokens, "forward") == num_tokens * parts["gated_linear_attention"]
    assert useful_flops(CASES["gla"], num_tokens, "both") == 3 * num_tokens * parts["gated_linear_attention"]
    assert useful_flops(CASES[WINDOW], num_tokens, "forward") == pytest.approx(num_tokens * parts["sliding_window"])
    assert useful_flops(CASES[WINDOW], num_tokens, "both") == pytest.approx(3.5 * num_tokens * parts["sliding_window"])
    assert useful_flops(CASES["linear_cross_entropy mean"], num_tokens, "both") == 6 * 40 * 32 * 120
    assert useful_flops(CASES["grouped_mm 8 experts, balanced"], num_tokens, "forward") == 2 * 40 * 32 * 48
    assert useful_flops(CASES["rms_norm"], num_tokens, "both") == 0


def test_a_halo_has_no_queries():
    halo, x = CASES[f"{WINDOW}, halo"], inputs_of(f"{WINDOW}, halo", 40)
    assert (x["q"].shape[1], x["k"].shape[1]) == (30, 40) and x["q"].is_leaf
    seen = sum(min(t + 1, TINY.window) for t in range(10, 40))
    assert useful_flops(halo, 40, "forward") == 4 * 8 * 4 * seen


def test_sinks_are_seen_by_every_query():
    sinks, plain = (useful_flops(CASES[name], 40, "forward") for name in (f"{WINDOW}, 128 sinks", WINDOW))
    assert sinks - plain == 4 * 8 * 4 * 128 * 40  # 4 x head size x query heads x sinks x queries


@pytest.mark.parametrize(
    "title, forward, both",
    [
        # bf16 gate_up [T, 96], y [T, 48]; backward reads gate_up and grad_y, writes the gradient of gate_up
        ("swiglu", 2 * (96 + 48), 2 * (96 + 48) + 2 * (96 + 48 + 96)),
        # q, k [T, 4 + 2 heads x 8], positions of 8 bytes, 4 fp32 frequencies a row of 10; x is not read again
        ("rope queries and keys", 2 * 2 * 48 + 8 + 1.6, 4 * 2 * 48 + 16 + 3.2),
        # x, y [T, 32] and a weight of 32 in a row of 10; backward reads x, weight and grad_y, writes both gradients
        ("rms_norm", 2 * 2 * 32 + 6.4, 5 * 2 * 32 + 3 * 6.4),
        # x, residual, y, sum; backward reads sum, weight and two upstream gradients, writes one for x and residual
        ("rms_norm with residual", 4 * 2 * 32 + 6.4, 8 * 2 * 32 + 3 * 6.4),
        # q, o [T, 32], k, v [T, 16] in bf16, decays [T, 16] in fp32; backward reads all and writes as many gradients
        ("gla", 2 * 96 + 64, (2 * 96 + 64) + (2 * 96 + 64) + (2 * 64 + 64)),
        ("spike_count", 2 * 32 + 4 * 32 + 4, None),
        ("spike_count values, FFN", 2 * 48 + 2 * 48, None),
        ("spike_encode decode 8 steps", 8 * 4 * 32 + 4 * 32, None),
    ],
)
def test_moved_bytes_are_each_input_and_output_once(title, forward, both):
    case, inputs = CASES[title], inputs_of(title, 10)
    reference = __import__(f"ops.{case.op}.reference", fromlist=["reference"])
    functions = vars(reference)
    outputs = case.call(functions, inputs)
    assert moved_bytes(case, inputs, outputs, "forward") == pytest.approx(10 * forward)
    if both is not None:
        assert moved_bytes(case, inputs, outputs, "both") == pytest.approx(10 * both)


@pytest.mark.parametrize("title", CASES)
def test_inputs_are_leaves_that_repeat_for_a_seed(title):
    case = CASES[title]
    first, again, other = (case.inputs(Draw(CPU, torch.float32, seed), 24) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(x.is_leaf and x.isfinite().all() for x in first.values() if x.is_floating_point())
    assert wanted(leaves(first)).keys() == wanted(first).keys()


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(ops_ceilings, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ops_ceilings, "GEMM_SIZE", {"cpu": 64})
    limits = ops_ceilings.ceilings(CPU, torch.bfloat16)
    assert limits["copy_gb_per_s"] > 0.1 and limits["gemm_tflops"] > 1e-5
    assert (limits["copy_bytes"], limits["gemm_size"], limits["gemm_dtype"]) == (2**20, 64, "bfloat16")


def test_the_ceiling_that_binds_gives_the_unit():
    """4 GB/s and 2 TFLOP/s: 8 GB take 2 s, 6 TFLOP 3 s."""
    limits = {"copy_gb_per_s": 4.0, "gemm_tflops": 2.0}
    assert ops_ceilings.floor_ms(1e12, 8e9, limits) == (2000.0, "GB/s")
    assert ops_ceilings.floor_ms(6e12, 8e9, limits) == (3000.0, "TFLOP/s")

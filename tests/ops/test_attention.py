"""ops.attention against a dense float64 softmax, and the band of visible keys that the kernels read."""

import pytest
import torch

import op_oracles
import ops
from op_oracles import assert_same, cu, gradients
from ops.attention.visible import visible

RAGGED = cu(0, 0, 1, 2, 63, 63, 64, 129, 200, 200)


def inputs(num_tokens, *, num_sinks=0, dtype=torch.float64):
    shapes = [(1, num_tokens, 4, 8), (1, num_tokens, 2, 8), (1, num_tokens, 2, 6)]
    if num_sinks:
        shapes += [(num_sinks, 2, 8), (num_sinks, 2, 6)]
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def run(tensors, function, **kwargs):
    sinks = {"sink_k": tensors[3], "sink_v": tensors[4]} if len(tensors) > 3 else {}
    return list(function(*tensors[:3], **sinks, **kwargs))


@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 7, 128])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 200])
def test_one_document(num_tokens, window, num_sinks):
    tensors = inputs(num_tokens, num_sinks=num_sinks)
    expected = run(tensors, op_oracles.attention, window=window)
    actual = run(tensors, ops.attention, window=window, return_lse=True)
    assert_same(actual, expected, 1e-12, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-12, "gradients")


@pytest.mark.parametrize("window, num_sinks", [(None, 0), (20, 0), (20, 2)])
def test_ragged_documents(window, num_sinks):
    tensors = inputs(200, num_sinks=num_sinks)
    expected = run(tensors, op_oracles.attention, window=window, cu_seqlens=RAGGED)
    actual = run(tensors, ops.attention, window=window, cu_seqlens=RAGGED, return_lse=True)
    assert_same(actual, expected, 1e-12, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-12, "gradients")


def test_rows_are_documents_and_lse_is_optional():
    tensors = [torch.randn(3, 150, heads, 8) for heads in (4, 2, 2)]
    actual = ops.attention(*tensors, window=33)
    for row in range(3):
        expected = op_oracles.attention(*(x[row : row + 1].double() for x in tensors), window=33)[0]
        assert_same([actual[row : row + 1]], [expected], 1e-5)


def test_fp32_is_close_to_float64():
    exact = inputs(300)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    expected, actual = run(exact, op_oracles.attention), run(rounded, ops.attention, return_lse=True)
    assert_same(actual, expected, 1e-5, "outputs")
    assert_same(gradients(actual, rounded), gradients(expected, exact), 1e-5, "gradients")


@pytest.mark.parametrize(
    "edges, window",
    [((0, 70), None), ((0, 70), 1), ((0, 70), 13), ((0, 1, 1, 13, 26, 64, 70), None), ((0, 0, 30, 70, 70), 13)],
)
def test_band_of_visible_keys(edges, window):
    first, last = visible(cu(*edges), window, 70, torch.device("cpu"))
    expected = torch.zeros(70, 70, dtype=torch.bool)
    for start, end in zip(edges, edges[1:]):
        for t in range(start, end):
            expected[t, start if window is None else max(start, t - window + 1) : t + 1] = True
    query, key = torch.arange(70)[:, None], torch.arange(70)[None]
    assert torch.equal((key >= first[:, None]) & (key <= query), expected)
    assert torch.equal((query >= key) & (query <= last[None]), expected)
    assert first.dtype == last.dtype == torch.int32


def test_band_is_made_once_per_cu_seqlens():
    row, device = cu(0, 30, 200), torch.device("cpu")
    band = visible(row, 16, 200, device)
    assert visible(row, 16, 200, device) is band
    assert visible(row, 17, 200, device) is not band
    row[1] = 31
    assert visible(row, 16, 200, device) is not band


def test_wrong_arguments_are_refused_in_one_line():
    q, k, v = (x.detach() for x in inputs(6))
    with pytest.raises(ValueError, match="window must be at least 1"):
        ops.attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="heads a multiple"):
        ops.attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="sink_k and sink_v go together"):
        ops.attention(q, k, v, sink_k=k[0])
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        ops.attention(q, k, v, cu_seqlens=cu(0, 4, 3, 6))

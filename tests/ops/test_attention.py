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


@pytest.mark.parametrize("edges", [None, (0, 0, 1, 2, 63, 63, 64, 129, 200, 200), (0, 100, 200)])
@pytest.mark.parametrize("window, num_sinks", [(None, 0), (1, 0), (20, 0), (20, 2)])
@pytest.mark.parametrize("num_queries", [1, 63, 100, 199, 200])
def test_fewer_queries_than_keys_are_the_last(num_queries, window, num_sinks, edges):
    tensors = inputs(200, num_sinks=num_sinks)
    documents = None if edges is None else cu(*edges)
    whole = run(tensors, op_oracles.attention, window=window, cu_seqlens=documents)
    expected = [x[:, -num_queries:] for x in whole]
    last = [tensors[0][:, -num_queries:], *tensors[1:]]
    actual = run(last, ops.attention, window=window, cu_seqlens=documents, return_lse=True)
    assert_same(actual, expected, 1e-12, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-12, "gradients")


def test_keys_that_no_query_sees_get_no_gradient():
    q, k, v = inputs(200)
    o = ops.attention(q[:, 150:], k, v, window=20, cu_seqlens=cu(0, 100, 140, 200))
    for x in torch.autograd.grad(o.sum(), (k, v)):
        assert not x[:, :140].any() and x[:, 140:].all()


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


def band(cu_seqlens, window, *, num_tokens=70, num_queries=70):
    return visible(cu_seqlens, window, num_queries=num_queries, num_tokens=num_tokens, device=torch.device("cpu"))


@pytest.mark.parametrize("num_queries", [70, 69, 40, 1])
@pytest.mark.parametrize(
    "edges, window",
    [((0, 70), None), ((0, 70), 1), ((0, 70), 13), ((0, 1, 1, 13, 26, 64, 70), None), ((0, 0, 30, 70, 70), 13)],
)
def test_band_of_visible_keys(edges, window, num_queries):
    first, last = band(cu(*edges), window, num_queries=num_queries)
    expected = torch.zeros(70, 70, dtype=torch.bool)
    for start, end in zip(edges, edges[1:]):
        for t in range(start, end):
            expected[t, start if window is None else max(start, t - window + 1) : t + 1] = True
    ahead = 70 - num_queries
    query, key = torch.arange(num_queries)[:, None], torch.arange(70)[None]
    assert torch.equal((key >= first[:, None]) & (key <= ahead + query), expected[ahead:])
    assert torch.equal((query >= key - ahead) & (query <= last[None]), expected[ahead:])
    assert (last.diff() >= 0).all() and last[0] >= -1
    assert first.dtype == last.dtype == torch.int32


def test_band_is_made_once_per_cu_seqlens():
    row, lengths = cu(0, 30, 200), dict(num_tokens=200, num_queries=200)
    found = band(row, 16, **lengths)
    assert band(row, 16, **lengths) is found
    assert band(row, 17, **lengths) is not found
    assert band(row, 16, num_tokens=200, num_queries=100) is not found
    row[1] = 31
    assert band(row, 16, **lengths) is not found


def test_wrong_arguments_are_refused_in_one_line():
    q, k, v = (x.detach() for x in inputs(6))
    with pytest.raises(ValueError, match="window must be at least 1"):
        ops.attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="heads a multiple"):
        ops.attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="heads a multiple"):
        ops.attention(torch.cat([q, q]), k, v)
    with pytest.raises(ValueError, match="no more tokens than k and v, .* got 6 for 5"):
        ops.attention(q, k[:, :5], v[:, :5])
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        ops.attention(q[:, 2:], k, v, cu_seqlens=cu(0, 2, 4))
    with pytest.raises(ValueError, match="sink_k and sink_v go together"):
        ops.attention(q, k, v, sink_k=k[0])
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        ops.attention(q, k, v, cu_seqlens=cu(0, 4, 3, 6))

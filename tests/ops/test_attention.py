"""ops.attention against a dense float64 softmax, and the block mask of the CUDA backend against the same visibility."""

import pytest
import torch

import op_oracles
import ops
from op_oracles import assert_same, cu, gradients
from ops import documents

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
    "edges, window, num_sinks",
    [
        ((0, 700), 129, 0),
        ((0, 1, 1, 130, 256, 640, 700), None, 0),
        ((0, 300, 700), 128, 0),
        ((0, 300, 700), 65, 5),
        ((0, 700), None, 200),
    ],
)
def test_block_mask_of_the_cuda_backend(edges, window, num_sinks):
    from ops.attention.cuda import BLOCK_TOKENS, block_mask

    first = documents.first_visible(cu(*edges), window, num_tokens=700, device="cpu")
    mask = block_mask(first, num_sinks)
    query, key = torch.arange(700)[:, None], torch.arange(700 + num_sinks)[None]
    seen = mask.mask_mod(0, 0, query, key)
    expected = torch.zeros(700, 700 + num_sinks, dtype=torch.bool)
    for start, end in zip(edges, edges[1:]):
        for t in range(start, end):
            left = start if window is None else max(start, t - window + 1)
            expected[t, num_sinks + left : num_sinks + t + 1] = True
    expected[:, :num_sinks] = True
    assert torch.equal(seen.expand_as(expected), expected)
    rows, columns = (-(-size // BLOCK_TOKENS) for size in expected.shape)
    some, every = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            block = expected[i * BLOCK_TOKENS :, j * BLOCK_TOKENS :][:BLOCK_TOKENS, :BLOCK_TOKENS]
            some[i, j], every[i, j] = block.any(), block.all()
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    full = [set(mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]].tolist()) for i in range(rows)]
    partial_columns = (
        columns - 1 if expected.shape[1] % BLOCK_TOKENS else columns
    )  # the last block may count as partial
    for i in range(rows):
        assert {j for j in full[i] if j < partial_columns} == set(every[i, :partial_columns].nonzero()[:, 0].tolist())
        assert all(every[i, j] for j in full[i])


def test_block_mask_is_made_once_per_cu_seqlens():
    from ops.attention.cuda import _mask

    row = cu(0, 30, 200)
    mask = _mask(row, 16, 200, 0, torch.device("cpu"))
    assert _mask(row, 16, 200, 0, torch.device("cpu")) is mask
    assert _mask(row, 17, 200, 0, torch.device("cpu")) is not mask
    row[1] = 31
    assert _mask(row, 16, 200, 0, torch.device("cpu")) is not mask


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

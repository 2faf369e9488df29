"""ops.gated_delta_rule and ops.moba against float64 loops."""

import pytest
import torch

import op_oracles
import ops
from op_oracles import assert_same, cu, gradients

RAGGED = cu(0, 0, 1, 2, 63, 63, 64, 129, 150, 150)


def delta_inputs(num_tokens, *, strength, num_documents=None):
    tensors = [torch.randn(1, num_tokens, 4, 8), torch.randn(1, num_tokens, 2, 8), torch.randn(1, num_tokens, 2, 5)]
    tensors += [-2 * strength * torch.rand(1, num_tokens, 2), torch.rand(1, num_tokens, 2)]
    if num_documents:
        tensors.append(torch.randn(num_documents, 2, 8, 5))
    return [x.double().requires_grad_() for x in tensors]


def run(tensors, function, **kwargs):
    state = tensors[5] if len(tensors) > 5 else None
    return list(function(*tensors[:5], initial_state=state, qk_l2norm=True, **kwargs))


@pytest.mark.parametrize("strength", [0.05, 5.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 150])
def test_delta_rule_one_document(num_tokens, strength):
    tensors = delta_inputs(num_tokens, strength=strength, num_documents=1)
    expected = run(tensors, op_oracles.gated_delta_rule)
    actual = run(tensors, ops.gated_delta_rule, output_final_state=True)
    assert_same(actual, expected, 1e-10, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-10, "gradients")


@pytest.mark.parametrize("with_state", [False, True])
def test_delta_rule_ragged_documents(with_state):
    tensors = delta_inputs(150, strength=0.3, num_documents=9 if with_state else None)
    expected = run(tensors, op_oracles.gated_delta_rule, cu_seqlens=RAGGED)
    actual = run(tensors, ops.gated_delta_rule, cu_seqlens=RAGGED, output_final_state=with_state)
    if not with_state:
        expected, actual = expected[:1], actual[:1]
    assert_same(actual, expected, 1e-10, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-10, "gradients")


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 50])
@pytest.mark.parametrize("edges", [(0, 1), (0, 47), (0, 8, 8, 9, 40, 47)])
def test_moba(edges, num_chunks):
    tensors = [torch.randn(1, edges[-1], heads, 6).double().requires_grad_() for heads in (4, 2, 2)]
    settings = {"chunk_tokens": 8, "num_chunks": num_chunks, "cu_seqlens": cu(*edges)}
    expected, actual = [op_oracles.moba(*tensors, **settings)], [ops.moba(*tensors, **settings)]
    assert_same(actual, expected, 1e-10, "output")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-10, "gradients")


def test_moba_with_all_chunks_is_full_attention():
    tensors = [torch.randn(1, 300, heads, 6).double() for heads in (4, 2, 2)]
    full = op_oracles.attention(*tensors)[0]
    assert_same([ops.moba(*tensors, chunk_tokens=32, num_chunks=10)], [full], 1e-10)

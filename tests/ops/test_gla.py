"""ops.gla and its halves against a float64 token loop: outputs and every gradient."""

import pytest
import torch

import op_oracles
import ops
from op_oracles import assert_same, cu, gradients

RAGGED = cu(0, 0, 1, 2, 63, 63, 64, 129, 200, 200)


def inputs(num_tokens, *, strength, dtype=torch.float64, rows=1, num_documents=None):
    """q, k, v, log_decay (uniform in -2 strength .. 0) and, with num_documents, an initial state."""
    tensors = [torch.randn(rows, num_tokens, 4, 8), torch.randn(rows, num_tokens, 2, 8)]
    tensors += [torch.randn(rows, num_tokens, 2, 5), -2 * strength * torch.rand(rows, num_tokens, 2, 8)]
    if num_documents:
        tensors.append(torch.randn(num_documents, 2, 8, 5))
    return [x.to(dtype).requires_grad_() for x in tensors]


def run(tensors, function, **kwargs):
    """[o, final] of a function."""
    state = tensors[4] if len(tensors) > 4 else None
    return list(function(*tensors[:4], initial_state=state, **kwargs))


@pytest.mark.parametrize("strength", [0.05, 5.0])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 200])
def test_one_document(num_tokens, with_state, strength):
    tensors = inputs(num_tokens, strength=strength, num_documents=1 if with_state else None)
    expected = run(tensors, op_oracles.gla)
    actual = run(tensors, ops.gla, output_final_state=True)
    assert_same(actual, expected, 1e-12, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-12, "gradients")


@pytest.mark.parametrize("strength", [0.05, 5.0])
@pytest.mark.parametrize("with_state, output_final_state", [(False, False), (True, False), (False, True), (True, True)])
def test_ragged_documents(with_state, output_final_state, strength):
    tensors = inputs(200, strength=strength, num_documents=9 if with_state else None)
    expected = run(tensors, op_oracles.gla, cu_seqlens=RAGGED)
    actual = run(tensors, ops.gla, cu_seqlens=RAGGED, output_final_state=output_final_state)
    if not output_final_state:
        assert actual.pop() is None
        expected.pop()
    assert_same(actual, expected, 1e-12, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-12, "gradients")


def test_rows_are_documents():
    tensors = inputs(70, strength=0.1, rows=3, num_documents=3)
    actual = run(tensors, ops.gla, output_final_state=True)
    for row in range(3):
        expected = op_oracles.gla(*(x[row : row + 1] for x in tensors[:4]), initial_state=tensors[4][row : row + 1])
        assert_same([x[row : row + 1] for x in actual], expected, 1e-12)


@pytest.mark.parametrize("strength, tolerance", [(0.02, 1e-5), (1.0, 1e-5), (10.0, 5e-5)])
def test_fp32_is_close_to_float64(strength, tolerance):
    exact = inputs(300, strength=strength, num_documents=1)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    expected, actual = run(exact, op_oracles.gla), run(rounded, ops.gla, output_final_state=True)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_same(actual, expected, tolerance, "outputs")
    assert_same(gradients(actual, rounded), gradients(expected, exact), tolerance, "gradients")


def test_bf16_rounds_only_inputs_and_output():
    tensors = [x.detach().bfloat16() for x in inputs(100, strength=0.1)]
    actual = ops.gla(*tensors)[0]
    assert actual.dtype == torch.bfloat16
    assert_same([actual], [op_oracles.gla(*(x.double() for x in tensors))[0].bfloat16()], 1e-3)


def test_strong_decay_is_finite_everywhere():
    tensors = [x.detach().float().requires_grad_() for x in inputs(256, strength=20.0)]
    o, _ = ops.gla(*tensors)
    assert all(x.isfinite().all() for x in [o, *gradients([o], tensors)])


def test_decoding_continues_prefill():
    tensors = [x.detach() for x in inputs(40, strength=0.1)]
    whole, final = ops.gla(*tensors, output_final_state=True)
    o, state = ops.gla(*(x[:, :37] for x in tensors), output_final_state=True)
    outputs = [o]
    for t in range(37, 40):
        o, state = ops.gla(*(x[:, t : t + 1] for x in tensors), initial_state=state, output_final_state=True)
        outputs.append(o)
    assert_same([torch.cat(outputs, 1), state], [whole, final], 1e-12)


# A row of 96 tokens in shards of 32, with the documents of each shard as ops.gla_state asks for them: document 0 enters
# from the left, the last one leaves to the right.
SHARDED = [
    (cu(0, 96), [cu(0, 32), cu(0, 32), cu(0, 32)]),
    (cu(0, 10, 10, 11, 40, 96), [cu(0, 10, 10, 11, 32), cu(0, 8, 32), cu(0, 32)]),
    (cu(0, 32, 90, 96), [cu(0, 32, 32), cu(0, 32), cu(0, 26, 32)]),
    (cu(0, 32, 96), [cu(0, 32), cu(0, 0, 32), cu(0, 32)]),
]


@pytest.mark.parametrize("row, shards", SHARDED)
def test_state_and_output_compose_to_gla(row, shards):
    tensors = inputs(96, strength=0.1)
    expected = [op_oracles.gla(*tensors, cu_seqlens=row)[0]]
    state, outputs = tensors[0].new_zeros(2, 8, 5), []
    for rank, documents in enumerate(shards):
        q, k, v, log_decay = (x[:, 32 * rank : 32 * (rank + 1)] for x in tensors)
        outputs.append(ops.gla_output(q, k, v, log_decay, state, cu_seqlens=documents))
        added, total = ops.gla_state(k, v, log_decay, cu_seqlens=documents)
        assert bool((total == -torch.inf).all()) == (len(documents) > 2)
        state = total.exp()[..., None] * state + added
    actual = [torch.cat(outputs, 1)]
    assert_same(actual, expected, 1e-12, "output")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-12, "gradients")


def test_gla_state_equals_final_state():
    tensors = inputs(50, strength=0.5)
    _, final = op_oracles.gla(*tensors)
    state, total = ops.gla_state(*tensors[1:])
    assert_same([state, total], [final[0], tensors[3][0].sum(0)], 1e-12)


def test_wrong_shapes_are_refused_in_one_line():
    q, k, v, log_decay = (x.detach() for x in inputs(6, strength=1.0))
    with pytest.raises(ValueError, match="log_decay must have k's shape"):
        ops.gla(q, k, v, log_decay[..., :3])
    with pytest.raises(ValueError, match="Hq a multiple"):
        ops.gla(q[:, :, :3], k, v, log_decay)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 6"):
        ops.gla(q, k, v, log_decay, cu_seqlens=cu(0, 5))
    with pytest.raises(ValueError, match="initial_state must be"):
        ops.gla(q, k, v, log_decay, initial_state=q.new_zeros(2, 2, 8, 5))
    with pytest.raises(ValueError, match="cu_seqlens goes with one row"):
        ops.gla(*(x.repeat(2, 1, 1, 1) for x in (q, k, v, log_decay)), cu_seqlens=cu(0, 6))

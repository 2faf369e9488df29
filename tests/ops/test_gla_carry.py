"""ops.gla_carry against a float64 token loop, and with ops.gla against ops.gla_output: outputs and every gradient."""

import pytest
import torch

import op_oracles
import ops
from op_oracles import assert_same, cu, gradients

LENGTHS = [1, 2, 63, 64, 65, 200]
DOCUMENTS = [None, cu(0, 70, 70, 130, 200), cu(0, 0, 130, 200), cu(0, 200, 200), cu(0, 1, 200), cu(0, 0, 0, 200)]


def inputs(num_tokens, *, strength, heads=(6, 2)):
    """q, k, v, log_decay (uniform in -2 strength .. 0) and the state that enters, fp64."""
    shapes = [(heads[0], 8), (heads[1], 8), (heads[1], 5)]
    tensors = [torch.randn(1, num_tokens, *shape) for shape in shapes]
    tensors += [-2 * strength * torch.rand(1, num_tokens, heads[1], 8), torch.randn(heads[1], 8, 5)]
    return [x.double().requires_grad_() for x in tensors]


def in_two_steps(q, k, v, log_decay, state, **options):
    """ops.gla_output as ops.gla, which does not know the state, and ops.gla_carry."""
    o, _ = ops.gla(q, k, v, log_decay, **options)
    return [ops.gla_carry(o, q, log_decay, state, **options)]


def same(actual, expected, tensors, tolerance=1e-12):
    assert_same(actual, expected, tolerance, "output")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), tolerance, "gradients")


@pytest.mark.parametrize("strength", [0.0, 0.05, 5.0])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_gla_then_gla_carry_is_gla_output(num_tokens, heads, strength):
    tensors = inputs(num_tokens, strength=strength, heads=heads)
    same(in_two_steps(*tensors), [ops.gla_output(*tensors)], tensors)


@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
def test_only_document_0_is_entered(documents):
    tensors, options = inputs(200, strength=0.05), dict(cu_seqlens=documents, scale=0.3)
    same(in_two_steps(*tensors, **options), [ops.gla_output(*tensors, **options)], tensors)
    num_documents = 1 if documents is None else len(documents) - 1
    states = torch.cat([tensors[4][None], torch.zeros(num_documents - 1, 2, 8, 5).double()])
    expected, _ = op_oracles.gla(*tensors[:4], initial_state=states, **options)
    same(in_two_steps(*tensors, **options), [expected], tensors)


@pytest.mark.parametrize("documents", [None, cu(0, 30, 70)])
def test_against_the_token_loop(documents):
    """Without keys and values, all that comes out is what came in."""
    q, _, _, log_decay, state = inputs(70, strength=0.2)
    o = torch.randn(1, 70, 6, 5, dtype=torch.float64, requires_grad=True)
    expected, entered = o[0].unbind(0), 70 if documents is None else 30
    expected, carried = list(expected), state
    for t in range(entered):
        carried = log_decay[0, t].exp()[:, :, None] * carried
        expected[t] = expected[t] + 8**-0.5 * torch.einsum("hk,hkv->hv", q[0, t], carried.repeat_interleave(3, 0))
    actual = [ops.gla_carry(o, q, log_decay, state, cu_seqlens=documents)]
    same(actual, [torch.stack(expected)[None]], [o, q, log_decay, state])


def test_an_empty_document_0_has_gradients_of_zero():
    """They are there, for collectives that wait for them in the backward pass."""
    q, _, v, log_decay, state = inputs(20, strength=0.2)
    o = torch.randn(1, 20, 6, 5, dtype=torch.float64)
    actual = ops.gla_carry(o.clone(), q, log_decay, state, cu_seqlens=cu(0, 0, 20))
    assert torch.equal(actual, o)
    found = torch.autograd.grad(actual.sum(), [q, log_decay, state])
    assert not any(x.any() for x in found)


def test_gradcheck():
    q, _, _, log_decay, state = inputs(5, strength=0.5, heads=(3, 1))
    o = torch.randn(1, 5, 3, 5, dtype=torch.float64, requires_grad=True)
    options = dict(cu_seqlens=cu(0, 3, 5))
    assert torch.autograd.gradcheck(lambda *x: ops.gla_carry(*x, **options), [o, q, log_decay, state])


@pytest.mark.parametrize("strength", [0.02, 20.0])
def test_low_precision(strength):
    exact = inputs(300, strength=strength)
    expected = ops.gla_output(*exact)
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.bfloat16, 1e-2)):
        tensors = [x.detach().to(dtype) for x in exact[:3]] + [x.detach().float() for x in exact[3:]]
        actual = in_two_steps(*tensors)[0]
        assert actual.dtype == dtype
        assert_same([actual], [expected], tolerance)


def test_no_tokens():
    tensors = [x.detach() for x in inputs(0, strength=1.0)]
    assert in_two_steps(*tensors)[0].shape == (1, 0, 6, 5)


def test_wrong_shapes_are_refused_in_one_line():
    q, _, _, log_decay, state = (x.detach() for x in inputs(6, strength=1.0))
    o = q.new_zeros(1, 6, 6, 5)
    for name, arguments in {
        "a shard is one row": (o.repeat(2, 1, 1, 1), q.repeat(2, 1, 1, 1), log_decay, state),
        "o must be": (o[:, :5], q, log_decay, state),
        "log_decay must be": (o, q, log_decay[..., :3], state),
        "Hkv a divisor": (o[:, :, :5], q[:, :, :5], log_decay, state),
        "state_in must be": (o, q, log_decay, state[..., :3]),
    }.items():
        with pytest.raises(ValueError, match=name) as error:
            ops.gla_carry(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 6"):
        ops.gla_carry(o, q, log_decay, state, cu_seqlens=cu(0, 5))

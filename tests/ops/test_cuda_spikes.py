"""The spike ops on a GPU, with NVIDIA's and MetaX's tiles: exact given the threshold, seldom waiting."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch

import ops
from ops.spike_count import reference
from ops.spike_encode.steps import COUNTED, ENCODINGS, SIGNED
from ops.spike_linear.events import spike_linear_events
from test_cuda_backends import cuda_module, poison

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(8191, 3584), (1025, 18944), (2, 4097, 28, 128), (1000, 896), (65, 64), (9, 40000), (33, 7), (1, 1)]


@pytest.fixture(params=["cuda", "maca"])
def tiles(request):
    """Which file runs. MetaX's runs its tiles here, which says nothing about its own compiler."""
    cuda_module("spike_count")
    return request.param


def activations(*shape, dtype):
    """Heavy tails, as activations have them."""
    x = torch.randn(*shape, device="cuda")
    return (x * torch.randn(*shape, device="cuda").exp()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_exact_given_the_threshold(tiles, shape, dtype):
    """The mean's last rounding depends on the order of summation: rarely in bf16 and fp16, often in fp32."""
    module = import_module(f"ops.spike_count.{tiles}")
    x = activations(*shape, dtype=dtype)
    for k in (1.0, 3.0, 2.7):
        poison()
        count, threshold = module.spike_count(x, k=k)
        assert torch.equal(count, (x.float() / threshold).round().int())
        assert torch.equal(module.spike_values(x, k=k), (count * threshold).to(dtype))
        expected = reference.spike_count(x, k=k)[1]
        off = (threshold / expected - 1).abs()
        assert off.max() <= {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
        assert dtype == torch.float32 or (off > 0).float().mean() <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mean_that_is_given_makes_the_references_bits(tiles, shape, dtype):
    module = import_module(f"ops.spike_count.{tiles}")
    x = activations(*shape, dtype=dtype)
    exact = 1.5 * x.float().abs().mean(-1, keepdim=True)
    for mean in (exact, exact.to(dtype)):
        poison()
        found, expected = (m.spike_count(x, mean_abs=mean) for m in (module, reference))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert torch.equal(module.spike_values(x, mean_abs=mean), reference.spike_values(x, mean_abs=mean))


def test_many_quotients_are_rounded_as_divisions(tiles):
    """5e8 numbers whose quotients lie around halves: a quotient with one wrong bit would count differently."""
    module = import_module(f"ops.spike_count.{tiles}")
    for seed in range(8):
        torch.manual_seed(seed)
        threshold = torch.rand(16384, 1, device="cuda") * 4 + 1e-3
        near = (torch.randint(-200, 200, (16384, 4096), device="cuda") + 0.5) * threshold
        steps = torch.randint(-3, 4, near.shape, device="cuda", dtype=torch.int32)
        x = (near.view(torch.int32) + steps).view(torch.float32)
        count, found = module.spike_count(x, k=1.0, mean_abs=threshold)
        assert torch.equal(found, threshold)
        assert torch.equal(count, (x / threshold).round().int())


@pytest.mark.parametrize("size", [1, 70, 5000, 40000])
def test_odd_tokens(tiles, size):
    module = import_module(f"ops.spike_count.{tiles}")
    x = torch.randn(6, size, device="cuda")
    x[0] = 0
    x[1, -1], x[2, 0], x[3, size // 2] = torch.nan, torch.inf, -torch.inf
    x[4] = x[4].abs() * 1e-7
    x[5] = 1e34 * x[5].sign()
    for mean in (None, torch.ones(6, 1, device="cuda")):
        found, expected = (
            [*m.spike_count(x, mean_abs=mean), m.spike_values(x, mean_abs=mean)] for m in (module, reference)
        )
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found[1:], expected[1:]):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
    count, threshold = module.spike_count(x)
    assert threshold[1:4].isnan().all() and not count[:4].any() and module.spike_values(x)[1:4].isnan().all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(tiles, shape):
    module = import_module(f"ops.spike_count.{tiles}")
    x = torch.zeros(shape, device="cuda", requires_grad=True)
    count, threshold = module.spike_count(x)
    assert count.shape == shape and (threshold == 1e-5).all()
    module.spike_values(x).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_pass_straight_through(tiles, dtype):
    module = import_module(f"ops.spike_count.{tiles}")
    x = activations(128, 33, dtype=dtype).requires_grad_()
    mean = x.detach().float().abs().mean(0)[:, None].requires_grad_()
    x_hat = module.spike_values(x.T, mean_abs=mean)
    upstream = activations(128, 33, dtype=dtype).T
    to_x, to_mean = torch.autograd.grad(x_hat, (x, mean), upstream, allow_unused=True)
    assert torch.equal(to_x, upstream.T) and to_mean is None
    assert torch.equal(x_hat, reference.spike_values(x.T, mean_abs=mean))


def test_more_numbers_than_int32_counts(tiles):
    """2.3e9 numbers: offsets beyond 2**31 in the last rows."""
    module = import_module(f"ops.spike_count.{tiles}")
    x = torch.zeros(120000, 18944, device="cuda", dtype=torch.bfloat16)
    last = slice(-3, None)
    x[last] = activations(3, 18944, dtype=torch.bfloat16)
    mean = torch.full((120000, 1), 0.75, device="cuda")
    assert torch.equal(
        module.spike_values(x, mean_abs=mean)[last], reference.spike_values(x[last], mean_abs=mean[last])
    )
    assert torch.equal(module.spike_values(x)[last], module.spike_values(x[last]))
    count, threshold = module.spike_count(x)
    expected = module.spike_count(x[last])
    assert torch.equal(count[last], expected[0]) and torch.equal(threshold[last], expected[1])
    assert count.shape == x.shape and not count[:1000].any()


def waits(function, *args, **kwargs):
    """How often a call waits for the device."""
    function(*args, **kwargs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def test_only_codings_wait_for_the_device_and_once():
    x = activations(100, 3584, dtype=torch.bfloat16).requires_grad_()
    mean, upstream = torch.ones(100, 1, device="cuda"), torch.randn_like(x)
    for options in ({}, {"mean_abs": mean}):
        for function in (ops.spike_count, reference.spike_count, ops.spike_values):
            assert waits(function, x, **options) == 0
    assert waits(torch.autograd.grad, ops.spike_values(x), x, upstream, retain_graph=True) == 0
    count, _ = ops.spike_count(x)
    for options in ({}, {"num_steps": 20}):
        assert waits(ops.spike_encode, count, encoding="twos_complement", **options) == 1
    spikes = ops.spike_encode(count, encoding="bidirectional")
    assert waits(ops.spike_decode, spikes, encoding="bidirectional") == 1


@pytest.mark.parametrize("lsb_first", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_codings(tiles, encoding, lsb_first):
    module, plain = import_module(f"ops.spike_encode.{tiles}"), import_module("ops.spike_encode.reference")
    for shape, largest, dtype in (
        ((100, 3584), 40, torch.int32),
        ((7, 1111), 2**31 - 1, torch.int64),
        ((1,), 1, torch.int8),
        ((), 9, torch.int64),
        ((0, 5), 1, torch.int32),
    ):
        largest = min(largest, 300) if encoding in COUNTED else largest
        low = -largest if encoding in SIGNED else 0
        count = torch.randint(low, largest + 1, shape, device="cuda").to(dtype)
        options = {"encoding": encoding, "lsb_first": lsb_first}
        poison()
        spikes = module.spike_encode(count, **options)
        assert torch.equal(spikes, plain.spike_encode(count, **options))
        assert torch.equal(spikes.cpu(), plain.spike_encode(count.cpu(), **options))
        for kind in (torch.float32, torch.bfloat16, torch.int8):
            assert torch.equal(module.spike_decode(spikes.to(kind), **options), count.int())
        more = len(spikes) + 3
        assert torch.equal(
            module.spike_decode(module.spike_encode(count, num_steps=more, **options), **options), count.int()
        )


def test_more_spikes_than_int32_counts(tiles):
    """33 steps of 2**26 + 5 counts: 8.9 GB of spikes."""
    module = import_module(f"ops.spike_encode.{tiles}")
    count = torch.randint(-(2**31), 2**31 - 1, (2**26 + 5,), device="cuda").int()
    spikes = module.spike_encode(count, encoding="twos_complement", num_steps=33)
    assert torch.equal(spikes[0], (count < 0).float()) and torch.equal(spikes[32], (count & 1).float())
    assert torch.equal(module.spike_decode(spikes, encoding="twos_complement"), count)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_codings_do_not_hold(tiles, encoding):
    module = import_module(f"ops.spike_encode.{tiles}")
    spikes = torch.zeros(3, 50000, device="cuda")
    spikes[2, 49999] = 0.5
    with pytest.raises(ValueError, match=f"spikes of encoding={encoding} must be"):
        module.spike_decode(spikes, encoding=encoding)
    with pytest.raises(ValueError, match="use at least"):
        module.spike_encode(torch.tensor([9, 0], device="cuda"), encoding=encoding, num_steps=2)
    if encoding not in SIGNED:
        with pytest.raises(ValueError, match="no negative counts, got -1"):
            module.spike_encode(torch.tensor([9, -1], device="cuda"), encoding=encoding)
    if encoding in ("bitwise", "bidirectional"):
        with pytest.raises(ValueError, match="int32 does not hold"):
            module.spike_decode(torch.ones(32, 5, device="cuda"), encoding=encoding)


def test_events_of_counted_activations():
    x = activations(50, 256, dtype=torch.bfloat16)
    weight = torch.randint(-127, 128, (64, 256), device="cuda", dtype=torch.int8)
    count, _ = ops.spike_count(x)
    exact = count.double() @ weight.double().T
    for encoding in SIGNED:
        assert torch.equal(spike_linear_events(count, weight, encoding=encoding).double(), exact)


def test_the_table_takes_the_kernels():
    for op in ("spike_count", "spike_encode"):
        assert ops.resolve(op).backend == "cuda"
    with pytest.raises(ops.Refused, match="takes bf16, fp16 and fp32"):
        ops.spike_values(torch.randn(3, 4, device="cuda", dtype=torch.float64))

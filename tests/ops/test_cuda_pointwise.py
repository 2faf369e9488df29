"""More of the pointwise ops, the cross-entropy and grouped products on a GPU, with NVIDIA's and MetaX's tiles."""

from importlib import import_module

import pytest
import torch

import ops
import test_cuda_backends
from test_cuda_backends import TOLERANCES, compare, cu, randn

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "maca"])
def tiles(request, monkeypatch):
    """Which file `compare` runs. MetaX's runs its tiles here, which says nothing about its own compiler."""
    if request.param == "maca":
        files = ("maca", "reference")
        monkeypatch.setattr(
            test_cuda_backends, "cuda_module", lambda op: [import_module(f"ops.{op}.{name}") for name in files]
        )
    return request.param


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(8191, 1, 3584), (2, 65, 576), (1000, 28, 128), (300, 5120), (1, 1)])
def test_rms_norm_with_residual(tiles, shape, dtype):
    tensors = [randn(*shape), randn(shape[-1]), randn(*shape)]
    compare("rms_norm", lambda m, x, w, r: m.rms_norm(x, w, eps=1e-6, residual=r), tensors, dtype)


@pytest.mark.parametrize("kept", [0, 1])
def test_rms_norm_with_one_of_two_outputs_used(kept):
    tensors = [randn(100, 3584), randn(3584), randn(100, 3584)]
    compare("rms_norm", lambda m, x, w, r: [m.rms_norm(x, w, eps=1e-6, residual=r)[kept]], tensors, torch.bfloat16)


def test_rms_norm_with_residual_is_bitwise_the_two_steps():
    x, residual, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((999, 3584),) * 2 + ((3584,),))
    y, total = ops.rms_norm(x, weight, eps=1e-6, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total, weight, eps=1e-6))


@pytest.mark.parametrize("op, shape", [("rms_norm", (2049, 3584)), ("swiglu", (2049, 2 * 18944))])
def test_backward_is_deterministic(op, shape):
    x = torch.randn(*shape, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(shape[-1], device="cuda").bfloat16().requires_grad_()
    inputs = (x, weight) if op == "rms_norm" else (x,)
    y = ops.rms_norm(x, weight, eps=1e-6) if op == "rms_norm" else ops.swiglu(x)
    upstream = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, inputs, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("shape, part", [((1, 8191, 28, 128), slice(None)), ((3, 65, 7, 64), slice(2, 6))])
def test_rope_of_long_positions(tiles, shape, part):
    """Angles are rounded to fp32: at 1e6 radians that alone is 0.03, so the frequencies are powers of two."""
    positions = torch.randint(0, 2**20, shape[:2], device="cuda")
    inv_freq = 0.5 ** torch.arange(shape[3] // 2, device="cuda")
    compare("rope", lambda m, x: [m.rope(x[:, :, part], positions, inv_freq)], [randn(*shape)], torch.float32, 1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "shape, part, keys",
    [
        ((1, 8191, 36, 128), slice(28), slice(28, 32)),  # one buffer of queries, keys and values
        ((3, 65, 12, 64), slice(None, None, 2), slice(1, None, 4)),
        ((1, 1000, 60, 96), slice(40), slice(40, 50)),
        ((2, 63, 4, 128), slice(2), slice(2, 3)),
        ((1, 1, 2, 6), slice(1), slice(1, 2)),
    ],
)
def test_rope_of_queries_and_keys(tiles, shape, part, keys, dtype):
    positions = torch.randint(0, 5000, shape[:2], device="cuda")
    inv_freq = 1e4 ** (-torch.arange(shape[3] // 2, device="cuda") * 2 / shape[3])

    def together(module, x):
        return module.rope_qk(x[:, :, part], x[:, :, keys], positions, inv_freq)

    compare("rope", together, [randn(*shape)], dtype)


def test_rope_of_queries_and_keys_is_bitwise_the_two_by_themselves():
    """28 heads and 4, one gradient alone, and gradients that lie otherwise than their tensors."""
    q, k = (torch.randn(2, 999, heads, 128, device="cuda").bfloat16().requires_grad_() for heads in (28, 4))
    rest = torch.randint(0, 5000, (2, 999), device="cuda"), 1e6 ** (-torch.arange(64, device="cuda") / 64)
    upstream = [torch.randn(2, x.shape[2], 999, 128, device="cuda").bfloat16().transpose(1, 2) for x in (q, k)]
    together, apart = ops.rope_qk(q, k, *rest), (ops.rope(q, *rest), ops.rope(k, *rest))
    gradients = [torch.autograd.grad(outputs, (q, k), upstream, retain_graph=True) for outputs in (together, apart)]
    assert all(torch.equal(a, b) for a, b in zip((*together, *gradients[0]), (*apart, *gradients[1])))
    (of_keys,) = torch.autograd.grad(together[1], k, upstream[1])
    assert torch.equal(of_keys, gradients[1][1])


def test_swiglu_and_cross_entropy_with_other_tiles(tiles):
    compare("swiglu", lambda m, x: [m.swiglu(x)], [randn(100, 2 * 18944)], torch.bfloat16)
    labels = torch.randint(0, 49000, (1000,), device="cuda")
    compare(
        "linear_cross_entropy",
        lambda m, *x: [m.linear_cross_entropy(*x, labels, valid_vocab=49001)],
        [randn(1000, 256), 0.1 * randn(49152, 256)],
        torch.bfloat16,
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "edges, sizes",
    [((0, 256, 512, 768, 1024), (256, 512)), ((0, 0, 1, 2, 500, 500, 777), (264, 136)), ((0, 70, 111), (61, 35))],
)
def test_grouped_mm(tiles, edges, sizes, dtype, tolerance):
    tensors = [randn(edges[-1], sizes[0]), randn(len(edges) - 1, sizes[1], sizes[0])]
    compare("grouped_mm", lambda m, *x: [m.grouped_mm(*x, offsets=cu(*edges))], tensors, dtype, tolerance)


class Buffer:
    """ops.gradient_buffer.GradientBuffer over unwritten memory."""

    def __init__(self, weight, scale):
        self.total = torch.full_like(weight, torch.nan, dtype=torch.float32).detach()
        self.scale, self.written = scale, False

    def begin(self):
        held, self.written = self.written, True
        return held

    def finish(self):
        pass


def test_cross_entropy_adds_to_a_buffer():
    hidden, labels = torch.randn(2, 3000, 512, device="cuda").bfloat16(), torch.randint(0, 60000, (2, 3000))
    weight, labels = (0.1 * torch.randn(60000, 512, device="cuda")).bfloat16().requires_grad_(), labels.cuda()
    buffer = Buffer(weight, 1 / 6000)
    for x, wanted in zip(hidden, labels):
        loss = ops.linear_cross_entropy(x.detach().requires_grad_(), weight, wanted, weight_grad=buffer)
        (loss.sum() / 6000).backward()
    assert weight.grad is None
    exact = weight.detach().float().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.flatten(0, 1).float() @ exact.T, labels.flatten()).backward()
    assert (buffer.total - exact.grad).norm() <= 1e-2 * exact.grad.norm()


@pytest.mark.parametrize("buffered", [False, True])
def test_cross_entropy_holds_one_chunk_of_logits(buffered):
    num_tokens, size, vocab = 6000, 2048, 65536
    hidden = torch.randn(num_tokens, size, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocab, size, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (num_tokens,), device="cuda")
    options = dict(weight_grad=Buffer(weight, 1.0)) if buffered else {}
    peaks = []
    for _ in range(2):  # the first call compiles and makes cuBLAS's workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ops.linear_cross_entropy(hidden, weight, labels, **options).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    logits, of_hidden = 2 * 2048 * vocab, 2 * hidden.numel()
    fp32_and_bf16_gradient = 6 * weight.numel()
    expected = logits if buffered else max(4 * weight.numel() + logits, fp32_and_bf16_gradient)
    assert peaks[-1] <= expected + of_hidden + 2**22


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (4097,), (3, 1000, 513), (3584, 18944)])
def test_accumulate_is_one_fp32_addition(tiles, shape, dtype, add):
    total, part = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda").to(dtype)
    expected = total + part.float() if add else part.float()
    module = test_cuda_backends.cuda_module("accumulate")[0]
    assert torch.equal(module.accumulate(total, part, add=add), expected) and torch.equal(total, expected)


def test_accumulate_takes_parts_of_other_strides():
    total, part = torch.zeros(300, 200, device="cuda"), torch.randn(200, 300, device="cuda").bfloat16().T
    assert torch.equal(ops.accumulate(total, part, add=True), part.float())


def test_accumulate_beyond_32_bit_offsets():
    length = 2**31 + 5
    total, part = torch.zeros(length, device="cuda"), torch.ones(length, device="cuda", dtype=torch.bfloat16)
    ops.accumulate(total, part, add=True)
    assert bool((total == 1).all())

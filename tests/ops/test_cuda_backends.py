"""Every cuda.py against its reference in float64 on the same GPU and inputs: outputs and gradients, bf16 and fp32."""

from importlib import import_module

import pytest
import torch

import ops

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
LENGTHS = [1, 2, 63, 64, 65, 1000, 8191]
RAGGED = (0, 0, 1, 2, 66, 66, 500, 501, 900, 1000, 1000)


def cuda_module(op):
    """The op's CUDA file, or a skip that says why it is not used here."""
    choice = ops.resolve(op)
    if choice.backend != "cuda":
        pytest.skip(f"ops.{op} runs on {choice.backend}: {choice.reason}")
    return import_module(f"ops.{op}.cuda"), import_module(f"ops.{op}.reference")


def compare(op, call, tensors, dtype, tolerance=None):
    """call(module, *tensors) -> outputs: the CUDA file in dtype, the reference in float64, from equal numbers."""
    results = []
    rounded = [x.cuda().to(dtype if x.dtype == torch.float64 else x.dtype) for x in tensors]
    for module, wanted in zip(cuda_module(op), (None, torch.float64)):
        poison()
        leaves = [x.detach().to(wanted or x.dtype).requires_grad_() for x in rounded]
        outputs = call(module, *leaves)
        generator = torch.Generator(device="cuda").manual_seed(5)
        weights = [torch.randn(o.shape, generator=generator, device="cuda").to(dtype) for o in outputs]
        loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([*outputs, *gradients])
    worst = {}
    for i, (actual, expected) in enumerate(zip(*results)):
        if expected is None:
            assert actual is None or not actual.any()
            continue
        assert actual.isfinite().all(), f"result {i} is not finite"
        size, usual = expected.norm().item(), expected.numel() ** 0.5
        size = size if size > 1e-9 * usual else 1e-2 * usual  # what is 0 in exact arithmetic
        worst[i] = (actual.double() - expected).norm().item() / size
    assert max(worst.values()) <= (tolerance or TOLERANCES[dtype]), worst


def poison():
    """Fill the memory that the next tensors get with NaN: what a kernel does not write is seen."""
    torch.cuda.empty_cache()
    filled = [torch.full((2**17,), torch.nan, device="cuda") for _ in range(16)]  # half a megabyte: the small pool
    filled.append(torch.full((2**28,), torch.nan, device="cuda"))
    del filled


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cu(*edges):
    return torch.tensor(edges, dtype=torch.int32, device="cuda")


def gla_inputs(num_tokens, *, strength=0.05, heads=(12, 4), size=128):
    """relu'd q and k, v, and fp32 log decays, as the models make them."""
    q, k, v = (randn(1, num_tokens, num_heads, size) for num_heads in (*heads, heads[1]))
    return [q.relu(), k.relu(), v, (-2 * strength * torch.rand(1, num_tokens, heads[1], size)).float()]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("strength", [0.05, 5.0])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_gla(num_tokens, strength, dtype):
    compare("gla", lambda m, *x: [m.gla(*x)[0]], gla_inputs(num_tokens, strength=strength), dtype)


@pytest.mark.parametrize("heads, size", [((9, 3), 64), ((28, 4), 128)])
def test_gla_ragged_documents(heads, size):
    tensors = gla_inputs(1000, heads=heads, size=size)
    compare("gla", lambda m, *x: [m.gla(*x, cu_seqlens=cu(*RAGGED))[0]], tensors, torch.bfloat16)


@pytest.mark.parametrize("num_tokens, edges", [(1, None), (65, None), (1000, RAGGED)])
def test_gla_states(num_tokens, edges):
    num_documents = 1 if edges is None else len(edges) - 1
    tensors = [*gla_inputs(num_tokens), randn(num_documents, 4, 128, 128).float()]

    def call(module, *x):
        documents = None if edges is None else cu(*edges)
        return module.gla(*x[:4], initial_state=x[4], cu_seqlens=documents, output_final_state=True)

    compare("gla", call, tensors, torch.bfloat16)


@pytest.mark.parametrize("edges", [None, (0, 300, 300, 1000), (0, 0, 300, 1000, 1000)])
def test_gla_halves(edges):
    documents = None if edges is None else cu(*edges)
    tensors = [*gla_inputs(1000), randn(4, 128, 128).float()]
    compare("gla", lambda m, *x: [m.gla_output(*x, cu_seqlens=documents)], tensors, torch.bfloat16)

    def state(module, q, k, v, log_decay, _):
        added, total = module.gla_state(k, v, log_decay, cu_seqlens=documents)
        return [added, total.exp()]

    compare("gla", state, tensors, torch.bfloat16)


def attention_inputs(num_tokens, *, rows=1, heads=(12, 4), size=128, num_sinks=0):
    tensors = [randn(rows, num_tokens, heads[0], size), *(randn(rows, num_tokens, heads[1], size) for _ in "kv")]
    return tensors + [randn(num_sinks, heads[1], size) for _ in "kv" if num_sinks]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("window", [None, 128, 4097])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_attention(num_tokens, window, dtype):
    compare("attention", lambda m, *x: [m.attention(*x, window=window)], attention_inputs(num_tokens), dtype)


def test_attention_on_request_gives_the_same_bits():
    """cuDNN's backward pass does not; under torch's switch another kernel does its part."""
    q, k, v = (x.cuda().bfloat16().requires_grad_() for x in attention_inputs(4096))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(ops.attention(q, k, v).float().square().sum(), (q, k, v)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("heads, size", [((9, 3), 64), ((28, 4), 128)])
@pytest.mark.parametrize("window", [None, 128])
def test_attention_ragged_documents(window, heads, size):
    tensors = attention_inputs(1000, heads=heads, size=size)
    compare(
        "attention", lambda m, *x: [m.attention(*x, window=window, cu_seqlens=cu(*RAGGED))], tensors, torch.bfloat16
    )


@pytest.mark.parametrize("edges", [(0, 0, 1000, 1000), (0, 250, 500, 750, 1000), (0, 500, 500, 1000), (0, 1, 1000)])
@pytest.mark.parametrize("window", [None, 250, 499])
def test_attention_documents_of_one_length(window, edges):
    """They are a batch to the kernel; (0, 1, 1000) is none, and a window as long as every document is no window."""
    tensors = attention_inputs(1000)
    compare("attention", lambda m, *x: [m.attention(*x, window=window, cu_seqlens=cu(*edges))], tensors, torch.bfloat16)


@pytest.mark.parametrize("num_sinks", [0, 128, 5])
def test_attention_sinks_rows_and_lse(num_sinks):
    tensors = attention_inputs(500, rows=2, num_sinks=num_sinks)

    def call(module, q, k, v, sink_k=None, sink_v=None):
        return module.attention(q, k, v, window=100, sink_k=sink_k, sink_v=sink_v, return_lse=True)

    compare("attention", call, tensors, torch.bfloat16)


def last_queries(num_queries, *, return_lse=False, **options):
    """A call with the last queries; the reference has them all, and its outputs are cut."""

    def call(module, q, k, v, *sinks):
        seen = q if q.dtype == torch.float64 else q[:, -num_queries:]
        outputs = module.attention(
            seen, k, v, return_lse=return_lse, **options, **dict(zip(("sink_k", "sink_v"), sinks))
        )
        return [x[:, -num_queries:] for x in (outputs if return_lse else [outputs])]

    return call


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 5e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize("edges", [None, RAGGED])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("num_queries", [1, 63, 100, 512, 999, 1000])
def test_attention_of_the_last_queries(num_queries, window, edges, dtype, tolerance):
    """With 1, 63 and 100 queries most documents of RAGGED end before the first."""
    documents = None if edges is None else cu(*edges)
    call = last_queries(num_queries, window=window, cu_seqlens=documents)
    compare("attention", call, attention_inputs(1000), dtype, tolerance)


@pytest.mark.parametrize("heads, size", [((9, 3), 64), ((28, 4), 128), ((4, 2), 256)])
@pytest.mark.parametrize("num_tokens, num_queries, window", [(1000, 300, 200), (4096, 3072, 1025), (4000, 1, 3999)])
def test_attention_of_the_last_queries_by_heads(num_tokens, num_queries, window, heads, size):
    tensors = attention_inputs(num_tokens, heads=heads, size=size)
    compare("attention", last_queries(num_queries, window=window), tensors, torch.bfloat16)


@pytest.mark.parametrize("num_sinks", [0, 128, 5])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("num_queries", [1, 63, 499])
def test_attention_of_the_last_queries_with_sinks_and_lse(num_queries, rows, num_sinks):
    tensors = attention_inputs(500, rows=rows, num_sinks=num_sinks)
    compare("attention", last_queries(num_queries, window=100, return_lse=True), tensors, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 1000])
def test_attention_of_the_last_queries_gives_the_same_bits(window):
    q, k, v = (x.cuda().bfloat16().requires_grad_() for x in attention_inputs(4096))
    runs = []
    for _ in range(3):
        poison()
        o = ops.attention(q[:, 1100:], k, v, window=window)
        runs.append([o, *torch.autograd.grad(o.float().square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
    if window is not None:
        assert not any(x[:, : 1100 - window + 1].any() for x in runs[0][2:])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(1, 8191, 3584), (2, 65, 576), (1000, 28, 128), (40000, 64)])
def test_rms_norm(shape, dtype):
    tensors = [randn(*shape), randn(shape[-1])]
    compare("rms_norm", lambda m, *x: [m.rms_norm(*x, eps=1e-6)], tensors, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(1000, 2 * 18944), (3, 65, 2 * 1536), (1, 2 * 7)])
def test_swiglu(shape, dtype):
    compare("swiglu", lambda m, x: [m.swiglu(x)], [randn(*shape)], dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_rope(num_tokens, dtype):
    positions = torch.randint(0, 5000, (1, num_tokens), device="cuda")
    inv_freq = 1e6 ** (-torch.arange(64, device="cuda") / 64)
    tensors = [randn(1, num_tokens, 9, 128)]
    compare("rope", lambda m, x: [m.rope(x, positions, inv_freq)], tensors, dtype)
    compare("rope", lambda m, x: [m.rope(x[:, :, 2:7], positions, inv_freq)], tensors, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("num_tokens, vocab, valid_vocab", [(65, 1000, None), (1000, 49152, 49000), (8191, 5000, 4999)])
def test_linear_cross_entropy(num_tokens, vocab, valid_vocab, dtype):
    labels = torch.randint(0, valid_vocab or vocab, (num_tokens,), device="cuda")
    labels[::7] = -100
    tensors = [randn(num_tokens, 256), 0.1 * randn(vocab, 256)]

    def call(module, hidden, weight):
        return [module.linear_cross_entropy(hidden, weight, labels, valid_vocab=valid_vocab)]

    compare("linear_cross_entropy", call, tensors, dtype)


def test_linear_cross_entropy_of_a_sum_equals_that_of_the_tokens():
    labels = torch.randint(0, 3000, (5000,), device="cuda")
    gradients = []
    for upstream in (torch.full((5000,), 0.5, device="cuda"), torch.linspace(0.4999, 0.5001, 5000, device="cuda")):
        generator = torch.Generator(device="cuda").manual_seed(1)
        hidden, weight = (
            torch.randn(n, 128, generator=generator, device="cuda").bfloat16().requires_grad_() for n in (5000, 3000)
        )
        loss = ops.linear_cross_entropy(hidden, weight, labels)
        gradients.append(torch.autograd.grad((loss * upstream).sum(), (hidden, weight)))
    for one, other in zip(*gradients):
        assert (one.float() - other.float()).norm() <= 1e-2 * one.float().norm()


def test_grouped_mm():
    offsets = cu(0, 100, 100, 356, 1000)
    tensors = [randn(1000, 256), randn(4, 512, 256)]
    compare("grouped_mm", lambda m, *x: [m.grouped_mm(*x, offsets=offsets)], tensors, torch.bfloat16)


def test_cpu_tensors_run_on_the_reference_whatever_the_machine():
    assert ops.rms_norm(torch.ones(4), torch.ones(4), eps=0.0).tolist() == [1.0] * 4

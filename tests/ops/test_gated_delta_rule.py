"""ops.gated_delta_rule: heads that share keys and queries, its Triton kernels interpreted, compiled and on a GPU.

The reference itself is held against a float64 token loop, the kernels against the reference in float64.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import op_oracles
import ops
from interpreted_delta_rule import differences, same_bits
from op_oracles import assert_same, cu, gradients
from ops import tuning
from ops.backends.maca import BACKEND
from test_interpreted_kernels import release

RAGGED = (0, 0, 1, 2, 66, 66, 67, 130, 130)
HEADS = [(2, 2, 4), (2, 1, 4), (1, 1, 3), (4, 2, 2), (3, 1, 1)]
"""Query, key and value heads."""

interpreted = pytest.mark.skipif(
    release("triton") < (3, 6) or (release("triton") < (3, 9) and release("numpy") >= (2, 4)),
    reason="needs Triton; its interpreter before 3.9 cannot count loops with numpy 2.4 and later",
)


def oracle_inputs(num_tokens, heads, num_documents):
    shapes = [(heads[0], 8), (heads[1], 8), (heads[2], 5), (heads[2],), (heads[2],)]
    tensors = [torch.rand(1, num_tokens, *shape, dtype=torch.float64) for shape in shapes]
    tensors[3] *= -0.3
    tensors.append(torch.randn(num_documents, heads[2], 8, 5, dtype=torch.float64))
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("heads", HEADS)
def test_reference_with_shared_heads(heads):
    tensors = oracle_inputs(80, heads, 4)
    options = dict(initial_state=tensors[5], cu_seqlens=cu(0, 30, 30, 31, 80), qk_l2norm=True)
    expected = op_oracles.gated_delta_rule(*tensors[:5], **options)
    actual = ops.gated_delta_rule(*tensors[:5], **options, output_final_state=True)
    assert_same(actual, expected, 1e-10, "outputs")
    assert_same(gradients(actual, tensors), gradients(expected, tensors), 1e-10, "gradients")


def test_wrong_shapes_are_refused_in_one_line():
    q, k, v, log_decay, beta, state = (x.detach() for x in oracle_inputs(6, (2, 2, 4), 1))
    with pytest.raises(ValueError, match="log_decay, beta must be"):
        ops.gated_delta_rule(q, k, v, log_decay[..., :2], beta)
    with pytest.raises(ValueError, match="a multiple of k's heads"):
        ops.gated_delta_rule(q, k, v[:, :, :3], log_decay[..., :3], beta[..., :3])
    with pytest.raises(ValueError, match="a multiple of k's heads"):
        ops.gated_delta_rule(q.repeat(1, 1, 3, 1), k, v, log_decay, beta)
    with pytest.raises(ValueError, match="q must be"):
        ops.gated_delta_rule(q[..., :4], k, v, log_decay, beta)
    with pytest.raises(ValueError, match="initial_state must be"):
        ops.gated_delta_rule(q, k, v, log_decay, beta, initial_state=state[:, :2])


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


def within(values: list[float], tolerance: float) -> bool:
    return all(value <= tolerance for value in values)


@interpreted
@pytest.mark.parametrize(
    "backend, num_tokens, strength",
    [
        *(("cuda", *case) for case in [(1, 0.05), (2, 5.0), (63, 0.05), (64, 5.0), (65, 0.05), (257, 0.05)]),
        *(("maca", *case) for case in [(1, 5.0), (33, 5.0), (257, 0.05)]),
    ],
)
def test_kernels_by_length(interpreter, backend, num_tokens, strength):
    (values,) = interpreter(differences, num_tokens=num_tokens, strength=strength, backend=backend)
    assert within(values, 1e-4), values


@interpreted
@pytest.mark.parametrize("backend", ["cuda", "maca"])
@pytest.mark.parametrize("strength, with_state", [(0.05, True), (5.0, True), (0.05, False)])
def test_kernels_on_ragged_documents(interpreter, backend, strength, with_state):
    case = dict(num_tokens=130, edges=RAGGED, strength=strength, with_state=with_state, backend=backend)
    (values,) = interpreter(differences, **case, qk_l2norm=not with_state)
    assert within(values, 1e-4), values


@interpreted
@pytest.mark.parametrize(
    "backend, heads", [*(("cuda", heads) for heads in HEADS), ("maca", HEADS[1]), ("maca", HEADS[3])]
)
def test_kernels_with_shared_heads(interpreter, backend, heads):
    case = dict(num_tokens=35, rows=2, heads=heads, sizes=(24, 40), with_state=True, backend=backend)
    (values,) = interpreter(differences, **case)
    assert within(values, 1e-4), values


@interpreted
@pytest.mark.parametrize("backend", ["cuda", "maca"])
def test_kernels_with_wide_heads(interpreter, backend):
    (values,) = interpreter(differences, num_tokens=66, heads=(1, 1, 2), sizes=(128, 128), backend=backend)
    assert within(values, 1e-4), values


@interpreted
@pytest.mark.parametrize("backend", ["cuda", "maca"])
def test_kernels_in_fp16(interpreter, backend):
    case = dict(num_tokens=130, edges=RAGGED, strength=2.0, with_state=True, dtype="float16", backend=backend)
    (values,) = interpreter(differences, **case)
    assert within(values, 2e-3), values


@interpreted
def test_kernels_where_nothing_is_written(interpreter):
    """beta = 0 has a gradient of its own, though all else that depends on it vanishes."""
    (values,) = interpreter(differences, num_tokens=40, beta=0.0, with_state=True)
    assert within(values, 1e-4), values


@interpreted
@pytest.mark.parametrize("case", [dict(num_tokens=3, rows=2), dict(num_tokens=9, edges=(0, 0, 1, 9))], ids=str)
@pytest.mark.parametrize("heads", [(2, 1, 4), (4, 2, 2)])
def test_a_few_tokens_without_gradients(interpreter, heads, case):
    (values,) = interpreter(differences, **case, heads=heads, with_state=True, with_gradients=False, qk_l2norm=True)
    assert within(values, 1e-5), values


@interpreted
def test_gradients_of_the_final_state_alone(interpreter):
    (values,) = interpreter(differences, num_tokens=40, with_state=True, loss_of=(1,))
    assert within(values, 1e-4), values


@interpreted
def test_backward_gives_the_same_bits(interpreter):
    assert interpreter(same_bits, num_tokens=70) == [True]


POINTERS = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", "states", "grads", "inverses"), "*bf16"),
    **dict.fromkeys(("known", "missing", "errors", "derrors", "carried", "local"), "*bf16"),
    **dict.fromkeys(("log_decay", "beta", "sums", "weights", "leaves", "totals", "enters"), "*fp32"),
    **dict.fromkeys(("initial", "final", "dfinal", "dinitial"), "*fp32"),
    **dict.fromkeys(("dbeta", "dlog", "dweights", "dsums", "dtotals"), "*fp32"),
    **dict.fromkeys(("chunks", "bounds", "edges"), "*i32"),
}
TARGETS = {"A100": ("cuda", 80, 32), "64 lanes": ("hip", "gfx942", 64)}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_metax_tiles_fit_64_kb_of_shared_memory(target):
    """A proxy: stand-ins for hardware that has no public compiler."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.gated_delta_rule import triton_backward, triton_forward

    entries = dict(tuning.read(tuning.tune_file("gated_delta_rule", "maca"), BACKEND)[tuning.DEFAULT])
    length = entries.pop("chunks")["C"]
    sizes = dict(H=32, HQ=16, HK=16, HV=32, K=128, V=128, BK=128, C=length, PARTS=1, KEEP=True, GIVEN=True, BOXED=False)
    sizes |= dict(LEVELS=length.bit_length() - 1, DOT=tl.bfloat16, SOLVE=tl.float16, PRECISION="ieee")
    grouped = dict(H=28, HQ=28, HK=4, HV=4)
    for name, tile in entries.items():
        body = name.removesuffix("_grouped")
        kernel = getattr(triton_forward, body, None) or getattr(triton_backward, body)
        known = sizes | dict(BV=tile.get("PART", 128)) | (grouped if name != body else {})
        fixed = {key: size for key, size in known.items() if key in kernel.arg_names}
        kinds = {**POINTERS, "scale": "fp32", "num_tokens": "i32", **dict.fromkeys(fixed, "constexpr")}
        source = ASTSource(fn=kernel, signature={key: kinds[key] for key in kernel.arg_names}, constexprs=fixed)
        options = dict(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert compiled.metadata.shared <= tile.get("shared_bytes", BACKEND.limits.shared_memory_bytes), name


GPU_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
GPU_RAGGED = (0, 0, 1, 2, 66, 66, 500, 501, 900, 1000, 1000)


def compare_on_gpu(num_tokens, dtype, *, heads=(2, 2, 4), size=128, edges=None, strength=0.05, with_state=False):
    """Outputs and gradients of the CUDA file against the reference in float64, from equal numbers."""
    from ops.gated_delta_rule import cuda, reference

    shapes = [(heads[0], size), (heads[1], size), (heads[2], size)]
    inputs = [torch.randn(1, num_tokens, *shape, device="cuda").to(dtype) for shape in shapes]
    inputs += [-2 * strength * torch.rand(1, num_tokens, heads[2], device="cuda")]
    inputs += [torch.rand(1, num_tokens, heads[2], device="cuda")]
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32, device="cuda")
    if with_state:
        inputs.append(torch.randn(1 if edges is None else len(edges) - 1, heads[2], size, size, device="cuda"))
    options = dict(cu_seqlens=documents, output_final_state=True, qk_l2norm=True)
    results = []
    for module, kind in ((cuda, None), (reference, torch.float64)):
        leaves = [x.to(kind or x.dtype).requires_grad_() for x in inputs]
        state = leaves[5] if with_state else None
        outputs = module.gated_delta_rule(*leaves[:5], initial_state=state, **options)
        generator = torch.Generator(device="cuda").manual_seed(5)
        weights = [torch.randn(x.shape, generator=generator, device="cuda").to(dtype) for x in outputs]
        loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    assert_same(*results, GPU_TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strength", [0.05, 5.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 1000, 8191])
def test_gpu_by_length(num_tokens, strength, dtype):
    compare_on_gpu(num_tokens, dtype, strength=strength)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_TOLERANCES))
@pytest.mark.parametrize("heads, size", [((9, 3, 3), 64), ((2, 1, 4), 128), ((4, 2, 2), 100), ((7, 1, 1), 128)])
def test_gpu_ragged_documents(heads, size, dtype):
    compare_on_gpu(1000, dtype, heads=heads, size=size, edges=GPU_RAGGED, with_state=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
def test_gpu_steps_continue_a_prefill(rows):
    q, k, v = (torch.randn(rows, 70, heads, 64, device="cuda").bfloat16() for heads in (2, 2, 4))
    log_decay, beta = -torch.rand(rows, 70, 4, device="cuda"), torch.rand(rows, 70, 4, device="cuda")
    tensors, options = (q, k, v, log_decay, beta), dict(output_final_state=True, qk_l2norm=True)
    expected = ops.gated_delta_rule(*tensors, **options)
    o, state = ops.gated_delta_rule(*(x[:, :68] for x in tensors), **options)
    outputs = [o]
    for t in range(68, 70):
        o, state = ops.gated_delta_rule(*(x[:, t : t + 1] for x in tensors), initial_state=state, **options)
        outputs.append(o)
    assert_same([torch.cat(outputs, 1), state], expected, 1e-2)

"""Kernels of a trace: who launched them, of what kind they are, how long the device waited. Traces written by hand."""

import pytest

from sbtrain.bench import trace
from sbtrain.bench.profile import summarize

MAIN, AUTOGRAD = 1, 2


def span(cat, name, ts, dur, *, tid=MAIN, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 9, "tid": tid, "args": args}


def launch(number, ts, *, tid=MAIN, cat="cuda_runtime"):
    return span(cat, "cudaLaunchKernel", ts, 1, tid=tid, correlation=number)


EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 9, "args": {}},
    span("user_annotation", "bench: forward and backward", 0, 100),
    span("cpu_op", "_RMSNorm", 10, 20),
    span("cpu_op", "aten::empty", 10, 5),
    launch(1, 20, cat="cuda_driver"),
    span("cpu_op", "aten::mm", 40, 10),
    launch(2, 41),
    launch(3, 60),
    # the backward pass runs on a thread of its own, at the same time
    span("cpu_op", "autograd::engine::evaluate_function: _RMSNormBackward", 12, 30, tid=AUTOGRAD),
    span("cpu_op", "_RMSNormBackward", 13, 28, tid=AUTOGRAD),
    launch(4, 20, tid=AUTOGRAD),
    span("user_annotation", "bench: optimizer", 100, 50),
    launch(5, 110),
    # on the device; kernel 2 overlaps kernel 1, and nothing runs from 140 to 200
    span("kernel", "forward", 100, 20, tid=7, correlation=1),
    span("kernel", "nvjet_tst_128x256", 110, 30, tid=8, correlation=2),
    span("kernel", "chunk_gla_fwd_kernel_o", 200, 10, tid=7, correlation=3),
    span("kernel", "backward", 210, 20, tid=7, correlation=4),
    span("kernel", "multi_tensor_apply_kernel", 230, 40, tid=7, correlation=5),
    span("gpu_memcpy", "Memcpy HtoD", 270, 10, tid=7, correlation=99),
    span("gpu_user_annotation", "bench: optimizer", 100, 500, tid=7),
]


def test_kernels_know_what_launched_them():
    """Equal kernel names are told apart by the open operations of the launching thread; annotations are no kernels."""
    found = trace.kernels(EVENTS)
    assert [(kernel.name, kernel.owner, kernel.category) for kernel in found] == [
        ("forward", "_RMSNorm", "norm"),
        ("nvjet_tst_128x256", "aten::mm", "gemm"),
        ("chunk_gla_fwd_kernel_o", "", "gla"),
        ("backward", "_RMSNormBackward", "norm"),
        ("multi_tensor_apply_kernel", "", "optimizer"),
        ("Memcpy HtoD", "", "other"),
    ]


def test_time_is_counted_once_and_gaps_are_idle():
    found = trace.kernels(EVENTS)
    assert trace.span_us(found) == 180
    assert trace.busy_us(found) == 120
    assert trace.by_category(found) == {"optimizer": 40, "norm": 40, "gemm": 30, "gla": 10, "other": 10}
    summary = summarize(found, num_steps=2, flops={"gemm": 3e9})
    assert summary["idle_share"] == pytest.approx(60 / 180)
    assert summary["categories_ms"]["gemm"] == pytest.approx(0.015)
    assert "200" in next(line for line in summary["text"].splitlines() if line.startswith("gemm"))  # 3e9 in 15 us
    assert summary["kernels"][0] == {
        "kernel": "multi_tensor_apply_kernel",
        "owner": "",
        "category": "optimizer",
        "runs": 0.5,
        "ms": 0.02,
    }


@pytest.mark.parametrize(
    "name, owners, category",
    [
        ("cudnn_generated_sdpa_sm90_flash_fprop", ("aten::_scaled_dot_product_cudnn_attention",), "attention"),
        ("triton_tem_fused_flex_attention_0", ("CompiledFunction",), "attention"),
        ("triton_tem_fused_mm_3", ("CompiledFunction",), "compiled, fused"),
        ("sm90_xmma_gemm_bf16bf16", ("_Losses",), "gemm"),
        ("gradient", ("_LossesBackward",), "loss"),
        (
            "vectorized_elementwise_kernel",
            ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad",),
            "gradient buffers",
        ),
        ("reduce_kernel", ("bench: optimizer", "aten::norm"), "optimizer"),
    ],
)
def test_categories(name, owners, category):
    assert trace.Kernel(name, 0, 1, owners).category == category


def test_collectives_are_told_apart_and_exposed_where_nothing_computes():
    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    found = [
        trace.Kernel("nvjet", 0, 10, ("aten::mm",)),
        trace.Kernel(gather, 5, 10, ("_Leave", "nccl:_all_gather_base")),  # 5 beside the product, 5 alone
        trace.Kernel("elementwise_kernel", 11, 3, ("_Leave", "aten::addcmul")),  # part of the exchange
        trace.Kernel("ncclDevKernel_SendRecv", 12, 6, ("autograd::engine::evaluate_function: _FetchBackward",)),
        trace.Kernel(gather, 30, 4, ("bench: optimizer",)),
        trace.Kernel("nvjet", 33, 10, ("aten::mm",)),
        trace.Kernel("nvjet", 40, 10, ("aten::mm",)),
    ]
    assert [kernel.category for kernel in found] == ["gemm", "sp", "other", "sp", "collectives", "gemm", "gemm"]
    assert trace.exposed_us(found, "sp") == 8  # from 10 to 18, the two of them once
    assert trace.exposed_us(found, "collectives") == 3
    summary = summarize(found, num_steps=2, flops={})
    assert summary["exposed_ms"] == pytest.approx({"sp": 0.004, "collectives": 0.0015})
    assert "sp, exposed" in summary["text"] and "collectives, exposed" in summary["text"]


@pytest.mark.parametrize(
    ("owner", "category"),
    [
        ("_AttentionBackward", "attention"),
        ("_Combine", "dispatch"),
        ("_DepartBackward", "dispatch"),
        ("_Leave", "other"),
    ],
)
def test_kernels_of_our_own_functions_have_a_kind(owner, category):
    kernel = trace.Kernel("index_kernel", 0.0, 1.0, (owner,))
    assert kernel.category == category
    assert kernel.communicates == (owner == "_Leave"), "what packs for sequence parallelism's collectives"

"""ops.attention's Triton kernels against the float64 reference, in Triton's interpreter, with both backends' tiles."""

from __future__ import annotations

import pytest

from interpreted_attention_case import attention_differences, equal_twice, trains_after_inference, vendor_calls
from test_interpreted_kernels import RAGGED, pytestmark, within  # noqa: F401


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


BACKENDS = pytest.mark.parametrize("backend", ["cuda", "maca"])


@BACKENDS
@pytest.mark.parametrize("num_tokens, window", [(1, None), (2, 1), (64, None), (65, 40), (257, 100)])
def test_by_length(interpreter, backend, num_tokens, window):
    (values,) = interpreter(attention_differences, backend=backend, num_tokens=num_tokens, window=window)
    assert within(values, 1e-5), values


@BACKENDS
@pytest.mark.parametrize("window, num_sinks", [(None, 0), (20, 0), (20, 5), (1, 40)])
def test_ragged_documents(interpreter, backend, window, num_sinks):
    case = dict(num_tokens=130, edges=RAGGED, window=window, num_sinks=num_sinks, most=32)
    (values,) = interpreter(attention_differences, backend=backend, **case)
    assert within(values, 1e-5), values


@pytest.mark.parametrize(
    "case",
    [
        dict(num_tokens=100, rows=2, window=33, num_sinks=20, most=32),
        dict(num_tokens=70, heads=(4, 4), sizes=(24, 40), window=30, return_lse=False, most=32),
        dict(num_tokens=50, heads=(7, 1), sizes=(16, 64), most=16, num_programs=100),
        dict(num_tokens=70, heads=(7, 1), window=40, most=32, num_programs=8),
        dict(num_tokens=40, window=7, scale=-0.3),
        dict(num_tokens=40, window=7, scale=0.0),
        dict(num_tokens=40, window=7, strided=True),
        dict(num_tokens=20, sizes=(256, 64)),
    ],
    ids=str,
)
def test_shapes(interpreter, case):
    (values,) = interpreter(attention_differences, backend="cuda", **case)
    assert within(values, 1e-5), values


@BACKENDS
@pytest.mark.parametrize(
    "case",
    [
        dict(num_queries=1, window=20, num_sinks=5),
        dict(num_queries=63, edges=RAGGED, window=20, num_sinks=5),
        dict(num_queries=98, edges=RAGGED, window=20, num_programs=1),
        dict(num_queries=129, edges=RAGGED),
        dict(num_queries=70, rows=2),
    ],
    ids=str,
)
def test_fewer_queries_than_keys(interpreter, backend, case):
    case = dict(num_tokens=130, heads=(2, 1), most=32, **case)
    (values,) = interpreter(attention_differences, backend=backend, **case)
    assert within(values, 1e-5), values


@BACKENDS
def test_in_fp16(interpreter, backend):
    case = dict(num_tokens=130, edges=RAGGED, window=40, num_sinks=5, dtype="float16")
    (values,) = interpreter(attention_differences, backend=backend, **case)
    assert within(values, 3e-3), values


@pytest.mark.parametrize("num_programs", [1, 8])
def test_the_same_bits_every_time(interpreter, num_programs):
    (same,) = interpreter(equal_twice, num_tokens=100, num_programs=num_programs)
    assert all(same), same


def test_training_after_inference_mode(interpreter):
    assert interpreter(trains_after_inference) == [True]


def test_maca_asks_the_vendor_first(interpreter):
    options = dict(softmax_scale=None, causal=True, window_size=(2, 0), deterministic=True)
    heads = [[1, 8, 4, 16], [1, 8, 2, 16], [1, 8, 2, 16]]
    (values,) = interpreter(vendor_calls, edges=None)
    assert values == [heads[0], [heads, options]]
    (values,) = interpreter(vendor_calls, edges=(0, 0, 3, 8))
    assert values == [heads[0], [[*(shape[1:] for shape in heads), [3], [3], 5, 5], options]]


@pytest.mark.parametrize("num_queries, edges, most", [(6, (0, 3, 8), (5, 5)), (3, (0, 5), (3, 5)), (5, (0, 5), (5, 5))])
def test_maca_asks_the_vendor_for_documents_that_have_queries(interpreter, num_queries, edges, most):
    (values,) = interpreter(vendor_calls, edges=(0, 0, 3, 8), num_queries=num_queries)
    first = 8 - edges[-1]
    (_, (sizes, _)) = values
    assert sizes == [[num_queries, 4, 16], *[[8 - first, 2, 16]] * 2, [len(edges)], [len(edges)], *most]

"""The Triton kernels of ops.gla_carry against their float64 reference, in Triton's interpreter."""

from __future__ import annotations

import pytest

import interpreted_carry as case
from test_interpreted_kernels import pytestmark, within  # noqa: F401


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


@pytest.mark.parametrize("backend", ["cuda", "maca"])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("strength", [0.0, 0.05, 5.0])
def test_by_length(interpreter, num_tokens, strength, backend):
    (values,) = interpreter(case.differences, num_tokens=num_tokens, strength=strength, backend=backend)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("backend", ["cuda", "maca"])
@pytest.mark.parametrize("edges", [(0, 70, 70, 130, 200), (0, 0, 130, 200), (0, 200, 200), (0, 1, 200), (0, 64, 200)])
def test_only_document_0_is_entered(interpreter, edges, backend):
    (values,) = interpreter(case.differences, num_tokens=200, edges=edges, backend=backend)
    assert within(values, 1e-5), values


@pytest.mark.parametrize(
    "options",
    [
        dict(heads=(2, 2), sizes=(24, 40), scale=0.7),
        dict(heads=(7, 1), sizes=(64, 48), strength=0.5),
        dict(heads=(3, 1), sizes=(16, 130)),
        dict(strength=20.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["cuda", "maca"])
def test_shapes_and_strong_decays(interpreter, options, backend):
    (values,) = interpreter(case.differences, num_tokens=80, backend=backend, **options)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("strength", [0.0, 0.05, 5.0])
def test_chunks_by_the_dozen(interpreter, strength):
    (values,) = interpreter(case.few_programs, num_tokens=210, strength=strength, sizes=(16, 16))
    assert within(values, 1e-5), values


@pytest.mark.parametrize("edges", [None, (0, 70, 100), (0, 0, 100)])
def test_gla_then_gla_carry_is_gla_output(interpreter, edges):
    (values,) = interpreter(case.two_steps, edges=edges)
    assert within(values, 1e-5), values


def test_fp16(interpreter):
    (values,) = interpreter(case.differences, num_tokens=130, dtype="float16")
    assert within(values, 2e-3), values


def test_o_is_overwritten_where_nothing_else_sees_it(interpreter):
    (found,) = interpreter(case.memory)
    copied = ("leaf", "view", "strided")
    expected = {name: name not in copied for name in ("own", "result", *copied)}
    expected |= {f"{name} kept": name in copied for name in ("own", "result", *copied)}
    assert found == {**expected, "caught": True}


def test_the_same_bits_every_time(interpreter):
    assert interpreter(case.same_bits) == [True]

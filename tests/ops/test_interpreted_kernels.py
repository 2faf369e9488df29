"""Own Triton kernels against their float64 references, in Triton's interpreter, with the tiles of both backends."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from interpreted_case import decoding, differences, halves, states

RAGGED = (0, 0, 1, 2, 66, 66, 67, 130, 130)


def release(package: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) where it is not installed."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return 0, 0


pytestmark = pytest.mark.skipif(
    release("triton") < (3, 6) or (release("triton") < (3, 9) and release("numpy") >= (2, 4)),
    reason="needs Triton; its interpreter before 3.9 cannot count loops with numpy 2.4 and later",
)


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


def within(values: list[float], tolerance: float) -> bool:
    return all(value <= tolerance for value in values)


@pytest.mark.parametrize("backend", ["cuda", "maca"])
@pytest.mark.parametrize("num_tokens, strength", [(2, 0.05), (63, 5.0), (64, 0.05), (65, 2.5), (257, 0.05)])
def test_gla_by_length(interpreter, num_tokens, strength, backend):
    (values,) = interpreter(differences, num_tokens=num_tokens, strength=strength, backend=backend)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("strength", [0.05, 5.0])
@pytest.mark.parametrize("with_state", [False, True])
def test_gla_ragged_documents(interpreter, strength, with_state):
    (values,) = interpreter(differences, num_tokens=130, edges=RAGGED, strength=strength, with_state=with_state)
    assert within(values, 1e-5), values


@pytest.mark.parametrize(
    "case",
    [
        dict(num_tokens=37, rows=3, with_state=True),
        dict(num_tokens=50, heads=(4, 4), sizes=(24, 40), with_state=True),
        dict(num_tokens=50, heads=(7, 1), sizes=(64, 48)),
    ],
    ids=str,
)
def test_gla_shapes(interpreter, case):
    (values,) = interpreter(differences, **case)
    assert within(values, 1e-5), values


def test_gla_that_forgets_nearly_everything(interpreter):
    """Inside a block decays are cut at exp(-10), which is what the tolerance allows."""
    (values,) = interpreter(differences, num_tokens=40, strength=20.0, with_state=True)
    assert within(values, 1e-3), values


def test_gla_in_fp16(interpreter):
    (values,) = interpreter(differences, num_tokens=130, edges=RAGGED, strength=5.0, dtype="float16")
    assert within(values, 2e-3), values


@pytest.mark.parametrize("edges", [None, (0, 30, 30, 70), (0, 69, 70), (0, 70, 70)])
def test_gla_state(interpreter, edges):
    (values,) = interpreter(states, num_tokens=70, edges=edges)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_gla_decoding(interpreter, num_tokens, with_state):
    (values,) = interpreter(decoding, num_tokens=num_tokens, with_state=with_state)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("edges", [None, (0, 30, 30, 70), (0, 0, 30, 70)])
def test_gla_output(interpreter, edges):
    (values,) = interpreter(halves, num_tokens=70, edges=edges)
    assert within(values, 1e-5), values

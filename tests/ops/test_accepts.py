"""The way of every call: accepts() on metadata, refusal or the reference as allowed, torch.compile, the cost."""

import logging
import sys
import timeit
from importlib import import_module

import pytest
import torch

import ops
from ops import discover, registry
from ops.device import EnvFacts
from ops.discover import Catalog, File

PUBLIC = """
from ops.registry import implementation
__all__ = ["twice", "thrice"]
def twice(x, *, shift=None):
    return implementation("twice", "twice", x)(x, shift=shift)
def thrice(x):
    return implementation("twice", "thrice", x)(x)
"""
REFERENCE = """
def twice(x, *, shift=None):
    return 2 * x if shift is None else 2 * x + shift
def thrice(x):
    return 3 * x
"""
CUDA = """
import torch
def accepts(name, x, *, shift=None):
    if x.dtype == torch.float64:
        return "takes no float64"
    if name == "twice" and shift is not None:
        return "takes no shift"
    return None
def twice(x, *, shift=None):
    return 20 * x
def thrice(x):
    return 30 * x
"""
GPU = EnvFacts(torch_version="2.11.0+cu130", cuda_available=True, device_name="NVIDIA H200", capability=(9, 0))


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """A temporary op on a machine that looks like an H200; its tensors are CPU's, which are let onto the "device"."""
    folder = tmp_path / "accepting" / "twice"
    folder.mkdir(parents=True)
    for name, text in {"__init__": PUBLIC, "reference": REFERENCE, "cuda": CUDA}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("reference", "cuda")
    files = {"twice": {name: File(f"accepting.twice.{name}", folder / f"{name}.py") for name in names}}
    backends = discover.catalog().backends
    discover.descriptors()
    discover.catalog.cache_clear()
    found = Catalog({"twice": "accepting.twice"}, files, backends)
    monkeypatch.setattr(discover, "search", lambda _: found)
    monkeypatch.setattr(registry, "collect", lambda: GPU)
    monkeypatch.setattr(registry, "TABLE", registry.Table())
    monkeypatch.setattr(registry, "DEVICE_BLIND", ("meta",))
    yield import_module("accepting.twice")
    discover.catalog.cache_clear()
    for name in [name for name in sys.modules if name.startswith("accepting")]:
        del sys.modules[name]


ONE, EXACT = torch.ones(1), torch.ones(1, dtype=torch.float64)


def test_accepted_calls_run_on_the_backend(twice):
    assert (twice.twice(ONE).item(), twice.thrice(ONE).item()) == (20, 30)
    assert not registry.TABLE.refused


def test_refused_calls_are_errors_unless_the_reference_is_allowed(twice):
    with pytest.raises(ops.Refused, match="ops.twice on cuda does not accept this call: takes no float64; ") as error:
        twice.twice(EXACT)
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    assert "ops.twice: 'cuda or reference'" in str(error.value)
    with pytest.raises(ops.Refused, match="ops.thrice on cuda"):
        twice.thrice(EXACT)
    with pytest.raises(ops.Refused, match="takes no shift"):
        twice.twice(ONE, shift=ONE)


@pytest.mark.parametrize("how", [{"recipe": {"twice": "cuda or reference"}}, {"allow_reference": True}])
def test_an_allowed_reference_is_used_and_logged_once_for_each_reason(twice, how, caplog):
    ops.use(**how)
    with caplog.at_level(logging.WARNING, logger="ops"):
        results = [twice.twice(EXACT), twice.twice(EXACT), twice.thrice(EXACT), twice.twice(ONE, shift=ONE)]
    assert [x.item() for x in results] == [2, 2, 3, 3]
    assert twice.twice(ONE).item() == 20
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "cuda does not accept the call",
        "cuda does not accept the call",
    ]
    assert ops.table()["twice"]["refused"] == ["takes no float64", "takes no shift"]
    assert ops.table()["twice"]["allow_reference"]
    ops.use({"twice": "cuda"})
    with pytest.raises(ops.Refused):
        twice.twice(EXACT)


def test_allowing_the_reference_changes_the_hash_that_ranks_compare(twice):
    strict = ops.table_hash()
    ops.use({"twice": "auto or reference"})
    assert ops.table_hash() != strict


def test_errors_of_an_accepted_call_are_raised(twice, monkeypatch):
    """Never a silent fallback on a runtime exception."""
    import accepting.twice.cuda as file

    monkeypatch.setattr(file, "thrice", lambda x: 1 / 0)
    ops.use(allow_reference=True)
    with pytest.raises(ZeroDivisionError):
        twice.thrice(ONE)


def test_accepts_sees_metadata_only(twice):
    """What torch.compile and equal ranks rely on: the answer for meta tensors is the answer."""
    from accepting.twice.cuda import accepts

    for x in (ONE, EXACT):
        assert accepts("twice", x) == accepts("twice", x.to("meta"))


def test_compiled_calls_keep_the_dispatcher_out_of_the_graph(twice):
    ops.use({"twice": "cuda or reference"})
    registry.TABLE.choices.clear()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: twice.twice(x) + twice.thrice(x), fullgraph=True, backend=keep)
    assert compiled(ONE).item() == 50
    assert compiled(EXACT).item() == 5, "traced anew for another dtype"
    called = [node.name for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(called) == 3, "two products and a sum"


def test_every_op_compiles_on_cpu():
    function = torch.compile(lambda x, w: ops.swiglu(ops.rms_norm(x, w, eps=1e-6)), fullgraph=True, backend="eager")
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(function(x, weight), ops.swiglu(ops.rms_norm(x, weight, eps=1e-6)))


def test_the_dispatcher_costs_microseconds(twice):
    twice.thrice(ONE)
    found = min(timeit.repeat(lambda: registry.implementation("twice", "thrice", ONE), number=1000, repeat=5)) / 1000
    assert found < 20e-6, f"{found * 1e6:.1f} us a call"

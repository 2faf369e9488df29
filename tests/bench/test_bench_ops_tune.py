"""The search for tiles, on an op whose time and results follow from its tiles, by a made-up clock."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

from ops import discover, tuning
from ops.device import EnvFacts
from ops.discover import Catalog, File
from sbtrain.bench import ops_measure, ops_tune
from sbtrain.bench.ops_case import Version
from sbtrain.bench.ops_measure import Settings, Stopwatch
from sbtrain.bench.ops_shapes import cases
from sbtrain.bench.ops_tune import Tuner, progress, space, summary
from sbtrain.bench.shapes import model_config

H200 = EnvFacts(torch_version="2.11.0+cu130", cuda_available=True, device_name="NVIDIA H200", triton_backend="cuda")
CPU = torch.device("cpu")
PRESENT = {"BLOCK": 64, "num_warps": 4}
CUDA = """dot: {forward: [BLOCK]}
# Fits everywhere.
default:
  forward: {BLOCK: 64, num_warps: 4, shared_bytes: 1024}
  backward: {BLOCK: 64, num_warps: 4}
"""


@pytest.fixture
def op(tmp_path, monkeypatch):
    """swiglu with tune files in a folder of the test's own and a cuda file that declares BLOCK of its forward kernel.

    A call takes 1 s, less for larger blocks of the forward kernel and more for other warps of the backward one.
    """
    folder = tmp_path / "swiglu"
    (folder / "tune").mkdir(parents=True)
    (folder / "tune" / "cuda.yaml").write_text(CUDA)
    module = ModuleType("made_up_cuda")
    module.SPACE = {"forward": {"BLOCK": (8, 64, 128, 256, 512)}}
    monkeypatch.setitem(sys.modules, "made_up_cuda", module)
    names = {"cuda": "made_up_cuda", "reference": "ops.swiglu.reference"}
    files = {"swiglu": {name: File(module, folder / f"{name}.py") for name, module in names.items()}}
    catalog = Catalog({"swiglu": "ops.swiglu"}, files, discover.catalog().backends)
    for place in (tuning, ops_tune):
        monkeypatch.setattr(place, "catalog", lambda: catalog)
        monkeypatch.setattr(place, "collect", lambda: H200)
    monkeypatch.setattr(tuning, "LOADED", tuning.Loaded())
    monkeypatch.setattr(ops_tune, "resolve", lambda op: SimpleNamespace(backend="cuda"))
    monkeypatch.setattr(ops_tune, "compiled", lambda op: None)  # whatever other tests have compiled
    now = [0.0]
    monkeypatch.setattr(ops_measure.time, "perf_counter", lambda: now[0])

    def call(inputs):
        tiles = tuning.tiles("swiglu", "cuda")
        block, warps = tiles["forward"]["BLOCK"], tiles["backward"]["num_warps"]
        if block == 256:
            raise RuntimeError("out of resource: shared memory")
        now[0] += 64 / block if warps == 4 else 2.0
        gate, up = inputs["gate_up"].chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up * (2 if block == 512 else 1),)  # 512 is fast and wrong

    monkeypatch.setattr(ops_tune, "own_versions", lambda case, names: [Version("cuda", lambda: call, gpu_only=False)])
    return folder / "tune" / "cuda.yaml"


def tuner(**changes) -> Tuner:
    case = next(case for case in cases(model_config("tiny", num_layers=2, pattern="LS")) if case.op == "swiglu")
    settings = Settings(CPU, torch.float32, steps=1, warmup=0, time_limit_s=30.0, seed=0)
    made = Tuner("swiglu", [case], settings, Stopwatch(CPU), **{"tune_limit_s": 1e9, **changes})
    made.prepare((8, 16), 8)
    return made


def test_space_is_what_the_op_declares_and_neighbors_of_the_rest(op):
    """8 is too small for a tl.dot, 64 x 4 is there already."""
    found = space("swiglu", "cuda", "forward", PRESENT)
    pairs = {(entry["BLOCK"], entry["num_warps"]) for entry in found}
    assert pairs == {(b, w) for b in (64, 128, 256, 512) for w in (2, 4, 8)} - {(64, 4)}
    changed = [sum(entry[key] != PRESENT[key] for key in entry) for entry in found]
    assert changed == sorted(changed)
    stages = space("swiglu", "cuda", "backward", {"BLOCK": 1, "num_warps": 32, "num_stages": 2})
    assert {entry["num_stages"] for entry in stages} == {1, 2, 3, 4}
    assert {entry["num_warps"] for entry in stages} == {16, 32}  # 64 warps are over the limit
    assert {entry["BLOCK"] for entry in stages} == {1, 2}


def test_the_fastest_tiles_that_are_right_are_written(op):
    searches = [search for search in tuner().searches("a test, today") if search.finished]
    forward, backward = searches
    assert forward.best["entry"]["BLOCK"] == 128 and forward.best["again"] == pytest.approx(0.5)
    assert backward.best is None and len(backward.tried) == 8
    by_block = {}
    for tried in forward.tried:
        by_block.setdefault(tried["entry"]["BLOCK"], []).append(tried)
    assert all("out of resource" in tried["problem"] for tried in by_block[256])
    assert all("error 1.0e+00" in tried["wrong"] for tried in by_block[512] if "wrong" in tried)
    assert any("wrong" in tried for tried in by_block[512])
    content = yaml.safe_load(op.read_text())
    assert content["default"] == yaml.safe_load(CUDA)["default"] and "# Fits everywhere." in op.read_text()
    written = content["H200"]
    assert written["forward"] == {**forward.best["entry"], "status": "measured", "source": "a test, today"}
    assert written["backward"] == {**PRESENT, "status": "measured", "source": "a test, today"}
    assert tuning.tiles("swiglu", "cuda")["forward"]["BLOCK"] == 128
    text = summary(searches)
    assert "BLOCK=64 num_warps=4 -> BLOCK=128" in text and "num_warps=4, kept" in text
    assert "0.500 of the time, written to" in progress(forward)


def test_a_kernel_that_is_never_launched_is_not_called_measured(op, monkeypatch):
    """Whatever is tried for the backward kernel, nothing new is compiled."""
    blocks = []

    def compiled(name):
        block = tuning.tiles("swiglu", "cuda")["forward"]["BLOCK"]
        blocks.append(block)
        return set(blocks)

    monkeypatch.setattr(ops_tune, "compiled", compiled)
    monkeypatch.setattr(ops_tune, "compiler_notes", lambda kernels: {})
    searches = {search.kernel: search for search in tuner().searches("a test") if search.finished}
    assert searches["forward"].reached
    assert not searches["backward"].reached and searches["backward"].file is None
    assert "backward" not in yaml.safe_load(op.read_text())["H200"]
    assert progress(searches["backward"]) == "swiglu.backward: not launched for these inputs"


def test_the_search_ends_with_its_time(op):
    """Present tiles are timed first; a candidate takes seconds of the made-up clock, and 5 s are all there is."""
    search = next(search for search in tuner(tune_limit_s=5.0).searches("a test") if search.finished)
    assert 1 <= len(search.tried) < 11 and search.left == 11 - len(search.tried)


def test_a_lost_device_ends_the_search(op, monkeypatch):
    searches = tuner().searches("a test")

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops_tune, "synchronize", lost)
    with pytest.raises(ops_tune.DeviceLost, match="swiglu.forward with {'BLOCK': 256.*: RuntimeError: out of resource"):
        list(searches)
    assert "H200" not in yaml.safe_load(op.read_text())


def test_kernels_can_be_named(op):
    searches = [search for search in tuner(kernels=("backward", "other")).searches("a test") if search.finished]
    assert [search.kernel for search in searches] == ["backward"]
    with pytest.raises(ValueError, match="op swiglu on cuda has the kernels forward, backward"):
        tuner(kernels=("backwards",))


def test_an_op_without_tiles_says_so(op):
    op.unlink()
    with pytest.raises(ValueError, match="op swiglu on cuda has no tiles to tune"):
        tuner()


def test_compiler_notes_are_the_most_of_the_new_kernels():
    assert ops_tune.compiler_notes(set()) == {}

    class Compiled:
        def __init__(self, shared, spills, registers):
            self.metadata, self.n_spills, self.n_regs = SimpleNamespace(shared=shared), spills, registers

    found = ops_tune.compiler_notes({Compiled(100, 0, 64), Compiled(50, 2, 128)})
    assert found == {"shared_bytes": 100, "private_bytes": 8, "registers": 128}

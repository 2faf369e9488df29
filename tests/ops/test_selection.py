"""Backend selection: truth table over published device facts, overrides, discovery, what importing ops pulls in."""

import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ops
from ops import registry
from ops.device import EnvFacts
from ops.select import choose, platform

C550 = EnvFacts(
    torch_version="2.10.0+metax3.8.1.0",
    version_cuda="11.6",
    version_maca="3.8.1.0",
    cuda_available=True,
    device_name="MetaX C550",
    capability=(8, 0),
    warp_size=64,
    num_multiprocessors=104,
    shared_memory_bytes=65536,
    triton_backend="maca",
    maca_path="/opt/maca",
)
A100 = EnvFacts(
    torch_version="2.10.0+cu128",
    version_cuda="12.8",
    cuda_available=True,
    device_name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    warp_size=32,
    num_multiprocessors=108,
    triton_backend="cuda",
)
H100 = replace(A100, device_name="NVIDIA H100 80GB HBM3", capability=(9, 0), num_multiprocessors=132)
ROCM = replace(A100, version_cuda=None, version_hip="6.4", device_name="AMD Instinct MI300X", triton_backend="hip")
CPU = EnvFacts(torch_version="2.13.0+cpu")
BACKENDS = registry.backends()
ALL = frozenset({"cuda", "maca", "reference"})
UNKNOWN_NAME = replace(A100, device_name="Graphics Device")


@pytest.mark.parametrize(
    "facts, expected, why",
    [
        (C550, "maca", "torch.version.maca is 3.8.1.0"),
        (replace(C550, version_maca=None), "maca", r"torch is 2.10.0\+metax3.8.1.0"),
        (replace(C550, version_maca=None, torch_version="2.4.0"), "maca", "'MetaX C550'"),
        (replace(C550, triton_backend=None), "maca", "version.maca"),
        (replace(C550, cuda_available=False, device_name="", triton_backend=None), "reference", "anywhere"),
        (A100, "cuda", "A100"),
        (H100, "cuda", "H100"),
        (replace(H100, device_name="NVIDIA H200"), "cuda", "H200"),
        (replace(A100, triton_backend=None), "cuda", "A100"),
        (UNKNOWN_NAME, "cuda", "unknown device name 'Graphics Device'"),
        (ROCM, "reference", "anywhere"),
        (CPU, "reference", "anywhere"),
        (replace(CPU, maca_path="/opt/maca"), "reference", "anywhere"),
    ],
)
def test_platform_truth_table(facts, expected, why):
    name, reason = platform(facts, BACKENDS)
    assert name == expected
    assert re.search(why, reason)


def test_a100_and_c550_differ_only_in_name_and_version():
    twin = replace(A100, version_cuda="11.6", triton_backend=None)
    card = replace(twin, device_name="MetaX C550", torch_version="2.10.0+metax3.8.1.0")
    assert platform(twin, BACKENDS)[0] == "cuda"
    assert platform(card, BACKENDS)[0] == "maca"


@pytest.mark.parametrize(
    "facts, message",
    [
        (replace(A100, maca_path="/opt/maca"), "unset MACA_PATH"),
        (replace(C550, triton_backend="cuda"), "install MetaX's Triton"),
        (replace(C550, device_name="NVIDIA A100-SXM4-80GB"), "device is called 'NVIDIA"),
        (replace(C550, version_hip="6.4"), "ROCm 6.4"),
        (replace(A100, triton_backend="maca"), "install MetaX's torch"),
    ],
)
def test_contradictions_are_errors_that_show_the_facts(facts, message):
    with pytest.raises(ValueError, match=message) as error:
        platform(facts, BACKENDS)
    assert repr(facts.torch_version) in str(error.value)


def pick(facts, *, files=ALL, recipe=None, missing=None, op="gla"):
    """choose() where the backends named in `missing` lack a package."""
    missing = missing or {}
    return choose(op, files=files, facts=facts, backends=BACKENDS, recipe=recipe or {}, why_not=missing.get)


def with_env(facts, **overrides):
    return replace(facts, overrides=overrides)


def test_chains():
    assert pick(H100)[0] == "cuda"
    backend, reason = pick(C550, files=frozenset({"cuda", "reference"}))
    assert backend == "reference", "maca must never run cuda files"
    assert "maca: no implementation" in reason
    backend, reason = pick(H100, missing={"cuda": "fla is not installed"})
    assert (backend, "cuda: unavailable: fla is not installed" in reason) == ("reference", True)
    assert pick(H100, files=frozenset({"reference"}))[0] == "reference"
    with pytest.raises(ValueError, match="op gla has no implementation for cpu|no implementation for reference"):
        pick(CPU, files=frozenset({"cuda"}))


def test_precedence_of_overrides():
    assert pick(H100, recipe={"gla": "reference"}) == ("reference", "recipe ops.gla")
    assert pick(H100, recipe={"attention": "reference"})[0] == "cuda"
    forced = with_env(H100, OPS_BACKEND="reference")
    assert pick(forced)[0] == "reference"
    assert pick(forced, recipe={"gla": "cuda"})[0] == "cuda"
    forced = with_env(H100, OPS_BACKEND="reference", OPS_BACKEND_GLA="cuda")
    assert pick(forced, recipe={"gla": "reference"}) == ("cuda", "OPS_BACKEND_GLA")
    assert pick(forced, op="rope")[0] == "reference"


@pytest.mark.parametrize(
    "facts, kwargs, message",
    [
        (
            with_env(H100, OPS_BACKEND="maca"),
            {},
            "OPS_BACKEND=maca is not usable here: no sign of MetaX.*cuda, reference",
        ),
        (with_env(C550, OPS_BACKEND="cuda"), {}, "this is a MetaX device.*choose from: maca, reference"),
        (with_env(CPU, OPS_BACKEND_GLA="cuda"), {}, "OPS_BACKEND_GLA=cuda: torch sees no CUDA device.*reference"),
        (with_env(H100, OPS_BACKEND_GLA="tpu"), {}, "OPS_BACKEND_GLA=tpu: no such backend; choose from: cuda, maca"),
        (C550, {"recipe": {"gla": "cuda"}}, "recipe key ops.gla=cuda: this is a MetaX device"),
        (H100, {"recipe": {"gla": "cuda"}, "missing": {"cuda": "fla is not installed"}}, "fla is not installed"),
        (with_env(H100, OPS_BACKEND="cuda"), {"missing": {"cuda": "fla is not installed"}}, "fla is not installed"),
        (H100, {"recipe": {"gla": "cuda"}, "files": frozenset({"reference"})}, "no implementation.*reference"),
    ],
)
def test_forced_but_unavailable_lists_the_choices(facts, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        pick(facts, **kwargs)
    assert "\n" not in str(error.value)


def test_forcing_the_platform_leaves_ops_without_its_file_to_the_chain():
    assert pick(with_env(H100, OPS_BACKEND="cuda"), files=frozenset({"reference"}))[0] == "reference"


def test_scan_finds_new_folders_and_backends_without_importing(tmp_path):
    root = tmp_path / "ops"
    shutil.copytree(registry.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    before = registry.scan(root)
    (root / "backends" / "tpu.py").write_text("raise RuntimeError('scanned, so imported')\n")
    (root / "convolution").mkdir()
    for name in ("__init__", "reference", "tpu", "triton_kernels"):
        (root / "convolution" / f"{name}.py").write_text("raise RuntimeError('scanned, so imported')\n")
    after = registry.scan(root)
    assert after.pop("convolution") == {"reference", "tpu"}
    assert after == before == registry.scan()
    assert "backends" not in after


def test_a_new_op_needs_no_edit(tmp_path):
    root = tmp_path / "ops"
    shutil.copytree(registry.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "double").mkdir()
    (root / "double" / "__init__.py").write_text(
        "from ops.registry import implementation\n__all__ = ['double']\n"
        "def double(x):\n    return implementation('double', 'double', x)(x)\n"
    )
    (root / "double" / "reference.py").write_text("def double(x):\n    return 2 * x\n")
    code = "import ops, torch; print(ops.double(torch.ones(1)).item(), ops.resolve('double').backend)"
    assert python(code, cwd=tmp_path) == "2.0 reference"


def test_importing_and_calling_ops_on_cpu_imports_no_kernel_package():
    code = (
        "import sys, torch, ops\n"
        "ops.rms_norm(torch.ones(2), torch.ones(2), eps=1e-6)\n"
        "names = ('triton', 'fla', 'liger_kernel', 'flash_attn', 'mcoplib', 'torch._dynamo')\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert python(code) == "[]"


def test_resolve_and_use_on_this_machine(monkeypatch, caplog):
    monkeypatch.setattr(registry, "collect", lambda: CPU)
    monkeypatch.setattr(registry, "TABLE", registry.Table())
    with caplog.at_level(logging.INFO, logger="ops"):
        choice = ops.resolve("gla")
        assert ops.resolve("gla") is choice
    assert [record.message for record in caplog.records] == ["ops.gla -> reference (plain torch runs anywhere)"]
    assert choice.function is choice.functions["gla"]
    assert set(choice.functions) == {"gla", "gla_state", "gla_output"}
    ops.use({"gla": "reference"})
    assert ops.resolve("gla").reason == "recipe ops.gla"
    assert ops.resolve("gla", {}).reason == "plain torch runs anywhere"
    with pytest.raises(ValueError, match="recipe key ops.glaa: no such op; choose from: attention"):
        ops.use({"glaa": "reference"})
    with pytest.raises(ValueError, match="recipe key ops.gla=cuda: torch sees no CUDA device"):
        ops.use({"gla": "cuda"})
    with pytest.raises(ValueError, match="no such op: glaa"):
        ops.resolve("glaa")


def test_table_names_every_op_with_a_reason_and_its_hash_follows_the_choice(monkeypatch):
    monkeypatch.setattr(registry, "collect", lambda: CPU)
    monkeypatch.setattr(registry, "TABLE", registry.Table())
    rows = registry.rows()
    assert len(rows) == len(registry.scan()) * len(BACKENDS)
    assert all(reason for *_, reason in rows)
    assert ("gla", "cuda", "", "torch sees no CUDA device") in rows
    assert ops.table()["gla"] == {"backend": "reference", "reason": "plain torch runs anywhere"}
    assert ops.table()["platform"]["backend"] == "reference"
    before = ops.table_hash()
    choice = ops.resolve("rope")
    registry.TABLE.choices["rope"] = replace(choice, backend="cuda")
    assert ops.table_hash() != before


def test_missing_optional_package_is_a_reason_and_any_other_failure_is_raised(monkeypatch):
    def absent(name):
        def load(module):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return load

    monkeypatch.setattr(registry, "import_module", absent("fla.ops"))
    assert registry.why_not("gla", BACKENDS["cuda"]) == "fla is not installed"
    monkeypatch.setattr(registry, "import_module", absent("numpyy"))
    with pytest.raises(ModuleNotFoundError):
        registry.why_not("gla", BACKENDS["cuda"])


def python(code, cwd=None):
    """stdout of a fresh interpreter that finds the given checkout's ops first."""
    cwd = cwd or Path(ops.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()

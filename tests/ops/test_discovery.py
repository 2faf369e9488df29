"""Ops and backends are found by scanning: new folders and files, packages from outside, what importing ops pulls in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ops
from ops import discover

ROOT = Path(ops.__file__).parents[1]
BACKEND = """
from ops.backends import Backend, Limits
BACKEND = Backend("tpu", rank=5, probe=lambda facts: (True, "always there"), fallback=("reference",))
"""
REFERENCE = "def double(x):\n    return 2 * x\n"
PUBLIC = """
from ops.registry import implementation
__all__ = ["double"]
def double(x):
    return implementation("double", "double", x)(x)
"""
EXPLAIN = "import ops; t = ops.table(); print(t['platform']['backend'], t['double']['backend'], t['gla']['backend'])"


def test_scan_finds_new_folders_and_backends_without_importing(tmp_path):
    root = tmp_path / "ops"
    shutil.copytree(discover.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    before = discover.scan(root)
    (root / "backends" / "tpu.py").write_text("raise RuntimeError('scanned, so imported')\n")
    (root / "convolution").mkdir()
    for name in ("__init__", "reference", "tpu", "triton_kernels"):
        (root / "convolution" / f"{name}.py").write_text("raise RuntimeError('scanned, so imported')\n")
    after = discover.scan(root)
    assert after.pop("convolution") == {"reference", "tpu"}
    assert after == before == discover.scan()
    assert "backends" not in after


def test_a_new_op_needs_no_edit(tmp_path):
    root = tmp_path / "ops"
    shutil.copytree(discover.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "double").mkdir()
    (root / "double" / "__init__.py").write_text(
        "from ops.registry import implementation\n__all__ = ['double']\n"
        "def double(x):\n    return implementation('double', 'double', x)(x)\n"
    )
    (root / "double" / "reference.py").write_text("def double(x):\n    return 2 * x\n")
    code = "import ops, torch; print(ops.double(torch.ones(1)).item(), ops.resolve('double').backend)"
    assert python(code, cwd=tmp_path) == "2.0 reference"


def write(folder, **files):
    """Write name.py files into a folder that may not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def test_a_temporary_op_and_backend_are_used_and_git_sees_no_edit(tmp_path):
    """The tree-scan test: new files only, in a clone of this tree's ops."""
    root = tmp_path / "ops"
    shutil.copytree(discover.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it is"]):
        subprocess.run([*git, *command], check=True)
    write(root / "double", __init__=PUBLIC, reference=REFERENCE, tpu=REFERENCE.replace("2", "3"))
    write(root / "backends", tpu=BACKEND)
    assert python(EXPLAIN, cwd=tmp_path) == "tpu tpu reference"
    status = subprocess.run([*git, "status", "--short", "-uall"], capture_output=True, text=True, check=True).stdout
    changed = [line for line in status.splitlines() if "__pycache__" not in line]
    assert changed and all(line.startswith("??") for line in changed)


@pytest.mark.parametrize("how", ["OPS_MODULES", "entry point"])
def test_ops_and_backends_of_another_package(tmp_path, how):
    write(tmp_path / "acme", __init__="")
    write(tmp_path / "acme" / "double", __init__=PUBLIC, reference=REFERENCE, tpu=REFERENCE.replace("2", "3"))
    write(tmp_path / "acme" / "swiglu", tpu="def swiglu(gate_up):\n    return gate_up\n")
    write(tmp_path / "acme" / "backends", tpu=BACKEND)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    if how == "OPS_MODULES":
        environment["OPS_MODULES"] = "acme"
    else:
        info = tmp_path / "acme-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[sbtrain.ops]\nacme = acme\n")
    code = EXPLAIN + "; import torch; print(t['swiglu']['backend'], ops.double(torch.ones(1)).item())"
    assert python(code, **environment) == "tpu tpu reference\ntpu 2.0"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"rope": "reference"}, r"op rope on reference is there twice, in .*ops/rope/reference.py and .*acme"),
        ({"backends": "cuda"}, "backend cuda is there twice"),
        ({"ropes": "cuda"}, "acme/ropes/cuda.py belongs to no op: there is no ropes with __init__"),
        ({"double": "reference"}, "acme.double calls a function gla, as ops or another op does; rename it"),
        ({}, "OPS_MODULES: there is no package absent; install it or correct the name"),
    ],
)
def test_outsiders_that_claim_what_is_taken_or_are_not_there(tmp_path, files, message):
    write(tmp_path / "acme", __init__="")
    for folder, name in files.items():
        write(tmp_path / "acme" / folder, __init__="__all__ = ['gla']\ngla = 1\n", **{name: ""})
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OPS_MODULES": "acme" if files else "absent"}
    assert re.search(message, python("import ops", fails=True, **environment).splitlines()[-1])


def test_outsiders_whose_names_would_shadow_ours(tmp_path):
    write(tmp_path / "acme", __init__="")
    write(tmp_path / "acme" / "double", __init__="__all__ = ['tuning']\ntuning = 1\n", reference="")
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OPS_MODULES": "acme"}
    message = python("import ops", fails=True, **environment)
    assert "acme.double calls a function tuning, as ops or another op does; rename it" in message


def test_a_backend_is_named_like_its_file(tmp_path):
    write(tmp_path / "acme", __init__="")
    write(tmp_path / "acme" / "backends", npu=BACKEND)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OPS_MODULES": "acme"}
    message = python("import ops; ops.table()", fails=True, **environment)
    assert "acme/backends/npu.py: BACKEND.name is 'tpu'; make it 'npu', like the file's name" in message


def test_the_table_hash_does_not_depend_on_where_packages_are(tmp_path):
    found = set()
    shutil.copytree(discover.ROOT, tmp_path / "m" / "ops")
    for place in ("a", "z"):
        acme = tmp_path / place / "acme"
        write(acme, __init__="")
        write(acme / "swiglu", tpu="def swiglu(gate_up):\n    return gate_up\n")
        write(acme / "backends", tpu=BACKEND)
        environment = {"PYTHONPATH": f"{tmp_path / 'm'}{os.pathsep}{acme.parent}", "OPS_MODULES": "acme"}
        found.add(python("import ops; print(ops.table_hash())", cwd=tmp_path, **environment))
    assert len(found) == 1


def test_importing_and_calling_ops_on_cpu_imports_no_kernel_package():
    code = (
        "import sys, torch, ops\n"
        "ops.rms_norm(torch.ones(2), torch.ones(2), eps=1e-6)\n"
        "names = ('triton', 'fla', 'liger_kernel', 'flash_attn', 'mcoplib', 'torch._dynamo')\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert python(code) == "[]"


def python(code, cwd=ROOT, fails=False, **environment):
    """stdout (stderr if it fails) of a fresh interpreter that finds the given checkout's ops first."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), **environment}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert bool(result.returncode) == fails, result.stderr
    return (result.stderr if fails else result.stdout).strip()

"""launch/first_boot.py without a device: the reference against itself, and ops that hang, crash or are wrong."""

import json
import os
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = """
from ops.registry import implementation
__all__ = ["{op}"]
def {op}(x):
    return implementation("{op}", "{op}", x)(x)
"""
EXAMPLES = """
import torch
TOLERANCES = {{torch.float32: 1e-6}}
def examples(size):
    return [("{op}", (torch.ones(3, dtype=torch.float64, requires_grad=True),), {{}})]
"""
BODIES = {
    "hangs": "import subprocess, sys, time\n"
    "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n    time.sleep(600)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "raises": "raise RuntimeError('out of order')",
    "strays": "return x * (1.001 if x.element_size() == 4 else 1)",
    "works": "return 2 * x",
}


@pytest.fixture
def outside(tmp_path):
    """An environment in which a package adds one op for each of BODIES, and `bare`, which has no examples."""
    for op, body in {**BODIES, "bare": "return x"}.items():
        folder = tmp_path / "acme" / op
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(PUBLIC.format(op=op))
        (folder / "reference.py").write_text(f"def {op}(x):\n    {body}\n")
        if op != "bare":
            (folder / "examples.py").write_text(EXAMPLES.format(op=op))
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OPS_MODULES": "acme", "OMP_NUM_THREADS": "1"}


def first_boot(*arguments, out, env=None):
    """(finished process, status.json or None)."""
    command = [sys.executable, str(ROOT / "launch" / "first_boot.py"), *arguments, f"out={out}"]
    done = subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, timeout=280)
    status = out / "status.json"
    return done, json.loads(status.read_text()) if status.exists() else None


def test_the_reference_against_itself(tmp_path):
    arguments = ("backend=reference", "ops=rms_norm,spike_encode", "sizes=small", "mark=true")
    done, status = first_boot(*arguments, out=tmp_path / "boot")
    assert done.returncode == 0, done.stdout + done.stderr
    assert status["backend"] == status["machine"]["backend"] == "reference"
    assert status["machine"]["facts"]["overrides"] == {"OPS_BACKEND": "reference"}
    found = status["ops"]["rms_norm"]["small"]
    assert found["status"] == "ok" and found["backend"] == "reference"
    assert {case["dtype"] for case in found["cases"]} == {"float32", "bfloat16"}
    assert all(case["error"] <= case["tolerance"] for case in found["cases"])
    assert status["marked"] == [f"{op}: not marked, reference was ok" for op in ("rms_norm", "spike_encode")]
    assert "rms_norm" in done.stdout and "torch_version=" in done.stdout and "limits: " in done.stdout


def test_what_hangs_is_killed_and_what_crashes_takes_nothing_along(tmp_path, outside):
    arguments = ("ops=hangs,crashes,raises,bare,works", "sizes=small", "timeout_s=25")
    start = time.monotonic()
    done, status = first_boot(*arguments, out=tmp_path / "boot", env=outside)
    assert time.monotonic() - start < 250
    assert done.returncode == 1
    found = {op: sizes["small"] for op, sizes in status["ops"].items()}
    assert [found[op]["status"] for op in found] == ["hung", "crashed", "crashed", "no examples", "ok"]
    assert found["hangs"]["note"] == "no answer in 25 s, killed"
    assert found["crashes"]["note"] == "SIGSEGV"
    assert found["raises"]["note"] == "exit code 1: RuntimeError: out of order"
    assert not sleeping(), "the hanging op's own child is gone as well"
    assert "hangs" in done.stdout and "killed" in done.stdout


def sleeping() -> list[str]:
    """Command lines of the processes that the hanging op has started."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    return [line.decode() for line in lines if b"import time; time.sleep(600)" in line]


def test_a_wrong_op_is_named(tmp_path, outside):
    done, status = first_boot("ops=strays", "sizes=small", out=tmp_path / "boot", env=outside)
    assert done.returncode == 1 and "wrong: strays float32" in done.stdout
    assert status["ops"]["strays"]["small"]["cases"][0]["error"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("backend=tpu", "backend=tpu: choose from: maca, cuda, reference"),
        ("ops=glaa", "ops=glaa: choose from: accumulate"),
        ("sizes=huge", "sizes=huge: choose from: small, mid"),
        ("timeout_s=soon", "timeout_s=soon: must be a number of seconds"),
        ("mark=yes", "mark=yes: choose from: true, false"),
        ("gpu=1", "gpu=1: must be key=value with one of: backend"),
    ],
)
def test_bad_arguments_are_one_line(script, argument, message):
    with pytest.raises(ValueError, match=message) as error:
        script.parse([argument])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "found, sentence",
    [
        ({"status": "ok", "backend": "maca", "emulated": False}, "gla: measured, FILE"),
        ({"status": "ok", "backend": "maca", "emulated": True}, "gla: not marked, emulated"),
        ({"status": "wrong", "backend": "maca"}, "gla: not marked, maca was wrong"),
        ({"status": "hung"}, "gla: not marked, nothing was hung"),
    ],
)
def test_only_what_passed_on_its_own_device_is_marked(script, monkeypatch, found, sentence):
    calls = []
    monkeypatch.setattr(script.tuning, "mark_measured", lambda *call: calls.append(call) or "FILE")
    facts = {"torch_version": "2.10.0+metax3.8.1.0", "device_name": "MetaX C550"}
    status = {"date": "2026-01-01", "machine": {"facts": facts}, "ops": {"gla": {"small": found}}}
    assert script.mark(status) == [sentence]
    if calls:
        op, backend, _, source = calls[0]
        assert (op, backend) == ("gla", "maca")
        assert source == "parity on MetaX C550, torch 2.10.0+metax3.8.1.0, 2026-01-01"


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    spec = spec_from_file_location("first_boot", ROOT / "launch" / "first_boot.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

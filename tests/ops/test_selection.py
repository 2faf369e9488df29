"""Backend selection: truth table over published device facts, limits, overrides, emulation, the table that explains."""

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ops
from ops import discover, explain, registry
from ops.device import EnvFacts, device_model, names_model
from ops.select import choose, platform, read_wish

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
BACKENDS = discover.descriptors()
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
        (replace(C550, maca_path=""), "maca", "version.maca"),
        (replace(C550, device_name="MetaX C500", torch_version="2.4.0+metax3.5.3.2"), "maca", "version.maca"),
        (replace(H100, emulate=True), "cuda", "H100"),
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
        (replace(C550, triton_backend=None, triton_error="TypeError: None", maca_path=""), "set MACA_PATH"),
        (replace(H100, triton_backend=None, triton_error="RuntimeError: 0 active drivers"), "0 active drivers"),
    ],
)
def test_contradictions_are_errors_that_show_the_facts(facts, message):
    with pytest.raises(ValueError, match=message) as error:
        platform(facts, BACKENDS)
    assert repr(facts.torch_version) in str(error.value)


def test_the_reference_can_be_had_without_knowing_the_device():
    broken = replace(C550, triton_backend="cuda", overrides={"OPS_BACKEND": "reference"})
    assert platform(broken, BACKENDS) == ("reference", "OPS_BACKEND")


def test_facts_of_another_machine_come_from_json():
    text = json.dumps(C550.to_json())
    assert EnvFacts.from_json(json.loads(text)) == C550
    assert platform(EnvFacts.from_json({"torch_version": "2.13.0+cpu"}), BACKENDS)[0] == "reference"


def test_cautions_are_given_for_usable_devices_that_may_be_something_else():
    assert BACKENDS["cuda"].caution(H100) is None
    assert "taken for NVIDIA" in BACKENDS["cuda"].caution(UNKNOWN_NAME)
    assert BACKENDS["maca"].caution(C550) is None
    assert "MACA_PATH is not set" in BACKENDS["maca"].caution(replace(C550, maca_path=""))


@pytest.mark.parametrize(
    "name, model",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("MetaX C550", "C550"),
    ],
)
def test_device_models(name, model):
    assert device_model(name) == model
    assert names_model(name, model)
    assert not names_model("NVIDIA GH200 480GB", "H200")


def test_limits_follow_the_device():
    cuda, maca = BACKENDS["cuda"], BACKENDS["maca"]
    kilobytes = {facts.device_name: cuda.limits_on(facts).shared_memory_bytes // 1024 for facts in (A100, H100)}
    assert kilobytes == {"NVIDIA A100-SXM4-80GB": 163, "NVIDIA H100 80GB HBM3": 227}
    consumer = replace(A100, device_name="NVIDIA GeForce RTX 4090", capability=(8, 9))
    assert cuda.limits_on(consumer).shared_memory_bytes == 99 * 1024
    assert cuda.limits_on(replace(consumer, shared_memory_bytes=101376)).shared_memory_bytes == 101376
    assert cuda.limits_of_model("H200").shared_memory_bytes == 227 * 1024
    assert cuda.limits_of_model("default").shared_memory_bytes == 99 * 1024
    assert (cuda.limits.max_num_warps, maca.limits.max_num_warps) == (32, 8)
    assert maca.limits_on(replace(C550, max_threads_per_block=1024)).max_num_warps == 16
    assert maca.limits_on(replace(H100, max_threads_per_block=1024)) == maca.limits, "emulation keeps MetaX's limits"
    limits = maca.limits_on(C550)
    assert (limits.warp_size, limits.shared_memory_bytes) == (64, 65536)
    assert (limits.max_num_ctas, limits.min_dot_size, limits.private_bytes_per_thread) == (1, 16, 4096)
    assert not any((limits.bf16_atomics, limits.tensor_memory_access, limits.fp8, limits.spin_between_programs))


def pick(facts, *, files=ALL, recipe=None, missing=None, op="gla"):
    """choose() where the backends named in `missing` lack a package."""
    missing = missing or {}
    return choose(op, files=files, facts=facts, backends=BACKENDS, recipe=recipe or {}, why_not=missing.get)


def with_env(facts, **overrides):
    return replace(facts, overrides=overrides)


def test_chains():
    assert pick(H100)[0] == "cuda"
    backend, reason, *_ = pick(C550, files=frozenset({"cuda", "reference"}))
    assert backend == "reference", "maca must never run cuda files"
    assert "maca: no implementation" in reason
    backend, reason, *_ = pick(H100, missing={"cuda": "fla is not installed"})
    assert (backend, "cuda: unavailable: fla is not installed" in reason) == ("reference", True)
    assert pick(H100, files=frozenset({"reference"}))[0] == "reference"
    with pytest.raises(ValueError, match="op gla has no implementation for cpu|no implementation for reference"):
        pick(CPU, files=frozenset({"cuda"}))


def test_precedence_of_overrides():
    assert pick(H100, recipe={"gla": "reference"})[:2] == ("reference", "recipe ops.gla")
    assert pick(H100, recipe={"attention": "reference"})[0] == "cuda"
    forced = with_env(H100, OPS_BACKEND="reference")
    assert pick(forced)[0] == "reference"
    assert pick(forced, recipe={"gla": "cuda"})[0] == "cuda"
    forced = with_env(H100, OPS_BACKEND="reference", OPS_BACKEND_GLA="cuda")
    assert pick(forced, recipe={"gla": "reference"})[:2] == ("cuda", "OPS_BACKEND_GLA")
    assert pick(forced, op="rope")[0] == "reference"


@pytest.mark.parametrize(
    "wishes, expected",
    [
        ({}, ("cuda", False)),
        ({"recipe": {"gla": "cuda or reference"}}, ("cuda", True)),
        ({"recipe": {"gla": "auto or reference"}}, ("cuda", True)),
        ({"recipe": {"rope": "auto or reference"}}, ("cuda", False)),
        ({"OPS_BACKEND": "auto or reference"}, ("cuda", True)),
        ({"OPS_BACKEND": "cuda or reference", "recipe": {"gla": "cuda"}}, ("cuda", False)),
        ({"OPS_BACKEND_GLA": "cuda", "recipe": {"gla": "cuda or reference"}}, ("cuda", False)),
        ({"OPS_BACKEND_GLA": "auto or reference", "recipe": {"gla": "reference"}}, ("reference", True)),
        ({"OPS_BACKEND": "reference", "recipe": {"gla": "auto or reference"}}, ("reference", True)),
    ],
)
def test_the_reference_for_refused_calls_is_asked_for_beside_the_backend(wishes, expected):
    recipe = wishes.pop("recipe", {})
    selection = pick(with_env(H100, **wishes), recipe=recipe)
    assert (selection.backend, selection.allow_reference) == expected


def test_words_that_are_no_wish():
    for text in ("cuda or maca", "reference or cuda", "cuda, reference", "or reference"):
        with pytest.raises(ValueError, match="no such backend; choose from: cuda, maca, reference, auto"):
            read_wish("recipe key ops.gla", text, BACKENDS)


def test_a_foreign_backend_is_emulated_only_when_asked_and_says_so():
    forced = with_env(H100, OPS_BACKEND="maca")
    with pytest.raises(ValueError, match="OPS_EMULATE=1 runs its files on NVIDIA H100"):
        pick(forced)
    selection = pick(replace(forced, emulate=True))
    assert selection == ("maca", "OPS_BACKEND, emulated on NVIDIA H100 80GB HBM3", True, False)
    chained = pick(replace(forced, emulate=True), files=frozenset({"cuda", "reference"}))
    assert (chained.backend, chained.emulated) == ("reference", False), "never the host's own kernels"
    one = pick(replace(with_env(H100, OPS_BACKEND_GLA="maca"), emulate=True))
    assert one == ("maca", "OPS_BACKEND_GLA, emulated", True, False)
    with pytest.raises(ValueError, match="cuda is not usable"):
        pick(replace(with_env(C550, OPS_BACKEND="cuda"), emulate=True))
    with pytest.raises(ValueError, match="no sign of MetaX"):
        pick(replace(with_env(CPU, OPS_BACKEND="maca"), emulate=True))


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
    with pytest.raises(ValueError, match="recipe key ops.glaa: no such op; choose from: .*attention, .*gla, "):
        ops.use({"glaa": "reference"})
    with pytest.raises(ValueError, match="recipe key ops.gla=cuda: torch sees no CUDA device"):
        ops.use({"gla": "cuda"})
    assert ops.resolve("gla").reason == "plain torch runs anywhere"  # what was refused is not in force
    with pytest.raises(ValueError, match="no such op: glaa"):
        ops.resolve("glaa")


@pytest.mark.parametrize("variable", ["OPS_BACKEND_GLAA", "OPS_BACKEND_gla"])
def test_a_variable_that_no_op_would_hear_is_an_error(monkeypatch, variable):
    monkeypatch.setattr(registry, "collect", lambda: with_env(CPU, **{variable: "reference"}))
    monkeypatch.setattr(registry, "TABLE", registry.Table())
    with pytest.raises(ValueError, match=f"{variable}: no such op; unset it or choose from: .*OPS_BACKEND_GLA,"):
        ops.resolve("rope")


def test_table_names_every_op_with_a_reason_and_its_hash_follows_the_choice(monkeypatch):
    monkeypatch.setattr(registry, "collect", lambda: CPU)
    monkeypatch.setattr(registry, "TABLE", registry.Table())
    rows = explain.rows()
    assert len(rows) == len(discover.scan()) * len(BACKENDS)
    assert all(reason for *_, reason in rows)
    assert ("gla", "cuda", "", "torch sees no CUDA device") in rows
    assert ops.table()["gla"] == {"backend": "reference", "reason": "plain torch runs anywhere"}
    assert ops.table()["platform"]["backend"] == "reference"
    before = ops.table_hash()
    choice = ops.resolve("rope")
    registry.TABLE.choices["rope"] = replace(choice, backend="cuda")
    assert ops.table_hash() != before


def test_kernels_are_not_launched_on_another_device_than_their_tensors(monkeypatch):
    tensor, table = SimpleNamespace(device=torch.device("cuda", 1)), registry.Table()
    monkeypatch.setattr(registry, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for backend in ("reference", "cuda"):
        table.functions["rope"] = {"rope": "function"}
        table.choices["rope"] = registry.Choice("rope", backend, "", {})
        if backend == "reference":
            assert registry.implementation("rope", "rope", tensor) == "function"
        else:
            with pytest.raises(
                ValueError, match=r"op rope on cuda: tensors on cuda:1, but .* is cuda:0; call torch.cuda.set"
            ):
                registry.implementation("rope", "rope", tensor)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert registry.implementation("rope", "rope", tensor) == "function"


def test_missing_optional_package_is_a_reason_and_any_other_failure_is_raised(monkeypatch):
    def absent(name):
        def load(module):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return load

    monkeypatch.setattr(registry, "import_module", absent("triton.language"))
    assert registry.why_not("gla", BACKENDS["cuda"]) == "triton is not installed"
    monkeypatch.setattr(registry, "import_module", absent("numpyy"))
    with pytest.raises(ModuleNotFoundError):
        registry.why_not("gla", BACKENDS["cuda"])

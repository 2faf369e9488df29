"""Tune files: every one in the tree is legal, illegal ones are refused by file and key, devices get their section."""

from dataclasses import replace

import pytest
import yaml

from ops import discover, registry, tuning
from ops.device import EnvFacts
from ops.discover import Catalog, File

BACKENDS = discover.descriptors()
H200 = EnvFacts(
    torch_version="2.11.0+cu130",
    cuda_available=True,
    device_name="NVIDIA H200",
    capability=(9, 0),
    triton_backend="cuda",
)
C550 = EnvFacts(
    torch_version="2.10.0+metax3.8.1.0",
    version_maca="3.8.1.0",
    cuda_available=True,
    device_name="MetaX C550",
    capability=(8, 0),
    shared_memory_bytes=65536,
    triton_backend="maca",
    maca_path="/opt/maca",
)
CUDA = """# How it was found.
dot: {forward: [M, N]}

# Fits everywhere.
default:
  forward: {M: 64, N: 32, num_warps: 4, num_stages: 2, shared_bytes: 24576}  # small
  sums: {BLOCK: 1024, num_warps: 4}

# Bigger.
H200:
  # inside
  forward: {M: 128, N: 64, num_warps: 8, num_stages: 3, shared_bytes: 196608}
# The end.
"""
MACA = """dot: {forward: [M, N]}
default:
  forward: {M: 32, N: 32, num_warps: 4, num_stages: 1, shared_bytes: 16384, pipeline: basic,
            status: borrowed, source: x}
  sums: {BLOCK: 1024, num_warps: 4, status: borrowed, source: x}
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An op `demo` with tune files, the only op there is. Returns {"cuda": path, "maca": path}."""
    folder = tmp_path / "demo"
    (folder / "tune").mkdir(parents=True)
    paths = {name: folder / "tune" / f"{name}.yaml" for name in ("cuda", "maca")}
    paths["cuda"].write_text(CUDA)
    paths["maca"].write_text(MACA)
    names = ("cuda", "maca", "reference")
    found = {"demo": {name: File(f"demo.{name}", folder / f"{name}.py") for name in names}}
    catalog = Catalog({"demo": "demo"}, found, discover.catalog().backends)
    monkeypatch.setattr(tuning, "catalog", lambda: catalog)
    monkeypatch.setattr(tuning, "LOADED", tuning.Loaded())
    monkeypatch.setattr(tuning, "collect", lambda: H200)
    return paths


def tune_files():
    for op, found in discover.catalog().files.items():
        for backend, file in found.items():
            path = file.path.parent / "tune" / f"{backend}.yaml"
            if path.exists():
                yield pytest.param(path, backend, id=f"{op}-{backend}")


@pytest.mark.parametrize("path, backend", tune_files())
def test_every_tune_file_in_the_tree_is_legal(path, backend):
    tuning.read(path, BACKENDS[backend])


def test_tune_files_are_named_after_backends_that_have_a_file():
    known = {file.path.parent / "tune" / f"{name}.yaml" for files in discover.catalog().files.values()
             for name, file in files.items()}  # fmt: skip
    assert set(discover.ROOT.glob("*/tune/*")) <= known


def test_a_device_gets_its_section_and_the_default_for_the_rest(files):
    chosen = tuning.select("demo", "cuda", H200)
    assert chosen.models == {"forward": "H200", "sums": "default"}
    assert chosen.entries["forward"]["M"] == 128
    elsewhere = tuning.select("demo", "cuda", replace(H200, device_name="NVIDIA GH200 480GB"))
    assert elsewhere.models == {"forward": "default", "sums": "default"}
    assert chosen.describe() == {"models": ["H200", "default"], "hash": chosen.digest}
    assert tuning.select("demo", "maca", C550).describe()["status"] == ["borrowed"]
    assert tuning.select("demo", "reference", H200) is None


def test_the_longest_name_wins(files):
    text = CUDA + "H200 NVL:\n  forward: {M: 64, N: 64, num_warps: 4, shared_bytes: 1}\n"
    files["cuda"].write_text(text)
    assert tuning.select("demo", "cuda", replace(H200, device_name="NVIDIA H200 NVL")).models["forward"] == "H200 NVL"
    assert tuning.select("demo", "cuda", H200).models["forward"] == "H200"


def test_kernels_get_sizes_and_launch_options_without_notes(files):
    assert tuning.tiles("demo", "cuda")["forward"] == {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3}
    assert tuning.tiles("demo", "cuda")["sums"] == {"BLOCK": 1024, "num_warps": 4}
    assert tuning.tiles("demo", "cuda") is tuning.tiles("demo", "cuda")
    entry = tuning.select("demo", "maca", C550).entries["forward"]
    assert tuning.launch(entry, "maca", C550)["pipeline"] == "basic"
    assert tuning.launch(entry, "maca", H200) == {"M": 32, "N": 32, "num_warps": 4, "num_stages": 1}
    with pytest.raises(ValueError, match=r"tune/reference.yaml does not exist; write its default section"):
        tuning.tiles("demo", "reference")
    with pytest.raises(ValueError, match="op demo has no file for tpu; there are: cuda, maca, reference"):
        tuning.tiles("demo", "tpu")


def edited(text, section="default", kernel="forward", **changes):
    """The file's text with an entry's values set, or removed where None."""
    content = yaml.safe_load(text)
    entry = content.setdefault(section, {}).setdefault(kernel, dict(content["default"].get(kernel, {})))
    entry.update(changes)
    content[section][kernel] = {key: value for key, value in entry.items() if value is not None}
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    "backend, changes, message",
    [
        ("maca", {"num_warps": 32}, "default.forward.num_warps: 32 x 64 lanes are 2048 threads, at most 512"),
        ("maca", {"num_warps": 16}, "default.forward.num_warps: 16 x 64 lanes are 1024 threads, at most 512"),
        ("maca", {"shared_bytes": 72 * 1024}, "default.forward.shared_bytes: 73728 is over the device's 65536"),
        ("maca", {"N": 8}, "default.forward.N: 8 cannot be a tl.dot dimension; use a power of two from 16"),
        ("maca", {"N": 24}, "default.forward.N: 24 cannot be a tl.dot dimension"),
        ("maca", {"num_ctas": 2}, "default.forward.num_ctas: 2 is over the device's 1"),
        ("maca", {"private_bytes": 5000}, "private_bytes: 5000 is over the device's 4096"),
        ("maca", {"maxnreg": 128}, "maxnreg: an option of cuda, unknown to maca; remove it"),
        ("maca", {"status": None}, "default.forward.status: missing; say whether the entry was measured"),
        ("maca", {"source": None}, "default.forward.source: missing"),
        ("maca", {"status": "guessed"}, "status: must be borrowed or measured, got 'guessed'"),
        ("maca", {"shared_bytes": None}, "shared_bytes: missing; compile the kernel and write what it reports"),
        ("cuda", {"pipeline": "basic"}, "default.forward.pipeline: an option of maca, unknown to cuda; remove it"),
        ("cuda", {"num_warp": 4}, "default.forward.num_warp: unknown; choose from: M, N, num_warps"),
        ("cuda", {"num_warps": 6}, "default.forward.num_warps: 6 is no power of two"),
        ("cuda", {"num_warps": 64}, "64 x 32 lanes are 2048 threads, at most 1024"),
        ("cuda", {"num_stages": 0}, "num_stages: must be an integer of at least 1, got 0"),
        ("cuda", {"M": 64.0}, "default.forward.M: must be an integer of at least 1, got 64.0"),
        ("cuda", {"num_ctas": 2}, "default.forward.num_ctas: 2 is over the device's 1"),
        ("cuda", {"shared_bytes": 200_000}, "shared_bytes: 200000 is over the device's 101376"),
        ("cuda", {"maxnreg": 256}, "maxnreg: 256 is over the device's 255"),
        ("cuda", {"registers": 255, "num_warps": 16}, "registers: 130560 in a block, at most 65536; use fewer warps"),
        ("cuda", {"status": "measured"}, "source: missing"),
        ("cuda", {"section": "H100", "shared_bytes": 240_000}, "H100.forward.shared_bytes: 240000 is over"),
        ("cuda", {"section": "H100", "M": None}, "H100.forward.M: missing; an entry replaces the default's as a whole"),
        ("cuda", {"section": "H100", "BLOCK": 1}, "H100.forward.BLOCK: unknown; choose from: M, N"),
        ("cuda", {"section": "H100", "kernel": "forwards"}, "H100.forwards: no such kernel in the default section"),
    ],
)
def test_illegal_entries_are_refused_in_one_line_with_file_and_key(files, backend, changes, message):
    path = files[backend]
    path.write_text(edited(path.read_text(), **changes))
    with pytest.raises(ValueError) as error:
        tuning.read(path, BACKENDS[backend])
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("default: [", "flow"),
        ("", "default: missing; name every kernel there"),
        ("H100: {forward: {M: 16}}", "default: missing"),
        ("default: {forward: 3}", "default.forward: must be a mapping, got 3"),
        ("default: {forward: {M: 16}}\n4090: {forward: {M: 16}}", "4090: put quotes around a device model"),
        ("default: {forward: {M: 16}}\nH100: 3", "H100: must map kernels to entries, got 3"),
        ("dot: {forward: [K]}\ndefault: {forward: {M: 16}}", "dot.forward: must list sizes of the default entry"),
        ("dot: {sums: [M]}\ndefault: {forward: {M: 16}}", "dot.sums: no such kernel in the default section"),
        ("default: {forward: {1: 16}}", "default.forward.1: must be a name"),
    ],
)
def test_files_of_another_structure_are_refused(files, text, message):
    files["cuda"].write_text(text)
    with pytest.raises(ValueError) as error:
        tuning.read(files["cuda"], BACKENDS["cuda"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_limits_are_those_of_the_device_that_runs(files):
    path = files["maca"]
    path.write_text(edited(MACA, "C550", num_warps=8, shared_bytes=60_000))
    small = replace(C550, shared_memory_bytes=32768)
    with pytest.raises(ValueError, match=r"C550.forward.shared_bytes: 60000 .*32768 \(limits of MetaX C550\)"):
        tuning.select("demo", "maca", small)
    assert tuning.select("demo", "maca", C550).models["forward"] == "C550"


def test_a_search_tries_candidates_and_puts_the_file_back(files):
    before = tuning.tiles("demo", "cuda")
    candidate = {"M": 64, "N": 128, "num_warps": 4, "num_stages": 4}
    with tuning.trying("demo", "cuda", {"forward": candidate}):
        assert tuning.tiles("demo", "cuda") == {**before, "forward": candidate}
    assert tuning.tiles("demo", "cuda") == before
    problems = {
        "num_warps": tuning.candidate_problem("demo", "cuda", "forward", {**candidate, "num_warps": 3}, H200),
        "no such kernel": tuning.candidate_problem("demo", "cuda", "backward", candidate, H200),
        "missing": tuning.candidate_problem("demo", "cuda", "forward", {"M": 16}, H200),
        "227": tuning.candidate_problem("demo", "cuda", "forward", candidate, H200),
    }
    assert "no power of two" in problems["num_warps"] and problems["227"] is None
    assert "no such kernel" in problems["no such kernel"] and "N: missing" in problems["missing"]
    with (
        pytest.raises(ValueError, match="demo.forward.N: 8 cannot be"),
        tuning.trying("demo", "cuda", {"forward": {**candidate, "N": 8}}),
    ):
        pass


def test_saving_replaces_one_section_and_keeps_the_rest_of_the_text(files):
    path, notes = files["cuda"], {"status": "measured", "source": "a run"}
    entry = {"M": 64, "N": 64, "num_warps": 8, "num_stages": 4, "shared_bytes": 100_000, **notes}
    tuning.tiles("demo", "cuda")
    assert tuning.save_tiles("demo", "cuda", "H200", {"forward": entry}) == path
    text = path.read_text()
    assert text.startswith(CUDA[: CUDA.index("H200")]) and text.endswith("# The end.\n") and "# inside" not in text
    assert tuning.tiles("demo", "cuda")["forward"]["M"] == 64
    sums = {"BLOCK": 512, "num_warps": 2, **notes}
    tuning.save_tiles("demo", "cuda", "H200", {"sums": sums})
    tuning.save_tiles("demo", "cuda", "RTX 4090", {"sums": sums})
    content = yaml.safe_load(path.read_text())
    assert content["H200"] == {"forward": entry, "sums": sums}
    assert content["RTX 4090"] == {"sums": sums}
    assert content["default"] == yaml.safe_load(CUDA)["default"]
    assert all(len(line) < 160 for line in path.read_text().splitlines())
    saved = path.read_text()
    with pytest.raises(ValueError, match=r"cuda.yaml: H200.sums.num_warps: 3 is no power of two"):
        tuning.save_tiles("demo", "cuda", "H200", {"sums": {**sums, "num_warps": 3}})
    assert path.read_text() == saved and sorted(path.parent.iterdir()) == sorted(files.values())


def test_entries_become_measured_on_their_own_device_only(files):
    assert tuning.mark_measured("demo", "maca", C550, "first boot") == files["maca"]
    content = yaml.safe_load(files["maca"].read_text())
    assert content["C550"]["forward"]["status"] == "measured" and content["C550"]["sums"]["source"] == "first boot"
    assert content["default"]["forward"]["status"] == "borrowed"
    assert tuning.select("demo", "maca", C550).describe()["status"] == ["measured"]
    with pytest.raises(ValueError, match="entries of maca cannot be measured here: no sign of MetaX"):
        tuning.mark_measured("demo", "maca", H200, "first boot")
    assert tuning.mark_measured("demo", "reference", C550, "first boot") is None


def test_installed_packages_bring_their_tune_files():
    """setup.cfg's pattern holds for every package, so for every op."""
    import configparser

    setup = configparser.ConfigParser()
    setup.read(discover.ROOT.parent / "setup.cfg")
    assert setup["options.package_data"]["*"] == "tune/*.yaml"


def test_the_table_names_section_and_hash():
    choice = registry.Choice("demo", "maca", "why", {}, tune={"models": ["C550"], "hash": "ab", "status": ["measured"]})
    from ops.explain import _reason

    assert _reason(choice) == "why; tiles of C550, measured (ab)"

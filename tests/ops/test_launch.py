"""ops.launch: which compiled form of a kernel a call gets, and what is made anew for other tiles. No kernel runs."""

import pytest
import torch

launch = pytest.importorskip("ops.launch", reason="Triton is not installed", exc_type=ImportError)


class Compiled:
    """One compiled form: keeps its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """What Triton's decorator makes: compiles anew at every launch of its own."""

    arg_names = ("x", "count", "scale", "SIZE", "BLOCK", "FLAG")

    def __init__(self):
        self.forms, self.launches = [], []

    def __getitem__(self, grid):
        def start(*arguments, **named):
            self.launches.append((grid, arguments, named))
            self.forms.append(Compiled())
            return self.forms[-1]

        return start


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that Triton would compile for device 0."""
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "_RELEASE", launch._DIRECT_SINCE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


TILE = {"BLOCK": 64, "UNUSED": 3, "num_warps": 4, "maxnreg": 128}
FP32 = torch.zeros(32)


def launcher_of(kernel):
    return launch.Launcher(kernel, {"SIZE": 100, "FLAG": True}, TILE)


def test_the_first_launch_compiles_and_later_ones_pass_all_arguments_on(kernel):
    launcher = launcher_of(kernel)
    launcher((5,), FP32, 48, 0.5)
    assert kernel.launches == [
        ((5,), (FP32, 48, 0.5), dict(SIZE=100, BLOCK=64, FLAG=True, num_warps=4, maxnreg=128)),
    ]
    launcher((7, 2), FP32, 32, 0.25)
    assert len(kernel.forms) == 1
    assert kernel.forms[0].launches == [((7, 2, 1), (FP32, 32, 0.25, 100, 64, True))]


@pytest.mark.parametrize(
    "group",
    [
        [0, 16, 48, -32, 2**31 - 16],
        [1],
        [2, 3, 15, 17, -1, 2**31 - 1],
        [2**31, 2**40],
        [2**31 + 1, -(2**31) - 1],
    ],
)
def test_integers_share_a_form_where_triton_compiles_one(kernel, group):
    """By width, divisibility by 16, and being 1."""
    launcher = launcher_of(kernel)
    for other in (16, 1, 3, 2**32, 2**32 + 1):
        launcher((1,), FP32, other, 0.5)
    assert len(kernel.forms) == 5
    for count in group:
        launcher((1,), FP32, count, 0.5)
    assert len(kernel.forms) == 5
    assert sorted(len(form.launches) for form in kernel.forms) == [0, 0, 0, 0, len(group)]


def test_tensors_share_a_form_by_dtype_and_alignment_and_floats_always_do(kernel):
    launcher = launcher_of(kernel)
    for x in (FP32, FP32[4:], FP32[1:], FP32[2:], FP32.bfloat16()):
        launcher((1,), x, 16, 0.5)
    assert len(kernel.forms) == 3
    launcher((1,), FP32, 16, 1.0)
    assert len(kernel.forms) == 3


def test_devices_have_forms_of_their_own(kernel, monkeypatch):
    launcher = launcher_of(kernel)
    launcher((1,), FP32, 16, 0.5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launcher((1,), FP32, 16, 0.5)
    assert len(kernel.forms) == 2


def test_flags_are_no_arguments(kernel):
    with pytest.raises(TypeError, match="flags are constants"):
        launcher_of(kernel)((1,), FP32, True, 0.5)


def test_older_tritons_look_at_every_launch(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_RELEASE", (3, 3))
    launcher = launcher_of(kernel)
    launcher((5,), FP32, 48, 0.5)
    launcher((5,), FP32, 48, 0.5)
    assert len(kernel.launches) == 2


def test_what_was_prepared_is_kept_until_the_tiles_change(monkeypatch):
    present = {"now": {"forward": {"BLOCK": 1}}}
    monkeypatch.setattr(launch, "tiles", lambda op, backend: present["now"])
    prepared = launch.Prepared("demo", "cuda")

    def make(size, entries):
        return [size, entries["forward"]["BLOCK"]]

    first = prepared(make, 3)
    assert first == [3, 1] and prepared(make, 3) is first and prepared(make, 4) == [4, 1]
    before, present["now"] = present["now"], {"forward": {"BLOCK": 2}}
    assert prepared(make, 3) == [3, 2]
    present["now"] = before
    assert prepared(make, 3) == [3, 1]

"""Versions of a case against each other, with a case made up here and versions that misbehave in every way."""

import time

import pytest
import torch

from ops import documents
from sbtrain.bench import ops_contest, ops_measure
from sbtrain.bench.hand_kernels import chunked_gla
from sbtrain.bench.ops_case import Case, Draw, Version
from sbtrain.bench.ops_chart import write_chart
from sbtrain.bench.ops_contest import Contest
from sbtrain.bench.ops_errors import errors, find_truth
from sbtrain.bench.ops_flex import BLOCK_TOKENS, block_mask
from sbtrain.bench.ops_measure import Problem, Settings, Stopped, Stopwatch, deadline
from sbtrain.bench.ops_peers import attention_peers, gla_peers, rope_peers, swiglu_peers
from sbtrain.bench.ops_shapes import cases
from sbtrain.bench.ops_table import line, summary
from sbtrain.bench.shapes import model_config

CPU = torch.device("cpu")
LIMITS = {"copy_gb_per_s": 10.0, "gemm_tflops": 0.1}
CASES = {case.title: case for case in cases(model_config("tiny", num_layers=2, pattern="LS"))}


def settings(**changes) -> Settings:
    given = dict(device=CPU, dtype=torch.float32, steps=3, warmup=1, time_limit_s=30.0, seed=0)
    return Settings(**{**given, **changes})


def peer(name: str, call, **options) -> Version:
    return Version(name, lambda: call, gpu_only=False, **options)


def contest_of(*peers: Version, **changes) -> Contest:
    """swiglu with these peers."""
    case = CASES["swiglu"]
    made_up = Case(case.op, case.name, case.inputs, case.call, peers=peers)
    return Contest(made_up, settings(**changes), Stopwatch(CPU), LIMITS)


def swiglu(x, factor: float = 1.0):
    gate, up = x["gate_up"].chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up * factor,)


def rows_by_version(contest: Contest, *lengths: int, passes=("forward", "both"), error_tokens: int = 64) -> dict:
    rows = list(contest.rows(lengths or (16,), passes, error_tokens=error_tokens))
    return {(row["version"], row["num_tokens"], row["pass"]): row for row in rows}


def test_every_version_is_timed_and_compared():
    rows = rows_by_version(contest_of(peer("same", swiglu)), 16, 48)
    assert len(rows) == 2 * 2 * 2
    for (version, num_tokens, which), row in rows.items():
        assert row["ours"] == (version == "reference") and not row["wrong"] and row["steps"] == 3
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["rate"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6) and row["unit"] == "GB/s"
        assert row["of_ceiling"] == pytest.approx(row["rate"] / LIMITS["copy_gb_per_s"])
        assert row["error"] < 1e-6 and row["error_tokens"] == num_tokens and row["peak_memory_bytes"] is None
        assert ("gradient_error" in row) == (which == "both")
        ours = rows["reference", num_tokens, which]
        assert row["speed_against_ours"] == pytest.approx(ours["ms"]["median"] / row["ms"]["median"])
    both = rows["same", 16, "both"]
    assert both["gradient_error"] < 1e-6 and both["worst_gradient"] == "gate_up" and both["repeats"]


def test_a_version_that_computes_something_else_shows():
    rows = rows_by_version(
        contest_of(peer("off", lambda x: swiglu(x, 1.01)), peer("nan", lambda x: swiglu(x, torch.nan)))
    )
    for name in ("off", "nan"):
        assert rows[name, 16, "forward"]["wrong"] and rows[name, 16, "both"]["wrong"]
    assert rows["off", 16, "forward"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert "nan" in line(rows["nan", 16, "forward"])
    text = summary(list(rows.values()))
    assert "Look at these:\n  swiglu 16 fwd off: error 1.0e-02 is more than rounding" in text


def test_errors_at_a_shorter_length_say_so_and_full_length_is_compared_with_ours():
    def short_index(x):
        """Right for 32 tokens and less."""
        y = swiglu(x)[0]
        return (torch.cat([y[:32], torch.zeros_like(y[32:])]),)

    rows = rows_by_version(contest_of(peer("short", short_index)), 64, error_tokens=32)
    row = rows["short", 64, "both"]
    assert row["error_tokens"] == 32 and row["error"] < 1e-6 and row["difference"] > 0.5
    assert "differs by" in summary(list(rows.values())) and rows["reference", 64, "both"]["difference"] is None


def test_reasons_of_versions_that_cannot_run():
    def missing():
        import a_package_that_nobody_has  # noqa: F401

    def raises(x):
        raise RuntimeError("unsupported head size\nmore lines")

    def out_of_memory(x):
        raise torch.OutOfMemoryError("no")

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("refuses this GPU")

    contest = contest_of(
        Version("missing", missing, gpu_only=False),
        Version("gpu", lambda: swiglu),
        peer("raises", raises),
        peer("large", out_of_memory),
        peer("forward only", lambda x: (NoBackward.apply(swiglu(x)[0]),)),
    )
    rows = rows_by_version(contest, 16, 32)
    problems = {
        name: rows[name, 32, "both"]["problem"] for name in ("missing", "gpu", "raises", "large", "forward only")
    }
    assert problems == {
        "missing": "a_package_that_nobody_has is not installed",
        "gpu": "needs a GPU",
        "raises": "RuntimeError: unsupported head size",
        "large": "out of memory",
        "forward only": "RuntimeError: refuses this GPU",
    }
    assert rows["forward only", 32, "forward"]["ms"]["median"] > 0
    assert not any(row["wrong"] for row in rows.values())
    text = summary(list(rows.values()))
    assert "  missing: a_package_that_nobody_has is not installed (swiglu 16 fwd, swiglu 16 fwd+bwd and 2 more)" in text
    assert "problem" in rows["raises", 16, "forward"] and "not measured, needs a GPU" in line(rows["gpu", 16, "both"])


def test_a_version_that_hangs_is_stopped_and_the_others_go_on():
    class Tuning(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            while True:
                time.sleep(0.01)

    rows = rows_by_version(contest_of(peer("slow", lambda x: (Tuning.apply(swiglu(x)[0]),)), time_limit_s=1.0))
    assert rows["slow", 16, "both"]["problem"] == "stopped after 1 s (time_limit_s)"
    assert rows["slow", 16, "forward"]["ms"]["median"] > 0
    assert rows["reference", 16, "both"]["ms"]["median"] > 0


def test_the_deadline_is_over_afterwards():
    with pytest.raises(Stopped, match="stopped after 0 s"), deadline(0.05):
        time.sleep(5)
    with deadline(0.05):
        pass
    time.sleep(0.1)


def test_what_would_be_too_slow_is_left_out(monkeypatch):
    monkeypatch.setattr(ops_contest, "SLOWEST_S", 0.2)

    def sleeps(x):
        time.sleep(0.1)
        return swiglu(x)

    rows = rows_by_version(contest_of(peer("slow", sleeps)), 8, 64, passes=("forward",))
    assert rows["slow", 8, "forward"]["ms"]["median"] >= 100
    assert rows["slow", 64, "forward"]["problem"] == "too slow: about 1 s a call"


def test_slow_calls_are_timed_fewer_times(monkeypatch):
    monkeypatch.setattr(ops_measure, "TIMED_S", 0.05)

    def sleeps(x):
        time.sleep(0.02)
        return swiglu(x)

    rows = rows_by_version(contest_of(peer("slow", sleeps), steps=9), passes=("forward",))
    assert (rows["slow", 16, "forward"]["steps"], rows["reference", 16, "forward"]["steps"]) == (3, 9)


def test_versions_take_turns():
    calls = []
    noted = [peer(name, lambda x, name=name: calls.append(name) or swiglu(x)) for name in ("a", "b")]
    rows_by_version(contest_of(*noted), passes=("forward",))
    assert "".join(calls).endswith("ababab"), calls  # the race; one more call of ours gives the sizes


def test_a_backward_pass_that_gives_other_bits_is_noticed():
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-6 * torch.rand(()))

    rows = rows_by_version(contest_of(peer("noisy", lambda x: (Noisy.apply(swiglu(x)[0]),))), passes=("both",))
    assert rows["noisy", 16, "both"]["repeats"] is False and rows["reference", 16, "both"]["repeats"] is True


def test_peers_that_write_in_place_do_not_touch_what_others_read():
    def writes(x):
        y = swiglu(x)[0]
        x["gate_up"].data.zero_()
        return (y,)

    case = CASES["swiglu"]
    problem = Problem.draw(case, 8, settings())
    entry = ops_measure.Entry(peer("writes", writes, in_place=True), writes, problem)
    entry.run("forward")
    assert problem.sets[0]["gate_up"].abs().sum() > 0 and entry.sets[0]["gate_up"].abs().sum() == 0


def test_gradients_of_repeated_heads_come_back_to_the_groups():
    """fla's preparation, with the hand-written recurrence in place of its kernel."""
    case, (fla,) = CASES["gla"], gla_peers()

    def call(x):
        assert x["k"].shape == x["log_decay"].shape == x["q"].shape
        return (chunked_gla(x["q"], x["k"], x["v"], x["log_decay"]),)

    found, problem = errors(fla, call, find_truth(case, 20, settings()), settings())
    assert problem is None and found["error"] < 1e-5 and found["gradient_error"] < 1e-5 and found["error_tokens"] == 20


def test_preparations_of_liger():
    """Halves apart, and the tables that turn a vector as ops.rope does."""
    inputs = CASES["swiglu"].inputs(Draw(CPU, torch.float32, 0), 4)
    halves = swiglu_peers()[0].prepare(inputs)
    assert torch.equal(torch.cat([halves["gate"], halves["up"]], -1), inputs["gate_up"])
    inputs = CASES["rope queries and keys"].inputs(Draw(CPU, torch.float32, 0), 4)
    tables = rope_peers()[0].prepare(inputs)
    a, b = inputs["q"].chunk(2, -1)
    turned = inputs["q"] * tables["cos"][:, :, None] + torch.cat([-b, a], -1) * tables["sin"][:, :, None]
    from ops.rope.reference import rope

    assert torch.allclose(turned, rope(inputs["q"], inputs["positions"], inputs["inv_freq"]), atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 77, 299])
@pytest.mark.parametrize("num_sinks", [0, 5])
@pytest.mark.parametrize("edges, window", [([0, 300], 70), ([0, 1, 1, 130, 300], None), ([0, 128, 300], 40)])
def test_flex_mask_is_the_mask(edges, window, num_sinks, ahead):
    """Blocks and the rule inside them, against the matrix of all pairs."""
    first = documents.first_visible(torch.tensor(edges, dtype=torch.int32), window, num_tokens=300, device=CPU)
    mask = block_mask(first, num_sinks, ahead)
    query, key = torch.arange(ahead, 300)[:, None], torch.arange(300 + num_sinks) - num_sinks
    exact = (key < 0) | ((key <= query) & (key >= first[ahead:, None]))
    blocks = mask.to_dense()[0, 0].bool().repeat_interleave(BLOCK_TOKENS, 0).repeat_interleave(BLOCK_TOKENS, 1)
    inside = mask.mask_mod(0, 0, query - ahead, key + num_sinks)
    assert torch.equal(inside & blocks[: 300 - ahead, : 300 + num_sinks], exact)


def test_attention_has_the_peers_that_know_its_mask():
    names = [
        [version.name for version in attention_peers(*given, **masks)]
        for given, masks in (
            ((None,), {}),
            ((9,), {}),
            ((9,), {"documents": True}),
            ((9,), {"sinks": True}),
        )
    ]
    flex, dense, packed = "FlexAttention", "cuDNN SDPA", "flash_attn"
    assert names == [[flex, dense, packed], [flex, packed], [flex, packed], [flex]]


def test_the_chart_shows_bars(tmp_path):
    from matplotlib.image import imread

    rows = list(rows_by_version(contest_of(peer("same", swiglu)), 16, 48).values())
    write_chart(rows, tmp_path / "chart.png")
    pixels = imread(tmp_path / "chart.png")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 1000
    for color in ((0xCB, 0xD2, 0xD9), (0xE8, 0x85, 0x3D)):  # the reference's bars, and the peer's
        share = (abs(pixels[..., :3] * 255 - torch.tensor(color).numpy()).max(-1) < 3).mean()
        assert share > 0.02, share
    write_chart([{**rows[0], "problem": "out of memory"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_backend_of_ours_that_raises_fails_the_run(monkeypatch):
    monkeypatch.setattr(ops_contest, "_own", lambda case, name: lambda x: 1 / 0)
    row = rows_by_version(contest_of(), passes=("forward",))["reference", 16, "forward"]
    assert row["wrong"] and row["problem"] == "ZeroDivisionError: division by zero"


@pytest.mark.gpu
def test_launching_is_not_part_of_the_time():
    """A hundred tiny kernels take the GPU a fraction of what the host needs to launch them."""
    device = torch.device("cuda")
    x = torch.zeros(16, device=device)

    def call():
        for _ in range(100):
            x.add_(1)

    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    host_ms = (time.perf_counter() - began) * 1e3
    torch.cuda.synchronize()
    watch = Stopwatch(device)
    reads = [watch.start(call, cover_ms=2 * host_ms + 0.1) for _ in range(5)]
    torch.cuda.synchronize()
    assert min(read() for read in reads) < 0.7 * host_ms
    watched = watch.start(lambda: torch.cuda._sleep(int(5 * watch.cycles_per_ms)), cover_ms=0.1)
    torch.cuda.synchronize()
    assert watched() == pytest.approx(5, rel=0.3)


@pytest.mark.gpu
def test_peak_memory_is_what_a_call_allocates():
    """swiglu's forward pass at 4096 x 2 x 48 fp32 makes one output."""
    case = CASES["swiglu"]
    made_up = Case(case.op, case.name, case.inputs, case.call, peers=(peer("same", swiglu),))
    on_gpu = settings(device=torch.device("cuda"))
    contest = Contest(made_up, on_gpu, Stopwatch(on_gpu.device), LIMITS, backends=("cuda",))
    rows = rows_by_version(contest, 4096, passes=("forward",), error_tokens=4096)
    assert rows["cuda", 4096, "forward"]["peak_memory_bytes"] == 4096 * 48 * 4
    assert rows["same", 4096, "forward"]["peak_memory_bytes"] >= 2 * 4096 * 48 * 4
    assert rows["cuda", 4096, "forward"]["error"] < 1e-6

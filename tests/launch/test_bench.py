"""`python launch/bench.py`: the whole command at a tiny size, its JSON file, and what it answers to bad input."""

import contextlib
import importlib
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sbtrain.bench.options import parse

LIMITS = {
    "copy_gb_per_s": 10.0,
    "gemm_tflops": 0.1,
    "copy_bytes": 1,
    "gemm_size": 1,
    "gemm_dtype": "bfloat16",
}
ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, num_ranks: int = 0):
    """Run the command as a user does, under torchrun where num_ranks is given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"] if num_ranks else []
    command = [sys.executable, *torchrun, str(ROOT / "launch" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_train_measures_both_peers_and_writes_what_it_saw(tmp_path):
    done = bench(
        "train",
        "model=tiny",
        "layers=2",
        "seq_len=64",
        "micro_batch=2",
        "pattern=LS",
        "precision=fp32",
        "steps=2",
        "warmup=1",
        "profile=true",
        "peak_tflops=1",
        f"out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_train.json").read_text())
    assert [(row["round"], row["peer"]) for row in report["results"]] == [
        (1, "hand"),
        (1, "engine"),
        (2, "hand"),
        (2, "engine"),
    ]
    for row in report["results"]:
        assert len(row["steps_ms"]) == 2 and len(row["losses"]) == len(row["grad_norms"]) == 3
        assert 0 < row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
        assert set(row["parts_ms"]) == {"forward_backward", "optimizer"}
        assert row["tokens_per_s"] == pytest.approx(128 / row["step_ms"]["median"] * 1e3)
        assert row["mfu"] == pytest.approx(row["tflops"])
    for comparison in report["comparisons"]:
        hand, engine = (
            next(r for r in report["results"] if (r["round"], r["peer"]) == (comparison["round"], peer))
            for peer in ("hand", "engine")
        )
        assert comparison["ratio"] == pytest.approx(hand["step_ms"]["median"] / engine["step_ms"]["median"])
        assert comparison["agree"] and comparison["loss_difference"] < 1e-5
    assert len(report["comparisons"]) == 2
    assert report["machine"]["torch"] and report["machine"]["device"] and "commit" in report["machine"]
    assert report["ops"]["gla"]["backend"] == "reference" and "pattern=LS" in report["command"]
    assert (tmp_path / "profile_LS_engine.txt").stat().st_size and (tmp_path / "profile_LS_hand.trace.json").exists()
    assert (
        "of the hand-assembled speed" in done.stdout
        and "engine's ops: " in done.stdout
        and "attention reference" in done.stdout
    )


def test_two_ranks_train_on_layouts_of_sequence_parallelism_and_measure_their_links(tmp_path):
    """Equal tokens a rank: the losses of sp 2 are of one row, whatever carries its states."""
    arguments = ["model=tiny", "layers=2", "seq_len=32", "pattern=LS", "precision=fp32", "steps=2", "warmup=1"]
    arguments += ["peers=engine", "rounds=1", "sp=1,2,2:zeco,2:ulysses", "profile=true", f"out={tmp_path}"]
    done = bench("train", *arguments, num_ranks=2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_train.json").read_text())
    rows = {row["sp"]: row for row in report["results"]}
    assert list(rows) == ["1", "2", "2:zeco", "2:ulysses"] and done.stdout.count("round 1 engine sp") == 4
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(32 / row["step_ms"]["median"] * 1e3)
        for key in ("losses", "grad_norms"):
            expected = rows["2"][key] if row["sp"] != "1" else row[key]
            assert row[key] == pytest.approx(expected, rel=1e-5)
    assert set(rows["2"]["sp_choices"]) == {"S", "L"} and rows["2:zeco"]["sp_choices"] == {}
    assert (tmp_path / "profile_LS_engine_sp2_zeco.txt").stat().st_size

    done = bench("links", "model=tiny", "kib=1,64,4096", "sp=2,8", "shard_tokens=64", f"out={tmp_path}", num_ranks=2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_links.json").read_text())
    assert report["num_ranks"] == 2 and all(row["seconds"] > 0 for row in report["ring"])
    assert report["link"]["bytes_per_s"] > 0 and set(report["exchanges_ms"]) == {"lasp2", "zeco"}
    assert [row["sp"] for row in report["model"]] == [2, 8] and "A MODEL, not measured" in done.stdout
    assert report["model"][1]["zeco_ms"] > report["model"][0]["zeco_ms"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "model=tiny", "sp=2"), "sp=2 does not divide the 1 ranks"),
        (("links", "model=tiny"), "links are between ranks: start it with torchrun"),
        (("links", "model=tiny", "kib=64"), "kib=64 is one size; latency and bandwidth need two"),
        (("links", "model=tiny", "network=8"), "network=8 must be microseconds and GB/s"),
    ],
)
def test_ranks_that_are_not_there(arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_prefill_measures_every_length_of_every_pattern(tmp_path):
    done = bench("prefill", "model=tiny", "layers=2", "seq_len=32,64", "patterns=F,LS", "steps=2", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_prefill.json").read_text())
    assert [(row["pattern"], row["num_tokens"]) for row in report["results"]] == [
        ("F", 32),
        ("F", 64),
        ("LS", 32),
        ("LS", 64),
    ]
    assert all(row["step_ms"]["median"] > 0 and row["tokens_per_s"] > 0 for row in report["results"])
    assert done.stdout.count("LS") >= 2


def test_prefill_on_layouts_has_the_same_tokens_on_every_rank(tmp_path):
    """sp 1 reads a prompt on each of the two ranks, sp 2 one of twice the length on both."""
    arguments = ("prefill", "model=tiny", "layers=2", "pattern=LS", "seq_len=16,32", "steps=2", "cache=true")
    done = bench(*arguments, "sp=1,2,2:ulysses", "peak_tflops=1", f"out={tmp_path}", num_ranks=2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_prefill.json").read_text())
    assert report["command"].startswith("torchrun --nproc_per_node=2 launch/bench.py prefill")
    rows = {(row["sp"], row["tokens_per_rank"]): row for row in report["results"]}
    assert list(rows) == [(sp, length) for sp in ("1", "2", "2:ulysses") for length in (16, 32)]
    for (sp, length), row in rows.items():
        assert row["num_tokens"] == int(sp[0]) * length and len(row["steps_ms"]) == 2
        assert row["tokens_per_s"] == pytest.approx(length / row["step_ms"]["median"] * 1e3)
        assert row["mfu"] == pytest.approx(row["tflops"])
    flops = {key: row["tflops"] / row["tokens_per_s"] for key, row in rows.items()}
    assert flops["2", 16] == pytest.approx(flops["1", 32]), "a token's work goes by its prompt"
    assert set(rows["2", 16]["sp_choices"]) == {"S", "L"} and not rows["2:ulysses", 16]["sp_choices"]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:5] for line in lines if line[:1] == ["LS"] and len(line) == 12] == [
        ["LS", sp, prompts, tokens, length]
        for sp, prompts, sizes in (("1", "2", (16, 32)), ("2", "1", (32, 64)), ("2:ulysses", "1", (32, 64)))
        for length, tokens in zip(("16", "32"), map(str, sizes))
    ]
    assert "LS sp 2, S layers: halo (" in done.stdout and done.stdout.count("bench_prefill.json") == 1


def refused(rank: int, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of one rank."""
    sys.path.insert(0, str(ROOT / "launch"))
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return importlib.import_module("bench").main(arguments), err.getvalue()


def test_prefill_over_ranks_is_refused_once(run_ranks, tmp_path):
    tiny = ["prefill", "model=tiny", "layers=2", f"out={tmp_path / 'none'}"]
    for given, message in (
        (
            ["sp=1,3", "pattern=F", "seq_len=96"],
            "sp=3 is larger than the 2 key/value heads of a tp rank and no multiple; choose",
        ),
        (["sp=1,2"], "sp=2 does not divide the 3 ranks of torchrun --nproc_per_node"),
    ):
        (code, line), *others = run_ranks(3)(refused, [*tiny, *given])
        assert code == 2 and line.startswith(f"error: {message}") and line.count("\n") == 1
        assert others == [(2, "")] * 2 and not (tmp_path / "none").exists()


def test_ops_measures_every_op_and_says_what_it_could_not(tmp_path):
    done = bench(
        "ops",
        "model=tiny",
        "lengths=64,160",
        "error_tokens=64",
        "dtype=fp32",
        "backends=reference,cuda",
        "steps=2",
        "warmup=1",
        f"out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_ops.json").read_text())
    rows = report["rows"]
    assert {row["op"] for row in rows} == set(report["ops"]) - {"platform"}  # every op there is
    assert report["ceilings"]["copy_gb_per_s"] > 0 and report["ceilings"]["gemm_tflops"] > 0
    for row in rows:
        if row["version"] == "reference":
            assert row["ms"]["median"] > 0 and row["error"] < 1e-4 and row["speed_against_ours"] == 1, row
        elif row["version"] == "cuda":
            assert "problem" in row
        elif row["version"] == "fla":
            assert row["problem"] == "needs a GPU"
    plain = [row for row in rows if row["version"] == "torch" and "ms" in row]
    assert {row["op"] for row in plain} == {"rms_norm", "swiglu", "linear_cross_entropy"}
    assert {(row["num_tokens"], row["pass"]) for row in plain} == {
        (n, p) for n in (64, 160) for p in ("forward", "both")
    }
    assert all(row["error"] < 1e-4 and row.get("gradient_error", 0) < 1e-4 for row in plain)
    assert (tmp_path / "bench_ops.png").stat().st_size > 20_000
    for text in ("ceilings measured here: copy", "Not measured:", "FlexAttention: needs a GPU", "at 64 tokens"):
        assert text in done.stdout


def test_an_interrupted_ops_run_shows_what_it_has(tmp_path, monkeypatch, capsys):
    from sbtrain.bench import ops as bench_ops

    monkeypatch.setattr(bench_ops, "ceilings", lambda device, dtype: LIMITS)
    rows = bench_ops.Contest.rows

    def interrupted(self, *args, **kwargs):
        yield from itertools.islice(rows(self, *args, **kwargs), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_ops.Contest, "rows", interrupted)
    options = parse(
        bench_ops.OpsOptions, ["ops=swiglu", "model=tiny", "lengths=16", "steps=1", "peers=false", f"out={tmp_path}"]
    )
    with pytest.raises(KeyboardInterrupt):
        bench_ops.bench_ops(options, "a test")
    assert len(json.loads((tmp_path / "bench_ops.json").read_text())["rows"]) == 2
    assert (tmp_path / "bench_ops.png").exists() and "fwd+bwd  reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing is not a benchmark; write one of: train, prefill, links, ops"),
        (["training"], "training is not a benchmark"),
        (["train", "sequence=8"], "'sequence=8' is not an option; the keys are: model=, layers=, patterns=, seq_len="),
        (["train", "steps"], "'steps' is not an option"),
        (["train", "steps=ten"], "steps=ten is not a number; write for example steps=8192"),
        (["train", "steps=0"], "steps=0 must be at least 1"),
        (["train", "steps=1", "steps=2"], "steps= is given more than once"),
        (["train", "precision=fp8"], "precision=fp8 is not a choice; it is one of: fp32, bf16"),
        (["train", "profile=yes"], "profile=yes is not true or false"),
        (["train", "peers=hand,megatron"], "peers=megatron is not known; choose from: engine, hand"),
        (["train", "model=70b"], "model=70b is not known"),
        (["train", "layers=3"], "model.pattern 'LS' gives 2 layers"),
        (["prefill", "seq_len=8,,9"], "seq_len=8,,9 has an empty entry"),
        (["prefill", "seq_len=8,0"], "must be at least 1"),
        (["prefill", "sp=0"], "sp=0 is not a layout; write for example sp=1,4 or sp=4:ulysses,4:lasp2,4:zeco"),
        (["prefill", "sp=1,2:halo"], "sp=2:halo is not a layout"),
        (["prefill", "sp=4"], "sp=4 does not divide the 1 ranks of torchrun"),
        (["prefill", "sp_algorithm.L=lasp2"], "'sp_algorithm.L=lasp2' is not an option; the keys are: model=, layers="),
        (["ops", "ops=gla,glaa"], "ops=glaa is not known; choose from: gla, gla_carry, gated_delta_rule, attention"),
        (["ops", "backends=rocm"], "backends=rocm is not known; choose from: cuda, maca, reference"),
        (["ops", "passes=backward"], "passes=backward is not known; choose from: forward, both"),
        (["ops", "dtype=fp8"], "dtype=fp8 is not a choice; it is one of: bf16, fp16, fp32"),
        (["ops", "lengths=0"], "lengths=(0,) must be at least 1"),
        (["ops", "peers=fla"], "peers=fla is not true or false"),
        (["ops", "time_limit_s=0"], "time_limit_s=0.0 must be more than 0"),
        (["ops", "tune_limit_s=-1"], "tune_limit_s=-1.0 must be more than 0"),
        (["ops", "tune=true"], "tune=true needs a GPU"),
        (["ops", "model=9b"], "model=9b is not known"),
        (["ops", "length=8"], "'length=8' is not an option; the keys are: ops=, lengths=, backends=, peers=, passes="),
        (["train", "model=tiny", "layers=2", "out=/dev/null/x"], "out=/dev/null/x cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, monkeypatch, capsys):
    """In this process: a start of python a case would take a minute."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    bench_script = __import__("bench")
    assert bench_script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_train_measures_experts_over_ranks(tmp_path):
    done = bench(
        "train",
        "model=tiny",
        "layers=2",
        "seq_len=64",
        "rows=2",
        "pattern=LS:m",
        "precision=fp32",
        "steps=1",
        "warmup=1",
        "rounds=1",
        "peers=engine",
        "ep=2",
        "expert_load=skewed",
        "experts.max_copies=1",
        f"out={tmp_path}",
        num_ranks=2,
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "bench_train.json").read_text())["results"]
    experts = result["model_metrics"]["experts"]
    assert result["ep"] == 2 and experts["load_max"] == 8.0 and experts["copies"] == 1
    assert result["tokens_per_s"] == pytest.approx(128 / result["step_ms"]["median"] * 1e3)


def test_train_refuses_experts_where_there_are_none():
    done = bench("train", "model=tiny", "layers=1", "peers=engine", "experts.align_tokens=8", "pattern=L")
    assert done.returncode == 2 and "experts has no effect" in done.stderr
    done = bench("train", "model=tiny", "layers=1", "pattern=L:m")
    assert done.returncode == 2 and "peers=hand knows no mixtures of experts" in done.stderr


def test_train_runs_every_level_of_recompute(tmp_path):
    """On the same weights and batch: the numbers are the same ones."""
    levels = ["none", "activations", "selective", "full"]
    done = bench(
        "train", "model=tiny", "layers=2", "seq_len=32", "pattern=LS:m", "precision=fp32", "steps=1", "warmup=1",
        "rounds=2", "peers=engine", f"recompute={','.join(levels)}", f"out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench_train.json").read_text())["results"]
    assert [(row["round"], row["recompute"]) for row in results] == [(n, level) for n in (1, 2) for level in levels]
    assert all(row["losses"] == results[0]["losses"] for row in results)
    assert all(row["grad_norms"] == results[0]["grad_norms"] for row in results)
    assert all(f"LS:m 2 engine 1 {level} " in done.stdout for level in levels)

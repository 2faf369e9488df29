"""A killed or stuck rank ends the others within the timeout, with one line that names the rank and the primitive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lost_rank_case import LONG_S, ROOT, Template
from parallel.mesh import start_distributed
from parallel.pace import Pace
from parallel.place import At, Kind, Trail, here, primitive, section
from parallel.watch import EXIT_CODE, FAILED_CODE, RankWatch, _awaited, _innermost, _line
from run_case import write_inputs
from sbtrain.checkpoint.run_dir import Exit

TIMEOUT_S = 5
SHORT_TIMEOUT_S = 4
LATE_S = 12
"""What ends may come later than the timeout on a busy machine."""
SP = ("~stages.ctx_64", "~stages.ctx_128", "model.pattern=LSL", "evaluation.tokens=0", "checkpoint.every_steps=1")
ALGORITHMS = ("stages.ctx_32.layout.sp_algorithm.L=lasp2", "stages.ctx_32.layout.sp_algorithm.S=halo")
SHORT = ("stages.ctx_32.seq_len=48", "stages.ctx_32.micro_batch=1", "stages.ctx_32.global_batch_tokens=96")
KERNEL_SIZES = ("precision=bf16", "model.hidden_size=256", "model.head_dim=64", "model.ffn_size=384")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("lost")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def template():
    with Template() as template:
        yield template


def arguments(inputs: Path, name: str, num_ranks: int, timeout_s: float = TIMEOUT_S) -> list[str]:
    """Of launch/train.py: two steps on so many sp ranks."""
    sizes = (f"stages.ctx_32.layout.sp={num_ranks}", "stages.ctx_32.tokens=192", f"runtime.timeout_s={timeout_s}")
    return [f"recipe={inputs / 'tiny.yaml'}", f"run_dir={inputs / name}", *SP, *ALGORITHMS, *SHORT, *sizes]


def lines(ends: dict) -> list[str]:
    """The error lines of all ranks."""
    return [line for text in ends["texts"] for line in text.splitlines() if line.startswith("error: ")]


def check_verdict(ends: dict, bad: int, says: str, run_dir: Path, timeout_s: float = TIMEOUT_S) -> None:
    """The ranks but the bad one ended in time with EXIT_CODE, and one line names it; so does exit.json."""
    others = [rank for rank in range(len(ends["codes"])) if rank != bad]
    assert [ends["orphans"][rank] for rank in others] == [[]] * len(others), ends["orphans"]
    assert [ends["codes"][rank] for rank in others] == [EXIT_CODE] * len(others), ends
    assert max(ends["seconds"][rank] for rank in others) < timeout_s + LATE_S, ends
    (line,) = lines(ends)
    assert line.startswith(f"error: rank {bad} (host ") and "start the same command again" in line
    assert all(part in line for part in says.split(" | ")), line
    print(line)
    assert json.loads((run_dir / "exit.json").read_text()) == {"code": 76, "reason": line.removeprefix("error: ")}
    assert not any("Traceback" in ends["texts"][rank] for rank in others)


CASES = [
    ("kill", 2, 3, "no sign of life | last seen in ' | lost a connection in 'lasp2 all-gather' (no. "),
    ("stop", 1, 3, "no sign of life | last seen in ' | waits in 'lasp2 all-gather' (no. "),
    ("sleep", 1, 2, "still in 'forward' (no. | lost_rank_case.py: | rank 0 waits in 'lasp2 all-gather' (no. "),
    ("kill", 0, 2, "is gone, last seen in ' | in 'lasp2 all-gather' (no. "),
    pytest.param("stop", 0, 2, "has not answered | in 'lasp2 all-gather' (no. ", marks=pytest.mark.slow),
    pytest.param("spin", 0, 2, "still in 'forward' (no. | rank 1 waits in 'lasp2", marks=pytest.mark.slow),
    pytest.param("kill", 1, 2, "no sign of life | in 'lasp2 all-gather' (no. ", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fault", "bad", "num_ranks", "says"), CASES)
def test_a_lost_rank_ends_the_others(inputs, template, fault, bad, num_ranks, says):
    """Without torchrun: the ranks have only one another, and rank 0 holds the store."""
    name = f"{fault}_{bad}_of_{num_ranks}"
    ends = template.run(num_ranks, fault, bad, inputs / f"{name}.out", arguments(inputs, name, num_ranks))
    check_verdict(ends, bad, says, inputs / name)
    check_stacks(inputs / name, num_ranks, bad, fault)


def check_stacks(run_dir: Path, num_ranks: int, bad: int, fault: str) -> None:
    """Every rank that a verdict ended says what its threads were in, also the one that was held up in Python."""
    (folder,) = (run_dir / "stacks").iterdir()
    alive = [rank for rank in range(num_ranks) if rank != bad or fault not in ("kill", "stop")]
    assert sorted(path.name for path in folder.iterdir()) == [f"rank_{rank}.txt" for rank in alive]
    for rank in alive:
        text = (folder / f"rank_{rank}.txt").read_text()
        assert f"rank {bad} (host " in text.splitlines()[0]
        assert text.lower().count("thread 0x") >= 3  # main, watch and the writer; with the store its thread is gone
        within = "lost_rank_case.py" if rank == bad else "parallel/sequence/lasp2.py"
        assert within in text or fault == "kill", text


@pytest.mark.parametrize(
    ("mixer", "algorithm", "says"),
    [
        ("L", "zeco", "zeco all-scan"),
        pytest.param("S", "halo", "halo all-to-all", marks=pytest.mark.slow),
        pytest.param("F", "ulysses", "ulysses all-to-all", marks=pytest.mark.slow),
    ],
)
def test_the_primitive_is_named_whatever_the_algorithm(inputs, template, mixer, algorithm, says):
    changes = {"model.pattern=LSL": f"model.pattern={mixer}", ALGORITHMS[0]: ALGORITHMS[0].replace("lasp2", "zeco")}
    given = [changes.get(text, text) for text in arguments(inputs, algorithm, 2)]
    ends = template.run(2, "stop", 1, inputs / f"{algorithm}.out", given, before=algorithm)
    check_verdict(ends, 1, f"no sign of life | rank 0 waits in '{says}' (no. ", inputs / algorithm)


def test_a_rank_that_fails_by_itself_is_named_and_not_started_again(inputs, template):
    """Its own traceback says why; the others do not ask to be requeued, which would meet the same error."""
    ends = template.run(2, "fail", 0, inputs / "fail.out", arguments(inputs, "fail", 2))
    assert ends["codes"] == [FAILED_CODE] * 2 and "TypeError: an error of its own" in ends["texts"][0]
    (line,) = lines(ends)
    assert "rank 0 (host" in line and "ended with TypeError in 'forward'" in line and "in 'lasp2 all-gather'" in line
    assert json.loads((inputs / "fail" / "exit.json").read_text())["code"] == FAILED_CODE


def test_a_whole_run_says_nothing_and_leaves_no_thread_and_no_group(inputs, template):
    """Rank 0 exports alone, when all have left the process group."""
    args = [*arguments(inputs, "whole", 2), f"export_dir={inputs / 'exported'}"]
    ends = template.run(2, "", 0, inputs / "whole.out", args)
    assert ends["codes"] == [0, 0] and lines(ends) == []
    assert all("threads: ['MainThread'], in a process group: False" in text for text in ends["texts"]), ends["texts"]
    assert (inputs / "exported" / "config.json").is_file() and "report: " in ends["texts"][0]


@pytest.mark.parametrize("late", ["report", "sinks"])
def test_what_rank_0_does_alone_may_take_longer_than_the_timeout(inputs, template, late):
    """Its report, after the others have left, and the end of its logs, which they wait for."""
    ends = template.run(2, late, 0, inputs / f"{late}.out", arguments(inputs, late, 2))
    assert ends["codes"] == [0, 0] and lines(ends) == []
    assert "report: " in ends["texts"][0]


@pytest.mark.parametrize("fault", ["save", "late"])
def test_a_rank_may_take_three_timeouts_for_a_checkpoint_and_not_elsewhere(inputs, template, fault):
    """The same rank, the same time: writing its part of a checkpoint it is waited for, computing it is not."""
    assert LONG_S > 3 * SHORT_TIMEOUT_S
    given = arguments(inputs, fault, 2, SHORT_TIMEOUT_S)
    ends = template.run(2, fault, 1, inputs / f"{fault}.out", given)
    if fault == "late":
        assert ends["codes"][1] == EXIT_CODE and ends["seconds"][1] < LONG_S
        check_verdict(ends, 1, "still in 'forward' (no. | rank 0 waits in 'lasp2 all-gather'", inputs / fault)
        return
    assert ends["codes"] == [0, 0] and lines(ends) == [] and min(ends["seconds"]) > LONG_S
    ledger = json.loads((inputs / fault / "ledger.json").read_text())
    assert ledger["checkpoint"] == "checkpoints/step_2" and ledger["stages_done"] == ["ctx_32"]


@pytest.mark.slow
def test_under_torchrun(inputs):
    """torchrun holds the store, and would end the others of its own: rank 0 can be named like any other."""
    script = inputs / "rank.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT / 'launch')!r}, {str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "import lost_rank_case\n"
        f"case = dict(num_ranks=2, fault='stop', bad=0, before='lasp2', folder={str(inputs)!r}, args=sys.argv[1:])\n"
        "rank, port = int(os.environ['RANK']), int(os.environ['MASTER_PORT'])\n"
        "if __name__ == '__main__':\n    sys.exit(lost_rank_case.rank_of_case(rank, case, port))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments_of_run = arguments(inputs, "torchrun", 2)
    done = subprocess.run([*command, *arguments_of_run], env=environment, capture_output=True, text=True, timeout=150)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: rank")]
    assert "rank 0 (host" in line and "no sign of life" in line and "waits in 'lasp2 all-gather'" in line
    assert json.loads((inputs / "torchrun" / "exit.json").read_text())["code"] == EXIT_CODE


@pytest.mark.multigpu
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("kill", "no sign of life | rank 0 "),  # NCCL may notice too, and then it is not known where
        ("stop", "no sign of life | rank 0 waits in | 'lasp2 all-gather' (no. "),
        ("sleep", "still in ' | rank 0 waits in | 'lasp2 all-gather' (no. "),
        ("fail", "ended with TypeError"),
    ],
)
def test_a_lost_rank_ends_the_others_on_gpus(inputs, fault, says):
    """NCCL: calls return before the collective ends, so it is the GPU that has not finished it."""
    timeout_s, name = 30, f"{fault}_gpu"  # kernels compile
    with Template(on_gpus=True) as template:
        given = [*arguments(inputs, name, 2, timeout_s), *KERNEL_SIZES]
        ends = template.run(2, fault, 1, inputs / f"{name}.out", given, limit_s=300)
    if fault != "fail":
        check_verdict(ends, 1, says, inputs / name, timeout_s)
    else:
        assert ends["codes"] == [FAILED_CODE] * 2 and [says in line for line in lines(ends)] == [True], ends


def watch_twice(rank: int, recorded: list) -> list[str]:
    """Two watches, one after the other, in each of which rank 1 is late by less than the timeout."""
    for _ in range(2):
        with RankWatch(timeout_s=3, record=lambda *end: recorded.append(end)), primitive("meeting"):
            time.sleep(1.5 * rank)
            dist.barrier()
    return [thread.name for thread in threading.enumerate() if thread.name in ("post", "rank watch")] + recorded


def take_time(rank: int) -> str:
    """Rank 1 is in a patient section for longer than the timeout."""
    with RankWatch(timeout_s=1, record=lambda *end: None):
        with section("checkpoint save", patient=True):
            if rank:
                time.sleep(3.5)
        with primitive("end"):
            dist.barrier()
    return here.at.name


def sign_behind_patience(rank: int) -> tuple[bool, bool]:
    """Whether this rank says that it is at patient work, in the middle of it and right behind it."""
    said = []
    with RankWatch(timeout_s=40, record=lambda *end: None) as watch:
        read = lambda: json.loads(watch._post._store.get(str(rank)))["patient"]  # noqa: E731
        with section("checkpoint save", patient=True):
            time.sleep(2 * watch.interval_s + 0.5)
            said.append(read())
        time.sleep(0.5)
        said.append(read())
        dist.barrier()
    return tuple(said)


def refuse(rank: int) -> None:
    """All ranks raise a user's mistake: nothing is waited for."""
    with RankWatch(timeout_s=60, record=lambda *end: None):
        raise ValueError("seed=-1 is negative")


def test_watches_one_after_the_other(run_ranks):
    assert run_ranks(2)(watch_twice, []) == [[], []]


def test_who_takes_time_for_a_checkpoint_is_not_missing(run_ranks):
    assert run_ranks(2)(take_time) == ["between steps"] * 2


def test_nobody_is_waited_for_because_of_patient_work_that_is_done(run_ranks):
    """A rank that dies before its next regular sign must not be taken for one that writes a checkpoint."""
    assert run_ranks(2)(sign_behind_patience) == [(True, False)] * 2


def test_errors_of_all_ranks_pass_at_once(run_ranks):
    started = time.monotonic()
    with pytest.raises(ValueError, match="seed=-1"):
        run_ranks(2)(refuse)
    assert time.monotonic() - started < 10


def test_one_process_has_nobody_to_watch():
    start_distributed()
    before = threading.active_count()
    with RankWatch(timeout_s=1, record=lambda *end: None):
        assert threading.active_count() == before


def test_a_wait_that_a_pace_measures_is_a_wait():
    """Of a collective that nobody marked, such as megatron's of gradients: else its hang would be this rank's work."""
    seen = []

    class Work:
        def wait(self):
            frame = sys._current_frames()[threading.get_ident()].f_back  # a wait of torch's has no frame of its own
            seen.append((_awaited(frame), _awaited(_innermost(frame)), _line(_innermost(frame))))

    pace = Pace(torch.device("cpu"))
    work = SimpleNamespace(wait=pace._measured(Work().wait))
    work.wait()
    ((unseen, awaited, line),) = seen
    assert unseen == "" and awaited == "wait in test_a_wait_that_a_pace_measures_is_a_wait"
    assert line.startswith("test_rank_watch.py:")


def test_places_nest_and_count():
    first = here.at.number
    with section("forward"):
        with primitive("all-gather"):
            assert here.at == At("all-gather", Kind.wait, first + 2)
        assert here.at == At("forward", Kind.work, first + 2)
        with section("save", patient=True):
            assert here.at == At("save", Kind.patient, first + 3)
    with pytest.raises(RuntimeError), section("backward"), primitive("all-to-all"):
        raise RuntimeError("connection closed")
    assert here.broken.name == "all-to-all" and here.at.number == first + 5


def test_clearing_away_does_not_hide_where_it_broke():
    with pytest.raises(RuntimeError):
        try:
            with section("backward"):
                raise RuntimeError("connection closed")
        finally:
            with section("closing of the sinks", patient=True):
                pass
    assert here.broken.name == "backward"
    with section("the next part"):
        assert here.broken is None


class Event:
    """A GPU's event that ends when the test says so."""

    def __init__(self):
        self.ended = True

    def record(self):
        self.ended = False

    def query(self):
        return self.ended


def test_the_trail_knows_the_first_collective_that_is_not_finished():
    events = [Event() for _ in range(3)]
    trail = Trail(events)
    assert trail.unfinished() is None
    places = [At(f"gather {index}", Kind.wait, index) for index in range(4)]
    for index, place in enumerate(places[:2]):
        trail.leave(place)
        assert trail.unfinished() == places[0], index
    events[0].ended = True
    assert trail.unfinished() == places[1]
    trail.leave(places[2])
    trail.leave(places[3])  # takes the place of the first
    assert trail.unfinished() == places[1]
    for event in events:
        event.ended = True
    assert trail.unfinished() is None


def test_a_rank_whose_gpu_has_work_left_waits(monkeypatch):
    """Its main thread may be anywhere behind the collective, also where nothing is waited for on the host."""
    watch, trail = RankWatch(timeout_s=0.2, record=lambda *end: None), Trail([Event()])
    watch._main, watch._post = 0, SimpleNamespace()
    monkeypatch.setattr(here, "trail", trail)
    monkeypatch.setattr("parallel.watch._device_is_busy", lambda: True)
    with section("forward"):
        with primitive("gather"):
            number = here.at.number
        watch._look()
        time.sleep(0.1)
        watch._look()
    assert watch._sight.waiting and watch._sight.name == "forward" and watch._sight.stayed_s > 0.05
    assert watch._sight.device == f"'gather' (no. {number})" and watch._post.suspects


def test_the_exit_code_is_the_documented_one():
    assert Exit.RANK_LOST == EXIT_CODE == 76

"""A pool of torch.distributed processes that stays alive between tests: the machinery behind the `run_ranks` fixture.

Starting a process that imports torch costs seconds; a test case costs milliseconds. So the processes of a world size
are started once, wait at a pipe, and run one case after another. They see the environment torchrun would give them.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import random
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

GRACE_S = 3.0  # what the other ranks get to finish once one of them failed: they may hang in a collective


class RankError(RuntimeError):
    """Carries the tracebacks of failed ranks, as the cause of the exception that the test sees."""


class RankPool:
    """`world_size` processes joined in one process group; run() hands them a function and returns their results."""

    def __init__(self, world_size: int, backend: str):
        self.world_size, self.backend = world_size, backend
        self._processes, self._pipes, self._store, self._case, self._fresh = [], [], None, 0, False

    def run(self, function, args: tuple, kwargs: dict, timeout_s: float) -> list:
        """Call function(rank, *args, **kwargs) on every rank; results in rank order.

        Raises what the first failing rank raised (its traceback is in __cause__), or TimeoutError after timeout_s.
        A rank that dies or hangs takes the pool with it; the next case starts another.
        """
        if not self._processes:
            self._start()
        self._case += 1
        source = sys.modules[function.__module__].__file__
        header = (sys.path, function.__module__, source, self._case, self._fresh, timeout_s)
        payload = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send(header)
            pipe.send_bytes(payload)
        answers, late = self._collect(timeout_s)
        failures = sorted((a for a in answers.values() if a["failed"]), key=lambda answer: answer["time"])
        self._fresh = bool(failures)
        if late or not all(process.poll() is None for process in self._processes):
            self.stop()
        if failures:
            cause = "".join(f"\n--- rank {a['rank']} of {self.world_size} ---\n{a['traceback']}" for a in failures)
            raise failures[0]["value"] from RankError(cause)
        if late:
            where = f"{function.__module__}.{function.__qualname__}"
            raise TimeoutError(f"{where}: ranks {late} of {self.world_size} still ran after {timeout_s:g} s")
        return [answers[rank]["value"] for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the processes. The pool may be used again and then starts new ones.

        A rank that listens ends by itself when its pipe closes, and so ends the processes that it started; killed, it
        would leave them behind.
        """
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        import torch.distributed as dist

        # The parent keeps the rendezvous store, so no port can be lost between choosing and using it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            ours, theirs = connection.Pipe()
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import rank_pool; rank_pool.main()"
            wanted = [str(rank), str(self.world_size), self.backend, str(self._store.port), str(theirs.fileno())]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, *wanted],
                    pass_fds=[theirs.fileno()],
                    env=self._environment(),
                )
            )
            theirs.close()
            self._pipes.append(ours)
        self._fresh = False

    def _environment(self) -> dict[str, str]:
        """One thread a rank; gloo's ranks are CPU ranks on a machine with GPUs, too, and interpret Triton kernels."""
        hidden = {} if self.backend == "nccl" else {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        return {**os.environ, "OMP_NUM_THREADS": "1", **hidden}

    def _collect(self, timeout_s: float) -> tuple[dict[int, dict], list[int]]:
        """Answers by rank, and the ranks that gave none in time."""
        answers, deadline = {}, time.monotonic() + timeout_s
        waiting = dict(zip(self._pipes, range(self.world_size)))
        while waiting and time.monotonic() < deadline:
            for pipe in connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(pipe)
                answers[rank] = self._receive(pipe, rank)
                if answers[rank]["failed"]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers, sorted(waiting.values())

    def _receive(self, pipe, rank: int) -> dict:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            code = self._processes[rank].wait(GRACE_S)
            error = RankError(f"rank {rank} of {self.world_size} died with exit code {code}")
            return {"rank": rank, "failed": True, "value": error, "traceback": str(error), "time": time.time()}


def main() -> None:
    """Entry of a rank's process: its place and the pipe to the parent come as arguments."""
    rank, world_size, backend, port, handle = sys.argv[1:]
    serve(int(rank), int(world_size), backend, int(port), connection.Connection(int(handle)))


def serve(rank: int, world_size: int, backend: str, port: int, pipe) -> None:
    """Body of one rank: wait for a case, run it, answer; ends when the parent closes the pipe."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    while True:
        try:
            path, module, source, case, fresh, timeout_s = pipe.recv()
            payload = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        faulthandler.dump_traceback_later(0.9 * timeout_s)
        answer = {"rank": rank, "failed": False, "traceback": ""}
        try:
            sys.path[:] = path
            prepare(backend, case, fresh)
            load_module(module, source)
            function, args, kwargs = pickle.loads(payload)
            answer["value"] = function(rank, *args, **kwargs)
        except BaseException as error:
            answer.update(failed=True, value=error, traceback=traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        answer["time"] = time.time()
        pipe.send_bytes(encode(answer))


def prepare(backend: str, case: int, fresh: bool) -> None:
    """Seeds, poisoned memory and a process group; `fresh` replaces a group that a failed case may have left dirty."""
    import numpy
    import torch
    import torch.distributed as dist

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if fresh and parallel_state is not None and parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if fresh and dist.is_initialized():
        dist.destroy_process_group()
    if backend == "nccl":
        from autotuning import shorten

        shorten()
        torch.cuda.set_device(int(os.environ["RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    else:
        poison_memory()
    if not dist.is_initialized():
        # The store keeps the keys of earlier groups, which would send a rank to a peer that is gone: a prefix each.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.PrefixStore(f"case {case}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=10))


def poison_memory(on: bool = True) -> None:
    """Make torch.empty return NaN (integers: the largest value), so that reading unwritten memory fails a test."""
    import torch

    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on


def load_module(name: str, source: str) -> None:
    """Import the test module of a case from its file; pickle then finds its functions and classes by name."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or Path(spec.origin) != Path(source):
        spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def encode(answer: dict) -> bytes:
    """Pickle an answer; what cannot be pickled becomes a RankError that says so."""
    try:
        encoded = pickle.dumps(answer)
        pickle.loads(encoded)
        return encoded
    except Exception as error:
        text = answer["traceback"] or f"{type(answer['value'])} returned by a rank cannot be pickled: {error}"
        return pickle.dumps({**answer, "failed": True, "value": RankError(text), "traceback": text})

"""A Slurm cluster on this machine for tests: slurmctld, two nodes n1 and n2 as two slurmd, munge; all in one folder.

Needs slurm-wlm and munge as Debian packs them, no systemd, no configuration outside of the folder. The nodes have two
GPUs each that are plain files. Partition `main` may be preempted by `high`, with some seconds to save.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES, CPUS, GPUS = ("n1", "n2"), 4, 2
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=1,batch_sched_delay=0,sched_min_interval=200000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait={kill_wait_s}
CompleteWait=0
UnkillableStepTimeout=10
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=4000 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverTimeLimit=0 PriorityTier=1 GraceTime={grace_s} State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def wait_for(condition: Callable[[], object], *, limit_s: float, what: str):
    """The first true value of condition, asked five times a second. Raises TimeoutError."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"{what}: not within {limit_s:g} s")


class Cluster:
    """Context: up on entry, every process of it gone afterwards. `slurm` runs one of Slurm's commands."""

    def __init__(self, root: Path, *, kill_wait_s: int = 5, grace_s: int = 60):
        self.root, self.config = root, root / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self._settings = {"kill_wait_s": kill_wait_s, "grace_s": grace_s}

    def __enter__(self) -> Cluster:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        ports = _free_ports(1 + len(NODES))
        text = CONFIG.format(
            root=self.root, user=_user(), controller=ports[0], first=ports[1], last=ports[-1], cpus=CPUS, gpus=GPUS,
            **self._settings,
        )  # fmt: skip
        self.config.write_text(text)
        devices = [self.root / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            device.touch()
        (self.root / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.root}/munge.{name}" for option, name in files.items()]
        try:
            self._start("munged", "--force", *options)
            self._start("slurmctld", "-c", "-f", str(self.config))
            for node in NODES:
                self.start_node(node)
            wait_for(self._is_idle, limit_s=60, what="a cluster of idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        for job in self._ask("squeue", "--noheader", "--format=%A").split():
            self._ask("scancel", job)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self._ask("squeue", "--noheader"), limit_s=15, what="the end of all jobs")
        for path in sorted(self.root.glob("*.pid"), reverse=True):
            _end(int(path.read_text() or 0), signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.processes("slurmd|slurmctld|munged"), limit_s=10, what="the end of the daemons")
        for process in self.processes(""):
            _end(process, signal.SIGKILL)

    def _start(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True, timeout=30)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start("slurmd", "-N", node, "-f", str(self.config))

    def _is_idle(self) -> bool:
        return self._ask("sinfo", "--noheader", "-N", "-p", "main", "-t", "idle", "-o", "%N").split() == list(NODES)

    def _ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def slurm(self, *command: str) -> str:
        """What a command of Slurm prints. Raises CalledProcessError."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.slurm("scontrol", "show", "job", job, "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def restarted(self, job: str, *, restarts: int, limit_s: float = 60) -> None:
        """Wait until the job was requeued so often and runs; skips the two minutes that Slurm holds it back."""

        def runs() -> bool:
            found = self.job(job)
            if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
                self._ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            return found["JobState"] == "RUNNING" and int(found["Restarts"]) >= restarts

        wait_for(runs, limit_s=limit_s, what=f"restart {restarts} of job {job}")

    def ended(self, *jobs: str, limit_s: float = 120) -> list[str]:
        """The states in which the jobs ended; a requeued job is not held back."""

        def states() -> list[str] | None:
            found = [self.job(job) for job in jobs]
            for job, fields in zip(jobs, found):
                if fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime":
                    self._ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            alive = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")
            return None if any(fields["JobState"] in alive for fields in found) else [f["JobState"] for f in found]

        return wait_for(states, limit_s=limit_s, what=f"the end of jobs {jobs}")

    def processes(self, pattern: str) -> list[int]:
        """Processes of this cluster, its jobs included, whose command line matches."""
        found, mark = [], f"SLURM_CONF={self.config}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if mark in variables and int(folder.name) != os.getpid() and re.search(pattern, command):
                    found.append(int(folder.name))
        return sorted(found)


def _end(process: int, number: int) -> None:
    with contextlib.suppress(OSError):
        if process > 1:
            os.kill(process, number)


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _free_ports(count: int) -> list[int]:
    """Neighboring ports that nobody listens on."""
    for first in range(17000 + os.getpid() % 2000, 20000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return list(range(first, first + count))
    raise OSError("no free ports between 17000 and 20000")

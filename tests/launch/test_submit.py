"""Submitting without Slurm: sbatch, squeue and scancel are stand-ins that write down how they are called."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from run_case import write_inputs

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SBATCH = """#!/bin/bash
echo "sbatch $*" >>{root}/calls
number=$(grep -c '^sbatch ' {root}/calls)
[ "$number" != "{fails_at}" ] || {{ echo "sbatch: error: Invalid account" >&2; exit 1; }}
echo "$((40 + number));cluster"
"""
SQUEUE = "#!/bin/bash\ncat {root}/queue 2>/dev/null || true\n"
SCANCEL = '#!/bin/bash\necho "scancel $*" >>{root}/calls\n'


class Login:
    """A folder of a user on a login node; submit.py is called in it, in this process."""

    def __init__(self, root: Path, monkeypatch, capsys):
        self.root, self.run_dir, self._capsys = root, root / "runs/a b", capsys
        self.recipe = write_inputs(root)
        monkeypatch.syspath_prepend(str(LAUNCH))
        monkeypatch.setenv("PATH", f"{root / 'bin'}", prepend=":")
        monkeypatch.chdir(root)
        (root / "bin").mkdir()
        self.commands()
        self._main = runpy.run_path(str(LAUNCH / "submit.py"))["main"]

    def commands(self, *, fails_at: int = 0) -> None:
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
            path = self.root / "bin" / name
            path.write_text(text.format(root=self.root, fails_at=fails_at))
            path.chmod(0o755)

    def submit(self, *keys: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a chain of three jobs."""
        nodes = ("nodes=1", "cluster.gpus_per_node=2", "stages.ctx_64.num_nodes=2", "stages.ctx_32.micro_batch=1")
        self._capsys.readouterr()
        code = self._main([f"recipe={self.recipe}", "run_dir='runs/a b'", *nodes, *keys])
        return code, *self._capsys.readouterr()

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def login(tmp_path, monkeypatch, capsys):
    return Login(tmp_path, monkeypatch, capsys)


def test_each_job_waits_for_the_one_before(login):
    code, out, err = login.submit("after=7")
    folder = login.run_dir / "slurm/1"
    assert code == 0, err
    assert login.calls == [
        f"sbatch --parsable --dependency=afterok:7 {folder}/ctx_32.sbatch",
        f"sbatch --parsable --dependency=afterok:41 {folder}/ctx_64.sbatch",
        f"sbatch --parsable --dependency=afterok:42 {folder}/ctx_128.sbatch",
    ]
    assert json.loads((folder / "jobs.json").read_text()) == {"ctx_32": "41", "ctx_64": "42", "ctx_128": "43"}
    assert "job 42: ctx_64 on 2 nodes, log in " in out
    assert (folder / "code/sbtrain/run.py").is_file() and (folder / "recipe.yaml").is_file()


def test_a_dry_run_prints_the_very_scripts_and_leaves_nothing(login):
    code, out, _ = login.submit("dry_run=true", "array=0-1")
    assert code == 0 and login.calls == [] and not login.run_dir.exists()
    assert login.submit("array=0-1")[0] == 0
    folder = login.run_dir / "slurm/1"
    for path in folder.glob("*.sbatch"):
        assert path.read_text() in out
    assert f"# sbatch {folder}/ctx_32.sbatch\n" in out
    assert f"# sbatch --dependency=aftercorr:JOB_OF_ctx_32 {folder}/ctx_64.sbatch\n" in out


def test_a_chain_that_cannot_be_submitted_whole_is_canceled(login):
    login.commands(fails_at=3)
    code, _, err = login.submit()
    assert code == 1 and err.endswith("ctx_128.sbatch: sbatch: error: Invalid account; canceled: job 41, 42\n")
    assert login.calls[-1] == "scancel 41 42"


def test_what_is_queued_is_not_submitted_again(login):
    assert login.submit()[0] == 0
    (login.root / "queue").write_text("42\n9_[0-3]\n")
    code, _, err = login.submit()
    assert code == 2 and "is queued already as job 42; scancel it first" in err and err.count("\n") == 1
    (login.root / "queue").write_text("420\n")
    assert login.submit()[0] == 0 and (login.run_dir / "slurm/2/ctx_32.sbatch").is_file()


def test_runs_of_an_array_have_their_own_ledgers(login):
    assert login.submit("array=3,5")[0] == 0
    for seed, done in ((3, ["ctx_32", "ctx_64"]), (5, ["ctx_32"])):
        folder = login.run_dir / f"seed_{seed}"
        folder.mkdir()
        (folder / "ledger.json").write_text(json.dumps({"stages_done": done, "checkpoint": None, "step": 0}))
        frozen = (login.run_dir / "slurm/1/recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(frozen.replace("seed: 3", f"seed: {seed}"))
    code, out, err = login.submit("array=3,5")
    assert code == 0, err
    assert [call.rpartition("/")[2] for call in login.calls[3:]] == ["ctx_64.sbatch", "ctx_128.sbatch"]
    assert login.submit("array=3,5", "stop_after=ctx_32")[2].endswith("all stages are done; nothing is submitted\n")

"""The run of a recipe as a chain of Slurm jobs: launch/slurm/submit.sh calls it with its arguments.

recipe=NAME [nodes=N] [site=cuda|maca] [gres=gpu] [grace_s=300] [idle_starts=3] [array=0-3] [after=JOB]
            [sbatch.OPTION=VALUE ...] [key=value ...]
dry_run=true prints the scripts and submits nothing. Exit codes: 0 submitted, 2 refused in one line, 1 sbatch failed.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import _path  # noqa: F401
from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.run_dir import SLURM, check_owner, run_folder
from sbtrain.config.load import load, save
from sbtrain.config.schema import Recipe
from sbtrain.plan.slurm import Leg, Site, batch_script, chain, describe_chain, split_keys

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "launch" / "slurm"
CODE = ("launch", "ops", "parallel", "sbtrain", "recipes")
"""What training reads of the repository."""


def sites() -> list[str]:
    """Values of site=."""
    return sorted(path.stem.removeprefix("env_") for path in HERE.glob("env_*.sh"))


def queued(run_dir: Path) -> list[str]:
    """Jobs of earlier chains of this run that Slurm still has. Raises ValueError where it cannot be asked."""
    ids = [job for path in run_dir.glob(f"{SLURM}/*/jobs.json") for job in read_json(path).values()]
    if not ids:
        return []
    asked = subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(f"squeue: {asked.stderr.strip() or 'failed'}; try again when Slurm answers")
    there = {line.split("_")[0] for line in asked.stdout.split()}
    return [job for job in ids if job in there]


def commit() -> str:
    """The commit of this checkout, marked where it has changes; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        given = ROOT / "COMMIT"
        return given.read_text().strip() if given.is_file() else ""


def freeze(recipe: Recipe, folder: Path) -> None:
    """A copy of the code and the resolved recipe: what is changed later does not reach jobs that wait."""
    for name in CODE:
        ignored = shutil.ignore_patterns("__pycache__", "*.partial")
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=ignored)
    (folder / "code" / "COMMIT").write_text(commit() + "\n")
    save(recipe, folder / "recipe.yaml")


def next_folder(run_dir: Path) -> Path:
    """RUN_DIR/slurm/N of this submission."""
    numbers = [int(path.name) for path in (run_dir / SLURM).glob("[0-9]*") if path.name.isdigit()]
    return run_dir / SLURM / str(max(numbers, default=0) + 1)


def sbatch(script: Path, *, after: str, array: bool) -> str:
    """Submit a script behind another job; returns its id. Raises RuntimeError with what sbatch says."""
    kind = "aftercorr" if array else "afterok"
    options = [f"--dependency={kind}:{after}"] if after else []
    done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def submit(recipe: Recipe, site: Site, legs: list[Leg], scripts: dict[str, str], folder: Path) -> None:
    """Freeze, write the scripts, submit them one behind another and print their ids."""
    freeze(recipe, folder)
    jobs, after = {}, site.after
    for leg in legs:
        script = folder / f"{leg.name}.sbatch"
        script.write_text(scripts[leg.name])
        jobs[leg.name] = after = sbatch(script, after=after, array=bool(site.array) and bool(jobs))
        write_json(folder / "jobs.json", jobs)
        print(f"job {after}: {leg.name} on {leg.num_nodes} nodes, log in {folder}")


def main(args: list[str]) -> int:
    """Submit or, with dry_run=true, print; the exit code."""
    try:
        site, rest = split_keys(args, sites())
        recipe = load(rest)
        dry, recipe = recipe.dry_run, replace(recipe, dry_run=False)
        run_dir = run_folder(recipe).absolute()
        check_owner(recipe)
        unfinished = Ledger(run_dir).unfinished(list(recipe.stages))
        if recipe.stop_after in unfinished:
            unfinished = unfinished[: unfinished.index(recipe.stop_after) + 1]
        legs = chain(recipe, site, unfinished)
        if not dry and shutil.which("sbatch") is None:
            raise ValueError(
                "sbatch is not on PATH; call submit.sh on a login node of a Slurm cluster, or dry_run=true"
            )
        if not dry and (jobs := queued(run_dir)):
            raise ValueError(f"run_dir={recipe.run_dir} is queued already as job {', '.join(jobs)}; scancel it first")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder, template = next_folder(run_dir), (HERE / "train.sbatch").read_text()
    places = {"frozen": folder, "python": sys.executable, "work": Path.cwd()}
    scripts = {leg.name: batch_script(template, recipe, leg, site, **places) for leg in legs}
    print(describe_chain(recipe, legs) + "\n")
    if dry:
        print("\n".join(f"# {folder / leg.name}.sbatch\n{scripts[leg.name]}" for leg in legs))
        return 0
    try:
        submit(recipe, site, legs, scripts, folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a login node's GPU is not ours
    sys.exit(main(sys.argv[1:]))

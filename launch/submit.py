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
from sbtrain.plan.slurm import Leg, Site, batch_script, chain, describe_chain, seeds, split_keys

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


def unfinished_stages(recipe: Recipe, site: Site) -> list[str]:
    """The stages that the run, or one of the array's, has still to do, up to stop_after.

    Raises ValueError where one of their run directories cannot be this recipe's.
    """
    runs = [replace(recipe, run_dir=f"{recipe.run_dir}/seed_{seed}", seed=seed) for seed in seeds(site)] or [recipe]
    left: set[str] = set()
    for each in runs:
        check_owner(each)
        left.update(Ledger(run_folder(each)).unfinished(list(recipe.stages)))
    stages = list(recipe.stages)
    last = stages.index(recipe.stop_after) if recipe.stop_after else len(stages)
    return [stage for stage in stages[: last + 1] if stage in left]


def dependency(site: Site, number: int, before: str) -> list[str]:
    """The option of sbatch that puts a job, by its place in the chain, behind the one before; none if that is ""."""
    kind = "aftercorr" if site.array and number > 0 else "afterok"
    return [f"--dependency={kind}:{before}"] if before else []


def submit(recipe: Recipe, site: Site, legs: list[Leg], scripts: dict[str, str], folder: Path) -> None:
    """Freeze, write the scripts, submit them one behind another and print their ids.

    Raises RuntimeError with what sbatch says; what was submitted before that is canceled.
    """
    freeze(recipe, folder)
    jobs, before = {}, site.after
    for number, leg in enumerate(legs):
        script = folder / f"{leg.name}.sbatch"
        script.write_text(scripts[leg.name])
        command = ["sbatch", "--parsable", *dependency(site, number, before), str(script)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            canceled = f"; canceled: job {', '.join(jobs.values())}" if jobs else ""
            if jobs:
                subprocess.run(["scancel", *jobs.values()])
            raise RuntimeError(f"{script}: {done.stderr.strip()}{canceled}")
        jobs[leg.name] = before = done.stdout.strip().split(";")[0]
        write_json(folder / "jobs.json", jobs)
        print(f"job {before}: {leg.name} on {leg.num_nodes} nodes, log in {folder}")


def main(args: list[str]) -> int:
    """Submit or, with dry_run=true, print; the exit code."""
    try:
        site, rest = split_keys(args, sites())
        recipe = load(rest)
        dry, recipe = recipe.dry_run, replace(recipe, dry_run=False)
        run_dir = run_folder(recipe).absolute()
        legs = chain(recipe, site, unfinished_stages(recipe, site))
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
        for number, leg in enumerate(legs):
            before = f"JOB_OF_{legs[number - 1].name}" if number else site.after
            print(" ".join(["# sbatch", *dependency(site, number, before), str(folder / f"{leg.name}.sbatch")]))
            print(scripts[leg.name])
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

"""A run as a chain of Slurm jobs: which stages a job carries, on how many nodes, and its batch script.

Neighboring stages on the same number of nodes are one job. Each job waits for the one before (`afterok`) and requeues
itself until its last stage is done, so the chain needs nobody. What runs is frozen: a copy of the code and the resolved
recipe.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from parallel.layout import Layout
from sbtrain.config.rules import check_training
from sbtrain.config.schema import Recipe
from sbtrain.plan.auto_layout import fit_world
from sbtrain.plan.table import table

SBATCH = "sbatch."
"""Keys that begin so are options of sbatch: sbatch.partition=long."""
OURS = {
    "job-name": "name=",
    "nodes": "nodes= or stages.NAME.num_nodes=",
    "ntasks": "cluster.gpus_per_node=",
    "ntasks-per-node": "cluster.gpus_per_node=",
    "gres": "gres=",
    "signal": "grace_s=",
    "array": "array=",
    "dependency": "after=",
    "chdir": "the folder that submit.sh is called in",
    "output": "run_dir=",
    "error": "run_dir=",
    "open-mode": "run_dir=",
    "requeue": "nothing: jobs are requeued",
    "no-requeue": "nothing: jobs are requeued",
    "kill-on-invalid-dep": "nothing: jobs behind a failed one are canceled",
}
"""Options of sbatch that the batch script sets, and the key that decides them."""
EARLY_S = 60
"""Slurm looks at time limits so rarely: its signal may come that much before it is asked to."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.I)


@dataclass(frozen=True)
class Site:
    """How jobs are submitted; the keys of submit.sh beside those of the recipe.

    nodes: nodes of stages without a num_nodes of their own; 0 takes cluster.num_gpus / cluster.gpus_per_node.
    site: which launch/slurm/env_SITE.sh prepares a node.
    gres: generic resource of Slurm that counts GPUs; empty asks for none.
    grace_s: seconds before the time limit at which a job is told to save.
    idle_starts: starts in a row that may end without a new checkpoint before a job gives up.
    array: seeds of repeats as Slurm writes them, 0-3; each trains in RUN_DIR/seed_N. Empty is one run.
    after: id of a job that must have ended well before the chain begins.
    options: further options of sbatch, by name.
    """

    nodes: int = 0
    site: str = "cuda"
    gres: str = "gpu"
    grace_s: int = 300
    idle_starts: int = 3
    array: str = ""
    after: str = ""
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Leg:
    """One job of the chain: consecutive stages on the same nodes."""

    stages: tuple[str, ...]
    num_nodes: int

    @property
    def name(self) -> str:
        """First and last stage."""
        return self.stages[0] if len(self.stages) == 1 else f"{self.stages[0]}-{self.stages[-1]}"


def split_keys(args: list[str], sites: list[str]) -> tuple[Site, list[str]]:
    """The keys of submit.sh and those of the recipe. Raises ValueError naming a key with a value that none may have."""
    values, options, rest = {}, {}, []
    for arg in args:
        key, equals, value = arg.partition("=")
        if key.startswith(SBATCH):
            options[key.removeprefix(SBATCH).lstrip("-")] = value
        elif equals and key in Site.__dataclass_fields__ and key != "options":
            values[key] = value
        else:
            rest.append(arg)
    for key in ("nodes", "grace_s", "idle_starts"):
        if key in values:
            if not values[key].isdigit() or values[key] == "0":
                raise ValueError(f"{key}={values[key]} must be a number of 1 or more")
            values[key] = int(values[key])
    if values.get("site", "cuda") not in sites:
        raise ValueError(
            f"site={values['site']}: there is no launch/slurm/env_{values['site']}.sh; there are: {', '.join(sites)}"
        )
    for name in options:
        if name in OURS:
            raise ValueError(f"{SBATCH}{name} is set by the batch script; what decides it is {OURS[name]}")
    site = Site(**values, options=options)
    seeds(site)
    limit_s = time_limit_s(options.get("time", ""))
    if limit_s is not None and limit_s <= site.grace_s + EARLY_S:
        raise ValueError(
            f"sbatch.time={options['time']} leaves no time to train: a job is told to save grace_s={site.grace_s} "
            f"seconds before its limit, and Slurm may be {EARLY_S} s early; give it more time or a smaller grace_s"
        )
    named = options.get("export", "").replace("=", ",").split(",")
    if secret := next((name for name in named if _SECRET.search(name)), None):
        raise ValueError(
            f"sbatch.export names {secret}, which would be written into the run directory; set it in the environment "
            "that submit.sh is called in, jobs inherit that"
        )
    return site, rest


def seeds(site: Site) -> list[int]:
    """The seeds of array=, in order. Raises ValueError where it names none."""
    found: list[int] = []
    for part in site.array.split(",") if site.array else []:
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True) and int(first) <= int(last or first)):
            raise ValueError(f"array={site.array} must be seeds such as 0-3 or 0,2,5")
        found += range(int(first), int(last or first) + 1)
    return sorted(set(found))


def time_limit_s(text: str) -> int | None:
    """Seconds of a time limit in one of Slurm's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None for any other text."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isdigit() for part in (*parts, days or "0")):
        return None
    numbers = [int(part) for part in parts]
    if not dash and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def chain(recipe: Recipe, site: Site, unfinished: list[str]) -> list[Leg]:
    """The jobs that carry the run through its unfinished stages, in order.

    Raises ValueError where a stage does not fit its nodes, or no stage is left.
    """
    if not unfinished:
        raise ValueError(f"run_dir={recipe.run_dir}: all stages are done; nothing is submitted")
    check_training(recipe)
    per_node = recipe.cluster.gpus_per_node
    usual = site.nodes or -(-recipe.cluster.num_gpus // per_node)
    legs: list[Leg] = []
    for name in unfinished:
        num_nodes = recipe.stages[name].num_nodes or usual
        fit_world(recipe, num_nodes * per_node, [name])
        if legs and legs[-1].num_nodes == num_nodes:
            legs[-1] = replace(legs[-1], stages=(*legs[-1].stages, name))
        else:
            legs.append(Leg((name,), num_nodes))
    return legs


def describe_chain(recipe: Recipe, legs: list[Leg]) -> str:
    """The chain as a table, a line a stage."""
    rows = []
    for number, leg in enumerate(legs, 1):
        world_size = leg.num_nodes * recipe.cluster.gpus_per_node
        for name in leg.stages:
            layout = fit_world(recipe, world_size, [name]).stages[name].layout
            rows.append((str(number), name, str(leg.num_nodes), str(world_size), _sizes(layout, world_size)))
    return table(("job", "stage", "nodes", "ranks", "layout"), rows, left=(1, 4))


def _sizes(layout: Layout, world_size: int) -> str:
    parts = {"tp": layout.tp, "pp": layout.pp, "sp": layout.sp, "ep": layout.ep}
    return " x ".join([f"dp {layout.dp(world_size)}", *(f"{key} {size}" for key, size in parts.items() if size > 1)])


def batch_script(template: str, recipe: Recipe, leg: Leg, site: Site, *, frozen: Path, python: str, work: Path) -> str:
    """The batch script of a leg: the template with its options of sbatch and its settings.

    frozen: folder with code/ and recipe.yaml; logs go there. python: the interpreter on the nodes. work: the folder
    that relative paths of the recipe count from.
    """
    options = {
        "job-name": f"{recipe.name}-{leg.name}",
        "nodes": leg.num_nodes,
        "ntasks-per-node": recipe.cluster.gpus_per_node,
        **({"gres": f"{site.gres}:{recipe.cluster.gpus_per_node}"} if site.gres else {}),
        **({"array": site.array} if site.array else {}),
        "signal": f"B:USR1@{site.grace_s}",
        "requeue": "",
        "kill-on-invalid-dep": "yes",
        "chdir": work,
        "output": frozen / f"{leg.name}-{'%A_%a' if site.array else '%j'}.log",
        "open-mode": "append",
        **site.options,
    }
    settings = {
        "run_dir": (work / recipe.run_dir).absolute(),
        "frozen": frozen,
        "python": python,
        "site": site.site,
        "leg": leg.name,
        "stop_after": leg.stages[-1],
        "idle_starts": site.idle_starts,
    }
    lines = [
        f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if str(value) else "") for name, value in options.items()
    ]
    values = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return template.replace("#OPTIONS", "\n".join(lines)).replace("#SETTINGS", "\n".join(values))

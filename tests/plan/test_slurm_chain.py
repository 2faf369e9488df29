"""A recipe as a chain of jobs: which stages go together, on how many nodes, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from run_case import write_inputs
from sbtrain.config.load import load
from sbtrain.plan.slurm import Leg, Site, batch_script, chain, describe_chain, seeds, split_keys, time_limit_s

TEMPLATE = (Path(__file__).resolve().parents[2] / "launch/slurm/train.sbatch").read_text()
SITES = ["cuda", "maca"]


@pytest.fixture
def recipe(tmp_path):
    def changed(*overrides):
        return load(
            [f"recipe={write_inputs(tmp_path)}", "cluster.gpus_per_node=2", "stages.ctx_32.micro_batch=1", *overrides]
        )

    return changed


def legs(recipe, site=None, unfinished=None):
    return chain(recipe, site or Site(nodes=1), unfinished or list(recipe.stages))


def test_neighbors_on_the_same_nodes_are_one_job(recipe):
    assert legs(recipe()) == [Leg(("ctx_32", "ctx_64", "ctx_128"), 1)]
    assert legs(recipe("stages.ctx_64.num_nodes=2")) == [
        Leg(("ctx_32",), 1), Leg(("ctx_64",), 2), Leg(("ctx_128",), 1)
    ]  # fmt: skip
    assert legs(recipe("stages.ctx_32.num_nodes=2")) == [Leg(("ctx_32",), 2), Leg(("ctx_64", "ctx_128"), 1)]


def test_the_nodes_of_the_recipe_where_submit_is_given_none(recipe):
    assert legs(recipe("cluster.num_gpus=4", "~stages.ctx_128"), Site())[0].num_nodes == 2


def test_what_is_done_is_not_submitted(recipe):
    assert legs(recipe(), unfinished=["ctx_64", "ctx_128"])[0].name == "ctx_64-ctx_128"
    with pytest.raises(ValueError, match="all stages are done; nothing is submitted"):
        chain(recipe(), Site(nodes=1), [])


def test_a_stage_that_does_not_fit_its_nodes(recipe):
    with pytest.raises(ValueError, match=r"stages.ctx_128: .* world of 6"):
        legs(recipe("stages.ctx_128.num_nodes=3"))
    fitted = recipe("stages.ctx_64.num_nodes=4", "layout_auto=true")
    assert "ctx_64" in describe_chain(fitted, legs(fitted))


def test_keys_of_submit_and_of_the_recipe():
    site, rest = split_keys(
        ["recipe=demo", "nodes=4", "sbatch.partition=long", "seed=1", "site=maca", "array=0-3"], SITES
    )
    assert (site.nodes, site.site, site.array, site.options) == (4, "maca", "0-3", {"partition": "long"})
    assert rest == ["recipe=demo", "seed=1"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nodes=0", "nodes=0 must be a number of 1 or more"),
        ("nodes=two", "nodes=two must be a number"),
        ("site=rocm", "no launch/slurm/env_rocm.sh; there are: cuda, maca"),
        ("sbatch.dependency=3", "sbatch.dependency is set by the batch script; what decides it is after="),
        ("array=a-b", "array=a-b must be seeds"),
        ("array=1-2-3", "array=1-2-3 must be seeds"),
        ("array=3-1", "array=3-1 must be seeds"),
        ("sbatch.time=6", "sbatch.time=6 leaves no time to train: .* grace_s=300"),
        ("sbatch.export=ALL,WANDB_API_KEY=5ec2e7", "^sbatch.export names WANDB_API_KEY, .* jobs inherit that$"),
    ],
)
def test_refusals(key, message):
    with pytest.raises(ValueError, match=message):
        split_keys([key], SITES)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-1", 176_400), ("2-1:30", 178_200)),
        *(("2-1:30:05", 178_205), ("UNLIMITED", None), ("", None), ("1:2:3:4", None)),
    ],
)
def test_time_limits_as_slurm_writes_them(text, seconds):
    assert time_limit_s(text) == seconds


def test_seeds_of_an_array():
    assert seeds(Site()) == [] and seeds(Site(array="7,0-2,1")) == [0, 1, 2, 7]


def test_the_batch_script(recipe, tmp_path):
    """Options, settings with spaces in their paths, and no mark left over; bash can read it."""
    site = Site(nodes=1, grace_s=90, options={"partition": "long"})
    plan = recipe("run_dir='runs/a b'")
    places = {"frozen": tmp_path / "a b", "python": "/venv/bin/python", "work": tmp_path}
    script = batch_script(TEMPLATE, plan, legs(plan)[0], site, **places)
    for line in (
        "--nodes=1",
        "--ntasks-per-node=2",
        "--gres=gpu:2",
        "--signal=B:USR1@90",
        "--requeue",
        "--partition=long",
        f"--output='{tmp_path}/a b/ctx_32-ctx_128-%j.log'",
    ):
        assert f"\n#SBATCH {line}\n" in script
    assert f"\nrun_dir='{tmp_path}/runs/a b'\n" in script and "stop_after=ctx_128" in script
    assert "#OPTIONS" not in script and "#SETTINGS" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "--gres" not in batch_script(TEMPLATE, plan, legs(plan)[0], Site(nodes=1, gres=""), **places)

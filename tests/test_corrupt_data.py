"""Data that changes on disk while a run reads it ends all ranks before a wrong batch; repaired, the run goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit
from sbtrain.train.watch import Watch

QUIET = ("evaluation.tokens=0", "stop_after=ctx_64")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_ranks):
    """The undisturbed run."""
    root = tmp_path_factory.mktemp("data")
    write_inputs(root)
    assert run_ranks(2)(run_until, tiny_recipe(root, "whole", *QUIET)) == [Exit.DONE] * 2
    return root, curve(root / "whole")


def run_damaging(rank: int, recipe, path: Path, at_step: int, how: str) -> str:
    """Run the recipe; one rank damages the file behind that step. Returns the error of this rank."""
    check = Watch.check

    def check_and_damage(self, state, **figures):
        check(self, state, **figures)
        if rank == 1 and state.step == at_step:
            damage(path, how)

    Watch.check = check_and_damage
    try:
        return str(run_until(rank, recipe))
    except ValueError as error:
        return str(error)
    finally:
        Watch.check = check


def damage(path: Path, how: str) -> None:
    """In place, as a bad disk or a careless copy does."""
    with open(path, "r+b") as file:
        if how == "cut":
            os.truncate(path, path.stat().st_size // 3)
        else:  # ids that are in the vocabulary, all over the file
            file.write(bytes(byte ^ (1 - index % 2) for index, byte in enumerate(path.read_bytes())))


@pytest.mark.parametrize(
    ("how", "step", "says"), [("changed", 4, "is corrupt: bytes 0 to"), ("cut", 7, "is truncated")]
)
def test_the_run_stops_with_the_name_of_the_file_and_ends_as_if_nothing_was(whole, run_ranks, how, step, says):
    root, steps = whole
    path, recipe = root / "one.bin", tiny_recipe(root, how, *QUIET)
    sound = path.read_bytes()
    first, second = run_ranks(2)(run_damaging, recipe, path, step, how)
    assert first == second and f"{path} {says}" in first and "copy the file again" in first
    done = curve(root / how)
    assert step <= len(done) <= step + 1 and done == steps[: len(done)]
    with pytest.raises(ValueError, match=rf"one\.bin {says}"):
        run_ranks(2)(run_until, recipe)
    path.write_bytes(sound)
    assert run_ranks(2)(run_until, recipe) == [Exit.DONE] * 2
    assert curve(root / how) == steps

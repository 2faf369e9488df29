"""torchrun launch/train.py recipe=NAME [key=value ...]: train a recipe through its stages; dry_run=true describes it.

Exit codes: 0 done, 75 told to stop and asks to be started again, 76 another rank was killed or hangs (one line names
it; start again), 2 the recipe cannot run here (one line says why).
"""

import os
import sys
from functools import partial

import _allocator  # noqa: F401
import _path  # noqa: F401
from parallel.told import told

if __name__ == "__main__":
    told.listen()  # what comes next takes seconds, or minutes where many read it over a network

from sbtrain.config.load import load


def say(error: ValueError) -> None:
    """Print a user's mistake once, on the first rank."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)


def refuse(error: ValueError, run_dir: str) -> int:
    """Print a user's mistake, and replace what exit.json says of an earlier start."""
    say(error)
    if os.path.exists(os.path.join(run_dir, "exit.json")):
        leave(run_dir, 2, str(error))
    return 2


def leave(run_dir: str, code: int, reason: str) -> None:
    """keep_end; no signal changes that any more: it would leave none, or another reason."""
    told.over()
    keep_end(run_dir, code, reason)


def keep_end(run_dir: str, code: int, reason: str) -> None:
    """Write exit.json on the first rank, unless another job holds the run directory and will write its own."""
    from pathlib import Path

    from sbtrain.checkpoint.lock import in_use
    from sbtrain.checkpoint.run_dir import record_exit

    if int(os.environ.get("RANK", 0)) == 0 and not in_use(Path(run_dir)):
        record_exit(run_dir, code, reason)


def run_dir_of(args: list[str]) -> str:
    """The run directory that the arguments mean, also where they make no recipe."""
    given = {key: value for key, _, value in (arg.partition("=") for arg in args)}
    name = given.get("name") or os.path.basename(given.get("recipe", "")).removesuffix(".yaml")
    return given.get("run_dir") or os.path.join("runs", name)


def train(args: list[str]) -> int:
    """Run the recipe and leave exit.json in its run directory."""
    try:
        recipe = load(args)
        if recipe.dry_run:
            from sbtrain.plan.dry_run import dry_run

            dry_run(recipe)
            return 0
    except ValueError as error:
        return refuse(error, run_dir_of(args))
    from sbtrain.checkpoint.lock import EarlierStart, RunInUse
    from sbtrain.checkpoint.run_dir import Exit, check_owner
    from sbtrain.run import run

    try:
        check_owner(recipe)
    except ValueError as error:
        return refuse(error, recipe.run_dir)
    told.record = partial(keep_end, recipe.run_dir)  # until run() holds the run directory
    try:
        code, reason = run(recipe)
    except RunInUse as error:  # how that run ends is for the other job to say
        say(error)
        return int(Exit.REQUEUE if isinstance(error, EarlierStart) else Exit.BAD_RECIPE)
    except ValueError as error:
        say(error)
        code, reason = Exit.BAD_RECIPE, str(error)
    except BaseException as error:
        leave(recipe.run_dir, 1, f"{type(error).__name__}: {error}")
        raise
    leave(recipe.run_dir, code, reason)
    return int(code)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(train(sys.argv[1:]))

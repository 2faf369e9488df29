"""torchrun launch/train.py recipe=NAME [key=value ...]: train a recipe through its stages; dry_run=true describes it.

Exit codes: 0 done, 75 saved and asks to be started again, 2 the recipe cannot run here (one line says why).
"""

import os
import sys

import _path  # noqa: F401
from sbtrain.config.load import load


def refuse(error: ValueError) -> int:
    """Print a user's mistake once, on the first rank."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def train(args: list[str]) -> int:
    """Run the recipe and leave exit.json in its run directory."""
    try:
        recipe = load(args)
        if recipe.dry_run:
            from sbtrain.plan.dry_run import dry_run

            dry_run(recipe)
            return 0
    except ValueError as error:
        return refuse(error)
    from sbtrain.checkpoint.run_dir import check_owner, record_exit
    from sbtrain.run import run

    try:
        check_owner(recipe)
    except ValueError as error:
        return refuse(error)
    try:
        code, reason = run(recipe)
    except ValueError as error:
        code, reason = refuse(error), str(error)
    except BaseException as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        raise
    finally:
        if int(os.environ.get("RANK", 0)) == 0:
            record_exit(recipe, code, reason)
    return int(code)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(train(sys.argv[1:]))

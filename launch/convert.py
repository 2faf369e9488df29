"""python launch/convert.py recipe=NAME [key=value ...]: Hugging Face checkpoint -> initial checkpoint of the run.

Offline, streaming; torchrun splits the work over ranks. launch/train.py with the same recipe continues from it.
"""

import os
import sys

import _path  # noqa: F401
from sbtrain.config.load import load


def convert(args: list[str]) -> int:
    """Convert and say where the checkpoint is."""
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        recipe = load(args)
        if recipe.dry_run:
            from sbtrain.plan.dry_run import dry_run

            dry_run(recipe)
            return 0
        from sbtrain.run import convert as write_start

        checkpoint = write_start(recipe)
    except ValueError as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if first:
        print(f"{recipe.start.path or 'random weights'} -> {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(convert(sys.argv[1:]))

"""A checkpoint of a run to a Hugging Face folder that transformers runs (trust_remote_code=True).

python launch/export.py run=DIR out=DIR [format=hf|gla_swa|sbtrain|sbtrain_moe] [dtype=bf16|fp16|fp32] [step=N]
"""

import sys

import _path  # noqa: F401
from sbtrain.checkpoint.run_dir import open_run
from sbtrain.convert.export import export_checkpoint
from sbtrain.convert.export_config import left_out


def main(arguments: list[str]) -> int:
    """Export as the arguments say. Returns the exit code: 2, with one line, for a mistake in them."""
    try:
        options = _options(arguments)
        recipe, step_dir = open_run(options["run"], options.get("step", ""))
        how = {key: options[key] for key in ("format", "dtype") if key in options}
        form = export_checkpoint(step_dir, recipe=recipe, out=options["out"], **how)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{step_dir} -> {options['out']} (format {form})")
    if note := left_out(recipe.model):
        print(f"note: {note}")
    return 0


def _options(arguments: list[str]) -> dict[str, str]:
    known = ("run", "out", "format", "dtype", "step")
    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{argument!r} is not one of {', '.join(f'{name}=' for name in known)}")
        options[key] = value
    for key in ("run", "out"):
        if not options.get(key):
            raise ValueError(f"{key}= is missing; usage: {__doc__.splitlines()[2]}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A checkpoint of a run to a Hugging Face folder that transformers runs (trust_remote_code=True).

python launch/export.py run=DIR out=DIR [format=hf|gla_swa|sbtrain|sbtrain_moe] [dtype=bf16|fp16|fp32] [step=N]
python launch/export.py run=DIR|model=FOLDER out=DIR format=w8aspike [calibrated=FOLDER] [dtype=...] [step=N]
    INT8 weights that launch/calibrate.py has made; calibrated= is where, if it was told another folder
"""

import sys
from pathlib import Path

import _path  # noqa: F401
from sbtrain.checkpoint.run_dir import open_run
from sbtrain.convert.calibrated import FILE, Calibrated
from sbtrain.convert.export import export, export_checkpoint, warm_in_note
from sbtrain.convert.export_config import W8ASPIKE
from sbtrain.inference.load import Where, open_source


def main(arguments: list[str]) -> int:
    """Export as the arguments say. Returns the exit code: 2, with one line, for a mistake in them."""
    try:
        options = _options(arguments)
        how = {key: options[key] for key in ("format", "dtype") if key in options}
        note = None
        if options.get("model"):
            origin, form = _export_folder(options, how)
        else:
            recipe, origin = open_run(options["run"], options.get("step", ""))
            if how.get("format") == W8ASPIKE:
                how["calibrated"] = _calibrated(options, Path(options["run"]) / "calibrated" / origin.name)
            form = export_checkpoint(origin, recipe=recipe, out=options["out"], **how)
            note = warm_in_note(origin, recipe.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{origin} -> {options['out']} (format {form}{', INT8 weights' if 'calibrated' in how else ''})")
    if note:
        print(f"note: {note}")
    return 0


def _export_folder(options: dict[str, str], how: dict) -> tuple[Path, str]:
    """A Hugging Face folder becomes another one: with INT8 weights."""
    if how.get("format") != W8ASPIKE:
        raise ValueError("model= goes with format=w8aspike alone; give run=DIR, or that format")
    source = open_source(Where(model=options["model"]))
    how["calibrated"] = _calibrated(options, source.origin / "calibrated")
    folders = dict(tokenizer_dir=source.tokenizer_dir, source_dir=source.origin)
    return source.origin, export(source.reader, model=source.config, out=options["out"], **folders, **how)


def _calibrated(options: dict[str, str], default: Path) -> Calibrated:
    folder = Path(options.get("calibrated") or default)
    if not (folder / FILE).is_file():
        what = " ".join(f"{key}={options[key]}" for key in ("run", "model", "step") if options.get(key))
        raise ValueError(
            f"format=w8aspike: {folder} has no calibrated weights; make them with: "
            f"python launch/calibrate.py {what} data=PREFIX"
        )
    return Calibrated(folder)


def _options(arguments: list[str]) -> dict[str, str]:
    known = ("run", "out", "format", "dtype", "step", "model", "calibrated")
    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{argument!r} is not one of {', '.join(f'{name}=' for name in known)}")
        options[key] = value
    for key in ("run", "out") if not options.get("model") else ("out",):
        if not options.get(key):
            raise ValueError(f"{key}= is missing; usage: {__doc__.splitlines()[2]}")
    if options.get("model") and (options.get("run") or options.get("step")):
        raise ValueError("run= and step= do not go with model=; drop one of them")
    if options.get("calibrated") and options.get("format") != W8ASPIKE:
        raise ValueError("calibrated= goes with format=w8aspike alone; drop it, or give that format")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

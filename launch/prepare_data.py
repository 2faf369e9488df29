"""Text to a tokenized corpus. Repeat input= for several files or folders; interrupted, the same command continues.

python launch/prepare_data.py input=FILE|FOLDER [input=...] out=PREFIX tokenizer=FOLDER
                              [text_key=text] [valid_percent=0] [workers=NUM_CPUS]
"""

import os
import sys

import _path  # noqa: F401
from sbtrain.data.prepare import prepare


def main(arguments: list[str]) -> int:
    """Prepare as the arguments say. Returns the exit code: 2 for a mistake in them or the text, 130 if interrupted."""
    try:
        options = _options(arguments)
        corpora = prepare(
            options["input"],
            options["out"],
            tokenizer=options["tokenizer"],
            text_key=options.get("text_key", "text"),
            valid_percent=_number(options, "valid_percent", float, 0.0),
            num_workers=_number(options, "workers", int, os.cpu_count() or 1),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    for corpus in corpora:
        print(f"ready: {corpus}")
    return 0


def _options(arguments: list[str]) -> dict:
    known = ("input", "out", "tokenizer", "text_key", "valid_percent", "workers")
    options: dict = {"input": []}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{argument!r} is not one of {', '.join(f'{name}=' for name in known)}")
        if key == "input":
            options["input"].append(value)
        else:
            options[key] = value
    for key in ("input", "out", "tokenizer"):
        if not options.get(key):
            raise ValueError(f"{key}= is missing; usage: {__doc__.splitlines()[2]}")
    return options


def _number(options: dict, key: str, kind: type, default: float) -> float:
    try:
        return kind(options.get(key, default))
    except ValueError as error:
        raise ValueError(f"{key}={options[key]} is not a number; write for example {key}={default:g}") from error


if __name__ == "__main__":
    # The workers are the parallelism; each would otherwise start a thread per core as well.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.exit(main(sys.argv[1:]))

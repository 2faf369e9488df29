"""Continue a prompt: prefill, then constant-memory decoding, streamed to the terminal.

python launch/generate.py model=FOLDER|run=FOLDER prompt=TEXT [max_new_tokens=64] [temperature=0] [top_k=0] [top_p=1]
                          [seed=0] [stream=true] [step=N] [precision=fp32|bf16] [chunk_tokens=4096]
                          [int8=true [calibrated=FOLDER]]
torchrun --nproc_per_node=N launch/generate.py sp=N ...     reads a long prompt on N GPUs, a shard each
"""

import os
import sys
from dataclasses import dataclass

import _path  # noqa: F401
from parallel.layout import Layout
from parallel.mesh import Mesh, check_one_row
from sbtrain.inference.generate import CHUNK_TOKENS, Speed, generate_text
from sbtrain.inference.load import Where, load_model
from sbtrain.inference.options import build, check_keys, split
from sbtrain.inference.sampling import Sampling


@dataclass(frozen=True)
class Text:
    """What is continued, how far, and how many processes read it (sp)."""

    prompt: str
    max_new_tokens: int = 64
    stream: bool = True
    chunk_tokens: int = CHUNK_TOKENS
    sp: int = 1

    def __post_init__(self):
        for key in ("max_new_tokens", "chunk_tokens", "sp"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")


def main(arguments: list[str]) -> int:
    """Generate as the arguments say. Returns the exit code: 2, with one line, for a mistake in them."""
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        given = split(arguments)
        check_keys(given, Where, Text, Sampling)
        where, text, sampling = build(Where, given), build(Text, given), build(Sampling, given)
        generate(where, text, sampling, first=first)
    except ValueError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def generate(where: Where, text: Text, sampling: Sampling, *, first: bool) -> None:
    """Print the continuation on stdout and the speed on stderr, on the first rank; all ranks make the same text."""
    speed, layout = Speed(), Layout(sp=text.sp)
    check_one_row(layout)
    with Mesh.build(layout) as mesh:
        loaded = load_model(where, mesh)
        pieces = generate_text(
            loaded,
            text.prompt,
            max_new_tokens=text.max_new_tokens,
            sampling=sampling,
            chunk_tokens=text.chunk_tokens,
            speed=speed,
        )
        for piece in pieces if text.stream else ["".join(pieces)]:
            if first:
                print(piece, end="", flush=True)
    if first:
        print()
        choices = [f"sp={text.sp}, {symbol} layers: {choice}" for symbol, choice in loaded.model.sp_choices.items()]
        print(*choices, speed, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))

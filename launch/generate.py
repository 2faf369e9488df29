"""Continue a prompt: prefill, then constant-memory decoding, streamed to the terminal.

python launch/generate.py model=FOLDER|run=FOLDER prompt=TEXT [max_new_tokens=64] [temperature=0] [top_k=0] [top_p=1]
                          [seed=0] [stream=true] [step=N] [precision=fp32|bf16] [chunk_tokens=4096]
"""

import os
import sys
from dataclasses import dataclass

import _path  # noqa: F401
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.inference.generate import CHUNK_TOKENS, Speed, generate_text
from sbtrain.inference.load import Where, load_model
from sbtrain.inference.options import build, check_keys, split
from sbtrain.inference.sampling import Sampling


@dataclass(frozen=True)
class Text:
    """What is continued, and how far."""

    prompt: str
    max_new_tokens: int = 64
    stream: bool = True
    chunk_tokens: int = CHUNK_TOKENS

    def __post_init__(self):
        for key in ("max_new_tokens", "chunk_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")


def main(arguments: list[str]) -> int:
    """Generate as the arguments say. Returns the exit code: 2, with one line, for a mistake in them."""
    try:
        given = split(arguments)
        check_keys(given, Where, Text, Sampling)
        where, text, sampling = build(Where, given), build(Text, given), build(Sampling, given)
        generate(where, text, sampling)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def generate(where: Where, text: Text, sampling: Sampling) -> None:
    """Print the continuation on stdout and the speed on stderr."""
    speed = Speed()
    with Mesh.build(Layout()) as mesh:
        pieces = generate_text(
            load_model(where, mesh),
            text.prompt,
            max_new_tokens=text.max_new_tokens,
            sampling=sampling,
            chunk_tokens=text.chunk_tokens,
            speed=speed,
        )
        for piece in pieces if text.stream else ["".join(pieces)]:
            print(piece, end="", flush=True)
    print()
    print(speed, file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))

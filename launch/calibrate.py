"""INT8 weights for a model whose activations are spikes: GPTQ on a few samples, one layer on the device at a time.

python launch/calibrate.py run=DIR|model=FOLDER data=PREFIX|FILE [method=gptq|rtn] [samples=128] [seq_len=2048] [step=N]
                           [out=FOLDER] [k=3] [weight_group=128] [spike_down_proj=false] [text_key=text]
                           [precision=fp32|bf16]
Then: python launch/export.py run=DIR out=DIR format=w8aspike
"""

import os
import sys

import _path  # noqa: F401
from sbtrain.inference.calibrate import calibrate


def main(arguments: list[str]) -> int:
    """Calibrate as the arguments say. Returns the exit code: 2, with one line, for a mistake in them."""
    try:
        out = calibrate(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"-> {out}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))

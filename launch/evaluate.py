"""Measure a model: bits per byte, passkey retrieval, tasks of lm-eval. A table for each, and a JSON file.

python launch/evaluate.py model=FOLDER|run=FOLDER [suite=bpb,passkey,lm_eval] [out=FOLDER] [step=N]
                          [precision=fp32|bf16]
    bpb:      [data=PREFIX|FILE,...] [lengths=512,1024,2048] [tokens=16384] [text_key=text]
    passkey:  [lengths=512,1024,2048] [depths=0,25,50,75,100] [samples=4] [seed=0]
    lm_eval:  tasks=NAME,... [include_path=FOLDER] [limit=0] [num_fewshot=-1] [batch_size=1]
"""

import os
import sys

import _path  # noqa: F401
from sbtrain.inference.suites import evaluate


def main(arguments: list[str]) -> int:
    try:
        evaluate(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; suites that were done have their results", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))

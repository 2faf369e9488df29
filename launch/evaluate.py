"""Measure a model: bits per byte, passkey retrieval, spikes, tasks of lm-eval. A table for each, and a JSON file.

python launch/evaluate.py model=FOLDER|run=FOLDER [suite=bpb,passkey,spiking,lm_eval] [out=FOLDER] [step=N]
                          [precision=fp32|bf16] [int8=true [calibrated=FOLDER]]
    bpb:      [data=PREFIX|FILE,...] [lengths=512,1024,2048] [tokens=16384] [text_key=text]
    passkey:  [lengths=512,1024,2048] [depths=0,25,50,75,100] [samples=4] [seed=0]
    spiking:  [k=2,2.5,3,3.5,4] [spike_down_proj=false] [data=PREFIX|FILE,...] [lengths=1024] [tokens=16384]
    lm_eval:  tasks=NAME,... [include_path=FOLDER] [limit=0] [num_fewshot=-1] [batch_size=1]
"""

import os
import sys
from pathlib import Path

import _path  # noqa: F401
from sbtrain.inference.options import split
from sbtrain.inference.suites import evaluate
from sbtrain.report import write_report


def refresh_page(run: str) -> None:
    """Build the report of a run that has one again: it shows what suites have measured."""
    if run and (Path(run) / "report").is_dir():
        print(f"report: {write_report(run)}", flush=True)


def main(arguments: list[str]) -> int:
    """Run the suites. Returns the exit code: 2, with one line, for a mistake in the arguments."""
    try:
        evaluate(arguments)
        refresh_page(split(arguments).get("run", ""))
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

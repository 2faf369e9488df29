"""What a Slurm job does when its ranks have ended: prints `done`, `again` or `stop` and the reason.

python launch/next_start.py run_dir=DIR job=ID restart=N nodes=LIST code=N signal=[NAME] idle_starts=N
launch/slurm/train.sbatch calls it. What each start came to is kept in DIR/slurm/starts.jsonl.
"""

import sys
import time

import _path  # noqa: F401
from sbtrain.checkpoint.starts import next_start

if __name__ == "__main__":
    given = {key: value for key, _, value in (arg.partition("=") for arg in sys.argv[1:])}
    kept = {key: given[key] for key in ("job", "restart", "nodes", "signal")}
    kept["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    verdict, why = next_start(
        given["run_dir"],
        kept,
        code=int(given["code"]),
        told_to_stop=bool(given["signal"]),
        idle_starts=int(given["idle_starts"]),
    )
    print(verdict, why)

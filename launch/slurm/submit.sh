#!/usr/bin/env bash
# launch/slurm/submit.sh recipe=NAME nodes=N [key=value ...]: the whole run as a chain of Slurm jobs. dry_run=true prints
# their scripts. PYTHON chooses the interpreter, which must be at the same place on the nodes. Keys: docs/operations.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
exec "$python" "$root/launch/submit.py" "$@"

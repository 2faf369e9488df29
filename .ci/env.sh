#!/usr/bin/env bash
# Makes .venv ready: `make env` and CI run it. Uses the torch that the calling python can import (>= 2.8), and keeps it;
# otherwise installs the CPU build. PYTHON chooses the interpreter, TORCH another requirement to install in its place.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch_wanted=${TORCH:-}
cpu_torch=2.13.0

command -v "$python" >/dev/null || { echo "sbtrain: $python not found; install Python >= 3.10 or run: make env PYTHON=/path/to/python3" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "sbtrain: needs Python >= 3.10, $python is $("$python" -V); run: make env PYTHON=/path/to/python3" >&2
    exit 1
}

torch_version() { # prints the version of an importable torch >= 2.8, else fails
    "$1" - 2>/dev/null <<'PYTHON'
import re, sys, torch
print(torch.__version__)
sys.exit(tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 8))
PYTHON
}

if ! .venv/bin/python -c "" 2>/dev/null; then
    echo "sbtrain: creating .venv"
    site=""
    if [ -z "$torch_wanted" ] && found=$(torch_version "$python"); then
        echo "sbtrain: torch $found is here and will be used as it is"
        site=--system-site-packages
    fi
    # Debian ships venv without ensurepip: then the calling python's own pip fills the environment.
    "$python" -m venv --clear $site .venv 2>/dev/null || {
        "$python" -m venv --clear --without-pip $site .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    }
fi
venv=.venv/bin/python

if ! torch_version "$venv" >/dev/null; then
    if [ -n "$torch_wanted" ]; then
        "$venv" -m pip install "$torch_wanted"
    else
        "$venv" -m pip install "torch==$cpu_torch+cpu" ||
            "$venv" -m pip install "torch==$cpu_torch" --index-url https://download.pytorch.org/whl/cpu
    fi
fi

# The constraint holds torch at what is there: an install that would replace it fails instead.
torch=$("$venv" -c 'from importlib.metadata import version; print(version("torch"))')
echo "torch==$torch" >.venv/constraints.txt
"$venv" -m pip install --quiet --constraint .venv/constraints.txt --editable ".[dev]"

# With torch from outside, torchrun on PATH would start the outer python, which lacks everything else.
if [ ! -x .venv/bin/torchrun ]; then
    printf '#!%s\nfrom torch.distributed.run import main\n\nmain()\n' "$PWD/.venv/bin/python" >.venv/bin/torchrun
    chmod +x .venv/bin/torchrun
fi
touch .venv/.ready
echo "sbtrain: .venv is ready: $("$venv" -V), torch $torch"

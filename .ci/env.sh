#!/usr/bin/env bash
# Makes .venv ready: `make env` and CI run it. Uses the torch that the calling python can import (>= 2.8), and keeps it;
# otherwise installs the CPU build. PYTHON chooses the interpreter, TORCH another requirement to install in its place.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch_wanted=${TORCH:-}
cpu_torch=2.13.0

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    found=$("$python" -V 2>/dev/null || echo "not there")
    echo "sbtrain: needs Python >= 3.10, but $python is $found; run: make env PYTHON=/path/to/python3" >&2
    exit 1
fi

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

# A package that comes from outside brings no script here, and the one on PATH would start the outer python.
shim() { # name, module, function
    [ -x ".venv/bin/$1" ] && return
    printf '#!%s\nimport sys\n\nfrom %s import %s\n\nif __name__ == "__main__":\n    sys.exit(%s())\n' "$PWD/$venv" "$2" "$3" "$3" >".venv/bin/$1"
    chmod +x ".venv/bin/$1"
}
shim torchrun torch.distributed.run main
shim pytest pytest console_main
shim lint-imports importlinter.cli lint_imports_command
touch .venv/.ready
echo "sbtrain: .venv is ready: $("$venv" -V), torch $torch"

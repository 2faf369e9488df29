"""Puts the repository root first on sys.path: a bare checkout runs, and our `ops` wins over an installed one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

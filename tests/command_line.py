"""launch/train.py as its users call it, in this process: exit code, stderr, and what it leaves. The rule of bad input:
exit 2, one line naming the key or file and the fix, nothing written or lost.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from run_case import write_inputs

ROOT = Path(__file__).resolve().parents[1]
ONE_STAGE = ("~stages.ctx_64", "~stages.ctx_128")
ONE_PROCESS = ("stages.ctx_64.layout.pp=1", "stages.ctx_128.layout.sp=1")


class Site:
    """A folder with a recipe and its inputs; launch/train.py works in it, in this process. out: its last stdout."""

    def __init__(self, root: Path, capture):
        self.root, self._capture, self.out = root, capture, ""
        self._train = runpy.run_path(str(ROOT / "launch" / "train.py"))["train"]
        self.recipe = write_inputs(root)
        self.run_dir = root / "run"

    def train(self, *overrides: str, recipe: str = "") -> tuple[int, str]:
        """Exit code and stderr of `train.py recipe=tiny run_dir=run overrides`."""
        self._capture.readouterr()
        code = self._train([f"recipe={recipe or self.recipe}", f"run_dir={self.run_dir}", *overrides])
        self.out, err = self._capture.readouterr()
        return code, err

    def files(self, but: tuple[str, ...] = ()) -> dict[str, tuple[bytes, int]]:
        """Content and time of every file, and every folder."""
        paths = [path for path in sorted(self.root.rglob("*")) if path.name not in but]
        return {
            str(path.relative_to(self.root)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
            for path in paths
        }

    def refuses(self, overrides: tuple[str, ...], mentions: list[str], *, recipe: str = "") -> None:
        """The rule of this file."""
        before = self.files(but=("exit.json", "lock.json"))
        code, line = self.train(*overrides, recipe=recipe)
        assert code == 2, line
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        assert [word for word in mentions if word not in line] == [], line
        after = self.files(but=("exit.json", "lock.json"))
        assert sorted(after) == sorted(before)
        assert [name for name in before if before[name] != after[name]] == []


def truncate(path: Path) -> None:
    """Cut the last 100 bytes of a file."""
    path.write_bytes(path.read_bytes()[:-100])

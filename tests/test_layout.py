"""The architecture as tests: whose `ops` it is, a README that is true, budgets, import direction, house rules."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sbtrain", "parallel", "ops")
MAX_LINES, MAX_FUNCTION_LINES, MAX_DOCLESS_LINES = 400, 60, 12
TREE_LINE = re.compile(r"^(?P<indent> *)(?P<names>\S+(?:, \S+)*)(?: {2,}(?P<clause>.*))?$")


def git_files() -> list[Path]:
    """Every file that is or will be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [path for path in git_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def num_lines(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def public_functions(path: Path) -> list[ast.FunctionDef]:
    """Functions of the module and methods of its public classes; of an autograd Function the class speaks for all."""
    tree = ast.parse(path.read_text())
    bodies = [tree.body]
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if "Function" not in [ast.unparse(base).split(".")[-1] for base in node.bases]:
            bodies.append(node.body)
    found = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and not is_kernel(node)]
    return [function for function in found if not function.name.startswith("_") and function.name != "main"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_ours_when_started_from_launch(package, tmp_path):
    """As torchrun starts a script: launch/ is first on sys.path, and a foreign package of the name is installed."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("FOREIGN = True\n")
    code = f"import sys; sys.path[:2] = [{str(ROOT / 'launch')!r}, {str(tmp_path)!r}]; import _path, {package}; "
    code += f"print({package}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / package / "__init__.py"


def test_import_contracts_hold():
    """The contracts of setup.cfg: direction, and one door for every heavy dependency."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    pytest.importorskip("importlinter", reason="import contracts need import-linter (pip install -e .[dev])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_scripts_in_launch_are_entered_through_path_and_imported_by_nobody():
    """launch/ is no package, so import-linter does not see it."""
    before = {"_path", "_allocator"}  # no scripts: what has to be set before anything else is imported
    scripts = {path.stem for path in python_files("launch")} - before
    for path in python_files("launch"):
        if path.stem in before:
            continue
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        ours = [node for node in imports if module_of(node).split(".")[0] in (*PACKAGES, "_path")]
        assert ours and module_of(ours[0]) == "_path", f"{name_of(path)}: `import _path` comes before our packages"
        assert not scripts & {module_of(node) for node in imports}, f"{name_of(path)} imports a script"
    for path in python_files(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert module_of(node).split(".")[0] not in ("launch", "tests", *before), name_of(path)


def module_of(node: ast.Import | ast.ImportFrom) -> str:
    return node.names[0].name if isinstance(node, ast.Import) else node.module or ""


def test_no_script_has_the_name_of_a_module():
    """launch/ops.py would be imported in place of ops."""
    taken = set(PACKAGES) | set(sys.stdlib_module_names)
    assert not {path.stem for path in python_files("launch")} & taken


def test_files_and_functions_are_short():
    too_long = []
    for path in python_files("launch", "tests", *PACKAGES):
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            too_long.append(f"{name_of(path)}: {lines} lines")
        for function in functions(path):
            if num_lines(function) > MAX_FUNCTION_LINES and not is_kernel(function):
                too_long.append(f"{name_of(path)}: {function.name} has {num_lines(function)} lines")
    assert not too_long


def test_modules_and_long_public_functions_have_docstrings():
    missing = []
    for path in python_files("launch", *PACKAGES):
        text = path.read_text()
        if text and not ast.get_docstring(ast.parse(text)):
            missing.append(name_of(path))
        for function in public_functions(path):
            if num_lines(function) > MAX_DOCLESS_LINES and not ast.get_docstring(function):
                missing.append(f"{name_of(path)}: {function.name}")
    assert not missing


def test_the_environment_is_read_in_few_places():
    allowed = re.compile(r"launch/|parallel/|ops/device")
    readers = re.compile(r"os\.(environ|getenv|putenv)|from os import .*environ")
    found = [name_of(path) for path in python_files(*PACKAGES) if readers.search(path.read_text())]
    assert not [name for name in found if not allowed.match(name)]


def test_nothing_is_left_to_do():
    words = re.compile(r"\b(TO" + "DO|FIX" + r"ME|XX" + r"X)\b")
    texts = (".py", ".md", ".cfg", ".toml", ".yaml", ".sh", ".sbatch")
    assert not [name_of(path) for path in git_files() if path.suffix in texts and words.search(path.read_text())]


def test_forbidden_names():
    """A module called utils is a place where things are lost."""
    bad = {"utils", "util", "common", "core", "helpers", "misc"}
    paths = [path.relative_to(ROOT).with_suffix("") for path in python_files("launch", *PACKAGES)]
    assert not bad & {part for path in paths for part in path.parts}
    classes = [
        f"{name_of(path)}: {node.name}"
        for path in python_files(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Handler|Helper)s?$", node.name)
    ]
    assert not classes


def test_tests_mirror_the_tree():
    """tests/parallel/sequence/ tests parallel/sequence/; tests/metrics/ tests sbtrain/metrics/. Names are unique."""
    modules = [path for path in python_files("tests") if path.name.startswith("test_")]
    for folder in {path.parent for path in modules} - {ROOT / "tests"}:
        inside = folder.relative_to(ROOT / "tests")
        homes = [ROOT / inside, ROOT / "sbtrain" / inside]
        assert any(home.is_dir() for home in homes), f"{name_of(folder)} tests a folder that does not exist"
    names = [path.name for path in python_files("tests")]
    assert sorted(set(names)) == sorted(names), "two test files of one name cannot both be imported"
    assert not [path for path in python_files("tests") if path.name == "__init__.py"]


def readme_tree() -> dict[str, str]:
    """path -> clause of the tree in README.md: one or more names a line, folders end in /, two spaces an indent."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^## The tree\n.*?^```\n(.*?)^```$", text, re.M | re.S)
    assert block, "README.md has no code block under '## The tree'"
    entries, parents = {}, []
    for line in block.group(1).splitlines():
        match = TREE_LINE.match(line)
        assert match, f"README tree: cannot read {line!r}"
        depth = len(match["indent"]) // 2
        prefix = "".join(parents[:depth])
        names = match["names"].split(", ")
        for name in names:
            entries[prefix + name] = match["clause"] or ""
        parents[depth:] = [names[-1]]
    return entries


def test_the_tree_in_the_readme_is_true():
    listed = readme_tree()
    for name in listed:
        is_there = (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file()
        assert is_there, f"README tree: {name} does not exist"
    for name, clause in listed.items():
        assert clause or name.endswith("/"), f"README tree: {name} has no clause"


def test_the_tree_in_the_readme_is_complete():
    """Every top-level entry, and everything inside a folder that the tree opens, is listed."""
    listed = readme_tree()
    opened = {os.path.dirname(name.rstrip("/")) for name in listed}
    missing = []
    for path in git_files():
        parts = path.relative_to(ROOT).parts
        for depth in range(len(parts)):
            inside, is_folder = "/".join(parts[:depth]), depth < len(parts) - 1
            name = "/".join(parts[: depth + 1]) + ("/" if is_folder else "")
            hidden = parts[depth].startswith((".git", "__init__"))
            if inside in opened and name not in listed and not hidden:
                missing.append(name)
    assert not sorted(set(missing))


def test_pages_name_only_what_exists():
    """Files and folders that README.md and docs/ mention are there; capitals are placeholders."""
    mention = re.compile(r"(?<![\w/.~-])(?:launch|recipes|sbtrain|parallel|ops|tests|docs|\.ci)/[\w./-]*[\w/]")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        found = set(mention.findall(page.read_text()))
        found = {name for name in found if not re.search(r"\b[A-Z]+\b(?!\.md)", name)}
        gone = [name for name in found if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
        assert not gone, f"{name_of(page)} mentions {sorted(gone)}"

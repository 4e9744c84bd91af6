"""The import arrows of the house: a room imports only what its line names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmsys"

# Room → the rooms it may import, besides itself.
KERNEL_ROOMS = {"env", "perf", "ops", "nn", "quant", "models", "optim", "memory", "parallel", "planner", "data"}
ARROWS = {
    "env": set(),
    "perf": {"env"},
    "ops": {"env", "_C"},
    "nn": {"ops"},
    "quant": {"ops", "nn"},
    "models": {"nn", "ops", "quant"},
    "optim": {"ops"},
    "memory": {"ops", "env"},
    "parallel": {"ops", "memory", "env"},
    "planner": {"perf", "parallel"},
    "data": {"env"},
    "train": KERNEL_ROOMS | {"infer"},
    "infer": KERNEL_ROOMS,
    "evaluate": KERNEL_ROOMS | {"train", "infer"},
    "align": KERNEL_ROOMS | {"train", "infer", "evaluate"},
    "integrations": KERNEL_ROOMS | {"train", "infer"},
    "doctor": KERNEL_ROOMS | {"_C"},
    "cli": KERNEL_ROOMS | {"train", "infer", "evaluate", "align", "doctor"},
    "__main__": {"cli"},
    "__init__": {"integrations", "memory", "nn", "ops", "optim"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, in full: `from llmsys import ops` counts as llmsys.ops."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "llmsys" else {node.module}
            )
            found |= names
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    room = room_of(path)
    assert room in ARROWS, f"{room} is not a room of the house"
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("llmsys.")} - {"__version__"}
    assert rooms <= ARROWS[room] | {room}, f"{room} imports {sorted(rooms)}, expected among {sorted(ARROWS[room])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_environment_is_read_in_one_place(path):
    text = path.read_text()
    if path.name != "env.py":
        assert not re.search(r"os\.environ|os\.getenv|find_spec", text)


def test_csrc_never_sees_torch():
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    assert not re.search(r"find_package\(torch|torch_|libtorch", (ROOT / "CMakeLists.txt").read_text(), re.IGNORECASE)


def test_intrinsics_are_in_one_place():
    """Kernels are written once, not once per instruction set."""
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.parent != ROOT / "csrc" / "cpu" / "simd":
            assert not re.search(r"\b_mm\d*_|\b__m\d+|intrin\.h", path.read_text()), path


def test_names_of_files():
    for path in FILES:
        assert path.stem not in {"utils", "helpers", "common", "misc"}, f"{path}: a helper lives where its noun lives"
        assert not re.search(r"_(v\d+|new|old)$", path.stem), f"{path}: replace it, git remembers"


def test_long_files_say_why():
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 400:
            assert "lines" in text.split('"""')[1].lower(), f"{path}: over 400 lines and its docstring does not say why"


def test_heavy_tools_are_imported_at_use():
    """`import llmsys` takes torch and the native module, nothing else."""
    code = (
        "import sys, torch; before = set(sys.modules); import llmsys;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = run.stdout.split()
    assert set(new) - sys.stdlib_module_names <= {"llmsys"}, new

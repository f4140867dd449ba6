"""Imports point down, and the ops need torch and numpy only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prunelm"

# A module may import its own layer's folder and every layer below; names on one line do not
# import each other.
LAYERS = [
    ["cli"],
    ["benchmarks"],
    ["study"],
    ["pruning"],
    ["decoding"],
    ["training"],
    ["metrics", "data"],
    ["models"],
    ["nn"],
    ["ops"],
    ["sparse"],
    ["triton_kernels"],
    ["gpu_index"],
    ["_C", "version"],
]
HEIGHT = {name: -depth for depth, names in enumerate(LAYERS) for name in names}
APART = {"pruning.criteria", "pruning.methods", "pruning.schedulers"}


def imported(path: Path) -> set[str]:
    """Dotted names below prunelm that a file imports, lazily or not, under either spelling."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.removeprefix("prunelm.") for a in node.names if "prunelm." in a.name}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "prunelm":
                names |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("prunelm."):
                names.add(str(node.module).removeprefix("prunelm."))
    return names


def module_files() -> list[Path]:
    top = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path not in top]


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for name in imported(path):
        top = name.split(".")[0]
        assert top in HEIGHT, f"{path.name} imports prunelm.{name}, which has no layer"
        if top != here[0]:
            assert HEIGHT[top] < HEIGHT[here[0]], f"{here[0]} must not import {top}"


@pytest.mark.parametrize("name", sorted(APART))
def test_criteria_methods_and_schedulers_stand_apart(name: str) -> None:
    path = PACKAGE / (name.replace(".", "/") + ".py")
    assert not imported(path) & (APART - {name})


def test_ops_need_torch_and_numpy_only() -> None:
    known = "{'torch', 'numpy', 'prunelm'}"
    code = (
        "import sys, torch, numpy, torch._dynamo; before = set(sys.modules); "
        "import prunelm, prunelm.ops; "
        "import importlib.metadata as m; "
        "top = {n.split('.')[0] for n in set(sys.modules) - before}; "
        f"installed = set(m.packages_distributions()); print(sorted((top & installed) - {known}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr

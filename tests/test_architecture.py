"""The architecture as a test: floors import only lower floors, core and driver know no method, imports stay light."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pquant_lightning
from pquant_lightning import CompressionMethodRegistry

PACKAGE = Path(pquant_lightning.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
FLOORS = {
    "cli": 6,
    "__main__": 6,
    "api": 5,
    "config": 5,
    "pipelines": 4,
    "callbacks": 3,
    "exporters": 3,
    "methods": 2,
    "backends": 2,
    "core": 1,
    "utils": 1,
}
OPTIONAL = {"tensorflow", "jax", "flax", "keras", "onnx", "onnxruntime", "matplotlib", "sklearn", "peft", "tensorly"}
files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@files
def test_a_floor_imports_only_lower_ones(path: Path) -> None:
    for name in imports(path):
        if name.startswith("pquant_lightning."):
            imported = name.split(".")[1]
            assert imported in FLOORS, f"{path} imports {name}: import from the module that defines it"
            lower = FLOORS[imported] < FLOORS[part(path)]
            beside = FLOORS[imported] == FLOORS[part(path)] >= 5
            assert lower or imported == part(path) or beside, f"{path}: {name}"


@files
def test_a_family_of_methods_imports_no_other(path: Path) -> None:
    if part(path) == "methods":
        family = path.relative_to(PACKAGE).parts[1]
        methods = [name for name in imports(path) if name.startswith("pquant_lightning.methods.")]
        assert all(name.split(".")[2] == family for name in methods)


@files
def test_lightning_stays_in_the_upper_floors(path: Path) -> None:
    if FLOORS[part(path)] in (1, 2):
        assert not [name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")]


@files
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not [name for name in imports(path, module_level=True) if name.split(".")[0] in OPTIONAL]


@files
def test_every_file_says_first_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith('"""')


def words(path: Path) -> set[str]:
    """Names and string literals outside of docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.update(re.findall(r"\w+", node.value))
    return found


DRIVER = [path for path in FILES if part(path) == "core" or path.name in ("base.py", "_monitors.py", "_optimizers.py")]


@pytest.mark.parametrize("path", DRIVER, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_and_driver_name_no_method(path: Path) -> None:
    methods = CompressionMethodRegistry.list_available()
    classes = [CompressionMethodRegistry.get_class(name).__name__ for name in methods]
    kinds = [kind for kind, cls in pquant_lightning.CompressedLayer.kinds.items() if "pquant" in cls.__module__]
    assert not words(path) & {*methods, *classes, *kinds, "LowRankCallback", "QATCallback"}


def test_the_import_loads_no_optional_package() -> None:
    code = f"import sys, pquant_lightning; print(sorted({OPTIONAL} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


PUBLIC = """
LowRankCallback QATCallback CompressionCallback compress_model finalize save_compressed load_compressed prepare
compression_report CompressedModule CompressionMethod LayerMethod CompressedLayer CompressionMethodRegistry
LayerAdapter register_adapter ConfigManager LowRankCompression QATCompression
"""


@pytest.mark.parametrize("name", PUBLIC.split())
def test_public_names(name: str) -> None:
    assert name in pquant_lightning.__all__
    assert getattr(pquant_lightning, name).__doc__

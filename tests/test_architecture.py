"""The house keeps its shape: floors, optional packages, names, safety; read from the source with `ast`."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch import nn

import pquant_lightning
from pquant_lightning import CompressedLayer, CompressionMethodRegistry
from pquant_lightning.core import _private

PACKAGE = Path(pquant_lightning.__file__).parent
FLOORS = {  # first part of a module's name inside the package -> floor
    "": 7,
    "__main__": 7,
    "_public": 7,
    "cli": 6,
    "_arguments": 6,
    "_commands": 6,
    "_lightning_cli": 6,
    "_targets": 6,
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
WITH_LIGHTNING = ("callbacks", "pipelines", "_lightning_cli", "_commands", "_targets", "api")
OPTIONAL = (
    "tensorflow keras ai_edge_litert jax flax onnx onnxscript onnxruntime matplotlib sklearn peft transformers "
    "tensorly tltorch"
).split()
FRAMEWORK_FILES = {  # which others import inside functions only
    "backends.lowering.jax_namespace",
    "backends.lowering.tensorflow_namespace",
    "backends._keras",
    "backends._nnx",
}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and whether it runs when the file is imported."""

    module: str
    line: int
    at_import: bool


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path

    @property
    def name(self) -> str:
        """Dotted name inside the package, "" for its `__init__`."""
        parts = self.path.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, at_import=True))

    def _imports(self, node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                inside = False
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    yield Import(f"{self._absolute(child)}.{alias.name}", child.lineno, at_import)
            yield from self._imports(child, inside)

    def _absolute(self, node: ast.ImportFrom) -> str:
        assert node.level == 0, f"{self.path}:{node.lineno}: a relative import"
        return node.module or ""

    @cached_property
    def docstrings(self) -> set[int]:
        """Ids of the string nodes that are docstrings."""
        owners = [n for n in ast.walk(self.tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        first = [owner.body[0] for owner in owners if owner.body]
        return {id(node.value) for node in first if isinstance(node, ast.Expr)}

    def calls(self, name: str) -> list[ast.Call]:
        """Calls of that name, which may be dotted."""
        nodes = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call)]
        return [n for n in nodes if ast.unparse(n.func) == name]


SOURCES = [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]
each_source = pytest.mark.parametrize("source", SOURCES, ids=[source.name or "__init__" for source in SOURCES])


def _inner(module: str) -> str | None:
    """Name inside the package, None for a foreign module."""
    if module.split(".")[0] != PACKAGE.name:
        return None
    inner = module.removeprefix(PACKAGE.name).removeprefix(".")
    return inner if inner.split(".")[0] in FLOORS else ""


@each_source
def test_each_floor_imports_only_lower_ones(source):
    own = source.name.split(".")
    assert own[0] in FLOORS, "a new part of the package: give it a floor"
    for item in source.imports:
        if (inner := _inner(item.module)) is None:
            continue
        other = inner.split(".")
        where = f"{source.path}:{item.line} imports {item.module}"
        assert FLOORS[other[0]] <= FLOORS[own[0]], where
        if own[0] in ("methods", "backends"):
            same_family = own[:2] == other[:2] if own[0] == "methods" else own[0] == other[0]
            assert same_family or FLOORS[other[0]] < FLOORS[own[0]], f"{where}, of another family"


@each_source
def test_lightning_appears_only_where_trainers_do(source):
    if source.name.split(".")[0] in WITH_LIGHTNING:
        return
    foreign = [item for item in source.imports if re.match(r"(pytorch_)?lightning(\.|$)", item.module)]
    assert not foreign


def test_lightning_is_found_where_it_is_expected():
    """Guards the test above against a search that finds nothing."""
    driver = next(source for source in SOURCES if source.name == "callbacks.base")
    assert any(item.module.startswith("lightning.") for item in driver.imports)


@each_source
def test_optional_packages_are_imported_inside_functions(source):
    early = [item for item in source.imports if item.at_import and item.module.split(".")[0] in OPTIONAL]
    assert not early or source.name in FRAMEWORK_FILES
    assert not [item for item in source.imports if item.at_import and _inner(item.module) in FRAMEWORK_FILES]


def test_importing_the_package_loads_no_optional_package():
    code = f"""
import sys, lightning.pytorch, torchmetrics
before = set(sys.modules)
import pquant_lightning
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & {set(OPTIONAL)!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@cache
def _method_names() -> list[str]:
    loaded = CompressionMethodRegistry.loaded()
    own = [cls for cls in loaded if cls.__module__.startswith(PACKAGE.name)]
    registered = [CompressionMethodRegistry.name_of(cls) for cls in own]
    kinds = {n: cls for n, cls in CompressedLayer.kinds.items() if cls.__module__.startswith(f"{PACKAGE.name}.methods")}
    classes = [cls.__name__ for cls in (*own, *kinds.values())]
    return [*registered, *kinds, *classes]


def _texts(source: Source) -> Iterator[tuple[int, str]]:
    """Identifiers and string literals outside docstrings, with their lines."""
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in source.docstrings:
            yield line, node.value
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield line, value


NEUTRAL = [s for s in SOURCES if s.name.startswith("core") or re.fullmatch(r"callbacks\.(base|_\w+)", s.name)]


@pytest.mark.parametrize("source", NEUTRAL, ids=[source.name for source in NEUTRAL])
def test_core_and_driver_know_no_method_by_name(source):
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(map(re.escape, _method_names()))})(?![a-z0-9])")
    torchs_own = "torch.ao.quantization.fx._decomposed"
    found = [(line, text) for line, text in _texts(source) if text != torchs_own and pattern.search(text)]
    assert not found


def test_the_search_for_names_finds_them():
    method = next(source for source in SOURCES if source.name == "methods.quantization.qat")
    assert any("qat" in text for _, text in _texts(method))
    assert {"low_rank", "qat", "QATCompression", "quant_linear"} <= set(_method_names())


@each_source
def test_no_print(source):
    assert not source.calls("print")


@each_source
def test_the_first_line_says_what_the_file_is(source):
    if not source.tree.body:
        return  # an empty __init__
    docstring = ast.get_docstring(source.tree)
    assert docstring
    assert source.tree.body[0].lineno == 1
    assert docstring.splitlines()[0].strip()


@each_source
def test_nothing_is_evaluated_or_unpickled(source):
    for name in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "yaml.load", "__import__"):
        assert not source.calls(name), name
    for call in source.calls("torch.load"):
        asked = [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"]
        assert asked in (["True"], ["weights_only"])  # the latter by who trusts the file, see load_compressed


@each_source
def test_no_mutable_defaults_and_no_bare_except(source):
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            assert not any(isinstance(d, ast.List | ast.Dict | ast.Set) for d in defaults), node.lineno
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, node.lineno


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _private_names(source: Source) -> Iterator[tuple[int, str]]:
    """Private attributes that are read or called, and private methods that are defined."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef) and _is_private(node.name):
            yield node.lineno, node.name


@cache
def _defined_here() -> set[str]:
    """Private names that the package gives itself: functions, classes, attributes and module constants."""
    names = set()
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


FOREIGN = [nn.Module(), nn.Conv2d(1, 1, 1), nn.Embedding(1, 1), pl.LightningModule(), pl.Callback(), pl.Trainer]


@cache
def _listed_in_private() -> set[str]:
    """Every name that core/_private.py mentions, in a string or as an identifier."""
    source = next(source for source in SOURCES if source.name == "core._private")
    return {text for _, text in _texts(source)}


@each_source
def test_private_names_of_torch_and_lightning_stand_in_one_place(source):
    ours, listed = _defined_here(), _listed_in_private()
    used = [
        (line, name)
        for line, name in _private_names(source)
        if name not in ours or any(hasattr(thing, name) for thing in FOREIGN)
    ]
    unlisted = [(line, name) for line, name in used if name not in listed]
    assert not unlisted


@each_source
def test_private_modules_and_members_of_others_are_not_imported(source):
    foreign = [item for item in source.imports if _inner(item.module) is None]
    assert not [item for item in foreign if any(map(_is_private, item.module.split(".")))]


def test_private_names_are_found():
    base = next(source for source in SOURCES if source.name == "core.compressed_layer")
    assert "_apply" in {name for _, name in _private_names(base)}
    assert hasattr(_private, "resume_path")


PUBLIC = (
    "LowRankCallback QATCallback CompressionCallback compress_model finalize save_compressed load_compressed "
    "compression_report prepare CompressedModule CompressionMethod LayerMethod CompressedLayer "
    "CompressionMethodRegistry LayerAdapter register_adapter ConfigManager LowRankCompression QATCompression "
    "PTQCallback PTQCompression QuantizationCompression PruningCallback UnstructuredPruning PruningCompression "
    "StructuredPruningCallback StructuredPruning "
    "FactorizationCallback FactorizationCompression add_proximal_step "
    "LoRACallback LoRACompression merge_lora unmerge_lora save_adapter load_adapter "
    "TensorTrainCallback TensorTrainCompression TuckerCallback TuckerCompression CPCallback CPCompression "
    "TensorNetworkCompression "
    "MixedPrecisionCallback MixedPrecisionCompression "
    "EvaluationPipeline EvaluationReport benchmark_models CompressionPipeline CompressionResult PipelineStage "
    "DistillationCallback CompressionReportCallback ModelAnalysis analyze_model "
    "export_model ExportResult get_backend BackendUnavailable register_lowering to_jax to_nnx to_keras load_jax"
).split()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    assert name in pquant_lightning.__all__
    assert getattr(pquant_lightning, name).__doc__


def test_all_is_sorted_complete_and_shadows_nothing():
    exported = pquant_lightning.__all__
    assert exported == sorted(exported)
    assert all(hasattr(pquant_lightning, name) for name in exported)
    assert not set(exported) & set(dir(builtins))


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("compress_model", "model, method_or_config, *, train_loader=None, val_loader=None, inplace=False, **options"),
        ("finalize", "model, inplace=False"),
        ("save_compressed", "model, path"),
        ("load_compressed", "model_or_class, path, *, weights_only=True, **init_kwargs"),
        ("prepare", "model"),
        (
            "add_proximal_step",
            "optimizer, penalty='group_lasso', strength=0.001, *, params=None, dim=0, every=1",
        ),
    ],
)
def test_signatures(name, signature):
    actual = inspect.signature(getattr(pquant_lightning, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in actual.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({signature})"


def test_registry_names_and_options():
    assert {"low_rank", "qat", "ptq", "quantization"} <= set(CompressionMethodRegistry.list_available())
    options = {name: set(inspect.signature(getattr(pquant_lightning, name)).parameters) for name in PUBLIC[:2]}
    assert {"rank", "energy", "param_ratio", "include", "exclude", "name"} <= options["LowRankCallback"]
    assert {"bits", "weight_bits", "act_bits", "include", "exclude", "name"} <= options["QATCallback"]
    assert {"quantizer", "start"} <= options["QATCallback"]
    assert {"bits", "scheme", "group_size", "name"} <= set(inspect.signature(pquant_lightning.PTQCallback).parameters)


def test_there_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pquant_lightning.__version__)


def test_one_function_copies() -> None:
    """`copy.deepcopy` gives up on a model that holds a lock or a file."""
    using = [
        path.name for path in PACKAGE.rglob("*.py") if re.search(r"\bdeepcopy\b", path.read_text(encoding="utf-8"))
    ]
    assert using == ["copying.py"]

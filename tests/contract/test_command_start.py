"""`pquant --help` and mistakes are answered before torch is loaded; other ways to use the package load all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from pquant_lightning import CompressionMethodRegistry
from pquant_lightning.methods import BUILT_IN

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "lightning_fabric", "torchmetrics", "numpy")

# what the installed script does, and whether it has loaded what takes seconds
SCRIPT = f"""
import sys
sys.argv = ["/usr/bin/pquant", *sys.argv[1:]]
from pquant_lightning.cli import main
try:
    main()
finally:
    loaded = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not loaded, loaded
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "compress   Compress a model"),
        ([], 2, "pquant COMMAND --help"),
        (["compres"], 2, "Did you mean 'compress'"),
        (["export", "--help"], 0, "litert"),
        (["plan", "--modle", "x"], 2, "Did you mean '--model'"),
        (["plan", "--model", "a.B", "--method", "low_rnk"], 2, "Did you mean 'low_rank'"),
        (["export", "--model", "a.B", "--output", "a.tflite", "--format", "onnx"], 2, "is that of 'tflite'"),
        (["evaluate", "--model", "a.B", "--compressed", "none.safetensors"], 2, "there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_answer_needs_no_torch(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def test_the_module_answers_without_torch_too() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pquant_lightning", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pquant_lightning.cli" in loaded
    assert not loaded & set(HEAVY)


def test_public_names_are_there_in_the_command_too() -> None:
    """A user's module that a command imports says `from pquant_lightning import ...`."""
    code = """
import sys
sys.argv = ["pquant"]
import pquant_lightning
assert "torch" not in sys.modules
assert not hasattr(pquant_lightning, "NoSuchName")
from pquant_lightning import QATCallback
from pquant_lightning import *
assert LowRankCallback(rank=2).method.name == "low_rank"
assert pquant_lightning.CompressionMethodRegistry.loaded()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_list_of_methods_is_that_of_the_registry() -> None:
    own = [name for name in CompressionMethodRegistry.list_available() if name in BUILT_IN]
    assert own == list(BUILT_IN)
    for name, module in BUILT_IN.items():
        assert CompressionMethodRegistry.get_class(name).__module__ == f"pquant_lightning.methods.{module}"
    ours = [cls for cls in CompressionMethodRegistry.loaded() if cls.__module__.startswith("pquant_lightning.")]
    assert len(ours) == len(BUILT_IN)

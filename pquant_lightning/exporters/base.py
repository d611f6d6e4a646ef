"""What an exporter is, what an export gives, and how files appear whole or not at all."""

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.backends.base import as_numpy, require
from pquant_lightning.backends.lowering.trace import Traced, tensors_in, with_tensors
from pquant_lightning.core.errors import PQuantError, named

Run = Callable[[Sequence[Tensor]], list[numpy.ndarray[Any, Any]]]


PACKED = {8: "int8"} | dict.fromkeys((2, 3, 4, 5, 6, 7), "packed, and unpacked as the graph runs")  # bits of weights


class ExportError(PQuantError):
    """An artefact cannot be written, or is not what the model is."""


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the file or directory.
        format: its format.
        size_bytes: bytes on disk, of all files.
        ratio: these bytes / the bytes of the uncompressed model's parameters and buffers in float32.
        max_error: largest difference to the model in PyTorch, relative to the largest output, over two batch sizes;
            None where nothing was compared.
        integer_weights: whether weights are integers in the file.
        inputs: names of the tensors that go in.
        outputs: names of the tensors that come out.
        target: the processors that the file is made for, "any" or "vnni"; None where the format has no such choice.
        rms_error: root mean square of the differences in `max_error`, relative to that of the outputs.
        rounding_error: the part of it that the format's own rounding of inputs costs, as `accuracy_level` allows it.
        accuracy_level: of ONNX's `MatMulNBits`; None where the format has no such choice.
        widened: layers whose weights take more bits in the file than they have, and how many.
    """

    path: Path
    format: str
    size_bytes: int
    ratio: float
    max_error: float | None
    integer_weights: bool
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    target: str | None = None
    rms_error: float | None = None
    rounding_error: float | None = None
    accuracy_level: int | None = None
    widened: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        error = "" if self.max_error is None else f", largest error {self.max_error:.1e}"
        if self.rms_error:
            error += f" ({self.rms_error:.1e} rms)"
        kind = "integer" if self.integer_weights else "float"
        size = f"{self.size_bytes:,} bytes ({self.ratio:.1%} of float32)"
        if self.rounding_error:
            error += f", {self.rounding_error:.1e} of it by rounding inputs"
        if self.widened:
            error += f"; {named(self.widened)} stored in more bits"
        return f"{self.path}: {self.format}, {size}, {kind} weights{error}"


class Exporter(ABC):
    """One format."""

    is_directory: ClassVar[bool] = False
    marker: ClassVar[str] = ""  # the file that every directory of this format holds
    finalizes: ClassVar[bool] = True  # the copy that is written is the deployed form
    extra: ClassVar[str | None] = None  # the extra of our package that it needs
    packages: ClassVar[tuple[str, ...]] = ()
    bits: ClassVar[dict[int, str]] = {}  # bits of weights that the format can hold, and how
    rounds_inputs: ClassVar[bool] = False  # its runtime rounds the inputs of layers with integer weights by itself
    least_integers: ClassVar[int] = 0  # weights of fewer values stay in floating point
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}  # options of this format alone, and their values; first: default

    @classmethod
    def chosen(cls, **given: Any) -> Self:
        """An exporter with these choices, by name, all of which are in `choices`."""
        assert not given
        return cls()

    def described(self, model: nn.Module) -> dict[str, Any]:
        """The choices of this exporter, and what they make of a finalized model, as `ExportResult` has them."""
        return {}

    def check_installed(self) -> None:
        """Checks that the packages are there.

        Raises:
            BackendUnavailable: one is not.
        """
        for package in self.packages:
            require(package, self.extra or "all")

    def twin(self, model: nn.Module) -> nn.Module:
        """What is traced in the place of a finalized model; the model itself is not changed."""
        return model

    def reference(self, traced: Traced, path: Path) -> nn.Module:
        """What an artefact is to compute, as a module: the model, or one with the grids that the format has."""
        return traced.model

    @abstractmethod
    def write(self, traced: Traced, path: Path) -> None:
        """Writes the artefact: a file, or a directory that exists already."""

    @abstractmethod
    def open(self, path: Path, traced: Traced) -> Run:
        """The artefact in its own runtime."""

    @abstractmethod
    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        """For each weight in the artefact its type ("float32", "int8", ...) and bytes."""


def run_in_torch(module: Callable[..., Any], traced: Traced) -> Run:
    """A module of torch as the runtime of an artefact."""

    def run(inputs: Sequence[Tensor]) -> list[numpy.ndarray[Any, Any]]:
        args, kwargs = with_tensors((traced.args, traced.kwargs), inputs)
        with torch.no_grad():
            return [as_numpy(tensor) for tensor in tensors_in(module(*args, **kwargs))]

    return run


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextlib.contextmanager
def appearing(path: Path, is_directory: bool) -> Iterator[Path]:
    """A temporary place beside a path, which takes its name (and the place of what is there) when the block has ended.

    Raises:
        ExportError: nothing can be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_directory:
            temporary.mkdir()
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}. Nothing was left behind.") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)

"""Artefacts: the deployed model as one safetensors file, streamed layer by layer, each shared tensor once."""

import contextlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as distributed_load

from pquant_lightning.core.compressed_layer import decode_spec, read_specs
from pquant_lightning.core.deploy import (
    deployed_form,
    finalize_across_layers,
    iter_deployed,
    pack_bits,
    share_copy,
    sparse_count,
    unpack_bits,
)
from pquant_lightning.core.errors import CheckpointError, a_or_an
from pquant_lightning.core.hyperparameters import Arguments, arguments_of

FORMAT_VERSION = 1
ARTIFACT_NAME = "model.safetensors"
_JSON = "pquant_json"
_MOST_NAMES = 8  # in a message
_BITMAP, _VALUES = "#bitmap", "#values"  # endings of the two tensors that stand for one with many zeros
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def artifact_metadata(model: nn.Module) -> dict[str, str]:
    """The class name and what is known of the arguments that the model was made with, which make it again."""
    return {"class": type(model).__qualname__, **arguments_of(model).to_metadata()}


def write_artifact(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> int:
    """Writes the deployed form of a model and returns the bytes of the file; the model is not changed.

    Layers are finalized one at a time, twice, so that the memory needed is the model plus one layer. A tensor with many
    zeros is stored as one bit per value and the other values, where that takes at most nine tenths of its bytes. The
    file appears under its name when it is complete.

    Args:
        model: training form or deployed form.
        path: a `.safetensors` file.
        metadata: text entries for the file's header.

    Raises:
        CheckpointError: a module's extra state or a tensor's type cannot be stored.
    """
    header, offsets = _layout(model, metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for name, tensor in _deployed_tensors(model):
            for part, values in _parts(name, tensor, offsets).items():
                file.seek(start + offsets[part])
                file.write(_raw(values))
    return path.stat().st_size


def artifact_bytes(model: nn.Module, metadata: dict[str, str] | None = None) -> int:
    """Bytes of the file that `write_artifact` would write."""
    header, _ = _layout(model, metadata or {})
    return 8 + len(header) + max(e["data_offsets"][1] for n, e in json.loads(header).items() if n != "__metadata__")


def file_bytes(model: nn.Module, like: nn.Module | None = None) -> int:
    """Bytes of the file that `save_compressed` would write.

    Args:
        model: training form, deployed form, or a structure on "meta".
        like: whose class and hyperparameters the file names; None: the model's own.
    """
    return artifact_bytes(model, artifact_metadata(model if like is None else like))


def _entries(deployed: nn.Module) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
    """Stored tensors by name, and the other names of shared ones."""
    first_names: dict[int | bytes, str] = {}
    tensors, aliases = [], {}
    state = {name: _storable(name, value) for name, value in deployed.state_dict(keep_vars=True).items()}
    for name, tensor in state.items():
        identity = bytes(tensor.tolist()) if _is_text(name, tensor) else id(tensor)
        if (owner := first_names.setdefault(identity, name)) != name:
            aliases[name] = owner
        else:
            tensors.append((name, tensor))
    return tensors, aliases


def _filled(bitmap: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The tensor of which a bitmap and the values that are not zero were stored."""
    dense = torch.zeros(shape, dtype=values.dtype)
    if bitmap.numel() != -(-dense.numel() // 8):
        raise ValueError(f"a bitmap of {bitmap.numel()} bytes for a tensor of shape {tuple(shape)}")
    dense[unpack_bits(bitmap, shape)] = values
    return dense


def _storable(name: str, value: Any) -> Tensor:
    """A tensor as it is, a user's plain extra state as JSON text in a uint8 tensor."""
    if isinstance(value, Tensor) and value.dtype in _DTYPES:
        return value
    try:
        text = "" if isinstance(value, Tensor) else json.dumps({_JSON: value})
        if json.loads(text) == {_JSON: value}:
            return torch.tensor(list(text.encode()), dtype=torch.uint8)
    except (TypeError, ValueError):
        pass
    kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
    raise CheckpointError(
        f"{name!r} is of type {kind}, which a safetensors file cannot hold. Save with the ending .pt, or keep such "
        "state out of the state dict."
    )


def _restored(name: str, tensor: Tensor) -> Any:
    """Undoes `_storable`."""
    start = f'{{"{_JSON}":'.encode()
    if _is_text(name, tensor) and bytes(tensor[: len(start)].tolist()) == start:
        return json.loads(bytes(tensor.tolist()))[_JSON]
    return tensor


def _is_text(name: str, tensor: Tensor) -> bool:
    """A spec or a user's JSON; equal ones are stored once."""
    return name.endswith("_extra_state") and tensor.dtype == torch.uint8 and tensor.dim() == 1


def _layout(model: nn.Module, metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of the file, and where each stored tensor begins in the data behind it."""
    counts: dict[str, int] = {}
    shared: dict[str, dict[str, str]] = {}  # told by the values: on "meta" two tensors of one shape look the same
    for name, tensor in _deployed_tensors(model):
        if (count := sparse_count(tensor)) is not None:
            counts[name] = count
        if name.endswith("._extra_state") and (spec := decode_spec(tensor)) is not None:
            shared[name.removesuffix("._extra_state")] = spec.get("tied_to", {})
    tensors, aliases = _entries(deployed_form(model, shared))
    sparse = {name: list(tensor.shape) for name, tensor in tensors if name in counts}
    stored = {"format": "pquant_lightning", "version": str(FORMAT_VERSION), "aliases": json.dumps(aliases), **metadata}
    header: dict[str, Any] = {"__metadata__": {**stored, "sparse": json.dumps(sparse)} if sparse else stored}
    pieces = []  # name, type, shape
    for name, tensor in tensors:
        if name in sparse:
            pieces.append((name + _VALUES, tensor.dtype, [counts[name]]))
            pieces.append((name + _BITMAP, torch.uint8, [-(-tensor.numel() // 8)]))
        else:
            pieces.append((name, tensor.dtype, list(tensor.shape)))
    offsets, position = {}, 0
    for name, dtype, shape in sorted(pieces, key=lambda piece: (-piece[1].itemsize, piece[0])):
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [position, end]}
        offsets[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offsets


def _deployed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    shell = share_copy(model)
    finalize_across_layers(shell)
    done: list[str] = []
    for name, final in iter_deployed(shell):
        layer = shell.get_submodule(name)
        uses = [f"{use}." if use else "" for use, m in shell.named_modules(remove_duplicate=False) if m is layer]
        for key, tensor in final.state_dict().items():
            yield from ((use + key, tensor) for use in uses)
        done += uses
    for key, tensor in shell.state_dict().items():
        if not any(key.startswith(prefix) for prefix in done):
            yield key, tensor


def _parts(name: str, tensor: Any, offsets: dict[str, int]) -> dict[str, Tensor]:
    """What is stored of a tensor, by name: itself, its bitmap and values, or nothing where an equal one is stored."""
    if name + _BITMAP in offsets:
        flat = tensor.detach().flatten()
        kept = flat != 0
        return {name + _VALUES: flat[kept], name + _BITMAP: pack_bits(kept)}
    return {name: _storable(name, tensor)} if name in offsets else {}


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when the block has ended well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_state_dict(model: nn.Module, path: Path) -> int:
    """Writes the deployed form's state dict with `torch.save`; returns the bytes of the file."""
    shell = share_copy(model)
    finalize_across_layers(shell)
    state = dict(_deployed_tensors(shell))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(state, file)
    return path.stat().st_size


def read_artifact(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict (shared tensors under all their names) and the hyperparameters in a `.safetensors` file.

    Raises:
        CheckpointError: it is truncated, damaged, or of a newer version.
    """
    state, metadata = _read(path)
    return state, Arguments.from_metadata(metadata).known


def read_model(path: Path) -> tuple[dict[str, Tensor], Arguments]:
    """The state dict in a `.safetensors` file, and what it says about the arguments of the model.

    Raises:
        CheckpointError: as `read_artifact`.
    """
    state, metadata = _read(path)
    return state, Arguments.from_metadata(metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: _restored(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, shape in json.loads(metadata.get("sparse", "{}")).items():
            state[name] = _filled(state.pop(name + _BITMAP), state.pop(name + _VALUES), torch.Size(shape))
        aliases = json.loads(metadata.get("aliases", "{}"))
        state.update({name: state[owner] for name, owner in aliases.items()})
        version = int(metadata.get("version", FORMAT_VERSION))
        if version <= FORMAT_VERSION:
            Arguments.from_metadata(metadata)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file of ours: {error!r}.") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has version {version}; this release reads up to {FORMAT_VERSION}.")
    return state, metadata


def read_checkpoint(path: Path, weights_only: bool | None = True) -> dict[str, Any]:
    """A file written by `torch.save`, memory-mapped, tensors and plain data only: no code is run from it.

    Args:
        path: the file.
        weights_only: False reads objects, too, which can run code from the file; None leaves it to torch.

    Raises:
        CheckpointError: it is missing, truncated, or holds anything but tensors and plain data.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects other than tensors and plain data ({_foreign_classes(path, error)}); it was not "
            "read, because loading them can run code from the file. If you trust it, give weights_only=False, to "
            "load_compressed or to the fit, validate, test or predict of the Trainer."
        ) from error
    except Exception as error:  # damaged bytes make the unpickler fail in any way
        raise CheckpointError(f"{path} is truncated or no checkpoint: {str(error).partition(chr(10))[0]}.") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds {a_or_an(type(checkpoint).__name__)}, not a checkpoint or state dict.")
    return checkpoint


def _foreign_classes(path: Path, error: Exception) -> str:
    """The full names of the classes and functions in a checkpoint that are in the way."""
    try:
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # an old format, or a damaged one
        found = []
    if not found:
        return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0]
    return ", ".join(found[:_MOST_NAMES]) + (", ..." if len(found) > _MOST_NAMES else "")


def read_sharded_specs(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The plain data, the specs and the tensors' shapes ("meta") of a sharded checkpoint directory.

    Raises:
        CheckpointError: the directory is no sharded checkpoint of Lightning.
    """
    if not (path / "meta.pt").exists():
        raise CheckpointError(f"{path} is a directory, but no sharded checkpoint (it has no meta.pt).")
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes, wanted = {}, {}
    for key, entry in entries.items():
        name = key.removeprefix("state_dict.")
        if isinstance(entry, TensorStorageMetadata) and name != key:
            shapes[name] = torch.empty(entry.size, device="meta", dtype=entry.properties.dtype)
            if name.endswith("._extra_state"):
                wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    distributed_load(wanted, checkpoint_id=path, no_dist=True)
    specs = read_specs({key.removeprefix("state_dict."): tensor for key, tensor in wanted.items()})
    return read_checkpoint(path / "meta.pt"), specs, shapes


def share_equal_storage(model: nn.Module) -> None:
    """Parameters that view the same memory become one `Parameter` again, after a load that assigned them by name."""
    owners: dict[tuple[int, torch.Size, tuple[int, ...]], nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() > 0:
                key = (parameter.data_ptr(), parameter.shape, parameter.stride())
                setattr(module, name, owners.setdefault(key, parameter))

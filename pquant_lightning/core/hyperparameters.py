"""The arguments that a model was made with: what a file can hold of them, and what has to be given again.

Plain data are stored as JSON. What JSON does not know (tuples, paths, NumPy numbers, namespaces, small arrays) is
stored as `{"pquant": kind, "value": ...}`. Modules, functions, classes and enums are not stored, as a file must not
name what to import: it says that they are missing, and what they were.
"""

import argparse
import contextlib
import enum
import inspect
import json
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.core._private import HPARAMS_NAME
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.structure import absolute_path

_TAG = "pquant"
_MOST_VALUES = 10_000  # of an array in a header
_PLAIN = (type(None), bool, int, float, str)
_PATHS = (Path, type(Path()), PurePath, type(PurePath()))


class AttributeDict(dict[str, Any]):
    """A dict whose entries are attributes, too, as Lightning's own."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"There is no {name!r}, only {', '.join(map(repr, self))}.") from None


def _array(value: Mapping[str, Any]) -> Any:
    return numpy.array(value["values"], dtype=value["dtype"]).reshape(value["shape"])


def _tensor(value: Mapping[str, Any]) -> Tensor:
    return torch.tensor(value["values"], dtype=_named_dtype(value["dtype"])).reshape(value["shape"])


def _named_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return found


# what is behind each tag, from its decoded value
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "size": torch.Size,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,  # of pairs
    "attributes": AttributeDict,
    "namespace": lambda value: argparse.Namespace(**value),
    "simple_namespace": lambda value: types.SimpleNamespace(**value),
    "path": Path,
    "complex": lambda value: complex(*value),
    "bytes": bytes.fromhex,
    "dtype": _named_dtype,
    "device": torch.device,
    "array": _array,
    "tensor": _tensor,
}
_SEQUENCES: dict[type, str] = {tuple: "tuple", torch.Size: "size", set: "set", frozenset: "frozenset"}


def encode(value: Any) -> Any:
    """A value as JSON-able data that `decode` makes the same value of.

    Raises:
        TypeError: it is of a type that is not stored.

    >>> decode(encode({"widths": (8, 4), "root": Path("a")})) == {"widths": (8, 4), "root": Path("a")}
    True
    """
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind in _SEQUENCES:
        return {_TAG: _SEQUENCES[kind], "value": [encode(item) for item in value]}
    if kind in (dict, OrderedDict):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: encode(item) for key, item in value.items()}
        return {_TAG: "dict", "value": [[encode(key), encode(item)] for key, item in value.items()]}
    tag, content = _tagged(value, kind)
    return {_TAG: tag, "value": content} if tag else content


def _tagged(value: Any, kind: Any) -> tuple[str, Any]:
    """The tag and the content of what JSON does not know; no tag where a plain value stands for it."""
    if isinstance(value, dict) and kind.__name__ == "AttributeDict":
        return "attributes", encode(dict(value))
    if kind in (argparse.Namespace, types.SimpleNamespace):
        return "namespace" if kind is argparse.Namespace else "simple_namespace", encode(vars(value))
    if kind in _PATHS:
        return "path", str(value)
    if kind is complex:
        return "complex", [value.real, value.imag]
    if kind is bytes:
        return "bytes", value.hex()
    if kind in (torch.dtype, torch.device):
        return kind.__name__, str(value).removeprefix("torch.")
    if isinstance(value, numpy.bool_ | numpy.integer | numpy.floating):
        return "", value.item()
    if kind is numpy.ndarray and value.dtype.kind in "biuf" and value.size <= _MOST_VALUES:
        return "array", {"dtype": str(value.dtype), "shape": list(value.shape), "values": value.ravel().tolist()}
    if kind is Tensor and not value.requires_grad and not value.is_complex() and value.numel() <= _MOST_VALUES:
        flat = value.detach().cpu().flatten().tolist()
        dtype = str(value.dtype).removeprefix("torch.")
        return "tensor", {"dtype": dtype, "shape": list(value.shape), "values": flat}
    raise TypeError(f"{described(value)} is not stored")


def decode(data: Any) -> Any:
    """The value that `encode` has made such data of; names of anything else are errors, and nothing is imported.

    Raises:
        ValueError: the data are not of `encode`.
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if _TAG not in data:
        return {key: decode(item) for key, item in data.items()}
    if data[_TAG] not in _DECODERS:
        raise ValueError(f"unknown kind of hyperparameter {data[_TAG]!r}")
    return _DECODERS[data[_TAG]](decode(data["value"]))


def described(value: Any) -> str:
    """What a value is, for a reader who is to give one like it.

    >>> described(nn.ReLU), described(nn.ReLU()), described(torch.tanh)
    ('the class torch.nn.modules.activation.ReLU', 'a torch.nn.modules.activation.ReLU', 'the function torch.tanh')
    """
    if isinstance(value, enum.Enum):
        return f"the {type(value).__module__}.{value}"
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        kind = "class" if isinstance(value, type) else "function"
        module = getattr(value, "__module__", None) or "torch"
        return f"the {kind} {module}.{value.__qualname__}".replace("._VariableFunctionsClass.", ".").replace(
            "torch._VariableFunctions.", "torch."
        )
    kind_of = type(value)
    return f"a {kind_of.__module__}.{kind_of.__qualname__}".replace(" builtins.", " ")


@dataclass(frozen=True)
class Arguments:
    """What is known of the arguments that a model was made with.

    Attributes:
        known: values by name.
        missing: what the model was made with and cannot be stored: a description by name.
        unknown: arguments that have a default and that the model did not keep.
        holder: the one argument that takes `known` as a whole (`def __init__(self, hparams)`), if so.
    """

    known: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    holder: str | None = None

    @classmethod
    def of_values(cls, model_class: type[nn.Module], known: dict[str, Any], holder: str | None) -> "Arguments":
        """From the values that a model of that class has kept, and the name of the argument that held them."""
        parameters = _parameters(model_class)
        holder = holder if holder in parameters and holder not in known else None
        unknown = [n for n, p in parameters.items() if n not in known and p.default is not p.empty]
        return cls(known, {}, () if holder else tuple(unknown), holder)

    def for_class(self, cls: type[nn.Module], given: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for a class; those it does not take are left out. `...` stands for nothing given.

        Raises:
            OptionError: one is missing that neither the file nor the caller knows.
        """
        given = {name: value for name, value in given.items() if value is not ...}
        saved = self.known
        if self.holder is not None and self.holder in _parameters(cls):
            saved = {self.holder: AttributeDict(self.known)}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in _signature(cls))
        found = {n: v for n, v in saved.items() if takes_all or n in _parameters(cls)} | given
        of_holder = self.holder in found and self.holder in given
        missing = {} if of_holder else {n: what for n, what in self.missing.items() if n not in given}
        required = [n for n, p in _parameters(cls).items() if p.default is p.empty and n not in found]
        missing |= {n: "" for n in required if n not in missing}
        if missing:
            raise OptionError(_ask(cls, missing))
        return found

    def not_known(self, cls: type[nn.Module], given: Mapping[str, Any]) -> list[str]:
        """Arguments for which a class would take its defaults, whatever the saved model had."""
        return [name for name in self.unknown if name in _parameters(cls) and given.get(name, ...) is ...]

    def differences(self, other: "Arguments") -> dict[str, tuple[Any, Any]]:
        """Arguments that both know with different values: both values by name."""
        found = {}
        for name in self.known.keys() & other.known.keys():
            mine, theirs = self.known[name], other.known[name]
            with contextlib.suppress(TypeError, ValueError, RecursionError):  # objects are not compared
                if json.dumps(encode(mine)) != json.dumps(encode(theirs)):
                    found[name] = (mine, theirs)
        return dict(sorted(found.items()))

    def to_metadata(self) -> dict[str, str]:
        """As text entries for a file's header; `from_metadata` reads them."""
        entries = {"hparams": json.dumps({name: encode(value) for name, value in self.known.items()})}
        if self.missing:
            entries["hparams_missing"] = json.dumps(self.missing)
        if self.unknown:
            entries["hparams_unknown"] = json.dumps(self.unknown)
        if self.holder is not None:
            entries["hparams_holder"] = self.holder
        return entries

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Arguments":
        """What a header says; nothing is known where it does not.

        Raises:
            ValueError, TypeError, KeyError: the entries are damaged.
        """
        known = decode(dict(json.loads(metadata.get("hparams", "{}"))))
        missing = dict(json.loads(metadata.get("hparams_missing", "{}")))
        if not all(isinstance(what, str) for what in missing.values()):
            raise TypeError(f"descriptions of hyperparameters are text, not {missing!r}")
        unknown = tuple(map(str, json.loads(metadata.get("hparams_unknown", "[]"))))
        return cls(dict(known), missing, unknown, metadata.get("hparams_holder"))


def _ask(cls: type[nn.Module], missing: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name} ({what})" if what else name for name, what in missing.items())
    calls = ", ".join(f"{name}=..." for name in missing)
    return (
        f"{cls.__name__} was made with arguments that the file does not hold: {listed}. Pass {calls} to "
        "load_compressed, or a model that is made already."
    )


def _signature(cls: type[nn.Module]) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in _signature(cls) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def arguments_of(model: nn.Module) -> Arguments:
    """What a model knows of its own arguments: a LightningModule's `save_hyperparameters` keeps them.

    An argument that it did not keep counts as missing where an attribute of that name has another value than its
    default, and as unknown otherwise.
    """
    hparams = getattr(model, "hparams", None)
    saved = {str(name): value for name, value in hparams.items()} if isinstance(hparams, Mapping) else {}
    kept = Arguments.of_values(type(model), saved, getattr(model, HPARAMS_NAME, None))
    known: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, value in kept.known.items():
        if name.startswith("_"):  # LightningCLI's own notes
            continue
        if "_instantiator" in saved and isinstance(value, Mapping) and "class_path" in value:
            missing[name] = f"a {value['class_path']}"
            continue
        try:
            json.dumps(encode(value))
            known[name] = value
        except (TypeError, ValueError, RecursionError):
            if not _is_default(type(model), name, value):
                missing[name] = described(value)
    attributes = _attributes(model)
    defaults = {name: parameter.default for name, parameter in _parameters(type(model)).items()}
    changed = {
        name: f"its attribute is {attributes[name]!r}"
        for name in kept.unknown
        if type(attributes.get(name)) in _PLAIN and attributes.get(name, defaults[name]) != defaults[name]
    }
    unknown = tuple(name for name in kept.unknown if name not in changed)
    return Arguments(known, missing | changed, unknown, kept.holder)


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The model's own attributes, with the values from before channels were taken out of it."""
    found = dict(vars(model))
    for name, layer in compressed_layers(model).items():
        for path, values in layer.spec.get("group", {"attributes": {}})["attributes"].items():
            if absolute_path(name, path) == "":
                found.update({attribute: value["before"] for attribute, value in values.items()})
    return found


def _is_default(cls: type[nn.Module], name: str, value: Any) -> bool:
    """Whether an argument is the very object that its default is."""
    parameter = _parameters(cls).get(name)
    return parameter is not None and parameter.default is value


def loading_line(model: nn.Module, path: Path | str) -> str:
    """The line of Python that loads a model from a file, with `...` for what only the reader has."""
    missing = arguments_of(model).missing
    given = "".join(f", {name}=..." for name in missing)
    notes = "".join(f"\n    # {name}: {what}" for name, what in missing.items())
    return f"load_compressed({type(model).__name__}, {str(path)!r}{given}){notes}"

"""Checkpoints without the frozen weights: they name the base that they need, and are completed from it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, compressed_layers
from pquant_lightning.core.errors import CheckpointError, known
from pquant_lightning.core.layer_adapter import as_torch

OMITTED = "pquant_omitted"  # in the state dict: the note of what was left out, JSON text as uint8
# in the state dict of a checkpoint with compressed layers: torch's error, in a model that does not know them, lists it
HINT = "(this checkpoint is compressed; load it with pquant_lightning.load_compressed(Class, path))"
_SAMPLE = 4096  # values of each tensor that go into a fingerprint
_ORDINARY = ("weight", "bias")


def omit_frozen(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the frozen weights that the uncompressed model (or the deployed one below) has, too.

    Args:
        model: its compressed layers may be wrappers (`wraps`); what other kinds have made of a weight stays.
        state: of the whole model; not changed.

    Returns:
        The other tensors, and a note that `complete` reads; the same tensors where nothing is frozen.
    """
    own = _base_tensors(model)
    omitted = {name: plain for plain, (name, tensor) in own.items() if not tensor.requires_grad and name in state}
    if not omitted:
        return dict(state)
    note = {
        "names": omitted,
        "base": _fingerprint((plain, own[plain][1]) for plain in omitted.values()),
        "model": type(model).__name__,
    }
    kept = {name: tensor for name, tensor in state.items() if name not in omitted}
    return {**kept, OMITTED: torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)}


def complete(model: nn.Module, state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Puts the model's own weights where a state dict leaves them out, in place; a whole one only loses its hint.

    Raises:
        CheckpointError: the model is not the base that the state dict was written for; both are named.
    """
    state.pop(prefix + HINT, None)
    note = state.pop(prefix + OMITTED, None)
    if note is None:
        return
    try:
        content = json.loads(bytes(note.tolist()))
        names, base, writer = dict(content["names"]), str(content["base"]), str(content["model"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The note of what the checkpoint leaves out is damaged: {error!r}.") from error
    own = _base_tensors(model)
    for name, plain in names.items():
        if plain not in own:
            raise CheckpointError(
                f"The checkpoint leaves out {name!r}, which it expects in the base as {plain!r}; this "
                f"{type(model).__name__} has none. Load it into the {writer} it was trained on (base {base}). "
                f"{known(plain, own)}"
            )
    found = _fingerprint((plain, own[plain][1]) for plain in names.values())
    if found != base:
        raise CheckpointError(
            f"The checkpoint holds only what was trained, on a {writer} with the base weights {base}; this "
            f"{type(model).__name__} has the base weights {found}. Load those base weights into the model first."
        )
    state.update({prefix + name: own[plain][1].detach() for name, plain in names.items()})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits for the names, shapes and values of tensors, whatever their floating-point type.

    A sample of 4,096 values of each goes in, rounded to bfloat16.

    >>> fingerprint({"w": torch.zeros(3)}) == fingerprint({"w": torch.zeros(3, dtype=torch.float16)})
    True
    """
    return _fingerprint(tensors.items())


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _base_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """What a base consists of, by its name in the plain model: the name in this model, and the tensor.

    These are the parameters outside of compressed layers and inside of what wrappers wrap, in the layout of ordinary
    layers, and there, of deployed layers, the tensors that stand for parameters.
    """
    layers = compressed_layers(model)
    found: dict[str, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        around = [outer for outer in layers if outer and (name == outer or name.startswith(f"{outer}."))]
        plain = plain_name(name, layers)
        left = [outer for outer in around if not _is_inside_wrapped(name, outer, layers[outer])]
        if left not in ([], [name]):
            continue
        for own, tensor in own_tensors(module).items():
            found[f"{plain}.{own}" if plain else own] = (f"{name}.{own}" if name else own, tensor)
    return found


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer in the layout of an ordinary one, or of a deployed layer what stands for them."""
    if isinstance(module, CompressedLayer):
        names = (*module.parameter_buffers, *module.derived_tensors) if module.deployed else _ORDINARY
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        return {name: tensor for name, tensor in own.items() if name in names}
    ordinary = as_torch(module)
    return dict((module if ordinary is None else ordinary).named_parameters(recurse=False))


def _is_inside_wrapped(name: str, outer: str, layer: CompressedLayer) -> bool:
    return layer.wraps is not None and f"{name}.".startswith(f"{outer}.{layer.wraps}.")


def plain_name(name: str, layers: Mapping[str, CompressedLayer]) -> str:
    """A module's name without the parts that wrappers have put in: `fc1.base` is `fc1`."""
    for outer in sorted(layers, key=len, reverse=True):
        if _is_inside_wrapped(name, outer, layers[outer]):
            name = outer + name[len(outer) + 1 + len(layers[outer].wraps or "") :]
    return name

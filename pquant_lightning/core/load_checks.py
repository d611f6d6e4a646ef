"""What is compared between a model and the file that is loaded into it, where the shapes of tensors say nothing."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pquant_lightning.core.errors import CheckpointError
from pquant_lightning.core.layer_adapter import FUSED, NORMS, as_torch, layer_spec

log = logging.getLogger(__name__)

# a bias comes with a norm that is folded in; the others act in training only
_MAY_DIFFER = {"bias", "momentum", "dropout", "sparse", "scale_grad_by_freq", "device", "dtype"}


def check_same_layer(
    name: str, spec: Mapping[str, Any], existing: nn.Module, model: str, changed: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compares the layer that a spec stands for with the one in whose place it is put.

    The layer of the file is built whatever stands there, so that a model of other sizes, strides or heads would become
    the saved one in its compressed layers only.

    Args:
        name: of the layer.
        spec: in the file.
        existing: the layer in the model.
        model: name of its class.
        changed: attributes of the layer that a method had changed, `before` and `now`, when the spec was made.

    Raises:
        CheckpointError: they differ; the message names the layer and what differs.
    """
    saved, here = _stands_for(spec), _described(existing)
    if saved is None or here is None:
        return
    same = saved.get("type") == here.get("type")
    keys = [key for key in saved if key in here and key not in _MAY_DIFFER] if same else ["type"]
    either = {key: [_plain(saved[key]), changed.get(key, {}).get("before", _plain(saved[key]))] for key in keys}
    differ = [key for key in keys if _plain(here[key]) not in either[key]]
    if differ:
        there, mine = (", ".join(f"{key}={of[key]!r}" for key in differ) for of in (saved, here))
        raise CheckpointError(
            f"Layer {name!r} has {there} in the checkpoint and {mine} in this {model}: it was built with other "
            "arguments than the saved one. Build it with those, or load its class with them: "
            "load_compressed(Class, path, name=value)."
        )


def _stands_for(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ordinary layer as the model's own code makes it; norms have the size of the layer that they follow."""
    found = spec.get("original", spec.get("layer"))
    if not isinstance(found, dict) or found.get("type") in (None, *(norm.__name__ for norm in NORMS)):
        return None
    return found


def _described(layer: nn.Module) -> dict[str, Any] | None:
    own = getattr(layer, "spec", None)
    if isinstance(own, dict):
        return _stands_for(own)
    ordinary = layer if type(layer) in FUSED else as_torch(layer)
    return None if ordinary is None else layer_spec(ordinary)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def separate_ties(root: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Gives a parameter of its own to each of several modules that share one, where the file holds different values.

    Otherwise whichever is loaded last would win. A model comes to this where a method has changed only one of the
    modules, and the model's own code makes them share.

    Raises:
        CheckpointError: what is shared cannot be separated: a buffer, or a module that is used under two names.
    """
    owners: dict[int, dict[str, Any]] = {}  # by the shared tensor, one name for each of the values in the file
    tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if prefix + name not in state:
            continue
        known = owners.setdefault(id(tensor), {name: tensor})
        same = next((own for owner, own in known.items() if _equal(state[prefix + owner], state[prefix + name])), None)
        if same is not tensor:
            same = _separate(root, name, tensor, next(iter(known))) if same is None else same
            holder, attribute = _holder(root, name)
            holder.register_parameter(attribute, same)
            known[name] = same


def _separate(root: nn.Module, name: str, tensor: Tensor, owner: str) -> nn.Parameter:
    if _holder(root, name)[0] is _holder(root, owner)[0] or not isinstance(tensor, nn.Parameter):
        raise CheckpointError(
            f"{owner!r} and {name!r} are one tensor in this {type(root).__name__}, and the file holds two different "
            "ones: it was written by a model in which they are separate. Separate them before loading."
        )
    log.warning(
        "%r and %r are one parameter in this %s, and the file holds two different ones: they are separate now.",
        owner,
        name,
        type(root).__name__,
    )
    return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return root.get_submodule(module), attribute


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors are the same; True where that cannot be said here: sharded, without values, of two shapes."""
    if not all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in (one, other)):
        return True
    if one.shape != other.shape or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN equals NaN here

"""Putting a layer in the place of another: devices, dtypes, shared layers, shared parameters, hooks."""

import torch
from torch import Tensor, nn

from pquant_lightning.core._private import FULL_BACKWARD_FLAG, MODULE_HOOKS, MODULE_TABLE
from pquant_lightning.core.errors import PQuantError, known


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        PQuantError: no submodule has that name, or the name is empty.
    """
    if not name:
        raise PQuantError(
            f"{type(model).__name__} is itself the layer; a layer is replaced inside a model: wrap it in "
            "torch.nn.Sequential(layer)."
        )
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [other for other, _ in model.named_modules() if other]
        raise PQuantError(f"The model has no layer named {name!r}. {known(name, names)}") from None


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Puts `new` in place of the layer `name`, under every name that layer has in the model; returns the old one.

    The new layer takes over the training flag and the user's forward and backward hooks. Ancestors that read the
    weights of a layer directly when they make nested tensors (`nn.TransformerEncoder`) are told not to.

    Raises:
        PQuantError: no layer has that name, or it is the model itself.
    """
    old = get_layer(model, name)
    new.train(old.training)
    _take_over_hooks(old, new)
    for module in list(model.modules()):
        for child_name, child in list(module.__dict__[MODULE_TABLE].items()):
            if child is old:
                setattr(module, child_name, new)
    path = name.split(".")
    for depth in range(len(path)):
        ancestor = model.get_submodule(".".join(path[:depth]))
        if hasattr(ancestor, "use_nested_tensor"):
            setattr(ancestor, "use_nested_tensor", False)  # noqa: B010 (typed as a submodule otherwise)
    return old


def _take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """The tables themselves move, so that the handles which the user holds still remove their hooks."""
    for table in MODULE_HOOKS:
        moved, own = old.__dict__[table], new.__dict__[table]
        moved.update({key: hook for key, hook in own.items() if hook not in moved.values()})
        new.__dict__[table] = moved
    new.__dict__[FULL_BACKWARD_FLAG] = old.__dict__[FULL_BACKWARD_FLAG]


def materialize(layer: nn.Module, replaced: nn.Module | None) -> None:
    """Gives a layer built on "meta" its tensors, on the device and in the dtype of the layer it replaces.

    A parameter of equal name and shape is taken over as the same object: ties, `requires_grad` and optimizer entries
    stay. Where the layer wraps the replaced one, its child in `wraps` takes them over. The others are left
    uninitialised and require gradients if the replaced weight does.
    """
    reference = _reference(replaced)
    wraps = getattr(layer, "wraps", None)
    prefix = f"{wraps}." if wraps and getattr(replaced, "wraps", None) != wraps else ""
    old = () if replaced is None else replaced.named_parameters(remove_duplicate=False)
    available = {prefix + name: parameter for name, parameter in old}
    for module_name, module in layer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            adopted = available.get(f"{module_name}.{name}" if module_name else name)
            if adopted is None or adopted.shape != parameter.shape:
                kept = name in getattr(module, "float32_tensors", ())
                dtype = torch.float32 if kept else reference.dtype
                empty = torch.empty(parameter.shape, dtype=dtype, device=reference.device)
                adopted = nn.Parameter(empty, requires_grad=reference.requires_grad)
            setattr(module, name, adopted)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _placed(buffer, reference, name in getattr(module, "float32_tensors", ())))


def _placed(buffer: Tensor, reference: Tensor, keeps_dtype: bool) -> Tensor:
    if not buffer.is_meta:
        return buffer.to(reference.device)
    dtype = reference.dtype if buffer.is_floating_point() and not keeps_dtype else buffer.dtype
    return torch.empty_like(buffer, dtype=dtype, device=reference.device)


def _reference(replaced: nn.Module | None) -> Tensor:
    if replaced is not None:
        for tensor in (*replaced.parameters(), *replaced.buffers()):
            if tensor.is_floating_point():
                return tensor
    return nn.Parameter(torch.empty(0))

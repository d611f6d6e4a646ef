"""Parts that torch.compile has wrapped: they are compiled where they stand, and all names are as without it.

`self.net = torch.compile(self.net)` puts a module around the part, and `_orig_mod` into every name inside. What is
saved, planned and matched by patterns knows the part by its own name, so that files fit the class with and without it.
"""

from collections.abc import Iterable, MutableMapping
from typing import Any, TypeVar

from torch import nn

from pquant_lightning.core._private import (
    COMPILED_CALL,
    COMPILED_PART,
    MODULE_HOOKS,
    MODULE_TABLE,
    WHOLE_COMPILED,
    WHOLE_COMPILED_METHODS,
    compiled_in_place,
    is_compiled_wrapper,
)

_NOTE = "_pquant_compiled"  # plain names of the parts whose wrapper has been taken off
_PART = f"{COMPILED_PART}."

Value = TypeVar("Value")


def unwrap(model: nn.Module) -> nn.Module:
    """Takes the wrappers off the parts of a model, in place, and compiles those where they stand, in the same way.

    Returns:
        The model, or where all of it is wrapped, what is inside.

    >>> import torch
    >>> net = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    >>> [name for name, _ in unwrap(net).named_parameters()]
    ['0.weight', '0.bias']
    """
    root = _inside(model) if is_compiled_wrapper(model) else model
    wrapped: list[str] = []
    for name, module in root.named_modules(remove_duplicate=False):
        children = module.__dict__[MODULE_TABLE]
        for own, child in list(children.items()):
            if is_compiled_wrapper(child):
                children[own] = _inside(child)
                wrapped.append(plain_name(f"{name}.{own}" if name else own))
    if wrapped:
        root.__dict__[_NOTE] = list(dict.fromkeys([*root.__dict__.get(_NOTE, ()), *wrapped]))
        return unwrap(root)  # a wrapper may have been around another
    return root


def _inside(wrapper: Any) -> nn.Module:
    part = compiled_in_place(wrapper)
    for table in MODULE_HOOKS:
        part.__dict__[table].update(wrapper.__dict__[table])
    return part


def plain_name(name: str) -> str:
    """A name, or a pattern over names, without the part that torch.compile puts in.

    >>> plain_name("net._orig_mod.fc1"), plain_name("net._orig_mod")
    ('net.fc1', 'net')
    """
    return name.replace(_PART, "").removesuffix(f".{COMPILED_PART}") if COMPILED_PART in name else name


def rename_to_plain(state: MutableMapping[str, Any]) -> None:
    """Gives the entries of a state dict their plain names, in place."""
    for name in [name for name in state if _PART in name]:
        state[plain_name(name)] = state.pop(name)


def renamed_as_saved(model: nn.Module, state: MutableMapping[str, Value]) -> dict[str, Value]:
    """The state dict of an unwrapped model under the names that its own class gives, so that it loads there as well."""
    parts: Iterable[str] = model.__dict__.get(_NOTE, ())
    renamed = {}
    for name, value in state.items():
        for part in sorted(parts, key=len, reverse=True):  # inner first: the names of outer ones stay what they are
            if name.startswith(f"{part}."):
                name = f"{part}.{_PART}{name[len(part) + 1 :]}"
        renamed[name] = value
    return renamed


def forget_compiled(attributes: dict[str, Any]) -> None:
    """Takes out of a copy's attributes what was compiled of the original, and would run that one."""
    attributes.pop(COMPILED_CALL, None)
    if attributes.get(WHOLE_COMPILED) is not None:
        attributes[WHOLE_COMPILED] = None
        for method in WHOLE_COMPILED_METHODS:
            attributes.pop(method, None)

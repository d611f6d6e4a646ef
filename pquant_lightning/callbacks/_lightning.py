"""Lightning's two packages, `lightning.pytorch` and `pytorch_lightning`: the same classes twice, unknown to each other.

This package is written against the first. A model, a Trainer or a callback of the second is found here, without that
package being imported where the user has not done so.
"""

import sys
from typing import Any, TypeGuard, TypeVar

from lightning.pytorch import LightningDataModule, LightningModule
from lightning_utilities.core.overrides import is_overridden

OURS, OTHER = "lightning.pytorch", "pytorch_lightning"

Class = TypeVar("Class")


def twins(cls: type[Class]) -> tuple[type[Class], ...]:
    """A class of `lightning.pytorch`, and its namesake in the other package where that is imported.

    >>> twins(LightningModule)[0].__name__
    'LightningModule'
    """
    module = sys.modules.get(cls.__module__.replace(OURS, OTHER, 1))
    other = getattr(module, cls.__name__, cls)
    return (cls,) if other is cls else (cls, other)


def is_a(value: object, cls: type[Class]) -> TypeGuard[Class]:
    """Whether something is of a class of `lightning.pytorch` or of its namesake."""
    return isinstance(value, twins(cls))


def is_subclass(value: object, cls: type[Class]) -> TypeGuard[type[Class]]:
    """Whether something is a class that derives from a class of `lightning.pytorch` or from its namesake."""
    return isinstance(value, type) and issubclass(value, twins(cls))


def fitting(cls: type[Class], module: object) -> type[Class]:
    """A class of `lightning.pytorch`, or its namesake, whichever goes with a model: one Trainer does not take both."""
    return twins(cls)[-1] if not isinstance(module, LightningModule) and is_a(module, LightningModule) else cls


def overrides(name: str, instance: Any) -> bool:
    """Whether a LightningModule or LightningDataModule has a method of its own in place of the empty one."""
    parents = [parent for base in (LightningModule, LightningDataModule) for parent in twins(base)]
    found = next((parent for parent in parents if isinstance(instance, parent)), None)
    return found is not None and is_overridden(name, instance, found)

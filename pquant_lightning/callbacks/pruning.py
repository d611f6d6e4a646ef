"""Pruning methods as callbacks."""

from typing import Any

from pquant_lightning.callbacks.base import _MethodCallback, show_signature
from pquant_lightning.methods.pruning.structured import StructuredPruning
from pquant_lightning.methods.pruning.unstructured import UnstructuredPruning


class PruningCallback(_MethodCallback):
    """Sets weights to zero along a schedule and holds them there, see `UnstructuredPruning`.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `UnstructuredPruning`.

    >>> PruningCallback(sparsity=0.9).method.sparsity
    0.9
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(UnstructuredPruning(**options), name, reset_monitors)


show_signature(PruningCallback, UnstructuredPruning)


class StructuredPruningCallback(_MethodCallback):
    """Removes channels, neurons and attention heads along a schedule, see `StructuredPruning`.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `StructuredPruning`.

    >>> StructuredPruningCallback(target={"macs": 0.5}).method.target
    {'macs': 0.5}
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(StructuredPruning(**options), name, reset_monitors)


show_signature(StructuredPruningCallback, StructuredPruning)

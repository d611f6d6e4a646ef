"""Tensor-network methods as callbacks."""

from typing import Any

from pquant_lightning.callbacks.base import _MethodCallback, show_signature
from pquant_lightning.methods.tensor_networks.cp import CPCompression
from pquant_lightning.methods.tensor_networks.tensor_train import TensorTrainCompression
from pquant_lightning.methods.tensor_networks.tucker import TuckerCompression


class TensorTrainCallback(_MethodCallback):
    """Tensor trains from the start of fit on, see `TensorTrainCompression`; the cores are trained.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `TensorTrainCompression`.

    >>> TensorTrainCallback(max_error=0.2).method.max_error
    0.2
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(TensorTrainCompression(**options), name, reset_monitors)


class TuckerCallback(_MethodCallback):
    """Tucker-2 of convolutions at the start of fit, see `TuckerCompression`; the factors are fine-tuned.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `TuckerCompression`.

    >>> TuckerCallback(rank=64).method.rank
    64
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(TuckerCompression(**options), name, reset_monitors)


class CPCallback(_MethodCallback):
    """CP of convolutions and Linear layers at the start of fit, see `CPCompression`; the factors are fine-tuned.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `CPCompression`.

    >>> CPCallback(rank=32).method.rank
    32
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(CPCompression(**options), name, reset_monitors)


show_signature(TensorTrainCallback, TensorTrainCompression)
show_signature(TuckerCallback, TuckerCompression)
show_signature(CPCallback, CPCompression)

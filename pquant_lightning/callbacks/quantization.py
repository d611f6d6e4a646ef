"""Quantization methods as callbacks."""

from typing import Any

from pquant_lightning.callbacks.base import _MethodCallback, show_signature
from pquant_lightning.methods.quantization.ptq import PTQCompression
from pquant_lightning.methods.quantization.qat import QATCompression


class PTQCallback(_MethodCallback):
    """Post-training quantization at the end of fit, see `PTQCompression`; the artefact holds integers.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `PTQCompression`.

    >>> PTQCallback(scheme="dynamic").method.scheme
    'dynamic'
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(PTQCompression(**options), name, reset_monitors)


class QATCallback(_MethodCallback):
    """Quantization-aware training from the start of fit, see `QATCompression`; the artefact holds integers.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `QATCompression`.

    >>> QATCallback(bits=4).method.bits
    4
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(QATCompression(**options), name, reset_monitors)


show_signature(PTQCallback, PTQCompression)
show_signature(QATCallback, QATCompression)

"""LoRA as a callback."""

from typing import Any

from pquant_lightning.callbacks.base import _MethodCallback, show_signature
from pquant_lightning.methods.low_rank.lora import LoRACompression


class LoRACallback(_MethodCallback):
    """Adapters from the start of fit, all else frozen, see `LoRACompression`.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `LoRACompression`.

    >>> LoRACallback(r=16, alpha=32).method.alpha
    32
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(LoRACompression(**options), name, reset_monitors)


show_signature(LoRACallback, LoRACompression)

"""Low-rank methods as callbacks."""

from typing import Any

from pquant_lightning.callbacks.base import _MethodCallback, show_signature
from pquant_lightning.methods.low_rank.factorization import FactorizationCompression
from pquant_lightning.methods.low_rank.svd import LowRankCompression


class LowRankCallback(_MethodCallback):
    """Truncated SVD at the start of fit, see `LowRankCompression`; the factors are fine-tuned.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `LowRankCompression`.

    >>> LowRankCallback(rank=64).method.rank
    64
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(LowRankCompression(**options), name, reset_monitors)


class FactorizationCallback(_MethodCallback):
    """Other factorizations at the start of fit, see `FactorizationCompression`; the factors are fine-tuned.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `FactorizationCompression`.

    >>> FactorizationCallback(kind="monarch", rank=2).method.kind
    'monarch'
    """

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(FactorizationCompression(**options), name, reset_monitors)


show_signature(LowRankCallback, LowRankCompression)
show_signature(FactorizationCallback, FactorizationCompression)

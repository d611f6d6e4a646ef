"""Quantization methods as callbacks."""

import logging
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from pquant_lightning.callbacks._validation import check_logged, detached, validated
from pquant_lightning.callbacks.base import _MethodCallback, _take_samples, show_signature
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.deploy import deploy
from pquant_lightning.core.errors import BudgetError, ModelError
from pquant_lightning.methods.quantization.mixed_precision import MixedPrecisionCompression
from pquant_lightning.methods.quantization.ptq import PTQCompression
from pquant_lightning.methods.quantization.qat import QATCompression

log = logging.getLogger(__name__)

_STEP = 0.25  # bits per weight between two budgets that `max_drop` tells apart


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


class MixedPrecisionCallback(_MethodCallback):
    """Post-training quantization with bits per layer at the end of fit, see `MixedPrecisionCompression`.

    With `max_drop` the fit's validation data decide on the budget: the fewest bits on average, in steps of a quarter,
    for which the deployed model's metric is at most so much worse than that of the trained one.

    Args:
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.
        **options: of `MixedPrecisionCompression`.

    >>> MixedPrecisionCallback(average_bits=4).method.budget
    ('average_bits', 4)
    """

    method: MixedPrecisionCompression

    def __init__(self, *, name: str | None = None, reset_monitors: bool = True, **options: Any) -> None:
        super().__init__(MixedPrecisionCompression(**options), name, reset_monitors)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.method.max_drop is not None and trainer.world_size > 1:
            raise ModelError(
                f"max_drop validates models on one device, and this Trainer has {trainer.world_size}. Give "
                "average_bits or target_size_mb, or fit on one device."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.method.monitor is not None and trainer.training:
            check_logged(self.method.monitor, trainer.callback_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        smoke_test: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.method.max_drop is not None:
            search = (trainer, pl_module, self.method.max_drop, str(self.method.monitor))
            average = 8.0 if smoke_test else self._fewest_bits(*search)
            self.method = replace(self.method, max_drop=None, average_bits=average)
        super().on_train_end(trainer, pl_module)

    def _fewest_bits(self, trainer: Trainer, module: LightningModule, max_drop: float, monitor: str) -> float:
        """The least average that keeps to `max_drop`, by bisection.

        Raises:
            BudgetError: even 8 bits lose more.
        """
        samples = _take_samples(trainer, module, self.method)
        context = CompressionContext(by=self.state_key, samples=samples)
        measured = detached(module)
        self.method.share_again(measured, context)
        sign = 1.0 if self.method.mode == "max" else -1.0
        before = sign * validated(trainer, detached(module), monitor)

        def drop(average: float) -> float:
            method = replace(self.method, max_drop=None, average_bits=average)
            small = detached(measured)
            method.share_again(small, context)
            method.calibrate(small, context)
            deploy(small)
            lost = before - sign * validated(trainer, small, monitor)
            log.info("%g bits on average lose %.4g of %s", average, lost, monitor)
            return lost

        fewest, most = self.method.least_average(measured, context), 8.0
        if (lost := drop(most)) > max_drop:
            raise BudgetError(
                f"max_drop={max_drop:g} of {monitor} cannot be met: 8 bits in every layer lose {lost:.4g}. Give at "
                "least that, leave layers out (exclude), or leave the inputs in floating point (scheme='weight_only')."
            )
        while most - fewest > _STEP:
            middle = round((fewest + most) / 2 / _STEP) * _STEP
            if not fewest < middle < most:
                break
            fewest, most = (fewest, middle) if drop(middle) <= max_drop else (middle, most)
        return most


show_signature(PTQCallback, PTQCompression)
show_signature(MixedPrecisionCallback, MixedPrecisionCompression)
show_signature(QATCallback, QATCompression)

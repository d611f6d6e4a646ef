"""What a method sees of the gradients of an optimizer's step: its own, as they are used, and only where it is taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pquant_lightning.core._private import takes_off_scale
from pquant_lightning.core.compression_method import CompressionMethod


def observe_step(
    method: CompressionMethod, module: nn.Module, state: dict[str, Any], trainer: Trainer, optimizer: Any
) -> None:
    """Calls `method.observe` with the gradients of one optimizer's step, before it.

    A step whose gradients are not all finite is passed over: 16-bit precision does not take it, and one infinite value
    would decide every score that it enters.

    Args:
        method: what observes.
        module: holds the parameters.
        state: of the method.
        trainer: its precision may have multiplied the gradients by a factor, which is taken off meanwhile.
        optimizer: whose step it is; parameters that it does not hold have no gradients meanwhile.
    """
    if type(method).observe is CompressionMethod.observe or not _are_finite(_gradients(optimizer)):
        return
    with _only_gradients_of(optimizer, module), _without_factor(trainer, optimizer):
        method.observe(module, state)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _gradients(optimizer: Any) -> list[Tensor]:
    found = [p.grad for p in _parameters(optimizer)]
    return [grad.coalesce().values() if grad.is_sparse else grad for grad in found if grad is not None]


def _are_finite(gradients: list[Tensor]) -> bool:
    """Whether no value is NaN or infinite, on all processes that hold parts of them."""
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return True
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)  # no value is too large for this norm
    return bool((largest.full_tensor() if isinstance(largest, DTensor) else largest).isfinite())


@contextmanager
def _only_gradients_of(optimizer: Any, module: nn.Module) -> Iterator[None]:
    """Within the block other optimizers' parameters have no gradients: theirs are of another loss."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    hidden = [(p, p.grad) for p in module.parameters() if id(p) not in held and p.grad is not None]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in hidden:
            parameter.grad = gradient


@contextmanager
def _without_factor(trainer: Trainer, optimizer: Any) -> Iterator[None]:
    """Within the block gradients lack the factor of 16-bit precision, where only the optimizer's step takes it off."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not takes_off_scale(optimizer):
        yield
        return
    scaled, factor = [(p, p.grad) for p in _parameters(optimizer)], 1 / scaler.get_scale()
    for parameter, gradient in scaled:
        assert gradient is not None
        parameter.grad = gradient * factor
    try:
        yield
    finally:
        for parameter, gradient in scaled:
            parameter.grad = gradient

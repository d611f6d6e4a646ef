"""What rounding one layer does to the model's output: measured layer by layer, or from gradients in one pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.errors import CalibrationError

_DRAWS = 4  # random directions per batch
Losses = dict[str, dict[int, float]]  # by layer and bits: squared error of the output / squared output
RoundedWeight = Callable[[str, int], Tensor]  # layer and bits to the weight as it would be rounded


def output_losses(
    model: nn.Module, weights: Mapping[str, Tensor], bits: Sequence[int], rounded: RoundedWeight, samples: Samples
) -> Losses:
    """1 / SQNR of the model's output where one layer alone is rounded: a pass over the samples per layer and bits.

    Args:
        model: is as before when all is done.
        weights: the layers' own parameters, changed for a while.
        bits: to round to.
        rounded: gives the weight of a layer in so many bits.
        samples: what the model is run on.

    References:
        Pandey et al., "A Practical Mixed Precision Algorithm for Post-Training Quantization", 2023, section 3.1 (SQNR).
    """
    expected = [_flat(output) for output in run_samples(model, samples)]
    power = sum(float(out.square().sum()) for out in expected)
    losses: Losses = {}
    for name, weight in weights.items():
        kept = weight.data
        losses[name] = {}
        try:
            for count in bits:
                changed = rounded(name, count).to(kept.dtype)
                weight.data = changed
                pairs = zip(run_samples(model, samples), expected, strict=True)
                error = sum(float((_flat(found) - out).square().sum()) for found, out in pairs)
                losses[name][count] = error / max(power, 1e-30)
                weight.data = kept
        finally:
            weight.data = kept
    return losses


def fisher_losses(
    model: nn.Module, weights: Mapping[str, Tensor], bits: Sequence[int], rounded: RoundedWeight, samples: Samples
) -> Losses:
    """The same, estimated: sum of F (W - W')^2, with F the diagonal of the Gauss-Newton matrix of the output's error.

    F is the mean square of the gradients of the output's projections onto random directions, so that no labels are
    needed; its sum is the trace of the Hessian. One pass with gradients, whatever the bits are.

    References:
        Dong et al., "HAWQ-V2", 2020 (trace of the Hessian); Martens, "New Insights and Perspectives on the Natural
        Gradient Method", 2020, section 9 (Fisher and Gauss-Newton).
    """
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(0)
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    power = 0.0

    def run(holder: nn.Module, batch: Any) -> float:
        with torch.enable_grad():
            out = _flat(samples.run(holder, batch))
            if not out.requires_grad:
                raise CalibrationError(
                    f"The output of {type(holder).__name__} carries no gradient (no_grad, detach, or integers in its "
                    "forward): sensitivity='fisher' needs one. Use sensitivity='output'."
                )
            for draw in range(_DRAWS):
                signs = torch.randint(2, out.shape, generator=generator).to(out) * 2 - 1
                grads = torch.autograd.grad(
                    (out * signs).sum(), list(weights.values()), allow_unused=True, retain_graph=draw < _DRAWS - 1
                )
                for name, grad in zip(weights, grads, strict=True):
                    if grad is not None:
                        fisher[name] += grad.float().square() / _DRAWS
        return float(out.detach().square().sum())

    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        power = sum(run_samples(model, Samples(samples.batches, run)))
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])

    def loss(name: str, count: int) -> float:
        error = rounded(name, count).float() - weights[name].detach().float()
        return float((fisher[name] * error.square()).sum()) / max(power, 1e-30)

    return {name: {count: loss(name, count) for count in bits} for name in weights}


def _flat(output: Any) -> Tensor:
    """All floating-point tensors of an output in one vector of float32."""
    parts = [tensor.float().flatten() for tensor in tensors_in(output) if tensor.is_floating_point()]
    return torch.cat(parts) if parts else torch.zeros(0)

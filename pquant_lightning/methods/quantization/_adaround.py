"""AdaRound: for each weight it is learned whether it is rounded up or down, for a small error of the layer's output."""

import torch
from torch import Tensor

from pquant_lightning.core.affine import top_code
from pquant_lightning.core.moments import relative_moment

_ZETA, _GAMMA = 1.1, -0.1  # the stretched sigmoid reaches 0 and 1, as in the paper
_RATE = 0.01  # learning rate of the logits
_STRENGTH = 10.0  # of the push towards 0 and 1 for a whole row, relative to the error of the nearest codes
_WARM_UP = 0.2  # share of the steps before anything pushes towards 0 and 1


def adaround_codes(
    weight: Tensor, moment: Tensor, scale: Tensor, zero: Tensor | None, bits: int, steps: int = 400
) -> Tensor:
    """Codes one below or above each weight, for a small tr((W - W') M (W - W')^T); many layers at a time.

    Rows whose error does not get below that of the nearest codes keep those, so that the error never grows. Weights
    that are exactly zero have been pruned and keep the nearest code, which is the zero point.

    Args:
        weight: `(layers, out, in)`.
        moment: M, second moment of the inputs, `(layers, in, in)`, in any unit.
        scale: of the grid, `(layers, out, groups)`; groups lie one after the other along the inputs.
        zero: zero points, shaped as `scale`, whole codes where a weight is zero; None for symmetric codes.
        bits: 2 to 8.
        steps: of Adam.

    Returns:
        float32 codes, shaped as the weight.

    References:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, equations 21 to 25. We
        differ: the error comes from the second moment instead of a batch of inputs.
    """
    low, high = (-top_code(bits), top_code(bits)) if zero is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    repeat = weight.shape[2] // scale.shape[2]
    step = scale.float().repeat_interleave(repeat, 2)
    shift = 0.0 if zero is None else zero.float().repeat_interleave(repeat, 2)
    weight, moment, pruned = weight.float(), relative_moment(moment).float(), weight == 0
    place = weight / step + shift
    floor = place.floor()
    nearest = place.round().clamp(low, high)
    size = (weight @ moment * weight).sum((1, 2), keepdim=True) / weight.shape[1]

    def codes_of(up: Tensor) -> Tensor:  # above the floor by 0, 1 or, while it is learned, something between
        return torch.where(pruned, nearest, (floor + up).clamp(low, high))

    def errors(codes: Tensor) -> Tensor:  # (layers, out, 1), relative to the layer's mean output
        lost = (codes - shift) * step - weight
        return (lost @ moment * lost).sum(2, keepdim=True) / size.clamp_min(torch.finfo(torch.float32).tiny)

    with torch.enable_grad():
        share = ((place - floor) - _GAMMA) / (_ZETA - _GAMMA)
        logits = torch.logit(share).requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=_RATE)
        strength = _STRENGTH * errors(nearest).mean().item() / weight.shape[2]
        for done in range(steps):
            up = (torch.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
            loss = errors(codes_of(up)).sum()
            progress = (done / steps - _WARM_UP) / (1 - _WARM_UP)
            if progress > 0:
                beta = 20 - 18 * progress
                loss = loss + strength * (1 - (2 * up - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learned = codes_of(logits.detach() > 0.0)
    return torch.where(errors(learned) < errors(nearest), learned, nearest)

"""Activation-aware scaling: inputs of large magnitude get finer weights, by factors that the layer before undoes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.affine import blocks, unblock
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.moments import InputMoments, MomentSource
from pquant_lightning.methods.quantization._grids import code_bits, nearest_codes, weight_grid
from pquant_lightning.methods.quantization._layers import QuantLayer
from pquant_lightning.methods.quantization._scaling import Link, by_input, rescale

_EXPONENTS = 20  # tried between 0, which changes nothing, and 1
_LEAST = 1e-3  # of the largest magnitude: channels that are silent in calibration count as so loud


def scale_by_activations(model: nn.Module, links: Sequence[Link], samples: Samples, max_bytes: int) -> set[str]:
    """Scales the inputs of the layers that are to be rounded by "awq", for the least error of their outputs.

    Args:
        model: holds layers in training form.
        links: of the model; those all of whose readers are to be rounded so are used.
        samples: what second moments are computed on.
        max_bytes: moments held at a time.

    Returns:
        Names of the layers whose inputs a link feeds.
    """
    chosen = [link for link in links if all(_is_wanted(model.get_submodule(name)) for name, _ in link.readers)]
    source = MomentSource(model, [name for link in chosen for name, _ in link.readers], samples, max_bytes)
    for link in chosen:
        found = [(model.get_submodule(name), repeats, source.get(name)) for name, repeats in link.readers]
        readers = [(layer, repeats, moments) for layer, repeats, moments in found if moments is not None]
        if readers:
            rescale(model, link, best_factor(readers))
    return {name for link in chosen for name, _ in link.readers}


def best_factor(readers: Sequence[tuple[Any, int, InputMoments]]) -> Tensor:
    """The factor per channel, a power of its magnitude, for which the layers' outputs have the least squared error.

    The magnitude is the root mean square of the inputs, which the moments hold, where the reference takes their mean
    magnitude.

    Args:
        readers: layers in training form, the inputs that each channel has become, and the moments of the inputs.

    References:
        Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", 2023,
        section 3.2, equations 4 and 5.
    """
    magnitude = torch.stack([_magnitude(*reader) for reader in readers]).amax(0)
    magnitude = magnitude.clamp_min(_LEAST * float(magnitude.max()))
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(_EXPONENTS):
        factor = magnitude ** (step / _EXPONENTS)
        factor = factor / (factor.max() * factor.min()).sqrt()
        error = sum(output_error(layer, factor.repeat_interleave(count), moments) for layer, count, moments in readers)
        if error < least:
            best, least = factor, error
    return best


def output_error(layer: Any, factor: Tensor, moments: InputMoments) -> float:
    """tr(E M E^T), E the error of the weight rounded to nearest after its inputs `(in,)` were multiplied with `factor`.

    M is the covariance where bias correction takes the mean error away.
    """
    spec, factor = layer.spec, by_input(layer, factor)
    weight = layer.weight.detach().float()
    values = blocks(weight * factor, layer.axis, spec["group_size"])
    codes, scale, zero = nearest_codes(values, weight_grid(values, spec), code_bits(spec))
    levels = codes if zero is None else codes - zero[..., None]
    rounded = unblock(levels * scale[..., None], weight.shape, layer.axis) / factor
    error = (rounded - weight).reshape(len(moments.mean), -1, moments.width)
    centered = spec["correct_bias"] and isinstance(layer, nn.Linear)
    moment = moments.covariance if centered else moments.second
    return float(((error @ moment.to(error)) * error).sum())


def _magnitude(layer: Any, repeats: int, moments: InputMoments) -> Tensor:
    """Root mean square of the inputs per channel of the link, `(channels,)`."""
    squares = moments.second.diagonal(dim1=1, dim2=2).float()  # (groups, in / groups * window)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return squares.reshape(inputs, -1).mean(1).reshape(-1, repeats).mean(1).clamp_min(0).sqrt()


def _is_wanted(layer: nn.Module) -> bool:
    return isinstance(layer, QuantLayer) and layer.spec["rounding"] == "awq"

"""What makes a unit of channels important, relative to the others of its group, and which units go first."""

from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, visit_inputs
from pquant_lightning.core.layer_adapter import NORMS, channel_dim
from pquant_lightning.core.reduction import reduced_by_name
from pquant_lightning.core.structure import tensor_at, whole

Part = tuple[str, int, Tensor]  # see `Units`


def per_unit(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """A tensor's values by unit: `(units, values)`, float32."""
    values = whole(tensor)
    rows = values.movedim(dim, 0).flatten(1) if values.dim() > 1 else values[:, None]
    return rows.float()[indices.to(rows.device).flatten()].reshape(indices.shape[0], -1)


def _matrices(model: nn.Module, parts: Sequence[Part]) -> list[Tensor]:
    """The values of each unit in parameters of two dimensions or more; in all parameters where there are none."""
    found = [(tensor_at(model, name), dim, indices) for name, dim, indices in parts]
    own = [(tensor, dim, indices) for tensor, dim, indices in found if isinstance(tensor, nn.Parameter)]
    return [per_unit(*part) for part in [part for part in own if part[0].dim() > 1] or own]


def l1(model: nn.Module, parts: Sequence[Part]) -> Tensor:
    """Sum of |w| over all weights of a unit, `(units,)`."""
    return torch.stack([values.abs().sum(1) for values in _matrices(model, parts)]).sum(0)


def l2(model: nn.Module, parts: Sequence[Part]) -> Tensor:
    """Euclidean norm of all weights of a unit, `(units,)`."""
    return torch.stack([values.square().sum(1) for values in _matrices(model, parts)]).sum(0).sqrt()


def bn_scale(model: nn.Module, parts: Sequence[Part]) -> Tensor:
    """Sum of |gamma| over the batch norms of a unit, `(units,)`; the l2 norm where it has none."""
    scales = []
    for name, dim, indices in parts:
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and isinstance(model.get_submodule(owner), tuple(NORMS)):
            scales.append(per_unit(tensor_at(model, name), dim, indices).abs().sum(1))
    return torch.stack(scales).sum(0) if scales else l2(model, parts)


def fpgm(model: nn.Module, parts: Sequence[Part]) -> Tensor:
    """Sum of the distances of a unit's weights to those of the others, `(units,)`: 0 for what others can replace."""
    values = torch.cat(_matrices(model, parts), 1)
    return torch.cdist(values, values).sum(1)


OF_WEIGHTS: dict[str, Callable[[nn.Module, Sequence[Part]], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
}


def saliency(model: nn.Module, parts: Sequence[Part]) -> Tensor:
    """(sum of gradient times weight)^2 over all weights of a unit, `(units,)`: the loss without it, to first order."""
    total = torch.zeros(parts[0][2].shape[0])
    for name, dim, indices in parts:
        tensor = tensor_at(model, name)
        if tensor.grad is not None:
            total = total.to(tensor.device) + per_unit(tensor.detach() * tensor.grad, dim, indices).sum(1)
    return total.square()


def activation(model: nn.Module, groups: Sequence[Sequence[Part]], samples: Samples) -> list[Tensor]:
    """What a unit contributes to the layers that read it: sum of ||x_j|| ||W_:j|| over its channels j, `(units,)` each.

    The l2 norm stands in for groups that no Linear or convolution without groups reads.
    """
    readers = [[part for part in parts if _reads(model, part)] for parts in groups]
    names = {name.rpartition(".")[0] for parts in readers for name, _, _ in parts}
    energy: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        dim = channel_dim(model.get_submodule(name)) % x.dim()
        squares = x.float().square().sum([d for d in range(x.dim()) if d != dim])
        energy[name] = energy[name] + squares if name in energy else squares

    visit_inputs(model, sorted(names), samples, visit)
    totals = reduced_by_name({name: [found] for name, found in energy.items()}, sorted(names), samples)
    energy = {name: found for name, (found,) in totals.items()}
    scores = []
    for parts, own in zip(groups, readers, strict=True):
        found = [(name, dim, indices) for name, dim, indices in own if name.rpartition(".")[0] in energy]
        if not found:
            scores.append(l2(model, parts))
            continue
        total = torch.zeros(parts[0][2].shape[0])
        for name, dim, indices in found:
            norms = whole(tensor_at(model, name)).float().movedim(dim, 0).flatten(1).norm(dim=1)
            product = norms * energy[name.rpartition(".")[0]].sqrt()
            total = total.to(product.device) + product[indices.to(product.device).flatten()].reshape(indices.shape).sum(
                1
            )
        scores.append(total)
    return scores


def _reads(model: nn.Module, part: Part) -> bool:
    owner, _, attribute = part[0].rpartition(".")
    layer = model.get_submodule(owner)
    if attribute != "weight" or getattr(layer, "groups", 1) > 1:
        return False
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    ordinary = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (transposed and part[1] == 0) or (ordinary and part[1] == 1)


def lowest(scores: Sequence[Tensor], drop: int, caps: Sequence[int]) -> list[int]:
    """How many units of each group go, when the `drop` lowest of all groups go and no more than `caps` of each.

    Args:
        scores: by group `(units,)`, on one scale; each group's lowest go first.
        drop: how many go in all; fewer where the caps leave no more.
        caps: by group.
    """
    ordered = [numpy.sort(score.double().cpu().numpy())[:cap] for score, cap in zip(scores, caps, strict=True)]
    everything = numpy.sort(numpy.concatenate(ordered)) if ordered else numpy.empty(0)
    drop = min(drop, everything.size)
    if drop == 0:
        return [0] * len(ordered)
    threshold = everything[drop - 1]
    counts = [int(numpy.searchsorted(own, threshold, "left")) for own in ordered]
    for place, own in enumerate(ordered):  # of equal scores the first
        ties = int(numpy.searchsorted(own, threshold, "right")) - counts[place]
        counts[place] += min(ties, drop - sum(counts))
    return counts

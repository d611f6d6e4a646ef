"""Second moments of the inputs of layers: what the error of a rounded weight does to the layer's output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning.core.calibration import Samples, reduced, visit_inputs


@dataclass
class InputMoments:
    """What a layer's weight, as `(groups, out / groups, inputs)`, has been multiplied with in calibration.

    Attributes:
        second: E[x x^T], float32 `(groups, inputs, inputs)`.
        mean: E[x], float32 `(groups, inputs)`.
        count: vectors seen: tokens, positions of a kernel.
    """

    second: Tensor
    mean: Tensor
    count: int

    @property
    def covariance(self) -> Tensor:
        """E[(x - E[x]) (x - E[x])^T], `(groups, inputs, inputs)`."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


def has_moments(layer: nn.Module) -> bool:
    """Whether the inputs of this type of layer can be written as vectors that its weight is multiplied with."""
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)


def moment_bytes(layer: Any) -> int:
    """Bytes of the moments of one layer."""
    inputs = layer.weight[0].numel()
    return 4 * getattr(layer, "groups", 1) * inputs * (inputs + 1)


def in_passes(layers: dict[str, Any], max_bytes: int) -> Iterator[list[str]]:
    """The layers' names in groups, in order, whose moments fit into `max_bytes`; at least one layer in each."""
    group: list[str] = []
    size = 0
    for name, layer in layers.items():
        if group and size + moment_bytes(layer) > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += moment_bytes(layer)
    if group:
        yield group


class MomentSums:
    """Sums over the batches; the product of what several layers read (queries, keys, values) is computed once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.counts: dict[str, int] = {}
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # rows, their sum, their product

    def __call__(self, name: str, x: Tensor) -> None:
        rows = input_rows(self.model.get_submodule(name), x.float())
        total = rows.sum(1)
        if self._last is None or not _same(rows, self._last[0]) or not torch.equal(total, self._last[1]):
            self._last = (rows, total, rows.mT @ rows)
        product = self._last[2]
        if name in self.sums:
            self.sums[name][0].add_(product)
            self.sums[name][1].add_(total)
        else:
            self.sums[name] = (product.clone(), total.clone())
        self.counts[name] = self.counts.get(name, 0) + rows.shape[1]

    def result(self, samples: Samples) -> dict[str, InputMoments]:
        moments = {}
        for name, (second, total) in self.sums.items():
            count = int(reduced(torch.tensor(self.counts[name]), samples))
            moments[name] = InputMoments(
                reduced(second, samples).div_(count), reduced(total, samples).div_(count), count
            )
        return moments


def _same(rows: Tensor, last: Tensor) -> bool:
    """Whether they view the same memory; its values may have been changed in between."""
    return rows.data_ptr() == last.data_ptr() and rows.shape == last.shape and rows.stride() == last.stride()


def collect_moments(model: nn.Module, names: Sequence[str], samples: Samples) -> dict[str, InputMoments]:
    """Moments of the inputs of the named layers, in one pass; layers that were not reached are missing."""
    sums = MomentSums(model)
    visit_inputs(model, names, samples, sums)
    return sums.result(samples)


def input_rows(layer: Any, x: Tensor) -> Tensor:
    """What a layer's weight, as `(groups, out / groups, inputs)`, is multiplied with: `(groups, positions, inputs)`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    spatial = len(layer.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    flat = spatial == 1
    kernel, stride, dilation = (
        (1, *value) if flat else value for value in (layer.kernel_size, layer.stride, layer.dilation)
    )
    x = _padded(layer, x)
    patches = F.unfold(x[:, :, None] if flat else x, kernel, dilation, 0, stride)  # (N, channels * kernel, positions)
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _padded(layer: Any, x: Tensor) -> Tensor:
    margins: list[int] = []
    for place in reversed(range(len(layer.kernel_size))):
        whole = layer.dilation[place] * (layer.kernel_size[place] - 1)
        if isinstance(layer.padding, str):
            before = whole // 2 if layer.padding == "same" else 0
            margins += [before, whole - before if layer.padding == "same" else 0]
        else:
            margins += [layer.padding[place]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, margins, mode=mode)

"""Layers of every supported type with inputs for them, and registries that a test may write to."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """A layer and inputs that it takes."""

    layer: nn.Module
    inputs: Tensor


def _indices(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape)


_LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), torch.randn, (5, 12)),
    "linear_sequence_no_bias": (lambda: nn.Linear(10, 12, bias=False), torch.randn, (2, 3, 10)),
    "conv1d_strided": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), torch.randn, (2, 8, 15)),
    "conv1d_reflect": (lambda: nn.Conv1d(8, 6, 5, padding=2, padding_mode="reflect"), torch.randn, (2, 8, 9)),
    "conv2d_grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), torch.randn, (2, 8, 6, 5)),
    "conv2d_dilated": (
        lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
        torch.randn,
        (2, 6, 7, 8),
    ),
    "conv2d_same_circular": (
        lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"),
        torch.randn,
        (2, 6, 5, 5),
    ),
    "conv2d_replicate": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate"), torch.randn, (2, 6, 5, 5)),
    "conv3d_grouped": (
        lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1), groups=2),
        torch.randn,
        (2, 4, 3, 4, 5),
    ),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(8, 6, 3, stride=2, output_padding=1, groups=2),
        torch.randn,
        (2, 8, 7),
    ),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(6, 8, (3, 2), stride=2, padding=1, output_padding=(1, 0), dilation=(1, 2)),
        torch.randn,
        (2, 6, 4, 5),
    ),
    "conv_transpose3d": (
        lambda: nn.ConvTranspose3d(6, 4, 2, stride=(1, 2, 2), groups=2, bias=False),
        torch.randn,
        (2, 6, 3, 2, 3),
    ),
    "embedding": (lambda: nn.Embedding(40, 6), _indices, (3, 4)),
    "embedding_padding_idx": (lambda: nn.Embedding(40, 6, padding_idx=3), _indices, (7,)),
}


def _case(name: str) -> Case:
    torch.manual_seed(0)
    make, draw, shape = _LAYERS[name]
    layer = make()
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        return Case(layer, torch.cat([draw(*shape), torch.tensor([layer.padding_idx])]))
    return Case(layer, draw(*shape))


@pytest.fixture(params=_LAYERS)
def case(request: pytest.FixtureRequest) -> Case:
    """One layer of each supported type, in its odd variants."""
    return _case(request.param)


@pytest.fixture(params=[name for name in _LAYERS if "transpose" not in name])
def quantizable(request: pytest.FixtureRequest) -> Case:
    """One layer of each type that quantization-aware training covers."""
    return _case(request.param)

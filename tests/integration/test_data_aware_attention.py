"""Data-aware low rank inside attention, and of tied layers."""

from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import LowRankCompression, compress_model
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.models import TiedTransformer, Transformer, built

OPTIONS: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 4, "sequential": True},
    {"budget": {"params": 0.5}},
    {"budget": {"params": 0.5}, "sequential": True, "split": "channel"},
]


def _correlated(model: Any) -> Any:
    """Embeddings in a few directions, so that the inputs of the layers tell more than their weights."""
    with torch.no_grad():
        few = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        model.embed.weight.copy_(model.embed.weight[:, :4] @ few)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_projections_are_fitted_to_their_inputs(options: dict[str, Any]) -> None:
    model = _correlated(built(Transformer)).eval()
    inputs = Transformer.inputs(64, seed=3)
    expected = model(*inputs).detach()
    errors = []
    for loader in (None, model.loader()):
        given = {**options, "sequential": False} if loader is None else options
        small = compress_model(model, "low_rank", train_loader=loader, include=["encoder"], **given)
        assert any(name.endswith("_proj") for name in compressed_layers(small))
        with torch.no_grad():
            errors.append(float((small(*inputs) - expected).norm() / expected.norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ties_hold_and_the_shared_factor_fits_both(options: dict[str, Any]) -> None:
    model = built(TiedTransformer)
    method = LowRankCompression(factorize_ties=True, include=["embed", "head"], **options)
    small: Any = method.compress(model, model.loader())
    assert small.embed.first.weight is small.head.second.weight
    assert type(small.head.second) is nn.Linear
    for layer in (small.embed, small.head):
        error = (layer.dense_weight() - model.embed.weight).norm() / model.embed.weight.norm()
        assert error < 0.99  # of a random matrix

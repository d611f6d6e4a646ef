"""Structured pruning with default options on tiny models of transformers' families: smaller, and exactly so."""

import copy
from typing import Any

import pytest
import torch

from pquant_lightning import StructuredPruning, finalize
from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.compression_method import CompressionContext
from tests.zoo import NAMES, build

# more than a quarter of their groups cannot go: width shared by all blocks, a bias per head made from a constant, ...
FEW_GROUPS = {"albert", "bloom", "segformer"}


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_units_go(name: str) -> None:
    model, batch = build(name)
    method = StructuredPruning(sparsity=0.5)
    context = CompressionContext(by="test", samples=method.samples_of([batch]))
    plan = method.checked_plan(model, context)
    assert all(skip.reason for skip in plan.skipped)
    if name not in FEW_GROUPS:
        assert len(plan.skipped) <= (len(plan.layers) + len(plan.skipped)) / 4
    masked: Any = copy.deepcopy(model)
    method.apply(masked, plan, context)
    method.step(masked, context.state, 1.0)
    small = finalize(masked)
    with torch.no_grad():
        expected, found = list(tensors_in(masked(**batch))), list(tensors_in(small(**batch)))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert bool(torch.isfinite(one).all())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after <= 0.75 * before


def test_the_zoo_is_large_and_few_models_are_excused() -> None:
    assert len(NAMES) >= 24
    assert len(FEW_GROUPS) <= len(NAMES) / 12

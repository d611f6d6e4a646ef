"""Low-rank layers of every type: they compute what their dense weight says, and that weight is the optimal one."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pquant_lightning import LowRankCompression
from pquant_lightning.core.errors import OptionError
from pquant_lightning.methods.low_rank.svd import TruncatedSVDLinear, factorize


def _matrices(layer):
    """The weight as matrices `(groups, m, n)`: one channel dimension against all the rest, float64 NumPy."""
    weight = layer.weight.detach().double().numpy()
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _squared_tail(layer, rank):
    """Eckart-Young: the least squared Frobenius error of any weight of that rank (per group)."""
    return sum((np.linalg.svd(m, compute_uv=False)[rank:] ** 2).sum() for m in _matrices(layer))


def _squared_error(layer, new):
    return (new.dense_weight().double() - layer.weight.double()).square().sum().item()


def _largest_rank(layer):
    return min(_matrices(layer).shape[1:])


def _kept_share(layer, new):
    return sum(p.numel() for name, p in new.named_parameters() if "weight" in name) / layer.weight.numel()


def _with_weight(layer, weight):
    other = copy.deepcopy(layer)
    other.weight.data = weight.detach().clone()
    return other


def test_full_rank_gives_the_same_output(case):
    new = factorize(case.layer, rank=10**6)
    assert new.spec["rank"] == _largest_rank(case.layer)
    assert {type(m) for m in new.children()} <= {type(case.layer), nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}
    torch.testing.assert_close(new(case.inputs), case.layer(case.inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_forward_is_that_of_the_dense_weight(case, rank):
    new = factorize(case.layer, rank)
    expected = _with_weight(case.layer, new.dense_weight())(case.inputs)
    torch.testing.assert_close(new(case.inputs), expected, rtol=1e-4, atol=1e-5)
    assert (new(case.inputs) - case.layer(case.inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [1, 2])
def test_error_is_the_eckart_young_optimum(case, rank):
    new = factorize(case.layer, rank)
    optimum = _squared_tail(case.layer, rank)
    assert _squared_error(case.layer, new) == pytest.approx(optimum, rel=1e-4, abs=1e-10)


def test_a_factorized_weight_property_is_the_dense_weight(case):
    new = factorize(case.layer, rank=1)
    assert torch.equal(new.weight, new.dense_weight())
    assert new.weight.shape == case.layer.weight.shape


def test_gradients_reach_both_factors(case):
    new = factorize(case.layer, rank=1)
    new(case.inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())


def test_factors_are_balanced(case):
    left, right = factorize(case.layer, rank=2).factors()
    columns, rows = left.norm(dim=-2), right.norm(dim=-1)
    torch.testing.assert_close(columns, rows, rtol=1e-3, atol=1e-5)


def _planned(layer, **options):
    """The layer after compression, or None where it was left alone."""
    model = nn.Sequential(copy.deepcopy(layer))
    plan = LowRankCompression(min_saving=0, split="channel", include=["*"], **options).plan(model)
    LowRankCompression().apply(model, plan)
    return model[0] if plan.layers else None


@pytest.mark.parametrize("ratio", [0.3, 0.6, 1.0])
def test_param_ratio_is_the_largest_share_that_is_kept(case, ratio):
    new = _planned(case.layer, param_ratio=ratio)
    groups, m, n = _matrices(case.layer).shape
    per_rank = groups * (m + n) / case.layer.weight.numel()
    if new is None:
        assert per_rank > ratio
        return
    assert _kept_share(case.layer, new) <= ratio + 1e-9
    full = new.spec["rank"] == _largest_rank(case.layer)
    assert full or _kept_share(case.layer, new) + per_rank > ratio


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_is_kept_with_the_smallest_rank(case, energy):
    new = _planned(case.layer, energy=energy)
    total = case.layer.weight.double().square().sum().item()
    assert 1 - _squared_error(case.layer, new) / total >= energy - 1e-5
    if new.spec["rank"] > 1:
        short = [
            1 - (np.linalg.svd(m, compute_uv=False)[new.spec["rank"] - 1 :] ** 2).sum() / (m**2).sum()
            for m in _matrices(case.layer)
        ]
        assert min(short) < energy


def test_rank_is_a_count_per_group(case):
    new = _planned(case.layer, rank=2)
    assert new.spec["rank"] == 2
    assert all(
        (np.linalg.matrix_rank(m, tol=1e-4) == 2) for m in _matrices(_with_weight(case.layer, new.dense_weight()))
    )


def test_energy_is_the_same_as_its_rank():
    """The SVD of the decision is used again when the layer is filled."""
    layer = nn.Linear(80, 60)
    by_energy = _planned(layer, energy=0.5)
    by_rank = _planned(layer, rank=by_energy.spec["rank"])
    torch.testing.assert_close(by_energy.dense_weight(), by_rank.dense_weight(), rtol=1e-2, atol=1e-3)
    assert _squared_error(layer, by_energy) <= _squared_error(layer, by_rank) * (1 + 1e-5)


def test_the_padding_row_of_an_embedding_stays_zero():
    model = nn.Sequential(nn.Embedding(40, 8, padding_idx=3))
    LowRankCompression().apply(model, LowRankCompression(rank=2, min_saving=0).plan(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        model(torch.tensor([1, 3, 5])).sum().backward()
        optimizer.step()
    assert model[0].kind == "low_rank_embedding"
    assert model(torch.tensor([1])).abs().min() > 0.1
    assert model(torch.tensor([3])).abs().max() < 1e-4


def test_an_embedding_that_renormalizes_is_left_alone():
    plan = LowRankCompression(rank=2).plan(nn.Sequential(nn.Embedding(40, 8, max_norm=1.0)))
    assert not plan.layers
    assert "max_norm" in plan.skipped[0].reason


def test_a_layer_that_would_grow_is_left_alone_with_both_sizes():
    plan = LowRankCompression(rank=64).plan(nn.Sequential(nn.Linear(64, 64)))
    assert not plan.layers
    assert "33,024 bytes instead of 16,640" in plan.skipped[0].reason


@pytest.mark.parametrize("min_saving", [0.2, 0.4])
def test_min_saving_is_a_share_of_the_layers_bytes(min_saving):
    """Rank 22 of 64x64 keeps 2 * 64 * 22 + 64 of 4160 numbers: 31 % saved."""
    plan = LowRankCompression(rank=22, min_saving=min_saving).plan(nn.Sequential(nn.Linear(64, 64)))
    assert bool(plan.layers) == (min_saving < 0.31)


@pytest.mark.parametrize("rank", [1, 5, 12, 100])
def test_from_linear_is_the_best_of_its_rank(rank):
    layer = nn.Linear(16, 12)
    new = TruncatedSVDLinear.from_linear(layer, rank=rank)
    assert new.first.out_features == min(rank, 12)
    assert new.first.bias is None
    assert _squared_error(layer, new) == pytest.approx(_squared_tail(layer, rank), rel=1e-4, abs=1e-10)
    assert torch.equal(new.second.bias, layer.bias)


def test_from_linear_has_rank_64_by_default():
    assert TruncatedSVDLinear.from_linear(nn.Linear(100, 90)).spec["rank"] == 64


@pytest.mark.parametrize(("layer", "rank"), [(nn.Conv2d(1, 1, 1), 4), (nn.Linear(4, 4), 0), (nn.Linear(4, 4), -1)])
def test_from_linear_refuses_other_layers_and_ranks(layer, rank):
    with pytest.raises(OptionError, match="an nn.Linear and a rank of at least 1"):
        TruncatedSVDLinear.from_linear(layer, rank=rank)


def test_candidates_fall_in_loss_as_they_grow():
    layer = nn.Linear(64, 48)
    candidates = LowRankCompression().candidates("fc", layer, None)
    sizes, losses = [c.size_bytes for c in candidates], [c.loss for c in candidates]
    assert len(candidates) > 5
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    total = layer.weight.double().square().sum().item()
    for candidate in candidates:
        rank = candidate.options["rank"]
        assert candidate.size_bytes == 4 * rank * (64 + 48)
        assert candidate.loss == pytest.approx(_squared_tail(layer, rank) / total, abs=1e-5)

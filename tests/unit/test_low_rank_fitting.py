"""Factors of least output error, against the theory of reduced-rank regression, on data with and without full rank."""

import numpy as np
import pytest
import torch
from torch import nn

from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.moments import InputMoments, collect_moments, damped_root, has_moments
from pquant_lightning.methods.low_rank import _fitting
from pquant_lightning.methods.low_rank._choices import losses, macs_per_position, offers, why_slower
from pquant_lightning.methods.low_rank._fitting import fit, fit_layer
from pquant_lightning.methods.low_rank._layers import (
    TruncatedSVDConv,
    TruncatedSVDLinear,
    TruncatedSVDSpatialConv,
    fill_factors,
    kinds_of,
    low_rank_spec,
    weight_matrix,
)
from pquant_lightning.methods.low_rank._ranks import evbmf_rank


@pytest.fixture
def no_damping(monkeypatch):
    monkeypatch.setattr(damped_root, "__defaults__", (1e-7,))
    monkeypatch.setattr(_fitting, "REGRESSION_DAMPING", 1e-7)


def _moments(layer, x):
    return collect_moments(nn.Sequential(layer), ["0"], Samples((x,), lambda m, b: m(b)))["0"]


def _built(layer, kind, rank, moments):
    found = fit_layer(layer, kind, rank, moments)
    new = CompressedLayer.build(low_rank_spec(layer, rank, kind), layer)
    with torch.no_grad():
        fill_factors(new, layer, found.factors)
        if found.shift is not None:
            new.second.bias = nn.Parameter(new.second.bias + found.shift)
    return new, found


def _skewed(*shape):
    """Correlated inputs with very different variances and a mean."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    n = shape[-1]
    return x @ (torch.randn(n, n, generator=torch.Generator().manual_seed(4)) * torch.logspace(0, -2, n)) + 0.7


@pytest.mark.parametrize(("out", "in_"), [(20, 12), (12, 20), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_the_least_output_error(out, in_, bias, no_damping):
    """Reduced-rank regression: the tail of the singular values of the (centred) outputs."""
    torch.manual_seed(0)
    layer, x, rank = nn.Linear(in_, out, bias=bias).double(), _skewed(300, in_).double(), 4
    new, found = _built(layer, TruncatedSVDLinear, rank, _moments(layer, x))
    with torch.no_grad():
        y, error = layer(x), (layer(x) - new(x)).square().sum().item()
    y = y - y.mean(0) if bias else y
    squares = np.linalg.svd(y.numpy(), compute_uv=False) ** 2
    assert error == pytest.approx(squares[rank:].sum(), rel=1e-4)
    assert found.loss == pytest.approx(squares[rank:].sum() / squares.sum(), rel=1e-3)
    plain, _ = _built(layer, TruncatedSVDLinear, rank, None)
    assert error < 0.5 * (layer(x) - plain(x)).square().sum().item()


def test_convolutions_and_their_groups_beat_plain_factors(case):
    layer = case.layer
    if not has_moments(layer) or "Transpose" in type(layer).__name__:
        pytest.skip("outputs of positions overlap")
    x = case.inputs * torch.linspace(0.1, 3, case.inputs[0].numel()).reshape(case.inputs[0].shape) + 0.5
    moments = _moments(layer, x)
    for kind in kinds_of(layer):
        new, found = _built(layer, kind, 2, moments)
        plain, _ = _built(layer, kind, 2, None)
        wanted = layer(x).detach()
        error, plain_error = (wanted - new(x)).square().sum(), (wanted - plain(x)).square().sum()
        assert error < 1.02 * plain_error, kind
        if layer.bias is not None:
            channels = wanted.dim() - 1 if isinstance(layer, nn.Linear) else 1
            positions = [d for d in range(wanted.dim()) if d != channels]
            torch.testing.assert_close(new(x).mean(positions), wanted.mean(positions), rtol=1e-3, atol=1e-4)
            variance = (wanted - wanted.mean(positions, keepdim=True)).square().sum()
            assert found.loss == pytest.approx(float((error / variance).detach()), rel=0.15, abs=2e-3)


def test_a_transposed_convolution_is_fitted_to_its_inputs():
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(8, 6, 2, stride=2), _skewed(40, 3, 3, 8).movedim(-1, 1)  # windows do not overlap
    (kind,) = kinds_of(layer)
    new, _ = _built(layer, kind, 3, _moments(layer, x))
    plain, _ = _built(layer, kind, 3, None)
    wanted = layer(x)
    assert (wanted - new(x)).norm() < 0.7 * (wanted - plain(x)).norm()


def test_factors_stay_balanced_with_data():
    torch.manual_seed(0)
    layer = nn.Linear(20, 16)
    new, _ = _built(layer, TruncatedSVDLinear, 4, _moments(layer, _skewed(200, 20)))
    left, right = new.factors()
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("out", "in_"), [(10, 24), (24, 10)])
def test_full_rank_is_exact_even_on_poor_data(out, in_):
    layer = nn.Linear(in_, out)
    x = torch.zeros(3, in_)
    x[:, 0] = 1.0
    new, found = _built(layer, TruncatedSVDLinear, min(out, in_), _moments(layer, x))
    torch.testing.assert_close(new.dense_weight(), layer.weight, rtol=1e-4, atol=1e-5)
    assert found.loss == 0


def test_singular_moments_are_damped_to_plain_factors_where_nothing_is_seen():
    """Three positions of a layer with 24 inputs: exact there, and the unseen directions share what rank is left."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 20, bias=False), torch.randn(3, 24)
    new, _ = _built(layer, TruncatedSVDLinear, 8, _moments(layer, x))
    assert (layer(x) - new(x)).norm() < 1e-2 * layer(x).norm()
    unseen = torch.linalg.qr(x.T, mode="complete").Q[:, 3:].T
    lost = (layer(unseen) - new(unseen)).norm() / layer(unseen).norm()
    plain, _ = _built(layer, TruncatedSVDLinear, 8, None)
    assert lost < 1.3 * (layer(unseen) - plain(unseen)).norm() / layer(unseen).norm()


def test_inputs_of_zero_give_plain_factors():
    layer = nn.Linear(6, 5)
    zero = InputMoments(10, torch.zeros(1, 6), torch.zeros(1, 6, 6))
    assert damped_root(zero.second) is None
    new, _ = _built(layer, TruncatedSVDLinear, 2, zero)
    plain, _ = _built(layer, TruncatedSVDLinear, 2, None)
    torch.testing.assert_close(new.dense_weight(), plain.dense_weight(), rtol=1e-4, atol=1e-5)


def test_damping_is_raised_until_the_moment_is_definite():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.2]))[None]
    root = damped_root(indefinite, 0.01)
    added = root @ root.mT - indefinite
    torch.testing.assert_close(added, 0.6 * torch.eye(3)[None], rtol=1e-4, atol=1e-5)  # 0.01, 0.1, then 1 times 0.6


def test_changed_inputs_are_regressed_to_the_reference(no_damping):
    """What the layer gave from x' is linear in x: the corrected weight finds it, and plain whitening cannot."""
    torch.manual_seed(0)
    layer, mix = nn.Linear(12, 9).double(), torch.eye(12).double() + 0.4 * torch.randn(12, 12).double()
    x = torch.randn(400, 12).double()
    reference = x @ mix.T + 0.3
    moments = _moments(layer, x)
    moments.reference_mean = reference.mean(0)[None]
    moments.cross_covariance = ((reference - reference.mean(0) - x + x.mean(0)).T @ (x - x.mean(0)) / len(x))[None]
    new, _ = _built(layer, TruncatedSVDLinear, 9, moments)
    wanted = layer(reference)
    assert (wanted - new(x)).norm() < 1e-3 * wanted.norm()
    blind, _ = _built(layer, TruncatedSVDLinear, 9, _moments(layer, x))
    assert (wanted - blind(x)).norm() > 0.3 * wanted.norm()


class TestSpatial:
    layer = staticmethod(lambda **o: nn.Conv2d(6, 8, (3, 2), **{"stride": (2, 1), "padding": (1, 0), **o}))

    def test_matrix_and_back(self):
        layer = self.layer(groups=2)
        matrix = weight_matrix(layer, TruncatedSVDSpatialConv)
        assert matrix.shape == (2, 4 * 2, 3 * 3)
        assert torch.equal(TruncatedSVDSpatialConv.from_matrix(matrix, layer.kernel_size), layer.weight)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"groups": 2},
            {"dilation": (1, 2)},
            {"stride": (2, 3)},
            {"stride": 1, "padding": "same", "padding_mode": "circular"},
            {"padding": (1, 1), "padding_mode": "reflect", "bias": False},
        ],
    )
    @pytest.mark.parametrize("rank", [1, 2, 8])
    def test_the_two_convolutions_compute_the_dense_weight(self, options, rank):
        torch.manual_seed(0)
        layer, x = self.layer(**options), torch.randn(2, 6, 7, 8)
        new, _ = _built(layer, TruncatedSVDSpatialConv, rank, None)
        assert [tuple(m.kernel_size) for m in (new.first, new.second)] == [(3, 1), (1, 2)]
        twin = self.layer(**options)
        twin.load_state_dict({**layer.state_dict(), "weight": new.dense_weight()})
        torch.testing.assert_close(new(x), twin(x), rtol=1e-4, atol=1e-5)
        squares = torch.linalg.svdvals(weight_matrix(layer, TruncatedSVDSpatialConv)).square()
        lost = (new.dense_weight() - layer.weight).square().sum()
        torch.testing.assert_close(lost, squares[:, rank:].sum(), rtol=1e-3, atol=1e-6)

    def test_the_refit_is_the_least_squares_optimum(self, no_damping):
        """No other second convolution behind the same first one does better: the gradient there is zero."""
        torch.manual_seed(0)
        layer = self.layer(groups=2).double()
        x = torch.nn.functional.avg_pool2d(torch.randn(60, 6, 9, 10).double(), 2, 1) + 0.3
        new, _ = _built(layer, TruncatedSVDSpatialConv, 2, _moments(layer, x))
        (layer(x) - new(x)).square().mean().backward()
        scale = layer(x).square().mean() / new.second.weight.norm()
        assert new.second.weight.grad.norm() < 1e-3 * scale
        assert new.second.bias.grad.norm() < 1e-3 * scale

    def test_losses_at_all_ranks_are_those_before_the_refit(self, no_damping):
        torch.manual_seed(0)
        layer = self.layer(groups=2).double()
        x = torch.nn.functional.avg_pool2d(torch.randn(60, 6, 9, 10).double(), 2, 1)
        moments = _moments(layer, x)
        found = losses(layer, TruncatedSVDSpatialConv, weight_matrix(layer, TruncatedSVDSpatialConv).detach(), moments)
        for rank in (1, 3, 5):
            refitted = fit(layer, TruncatedSVDSpatialConv, rank, moments).loss
            assert refitted - 1e-9 <= float(found[rank - 1]) < 1.3 * refitted + 1e-6
        assert float(found[-1]) < 1e-6

    def test_a_wide_stride_makes_it_slower_than_the_dense_layer(self):
        layer = nn.Conv2d(16, 16, 3, stride=(1, 3))
        assert macs_per_position(layer, None, 1) == 16 * 16 * 9
        assert macs_per_position(layer, TruncatedSVDSpatialConv, 16) == 16 * (16 * 3 + 3 * 16 * 3)
        assert "multiply-accumulates per position instead of 2,304" in why_slower(layer, TruncatedSVDSpatialConv, 16)
        assert why_slower(layer, TruncatedSVDSpatialConv, 8) is None
        assert why_slower(layer, TruncatedSVDConv, 12) is None


@pytest.mark.parametrize("with_data", [True, False])
def test_offers_state_the_losses_that_come_true(with_data):
    torch.manual_seed(0)
    layer = nn.Linear(40, 32)
    moments = _moments(layer, _skewed(500, 40)) if with_data else None
    offered = offers(layer, TruncatedSVDLinear, 4, moments)
    assert all(offer.options["rank"] % 4 == 0 for offer in offered)
    assert len(offered) == 4  # 4, 8, 12, 16: rank 17 is as large as the layer
    for offer in offered:
        assert offer.size_bytes == 4 * offer.options["rank"] * 72
        found = fit_layer(layer, TruncatedSVDLinear, offer.options["rank"], moments)
        assert offer.loss == pytest.approx(found.loss, rel=0.05, abs=1e-4)


class TestEVBMF:
    @pytest.mark.parametrize(("m", "n", "rank"), [(100, 200, 10), (200, 100, 5), (64, 64, 0), (300, 100, 30)])
    @pytest.mark.parametrize("noise", [0.1, 1.0])
    def test_it_finds_the_rank_of_the_signal(self, m, n, rank, noise):
        generator = torch.Generator().manual_seed(m + rank)
        signal = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
        matrix = signal + noise * torch.randn(m, n, generator=generator)
        assert evbmf_rank(torch.linalg.svdvals(matrix), m, n) == rank
        assert evbmf_rank(torch.linalg.svdvals(1e-4 * matrix), m, n) == rank  # the scale is free

    def test_a_signal_below_the_noise_is_not_found(self):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(100, 100, generator=generator)
        matrix += 0.2 * torch.outer(torch.randn(100, generator=generator), torch.randn(100, generator=generator)) / 3
        assert evbmf_rank(torch.linalg.svdvals(matrix), 100, 100) == 0

    def test_without_noise_and_without_anything(self):
        generator = torch.Generator().manual_seed(0)
        exact = torch.randn(50, 7, generator=generator) @ torch.randn(7, 40, generator=generator)
        assert evbmf_rank(torch.linalg.svdvals(exact), 50, 40) == 7
        assert evbmf_rank(torch.zeros(40), 50, 40) == 0

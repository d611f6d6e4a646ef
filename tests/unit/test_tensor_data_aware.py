"""Tensor networks fitted to the inputs of their layers, never worse than without; and what they offer to a budget."""

import copy
import itertools
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pquant_lightning import (
    CPCallback,
    CPCompression,
    TensorTrainCallback,
    TensorTrainCompression,
    TuckerCallback,
    TuckerCompression,
    compress_model,
)
from pquant_lightning.core.budget import allocate
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import CalibrationError, OptionError
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.moments import damped_root, energy
from pquant_lightning.core.plan import LayerPlan
from pquant_lightning.methods.tensor_networks import _tt_refit
from pquant_lightning.methods.tensor_networks._contraction import merged
from pquant_lightning.methods.tensor_networks._cp_als import cp_als, cp_dense
from pquant_lightning.methods.tensor_networks._output_fit import (
    correction,
    fit_cp_matrix,
    fit_kernel,
    fit_matrix,
    kernel_rows,
    mode_roots,
    scale_modes,
)
from pquant_lightning.methods.tensor_networks._tt_refit import _refit, refit_cores
from pquant_lightning.methods.tensor_networks._tt_svd import tt_dense, tt_svd
from pquant_lightning.methods.tensor_networks.tensor_train import from_train, to_train
from pquant_lightning.methods.tensor_networks.tucker import _split
from tests.models import ConvNet, built, fit, quiet_trainer

METHODS = {"tensor_train": TensorTrainCompression, "tucker": TuckerCompression, "cp": CPCompression}


@pytest.fixture
def no_damping(monkeypatch):
    monkeypatch.setattr(damped_root, "__defaults__", (1e-12,))


def correlated(count, channels, *size, seed=0):
    """Inputs whose channels have a few strong directions and a mean: `(count, channels, *size)`."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw) * (0.6 ** torch.arange(channels))
    x = torch.randn(count, *size, channels, generator=draw) @ mixing.T + torch.randn(channels, generator=draw)
    return x.movedim(-1, 1)


def samples_of(x):
    return Samples((x,), lambda model, batch: model(batch))


def compressed(layer, x, method, **options):
    """A layer that was fitted to `x`; the same without data where `x` is None."""
    model = nn.Sequential(copy.deepcopy(layer))
    chosen = METHODS[method](min_saving=0.0, **options)
    context = CompressionContext(by="test", samples=None if x is None else samples_of(x))
    plan = chosen.plan(model, context)
    chosen.apply(model, plan, context)
    return model[0]


def error(layer, new, x):
    with torch.no_grad():
        wanted = layer(x)
        return float((new(x) - wanted).square().mean() / wanted.var())


LAYERS = {
    "linear": (nn.Linear(24, 20), ()),
    "linear_padded": (nn.Linear(23, 19, bias=False), ()),
    "conv": (nn.Conv2d(12, 16, 3, padding=1), (6, 6)),
    "conv_grouped_strided": (nn.Conv1d(12, 16, 3, stride=2, groups=2, bias=False), (9,)),
}
PAIRS = [(m, name) for m in METHODS for name in LAYERS if m != "tucker" or "conv" in name]


@pytest.mark.parametrize(("method", "name"), PAIRS)
@pytest.mark.parametrize("rank", [2, 4])
def test_the_output_error_on_the_samples_is_at_most_that_without_data(method, name, rank):
    layer, size = LAYERS[name]
    x = correlated(200, layer.weight.shape[1] * getattr(layer, "groups", 1), *size)
    aware, plain = compressed(layer, x, method, rank=rank), compressed(layer, None, method, rank=rank)
    assert aware.spec["ranks" if method != "cp" else "rank"] == plain.spec["ranks" if method != "cp" else "rank"]
    assert error(layer, aware, x) <= error(layer, plain, x) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("method", "name", "share"),
    [
        ("tucker", "conv", 0.6),
        ("cp", "conv", 0.6),
        ("tensor_train", "conv", 0.6),
        ("cp", "linear", 0.8),
        ("tensor_train", "linear", 0.8),
    ],
)
def test_correlated_inputs_make_it_much_smaller(method, name, share):
    layer, size = LAYERS[name]
    x = correlated(300, layer.weight.shape[1], *size)
    fresh = correlated(300, layer.weight.shape[1], *size)[150:]
    aware, plain = compressed(layer, x[:150], method, rank=5), compressed(layer, None, method, rank=5)
    assert error(layer, aware, fresh) < share * error(layer, plain, fresh)


@pytest.mark.parametrize("method", METHODS)
def test_full_ranks_stay_exact(case, method):
    if isinstance(case.layer, nn.Embedding) or (method == "tucker" and isinstance(case.layer, nn.Linear)):
        pytest.skip("no moments, or no kernel")
    new = compressed(case.layer, case.inputs, method, rank=10_000)
    torch.testing.assert_close(new(case.inputs), case.layer(case.inputs), rtol=1e-3, atol=1e-4)


def test_a_transposed_conv_is_fitted_to_the_moment_of_its_channels():
    layer = nn.ConvTranspose2d(12, 8, 3, stride=2)
    x = correlated(100, 12, 4, 4)
    for method in METHODS:
        aware, plain = compressed(layer, x, method, rank=4), compressed(layer, None, method, rank=4)
        assert error(layer, aware, x) < 0.8 * error(layer, plain, x)


@pytest.mark.parametrize("method", ["tensor_train", "tucker", "cp"])
def test_the_bias_takes_the_mean_error(method):
    layer, x = nn.Conv2d(12, 16, 3), correlated(64, 12, 6, 6)
    aware, plain = compressed(layer, x, method, rank=3), compressed(layer, None, method, rank=3)
    with torch.no_grad():
        gaps = [(new(x) - layer(x)).mean((0, 2, 3)).abs().max() for new in (aware, plain)]
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]


# -- theory ------------------------------------------------------------------------------------------------------------


def _moment(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=draw, dtype=torch.float64) * (0.7 ** torch.arange(n))
    x = x @ torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    return x.T @ x / len(x)


def test_a_point_kernel_reaches_the_optimum_of_reduced_rank_regression(no_damping):
    kernel, moment = torch.randn(2, 9, 8, 1, dtype=torch.float64), torch.stack([_moment(8, 1), _moment(8, 2)])
    left, inner = fit_kernel(kernel, moment, lambda whole: _split(whole, (3, 3)))
    lost = energy((kernel - (left @ inner.flatten(2)).unflatten(2, (8, 1)))[..., 0], moment)
    tail = torch.linalg.svdvals(kernel[..., 0] @ torch.linalg.cholesky(moment))[:, 3:].square().sum()
    assert lost == pytest.approx(float(tail), rel=1e-6)


def test_the_last_factor_is_the_least_squares_one(no_damping):
    kernel, moment = torch.randn(1, 6, 4, 3, dtype=torch.float64), _moment(12).unsqueeze(0)
    left, inner = fit_kernel(kernel, moment, lambda whole: _split(whole, (6, 2)))
    read, rows = kernel_rows(inner, 12)[:, :, 0], kernel_rows(kernel, 12)[:, :, 0]
    gradient = (rows - left @ read) @ moment @ read.mT
    assert float(gradient.abs().max()) < 1e-8 * float((rows @ moment @ read.mT).abs().max())


@pytest.mark.parametrize("damping", [1e-9, 0.1, 10.0])
def test_a_correction_never_increases_the_error(damping, monkeypatch):
    monkeypatch.setattr(damped_root, "__defaults__", (damping,))
    weight, moment = torch.randn(1, 5, 8, dtype=torch.float64), _moment(8).unsqueeze(0)
    read, left = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    better = correction(left, weight @ moment @ read.mT, read @ moment @ read.mT)
    assert energy(weight - better @ read, moment) < energy(weight - left @ read, moment)


def test_a_train_of_two_cores_is_optimal_where_the_moment_is_a_kronecker_product(no_damping):
    rows, columns = (3, 4), (5, 2)
    parts = _moment(5, 1), _moment(2, 2)
    moment, weight = torch.kron(*parts), torch.randn(12, 10, dtype=torch.float64)

    def approximate(matrix):
        return from_train(tt_dense(tt_svd(to_train(matrix, rows, columns), [1, 3, 1])[0]), rows, columns)

    found = fit_matrix(weight, moment, (rows, columns), approximate, lambda matrix: matrix)
    whitened = to_train(weight @ torch.kron(*(torch.linalg.cholesky(part) for part in parts)), rows, columns)
    tail = torch.linalg.svdvals(whitened[0])[3:].square().sum()
    assert energy(weight - found, moment) == pytest.approx(float(tail), rel=1e-6)
    assert energy(weight - approximate(weight), moment) > 1.1 * float(tail)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_refitted_core_is_the_least_squares_one(place, no_damping, monkeypatch):
    """Against a dense least-squares problem over the core's own numbers."""
    rows, columns = (2, 3, 2), (3, 2, 2)
    weight, moment = torch.randn(11, 12, dtype=torch.float64), _moment(12)
    sizes = [(1, 2, 3, 2), (2, 3, 2, 3), (3, 2, 2, 1)]
    cores = [torch.randn(size, dtype=torch.float64) for size in sizes]
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 1))
    fitted = _refit(cores, place, padded @ moment, moment)

    def dense(core):
        return merged([*cores[:place], core, *cores[place + 1 :]])

    root = torch.linalg.cholesky(moment)
    units = torch.eye(cores[place].numel(), dtype=torch.float64).reshape(-1, *sizes[place])
    system = torch.stack([(dense(unit) @ root).flatten() for unit in units], 1)
    solved = torch.linalg.lstsq(system, (padded @ root).flatten(), driver="gelsd").solution.reshape(sizes[place])
    best = energy(padded - dense(solved), moment)
    assert energy(padded - dense(fitted), moment) == pytest.approx(best, rel=1e-6)
    assert energy(padded - dense(cores[place]), moment) > 1.1 * best
    after = refit_cores(cores, weight, moment, (rows, columns))
    assert energy(padded - merged(after), moment) < best
    monkeypatch.setattr(_tt_refit, "MOST_NUMBERS", 1)
    assert all(map(torch.equal, refit_cores(cores, weight, moment, (rows, columns)), cores))


def test_scaling_modes_is_the_kronecker_product_and_is_undone():
    moment, matrix = _moment(12), torch.randn(4, 12, dtype=torch.float64)
    roots = mode_roots(moment, (3, 2, 2))
    scaled = scale_modes(matrix, roots)
    torch.testing.assert_close(scaled, matrix @ torch.kron(torch.kron(roots[0], roots[1]), roots[2]))
    torch.testing.assert_close(scale_modes(scaled, roots, undo=True), matrix)
    assert mode_roots(torch.zeros(12, 12), (3, 4)) is None


def test_cp_of_a_matrix_is_at_least_as_good_as_als():
    weight, moment = torch.randn(11, 12, dtype=torch.float64), _moment(12)
    modes = (3, 4), (4, 3)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 1)).reshape(1, 3, 4, 4, 3)
    for rank in (2, 5, 9):
        found = [cp_dense(fit_cp_matrix(weight, moment, modes, rank)), cp_dense(cp_als(padded, rank, 2))]
        errors = [energy(weight - dense.reshape(12, 12)[:11], moment) for dense in found]
        assert errors[0] < 0.8 * errors[1]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_data_are_used_where_they_are_and_no_training_follows(method, caplog):
    model, x = nn.Sequential(nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), correlated(40, 12, 8, 8)
    options = {"rank": 3, "min_saving": 0.0}
    with caplog.at_level(logging.INFO):
        plain = compress_model(model, method, train_loader=[x], data_aware=False, **options)
        assert "fitted" not in caplog.text
        aware = compress_model(model, method, train_loader=[x], num_samples=20, **options)
        assert f"{method} has fitted layers to their inputs in 20 samples." in caplog.text
        parts = compress_model(model, method, train_loader=[x], num_samples=20, max_statistics_bytes=1, **options)
        # two to plan, two to apply
        assert "in 20 samples in 5 passes (max_statistics_bytes)" in caplog.text
    assert error(model, aware, x) < 0.9 * error(model, plain, x)
    assert error(model, parts, x) < 0.9 * error(model, plain, x)
    with pytest.raises(CalibrationError, match=f"{method} is to measure the inputs of the layers"):
        compress_model(model, method, data_aware=True, **options)


@pytest.mark.parametrize("callback", [TensorTrainCallback, TuckerCallback, CPCallback])
def test_in_a_trainer_only_on_request(callback, tmp_path, caplog):
    for given in (None, True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(quiet_trainer(tmp_path, [callback(rank=2, min_saving=0.0, data_aware=given)]), built(ConvNet))
        assert ("fitted layers to their inputs" in caplog.text) is (given is True)


@pytest.mark.parametrize("options", [{"max_error": 0.5}, {"init": "random"}])
def test_what_bounds_the_weight_or_drops_it_uses_no_data(options, caplog):
    with caplog.at_level(logging.INFO):
        compress_model(nn.Sequential(nn.Linear(64, 64)), "tensor_train", train_loader=[torch.randn(9, 64)], **options)
    assert "fitted" not in caplog.text
    with pytest.raises(OptionError, match="data_aware=True bounds the error of the outputs"):
        TensorTrainCompression(data_aware=True, **options)


# -- candidates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_candidates_are_what_the_layers_become(case, method, with_data):
    if with_data and isinstance(case.layer, nn.Embedding):
        pytest.skip("indices have no moments")
    chosen, model = METHODS[method](min_saving=0.0), nn.Sequential(case.layer)
    context = CompressionContext(by="test", samples=samples_of(case.inputs) if with_data else None)
    offers = chosen.candidates("0", case.layer, chosen.with_source(model, context))
    if chosen.why_not(case.layer) is not None:
        assert offers == []
        return
    for before, after in itertools.pairwise(offers):
        assert before.size_bytes < after.size_bytes
        assert before.loss > after.loss
    assert 0 <= offers[-1].loss < offers[0].loss <= 1.0 + 1e-6
    for offer in offers[:2]:
        new = _build(case.layer, offer.options, chosen, chosen.with_source(model, context))
        assert stored_bytes(new) == offer.size_bytes
        if not with_data:
            lost = (case.layer.weight - new.weight).square().sum() / case.layer.weight.square().sum()
            assert offer.loss == pytest.approx(float(lost), rel=1e-4)


def _build(layer, options, method, context):
    spec = {**options, "by": "test", "layer": layer_spec(layer)}
    own = copy.deepcopy(layer)
    new = CompressedLayer.build(spec, own)
    context.notes.setdefault("singular", [])
    with torch.no_grad():
        method.fill(new, own, LayerPlan("0", spec), context)
    return new


def _macs(layer, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("method", METHODS)
def test_multiplications_are_those_of_the_forward(method):
    layer, x = nn.Conv2d(8, 12, 2, stride=2, bias=False), torch.randn(1, 8, 12, 12)
    chosen = METHODS[method](min_saving=0.0)
    for offer in chosen.candidates("0", layer, None):
        new = _build(layer, offer.options, chosen, CompressionContext(by="test"))
        assert _macs(new, x) == 36 * offer.macs
    layer, x = nn.ConvTranspose2d(8, 12, 2, stride=2, bias=False), torch.randn(1, 8, 6, 6)
    for offer in chosen.candidates("0", layer, None):
        new = _build(layer, offer.options, chosen, CompressionContext(by="test"))
        assert _macs(new, x) == 36 * offer.macs


@pytest.mark.parametrize("method", ["tensor_train", "cp"])
def test_multiplications_of_a_linear(method):
    layer = nn.Linear(64, 60, bias=False)
    chosen = METHODS[method](min_saving=0.0)
    for offer in chosen.candidates("0", layer, None):
        new = _build(layer, offer.options, chosen, CompressionContext(by="test"))
        if method == "cp":
            assert offer.macs == offer.options["rank"] * 124
        else:
            assert offer.macs == min(sum(step.macs for step in route.steps) for route in new.shape.routes) <= 64 * 60


def test_a_budget_is_shared_over_layers_and_methods():
    layers = {"0": nn.Conv2d(16, 16, 3), "1": nn.Conv2d(16, 32, 3)}
    offers = {
        name: [offer for method in METHODS.values() for offer in method().candidates(name, layer, None)]
        for name, layer in layers.items()
    }
    losses = []
    for share in (0.3, 0.5, 0.8):
        budget = share * sum(stored_bytes(layer) for layer in layers.values())
        chosen = allocate(offers, budget, lambda offer: offer.size_bytes)
        assert sum(offer.size_bytes for offer in chosen.values()) <= budget
        losses.append(math.fsum(offer.loss for offer in chosen.values()))
    assert losses[0] > losses[1] > losses[2]

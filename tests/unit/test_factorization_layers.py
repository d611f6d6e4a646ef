"""The layers of `factorization`: they compute what their dense weight says, and keep their constraints in training."""

import copy

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressionMethodRegistry,
    FactorizationCallback,
    FactorizationCompression,
    LowRankCallback,
    LowRankCompression,
    compress_model,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.errors import ModelError, OptionError
from pquant_lightning.core.report import make_report, weight_error
from tests.models import MLP, built, fit, quiet_trainer

KINDS = ("nmf", "kronecker", "monarch", "cur", "sparse_low_rank")
LINEAR_ONLY = ("kronecker", "monarch")


def _single(layer, **options):
    """A layer compressed alone, which must succeed."""
    return FactorizationCompression(min_saving=0, **options).compress(nn.Sequential(layer))[0]


def _with_weight(layer, weight):
    other = copy.deepcopy(layer)
    other.weight.data = weight.detach().clone()
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_that_of_the_dense_weight(case, kind):
    if kind in LINEAR_ONLY and type(case.layer) is not nn.Linear:
        with pytest.raises(ModelError, match=f"{kind} covers Linear layers only"):
            _single(case.layer, kind=kind, rank=1)
        return
    options = {"blocks": 2} if kind == "monarch" else {}
    new = _single(case.layer, kind=kind, rank=2, **options)
    expected = _with_weight(case.layer, new.dense_weight())(case.inputs)
    torch.testing.assert_close(new(case.inputs), expected, rtol=1e-4, atol=1e-5)
    assert (new(case.inputs) - case.layer(case.inputs)).abs().max() > 1e-3
    ordinary = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, type(case.layer))
    assert {type(child) for child in new.children()} <= set(ordinary)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("kind", LINEAR_ONLY)
def test_inputs_of_any_number_of_dimensions(kind, shape):
    layer, x = nn.Linear(12, 8), torch.randn(shape)
    options = {"blocks": 4} if kind == "monarch" else {}
    new = _single(layer, kind=kind, rank=1, **options)
    torch.testing.assert_close(new(x), _with_weight(layer, new.dense_weight())(x), rtol=1e-4, atol=1e-5)
    assert new.bias is not layer.bias  # a copy of the model
    assert torch.equal(new.bias, layer.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_param_ratio_is_the_share_of_weights_that_is_kept(kind, share):
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    small = FactorizationCompression(kind=kind, param_ratio=share, min_saving=0).compress(model)
    kept = sum(int(torch.count_nonzero(p)) for p in small.parameters()) / (64 * 48)
    assert share - 0.08 <= kept <= share + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_more_rank_means_less_error(kind):
    layer = nn.Linear(32, 24)
    errors = [weight_error(layer, _single(layer, kind=kind, rank=rank)) for rank in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_more_blocks_or_iterations_or_density():
    layer = nn.Linear(32, 32)

    def error(**options):
        return weight_error(layer, _single(layer, **options))

    assert _single(layer, kind="monarch", rank=1, blocks=8).first.groups == 8
    assert error(kind="monarch", rank=1, blocks=8) < error(kind="monarch", rank=1, blocks=2)
    assert error(kind="nmf", rank=8, iterations=50) < error(kind="nmf", rank=8, iterations=1)
    sparse = {"kind": "sparse_low_rank", "rank": 4}
    assert error(**sparse, density=0.3) < error(**sparse, density=0.1) < error(kind="nmf", rank=4)
    assert int((_single(layer, **sparse, density=0.25).sparse.weight != 0).sum()) == 256
    assert error(**sparse, iterations=30) < error(**sparse, iterations=1)


def test_a_sparse_layer_counts_the_bytes_it_has_in_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    method = FactorizationCompression(rank=8, density=0.1)  # with all zeros stored, it would be larger than before
    small = method.compress(model)
    stored = 409 * 4 + 64 * 64 // 8 + 2 * 64 * 8 * 4
    assert make_report(small, original=model).size_bytes == (64 * 64 * 4, stored)
    path = save_compressed(small, tmp_path / "model.safetensors")
    assert stored < path.stat().st_size < stored + 2000
    loaded = load_compressed(nn.Sequential(nn.Linear(64, 64, bias=False)), path)
    assert torch.equal(loaded[0].sparse.weight, small[0].sparse.weight)
    with pytest.raises(ModelError, match="would not get smaller: 16,896 bytes instead of 16,384"):
        FactorizationCompression(rank=24, density=0.25).compress(model)


class TestTraining:
    @pytest.mark.parametrize(("kind", "options"), [("nmf", {"rank": 3}), ("sparse_low_rank", {"param_ratio": 0.6})])
    def test_constraints_hold_after_every_step_and_on_resume(self, kind, options, tmp_path):
        trainer = quiet_trainer(tmp_path, [FactorizationCallback(kind=kind, include=["fc*"], **options)])
        model = fit(trainer, built(MLP))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        first = self._constrained(model, kind)
        again = quiet_trainer(tmp_path, [FactorizationCallback(kind=kind, include=["fc*"], **options)], max_epochs=2)
        resumed = fit(again, MLP(), ckpt_path=tmp_path / "last.ckpt")
        second = self._constrained(resumed, kind)
        for one, other in zip(first, second, strict=True):
            assert not torch.equal(one, other)  # trained on
            if kind == "sparse_low_rank":
                assert torch.equal(one != 0, other != 0)
                assert 0.25 < (one != 0).float().mean() <= 0.32  # half of the share, and what the rank leaves of it
            else:
                assert one.min() == other.min() == 0

    @staticmethod
    def _constrained(model, kind):
        name = "sparse" if kind == "sparse_low_rank" else None
        weights = []
        for layer in (model.fc1, model.fc2):
            wide = layer.spec["layer"]["in_features"] > layer.spec["layer"]["out_features"]
            weights.append(getattr(layer, name or ("second" if wide else "first")).weight.detach().clone())
        return weights

    def test_without_the_projection_they_would_not_hold(self):
        model = FactorizationCompression(kind="nmf", rank=3).compress(built(MLP))
        method = FactorizationCompression(kind="nmf", rank=3)
        with torch.no_grad():
            model.fc1.first.weight.sub_(0.1)
        assert model.fc1.first.weight.min() < 0
        method.project(model, {})
        assert model.fc1.first.weight.min() == 0


def test_it_quantizes_on_top_and_loads_again(tmp_path):
    for kind in KINDS:
        small = FactorizationCompression(kind=kind, rank=2, **({"blocks": 2} if kind == "monarch" else {}))
        model = compress_model(small.compress(built(MLP)), "ptq", scheme="weight_only", min_saving=0)
        assert "int" in model.fc1.first.kind
        loaded = load_compressed(MLP, save_compressed(model, tmp_path / f"{kind}.safetensors"))
        assert torch.equal(loaded(*MLP.inputs()), finalize(model)(*MLP.inputs()))


class TestOptions:
    def test_low_rank_leads_here(self):
        method = LowRankCompression({"method": "factorization", "kind": "cur", "rank": 3})
        assert method == FactorizationCompression(kind="cur", rank=3)
        assert CompressionMethodRegistry.get("low_rank", {"method": "factorization", "rank": 3}).name == "factorization"
        assert LowRankCallback(method="factorization", rank=3).method == FactorizationCompression(rank=3)
        assert LowRankCompression(method="svd", rank=3).method == "svd"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 2, "param_ratio": 0.5}, "one of rank, param_ratio"),
            ({"rank": 0}, "rank is a count, at least 1"),
            ({"param_ratio": 1.5}, "a share that is kept"),
            ({"kind": "tucker"}, "has no kind 'tucker'"),
            ({"kind": "nmf", "blocks": 4}, "blocks is an option of 'monarch', not of 'nmf'"),
            ({"kind": "cur", "iterations": 4}, "iterations is an option of 'nmf' and 'sparse_low_rank', not of 'cur'"),
            ({"kind": "monarch", "blocks": 1}, "blocks is a count, at least 2"),
            ({"density": 1.0}, r"a share of weights in \(0, 1\)"),
            ({"density": 0.5, "param_ratio": 0.4}, "the sparse part alone"),
        ],
    )
    def test_bad_ones_are_explained(self, options, message):
        with pytest.raises(OptionError, match=message):
            FactorizationCompression(**options)

    def test_sizes_that_are_no_multiples_are_left_alone_with_the_reason(self):
        plan = FactorizationCompression(kind="monarch", rank=1).plan(nn.Sequential(nn.Linear(10, 8)))
        assert "sizes (8, 10) are no multiples of blocks=4" in plan.skipped[0].reason

    def test_a_rank_above_the_full_one_is_the_full_one(self):
        for kind, full in (("nmf", 8), ("cur", 8), ("sparse_low_rank", 8), ("monarch", 2), ("kronecker", 8)):
            new = _single(nn.Linear(12, 8), kind=kind, rank=100)
            assert new.spec["rank"] == full

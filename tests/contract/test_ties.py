"""A weight shared by embedding and head stays shared, or is left alone: never two copies where there was one."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pquant_lightning import (
    LowRankCallback,
    LowRankCompression,
    QATCallback,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.report import make_report
from tests.contract.table import same_state
from tests.models import TiedTransformer, built, fit, quiet_trainer


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tied model after QAT, in training form."""
    directory = tmp_path_factory.mktemp("tied")
    model = fit(quiet_trainer(directory, [QATCallback(bits=8)]), built(TiedTransformer))
    assert {"embed", "head"} <= set(compressed_layers(model))
    return model


def assert_codes_shared(model: Any) -> None:
    assert model.head.codes is model.embed.codes
    assert model.head.scale is model.embed.scale


def test_qat_keeps_the_parameter_shared(quantized: Any) -> None:
    assert quantized.head.weight is quantized.embed.weight
    assert not torch.equal(quantized.head.weight, built(TiedTransformer).head.weight)  # and it has been trained


def test_the_tie_survives_a_checkpoint(quantized: Any, tmp_path: Path) -> None:
    quantized.trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = load_compressed(TiedTransformer, tmp_path / "last.ckpt")

    assert loaded.head.weight is loaded.embed.weight
    assert same_state(loaded, quantized)


def test_the_tie_survives_copies(quantized: Any) -> None:
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert twin.head.weight is twin.embed.weight
        assert_codes_shared(finalize(twin))


def test_finalize_shares_the_codes(quantized: Any) -> None:
    assert_codes_shared(finalize(quantized))


def test_the_file_stores_the_codes_once(quantized: Any, tmp_path: Path) -> None:
    path = save_compressed(quantized, tmp_path / "model.safetensors")

    with safe_open(path, framework="pt") as file:
        assert len({"embed.codes", "head.codes"} & set(file.keys())) == 1
        assert len({"embed.scale", "head.scale"} & set(file.keys())) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "directory"])
def test_the_codes_are_shared_again_after_loading(quantized: Any, name: str, tmp_path: Path) -> None:
    save_compressed(quantized, tmp_path / name)

    loaded = load_compressed(TiedTransformer, tmp_path / name)

    assert_codes_shared(loaded)
    assert same_state(loaded, finalize(quantized))


def test_a_loaded_file_is_saved_at_the_same_size(quantized: Any, tmp_path: Path) -> None:
    first = save_compressed(quantized, tmp_path / "first.safetensors")

    second = save_compressed(load_compressed(TiedTransformer, first), tmp_path / "second.safetensors")

    assert second.stat().st_size == first.stat().st_size


def test_low_rank_leaves_the_tied_layers_alone_with_the_reason(tmp_path: Path) -> None:
    model = built(TiedTransformer)
    reasons = {skip.name: skip.reason for skip in LowRankCompression(rank=2).plan(model).skipped}

    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2)]), model)

    assert "shares" in reasons["embed"]
    assert "'head'" in reasons["embed"]
    assert "shares" in reasons["head"]
    assert "'embed'" in reasons["head"]
    assert not {"embed", "head"} & set(compressed_layers(model))
    assert "encoder.layers.0.linear1" in compressed_layers(model)
    assert model.head.weight is model.embed.weight


def test_a_plain_tie_is_stored_once_and_comes_back(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2)]), built(TiedTransformer))

    path = save_compressed(model, tmp_path / "model.safetensors")
    loaded = load_compressed(TiedTransformer, path)

    with safe_open(path, framework="pt") as file:
        assert len({"embed.weight", "head.weight"} & set(file.keys())) == 1
    assert loaded.head.weight is loaded.embed.weight
    assert same_state(loaded, finalize(model))


def test_quantizing_only_one_of_the_two_keeps_the_tie(tmp_path: Path) -> None:
    callback = QATCallback(bits=8, include=["head"], min_saving=0.0)

    model: Any = fit(quiet_trainer(tmp_path, [callback]), built(TiedTransformer))
    loaded = load_compressed(TiedTransformer, save_compressed(model, tmp_path / "model.safetensors"))

    assert model.head.weight is model.embed.weight
    assert same_state(loaded, finalize(model))


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tied model after a fit with factorized ties."""
    callback = LowRankCallback(rank=4, factorize_ties=True)
    model = fit(quiet_trainer(tmp_path_factory.mktemp("ties"), [callback]), built(TiedTransformer))
    assert {"embed", "head"} <= set(compressed_layers(model))
    return model


class TestFactorizedTies:
    """`factorize_ties=True`: embedding and head share the large factor, and only that."""

    @staticmethod
    def _shared(model: Any) -> bool:
        return model.embed.first.weight is model.head.second.weight

    def test_both_hold_one_factor_and_are_the_best_of_that_rank(self) -> None:
        original: Any = built(TiedTransformer)
        model: Any = LowRankCompression(rank=4, factorize_ties=True).compress(original)
        assert self._shared(model)
        u, s, vh = torch.linalg.svd(original.embed.weight.detach())
        best = (u[:, :4] * s[:4]) @ vh[:4]
        torch.testing.assert_close(model.embed.dense_weight(), best, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.head.dense_weight(), best, rtol=1e-3, atol=1e-4)
        assert type(model.embed.first) is torch.nn.Embedding
        assert type(model.head.second) is torch.nn.Linear

    def test_it_counts_once(self) -> None:
        original, method = (
            built(TiedTransformer),
            LowRankCompression(rank=4, include=["embed", "head"], factorize_ties=True),
        )
        model = method.compress(original)
        removed = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in model.parameters())
        assert removed == 32 * 16 - (32 * 4 + 2 * 4 * 16)
        for report in (make_report(model), make_report(model, original=original)):
            assert report.params[0] - report.params[1] == removed

    def test_training_keeps_it_shared_and_moves_it(self, factorized: Any) -> None:
        start: Any = LowRankCompression(rank=4, factorize_ties=True).compress(built(TiedTransformer))
        assert self._shared(factorized)
        assert not torch.equal(factorized.embed.first.weight, start.embed.first.weight)

    def test_a_checkpoint_copies_and_files_keep_it_shared(self, factorized: Any, tmp_path: Path) -> None:
        factorized.trainer.save_checkpoint(tmp_path / "last.ckpt")
        path = save_compressed(factorized, tmp_path / "model.safetensors")
        twins = [load_compressed(TiedTransformer, tmp_path / "last.ckpt"), load_compressed(TiedTransformer, path)]
        twins += [copy.deepcopy(factorized), pickle.loads(pickle.dumps(factorized)), finalize(factorized)]
        for twin in twins:
            assert self._shared(twin)
            assert same_state(twin, factorized)
        with safe_open(path, framework="pt") as file:
            assert len({"embed.first.weight", "head.second.weight"} & set(file.keys())) == 1

    def test_resuming_goes_on_with_one(self, factorized: Any, tmp_path: Path) -> None:
        factorized.trainer.save_checkpoint(tmp_path / "last.ckpt")
        model: Any = TiedTransformer()
        trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4, factorize_ties=True)], max_epochs=2)
        fit(trainer, model, ckpt_path=tmp_path / "last.ckpt")
        assert self._shared(model)
        held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(list(model.parameters()))

    def test_quantization_on_top_stores_its_codes_once(self, tmp_path: Path) -> None:
        callbacks = [LowRankCallback(rank=4, factorize_ties=True), QATCallback(bits=8, min_saving=0)]
        model: Any = fit(quiet_trainer(tmp_path, callbacks), built(TiedTransformer))
        assert self._shared(model)
        final: Any = finalize(model)
        assert final.embed.first.codes is final.head.second.codes
        loaded: Any = load_compressed(TiedTransformer, callbacks[1].artifact)
        assert loaded.embed.first.codes is loaded.head.second.codes
        assert same_state(loaded, final)

    @pytest.mark.parametrize(("include", "left"), [(["embed"], "head"), (["head"], "embed")])
    def test_only_one_of_the_two_is_left_alone_with_the_reason(self, include: list[str], left: str) -> None:
        method = LowRankCompression(rank=4, include=[*include, "*linear1"], factorize_ties=True)
        plan = method.plan(built(TiedTransformer))
        reasons = {skip.name: skip.reason for skip in plan.skipped}
        assert f"shares a parameter with {left!r}, which is not factorized with it" in reasons[include[0]]
        assert all("linear1" in entry.name for entry in plan.layers)

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
    callback = QATCallback(bits=8, include=["head"])

    model: Any = fit(quiet_trainer(tmp_path, [callback]), built(TiedTransformer))
    loaded = load_compressed(TiedTransformer, save_compressed(model, tmp_path / "model.safetensors"))

    assert model.head.weight is model.embed.weight
    assert same_state(loaded, finalize(model))

"""Every compressed model, saved and loaded in every way, is bitwise the same; files are as large as we say."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pquant_lightning import (
    QATCallback,
    QATCompression,
    compression_report,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.api import artifact_metadata
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CheckpointError
from pquant_lightning.core.serialization import artifact_bytes
from tests.contract.table import (
    CASES,
    ROWS,
    Case,
    apply_method,
    compressed,
    output,
    over,
    same_state,
    same_tensors,
    specs_of,
    state_of,
    trained,
)
from tests.models import MODELS


def assert_same(first: nn.Module, second: nn.Module, case: Case) -> None:
    """Equal structure, bitwise equal tensors, bitwise equal output; and they are compressed."""
    assert compressed_layers(second) or case.merges
    assert specs_of(first) == specs_of(second)
    assert same_state(first, second)
    expected, found = output(first, case.inputs()), output(second, case.inputs())
    if case.merges:  # a merged encoder takes its fast path again
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


@over(CASES)
def test_state_dict_into_a_fresh_prepared_model(case: Case) -> None:
    model = trained(case)
    fresh = prepare(case.make_model(seed=1))

    fresh.load_state_dict(model.state_dict())

    assert_same(model, fresh, case)


@over(CASES)
def test_the_structure_of_a_state_dict_wins_over_the_one_that_is_there(case: Case) -> None:
    model, other = trained(case), prepare(case.make_model(seed=1))
    apply_method(QATCompression(bits=2, include=list(compressed_layers(model, outermost=True))), other)
    assert specs_of(other) != specs_of(model)

    other.load_state_dict(model.state_dict())

    assert_same(model, other, case)


def test_a_plain_layer_in_a_file_does_not_fit_a_compressed_one() -> None:
    case = Case("mlp", (partial(QATCallback),), "qat")
    model = compressed(case)
    state = state_of(model)

    with pytest.raises(CheckpointError, match=r"uncompressed.*'fc1'"):
        prepare(model).load_state_dict(case.make_model(seed=1).state_dict())

    assert same_tensors(model.state_dict(), state)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "directory"])
@over(CASES)
def test_save_and_load(case: Case, name: str, tmp_path: Path) -> None:
    model = trained(case)
    state = state_of(model)

    path = save_compressed(model, tmp_path / name)
    loaded = load_compressed(MODELS[case.model], tmp_path / name)

    assert path.is_file()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())  # saving changes nothing
    assert not loaded.training
    assert_same(finalize(model), loaded, case)


@over(ROWS)
def test_load_into_a_model_that_is_there(case: Case, tmp_path: Path) -> None:
    model, there = trained(case), case.make_model(seed=1)

    loaded = load_compressed(there, save_compressed(model, tmp_path / "model.safetensors"))

    assert loaded is there
    assert_same(finalize(model), loaded, case)


@over(ROWS)
def test_a_finalized_model_is_saved_as_it_is(case: Case, tmp_path: Path) -> None:
    final = finalize(trained(case))

    loaded = load_compressed(MODELS[case.model], save_compressed(final, tmp_path / "model.safetensors"))

    assert_same(final, loaded, case)


@over(CASES)
def test_deepcopy_and_pickle(case: Case) -> None:
    for model in (trained(case), finalize(trained(case))):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(model, twin, case)
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


@over(ROWS)
def test_a_copy_still_loads_compressed_state_dicts(case: Case) -> None:
    model, fresh = trained(case), prepare(case.make_model(seed=1))

    for twin in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        twin.load_state_dict(model.state_dict())
        assert_same(model, twin, case)


@over(CASES)
def test_bytes_reported_are_bytes_on_disk(case: Case, tmp_path: Path) -> None:
    model = trained(case)
    promised = artifact_bytes(model, artifact_metadata(model))

    path = save_compressed(model, tmp_path / "model.safetensors")

    assert compressed_layers(model)
    assert path.stat().st_size == promised == artifact_bytes(finalize(model), artifact_metadata(model))


@over(CASES)
def test_bytes_in_the_report_are_those_of_the_tensors_in_the_file(case: Case, tmp_path: Path) -> None:
    original, model = case.make_model(), trained(case)

    with safe_open(save_compressed(model, tmp_path / "model.safetensors"), framework="pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys() if not key.endswith("_extra_state")]  # noqa: SIM118

    before, after = compression_report(original, model).size_bytes
    assert after == sum(tensor.nbytes for tensor in tensors)
    assert before == sum(t.nbytes for t in {id(t): t for t in original.state_dict(keep_vars=True).values()}.values())
    assert after < before or case.merges


@over(ROWS)
def test_the_report_is_the_same_for_training_form_and_deployed_form(case: Case) -> None:
    original, model = case.make_model(), trained(case)

    training, deployed = compression_report(original, model), compression_report(original, finalize(model))

    assert training.size_bytes == deployed.size_bytes
    assert training.params == deployed.params


@over(CASES)
def test_every_tensor_of_a_file_is_plain_data(case: Case, tmp_path: Path) -> None:
    path = save_compressed(trained(case), tmp_path / "model.pt")

    state = torch.load(path, weights_only=True)

    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert any(key.endswith("_extra_state") for key in state) or case.merges


@over(ROWS)
def test_half_precision_survives(case: Case, tmp_path: Path) -> None:
    model = trained(case).bfloat16()

    loaded = load_compressed(MODELS[case.model], save_compressed(model, tmp_path / "model.safetensors"))

    assert specs_of(loaded) or case.merges
    assert same_state(finalize(model), loaded)

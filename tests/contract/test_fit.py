"""A fit compresses once, whatever was run before it, and leaves a model that can go on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pquant_lightning import LowRankCallback, QATCallback, compression_report, finalize
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.contract.conftest import Decisions, Fitted, fresh_model
from tests.contract.table import CASES, Case, assert_compressed, over, same_state, same_tensors, specs_of, state_of
from tests.models import MLP, fit, quiet_trainer


@over(CASES)
def test_fast_dev_run_compresses(case: Case, tmp_path: Path) -> None:
    callbacks = case.make_callbacks()

    model = fit(quiet_trainer(tmp_path, callbacks, fast_dev_run=2), fresh_model(case))

    assert_compressed(model, callbacks)
    assert not list(tmp_path.rglob("*"))


def test_every_parameter_of_ours_is_trained(fitted: Fitted, tmp_path: Path) -> None:
    model = copy.deepcopy(fitted.model)
    before = state_of(model)

    fit(quiet_trainer(tmp_path, fitted.case.make_callbacks(), max_epochs=2), model)

    ours = {id(p) for layer in compressed_layers(model).values() for p in layer.parameters() if p.requires_grad}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ours]
    assert names
    assert not [name for name in names if torch.equal(before[name], model.state_dict()[name])]


def test_a_second_fit_decides_nothing_again(fitted: Fitted, tmp_path: Path, decisions: Decisions) -> None:
    model = copy.deepcopy(fitted.model)

    fit(quiet_trainer(tmp_path, fitted.case.make_callbacks()), model)

    assert specs_of(model) == specs_of(fitted.model)
    assert not same_state(model, fitted.model)
    assert decisions == Decisions(plans=0, decompositions=0)


def test_a_second_fit_with_the_same_callbacks(fitted: Fitted, tmp_path: Path, decisions: Decisions) -> None:
    model, callbacks = copy.deepcopy(fitted.model), copy.deepcopy(fitted.callbacks)

    fit(quiet_trainer(tmp_path, callbacks), model)

    assert specs_of(model) == specs_of(fitted.model)
    assert decisions == Decisions(plans=0, decompositions=0)


def test_the_callbacks_compress_another_model(fitted: Fitted, tmp_path: Path) -> None:
    callbacks = copy.deepcopy(fitted.callbacks)
    model = fresh_model(fitted.case, seed=1)

    fit(quiet_trainer(tmp_path, callbacks), model)

    assert_compressed(model, callbacks)


@over(CASES)
def test_validate_then_fit(case: Case, tmp_path: Path) -> None:
    model, callbacks = fresh_model(case), case.make_callbacks()
    trainer = quiet_trainer(tmp_path, callbacks)

    trainer.validate(model, model.loader(seed=1), verbose=False)
    assert not compressed_layers(model)
    fit(trainer, model)

    assert_compressed(model, callbacks)


@over(CASES)
def test_validate_test_and_predict_leave_the_model_as_it_is(case: Case, tmp_path: Path) -> None:
    model = case.make_model()
    modules, state = dict(model.named_modules()), state_of(model)
    trainer, loader = quiet_trainer(tmp_path, case.make_callbacks()), model.loader(seed=1)

    trainer.validate(model, loader, verbose=False)
    trainer.test(model, loader, verbose=False)
    trainer.predict(model, loader)

    assert dict(model.named_modules()) == modules
    assert same_tensors(model.state_dict(), state)


def test_repeated_fits_of_a_stack_keep_the_structure(tmp_path: Path, decisions: Decisions) -> None:
    """`head` is skipped by low rank in the first fit; it must not be taken in a later one, over its QAT layer."""
    model = MLP()
    structures = []

    for _ in range(4):
        callbacks = [LowRankCallback(energy=0.7, min_saving=0.2), QATCallback(bits=8)]
        structures.append(specs_of(fit(quiet_trainer(tmp_path / str(len(structures)), callbacks), model)))

    assert structures[0]["fc1"]["kind"] == "low_rank_linear"
    assert structures[0]["head"]["kind"] == "quant_linear"
    assert structures[1:] == structures[:1] * 3
    assert decisions.plans == 2


def test_the_wrapper_of_configure_model_is_gone(fitted: Fitted) -> None:
    assert "configure_model" not in fitted.model.__dict__


def test_the_report_describes_the_fitted_model(fitted: Fitted) -> None:
    report: Any = fitted.callbacks[-1].report
    expected = compression_report(fitted.case.make_model(), fitted.model)

    assert (report.params, report.size_bytes) == (expected.params, expected.size_bytes)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    metrics = fitted.trainer.callback_metrics
    assert metrics["pquant/size_ratio"] == pytest.approx(report.size_ratio)
    assert metrics["pquant/compression_ratio"] == pytest.approx(report.compression_ratio)
    assert metrics["pquant/size_bytes"] == report.size_bytes[1]


def test_a_finalized_model_is_not_fitted_again(fitted: Fitted, tmp_path: Path) -> None:
    final = finalize(fitted.model)
    if specs_of(final) == specs_of(fitted.model) or fitted.case.merges:
        fit(quiet_trainer(tmp_path, fitted.case.make_callbacks()), final)  # nothing became an integer
        assert specs_of(final) == specs_of(fitted.model)
        return
    state = state_of(final)

    with pytest.raises(ValueError, match="finalized"):
        fit(quiet_trainer(tmp_path, fitted.case.make_callbacks()), final)

    assert same_tensors(final.state_dict(), state)

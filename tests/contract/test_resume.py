"""Checkpoints of a fit: resumed, tested, loaded again; nothing is decided twice."""

from pathlib import Path

import pytest
import torch

from pquant_lightning import CompressedModule, LowRankCallback, finalize, load_compressed, prepare
from pquant_lightning.core.compressed_layer import compressed_layers, read_specs
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.partial import HINT
from tests.contract.conftest import EPOCHS, Decisions, Fitted, checkpointer, fresh_model, resume
from tests.contract.table import Case, output, same_state, same_tensors, specs_of
from tests.models import MLP, MODELS, fit, quiet_trainer


def test_resuming_from_the_end_of_an_epoch_equals_the_uninterrupted_fit(
    fitted: Fitted, tmp_path: Path, decisions: Decisions
) -> None:
    resumed = resume(fitted, tmp_path, fitted.checkpoint(epoch=0))

    assert specs_of(resumed) == specs_of(fitted.model)
    assert same_state(resumed, fitted.model)
    assert decisions == Decisions(plans=0, decompositions=0)


def test_every_checkpoint_loads_as_plain_data_and_is_compressed(fitted: Fitted) -> None:
    for epoch in range(EPOCHS):
        checkpoint = torch.load(fitted.checkpoint(epoch), weights_only=True)
        assert read_specs(checkpoint["state_dict"]) == specs_of(fitted.model)


def test_the_best_checkpoint_is_the_artefact(fitted: Fitted) -> None:
    best = load_compressed(MODELS[fitted.case.model], fitted.best)
    deployed = load_compressed(MODELS[fitted.case.model], fitted.artifact)

    assert compressed_layers(best)
    assert specs_of(best) == specs_of(fitted.model)
    for callback in fitted.callbacks:
        if not callback.method.trains:
            samples = callback.method.samples_of(best.loader(seed=0))
            callback.method.calibrate(best, CompressionContext(by=callback.state_key, samples=samples))
    assert same_state(finalize(best), deployed)


def test_load_compressed_reads_a_checkpoint_bitwise(fitted: Fitted, decisions: Decisions) -> None:
    loaded = load_compressed(MODELS[fitted.case.model], fitted.checkpoint(EPOCHS - 1))

    assert specs_of(loaded) == specs_of(fitted.model)
    assert same_state(loaded, fitted.model)
    assert torch.equal(output(loaded, fitted.case.inputs()), output(fitted.model, fitted.case.inputs()))
    assert decisions == Decisions(plans=0, decompositions=0)


def test_the_mixin_gives_plain_load_from_checkpoint(fitted: Fitted) -> None:
    mixed = type("Mixed", (CompressedModule, MODELS[fitted.case.model]), {})

    loaded = mixed.load_from_checkpoint(fitted.checkpoint(EPOCHS - 1))

    assert specs_of(loaded) == specs_of(fitted.model)
    assert same_state(loaded, fitted.model)


@pytest.mark.parametrize("form", ["fresh", "training_form", "finalized"])
def test_test_with_a_checkpoint(fitted: Fitted, form: str, tmp_path: Path, decisions: Decisions) -> None:
    fresh = fresh_model(fitted.case, seed=1)
    calibrated_late = any(
        not callback.method.trains and callback.method.wanted_samples for callback in fitted.callbacks
    )
    epoch = EPOCHS - 1 if form == "finalized" and calibrated_late else 0  # it cannot be finalized before
    other = load_compressed(MODELS[fitted.case.model], fitted.checkpoint(epoch))
    model = fresh if form == "fresh" else finalize(other) if form == "finalized" else other
    loader = model.loader(seed=2)
    (expected,) = quiet_trainer(tmp_path).test(fitted.model, loader, verbose=False)

    trainer = quiet_trainer(tmp_path, fitted.case.make_callbacks())
    (scores,) = trainer.test(model, loader, ckpt_path=fitted.checkpoint(EPOCHS - 1), verbose=False)

    assert scores == expected
    assert specs_of(model) == specs_of(fitted.model)
    assert same_state(model, fitted.model)
    assert decisions == Decisions(plans=0, decompositions=0)


def test_a_prepared_model_needs_no_callback(fitted: Fitted, tmp_path: Path) -> None:
    model = prepare(fresh_model(fitted.case, seed=1))
    trainer, loader = quiet_trainer(tmp_path), model.loader(seed=2)

    trainer.test(model, loader, ckpt_path=fitted.checkpoint(EPOCHS - 1), verbose=False)

    assert same_state(model, fitted.model)


@pytest.mark.parametrize("step", [2, 6])
def test_resuming_within_an_epoch_keeps_the_structure_and_goes_on(step: int, fitted: Fitted, tmp_path: Path) -> None:
    """Not bitwise: plain Lightning is not, either (the loader starts the epoch again)."""
    trainer = quiet_trainer(tmp_path, fitted.case.make_callbacks(), max_steps=step, max_epochs=EPOCHS)
    fit(trainer, fresh_model(fitted.case))
    trainer.save_checkpoint(tmp_path / "within.ckpt")
    stored = torch.load(tmp_path / "within.ckpt", weights_only=True)["state_dict"]

    resumed = resume(fitted, tmp_path / "resumed", tmp_path / "within.ckpt")

    assert specs_of(resumed) == read_specs(stored)
    assert resumed.trainer.global_step > step
    assert not same_tensors(resumed.state_dict(), stored)


def test_the_file_decides_where_the_options_have_changed(tmp_path: Path, decisions: Decisions) -> None:
    case = Case("mlp", (lambda: LowRankCallback(rank=2),))
    trainer = quiet_trainer(tmp_path / "first", case.make_callbacks())
    model = fit(trainer, fresh_model(case))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert decisions == Decisions(plans=1, decompositions=2)

    trainer = quiet_trainer(tmp_path / "second", [LowRankCallback(rank=5)], max_epochs=2)
    resumed = fit(trainer, MLP(), ckpt_path=tmp_path / "last.ckpt")

    assert specs_of(resumed) == specs_of(model)
    assert decisions == Decisions(plans=1, decompositions=2)


def test_best_is_found_by_name(fitted: Fitted, tmp_path: Path) -> None:
    model = fresh_model(fitted.case, seed=1)
    loader = model.loader(seed=2)
    trainer = quiet_trainer(tmp_path, [*fitted.case.make_callbacks(), checkpointer(tmp_path)], max_epochs=2)
    fit(trainer, model)
    best = trainer.checkpoint_callback.best_model_path

    trainer.test(model, loader, ckpt_path="best", verbose=False)

    stored = torch.load(best, weights_only=True)["state_dict"]
    stored.pop(HINT, None)
    assert specs_of(model) == read_specs(stored)
    trains = fitted.callbacks[-1].method.trains
    measured = {} if trains else {key for key in stored if ".act_" in key or ".output_range" in key}
    trained = {key: value for key, value in stored.items() if key not in measured}  # what was measured since stays
    own = {key: value for key, value in model.state_dict().items() if ".rounded_" not in key and key not in measured}
    assert same_tensors(own, trained)

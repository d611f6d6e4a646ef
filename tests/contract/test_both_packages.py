"""What asks Lightning's own classes for something does so in both of its packages, `import pytorch_lightning` too."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pquant_lightning import (
    CompressionPipeline,
    CompressionReportCallback,
    DistillationCallback,
    LowRankCallback,
    MixedPrecisionCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    compress_model,
    load_compressed,
)
from pquant_lightning.callbacks._lightning import is_a, twins
from pquant_lightning.core.compressed_layer import compressed_layers
from tests import models
from tests.contract.conftest import use_package
from tests.contract.table import same_state, specs_of
from tests.models import MODELS, PACKAGES, fit, quiet_trainer

PRUNED = {"sparsity": 0.9, "include": ["*"], "min_saving": 0.0}


@pytest.fixture(autouse=True, params=PACKAGES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_package(monkeypatch, request.param)
    return request.param


def callback_class(package: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{package}.callbacks"), name)


def zeros(model: Any) -> float:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)


def test_the_models_are_of_the_package(package: str) -> None:
    base = importlib.import_module(package).LightningModule
    (other,) = (importlib.import_module(name).LightningModule for name in PACKAGES if name != package)

    assert issubclass(MODELS["mlp"], base)
    assert not issubclass(MODELS["mlp"], other)
    assert is_a(MODELS["mlp"](), twins(importlib.import_module(PACKAGES[0]).LightningModule)[0])


def test_monitors_start_afresh_so_that_the_artefact_is_pruned(package: str, tmp_path: Path) -> None:
    class Rising(MODELS["mlp"]):  # type: ignore[misc, name-defined]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", float(self.current_epoch))

    checkpoint = callback_class(package, "ModelCheckpoint")(tmp_path, filename="{epoch}", monitor="score")
    stopping = callback_class(package, "EarlyStopping")("score", patience=4)
    callback = PruningCallback(**PRUNED, end=0.5)
    trainer = quiet_trainer(tmp_path, [callback, checkpoint, stopping], max_epochs=6)

    fit(trainer, Rising())

    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt"
    assert trainer.current_epoch == 6
    assert zeros(load_compressed(Rising, callback.artifact)) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"])
def test_what_copies_the_model_must_stand_last(package: str, name: str, tmp_path: Path) -> None:
    copies = callback_class(package, name)
    averaging = copies(swa_lrs=0.01) if name == "StochasticWeightAveraging" else copies()

    with pytest.raises(ValueError, match=f"{name} copies the model and stands before"):
        fit(quiet_trainer(tmp_path, [averaging, LowRankCallback(rank=2)]), MODELS["mlp"]())


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_the_averaged_model_is_masked(package: str, name: str, tmp_path: Path) -> None:
    swa = name == "StochasticWeightAveraging"
    averaging = callback_class(package, name)(**({"swa_lrs": 0.01, "swa_epoch_start": 0.3} if swa else {}))
    trainer = quiet_trainer(tmp_path, [PruningCallback(**PRUNED, end=0.3), averaging], max_epochs=4)

    model = fit(trainer, MODELS["mlp"]())

    assert zeros(model) == pytest.approx(0.9, abs=0.01)


def test_channels_are_removed_by_samples_of_the_fit(tmp_path: Path) -> None:
    callback = StructuredPruningCallback(sparsity=0.5, min_saving=0.0)

    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=2), MODELS["mlp"]())
    deployed = load_compressed(MODELS["mlp"], callback.artifact)

    assert deployed.fc1.weight.shape == (16, 16)
    assert model.fc1.weight.shape == (32, 16)


def test_a_class_and_a_checkpoint_make_the_model_with_its_hyperparameters(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=2)])
    model = fit(trainer, MODELS["mlp"](width=48))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = load_compressed(MODELS["mlp"], tmp_path / "last.ckpt")

    assert loaded.hparams["width"] == 48
    assert specs_of(loaded) == specs_of(model)
    assert same_state(loaded, model)


def test_bits_are_chosen_by_the_fits_own_validation(tmp_path: Path) -> None:
    callback = MixedPrecisionCallback(max_drop=10.0, monitor="val_loss", mode="min")

    model = fit(quiet_trainer(tmp_path, [callback]), MODELS["mlp"]())

    assert compressed_layers(model)
    assert callback.method.average_bits == pytest.approx(2.0, abs=1.0)


def test_the_plain_callbacks_stand_beside_a_method(tmp_path: Path) -> None:
    report = CompressionReportCallback()
    callbacks = [DistillationCallback(), QATCallback(bits=8), report]

    trainer = quiet_trainer(tmp_path, callbacks, max_epochs=2)
    fit(trainer, MODELS["mlp"]())

    assert report.path is not None
    assert trainer.callback_metrics["pquant/distillation_loss"] > 0


def test_a_pipeline_trains_monitors_and_evaluates(tmp_path: Path) -> None:
    model = MODELS["mlp"]()
    pipeline = CompressionPipeline(
        [{"ptq": {"scheme": "dynamic"}}], monitor="val_loss", mode="min", max_drop=1.0, metrics=["val_loss", "params"]
    )
    config = {"compression": {"methods": ["qat"]}, "training": {"epochs": 1}}

    result = pipeline.run(model, model.loader(), model.loader(seed=1))
    tuned = CompressionPipeline.from_config(config).run(model, model.loader(), dirpath=tmp_path)

    assert result.evaluation is not None
    assert {"val_loss", "params"} == set(result.evaluation.before)
    assert not same_state(tuned.model, compress_model(model, "ptq", train_loader=model.loader()))
    assert compressed_layers(tuned.model)


def test_a_datamodule_calibrates_and_fits(package: str, tmp_path: Path) -> None:
    data, model = models.models_of(package).SmallData(), MODELS["mlp"]()
    config = {"compression": {"methods": ["qat"]}, "training": {"epochs": 1}}

    small = compress_model(model, "ptq", train_loader=data)
    trained = compress_model(model, config, train_loader=data, val_loader=data)
    quiet_trainer(tmp_path, [PTQCallback()]).fit(model, datamodule=data)

    assert all(compressed_layers(m) for m in (small, trained, model))
    assert all(torch.isfinite(m(*model.inputs())).all() for m in (small, trained, model))

"""CompressionPipeline: order, training, interruption, the metric that is watched, and what a user gets wrong."""

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from pquant_lightning import (
    CompressionMethod,
    CompressionPipeline,
    LowRankCompression,
    PipelineStage,
    PTQCompression,
    QATCompression,
    UnstructuredPruning,
    compress_model,
    load_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CallbackOrderError, CheckpointError, ModelError, OptionError, PQuantError
from tests.contract.table import output, same_state
from tests.models import CLASSES, MLP, SmallData, SmallModule, built

CONFIG = {
    "compression": {
        "methods": ["low_rank", "quantization"],
        "low_rank": {"rank": 4},
        "quantization": {"bits": 8, "method": "ptq"},
    },
    "training": {"epochs": 2, "lr": 0.02, "batch_size": 16},
    "evaluation": {"metrics": ["params", "val_loss"]},
}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: layer.kind for name, layer in compressed_layers(model).items()}


def test_stages_act_in_the_order_that_they_can(package_log: pytest.LogCaptureFixture) -> None:
    pipeline = CompressionPipeline(["ptq", {"low_rank": {"rank": 4}}, UnstructuredPruning(sparsity=0.5, include=["*"])])
    assert [stage.name for stage in pipeline.stages] == ["low_rank", "unstructured_pruning", "ptq"]
    assert "act in the order [low_rank, unstructured_pruning, ptq]" in package_log.text
    model = built(MLP)
    result = pipeline.run(model, MLP.loader())
    assert kinds(result.model)["fc1"] == "low_rank_linear"
    assert kinds(result.model)["fc1.first"] == "int_linear"
    codes = result.model.fc1.first.codes
    assert 0.3 < float((codes == 0).float().mean()) < 0.8  # pruned before it was rounded
    assert kinds(model) == {}


def test_stages_that_contradict_each_other() -> None:
    first = PipelineStage(["low_rank", "ptq"])
    with pytest.raises(CallbackOrderError, match="low_rank\\+ptq quantizes or prunes by ptq before"):
        CompressionPipeline([first, "unstructured_pruning"])


def test_a_stage_trains_what_it_has_compressed() -> None:
    model, loader = built(MLP), MLP.loader()
    stage = PipelineStage(LowRankCompression(rank=4), epochs=8, lr=0.03, trainer=QUIET)
    trained = CompressionPipeline([stage]).run(model, loader).model
    plain = CompressionPipeline([LowRankCompression(rank=4)]).run(model, loader).model
    assert kinds(trained) == kinds(plain)
    with torch.no_grad():
        losses = [float(torch.stack([m.loss(batch) for batch in loader]).mean()) for m in (trained, plain)]
    assert losses[0] < 0.8 * losses[1]


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.sizes.append(len(batch[0]))


class Scheduled(MLP):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def test_the_learning_rate_is_set_and_its_schedule_kept() -> None:
    rates = Rates()
    stage = PipelineStage("low_rank", epochs=3, lr=0.02, trainer={**QUIET, "callbacks": rates})
    CompressionPipeline([{"low_rank": {"rank": 4}}]).stages  # noqa: B018
    stage = PipelineStage({"low_rank": {"rank": 4}}, epochs=3, lr=0.02, trainer=stage.trainer)
    CompressionPipeline([stage], batch_size=16).run(Scheduled(), MLP.loader())
    assert rates.sizes == [16, 16] * 3
    shape = [(1 + torch.cos(torch.tensor(torch.pi * e / 4))) / 2 for e in range(3)]
    assert rates.seen[::2] == pytest.approx([0.02 * float(factor) for factor in shape], rel=1e-4)


def test_a_later_training_keeps_the_zeros_of_an_earlier_stage() -> None:
    stages = [
        UnstructuredPruning(sparsity=0.5, include=["*"]),
        PipelineStage(QATCompression(bits=8), epochs=2, trainer=QUIET),
    ]
    model = CompressionPipeline(stages).run(built(MLP), MLP.loader()).model
    codes = torch.cat([layer.codes.flatten() for layer in compressed_layers(model).values()])
    assert float((codes == 0).float().mean()) >= 0.5


def test_a_configuration_trains_evaluates_and_is_deployed(tmp_path: Any) -> None:
    result = CompressionPipeline.from_config(CONFIG).run(built(MLP), MLP.loader(), MLP.loader(1), dirpath=tmp_path)
    assert kinds(result.model)["fc1.first"] == "int_linear"
    assert result.evaluation["params"].after < result.evaluation["params"].before
    assert result.evaluation["val_loss"].before != result.evaluation["val_loss"].after
    loaded = load_compressed(MLP, result.artifact)
    assert torch.equal(output(loaded, MLP.inputs()), output(result.model, MLP.inputs()))
    assert result.report.size_ratio < 0.6


def test_compress_model_runs_the_training_of_a_configuration(package_log: pytest.LogCaptureFixture) -> None:
    model = built(MLP)
    config = {**CONFIG, "training": {"epochs": 2}}
    trained = compress_model(model, config, train_loader=SmallData())
    torch.manual_seed(0)
    plain = compress_model(model, {"compression": CONFIG["compression"]}, train_loader=SmallData())
    assert kinds(trained) == kinds(plain)
    assert not same_state(trained, plain)
    assert "Evaluation on 32 samples" in package_log.text


def test_a_plain_module_is_compressed_and_the_log_says_that_it_was_not_trained(package_log: Any) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    config = {**CONFIG, "evaluation": {"metrics": ["params"]}}
    small = compress_model(net, config, train_loader=[torch.randn(16, 64)])
    assert kinds(small)["0.first"] == "int_linear"
    assert "Sequential is no LightningModule: the model is compressed without training" in package_log.text


def test_a_method_that_saves_nothing_is_left_out(package_log: pytest.LogCaptureFixture) -> None:
    config = {**CONFIG, "compression": {**CONFIG["compression"], "low_rank": {"rank": 64}}}
    result = CompressionPipeline.from_config(config).run(built(MLP), MLP.loader(), MLP.loader(1))
    assert set(kinds(result.model).values()) == {"int_linear"}
    assert "low_rank changes no layer of MLP:\n  fc1: would not get smaller" in package_log.text
    with pytest.raises(ModelError, match="No stage changes a layer"):
        CompressionPipeline([{"low_rank": {"rank": 64}}]).run(built(MLP))


def test_a_class_of_the_specifications_shape_is_a_stage() -> None:
    class Halve(CompressionMethod):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)

        def compress(self, model: nn.Module, train_loader: Any = None, val_loader: Any = None) -> nn.Module:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.div_(2)
            return model

        def get_compression_info(self, original_model: Any, compressed_model: Any) -> dict[str, Any]:
            return {}

    model = built(MLP)
    result = CompressionPipeline([Halve({}), {"ptq": {"scheme": "dynamic"}}]).run(model)
    assert result.stages[0].name == "Halve"
    first = result.model.head.dense_weight()
    torch.testing.assert_close(first, model.head.weight / 2, atol=0.01, rtol=0.1)


# -- interruption ----------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Interrupts the fit after its first epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("power cut")


def interrupted(extra: list[Any], epochs: int = 4) -> CompressionPipeline:
    stages = [
        {"low_rank": {"rank": 4}},
        PipelineStage(QATCompression(bits=4), epochs=epochs, trainer={**QUIET, "callbacks": extra}),
        UnstructuredPruning(sparsity=0.3, include=["*"]),
    ]
    return CompressionPipeline(stages, monitor="val_loss", mode="min")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Any, package_log: pytest.LogCaptureFixture) -> None:
    model, loaders = built(MLP), (MLP.loader(0), MLP.loader(1))
    whole = interrupted([]).run(model, *loaders)
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted([Stop()]).run(model, *loaders, dirpath=tmp_path)
    state = json.loads((tmp_path / "pipeline.json").read_text())
    assert [stage["name"] for stage in state["finished"]] == ["low_rank", "unstructured_pruning"]
    resumed = interrupted([]).run(model, *loaders, dirpath=tmp_path)
    assert "goes on from" in package_log.text
    assert [stage.resumed for stage in resumed.stages] == [True, True, False]
    assert same_state(whole.model, resumed.model)
    assert [stage.metric for stage in whole.stages] == [stage.metric for stage in resumed.stages]
    again = interrupted([]).run(model, *loaders, dirpath=tmp_path)  # all is done: nothing trains
    assert all(stage.resumed for stage in again.stages)
    assert same_state(whole.model, again.model)


@pytest.mark.parametrize("changed", ["stages", "model", "weights", "data", "monitor"])
def test_another_run_is_not_gone_on_with(changed: str, tmp_path: Any) -> None:
    def run(other: bool) -> Any:
        torch.manual_seed(int(other and changed == "weights"))
        model = MLP(width=20 if other and changed == "model" else 32)
        method = LowRankCompression(rank=3 if other and changed == "stages" else 4)
        loader = DataLoader(MLP.loader().dataset, 4) if other and changed == "data" else MLP.loader()
        monitor = None if other and changed == "monitor" else "val_loss"
        pipeline = CompressionPipeline([method], monitor=monitor, mode="min")
        return pipeline.run(model, loader, MLP.loader(1), dirpath=tmp_path)

    run(False)
    with pytest.raises(
        CheckpointError,
        match=rf"a run of another pipeline; what differs: .*{changed}",
    ):
        run(True)


def test_a_damaged_state_is_explained(tmp_path: Any) -> None:
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        CompressionPipeline(["low_rank"]).run(built(MLP), dirpath=tmp_path)


# -- the metric that is watched ---------------------------------------------------------------------------------------


class Scored(SmallModule):
    """Logs how near its outputs are to those of its first weights; one layer matters much more than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fragile, self.sturdy = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.fragile.weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])  # every direction counts
            left, right = torch.randn(16, 3), torch.randn(3, 16)
            self.sturdy.weight.copy_(left @ right / 4)  # of rank 3
        self.reference = [layer.weight.detach().clone() for layer in (self.fragile, self.sturdy)]

    draw = staticmethod(MLP.draw)

    def forward(self, x: Any) -> Any:
        return self.head(self.sturdy(x) + self.fragile(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        wanted = self.head(x @ self.reference[1].T + x @ self.reference[0].T)
        self.log("val_score", 1 - (self(x) - wanted).norm() / wanted.norm())


def scored() -> Scored:
    torch.manual_seed(3)
    return Scored()


def test_the_layer_that_costs_too_much_is_left_alone(package_log: pytest.LogCaptureFixture) -> None:
    stages = [LowRankCompression(rank=3, exclude=["head"])]
    loaders = (Scored.loader(0), Scored.loader(1))
    free = CompressionPipeline(stages, monitor="val_score").run(scored(), *loaders)
    assert free.stages[0].metric < 0.7
    assert set(kinds(free.model)) == {"fragile", "sturdy"}
    guarded = CompressionPipeline(stages, monitor="val_score", max_drop=0.05).run(scored(), *loaders)
    assert set(kinds(guarded.model)) == {"sturdy"}
    assert guarded.stages[0].put_back == ("fragile",)
    assert guarded.stages[0].metric > 0.95
    assert "leaves fragile alone, as " in package_log.text


def test_a_stage_that_always_costs_too_much_is_put_back() -> None:
    stages = [LowRankCompression(rank=3, include=["fragile"]), PTQCompression(bits=8)]
    pipeline = CompressionPipeline(stages, monitor="val_score", max_drop=0.05)
    result = pipeline.run(scored(), Scored.loader(0), Scored.loader(1))
    assert [stage.put_back for stage in result.stages] == [("fragile",), ()]
    assert set(kinds(result.model).values()) == {"int_linear"}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CompressionPipeline([]), OptionError, "takes a list of stages"),
        (lambda: CompressionPipeline("low_rank"), OptionError, "takes a list of stages"),
        (lambda: CompressionPipeline(["low_rnk"]), PQuantError, "Did you mean 'low_rank'"),
        (lambda: CompressionPipeline([3]), OptionError, "A stage is a method, its name"),
        (lambda: CompressionPipeline([{"low_rank": {"rnk": 3}}]), OptionError, "no option 'rnk'"),
        (lambda: CompressionPipeline(["low_rank"], max_drop=0.1), OptionError, "goes with monitor"),
        (lambda: PipelineStage("low_rank", lr=0.1), OptionError, "give it epochs"),
        (lambda: PipelineStage([]), OptionError, "at least one method"),
        (lambda: PipelineStage("low_rank", epochs=-1), OptionError, "epochs >= 0"),
    ],
)
def test_pipelines_that_cannot_be_made(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("pipeline", "model", "data", "error", "message"),
    [
        (CompressionPipeline([QATCompression()]), MLP, (MLP.loader(),), OptionError, "qat must be trained"),
        (
            CompressionPipeline([PipelineStage("low_rank", epochs=1)]),
            lambda: nn.Sequential(nn.Linear(8, 8)),
            ([torch.zeros(2, 8)],),
            ModelError,
            "Sequential has no training_step",
        ),
        (CompressionPipeline([PipelineStage("low_rank", epochs=1)]), MLP, (), OptionError, "give run a train_loader"),
        (
            CompressionPipeline([{"low_rank": {"rank": 2}}], monitor="val_acc"),
            MLP,
            (MLP.loader(), MLP.loader(1)),
            OptionError,
            "'val_acc' is not logged by the validation.*'val_loss'",
        ),
        (CompressionPipeline(["low_rank"], monitor="val_loss"), MLP, (MLP.loader(),), OptionError, "validation data"),
        (
            CompressionPipeline([PipelineStage({"low_rank": {"rank": 2}}, epochs=1)], batch_size=4),
            MLP,
            ([(torch.zeros(2, 16), torch.zeros(2, dtype=torch.long))],),
            OptionError,
            "a list has its batches made",
        ),
    ],
)
def test_runs_that_cannot_start(pipeline: Any, model: Any, data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline.run(model(), *data)


def test_a_pipeline_with_training_shows_one_table(package_log: Any) -> None:
    """Of the whole, at its end: not one more for the start and the end of each fit."""
    stages = [PipelineStage("low_rank", epochs=1, trainer=QUIET), PipelineStage({"ptq": {"scheme": "dynamic"}})]
    CompressionPipeline(stages).run(built(MLP), MLP.loader(), MLP.loader(seed=1))
    tables = [record.getMessage() for record in package_log.records if "whole model" in record.getMessage()]
    assert len(tables) == 1
    assert "MACs per sample" in tables[0]  # counted on a batch of the training


def test_a_budget_alone_chooses_the_methods(package_log: Any) -> None:
    model = built(MLP)
    result = CompressionPipeline(budget={"size": 0.5}).run(model, MLP.loader())
    assert result.report.size_ratio <= 0.5
    said = [record.getMessage() for record in package_log.records]
    assert sum("low_rank has fitted layers" in line for line in said) <= 1  # not once for every try
    with pytest.raises(PQuantError, match="or give a budget"):
        CompressionPipeline()

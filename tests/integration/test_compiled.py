"""Models with parts that torch.compile has wrapped, and models compiled as a whole: names and files as without it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    CompressionReportCallback,
    DistillationCallback,
    LoRACallback,
    LowRankCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    compress_model,
    compression_report,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers, read_specs
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import share_copy
from tests.contract.table import same_state, specs_of
from tests.models import CLASSES, MLP, fit, quiet_trainer


class Plain(MLP):
    """Its layers are in a part, with a part inside."""

    wraps = ""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        del self.fc1, self.fc2, self.head
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 24), nn.ReLU()))
        self.head = nn.Linear(24, CLASSES)
        self.wrap()

    def wrap(self) -> None:
        """Nothing is compiled here."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Wrapped(Plain):
    def wrap(self) -> None:
        self.net[2] = torch.compile(self.net[2], backend="eager")
        self.net = torch.compile(self.net, backend="eager")


class InPlace(Plain):
    def wrap(self) -> None:
        self.net.compile(backend="eager")


class Late(Plain):
    """Wrapped in `configure_model`, which Lightning calls more than once."""

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Sequential):
            self.net = torch.compile(self.net, backend="eager")


COMPILED: dict[str, type[Plain]] = {"wrapped": Wrapped, "in_place": InPlace, "late": Late}
STACKS: dict[str, Any] = {
    "low_rank+qat": lambda: [LowRankCallback(rank=2, exclude=["head"]), QATCallback(bits=4)],
    "pruning": lambda: [PruningCallback(sparsity=0.5, include=["net.*"])],
    "channels+ptq": lambda: [StructuredPruningCallback(sparsity=0.5, min_saving=0.0), PTQCallback()],
    "lora": lambda: [LoRACallback(r=2, adapter_only=True)],
}


def outputs(model: Any) -> Tensor:
    was = model.training
    with torch.no_grad():
        found: Tensor = model.eval()(*MLP.inputs())
    model.train(was)
    return found


def plain(value: Any) -> Any:
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in value.items()}


@pytest.mark.parametrize(
    ("kind", "stack"), [*(("wrapped", stack) for stack in STACKS), ("in_place", "low_rank+qat"), ("late", "pruning")]
)
def test_files_go_from_the_compiled_class_to_the_plain_one_and_back(kind: str, stack: str, tmp_path: Path) -> None:
    compiled_class, results = COMPILED[kind], {}
    for number, cls in enumerate((compiled_class, Plain)):
        torch.manual_seed(0)
        callbacks = STACKS[stack]()
        trainer = quiet_trainer(tmp_path / str(number), callbacks)
        model = fit(trainer, cls())
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        results[cls] = model, callbacks[-1].artifact, tmp_path / f"{number}.ckpt"
    (first, artifact, checkpoint), (second, other_artifact, other_checkpoint) = results.values()

    assert specs_of(first) == specs_of(second)
    torch.testing.assert_close(plain(first.state_dict()), plain(second.state_dict()))
    for cls, given in ((Plain, artifact), (compiled_class, other_artifact)):
        loaded = load_compressed(cls, given)
        reference = load_compressed(Plain, other_artifact)
        assert all(torch.allclose(v.float(), reference.state_dict()[k].float()) for k, v in loaded.state_dict().items())
        torch.testing.assert_close(outputs(loaded), outputs(reference))
    for cls, given in ((Plain, checkpoint), (compiled_class, other_checkpoint)):
        torch.manual_seed(0)  # the base of the adapters
        loaded = load_compressed(cls, given)
        torch.testing.assert_close(outputs(loaded), outputs(first))


@pytest.mark.parametrize("source", [Wrapped, Plain])
def test_a_fit_goes_on_from_the_file_of_the_other_class(source: type[Plain], tmp_path: Path) -> None:
    target = Plain if source is Wrapped else Wrapped
    make = STACKS["low_rank+qat"]
    for cls, name in ((source, "source"), (target, "target")):
        torch.manual_seed(0)
        trainer = quiet_trainer(tmp_path / name, make(), max_epochs=1)
        fit(trainer, cls())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")

    models = [
        fit(quiet_trainer(tmp_path, make(), max_epochs=2), target(), ckpt_path=tmp_path / f"{name}.ckpt")
        for name in ("source", "target")
    ]

    assert compressed_layers(models[0])
    assert specs_of(models[0]) == specs_of(models[1])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_a_pruned_checkpoint_loads_into_its_own_class_with_plain_lightning(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, STACKS["pruning"]())
    model = fit(trainer, Wrapped())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = Wrapped.load_from_checkpoint(tmp_path / "last.ckpt")

    assert "net._orig_mod.0.weight" in loaded.state_dict()
    assert torch.equal(loaded.net._orig_mod[0].weight, model.net[0].weight)


@pytest.mark.parametrize("pattern", ["net.0", "net._orig_mod.0"])
def test_patterns_name_layers_with_and_without_the_wrapper(pattern: str) -> None:
    small = compress_model(Wrapped(), "low_rank", rank=2, include=[pattern])

    assert list(specs_of(small)) == ["net.0"]


def test_a_model_compiled_as_a_whole(tmp_path: Path) -> None:
    net = Plain().net
    compiled = torch.compile(copy.deepcopy(net), backend="eager")

    small = compress_model(compiled, "low_rank", rank=2)
    reference = compress_model(net, "low_rank", rank=2)
    path = save_compressed(torch.compile(small, backend="eager"), tmp_path / "small.safetensors")
    loaded = load_compressed(torch.compile(copy.deepcopy(net), backend="eager"), path)
    inside = compress_model(compiled, "low_rank", rank=2, inplace=True)

    assert list(specs_of(small)) == list(specs_of(reference)) == list(specs_of(loaded)) == ["0", "2.0"]
    assert compressed_layers(compiled)
    assert inside is compiled._orig_mod
    for model in (small, loaded, compiled, finalize(compiled)):
        torch.testing.assert_close(outputs(model), outputs(reference))
    assert compression_report(net, compiled).params == compression_report(net, reference).params


@pytest.mark.parametrize("copied", [deep_copy, share_copy])
@pytest.mark.parametrize("cls", [Wrapped, InPlace])
def test_a_copy_runs_its_own_layers(cls: type[Plain], copied: Any) -> None:
    """What is compiled of the original would run the original."""
    model = cls()
    outputs(model)

    twin = copied(model)
    twin.net[0] = nn.Linear(16, 32)
    changed, before = outputs(twin), outputs(model)

    assert not torch.allclose(changed, before)
    reference = Plain()
    reference.load_state_dict(plain(twin.state_dict()))
    torch.testing.assert_close(changed, outputs(reference))


def test_lightnings_compiled_module_keeps_its_teacher_and_its_report(tmp_path: Path) -> None:
    report, distillation = CompressionReportCallback(), DistillationCallback(weight=1.0)
    model = Wrapped()
    callbacks = [distillation, LowRankCallback(rank=1, exclude=["head"]), report]
    trainer = quiet_trainer(tmp_path, callbacks, max_epochs=1)

    fit(trainer, model)

    assert trainer.callback_metrics["pquant/distillation_loss"] > 0  # a teacher that ran the student would give 0
    assert report.path is not None


def test_a_copy_of_a_module_that_lightning_has_compiled_runs_itself() -> None:
    from lightning.pytorch.utilities.compile import from_compiled

    model = from_compiled(torch.compile(Plain(), backend="eager"))

    for copied in (deep_copy, share_copy):
        twin = copied(model)
        twin.head = nn.Linear(24, CLASSES)
        assert not torch.allclose(outputs(twin), outputs(model))


def test_the_part_is_still_compiled(tmp_path: Path) -> None:
    torch._dynamo.reset()  # after a few graphs of one function torch compiles it no more
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Plain()
    model.net = torch.compile(model.net, backend=backend)

    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2)], limit_train_batches=1, limit_val_batches=0), model)

    assert isinstance(model.net, nn.Sequential)
    assert graphs
    assert any("low_rank" in layer.kind for layer in compressed_layers(model).values())


def test_prepared_models_take_files_of_both_kinds() -> None:
    model = compress_model(Plain(), "low_rank", rank=2)
    for cls in (Plain, Wrapped):
        fresh = prepare(cls())
        fresh.load_state_dict({k.replace("net.", "net._orig_mod.", 1): v for k, v in model.state_dict().items()})
        assert same_state(fresh, model)
        fresh = prepare(cls())
        fresh.load_state_dict(model.state_dict())
        assert same_state(fresh, model)
    assert read_specs({f"net._orig_mod.{k}": v for k, v in model.net.state_dict().items()}).keys() == {
        "net.0",
        "net.2.0",
    }

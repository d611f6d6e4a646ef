"""What fails half way leaves the model as it was: a fit, `compress_model` and `finalize` in place."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressionCallback,
    CompressionMethodRegistry,
    LowRankCallback,
    LowRankCompression,
    PruningCallback,
    PTQCallback,
    PTQCompression,
    QATCallback,
    QATCompression,
    StructuredPruningCallback,
    compress_model,
    finalize,
    prepare,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.compression_method import CompressionContext, CompressionMethod, Stage
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.plan import CompressionPlan, LayerPlan
from pquant_lightning.core.undo import unchanged_on_error
from tests.contract.table import TABLE, same_state, specs_of, state_of
from tests.models import MLP, MODELS, Inputs, SmallModule, built, fit, quiet_trainer

_WRITING = {  # what changes values where they are, beside the methods of the table
    "sparsegpt": partial(PruningCallback, sparsity=0.5, criterion="sparsegpt", include=["*"]),
    "wanda": partial(PruningCallback, sparsity=0.5, criterion="wanda", include=["*"]),
    "channels": partial(StructuredPruningCallback, sparsity=0.5, min_saving=0.0),
    "equalized": partial(PTQCallback, equalize=True),
}
FIRST = {name: partial(rows.callback, **rows.rows[0]) for name, rows in TABLE.items()} | _WRITING
PAIRS = [
    (first, model)
    for first in FIRST
    for model in ("mlp", "conv_net")
    if first not in TABLE or TABLE[first].takes(model)
]
ERRORS = {
    "plan": RuntimeError,
    "apply": torch.OutOfMemoryError,
    "calibrate": CalibrationError,
    "attach": KeyboardInterrupt,
}


class Broken(CompressionMethod):
    """Fails in one of its parts, after it has changed everything in the model."""

    where: str = "apply"
    stage = Stage.QUANTIZE

    def _fail_in(self, part: str, model: nn.Module) -> None:
        if part == self.where:
            for module in model.modules():
                module.eval()
                module.noted = part
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                parameter.mul_(2.0)
            raise ERRORS[part](f"in {part}")

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        if self.where == "plan":
            raise RuntimeError("in plan")
        return CompressionPlan("broken", "broken", (LayerPlan("anything", {}),), ())

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        self._fail_in("apply", model)

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        self._fail_in("calibrate", model)

    def attach(self, model: nn.Module, state: dict[str, Any]) -> None:
        self._fail_in("attach", model)


@pytest.fixture(autouse=True)
def _broken(own_registries: None) -> None:
    CompressionMethodRegistry.register("broken", Broken)


def seen(model: nn.Module) -> list[Any]:
    """What a user can see of a model beside its values: modules, their attributes and hooks, parameters, flags."""
    parameters = [(name, id(p), p.requires_grad, tuple(p.shape)) for name, p in model.named_parameters()]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    attributes = [
        sorted((key, len(value) if isinstance(value, dict | list) else None) for key, value in module.__dict__.items())
        for module in model.modules()
    ]
    return [modules, parameters, attributes]


def prepared_for(trainer: Any, model: SmallModule) -> tuple[list[Any], dict[str, Any]]:
    """After a validation, which leaves Lightning's own notes in the module."""
    trainer.validate(model, model.loader(), verbose=False)
    model.train()
    model.__dict__.setdefault("configure_model", model.configure_model)
    return seen(model), state_of(model)


def assert_untouched(model: nn.Module, before: tuple[list[Any], dict[str, Any]]) -> None:
    structure, state = before
    assert not compressed_layers(model)
    assert seen(model) == structure
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])] == []


@pytest.mark.parametrize(("first", "model_name"), PAIRS)
def test_a_later_method_that_fails_undoes_the_earlier_one(first: str, model_name: str, tmp_path: Path) -> None:
    model = built(MODELS[model_name])
    callbacks = [FIRST[first](), CompressionCallback(Broken())]
    trainer = quiet_trainer(tmp_path, callbacks)
    before = prepared_for(trainer, model)

    with pytest.raises(torch.OutOfMemoryError):
        fit(trainer, model)

    assert_untouched(model, before)
    assert not callbacks[0]._state


@pytest.mark.parametrize("where", ERRORS)
def test_wherever_it_fails_the_next_fit_is_that_of_an_untouched_model(where: str, tmp_path: Path) -> None:
    model = MLP()
    other = copy.deepcopy(model)
    callbacks = [LowRankCallback(rank=2), PruningCallback(sparsity=0.5, include=["*"]), QATCallback(bits=4)]
    trainer = quiet_trainer(tmp_path, [*callbacks, CompressionCallback(Broken(where=where))])
    before = prepared_for(trainer, model)

    with pytest.raises((ERRORS[where], SystemExit), match=None if where == "attach" else f"in {where}"):
        fit(trainer, model)
    assert_untouched(model, before)
    del model.__dict__["configure_model"]
    first, second = (fit(quiet_trainer(tmp_path, copy.deepcopy(callbacks)), m) for m in (model, other))

    assert compressed_layers(first)
    assert specs_of(first) == specs_of(second)
    assert same_state(first, second)


class Late(MLP):
    """Its own `configure_model` fails at first."""

    fails = True

    def configure_model(self) -> None:
        if self.fails:
            raise OSError("no weights there")


def test_a_configure_model_that_fails_leaves_the_model_alone(tmp_path: Path) -> None:
    model = Late()
    with pytest.raises(OSError, match="no weights"):
        fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2)]), model)
    assert not compressed_layers(model)
    assert "configure_model" not in model.__dict__

    Late.fails = False
    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2)]), model)

    assert compressed_layers(model)


@pytest.mark.parametrize("first", [*(name for name in FIRST if name not in _WRITING), "unstructured_pruning"])
def test_compress_model_in_place(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"include": ["*"]} if first == "unstructured_pruning" else TABLE[first].rows[0]
    model = prepare(built(MODELS["conv_net" if first == "tucker" else "mlp"]))
    method = CompressionMethodRegistry.get(first, dict(options))
    before = seen(model), state_of(model)
    original = type(method).attach

    def attach(self: Any, *args: Any) -> None:
        original(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(method), "attach", attach)
    with pytest.raises(KeyboardInterrupt):
        compress_model(model, method, train_loader=model.loader(), inplace=True)
    assert_untouched(model, before)

    monkeypatch.setattr(type(method), "attach", original)
    compress_model(model, method, train_loader=model.loader(), inplace=True)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[1].get(key, value))] or (
        compressed_layers(model)
    )


@pytest.mark.parametrize("method", [QATCompression(bits=4), PTQCompression(scheme="dynamic")], ids=lambda m: m.name)
def test_finalize_in_place(method: CompressionMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that is deployed last cannot be."""
    model = prepare(built(MODELS["conv_net"]))
    method.compress_in_place(model)
    before, state, specs = seen(model), state_of(model), specs_of(model)
    kind = type(model.head)
    original = kind.finalized

    def finalized(self: Any) -> nn.Module:
        if self is model.head:
            raise torch.OutOfMemoryError("no room")
        return original(self)

    monkeypatch.setattr(kind, "finalized", finalized)
    with pytest.raises(torch.OutOfMemoryError):
        finalize(model, inplace=True)

    assert specs_of(model) == specs
    assert seen(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Odd(nn.Module):
    """What is easily forgotten: shared memory, statistics, containers of its own, a view, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("later", torch.zeros(8, 2)[4:])
        self.names, self.sizes = ["a"], {"a": 1}
        self.first.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Inputs:
        return (self.second(self.first(self.norm(x))),)


def test_undo_knows_more_than_parameters() -> None:
    model = Odd()
    model.first.weight.grad = grad = torch.ones(4, 4)
    before, state = seen(model), state_of(model)

    with pytest.raises(ZeroDivisionError), unchanged_on_error(model) as undo, undo.writing():  # noqa: PT012
        model.train()(torch.randn(8, 4))  # moves the statistics of the norm
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 3.0)
            model.later.add_(1.0)
            nn.init.constant_(model.second.bias, 7.0)
        model.first.bias.data = torch.zeros(2)
        model.second.weight = nn.Parameter(torch.zeros(1))
        model.first.weight.grad = None
        model.names.append("b")
        model.sizes["a"] = 2
        model.new = nn.Identity()
        model.register_forward_hook(lambda *_: None)
        raise ZeroDivisionError

    assert seen(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.first.weight is model.second.weight
    assert model.first.weight.grad is grad
    assert (model.names, model.sizes) == (["a"], {"a": 1})
    assert not model.first.bias.requires_grad


def test_nothing_is_undone_without_an_error() -> None:
    model = nn.Linear(2, 2)

    with unchanged_on_error(model) as undo, undo.writing(), torch.no_grad():
        model.weight.zero_()

    assert not model.weight.any()


def test_only_what_is_written_into_is_copied() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))

    with unchanged_on_error(model) as undo, undo.writing(), torch.no_grad():
        LowRankCompression(rank=2, exclude=["7"]).compress_in_place(model)
        torch.empty(64, 64).copy_(model[7].weight)
        assert undo.copied_bytes == 0
        model[7].weight[0].zero_()
        model[7].weight.zero_()
        assert undo.copied_bytes == 64 * 64 * 4

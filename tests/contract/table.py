"""The rows of the contract suite: how each registered method is used, and which of them are fitted on which model.

A new method joins every contract test by one entry in `TABLE`.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from pquant_lightning import (
    CompressionMethod,
    CompressionMethodRegistry,
    CompressionPlan,
    CPCallback,
    FactorizationCallback,
    LoRACallback,
    LowRankCallback,
    MixedPrecisionCallback,
    PTQCallback,
    QATCallback,
    TensorTrainCallback,
    TuckerCallback,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.splitting import split_as_planned
from tests.models import MODELS, PACKAGES, Inputs, SmallModule, built

Options = Mapping[str, Any]


@dataclass(frozen=True)
class MethodRows:
    """How one method takes part in the suite.

    Attributes:
        callback: its named callback.
        rows: options that compress; each is one row.
        lossless: options that keep the output, up to `tolerance` (relative).
        tolerance: of `lossless`.
        ladder: options from coarse to fine; the error falls along them. Empty where nothing changes at the start.
        merges: its deployed layers are ordinary ones again, as large as before.
        models: keys of `MODELS` on which it is tried, each with layers for it; None means all.
    """

    callback: Callable[..., Callback]
    rows: tuple[Options, ...]
    lossless: Options
    tolerance: float
    ladder: tuple[Options, ...]
    merges: bool = False
    models: tuple[str, ...] | None = None

    def takes(self, model: str) -> bool:
        return self.models is None or model in self.models


TABLE: dict[str, MethodRows] = {
    "low_rank": MethodRows(
        LowRankCallback,
        rows=(
            {"rank": 2},
            {"energy": 0.6},
            {"param_ratio": 0.5},
            {"budget": {"params": 0.6}, "data_aware": True},
            {"param_ratio": 0.6, "split": "spatial", "sequential": True},
        ),
        lossless={"rank": 10_000, "min_saving": 0.0},
        tolerance=1e-5,
        ladder=tuple({"rank": rank, "min_saving": 0.0, "include": ["*"]} for rank in (1, 4, 8)),
    ),
    "factorization": MethodRows(
        FactorizationCallback,
        rows=(
            {"kind": "sparse_low_rank", "param_ratio": 0.6},
            {"kind": "nmf", "rank": 2},
            {"kind": "kronecker", "rank": 2, "include": ["*"]},
            {"kind": "monarch", "rank": 1, "blocks": 2, "include": ["*"]},
            {"kind": "cur", "param_ratio": 0.5},
        ),
        lossless={"kind": "nmf", "rank": 10_000, "min_saving": 0.0},
        tolerance=1e-5,
        ladder=tuple({"kind": "sparse_low_rank", "rank": rank, "min_saving": 0.0} for rank in (1, 4, 8)),
    ),
    "ptq": MethodRows(
        PTQCallback,
        rows=({"bits": 8}, {"scheme": "dynamic"}, {"bits": 4, "scheme": "weight_only", "group_size": 8}),
        lossless={"bits": 8, "scheme": "weight_only", "min_saving": 0.0},
        tolerance=0.02,
        ladder=tuple({"bits": bits, "scheme": "weight_only", "min_saving": 0.0} for bits in (2, 4, 8)),
    ),
    "mixed_precision": MethodRows(
        MixedPrecisionCallback,
        rows=({"average_bits": 4}, {"average_bits": 3, "scheme": "weight_only", "sensitivity": "output"}),
        lossless={"average_bits": 8, "scheme": "weight_only", "min_saving": 0.0},
        tolerance=0.02,
        ladder=tuple({"average_bits": bits, "scheme": "weight_only", "min_saving": 0.0} for bits in (2, 4, 8)),
    ),
    "qat": MethodRows(
        QATCallback,
        rows=({"bits": 8}, {"bits": 4}, {"weight_bits": 3, "act_bits": 16}),
        lossless={"weight_bits": 8, "act_bits": 16, "min_saving": 0.0},
        tolerance=0.02,
        ladder=tuple({"bits": bits, "min_saving": 0.0} for bits in (2, 4, 8)),
    ),
    "lora": MethodRows(
        LoRACallback,
        rows=({"r": 2}, {"r": 4, "init": "pissa", "use_dora": True, "bias": "lora_only"}),
        lossless={"r": 2, "init": "olora"},
        tolerance=1e-6,  # bit for bit, but stock encoders leave their fast path
        ladder=(),
        merges=True,
    ),
    "tensor_train": MethodRows(
        TensorTrainCallback,
        rows=({"rank": 2}, {"max_error": 0.85}),
        lossless={"rank": 10_000, "min_saving": 0.0},
        tolerance=1e-4,
        ladder=tuple({"rank": rank, "min_saving": 0.0} for rank in (1, 4, 12)),
        models=("mlp", "conv_net", "transformer"),
    ),
    "tucker": MethodRows(
        TuckerCallback,
        rows=({"rank": 2}, {"param_ratio": 0.4}),
        lossless={"rank": 10_000, "min_saving": 0.0},
        tolerance=1e-4,
        ladder=tuple({"rank": rank, "min_saving": 0.0} for rank in (1, 3, 6)),
        models=("conv_net",),
    ),
    "cp": MethodRows(
        CPCallback,
        rows=({"rank": 4},),
        lossless={"rank": 10_000, "min_saving": 0.0},
        tolerance=1e-4,
        ladder=tuple({"rank": rank, "min_saving": 0.0} for rank in (1, 8, 64)),
        models=("mlp", "conv_net"),
    ),
}


def registered_methods() -> list[str]:
    """Names of the package's own methods that leave layers of their own; toys and installed plug-ins are left out."""
    registry = CompressionMethodRegistry
    families = {"quantization", "pruning", "tensor_network"}  # names of configurations that make one of the methods
    # one leaves no layers, the other changes sizes of many: tests/integration/test_pruning.py, test_structured_*.py
    without_layers = {"unstructured_pruning", "structured_pruning"}
    names = [name for name in registry.list_available() if name not in families | without_layers]
    return [n for n in names if registry.get_class(n).__module__.startswith("pquant_lightning.")]


@dataclass(frozen=True)
class Case:
    """One model and the callbacks that compress it."""

    model: str
    callbacks: tuple[Callable[[], Callback], ...] = field(repr=False)
    label: str = ""
    package: str = PACKAGES[0]

    def make_callbacks(self) -> list[Any]:
        return [make() for make in self.callbacks]

    @property
    def merges(self) -> bool:
        """Whether the deployed model is an ordinary one."""
        return all(TABLE[callback.method.name].merges for callback in self.make_callbacks())

    def make_model(self, seed: int = 0) -> SmallModule:
        """With all its layers, as a test needs it that compares modules or applies a method by hand."""
        return built(MODELS[self.model], seed)

    def inputs(self, seed: int = 0) -> Inputs:
        return MODELS[self.model].inputs(seed=seed)

    def __str__(self) -> str:
        return f"{self.model}-{self.label}" + (f"-{self.package}" if self.package != PACKAGES[0] else "")


def _label(name: str, options: Options) -> str:
    return name + "".join(f",{key}={value}" for key, value in options.items())


def _rows(model: str, first_only: bool = False) -> list[Case]:
    cases = []
    for name, method in TABLE.items():
        if not method.takes(model):
            continue
        for options in method.rows[:1] if first_only else method.rows:
            cases.append(Case(model, (partial(method.callback, **options),), _label(name, options)))
    return cases


LOW_RANK_THEN_QAT = (partial(LowRankCallback, rank=2, include=["*"]), partial(QATCallback, bits=8))
TENSOR_TRAIN_THEN_QAT = (partial(TensorTrainCallback, rank=2), partial(QATCallback, bits=8))
_NAMED = (
    partial(LowRankCallback, rank=2, include=["fc1"], name="first"),
    partial(LowRankCallback, energy=0.7, include=["fc2"], name="second"),
)
STACKS = [
    Case("mlp", LOW_RANK_THEN_QAT, "low_rank+qat"),
    Case("mlp", _NAMED, "low_rank+low_rank"),
    Case("mlp", (*_NAMED, partial(QATCallback, bits=4)), "low_rank+low_rank+qat"),
    Case("mlp", (partial(LoRACallback, r=2), partial(QATCallback, bits=8)), "lora+qat"),
    Case("mlp", (_NAMED[0], partial(LoRACallback, r=2), partial(QATCallback, bits=4)), "low_rank+lora+qat"),
    Case(
        "mlp",
        (partial(QATCallback, bits=4, exclude=["head"], name="body"), partial(QATCallback, include=["head"])),
        "qat+qat",
    ),
]
OTHER_MODELS = [name for name in MODELS if name != "mlp"]

ROWS = [case for model in MODELS for case in _rows(model)]
"""Every row on every model: for what is done without a Trainer."""

CASES = [
    *_rows("mlp"),
    *STACKS,
    *(case for model in OTHER_MODELS for case in _rows(model, first_only=True)),
    *(Case(model, LOW_RANK_THEN_QAT, "low_rank+qat") for model in OTHER_MODELS),
    Case("mlp", TENSOR_TRAIN_THEN_QAT, "tensor_train+qat"),
    Case("conv_net", (partial(TuckerCallback, rank=2), partial(QATCallback, bits=8)), "tucker+qat"),
]
"""For what costs more: every row and stack on the MLP, one row of each method and one stack on the other models."""

OTHER_PACKAGE = [
    replace(case, package=PACKAGES[1])
    for case in (
        *_rows("mlp", first_only=True),
        Case("conv_net", (partial(TuckerCallback, rank=2),), "tucker"),
        Case("mlp", LOW_RANK_THEN_QAT, "low_rank+qat"),
        Case("late_mlp", (partial(PTQCallback),), "ptq"),
    )
]
"""Each method once more, under the other package of Lightning."""


def over(cases: list[Case]) -> Any:
    """Parametrises a test with `case`."""
    return pytest.mark.parametrize("case", cases, ids=str)


def over_methods(with_ladder: bool = False) -> Any:
    """Parametrises a test with `name`, a key of `TABLE`, and `model`, a key of `MODELS`."""
    chosen = [name for name, rows in TABLE.items() if rows.ladder or not with_ladder]
    pairs = [(name, model) for name in chosen for model in MODELS if TABLE[name].takes(model)]
    return pytest.mark.parametrize(("name", "model"), pairs, ids=[f"{model}-{name}" for name, model in pairs])


def context_for(method: CompressionMethod, model: nn.Module, by: str = "test") -> CompressionContext:
    """With the model's own data, where the method wants them in a Trainer."""
    with_data = isinstance(model, SmallModule) and method.wanted_samples_in_trainer > 0
    return CompressionContext(by=by, samples=method.samples_of(model.loader()) if with_data else None)


def apply_method(method: CompressionMethod, model: nn.Module, by: str = "test") -> CompressionPlan:
    """Plans and applies by hand; the row is worth nothing unless every planned layer has changed."""
    before = copy.deepcopy(model)
    context = context_for(method, model, by)
    plan = method.plan(model, context)
    method.apply(model, plan, context)
    method.calibrate(model, context)
    assert plan.layers, plan
    split_as_planned(before, plan.splits)
    for entry in plan.layers:
        old, new = before.get_submodule(entry.name), model.get_submodule(entry.name)
        assert type(new) is not type(old) or not same_state(new, old), f"{entry.name} has not changed"
    return plan


def compressed(case: Case, seed: int = 0) -> SmallModule:
    """A new model with all of the case's methods applied, in training form."""
    model = case.make_model(seed)
    for callback in case.make_callbacks():
        apply_method(callback.method, model, by=callback.state_key)
    return model


def trained(case: Case, steps: int = 2) -> SmallModule:
    """`compressed`, after a few optimizer steps, so that observers have seen data and weights have moved."""
    model = compressed(case).train()
    methods = [callback.method for callback in case.make_callbacks()]
    for method in methods:
        method.project(model, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _, batch in zip(range(steps), model.loader(), strict=False):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        for method in methods:
            method.project(model, {})
    return model


def assert_compressed(model: nn.Module, callbacks: list[Any]) -> None:
    """Each callback has left its mark: layers made by it."""
    makers = {layer.spec["by"] for layer in compressed_layers(model).values()}
    for callback in callbacks:
        assert callback.state_key in makers, f"{callback.state_key} has changed nothing"


def specs_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The structure: the spec of every compressed layer by name."""
    return {name: layer.spec for name, layer in compressed_layers(model).items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A state dict that does not follow the model."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Equal names in any order, and bitwise equal tensors of equal types."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def same_state(first: nn.Module, second: nn.Module) -> bool:
    """Bitwise equal state dicts."""
    return same_tensors(first.state_dict(), second.state_dict())


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The output in eval mode without gradients; the model's mode is not changed."""
    was_training = model.training
    with torch.no_grad():
        result: Tensor = model.eval()(*inputs)
    model.train(was_training)
    return result

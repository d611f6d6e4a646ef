"""Every numeric option of every method has a range, and what lies outside is refused when the method is made."""

import dataclasses
import math
import types
import typing
from typing import Any

import pytest

from pquant_lightning import (
    CompressionMethod,
    CompressionMethodRegistry,
    CompressionPipeline,
    DistillationCallback,
    PQuantError,
)
from pquant_lightning.core.compression_method import MethodFamily
from pquant_lightning.pipelines.compression_pipeline import PipelineStage

COUNT = ([1, 3], [0, -1, 1.5])  # values that are taken, values that are refused
SHARE = ([0.001, 0.5, 1.0], [0.0, -0.5, 1.001, 2])  # that is kept
REMOVED = ([0.001, 0.5], [-0.5, 1.0, 2])
MOMENT = ([0.0, 0.4], [-0.1, 1.001])
FACTOR = ([0.01, 100], [0.0, -1])
BITS = ([2, 5, 8], [1, 0, -4, 9, 20, 4.5])
BITS_OR_NONE = ([2, 8, 16], [1, 0, -4, 9, 15, 17, 20])
AVERAGE = ([2, 3.5, 8, 16], [1.9, 0, -1, 16.1, 20])

# option -> its range; one of several methods where the name means another thing there
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "min_saving": ([0.0, 0.5], [-0.1, 1.0, 2]),
    "r": COUNT,
    "alpha": FACTOR,
    "dropout": ([0.0, 0.5], [-0.1, 1.0]),
    "lr_ratio": FACTOR,
    "loftq_bits": BITS,
    "loftq_iter": COUNT,
    "num_samples": COUNT,
    "qat.num_samples": ([0, 3], [-1, 1.5]),
    "max_statistics_bytes": COUNT,
    "rank": COUNT,
    "energy": SHARE,
    "param_ratio": SHARE,
    "round_to": COUNT,
    "factorization.blocks": ([2, 4], [1, 0, -1]),
    "factorization.density": ([0.01, 0.5], [0.0, 1.0, -1]),
    "factorization.iterations": COUNT,
    "sparsity": REMOVED,
    "max_sparsity": REMOVED,
    "start": MOMENT,
    "end": ([0.9, 1.0], [-0.1, 1.001]),
    "seed": ([0, 7], [1.5]),
    "unstructured_pruning.interval": COUNT,
    "unstructured_pruning.rewind": ([0.0, 0.5], [-0.1, 1.0, 2]),
    "bits": BITS,
    "weight_bits": BITS_OR_NONE,
    "mixed_precision.weight_bits": ([], [8, 20]),
    "act_bits": BITS_OR_NONE,
    "first_last_bits": BITS_OR_NONE,
    "group_size": ([2, 64], [1, 0, -1]),
    "damping": ([0.01, 1.0], [0.0, -1, 1.001]),
    "smooth": ([0.0, 0.5, 1.0], [-0.1, 1.1]),
    "average_bits": AVERAGE,
    "target_size_mb": FACTOR,
    "max_drop": ([0.0, 0.5], [-0.1]),
    "sensitivity_samples": COUNT,
    "initial_bits": BITS,
    "freeze_observers": MOMENT,
    "freeze_norms": MOMENT,
    "scale_lr": FACTOR,
    "tensor_train.max_error": ([0.01, 0.9], [0.0, 1.0, -1]),
    "num_cores": ([2, 4], [1, 0, -1]),
}
NEEDS: dict[str, dict[str, Any]] = {  # without which an option means nothing
    "factorization.blocks": {"kind": "monarch"},
    "factorization.density": {"kind": "sparse_low_rank"},
    "factorization.iterations": {"kind": "nmf"},
    "max_drop": {"monitor": "val_loss"},
    "group_size": {"scheme": "weight_only"},
    "smooth": {"scheme": "static"},
    "loftq_bits": {"init": "loftq"},
    "loftq_iter": {"init": "loftq"},
    "act_bits": {"scheme": "static"},
    "unstructured_pruning.rewind": {"sparsity": 0.5},
    "structured_pruning.round_to": {"sparsity": 0.5},
}
OTHERS: list[tuple[str, dict[str, Any]]] = [  # what is not one number
    *(
        (name, {option: value})
        for name, option in (("low_rank", "budget"), ("structured_pruning", "target"))
        for value in ({"macs": 1.5}, {"macs": 0}, {"macs": -1}, {"macs": math.nan}, {"macs": True}, {}, {"speed": 0.5})
    ),
    *(("unstructured_pruning", {"pattern": p}) for p in ("0:4", "4:2", "4:4", "2", "2:0", "-1:4", "a")),
    *(("unstructured_pruning", {"block_size": b}) for b in ((0, 4), (-1, 1), (2, True), (2,))),
    *(("unstructured_pruning", {"overrides": {"a": o}}) for o in ({"sparsity": 2}, {"sparsity": math.nan}, {"x": 1})),
    *(("unstructured_pruning", {"sparsity": 0.5, "start": 0.8, "end": 0.5}),),
    *((n, {"overrides": {"a": o}}) for n in ("ptq", "qat", "mixed_precision") for o in ({"bits": 20}, {"bits": 0})),
    *(("mixed_precision", {"choices": c}) for c in ([1], [20], [], [True])),
    *(("mixed_precision", o) for o in ({"average_bits": 3, "choices": [4, 8]}, {"max_drop": 0.1})),
    ("qat", {"initial_bits": 8, "bits": 4, "start": 0.6, "end": 0.5}),
    *(("lora", {"rank_pattern": {"a": r}}) for r in (0, -2)),
    *(("lora", {"alpha_pattern": {"a": a}}) for a in (0, -1, math.nan)),
]
NAMES = [
    name
    for name in CompressionMethodRegistry.list_available()
    if not issubclass(CompressionMethodRegistry.get_class(name), MethodFamily)
]


def numeric(method: type[CompressionMethod]) -> list[str]:
    """The options that take a number."""
    hints, found = typing.get_type_hints(method), []
    for option in dataclasses.fields(method):
        hint = hints[option.name]
        parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if int in parts or float in parts:
            found.append(option.name)
    return found


OPTIONS = [(name, option) for name in NAMES for option in numeric(CompressionMethodRegistry.get_class(name))]


def of(table: dict[str, Any], name: str, option: str, default: Any = None) -> Any:
    return table.get(f"{name}.{option}", table.get(option, default))


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=".".join)
def test_a_number_out_of_range_is_refused_when_the_method_is_made(name: str, option: str) -> None:
    method = CompressionMethodRegistry.get_class(name)
    needed = {key: value for key, value in of(NEEDS, name, option, {}).items() if hasattr(method, key)}
    taken, refused = of(RANGES, name, option, (None, None))
    assert taken is not None, f"{name}.{option} has no range in the table"
    for value in taken:
        CompressionMethodRegistry.get(name, {**needed, option: value})
    for value in [*refused, math.nan, math.inf, -math.inf, "8", [8], -(10**9), True]:
        if option == "seed" and value == -(10**9):
            continue
        with pytest.raises(PQuantError, match=option.split("_")[0]):
            CompressionMethodRegistry.get(name, {**needed, option: value})


@pytest.mark.parametrize(("name", "options"), OTHERS, ids=str)
def test_other_values_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PQuantError):
        CompressionMethodRegistry.get(name, options)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda o=o: DistillationCallback(**o) for o in ({"weight": v} for v in (2, -1, math.nan, "a", True))),
        *(
            lambda o=o: DistillationCallback(**o)
            for o in ({"temperature": v} for v in (0, -1, math.nan, math.inf, "a"))
        ),
        *(lambda o=o: PipelineStage("ptq", **o) for o in ({"epochs": v} for v in (-1, 1.5, math.nan, "a"))),
        *(lambda o=o: PipelineStage("qat", epochs=1, **o) for o in ({"lr": v} for v in (-1, 0, math.nan, math.inf))),
        *(lambda b=b: CompressionPipeline(["ptq"], budget=b) for b in ({"size": 1.5}, {"size": 0}, {}, {"x": 1})),
        *(lambda d=d: CompressionPipeline(["ptq"], monitor="loss", max_drop=d) for d in (-1, math.nan, math.inf, "a")),
        *(lambda s=s: CompressionPipeline(["ptq"], batch_size=s) for s in (0, -2, 1.5, "a")),
    ],
)
def test_callbacks_and_pipelines(make: Any) -> None:
    with pytest.raises(PQuantError):
        make()

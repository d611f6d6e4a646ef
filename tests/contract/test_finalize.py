"""The deployed form: a copy that computes what was trained, and that exports."""

import operator
from typing import Any

import pytest
import torch

from pquant_lightning import finalize, prepare
from pquant_lightning.core.compressed_layer import Stage, compressed_layers
from tests.contract.table import (
    CASES,
    ROWS,
    Case,
    output,
    over,
    same_state,
    same_tensors,
    specs_of,
    state_of,
    trained,
)
from tests.models import MODELS


@over(CASES)
def test_finalize_leaves_the_original_untouched(case: Case) -> None:
    model = trained(case)
    modules, state, training = dict(model.named_modules()), state_of(model), model.training

    final = finalize(model)

    assert compressed_layers(final) or case.merges
    assert dict(model.named_modules()) == modules
    assert same_tensors(model.state_dict(), state)
    assert model.training == training
    assert not final.training


@over(CASES)
def test_the_deployed_output_is_the_trained_one(case: Case) -> None:
    model = trained(case)
    expected, callbacks = output(model, case.inputs()), case.make_callbacks()

    final = finalize(model)

    assert compressed_layers(final) or case.merges
    # integers are accumulated in another order; what is rounded after training only is compared with floating point
    rounded_later = any(
        callback.method.stage == Stage.QUANTIZE and not callback.method.trains for callback in callbacks
    )
    error = (output(final, case.inputs()) - expected).norm() / expected.norm()
    assert error < (0.2 if rounded_later else 0.01)


@over(CASES)
def test_finalize_in_place_gives_the_same(case: Case) -> None:
    model = trained(case)
    final = finalize(model)

    assert finalize(model, inplace=True) is model
    assert specs_of(model) == specs_of(final)
    assert same_state(model, final)


@over(ROWS)
def test_finalizing_twice_changes_nothing(case: Case) -> None:
    final = finalize(trained(case))

    again = finalize(final)

    assert specs_of(again) == specs_of(final)
    assert same_state(again, final)


@over(CASES)
def test_a_training_checkpoint_brings_a_finalized_model_back(case: Case, package_log: pytest.LogCaptureFixture) -> None:
    model = trained(case)
    final = finalize(model)
    changes = specs_of(final) != specs_of(model)

    final.load_state_dict(model.state_dict())

    assert specs_of(final) == specs_of(model)
    assert same_state(final, model)
    assert ("training form" in package_log.text) == (changes and not case.merges)


@over(CASES)
def test_a_finalized_state_dict_loads_into_the_training_form(case: Case) -> None:
    model = prepare(trained(case))
    final = finalize(model)

    model.load_state_dict(final.state_dict())

    assert specs_of(final) == specs_of(model)
    assert same_state(final, model)


def assert_plain_aten(program: torch.export.ExportedProgram) -> None:
    """All operations are torch's own: an exporter needs no knowledge of this package."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target not in (operator.getitem,):
            named = getattr(node.target, "namespace", None) or getattr(node.target, "__module__", "")
            assert named in ("aten", "quantized_decomposed", "_operator", "math", "torch.sym_sum"), node.format_node()
        assert node.op != "call_module"


def dynamic_batch(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch", min=2, max=64)
    return tuple({0: batch} for _ in inputs)


@over(CASES)
def test_the_finalized_model_exports_to_plain_aten_with_a_dynamic_batch(case: Case) -> None:
    final = finalize(trained(case))
    inputs, more = case.inputs(), MODELS[case.model].inputs(count=11, seed=1)

    program = torch.export.export(final, inputs, dynamic_shapes=dynamic_batch(inputs))

    assert compressed_layers(final) or case.merges
    assert_plain_aten(program)
    torch.testing.assert_close(program.module()(*more), output(final, more), atol=1e-5, rtol=1e-4)

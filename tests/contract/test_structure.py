"""What a method does to a model, without a Trainer: plan, apply, values, gradients."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressionMethod,
    CompressionMethodRegistry,
    CompressionPlan,
    QATCallback,
    compression_report,
    finalize,
)
from pquant_lightning.core.compressed_layer import CompressedLayer, compressed_layers
from pquant_lightning.core.splitting import split_as_planned
from tests.contract.table import (
    CASES,
    ROWS,
    TABLE,
    Case,
    apply_method,
    compressed,
    context_for,
    output,
    over,
    over_methods,
    same_tensors,
    specs_of,
    state_of,
    trained,
)
from tests.models import MODELS, built


def shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in (*layer.named_parameters(), *layer.named_buffers())}


@over(ROWS)
def test_plan_leaves_the_model_untouched(case: Case) -> None:
    model = case.make_model()
    modules, state = dict(model.named_modules()), state_of(model)
    (callback,) = case.make_callbacks()

    plan = callback.method.plan(model)

    assert plan.layers
    assert dict(model.named_modules()) == modules  # the same objects
    assert same_tensors(model.state_dict(), state)


@over(ROWS)
def test_plan_survives_json(case: Case) -> None:
    (callback,) = case.make_callbacks()
    plan = callback.method.plan(case.make_model())

    again = CompressionPlan.from_json(plan.to_json())

    assert plan.layers
    assert again == plan


@over(ROWS)
def test_a_plan_read_from_json_applies_to_the_same_model(case: Case) -> None:
    (callback,) = case.make_callbacks()
    model, twin = case.make_model(), case.make_model()
    plan = apply_method(callback.method, model)

    context = context_for(callback.method, twin)
    callback.method.apply(twin, CompressionPlan.from_json(plan.to_json()), context)
    callback.method.calibrate(twin, context)

    assert specs_of(twin) == specs_of(model)
    torch.testing.assert_close(output(twin, case.inputs()), output(model, case.inputs()), atol=1e-5, rtol=1e-4)


@over(ROWS)
def test_every_layer_is_changed_or_left_alone_with_a_reason(case: Case) -> None:
    model = case.make_model()
    matrices = {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d, nn.Embedding)}
    (callback,) = case.make_callbacks()

    plan = apply_method(callback.method, model)

    reasons = {skip.name: skip.reason for skip in plan.skipped}
    assert matrices <= {entry.name for entry in plan.layers} | set(reasons)
    assert all(reasons.values())


@over(ROWS)
def test_from_spec_on_meta_has_the_keys_and_shapes_of_what_apply_made(case: Case) -> None:
    original, model = case.make_model(), case.make_model()
    (callback,) = case.make_callbacks()
    plan = apply_method(callback.method, model)

    split_as_planned(original, plan.splits)
    for entry in plan.layers:
        with torch.device("meta"):
            kind = CompressedLayer.kinds[entry.spec["kind"]]
            structure = kind.from_spec(entry.spec, original.get_submodule(entry.name))
        assert shapes(structure) == shapes(model.get_submodule(entry.name))


@over_methods()
def test_lossless_options_reproduce_the_output(name: str, model: str) -> None:
    original = built(MODELS[model])
    small = copy.deepcopy(original)
    method = CompressionMethodRegistry.get(name, TABLE[name].lossless)
    inputs = MODELS[model].inputs()

    apply_method(method, small)

    expected = output(original, inputs)
    error = (output(small, inputs) - expected).norm() / expected.norm()
    assert error <= TABLE[name].tolerance


@over_methods(with_ladder=True)
def test_error_falls_along_the_ladder(name: str, model: str) -> None:
    original, inputs = built(MODELS[model]), MODELS[model].inputs(count=64)
    expected = output(original, inputs)
    weight_errors, output_errors = [], []

    for options in TABLE[name].ladder:
        small = copy.deepcopy(original)
        apply_method(CompressionMethodRegistry.get(name, options), small)
        errors = [layer.error for layer in compression_report(original, small).layers]
        weight_errors.append(sum(error for error in errors if error is not None))
        output_errors.append(float((output(finalize(small), inputs) - expected).norm()))

    assert weight_errors == sorted(weight_errors, reverse=True)
    assert weight_errors[0] > 2 * weight_errors[-1] > 0
    assert output_errors == sorted(output_errors, reverse=True)


@over(CASES)
def test_every_trainable_parameter_of_ours_gets_a_gradient_within_two_steps(case: Case) -> None:
    model = compressed(case).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ours = {
        f"{name}.{own}": parameter
        for name, layer in compressed_layers(model).items()
        for own, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    reached = set()

    for _, batch in zip(range(2), model.loader(), strict=False):
        optimizer.zero_grad()
        model.loss(batch).backward()
        reached |= {name for name, p in ours.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()

    assert ours
    assert set(ours) == reached


def with_and_without_mask() -> Any:
    """Each stacked case with its first input alone; those that take a padding mask with it, too."""
    pairs = [(case, count) for case in CASES for count in range(1, len(case.inputs()) + 1)]
    ids = [f"{case}-{'mask' if count == 2 else 'plain'}" for case, count in pairs]
    return pytest.mark.parametrize(("case", "num_inputs"), pairs, ids=ids)


@with_and_without_mask()
def test_eval_equals_train_forward(case: Case, num_inputs: int) -> None:
    inputs = case.inputs()[:num_inputs]
    model = compressed(case).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # by definition another function in eval mode
            module.eval()

    with torch.no_grad():
        trained_output = model(*inputs)  # the observers see this batch
        eval_output = model.eval()(*inputs)

    torch.testing.assert_close(eval_output, trained_output, atol=2e-6, rtol=1e-5)


@over(CASES)
def test_eval_forward_changes_no_state(case: Case) -> None:
    """Before the first training batch (a sanity check) and after it."""
    for model in (compressed(case), trained(case)):
        state = state_of(model)

        output(model, case.inputs(seed=1))

        assert same_tensors(model.state_dict(), state)


@over(ROWS)
def test_the_training_flag_and_requires_grad_are_taken_over(case: Case) -> None:
    model = case.make_model().eval().requires_grad_(False)
    (callback,) = case.make_callbacks()

    apply_method(callback.method, model)

    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@over(ROWS)
def test_a_second_plan_finds_nothing_more_to_do(case: Case) -> None:
    model = case.make_model()
    (callback,) = case.make_callbacks()
    plan = apply_method(callback.method, model)

    again = callback.method.plan(model)

    done = {entry.name for entry in plan.layers}
    assert not {entry.name for entry in again.layers} & done
    assert all(not entry.name.startswith(f"{name}.") for entry in again.layers for name in done)


@over(ROWS)
def test_compress_copies_and_reports(case: Case) -> None:
    model = case.make_model()
    state = state_of(model)
    method: Any = case.make_callbacks()[0].method
    assert isinstance(method, CompressionMethod)

    small = method.compress(model, model.loader())

    assert same_tensors(model.state_dict(), state)
    assert compressed_layers(small)
    info = method.get_compression_info(model, small)
    assert info["original_params"] == sum(p.numel() for p in model.parameters())
    assert info["compressed_params"] == sum(p.numel() for p in small.parameters())
    assert info["compression_ratio"] == info["original_params"] / info["compressed_params"]
    assert info["method"] == method.name
    assert {**method.config, "method": method.name}.items() <= info.items()


def test_the_info_of_a_finalized_model_counts_its_integer_weights() -> None:
    case = Case("mlp", (partial(QATCallback, bits=8),), "qat")
    original, model = case.make_model(), compressed(case)
    method = case.make_callbacks()[0].method

    info = method.get_compression_info(original, finalize(model))

    assert (info["original_params"], info["compressed_params"]) == compression_report(original, model).params


@over(ROWS)
def test_the_context_is_told_the_error_of_every_changed_layer(case: Case) -> None:
    model = case.make_model()
    method = case.make_callbacks()[0].method
    context = context_for(method, model)
    plan = method.plan(model, context)

    method.apply(model, plan, context)

    assert set(context.errors) == {entry.name for entry in plan.layers}
    assert all(0 <= error < 1 for error in context.errors.values())

"""Layers of tensor networks: of every type, on every route, under later methods, compiled, and with what they keep."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CPCompression,
    PruningCompression,
    PTQCompression,
    QATCompression,
    TensorTrainCompression,
    TuckerCompression,
    compress_model,
    finalize,
)
from pquant_lightning.core.compressed_layer import compressed_layers, weight_of
from pquant_lightning.core.errors import OptionError
from pquant_lightning.methods.tensor_networks._contraction import TrainShape

METHODS = {"tensor_train": TensorTrainCompression, "tucker": TuckerCompression, "cp": CPCompression}


def planned(layer, method, **options):
    model = nn.Sequential(copy.deepcopy(layer))
    chosen = METHODS[method](min_saving=0.0, **options)
    plan = chosen.plan(model)
    chosen.apply(model, plan)
    return model[0] if plan.layers else plan.skipped[0].reason


def with_weight(layer, weight):
    other = copy.deepcopy(layer)
    other.weight.data = weight.detach().clone()
    return other


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_forward_is_that_of_the_dense_weight(case, method, rank):
    new = planned(case.layer, method, rank=rank)
    if isinstance(new, str):
        assert type(case.layer) in (nn.Linear, nn.Embedding)
        assert "kernel" in new
        return
    for layer in (new.train(), new.eval()):
        expected = with_weight(case.layer, layer.dense_weight())(case.inputs)
        torch.testing.assert_close(layer(case.inputs), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(layer(case.inputs), expected, rtol=1e-4, atol=1e-5)
    assert (new(case.inputs) - case.layer(case.inputs)).abs().max() > 1e-3
    assert torch.equal(new.weight, new.dense_weight())


@pytest.mark.parametrize("method", METHODS)
def test_ranks_above_the_full_one_are_cut_and_exact(case, method):
    new = planned(case.layer, method, rank=10**6)
    if isinstance(new, str):
        return
    torch.testing.assert_close(new(case.inputs), case.layer(case.inputs), rtol=1e-3, atol=1e-4)
    assert new.spec.get("rank", 0) < 10**4
    assert max(new.spec.get("ranks", [0])) < 10**4


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_ordinary_layers_and_all_get_a_gradient(case, method):
    new = planned(case.layer, method, rank=2)
    if isinstance(new, str):
        return
    assert all(type(part).__module__.startswith("torch.nn") for part in new.parts)
    new(case.inputs).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in new.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_param_ratio_is_the_largest_share_that_is_kept(case, method, ratio):
    new = planned(case.layer, method, param_ratio=ratio)
    if isinstance(new, str):
        assert "kernel" in new or "keep" in new
        return
    kept = sum(p.numel() for name, p in new.named_parameters() if "weight" in name) / case.layer.weight.numel()
    assert kept <= ratio


# -- tensor train


@pytest.mark.parametrize("max_error", [0.2, 0.6])
def test_max_error_is_kept_by_each_layer(case, max_error):
    new = planned(case.layer, "tensor_train", max_error=max_error)
    weight = case.layer.weight.detach()
    assert (new.dense_weight() - weight).norm() <= max_error * weight.norm() * (1 + 1e-4)


@pytest.mark.parametrize("num_cores", [2, 3, 4])
def test_num_cores_is_the_number_of_cores(num_cores):
    new = planned(nn.Linear(64, 81), "tensor_train", rank=3, num_cores=num_cores)
    assert len(new.parts) == num_cores
    assert math.prod(new.spec["column_modes"]) == 64


@pytest.mark.parametrize(("out", "in_"), [(97, 101), (1, 16), (10, 13)])
@pytest.mark.parametrize("method", ["tensor_train", "cp"])
def test_primes_are_padded_and_vectors_are_left_alone(out, in_, method):
    layer, x = nn.Linear(in_, out), torch.randn(5, in_)
    new = planned(layer, method, rank=2)
    if out == 1:
        assert "vector" in new
        return
    assert math.prod(new.spec["row_modes"]) > out
    expected = with_weight(layer, new.dense_weight())(x)
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-5)
    new.parts[0].register_forward_hook(lambda *_: None)  # the parts are called one by one
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-5)


def test_every_route_gives_the_same_output_and_the_cheapest_one_moves_with_the_rows():
    layer = nn.Linear(1024, 1024)
    new = planned(layer, "tensor_train", rank=8)
    routes = {rows: new.shape.cheapest(rows) for rows in (1, 128, 1024)}
    assert routes == {1: 2, 128: 1, 1024: 0}
    expected = {rows: with_weight(layer, new.dense_weight()) for rows in routes}
    for rows, dense in expected.items():
        x = torch.randn(rows, 1024)
        torch.testing.assert_close(new(x), dense(x), rtol=1e-3, atol=1e-4)


def test_costs_are_those_of_the_products():
    """Two cores 2x3 and 4x5, rank 6: the chain's multiply-accumulates by hand."""
    shape = TrainShape((2, 4), (3, 5), (1, 6, 1))
    assert [step.macs for step in shape.routes[1].steps] == [3 * 2 * 6 * 5, 2 * 6 * 5 * 4]
    assert [step.macs for step in shape.routes[0].steps] == [8 * 15]


def test_random_cores_have_the_variance_of_the_weight_and_differ_from_draw_to_draw():
    layer = nn.Linear(256, 256)
    first, second = (planned(layer, "tensor_train", rank=8, init="random") for _ in range(2))
    assert not torch.equal(first.parts[0].weight, second.parts[0].weight)
    assert first.dense_weight().std().item() == pytest.approx(layer.weight.std().item(), rel=0.35)
    assert torch.equal(first.bias, layer.bias)


def test_an_embedding_looks_up_or_rebuilds_by_the_number_of_tokens():
    torch.manual_seed(0)
    layer = nn.Embedding(101, 24, padding_idx=3)
    new = planned(layer, "tensor_train", rank=4).train()
    for count in (3, 5000):
        tokens = torch.randint(101, (count,))
        tokens[0] = 3
        torch.testing.assert_close(new(tokens), new.dense_weight()[tokens], rtol=1e-4, atol=1e-5)
        assert not new(tokens)[0].any()
    few, many = (new.shape.look_up.cost(count) < new.shape.routes[0].fixed for count in (3, 5000))
    assert few
    assert not many


@pytest.mark.parametrize("token", [-1, 101, 107, 10**6])
def test_an_index_out_of_range_is_an_error_as_in_the_table_itself(token):
    new = planned(nn.Embedding(101, 24), "tensor_train", rank=4).train()
    assert new.shape.out_size > 107
    with pytest.raises(IndexError, match="out of range"):
        new(torch.tensor([token]))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(40, 8, max_norm=1.0), "max_norm"),
        (nn.Embedding(40, 8, sparse=True), "its gradients are sparse"),
        (nn.Embedding(40, 8, scale_grad_by_freq=True), "per row"),
        (nn.Embedding.from_pretrained(torch.ones(40, 8), padding_idx=3), "not zero"),
        (nn.Conv2d(8, 8, 1), "single point"),
        (nn.Conv2d(8, 8, 3, groups=8), "each group of its channels has a single"),
    ],
)
def test_what_a_train_cannot_hold_is_left_alone_with_the_reason(layer, reason):
    assert reason in planned(layer, "tensor_train", rank=2)


# -- what is kept in eval


@pytest.fixture
def kept():
    """A train whose rebuilt weight is kept, and inputs of so many rows that it is used."""
    new = planned(nn.Linear(64, 64), "tensor_train", rank=2).eval()
    x = torch.randn(4096, 64)
    with torch.no_grad():
        new(x)
    assert new._kept is not None
    return new, x


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load", "half", "train"])
def test_a_changed_core_is_seen(kept, change):
    new, x = kept
    before = new(x)
    if change == "in place":
        new.parts[0].weight.mul_(2)
    elif change == "load":
        new.load_state_dict({key: value * 2 if "parts.0" in key else value for key, value in new.state_dict().items()})
    elif change == "half":
        new.bfloat16()
        assert new(x.bfloat16()).dtype == torch.bfloat16
        return
    else:
        new.train().parts[0].weight.data.mul_(2)
        new.eval()
    torch.testing.assert_close(new(x) - new.bias, 2 * (before - new.bias), rtol=1e-4, atol=1e-5)


def test_the_kept_weight_is_in_no_copy_and_no_checkpoint(kept):
    new, _ = kept
    assert copy.deepcopy(new)._kept is None
    assert pickle.loads(pickle.dumps(new))._kept is None
    stored = io.BytesIO()
    torch.save(new.state_dict(), stored)
    assert set(new.state_dict()) == {"bias", "_extra_state", *(f"parts.{k}.weight" for k in range(3))}
    assert not list(new.buffers())


def test_nothing_is_kept_where_gradients_are_asked_for():
    new = planned(nn.Linear(64, 64), "tensor_train", rank=2).eval()
    new(torch.randn(4096, 64)).sum().backward()
    assert new._kept is None
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_a_weight_kept_in_inference_mode_serves_later():
    new = planned(nn.Linear(64, 64), "tensor_train", rank=2).eval()
    x = torch.randn(4096, 64)
    with torch.inference_mode():
        expected = new(x).clone()
    with torch.no_grad():
        torch.testing.assert_close(new(x), expected)
    new(x).sum().backward()


# -- later methods


@pytest.mark.parametrize("later", ["ptq", "qat"])
@pytest.mark.parametrize("method", METHODS)
def test_quantization_takes_the_parts(case, method, later):
    small = planned(case.layer, method, rank=2)
    if isinstance(small, str) or (later == "qat" and "Transpose" in type(case.layer).__name__):
        return
    model = nn.Sequential(small)
    quantization = PTQCompression if later == "ptq" else QATCompression
    quantized = compress_model(model, quantization(bits=8, min_saving=0.0), train_loader=[case.inputs])
    parts = [name for name in compressed_layers(quantized) if "parts" in name]
    assert len(parts) == len(small.parts)
    final = finalize(quantized)
    with torch.no_grad():
        expected = small(case.inputs)
        assert (final(case.inputs) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
def test_pruning_takes_the_parts(method):
    layer, inputs = (nn.Linear(24, 24), (4, 24)) if method != "tucker" else (nn.Conv2d(8, 8, 3), (4, 8, 5, 5))
    model = nn.Sequential(planned(layer, method, rank=4))
    pruned = compress_model(model, PruningCompression(sparsity=0.5, include=["*"]))
    zeros = sum((part.weight == 0).sum().item() for part in pruned[0].parts)
    assert zeros == pytest.approx(0.5 * sum(part.weight.numel() for part in pruned[0].parts), abs=2)
    x = torch.randn(inputs)
    torch.testing.assert_close(pruned(x), with_weight(layer, weight_of(pruned[0]))(x), rtol=1e-4, atol=1e-5)


def test_parts_are_called_where_a_hook_watches_them():
    new = planned(nn.Linear(64, 64), "tensor_train", rank=2)
    seen = []
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in new.parts]
    x = torch.randn(3, 64)
    watched = new(x)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    torch.testing.assert_close(watched, new(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("method", ["tensor_train", "cp"])
def test_it_compiles_without_a_break(method):
    new = planned(nn.Linear(60, 64), method, rank=3)
    compiled = torch.compile(new, fullgraph=True, backend="eager")
    for rows in (2, 300):
        x = torch.randn(rows, 60)
        torch.testing.assert_close(compiled(x), new(x), rtol=1e-4, atol=1e-5)


# -- options


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tensor_train", {"rank": 0}, "rank is a count, at least 1, got 0"),
        ("tucker", {"rank": 0}, "rank is a count, at least 1, got 0"),
        ("cp", {"rank": -3}, "rank is a count, at least 1, got -3"),
        ("tensor_train", {"rank": 2, "max_error": 0.1}, "takes one of rank, param_ratio, max_error"),
        ("tucker", {"rank": 2, "param_ratio": 0.1}, "takes one of rank, param_ratio"),
        ("cp", {"rank": 2, "param_ratio": 0.1}, "takes one of rank, param_ratio"),
        ("tensor_train", {"param_ratio": 1.5}, "share that is kept"),
        ("tucker", {"param_ratio": 0.0}, "share that is kept"),
        ("cp", {"param_ratio": -0.1}, "share that is kept"),
        ("tensor_train", {"max_error": 1.0}, "relative error, in"),
        ("tensor_train", {"max_error": 0.1, "init": "random"}, "init='random' drops it"),
        ("tensor_train", {"num_cores": 1}, "num_cores is a count, at least 2"),
        ("tensor_train", {"init": "zeros"}, "has no init 'zeros'"),
    ],
)
def test_bad_options_are_explained(method, options, message):
    with pytest.raises(OptionError, match=message):
        METHODS[method](**options)


def test_defaults():
    spec = TensorTrainCompression(min_saving=0.0).plan(nn.Sequential(nn.Linear(256, 256))).layers[0].spec
    assert max(spec["ranks"]) == 8
    assert CPCompression().plan(nn.Sequential(nn.Linear(256, 256))).layers[0].spec["rank"] == 64
    kept = TuckerCompression().plan(nn.Sequential(nn.Conv2d(32, 32, 3))).layers[0].spec["ranks"]
    assert kept[0] * 32 + kept[0] * kept[1] * 9 + kept[1] * 32 <= 0.5 * 32 * 32 * 9


def test_a_linear_gets_no_more_terms_than_pay():
    spec = CPCompression(param_ratio=1.0, min_saving=0.0).plan(nn.Sequential(nn.Linear(64, 64))).layers[0].spec
    assert spec["rank"] * 128 <= 64 * 64  # multiply-accumulates, for a share of 100 %
    assert spec["rank"] * (sum(spec["row_modes"]) + sum(spec["column_modes"])) > 0.98 * 64 * 64


@pytest.mark.parametrize("method", METHODS)
def test_the_family_makes_its_members(method):
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    small = compress_model(model, "tensor_network", method=method, rank=1)
    assert compressed_layers(small)["0"].spec["by"] == method

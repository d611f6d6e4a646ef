"""LoRA on each type of layer: a no-op at the start, the weight that it stands for, and what trains."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import (
    LoRACompression,
    compress_model,
    compression_report,
    finalize,
    merge_lora,
    unmerge_lora,
)
from pquant_lightning.core.affine import fake_quantize_weight
from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.errors import ModelError, OptionError
from pquant_lightning.core.layer_adapter import build_layer
from pquant_lightning.core.optimizer import separate_groups
from pquant_lightning.methods.low_rank import _lora_init
from pquant_lightning.methods.low_rank._lora_layers import LoRALayer
from pquant_lightning.methods.low_rank.lora import adapters
from tests.models import MLP, ConvNet, Transformer, built
from tests.unit.conftest import Case

INITS = ("default", "pissa", "olora")


def adapted(layer: nn.Module, **options: Any) -> Any:
    return compress_model(nn.Sequential(layer), "lora", **{"r": 2, **options}).eval()


def disturb(model: nn.Module, size: float = 0.3) -> Any:
    """Moves every adapter."""
    with torch.no_grad():
        for layer in adapters(model).values():
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.add_(size * torch.randn_like(parameter))
                if name == "lora_magnitude":
                    parameter.abs_()
    return model


# -- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_the_start_is_the_model_bit_for_bit(quantizable: Case, init: str, use_dora: bool) -> None:
    model = adapted(quantizable.layer, init=init, use_dora=use_dora)
    assert isinstance(model[0], LoRALayer)
    assert torch.equal(model(quantizable.inputs), quantizable.layer(quantizable.inputs))
    assert torch.equal(model.train()(quantizable.inputs), quantizable.layer(quantizable.inputs))


@pytest.mark.parametrize("use_dora", [False, True])
def test_loftq_starts_as_the_model_up_to_rounding(quantizable: Case, use_dora: bool) -> None:
    model = adapted(quantizable.layer, init="loftq", loftq_bits=3, use_dora=use_dora)
    torch.testing.assert_close(model(quantizable.inputs), quantizable.layer(quantizable.inputs), atol=1e-5, rtol=1e-5)
    assert not torch.equal(model[0].base.weight, quantizable.layer.weight)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "olora", "use_dora": True}])
def test_it_computes_with_the_weight_that_it_says(quantizable: Case, options: dict[str, Any]) -> None:
    model = disturb(adapted(quantizable.layer, **options))
    ordinary: Any = build_layer(model[0].spec["layer"])
    ordinary.load_state_dict({**quantizable.layer.state_dict(), "weight": model[0].dense_weight().detach()})

    found, expected = model(quantizable.inputs), ordinary(quantizable.inputs)

    start = quantizable.layer(quantizable.inputs)
    assert (found - start).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}])
def test_finalize_and_merge_give_the_same_output(quantizable: Case, options: dict[str, Any]) -> None:
    model = disturb(adapted(quantizable.layer, **options))
    expected = model(quantizable.inputs)

    final = finalize(model)
    merged = merge_lora(copy.deepcopy(model))

    assert type(final[0]) is type(quantizable.layer)
    tolerance = {"atol": 1e-6 * float(expected.detach().abs().max()), "rtol": 1e-5}
    torch.testing.assert_close(final(quantizable.inputs), expected, **tolerance)
    torch.testing.assert_close(merged(quantizable.inputs), expected, **tolerance)
    assert torch.equal(unmerge_lora(merged)(quantizable.inputs), expected)


def test_the_product_of_a_linear_is_the_formula() -> None:
    layer = nn.Linear(6, 5)
    model = disturb(adapted(layer, r=2, alpha=3))
    a, b = model[0].lora_A, model[0].lora_B
    torch.testing.assert_close(model[0].dense_weight(), layer.weight + 1.5 * b @ a)


def test_rank_stabilised_scaling() -> None:
    plain, stabilised = adapted(nn.Linear(8, 8), r=4, alpha=8), adapted(nn.Linear(8, 8), r=4, alpha=8, use_rslora=True)
    assert (plain[0].scaling, stabilised[0].scaling) == (2.0, 4.0)


def test_dora_gives_each_channel_its_magnitude(quantizable: Case) -> None:
    model = disturb(adapted(quantizable.layer, use_dora=True))
    layer = model[0]
    weight = layer.dense_weight().movedim(layer.outputs, 0).flatten(1)
    torch.testing.assert_close(weight.norm(dim=1), layer.lora_magnitude)


def test_dora_on_a_channel_of_zeros() -> None:
    layer, x = nn.Linear(8, 6), torch.randn(50, 8)
    with torch.no_grad():
        layer.weight[2] = 0.0
    model = adapted(layer, use_dora=True)
    assert torch.equal(model(x), layer(x))
    torch.testing.assert_close(finalize(model)(x), layer(x))


def test_a_merged_encoder_may_take_its_fast_path_again() -> None:
    final = finalize(compress_model(Transformer(), "lora", r=2, exclude=["*.self_attn"]))
    assert not any(module._forward_pre_hooks for module in final.modules())


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_acts_on_the_adapter_alone_and_in_training_alone(use_dora: bool) -> None:
    x = torch.randn(50, 8)
    model = adapted(nn.Linear(8, 6), dropout=0.5, use_dora=use_dora)
    assert torch.equal(model.train()(x), model.eval()(x))  # B is zero
    disturb(model)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_a_hooked_base_is_called() -> None:
    model = disturb(adapted(nn.Linear(8, 6)))
    x, seen = torch.randn(50, 8), []
    expected = model(x)
    model[0].base.register_forward_hook(lambda *args: seen.append(args[1][0]))
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(seen[0], x)


def test_a_model_compiles_with_adapters() -> None:
    model, x = disturb(adapted(nn.Linear(8, 6), use_dora=True)), torch.randn(50, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


# -- starts ----------------------------------------------------------------------------------------------------------


def test_pissa_starts_with_the_best_approximation() -> None:
    layer = nn.Linear(30, 20)
    model = adapted(layer, r=3, alpha=6, init="pissa")
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    product = model[0].scaling * model[0].lora_B @ model[0].lora_A
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ vh[:3], atol=1e-5, rtol=1e-4)


def test_olora_starts_with_an_orthonormal_b() -> None:
    layer = nn.Linear(30, 20)
    model = adapted(layer, r=3, init="olora")
    b, a = model[0].lora_B, model[0].lora_A
    torch.testing.assert_close(b.T @ b, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(b @ a, b @ b.T @ layer.weight, atol=1e-5, rtol=1e-4)  # a projection of the weight


def test_loftq_brings_the_rounded_model_nearer() -> None:
    layer = nn.Linear(64, 48)
    weight = layer.weight.detach().clone()
    plain = (fake_quantize_weight(weight, 3) - weight).norm()
    errors = []
    for turns in (1, 5):
        new = adapted(copy.deepcopy(layer), r=8, init="loftq", loftq_bits=3, loftq_iter=turns)[0]
        rounded = _lora_init.rounded(new.base.weight.detach(), 3)
        errors.append((rounded + new.scaling * new.lora_B @ new.lora_A - weight).norm())
    assert errors[1] < errors[0] < 0.9 * plain


def test_loftq_bits_are_those_of_the_rounding() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    sizes = []
    for bits in (2, 4, 8):
        new = adapted(copy.deepcopy(layer), r=8, init="loftq", loftq_bits=bits)[0]
        sizes.append(float((new.base.weight - layer.weight).detach().norm()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 10 * sizes[2] > 0


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_patterns_choose_rank_and_alpha_and_the_last_one_counts() -> None:
    options = {"rank_pattern": {"fc*": 4, "fc2": 6}, "alpha_pattern": {"head": 2.0}}
    layers = adapters(compress_model(MLP(), "lora", r=3, **options))
    assert {name: (layer.spec["r"], layer.spec["alpha"]) for name, layer in layers.items()} == {
        "fc1": (4, 8),
        "fc2": (6, 8),
        "head": (3, 2.0),
    }
    assert layers["fc2"].lora_A.shape == (6, 32)


def test_a_small_layer_gets_its_full_rank() -> None:
    layers = adapters(compress_model(MLP(), "lora", r=8))
    assert {name: layer.spec["r"] for name, layer in layers.items()} == {"fc1": 8, "fc2": 8, "head": 4}


def test_groups_share_the_rank() -> None:
    layer = adapters(compress_model(ConvNet(), "lora", r=4))["conv2"]  # 8 -> 16 channels, 2 groups
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 4, 3, 3), (16, 2, 1, 1))


# -- what trains -----------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


FACTORS = {f"{name}.lora_{x}" for name in ("conv1", "conv2", "head") for x in "AB"}


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({}, set()),
        ({"bias": "lora_only"}, {"conv2.base.bias", "head.base.bias"}),
        ({"bias": "all"}, {"conv2.base.bias", "head.base.bias", "bn1.bias", "bn2.bias"}),
        ({"use_dora": True}, {f"{name}.lora_magnitude" for name in ("conv1", "conv2", "head")}),
        ({"modules_to_save": ["bn1"]}, {"bn1.weight", "bn1.bias"}),
    ],
)
def test_everything_else_is_frozen(options: dict[str, Any], others: set[str]) -> None:
    assert trained(compress_model(ConvNet(), "lora", r=2, **options)) == FACTORS | others


def test_a_module_to_save_has_no_adapter() -> None:
    model = compress_model(ConvNet(), "lora", r=2, modules_to_save=["head"])
    assert set(adapters(model)) == {"conv1", "conv2"}
    assert {"head.weight", "head.bias"} <= trained(model)


def test_attach_again_freezes_again() -> None:
    model = compress_model(ConvNet(), "lora", r=2, bias="lora_only")
    before = trained(model)
    model.requires_grad_(True)
    LoRACompression(bias="none").attach(model, {})  # the layers' own options count
    assert trained(model) == before


def test_learned_scales_of_a_quantizer_train_on() -> None:
    model = compress_model(MLP(), "lora", r=2)
    model.requires_grad_(True)
    compress_model(model, "qat", bits=4, num_samples=0, inplace=True)
    LoRACompression().attach(model, {})
    assert {name.rpartition(".")[2] for name in trained(model)} == {
        *("lora_A", "lora_B", "weight_scale", "act_scale", "act_zero")
    }


def test_lr_ratio_gives_b_its_own_learning_rate() -> None:
    model = compress_model(MLP(), "lora", r=2, lr_ratio=16.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    separate_groups(model, optimizer, [])
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for layer in adapters(model).values():
        assert (rates[id(layer.lora_A)], rates[id(layer.lora_B)]) == (1e-3, pytest.approx(16e-3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


# -- on integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"init": "olora", "use_dora": True}])
def test_an_adapter_on_integers(quantizable: Case, bits: int, options: dict[str, Any]) -> None:
    scheme = {"bits": bits, "scheme": "weight_only", "min_saving": 0.0}
    base = compress_model(nn.Sequential(quantizable.layer), "ptq", **scheme)
    model = compress_model(base, "lora", r=2, **options).eval()

    assert model[0].base.kind == base[0].kind
    torch.testing.assert_close(model(quantizable.inputs), base(quantizable.inputs), atol=0, rtol=0)

    disturb(model)
    x = quantizable.inputs.requires_grad_() if quantizable.inputs.is_floating_point() else quantizable.inputs
    output = model(x)
    output.sum().backward()
    assert model[0].lora_A.grad.abs().sum() > 0
    assert x.grad is None or x.grad.abs().sum() > 0
    bias = getattr(base[0], "bias", None)  # post-training quantization may have given it one
    structure = model[0].spec["layer"]
    dense: Any = build_layer(structure, **({} if "bias" not in structure else {"bias": bias is not None}))
    dense.load_state_dict({"weight": weight_of(model[0]).detach()} | ({} if bias is None else {"bias": bias}))
    torch.testing.assert_close(output, dense(quantizable.inputs), atol=1e-3, rtol=1e-3)
    final = finalize(model)
    assert final[0].base.kind == base[0].kind
    assert torch.equal(final(quantizable.inputs.detach()), model(quantizable.inputs.detach()))


def test_only_adapters_train_on_integers() -> None:
    base = compress_model(MLP(), "ptq", bits=4, scheme="weight_only", min_saving=0.0)
    model = compress_model(base, "lora", r=2)
    assert trained(model) == {f"{name}.lora_{x}" for name in ("fc1", "fc2", "head") for x in "AB"}


def test_the_report_counts_the_products_of_adapters_that_stay() -> None:
    base = compress_model(MLP(), "ptq", bits=8, scheme="weight_only", min_saving=0.0)
    on_floats, on_integers = compress_model(MLP(), "lora", r=2), compress_model(base, "lora", r=2)
    x = torch.zeros(1, 16)
    before = 16 * 32 + 32 * 24 + 24 * 4
    adapters_only = 2 * (16 + 32 + 32 + 24 + 24 + 4)
    assert compression_report(MLP(), on_floats, x).macs == (before, before)
    assert compression_report(MLP(), on_integers, x).macs == (before, before + adapters_only)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is a count, at least 1, got 0"),
        ({"r": None}, "takes int for r, got None"),
        ({"alpha": 0}, "alpha is a positive number, got 0"),
        ({"alpha": float("nan")}, "finite number for alpha, got nan"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got 1.0"),
        ({"init": "eva"}, "no init 'eva'"),
        ({"bias": "some"}, "no bias 'some'"),
        ({"rank_pattern": {"fc1": 0}}, r"rank_pattern\['fc1'\] is a count, at least 1"),
        ({"alpha_pattern": {"fc1": -1.0}}, r"alpha_pattern\['fc1'\] is a positive number"),
        ({"lr_ratio": 0.0}, "lr_ratio is a positive number"),
        ({"loftq_bits": 9}, "loftq_bits is a count, between 2 and 8"),
        ({"loftq_iter": 0}, "loftq_iter is a count"),
        ({"init": "loftq", "adapter_only": True}, "changes the weights below the adapters"),
        ({"lora_alpha": 8}, "has no option 'lora_alpha'. Did you mean 'alpha'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoRACompression(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 25}, "r=25 is above the full rank of every layer; the largest is 24, of 'fc2'"),
        ({"rank_pattern": {"head": 5}}, "gives layer 'head' the rank 5, above its full rank 4"),
        (
            {"alpha_pattern": {"fc1": 4.0}, "exclude": ["fc1"]},
            "alpha_pattern names 'fc1', where no layer gets an adapter",
        ),
        ({"rank_pattern": {"fc9": 4}}, "rank_pattern pattern 'fc9' matches no layer. Did you mean"),
        ({"include": ["fd*"]}, r"include pattern 'fd\*' matches no layer"),
        ({"modules_to_save": ["hed"]}, "modules_to_save pattern 'hed' matches no layer. Did you mean 'head'"),
        ({"min_saving": 0.1}, "changes no layer"),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], message: str) -> None:
    model = built(MLP)
    with pytest.raises(ValueError, match=message):
        compress_model(model, "lora", inplace=True, **options)
    assert not adapters(model)


def test_groups_that_do_not_divide_the_rank_are_left_alone() -> None:
    plan = LoRACompression(r=3).plan(ConvNet())
    assert {skip.name: skip.reason for skip in plan.skipped}["conv2"].startswith(
        "the rank 3 does not divide into its 2"
    )
    assert "conv1" in [layer.name for layer in plan.layers]


def test_groups_that_do_not_divide_a_rank_given_by_name() -> None:
    with pytest.raises(OptionError, match=r"layer 'conv2' the rank 3, which does not divide into its 2 groups"):
        compress_model(ConvNet(), "lora", rank_pattern={"conv2": 3})


def test_loftq_needs_float_weights() -> None:
    base = compress_model(MLP(), "ptq", bits=4, scheme="weight_only", min_saving=0.0)
    with pytest.raises(ModelError, match="needs float weights, and layer 'fc1' holds integers"):
        compress_model(base, "lora", r=2, init="loftq")


def test_a_fake_quantized_layer_is_left_alone() -> None:
    model = compress_model(MLP(), "qat", num_samples=0)
    with pytest.raises(ModelError, match="changes no layer.*\n.*already compressed"):
        compress_model(model, "lora", r=2)


def test_merging_into_integers() -> None:
    base = compress_model(MLP(), "ptq", bits=8, scheme="weight_only", min_saving=0.0)
    model = compress_model(base, "lora", r=2)
    with pytest.raises(ModelError, match="layer 'fc1' stands on 8-bit weights, and merging it would round it"):
        merge_lora(model)


def test_merging_nan() -> None:
    model = compress_model(MLP(), "lora", r=2).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        model.fc2.lora_B[0, 0] = torch.nan
    expected = model.fc1(x)
    with pytest.raises(ModelError, match="layer 'fc2' gives weights that are NaN"):
        merge_lora(model)
    assert model.fc1.merged_weight is None
    assert torch.equal(model.fc1(x), expected)


def test_nothing_to_merge() -> None:
    for function in (merge_lora, unmerge_lora):
        with pytest.raises(ModelError, match="No layer of MLP has an adapter"):
            function(MLP())


def test_training_and_loading_go_back_to_the_adapters() -> None:
    model, x = compress_model(MLP(), "lora", r=2), torch.randn(4, 16)
    state = disturb(copy.deepcopy(model)).state_dict()
    merge_lora(model).train()
    assert model.fc1.merged_weight is None
    merge_lora(model).load_state_dict(state)
    assert torch.equal(model(x), unmerge_lora(model)(x))


def test_merged_weights_move_with_the_model() -> None:
    model, x = disturb(compress_model(MLP(), "lora", r=2)), torch.randn(4, 16, dtype=torch.float64)
    expected = copy.deepcopy(model).double().eval()(x)
    torch.testing.assert_close(merge_lora(model).double()(x), expected, atol=1e-5, rtol=1e-5)

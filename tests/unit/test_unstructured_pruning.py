"""Which weights are pruned, by each option, in numbers; without a Trainer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import (
    CompressionPlan,
    PruningCompression,
    UnstructuredPruning,
    compress_model,
    compression_report,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError, PQuantError
from pquant_lightning.core.moments import input_rows
from pquant_lightning.core.serialization import read_artifact
from pquant_lightning.methods.pruning import _second_order
from pquant_lightning.methods.pruning._second_order import sparse_gpt, squared_input_norms
from tests.models import MLP, ConvNet, TiedTransformer, Transformer, built


def net(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))


def pruned(model: nn.Module, loader: Any = None, **options: Any) -> Any:
    return compress_model(model, "unstructured_pruning", train_loader=loader, **options)


def zeros(layer: Any) -> int:
    return int((layer.weight == 0).sum())


# -- targets -----------------------------------------------------------------------------------------------------------


def test_the_smallest_of_all_prunable_weights_are_zero() -> None:
    model = net()
    model[1].weight.data.mul_(2)
    small = pruned(model, sparsity=0.7)
    assert [zeros(small[0]), zeros(small[3])] == [0, 0]  # the first and the last
    both = torch.cat([model[i].weight.flatten() for i in (1, 2)]).abs()
    dropped = torch.cat([small[i].weight.flatten() == 0 for i in (1, 2)])
    assert int(dropped.sum()) == round(0.7 * 2048)
    assert both[dropped].max() < both[~dropped].min()
    assert zeros(small[1]) < zeros(small[2])
    for old, new in zip(model, small, strict=True):
        assert torch.equal(new.bias, old.bias)
        assert torch.equal(new.weight[new.weight != 0], old.weight[new.weight != 0])


def test_scope_layer_and_include_and_exclude() -> None:
    model = net()
    model[1].weight.data.mul_(2)
    assert [zeros(layer) for layer in pruned(model, sparsity=0.5, scope="layer")] == [0, 512, 512, 0]
    assert [zeros(layer) for layer in pruned(model, sparsity=0.5, scope="layer", include=["*"])] == [512] * 4
    assert [zeros(layer) for layer in pruned(model, sparsity=0.5, scope="layer", exclude=["1"])] == [0, 0, 512, 0]


def test_the_default_is_half() -> None:
    assert sum(map(zeros, pruned(net()))) == 1024
    assert PruningCompression({"sparsity": 0.75, "method": "unstructured"}) == UnstructuredPruning(sparsity=0.75)


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("3:4", 0.25)])
def test_patterns(pattern: str, share: float) -> None:
    kept, of = map(int, pattern.split(":"))
    model = net()
    small = pruned(model, pattern=pattern, min_saving=0.0)
    groups, old = small[1].weight.reshape(-1, of), model[1].weight.reshape(-1, of).abs()
    assert ((groups != 0).sum(1) == kept).all()
    assert zeros(small[1]) == share * 1024
    assert torch.equal(old.topk(kept).values.sum(1), groups.abs().topk(kept).values.sum(1))


def test_patterns_of_convolutions_go_along_the_input_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1))
    small = pruned(model, pattern="2:4")
    groups = small[1].weight.unflatten(1, (2, 4))
    assert ((groups != 0).sum(2) == 2).all()
    assert zeros(small[2]) == 0  # six inputs
    plan = UnstructuredPruning(pattern="2:4").plan(model)
    assert "its 6 inputs are no multiple of the pattern 2:4" in str(plan)


@pytest.mark.parametrize("block", [(4, 1), (1, 8), (4, 4)])
def test_blocks_stay_or_go_whole(block: tuple[int, int]) -> None:
    model = net()
    small = pruned(model, sparsity=0.75, block_size=block, scope="layer")
    tiles = small[1].weight.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    count = (tiles != 0).sum((1, 3))
    assert set(count.unique().tolist()) == {0, block[0] * block[1]}
    assert zeros(small[1]) == 768
    means = model[1].weight.abs().unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).mean((1, 3))
    assert means[count == 0].max() <= means[count > 0].min()


def test_overrides() -> None:
    small = pruned(net(), sparsity=0.5, overrides={"1": {"sparsity": 0.9}, "2": {"pattern": "1:4"}}, min_saving=0.0)
    assert [zeros(layer) for layer in small] == [0, round(0.9 * 1024), 768, 0]


def test_no_layer_is_emptied() -> None:
    model = net()
    model[1].weight.data.mul_(1e-3)  # all of it below the global threshold
    small = pruned(model, sparsity=0.9)
    assert zeros(small[1]) == int((1 - 0.1 * 0.1) * 1024)
    assert zeros(small[1]) + zeros(small[2]) == round(0.9 * 2048)


def test_random_is_reproducible_and_has_a_seed() -> None:
    first, again, other = (pruned(net(), criterion="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight == 0, other[1].weight == 0)
    assert not torch.equal(first[1].weight == 0, first[2].weight == 0)
    assert zeros(first[1]) + zeros(first[2]) == 1024


def test_attention_and_recurrent_weights_are_pruned_embeddings_are_not() -> None:
    model = Transformer()
    small = pruned(model, sparsity=0.5, scope="layer")
    assert zeros(small.embed) == 0
    attention = small.encoder.layers[0].self_attn
    assert int((attention.in_proj_weight == 0).sum()) == attention.in_proj_weight.numel() // 2
    assert zeros(attention.out_proj) == 128
    assert (small.encoder.layers[0].norm1.weight != 0).all()
    recurrent = pruned(nn.Sequential(nn.LSTM(8, 16)), sparsity=0.5)
    assert int((recurrent[0].weight_hh_l0 == 0).sum() + (recurrent[0].weight_ih_l0 == 0).sum()) == 64 * 24 // 2
    assert zeros(pruned(model, include=["embed"]).embed) == 256


def test_a_shared_weight_is_pruned_once_and_stays_shared() -> None:
    small = pruned(built(TiedTransformer), sparsity=0.5, scope="layer", include=["embed", "head"])
    assert small.head.weight is small.embed.weight
    assert zeros(small.head) == 256


# -- criteria from data ------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(6, 5), (7, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (7, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=1, dilation=(1, 2)), (7, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (7, 4, 9, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_input_rows_are_what_the_weight_is_multiplied_with(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    out = input_rows(layer, x)[0] @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    expected = layer(x).detach()
    torch.testing.assert_close(
        out, expected.movedim(1, -1).flatten(0, -2) if name != "linear" else out, atol=1e-5, rtol=1e-4
    )
    if name == "linear":
        torch.testing.assert_close(out, expected.flatten(0, -2))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_norms_are_those_of_the_input_rows(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    samples = Samples.take([x], shape[0])
    norms = squared_input_norms(nn.Sequential(layer), ["0"], samples)["0"]
    expected = input_rows(layer, x)[0].square().sum(0)
    torch.testing.assert_close(norms.flatten(), expected.flatten())


def test_norms_of_groups_differ_by_output() -> None:
    layer = nn.Conv2d(4, 6, 1, groups=2)
    x = torch.randn(3, 4, 5, 5)
    norms = squared_input_norms(nn.Sequential(layer), ["0"], Samples.take([x], 3))["0"]
    channels = x.square().sum((0, 2, 3))
    torch.testing.assert_close(norms.flatten(1), channels.reshape(2, 2).repeat_interleave(3, 0))


def test_wanda_ranks_within_each_output_by_weight_times_norm() -> None:
    model, x = net(), torch.randn(64, 32) * torch.logspace(-1, 1, 32)
    small = pruned(model, [x], sparsity=0.5, criterion="wanda", include=["0"])
    score = model[0].weight.abs() * x.square().sum(0).sqrt()
    assert ((small[0].weight == 0).sum(1) == 16).all()
    for row, kept in zip(score, small[0].weight != 0, strict=True):
        assert row[~kept].max() <= row[kept].min()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_loses_less_than_magnitude(pattern: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 192) * torch.logspace(0, -2, 192) @ torch.randn(192, 192)  # correlated inputs
    weight = torch.randn(64, 192)
    new = sparse_gpt(weight[None], (x.T @ x)[None], 0.5, pattern)[0]
    if pattern is None:
        assert int((new == 0).sum()) == 64 * 192 // 2
        threshold = weight.abs().flatten().kthvalue(64 * 96).values
        simple = weight * (weight.abs() > threshold)
    else:
        assert ((new.reshape(-1, 4) != 0).sum(1) == 2).all()
        keep = weight.abs().reshape(-1, 4).topk(2).indices
        simple = weight * torch.zeros(64 * 48, 4).scatter_(1, keep, 1.0).reshape(64, 192)

    def error(other: Tensor) -> float:
        return float((x @ (weight - other).T).norm() / (x @ weight.T).norm())

    assert 0 < error(new) < 0.7 * error(simple)


def test_sparsegpt_in_a_model_and_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mix = torch.randn(32, 32)
    model, x = net(), torch.randn(300, 32) @ mix
    one = pruned(model, [x], sparsity=0.5, criterion="sparsegpt", include=["*"])
    monkeypatch.setattr(_second_order, "_MAX_BYTES", 1)
    several = pruned(model, [x], sparsity=0.5, criterion="sparsegpt", include=["*"])
    simple = pruned(model, sparsity=0.5, scope="layer", include=["*"])
    assert [zeros(layer) for layer in one] == [zeros(layer) for layer in several] == [512] * 4
    assert torch.equal(one[0].weight, several[0].weight)
    assert not torch.equal(one[3].weight, several[3].weight)  # later layers have seen the pruned ones' outputs

    def error(other: nn.Module) -> float:
        return ((other(x) - model(x)).norm() / model(x).norm()).item()

    assert error(several) < error(simple)
    assert error(one) < error(simple)


def test_layers_that_calibration_never_reached_stay_dense(package_log: pytest.LogCaptureFixture) -> None:
    class Half(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(16, 16)

    for criterion in ("wanda", "sparsegpt"):
        small = pruned(Half(), MLP.loader(), criterion=criterion, include=["fc1", "unused"])
        assert zeros(small.unused) == 0
        assert zeros(small.fc1) == 256
        assert "Calibration never reached layer 'unused'" in package_log.text


# -- files and reports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_holds_a_bitmap_and_the_values(dtype: torch.dtype, tmp_path: Any) -> None:
    model = net(64).to(dtype)
    small = pruned(model, sparsity=0.9, include=["*"])
    path = save_compressed(small, tmp_path / "small.safetensors")
    dense = save_compressed(model, tmp_path / "dense.safetensors")
    size, kept = model[0].weight.element_size(), sum(4096 - zeros(layer) for layer in small)
    expected = kept * size + 4 * 4096 // 8 + 4 * 64 * size
    assert expected < path.stat().st_size < expected + 2000
    assert path.stat().st_size < 0.35 * dense.stat().st_size
    loaded = load_compressed(net(64), path)
    for old, new in zip(small, loaded, strict=True):
        assert torch.equal(new.weight, old.weight)
        assert new.weight.dtype == dtype
    report = compression_report(model, small)
    assert report.size_bytes == (4 * (4096 + 64) * size, expected)
    assert [row.method for row in report.layers] == [f"{zeros(layer) / 4096:.1%} zeros" for layer in small]
    expected_error = (small[0].weight - model[0].weight).float().norm() / model[0].weight.float().norm()
    assert report.layers[0].error == pytest.approx(expected_error.item(), rel=0.02)


def test_few_zeros_are_stored_densely(tmp_path: Any) -> None:
    small = pruned(net(64), sparsity=0.1, min_saving=0.0)
    path = save_compressed(small, tmp_path / "small.safetensors")
    assert set(read_artifact(path)[0]) == set(small.state_dict())
    assert b"bitmap" not in path.read_bytes()


def test_a_damaged_bitmap_is_refused(tmp_path: Any) -> None:
    path = save_compressed(pruned(net(64), sparsity=0.9, include=["*"]), tmp_path / "small.safetensors")
    path.write_bytes(path.read_bytes().replace(b"[64, 64]", b"[64, 99]"))
    with pytest.raises(PQuantError, match="truncated or no safetensors file"):
        read_artifact(path)


def test_pruning_does_not_touch_the_given_model() -> None:
    model = net()
    before = [layer.weight.clone() for layer in model]
    pruned(model)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))


def test_the_plan_is_data_and_says_why() -> None:
    model = nn.Sequential(nn.Embedding(8, 32), *net(), nn.Bilinear(4, 4, 4))
    plan = UnstructuredPruning(sparsity=0.75).plan(model)
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert [entry.name for entry in plan.layers] == ["2", "3"]
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    assert reasons["0"] == "an embedding: name it in include to prune it"
    assert reasons["1"] == reasons["4"] == "the first or the last layer: name it in include to prune it"
    assert "no adapter for the type torch.nn.modules.linear.Bilinear" in reasons["5"]
    context = CompressionContext(by="test")
    UnstructuredPruning(sparsity=0.75).apply(model, plan.without("2"), context)
    assert set(context.state["targets"]) == {"3.weight"}


def test_a_deployed_model_runs_as_plain_torch() -> None:
    small, x = pruned(net(), sparsity=0.9), torch.randn(3, 32)
    assert all(type(layer) is nn.Linear for layer in small)
    expected = x
    for layer in small:
        expected = F.linear(expected, layer.weight, layer.bias)
    assert torch.equal(small(x), expected)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "pattern": "2:4"}, "takes one of sparsity, pattern; got sparsity=0.5, pattern='2:4'"),
        ({"sparsity": 1.0}, r"the share of weights that is removed, in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"pattern": "4:4"}, '"N:M" with 0 < N < M'),
        ({"pattern": "half"}, "got 'half'"),
        ({"pattern": "2:4", "block_size": (2, 2)}, "block_size goes with sparsity"),
        ({"block_size": (0, 2)}, "block_size is"),
        ({"block_size": (1, 2, 3)}, "block_size"),
        ({"criterion": "magnitud"}, "Did you mean 'magnitude'"),
        ({"start": 0.8}, "0 <= start <= end <= 1, got 0.8, 0.7"),
        ({"end": 1.5}, "got 0.0, 1.5"),
        ({"interval": 0}, "interval is a count, at least 1"),
        ({"rewind": 0.9}, "rewind is a share of the training up to the last masks, got 0.9"),
        ({"criterion": "wanda", "scope": "global"}, "compares weights of one layer one by one"),
        ({"criterion": "sparsegpt", "schedule": "cubic"}, "prunes once, at the start of fit"),
        ({"criterion": "sparsegpt", "start": 0.1}, "prunes once"),
        ({"overrides": {"fc1": {"bits": 4}}}, "has no option 'bits'"),
        ({"overrides": {"fc1": {}}}, "takes one of sparsity, pattern"),
        ({"overrides": {"fc1": {"sparsity": 2.0}}}, r"overrides\['fc1'\]: sparsity"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        UnstructuredPruning(**options)


def test_a_family_names_its_methods() -> None:
    with pytest.raises(OptionError, match="has no method 'structure' in this release"):
        PruningCompression(method="structure")


@pytest.mark.parametrize("criterion", ["snip", "taylor", "movement"])
def test_criteria_of_a_training_need_one(criterion: str) -> None:
    with pytest.raises(ModelError, match="needs the gradients of a training: use PruningCallback"):
        pruned(net(), criterion=criterion)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_criteria_from_data_need_data(criterion: str) -> None:
    with pytest.raises(CalibrationError, match="give compress_model a train_loader"):
        pruned(net(), criterion=criterion)


def test_what_cannot_be_pruned_is_an_error() -> None:
    quantized = compress_model(ConvNet(), "ptq", scheme="weight_only", min_saving=0.0)
    with pytest.raises(ModelError, match="already compressed .8-bit weights"):
        pruned(quantized)
    with pytest.raises(ModelError, match="sparsity 0 leaves it as it is"):
        pruned(net(), sparsity=0.0)
    model = net()
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="weight of layer '1' holds NaN"):
        pruned(model)
    with pytest.raises(ModelError, match="overrides pattern 'fc9' matches no layer"):
        pruned(MLP(), overrides={"fc9": {"sparsity": 0.1}})
    frozen = net().requires_grad_(False)
    reasons = [skip.reason for skip in UnstructuredPruning(criterion="snip").plan(frozen).skipped]
    assert "is frozen, and snip needs gradients" in reasons

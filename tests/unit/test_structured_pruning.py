"""Structured pruning without a Trainer: importance, choice, targets, repairs, removal, and what is refused."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import (
    CompressionPlan,
    PruningCompression,
    StructuredPruning,
    compress_model,
    compression_report,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import CalibrationError, CheckpointError, ModelError, OptionError
from pquant_lightning.methods.pruning import _importance
from pquant_lightning.methods.pruning._reconstruction import least_squares, recalibrate

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FINE = {"round_to": 1}


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    for _ in range(3):
        net(IMAGES)
    return net.eval()


def pruned(model: nn.Module, data: Any = (IMAGES,), **options: Any) -> Any:
    return compress_model(model, "structured_pruning", train_loader=list(data), **{**FINE, **options})


def share(original: nn.Module, small: nn.Module, what: str) -> float:
    report = compression_report(original, small, IMAGES)
    before, after = getattr(report, what)
    return after / before


# -- importance --------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers; a unit is row i of the first, its bias, and column i of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


UNITS = torch.arange(6)[:, None]
PARTS = [("a.bias", 0, UNITS), ("a.weight", 0, UNITS), ("b.weight", 1, UNITS)]


def test_norms_are_those_of_all_weights_of_a_unit() -> None:
    net = Two()
    values = torch.cat([net.a.weight, net.b.weight.T], 1).detach()
    torch.testing.assert_close(_importance.l1(net, PARTS), values.abs().sum(1))
    torch.testing.assert_close(_importance.l2(net, PARTS), values.norm(dim=1))


def test_fpgm_is_least_for_the_unit_that_others_replace() -> None:
    net = Two()
    with torch.no_grad():
        net.a.weight[2], net.b.weight[:, 2] = net.a.weight.mean(0), net.b.weight.mean(1)
    values = torch.cat([net.a.weight, net.b.weight.T], 1).detach()
    expected = torch.stack([(values - row).norm(dim=1).sum() for row in values])
    found = _importance.fpgm(net, PARTS)
    torch.testing.assert_close(found, expected)
    assert int(found.argmin()) == 2


def test_bn_scale_is_gamma() -> None:
    net = conv_net()
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(-1, 1, 32))
    units = torch.arange(32)[:, None]
    parts = [("0.weight", 0, units), ("1.weight", 0, units)]
    torch.testing.assert_close(_importance.bn_scale(net, parts), torch.linspace(-1, 1, 32).abs())
    torch.testing.assert_close(_importance.bn_scale(net, parts[:1]), _importance.l2(net, parts[:1]))


def test_saliency_is_the_first_order_change_of_the_loss() -> None:
    net, x = Two().double(), torch.randn(8, 4).double()
    net(x).square().sum().backward()
    products = [(p * p.grad).detach() for p in (net.a.bias, net.a.weight, net.b.weight)]
    expected = (products[0] + products[1].sum(1) + products[2].sum(0)).square()
    torch.testing.assert_close(_importance.saliency(net, PARTS), expected.float())


def test_activation_is_what_the_reader_gets() -> None:
    net, x = Two(), torch.randn(8, 4)
    hidden = F.relu(net.a(x)).detach()
    expected = hidden.norm(dim=0) * net.b.weight.detach().norm(dim=0)
    (found,) = _importance.activation(net, [PARTS], Samples((x[:5], x[5:]), lambda m, batch: m(batch)))
    torch.testing.assert_close(found, expected)


def test_the_lowest_of_all_groups_go_up_to_their_caps() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.3, 5.0]), torch.tensor([0.15, 4.0])]
    assert _importance.lowest(scores, 3, [4, 2]) == [2, 1]
    assert _importance.lowest(scores, 3, [1, 2]) == [1, 2]
    assert _importance.lowest(scores, 99, [3, 1]) == [3, 1]
    assert _importance.lowest([torch.ones(4), torch.ones(4)], 5, [3, 3]) == [3, 2]


# -- choice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["l2", "l1", "bn_scale", "fpgm", "activation", "random"])
def test_every_criterion_removes_half_and_keeps_what_it_calls_important(criterion: str) -> None:
    net: Any = conv_net()
    with torch.no_grad():  # unit 0 is important, unit 1 is not, by any measure but chance
        net[0].weight[0] *= 5
        net[1].weight[0] *= 5
        net[0].weight[1], net[1].weight[1] = net[0].weight.mean(0), 1e-3
        net[3].weight[:, 0] *= 5
        net[3].weight[:, 1] = net[3].weight.mean(1)
    small = pruned(net, criterion=criterion)
    assert small[0].out_channels + small[3].out_channels == 48
    kept = {tuple(row.tolist()) for row in small[0].weight.flatten(1)}
    if criterion != "random":
        assert tuple(net[0].weight[0].flatten().tolist()) in kept
        assert tuple(net[0].weight[1].flatten().tolist()) not in kept
    else:
        assert not torch.equal(small[0].weight, pruned(net, criterion=criterion, seed=1)[0].weight)


@pytest.mark.parametrize(
    ("target", "what"), [({"params": 0.5}, "params"), ({"params": 0.3}, "params"), ({"macs": 0.4}, "macs")]
)
def test_a_target_is_met_within_two_percent(target: dict[str, float], what: str) -> None:
    net = conv_net()
    (wanted,) = target.values()
    for round_to in (1, 8):
        assert share(net, pruned(net, target=target, round_to=round_to), what) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [{"params": 0.5}, {"macs": 0.4}, {"macs": 0.3}])
def test_targets_are_met_where_units_cost_unlike_amounts(target: dict[str, float], seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=32),
        nn.ReLU(), nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    ((what, wanted),) = target.items()
    assert share(net, pruned(net, target=target), what) <= 1.02 * wanted


def test_layers_that_cannot_lose_channels_are_left_alone(tmp_path: Any) -> None:
    small = compress_model(conv_net(), "lora", r=2, include=["3"])
    with pytest.raises(ModelError, match=r"is inside 3 \(LoRA 2\), which cannot lose channels"):
        pruned(small)


def test_latency_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from pquant_lightning.methods.pruning import _cost

    now = 0.0  # of a clock on which a model takes a second per parameter

    def run(model: nn.Module, samples: Any) -> list[Any]:
        nonlocal now
        now += sum(p.numel() for p in model.parameters())
        return []

    monkeypatch.setattr(_cost, "run_samples", run)
    monkeypatch.setattr(_cost, "measure", partial(_cost.measure, clock=lambda: now))
    net = conv_net()
    assert share(net, pruned(net, target={"latency": 0.5}), "params") == pytest.approx(0.5, rel=0.1)


def test_widths_are_rounded_and_capped() -> None:
    net = conv_net()
    small = pruned(net, sparsity=0.4, round_to=16)
    assert small[0].out_channels % 16 == small[3].out_channels % 16 == 0
    capped = pruned(net, sparsity=0.3, max_sparsity=0.3)
    assert (capped[0].out_channels, capped[3].out_channels) == (23, 45)


def test_patterns_choose_groups() -> None:
    net = conv_net()
    assert pruned(net, include=["0"])[3].out_channels == 64
    assert pruned(net, exclude=["0"])[0].out_channels == 32
    with pytest.raises(ModelError, match="matches no layer and no parameter"):
        pruned(net, include=["first"])


def test_the_plan_can_be_printed_saved_edited_and_applied() -> None:
    net: Any = conv_net()
    method, context = StructuredPruning(sparsity=0.5, **FINE), CompressionContext(by="me")
    samples = method.samples_of([IMAGES])
    plan = method.plan(net, CompressionContext(by="me", samples=samples))
    assert "0: units=32, removes=" in str(plan)
    text = plan.to_json()
    data = json.loads(text)
    for entry in data["layers"]:
        entry["spec"]["removes"] = 5
    edited = CompressionPlan.from_json(json.dumps(data)).without("3")
    method.apply(net, edited, context)
    method.step(net, context.state, 1.0)
    StructuredPruning.finalize(net)
    assert (net[0].out_channels, net[3].out_channels) == (27, 64)
    assert CompressionPlan.from_json(text) == plan


# -- repairs -----------------------------------------------------------------------------------------------------------


def test_least_squares_is_the_best_fit_from_the_inputs_that_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)).double()
    weight, kept = torch.randn(3, 6, generator=generator).double(), torch.tensor([True, False, True, True, False, True])
    found = least_squares(weight, x.T @ x, kept, 1e-4)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(found[:, kept], best, rtol=1e-2, atol=1e-3)
    assert bool((found[:, ~kept] == 0).all())
    for unit in (1e-20, 1e20):
        torch.testing.assert_close(
            least_squares(weight, x.T @ x * unit, kept, 1e-4 * unit), found, rtol=1e-9, atol=1e-9
        )
    assert torch.equal(least_squares(weight, torch.zeros(6, 6), kept, 0.0), weight * kept)


class Wide(nn.Module):
    """Its second layer reads what the first gives; with 128 samples it has seen little of its 512 inputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 512), nn.Linear(512, 64, bias=bias)
        self.first.bias.data += 1.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.float64)])
def test_few_samples_do_not_pull_the_weights_that_stay_to_zero(bias: bool, dtype: torch.dtype) -> None:
    net, generator = Wide(bias).to(dtype), torch.Generator().manual_seed(1)
    samples, fresh = (torch.randn(n, 32, generator=generator).to(dtype) for n in (128, 2000))
    small = pruned(net, [samples], sparsity=0.5, criterion="random", reconstruct=True)
    with torch.no_grad():
        hidden, seen = torch.relu(small.first(fresh)), torch.relu(small.first(samples))
        if bias:
            hidden, seen = (torch.cat([h, h.new_ones(len(h), 1)], 1) for h in (hidden, seen))
        level = 1e-4 * seen.square().mean() * len(seen) * torch.eye(seen.shape[1], dtype=dtype)
        shrunk = torch.linalg.solve((seen.T @ seen + level).double(), (seen.T @ net(samples)).double()).to(dtype)
        errors = [float((y - net(fresh)).norm() / net(fresh).norm()) for y in (small(fresh), hidden @ shrunk)]
    assert small.second.weight.dtype == dtype
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_the_unit_of_the_inputs_does_not_count_in_a_reconstruction(unit: float) -> None:
    net, x = Wide(True), torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    scaled = Wide(True)
    scaled.first.weight.data.mul_(unit)
    scaled.first.bias.data.mul_(unit)
    found = [pruned(m, [x], sparsity=0.5, criterion="random", reconstruct=True) for m in (net, scaled)]
    torch.testing.assert_close(found[0].second.weight, found[1].second.weight)


def test_reconstruction_and_recalibration_bring_the_output_closer() -> None:
    net = conv_net()
    torch.manual_seed(1)
    data = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    recalibrate(net, Samples(tuple(data), lambda m, batch: m(batch)))
    expected = net(data[0]).detach()

    def error(**options: Any) -> float:
        with torch.no_grad():
            return float((pruned(net, data, sparsity=0.4, **options)(data[0]) - expected).norm() / expected.norm())

    plain = error()
    assert error(reconstruct=True) < 0.7 * plain
    assert error(recalibrate=True) < plain


def test_recalibrated_norms_have_the_statistics_of_their_inputs() -> None:
    small = pruned(conv_net(), recalibrate=True)
    with torch.no_grad():
        y = small[0](IMAGES)
    torch.testing.assert_close(small[1].running_mean, y.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert small[1].momentum == 0.1


# -- removal -----------------------------------------------------------------------------------------------------------


def test_removal_is_exact_and_files_load_into_the_model_and_its_class(tmp_path: Any) -> None:
    net = conv_net()
    small = pruned(net, sparsity=0.6)
    save_compressed(small, tmp_path / "small.safetensors")
    loaded = load_compressed(conv_net(), tmp_path / "small.safetensors")
    assert torch.equal(loaded(IMAGES), small(IMAGES))
    again = prepare(conv_net())
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.eval()(IMAGES), small(IMAGES))
    report = compression_report(net, small, IMAGES)
    assert [layer.name for layer in report.layers] == ["0", "1", "3", "4", "8"]
    assert report.params == (sum(p.numel() for p in net.parameters()), sum(p.numel() for p in small.parameters()))
    assert "64x32 → " in report.layers[2].method
    program = torch.export.export(small, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), small(IMAGES))


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn, self.head = layer(8, 16, **options), nn.Linear(options.get("proj_size", 16), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Cells(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = layer(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.rnn(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(8, 16, 3), norm, nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x.transpose(1, 2)))))


@pytest.mark.parametrize(
    ("model", "attribute"),
    [
        (lambda: Recurrent(nn.LSTM), "hidden_size"),
        (lambda: Recurrent(nn.GRU, num_layers=1), "hidden_size"),
        (lambda: Recurrent(nn.LSTM, proj_size=8), "proj_size"),
        (lambda: Cells(nn.LSTMCell), "hidden_size"),
        (lambda: Cells(nn.GRUCell), "hidden_size"),
        (lambda: Normed(nn.InstanceNorm1d(16, affine=True)), "num_features"),
        (lambda: Normed(nn.GroupNorm(16, 16)), "num_channels"),
        (lambda: Normed(nn.BatchNorm1d(16)), "num_features"),
    ],
)
def test_the_sizes_of_other_layers_follow(model: Any, attribute: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, x = model().eval(), torch.randn(4, 6, 8)
    small = pruned(net, [x])
    layer = getattr(small, "rnn", None) or small.norm
    assert getattr(layer, attribute) < getattr(getattr(net, "rnn", None) or net.norm, attribute)
    save_compressed(small, tmp_path / "small.safetensors")
    loaded = load_compressed(model(), tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded(x), small(x))
    twin = getattr(loaded, "rnn", None) or loaded.norm
    assert getattr(twin, attribute) == getattr(layer, attribute)


def test_a_quantized_pruned_model_loads(tmp_path: Any) -> None:
    small = compress_model(pruned(conv_net()), "ptq", train_loader=[IMAGES])
    save_compressed(small, tmp_path / "small.safetensors")
    loaded = load_compressed(conv_net(), tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded(IMAGES), small(IMAGES))
    assert compression_report(conv_net(), small, IMAGES).params[0] == sum(p.numel() for p in conv_net().parameters())


def test_a_damaged_group_is_refused() -> None:
    state = pruned(conv_net()).state_dict()
    spec = json.loads(bytes(state["0._extra_state"].tolist()))
    spec["group"]["tensors"]["../3/weight"]["now"] = [10**6, 10**6, 3, 3]
    state["0._extra_state"] = torch.tensor(list(json.dumps(spec).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="group in the spec of layer '0' is damaged"):
        prepare(conv_net()).load_state_dict(state)


def test_the_model_is_not_touched_and_frozen_parameters_go_too() -> None:
    net = conv_net().requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = pruned(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert small[0].out_channels < 32
    assert not any(p.requires_grad for p in small.parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "target": {"macs": 0.5}}, "takes one of sparsity, target"),
        ({"sparsity": 1.0}, "a share of units that goes"),
        ({"sparsity": 0.95}, "max_sparsity=0.9 is the most of each group"),
        ({"target": {"flops": 0.5}}, "has no target 'flops'"),
        ({"target": {"macs": 1.5}}, "a share that is kept"),
        ({"target": {"macs": 0.5, "params": 0.5}}, "takes one target"),
        ({"criterion": "magnitude"}, "has no criterion 'magnitude'"),
        ({"round_to": 0}, "round_to is a count"),
        ({"start": 0.8, "end": 0.2}, "0 <= start <= end <= 1"),
        ({"reconstruct": True, "schedule": "linear"}, "prune once, at the start of fit"),
        ({"recalibrate": True, "criterion": "taylor"}, "prune once, at the start of fit"),
        ({"remove": "later"}, "has no remove 'later'"),
        ({"pattern": "2:4"}, "has no option 'pattern'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        StructuredPruning(**options)


def test_a_target_out_of_reach_says_what_is_reachable_and_what_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Softmax(1), nn.Linear(64, 4))
    with pytest.raises(
        ModelError, match=r"(?s)cannot keep as little as 10.0% of the params.*\d+.\d% are left.*softmax"
    ) as error:
        pruned(net, [torch.randn(4, 8)], target={"params": 0.1})
    assert "64 channels of 2, 4" in str(error.value)


def test_too_little_to_remove_is_an_error() -> None:
    with pytest.raises(ModelError, match="less than min_saving=90%"):
        pruned(conv_net(), sparsity=0.2, min_saving=0.9)


def test_a_model_without_a_choice_is_an_error() -> None:
    with pytest.raises(ModelError, match="finds nothing to remove"):
        pruned(nn.Sequential(nn.Linear(8, 4)), [torch.randn(2, 8)])


def test_an_example_is_needed_and_must_run() -> None:
    with pytest.raises(CalibrationError, match="runs the model once"):
        compress_model(conv_net(), "structured_pruning")
    with pytest.raises(CalibrationError, match=r"float32 \(2, 5, 8, 8\).* in '0'"):
        pruned(conv_net(), [torch.randn(4, 5, 8, 8)])
    with pytest.raises(ModelError, match="needs the gradients of a training"):
        pruned(conv_net(), criterion="taylor")


def test_a_class_is_no_model() -> None:
    with pytest.raises(ModelError, match="a torch.nn.Module that is made already"):
        compress_model(Two, "structured_pruning")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["structured_pruning", "ptq"])
def test_quantized_and_removed_layers_are_refused(method: str) -> None:
    with pytest.raises(ModelError, match="compressed already .*channels are removed before that"):
        pruned(compress_model(conv_net(), method, train_loader=[IMAGES]))


def test_control_flow_that_follows_the_data_is_kept_as_it_ran() -> None:
    class Branch(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    x = torch.randn(8, 4)
    small: Any = pruned(Branch(), [x], sparsity=0.5)
    assert small.a.out_features == 3
    assert small(x).shape == small(-x).shape == (8, 3)


def test_the_family_makes_it() -> None:
    assert PruningCompression(method="structured", sparsity=0.25).name == "structured_pruning"

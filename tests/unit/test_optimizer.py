"""Learned scales in parameter groups of their own, with learning rates that schedulers keep in proportion."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from pquant_lightning import QATCompression
from pquant_lightning.core.optimizer import separate_groups
from tests.models import MLP

FACTOR = 0.1


def quantized(**options: Any) -> nn.Module:
    """An MLP whose layers all learn the scales of weights and inputs, and the zero points of inputs."""
    given = {"bits": 4, "first_last_bits": 4, "min_saving": 0.0, "scale_lr": FACTOR, **options}
    return QATCompression(**given).compress(MLP(), MLP.loader()).train()


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return [named[id(parameter)] for parameter in group["params"]]


def step(model: Any, optimizer: Optimizer) -> None:
    for batch in MLP.loader():
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()


LEARNED = ("weight_scale", "act_scale", "act_zero")


@pytest.fixture
def model() -> nn.Module:
    return quantized()


def test_a_group_of_its_own(model: nn.Module) -> None:
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), amsgrad=True)
    separate_groups(model, optimizer, [])
    weights, scales = optimizer.param_groups
    layers = ("fc1", "fc2", "head")
    assert sorted(names(model, scales)) == sorted(f"{layer}.{name}" for layer in layers for name in LEARNED)
    assert sorted(names(model, weights)) == sorted(f"{layer}.{name}" for layer in layers for name in ("weight", "bias"))
    assert (weights["lr"], weights["weight_decay"]) == (0.01, 0.2)
    assert scales["lr"] == pytest.approx(0.01 * FACTOR)
    assert scales["weight_decay"] == 0
    assert (scales["betas"], scales["amsgrad"]) == ((0.8, 0.9), True)


def test_twice_is_once(model: nn.Module) -> None:
    optimizer = SGD(model.parameters(), lr=0.01)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 10)
    separate_groups(model, optimizer, [scheduler])
    before = [dict(group, params=names(model, group)) for group in optimizer.param_groups]
    lists = {key: list(value) for key, value in vars(scheduler).items() if isinstance(value, list)}
    separate_groups(model, optimizer, [scheduler])
    assert [dict(group, params=names(model, group)) for group in optimizer.param_groups] == before
    assert {key: value for key, value in vars(scheduler).items() if isinstance(value, list)} == lists


def test_each_group_is_split_by_itself(model: Any) -> None:
    groups = [{"params": model.fc1.parameters(), "lr": 0.5}, {"params": model.fc2.parameters(), "lr": 0.05}]
    optimizer = SGD(groups, weight_decay=0.1)
    separate_groups(model, optimizer, [])
    found = [(sorted(names(model, group)), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    learned = {layer: sorted(f"{layer}.{name}" for name in LEARNED) for layer in ("fc1", "fc2")}
    assert found == [
        (["fc1.bias", "fc1.weight"], 0.5, 0.1),
        (["fc2.bias", "fc2.weight"], 0.05, 0.1),
        (learned["fc1"], pytest.approx(0.5 * FACTOR), 0.0),
        (learned["fc2"], pytest.approx(0.05 * FACTOR), 0.0),
    ]


def test_a_group_is_never_emptied(model: Any) -> None:
    """The user has put the scales into a group of their own: its settings are the user's."""
    scales = [p for name, p in model.named_parameters() if name.endswith(LEARNED)]
    others = [p for name, p in model.named_parameters() if not name.endswith(LEARNED)]
    optimizer = SGD([{"params": others}, {"params": scales, "lr": 0.3}], lr=0.01, weight_decay=0.1)
    separate_groups(model, optimizer, [])
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (len(others), 0.01, 0.1),
        (len(scales), 0.3, 0.1),
    ]


@pytest.mark.parametrize("options", [{"quantizer": "ste"}, {"bits": 8, "first_last_bits": 8}])
def test_without_learned_scales_nothing_changes(options: dict[str, Any]) -> None:
    model = quantized(**options)
    optimizer = Adam(model.parameters())
    separate_groups(model, optimizer, [])
    (group,) = optimizer.param_groups
    assert names(model, group) == [name for name, _ in model.named_parameters()]


def test_parameters_of_another_optimizer_are_not_taken(model: Any) -> None:
    optimizer = SGD(model.fc1.parameters(), lr=0.1)
    separate_groups(model, optimizer, [])
    assert {name.split(".")[0] for group in optimizer.param_groups for name in names(model, group)} == {"fc1"}


def test_different_factors_are_different_groups() -> None:
    model = quantized(include=["fc1"])
    other = QATCompression(bits=4, first_last_bits=4, min_saving=0.0, scale_lr=0.5, include=["fc2"])
    other.compress_in_place(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    separate_groups(model, optimizer, [])
    assert [(g["lr"], {n.split(".")[0] for n in names(model, g)}) for g in optimizer.param_groups[1:]] == [
        (FACTOR, {"fc1"}),
        (0.5, {"fc2"}),
    ]


def test_a_learning_rate_that_is_a_tensor(model: nn.Module) -> None:
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.01), capturable=False, foreach=False)
    separate_groups(model, optimizer, [])
    weights, scales = (float(group["lr"]) for group in optimizer.param_groups)
    assert (weights, scales) == (pytest.approx(0.01), pytest.approx(0.001))


def test_the_scales_do_not_decay_and_move_slower(model: Any) -> None:
    """Without gradients, weight decay alone moves the weights and leaves the scales."""
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    separate_groups(model, optimizer, [])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.endswith(LEARNED) else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        before[id(parameter)] = parameter.detach().clone()
    optimizer.step()
    moved = before[id(model.fc1.act_scale)] - model.fc1.act_scale.detach()
    torch.testing.assert_close(moved, torch.full((1,), 0.1 * FACTOR))


STEPS = 12


def _plateau(optimizer: Optimizer) -> Any:
    return schedulers.ReduceLROnPlateau(optimizer, patience=1, factor=0.5, min_lr=1e-6)


def _sequential(optimizer: Optimizer) -> Any:
    warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 8)], milestones=[4])


def _chained(optimizer: Optimizer) -> Any:
    both = [schedulers.ConstantLR(optimizer, 0.5, total_iters=3), schedulers.ExponentialLR(optimizer, 0.8)]
    return schedulers.ChainedScheduler(both, optimizer)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "sequential": _sequential,
    "chained": _chained,
    "plateau": _plateau,
    "step": lambda o: schedulers.StepLR(o, 3),
    "multi_step": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "linear": lambda o: schedulers.LinearLR(o, 0.2, total_iters=6),
    "polynomial": lambda o: schedulers.PolynomialLR(o, STEPS),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "warm_restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
}


def rates(optimizer: Optimizer, scheduler: Any, count: int = STEPS) -> list[list[float]]:
    """The learning rates of all groups over the steps; the loss of a plateau never falls."""
    found = []
    optimizer.zero_grad()  # no parameter moves
    for _ in range(count):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
        found.append([float(group["lr"]) for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_the_ratio(name: str, model: Any) -> None:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    separate_groups(model, optimizer, [scheduler])
    found = rates(optimizer, scheduler)
    plain = SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    expected = rates(plain, SCHEDULERS[name](plain))
    assert [weights for weights, _ in found] == pytest.approx([rate for (rate,) in expected])
    assert len({round(weights, 9) for weights, _ in found}) > 1  # the schedule moves
    assert [scales for _, scales in found] == pytest.approx([FACTOR * weights for weights, _ in found], rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "lambda", "one_cycle", "sequential", "plateau"])
def test_two_groups_with_rates_of_their_own(name: str, model: Any) -> None:
    optimizer = SGD([{"params": model.fc1.parameters(), "lr": 0.1}, {"params": model.fc2.parameters(), "lr": 0.01}])
    make = (
        (lambda o: schedulers.OneCycleLR(o, [0.1, 0.01], STEPS + 1, cycle_momentum=False))
        if name == "one_cycle"
        else SCHEDULERS[name]
    )
    scheduler = make(optimizer)
    separate_groups(model, optimizer, [scheduler])
    for first, second, first_scales, second_scales in rates(optimizer, scheduler):
        assert first_scales == pytest.approx(FACTOR * first)
        assert second_scales == pytest.approx(FACTOR * second)
        assert second == pytest.approx(first / 10) or name == "one_cycle"


@pytest.mark.parametrize("name", ["cosine", "lambda", "one_cycle", "sequential", "plateau"])
def test_state_dicts_of_optimizer_and_scheduler_go_round(name: str) -> None:
    def made() -> tuple[Any, Optimizer, Any]:
        torch.manual_seed(0)
        model = quantized()
        optimizer = AdamW(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        separate_groups(model, optimizer, [scheduler])
        return model, optimizer, scheduler

    model, optimizer, scheduler = made()
    step(model, optimizer)
    rates(optimizer, scheduler, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    expected = rates(optimizer, scheduler, 5)
    step(model, optimizer)

    again, other, clock = made()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    clock.load_state_dict(saved[2])
    assert rates(other, clock, 5) == expected
    step(again, other)
    for (key, value), twin in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, twin), key


def test_a_cosine_reaches_its_least_rate_in_proportion(model: Any) -> None:
    """`eta_min` is a number for all groups, and the scales' rate ends at it too where it is zero."""
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 4)
    separate_groups(model, optimizer, [scheduler])
    for done, (weights, scales) in enumerate(rates(optimizer, scheduler, 4), start=1):
        assert weights == pytest.approx(0.05 * (1 + math.cos(math.pi * done / 4)), abs=1e-9)
        assert scales == pytest.approx(FACTOR * weights, abs=1e-9)

"""The proximal step: the right operators, zeros and low ranks that plain training does not find, resumption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as schedulers

from pquant_lightning import LowRankCallback, LowRankCompression, add_proximal_step
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.optimizer import (
    balance_factors,
    orthonormalize_factors,
    shrink_groups,
    shrink_singular_values,
)
from tests.models import MLP, fit, quiet_trainer


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestOperators:
    @pytest.mark.parametrize(("dim", "shape"), [(0, (6, 4)), (1, (6, 4)), (0, (6, 4, 3, 3)), (1, (6, 4, 3, 3))])
    def test_groups_become_shorter_by_the_threshold(self, dim: int, shape: tuple[int, ...]) -> None:
        weight = _random(*shape)
        before = weight.movedim(dim, 0).flatten(1)
        threshold = float(before.norm(dim=1).median())
        after = shrink_groups(weight, threshold, dim).movedim(dim, 0).flatten(1)
        torch.testing.assert_close(after.norm(dim=1), (before.norm(dim=1) - threshold).clamp_min(0))
        assert 0 < int((after == 0).all(1).sum()) < len(after)
        torch.testing.assert_close(
            torch.cosine_similarity(after, before)[after.norm(dim=1) > 0].min(), torch.tensor(1.0)
        )

    def test_singular_values_become_smaller_by_the_threshold(self) -> None:
        matrix = _random(8, 5)
        values = torch.linalg.svdvals(matrix)
        threshold = float(values[2]) + 1e-3
        found = torch.linalg.svdvals(shrink_singular_values(matrix, threshold))
        torch.testing.assert_close(found, (values - threshold).clamp_min(0), atol=1e-5, rtol=1e-5)
        assert torch.linalg.matrix_rank(shrink_singular_values(matrix, threshold)) == 2

    @pytest.mark.parametrize("operator", [shrink_groups, shrink_singular_values])
    def test_they_minimize_the_penalized_distance(self, operator: Any) -> None:
        matrix, threshold = _random(6, 4), 0.7

        def objective(other: Tensor) -> Tensor:
            size = other.norm(dim=1).sum() if operator is shrink_groups else torch.linalg.svdvals(other).sum()
            return (other - matrix).square().sum() / 2 + threshold * size

        best = objective(operator(matrix, threshold))
        for seed in range(200):
            other = operator(matrix, threshold) + 10 ** -(seed % 4) * _random(6, 4, seed=seed + 1)
            assert objective(other) > best


def _regression(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy outputs of a linear layer, and their inputs."""
    x = _random(400, weight.shape[1], seed=1)
    return x, x @ weight.T + 0.3 * _random(400, weight.shape[0], seed=2)


def _trained(data: tuple[Tensor, Tensor], make: Any, steps: int = 300) -> Tensor:
    x, y = data
    layer = nn.Linear(x.shape[1], y.shape[1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(0.1 * _random(*layer.weight.shape, seed=3))
    optimizer: Optimizer = make(layer)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().sum(1).mean().backward()
        optimizer.step()
    return layer.weight.detach()


class TestEffect:
    @pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.05), lambda p: Adam(p, lr=0.01)])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_group_lasso_finds_the_channels_that_matter(self, optimizer: Any, dim: int) -> None:
        planted = _random(12, 16)
        planted.movedim(dim, 0)[4:] = 0
        data = _regression(planted)
        plain = _trained(data, lambda layer: optimizer(layer.parameters()))
        found = _trained(data, lambda layer: add_proximal_step(optimizer(layer.parameters()), strength=0.5, dim=dim))
        alive = found.movedim(dim, 0).abs().sum(1) > 0
        assert alive.tolist() == [True] * 4 + [False] * (len(alive) - 4)
        assert (plain.movedim(dim, 0).abs().sum(1) > 0).all()
        assert (found - planted).norm() < 0.3 * planted.norm()

    @pytest.mark.parametrize("every", [1, 10])
    def test_nuclear_finds_the_rank(self, every: int) -> None:
        planted = _random(12, 3) @ _random(3, 16, seed=5)
        data = _regression(planted)
        plain = _trained(data, lambda layer: SGD(layer.parameters(), lr=0.05))
        found = _trained(
            data,
            lambda layer: add_proximal_step(SGD(layer.parameters(), lr=0.05), "nuclear", strength=0.5, every=every),
        )
        assert int(torch.linalg.matrix_rank(found, atol=1e-4)) == 3
        assert int(torch.linalg.matrix_rank(plain, atol=1e-4)) == 12
        assert (found - planted).norm() < 0.3 * planted.norm()

    def test_one_step_is_the_step_and_then_the_operator(self) -> None:
        weight, twin = (nn.Parameter(_random(5, 4)) for _ in range(2))
        bias = nn.Parameter(torch.ones(5))
        optimizer = add_proximal_step(SGD([weight, bias], lr=0.5, momentum=0.9), strength=0.6)
        plain = SGD([twin], lr=0.5, momentum=0.9)
        for parameter in (weight, twin, bias):
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
        plain.step()
        torch.testing.assert_close(weight.data, shrink_groups(twin.data, 0.3))
        assert torch.equal(bias.data, torch.full((5,), 0.95))

    def test_only_the_given_parameters(self) -> None:
        one, other = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
        optimizer = add_proximal_step(SGD([one, other], lr=1.0), strength=100.0, params=[one])
        one.grad, other.grad = torch.zeros(3, 3), torch.zeros(3, 3)
        optimizer.step()
        assert one.abs().sum() == 0
        assert torch.equal(other.data, torch.ones(3, 3))

    def test_schedulers_act_on_the_threshold(self) -> None:
        weight = nn.Parameter(torch.eye(3) * 10)
        optimizer = add_proximal_step(SGD([weight], lr=1.0), strength=1.0)
        scheduler = schedulers.StepLR(optimizer, 1, gamma=0.1)
        for _ in range(2):
            weight.grad = torch.zeros(3, 3)
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(weight.diagonal(), torch.full((3,), 10 - 1.0 - 0.1))

    def test_every_collects_the_thresholds(self) -> None:
        weight = nn.Parameter(torch.eye(2) * 10)
        optimizer = add_proximal_step(SGD([weight], lr=1.0), strength=1.0, every=3)
        sizes = []
        for _ in range(6):
            weight.grad = torch.zeros(2, 2)
            optimizer.step()
            sizes.append(round(weight.diagonal()[0].item(), 4))
        assert sizes == [10, 10, 7, 7, 7, 4]


class Penalized(MLP):
    """Trains with a proximal step every third step, under a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = add_proximal_step(Adam(self.parameters(), lr=0.01), strength=0.3, every=3)
        return {"optimizer": optimizer, "lr_scheduler": schedulers.ExponentialLR(optimizer, 0.9)}


def test_a_resumed_fit_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Four batches an epoch: the count of steps must go on where it was."""
    torch.manual_seed(0)
    state = Penalized().state_dict()

    def model() -> Penalized:
        fresh = Penalized()
        fresh.load_state_dict(state)
        return fresh

    whole = fit(quiet_trainer(tmp_path / "whole", [LowRankCallback(rank=3)], max_epochs=4), model())
    first = quiet_trainer(tmp_path / "first", [LowRankCallback(rank=3)], max_epochs=2)
    fit(first, model())
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = quiet_trainer(tmp_path / "rest", [LowRankCallback(rank=3)], max_epochs=4)
    resumed = fit(rest, model(), ckpt_path=tmp_path / "half.ckpt")
    assert rest.optimizers[0].param_groups[0]["proximal_steps"] == 16
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    weights = [p for p in whole.parameters() if p.dim() > 1]
    assert any(bool((p.abs().sum(1) == 0).any()) for p in weights)  # and it did something


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "lasso"}, "has no penalty 'lasso'.*'group_lasso'"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"every": 0}, "every=0"),
        ({"params": [nn.Parameter(torch.ones(3))]}, r"two dimensions or more, got one of shape \(3,\)"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?s){message}"):
        add_proximal_step(SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1), **options)


class TestRetraction:
    LEFT, RIGHT = 10 * _random(9, 4), _random(4, 7, seed=1)

    def test_balanced_factors_have_equal_gram_matrices_and_the_same_product(self) -> None:
        left, right = balance_factors(self.LEFT, self.RIGHT)
        torch.testing.assert_close(left @ right, self.LEFT @ self.RIGHT, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-4, atol=1e-4)
        again = balance_factors(left, right)
        torch.testing.assert_close(again[0], left, rtol=1e-4, atol=1e-4)  # the least change: none

    def test_orthonormal_rows_and_the_same_product(self) -> None:
        left, right = orthonormalize_factors(self.LEFT, self.RIGHT)
        torch.testing.assert_close(left @ right, self.LEFT @ self.RIGHT, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(right @ right.T, torch.eye(4), rtol=1e-5, atol=1e-5)
        basis = torch.linalg.svd(self.RIGHT, full_matrices=False)
        torch.testing.assert_close(right, basis[0] @ basis[2], rtol=1e-4, atol=1e-4)  # the nearest: the polar factor

    def test_factors_of_a_lower_rank_keep_their_product(self) -> None:
        left = self.LEFT.clone()
        left[:, 1] = left[:, 0]
        for retract in (balance_factors, orthonormalize_factors):
            one, other = retract(left, self.RIGHT)
            torch.testing.assert_close(one @ other, left @ self.RIGHT, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("retract", ["balanced", "orthonormal"])
    def test_factors_stay_so_in_a_fit_and_the_network_computes_the_same(self, retract: Any, tmp_path: Path) -> None:
        def off(model: Any) -> float:
            left, right = (factor[0].detach() for factor in model.fc1.factors())
            gram = right @ right.T
            wanted = left.T @ left if retract == "balanced" else torch.eye(len(gram))
            return float((gram - wanted).norm() / wanted.norm())

        torch.manual_seed(0)
        free: Any = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)], max_epochs=5), MLP(lr=0.05))
        kept: Any = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4, retract=retract)], max_epochs=5), MLP(lr=0.05))
        assert off(kept) < 1e-4
        assert off(free) > 0.05
        method = LowRankCompression(rank=4, retract=retract)
        with torch.no_grad():
            kept.fc1.first.weight.mul_(10)
        before = kept(*MLP.inputs())
        method.project(kept, {})
        torch.testing.assert_close(kept(*MLP.inputs()), before, rtol=1e-3, atol=1e-3)
        assert off(kept) < 1e-4

    def test_badly_scaled_factors_train_where_they_would_diverge(self) -> None:
        """The same start, scaled apart: plain gradient descent diverges, retracted it learns."""
        target = _random(8, 3) @ _random(3, 8, seed=1)

        def loss_after(retracted: bool) -> float:
            left, right = nn.Parameter(0.01 * _random(8, 3, seed=2)), nn.Parameter(10 * _random(3, 8, seed=3))
            optimizer = SGD([left, right], lr=0.01)
            for _ in range(500):
                if retracted:
                    with torch.no_grad():
                        for parameter, value in zip((left, right), balance_factors(left, right), strict=True):
                            parameter.copy_(value)
                optimizer.zero_grad()
                loss = (left @ right - target).square().sum()
                loss.backward()
                optimizer.step()
            return loss.item()

        assert not loss_after(retracted=False) < 1e6
        assert loss_after(retracted=True) < 1e-2

"""One budget over methods: it is kept, monotone, never worse than one method alone, and says what it cannot do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    CompressionPipeline,
    LayerMethod,
    LowRankCompression,
    PipelineStage,
    PTQCompression,
    StructuredPruning,
    TuckerCompression,
    UnstructuredPruning,
    compress_model,
)
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.deploy import deploy, stored_bytes
from pquant_lightning.core.errors import BudgetError, OptionError
from pquant_lightning.core.joint_budget import apply_share, share_budget
from pquant_lightning.core.output_error import OutputError
from pquant_lightning.core.plan import Candidate, CompressionPlan, Skip
from tests.models import MLP, built

PTQ = PTQCompression(scheme="weight_only", first_last_bits=2, min_saving=0.0)
LOW_RANK = LowRankCompression(min_saving=0.0)


class Mixed(nn.Module):
    """One layer of low rank, one of full rank, and a convolution: no method suits all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 16, 3, padding=1)
        self.low = nn.Linear(16 * 16, 64)
        self.full = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)
        with torch.no_grad():
            self.low.weight.copy_(torch.randn(64, 3) @ torch.randn(3, 256) / 16)
            self.full.weight.copy_(torch.linalg.qr(torch.randn(64, 64))[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(torch.relu(self.conv(x)).flatten(1))
        return self.head(torch.relu(self.full(torch.relu(x))))


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 2, 4, 4) for _ in range(3)]


def samples() -> Samples:
    return Samples.take(batches(), 96)


def deployed(model: nn.Module, share: Any) -> nn.Module:
    small = built(type(model)) if isinstance(model, MLP) else Mixed()
    apply_share(small, share, samples())
    deploy(small)
    return small


@pytest.mark.parametrize("size", [0.3, 0.15, 0.08])
def test_the_budget_of_bytes_is_kept_and_used(size: float) -> None:
    model = Mixed()
    share = share_budget(model, [LOW_RANK, PTQ], {"size": size}, samples())
    small = deployed(model, share)
    kept = stored_bytes(small) / stored_bytes(model)
    assert kept == pytest.approx(share.kept)
    assert 0.6 * size <= kept <= size
    assert OutputError(model, samples()).of(small) == pytest.approx(share.loss, rel=0.3)


@pytest.mark.parametrize("size", [0.2, 0.1, 0.06])
def test_together_they_lose_no_more_than_each_alone(size: float) -> None:
    model = Mixed()
    losses = {}
    for name, methods in {"both": [PTQ, LOW_RANK], "ptq": [PTQ], "low_rank": [LOW_RANK]}.items():
        try:
            losses[name] = share_budget(model, methods, {"size": size}, samples()).loss
        except BudgetError:
            losses[name] = float("inf")
    assert losses["both"] <= min(losses["ptq"], losses["low_rank"])
    if size < 0.2:
        assert losses["both"] < 0.7 * min(losses["ptq"], losses["low_rank"])


def test_each_layer_gets_what_suits_it() -> None:
    share = share_budget(Mixed(), [LOW_RANK, PTQ], {"size": 0.1}, samples())
    by_method = {step.method.name: step.choices for step in share.steps}
    assert by_method["low_rank"]["low"]["rank"] <= 16
    assert "full" not in by_method["low_rank"]
    assert "full" in by_method["ptq"]
    assert "low_rank of" in str(share)


def test_more_budget_never_costs_more() -> None:
    model = Mixed()
    losses = [share_budget(model, [LOW_RANK, PTQ], {"size": s}, samples()).loss for s in (0.05, 0.1, 0.2, 0.5)]
    assert losses == sorted(losses, reverse=True)


def test_multiply_accumulates_are_saved_and_what_saves_none_acts_as_it_is() -> None:
    model = Mixed()
    share = share_budget(model, [LOW_RANK, PTQ], {"macs": 0.6}, samples())
    assert share.kept <= 0.6
    names = {step.method.name: step.choices for step in share.steps}
    assert names["ptq"] is None
    assert names["low_rank"]
    small = deployed(model, share)
    assert type(small.full).__name__ == "IntLinear"


def test_channels_are_tried_at_their_levels() -> None:
    model = Mixed()
    pruning = StructuredPruning(round_to=1, min_saving=0.0)
    share = share_budget(model, [pruning], {"size": 0.6}, samples())
    assert share.kept <= 0.6
    assert share.steps[0].given is pruning
    assert share.steps[0].method.sparsity in (0.25, 0.5, 0.75)
    masks = UnstructuredPruning(include=["*"], criterion="magnitude")
    sparse = share_budget(model, [masks], {"size": 0.3}, samples())
    assert sparse.kept <= 0.3
    assert sparse.steps[0].method.sparsity == 0.75


def test_latency_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 512))
    data = Samples.take([torch.randn(256, 512)], 256)
    share = share_budget(model, [LOW_RANK], {"latency": 0.7}, data)
    assert share.kept <= 0.7
    assert share.steps[0].choices


def test_the_smallest_size_for_a_metric() -> None:
    model = Mixed()
    reference = OutputError(model, samples())
    drops: list[float] = []

    def drop(small: nn.Module) -> float:
        drops.append(reference.of(small))
        return drops[-1]

    share = share_budget(model, [LOW_RANK, PTQ], {"max_drop": 0.02}, samples(), drop=drop)
    assert reference.of(deployed(model, share)) <= 0.02
    assert share.kept < 0.15
    assert len(drops) <= 8


class Halved(LayerMethod):
    """A third party's method: rounds weights to so many digits and stores them as float16."""

    digits: int = 3

    def candidates(self, name: str, module: nn.Module, context: CompressionContext) -> list[Candidate]:
        return LowRankCompression(min_saving=0.0).candidates(name, module, context)[:1]

    def choose(self, name: str, layer: nn.Module, options: Any, context: CompressionContext) -> Any:
        return LowRankCompression(min_saving=0.0).choose(name, layer, options, context)

    def fill(self, new: Any, old: Any, plan: Any, context: CompressionContext) -> None:
        LowRankCompression(min_saving=0.0).fill(new, old, plan, context)

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> Skip:
        return Skip(name, "only by budget")


def test_a_third_partys_candidates_take_part() -> None:
    share = share_budget(Mixed(), [Halved(min_saving=0.0), PTQ], {"size": 0.05}, samples())
    assert any(isinstance(step.method, Halved) and step.choices for step in share.steps)


def test_choices_make_a_plan_that_can_be_edited() -> None:
    model = Mixed()
    context = CompressionContext(by="me", choices={"low": {"rank": 4, "kind": "low_rank_linear"}})
    plan = LOW_RANK.plan(model, context)
    assert [(layer.name, layer.spec["rank"]) for layer in plan.layers] == [("low", 4)]
    assert {skip.reason for skip in plan.skipped} == {"the budget leaves it as it is"}
    assert CompressionPlan.from_json(plan.to_json()) == plan
    tucker = TuckerCompression(min_saving=0.0)
    offer = tucker.candidates("conv", model.conv, CompressionContext(by="me"))[0]
    chosen = tucker.plan(model, CompressionContext(by="me", choices={"conv": offer.options}))
    assert [layer.name for layer in chosen.layers] == ["conv"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"size": 0.0}, "a share that is kept"),
        ({"size": 1.5}, "a share that is kept"),
        ({"sise": 0.5}, "Did you mean 'size'"),
        ({"size": 0.5, "macs": 0.5}, "one entry"),
        ({"max_drop": 0.1}, "goes with monitor"),
    ],
)
def test_bad_budgets(budget: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        share_budget(Mixed(), [PTQ], budget, samples())


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(BudgetError, match=r"the methods keep at least \d"):
        share_budget(Mixed(), [PTQ], {"size": 0.01}, samples())
    with pytest.raises(BudgetError, match="even .* of the bytes lose more"):
        share_budget(Mixed(), [PTQ], {"max_drop": 0.0}, samples(), drop=lambda model: 1.0)


def test_methods_without_a_choice() -> None:
    method = LowRankCompression(include=["head"], min_saving=0.9)
    with pytest.raises((OptionError, BudgetError), match="offers a budget a choice|cannot be met"):
        share_budget(Mixed(), [method], {"size": 0.5}, samples())


# -- in a pipeline ---------------------------------------------------------------------------------------------------


def test_in_a_pipeline_with_training_and_resume(tmp_path: Any, package_log: Any) -> None:
    def run(dirpath: Any = None) -> Any:
        quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
        stage = PipelineStage([LOW_RANK, PTQ], epochs=2, trainer=quiet)
        pipeline = CompressionPipeline([stage], budget={"size": 0.2})
        return pipeline.run(built(MLP), MLP.loader(), MLP.loader(1), dirpath=dirpath)

    result = run(tmp_path)
    assert result.report.size_ratio <= 0.21
    assert "The budget size=0.2" in package_log.text
    (tmp_path / "model.safetensors").unlink()
    package_log.clear()
    again = run(tmp_path)
    assert "The budget size=0.2" not in package_log.text  # not shared out again
    x = MLP.inputs(seed=3)[0]
    assert torch.equal(result.model(x), again.model(x))


def test_in_a_configuration() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    config = {
        "compression": {"methods": ["low_rank", "ptq"], "ptq": {"scheme": "weight_only"}, "budget": {"size": 0.2}}
    }
    small = compress_model(model, config, train_loader=[torch.randn(64, 64)])
    assert stored_bytes(small) <= 0.2 * stored_bytes(model)
    with pytest.raises(OptionError, match="give run a train_loader"):
        compress_model(model, config)

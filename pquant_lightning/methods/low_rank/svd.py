"""Low rank by truncated singular value decomposition: one layer becomes two thin ordinary ones."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compressed_layer import Stage
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.data_aware import DataAwareMethod, moments_of
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.options import check_count, check_share, one_of
from pquant_lightning.core.plan import Candidate, CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.low_rank._choices import Choice, choose, offers, why_slower
from pquant_lightning.methods.low_rank._fitting import fit_layer
from pquant_lightning.methods.low_rank._layers import (
    Kind,
    LowRankLayer,
    TruncatedSVDLinear,
    factorize,
    fill_factors,
    find_low_rank_kind,
    kinds_of,
    low_rank_spec,
    weight_matrix,
)
from pquant_lightning.methods.low_rank._probing import output_weights
from pquant_lightning.methods.low_rank._retraction import retract_factors, with_retraction
from pquant_lightning.methods.low_rank._sequential import Apply, apply_in_order
from pquant_lightning.methods.low_rank._shared_budget import BUDGETS, allowed_offers, probe_of, share_budget
from pquant_lightning.methods.low_rank._ties import TyingMethod, tie_factors
from pquant_lightning.methods.low_rank._truncated_svd import truncation_error_bound

__all__ = ["LowRankCompression", "TruncatedSVDLinear", "factorize", "weight_matrix"]

log = logging.getLogger(__name__)


@CompressionMethodRegistry.register("low_rank")
class LowRankCompression(DataAwareMethod, TyingMethod):
    """Truncated SVD of Linear, Conv, ConvTranspose and Embedding layers at the start of fit.

    Give at most one of `rank`, `energy`, `param_ratio` and `budget`; none means `rank=64`. A layer that would not get
    smaller, or would need more multiplications, is left alone, with the reason in the report, and so is one that
    shares its weight with another layer.

    With data the factors have the least error of the layer's outputs on the samples, instead of the least error of its
    weight, and a bias takes the mean error (embeddings, whose inputs are indices, keep the least error of the weight).

    Args:
        rank: number of singular values kept per layer (per group of a grouped conv), a count; more than a layer has
            means all of them. "evbmf" finds the number per layer: those that stand out of the noise of its weight.
        energy: share of each weight's squared Frobenius norm that is kept, in (0, 1], or with data of its outputs'
            variance; gives the rank per layer.
        param_ratio: share of each layer's weights that is kept, in (0, 1], less what one more rank would add; gives the
            rank per layer.
        budget: one bound for all layers together, which gives most to the layers whose loss matters most:
            `{"params": p}` or `{"macs": p}`, the share of their weights or multiply-accumulates that is kept; or
            `{"error": e}`, the relative error that is allowed, with as few weights as possible. With data the loss is
            the error of the model's outputs that each layer causes alone, as it is measured on 64 samples, and the sum
            over the layers is bounded; without data it is that of the weights, the root mean square over the layers,
            which is a much poorer guide.
        round_to: ranks that are found, by whatever but a count, are multiples of this: more for `energy` and "evbmf",
            fewer for `param_ratio` and `budget`.
        split: how a convolution is split: "channel" into the same window with fewer outputs and a 1x1 convolution;
            "spatial" into one along the first and one along the second dimension (2-d windows only; others are split
            by channel); "auto" takes, with `param_ratio` and `budget`, what loses less, with `energy` what is smaller,
            and with a `rank` the channel.
        data_aware: fit the factors to the inputs of the layers, which are measured on samples of the training data.
            None does so where there are data and no training follows: in `compress_model` with a `train_loader`, not
            in a Trainer, where plain factors train as well or better.
        sequential: with data: compress the layers in the order in which they run, and fit each by least squares to
            what the uncompressed layer gives, from the inputs that the already compressed ones give. Better, and slower
            by two runs of the model per layer.
        num_samples: samples of the training data to measure the inputs on.
        max_statistics_bytes: what the measured moments may take at a time; more than that are measured in several
            passes.
        factorize_ties: factorizes an embedding and a head that share their weight, too: they go on sharing the large
            factor, of a row for each token, while each has a small one of its own. False leaves them alone.
        retract: keeps the factors, after each optimizer step and with the same product, "balanced" (of equal Gram
            matrices) or "orthonormal" (the rows of the first one); None leaves them to the optimizer.
        method: how factors are found; `"svd"` is the optimal approximation, and `"factorization"` makes a
            `FactorizationCompression` with the other options.
        include: glob patterns over module names; only matching layers are changed. None means all but the output layer,
            in models of three layers or more, and layers whose rank would keep less than three quarters of its share.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing,
            not even fewer multiplications.

    Raises:
        OptionError: two of rank, energy, param_ratio and budget, or a value out of range.

    References:
        Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
        Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014 (scheme 1, by
        channel; scheme 2, spatial).
        Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        2024; we also correct the mean, and with `sequential` fit the outputs, not the weight.
        Nakajima et al., "Global analytic solution of fully-observed variational Bayesian matrix factorization", 2013.

    >>> LowRankCompression(param_ratio=0.25).plan(nn.Sequential(nn.Linear(64, 32))).layers[0].spec["rank"]
    5
    """

    rank: int | Literal["evbmf"] | None = None
    energy: float | None = None
    param_ratio: float | None = None
    budget: dict[str, float] | None = None
    round_to: int = 1
    split: Literal["auto", "channel", "spatial"] = "auto"
    sequential: bool = False
    retract: Literal["balanced", "orthonormal"] | None = None
    method: Literal["svd", "factorization"] = "svd"

    stage = Stage.FACTORIZE
    protects_output = True

    def validate_config(self) -> None:
        super().validate_config()
        name, value = self._target()
        if name == "budget":
            self._check_budget(value)
        elif name != "rank":
            check_share(type(self), name, value)
        elif value != "evbmf":
            check_count(type(self), name, value, low=1)
        check_count(type(self), "round_to", self.round_to, low=1)
        if self.sequential and self.data_aware is False:
            raise OptionError(
                "LowRankCompression: sequential=True fits layers to data, which data_aware=False forbids. Remove one."
            )

    def _check_budget(self, budget: dict[str, float]) -> None:
        if len(budget) != 1 or next(iter(budget)) not in BUDGETS:
            raise OptionError(
                f"LowRankCompression: budget has one entry, one of {', '.join(map(repr, BUDGETS))}, e.g. "
                f'{{"params": 0.5}}; got {budget!r}.'
            )
        check_share(type(self), f"budget[{next(iter(budget))!r}]", next(iter(budget.values())))

    def _target(self) -> tuple[str, Any]:
        given = {"rank": self.rank, "energy": self.energy, "param_ratio": self.param_ratio, "budget": self.budget}
        return one_of(type(self), {"rank": 64}, **given)

    # -- data --------------------------------------------------------------------------------------------------------

    @property
    def needs_samples(self) -> bool:
        return super().needs_samples or self.sequential

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        context = self.with_source(model, context)
        model = self.opened(model, context)
        if self.budget is not None and context.choices is None:
            chosen = self._share_budget(self.budget, model, context)
            context = replace(context, notes={**context.notes, "chosen": chosen})
        return with_retraction(super().plan(model, context), self.retract)

    def _share_budget(
        self, budget: dict[str, float], model: nn.Module, context: CompressionContext
    ) -> dict[str, LayerPlan]:
        samples = context.notes["samples"]
        found: dict[str, list[Candidate]] = {}
        survey = super().plan(model, replace(context, notes={**context.notes, "offers": found}))
        layers = {entry.name: as_torch(model.get_submodule(entry.name)) for entry in survey.layers}
        offers = allowed_offers(layers, found, self.min_saving)
        if samples is None:
            weights, positions = dict.fromkeys(offers, 1 / max(len(offers), 1)), dict.fromkeys(offers, 1)
        else:
            probes = {name: probe_of(layers[name], own, budget) for name, own in offers.items()}
            positions = {name: context.notes["source"].counts.get(name, 1) for name in offers}
            weights = output_weights(model, probes, context.notes["source"].get, samples, context.track)
        return share_budget(budget, layers, offers, positions, weights)

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> LayerPlan | Skip:
        if getattr(layer, "max_norm", None) is not None:
            return Skip(name, "its max_norm renormalizes rows, which factors do not have")
        if "offers" in context.notes:
            context.notes["offers"][name] = self.candidates(name, layer, context)
            return LayerPlan(name, low_rank_spec(layer, 1))
        if "chosen" in context.notes:
            choice = context.notes["chosen"].get(name)
            return choice or Skip(name, f"the budget {self.budget} leaves it as it is")
        kinds = self._kinds(layer)
        target, value = self._target()
        options = (target, value, self.round_to, moments_of(name, context), len(kinds) > 1)
        choices = [choose(layer, kind, *options) for kind in kinds]
        found = [choice for choice in choices if isinstance(choice, Choice)]
        if not found:
            return Skip(name, str(choices[0]))
        best = min(found, key=lambda choice: choice.params if target == "energy" else choice.loss)
        if self.min_saving > 0 and (reason := why_slower(layer, best.kind, best.rank)):
            return Skip(name, reason)
        if target == "param_ratio" and self.round_to == 1:
            reason = self.why_too_coarse(best.params, value, weight_matrix(layer).numel())
            if reason is not None:
                return Skip(name, reason)
        return LayerPlan(name, low_rank_spec(layer, best.rank, best.kind), scratch=best.fit)

    def _kinds(self, layer: nn.Module) -> list[Kind]:
        """The ways to split a layer that are to be compared."""
        kinds = kinds_of(layer)
        if self.split == "spatial":
            return kinds[-1:]
        return kinds[:1] if self.split == "channel" or self._target()[0] == "rank" else kinds

    def choose(
        self, name: str, layer: nn.Module, options: dict[str, Any], context: CompressionContext
    ) -> LayerPlan | Skip:
        return LayerPlan(name, low_rank_spec(layer, options["rank"], find_low_rank_kind(options["kind"])))

    def candidates(self, name: str, module: nn.Module, context: CompressionContext | None) -> list[Candidate]:
        if getattr(module, "max_norm", None) is not None:
            return []
        moments = moments_of(name, context)
        found = [offer for kind in self._kinds(module) for offer in offers(module, kind, self.round_to, moments)]
        return sorted(found, key=lambda candidate: candidate.size_bytes)

    # -- applying ----------------------------------------------------------------------------------------------------

    def apply_with(
        self, samples: Samples, apply: Apply, model: nn.Module, plan: CompressionPlan, context: CompressionContext
    ) -> None:
        if not self.sequential:
            super().apply_with(samples, apply, model, plan, context)
            return
        apply_in_order(apply, model, plan, samples, context)
        tie_factors(model, plan)

    def fill(self, new: LowRankLayer, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        moments = self.note_fit(old, plan, context)
        found = plan.scratch or fit_layer(old, type(new), new.spec["rank"], moments)
        fill_factors(new, old, found.factors)
        if found.shift is not None:
            new.second.bias.add_(found.shift)  # type: ignore[operator]
        # the nearest weight is a projection of W, so ||W - W'||^2 = ||W||^2 - ||S||^2, if that leaves enough digits
        if moments is None and found.loss > 1e-3:
            context.errors[plan.name] = found.loss**0.5

    def expected_error(self, layer: nn.Module, plan: LayerPlan, context: CompressionContext) -> float | None:
        """What the choice of the rank has found, else at most so much, by one random projection.

        None where the factors are fitted to the layer's outputs: the choice then knows the error of those only.
        """
        if moments_of(plan.name, context) is not None:
            return None
        if plan.scratch is not None:
            return float(plan.scratch.loss**0.5)
        return truncation_error_bound(weight_matrix(layer, find_low_rank_kind(plan.spec["kind"])), plan.spec["rank"])

    @property
    def keeps_shapes(self) -> bool:
        return False

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.project_held(model, state, lambda _: True)

    def project_held(self, model: nn.Module, state: dict[str, Any], held: Callable[[Tensor], bool]) -> None:
        if self.retract is not None:
            retract_factors(model, held)

"""Structured pruning: whole channels, neurons and attention heads go, and the model is smaller and faster for it."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, from_rank_zero
from pquant_lightning.core.channels import Group, find_groups
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers
from pquant_lightning.core.compression_method import (
    SPARSE_GRADIENTS,
    CompressionContext,
    CompressionMethod,
    Selection,
    check_weight,
    has_sparse_gradients,
)
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError, known
from pquant_lightning.core.example_sizes import other_sizes
from pquant_lightning.core.layer_adapter import as_torch, layer_spec
from pquant_lightning.core.options import check_count, one_of
from pquant_lightning.core.plan import CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import as_call
from pquant_lightning.core.schedule import scheduled
from pquant_lightning.core.splitting import planned_splits, split_as_planned, split_view
from pquant_lightning.core.structure import Resized, absolute_path, decode_indices, tensor_at
from pquant_lightning.core.surgery import replace_layer
from pquant_lightning.methods.pruning import _importance, _reconstruction
from pquant_lightning.methods.pruning._cost import TARGETS
from pquant_lightning.methods.pruning._sized import (
    CARRIERS,
    Removed,
    Units,
    as_json,
    carrier_of,
    decoded_lengths,
    groups_of,
    remove_channels,
    zero_units,
)
from pquant_lightning.methods.pruning._trial import Trial

log = logging.getLogger(__name__)

_DEFAULT = {"sparsity": 0.5}
_UPDATES = 20  # times that units are chosen between start and end
_TOLERANCE = 0.02  # of a target
_AROUND = 8  # numbers of units looked at on both sides of what a bisection has found
_SCORE_MOMENTUM = 0.05  # taylor scores are averages over about twenty steps


@CompressionMethodRegistry.register("structured_pruning")
class StructuredPruning(CompressionMethod):
    """Removes channels, hidden neurons, attention heads (with their keys and values) and the like, for good.

    What belongs together is found by running the model on an example, at several lengths and batch sizes where it takes
    them (`core/channels.py`), and each group is tried out: the model without some of its units must compute what the
    model computes in which these are zero, in evaluation and training, and by `predict_step` and `generate` where it
    has them. Numbers of the model (heads, widths) are changed only where it needs them to count the units.
    In a Trainer the chosen units are zero from then on, and go when the model is deployed; the model's inputs and
    outputs keep their width. Groups that cannot go are left alone with the reason.

    The example is the first batch of the training data; in `compress_model` without a `train_loader` the
    `example_input_array` of a LightningModule.

    Args:
        sparsity: share of the removable units that go. Default 0.5 where no target is given.
        target: share of the model that is kept instead, {"params": 0.5}, {"macs": 0.5}, or {"latency": 0.5} of the time
            of a forward pass, measured here; the first two are met within 2 %.
        criterion: what makes a unit important, relative to the mean of its group: "l2" and "l1" norms of its weights,
            "bn_scale" |gamma| of its batch norms (l2 where there is none), "fpgm" the sum of distances to the other
            units' weights, "taylor" (sum of g w)^2 over the last steps of the training, "activation" what it adds
            to the outputs of the layers that read it (from data), "random".
        round_to: widths of at least twice this many units stay multiples of it, unless a target asks for more.
        max_sparsity: most of a group's units that can go; one always stays.
        remove: when zero units leave the model: "end", when it is deployed, or "during" training, each time some are
            chosen: training gets faster (single device and DDP).
        reconstruct: the layers that read a group are fitted, by least squares on data, to what they gave before; prunes
            once, at the start of fit.
        recalibrate: batch norms get the statistics that the pruned model has on data; prunes once, at the start of fit.
        num_samples: training samples for "activation", `reconstruct` and `recalibrate`, and what latency is timed on,
            in the batches of the loader.
        schedule: how the number rises between `start` and `end`: "constant" (at once at `start`), "linear", "cubic",
            "cosine", "exponential" or "steps". Default: cubic; constant with `reconstruct` or `recalibrate`.
        start: share of the training at which pruning starts.
        end: share of the training at which the target is reached.
        seed: of the criterion "random".
        include: glob patterns over names of modules and parameters; a group is pruned if one of its own matches. None
            means all.
        exclude: glob patterns over names of modules and parameters (a table of positions, say); a group is left alone
            if one of its own matches.
        min_saving: least share of the model's parameters that must go, else it is an error.

    Raises:
        OptionError: an option out of range, or two that contradict each other.

    References:
        Li et al., "Pruning Filters for Efficient ConvNets", 2017 (l1). Liu et al., "Network Slimming", 2017 (bn_scale).
        He et al., "Filter Pruning via Geometric Median", 2019 (fpgm). Molchanov et al., "Importance Estimation for
        Neural Network Pruning", 2019, equation 8 (taylor). He et al., "Channel Pruning for Accelerating Very Deep
        Neural Networks", 2017, section 3.1 (reconstruct). Fang et al., "DepGraph", 2023 (groups; found otherwise here).

    >>> from pquant_lightning import compress_model
    >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> compress_model(net, "structured_pruning", train_loader=[torch.randn(8, 4)])[0].out_features
    16
    """

    sparsity: float | None = None
    target: dict[str, float] | None = None
    criterion: Literal["l2", "l1", "bn_scale", "fpgm", "taylor", "activation", "random"] = "l2"
    round_to: int = 8
    max_sparsity: float = 0.9
    remove: Literal["end", "during"] = "end"
    reconstruct: bool = False
    recalibrate: bool = False
    num_samples: int = 128
    schedule: Literal["constant", "linear", "cubic", "cosine", "exponential", "steps"] | None = None
    start: float = 0.0
    end: float = 0.5
    seed: int = 0

    stage = Stage.MASK

    # -- options -----------------------------------------------------------------------------------------------------

    def validate_config(self) -> None:
        super().validate_config()
        name = type(self).__name__
        one_of(type(self), _DEFAULT, sparsity=self.sparsity, target=self.target)
        check_count(type(self), "round_to", self.round_to, 1)
        check_count(type(self), "num_samples", self.num_samples, 1)
        for option in ("sparsity", "max_sparsity"):
            value = getattr(self, option)
            if value is not None and not 0 < value < 1:
                raise OptionError(f"{name}: {option} is a share of units that goes, in (0, 1), got {value}.")
        if self.sparsity is not None and self.sparsity > self.max_sparsity:
            raise OptionError(
                f"{name}: sparsity={self.sparsity} of all units cannot go where max_sparsity={self.max_sparsity} is "
                "the most of each group, so that no layer is emptied; raise max_sparsity or lower sparsity."
            )
        if self.target is not None:
            _check_target(name, self.target)
        if not 0 <= self.start <= self.completes_at <= 1:
            raise OptionError(f"{name}: shares of the training, 0 <= start <= end <= 1, got {self.start}, {self.end}.")
        if self._at_once and (self.schedule not in (None, "constant") or self.start > 0 or self.criterion == "taylor"):
            raise OptionError(
                f"{name}: reconstruct and recalibrate prune once, at the start of fit; remove schedule, start and "
                "criterion='taylor'."
            )

    @property
    def _at_once(self) -> bool:
        return self.reconstruct or self.recalibrate

    @property
    def shape_of_schedule(self) -> str:
        """The schedule in force."""
        return self.schedule or ("constant" if self._at_once else "cubic")

    @property
    def completes_at(self) -> float:
        return self.start if self.shape_of_schedule == "constant" else self.end

    @property
    def _from_data(self) -> bool:
        return self._at_once or self.criterion == "activation"

    @property
    def _timed(self) -> bool:
        return self.target is not None and "latency" in self.target

    @property
    def wanted_samples(self) -> int:
        return self.num_samples if self._from_data or self._timed else 2

    @property
    def needs_samples(self) -> bool:
        return True

    @property
    def resizes(self) -> bool:
        return self.remove == "during"

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        context = context or CompressionContext(by=self.name)
        samples = _example(model, context.samples)
        for name, layer in compressed_layers(model).items():
            if layer.stage >= self.stage:
                raise ModelError(
                    f"Layer {name!r} is compressed already ({layer.described()}); channels are removed before that, "
                    "and once: prune the model as it was, with one callback, in the order factorize, prune, quantize."
                )
        for name, module in model.named_modules():
            if (ordinary := as_torch(module)) is not None:
                check_weight(name, ordinary)
        few = samples.few()
        model = split_view(model, context.kept, recurrent=False)
        sizes = replace(few, batches=(*few.batches, *other_sizes(model, few).batches))
        trial = Trial(model, sizes)
        groups, skipped = self._tried(model, sizes, trial, context)
        if not groups and not skipped:
            raise ModelError(
                f"{self.name} finds nothing to remove in {type(model).__name__}: the only channels of its layers are "
                "the inputs and outputs of the model, which keep their width."
            )
        groups, counts = self._together(model, groups, context, few, skipped, trial)
        layers = [
            LayerPlan(_producer(model, units), {"units": units.count, "removes": count, "over": units.modules, **own})
            for units, count, own in zip(groups, counts, _specs(groups), strict=True)
        ]
        touched = [LayerPlan(name, {}) for units in groups for name in units.modules]
        splits = planned_splits(model, touched, context.by)
        return CompressionPlan(self.name, context.by, tuple(layers), tuple(skipped), splits)

    def _tried(
        self, model: nn.Module, sizes: Samples, trial: Trial, context: CompressionContext
    ) -> tuple[list[Units], list[Skip]]:
        """The groups of channels that the model can do without, each for itself, and those left alone."""
        chosen = Selection(self, model, parameters=True)
        traced = replace(sizes, batches=sizes.batches[:2])
        found = [(_units(group), group.fixed) for group in find_groups(model, traced)]
        tried: list[Units | Skip] = []
        for units, fixed in context.track(found, f"{self.name}: trying out"):
            result = fixed or _why_left(model, units, chosen) or trial.of(units)
            tried.append(Skip(_described(model, units), result, context.by) if isinstance(result, str) else result)
        return [u for u in tried if isinstance(u, Units)], [skip for skip in tried if isinstance(skip, Skip)]

    def _together(
        self,
        model: nn.Module,
        groups: list[Units],
        context: CompressionContext,
        example: Samples,
        skipped: list[Skip],
        trial: Trial,
    ) -> tuple[list[Units], list[int]]:
        """The groups that can go beside each other, and how many units of each; the others are noted as skipped."""
        while groups:
            counts = self._planned(model, groups, context, example, skipped)
            # removal during training passes through numbers that are not rounded
            tried = [max(1, units.count // 3) for units in groups] if self.resizes else counts
            reasons = trial.together(groups, tried)
            if not any(reasons):
                return groups, counts
            groups, left = [], groups
            for units, why in zip(left, reasons, strict=True):
                again = units if why is None else trial.of(replace(units, follow={}, lengths={}), thorough=True)
                if isinstance(again, str) or (why is not None and again == units):
                    skipped.append(Skip(_described(model, units), str(why), context.by))
                else:
                    groups.append(again)
        return [], []

    def _planned(
        self, model: nn.Module, groups: list[Units], context: CompressionContext, example: Samples, skipped: list[Skip]
    ) -> list[int]:
        """How many units each group is to lose: the least important of all, as the weights are now."""
        if self.criterion == "activation" and context.samples is not None:
            found = _importance.activation(model, [units.parts for units in groups], context.samples)
        else:
            measure = _importance.OF_WEIGHTS.get(self.criterion, _importance.l2)
            found = [measure(model, units.parts) for units in groups]
        scores = [_relative(score) for score in found]

        def chosen(drop: int, rounded: bool = True) -> list[int]:
            caps = [min(int(self.max_sparsity * units.count), units.count - 1) for units in groups]
            counts = _importance.lowest(scores, drop, caps)
            pairs = zip(groups, counts, caps, strict=True)
            return [self._rounded(units.count, count, cap) if rounded else count for units, count, cap in pairs]

        def units_of(counts: list[int]) -> Removed:
            return [_lowest_units(score, count) for score, count in zip(scores, counts, strict=True)]

        total = sum(units.count for units in groups)
        if self.target is None:
            counts = chosen(round((self.sparsity or _DEFAULT["sparsity"]) * total))
        else:
            ((name, wanted),) = self.target.items()
            timed = name == "latency"  # on as many samples as there are
            kept = TARGETS[name](model, groups, (context.samples or example) if timed else example)
            tolerance = 0.1 if timed else _TOLERANCE
            counts, reached = _meet(wanted, total, chosen, lambda counts: kept(units_of(counts)), tolerance)
            if reached > wanted * (1 + tolerance):
                left = "\n".join(f"  {skip.name}: {skip.reason}" for skip in skipped) or "  nothing"
                raise ModelError(
                    f"{self.name} cannot keep as little as {wanted:.1%} of the {name}: with "
                    f"max_sparsity={self.max_sparsity}, {reached:.1%} are left. Left alone:\n{left}"
                )
        saved = 1 - TARGETS["params"](model, groups, example)(units_of(counts))
        if saved < self.min_saving:
            raise ModelError(
                f"{self.name} would remove {saved:.1%} of the parameters, less than min_saving={self.min_saving:.0%}. "
                "Ask for more, or lower round_to or min_saving."
            )
        return counts

    def _rounded(self, units: int, count: int, cap: int) -> int:
        """A number of units to remove that leaves a multiple of `round_to`, where there are enough of them."""
        if units < 2 * self.round_to:
            return count
        kept = max(round((units - count) / self.round_to), 1) * self.round_to
        while units - kept > cap:
            kept += self.round_to
        return max(units - kept, 0)

    # -- applying ----------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        context = context or CompressionContext(by=plan.by)
        split_as_planned(model, plan.splits)
        groups = [_planned_units(entry) for entry in plan.layers]
        name = _carrier_name(model, groups)
        group = {
            "by": plan.by,
            **as_json(name, groups),
            "removed": [[] for _ in groups],
            "counts": [entry.spec["units"] for entry in plan.layers],
            "removes": [entry.spec["removes"] for entry in plan.layers],
            "tensors": {},
            "attributes": {},
        }
        carrier = model.get_submodule(name)
        spec = {"kind": CARRIERS[type(carrier)].kind, "by": plan.by, "layer": layer_spec(carrier), "group": group}
        replace_layer(model, name, CompressedLayer.build(spec, carrier))
        self.attach(model, context.state)
        shown = ", ".join(f"{e.name} {e.spec['removes']} of {e.spec['units']}" for e in plan.layers[:12])
        more = f" and {len(plan.layers) - 12} more groups" if len(plan.layers) > 12 else ""
        log.info("%s: units to go by group: %s%s.", self.name, shown, more)

    def attach(self, model: nn.Module, state: dict[str, Any]) -> None:
        found = carrier_of(model)
        if found is None or state.get("removed") == found[1].spec["group"]["removed"]:
            return
        group = found[1].spec["group"]  # the state may be that of another model
        gone = sum(group["counts"]) - sum(units.count for units in groups_of(model)) + sum(map(len, group["removed"]))
        state.clear()
        state.update(level=min(1.0, gone / max(1, sum(group["removes"]))), removed=group["removed"], scores=[])
        if gone and not any(group["removed"]):
            log.info("%s: %d units have left the model already; they stay away.", self.name, gone)

    @property
    def steering(self) -> frozenset[str]:
        return frozenset({"schedule", "start", "end", "criterion", "reconstruct", "recalibrate", "num_samples", "seed"})

    def applied_to(self, model: nn.Module, state: dict[str, Any], by: str) -> bool:
        found = carrier_of(model)
        return found is not None and found[1].spec["group"]["by"] == by

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        if not self._from_data:
            return
        if context.samples is None:
            raise CalibrationError(
                f"{self.name} with criterion='activation', reconstruct or recalibrate looks at data: give "
                "compress_model a train_loader (a loader, a list of batches or a datamodule)."
            )
        state = context.state
        if self.criterion == "activation":
            scores = _importance.activation(model, [units.parts for units in groups_of(model)], context.samples)
            state["scores"] = [score.cpu() for score in scores]
        if self._at_once:
            removed = from_rank_zero(self._choose(model, state, 1.0), context.samples)
            if self.reconstruct:
                _reconstruction.reconstruct(model, groups_of(model), removed, context.samples)
            self._mark(model, state, removed, 1.0)
            if self.recalibrate:
                _reconstruction.recalibrate(model, context.samples)

    # -- training ----------------------------------------------------------------------------------------------------

    def observe(self, model: nn.Module, state: dict[str, Any]) -> None:
        if self.criterion != "taylor" or not state or state["level"] >= 1:
            return
        groups = [units.parts for units in groups_of(model)]
        found = [_importance.saliency(model, parts).cpu() for parts in groups]
        if state["scores"]:
            seen = [any(tensor_at(model, name).grad is not None for name, _, _ in parts) for parts in groups]
            pairs = zip(state["scores"], found, seen, strict=True)
            found = [old.lerp(new, _SCORE_MOMENTUM) if fresh else old for old, new, fresh in pairs]
        state["scores"] = found

    def step(self, model: nn.Module, state: dict[str, Any], progress: float) -> list[Resized]:
        if not state:
            return []
        end = self.completes_at
        if self.start < progress < end:
            part = (end - self.start) / _UPDATES
            progress = self.start + math.floor((progress - self.start) / part) * part
        level = scheduled(self.shape_of_schedule, progress, 1.0, start=self.start, end=end)
        if level <= state["level"] or (self.criterion == "taylor" and not state["scores"]):
            return []
        self._mark(model, state, self._choose(model, state, level), level)
        if level == 1:
            log.info("%s", self._summary(model, state))
        return self._shrink(model, state) if self.resizes else []

    def _mark(self, model: nn.Module, state: dict[str, Any], removed: Removed, level: float) -> None:
        state.update(removed=removed, level=level)
        self.project(model, state)

    def _shrink(self, model: nn.Module, state: dict[str, Any]) -> list[Resized]:
        scores = []
        for score, gone in zip(state["scores"], state["removed"], strict=False):
            left = torch.ones(len(score), dtype=torch.bool).index_fill(0, torch.tensor(gone, dtype=torch.long), False)
            scores.append(score[left])
        resized = remove_channels(model)
        state.update(removed=[[] for _ in state["removed"]], scores=scores)
        return resized

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.project_held(model, state, lambda _: True)

    def project_held(self, model: nn.Module, state: dict[str, Any], held: Callable[[Tensor], bool]) -> None:
        found = carrier_of(model)
        if not state or found is None:
            return
        carrier = found[1]
        group = carrier.spec["group"]
        if group["removed"] != state["removed"]:
            carrier.spec = {**carrier.spec, "group": {**group, "removed": state["removed"]}}
        zero_units(model, state["removed"], held)

    def metrics(self, model: nn.Module, state: dict[str, Any]) -> dict[str, float]:
        found = carrier_of(model)
        if not state or found is None:
            return {}
        left = sum(units.count for units in groups_of(model)) - sum(map(len, state["removed"]))
        return {"channel_sparsity": 1 - left / sum(found[1].spec["group"]["counts"])}

    def levels(self) -> list[CompressionMethod]:
        shares = [share for share in (0.25, 0.5, 0.75) if share <= self.max_sparsity]
        return [replace(self, sparsity=share, target=None) for share in shares]

    @classmethod
    def finalize(cls, model: nn.Module) -> None:
        remove_channels(model)

    def compress_in_place(
        self, model: nn.Module, samples: Samples | None = None, context: CompressionContext | None = None
    ) -> None:
        if self.criterion == "taylor":
            raise ModelError(
                "criterion='taylor' needs the gradients of a training: use StructuredPruningCallback in a Trainer, or "
                "another criterion."
            )
        super().compress_in_place(model, samples, context)

    def _summary(self, model: nn.Module, state: dict[str, Any]) -> str:
        share = self.metrics(model, state)["channel_sparsity"]
        how = "are gone" if self.resizes else "are zero, and go when the model is deployed"
        return f"{self.name}: {share:.1%} of the removable units {how}."

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _choose(self, model: nn.Module, state: dict[str, Any], level: float) -> Removed:
        """The units to be zero at a level of the schedule, in [0, 1]: those that are, and the least important ones."""
        found = carrier_of(model)
        assert found is not None
        group, removed = found[1].spec["group"], []
        for place, units in enumerate(groups_of(model)):
            count = round(level * group["removes"][place]) - (group["counts"][place] - units.count)
            old = torch.tensor(state["removed"][place], dtype=torch.long)
            score = self._score(model, units, state, place).cpu().index_fill(0, old, -torch.inf)
            removed.append(_lowest_units(score, max(count, len(old))))
        return removed

    def _score(self, model: nn.Module, units: Units, state: dict[str, Any], place: int) -> Tensor:
        if self.criterion == "random":
            return torch.rand(units.count, generator=torch.Generator().manual_seed(self.seed * 7919 + place))
        if self.criterion in _importance.OF_WEIGHTS:
            return _importance.OF_WEIGHTS[self.criterion](model, units.parts)
        scores: list[Tensor] = state["scores"]
        return scores[place]


def _check_target(name: str, target: dict[str, float]) -> None:
    for key, value in target.items():
        if key not in TARGETS:
            raise OptionError(f"{name} has no target {key!r}. {known(key, TARGETS)}")
        if not 0 < value < 1:
            raise OptionError(f"{name}: a target is a share that is kept, in (0, 1), got {value}.")
    if len(target) != 1:
        raise OptionError(f"{name} takes one target, got {target}.")


def _example(model: nn.Module, samples: Samples | None) -> Samples:
    example = getattr(model, "example_input_array", None)
    if samples is None and example is None:
        raise CalibrationError(
            "structured_pruning runs the model once, to see which channels belong together: give compress_model a "
            "train_loader (or [batch]), or the LightningModule an example_input_array."
        )
    return samples or Samples(((example,) if isinstance(example, Tensor) else example,), _run_example)


def _run_example(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_call(example)
    return model(*args, **kwargs)


def _units(group: Group) -> Units:
    parts = [
        (name, dim, torch.from_numpy(indices))
        for (name, dim), indices in zip(group.tensors, group.indices, strict=True)
    ]
    return Units(tuple(parts), {}, {})


def _described(model: nn.Module, units: Units) -> str:
    """What the units are, by the layers that hold them; a parameter of no layer of torch's by its own name."""
    names = [name for name, _, _ in units.parts]
    plain = {name for name in names if type(_owner(model, name)).__module__.startswith("torch.nn.")}
    shown = list(dict.fromkeys(name.rpartition(".")[0] if name in plain else name for name in names))
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"{units.count} channels of {', '.join(shown[:4])}{more}"


def _owner(model: nn.Module, tensor: str) -> nn.Module:
    return model.get_submodule(tensor.rpartition(".")[0])


def _why_left(model: nn.Module, units: Units, chosen: Selection) -> str | None:
    reasons = [chosen(name) for name, _, _ in units.parts]
    if excluded := next((reason for reason in reasons if reason and "excluded" in reason), None):
        return excluded
    if all(reasons):
        return reasons[0]
    if sparse := next((name for name, _, _ in units.parts if has_sparse_gradients(_owner(model, name))), None):
        return f"{sparse.rpartition('.')[0]}: {SPARSE_GRADIENTS}"
    for name, layer in compressed_layers(model).items():
        inside = [module == name or module.startswith(f"{name}.") for module in units.modules]
        if layer.stage is not Stage.UNFUSE and (all(inside) or (any(inside) and not layer.resizable)):
            fixed = "" if layer.resizable else ", which cannot lose channels: prune before, or merge it first"
            return f"is inside {name} ({layer.described()}){fixed}"
    return "they go together or not at all" if units.count < 2 else None


def _specs(groups: list[Units]) -> list[dict[str, Any]]:
    json = as_json("", groups)
    return [dict(zip(json, values, strict=True)) for values in zip(*json.values(), strict=True)]


def _planned_units(entry: LayerPlan) -> Units:
    parts = [
        (absolute_path("", p["tensor"]), p["dim"], torch.tensor(decode_indices(p["indices"])))
        for p in entry.spec["parts"]
    ]
    follow = {absolute_path("", path): names for path, names in entry.spec["follow"].items()}
    return Units(tuple(parts), follow, decoded_lengths("", entry.spec.get("lengths")))


def _producer(model: nn.Module, units: Units) -> str:
    """The module that makes the group's channels: the first, as defined, whose weight has them as rows."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    rows = [name.rpartition(".")[0] for name, dim, _ in units.parts if dim == 0 and tensor_at(model, name).dim() > 1]
    return min(rows or units.modules, key=lambda name: order[name])


def _carrier_name(model: nn.Module, groups: list[Units]) -> str:
    """The layer whose spec is to hold the groups: one of their own, outside of compressed layers if there is one."""
    layers = compressed_layers(model)
    inside = tuple(f"{name}." for name in layers)
    closed = tuple(f"{name}." for name, layer in layers.items() if not (layer.resizable or layer.stage is Stage.UNFUSE))
    own = [name for units in groups for name in units.modules]
    everywhere = [name for name in [*own, *dict(model.named_modules())] if name and not name.startswith(closed)]
    names = [name for name in everywhere if type(model.get_submodule(name)) in CARRIERS]
    if not names:
        raise ModelError(
            f"{type(model).__name__} holds no Linear, Conv, ConvTranspose or Embedding layer that could say in its "
            "checkpoints which channels are gone."
        )
    return next((name for name in names if not name.startswith(inside)), names[0])


def _relative(score: Tensor) -> Tensor:
    """Importance relative to the group's mean."""
    mean = score.mean()
    return score / mean if mean > 0 else score


def _lowest_units(score: Tensor, count: int) -> list[int]:
    chosen: list[int] = score.argsort(stable=True)[:count].sort().values.tolist()
    return chosen


def _meet(
    wanted: float, total: int, chosen: Any, kept: Callable[[list[int]], float], tolerance: float
) -> tuple[list[int], float]:
    """The counts that keep a share close to `wanted`, and that share: rounded ones where they are close enough.

    A bisection, though the share does not fall with every unit (one costs more than another): then what lies around.
    Where nothing is close enough, the largest share below `wanted`; where there is none, the least that can be kept.
    """
    seen: dict[tuple[int, ...], float] = {}

    def share(drop: int, rounded: bool) -> float:
        counts = tuple(chosen(drop, rounded))
        if counts not in seen:
            seen[counts] = kept(list(counts))
        return seen[counts]

    for rounded in (True, False):
        low, high = 0, total
        while high - low > max(1, total // 256):
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle, rounded) > wanted else (low, middle)
        step = max(1, total // 512)
        for drop in range(max(low - _AROUND * step, 0), min(high + _AROUND * step, total) + 1, step):
            if abs(share(drop, rounded) / wanted - 1) <= tolerance:
                break
        best = min(seen, key=lambda counts: abs(seen[counts] - wanted))
        if abs(seen[best] / wanted - 1) <= tolerance:
            return list(best), seen[best]
    share(total, False)
    below = [counts for counts in seen if seen[counts] <= wanted]
    best = max(below, key=lambda counts: seen[counts]) if below else min(seen, key=lambda counts: seen[counts])
    return list(best), seen[best]

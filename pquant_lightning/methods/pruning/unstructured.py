"""Unstructured pruning: the least important weights are zero from some point of the training on, and stay zero."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pquant_lightning.core.attention import PROJECTIONS
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers, weight_of
from pquant_lightning.core.compression_method import (
    CompressionContext,
    CompressionMethod,
    Selection,
    check_patterns,
    check_weight,
    matches,
)
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError, known, named
from pquant_lightning.core.graph import outer_layers
from pquant_lightning.core.layer_adapter import SUPPORTED, as_torch, why_unsupported
from pquant_lightning.core.options import check_count, one_of
from pquant_lightning.core.plan import CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.schedule import scheduled
from pquant_lightning.core.structure import whole
from pquant_lightning.methods.pruning import _masks, _second_order
from pquant_lightning.methods.pruning._layout import Layout, layout_of
from pquant_lightning.methods.pruning._selection import (
    LEAST_DENSITY,
    check_finite,
    keep_largest,
    keep_largest_in_rows,
    most_dropped,
)

log = logging.getLogger(__name__)

_GRADIENT = ("snip", "taylor", "movement")
_DATA = ("wanda", "sparsegpt")
_PER_LAYER = ("sparsity", "pattern")
_DEFAULT = {"sparsity": 0.5}
_SCORE_MOMENTUM = 0.05  # gradient scores are averages over about twenty steps
_UPDATES = 100  # in a training, where no interval is given


@CompressionMethodRegistry.register("unstructured_pruning")
class UnstructuredPruning(CompressionMethod):
    """Sets the least important weights to zero along a schedule, and holds them there.

    Parameters keep their names and shapes: a checkpoint loads into the plain model with plain Lightning. The masks are
    part of the callback's state (one bit per weight). Left alone unless `include` names them: embeddings, the first and
    the last layer; always: biases, norms, and of layers that wrap another one (adapters) their own small factors and a
    frozen inner layer.

    `compress_model` prunes at once. It cannot use the criteria that need gradients (snip, taylor, movement).

    Args:
        sparsity: share of the prunable weights that is zero in the end, absolute: 0.9 after ten epochs is 0.9. Default
            0.5 where no pattern is given.
        pattern: "N:M", N of any M successive weights along a layer's inputs stay, e.g. "2:4"; it fixes the sparsity.
            Along the inputs means: of one output, at one place of a convolution's kernel, within its group; of an
            embedding, within each vector.
        criterion: what makes a weight important: "magnitude" |w|; "random"; "snip" |g w| and "taylor" (g w)^2, averaged
            over the last steps; "movement" -sum of g w over all steps; from data "wanda" |w| ||x|| within each output,
            and "sparsegpt", which also corrects the weights that stay and prunes once, at the start of fit.
        scope: "global" ranks all weights together, "layer" within each layer. Default: global; layer for wanda (within
            each output, which keeps at least one weight) and sparsegpt. No layer is left with less than a tenth of the
            average density, and none is emptied.
        block_size: (outputs, inputs) of the blocks that are kept or dropped whole, by their mean score; None = single
            weights.
        schedule: how the sparsity rises between `start` and `end`: "constant" (at once at `start`), "linear", "cubic",
            "cosine", "exponential" or "steps" (four equal jumps). Default: cubic; constant for sparsegpt.
        start: share of the training at which pruning starts.
        end: share of the training at which `sparsity` is reached (by "constant" it is reached at `start`).
        interval: how often masks are chosen anew: "epoch", at the start of each, or a number of optimizer steps. None =
            a hundred times between `start` and `end`.
        rewind: lottery tickets: whenever the masks change, all parameters go back to what they were at this share of
            the training (0 = the start); use it with schedule="steps". None = off.
        overrides: other `sparsity` or `pattern` by glob pattern over module names; such layers are ranked by
            themselves.
        num_samples: training samples for wanda and sparsegpt.
        seed: of the criterion "random".
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: an option out of range, or two that contradict each other.
        ModelError: when masks are chosen, weights or scores are NaN or infinite.

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017 (schedule). Lee et al., "SNIP", 2019. Molchanov et al.,
        "Importance Estimation for Neural Network Pruning", 2019. Sanh et al., "Movement Pruning", 2020. Sun et al., "A
        Simple and Effective Pruning Approach for Large Language Models", 2023 (Wanda). Frantar and Alistarh,
        "SparseGPT", 2023. Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019. We differ from SNIP, which scores
        one batch at the start, in that scores are averages of the steps before each choice.

    >>> from pquant_lightning import compress_model
    >>> net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    >>> int((compress_model(net, "unstructured_pruning", sparsity=0.75)[1].weight == 0).sum())
    3072
    """

    sparsity: float | None = None
    pattern: str | None = None
    criterion: Literal["magnitude", "random", "snip", "taylor", "movement", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["global", "layer"] | None = None
    block_size: tuple[int, int] | None = None
    schedule: Literal["constant", "linear", "cubic", "cosine", "exponential", "steps"] | None = None
    start: float = 0.0
    end: float = 0.7
    interval: Literal["epoch"] | int | None = None
    rewind: float | None = None
    overrides: dict[str, dict[str, Any]] | None = None
    num_samples: int = 128
    seed: int = 0

    stage = Stage.MASK
    keeps_ties = True

    # -- options -----------------------------------------------------------------------------------------------------

    def validate_config(self) -> None:
        super().validate_config()
        one_of(type(self), _DEFAULT, sparsity=self.sparsity, pattern=self.pattern)
        _check_target("", {"sparsity": self.sparsity, "pattern": self.pattern})
        check_count(type(self), "num_samples", self.num_samples, 1)
        if isinstance(self.interval, int):
            check_count(type(self), "interval", self.interval, 1)
        if self.block_size is not None and min(self.block_size) < 1:
            raise OptionError(f"UnstructuredPruning: block_size is (outputs, inputs), got {self.block_size}.")
        if not 0 <= self.start <= self.completes_at <= 1:
            raise OptionError(
                f"UnstructuredPruning: shares of the training, 0 <= start <= end <= 1, got {self.start}, {self.end}."
            )
        if self.rewind is not None and not 0 <= self.rewind <= self.completes_at:
            raise OptionError(
                f"UnstructuredPruning: rewind is a share of the training up to the last masks, got {self.rewind}."
            )
        if self.criterion in _DATA and (self.scope == "global" or self.block_size is not None):
            raise OptionError(
                f"UnstructuredPruning: {self.criterion} compares weights of one layer one by one; remove "
                "scope='global' and block_size."
            )
        if self.criterion == "sparsegpt" and (self.schedule not in (None, "constant") or self.start > 0):
            raise OptionError(
                "UnstructuredPruning: sparsegpt prunes once, at the start of fit; remove schedule and start, or use "
                "criterion='wanda'."
            )
        if self.block_size is not None and self.pattern is not None:
            raise OptionError("UnstructuredPruning: block_size goes with sparsity; pattern has a structure of its own.")
        for pattern, options in (self.overrides or {}).items():
            for option in options:
                if option not in _PER_LAYER:
                    raise OptionError(f"overrides[{pattern!r}] has no option {option!r}. {known(option, _PER_LAYER)}")
            if len(options) != 1:
                raise OptionError(f"overrides[{pattern!r}] takes one of {', '.join(_PER_LAYER)}, got {options}.")
            _check_target(f"overrides[{pattern!r}]: ", options)

    @property
    def wanted_samples(self) -> int:
        return self.num_samples if self.criterion in _DATA else 0

    @property
    def needs_samples(self) -> bool:
        return self.criterion in _DATA

    @property
    def shape_of_schedule(self) -> str:
        """The schedule in force."""
        return self.schedule or ("constant" if self.criterion == "sparsegpt" else "cubic")

    @property
    def completes_at(self) -> float:
        return self.start if self.shape_of_schedule == "constant" else self.end

    @property
    def steps_between(self) -> int | None:
        return None if self.interval == "epoch" else self.interval or 0

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        context = context or CompressionContext(by=self.name)
        check_patterns(model, "overrides", self.overrides or {})
        chosen, ends = Selection(self, model), outer_layers(model)
        layers: list[LayerPlan] = []
        skipped: list[Skip] = []
        owners: dict[int, str] = {}
        closed: list[str] = []
        wrapped: list[str] = []
        for name, module in model.named_modules():
            if any(name.startswith(f"{prefix}.") for prefix in closed):
                continue
            if isinstance(module, CompressedLayer) and module.wraps is not None and module.stage <= self.stage:
                wrapped.append(f"{name}.{module.wraps}" if name else module.wraps)
                skipped.append(
                    Skip(name, chosen(name) or f"its own weights ({module.described()}) are few", context.by)
                )
                continue
            if isinstance(module, CompressedLayer) and module.stage > self.stage:
                closed.append(name)
                skipped.append(Skip(name, f"already compressed ({module.described()})", context.by))
                continue
            weights = _weights(module)
            reason = why_unsupported(module) if not weights else chosen(name)
            if weights and reason is None and any(f"{name}.".startswith(f"{prefix}.") for prefix in wrapped):
                reason = _why_not_wrapped(weights)
            if weights and reason is None:
                reason = self._why_left(name, module, weights, owners, ends)
            spec = self._spec(name)
            if weights and reason is None:
                reason = self._why_unfit(module, weights, spec)
            for weight in weights.values():
                owners.setdefault(id(weight), name)
            if reason is not None:
                skipped.append(Skip(name or type(module).__name__, reason, context.by))
            elif weights:
                layers.append(LayerPlan(name, {"parameters": list(weights), **spec}))
        return CompressionPlan(self.name, context.by, tuple(layers), tuple(skipped))

    def _spec(self, name: str) -> dict[str, Any]:
        option, value = one_of(type(self), _DEFAULT, sparsity=self.sparsity, pattern=self.pattern)
        own = next((options for p, options in (self.overrides or {}).items() if matches(name, p)), None)
        target = {**dict.fromkeys(_PER_LAYER), **({option: value} if own is None else own)}
        by_itself = own is not None or self.criterion in _DATA or target["pattern"] is not None
        scope = "layer" if by_itself else self.scope or "global"
        return {**target, "scope": scope, "block_size": None if self.block_size is None else list(self.block_size)}

    def _why_left(
        self, name: str, module: nn.Module, weights: dict[str, nn.Parameter], owners: dict[int, str], ends: set[str]
    ) -> str | None:
        ordinary = as_torch(module)
        if isinstance(ordinary, nn.Embedding) and self.include is None:
            return "an embedding: name it in include to prune it"
        if name in ends and self.include is None:
            return "the first or the last layer: name it in include to prune it"
        if ordinary is not None and (reason := check_weight(name, ordinary, trains_on=True)):
            return reason
        if shared := [owners[id(weight)] for weight in weights.values() if id(weight) in owners]:
            return f"shares its weight with {shared[0]!r}"
        if self.criterion in _GRADIENT and not any(weight.requires_grad for weight in weights.values()):
            return f"is frozen, and {self.criterion} needs gradients"
        return None

    def _why_unfit(self, module: nn.Module, weights: dict[str, nn.Parameter], spec: dict[str, Any]) -> str | None:
        if self.criterion in _DATA and not _second_order.covers(module):
            return f"{self.criterion} does not cover {type(module).__name__}"
        for weight in weights.values():
            sparsity = _target(spec, 1.0)
            saving = sparsity - 1 / (8 * weight.element_size())
            if sparsity == 0:
                return "sparsity 0 leaves it as it is"
            if self.min_saving > 0 and saving < self.min_saving:
                return f"a file with {sparsity:.0%} zeros would save {max(saving, 0.0):.0%}"
            layout = layout_of(module, weight)
            if layout is None and (spec["pattern"] or spec["block_size"] or self.criterion in _DATA):
                return "its adapter holds its weight in another order, and nothing tells which are its inputs"
            inputs = 0 if layout is None else layout.to_product(weight).shape[3]
            if spec["pattern"] is not None and inputs % _pattern(spec["pattern"])[1]:
                return f"its {inputs} inputs are no multiple of the pattern {spec['pattern']}"
            if layout is not None and spec["block_size"] is not None:
                rows = layout.to_rows(weight)
                if any(n % b for n, b in zip(rows.shape, spec["block_size"], strict=True)):
                    return f"its shape {tuple(weight.shape)} is no multiple of the blocks {spec['block_size']}"
            if int(sparsity * weight.numel()) >= weight.numel():
                return "would be emptied"
        return None

    # -- applying ----------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        context = context or CompressionContext(by=self.name)
        targets = {}
        for entry in plan.layers:
            module = model.get_submodule(entry.name)
            for attribute in entry.spec["parameters"]:
                module.get_parameter(attribute)
                targets[f"{entry.name}.{attribute}" if entry.name else attribute] = entry.spec
        context.state.update(targets=targets, level=0.0, scores={}, norms={}, origin={}, masks={})
        pruned = {name: model.get_parameter(name) for name in targets}
        context.state["masks"] = _masks.packed(_masks.of_zeros(pruned))  # what has been pruned before stays
        context.state["turned"] = [name for name in targets if _layout(model, name) == _TURNED]

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        if self.criterion not in _DATA:
            return
        if context.samples is None:
            raise CalibrationError(
                f"unstructured_pruning with criterion={self.criterion!r} looks at the inputs of the layers: give "
                "compress_model a train_loader (a loader, a list of batches or a datamodule), or use another criterion."
            )
        state = context.state
        layers = {name.rpartition(".")[0]: name for name in state["targets"]}
        if self.criterion == "wanda":
            norms = _second_order.squared_input_norms(model, list(layers), context.samples)
            state["norms"] = {layers[name]: norm for name, norm in norms.items()}
            missed = [parameter for name, parameter in layers.items() if name not in norms]
        else:
            drops = {
                name: (_target(spec, 1.0), spec["pattern"] and _pattern(spec["pattern"]))
                for name, spec in state["targets"].items()
            }
            missed = _second_order.prune_with_correction(model, drops, context.samples)
            state.update(level=1.0, masks=None)
        if missed:
            log.warning("Calibration never reached %s: left dense.", named(name.rpartition(".")[0] for name in missed))
        for name in missed:
            del state["targets"][name]

    @property
    def steering(self) -> frozenset[str]:
        when = {"schedule", "start", "end", "interval", "rewind"}
        return frozenset({"sparsity", "criterion", "scope", "num_samples", "seed", *when})

    def applied_to(self, model: nn.Module, state: dict[str, Any], by: str) -> bool:
        parameters = dict(model.named_parameters())
        if not state:
            return self._find_zeros(model, state)
        if not all(name in parameters for name in state["targets"]):
            return False
        _follow_turned(model, state)
        masks = _masks.live(model, state)
        return all(bool((_masks.local(parameters[name]) * (1 - mask) == 0).all()) for name, mask in masks.items())

    def _find_zeros(self, model: nn.Module, state: dict[str, Any]) -> bool:
        """Takes the masks of an earlier fit from the zeros of layers that a later method holds by now."""
        weights = {
            f"{name}.{own}": parameter
            for name, layer in compressed_layers(model).items()
            if layer.stage > self.stage and not layer.deployed
            for own, parameter in _weights(layer).items()
        }
        masks = _masks.of_zeros(weights)
        if not masks:
            return False
        targets = {name: self._spec(name.rpartition(".")[0]) for name in masks}
        state.update(targets=targets, level=1.0, scores={}, norms={}, origin={}, masks=_masks.packed(masks))
        return True

    # -- training ----------------------------------------------------------------------------------------------------

    def observe(self, model: nn.Module, state: dict[str, Any]) -> None:
        if self.criterion not in _GRADIENT or not state or state["level"] >= 1:
            return
        with torch.no_grad():
            for name in state["targets"]:
                weight = model.get_parameter(name)
                if weight.grad is None:
                    continue
                if _masks.is_sharded(weight):
                    raise ModelError(f"criterion={self.criterion!r} does not work on sharded weights; use magnitude.")
                product = weight.detach().float() * weight.grad.float()
                if name not in state["scores"]:
                    state["scores"][name] = torch.zeros_like(product)
                score = state["scores"][name]
                if self.criterion == "movement":
                    score.sub_(product)
                else:
                    score.lerp_(product.abs() if self.criterion == "snip" else product.square(), _SCORE_MOMENTUM)

    def step(self, model: nn.Module, state: dict[str, Any], progress: float) -> None:
        if not state:
            return
        _follow_turned(model, state)
        if self.rewind is not None and not state["origin"] and progress >= self.rewind:
            state["origin"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        end = self.completes_at
        if self.interval is None and self.start < progress < end:
            part = (end - self.start) / _UPDATES
            progress = self.start + math.floor((progress - self.start) / part) * part
        level = scheduled(self.shape_of_schedule, progress, 1.0, start=self.start, end=end)
        if level <= state["level"] or (self.criterion in _GRADIENT and not state["scores"]):
            return
        with torch.no_grad():
            masks = self._choose(model, state, level)
            _masks.store(model, state, masks)
            for name, value in state["origin"].items():
                model.get_parameter(name).copy_(value)
        state["level"] = level
        self.project(model, state)
        if level == 1:
            state.update(scores={}, norms={}, origin={})
            log.info("%s", self._summary(model, state))

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.project_held(model, state, lambda _: True)

    def project_held(self, model: nn.Module, state: dict[str, Any], held: Callable[[Tensor], bool]) -> None:
        if not state:
            return
        with torch.no_grad():
            for name, mask in _masks.live(model, state).items():
                if held(weight := model.get_parameter(name)):
                    _masks.local(weight).mul_(mask)

    def kept_whole(self, model: nn.Module, state: dict[str, Any]) -> frozenset[str]:
        """Those that a cut would go through the blocks of."""

        def cut(name: str, block: Sequence[int] | None) -> bool:
            if block is None or not name.endswith("in_proj_weight"):
                return False
            return model.get_parameter(name).shape[0] % (block[0] * len(PROJECTIONS)) != 0

        return frozenset(name for name, spec in state.get("targets", {}).items() if cut(name, spec["block_size"]))

    def follow_split(self, model: nn.Module, state: dict[str, Any], parts: Mapping[str, Sequence[str]]) -> None:
        if state:
            _masks.split(model, state, parts)

    def metrics(self, model: nn.Module, state: dict[str, Any]) -> dict[str, float]:
        if not state:
            return {}
        weights = [model.get_parameter(name) for name in state["targets"]]
        zeros = sum(int((mask == 0).sum()) for mask in _masks.live(model, state).values())
        total = sum(p.numel() for p in model.parameters())
        return {"sparsity": zeros / max(sum(w.numel() for w in weights), 1), "model_sparsity": zeros / max(total, 1)}

    def levels(self) -> list[CompressionMethod]:
        return [] if self.pattern is not None else [replace(self, sparsity=share) for share in (0.5, 0.75, 0.9)]

    def compress_in_place(
        self, model: nn.Module, samples: Samples | None = None, context: CompressionContext | None = None
    ) -> None:
        if self.criterion in _GRADIENT:
            raise ModelError(
                f"criterion={self.criterion!r} needs the gradients of a training: use PruningCallback in a Trainer, or "
                "one of magnitude, random, wanda, sparsegpt."
            )
        super().compress_in_place(model, samples, context)

    def _summary(self, model: nn.Module, state: dict[str, Any]) -> str:
        shares = self.metrics(model, state)
        count = sum(model.get_parameter(name).numel() for name in state["targets"])
        return (
            f"{self.name}: {shares['sparsity']:.1%} of {count:,} prunable weights are zero, "
            f"{shares['model_sparsity']:.1%} of all parameters."
        )

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _choose(self, model: nn.Module, state: dict[str, Any], level: float) -> dict[str, Tensor]:
        """Masks at a level of the schedule, in [0, 1]: the old zeros, and the least important of the others."""
        weights = {name: whole(model.get_parameter(name)) for name in state["targets"]}
        old = _masks.unpacked(state["masks"] or {}, weights)
        absolute = self.criterion == "magnitude"
        scores, layouts = {}, {name: _layout(model, name) for name in weights}
        unseen = [name for name in weights if self.criterion in _GRADIENT and name not in state["scores"]]
        for name, weight in weights.items():
            score = weight.abs() if name in unseen else self._score(name, weight, state, layouts[name])
            check_finite(name, self.criterion, score)
            if not absolute and name in old:
                score = score.masked_fill(~old[name], -torch.inf)
            scores[name] = score
        masks: dict[str, Tensor] = {}
        everywhere = [name for name in weights if state["targets"][name]["scope"] == "global" and name not in unseen]
        if everywhere:
            share = _target(state["targets"][everywhere[0]], level)
            block = state["targets"][everywhere[0]]["block_size"]
            own = {name: layouts[name] for name in everywhere}
            masks.update(_keep_globally({name: scores[name] for name in everywhere}, share, block, absolute, own))
        for name in weights.keys() - masks.keys():
            masks[name] = self._keep_in_layer(scores[name], state["targets"][name], level, absolute, layouts[name])
        return {name: mask & old[name] if name in old else mask for name, mask in masks.items()}

    def _score(self, name: str, weight: Tensor, state: dict[str, Any], layout: Layout) -> Tensor:
        if self.criterion == "random":
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()  # names of equal letters differ too
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            return torch.rand(weight.shape, generator=generator).to(weight.device)
        if self.criterion in _GRADIENT:
            score: Tensor = state["scores"][name]
            return score.to(weight.device)
        if self.criterion == "wanda":
            norms = state["norms"][name].to(weight.device).sqrt()
            return weight.abs().float() * (norms.mT if layout.inputs_first and not layout.overlaps else norms)
        return weight

    def _keep_in_layer(
        self, score: Tensor, spec: dict[str, Any], level: float, absolute: bool, layout: Layout
    ) -> Tensor:
        if spec["pattern"] is not None:
            kept, of = _pattern(spec["pattern"])
            product = layout.to_product(score.abs() if absolute else score)
            mask = keep_largest_in_rows(product.reshape(-1, of), int((of - kept) * level + 1e-6))
            return layout.from_product(mask.reshape(product.shape), score.shape)
        share = _target(spec, level)
        if self.criterion == "wanda":
            rows = layout.to_rows(score)
            mask = keep_largest_in_rows(rows, most_dropped(share, rows.shape[1]))
            return layout.from_rows(mask, score.shape)
        return _keep_globally({"": score}, share, spec["block_size"], absolute, {"": layout})[""]


_TURNED = Layout(inputs_first=True)  # transformers' Conv1D, and what else an adapter turns


def _follow_turned(model: nn.Module, state: dict[str, Any]) -> None:
    """Turns the masks of weights that lay the other way round until another method put an ordinary layer there."""
    for name in state.get("turned", ()):  # states of earlier releases have none
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), CompressedLayer):
            continue
        state["turned"] = [other for other in state["turned"] if other != name]
        if state["masks"] and name in state["masks"]:
            turned = model.get_parameter(name).mT
            (mask,) = _masks.unpacked({name: state["masks"][name]}, {name: turned}).values()
            state["masks"] = {**state["masks"], **_masks.packed({name: mask.mT.contiguous()})}


def _layout(model: nn.Module, name: str) -> Layout:
    """The layout of a parameter; where none is known the order of its values counts for nothing that is asked."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    return layout_of(module, module.get_parameter(attribute)) or Layout()


def _keep_globally(
    scores: dict[str, Tensor],
    share: float,
    block: list[int] | None,
    absolute: bool,
    layouts: dict[str, Layout] | None = None,
) -> dict[str, Tensor]:
    """Ranks all scores together; a layer that would be left almost empty keeps its own share."""
    layouts = layouts or dict.fromkeys(scores, Layout())
    shapes = {name: score.shape for name, score in scores.items()}
    if block is not None:
        rows = {name: layouts[name].to_rows(score.abs() if absolute else score) for name, score in scores.items()}
        scores, absolute = {name: _block_means(row, block) for name, row in rows.items()}, False
    most = 1 - LEAST_DENSITY * (1 - share)
    left, masks = dict(scores), {}
    drop = round(share * sum(score.numel() for score in scores.values()))
    while left:
        found = dict(zip(left, keep_largest(list(left.values()), drop, absolute), strict=True))
        full = [n for n, mask in found.items() if mask.numel() - int(mask.sum()) > most * mask.numel()]
        for name in full or list(found):
            score = left.pop(name)
            if full:
                own = int(most * score.numel())
                drop -= own
                masks[name] = keep_largest([score], own, absolute)[0]
            else:
                masks[name] = found[name]
    if block is None:
        return masks
    spread = {n: mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) for n, mask in masks.items()}
    return {name: layouts[name].from_rows(mask, shapes[name]) for name, mask in spread.items()}


def _block_means(rows: Tensor, block: list[int]) -> Tensor:
    return rows.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).float().mean((1, 3))


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable parameters of a module by attribute: the weight of a layer, the matrices of attention and LSTM."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()}
    ordinary = as_torch(module)
    if ordinary is not None:
        return {name: p for name, p in own.items() if p.numel() == weight_of(ordinary).numel()}
    if isinstance(module, tuple(SUPPORTED)):  # of a subclass, whose forward may differ: its weight is a weight still
        return {name: p for name, p in own.items() if name == "weight"}
    return own if isinstance(module, CompressedLayer | nn.MultiheadAttention | nn.RNNBase) else {}


def _why_not_wrapped(weights: dict[str, nn.Parameter]) -> str | None:
    """Why what another layer wraps is left alone; None where it trains."""
    if any(weight.requires_grad for weight in weights.values()):
        return None
    return (
        "is frozen inside the layer that adapts it, and its zeros would be filled when that is merged: prune before "
        "adapting, or after merging"
    )


def _pattern(text: str) -> tuple[int, int]:
    kept, _, of = text.partition(":")
    return int(kept), int(of)


def _target(spec: dict[str, Any], level: float) -> float:
    """The share of zeros at a level of the schedule."""
    if spec["pattern"] is None:
        return float(spec["sparsity"]) * level
    kept, of = _pattern(spec["pattern"])
    return (1 - kept / of) * level


def _check_target(where: str, options: dict[str, Any]) -> None:
    sparsity, pattern = options.get("sparsity"), options.get("pattern")
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, float | int)):
        raise OptionError(f"{where}sparsity is a share of weights in [0, 1), got {sparsity!r}.")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise OptionError(f"{where}sparsity is the share of weights that is removed, in [0, 1), got {sparsity}.")
    if pattern is not None:
        kept, colon, of = str(pattern).partition(":")
        if not (colon and kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
            raise OptionError(f'{where}pattern is "N:M" with 0 < N < M, e.g. "2:4", got {pattern!r}.')

"""The contract of a method: options as a frozen dataclass, a plan, its application, and what training needs of it."""

import dataclasses
import functools
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeGuard, dataclass_transform

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compiled import plain_name
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, install_hook, weight_of
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.coverage import note_plan
from pquant_lightning.core.deploy import count_params, deployed_bytes, stored_bytes
from pquant_lightning.core.errors import ModelError, NothingToCompressError, OptionError, known
from pquant_lightning.core.graph import output_layers, trace
from pquant_lightning.core.layer_adapter import FUSED, SUPPORTED, as_torch, build_layer, layer_spec, why_unsupported
from pquant_lightning.core.options import check_type
from pquant_lightning.core.plan import Candidate, CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.splitting import planned_splits, split_as_planned, split_view, why_whole
from pquant_lightning.core.structure import Resized
from pquant_lightning.core.surgery import get_layer, replace_layer
from pquant_lightning.core.undo import NoUndo, Undo

_LEAST_OF_SHARE = 0.75  # of the share that is asked for, what a layer must be able to keep

__all__ = ["CompressionContext", "CompressionMethod", "LayerMethod", "Stage"]


def _no_tracking(items: Iterable[Any], description: str) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class CompressionContext:
    """What a method may use besides the model.

    Attributes:
        by: who plans: written into every spec, so that a callback knows its own layers again.
        track: wraps an iterable of layers and shows progress; `track(items, description)`.
        errors: filled by `apply`: relative weight error ||W - W'|| / ||W|| by layer name.
        samples: data to calibrate on, as many as the method's `wanted_samples`; None where there are none.
        notes: what a method's own `plan` finds out about the model and its `plan_layer` uses.
        state: the method's own, the same that `step` and `project` are given; in a Trainer it is checkpointed.
        kept: names of parameters that other methods keep track of: the layers that hold them are not taken apart.
        undo: notes what is written into the model, which is what it was before where an error is raised.
        choices: what a budget has chosen, the options of a `Candidate` by layer name; other layers are left alone. None
            where the method decides by itself.
    """

    by: str
    track: Callable[[Iterable[Any], str], Iterable[Any]] = _no_tracking
    errors: dict[str, float] = field(default_factory=dict)
    samples: Samples | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    undo: Undo | NoUndo = NoUndo()  # noqa: RUF009 (it holds nothing)
    choices: Mapping[str, dict[str, Any]] | None = None


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class CompressionMethod(ABC):  # noqa: B024 (the specification's own classes override neither plan nor apply)
    """Base of all methods: declare options as annotated fields, implement `plan` and `apply` (or use `LayerMethod`).

    Subclasses become frozen keyword-only dataclasses; `Method(rank=8)` and `Method({"rank": 8})` are the same. A class
    that writes its own `__init__(self, config)` and `compress` (the specification's shape) is taken as it is.

    Args:
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: unknown option, wrong type, value out of range.
    """

    include: list[str] | None = None
    exclude: list[str] | None = None
    min_saving: float = 0.05

    stage: ClassVar[Stage] = Stage.QUANTIZE  # last, unless a method says otherwise
    trains: ClassVar[bool] = False  # the method's own form must be trained; compress_model then gives the training form
    takes_deployed: ClassVar[bool] = False  # may wrap a layer that is deployed already; it gets that layer itself
    keeps_ties: ClassVar[bool] = False  # a weight shared with another layer stays shared
    acts_after_training: ClassVar[bool] = (
        False  # in a Trainer, `calibrate` sees the trained weights, not the first ones
    )

    @property
    def changes_shared(self) -> bool:
        """Whether layers that share their weights with others are changed, too."""
        return self.keeps_ties

    @property
    def wanted_samples(self) -> int:
        """Samples of the user's data that `plan`, `apply` and `calibrate` use if there are any; 0 = data-free."""
        return 0

    @property
    def wanted_samples_in_trainer(self) -> int:
        """The same in a Trainer, where a method that acts before the training may want none."""
        return self.wanted_samples

    @property
    def needs_samples(self) -> bool:
        """Whether the method cannot do without samples."""
        return False

    @property
    def omits_frozen(self) -> bool:
        """Whether the checkpoints of a fit leave out weights that are frozen and that the uncompressed model has."""
        return False

    @property
    def completes_at(self) -> float:
        """Progress of training, in [0, 1], at which the target is reached; 0 for methods that act at the start."""
        return 0.0

    @property
    def steps_between(self) -> int | None:
        """Optimizer steps between two calls of `step`; 0 = before every batch; None = at the start of every epoch.

        Whatever it says, `step` is also called when the schedule completes.
        """
        return 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [c for c in cls.__mro__ if "__init__" in c.__dict__ and "__dataclass_params__" not in c.__dict__]
        if not any(issubclass(c, CompressionMethod) for c in own):
            dataclass(frozen=True, kw_only=True)(cls)
            _accept_mapping(cls)

    def __post_init__(self) -> None:
        self.validate_config()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The options as a plain dict; `type(self)(self.config)` makes an equal method."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def steering(self) -> frozenset[str]:
        """Options that also act on a model that the method has changed in an earlier fit."""
        return frozenset({"num_samples"})

    @functools.cached_property
    def name(self) -> str:
        """The first registry name of the class."""
        return CompressionMethodRegistry.name_of(type(self))

    def validate_config(self) -> None:
        """Checks types and ranges of the options; methods extend it.

        Raises:
            OptionError: an option has a wrong type or value.
        """
        for option in dataclasses.fields(self):
            check_type(type(self), option.name, getattr(self, option.name))
        if not 0 <= self.min_saving < 1:
            raise OptionError(f"min_saving is a share of a layer's bytes in [0, 1), got {self.min_saving}.")

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        """Decides what to change. Pure: the model is not touched."""
        raise ModelError(
            f"{type(self).__name__} has no plan and apply: it can be used in compress_model(model, method), not in a "
            "Trainer. Derive it from LayerMethod, or give it plan(model, context) and apply(model, plan, context)."
        )

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        """Changes the model as planned, in place, once."""
        raise NotImplementedError(f"{type(self).__name__}.apply")

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        """Measures on `context.samples` what the applied layers need to know; may be repeated.

        Called right after `apply`; in a Trainer, for a method that `acts_after_training`, at the end of the fit.

        Raises:
            CalibrationError: there are no samples and it cannot do without, or they do not fit the model.
        """

    def attach(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Called at every start of a fit, before the optimizers are made; must be idempotent."""

    def applied_to(self, model: nn.Module, state: dict[str, Any], by: str) -> bool:
        """Whether `by` has changed this model in an earlier fit, of which `state` is left, where no layer says so."""
        return False

    @property
    def resizes(self) -> bool:
        """Whether `step` may put smaller parameters into the model."""
        return False

    @property
    def keeps_shapes(self) -> bool:
        """Whether its state or its `project` relies on the shapes that parameters had at the start."""
        return type(self).project is not CompressionMethod.project

    def step(self, model: nn.Module, state: dict[str, Any], progress: float) -> Sequence[Resized] | None:
        """Scheduled methods act here, before a training batch; `state` is checkpointed, `progress` in [0, 1].

        Returns:
            The parameters that have taken the place of larger ones, for the optimizers.
        """
        return None

    def observe(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Looks at the gradients, before each real optimizer step."""

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Restores what an optimizer step may have broken (exact zeros); after each real step."""

    def project_held(self, model: nn.Module, state: dict[str, Any], held: Callable[[Tensor], bool]) -> None:
        """`project` after a step of one optimizer of several, which `held` says whether it holds a parameter.

        The others' parameters must not be written into: a backward pass may be under way that needs them as they are.
        A method that does not override this has all of them projected.
        """
        self.project(model, state)

    def kept_whole(self, model: nn.Module, state: dict[str, Any]) -> frozenset[str]:
        """Names of the parameters that a method of a later stage may not take apart, since `state` speaks of them.

        A method whose state can follow (`follow_split`) names fewer.
        """
        return frozenset(names_in(state))

    def follow_split(self, model: nn.Module, state: dict[str, Any], parts: Mapping[str, Sequence[str]]) -> None:
        """A method of a later stage has taken layers apart: `state` is to speak of the parts.

        Args:
            model: holds the parts.
            state: changed in place.
            parts: names of the equal parts, along dimension 0, that a parameter has been cut into, by its name.
        """

    def metrics(self, model: nn.Module, state: dict[str, Any]) -> dict[str, float]:
        """What is logged at the end of each epoch, by name."""
        return {}

    def candidates(self, name: str, module: nn.Module, context: CompressionContext) -> list[Candidate]:
        """The choices for one layer as the budget sees them, smallest first; empty where there is no choice."""
        return []

    def levels(self) -> list["CompressionMethod"]:
        """Variants of a method that offers no choice layer by layer, weakest first, for a budget to choose from."""
        return []

    @classmethod
    def finalize(cls, model: nn.Module) -> None:
        """Deploys what spans several layers; single layers are deployed by `CompressedLayer.finalized`."""

    def compress(self, model: nn.Module, train_loader: Any = None, val_loader: Any = None) -> nn.Module:
        """Returns a compressed copy; the given model is not touched.

        Args:
            model: any module that contains layers.
            train_loader: data for methods that calibrate.
            val_loader: data for methods that measure.

        Raises:
            ModelError: no layer can be changed, weights are not finite, or a lazy layer is not built yet.
        """
        copy = deep_copy(model)
        self.compress_in_place(copy, self.samples_of(train_loader, copy))
        install_hook(copy)
        return copy

    def compress_in_place(
        self, model: nn.Module, samples: Samples | None = None, context: CompressionContext | None = None
    ) -> None:
        """Plans, and carries the plan out."""
        context = context or CompressionContext(by=self.name, samples=samples)
        self.carry_out(model, self.checked_plan(model, context), context)

    def carry_out(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext) -> None:
        """Applies a plan and calibrates; a method that does not train then reaches its target at once."""
        note_plan(model, plan)
        with context.undo.writing():
            self.apply(model, plan, context)
            self.calibrate(model, context)
            self.attach(model, context.state)
            if not self.trains:
                self.step(model, context.state, 1.0)

    def samples_of(self, loader: Any, model: nn.Module | None = None) -> Samples | None:
        """As many samples of a loader as this method wants; None where it wants none or there is no loader.

        Where a model is given they are run as it takes them (`Samples.fitted_to`).
        """
        if loader is None or not self.wanted_samples:
            return None
        samples = Samples.take(loader, self.wanted_samples)
        return samples if model is None else samples.fitted_to(model)

    def checked_plan(self, model: nn.Module, context: CompressionContext) -> CompressionPlan:
        """The plan, or an error where it would change nothing."""
        plan = self.plan(model, context)
        if not plan.layers:
            reasons = "\n".join(f"  {skip.name}: {skip.reason}" for skip in plan.skipped) or "  it has no such layers"
            raise NothingToCompressError(f"{self.name} changes no layer of {type(model).__name__}:\n{reasons}")
        return plan

    def get_compression_info(self, original_model: nn.Module, compressed_model: nn.Module) -> dict[str, Any]:
        """Parameter counts, their ratio, the method's name and its options."""
        original, compressed = count_params(original_model), count_params(compressed_model)
        return {
            "compression_ratio": original / max(compressed, 1),
            "original_params": original,
            "compressed_params": compressed,
            **self.config,
            "method": self.name,
        }


def names_in(state: Any) -> Iterator[str]:
    """All keys of a state at any depth, the names of parameters among them."""
    if isinstance(state, dict):
        yield from (key for key in state if isinstance(key, str))
        state = list(state.values())
    if isinstance(state, list):
        for value in state:
            yield from names_in(value)


def _accept_mapping(cls: type[CompressionMethod]) -> None:
    """Wraps the dataclass `__init__` so that one positional dict of options works and unknown names are explained."""
    initialize = cls.__init__
    names = [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(initialize)
    def accepting(self: CompressionMethod, config: dict[str, Any] | None = None, /, **options: Any) -> None:
        if not isinstance(config, dict | None):
            raise OptionError(f"{cls.__name__} takes its options as keywords or as one dict, got {config!r}.")
        options = {**(config or {}), **options}
        if "__dataclass_params__" not in type(self).__dict__:  # the specification's shape: its own __init__
            self.__dict__.update(config=options, name=type(self).__name__)
            return
        for name in options:
            if name not in names:
                raise OptionError(f"{cls.__name__} has no option {name!r}. {known(name, names)}")
        initialize(self, **options)

    cls.__init__ = accepting  # type: ignore[method-assign, assignment]


_accept_mapping(CompressionMethod)


class MethodFamily(CompressionMethod):
    """A name of configurations that makes the method which `method` names, with the other options.

    Attributes:
        members: the methods by name; the first is the default.

    Raises:
        OptionError: no such method, or an option it does not have.
    """

    members: ClassVar[dict[str, type[CompressionMethod]]]

    def __new__(cls, config: dict[str, Any] | None = None, /, **options: Any) -> Any:
        chosen = {**(config or {}), **options}
        method = chosen.pop("method", next(iter(cls.members)))
        if method not in cls.members:
            raise OptionError(f"{cls.__name__} has no method {method!r} in this release. {known(method, cls.members)}")
        return cls.members[method](**chosen)


class LayerMethod(CompressionMethod):
    """A method that changes one layer at a time: give `plan_layer` and `fill`.

    The projections of attention and the products of recurrent layers are layers like any other. A `plan` that looks at
    the model before it calls this one looks at, and hands on, `self.opened(model, context)`.
    """

    opens_recurrent: ClassVar[bool] = True  # recurrent layers are taken apart to change their products

    protects_output: ClassVar[bool] = False  # without `include` the layers that give the output are left alone

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict[str, Any] | Skip | LayerPlan:
        """Decides one ordinary layer: the new layer's spec (or a LayerPlan with scratch), or why it is left alone."""
        raise NotImplementedError(f"{type(self).__name__}.plan_layer")

    def opened(self, model: nn.Module, context: CompressionContext) -> nn.Module:
        """The model with its fused layers as the parts that this method may change; it shares all memory."""
        return split_view(model, context.kept, recurrent=self.opens_recurrent)

    def prepared(self, model: nn.Module, context: CompressionContext) -> CompressionContext:
        """The context with what `plan_layer` and `candidates` find out about the whole model, once, in its notes."""
        return context

    def choose(
        self, name: str, layer: nn.Module, options: dict[str, Any], context: CompressionContext
    ) -> dict[str, Any] | Skip | LayerPlan:
        """`plan_layer` with the options of one of the layer's candidates."""
        return dataclasses.replace(self, **options).plan_layer(name, layer, context)

    def offers(self, model: nn.Module, context: CompressionContext) -> dict[str, list[Candidate]]:
        """What a budget may choose from for each layer that the method can change, by layer name."""
        view = self.opened(model, context)
        context = self.prepared(view, context)
        owners, found = _weight_owners(view), {}
        protected = self._protected(view, owners, context)
        for name, module in self._targets(view, [], context.kept):
            layer = as_torch(module)
            if layer is None or name in protected:
                continue
            if check_weight(name, layer, not self.acts_after_training) is not None:
                continue
            if self.changes_shared or all(len(owners[id(p)]) == 1 for p in module.parameters(recurse=False)):
                found[name] = self.candidates(name, layer, context)
        return {name: offers for name, offers in found.items() if offers}

    def fill(self, new: Any, old: Any, plan: LayerPlan, context: CompressionContext) -> None:
        """Gives the new layer its values (under no_grad); parameters of equal name and shape are already the old's.

        A method that knows the error it makes notes it in `context.errors`; else the weights are compared.
        """

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        context = context or CompressionContext(by=self.name)
        if as_torch(model) is not None or type(model) in FUSED:
            raise ModelError(
                f"The model is a bare {type(model).__name__}, and a layer is replaced inside a model: wrap it in "
                "torch.nn.Sequential(layer)."
            )
        layers: list[LayerPlan] = []
        skipped: list[Skip] = []
        view = self.opened(model, context)
        owners = _weight_owners(view)
        protected = self._protected(view, owners, context)
        targets = list(self._targets(view, skipped, context.kept))
        for name, module in context.track(targets, f"{self.name}: planning"):
            decision = protected.get(name) or self._decide(name, module, owners, context)
            if isinstance(decision, Skip):
                skipped.append(decision)
            else:
                layers.append(decision)
        noted = tuple(dataclasses.replace(skip, by=context.by) for skip in skipped)
        splits = planned_splits(view, layers, context.by)
        return CompressionPlan(self.name, context.by, tuple(layers), noted, splits)

    def _protected(self, view: nn.Module, owners: dict[int, list[str]], context: CompressionContext) -> dict[str, Skip]:
        """The layers that give the output and are left alone for that, where the user and a budget leave it to us.

        Not those that share a weight: they are left alone for that, or the method is told to change them.
        """
        if not self.protects_output or self.include is not None or context.choices is not None:
            return {}
        samples = context.notes.get("samples", context.samples)
        names = output_layers(view, None if samples is None else trace(view, samples))
        names -= {name for holders in owners.values() if len(holders) > 1 for name in holders}
        for name in names:  # NaN in one of them is an error all the same
            if (layer := as_torch(get_layer(view, name))) is not None:
                check_weight(name, layer)
        return {name: Skip(name, "the output layer: name it in include to change it") for name in names}

    def why_too_coarse(self, kept: int, share: float, total: int) -> str | None:
        """Why a layer is left alone whose rank, a whole number, would fall far below its share; None for others.

        Args:
            kept: numbers that would be kept of the weight.
            share: that the user asks for, of the weight's numbers.
            total: the weight's numbers.
        """
        if self.include is not None or kept >= _LEAST_OF_SHARE * share * total:
            return None
        return (
            f"would keep {kept / total:.0%} of its weights instead of {share:.0%}, as a rank is a whole number: name "
            "it in include to change it"
        )

    def expected_error(self, layer: nn.Module, plan: LayerPlan, context: CompressionContext) -> float | None:
        """The relative weight error of a planned layer, about, where it is found without making the layer; else None.

        A method that knows it has layers whose bytes depend on the plan alone: a dry run does not apply it.
        """
        return None

    def apply_structure(self, model: nn.Module, plan: CompressionPlan) -> None:
        """Gives a model on "meta" the planned structure: what `apply` does, without values."""
        split_as_planned(model, plan.splits)
        for entry in plan.layers:
            replace_layer(model, entry.name, CompressedLayer.build(entry.spec, get_layer(model, entry.name)))

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        context = context or CompressionContext(by=plan.by)
        whole = split_view(model)
        for entry in plan.layers:
            get_layer(whole, entry.name)
        split_as_planned(model, plan.splits)
        for entry in context.track(plan.layers, f"{self.name}: compressing"):
            old = get_layer(model, entry.name)
            ordinary = old if self._takes(old) else as_torch(old)
            if ordinary is None:
                raise ModelError(f"The plan changes {entry.name!r}, and {type(old).__name__} has no adapter.")
            new = CompressedLayer.build(entry.spec, old)
            with torch.no_grad(), context.undo.filling(new, old):
                self.fill(new, ordinary, entry, context)
                if entry.name not in context.errors:
                    context.errors[entry.name] = relative_error(weight_of(ordinary), weight_of(new))
            replace_layer(model, entry.name, new)

    def _targets(
        self, model: nn.Module, skipped: list[Skip], kept: frozenset[str] = frozenset()
    ) -> Iterator[tuple[str, nn.Module]]:
        """Ordinary layers this method may look at; the others are noted with the reason."""
        chosen = Selection(self, model)
        closed: list[str] = []
        for name, module in model.named_modules():
            if any(not prefix or name.startswith(f"{prefix}.") for prefix in closed):
                continue
            if self._takes(module) and chosen(name) is None:
                closed.append(name)
                yield name, module
            elif isinstance(module, CompressedLayer) and module.stage >= self.stage:
                closed.append(name)
                skipped.append(Skip(name, f"already compressed ({module.described()})"))
            elif type(module) in FUSED:
                closed.append(name)
                whole = why_whole(model, name, kept) or "this method leaves recurrent layers whole"
                skipped.append(Skip(name, chosen(name) or whole))
            elif as_torch(module) is None:
                if isinstance(module, torch.jit.ScriptModule):
                    closed.append(name)
                elif is_parametrized(module):
                    closed.append(f"{name}.parametrizations" if name else "parametrizations")
                reason = None if isinstance(module, CompressedLayer) else why_unsupported(module)
                if reason is not None and "lazy" in reason and chosen(name) is None:
                    raise ModelError(f"Layer {name!r} {reason}.")
                if reason is not None:
                    skipped.append(Skip(name or type(module).__name__, chosen(name) or reason if name else reason))
            elif (reason := chosen(name)) is not None:
                skipped.append(Skip(name, reason))
            else:
                yield name, module

    def _takes(self, module: nn.Module) -> TypeGuard[CompressedLayer]:
        """Whether this is a deployed layer of a later stage that the method may wrap."""
        if not (self.takes_deployed and isinstance(module, CompressedLayer) and module.deployed):
            return False
        return module.stage > self.stage and module.spec["layer"]["type"] in {cls.__name__ for cls in SUPPORTED}

    def _decide(
        self, name: str, module: nn.Module, owners: dict[int, list[str]], context: CompressionContext
    ) -> LayerPlan | Skip:
        layer = build_layer(module.spec["layer"], device="meta") if self._takes(module) else as_torch(module)
        assert layer is not None
        reason = None if self._takes(module) else check_weight(name, layer, not self.acts_after_training)
        if reason is not None:
            return Skip(name, reason)
        shared = [other for p in module.parameters(recurse=False) for other in owners[id(p)] if other != name]
        if shared and not (self.changes_shared and layer is module):  # an adapter's weight may be a copy
            return Skip(name, f"shares a parameter with {shared[0]!r}")
        if context.choices is None:
            decision = self.plan_layer(name, layer, context)
        elif (options := _chosen(name, context.choices)) is None:
            decision = Skip(name, "the budget leaves it as it is")
        else:
            decision = self.choose(name, layer, options, context)
        if isinstance(decision, Skip):
            return decision
        plan = decision if isinstance(decision, LayerPlan) else LayerPlan(name, decision)
        spec = {**plan.spec, "by": context.by, "layer": layer_spec(layer)}
        before, after = stored_bytes(layer), deployed_bytes(spec, layer)
        saving = 1 - after / before
        if self.min_saving > 0 and saving < self.min_saving:
            return Skip(name, _why_kept(before, after, self.min_saving))
        return LayerPlan(name, spec, plan.scratch)


def _why_kept(before: int, after: int, min_saving: float) -> str:
    """Why a layer that would save less than `min_saving` of its bytes is left alone."""
    if after >= before:
        return f"would not get smaller: {after:,} bytes instead of {before:,}"
    return (
        f"would save only {1 - after / before:.0%} ({after:,} bytes instead of {before:,}), less than "
        f"min_saving={min_saving:g}"
    )


def _chosen(name: str, choices: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The choice for a layer, or for the one whose factor it is."""
    parts = name.split(".")
    around = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return next((choices[outer] for outer in around if outer in choices), None)


class Selection:
    """`include` and `exclude` of a method on one model: a layer's name to the reason why it is left out, or None.

    A pattern that matches a module speaks for everything inside it.

    Args:
        method: whose patterns they are.
        model: that has the names.
        parameters: patterns match names of parameters too.

    Raises:
        ModelError: a pattern matches nothing.
    """

    def __init__(self, method: CompressionMethod, model: nn.Module, parameters: bool = False) -> None:
        self.include, self.exclude = method.include, method.exclude or []
        check_patterns(model, "include", self.include or [], parameters)
        check_patterns(model, "exclude", self.exclude, parameters)

    def __call__(self, name: str) -> str | None:
        if pattern := next((p for p in self.exclude if matches(name, p)), None):
            return f"excluded by {pattern!r}"
        if self.include is not None and not any(matches(name, p) for p in self.include):
            return "not in include"
        return None


SPARSE_GRADIENTS = "its gradients are sparse (sparse=True), for optimizers such as SparseAdam that take no others"


def has_sparse_gradients(layer: nn.Module) -> bool:
    """Whether this is an embedding whose weight only such optimizers train: nothing may take that weight's place."""
    return isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse


def check_weight(name: str, layer: nn.Module, trains_on: bool = False) -> str | None:
    """Why the weight of an ordinary layer cannot be worked on; None where it can.

    Args:
        name: of the layer.
        layer: ordinary.
        trains_on: whether it is changed before the training, or during it.

    Raises:
        ModelError: it has no values, or NaN or infinite ones.
    """
    for tensor_name in ("weight", "bias"):
        if not isinstance(getattr(layer, tensor_name, None), nn.Parameter | None):
            return f"its {tensor_name} comes from a hook (prune, weight_norm): make it permanent"
    weight = weight_of(layer)
    if weight.numel() == 0:
        return "its weight holds no numbers"
    if not weight.is_floating_point():
        return f"its weight is of type {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight {tuple(weight.shape)} holds no values"
    if trains_on and has_sparse_gradients(layer):
        return SPARSE_GRADIENTS
    if weight.is_meta:
        raise ModelError(f'Layer {name!r} is on "meta" and has no values: load the weights, then compress.')
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():  # the sum is cheap, but may overflow
        raise ModelError(f"The weight of layer {name!r} holds NaN or infinite values; nothing was compressed.")
    return None


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern matches a module's name, or that of a module around it.

    >>> matches("encoder.0.linear", "encoder.*"), matches("head", "encoder.*")
    (True, False)
    """
    parts, pattern = plain_name(name).split("."), plain_name(pattern)
    return any(fnmatchcase(".".join(parts[: depth + 1]), pattern) for depth in range(len(parts)))


def check_patterns(model: nn.Module, option: str, patterns: Iterable[str], parameters: bool = False) -> None:
    """Checks that each pattern matches a module, or where these are meant too, a parameter.

    Raises:
        ModelError: one does not.
    """
    names = [plain_name(name) for name, _ in model.named_modules() if name]
    names += [plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)] if parameters else []
    for pattern in patterns:
        if not any(fnmatchcase(name, plain_name(pattern)) for name in names):
            what = "no layer and no parameter" if parameters else "no layer"
            raise ModelError(f"The {option} pattern {pattern!r} matches {what}. {known(pattern, names)}")


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def relative_error(before: Tensor, after: Tensor) -> float:
    """||W - W'|| / ||W|| in the Frobenius norm; 0 for a zero weight."""
    before, after = before.float(), after.float()
    return float(torch.dist(before, after) / torch.linalg.vector_norm(before).clamp_min(1e-30))

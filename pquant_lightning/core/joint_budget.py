"""One budget over several methods: ranks, bits and channels shared out together, by what they cost the outputs."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pquant_lightning.core.budget import allocate
from pquant_lightning.core.calibration import Samples, first_samples, run_samples
from pquant_lightning.core.compression_method import CompressionContext, CompressionMethod, LayerMethod
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import deploy, share_copy, stored_bytes
from pquant_lightning.core.errors import BudgetError, ModelError, NothingToCompressError, OptionError, counted, known
from pquant_lightning.core.output_error import OutputError
from pquant_lightning.core.plan import Candidate
from pquant_lightning.core.report import count_macs, make_report
from pquant_lightning.core.splitting import split_view
from pquant_lightning.utils.benchmarking import measure

log = logging.getLogger(__name__)

BUDGETS = ("size", "macs", "latency", "max_drop")
PROBE_SAMPLES = 64
"""Samples, spread over the batches, on which outputs are compared."""

_PROBES = 3  # candidates of a layer and method that are measured
_LOSSLESS = 1e-9  # losses below are rounding errors
_AIMS = (1.0, 0.75, 0.5)  # of the budget: less for the layers may be better, where their losses are not quite additive
_TRIES = 6  # of a budget that is corrected by what came out
_BISECTIONS = 6  # of the size, for a metric
_CLOSE = 0.97  # of the budget: near enough

Choices = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One method in a budget.

    Attributes:
        given: the method as it was given.
        method: the same, or one of its levels.
        choices: what was chosen for its layers; None where the method decides by itself.
    """

    given: CompressionMethod
    method: CompressionMethod
    choices: Choices | None = None


@dataclass(frozen=True)
class Share:
    """What a budget has decided.

    Attributes:
        steps: the methods that act, in order.
        kept: what is kept of the budget's quantity, as a share.
        loss: squared relative error of the model's outputs on the samples, measured.
    """

    steps: tuple[Step, ...]
    kept: float
    loss: float

    def __str__(self) -> str:
        words = [
            step.method.name if step.choices is None else f"{step.method.name} of {counted(len(step.choices), 'layer')}"
            for step in self.steps
        ]
        return (
            f"{' + '.join(words) or 'no method'}: {self.kept:.1%} kept, relative error of the outputs "
            f"{math.sqrt(self.loss):.3g}"
        )


def check_budget(budget: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of a budget.

    Raises:
        OptionError: not one entry, an unknown name, or a value out of range.
    """
    if len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        name = next(iter(budget), "")
        raise OptionError(f"budget has one entry, e.g. {{'size': 0.1}}; got {dict(budget)!r}. {known(name, BUDGETS)}")
    name, value = next(iter(budget.items()))
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= 1
        or (value == 0 and name != "max_drop")
    ):
        raise OptionError(f"budget[{name!r}] is a share that is kept, in (0, 1] (max_drop: in [0, 1]), got {value!r}.")
    return name, float(value)


def share_budget(
    model: nn.Module,
    methods: Sequence[CompressionMethod],
    budget: Mapping[str, float],
    samples: Samples,
    *,
    drop: Callable[[nn.Module], float] | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> Share:
    """Shares one budget out over the layers and the methods.

    What each layer may become is every combination of the candidates that the methods of different stages offer for it;
    its loss is the sum of theirs, each scaled by what the method does to the model's outputs in this layer alone, as it
    is measured. The least sum within the budget is found by `core.budget.allocate`. Methods that span layers (their
    `levels`) are tried at each level. What comes out is applied to a copy and measured, the budget corrected by what it
    really kept; of all that keep to it, each method alone included, the one with the least error of the outputs is
    taken.

    Args:
        model: uncompressed, not changed.
        methods: what may act, each at most once; for "macs" and "latency", those that save none act as they are.
        budget: `{"size": share of the stored bytes kept}`, `{"macs": share}`, `{"latency": share}` (measured here, with
            the current number of threads) or `{"max_drop": d}` (the smallest size for which `drop` is at most d).
        samples: what moments and errors are measured on.
        drop: how much worse a deployed model is, for "max_drop".
        track: shows progress.

    Raises:
        BudgetError: it cannot be met; the message says what can.
        OptionError: a budget out of range; no method has a choice to offer.
    """
    quantity, value = check_budget(budget)
    if quantity == "max_drop" and drop is None:
        raise OptionError("budget={'max_drop': ...} goes with monitor='...', the metric that may lose it.")
    with _methods_silent():
        sharing = _Sharing(model, sorted(methods, key=lambda m: m.stage), quantity, samples, track)
        if quantity != "max_drop":
            return sharing.best(value)
        assert drop is not None
        return _smallest(sharing, value, drop)


@contextmanager
def _methods_silent() -> Iterator[None]:
    """What methods say while candidates are tried is not what is done in the end; then they say it again."""
    loggers = [logging.getLogger(f"pquant_lightning.{part}") for part in ("methods", "core.data_aware")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def apply_share(
    model: nn.Module, share: Share, samples: Samples, notes: Mapping[int, dict[str, Any]] | None = None
) -> None:
    """Compresses a model in place as a budget has decided; in training form.

    Args:
        model: as it was when the budget was shared out.
        share: what was decided.
        samples: what moments are measured on.
        notes: what was measured on this model before, by the id of the given method.
    """
    for step in share.steps:
        known = dict((notes or {}).get(id(step.given), {}))
        context = CompressionContext(step.method.name, samples=samples, choices=step.choices, notes=known)
        step.method.compress_in_place(model, context=context)


def _smallest(sharing: "_Sharing", max_drop: float, drop: Callable[[nn.Module], float]) -> Share:
    """The smallest size whose drop is small enough, by bisection of the logarithm of the share kept."""

    def lost(share: Share) -> float:
        found = drop(sharing.deployed(share.steps))
        log.info("%s; the metric loses %.4g", share, found)
        return found

    low, high, best = sharing.least(), 1.0, None
    for _ in range(_BISECTIONS):
        size = math.sqrt(low * high)
        share = sharing.meet(size)
        if share.kept <= size * (1 + 1e-9) and lost(share) <= max_drop:
            best, high = share, share.kept
        else:
            low = size
        if high / low < 1.05:
            break
    if best is None:
        raise BudgetError(
            f"budget={{'max_drop': {max_drop:g}}} cannot be met: even {low:.0%} of the bytes lose more. Allow more, "
            "fine-tune, or leave the methods out that cost most."
        )
    return best


@dataclass
class _Layer:
    """One layer in the budget: what it takes as it is, and what it may become, by the method that offers it."""

    size_bytes: int
    macs: int
    offers: dict[int, list[Candidate]] = field(default_factory=dict)


class _Sharing:
    """What is measured once, whatever the budget's value."""

    def __init__(
        self, model: nn.Module, methods: Sequence[CompressionMethod], quantity: str, samples: Samples, track: Any
    ) -> None:
        self.model, self.methods, self.samples = model, methods, samples
        self.quantity = "size" if quantity == "max_drop" else quantity
        self.track = track
        share = -(-PROBE_SAMPLES // len(samples.batches))
        few = tuple(first_samples(batch, share) for batch in samples.batches)
        self.few = Samples(few, samples.run).on_one_process()
        self.error = OutputError(model, self.few)
        self.bytes = stored_bytes(model)
        self.example: Any = self.few.arguments_of(model)
        self.macs = (None if self.example is None else count_macs(model, self.example)) or {}
        self.notes: dict[int, dict[str, Any]] = {}
        self.layers = self._layers()
        if not self.layers and not any(method.levels() for method in methods):
            names = ", ".join(method.name for method in methods)
            raise OptionError(f"None of the methods ({names}) offers a budget a choice for a layer of this model.")

    # -- what there is to choose from ----------------------------------------------------------------------------------

    def _layers(self) -> dict[str, _Layer]:
        """Layers with what they may become; losses are those of the model's outputs."""
        view = split_view(self.model)
        found: dict[str, _Layer] = {}
        for place, method in enumerate(self.methods):
            if not isinstance(method, LayerMethod) or type(method).candidates is CompressionMethod.candidates:
                continue
            context = CompressionContext(method.name, samples=self.samples.on_one_process())
            offers = method.offers(self.model, context)
            self.notes[id(method)] = context.notes
            for name, own in self.track(list(offers.items()), f"{method.name}: measuring"):
                dense = stored_bytes(view.get_submodule(name))
                saving = [offer for offer in own if self._saves(offer, dense)]
                if not saving:
                    continue
                if measured := self._by_outputs(method, name, saving, context):
                    layer = found.setdefault(name, _Layer(dense, self._macs_of(name, view)))
                    layer.offers[place] = measured
        return found

    def _saves(self, offer: Candidate, dense: int) -> bool:
        return offer.size_bytes < 0.95 * dense

    def _macs_of(self, name: str, view: nn.Module) -> int:
        return self.macs.get(name) or sum(p.numel() for p in view.get_submodule(name).parameters() if p.dim() > 1)

    def _by_outputs(
        self, method: LayerMethod, name: str, offers: list[Candidate], context: CompressionContext
    ) -> list[Candidate]:
        """The candidates of one layer with the error of the outputs as their loss.

        A few are measured, each alone in the model; between them the factor from loss to error is interpolated.
        """
        places = sorted({round(step * (len(offers) - 1) / (_PROBES - 1)) for step in range(_PROBES)})
        measured = [(place, self._factor(method, name, offers[place], context)) for place in places]
        known = [(place, factor) for place, factor in measured if factor is not None]
        if not known:  # its own rules (min_saving) forbid all of them
            return []
        at, factors = [place for place, _ in known], [factor for _, factor in known]
        scales = np.interp(range(len(offers)), at, factors)
        return [replace(offer, loss=offer.loss * float(scale)) for offer, scale in zip(offers, scales, strict=True)]

    def _factor(self, method: LayerMethod, name: str, offer: Candidate, context: CompressionContext) -> float | None:
        """The error of the outputs with one candidate in the model / its loss."""
        twin = deep_copy(self.model)
        chosen = replace(
            context, samples=self.few, choices={name: offer.options}, notes={**context.notes}, errors={}, state={}
        )
        try:
            method.compress_in_place(twin, context=chosen)
        except NothingToCompressError:
            return None
        deploy(twin)
        return self.error.of(twin) / max(offer.loss, _LOSSLESS)

    # -- sharing -------------------------------------------------------------------------------------------------------

    def best(self, value: float) -> Share:
        """Of all ways to keep to the budget, the one with the least error of the outputs."""
        plain, *pruned = self._levels()
        tried = [
            self._meet(value * aim, places, plain)
            for places in self._teams()
            for aim in (_AIMS if len(places) > 1 else _AIMS[:1])
        ]
        tried += [self._meet(value, self._teams()[0], extra) for extra in pruned]
        found = [share for share in tried if share.kept <= value * (1 + 1e-9) and math.isfinite(share.loss)]
        if not found:
            least = min((share.kept for share in tried if math.isfinite(share.loss)), default=1.0)
            raise BudgetError(
                f"budget={{{self.quantity!r}: {value:g}}} cannot be met: the methods keep at least {least:.2%}. Allow "
                "at least that, or add a method."
            )
        best = min(found, key=lambda share: share.loss)
        log.info("The budget %s=%g is shared out: %s", self.quantity, value, best)
        return best

    def meet(self, value: float) -> Share:
        """The least error of the outputs by all methods together; more is kept where the budget cannot be met."""
        tried = [self._meet(value, self._teams()[0], extra) for extra in self._levels()]
        return max(tried, key=lambda share: self._rank(share, value))

    def least(self) -> float:
        """The smallest share that can be kept."""
        return min(self._meet(0.0, self._teams()[0], extra).kept for extra in self._levels())

    def _levels(self) -> list[tuple[Step, ...]]:
        """Methods without choices layer by layer: each as it is, or at one of its levels, or not at all."""
        options: list[list[Step | None]] = []
        for place, method in enumerate(self.methods):
            if any(place in layer.offers for layer in self.layers.values()) and self._counts(place):
                continue
            levels = [Step(method, level) for level in method.levels()]
            options.append([None, *levels] if levels else [Step(method, method)])
        return [tuple(step for step in chosen if step is not None) for chosen in itertools.product(*options)]

    def _counts(self, place: int) -> bool:
        """Whether a method's candidates differ in the budget's quantity."""
        offers = [layer.offers[place] for layer in self.layers.values() if place in layer.offers]
        return self.quantity == "size" or any(len({offer.macs for offer in own}) > 1 for own in offers)

    def _teams(self) -> list[frozenset[int]]:
        """All methods that have choices to offer, and each alone."""
        places = {place for layer in self.layers.values() for place in layer.offers if self._counts(place)}
        alone = [frozenset({place}) for place in sorted(places)] if len(places) > 1 else []
        return [frozenset(places), *alone]

    def _meet(self, value: float, places: frozenset[int], extra: tuple[Step, ...]) -> Share:
        """Allocates, applies to a copy, measures, and corrects the budget by what was really kept."""
        aim, best = value, None
        for _ in range(_TRIES):
            share = self._measured(self._allocated(aim, places), extra)
            fits = share.kept <= value * (1 + 1e-9)
            if best is None or self._rank(share, value) > self._rank(best, value):
                best = share
            if (fits and share.kept >= _CLOSE * value) or value == 0:
                break
            step = value / share.kept
            aim = min(max(aim * (step if not fits else math.sqrt(step)), 1e-6), 1.0)
            if aim == 1.0 and fits:
                break
        assert best is not None
        return best

    def _rank(self, share: Share, value: float) -> tuple[bool, float]:
        fits = share.kept <= value * (1 + 1e-9)
        return fits, -share.kept if not fits else -share.loss

    def _allocated(self, aim: float, places: frozenset[int]) -> list[Step]:
        """The least sum of losses within a share of the quantity; the cheapest there is where that is more."""
        choices = {name: self._combinations(layer, places) for name, layer in self.layers.items()}
        choices = {name: own for name, own in choices.items() if len(own) > 1}
        if not choices:
            return []
        sized = self.quantity == "size"

        def cost(candidate: Candidate) -> float:
            return float(candidate.size_bytes if sized else candidate.macs)

        whole = self.bytes if sized else self.macs.get("", 0) or sum(layer.macs for layer in self.layers.values())
        rest = whole - sum(cost(own[0]) for own in choices.values())
        least = sum(min(map(cost, own)) for own in choices.values())
        chosen = allocate(choices, max(aim * whole - rest, least), cost)
        steps = []
        for place in sorted(places):
            own = {n: c.options[str(place)] for n, c in chosen.items() if str(place) in c.options}
            if own:
                steps.append(Step(self.methods[place], self.methods[place], own))
        return steps

    def _combinations(self, layer: _Layer, places: frozenset[int]) -> list[Candidate]:
        """The layer as it is, and with one candidate of each stage, or of some."""
        found = [Candidate({}, layer.size_bytes, layer.macs, 0.0)]
        stages: dict[Any, list[tuple[int, Candidate]]] = {}
        for place in sorted(places & layer.offers.keys()):
            own = [(place, offer) for offer in layer.offers[place]]
            stages.setdefault(self.methods[place].stage, []).extend(own)
        dense = max((max(offer.macs for _, offer in own) for own in stages.values()), default=1)
        for own in stages.values():
            found += [
                Candidate(
                    {**before.options, str(place): offer.options},
                    round(before.size_bytes * offer.size_bytes / layer.size_bytes),
                    min(before.macs, round(layer.macs * offer.macs / max(dense, 1))),
                    before.loss + before.factors * offer.loss,
                    factors=before.factors * offer.factors,
                )
                for before in list(found)
                for place, offer in own
            ]
        return found

    # -- measuring -----------------------------------------------------------------------------------------------------

    def deployed(self, steps: Iterable[Step]) -> nn.Module:
        """A compressed copy in deployed form."""
        return self._applied(steps)[1]

    def _applied(self, steps: Iterable[Step]) -> tuple[nn.Module, nn.Module]:
        model = deep_copy(self.model)
        apply_share(model, Share(tuple(steps), 1.0, 0.0), self.samples, self.notes)
        final = share_copy(model)
        deploy(final)
        return model, final.eval()

    def _measured(self, steps: list[Step], extra: tuple[Step, ...]) -> Share:
        ordered = sorted([*steps, *extra], key=lambda step: step.method.stage)
        try:
            model, final = self._applied(ordered)
        except ModelError as error:  # one of the methods has nothing to do after the others
            log.debug("%s", error)
            return Share(tuple(ordered), 1.0, math.inf)
        return Share(tuple(ordered), self._kept(model, final), self.error.of(final))

    def _kept(self, model: nn.Module, final: nn.Module) -> float:
        if self.quantity == "size":
            return make_report(model, original=self.model).size_ratio
        if self.quantity == "macs":
            after = count_macs(final, self.example)
            if not after or not self.macs:
                raise OptionError(
                    "The multiply-accumulates of this model cannot be counted: its forward looks at values."
                )
            return after[""] / self.macs[""]
        runs = {"before": self._runner(self.model), "after": self._runner(final)}
        timings = measure(runs, max_seconds=1.0)
        return timings["after"].relative_to(timings["before"]).median

    def _runner(self, model: nn.Module) -> Callable[[], Any]:
        twin, example = share_copy(model).eval(), self.example
        if example is None:  # forward takes other batches
            return lambda: list(run_samples(twin, self.few))
        args, kwargs = ((), example) if isinstance(example, dict) else (example, {})

        def run() -> Any:
            with torch.inference_mode():
                return twin(*args, **kwargs)

        return run

"""Methods that fit layers to their inputs: what they measure, when they do, and what they say about it."""

import logging
from collections.abc import Callable

from torch import nn

from pquant_lightning.core.calibration import Samples, is_distributed, run_samples
from pquant_lightning.core.compression_method import CompressionContext, LayerMethod
from pquant_lightning.core.errors import CalibrationError, counted
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.moments import InputMoments, MomentSource, has_moments
from pquant_lightning.core.options import check_count
from pquant_lightning.core.plan import CompressionPlan, LayerPlan
from pquant_lightning.core.reduction import on_all
from pquant_lightning.core.splitting import split_as_planned

log = logging.getLogger(__name__)


class DataAwareMethod(LayerMethod):
    """Base of methods that give layers the least error of their outputs on samples instead of that of their weights.

    `plan_layer`, `candidates` and `fill` find the moments of a layer's inputs by `moments_of`; where there are none
    they do without.

    Args:
        data_aware: fit to the inputs of the layers. None does so where there are data and no training follows.
        num_samples: samples of the training data to measure the inputs on.
        max_statistics_bytes: what the measured moments may take at a time; more are measured in several passes.
    """

    data_aware: bool | None = None
    num_samples: int = 300
    max_statistics_bytes: int = 2**30

    def validate_config(self) -> None:
        super().validate_config()
        check_count(type(self), "num_samples", self.num_samples, low=1)
        check_count(type(self), "max_statistics_bytes", self.max_statistics_bytes, low=1)

    @property
    def wanted_samples(self) -> int:
        return 0 if self.data_aware is False else self.num_samples

    @property
    def wanted_samples_in_trainer(self) -> int:
        return self.num_samples if self.needs_samples else 0

    @property
    def needs_samples(self) -> bool:
        return self.data_aware is True

    # -- planning ----------------------------------------------------------------------------------------------------

    def with_source(self, model: nn.Module, context: CompressionContext | None) -> CompressionContext:
        """The context with the usable samples and the source of moments in its notes; idempotent."""
        context = context or CompressionContext(by=self.name)
        if "samples" not in context.notes:
            samples = context.notes["samples"] = self._usable(model, context.samples)
            if samples is not None:
                # one process plans; all of them measure again when the plan is applied
                view = self.opened(model, context)
                context.notes["source"] = self._source(view, samples.on_one_process())
        return context

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        return super().plan(model, self.with_source(model, context))

    def prepared(self, model: nn.Module, context: CompressionContext) -> CompressionContext:
        return self.with_source(model, context)

    def _usable(self, model: nn.Module, samples: Samples | None) -> Samples | None:
        """The samples, or None where there are none, or the model does not run on them and need not."""
        if samples is None or not self.wanted_samples:
            return None
        failure = None
        try:
            for _ in run_samples(model, samples.few()):
                pass
        except CalibrationError as error:
            failure = error
        if on_all(failure is None, samples):
            return samples
        failure = failure or CalibrationError("The model cannot be run on the samples of another process.")
        if self.needs_samples:
            raise failure
        log.warning("%s goes on without data: %s", self.name, failure)
        return None

    def _source(self, model: nn.Module, samples: Samples) -> MomentSource:
        layers = {name: as_torch(module) for name, module in self._targets(model, [])}
        names = [name for name, layer in layers.items() if layer is not None and has_moments(layer)]
        return MomentSource(model, names, samples, self.max_statistics_bytes)

    # -- applying ----------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        context = context or CompressionContext(by=plan.by)
        notes = context.notes
        samples = notes["samples"] if "samples" in notes else self._usable(model, context.samples)
        if samples is None and self.needs_samples:
            raise CalibrationError(
                f"{self.name} is to measure the inputs of the layers (data_aware=True, or an option that needs it): "
                "give compress_model a train_loader (a loader, a list of batches or a datamodule)."
            )
        if samples is None:
            super().apply(model, plan, context)
            return
        split_as_planned(model, plan.splits)
        notes["singular"], notes["unreached"] = [], []
        self.apply_with(samples, super().apply, model, plan, context)
        self._report_data(context, samples)

    def apply_with(
        self,
        samples: Samples,
        apply: Callable[[nn.Module, CompressionPlan, CompressionContext], None],
        model: nn.Module,
        plan: CompressionPlan,
        context: CompressionContext,
    ) -> None:
        """Calls `apply(model, plan, context)` with a source of moments in the notes."""
        if "source" not in context.notes or is_distributed():
            context.notes["source"] = self._source(model, samples)
        context.notes["source"].collect_first()
        apply(model, plan, context)

    def note_fit(self, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> InputMoments | None:
        """The moments that `fill` uses for one layer, with a note for the log where they say little or are missing."""
        moments = moments_of(plan.name, context)
        if "source" in context.notes and has_moments(old):
            if moments is None:
                context.notes["unreached"].append(plan.name)
            elif moments.count < moments.width:
                context.notes["singular"].append(plan.name)
        return moments

    def _report_data(self, context: CompressionContext, samples: Samples) -> None:
        source, notes = context.notes.get("source"), context.notes
        passes = f" in {source.passes} passes (max_statistics_bytes)" if source and source.passes > 1 else ""
        if source and source.blocks:
            passes = f", block by block in {len(source.blocks)} blocks (max_statistics_bytes)"
        log.info("%s has fitted layers to their inputs in %d samples%s.", self.name, samples.count, passes)
        if notes["unreached"]:
            log.warning("The samples never reach %s: fitted to the weights alone.", ", ".join(notes["unreached"]))
        if notes["singular"]:
            log.warning(
                "%s (%s) saw fewer input vectors than a vector has entries: what the samples do not show is fitted to "
                "the weights alone. Raise num_samples=%d, or give more data.",
                counted(len(notes["singular"]), "layer"),
                ", ".join(notes["singular"][:5]) + ("" if len(notes["singular"]) <= 5 else ", ..."),
                self.num_samples,
            )


def moments_of(name: str, context: CompressionContext | None) -> InputMoments | None:
    """The moments of one layer's inputs, where the context has a source of them that reaches it."""
    source = None if context is None else context.notes.get("source")
    return None if source is None else source.get(name)

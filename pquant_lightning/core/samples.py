"""Samples of the user's own data, and a model run on them, as it was before when all is done."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core.batches import batch_size, bind_batch, describe_batch, first_samples, map_tensors
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.reduction import gathered_on_zero, on_all, reduces
from pquant_lightning.core.steps import RandomNumbers, Run, run_forward, steps_of, transferred

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Batches to calibrate on, in memory.

    Attributes:
        batches: as the loader gives them.
        run: how a model is run on one batch.
        reduce: whether statistics are combined over all processes, each of which holds samples of its own.
    """

    batches: tuple[Any, ...]
    run: Run
    reduce: bool = True

    @classmethod
    def take(cls, source: Any, count: int, run: Run | None = None, seed: int = 0, datamodule: Any = None) -> Self:
        """The first `count` samples of a loader, or of a datamodule's training loader.

        Random states (those of torch, NumPy and Python, and the loader's generator) are as before; `seed` decides what
        a shuffling loader gives. Fewer samples than asked for are used with a warning.

        Args:
            source: an iterable of batches, or an object with `train_dataloader()`.
            count: samples to take (see `batch_size`); a batch that cannot be cut is taken whole.
            run: how a model is run on one batch; None calls `forward` (see `bind_batch` and `fitted_to`).
            seed: of the global random states while batches are drawn.
            datamodule: whose hooks around the transfer of a batch to a device the batches go through, where the source
                is one of its loaders.

        Raises:
            CalibrationError: the source cannot be iterated, or holds no sample.
        """
        batches, found = [], 0
        with RandomNumbers(seed):
            loader = _loader_of(source)
        hooks = source if loader is not source and not isinstance(source, nn.Module) else datamodule
        with RandomNumbers(seed), _kept_generators(loader):
            for batch in loader:
                batch = batch if hooks is None else transferred(hooks, batch)
                size = batch_size(batch)
                batches.append(first_samples(batch, count - found) if size > count - found else batch)
                found += min(size, count - found)
                if found >= count:
                    break
        if found == 0:
            raise CalibrationError(
                f"The calibration data ({type(source).__name__}) hold 0 samples; give a loader with at least one batch."
            )
        if found < count:
            log.warning("The loader holds only %d samples, and %d were asked for: these are used.", found, count)
        return cls(tuple(batches), run or run_forward)

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(map(batch_size, self.batches))

    def of_all_processes(self) -> Self | None:
        """On process 0 the samples of all of them, to decide alone as one that has all; on the others None."""
        if not reduces(self):
            return self
        batches = [_on_cpu(batch) for batch in self.batches]
        parts = gathered_on_zero(batches)
        if parts is None:
            return None
        return replace(self, batches=tuple(batch for part in parts for batch in part), reduce=False)

    def arguments_of(self, model: nn.Module) -> Any:
        """The first batch as `forward` takes it, keywords as a dict; None where it takes other batches."""
        try:
            args, kwargs = bind_batch(model, self.batches[0])
        except CalibrationError:
            return None
        return kwargs or args

    def few(self) -> Self:
        """The first two samples, to see what a model does with them; on this process alone."""
        return replace(self, batches=(first_samples(self.batches[0], 2),), reduce=False)

    def fitted_to(self, model: nn.Module) -> Self:
        """The same samples, run as a LightningModule takes them: by `predict_step`, `forward` or `training_step`.

        The first that runs on two samples and on three, in all processes: a tensor of two samples unpacks like a pair.
        Which it is stands in the log where it is not the first there is. Where none does, running them raises a
        CalibrationError that says why. Samples that are run in a way of their own, or on another module, stay as they
        are.
        """
        steps = steps_of(model)
        if self.run is not run_forward or not steps:
            return self
        failures: list[str] = []
        tried = replace(self.few(), batches=tuple(first_samples(self.batches[0], count) for count in (2, 3)))
        for step in steps:
            failure = ""
            try:
                deque(run_samples(model, replace(tried, run=step)), maxlen=0)
            except CalibrationError as error:
                cause = error.__cause__
                failure = str(error) if cause is None else f"{type(cause).__name__}{_where(model, cause)}: {cause}"
            if on_all(not failure, self):
                if failures:
                    log.info("Calibration runs %s.%s (%s).", type(model).__name__, step.described, "; ".join(failures))
                return replace(self, run=step)
            failures.append(f"{step.described}: {failure or 'fails in another process'}")
        return replace(self, run=_Refusal(self._refused(model, failures)))

    def _refused(self, model: nn.Module, failures: list[str]) -> str:
        return (
            f"{type(model).__name__} cannot be run on the calibration batches ({describe_batch(self.batches[0])}): "
            f"{'; '.join(failures)}. Give a loader whose batches hold what forward takes, in its order, optionally "
            "followed by a target; in a LightningModule, predict_step(batch, batch_idx) may say what to run."
        )

    def on_one_process(self) -> Self:
        """The same samples, with statistics that are not combined over processes."""
        return replace(self, reduce=False)


@dataclass(frozen=True)
class _Refusal:
    """Stands for a way to run a model where there is none."""

    reason: str

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        raise CalibrationError(self.reason)


def _on_cpu(batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor.cpu(), batch)


def _loader_of(source: Any) -> Iterable[Any]:
    if hasattr(source, "train_dataloader"):
        for prepare in ("prepare_data", "setup"):
            if hasattr(source, prepare):
                getattr(source, prepare)(*(["fit"] if prepare == "setup" else []))
        source = source.train_dataloader()
    if not isinstance(source, Iterable) or isinstance(source, Tensor | Mapping | str):
        raise CalibrationError(
            f"Calibration data are a DataLoader, a list of batches or a datamodule, got {type(source).__name__}."
        )
    return source


@contextmanager
def _kept_generators(loader: Any) -> Iterator[None]:
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = {id(g): g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


# -- running the model -----------------------------------------------------------------------------------------------


def run_samples(model: nn.Module, samples: Samples, batch_norms: bool = False) -> Iterator[Any]:
    """Runs the model on each batch, in eval mode without gradients; yields its outputs.

    Batches are moved to the model's device, and to its precision where that is not float32. Random numbers that the
    model draws are the same in every pass, and those of the caller are not moved.

    Args:
        model: its training flags and its statistics are as before when all is done.
        samples: what to run it on.
        batch_norms: normalise by the statistics of each batch where training does: those of a model that is not trained
            yet are not kept, and its layers would see other values in eval. Norms that the user keeps in eval stay so,
            and so do all others for a batch with a single value per channel.

    Raises:
        CalibrationError: the model cannot be run on these batches.
    """
    reference = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    halved = reference.dtype != torch.float32  # a loader gives float32, whatever the model's precision is

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(reference.device, reference.dtype if halved and tensor.is_floating_point() else None)

    def placed_whole(value: Any) -> Any:
        if not callable(getattr(value, "to", None)) or reference.device.type in ("cpu", "meta"):
            return value
        twin = copy(value)
        return moved if (moved := twin.to(reference.device)) is not None else twin

    numbers = RandomNumbers(device=reference.device)
    norms = _trained_norms(model) if batch_norms else []  # before all modules are in eval
    with _in_eval(model), _by_batch(norms):
        for batch in samples.batches:
            with torch.no_grad(), numbers:
                output = _run(model, samples.run, map_tensors(placed, batch, placed_whole))
            yield output


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    nesting: list[Any] = [module for module in model.modules() if getattr(module, "use_nested_tensor", False) is True]
    for module, _ in modes:
        module.training = False
    for module in nesting:  # what layers receive must be ordinary tensors
        module.use_nested_tensor = False
    try:
        yield
    finally:
        for module in nesting:
            module.use_nested_tensor = True
        for module, training in modes:
            module.training = training


def _trained_norms(model: nn.Module) -> list[Any]:
    """The norms with running statistics that training updates: those that are in training mode while the model is."""
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()  # a model's own `train` may leave some of them in eval
    found = [
        module for module in model.modules() if module.training and getattr(module, "running_mean", None) is not None
    ]
    for module, training in modes:
        module.training = training
    return found


@contextmanager
def _by_batch(norms: list[Any]) -> Iterator[None]:
    """Meanwhile norms use the statistics of each batch, and leave their own as they are."""

    def choose(norm: Any, args: Any) -> None:
        norm.training = has_variance(norm, args[0])

    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    handles = [norm.register_forward_pre_hook(choose) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum, tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def has_variance(norm: nn.Module, x: Tensor) -> bool:
    """Whether an input has more than one value per channel: training by the batch's statistics needs them."""
    alone = isinstance(norm, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return (1 if alone else len(x)) * x.shape[2:].numel() > 1


def _run(model: nn.Module, run: Run, batch: Any) -> Any:
    try:
        return run(model, batch)
    except CalibrationError:
        raise
    except Exception as error:  # whatever a user's forward may raise on a batch that it was not made for
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise CalibrationError(
                f"There is not enough memory to calibrate {type(model).__name__}{_where(model, error)}: {error}. Give "
                "smaller batches; a method's max_statistics_bytes bounds what it measures at a time."
            ) from error
        raise CalibrationError(
            f"{type(model).__name__} cannot be run on the calibration batches ({describe_batch(batch)}): "
            f"{type(error).__name__}{_where(model, error)}: {error}. Give a loader whose batches hold what forward "
            "takes, in its order, optionally followed by a target; in a LightningModule, predict_step(batch, "
            "batch_idx) may say what to run."
        ) from error


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model in which an error was raised, in words."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found, trace = "", error.__traceback__
    while trace is not None:
        name = names.get(id(trace.tb_frame.f_locals.get("self")))
        found = f" in {name!r}" if name else found
        trace = trace.tb_next
    return found

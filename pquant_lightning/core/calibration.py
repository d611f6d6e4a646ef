"""Calibration: a few samples of the user's own data, run through the model, and what its layers receive meanwhile."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from pquant_lightning.core.errors import CalibrationError, a_or_an, counted
from pquant_lightning.core.layer_adapter import channel_dim

log = logging.getLogger(__name__)

MOVING_AVERAGE = 0.1  # weight of the newest batch
MAX_VALUES = 2**18  # values kept per layer, evenly spread over all it receives: 1 MiB

Run = Callable[[nn.Module, Any], Any]
Decision = TypeVar("Decision")


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
    def take(cls, source: Any, count: int, run: Run | None = None, seed: int = 0) -> Self:
        """The first `count` samples of a loader, or of a datamodule's training loader.

        Random states (the global one, and the loader's generator) are as before; `seed` decides what a shuffling loader
        gives. Fewer samples than asked for are used with a warning.

        Args:
            source: an iterable of batches, or an object with `train_dataloader()`.
            count: samples to take; a batch's samples are the entries along the first dimension of its first tensor.
            run: how a model is run on one batch; None calls `forward` (see `bind_batch`).
            seed: of the global random state while batches are drawn.

        Raises:
            CalibrationError: the source cannot be iterated, or holds no sample.
        """
        loader = _loader_of(source)
        batches, found = [], 0
        with torch.random.fork_rng(devices=[]), _kept_generator(loader):
            torch.manual_seed(seed)
            for batch in loader:
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

    def on_one_process(self) -> Self:
        """The same samples, with statistics that are not combined over processes."""
        return replace(self, reduce=False)


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
def _kept_generator(loader: Any) -> Iterator[None]:
    generators = [getattr(holder, "generator", None) for holder in (loader, getattr(loader, "sampler", None))]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _map(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map(change, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(change, value) for value in batch))
    return type(batch)(_map(change, value) for value in batch) if isinstance(batch, list | tuple) else batch


def batch_size(batch: Any) -> int:
    """Entries along the first dimension of the first tensor in the batch; 1 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((batch_size(value) for value in inner if isinstance(value, Tensor | Mapping | list | tuple)), 1)


def first_samples(batch: Any, count: int) -> Any:
    """The batch with the first `count` of its samples."""
    size = batch_size(batch)
    return _map(lambda tensor: tensor[:count] if tensor.dim() and tensor.shape[0] == size else tensor, batch)


# -- running the model -----------------------------------------------------------------------------------------------


def bind_batch(model: nn.Module, batch: Any, labelled: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `model.forward` out of a batch.

    A tensor is the first argument. Of a tuple or list with several entries the last is the target, unless `forward`
    requires them all; it gives as many positional arguments as `forward` takes. Where the first entry is a tuple or a
    dict, it holds all inputs. Of a dict, the entries that `forward`
    has names for are passed by name; where it has none, the dict is the first argument.

    Raises:
        CalibrationError: `forward` requires more than the batch holds.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if isinstance(batch, Mapping):
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {key: batch[key] for key in batch if open_ended or key in [p.name for p in parameters]}
        if not named and len(required) <= 1:
            return (batch,), {}
        if missing := [p.name for p in required if p.name not in named]:
            raise CalibrationError(
                f"{type(model).__name__}.forward requires {', '.join(missing)}, and the calibration batches are dicts "
                f"with {', '.join(map(repr, batch))}. Give a loader whose dicts have the names of forward's arguments."
            )
        return (), named
    if not isinstance(batch, list | tuple):
        return (batch,), {}
    if batch and isinstance(batch[0], Mapping | list | tuple):
        return bind_batch(model, batch[0], labelled=False)
    inputs = batch[:-1] if labelled and len(batch) > max(1, len(required)) else batch
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        inputs = inputs[: len(positional)]
    if len(inputs) < len(required):
        raise CalibrationError(
            f"{type(model).__name__}.forward requires {', '.join(p.name for p in required)}, and the calibration "
            f"batches hold {counted(len(inputs), 'input')}. Give a loader whose batches have forward's arguments first."
        )
    return tuple(inputs), {}


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Calls the model on a batch of a loader (see `bind_batch`)."""
    args, kwargs = bind_batch(model, batch)
    return model(*args, **kwargs)


def main_output(output: Any) -> Tensor:
    """The tensor that a model's output is about: itself, its `logits`, or the first floating-point tensor in it.

    Raises:
        CalibrationError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    values = output
    if isinstance(output, Mapping):
        values = [output["logits"]] if "logits" in output else list(output.values())
    for value in values if isinstance(values, list | tuple) else ():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise CalibrationError(f"The model returns {a_or_an(type(output).__name__)}, which holds no tensor to compare.")


def run_samples(model: nn.Module, samples: Samples, batch_norms: bool = False) -> Iterator[Any]:
    """Runs the model on each batch, in eval mode without gradients; yields its outputs.

    Batches are moved to the model's device, and to its precision where that is not float32.

    Args:
        model: its training flags and its statistics are as before when all is done.
        samples: what to run it on.
        batch_norms: normalise by the statistics of each batch, as in training: those of a model that is not trained yet
            are not kept, and its layers would see other values in eval. Batches of one sample are passed over.

    Raises:
        CalibrationError: the model cannot be run on these batches.
    """
    reference = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    halved = reference.dtype != torch.float32  # a loader gives float32, whatever the model's precision is

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(reference.device, reference.dtype if halved and tensor.is_floating_point() else None)

    modes = [(module, module.training) for module in model.modules()]
    nesting: list[Any] = [module for module in model.modules() if getattr(module, "use_nested_tensor", False) is True]
    model.eval()
    for module in nesting:  # what layers receive must be ordinary tensors
        module.use_nested_tensor = False
    norms: list[Any] = [
        module for module in model.modules() if batch_norms and getattr(module, "running_mean", None) is not None
    ]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        for batch in samples.batches:
            if norms and batch_size(batch) < 2:
                continue
            with torch.no_grad():
                yield _run(model, samples.run, _map(placed, batch))
    finally:
        for module in nesting:
            module.use_nested_tensor = True
        for norm, momentum, tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, tracked
        for module, training in modes:
            module.training = training


def _run(model: nn.Module, run: Run, batch: Any) -> Any:
    try:
        return run(model, batch)
    except CalibrationError:
        raise
    except Exception as error:  # whatever a user's forward may raise on a batch that it was not made for
        raise CalibrationError(
            f"{type(model).__name__} cannot be run on the calibration batches ({describe_batch(batch)}): "
            f"{type(error).__name__}{_where(model, error)}: {error}. Give a loader whose batches hold what forward "
            "takes, in its order, optionally followed by a target; in a LightningModule, predict_step(batch, "
            "batch_idx) may say what to run."
        ) from error


def _where(model: nn.Module, error: Exception) -> str:
    """The innermost module of the model in which an error was raised, in words."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found, trace = "", error.__traceback__
    while trace is not None:
        name = names.get(id(trace.tb_frame.f_locals.get("self")))
        found = f" in {name!r}" if name else found
        trace = trace.tb_next
    return found


def describe_batch(batch: Any) -> str:
    """Types and shapes in a few words."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "a dict of " + ", ".join(f"{key}: {describe_batch(value)}" for key, value in batch.items())
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of " + ", ".join(map(describe_batch, batch))
    return type(batch).__name__


# -- statistics ------------------------------------------------------------------------------------------------------


@dataclass
class InputStatistics:
    """What one layer has received over all samples and processes.

    Attributes:
        minimum: of all values.
        maximum: of all values.
        moving: exponential moving averages of the batches' minima and maxima.
        mean: float32 `(channels,)`, per input channel.
        histogram: float32 `(bins,)`, counts between `minimum` and `maximum` in equal bins.
    """

    minimum: float
    maximum: float
    moving: tuple[float, float]
    mean: Tensor
    histogram: Tensor


class _Collector:
    """Sums over the batches of one layer; `values` are an even selection, at most `MAX_VALUES`."""

    def __init__(self, name: str, layer: nn.Module, share: int) -> None:
        self.name, self.layer, self.share = name, layer, share
        self.extremes: Tensor | None = None  # (2,): -minimum, maximum, so that both are maxima
        self.moving = torch.zeros(2, dtype=torch.float32)
        self.total, self.count = torch.zeros(()), 0
        self.values: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        x = x.float()
        low, high = torch.aminmax(x)
        extremes = torch.stack([-low, high]).cpu()
        if not torch.isfinite(extremes).all():
            raise CalibrationError(
                f"The inputs of layer {self.name!r} hold NaN or infinite values in calibration. Look at the data and "
                "the weights; a model that gives NaN cannot be calibrated."
            )
        first = self.extremes is None
        self.moving = extremes if first else self.moving.lerp(extremes, MOVING_AVERAGE)
        self.extremes = extremes if first else self.extremes.maximum(extremes)  # type: ignore[union-attr]
        dim = channel_dim(self.layer)
        self.total = self.total + x.sum([d for d in range(x.dim()) if d != dim % x.dim()], dtype=torch.float64).cpu()
        self.count += x.numel() // x.shape[dim]
        stride = -(-x.numel() // self.share) | 1  # odd, so that it does not keep to the same channels
        self.values.append(x.flatten()[::stride].cpu())


def collect_inputs(
    model: nn.Module, names: Sequence[str], samples: Samples, bins: int = 2048, batch_norms: bool = False
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the named layers, in one pass over the samples (`batch_norms`: see `run_samples`).

    Layers that receive nothing (or no floating-point tensor) are not in the result.

    Raises:
        CalibrationError: a layer receives NaN or infinite values, or the model cannot be run.
    """
    share = max(MAX_VALUES // len(samples.batches), 1)
    collectors = {name: _Collector(name, model.get_submodule(name), share) for name in names}
    visit_inputs(model, names, samples, lambda name, x: collectors[name](x), batch_norms)
    return {n: _summary(c, bins, _reduces(samples)) for n, c in collectors.items() if c.extremes is not None}


@contextmanager
def output_ranges(
    model: nn.Module, names: Mapping[str, str], samples: Samples
) -> Iterator[dict[str, tuple[float, float]]]:
    """The least and the largest output of modules while the block runs, filled in at its end.

    Args:
        model: what runs in the block.
        names: by the key that they get in the result, names of modules.
        samples: what it runs on.
    """
    seen: dict[str, Tensor] = {}

    def hook(key: str) -> Any:
        def call(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                ends = torch.stack([-output.detach().amin(), output.detach().amax()]).float()
                seen[key] = ends if key not in seen else torch.maximum(seen[key], ends)

        return call

    handles = [model.get_submodule(name).register_forward_hook(hook(key)) for key, name in names.items()]
    found: dict[str, tuple[float, float]] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for key, ends in seen.items():
        low, high = reduced(ends, samples, torch.distributed.ReduceOp.MAX).tolist()
        found[key] = (-low, high)


def visit_inputs(
    model: nn.Module,
    names: Sequence[str],
    samples: Samples,
    visit: Callable[[str, Tensor], None],
    batch_norms: bool = False,
) -> None:
    """Calls `visit(name, x)` with every floating-point input of the named layers, in one pass over the samples."""

    def hook(name: str) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0:
                visit(name, x.detach())

        return call

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    try:
        for _ in run_samples(model, samples, batch_norms):
            pass
    finally:
        for handle in handles:
            handle.remove()


def reduced(total: Tensor, samples: Samples, by: Any = None) -> Tensor:
    """A sum over the samples of this process, in place the sum over those of all processes; `by` a ReduceOp else."""
    if _reduces(samples):
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM if by is None else by)
    return total


def from_rank_zero(decision: Decision, samples: Samples) -> Decision:
    """What process 0 has decided, on all processes that look at samples of their own."""
    if _reduces(samples):
        held = [decision]
        torch.distributed.broadcast_object_list(held, src=0)
        (decision,) = held
    return decision


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _reduces(samples: Samples) -> bool:
    return samples.reduce and is_distributed()


def _summary(collected: _Collector, bins: int, reduce: bool) -> InputStatistics:
    assert collected.extremes is not None
    extremes, moving = collected.extremes.double(), collected.moving.double()
    sums = torch.cat([moving, collected.total, torch.tensor([1.0, collected.count], dtype=torch.float64)])
    if reduce:
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(sums)
    low, high = -float(extremes[0]), float(extremes[1])
    values = torch.cat(collected.values)
    histogram = torch.histc(values, bins, low, high) if high > low else torch.zeros(bins, dtype=torch.float32)
    if reduce:
        torch.distributed.all_reduce(histogram)
    processes, count = float(sums[-2]), float(sums[-1])
    moving = sums[:2] / processes
    mean = (sums[2:-2] / count).float()
    return InputStatistics(low, high, (-float(moving[0]), float(moving[1])), mean, histogram)

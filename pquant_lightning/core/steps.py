"""How a model is run on a batch of its training data, and that nothing of it is left behind: random numbers, logs."""

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.core._private import TENSOR_TABLES
from pquant_lightning.core.batches import bind_batch

Run = Callable[[nn.Module, Any], Any]

_LIGHTNING, _BASES = ("lightning", "pytorch_lightning"), ("LightningModule", "DataHooks", "ModelHooks")
_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
_LOGGING = ("log", "log_dict", "print")
_MODULE_TABLES = frozenset(vars(nn.Module()))


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Calls the model on a batch of a loader (see `bind_batch`)."""
    args, kwargs = bind_batch(model, batch)
    return model(*args, **kwargs)


# -- random numbers --------------------------------------------------------------------------------------------------


class RandomNumbers:
    """Random numbers of its own for what runs inside: those outside (torch, NumPy, Python) are not moved.

    Each further block goes on where the last one ended.

    Args:
        seed: of the first block.
        device: whose generator is kept as well; None for the CPU alone.

    >>> before = torch.get_rng_state()
    >>> with RandomNumbers(0):
    ...     first = torch.rand(2)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """

    def __init__(self, seed: int = 0, device: torch.device | None = None) -> None:
        accelerated = device is not None and device.type not in ("cpu", "meta")
        self._accelerator = device if accelerated else None
        self._seed = seed
        self._own: Any = None
        self._outside: Any = None

    def __enter__(self) -> None:
        self._outside = self._states()
        if self._own is None:
            random.seed(self._seed)
            numpy.random.seed(self._seed % 2**32)
            torch.default_generator.manual_seed(self._seed)
            if self._accelerator is not None:
                torch.get_device_module(self._accelerator).manual_seed(self._seed)
        else:
            self._set(self._own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own = self._states()
        self._set(self._outside)

    def _states(self) -> tuple[Any, ...]:
        found = random.getstate(), numpy.random.get_state(), torch.default_generator.get_state()
        if self._accelerator is None:
            return found
        return *found, torch.get_device_module(self._accelerator).get_rng_state(self._accelerator)

    def _set(self, states: tuple[Any, ...]) -> None:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
        if self._accelerator is not None:
            torch.get_device_module(self._accelerator).set_rng_state(states[3], self._accelerator)


# -- the steps of a LightningModule ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleStep:
    """Runs one of a LightningModule's steps on a batch as its training gives it.

    Attributes:
        name: of the step, or "forward".
        trainer: what the module is attached to meanwhile, where it is to none.
        transferred: whether the module's hooks around the transfer of a batch come first, as in training.
        as_in_training: the user's own modules are in training mode, and torch's layers (dropout, norms) still in eval.
    """

    name: str
    trainer: Any = None
    transferred: bool = True
    as_in_training: bool = False

    @property
    def described(self) -> str:
        """In words."""
        if self.name == "forward":
            return "forward" if self.transferred else "forward, on batches without the module's transfer hooks"
        return f"{self.name} (in training mode, without dropout)" if self.as_in_training else self.name

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(_silenced(model, self.trainer))
            if self.name == "training_step":
                stack.enter_context(_restored(model))
            if self.as_in_training:
                stack.enter_context(_own_modules_train(model))
            if self.transferred:
                batch = transferred(model, batch)
            if self.name == "forward":
                return run_forward(model, batch)
            step: Any = getattr(model, self.name)
            return step(*(batch, 0)[: _count_arguments(step)])


def transferred(holder: Any, batch: Any) -> Any:
    """A batch as it is after the transfer hooks that a module or datamodule has of its own."""
    for hook in _HOOKS:
        if _is_own(holder, hook):
            batch = getattr(holder, hook)(batch, 0)
    return batch


def steps_of(model: nn.Module) -> list[ModuleStep]:
    """The ways to run a LightningModule on a training batch, the best first; none for another module.

    What `predict_step` and `forward` do is what the model is for. They may take other batches than the training gives;
    `training_step` takes these, and where it compares outputs that there are in training mode alone, it runs in that.
    Under manual optimization it would train, and is none of them.
    """
    if not hasattr(model, "training_step"):
        return []
    trainer = vars(model).get("_trainer")
    found = [ModuleStep("predict_step", trainer)] if _is_own(model, "predict_step") else []
    found.append(ModuleStep("forward", trainer))
    if _is_own(model, "training_step") and getattr(model, "automatic_optimization", True):
        found += [ModuleStep("training_step", trainer, as_in_training=flag) for flag in (False, True)]
    if any(_is_own(model, hook) for hook in _HOOKS):
        found.append(ModuleStep("forward", trainer, transferred=False))
    return found


def _count_arguments(step: Callable[..., Any]) -> int:
    """How many positional arguments a step takes: some have no `batch_idx`."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _is_own(holder: Any, name: str) -> bool:
    """Whether a method is there and is not the one of Lightning (of either package) that all modules have."""
    function = getattr(holder, name, None)
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    owner = str(getattr(function, "__qualname__", "")).partition(".")[0]
    return callable(function) and not (package in _LIGHTNING and owner in _BASES)


class _Silence:
    """Takes any call and any attribute, and does nothing: a logger's place."""

    def __getattr__(self, name: str) -> "_Silence":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Silence":
        return self


@contextmanager
def _silenced(model: nn.Module, trainer: Any) -> Iterator[None]:
    """Meanwhile the module logs nothing, and is attached to the trainer."""
    own, changed = vars(model), dict.fromkeys(_LOGGING, _Silence())
    kept = {name: own[name] for name in _LOGGING if name in own}
    attach = trainer is not None and own.get("_trainer", trainer) is None
    loggers = None if trainer is None else list(trainer.loggers)
    own.update({name: silence for name, silence in changed.items() if hasattr(model, name)})
    if loggers:
        trainer.loggers = [_Silence()]
    if attach:
        own["_trainer"] = trainer
    try:
        yield
    finally:
        for name in _LOGGING:
            own.pop(name, None)
        own.update(kept)
        if loggers:
            trainer.loggers = loggers
        if attach:
            own["_trainer"] = None


@contextmanager
def _own_modules_train(model: nn.Module) -> Iterator[None]:
    chosen = [
        module
        for module in model.modules()
        if not type(module).__module__.startswith("torch.nn.") and getattr(module, "running_mean", None) is None
    ]
    modes = [(module, module.training) for module in chosen]
    for module in chosen:
        module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """What a step writes to (metrics, lists of outputs, buffers, averaged weights) is as before at the end."""
    attributes = [(vars(m), {k: v for k, v in vars(m).items() if k not in _MODULE_TABLES}) for m in model.modules()]
    held = [value for _, own in attributes for value in own.values()]
    contents = [(value, value.copy()) for value in held if type(value) in (list, dict, set)]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    tensors = {id(t): t for t in (*model.buffers(), *frozen, *held) if isinstance(t, Tensor) and not t.is_meta}
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    tables = [vars(module)[TENSOR_TABLES[1]] for module in model.modules()]
    buffers = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for own, before in attributes:
            for name in [name for name in own if name not in _MODULE_TABLES and name not in before]:
                del own[name]
            own.update(before)
        for table, entries in buffers:
            table.update(entries)
        for container, before in contents:
            container.clear()
            container.update(before) if isinstance(container, dict | set) else container.extend(before)
        with torch.no_grad():
            for tensor, value in values:
                tensor.data.copy_(value)

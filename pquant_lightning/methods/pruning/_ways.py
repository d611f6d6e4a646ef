"""The ways through a model in which it is tried: at several sizes, in training, by `predict_step` and `generate`."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, bind_batch, run_samples
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.steps import Run
from pquant_lightning.core.structure import replace_tensors

Way = Callable[[nn.Module], list[Tensor]]  # runs a model, which it may change, and gives what it has computed

_TOKENS = 3  # that are generated
_LIMITS = ("max_new_tokens", "num_tokens", "max_length", "max_len", "num_steps", "steps", "length")  # how many they are
_INPUTS = ("input_ids", "attention_mask", "input_features", "input_values", "pixel_values", "inputs_embeds")
_SEED = 0x5EED
_SPREAD = 0.2  # of the values that a constant is given
_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


def ways_through(model: nn.Module, sizes: Samples) -> list[Way]:
    """The ways in which a model runs: the first is the example as it is.

    Args:
        model: is not changed.
        sizes: the example, at several sizes.
    """
    first = sizes.batches[0]
    ways = [_evaluated(replace(sizes, batches=(batch,))) for batch in sizes.batches]
    others = [_trained(replace(sizes, batches=sizes.batches[1:2] or (first,)))]
    if callable(getattr(model, "predict_step", None)):
        others.append(_evaluated(Samples((first,), _predicted)))
    for path in _generators(model):
        others.append(_generated(path, replace(sizes, batches=(first,))))
    return [*ways, *(way for way in others if _goes(model, way))]


def own_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, with buffers of its own: training writes into them."""
    copied = share_copy(model)
    replace_tensors(copied, {id(buffer): buffer.detach().clone() for buffer in model.buffers()})
    return copied


def without_constants(model: nn.Module) -> nn.Module:
    """A copy in which no parameter or statistic is constant along a dimension: what is all zero would hide a mistake.

    Positions that start from zero, scales of one and adapters of zeros get random values near to them.
    """
    copied, generator = own_copy(model), torch.Generator().manual_seed(_SEED)
    new: dict[int, Tensor] = {}
    statistics = {id(b): n.rpartition(".")[2] for n, b in copied.named_buffers() if "running_" in n}
    for tensor in (*copied.parameters(), *(b for b in copied.buffers() if id(b) in statistics)):
        if isinstance(tensor, DTensor) or not tensor.is_floating_point() or not _is_constant(tensor):
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        scale = _SPREAD * max(float(tensor.detach().abs().mean()), 0.5)
        if statistics.get(id(tensor)) == "running_var":
            noise = noise.abs()
        values = tensor.detach() + scale * noise
        new[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    replace_tensors(copied, new)
    return copied


def _is_constant(tensor: Tensor) -> bool:
    values = tensor.detach()
    return any(bool((values == values.narrow(d, 0, 1)).all()) for d in range(values.dim()) if values.shape[d] > 1)


# -- ways --------------------------------------------------------------------------------------------------------------


def _evaluated(samples: Samples) -> Way:
    def way(model: nn.Module) -> list[Tensor]:
        with _seeded(model):
            return [tensor for output in run_samples(model, samples) for tensor in tensors_in(output)]

    return way


def _trained(samples: Samples) -> Way:
    """In training; only the shapes where the model draws random numbers, which may be others for fewer channels."""

    def way(model: nn.Module) -> list[Tensor]:
        drawn: list[bool] = []

        def run(own: nn.Module, batch: Any) -> Any:
            own.train()
            before = torch.random.get_rng_state()
            with _NoDropout():
                output = samples.run(own, batch)
            drawn.append(not torch.equal(before, torch.random.get_rng_state()))
            return output

        found = _evaluated(replace(samples, run=run))(model)
        return [torch.zeros_like(tensor) for tensor in found] if any(drawn) else found

    return way


def _generated(path: str, samples: Samples) -> Way:
    """Through `generate` of a module of the model, on what its `forward` receives for the example."""

    def run(model: nn.Module, batch: Any) -> Any:
        return _call_generate(model.get_submodule(path), *_received(model, path, samples.run, batch))

    return _evaluated(replace(samples, run=run))


def _goes(model: nn.Module, way: Way) -> bool:
    try:
        return bool(way(own_copy(model)))
    except CalibrationError:
        return False


def _predicted(model: Any, batch: Any) -> Any:
    return model.predict_step(batch, 0)


class _NoDropout(TorchFunctionMode):
    """Dropout gives what it is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs.update({"dropout_p": 0.0} if len(args) < 5 else {})
        return func(*args, **kwargs)


@contextmanager
def _seeded(model: nn.Module) -> Iterator[None]:
    """Random numbers are the same in every run, and afterwards as before."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        torch.manual_seed(_SEED)
        yield


# -- generate ----------------------------------------------------------------------------------------------------------


def _generators(model: nn.Module) -> list[str]:
    """Names of the outermost modules that can generate."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and callable(getattr(module, "generate", None)):
            can = getattr(module, "can_generate", None)
            if not callable(can) or can():
                found.append(name)
    return found


def _received(model: nn.Module, path: str, run: Run, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module's `forward` is called with first."""
    if not path:
        return bind_batch(model, batch)
    calls: list[tuple[Any, dict[str, Any]]] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        run(model, batch)
    finally:
        hook.remove()
    return calls[0]


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Without what a library has to say about three tokens."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _call_generate(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if callable(getattr(module, "can_generate", None)):  # transformers
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = {name: given[name] for name in _INPUTS if given.get(name) is not None}
        lengths = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False, "num_beams": 1}
        with _quiet(type(module).__module__.partition(".")[0]):
            found = module.generate(**inputs, **lengths, return_dict_in_generate=True, output_scores=True)
        return list(found.scores)
    limit = next((name for name in _LIMITS if name in inspect.signature(module.generate).parameters), None)
    first = args[0] if args else next(iter(kwargs.values()))
    return module.generate(first, **({} if limit is None else {limit: _TOKENS}))

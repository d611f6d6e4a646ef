"""Layers of other packages that compute what an ordinary one does: found by running both, never by their name.

`torch_geometric.nn.Linear`, timm's `Linear`, a subclass that only sets up its weights another way. The check runs a
copy with random weights, so that its answer holds for every layer of the same type and settings, whatever its weights.
"""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pquant_lightning.core._private import MODULE_HOOKS, MODULE_TABLE, TENSOR_TABLES, shallow_copy

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_TOLERANCE = 1e-10  # relative, in float64
_TORCHS = frozenset(vars(nn.Module()))  # its tables, and whether it trains
_known: dict[Any, bool] = {}  # by type and settings
_known_modules: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # those with settings of other types

Builder = Callable[[nn.Module], nn.Module | None]


def ordinary_twin(layer: nn.Module, build: Builder) -> nn.Module | None:
    """The ordinary layer with the same parameters that computes what this one does; None where there is none.

    Args:
        layer: of any type; hooks that watch or change what goes in and out are not looked at, they move with it.
        build: makes a candidate that shares the layer's parameters, from its attributes; None where it has not those.
    """
    if not _may_be_one(layer):
        return None
    candidate = build(layer)
    return candidate if candidate is not None and _is_the_same(layer, candidate, build) else None


def _may_be_one(layer: nn.Module) -> bool:
    """It holds a weight and maybe a bias, and nothing else that a forward could use; cheap."""
    own = layer.__dict__
    if own[MODULE_TABLE] or own["_buffers"] or "forward" in own or "weight" not in own["_parameters"]:
        return False
    if isinstance(layer, torch.jit.ScriptModule) or is_parametrized(layer):
        return False
    held = {name: p for name, p in own["_parameters"].items() if p is not None}
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in held.values())
    return plain and held.keys() <= {"weight", "bias"} and held["weight"].dim() > 1


def _is_the_same(layer: nn.Module, candidate: nn.Module, build: Builder) -> bool:
    key = _settings(layer)
    if key is None:
        if layer not in _known_modules:
            _known_modules[layer] = _compare(layer, candidate, build)
        return _known_modules[layer]
    if key not in _known:
        _known[key] = _compare(layer, candidate, build)
    return _known[key]


def _settings(layer: nn.Module) -> Any:
    """All that its computation can depend on beside its weights; None where something is no plain value."""
    kept = []
    for name, value in layer.__dict__.items():
        if name in _TORCHS:
            continue
        values = value if isinstance(value, tuple | list) else (value,)
        if not all(isinstance(item, _SIMPLE) for item in values):
            return None
        kept.append((name, repr(value)))
    shapes = tuple((name, p if p is None else tuple(p.shape)) for name, p in layer._parameters.items())
    return type(layer), type(layer).forward, tuple(kept), shapes


def _compare(layer: nn.Module, candidate: nn.Module, build: Builder) -> bool:
    """Runs both on random inputs of several sizes and magnitudes, in training and in eval mode, in float64."""
    if not _same_arguments(layer, candidate):
        return False
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        return _agree(layer, build)


def _agree(layer: nn.Module, build: Builder) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        mine = _with_random_weights(layer, generator)
        other = build(mine)
        if other is None:
            return False
        for training in (True, False):
            mine.train(training)
            other.train(training)
            for x in _inputs(other, generator):
                before = x.clone()
                found, expected = mine(x), other(before)
                if not _equal(found, expected) or not torch.equal(x, before):
                    return False
    except Exception:  # whatever another package's forward raises on an input that the ordinary layer takes
        return False
    return True


def _same_arguments(layer: nn.Module, ordinary: nn.Module) -> bool:
    """Whether the forward can be called in as many ways as the ordinary layer's, and in no others."""
    mine, others = (list(inspect.signature(module.forward).parameters.values()) for module in (layer, ordinary))
    return [argument.kind for argument in mine] == [argument.kind for argument in others]


def _with_random_weights(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    twin: nn.Module = shallow_copy(layer)
    for table in MODULE_HOOKS:
        twin.__dict__[table].clear()
    for table in TENSOR_TABLES:
        twin.__dict__[table] = {
            name: None if p is None else nn.Parameter(torch.randn(p.shape, generator=generator, dtype=torch.float64))
            for name, p in layer.__dict__[table].items()
        }
    return twin


def _inputs(layer: Any, generator: torch.Generator) -> list[Tensor]:
    """Inputs that the ordinary layer takes: with and without a batch, of even and odd sizes, small and large."""
    if isinstance(layer, nn.Embedding):
        places: tuple[tuple[int, ...], ...] = ((7,), (2, 3), (1, 2, 2))
        return [torch.randint(layer.num_embeddings, shape, generator=generator) for shape in places]
    shapes: tuple[tuple[int, ...], ...]
    if isinstance(layer, nn.Linear):
        shapes = tuple((*rows, layer.in_features) for rows in ((), (3,), (2, 3), (1, 2, 2)))
    else:
        sides = zip(layer.dilation, layer.kernel_size, layer.stride, strict=True)
        reach = [dilation * (window - 1) + 2 * stride + 1 for dilation, window, stride in sides]
        sizes = [[size + more for size in reach] for more in (0, 1, 2, 5)]
        shapes = tuple((*batch, layer.in_channels, *size) for batch in ((), (2,)) for size in sizes)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x * scale for x in drawn for scale in (1e-3, 1.0, 1e4)]


def _equal(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-300))

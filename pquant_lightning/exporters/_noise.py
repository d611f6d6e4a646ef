"""What rounding explains: how far a model's outputs move when values at its grids fall on the other side of a step.

Another runtime adds up in another order, and a value beside the middle of two codes gets the other one. In a deep model
such a step moves values before the next grid, where more of them change sides; how far that carries depends on the
model, so it is measured: one value in a thousand is moved by a step of its grid, before each layer that rounds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ONE_IN = 1000  # values of an input that change sides; one at least


@contextmanager
def moved_values(model: nn.Module, seed: int, rounds_inputs: bool) -> Iterator[None]:
    """Within the block, inputs of layers on grids are moved by steps of these, at random.

    Args:
        model: with layers of which `spec` has `bits` and `act`.
        seed: of what is moved, and which way.
        rounds_inputs: whether the runtime rounds all inputs of quantized layers, by grids of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    layers = rounding_layers(model, rounds_inputs)
    outer = {id(layer) for layer in layers}  # a layer in the place of another one shares its hooks with it

    def before(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if id(layer) not in outer:
            return args
        x, *others = args
        return (_rounded_anew(x, generator) if rounds_inputs else _moved(layer, x, generator), *others)

    def after(layer: Any, args: Any, output: Any) -> Any:
        """Rounds and cuts the outputs that the file has on a grid; sums and gates behind them may be rounded, too."""
        if id(layer) not in outer or not getattr(layer, "rounds_output", False):
            return output
        low = -layer.out_zero.float() * layer.out_scale
        cut = output.clamp(low, low + 255 * layer.out_scale)
        return cut + (2 * _random(cut, generator) - 1) * layer.out_scale

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounding_layers(model: nn.Module, rounds_inputs: bool = False) -> list[nn.Module]:
    """The layers that round their inputs; of one inside of another the outer one."""
    found: list[nn.Module] = []
    inner: set[int] = set()
    for module in model.modules():
        spec = getattr(module, "spec", None)
        if id(module) in inner or not isinstance(spec, dict) or "bits" not in spec:
            continue
        rounds = getattr(module, "rounds_inputs", rounds_inputs or bool(spec.get("act")))
        if rounds and not isinstance(module, nn.Embedding):
            found.append(module)
        inner |= {id(part) for part in module.modules()}
    return found


def _moved(layer: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    every = max(min(_ONE_IN, x.numel()), 1)
    places = torch.arange(int(torch.randint(every, (), generator=generator)), x.numel(), every)
    levels = 2 ** min(layer.spec["act_bits"], 8) - 1
    static = layer.spec["act"] == "static"
    step = layer.act_grid[0] if static else (x.amax() - x.amin()).float() / levels if x.numel() else 0.0
    steps = torch.zeros(x.numel())
    steps[places] = (2 * torch.randint(2, (len(places),), generator=generator) - 1).float()
    return (x + steps.view(x.shape) * step).to(x.dtype)


def _rounded_anew(x: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to a step of symmetric grids of 8 bits: as two roundings do, of inputs and of weights."""
    step = x.abs().flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1)) / 127
    return (x + (2 * _random(x, generator) - 1) * step).to(x.dtype)


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator)

"""Parameter groups of their own for parameters that want other options than the weights; the optimizer exists."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pquant_lightning.core.compressed_layer import compressed_layers

_PER_GROUP = ("lrs", "_lr", "lambdas", "momentums")


def separate_groups(model: nn.Module, optimizer: Optimizer, schedulers: list[Any]) -> None:
    """Moves parameters with `parameter_options` out of their groups into new ones with the same settings but these.

    The learning rate becomes a multiple of the old group's, under its schedulers too; a group is never emptied.
    Does nothing the second time.

    Args:
        model: its compressed layers say what they want.
        optimizer: before its state is restored.
        schedulers: of this optimizer; their lists with an entry per group grow with it.
    """
    wanted: dict[int, dict[str, float]] = {}
    for layer in compressed_layers(model).values():
        own = dict(layer.named_parameters(recurse=False))
        wanted.update({id(own[name]): options for name, options in layer.parameter_options().items() if name in own})
    for source, group in enumerate(list(optimizer.param_groups)):
        moved: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if id(parameter) in wanted:
                moved.setdefault(tuple(sorted(wanted[id(parameter)].items())), []).append(parameter)
        for options, parameters in moved.items():
            if len(parameters) == len(group["params"]):
                continue
            taken = {id(parameter) for parameter in parameters}
            group["params"] = [p for p in group["params"] if id(p) not in taken]
            _add_group(optimizer, schedulers, source, dict(options), parameters)


def _add_group(
    optimizer: Optimizer, schedulers: list[Any], source: int, options: dict[str, float], parameters: list[nn.Parameter]
) -> None:
    group = optimizer.param_groups[source]
    factor, count = options["lr"], len(optimizer.param_groups)
    new = {key: value for key, value in group.items() if key not in ("params", "name")}
    for key in ("lr", "initial_lr", "max_lr", "min_lr"):
        if key in new:
            new[key] = new[key] * factor
    if "weight_decay" in new:
        new["weight_decay"] = options.get("weight_decay", new["weight_decay"])
    optimizer.add_param_group({**new, "params": parameters})
    for scheduler in schedulers:
        _extend(scheduler, source, count, factor)


def _extend(scheduler: Any, source: int, count: int, factor: float) -> None:
    """Every list of the scheduler with an entry per group gets one for the new group; learning rates are scaled.

    Such lists are known by the ends of their names: others (milestones) may be as long by chance.
    """
    for name, value in vars(scheduler).items():
        if isinstance(value, LRScheduler | ReduceLROnPlateau):
            _extend(value, source, count, factor)
        elif isinstance(value, list) and any(isinstance(item, LRScheduler | ReduceLROnPlateau) for item in value):
            for inner in value:
                _extend(inner, source, count, factor)
        elif isinstance(value, list) and len(value) == count and name.endswith(_PER_GROUP):
            scaled = isinstance(value[source], float) and not name.endswith("momentums")
            value.append(value[source] * factor if scaled else value[source])

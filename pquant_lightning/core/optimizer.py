"""What compression asks of an optimizer that exists: parameter groups, a proximal step, a retraction of factors."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import OptionError, known

Penalty = Literal["group_lasso", "nuclear"]
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


# -- proximal step ---------------------------------------------------------------------------------------------------


def add_proximal_step(
    optimizer: Optimizer,
    penalty: Penalty = "group_lasso",
    strength: float = 1e-3,
    *,
    params: Iterable[nn.Parameter] | None = None,
    dim: int = 0,
    every: int = 1,
) -> Optimizer:
    """Lets an optimizer of any class follow each of its steps by the proximal step of a penalty; returns the same one.

    Unlike a penalty in the loss, it gives exact zeros: whole channels with "group_lasso", singular values with
    "nuclear", so that structured pruning or a low rank loses nothing afterwards. The threshold is the group's current
    learning rate times `strength`, so schedulers act on it, too; where the optimizer divides its steps (Adam, RMSprop
    and their kin), the threshold is divided by the mean of the same. The count of steps lies in the parameter groups: a
    checkpoint holds it. Call it in `configure_optimizers`.

    Args:
        optimizer: of any class; it stays what it is, for schedulers, gradient scalers and Lightning.
        penalty: "group_lasso", the sum of the norms of a weight's channels, or "nuclear", the sum of its singular
            values.
        strength: weight of the penalty in the objective; 0 changes nothing.
        params: parameters that are penalized; None means all of the optimizer's with two dimensions or more. Others
            are refused.
        dim: of "group_lasso": the dimension whose entries are the groups; 0 are outputs, 1 inputs of a Linear or Conv.
        every: steps between two proximal ones, which then have the threshold of all of them; "nuclear" takes an SVD of
            each weight.

    Raises:
        OptionError: unknown penalty, a negative strength, `every` below 1, or a parameter without two dimensions.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sections 4.2, 6.5.4 and 6.7.3.
        Yun, Lozano and Yang, "A General Family of Stochastic Proximal Gradient Methods for Deep Learning", 2021, for
        adaptive optimizers; their metric is diagonal, ours one number for each channel, which has a closed form.

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    >>> optimizer = add_proximal_step(torch.optim.SGD([weight], lr=0.1), strength=10.0)
    >>> weight.grad = torch.zeros_like(weight)
    >>> _ = optimizer.step()
    >>> weight.tolist()  # norms 5 and 0.5 become 4 and 0
    [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    if penalty not in get_args(Penalty):
        raise OptionError(f"add_proximal_step has no penalty {penalty!r}. {known(penalty, get_args(Penalty))}")
    if strength < 0 or every < 1:
        raise OptionError(
            f"add_proximal_step: strength is at least 0 and every at least 1, got strength={strength}, every={every}."
        )
    chosen = None if params is None else {id(parameter): parameter for parameter in params}
    for parameter in (chosen or {}).values():
        if parameter.dim() < 2:
            raise OptionError(
                f"add_proximal_step penalizes weights of two dimensions or more, got one of shape "
                f"{tuple(parameter.shape)}; leave biases and norms out of params."
            )
    optimizer.register_step_post_hook(_ProximalStep(penalty, strength, chosen, dim, every))
    return optimizer


class _ProximalStep:
    """The hook: looks at the optimizer's groups as they are, since compression may change them."""

    def __init__(
        self, penalty: Penalty, strength: float, chosen: dict[int, nn.Parameter] | None, dim: int, every: int
    ) -> None:
        self.penalty, self.strength, self.chosen, self.dim, self.every = penalty, strength, chosen, dim, every

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            threshold = group.get("proximal_threshold", 0.0) + float(group["lr"]) * self.strength
            group["proximal_steps"] = group.get("proximal_steps", 0) + 1
            due = group["proximal_steps"] % self.every == 0
            group["proximal_threshold"] = 0.0 if due else threshold
            for parameter in group["params"] if due else []:
                chosen = self.chosen is None or id(parameter) in self.chosen
                if chosen and parameter.dim() > 1 and parameter.requires_grad:
                    parameter.copy_(self._shrunk(parameter, threshold, _preconditioner(optimizer, group, parameter)))

    def _shrunk(self, weight: Tensor, threshold: float, divisor: Tensor | None) -> Tensor:
        if self.penalty == "nuclear":
            scaled = threshold if divisor is None else threshold / float(divisor.mean())
            return shrink_singular_values(weight.flatten(1), scaled).view_as(weight)
        others = [d for d in range(weight.dim()) if d != self.dim % weight.dim()]
        return shrink_groups(
            weight, threshold if divisor is None else threshold / divisor.mean(others, keepdim=True), self.dim
        )


def _preconditioner(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Tensor | None:
    """What an adaptive optimizer divides its steps by, of the parameter's shape; None where it has no such state."""
    state = optimizer.state.get(parameter, {})
    squares = state.get("exp_avg_sq", state.get("square_avg"))
    if not isinstance(squares, Tensor) or squares.shape != parameter.shape:
        return None
    if "exp_avg_sq" in state and "betas" in group:
        squares = squares / (1 - group["betas"][1] ** float(state["step"]))
    return squares.sqrt() + float(group.get("eps", 1e-8))


def shrink_groups(weight: Tensor, threshold: float | Tensor, dim: int = 0) -> Tensor:
    """The proximal operator of `threshold * sum of norms`: each slice along `dim` becomes shorter by the threshold.

    Args:
        weight: any shape.
        threshold: in the units of the weight, one or one for each slice; slices with a norm up to it become zero.
        dim: the dimension whose entries are the groups.
    """
    others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
    norms = torch.linalg.vector_norm(weight.float(), dim=others, keepdim=True)
    factor = (1 - threshold / norms.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(0)
    return weight * factor.to(weight.dtype)


def shrink_singular_values(matrix: Tensor, threshold: float) -> Tensor:
    """The proximal operator of `threshold * nuclear norm`: singular values become smaller by the threshold.

    Args:
        matrix: `(m, n)`.
        threshold: singular values up to it become zero.
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept = s > threshold
    return ((u[:, kept] * (s[kept] - threshold)) @ vh[kept]).to(matrix.dtype)


# -- retraction of factors -------------------------------------------------------------------------------------------


def balance_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with `left^T left = right right^T`, by the least change of basis: balanced factors stay put.

    Gradient descent on a product is best conditioned there, and the weights stay where momentum expects them: the
    change M of basis is symmetric and positive, M^2 the geometric mean of `(left^T left)^-1` and `right right^T`.

    Args:
        left: `(..., m, r)`.
        right: `(..., r, n)`.

    References:
        Tu et al., "Low-rank Solutions of Linear Matrix Equations via Procrustes Flow", 2016, for why balance matters.
        Bhatia, "Positive Definite Matrices", 2007, section 4.1, for the geometric mean.
    """
    first, second = left.double(), right.double()
    root, inverse = _root(first.mT @ first)
    middle, _ = _root(root @ (second @ second.mT) @ root)
    change, back = _root(inverse @ middle @ inverse)
    return (first @ change).to(left.dtype), (back @ second).to(right.dtype)


def orthonormalize_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows of `right (..., r, n)`: the nearest ones (its polar factor)."""
    first, second = left.double(), right.double()
    root, inverse = _root(second @ second.mT)
    return (first @ root).to(left.dtype), (inverse @ second).to(right.dtype)


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive `(..., r, r)`, and its inverse; directions of nothing get a small value."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    least = values[..., -1:].clamp_min(torch.finfo(gram.dtype).tiny) * 1e-14
    roots = values.maximum(least).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT

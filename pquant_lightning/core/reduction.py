"""Several processes, each with samples of its own: their statistics become those of all samples, by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Decision = TypeVar("Decision")
Reduction = Literal["sum", "max"]


class Shared(Protocol):
    """What is measured on: `reduce` says whether other processes measure as well, each on samples of its own."""

    @property
    def reduce(self) -> bool: ...


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reduces(samples: Shared) -> bool:
    """Whether statistics of these samples are combined over processes."""
    return samples.reduce and is_distributed()


def reduced(total: Tensor, samples: Shared | None = None, by: Reduction = "sum") -> Tensor:
    """A sum over the samples of this process, in place the sum over those of all processes; or a maximum."""
    if is_distributed() if samples is None else reduces(samples):
        operation = torch.distributed.ReduceOp.SUM if by == "sum" else torch.distributed.ReduceOp.MAX
        there = total.to(_device_of(total))
        torch.distributed.all_reduce(there, operation)
        if there is not total:
            total.copy_(there)
    return total


def _device_of(tensor: Tensor) -> torch.device:
    """Where the processes can talk about a tensor: NCCL does so on a GPU alone."""
    if tensor.device.type == "cpu" and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


def reduced_by_name(
    found: Mapping[str, Sequence[Tensor]], names: Iterable[str], samples: Shared, by: Reduction = "sum"
) -> dict[str, list[Tensor]]:
    """Statistics of layers over the samples of all processes, in place: those of equal name are combined.

    A process that has not reached a layer has nothing to add to it: zeros to a sum, and to maxima what is below all.

    Args:
        found: by layer name, tensors of equal shapes in all processes that have them.
        names: all layers, in an order that all processes share.
        samples: what was measured on.
        by: how they are combined.

    Returns:
        In the order of `names`, the layers that any process has reached.
    """
    if not reduces(samples):
        return {name: list(found[name]) for name in names if name in found}
    held = {name: [(t.shape, t.dtype, t.device.type) for t in tensors] for name, tensors in found.items()}
    everywhere: dict[str, Any] = {}
    for layers in gathered(held):
        everywhere = {**layers, **everywhere}
    result: dict[str, list[Tensor]] = {}
    for name in (name for name in names if name in everywhere):
        own = list(found.get(name) or (_nothing(shape, dtype, device, by) for shape, dtype, device in everywhere[name]))
        result[name] = [reduced(tensor, samples, by) for tensor in own]
    return result


def _nothing(shape: torch.Size, dtype: torch.dtype, device: str, by: Reduction) -> Tensor:
    return torch.full(shape, 0 if by == "sum" else -torch.inf, dtype=dtype, device=device)


def gathered(value: Decision) -> list[Decision]:
    """What each process has, on all of them, in the order of their ranks."""
    held: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(held, value)
    return held


def gathered_on_zero(value: Decision) -> list[Decision] | None:
    """What each process has, on process 0, in the order of their ranks; None on the others."""
    first = torch.distributed.get_rank() == 0
    held: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(value, held, dst=0)
    return held


def from_rank_zero(decision: Decision, samples: Shared) -> Decision:
    """What process 0 has decided, on all processes that look at samples of their own."""
    if reduces(samples):
        held = [decision]
        torch.distributed.broadcast_object_list(held, src=0)
        (decision,) = held
    return decision


def on_all(holds: bool, samples: Shared | None = None) -> bool:
    """Whether something holds in every process (that measures on such samples): then all of them go the same way."""
    return all(gathered(holds)) if (is_distributed() if samples is None else reduces(samples)) else holds

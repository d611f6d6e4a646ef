"""Which channels belong together: found by running the model and following every index of every dimension.

Each parameter gives an identity to every index of each of its dimensions. While the model runs on an example, the
identities are carried through every operation that torch really executes (a `TorchDispatchMode`), so that any Python in
a `forward` is fine: an addition makes the channels it adds one, a matrix product joins the columns of a weight to the
channels it reads, a reshape into heads keeps the identity of each element. Where an operation mixes what it is given
(softmax, layer norm) or something of fixed size is met (the model's inputs, buffers), the channels along that dimension
become one, and where nothing is left to choose, they are fixed, with the reason. What no product sums over is fixed
too: nobody has seen it used, as with the rows of a table for positions behind the last token. What remains are units:
slices of parameters that can only go together, such as a channel, a hidden neuron, or an attention head with its keys,
values and outputs.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.core._private import DispatchMode
from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, first_samples, run_samples
from pquant_lightning.core.channel_labels import FIXED_SIZE, HEAD_WIDTH, MERGED, Block, Ids, Labelling, Labels
from pquant_lightning.core.channel_rules import (
    ALWAYS_FOLLOWED,
    GROUP_WIDTH,
    RANKED,
    SOFTMAX,
    WEIGHT_NORM,
    name_of,
    rule_of,
)
from pquant_lightning.core.channel_views import KERNEL, LOOKED_UP, tensors_of

OUTPUT = "they are outputs of the model, whose width stays"
STOCK_ATTENTION = "they belong to nn.MultiheadAttention, whose code asks for all of its heads and channels"
UNREAD = "no layer reads them in the example, as with the rows of a table for later positions"

_NO_CHANNELS = {KERNEL, LOOKED_UP, GROUP_WIDTH, HEAD_WIDTH}
_ENDS = {OUTPUT, FIXED_SIZE, RANKED, SOFTMAX, WEIGHT_NORM, MERGED, STOCK_ATTENTION}  # where one layer alone has them


@dataclass(frozen=True)
class Slice:
    """Indices along one dimension of a parameter or buffer, by its name in the model."""

    tensor: str
    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: each is a set of slices that can only go together, and any of them can go.

    Attributes:
        tensors: names and dimensions that the units have slices of.
        indices: for each of them `(units, n)`, the indices of each unit.
        fixed: why none of them can go; None where they can.
    """

    tensors: tuple[tuple[str, int], ...]
    indices: tuple[Ids, ...]
    fixed: str | None = None

    def __len__(self) -> int:
        return len(self.indices[0])

    @cached_property
    def units(self) -> tuple[tuple[Slice, ...], ...]:
        """The slices of each unit."""
        columns = [
            [Slice(name, dim, tuple(row)) for row in rows.tolist()]
            for (name, dim), rows in zip(self.tensors, self.indices, strict=True)
        ]
        return tuple(zip(*columns, strict=True))


def find_groups(model: nn.Module, samples: Samples) -> list[Group]:
    """The groups of channels of a model, found on the first two samples of each batch; free ones first.

    What holds for one batch holds for all: batches of other lengths show which sizes are none of the model's own.

    Dimensions that never had more than one choice (kernels, look-up tables, the width of a head, the model's inputs and
    outputs where one layer alone has them) are no groups. Parameters that the example does not reach are left out.

    Raises:
        CalibrationError: the model cannot be run on them.
    """
    tracer = _Tracer(model)
    few = Samples(tuple(first_samples(batch, 2) for batch in samples.batches), samples.run)
    with _plain_kernels(), tracer:
        for output in run_samples(model, few):
            for tensor in tensors_in(output):
                tracer.labelling.fix(tracer.labelling.of(tensor), OUTPUT)
    tracer.labelling.close_grids()
    return _grouped(tracer)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Recurrent layers and torch's encoder layers then run as single operations that show what they do."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), [backend.enabled for backend in backends]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for backend, value in zip(backends, enabled, strict=True):
            backend.enabled = value


class _Tracer(DispatchMode):  # type: ignore[misc]
    """Carries identities through the operations of one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labelling = Labelling()
        self.own: dict[str, tuple[Tensor, Labels]] = {}  # of parameters and statistics, by name
        self.used: set[int] = set()
        statistics = [
            (f"{name}.{key}" if name else key, buffer)
            for name, module in model.named_modules()
            for key, buffer in module.named_buffers(recurse=False)
            if isinstance(getattr(module, "running_mean", None), Tensor)
        ]
        for name, tensor in (*model.named_parameters(), *statistics):
            labels = [Block((d,), self.labelling.ids.fresh(n)) for d, n in enumerate(tensor.shape) if n > 1]
            self.own[name] = tensor, labels
            self.labelling.put(tensor, labels)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                for name, parameter in module.named_parameters(recurse=False):
                    if name.endswith("proj_weight"):
                        self.labelling.fix(self.labelling.of(parameter), STOCK_ATTENTION)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(result)
        self.used.update(map(id, inputs))
        if outputs:
            self._follow(func, args, kwargs, result, inputs, outputs)
        return result

    def _follow(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        name, rule = name_of(func), rule_of(func)
        held = [self.labelling.of(tensor) for tensor in inputs]
        if name == "lift_fresh":
            self.labelling.literals[outputs[0]] = True
        if rule is not None and (any(held) or name in ALWAYS_FOLLOWED):
            found = rule(self.labelling, args, kwargs, result)
        else:
            for labels in held:
                self.labelling.fix(
                    labels, f"{name} is applied to them, and what that does to single channels is not known"
                )
            found = [[] for _ in outputs]
        for tensor, labels in zip(outputs, found, strict=True):
            self.labelling.put(tensor, labels)


def _grouped(tracer: _Tracer) -> list[Group]:
    ids = tracer.labelling.ids
    keys = [
        ((name, block.dims[0]), ids.roots(block.ids))
        for name, (tensor, labels) in sorted(tracer.own.items())
        for block in labels
        if id(tensor) in tracer.used
    ]
    if not keys:
        return []
    # one row for each index of each dimension: its class, its dimension, itself; sorted in that order
    rows = numpy.stack(
        [
            numpy.concatenate([roots for _, roots in keys]),
            numpy.concatenate([numpy.full(len(roots), key) for key, (_, roots) in enumerate(keys)]),
            numpy.concatenate([numpy.arange(len(roots)) for _, roots in keys]),
        ]
    )
    rows = rows[:, numpy.lexsort(rows[::-1])]
    starts = numpy.flatnonzero(numpy.diff(rows[0], prepend=-1))
    alike: dict[tuple[bytes, str | None], list[int]] = defaultdict(list)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), rows.shape[1]], strict=True):
        root = int(rows[0, start])
        reason = ids.reason(root) or (None if ids.is_read(root) else UNREAD)
        alike[rows[1, start:end].tobytes(), reason].append(start)
    groups = []
    for (signature, fixed), firsts in alike.items():
        if fixed in _NO_CHANNELS:
            continue
        own = numpy.frombuffer(signature, rows.dtype)
        found = rows[2][numpy.array(firsts)[:, None] + numpy.arange(len(own))]
        found = found[numpy.argsort(found[:, 0])]
        members = numpy.unique(own)
        groups.append(
            Group(tuple(keys[key][0] for key in members), tuple(found[:, own == key] for key in members), fixed)
        )
    chosen = [group for group in groups if group.fixed is None or _is_channels(group, tracer)]
    return sorted(chosen, key=lambda group: (group.fixed is not None, group.tensors))


def _is_channels(group: Group, tracer: _Tracer) -> bool:
    """Whether a fixed group is one that a user would expect to be free."""
    matrix = any(tracer.own[name][0].dim() > 1 for name, _ in group.tensors)
    layers = {name.rpartition(".")[0] for name, _ in group.tensors}
    return matrix and not (group.fixed in _ENDS and len(layers) == 1)

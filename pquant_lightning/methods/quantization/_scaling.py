"""Factors per channel that can be moved from a layer or norm into the layers that read it, leaving the model the same.

Who reads whom is taken from the data flow of one run. A writer's output may be divided by a positive factor per channel
where every use of it ends in a layer that is multiplied with the factor, and only positively homogeneous functions lie
between: f(a x) = a f(x) for a > 0.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.graph import Graph, Operation
from pquant_lightning.core.layer_adapter import NORMS, SUPPORTED
from pquant_lightning.methods.quantization._layers import QuantLayer

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAST_DIM_NORMS = (nn.LayerNorm, nn.RMSNorm)
_ELEMENTWISE = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "abs"),
    *("dropout", "dropout_", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("contiguous", "clone", "detach", "float", "half", "bfloat16"),
}
_POOLING = {
    f"{name}{dims}d"
    for name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for dims in (1, 2, 3)
}
_RESHAPING = {"flatten", "reshape", "view"}
_ASKING = {"size", "dim", "numel", "ndimension", "is_floating_point", "stride", "is_contiguous"}


@dataclass(frozen=True)
class Link:
    """A layer or norm, and all that read its channels.

    Attributes:
        writer: name of the module whose output is divided.
        layer: the layer that the norm `writer` follows and is folded into; None for other writers.
        readers: names of the layers that are multiplied, each with how many of its inputs each channel has become.
    """

    writer: str
    layer: str | None
    readers: tuple[tuple[str, int], ...]


def find_links(model: nn.Module, graph: Graph) -> list[Link]:
    """The links of a model, in the order of execution; a module writes in one and may read in another.

    Modules that are called more than once, share a parameter, or whose parameters are read elsewhere have no part.
    """
    modules = dict(model.named_modules())
    uses = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    once = {name for name in _once(graph) if _owns(modules[name], uses) and _reads_own(name, graph)}
    scalable = {name for name in once if _is_known(modules[name]) or _multiplies_last(name, modules[name], graph)}
    norm_of = graph.foldable_norms(model)
    layer_of = {norm: layer for layer, norm in norm_of.items()}
    links = []
    for name, _, outputs in graph.calls:
        module: Any = modules[name]
        if name not in scalable or len(outputs) != 1 or (type(module) in NORMS and name not in layer_of):
            continue
        dim = _channel_dim(module, len(graph.shapes[outputs[0]]))
        found = None if dim is None else _Walk(graph, modules, scalable, name).readers(outputs[0], dim)
        if found:
            links.append(Link(name, layer_of.get(name), found))
    return links


def _once(graph: Graph) -> list[str]:
    times = Counter(name for name, _, _ in graph.calls)
    return [name for name, count in times.items() if count == 1]


def _owns(module: nn.Module, uses: Counter[int]) -> bool:
    """Whether a module has a weight, and no other has its parameters."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and all(uses[id(parameter)] == 1 for parameter in module.parameters())


def _is_known(module: Any) -> bool:
    """A layer or norm of torch's, with one factor per channel where it is a norm."""
    if type(module) in _LAST_DIM_NORMS:
        return bool(module.weight.dim() == 1)
    known = type(module) in SUPPORTED or type(module) in NORMS or isinstance(module, QuantLayer)
    return known and not isinstance(module, nn.Embedding)


def _multiplies_last(name: str, module: Any, graph: Graph) -> bool:
    """Whether a module's output is something of its last dimension times `weight`, its one parameter (RMS norms)."""
    operations = [op for op in graph.operations if op.module == name and op.name not in _ASKING]
    outputs = next(outputs for called, _, outputs in graph.calls if called == name)
    if [key for key, _ in module.named_parameters()] != ["weight"] or module.weight.dim() != 1 or not operations:
        return False
    last, given = operations[-1], next(inputs for called, inputs, _ in graph.calls if called == name)
    made = {tensor for op in operations[:-1] for tensor in op.outputs}
    own = [tensor for tensor in last.inputs if tensor not in (*given, *made)]
    read_before = any(tensor in op.inputs for op in operations[:-1] for tensor in own)
    whole = len(outputs) == 1 and graph.shapes[outputs[0]][-1:] == module.weight.shape
    return last.name == "mul" and last.outputs == outputs and len(own) == 1 and not read_before and whole


def _reads_own(name: str, graph: Graph) -> bool:
    """Whether the parameters of a module are read by it alone."""
    given = {tensor for called, inputs, _ in graph.calls if called == name for tensor in inputs}
    own = {tensor for op in graph.operations if op.module == name for tensor in op.inputs} - given
    made = {tensor for op in graph.operations if op.module == name for tensor in op.outputs}
    elsewhere = [op for op in graph.operations if op.module != name and op.name not in _ASKING]
    return not any((own - made) & set(op.inputs) for op in elsewhere)


def _channel_dim(module: Any, dimensions: int) -> int | None:
    """The dimension of a module's input and output that holds its channels; None for a shape that is not expected."""
    if type(module) in NORMS:
        return 1
    if hasattr(module, "kernel_size"):
        return 1 if dimensions == len(module.kernel_size) + 2 else None
    return dimensions - 1 if dimensions >= 2 else None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "kernel_size")


class _Walk:
    """Follows a tensor through a graph to the layers that read it."""

    def __init__(self, graph: Graph, modules: dict[str, nn.Module], scalable: set[str], writer: str) -> None:
        self.graph, self.modules, self.scalable, self.writer = graph, modules, scalable, writer
        self.given = {name: inputs for name, inputs, _ in graph.calls}

    def readers(self, tensor: int, dim: int) -> tuple[tuple[str, int], ...] | None:
        """Names of the layers, with the inputs that each channel has become; None where anything else reads it."""
        channels = self.graph.shapes[tensor][dim]
        found: dict[str, int] = {}
        waiting, seen = [(tensor, dim)], {tensor}
        while waiting:
            tensor, dim = waiting.pop()
            if tensor in self.graph.outputs:
                return None
            for op in self.graph.operations:
                if tensor not in op.inputs or op.module == self.writer or op.name in _ASKING:
                    continue
                if op.module in self.scalable and _is_layer(self.modules[op.module]):
                    if self.given[op.module] != (tensor,) or not self._fits(op.module, tensor, dim):
                        return None
                    found[op.module] = self.graph.shapes[tensor][dim] // channels
                    continue
                after = self._after(op, tensor, dim)
                if after is None:
                    return None
                waiting += [(out, after) for out in op.outputs if out not in seen]
                seen.update(op.outputs)
        return tuple(found.items())

    def _fits(self, reader: str, tensor: int, dim: int) -> bool:
        return dim == _channel_dim(self.modules[reader], len(self.graph.shapes[tensor]))

    def _after(self, op: Operation, tensor: int, dim: int) -> int | None:
        """The dimension of the channels after an operation; None where factors cannot be taken through it."""
        if len(op.outputs) != 1:
            return None
        before, after = self.graph.shapes[tensor], self.graph.shapes[op.outputs[0]]
        alone = op.inputs == (tensor,) or (op.name == "prelu" and op.inputs[0] == tensor)
        if not alone:
            return None
        unchanged = op.name == "to" and op.outputs == op.inputs  # another type may round
        if unchanged or (op.name in _ELEMENTWISE and before == after):
            return dim
        pools = op.name in _POOLING and len(before) == len(after) == int(op.name[-2]) + 2
        if pools and dim == 1 and after[:2] == before[:2]:
            return dim
        if op.name in _RESHAPING and before == after:
            return dim
        if op.name in _RESHAPING and dim == 1 and after == (before[0], before[1:].numel()):
            return dim  # each channel becomes so many
        averaged = op.name == "mean" and dim == 1 and after[:2] == before[:2] and after[2:].numel() == 1
        distinct = before[1] not in (before[0], *before[2:])  # else the mean may have been over the channels
        return dim if averaged and distinct else None


# -- scaling ---------------------------------------------------------------------------------------------------------


def rescale(model: nn.Module, link: Link, factor: Tensor) -> None:
    """Divides the writer's output by `factor` `(channels,)`, and multiplies the weights of its readers with it."""
    with torch.no_grad():
        writer: Any = model.get_submodule(link.writer)
        if _is_layer(writer):
            writer.weight.div_(_by_output(writer, factor).to(writer.weight))
        else:
            writer.weight.div_(factor.to(writer.weight))
        if getattr(writer, "bias", None) is not None:
            writer.bias.div_(factor.to(writer.bias))
        for name, repeats in link.readers:
            reader: Any = model.get_submodule(name)
            reader.weight.mul_(by_input(reader, factor.repeat_interleave(repeats)).to(reader.weight))
    for name in {link.writer, *(name for name, _ in link.readers)}:
        module = model.get_submodule(name)
        if isinstance(module, QuantLayer):
            module.rescaled()


def by_input(layer: Any, factor: Tensor) -> Tensor:
    """`(in,)` as it is broadcast over the weight of a layer."""
    if isinstance(layer, nn.Linear):
        return factor
    ones = [1] * len(layer.kernel_size)
    if isinstance(layer, _TRANSPOSED):
        return factor.reshape(-1, 1, *ones)
    rows = layer.out_channels // layer.groups
    return factor.reshape(layer.groups, -1).repeat_interleave(rows, 0).unflatten(1, (-1, *ones))


def _by_output(layer: Any, factor: Tensor) -> Tensor:
    """`(out,)` as it is broadcast over the weight of a layer."""
    if not isinstance(layer, _TRANSPOSED):
        return factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
    rows = layer.in_channels // layer.groups
    return factor.reshape(layer.groups, -1).repeat_interleave(rows, 0).unflatten(1, (-1, *[1] * len(layer.kernel_size)))


def input_ranges(layer: Any) -> Tensor:
    """Largest magnitude of the weights that each input of a layer meets, float32 `(in,)`."""
    weight = layer.weight.detach().abs().float()
    if isinstance(layer, _TRANSPOSED):
        return weight.flatten(1).amax(1)
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).flatten()


def output_ranges(layer: Any) -> Tensor:
    """Largest magnitude of the weights of each output of a layer, float32 `(out,)`."""
    weight = layer.weight.detach().abs().float()
    if not isinstance(layer, _TRANSPOSED):
        return weight.flatten(1).amax(1)
    return weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).flatten()


def reader_ranges(model: nn.Module, link: Link) -> Tensor:
    """Largest magnitude of the readers' weights per channel of the link, float32 `(channels,)`."""
    found = [input_ranges(model.get_submodule(n)).reshape(-1, repeats).amax(1) for n, repeats in link.readers]
    return torch.stack(found).amax(0)

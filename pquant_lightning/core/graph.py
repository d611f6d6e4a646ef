"""Who feeds whom: the model's data flow, recorded while it runs on one sample, and what can be read from it.

The model runs as it is: no symbolic tracing, so that any Python in a `forward` is fine.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.layer_adapter import NORMS, as_torch

_PRODUCERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Operation:
    """One call of a torch function: its name, the module it was called in, and the tensors by number."""

    name: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Graph:
    """The data flow of one forward pass.

    Attributes:
        operations: in the order of execution.
        calls: for each call of a module that holds no other module: name, input and output tensors.
        outputs: the tensors that the model returned.
        shapes: of all tensors, by number.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    outputs: tuple[int, ...] = ()
    shapes: list[torch.Size] = field(default_factory=list)

    @property
    def order(self) -> list[str]:
        """The called modules, each once, in the order of their first calls."""
        return list(dict.fromkeys(name for name, _, _ in self.calls))

    def foldable_norms(self, model: nn.Module) -> dict[str, str]:
        """Batch norms that can be folded into the layer before them, by that layer's name.

        Both are called once, and nothing else reads what goes from one to the other.
        """
        times = Counter(name for name, _, _ in self.calls)
        modules = dict(model.named_modules())
        makers = {
            out[0]: name for name, _, out in self.calls if len(out) == 1 and isinstance(modules[name], _PRODUCERS)
        }
        pairs = {}
        for norm, inputs, _ in self.calls:
            if type(modules[norm]) not in NORMS or len(inputs) != 1 or (tensor := inputs[0]) not in makers:
                continue
            layer = makers[tensor]
            elsewhere = tensor in self.outputs or any(
                tensor in op.inputs and op.module not in (layer, norm) for op in self.operations
            )
            foldable = _is_foldable(modules[norm], modules[layer], len(self.shapes[tensor]))
            if times[norm] == times[layer] == 1 and not elsewhere and foldable:
                pairs[layer] = norm
        return pairs


def norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Factor and shift, float32 `(channels,)`, that a batch norm applies in eval mode.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, section 3.2, equation 14.
    """
    factor = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.detach().float()
    shift = -norm.running_mean.float() * factor
    return factor, shift + norm.bias.detach().float() if norm.affine else shift


def _is_foldable(norm: Any, layer: Any, dimensions: int) -> bool:
    """Its statistics are fixed in eval, and each of its channels is one output channel of the layer's weight."""
    batched = dimensions == max(2, layer.weight.ndim)  # without a batch, the norm's channels are another dimension
    one_to_one = not isinstance(layer, _PRODUCERS[4:]) or layer.groups == 1
    return norm.running_mean is not None and one_to_one and batched


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        self.graph = Graph()
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a dead tensor's id may be used again
        self.stack: list[str] = [""]
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            if name and not any(True for _ in module.children()):
                self.handles += [
                    module.register_forward_pre_hook(self._enter(name)),
                    module.register_forward_hook(self._leave(name), with_kwargs=True),
                ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (name := getattr(func, "__name__", "")) != "__get__":  # an attribute such as shape
            inputs, outputs = self._ids((args, kwargs)), self._ids(result)
            self.graph.operations.append(Operation(name, self.stack[-1], inputs, outputs))
        return result

    def _enter(self, name: str) -> Any:
        return lambda module, args: self.stack.append(name)

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.stack.pop()
            self.graph.calls.append((name, self._ids((args, kwargs)), self._ids(output)))

        return hook

    def _ids(self, values: Any) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._number(tensor) for tensor in tensors_in(values)))

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.numbers)
            self.alive.append(tensor)
            self.graph.shapes.append(tensor.shape)
        return self.numbers[id(tensor)]

    def finish(self, output: Any) -> Graph:
        self.graph.outputs = self._ids(output)
        return self.graph


def trace(model: nn.Module, samples: Samples) -> Graph:
    """Records the data flow of the model on the first two samples, in eval mode; what they do not reach is unknown.

    Raises:
        CalibrationError: the model cannot be run on them.
    """
    few = samples.few()
    recorder = _Recorder(model)
    try:
        with torch.no_grad(), recorder:
            (output,) = run_samples(model, few)
    finally:
        for handle in recorder.handles:
            handle.remove()
    return recorder.finish(output)


def outer_layers(model: nn.Module, graph: Graph | None = None) -> set[str]:
    """The first and the last layer in the order of execution where it is known, else of definition, and their ties."""
    modules = dict(model.named_modules())
    names = list(modules) if graph is None else graph.order
    layers = [n for n in names if (found := as_torch(modules[n])) is not None and not isinstance(found, nn.Embedding)]
    if len(layers) < 3:
        return set()
    shared = {id(p) for name in (layers[0], layers[-1]) for p in modules[name].parameters(recurse=False)}
    return {n for n, m in modules.items() if any(id(p) in shared for p in m.parameters(recurse=False))}


def output_layers(model: nn.Module, graph: Graph | None = None) -> set[str]:
    """The layers that give the model's outputs, as far as that is known, the last one among them, and their ties.

    None in models of fewer than three layers with weights, as in `outer_layers`; an LSTM counts twice.
    """
    modules = dict(model.named_modules())
    names = list(modules) if graph is None else graph.order
    layers = [n for n in names if (found := as_torch(modules[n])) is not None and not isinstance(found, nn.Embedding)]
    count = sum(2 if isinstance(m, nn.RNNBase) else 1 for m in modules.values() if _holds_weights(m))
    if not layers or count < 3:
        return set()
    last = {layers[-1]}
    if graph is not None:
        last |= {name for name, _, outputs in graph.calls if name in layers and set(outputs) & set(graph.outputs)}
    shared = {id(p) for name in last for p in modules[name].parameters(recurse=False)}
    return {n for n, m in modules.items() if any(id(p) in shared for p in m.parameters(recurse=False))}


def _holds_weights(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Embedding) and any(is_lazy(p) or p.dim() > 1 for p in own)

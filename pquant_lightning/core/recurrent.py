"""Recurrent layers as layers of ordinary products, which any method can change."""

import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, weight_of
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.layer_adapter import RECURRENT, build_layer

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_PRODUCTS = {"ih": "input", "hh": "hidden", "hr": "projection"}
_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)_(l\d+(?:_reverse)?)")


def recurrent_parts(layer: dict[str, Any]) -> dict[str, str]:
    """The parameters of a recurrent layer, in torch's order, and what each is called when it is taken apart.

    >>> recurrent_parts({"num_layers": 1, "bidirectional": False, "bias": False, "proj_size": 0})
    {'weight_ih_l0': 'l0.input.weight', 'weight_hh_l0': 'l0.hidden.weight'}
    """
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * layer["bias"]
    names += ["weight_hr"] * bool(layer.get("proj_size"))
    found = {}
    for direction in _directions(layer["num_layers"], layer["bidirectional"]):
        for name in names:
            kind, product = name.split("_")
            found[f"{name}_{direction}"] = f"{direction}.{_PRODUCTS[product]}.{kind}"
    return found


def _directions(num_layers: int, bidirectional: bool) -> list[str]:
    return [f"l{layer}{end}" for layer in range(num_layers) for end in ("", "_reverse")[: 1 + bidirectional]]


class UnfusedRecurrent(CompressedLayer, kind="unfused_recurrent", stage=Stage.UNFUSE):
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` with the products of each layer and direction as `nn.Linear`s.

    They are `l0.input`, `l0.hidden` and, with a `proj_size`, `l0.projection`; those of the second direction are in
    `l0_reverse`. The input product is computed for all steps at once, the others at every step. The same arguments
    give the same outputs, and what may be read of torch's layer (sizes, `weight_ih_l0`, `all_weights`) can be read.
    """

    unfolds = True
    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer, config = cls(), spec["layer"]
        for name in RECURRENT:
            setattr(layer, name, config[name])
        if config["type"] == "RNN":
            layer.nonlinearity = config["nonlinearity"]
            layer.mode = f"RNN_{config['nonlinearity'].upper()}"
        else:
            layer.mode = config["type"]
        rows = GATES[config["type"]] * layer.hidden_size
        outputs = layer.proj_size or layer.hidden_size
        inputs = layer.input_size
        for name in _directions(layer.num_layers, layer.bidirectional):
            if not name.startswith("l0"):
                inputs = outputs * (1 + layer.bidirectional)
            parts: dict[str, nn.Module] = {
                "input": nn.Linear(inputs, rows, bias=layer.bias),
                "hidden": nn.Linear(outputs, rows, bias=layer.bias),
            }
            if layer.proj_size:
                parts["projection"] = nn.Linear(layer.hidden_size, outputs, bias=False)
            layer.add_module(name, nn.ModuleDict(parts))
        return layer

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002 (torch's name)
        """As the `forward` of `nn.LSTM`, `nn.GRU` or `nn.RNN`, whose documentation gives the shapes.

        Raises:
            ModelError: an input or an initial state of the wrong shape.
        """
        if isinstance(input, PackedSequence):
            sizes, order, back = input.batch_sizes.tolist(), input.sorted_indices, input.unsorted_indices
            states = self._initial(hx, sizes[0], False, input.data)
            states = states if order is None else [state.index_select(1, order) for state in states]
            data, last = self._layers(input.data, states, sizes)
            last = last if back is None else [state.index_select(1, back) for state in last]
            return PackedSequence(data, input.batch_sizes, order, back), self._as_states(last)
        x, single = self._steps_first(input), input.dim() == 2  # (T, N, in)
        x, last = self._layers(x, self._initial(hx, x.shape[1], single, x), [x.shape[1]] * x.shape[0])
        if single:
            return x.squeeze(1), self._as_states([state.squeeze(1) for state in last])
        return x.transpose(0, 1) if self.batch_first else x, self._as_states(last)

    def _as_states(self, last: list[Tensor]) -> Any:
        return tuple(last) if self.mode == "LSTM" else last[0]

    def _layers(self, x: Tensor, states: list[Tensor], sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """All layers: the outputs of the last, and the last states `(layers * directions, N, H or P)`; see `_run`."""
        finals: list[list[Tensor]] = []
        names = _directions(self.num_layers, self.bidirectional)
        for first in range(0, len(names), self._ways):
            outputs = []
            for name in names[first : first + self._ways]:
                own = [state[len(finals)] for state in states]
                output, final = self._run(self.get_submodule(name), x, own, sizes, name.endswith("_reverse"))
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if first + self._ways < len(names) and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
        return x, [torch.stack(each) for each in zip(*finals, strict=True)]

    @property
    def _ways(self) -> int:
        return 1 + self.bidirectional

    def _steps_first(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ModelError(
                f"An {self.mode} got an input of shape {tuple(x.shape)}; it takes 2 dimensions (one sequence) or 3 "
                f"(a batch), the last of size {self.input_size}."
            )
        if x.dim() == 2:
            return x[:, None]
        return x.transpose(0, 1) if self.batch_first else x

    def _initial(self, hx: Any, batch: int, single: bool, x: Tensor) -> list[Tensor]:
        """The states at the start, h of `(layers * directions, N, H or P)` and, of an LSTM, c with H."""
        sizes = [self.proj_size or self.hidden_size] + [self.hidden_size] * (self.mode == "LSTM")
        shapes = [(self.num_layers * self._ways, batch, size) for size in sizes]
        if hx is None:
            return [torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in shapes]
        given = [hx] if isinstance(hx, Tensor) else list(hx)
        if single:
            given = [state[:, None] if state.dim() == 2 else state for state in given]
        if [tuple(state.shape) for state in given] != shapes:
            raise ModelError(
                f"An {self.mode} got initial states of the shapes {[tuple(state.shape) for state in given]}; for this "
                f"input they must be {shapes}" + (" without the second dimension." if single else ".")
            )
        return given

    def _run(
        self, parts: nn.Module, x: Tensor, initial: list[Tensor], sizes: Sequence[int], backwards: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """One direction of one layer.

        Args:
            parts: its products.
            x: `(T, N, in)`, or `(values, in)` where the sequences are packed.
            initial: states `(N, ...)`.
            sizes: how many sequences there are at each step; they only become fewer.
            backwards: from the last step to the first.

        Returns:
            The outputs, in the form of `x`, and the states after each sequence's last step.
        """
        assert isinstance(parts, nn.ModuleDict)
        products = parts["input"](x)
        steps: Sequence[Tensor] = products.unbind(0) if x.dim() == 3 else products.split(list(sizes))
        states = [state[: sizes[-1 if backwards else 0]] for state in initial]
        outputs: list[Tensor] = []
        ended: list[list[Tensor]] = []
        for step in reversed(steps) if backwards else steps:
            now, size = states[0].shape[0], step.shape[0]
            if size < now:
                ended.append([state[size:] for state in states])
                states = [state[:size] for state in states]
            elif size > now:
                states = [torch.cat([state, first[now:size]]) for state, first in zip(states, initial, strict=True)]
            states = self._step(parts, step, states)
            outputs.append(states[0])
        if backwards:
            outputs.reverse()
        if ended:
            states = [torch.cat(each) for each in zip(states, *reversed(ended), strict=True)]
        return torch.stack(outputs) if x.dim() == 3 else torch.cat(outputs), states

    def _step(self, parts: nn.ModuleDict, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The states after one step; `x` is the input product `(N, gates * H)`."""
        h = states[0]
        hidden = parts["hidden"](h)
        if self.mode == "LSTM":
            i, f, g, o = (x + hidden).chunk(4, -1)
            c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return [parts["projection"](h) if self.proj_size else h, c]
        if self.mode == "GRU":
            own = 2 * self.hidden_size
            reset, update = (x + hidden)[:, :own].sigmoid().chunk(2, -1)
            new = (x[:, own:] + reset * hidden[:, own:]).tanh()
            return [new + update * (h - new)]
        return [(x + hidden).relu() if self.mode == "RNN_RELU" else (x + hidden).tanh()]

    def finalized(self) -> nn.Module:
        """torch's own layer, which has faster kernels, where all products are ordinary again; else this one."""
        own = dict(self.named_parameters())
        products = [part for name, part in self.named_modules() if name.count(".") == 1]
        names = recurrent_parts(self.spec["layer"])
        if any(type(part) is not nn.Linear for part in products) or own.keys() != set(names.values()):
            return self
        reference = next(iter(own.values()))
        whole = build_layer(self.spec["layer"], device=reference.device, dtype=reference.dtype).train(self.training)
        with torch.no_grad():
            for name, part in names.items():
                whole.get_parameter(name).copy_(own[part])
                whole.get_parameter(name).requires_grad_(own[part].requires_grad)
        return whole

    def flatten_parameters(self) -> None:
        """Nothing to do: that is for torch's own kernels."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The tensors of each layer and direction, as torch's layer gives them."""
        directions = _directions(self.num_layers, self.bidirectional)
        names = list(recurrent_parts(self.spec["layer"]))
        return [[getattr(self, n) for n in names if n.endswith(f"_{direction}")] for direction in directions]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [tensor for each in self.all_weights for tensor in each]

    def __getattr__(self, name: str) -> Any:
        found = _NAME.fullmatch(name)
        parts = recurrent_parts(self.__dict__["spec"]["layer"]) if found and "spec" in self.__dict__ else {}
        if found is None or name not in parts:
            return super().__getattr__(name)
        product = self.get_submodule(parts[name].rpartition(".")[0])
        return weight_of(product) if found[1] == "weight" else product.bias

    def described(self) -> str:
        return f"{self.mode} as products"

"""The backend of PyTorch: layers are modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.backends.base import Backend, Weights, as_numpy, checked_weights


class PyTorchBackend(Backend):
    """Layers are `torch.nn.Module`, tensors `torch.Tensor`."""

    def from_torch(self, module: nn.Module, example_inputs: Any = None) -> nn.Module:
        return module.eval()

    def get_weights(self, layer: nn.Module) -> Weights:
        return {name: as_numpy(tensor) for name, tensor in _tensors(layer).items()}

    def set_weights(self, layer: nn.Module, weights: Mapping[str, Any]) -> None:
        tensors = _tensors(layer)
        checked = checked_weights({name: as_numpy(tensor) for name, tensor in tensors.items()}, weights)
        state = layer.state_dict()
        for name, values in checked.items():
            state[name] = torch.as_tensor(values.astype("float32") if values.dtype.name == "bfloat16" else values)
        layer.load_state_dict(state)

    def forward(self, layer: nn.Module, x: Any) -> Tensor:
        with torch.no_grad():
            result: Tensor = layer(torch.as_tensor(x))
        return result


def stored_names(layer: nn.Module) -> list[str]:
    """The names of the weights that a state dict has."""
    return list(_tensors(layer))


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    state = layer.state_dict()
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and not name.endswith("_extra_state")}

"""What the integration and the distributed tests compare: kinds of layers and state dicts of `tests.models.MLP`."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from pquant_lightning import CompressedLayer, LowRankCallback, QATCallback

LOW_RANK = {"fc1": "low_rank_linear", "fc2": "low_rank_linear"}  # at rank 4, `head` would not get smaller
QAT = {"fc1": "quant_linear", "fc2": "quant_linear", "head": "quant_linear"}
STACK = {
    **LOW_RANK,
    "fc1.first": "quant_linear",
    "fc1.second": "quant_linear",
    "fc2.first": "quant_linear",
    "fc2.second": "quant_linear",
    "head": "quant_linear",
}


def stack() -> list[Callback]:
    """Callbacks that make an MLP into `STACK`."""
    return [LowRankCallback(rank=4), QATCallback(bits=8)]


def kinds(model: nn.Module) -> dict[str, str]:
    """The kind of every compressed layer by its name."""
    return {name: module.kind for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors in the state dict, specs included."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two sets of tensors have the same names and are equal bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


class AtStart(Callback):
    """Keeps the parameters that the training starts from."""

    parameters: dict[str, Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def assert_all_trained(model: LightningModule, start: AtStart) -> None:
    """Every parameter is in an optimizer, nothing else is, and every parameter has moved."""
    alive = {id(p): name for name, p in model.named_parameters()}
    optimizers = model.trainer.optimizers
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(alive)
    assert all(id(p) in alive for optimizer in optimizers for p in optimizer.state)
    assert [name for name, p in model.named_parameters() if torch.equal(p, start.parameters[name])] == []

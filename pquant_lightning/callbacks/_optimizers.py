"""Optimizers get the parameters that are in the model, whatever was there when they were made."""

import gc
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from pquant_lightning.callbacks._lightning import is_a
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.structure import Resized


def repair_optimizers(trainer: Trainer, module: nn.Module, names_before: dict[int, str]) -> None:
    """Replaces parameters that are gone by those of the layers in their place, in the same parameter groups.

    What such a layer has beside a parameter that it took over joins that one's group.

    Args:
        trainer: its optimizers exist.
        module: the compressed model.
        names_before: names of the parameters before compression, by id.

    Raises:
        ModelError: a trainable parameter of a compressed layer is in no optimizer.
    """
    if not trainer.optimizers:
        return
    alive = {id(parameter): position for position, parameter in enumerate(module.parameters())}
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            gone = [p for p in group["params"] if id(p) not in alive]
            for parameter in gone:
                optimizer.state.pop(parameter, None)
            replacements = _replacements(module, [names_before.get(id(p), "") for p in group["params"]], held)
            if gone or replacements:
                members = [p for p in group["params"] if id(p) in alive] + replacements
                # in the order of the model, so that a resume, which knows no adopted parameters, gives the same order
                group["params"] = sorted(members, key=lambda p: alive[id(p)])
                held.update(map(id, replacements))
    for name, layer in compressed_layers(module, outermost=True).items():
        for own, parameter in layer.named_parameters(prefix=name):
            if parameter.requires_grad and id(parameter) not in held:
                raise ModelError(
                    f"The parameter {own!r} of a compressed layer is in no optimizer, so it would never train. Let "
                    "configure_optimizers read self.parameters() when it is called, or freeze the layer with "
                    "requires_grad_(False) before the fit."
                )


def _replacements(module: nn.Module, old_names: list[str], held: set[int]) -> list[Any]:
    """Trainable parameters of the compressed layers that the old parameters belonged to, and that no group holds."""
    found: dict[int, Any] = {}
    for name, layer in compressed_layers(module, outermost=True).items():
        if any(old.startswith(f"{name}.") for old in old_names):
            found.update({id(p): p for p in layer.parameters() if p.requires_grad and id(p) not in held})
    return list(found.values())


def follow_resized(trainer: Trainer, resized: Sequence[Resized]) -> None:
    """Lets a running training go on with smaller parameters.

    The optimizers hold them in the same groups and places, with the same part of their state; DDP wraps the model anew.

    Raises:
        ModelError: an optimizer keeps something of other shapes than the parameters' (Adafactor, LBFGS).
    """
    changes = {id(change.old): change for change in resized}
    for optimizer in trainer.optimizers:
        kept = [(p, v) for p, state in optimizer.state.items() for v in state.values()]
        if any(
            isinstance(v, list) or (isinstance(v, Tensor) and v.numel() > 1 and v.shape != p.shape) for p, v in kept
        ):
            raise ModelError(
                f"{type(optimizer).__name__} keeps a state of other shapes than its parameters, which cannot follow "
                "when they get smaller during training. Let that be at the end of the fit, or use another optimizer."
            )
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [changes[id(p)].new if id(p) in changes else p for p in group["params"]]
        for old in [parameter for parameter in optimizer.state if id(parameter) in changes]:
            change, state = changes[id(old)], optimizer.state.pop(old)
            optimizer.state[change.new] = {
                key: change.follow(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in state.items()
            }
    if is_a(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.lightning_module
        gc.collect()
        trainer.strategy.configure_ddp()

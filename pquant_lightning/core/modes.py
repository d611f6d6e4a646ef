"""Eval mode that can be taken back: a model which was only loaded or finalized trains again as it would have before."""

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)

_FROZEN = "_pquant_in_eval"  # names of the modules that were in eval mode while the model as a whole was not


def to_eval(model: Model) -> Model:
    """Eval mode; what `to_training` needs to know stays with the model. Returns the same model.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> [module.training for module in to_training(to_eval(net)).modules()]
    [True, True, False]
    """
    if model.training:
        model.__dict__[_FROZEN] = tuple(name for name, module in model.named_modules() if not module.training)
    return model.eval()


def to_training(model: Model, always: bool = False) -> Model:
    """The modes from before `to_eval`, where the model is still in eval mode. Returns the same model.

    A model that its user has put into eval mode stays as it is, as a Trainer leaves it.

    Args:
        model: its own `train` is called, which may keep some of its modules in eval mode.
        always: also where it was the user who has put the whole model into eval mode.
    """
    frozen = model.__dict__.pop(_FROZEN, None)
    if not model.training and (frozen is not None or always):
        model.train()
        for name, module in model.named_modules():
            if name in (frozen or ()):
                module.train(False)
    return model

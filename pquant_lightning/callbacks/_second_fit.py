"""What a callback says of a model that has its layers already: options of now that cannot change what is there."""

import logging
from typing import Any

from torch import nn

from pquant_lightning.core.compression_method import CompressionMethod

log = logging.getLogger(__name__)

_NOTE = "_pquant_options"  # on a module: the options that made its layers, by the callback's state_key


def options_of(method: CompressionMethod) -> dict[str, str]:
    """The options of a method as text, which every checkpoint may hold."""
    return {name: repr(value) for name, value in method.config.items()}


def note_options(module: nn.Module, key: str, method: CompressionMethod) -> dict[str, str]:
    """Remembers what the layers of a callback have been made with, and returns it."""
    options = module.__dict__.setdefault(_NOTE, {})[key] = options_of(method)
    return options


def warn_of_other_options(key: str, method: CompressionMethod, made_with: dict[str, str] | None) -> None:
    """Says which options change nothing, because layers made with others are in the model.

    Args:
        key: the callback's state_key.
        method: what the callback is to do now.
        made_with: options of the fit that made the layers; None where that is not known.
    """
    if made_with is None:
        return
    now = options_of(method)
    fixed = {name: value for name, value in now.items() if name not in method.steering}
    changed = {name: value for name, value in fixed.items() if made_with.get(name, value) != value}
    if not changed:
        return
    asked = ", ".join(f"{name}={value}" for name, value in changed.items())
    before = ", ".join(f"{name}={made_with[name]}" for name in changed)
    log.warning(
        "%s asks for %s, and the model has layers that an earlier fit made with %s. They stay as they are. To compress "
        "with other options, fit the uncompressed model; to change other layers of this one, give the callback a name "
        "of its own and include=[...].",
        key,
        asked,
        before,
    )


def made_with(module: nn.Module, key: str) -> dict[str, str] | None:
    """The options that the layers of a callback have been made with, where this process has made them."""
    noted: dict[str, Any] = module.__dict__.get(_NOTE, {})
    return noted.get(key)

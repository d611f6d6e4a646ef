"""Checks of option values against their annotations; the messages name the option, the value and the rule."""

import inspect
import math
import re
import types
import typing
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from torch import nn

from pquant_lightning.core.errors import ModelError, OptionError, known


@cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def check_type(owner: type, name: str, value: object) -> None:
    """Compares an option's value with its annotation on the class `owner`.

    Raises:
        OptionError: the value is not of the annotated type (an int is a float, a bool is neither), or not finite.
    """
    hint = _hints(owner)[name]
    if isinstance(value, float) and not math.isfinite(value) and value is not getattr(owner, name, None):
        raise OptionError(f"{owner.__name__} takes a finite number for {name}, got {value!r}.")
    if _matches(value, hint):
        return
    choices = [choice for part in _parts(hint) if get_origin(part) is Literal for choice in get_args(part)]
    named = all(part in (None, type(None)) or get_origin(part) is Literal for part in _parts(hint))
    if choices and named and isinstance(value, str):
        raise OptionError(f"{owner.__name__} has no {name} {value!r}. {known(value, map(str, choices))}")
    shown = " or ".join(_readable(part) for part in _parts(hint))
    raise OptionError(f"{owner.__name__} takes {shown} for {name}, got {value!r} ({type(value).__name__}).")


def check_model(function: str, value: object, or_class: bool = False) -> None:
    """Checks that what a function was given is a model.

    Raises:
        ModelError: it is something else; a class is told apart.
    """
    if isinstance(value, nn.Module):
        return
    what = "a model, a torch.nn.Module that is made already"
    if or_class:
        what += ", or the class of one"
    hint = " Make the model first." if isinstance(value, type) and issubclass(value, nn.Module) else ""
    raise ModelError(f"{function} takes {what}; got {value!r}.{hint}")


def one_of(owner: type, default: dict[str, Any], **given: Any) -> tuple[str, Any]:
    """The one member of an either/or group that was given, or the documented default where none was.

    Raises:
        OptionError: two or more were given.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in named.items())
        raise OptionError(f"{owner.__name__} takes one of {', '.join(given)}; got {shown}. Remove all but one.")
    return next(iter((named or default).items()))


def check_count(owner: type, name: str, value: int, low: int, high: int | None = None) -> None:
    """Checks that a count lies in low..high.

    Raises:
        OptionError: it does not.
    """
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise OptionError(f"{owner.__name__}: {name} is a count, {bounds}, got {value!r}.")


def check_share(owner: type, name: str, value: float) -> None:
    """Checks that a share that is kept lies in (0, 1].

    Raises:
        OptionError: it does not.
    """
    if not 0 < value <= 1:
        raise OptionError(f"{owner.__name__}: {name} is a share that is kept, in (0, 1], got {value!r}.")


def check_rank_or_share(owner: type, name: str, value: Any) -> None:
    """Checks the chosen member of the either/or group `rank`, a count, and `param_ratio` or the like, a share.

    Raises:
        OptionError: it is out of range.
    """
    if name == "rank":
        check_count(owner, name, value, low=1)
    else:
        check_share(owner, name, value)


def option_texts(owner: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each option, as it stands in their `Args:`.

    >>> class Base:
    ...     '''A method.
    ...
    ...     Args:
    ...         rank: of each layer,
    ...             a count.
    ...     '''
    >>> option_texts(Base)
    {'rank': 'of each layer,\\n            a count.'}
    """
    found: dict[str, str] = {}
    for cls in owner.__mro__:
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
        for name, words in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section[1] if section else "", re.MULTILINE):
            found.setdefault(name, words.rstrip().replace("\n", "\n    "))
    return found


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _matches(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_matches(item, get_args(hint)[0]) for item in value)
    if origin is tuple:  # YAML has only lists
        items = get_args(hint)
        return isinstance(value, list | tuple) and len(value) == len(items) and all(map(_matches, value, items))
    if origin is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(_matches(k, key) and _matches(v, item) for k, v in value.items())
    if hint in (None, type(None)):
        return value is None
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _readable(hint: Any) -> str:
    if hint in (None, type(None)):
        return "None"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)

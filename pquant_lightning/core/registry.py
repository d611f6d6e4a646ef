"""Methods by name: the built-in ones, the user's, and those of installed packages."""

import contextlib
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from pquant_lightning.core.errors import OptionError, PQuantError, known

MethodClass = TypeVar("MethodClass", bound=type[Any])

if TYPE_CHECKING:
    from pquant_lightning.core.compression_method import CompressionMethod

ENTRY_POINT_GROUP = "pquant_lightning.methods"


@cache
def _announced() -> dict[str, EntryPoint]:
    """What installed packages announce under `pquant_lightning.methods`, by registry name; nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


class CompressionMethodRegistry:
    """Compression methods by registry name.

    >>> CompressionMethodRegistry.get("low_rank", {"rank": 4}).rank
    4
    """

    _methods: ClassVar[dict[str, type[Any]]] = {}

    @overload
    @classmethod
    def register(cls, name: str, method_class: type[Any]) -> type[Any]: ...
    @overload
    @classmethod
    def register(cls, name: str, method_class: None = None) -> Callable[[MethodClass], MethodClass]: ...
    @classmethod
    def register(cls, name: str, method_class: type[Any] | None = None) -> Any:
        """Registers a method class, as a plain call or as a decorator `@register("name")`.

        Raises:
            PQuantError: the name is taken by another class, or it is not a class with `compress`.
        """
        if method_class is None:
            return partial(cls.register, name)
        if not (isinstance(method_class, type) and hasattr(method_class, "compress")):
            raise PQuantError(
                f"register({name!r}, ...) takes a method class with a `compress` method, got {method_class!r}."
            )
        holder = cls._methods.setdefault(name, method_class)
        if holder is not method_class and holder.__qualname__ != method_class.__qualname__:
            raise PQuantError(f"The method name {name!r} is already taken by {holder.__name__}; choose another name.")
        cls._methods[name] = method_class
        return method_class

    @classmethod
    def get(cls, name: str, config: dict[str, Any] | None = None, **options: Any) -> "CompressionMethod":
        """Makes the method of that name with the options of a dict, of keywords, or both.

        Raises:
            PQuantError: no method has that name, or the options are no dict.
        """
        if not isinstance(config, dict | None):
            raise OptionError(f"The options of {name!r} are a dict, got {config!r}.")
        method: CompressionMethod = cls.get_class(name)({**(config or {}), **options})
        return method

    @classmethod
    def get_class(cls, name: str) -> type[Any]:
        """The method class of that name; an installed package that announces it is imported now.

        Raises:
            PQuantError: no method has that name, or its package cannot be imported.
        """
        if name not in cls._methods and name in _announced():
            entry = _announced()[name]
            try:
                cls.register(name, entry.load())
            except (ImportError, AttributeError) as error:
                raise PQuantError(f"The method {name!r} cannot be imported from {entry.value}: {error}") from error
        if name not in cls._methods:
            raise PQuantError(f"Unknown compression method: {name!r}. Available: {known(name, cls.list_available())}")
        return cls._methods[name]

    @classmethod
    def list_available(cls) -> list[str]:
        """Names of all methods: registered ones in the order of registration, then those of installed packages."""
        return list(dict.fromkeys([*cls._methods, *_announced()]))

    @classmethod
    def load_announced(cls) -> None:
        """Imports the methods of installed packages, which registers their kinds; broken packages are passed over."""
        for name in _announced():
            with contextlib.suppress(PQuantError):
                cls.get_class(name)

    @classmethod
    def loaded(cls) -> list[type[Any]]:
        """The method classes that are registered by now, each once."""
        return list(dict.fromkeys(cls._methods.values()))

    @classmethod
    def name_of(cls, method_class: type[Any]) -> str:
        """The first name a class was registered under, else its class name."""
        return next((name for name, held in cls._methods.items() if held is method_class), method_class.__name__)

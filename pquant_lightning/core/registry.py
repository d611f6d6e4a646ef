"""Methods by name: the built-in ones, the user's, and those of installed packages."""

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from pquant_lightning.core.errors import PQuantError, known

MethodClass = TypeVar("MethodClass", bound=type[Any])

if TYPE_CHECKING:
    from pquant_lightning.core.compression_method import CompressionMethod

ENTRY_POINT_GROUP = "pquant_lightning.methods"


@cache
def _load_entry_points() -> None:
    """Imports what installed packages announce under `pquant_lightning.methods` (name = registry name)."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name not in CompressionMethodRegistry._methods:
            CompressionMethodRegistry.register(entry.name, entry.load())


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
            PQuantError: no method has that name.
        """
        method: CompressionMethod = cls.get_class(name)({**(config or {}), **options})
        return method

    @classmethod
    def get_class(cls, name: str) -> type[Any]:
        """The method class of that name.

        Raises:
            PQuantError: no method has that name.
        """
        _load_entry_points()
        if name not in cls._methods:
            raise PQuantError(f"Unknown compression method: {name!r}. Available: {known(name, cls._methods)}")
        return cls._methods[name]

    @classmethod
    def list_available(cls) -> list[str]:
        """Names of all registered methods, in the order of registration."""
        _load_entry_points()
        return list(cls._methods)

    @classmethod
    def name_of(cls, method_class: type[Any]) -> str:
        """The first name a class was registered under, else its class name."""
        return next((name for name, held in cls._methods.items() if held is method_class), method_class.__name__)

"""Deep copies of models and callbacks, also of those that hold what cannot be copied: locks, sockets, files, ..."""

import copy
from types import TracebackType
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from pquant_lightning.core._private import is_compiled_wrapper
from pquant_lightning.core.compiled import forget_compiled, unwrap
from pquant_lightning.core.errors import ModelError

T = TypeVar("T")

_ATTEMPTS = 500  # more are needed only where each attempt makes anew what cannot be copied


def deep_copy(original: T) -> T:
    """A copy as `copy.deepcopy` makes it, that shares with the original what refuses to be copied.

    Tensors are never shared: of one that is the result of a computation (which torch does not copy), the values are
    copied. A lock, a socket, an open file, a generator, a module of Python, ... is the same object in both.

    Args:
        original: a model, or anything else.

    Raises:
        ModelError: it refuses to be copied as a whole.

    >>> import threading
    >>> net = nn.Linear(2, 2)
    >>> net.lock = threading.Lock()
    >>> twin = deep_copy(net)
    >>> twin.lock is net.lock, twin.weight is net.weight
    (True, False)
    """
    done: dict[int, Any] = {}  # copies by the identity of what they are of
    kept: list[Any] = []  # as long as these live, no other object has their identity
    for _ in range(_ATTEMPTS):
        memo = dict(done)
        try:
            return _uncompiled(copy.deepcopy(original, memo))
        except Exception as error:  # whatever an object raises that cannot be copied
            refused = _refused(error.__traceback__)
            if refused is original or refused is None:
                raise ModelError(
                    f"A {type(original).__name__} cannot be copied: {error}. Pass inplace=True where there is such an "
                    "option, or give its class a __deepcopy__."
                ) from error
        alike = [value for value in _attributes(original) if type(value) is type(refused) and _refuses(value)]
        kept += [memo, refused]
        # tensors (and their memory, under torch's own key) that have been copied are not copied again
        done.update({k: v for k, v in memo.items() if not isinstance(k, int) or type(v) in (Tensor, nn.Parameter)})
        for value in (refused, *alike):
            done[id(value)] = value.detach().clone() if isinstance(value, Tensor) else value
    raise ModelError(f"A {type(original).__name__} cannot be copied: it makes anew what cannot be copied, {refused!r}.")


def _uncompiled(twin: T) -> T:
    """The copy of a module without what was compiled of the original; wrappers are taken off (`core/compiled.py`)."""
    if not isinstance(twin, nn.Module):
        return twin
    for module in twin.modules():
        if not is_compiled_wrapper(module):
            forget_compiled(module.__dict__)
    return cast(T, unwrap(twin))


def _attributes(model: object) -> list[Any]:
    """What the modules of a model hold in plain attributes."""
    return [v for module in model.modules() for v in vars(module).values()] if isinstance(model, nn.Module) else []


def _refuses(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # as above
        return True
    return False


def _refused(traceback: TracebackType | None) -> Any:
    """The innermost object that `copy.deepcopy` was about to copy when it failed."""
    found: Any = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code is copy.deepcopy.__code__:
            found = frame.f_locals["x"]
        traceback = traceback.tb_next
    return found

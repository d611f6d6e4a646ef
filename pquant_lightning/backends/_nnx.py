"""A lowered model as a flax NNX module. Import this file only where flax is installed."""

from collections.abc import Callable
from typing import Any

from flax import nnx


class TracedModule(nnx.Module):
    """A pure function with its parameters.

    Attributes:
        params: float parameters, `nnx.Param` by torch's names; they train.
        constants: integers, statistics and other buffers, `nnx.Variable` by torch's names.
    """

    def __init__(self, function: Callable[..., Any], params: dict[str, Any], trained: set[str]) -> None:
        self.function = function
        self.params = nnx.data({name: nnx.Param(value) for name, value in params.items() if name in trained})
        self.constants = nnx.data({n: nnx.Variable(value) for n, value in params.items() if n not in trained})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = {name: variable[...] for name, variable in {**self.params, **self.constants}.items()}
        return self.function(values, *args, **kwargs)

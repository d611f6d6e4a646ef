"""All or nothing: what changes a model in place and fails half way leaves it as it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core._private import TENSOR_TABLES, DispatchMode, without_modes

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator["Undo"]:
    """Within the block the model may be changed in place; where the block raises, the model is what it was.

    That is the layers, their attributes and hooks, the same parameters with the same values and flags. It costs no copy
    of the model: layers that are replaced stay in memory until the block ends, and of a tensor that is written into, a
    copy is made before the first such operation. Values are written within `writing()` of what the block is given,
    which slows down every operation by some microseconds; replacing layers and setting attributes need nothing.

    Args:
        model: any module; of tensors that are sharded, the values are not restored.

    >>> net = nn.Sequential(nn.Linear(2, 1))
    >>> try:
    ...     with unchanged_on_error(net) as undo, undo.writing(), torch.no_grad():
    ...         _ = net[0].weight.zero_()
    ...         net[0] = nn.Identity()
    ...         raise ValueError("half way")
    ... except ValueError:
    ...     print(type(net[0]).__name__, bool(net[0].weight.any()))
    Linear True
    """
    undo = Undo(model)
    try:
        yield undo
    except BaseException:
        undo.restore()
        raise


class Undo:
    """The module tree as it was, and for each tensor another name of the memory that it had."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _contents(module.__dict__)) for module in model.modules()]
        tensors = {id(t): t for m in model.modules() for table in TENSOR_TABLES for t in m.__dict__[table].values()}
        held = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]
        self._tensors = [(t, t.detach(), t.requires_grad, t.grad) for t in held]
        # running statistics, which torch's batch norm writes into without saying so
        small = [t for t in held if t.dim() < 2 and not t.requires_grad and _pointer(t)]
        self._copies = [(tensor, tensor.detach().clone()) for tensor in small]
        self._journal = _Journal([alias for _, alias, _, _ in self._tensors])

    def writing(self) -> AbstractContextManager[Any]:
        """What is written into a tensor of the model meanwhile is noted."""
        return self._journal

    @contextmanager
    def filling(self, new: nn.Module, old: nn.Module) -> Iterator[None]:
        """Of the model, only these two layers are written into meanwhile, of which one takes the other's place.

        Nothing is slowed down, for long computations of one layer's values; the memory of the layer is copied once.
        """
        tensors = [t for layer in (new, old) for t in (*layer.parameters(), *layer.buffers())]
        with without_modes(), self._journal.watching(tensors):
            yield

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies that have been made of what was written into."""
        return self._journal.copied_bytes

    def restore(self) -> None:
        """Brings back what was."""
        self._journal.undo()
        for module, attributes in self._modules:
            _refill(module.__dict__, attributes)
        for tensor, alias, requires_grad, grad in self._tensors:
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.dtype != alias.dtype:
                tensor.data = alias
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and where it is a plain container, what is in it."""
    return {name: (v, v.copy() if isinstance(v, _CONTAINERS) else None) for name, v in attributes.items()}


def _refill(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in attributes.keys() - before.keys():
        del attributes[name]
    for name, (value, content) in before.items():
        if isinstance(value, dict | set):
            value.clear()
            value.update(content)
        elif isinstance(value, list):
            value[:] = content
        attributes[name] = value


class NoUndo:
    """In place of an `Undo` where a copy of the model is changed, which nobody has seen."""

    def writing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def filling(self, new: nn.Module, old: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()


class _Journal(DispatchMode):  # type: ignore[misc]
    """Copies the memory of the given tensors before an operation writes into it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._open = {pointer for tensor in tensors if (pointer := _pointer(tensor))}
        self._saved: list[tuple[Any, Any]] = []  # a memory, and a copy of it
        self._written: dict[Any, list[tuple[int, str]]] = {}  # the arguments an operation writes into

    @contextmanager
    def watching(self, tensors: list[Tensor]) -> Iterator[None]:
        """Copies the memory of these tensors, and keeps the copies of what has changed in the end."""
        memories = {_pointer(t): t.untyped_storage() for t in tensors if _pointer(t) in self._open}
        copies = [(pointer, memory, memory.clone()) for pointer, memory in memories.items()]
        try:
            yield
        finally:
            for pointer, memory, copy in copies:
                if not torch.equal(_bytes(memory), _bytes(copy)):
                    self._open.discard(pointer)
                    self._saved.append((memory, copy))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._written:
            arguments = enumerate(func._schema.arguments)
            self._written[func] = [
                (i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write
            ]
        for place, name in self._written[func]:
            self._keep(args[place] if place < len(args) else kwargs.get(name))
        return func(*args, **kwargs)

    def _keep(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor) and (pointer := _pointer(tensor)) in self._open:
                self._open.discard(pointer)
                memory = tensor.untyped_storage()
                self._saved.append((memory, memory.clone()))

    @property
    def copied_bytes(self) -> int:
        return sum(content.nbytes() for _, content in self._saved)

    def undo(self) -> None:
        for memory, content in self._saved:
            memory.copy_(content)


def _bytes(memory: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


def _pointer(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return 0
    return tensor.untyped_storage().data_ptr()

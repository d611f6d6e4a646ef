"""Chains of blocks: those of a model that are called one after another, and the inputs of one block at a time."""

import itertools
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.copying import deep_copy

_PLAIN = (str, bytes, int, float, bool, type(None))


def find_chain(model: nn.Module, layers: Collection[str], samples: Samples) -> tuple[str, ...]:
    """Names of blocks of which each is called once, with what the block before it has returned and nothing else of it.

    They are the children of one ModuleList or Sequential, the one that holds most of the layers; found by running the
    model on the first batch.

    Args:
        model: any module.
        layers: names of layers that the blocks are to hold.
        samples: what the model is run on.

    Returns:
        In the order of their calls; empty where fewer than two blocks hold layers.
    """
    lists = {
        name: [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    calls: list[tuple[str, list[Tensor], list[Tensor]]] = []  # name, tensors that came in, tensors that went out

    def hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((name, list(tensors_in((args, kwargs))), list(tensors_in(output))))

        return call

    names = {name for blocks in lists.values() for name in blocks}
    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    try:
        for _ in run_samples(model, Samples(samples.batches[:1], samples.run)):
            pass
    finally:
        for handle in handles:
            handle.remove()

    def held(blocks: list[str]) -> list[str]:
        return [block for block in blocks if any(_inside(layer, block) for layer in layers)]

    chains = [blocks for blocks in lists.values() if len(held(blocks)) > 1 and _is_chain(blocks, calls)]
    count = [sum(_inside(layer, block) for block in blocks for layer in layers) for blocks in chains]
    return tuple(chains[count.index(max(count))]) if chains else ()


def _is_chain(blocks: list[str], calls: list[tuple[str, list[Tensor], list[Tensor]]]) -> bool:
    own = [call for call in calls if call[0] in blocks]
    if [name for name, _, _ in own] != blocks:
        return False
    returned: list[Tensor] = []
    for (_, _, before), (_, inputs, _) in itertools.pairwise(own):
        returned += before
        if not (before and inputs and inputs[0] is before[0]) or any(x is y for x in inputs[1:] for y in returned):
            return False
    return True


def _inside(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


class _Call:
    """One call of a block: its arguments, in which `_HIDDEN` stands for the first tensor, and that tensor.

    No dataclass: a batch of one would be cast to the model's precision, and these are as the block was given them.
    """

    def __init__(self, args: Any, kwargs: Any, hidden: Tensor) -> None:
        self.args, self.kwargs, self.hidden = args, kwargs, hidden


_HIDDEN = object()


class BlockInputs:
    """The inputs of one block of a chain at a time, over all samples, in memory.

    Args:
        model: holds the blocks; it is run once over the samples.
        blocks: a chain, see `find_chain`.
        samples: what the model is run on.
        max_bytes: of the inputs of one block and what all blocks are given beside them.

    Attributes:
        fits: whether they take no more than that; if not, nothing is held.
        block: the place in the chain of the block whose inputs are held.
    """

    def __init__(self, model: nn.Module, blocks: tuple[str, ...], samples: Samples, max_bytes: int) -> None:
        self.model, self.blocks, self.reduce = model, blocks, samples.reduce
        self.block, self.fits = 0, True
        self._hidden: list[Tensor] = []
        self._others: list[list[tuple[Any, Any]]] = [[] for _ in blocks]  # block, batch: positional and keyword
        self._seen: dict[int, tuple[Any, Any]] = {}  # of this batch: an object by its id, and what stands for it
        self._held, self._max_bytes = 0, max_bytes
        modules = [model.get_submodule(name) for name in blocks]
        handles = [m.register_forward_pre_hook(self._hook(i), with_kwargs=True) for i, m in enumerate(modules)]
        try:
            for _ in run_samples(model, samples):
                self._seen = {}
        finally:
            for handle in handles:
                handle.remove()
        if not self.fits:
            self._hidden, self._others = [], []

    def _hook(self, place: int) -> Callable[..., None]:
        def call(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.fits:
                return
            hidden = next(tensors_in((args, kwargs)))
            if place == 0:
                self._hidden.append(hidden.detach().clone())
                self._held += hidden.nbytes
            self._others[place].append((self._kept(args, hidden), self._kept(kwargs, hidden)))
            self.fits = self._held <= self._max_bytes

        return call

    def _kept(self, value: Any, hidden: Tensor) -> Any:
        if value is hidden:
            return _HIDDEN
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, dict):
            return {key: self._kept(item, hidden) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._kept(item, hidden) for item in value)
        if id(value) not in self._seen:  # an object as it is before the first block: a cache of keys, still empty
            self._seen[id(value)] = value, value if isinstance(value, Tensor) else deep_copy(value)
            self._held += value.nbytes if isinstance(value, Tensor) else 0
        return self._seen[id(value)][1]

    def samples(self) -> Samples:
        """The calls of the present block as samples to run it on."""
        calls = zip(self._others[self.block], self._hidden, strict=True)
        return Samples(tuple(_Call(*others, hidden) for others, hidden in calls), _call, self.reduce)

    def advance(self) -> None:
        """Runs the present block, as it is now: what it returns are the inputs of the next one."""
        block = self.model.get_submodule(self.blocks[self.block])
        self._hidden = [next(tensors_in(output)) for output in run_samples(block, self.samples())]
        self.block += 1


def _call(block: nn.Module, call: _Call) -> Any:
    hidden = call.hidden.clone()  # a block may write into its input

    def given(value: Any) -> Any:
        if value is _HIDDEN:
            return hidden
        if isinstance(value, dict):
            return {key: given(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(given(item) for item in value)
        return value if isinstance(value, (Tensor, *_PLAIN)) else deep_copy(value)

    return block(*given(call.args), **given(call.kwargs))

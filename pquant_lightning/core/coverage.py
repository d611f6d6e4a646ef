"""How much of a model all methods together have left alone: one warning where that is most of its bytes."""

import logging
from weakref import WeakKeyDictionary

from torch import nn

from pquant_lightning.core.plan import CompressionPlan

log = logging.getLogger(__name__)

_MOST = 0.5
_WISHED = ("excluded by", "not in include", "the budget", "trained as it is", "16 bits", "already compressed")


class _Record:
    """What is known of one model: its bytes before anything was changed, and by layer what was decided."""

    def __init__(self, model: nn.Module) -> None:
        self.total = _bytes(model)
        self.changed: set[str] = set()
        self.left: dict[str, tuple[str, int]] = {}


_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


def note_plan(model: nn.Module, plan: CompressionPlan) -> None:
    """Remembers what a plan changes and leaves alone; called before it is applied."""
    record = _records.setdefault(model, _Record(model))
    record.changed |= {entry.name for entry in (*plan.layers, *plan.splits)}
    modules = dict(model.named_modules())
    for skip in plan.skipped:
        module = modules.get(skip.name) or (model if skip.name == type(model).__name__ else None)
        if module is not None and skip.name not in record.left:
            whole = module is not model
            record.left[skip.name] = (skip.reason, _bytes(module, recurse=whole))


def warn_where_most_is_left(model: nn.Module) -> None:
    """Says once which layers hold most of the bytes, and why they stay as they are, where no method changes those.

    Layers that the user has left out do not count.
    """
    record = _records.pop(model, None)
    if record is None:
        return
    changed = record.changed
    left = {
        name: found
        for name, found in record.left.items()
        if not found[0].startswith(_WISHED)
        and name not in changed
        and not any(c.startswith(f"{name}.") for c in changed)
    }
    size = sum(size for _, size in left.values())
    if size <= _MOST * record.total:
        return
    by_reason: dict[str, list[str]] = {}
    for name in sorted(left, key=lambda name: -left[name][1]):
        by_reason.setdefault(left[name][0], []).append(name)
    shown = "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in by_reason.items()
    )
    log.warning("%.0f %% of the model's bytes stay as they are. %s.", 100 * size / record.total, shown)


def _bytes(module: nn.Module, recurse: bool = True) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse) if not _is_lazy(p))


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)

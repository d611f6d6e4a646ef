"""What a model without some of its units costs, as a share of what it costs with them."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pquant_lightning.core.calibration import Samples, bind_batch, run_samples
from pquant_lightning.core.deploy import count_params, share_copy
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.report import count_macs
from pquant_lightning.methods.pruning._sized import Removed, Units, take_out
from pquant_lightning.utils.benchmarking import measure

_ROUNDS = 7  # of a latency


def kept_params(model: nn.Module, groups: Sequence[Units], samples: Samples) -> Callable[[Removed], float]:
    """Share of the parameters that is kept without some units."""
    whole = count_params(model)
    return lambda removed: count_params(_without(model, groups, removed, "meta")) / whole


def kept_macs(model: nn.Module, groups: Sequence[Units], samples: Samples) -> Callable[[Removed], float]:
    """Share of the multiply-accumulates of one forward pass that is kept without some units.

    Raises:
        ModelError: they cannot be counted.
    """
    example: Any = _call(model, samples)
    whole = count_macs(model, example)

    def kept(removed: Removed) -> float:
        now = None if whole is None else count_macs(_without(model, groups, removed, "meta"), example)
        if whole is None or now is None or not whole[""]:
            raise ModelError(
                'target={"macs": ...} counts on "meta" tensors, where this model does not run (its forward looks at '
                "values, or predict_step does not call it with the batch). Use the target params or latency."
            )
        return now[""] / whole[""]

    return kept


def kept_latency(model: nn.Module, groups: Sequence[Units], samples: Samples) -> Callable[[Removed], float]:
    """Share of the time of a forward pass on the example, in eval mode on this machine; median of alternating runs."""

    def kept(removed: Removed) -> float:
        small = _without(model, groups, removed)
        runs = {
            "before": lambda: deque(run_samples(model, samples), maxlen=0),
            "now": lambda: deque(run_samples(small, samples), maxlen=0),
        }
        timings = measure(runs, min_rounds=_ROUNDS, max_rounds=_ROUNDS)
        return timings["now"].relative_to(timings["before"]).median

    return kept


TARGETS = {"params": kept_params, "macs": kept_macs, "latency": kept_latency}


def _without(model: nn.Module, groups: Sequence[Units], removed: Removed, device: str | None = None) -> nn.Module:
    small = share_copy(model, device)
    take_out(small, groups, removed)
    return small


def _call(model: nn.Module, samples: Samples) -> Any:
    """The example as `count_macs` takes it."""
    args, kwargs = bind_batch(model, samples.batches[0])
    return kwargs or args

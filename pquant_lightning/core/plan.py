"""Decisions as frozen data: which layers a method changes and how, and why it leaves the others alone."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from pquant_lightning.core.errors import CheckpointError, OptionError, known

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerInfo:
    """What an adapter knows of one layer.

    Attributes:
        type: torch's class name, e.g. `"Conv2d"`.
        shape: shape of the weight, e.g. `(out, in, kh, kw)`.
        config: the JSON-able constructor arguments that build the same structure again.
    """

    type: str
    shape: tuple[int, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class LayerPlan:
    """One layer to be changed. The spec *is* the plan entry: the layer built from it stores the same dict.

    Attributes:
        name: dotted module name.
        spec: structure of the new layer (`CompressedLayer`), JSON-able.
        scratch: what the decision computed on the way and `fill` can use (an SVD); never saved, never sent.
    """

    name: str
    spec: dict[str, Any]
    scratch: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "spec": self.spec, "scratch": None}


@dataclass(frozen=True)
class Skip:
    """One layer left alone, why, and by whom (a method's name or a callback's `state_key`)."""

    name: str
    reason: str
    by: str = ""


@dataclass(frozen=True)
class Candidate:
    """One choice a method offers for one layer, as the budget sees it.

    Attributes:
        options: the choice, e.g. `{"rank": 16}`.
        size_bytes: stored bytes of the layer with it.
        macs: multiply-accumulates with it, per output position.
        loss: what it costs, as a squared relative error.
        factors: matrices that the weight becomes the product of; what rounds them later errs so many times.
    """

    options: dict[str, Any]
    size_bytes: int
    macs: int
    loss: float
    factors: int = 1


@dataclass(frozen=True)
class CompressionPlan:
    """All decisions of one method on one model; pure data that can be printed, saved, edited and applied.

    Attributes:
        method: registry name of the method.
        by: who made it: the `state_key` of a callback, or the method's name.
        layers: the layers to change.
        skipped: the layers left alone.
        splits: layers that are only taken apart first, because some of their parts are among `layers`.
    """

    method: str
    by: str
    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skip, ...] = ()
    splits: tuple[LayerPlan, ...] = ()

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back to an equal plan."""
        entries = {
            key: [{"name": entry.name, "spec": entry.spec} for entry in getattr(self, key)]
            for key in ("splits", "layers")
        }
        skipped = [asdict(skip) for skip in self.skipped]
        payload = {"version": PLAN_VERSION, "method": self.method, "by": self.by, **entries, "skipped": skipped}
        return json.dumps(payload, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: the text is no plan, or of a newer version.
        """
        try:
            payload = json.loads(text)
            version = payload["version"]
            layers, splits = (
                tuple(LayerPlan(entry["name"], entry["spec"]) for entry in payload[key]) for key in ("layers", "splits")
            )
            skipped = tuple(Skip(**entry) for entry in payload["skipped"])
            plan = cls(payload["method"], payload["by"], layers, skipped, splits)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"This text is not a compression plan ({error!r}); write one with plan.to_json()."
            ) from error
        if version != PLAN_VERSION:
            raise CheckpointError(f"The plan has version {version}; this release reads version {PLAN_VERSION}.")
        return plan

    def without(self, *names: str) -> Self:
        """The plan with these layers, and what is inside them, left alone.

        Raises:
            OptionError: the plan does not change a layer of that name.
        """
        planned = [layer.name for layer in (*self.splits, *self.layers)]
        for name in names:
            if name not in planned:
                raise OptionError(f"The plan does not change a layer {name!r}. {known(name, planned)}")
        dropped = tuple(Skip(name, "taken out of the plan") for name in names)
        inside = tuple(f"{name}." for name in names)
        kept = tuple(layer for layer in self.layers if layer.name not in names and not layer.name.startswith(inside))
        splits = tuple(e for e in self.splits if any(layer.name.startswith(f"{e.name}.") for layer in kept))
        return replace(self, layers=kept, skipped=self.skipped + dropped, splits=splits)

    def __str__(self) -> str:
        lines = [f"{self.method} plan: {len(self.layers)} layers to change, {len(self.skipped)} left alone"]
        hidden = ("version", "by", "layer", "parts", "follow", "lengths")
        for layer in self.layers:
            choice = ", ".join(f"{key}={value}" for key, value in layer.spec.items() if key not in hidden)
            lines.append(f"  {layer.name}: {choice}")
        lines += [f"  {skip.name}: left alone, {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)

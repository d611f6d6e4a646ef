"""Every pruning x every rounding: what has been pruned is exactly zero afterwards, and its code is the zero point."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import LoRACompression, UnstructuredPruning, compress_model, finalize
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.methods.quantization import _rounding
from pquant_lightning.methods.quantization._adaround import adaround_codes
from pquant_lightning.methods.quantization._integer import IntLayer

ANY: dict[str, Any] = {"include": ["*"], "min_saving": 0.0}


class Net(nn.Module):
    """One layer of each kind, all that can be scaled against a neighbour among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.scale = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.norm(self.conv(self.embed(ids).mT)).relu())
        result: Tensor = self.fc(self.scale(x.mT))
        return result


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.norm.weight.data[::2] *= -1  # a negative factor, folded in, turns codes around
    return model


IDS = torch.randint(24, (40, 12), generator=torch.Generator().manual_seed(0))
PRUNINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "few": {"pattern": "3:4"},
    "most": {"sparsity": 0.9, "scope": "layer"},
    "2:4": {"pattern": "2:4"},
    "blocks": {"sparsity": 0.5, "block_size": (4, 1)},
    "random": {"criterion": "random", "sparsity": 0.4},
    "snip": {"criterion": "snip", "sparsity": 0.5},
    "taylor 2:4": {"criterion": "taylor", "pattern": "2:4"},
    "movement": {"criterion": "movement", "sparsity": 0.5},
    "wanda": {"criterion": "wanda", "sparsity": 0.5},
    "wanda 2:4": {"criterion": "wanda", "pattern": "2:4"},
    "sparsegpt": {"criterion": "sparsegpt", "sparsity": 0.5},
    "sparsegpt 2:4": {"criterion": "sparsegpt", "pattern": "2:4"},
}


def pruned(name: str) -> tuple[Net, dict[str, Tensor]]:
    """The net after pruning, and the masks of its zeros by layer."""
    method, model = UnstructuredPruning(**PRUNINGS[name], **ANY), net()
    if method.criterion in ("snip", "taylor", "movement"):
        context = CompressionContext(by="test")
        method.apply(model, method.plan(model, context), context)
        model(IDS).square().sum().backward()
        method.observe(model, context.state)
        method.step(model, context.state, 1.0)
        model.zero_grad()
    else:
        method.compress_in_place(model, method.samples_of([IDS]))
    zeros = {n: layer.weight.detach() == 0 for n, layer in model.named_children() if layer.weight.dim() > 1}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 50
    return model.eval(), {n: mask for n, mask in zeros.items() if mask.any()}


BITS = {"embed": {"weight_bits": 4}, "conv": {"weight_bits": 3}, "up": {"weight_bits": 8}, "fc": {"weight_bits": 2}}


def ptq(rounding: str, scheme: str = "static", group_size: int | None = None, **options: Any) -> dict[str, Any]:
    return {"method": "ptq", "rounding": rounding, "scheme": scheme, "group_size": group_size, **options}


ROUNDINGS: dict[str, dict[str, Any]] = {
    **{rounding: ptq(rounding, overrides=BITS) for rounding in ("nearest", "hqq", "gptq")},
    **{
        f"{rounding} in groups": ptq(rounding, "weight_only", 4, weight_bits=4, overrides={"conv": {"weight_bits": 2}})
        for rounding in ("nearest", "hqq", "gptq", "awq", "adaround")
    },
    "dynamic, equalized, smoothed": ptq("gptq", "dynamic", weight_bits=4, equalize=True, smooth=0.5),
    "damped, in order": ptq("gptq", weight_bits=3, act_order=False, damping=0.5),
    "mixed by gradients": {"method": "mixed_precision", "average_bits": 4},
    "mixed by weights": {"method": "mixed_precision", "average_bits": 3, "scheme": "weight_only", "num_samples": 0},
    **{f"qat {q}": {"method": "qat", "weight_bits": 4, "quantizer": q, "overrides": BITS} for q in ("ste", "lsq")},
    "qat pact": {"method": "qat", "bits": 8, "quantizer": "pact"},
}


def loftq(model: Net) -> nn.Module:
    """Adapters that start with what rounding loses, and then rounding."""
    adapted = compress_model(model, LoRACompression(r=2, init="loftq", loftq_bits=2, loftq_iter=3))
    return compress_model(adapted, "ptq", rounding="nearest", weight_bits=4, train_loader=[IDS], **ANY)


def rounded(model: Net, options: dict[str, Any]) -> nn.Module:
    options = {"min_saving": 0.0, **options}
    loader = None if options.get("num_samples") == 0 else [IDS]
    return finalize(compress_model(model, options.pop("method"), train_loader=loader, **options))


def faults(model: nn.Module, zeros: dict[str, Tensor]) -> list[str]:
    """Layers in which something else than zero stands where there was a zero."""
    found = []
    for name, mask in zeros.items():
        layer: Any = model.get_submodule(name)
        layer = getattr(layer, "base", layer)  # below an adapter
        assert isinstance(layer, IntLayer), f"{name} was not rounded"
        rows = layer.weight_codes().movedim(layer.axis, 0).flatten(1)
        point = torch.zeros_like(layer.scale) if layer.zero is None else layer.zero.float()
        points = point.repeat_interleave(rows.shape[1] // point.shape[1], 1)
        moved = (rows != points)[mask.movedim(layer.axis, 0).flatten(1)]
        filled = layer.dense_weight()[mask] != 0
        if moved.any() or filled.any():
            found.append(f"{name}: {int(moved.sum())} codes, {int(filled.sum())} of {int(mask.sum())} zeros")
    return found


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_zeros_stay_zero(pruning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rounding, "adaround_codes", partial(adaround_codes, steps=60))
    model, zeros = pruned(pruning)
    ways: dict[str, Callable[[], nn.Module]] = {
        name: lambda options=options: rounded(model, options)  # type: ignore[misc]
        for name, options in ROUNDINGS.items()
    }
    ways["loftq"] = lambda: loftq(model)
    found = {name: fault for name, way in ways.items() if (fault := faults(way(), zeros))}
    assert not found

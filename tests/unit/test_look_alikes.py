"""Layers of other types that compute what an ordinary one does, as they stand in timm and torch_geometric."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import LayerAdapter, LowRankCompression, compress_model, finalize, load_compressed
from pquant_lightning import save_compressed as save
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import NothingToCompressError
from pquant_lightning.core.layer_adapter import as_torch


class TimmLinear(nn.Linear):
    """timm's `Linear`, which only looks after autocast in scripts."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as there)
        if torch.jit.is_scripting():
            bias = self.bias.to(dtype=input.dtype) if self.bias is not None else None
            return F.linear(input, self.weight.to(dtype=input.dtype), bias=bias)
        return F.linear(input, self.weight, self.bias)


class GraphLinear(nn.Module):
    """torch_geometric's `Linear`: no subclass, and other names for its sizes."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight_initializer: str | None = None
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) / in_channels**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class NamedConv(nn.Conv2d):
    """With an argument of its own, and the same computation."""

    def __init__(self, *args: Any, tag: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class Words(nn.Embedding):
    """Only starts differently."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


ALIKE: dict[str, nn.Module] = {
    "timm": TimmLinear(32, 24),
    "graph": GraphLinear(32, 24),
    "graph_square": GraphLinear(32, 32, bias=False),
    "conv": NamedConv(16, 24, 3, padding=1, tag="stem"),
    "words": Words(64, 16),
}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Transposing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 32))  # all zeros: the weights at hand would show nothing

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class Bounded(nn.Linear):
    """Differs on large values only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1000, 1000)


class SamePadding(nn.Conv2d):
    """timm's `Conv2dSame`: the margin follows the input's size, and for some sizes there is none."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        down, across = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in (height, width))
        x = F.pad(x, [across // 2, across - across // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Scaled(nn.Embedding):
    """Gemma's."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale


class Masked(nn.Linear):
    """Takes more than an input."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


def _patched() -> nn.Module:
    layer = TimmLinear(32, 24)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


OTHERS: dict[str, nn.Module] = {
    "doubled": Doubled(32, 24),
    "transposing": Transposing(),
    "noisy": Noisy(32, 24).eval(),
    "bounded": Bounded(32, 24),
    "same_padding": SamePadding(16, 24, 3, stride=2),
    "scaled": Scaled(64, 16),
    "masked": Masked(32, 24),
    "patched": _patched(),
    "parametrized": nn.utils.parametrizations.weight_norm(TimmLinear(32, 24)),
    "bag": nn.EmbeddingBag(64, 16),
    "norm": nn.LayerNorm((4, 8)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_computes_the_same_is_taken(name: str, tmp_path: Any) -> None:
    layer = ALIKE[name]
    tokens = torch.randint(64, (3, 5))
    x = {"conv": torch.randn(2, 16, 7, 6), "words": tokens}.get(name, torch.randn(4, 32))
    twin: Any = as_torch(layer)
    assert twin.weight is layer.weight
    assert LayerAdapter().is_compressible(layer)
    for method, options in (("low_rank", {"rank": 3}), ("lora", {"r": 2}), ("ptq", {"scheme": "weight_only"})):
        small = compress_model(nn.Sequential(layer), method, **options)
        if method == "lora":
            nn.init.normal_(small[0].lora_A)
            nn.init.normal_(small[0].lora_B)
        assert compressed_layers(small).keys() == {"0"}
        expected = finalize(small)(x)
        loaded = load_compressed(nn.Sequential(copy.deepcopy(layer)), save(small, tmp_path / f"{method}.safetensors"))
        assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_not(name: str) -> None:
    assert as_torch(OTHERS[name]) is None
    assert not LayerAdapter().is_compressible(OTHERS[name])


def test_the_answer_is_that_of_the_type_and_its_settings_also_on_meta() -> None:
    with torch.device("meta"):
        assert isinstance(as_torch(GraphLinear(20, 12)), nn.Linear)
        assert as_torch(Doubled(20, 12)) is None


def test_the_reason_has_the_full_name_of_the_type() -> None:
    plan = LowRankCompression(rank=2).plan(nn.Sequential(Doubled(32, 32), nn.Linear(32, 32)))
    assert f"no adapter for the type {Doubled.__module__}.Doubled (register_adapter" in plan.skipped[0].reason


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_part_says_to_compress_first() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    model = nn.Sequential(scripted, nn.Linear(32, 32), nn.Linear(32, 32))
    plan = LowRankCompression(rank=2).plan(model)
    assert [entry.name for entry in plan.layers] == ["1"]
    assert [skip.name for skip in plan.skipped] == ["0", "2"]
    assert "compress the module before scripting it" in plan.skipped[0].reason
    small = compress_model(model, "low_rank", rank=2)
    x = torch.randn(3, 32)
    assert torch.equal(small[0](x), model[0](x))
    with pytest.raises(NothingToCompressError, match="before scripting"):
        compress_model(nn.Sequential(scripted), "low_rank", rank=2)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


def test_one_warning_where_most_of_the_bytes_stay(package_log: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        found = [r.getMessage() for r in package_log.records if r.levelno == logging.WARNING]
        package_log.clear()
        return [text for text in found if "bytes stay as they are" in text]

    model = nn.Sequential(Custom(), Custom(), nn.Linear(64, 64), nn.Linear(64, 2))
    compress_model(model, "low_rank", rank=2)
    (text,) = warnings()
    assert text.startswith("67 % of the model's bytes stay as they are. 0, 1: no adapter for the type")
    compress_model(model, "low_rank", rank=2, exclude=["0"])
    compress_model(nn.Sequential(Custom(), nn.Linear(64, 128)), "low_rank", rank=2)
    assert warnings() == []

"""Weights that layers share, under every quantization: files get smaller, load, and keep the tie or say why."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import CompressionMethodRegistry, compress_model, finalize, load_compressed, save_compressed
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import NothingToCompressError


class Words(nn.Module):
    """Embedding and head share a weight (128, 32)."""

    embedding: type[nn.Embedding] = nn.Embedding

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = self.embedding(128, 32), nn.Linear(32, 32)
        self.second = nn.Linear(32, 128, bias=False)
        self.second.weight = self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.relu(self.body(self.first(tokens))))


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embedding_dim**0.5


class ScaledWords(Words):
    embedding = Scaled


class Twins(nn.Module):
    """Two Linear layers in a row share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(128, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 8)
        self.second.weight = self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(self.words(tokens))))))


METHODS = {
    "static": ("ptq", {}),
    "dynamic": ("ptq", {"scheme": "dynamic", "bits": 4}),
    "groups": ("ptq", {"scheme": "weight_only", "bits": 4, "group_size": 8}),
    "qat": ("qat", {}),
    "qat4": ("qat", {"bits": 4, "first_last_bits": 4}),
    "mixed": ("mixed_precision", {"average_bits": 4.0}),
}
CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "first 4": {"overrides": {"first": {"bits": 4}}},
    "second 4": {"overrides": {"second": {"weight_bits": 4}}},
    "different": {"overrides": {"first": {"bits": 4}, "second": {"bits": 3}}},
    "first 16": {"overrides": {"first": {"bits": 16}}},
    "second 16": {"overrides": {"second": {"weight_bits": 16}}},
    "without first": {"exclude": ["first"]},
    "without second": {"exclude": ["second"]},
    "inputs 16": {"overrides": {"second": {"act_bits": 16}}},
}
TOKENS = torch.randint(128, (16, 6), generator=torch.Generator().manual_seed(0))


def model_of(cls: type[nn.Module], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().eval()


def compressed(model: nn.Module, method: str, options: dict[str, Any]) -> Any:
    """In training form after one step, where the method trains."""
    found = compress_model(model, method, train_loader=[TOKENS], **options)
    if method == "qat":
        found.train()(TOKENS).square().mean().backward()
        torch.optim.SGD(found.parameters(), 1e-2).step()
    return found.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [Words, ScaledWords, Twins])
def test_the_file_is_smaller_loads_and_keeps_the_tie(cls: type[nn.Module], method: str, tmp_path: Path) -> None:
    model = model_of(cls)
    plain = save_compressed(model, tmp_path / "plain.safetensors").stat().st_size
    name, options = METHODS[method]
    for label, choice in CHOICES.items():
        trained = compressed(model, name, {**options, **choice})
        path = save_compressed(trained, tmp_path / "small.safetensors")
        assert path.stat().st_size < plain, label
        final, loaded = finalize(trained), load_compressed(model_of(cls, seed=1), path)
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS), final(TOKENS)), label
            torch.testing.assert_close(final(TOKENS), trained(TOKENS), rtol=1e-3, atol=1e-3)
        one, other = loaded.first, loaded.second
        left = cls is ScaledWords or label.startswith("without") or (label.endswith("16") and label[0] != "i")
        if left:
            assert one.weight is other.weight, label
        else:
            assert one.codes is other.codes, label
            assert one.scale is other.scale, label
            wanted = {"first 4": 4, "second 4": 4, "different": 3}.get(label)
            assert wanted in (None, one.spec["bits"]), label


def test_what_is_left_alone_has_its_reason_and_can_be_forced() -> None:
    for method, options in METHODS.values():
        plan = CompressionMethodRegistry.get(method, {**options, "exclude": ["first"]}).plan(model_of(Words))
        reasons = {skip.name: skip.reason for skip in plan.skipped}
        assert "shares its weight with 'first', which stays in floating point" in reasons["second"]
    with pytest.raises(NothingToCompressError, match="shares its weight with 'second'.*min_saving=0"):
        compress_model(model_of(Words), "qat", include=["first"])
    assert compress_model(model_of(Words), "qat", include=["first"], min_saving=0.0).first.kind == "quant_embedding"


def test_different_overrides_of_one_weight_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    overrides = {"first": {"bits": 4}, "second": {"bits": 3}}
    with caplog.at_level(logging.WARNING):
        compress_model(model_of(Words), "qat", overrides=overrides)
    assert (
        "'first' and 'second' share one weight, and overrides give it 4 ('first') and 3 ('second') bits" in caplog.text
    )


class Siamese(nn.Module):
    """Convolutions that share a weight, each with a batch norm of its own that is folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv1d(16, 16, 3, bias=False), nn.Conv1d(16, 16, 3, bias=False)
        self.other.weight = self.one.weight
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(16)])
        nn.init.constant_(self.norms[1].weight, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[1](self.other(torch.relu(self.norms[0](self.one(x)))))


def test_norms_folded_into_one_weight_give_scales_of_their_own(tmp_path: Path) -> None:
    model, x = model_of(Siamese), torch.randn(8, 16, 9, generator=torch.Generator().manual_seed(0))
    small = compress_model(model, "ptq", train_loader=[x], bits=6, first_last_bits=6)
    loaded = load_compressed(model_of(Siamese), save_compressed(small, tmp_path / "small.safetensors"))
    with torch.no_grad():
        expected, found = model(x), loaded(x)
    assert torch.equal(small(x), found)
    assert (found - expected).norm() < 0.1 * expected.norm()


class Autoencoder(nn.Module):
    """A convolution and its transpose, whose channels lie along different dimensions of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(24, 24, 5, bias=False), nn.ConvTranspose1d(24, 24, 5, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.relu(self.encode(x)))


def test_layouts_that_share_no_codes_are_counted_apart() -> None:
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    for dtype, method in itertools.product((torch.float32, torch.bfloat16), ("ptq", "qat")):
        model = model_of(Autoencoder).to(dtype)
        if dtype == torch.float32:
            assert stored_bytes(compressed_of(model, method, x)) < 0.7 * stored_bytes(model)
        else:  # two bytes a value, and one for each of the two
            with pytest.raises(NothingToCompressError, match="of another layout: their codes would take"):
                compressed_of(model, method, x)


def compressed_of(model: nn.Module, method: str, x: Tensor) -> nn.Module:
    return finalize(compress_model(model, method, train_loader=[x.to(next(model.parameters()).dtype)]))

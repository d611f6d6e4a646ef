"""A compressed layer of any kind answers what the ordinary one answers: sizes, strides, weight and bias."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import CompressedLayer, compress_model, finalize
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CalibrationError, NothingToCompressError, OptionError
from pquant_lightning.core.layer_adapter import layer_spec
from tests.contract.table import TABLE, registered_methods

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(16, 12),
    "linear_no_bias": nn.Linear(12, 16, bias=False),
    "conv1d": nn.Conv1d(8, 12, 3, stride=2, padding=1, dilation=2),
    "conv2d": nn.Conv2d(8, 12, 3, padding="same", groups=2, padding_mode="circular"),
    "conv2d_no_bias": nn.Conv2d(8, 12, (3, 5), stride=(2, 1), bias=False),
    "conv3d": nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)),
    "conv_transpose1d": nn.ConvTranspose1d(8, 6, 3, stride=2, output_padding=1),
    "conv_transpose2d": nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=(1, 0)),
    "conv_transpose3d": nn.ConvTranspose3d(8, 6, 2, stride=2, bias=False),
    "embedding": nn.Embedding(24, 8, padding_idx=-1),
}
# `sparse` of Embedding is the name of a child where a few single weights stand beside the low rank
TAKEN = {("sparse_low_rank_embedding", "sparse")}


def ordinary_attributes(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if not name.startswith("_") and name != "training"}


def made_of(layer: nn.Module) -> Iterator[tuple[str, CompressedLayer]]:
    """Every kind that a method's rows make of a layer, in training form and deployed."""
    for name in registered_methods():
        for options in TABLE[name].rows:
            try:
                small = compress_model(nn.Sequential(copy.deepcopy(layer)), name, **{"min_saving": 0.0, **options})
            except (NothingToCompressError, OptionError, CalibrationError):  # not this type, or not without data
                continue
            yield from compressed_layers(small).items()
            yield from compressed_layers(finalize(small)).items()
    for kind in CompressedLayer.kinds.values():  # what has no method of its own: channels, and adapted types
        if kind.kind.startswith("sized") and isinstance(layer, kind.__bases__[1]):
            spec = {"kind": kind.kind, "by": "test", "layer": layer_spec(layer), "group": {"removed": []}}
            yield "0", CompressedLayer.build(spec, layer)
    spec = {"kind": "adapted_layer", "by": "test", "layer": layer_spec(layer), "adapted": "a.B"}
    yield "0", CompressedLayer.build(spec, layer)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_answers_every_attribute(name: str) -> None:
    ordinary = LAYERS[name]
    expected = ordinary_attributes(ordinary)
    seen = set()
    for place, layer in made_of(ordinary):
        if place != "0" or layer.kind in seen:
            continue
        seen.add(layer.kind)
        for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            found = {key: getattr(twin, key) for key in expected if (layer.kind, key) not in TAKEN}
            assert found == {key: expected[key] for key in found}, layer.kind
            assert twin.weight.shape == ordinary.weight.shape, layer.kind
            assert (twin.weight.dtype, twin.weight.device) == (ordinary.weight.dtype, ordinary.weight.device)
            own, bias = getattr(twin, "bias", None), getattr(ordinary, "bias", None)
            if bias is not None or not layer.deployed:  # integer layers may get one, of a norm or a correction
                assert getattr(own, "shape", own) == getattr(bias, "shape", bias), layer.kind
            for typo in ("in_feature", "strides", "weigth", "num_features"):
                with pytest.raises(AttributeError, match=typo):
                    getattr(twin, typo)
        missing = {"stride", "in_features", "padding_idx"} - expected.keys()
        assert not any(hasattr(layer, key) for key in missing), layer.kind
        assert not any(key.split(".")[-1] in expected for key in layer.state_dict()), layer.kind
    assert len(seen) >= 4


def test_no_kind_is_left_out() -> None:
    """Attention, recurrent layers and a folded norm stand for no such layer, and have tests of their own."""
    ours = {name: kind for name, kind in CompressedLayer.kinds.items() if kind.__module__.startswith("pquant_light")}
    seen = {layer.kind for ordinary in LAYERS.values() for place, layer in made_of(ordinary) if place == "0"}
    assert set(ours) - seen == {"unfused_attention", "unfused_recurrent", "folded_norm"}


class Reading(nn.Module):
    """Its forward reads what models of the wild read: transformers' MobileNet-V2 and Mamba, darts' TCN."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 24, 5, dilation=2)
        self.fc = nn.Linear(24, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).transpose(1, 2) * (tokens != self.words.padding_idx).unsqueeze(1)
        margin = (self.conv.kernel_size[0] - 1) * self.conv.dilation[0] // self.conv.stride[0]
        x = nn.functional.pad(x, (margin, 0)).to(self.conv.weight.dtype)
        x = self.conv(x).transpose(1, 2).reshape(-1, self.fc.in_features)
        y: Tensor = self.fc(x) / self.fc.out_features
        return y if self.fc.bias is None else y - self.fc.bias


@pytest.mark.parametrize("name", ["low_rank", "lora", "tensor_train", "ptq"])
def test_a_forward_that_reads_them_is_compiled_and_exported(name: str) -> None:
    tokens = torch.randint(32, (2, 12))
    options = {**TABLE[name].rows[0], "min_saving": 0.0}
    small = compress_model(Reading(), name, train_loader=[tokens], **options).eval()
    assert len(compressed_layers(small)) >= 2
    rounding = 0.05 if name == "ptq" else 1e-5  # exported programs do not compute in integers
    with torch.no_grad():
        expected = small(tokens)
        torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(tokens), expected)
        exported = torch.export.export(small, (tokens,)).module()
        torch.testing.assert_close(exported(tokens), expected, rtol=rounding, atol=rounding)

"""Files in models that are not quite those that wrote them: an error or the right outputs, never another model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    PQuantError,
    QATCallback,
    compress_model,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from tests.models import TiedTransformer, built, fit, quiet_trainer

IMAGES = (torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)),)
SEQUENCE = (torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)),)


class Convolved(nn.Module):
    def __init__(self, stride: int = 2, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, width, 3, stride, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


class Attending(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Looking(nn.Module):
    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 16, padding_idx=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x)


CASES = [  # a model, one made with another argument, and what differs
    (lambda: Convolved(stride=2), lambda: Convolved(stride=1), r"stride=\[2, 2\]"),
    (lambda: Convolved(width=8), lambda: Convolved(width=16), "out_channels=8"),
    (lambda: Attending(2), lambda: Attending(4), "num_heads=2"),
    (lambda: Looking(0), lambda: Looking(1), "padding_idx=0"),
    (lambda: nn.Sequential(nn.Linear(16, 8)), lambda: nn.Sequential(nn.Linear(16, 9)), "out_features=8"),
    (lambda: nn.Sequential(nn.Linear(16, 8)), lambda: nn.Sequential(nn.Embedding(16, 8)), "type='Linear'"),
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("low_rank", {"rank": 2}),
    ("qat", {"bits": 8}),
    ("ptq", {"scheme": "weight_only"}),
    ("lora", {"r": 2}),
]


@pytest.mark.parametrize("final", [False, True], ids=["training", "final"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method[0])
@pytest.mark.parametrize(("make", "other", "differs"), CASES, ids=[c[2][:9] for c in CASES])
def test_another_size_or_stride_is_an_error(
    make: Any, other: Any, differs: str, method: Any, final: bool, tmp_path: Path
) -> None:
    name, options = method
    small = compress_model(make(), name, min_saving=0.0, **options)
    small = finalize(small) if final else small
    state, target = small.state_dict(), prepare(other())
    if not any(key.endswith("_extra_state") for key in state):
        pytest.skip("what the file holds are plain layers")
    modules = list(target.modules())
    with pytest.raises(PQuantError, match=differs):
        target.load_state_dict(state)
    assert list(target.modules()) == modules
    prepare(make()).load_state_dict(state)


def test_a_folded_norm_and_its_bias_are_no_other_model(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU())

    small = compress_model(make().eval(), "ptq", train_loader=[IMAGES])
    again = load_compressed(make(), save_compressed(small, tmp_path / "a.safetensors"))
    assert torch.equal(again(*IMAGES), small(*IMAGES))


class TestTies:
    """Embedding and head share a weight in the code of the model; in the file they do not."""

    def separate(self, changed: str) -> TiedTransformer:
        model = built(TiedTransformer)
        model.head.weight = nn.Parameter(model.head.weight.detach() * 1.5)
        assert isinstance(model, TiedTransformer)
        return model if not changed else compress_model(model, "qat", include=[changed], min_saving=0.0)

    @pytest.mark.parametrize("changed", ["", "head", "embed"])
    @pytest.mark.parametrize("ending", [".safetensors", ".pt"])
    def test_both_are_loaded(self, changed: str, ending: str, tmp_path: Path, package_log: Any) -> None:
        model = self.separate(changed)
        final = finalize(model)
        path = save_compressed(model, tmp_path / f"net{ending}")
        again = load_compressed(TiedTransformer, path)
        inputs = TiedTransformer.inputs()
        assert torch.equal(again(*inputs), final(*inputs))
        if not changed:
            assert again.head.weight is not again.embed.weight
            assert "they are separate now" in package_log.text

    def test_training_form(self, package_log: Any) -> None:
        model = self.separate("head")
        target = prepare(built(TiedTransformer, seed=1))
        target.load_state_dict(model.state_dict())
        inputs = TiedTransformer.inputs()
        assert torch.equal(target.eval()(*inputs), model.eval()(*inputs))

    def test_equal_ones_stay_shared(self, tmp_path: Path) -> None:
        model = built(TiedTransformer)
        target = prepare(built(TiedTransformer, seed=1))
        target.load_state_dict(copy.deepcopy(model.state_dict()))
        assert target.head.weight is target.embed.weight

    def test_three_names_and_two_matrices(self) -> None:
        def make() -> nn.Module:
            layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            layers[1].weight = layers[2].weight = layers[0].weight
            return prepare(layers)

        state = {name: tensor.clone() for name, tensor in make().state_dict().items()}
        state["1.weight"] = state["2.weight"] = state["0.weight"] + 1
        target: Any = make()
        target.load_state_dict(state)
        assert torch.equal(target[0].weight, state["0.weight"])
        assert torch.equal(target[1].weight, state["1.weight"])
        assert target[1].weight is target[2].weight

    def test_a_module_under_two_names_cannot_be_separated(self) -> None:
        layer = nn.Linear(3, 3)
        target = prepare(nn.ModuleList([layer, layer]))
        state = {name: tensor + i for i, (name, tensor) in enumerate(target.state_dict().items())}
        with pytest.raises(PQuantError, match="holds two different ones"):
            target.load_state_dict(state)

    def test_a_nan_is_no_difference(self) -> None:
        model = built(TiedTransformer)
        model.head.weight.data[0, 0] = torch.nan
        target = prepare(built(TiedTransformer))
        target.load_state_dict(copy.deepcopy(model.state_dict()))
        assert target.head.weight is target.embed.weight


def test_the_optimizer_of_a_resumed_fit_has_both(tmp_path: Path) -> None:
    """What is separated is separated before the optimizers are made."""
    model = built(TiedTransformer)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 1.5)
    trainer = quiet_trainer(tmp_path, [QATCallback(include=["head"], min_saving=0.0)])
    fit(trainer, model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = quiet_trainer(tmp_path / "b", [QATCallback(include=["head"], min_saving=0.0)], max_epochs=2)
    resumed = fit(again, built(TiedTransformer, seed=1), ckpt_path=tmp_path / "a.ckpt")
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in resumed.parameters() if p.requires_grad} <= held
    assert resumed.head.weight is not resumed.embed.weight

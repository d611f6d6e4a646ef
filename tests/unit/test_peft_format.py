"""Adapters in PEFT's format, against the real package: what one writes the other reads, with equal outputs."""

import copy
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pquant_lightning import (
    compress_model,
    export_model,
    finalize,
    load_adapter,
    register_adapter,
    save_adapter,
)
from pquant_lightning.core.errors import CheckpointError, ModelError
from pquant_lightning.exporters.base import ExportError
from pquant_lightning.exporters.peft import CONFIG, WEIGHTS
from pquant_lightning.methods.low_rank.lora import adapters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:::peft")

Inputs = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Every layer type with adapters in both packages; `block.fc` and `fc` end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv1, self.conv2 = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(1, 6, (3, 2), stride=2)
        self.conv3 = nn.Conv3d(1, 6, 2, bias=False)
        self.fc = nn.Linear(12, 16)
        self.block = nn.Sequential()
        self.block.fc = nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        flat, image = self.conv1(x).mean(2), self.conv2(x[:, None]).mean((2, 3))
        volume = self.conv3(x.reshape(len(x), 1, 2, 2, -1)).mean((2, 3, 4))
        hidden = self.fc(self.embed(tokens).mean(1) + torch.cat([flat + volume, image], 1))
        return self.head(self.norm(self.block.fc(hidden.relu())))


LAYERS = ["embed", "conv1", "conv2", "conv3", "fc", "block.fc", "head"]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def inputs() -> Inputs:
    torch.manual_seed(1)
    return torch.randint(20, (3, 5)), torch.randn(3, 4, 8)


def disturb(model: nn.Module) -> Any:
    """Moves all that trains, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
                if "magnitude" in name:
                    parameter.abs_()
    return model.eval()


OPTIONS: list[dict[str, Any]] = [
    {"r": 3, "alpha": 6},
    {"r": 4, "alpha": 3, "use_rslora": True, "dropout": 0.2},
    {"r": 2, "use_dora": True},
    {"r": 2, "alpha": 4, "rank_pattern": {"fc": 5, "conv2": 3}, "alpha_pattern": {"head": 1.0}},
    {"r": 2, "bias": "lora_only"},
    {"r": 2, "bias": "all", "modules_to_save": ["norm"]},
    {"r": 2, "include": ["fc"]},
    {"r": 2, "modules_to_save": ["head"]},
]


def peft_config(options: dict[str, Any]) -> Any:
    renamed = {{"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(k, k): v for k, v in options.items()}
    anchored = {
        k: {f"^{n}": v for n, v in renamed[k].items()} for k in ("rank_pattern", "alpha_pattern") if k in renamed
    }
    targets = renamed.pop("include", [name for name in LAYERS if name not in renamed.get("modules_to_save", ())])
    exact = f"(?:{'|'.join(targets)})"
    return LoraConfig(**{**renamed, **anchored}, target_modules=exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_saved_here_loads_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = disturb(compress_model(net(), "lora", **options))

    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(net(), tmp_path).eval()

    assert (model(*inputs()) - net()(*inputs())).abs().max() > 0.01
    torch.testing.assert_close(theirs(*inputs()), model(*inputs()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_saved_by_peft_loads_here(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = disturb(get_peft_model(net(), peft_config(options)))
    theirs.save_pretrained(tmp_path)

    model = load_adapter(net(), tmp_path).eval()

    assert (theirs(*inputs()) - net()(*inputs())).abs().max() > 0.01
    torch.testing.assert_close(model(*inputs()), theirs(*inputs()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(finalize(model)(*inputs()), theirs(*inputs()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_gradients_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = disturb(get_peft_model(net(), peft_config(options)))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(net(), tmp_path).eval()
    reference = dict(PeftModel.from_pretrained(net(), tmp_path, is_trainable=True).eval().named_parameters())
    theirs.load_state_dict({name: parameter.detach() for name, parameter in reference.items()}, strict=False)

    model(*inputs()).square().sum().backward()
    theirs(*inputs()).square().sum().backward()

    for name, layer in adapters(model).items():
        prefix, embedding = f"base_model.model.{name}.", "embedding_" if name == "embed" else ""
        for factor in "AB":
            found = dict(theirs.named_parameters())[
                f"{prefix}lora_{embedding}{factor}.default" + ("" if embedding else ".weight")
            ]
            torch.testing.assert_close(getattr(layer, f"lora_{factor}").grad, found.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_the_base_in_peft(init: str, tmp_path: Path) -> None:
    targets = ["fc", "block.fc", "head"]
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=targets)
    theirs = disturb(get_peft_model(net(), config))
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(net(), tmp_path).eval()
    torch.testing.assert_close(loaded(*inputs()), theirs(*inputs()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_our_starts_are_written_for_the_unchanged_base(init: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = disturb(compress_model(net(), "lora", r=2, init=init, **options))
    save_adapter(model, tmp_path)
    for loaded in (load_adapter(net(), tmp_path), PeftModel.from_pretrained(net(), tmp_path)):
        torch.testing.assert_close(loaded.eval()(*inputs()), model(*inputs()), atol=1e-4, rtol=1e-4)


def test_a_grouped_convolution_goes_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 5, 5)
    model = disturb(compress_model(base, "lora", r=4))
    save_adapter(model, tmp_path)
    for loaded in (
        load_adapter(copy.deepcopy(base), tmp_path),
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
    ):
        torch.testing.assert_close(loaded.eval()(x), model(x), atol=1e-5, rtol=1e-5)
    weights = load_file(tmp_path / WEIGHTS)
    weights["base_model.model.0.lora_A.weight"] = torch.ones(4, 4, 3, 3)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="adapter of '0' mixes the 2 groups"):
        load_adapter(base, tmp_path)


def test_a_layer_with_an_adapter_of_ours_for_its_type(own_registries: None, tmp_path: Path) -> None:
    """transformers' Conv1D keeps its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    def to_linear(layer: Any) -> nn.Linear:
        linear = nn.Linear(*layer.weight.shape)
        linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
        return linear

    register_adapter(Conv1D, to_linear)
    torch.manual_seed(0)
    base, x = nn.Sequential(Conv1D(6, 5)), torch.randn(2, 5)
    model = disturb(compress_model(base, "lora", r=2))
    save_adapter(model, tmp_path)
    for loaded in (
        load_adapter(copy.deepcopy(base), tmp_path),
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
    ):
        torch.testing.assert_close(loaded.eval()(x), model(x), atol=1e-5, rtol=1e-5)


class Normed(nn.Module):
    """A norm with running statistics, and with buffers that a fit does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x)).relu())


@pytest.mark.parametrize("bits", [None, 4])
def test_statistics_of_norms_go_there_and_back(bits: int | None, tmp_path: Path) -> None:
    """A fit of adapters measures them on its data, which are not those of the base."""
    torch.manual_seed(0)
    base, x = Normed().eval(), torch.randn(64, 12) * 3 + 1
    if bits:
        base = compress_model(base, "ptq", scheme="weight_only", bits=bits, group_size=None, min_saving=0.0)
    model = disturb(compress_model(base, "lora", r=2))
    for _ in range(3):
        model.train()(x)
    model.eval()
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition(".")[2] for key in stored if "norm" in key} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert not any("mask" in key or "scratch" in key for key in stored)
    assert (model(x) - base(x)).abs().max() > 0.1
    loaded = [load_adapter(copy.deepcopy(base), tmp_path).eval()]
    if not bits:  # PEFT knows nothing of our integers
        loaded.append(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval())
        assert loaded[1].base_model.model.norm.num_batches_tracked == 3
    for other in loaded:
        torch.testing.assert_close(other(x[:5]), model(x[:5]), atol=1e-5, rtol=1e-5)


def test_the_export_checks_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = compress_model(Normed().eval(), "lora", r=2)
    model.train()(torch.randn(32, 12))
    result = export_model(model.eval(), torch.randn(4, 12), tmp_path / "good", "peft")
    assert not result.integer_weights
    peft = importlib.import_module("pquant_lightning.exporters.peft")
    whole = peft.save_adapter

    def without(*args: Any) -> None:
        whole(*args)
        kept = {key: tensor for key, tensor in load_file(args[1] / WEIGHTS).items() if "running" not in key}
        save_file(kept, args[1] / WEIGHTS)

    monkeypatch.setattr(peft, "save_adapter", without)
    with pytest.raises(ExportError):
        export_model(model, torch.randn(4, 12), tmp_path / "bad", "peft")


# -- what the file says ----------------------------------------------------------------------------------------------


def test_the_file_is_small_and_names_its_base(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    save_adapter(compress_model(base, "lora", r=8), tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 80_000  # the base has 2.1 million bytes
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert set(file.metadata()) == {"format", "pquant_base", "pquant_model"}


def test_another_base_is_named(tmp_path: Path) -> None:
    save_adapter(compress_model(net(), "lora", r=2), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        base = file.metadata()["pquant_base"]
    other = net(seed=5)
    with pytest.raises(
        CheckpointError, match=rf"on a Net with the base weights {base}; this Net has the base weights \w+"
    ):
        load_adapter(other, tmp_path)
    assert not adapters(other)


def test_an_adapter_that_is_there_is_replaced(tmp_path: Path) -> None:
    model = disturb(compress_model(net(), "lora", r=2))
    save_adapter(model, tmp_path)
    other = load_adapter(disturb(compress_model(net(), "lora", r=4, use_dora=True)), tmp_path)
    torch.testing.assert_close(other.eval()(*inputs()), model(*inputs()), atol=0, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_on_integers(bits: int, tmp_path: Path) -> None:
    scheme = {"bits": bits, "scheme": "weight_only", "min_saving": 0.0}
    model = disturb(compress_model(compress_model(net(), "ptq", **scheme), "lora", r=2))
    save_adapter(model, tmp_path)
    loaded = load_adapter(compress_model(net(), "ptq", **scheme), tmp_path).eval()
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    with pytest.raises(CheckpointError, match="has the base weights"):
        load_adapter(net(), tmp_path)


def test_loaded_adapters_train_alone(tmp_path: Path) -> None:
    save_adapter(compress_model(net(), "lora", r=2, bias="lora_only", include=["fc", "norm"]), tmp_path)
    model = load_adapter(net(), tmp_path)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.lora_A", "fc.lora_B", "fc.base.bias"}


# -- bad input -------------------------------------------------------------------------------------------------------


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No layer of Net has an adapter"):
        save_adapter(net(), tmp_path)


def test_options_that_differ_between_layers(tmp_path: Path) -> None:
    model = compress_model(net(), "lora", r=2, include=["fc"], use_rslora=True)
    compress_model(model, "lora", r=2, include=["head"], inplace=True)
    with pytest.raises(ModelError, match="different use_rslora"):
        save_adapter(model, tmp_path)


def changed(path: Path, **entries: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "LOHA"}, "an adapter of type 'LOHA'; only LORA is read"),
        ({"lora_bias": True}, "uses lora_bias, which is not covered"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "started as 'pissa_niter_4'.*path_initial_model_for_weight_conversion",
        ),
    ],
)
def test_files_that_are_not_covered(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(compress_model(net(), "lora", r=2), tmp_path)
    changed(tmp_path, **entries)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(net(), tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is no directory with {CONFIG}"):
        load_adapter(net(), tmp_path / "none")
    save_adapter(compress_model(net(), "lora", r=2), tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("fd.lora_A.weight", torch.ones(2, 12), "for a layer 'fd' that this Net does not have.*Did you mean 'fc'"),
        ("fc.lora_B.weight", torch.ones(2, 2), r"adapter of 'fc' has a factor of shape \(2, 2\); this layer takes"),
        ("norm.lora_A.weight", torch.ones(2, 8), "adapter of 'norm' is for a LayerNorm, which is not covered"),
        ("other.weight", torch.ones(2), "holds 'other.weight' of shape .* has no such tensor"),
    ],
)
def test_tensors_that_do_not_fit(key: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    save_adapter(compress_model(net(), "lora", r=2), tmp_path)
    save_file({**load_file(tmp_path / WEIGHTS), f"base_model.model.{key}": tensor}, tmp_path / WEIGHTS)
    model = net()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path)
    assert not adapters(model)


def test_adapters_of_split_attention_come_back(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()

    model, x = compress_model(encoder(), "lora", r=2), torch.randn(3, 5, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    save_adapter(model, tmp_path)
    again = load_adapter(encoder(), tmp_path).eval()
    assert any(name.endswith("self_attn.q_proj") for name in adapters(again))
    torch.testing.assert_close(again(x), model.eval()(x))

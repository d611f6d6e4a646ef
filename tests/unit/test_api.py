"""The public functions: what they take, what they leave untouched, and how they say no."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressedModule,
    LowRankCompression,
    QATCompression,
    compress_model,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.core.errors import CheckpointError, OptionError
from tests.models import MLP


class Net(nn.Module):
    """A plain module with constructor arguments."""

    def __init__(self, width=64, out=32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, out)

    def forward(self, x):
        return self.head(self.body(x))


CONFIG = {"compression": {"methods": ["low_rank", "qat"], "low_rank": {"rank": 8}, "qat": {"bits": 4}}}


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def inputs():
    return torch.randn(5, 64)


def _snapshot(model):
    return {name: (type(module), module.training) for name, module in model.named_modules()}, {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    }


def _assert_untouched(model, snapshot):
    modules, tensors = _snapshot(model)
    assert modules == snapshot[0]
    assert tensors.keys() == snapshot[1].keys()
    assert all(torch.equal(tensor, snapshot[1][name]) for name, tensor in tensors.items())


class TestCompressModel:
    def test_in_place_changes_and_returns_the_given_model(self, model):
        assert compress_model(model, "low_rank", rank=8, inplace=True) is model
        assert model.body[0].kind == "low_rank_linear"

    def test_name_method_and_configuration_are_the_same(self, model, inputs):
        config = {"compression": {"methods": ["low_rank"], "low_rank": {"rank": 8}}}
        forms = [("low_rank", {"rank": 8}), (LowRankCompression(rank=8), {}), (config, {})]
        outputs = [compress_model(model, what, **options)(inputs) for what, options in forms]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])

    @pytest.mark.parametrize(
        ("what", "options", "message"),
        [
            ("low_rank", {"rnk": 8}, "'rnk'.*Did you mean 'rank'"),
            (LowRankCompression(), {"rank": 8}, r"Options \(rank\) go with a method's name"),
            (CONFIG, {"bits": 8}, r"Options \(bits\) go with a method's name"),
            (QATCompression, {}, "takes a method's name, a method or a configuration"),
            (None, {}, "got None"),
            ("nowhere.yaml", {}, "nowhere.yaml"),
            (Path("nowhere.yml"), {}, "nowhere.yml"),
        ],
    )
    def test_wrong_arguments(self, model, what, options, message):
        before = _snapshot(model)
        with pytest.raises(OptionError, match=message):
            compress_model(model, what, inplace=True, **options)
        _assert_untouched(model, before)

    @pytest.mark.parametrize(
        ("options", "changed"),
        [
            ({"include": ["head"]}, {"head"}),
            ({"include": ["body"]}, {"body.0"}),
            ({"include": ["*"]}, {"body.0", "head"}),
            ({"exclude": ["body*"]}, {"head"}),
            ({"include": ["body", "head"], "exclude": ["head"]}, {"body.0"}),
        ],
    )
    def test_patterns_choose_layers(self, model, options, changed):
        compressed = compress_model(model, "qat", **options)
        kinds = {name for name, module in compressed.named_modules() if hasattr(module, "kind")}
        assert kinds == changed


class TestFinalize:
    def test_an_uncompressed_model_stays_what_it_is(self, model, inputs):
        final = finalize(model)
        assert type(final.head) is nn.Linear
        assert torch.equal(final(inputs), model(inputs))

    def test_copies_share_nothing(self, model, inputs):
        trained = compress_model(model, "qat")
        final = finalize(trained)
        before = final(inputs)
        trained.head.bias.data += 1
        assert torch.equal(final(inputs), before)


class TestSaveAndLoad:
    def test_constructor_arguments(self, inputs, tmp_path):
        model = Net(width=48, out=16)
        small = compress_model(model, "low_rank", rank=4, exclude=["head"])
        path = save_compressed(small, tmp_path / "model.safetensors")
        assert load_compressed(Net, path, width=48, out=16)(inputs).shape == (5, 16)
        with pytest.raises(CheckpointError, match="'body.0' has out_features=48 in the checkpoint and out_features=64"):
            load_compressed(Net, path)
        with pytest.raises(OptionError, match=r"Arguments \(width\) go with a class"):
            load_compressed(Net(48, 16), path, width=48)
        with pytest.raises(OptionError, match="Net cannot be made from.*depth.*Pass its arguments"):
            load_compressed(Net, path, depth=3)

    def test_the_hyperparameters_of_a_lightning_module_are_in_the_file(self, tmp_path):
        path = save_compressed(compress_model(MLP(lr=0.5), "qat"), tmp_path / "model.safetensors")
        assert load_compressed(MLP, path).hparams.lr == 0.5
        assert load_compressed(MLP, path, lr=0.25).hparams.lr == 0.25

    def test_uncompressed_models_are_saved_and_loaded_too(self, model, inputs, tmp_path):
        path = save_compressed(model, tmp_path / "model.safetensors")
        assert torch.equal(load_compressed(Net, path)(inputs), model(inputs))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
    def test_the_floating_type_of_the_file_is_kept(self, tmp_path, dtype, name):
        inputs = torch.randn(5, 64, dtype=dtype)
        trained = compress_model(Net().to(dtype), "qat")
        trained(inputs)
        loaded = load_compressed(Net, save_compressed(trained, tmp_path / name))
        assert loaded(inputs).dtype == dtype
        assert torch.equal(loaded(inputs), finalize(trained)(inputs))

    @pytest.mark.parametrize("name", ["model.onnx", "model.ckpt", "model.safetensor"])
    def test_other_endings_are_not_written(self, model, tmp_path, name):
        with pytest.raises(OptionError, match=rf"writes .safetensors, .pt or a directory, got '{name}'"):
            save_compressed(model, tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_file_with_fewer_layers(self, model, tmp_path):
        path = save_compressed(compress_model(model, "qat").body, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"(?s)does not fit Sequential.*Missing key.*1\.weight"):
            load_compressed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), path)


class TestPrepare:
    def test_the_same_model_and_only_once(self, model):
        assert prepare(model) is model
        hooks = len(model._load_state_dict_pre_hooks)
        prepare(prepare(model))
        assert len(model._load_state_dict_pre_hooks) == hooks == 1

    def test_a_prepared_model_inside_another_loads_under_its_prefix(self, model):
        outer = nn.ModuleDict({"net": prepare(Net())})
        outer.load_state_dict({f"net.{key}": v for key, v in compress_model(model, CONFIG).state_dict().items()})
        assert outer["net"].body[0].first.kind == "quant_linear"

    def test_plain_state_dicts_still_load(self, model, inputs):
        fresh = prepare(Net())
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(inputs), model(inputs))

    def test_the_mixin_prepares(self, model):
        class Own(CompressedModule, Net):
            pass

        compressed = compress_model(model, "qat")
        own = Own(width=64)
        own.load_state_dict(compressed.state_dict())
        assert own.head.kind == "quant_linear"

"""Traps inside the user's model: hooks, extra state, shared modules and parameters, transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pquant_lightning import CompressedLayer, compress_model, finalize, load_compressed, save_compressed
from pquant_lightning.core.errors import CheckpointError
from tests.integration._helpers import STACK, assert_equal, kinds, stack, tensors
from tests.models import MLP, TiedTransformer, Transformer, built, fit, quiet_trainer


class TestExtraState:
    """A user's module with an extra state of its own."""

    class Counter(nn.Module):
        def __init__(self, state: Any) -> None:
            super().__init__()
            self.state = state

        def forward(self, x: Tensor) -> Tensor:
            return x

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    class CountingMLP(MLP):
        def __init__(self, state: Any = None) -> None:
            super().__init__()
            self.counter = TestExtraState.Counter(state)

    STATES = (
        {"calls": 3, "kind": "low_rank_linear"},
        torch.arange(5, dtype=torch.uint8),
        torch.tensor(list(b'{"calls": 3}'), dtype=torch.uint8),
        torch.tensor(1.5),
    )

    @pytest.mark.parametrize("state", STATES)
    def test_it_survives_fit_resume_and_load(self, tmp_path: Path, state: Any) -> None:
        trainer = quiet_trainer(tmp_path, stack())
        model = fit(trainer, self.CountingMLP(state))
        assert kinds(model) == STACK
        trainer.save_checkpoint(tmp_path / "counting.ckpt")

        resumed = fit(
            quiet_trainer(tmp_path, stack(), max_epochs=2), self.CountingMLP(), ckpt_path=tmp_path / "counting.ckpt"
        )
        loaded = load_compressed(self.CountingMLP, tmp_path / "counting.ckpt")
        for other in (resumed, loaded):
            assert kinds(other) == STACK
            assert other.counter.state == state if isinstance(state, dict) else torch.equal(other.counter.state, state)

    @pytest.mark.parametrize("state", STATES[1:], ids=["bytes", "json", "float"])
    def test_a_tensor_is_in_the_artefact(self, tmp_path: Path, state: Tensor) -> None:
        model = compress_model(self.CountingMLP(state), "low_rank", rank=4)
        save_compressed(model, tmp_path / "model.safetensors")
        assert torch.equal(load_compressed(self.CountingMLP, tmp_path / "model.safetensors").counter.state, state)

    def test_a_set_is_an_error_that_names_it_in_safetensors(self, tmp_path: Path) -> None:
        model = compress_model(self.CountingMLP({"calls": {3}}), "low_rank", rank=4)
        with pytest.raises(CheckpointError, match=r"'counter\._extra_state' is of type dict.*ending \.pt"):
            save_compressed(model, tmp_path / "model.safetensors")
        assert list(tmp_path.iterdir()) == []


class TestHooks:
    """Hooks that the user put on a layer before it was replaced."""

    @staticmethod
    def compressed(model: nn.Module) -> nn.Module:
        result = compress_model(model, "low_rank", rank=4, inplace=True)
        assert isinstance(result.fc1, CompressedLayer)
        return result

    def test_forward_hooks_run_once_in_training_and_deployed_form(self) -> None:
        model, shapes = MLP(), []
        model.fc1.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
        model.fc1.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        model.fc2.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        self.compressed(model)(*MLP.inputs())
        assert shapes == [(8, 32)]
        compress_model(model, "qat", inplace=True)(*MLP.inputs())
        assert shapes == [(8, 32)] * 2
        final = finalize(model)
        assert torch.equal(final(*MLP.inputs()), final.head.bias.expand(8, -1))
        assert shapes == [(8, 32)] * 3

    def test_hooks_that_take_keyword_arguments(self) -> None:
        model, seen = MLP(), []
        model.fc1.register_forward_hook(lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True)
        model.fc1.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
        self.compressed(model)(*MLP.inputs())
        assert seen == ["before", "after"]

    def test_a_handle_still_removes_its_hook(self) -> None:
        model, calls = MLP(), []
        handle = model.fc1.register_forward_hook(lambda *_: calls.append(1))
        self.compressed(model)(*MLP.inputs())
        handle.remove()
        model(*MLP.inputs())
        assert len(calls) == 1

    def test_full_backward_hooks_see_the_gradients_of_the_layer(self) -> None:
        model, shapes = MLP(), []
        model.fc2.register_full_backward_hook(
            lambda module, grad_input, grad_output: shapes.append((grad_input[0].shape, grad_output[0].shape))
        )
        self.compressed(model)(*MLP.inputs()).sum().backward()
        assert shapes == [((8, 32), (8, 24))]


class TestShared:
    """One module, or one parameter, at several places."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(24, 24)
            self.block = nn.ModuleDict({"again": self.first})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["again"](self.first(x))

    def test_a_module_used_twice_stays_one_module(self, tmp_path: Path) -> None:
        model = compress_model(self.Twice(), "low_rank", rank=4)
        assert model.first is model.block["again"]
        assert kinds(model) == {"first": "low_rank_linear"}
        compress_model(model, "qat", inplace=True)
        assert model.first is model.block["again"]
        final = finalize(model)
        assert final.first is final.block["again"]

    def test_a_module_used_twice_is_loaded_as_one_module(self, tmp_path: Path) -> None:
        model = compress_model(compress_model(self.Twice(), "low_rank", rank=4), "qat")
        final = finalize(model)
        save_compressed(model, tmp_path / "twice.safetensors")
        loaded = load_compressed(self.Twice(), tmp_path / "twice.safetensors")
        assert kinds(loaded) == kinds(final)
        assert loaded.first is loaded.block["again"]
        x = torch.ones(2, 24)
        assert torch.equal(loaded(x), final(x))
        with safe_open(tmp_path / "twice.safetensors", framework="pt") as file:
            assert sum(name.endswith(".codes") for name in file.keys()) == 2  # noqa: SIM118 (not a dict)

    def test_a_tied_weight_stays_tied_through_quantization(self, tmp_path: Path) -> None:
        trainer = quiet_trainer(tmp_path, stack()[1:])
        model = fit(trainer, TiedTransformer())
        assert kinds(model)["embed"] == "quant_embedding"
        assert kinds(model)["head"] == "quant_linear"
        assert model.head.weight is model.embed.weight
        trainer.save_checkpoint(tmp_path / "tied.ckpt")
        resumed = fit(
            quiet_trainer(tmp_path, stack()[1:], max_epochs=2), TiedTransformer(), ckpt_path=tmp_path / "tied.ckpt"
        )
        assert resumed.head.weight is resumed.embed.weight

    def test_a_tied_weight_is_left_alone_by_low_rank_with_the_reason(self, package_log: Any, tmp_path: Path) -> None:
        model = fit(quiet_trainer(tmp_path, stack()[:1]), TiedTransformer())
        assert kinds(model)["encoder.layers.0.linear1"] == "low_rank_linear"
        assert model.head.weight is model.embed.weight
        assert re.search("left alone.*: head: shares .* with 'embed'", package_log.text)

    def test_a_parametrized_weight_is_left_alone_with_the_reason(self, tmp_path: Path, package_log: Any) -> None:
        model = MLP()
        weight_norm(model.fc1)
        fit(quiet_trainer(tmp_path, stack()), model)
        assert kinds(model)["fc2"] == "low_rank_linear"
        assert "fc1" not in kinds(model)
        assert re.search("left alone.*: fc1: its weight is computed by", package_log.text)


class TestTransformer:
    """torch's encoder reads weights past its layers' forward: in eval mode, without gradients."""

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_eval_equals_train(self, tmp_path: Path, padded: bool, mode: Any) -> None:
        model = fit(quiet_trainer(tmp_path, stack()), built(Transformer))
        assert kinds(model)["encoder.layers.0.linear1"] == "low_rank_linear"
        assert kinds(model)["encoder.layers.0.linear1.first"] == "quant_linear"
        tokens, mask = Transformer.inputs()
        inputs = (tokens, mask) if padded else (tokens,)
        for layer in model.modules():
            layer.observe = lambda x: None  # ranges do not move
        expected = model.train()(*inputs)
        with mode():
            torch.testing.assert_close(model.eval()(*inputs), expected)
            final = finalize(model)
            torch.testing.assert_close(final(*inputs), expected, atol=1e-5, rtol=1e-5)

    def test_low_rank_alone(self) -> None:
        model = compress_model(built(Transformer), "low_rank", rank=4)
        assert kinds(model)["encoder.layers.1.linear2"] == "low_rank_linear"
        inputs = Transformer.inputs()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(*inputs), model.train()(*inputs))


class CachingMLP(MLP):
    """Its forward keeps things in plain Python objects; the report counts its MACs on "meta" tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 16)
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.ones(len(x), 1, device=x.device)
        return super().forward(x * self.cache[len(x)])


def test_the_report_leaves_no_trace_in_the_users_objects(tmp_path: Path) -> None:
    model, devices = CachingMLP(), []
    model.fc2.register_forward_hook(lambda module, args, output: devices.append(output.device.type))
    callbacks = stack()
    fit(quiet_trainer(tmp_path, callbacks), model)
    assert kinds(model) == STACK
    assert callbacks[-1].report.macs is not None
    assert {tensor.device.type for tensor in model.cache.values()} == {"cpu"}
    assert set(devices) == {"cpu"}
    assert model(torch.zeros(1, 16)).shape == (1, 4)


def test_specs_are_plain_json(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, stack()), MLP())
    assert kinds(model) == STACK
    for name in kinds(model):
        spec = model.get_submodule(name).spec
        assert json.loads(json.dumps(spec)) == spec


def test_layers_keep_their_training_flag(tmp_path: Path) -> None:
    model = MLP()
    model.fc1.eval()
    compress_model(model, "low_rank", rank=4, inplace=True)
    assert isinstance(model.fc1, CompressedLayer)
    assert [module.training for module in (model.fc1, model.fc1.first, model.fc2, model.fc2.first)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_copy_is_independent_of_the_original() -> None:
    model = MLP()
    before = tensors(model)
    copy = compress_model(model, "qat")
    assert set(kinds(copy)) == {"fc1", "fc2", "head"}
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert kinds(model) == {}
    assert_equal(tensors(model), before)

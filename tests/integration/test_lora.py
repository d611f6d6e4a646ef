"""LoRA in whole fits: what trains, what resumes, stacks with quantization, adapters on integers, thin checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from pquant_lightning import (
    LoRACallback,
    LowRankCallback,
    PTQCallback,
    QATCallback,
    compress_model,
    finalize,
    load_adapter,
    load_compressed,
    prepare,
    save_adapter,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import Stage, compressed_layers
from pquant_lightning.core.errors import CheckpointError
from pquant_lightning.core.partial import HINT, OMITTED
from pquant_lightning.core.splitting import split_view
from pquant_lightning.methods.low_rank.lora import adapters
from tests.contract.table import output, same_state, same_tensors
from tests.integration._helpers import kinds
from tests.models import MLP, ConvNet, SmallModule, Transformer, built, fit, quiet_trainer


class Filtering(MLP):
    """Gives the optimizer only what trains, as is usual for adapters."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    old = dict(before.named_parameters())
    return {
        name for name, parameter in after.named_parameters() if name in old and not torch.equal(parameter, old[name])
    }


@pytest.mark.parametrize("model_class", [MLP, ConvNet, Transformer])
def test_a_fit_trains_the_adapters_alone_and_leaves_an_ordinary_model(
    model_class: type[SmallModule], tmp_path: Path
) -> None:
    base = built(model_class)
    callback = LoRACallback(r=2)
    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=2), copy.deepcopy(base))
    base = split_view(base)  # attention stays apart, as projections

    names = {f"{name}.lora_{x}" for name in adapters(model) for x in "AB"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    assert moved(compress_model(base, "lora", r=2), model) == names
    for name in adapters(model):
        assert torch.equal(model.get_submodule(name).base.weight, base.get_submodule(name).weight)
    deployed = load_compressed(model_class, callback.artifact)
    assert {layer.stage for layer in compressed_layers(deployed).values()} <= {Stage.UNFUSE}
    assert deployed.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(
        output(deployed, model_class.inputs()), output(model, model_class.inputs()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"adapter_only": True}, {"adapter_only": True, "init": "pissa"}])
def test_a_resumed_fit_freezes_again_and_equals_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    base = built(Filtering)

    def run(directory: Path, model: SmallModule, **fit_options: Any) -> SmallModule:
        checkpoint = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
        callbacks = [LoRACallback(r=2, bias="lora_only", **options), checkpoint]
        return fit(quiet_trainer(directory, callbacks, max_epochs=3), model, **fit_options)

    whole = run(tmp_path / "whole", copy.deepcopy(base))
    resumed = run(tmp_path / "again", copy.deepcopy(base), ckpt_path=tmp_path / "whole/epoch=0.ckpt")

    assert same_state(resumed, whole)
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in whole.parameters()]
    stored = torch.load(tmp_path / "whole/epoch=0.ckpt", weights_only=True)["state_dict"]
    assert ("fc1.base.weight" in stored) == (not options)
    assert "fc1.lora_A" in stored


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A fit that keeps its best checkpoint, without the frozen weights."""
    directory = tmp_path_factory.mktemp("thin")
    checkpoint = ModelCheckpoint(directory, filename="best", monitor="val_loss")
    callback = LoRACallback(r=2, adapter_only=True)
    model = fit(quiet_trainer(directory, [callback, checkpoint], max_epochs=2), built(MLP))
    return model, directory / "best.ckpt", callback


def test_a_thin_checkpoint_is_small_and_says_so(thin: Any) -> None:
    model, path, _ = thin
    state = torch.load(path, weights_only=True)["state_dict"]
    sizes = {name: tensor.numel() for name, tensor in state.items() if not name.endswith("_extra_state")}
    assert OMITTED in sizes
    own = {f"{name}.lora_{x}" for name in adapters(model) for x in "AB"}
    assert set(sizes) - own == {HINT, OMITTED}


def test_the_artefact_of_a_thin_fit_is_whole(thin: Any) -> None:
    _, path, callback = thin
    best = load_compressed(built(MLP), path)
    assert same_state(finalize(best), load_compressed(MLP, callback.artifact))


def test_test_with_a_thin_checkpoint(thin: Any, tmp_path: Path) -> None:
    _, path, _ = thin
    best = load_compressed(built(MLP), path)
    loader = MLP.loader(seed=2)
    (expected,) = quiet_trainer(tmp_path).test(best, loader, verbose=False)
    (scores,) = quiet_trainer(tmp_path).test(prepare(built(MLP)), loader, ckpt_path=path, verbose=False)
    assert scores == expected


def test_a_thin_checkpoint_names_the_base_that_it_needs(thin: Any, tmp_path: Path) -> None:
    _, path, _ = thin
    message = r"on a MLP with the base weights \w{16}; this MLP has the base weights \w{16}"
    with pytest.raises(CheckpointError, match=message):
        load_compressed(built(MLP, seed=1), path)
    other = built(MLP, seed=1)
    with pytest.raises(CheckpointError, match=message):
        fit(quiet_trainer(tmp_path, [LoRACallback(r=2, adapter_only=True)], max_epochs=3), other, ckpt_path=path)
    assert not compressed_layers(other)


# -- with quantization -----------------------------------------------------------------------------------------------


def test_over_fake_quantized_weights_the_deployed_output_is_the_trained_one(tmp_path: Path) -> None:
    callbacks = [LoRACallback(r=2), QATCallback(weight_bits=4, act_bits=8, quantizer="ste")]
    model = fit(quiet_trainer(tmp_path, callbacks, max_epochs=2), built(MLP))

    final = finalize(model)
    loaded = load_compressed(MLP, save_compressed(model, tmp_path / "model.safetensors"))

    assert kinds(final) == {
        **dict.fromkeys(("fc1", "fc2", "head"), "lora_linear"),
        **{f"{name}.base": "int_linear" for name in ("fc1", "fc2", "head")},
    }
    expected = output(model, MLP.inputs())
    torch.testing.assert_close(output(final, MLP.inputs()), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(output(loaded, MLP.inputs()), output(final, MLP.inputs()))


def test_loftq_starts_a_quantized_fit_nearer_to_the_model(tmp_path: Path) -> None:
    def start(*callbacks: Any) -> Tensor:
        model = built(MLP)
        model.hparams.lr = 0.0
        fit(quiet_trainer(tmp_path, callbacks, max_epochs=1), model)
        return (output(model, MLP.inputs(64)) - output(built(MLP), MLP.inputs(64))).norm()

    quantizer = {"weight_bits": 2, "act_bits": 16, "first_last_bits": 2, "quantizer": "ste"}
    plain = start(LoRACallback(r=4), QATCallback(**quantizer))
    near = start(LoRACallback(r=4, init="loftq", loftq_bits=2, loftq_iter=3), QATCallback(**quantizer))
    assert near < 0.8 * plain


def qlora(bits: int, directory: Path) -> tuple[SmallModule, SmallModule]:
    """A finalized QAT model, and the same after a fit with adapters."""
    callbacks = [QATCallback(weight_bits=bits, act_bits=8)]
    base = finalize(fit(quiet_trainer(directory / "qat", callbacks), built(MLP)))
    checkpoint = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(directory, [LoRACallback(r=2), checkpoint], max_epochs=2)
    return base, fit(trainer, copy.deepcopy(base))


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_train_over_integers_and_resume_in_a_fresh_model(bits: int, tmp_path: Path) -> None:
    base, model = qlora(bits, tmp_path)

    callbacks = [LoRACallback(r=2), ModelCheckpoint(tmp_path / "again")]
    trainer = quiet_trainer(tmp_path / "again", callbacks, max_epochs=2)
    resumed = fit(trainer, built(MLP, seed=1), ckpt_path=tmp_path / "epoch=0.ckpt")

    for name in ("fc1", "fc2"):
        assert torch.equal(model.get_submodule(name).base.codes, base.get_submodule(name).codes)
        assert model.get_submodule(name).lora_B.abs().max() > 0
    assert same_state(resumed, model)
    assert (output(model, MLP.inputs()) - output(base, MLP.inputs())).abs().max() > 0.01
    final = finalize(resumed)
    torch.testing.assert_close(output(final, MLP.inputs()), output(model, MLP.inputs()), atol=0, rtol=0)
    assert final.fc1.base.kind == "int_linear"


def test_a_fit_of_a_deployed_stack_goes_on_with_its_adapters(tmp_path: Path) -> None:
    callbacks = [LoRACallback(r=2), QATCallback(bits=8)]
    final = finalize(fit(quiet_trainer(tmp_path, callbacks), built(MLP)))
    before = copy.deepcopy(final)

    fit(quiet_trainer(tmp_path, [LoRACallback(r=2)]), final)

    assert moved(before, final) == {f"{name}.lora_{x}" for name in ("fc1", "fc2", "head") for x in "AB"}
    assert same_tensors(final.fc1.base.state_dict(), before.fc1.base.state_dict())


def test_ptq_after_adapters_measures_what_is_below_them(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [LoRACallback(r=2), PTQCallback()], max_epochs=2), built(MLP))
    final = finalize(model)
    assert kinds(final)["fc1.base"] == "int_linear"
    error = (output(final, MLP.inputs()) - output(model, MLP.inputs())).norm() / output(model, MLP.inputs()).norm()
    assert error < 0.1


def test_adapters_on_factors(tmp_path: Path) -> None:
    callbacks = [LowRankCallback(rank=4, include=["fc*"]), LoRACallback(r=2, include=["fc*"])]
    model = fit(quiet_trainer(tmp_path, callbacks), built(MLP))
    final = finalize(model)
    assert kinds(model)["fc1.first"] == "lora_linear"
    assert kinds(final) == {"fc1": "low_rank_linear", "fc2": "low_rank_linear"}
    torch.testing.assert_close(output(final, MLP.inputs()), output(model, MLP.inputs()), atol=1e-5, rtol=1e-5)


# -- in other company ------------------------------------------------------------------------------------------------


def test_two_named_callbacks_adapt_their_own_layers(tmp_path: Path) -> None:
    callbacks = [
        LoRACallback(r=2, include=["fc1"], bias="lora_only", name="first"),
        LoRACallback(r=3, include=["fc2"], modules_to_save=["head"], name="second"),
    ]
    model = fit(quiet_trainer(tmp_path, callbacks), built(MLP))
    assert {name: layer.spec["r"] for name, layer in adapters(model).items()} == {"fc1": 2, "fc2": 3}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        *("fc1.lora_A", "fc1.lora_B", "fc1.base.bias", "fc2.lora_A", "fc2.lora_B", "head.weight", "head.bias")
    }


def test_mixed_precision(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [LoRACallback(r=2, dropout=0.1)], precision="bf16-mixed"), built(MLP))
    assert all(layer.lora_B.dtype == torch.float32 for layer in adapters(model).values())
    assert all(layer.lora_B.abs().max() > 0 for layer in adapters(model).values())


def test_lr_ratio_in_a_fit(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [LoRACallback(r=2, lr_ratio=4.0)]), built(Filtering))
    (optimizer,) = model.trainer.optimizers
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.01, 0.04])


class EarlyOptimizer(MLP):
    """Its optimizer is made in `__init__`, as that of the command line is, with a learning rate for each layer."""

    def __init__(self) -> None:
        super().__init__()
        rates = {self.fc1: 0.1, self.fc2: 0.01, self.head: 0.001}
        self.optimizer = torch.optim.SGD([{"params": list(m.parameters()), "lr": lr} for m, lr in rates.items()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def test_adapters_join_an_optimizer_that_is_there_already(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [LoRACallback(r=2)]), built(EarlyOptimizer))
    rates = {id(p): group["lr"] for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    for name, rate in {"fc1": 0.1, "fc2": 0.01, "head": 0.001}.items():
        layer = adapters(model)[name]
        assert rates[id(layer.lora_A)] == rates[id(layer.lora_B)] == rate
        assert layer.lora_B.abs().max() > 0


def test_a_fit_goes_on_with_a_loaded_adapter(tmp_path: Path) -> None:
    first = fit(quiet_trainer(tmp_path, [LoRACallback(r=2)]), built(MLP))
    save_adapter(first, tmp_path / "adapter")
    model = load_adapter(built(MLP), tmp_path / "adapter")
    assert torch.equal(output(model, MLP.inputs()), output(first, MLP.inputs()))
    before = copy.deepcopy(model)

    fit(quiet_trainer(tmp_path, [LoRACallback(r=4)]), model)

    assert {layer.spec["r"] for layer in adapters(model).values()} == {2}
    assert moved(before, model) == {f"{name}.lora_{x}" for name in ("fc1", "fc2", "head") for x in "AB"}

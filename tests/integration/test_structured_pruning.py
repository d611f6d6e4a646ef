"""Structured pruning in a Trainer: zero units while training, smaller layers afterwards, other callbacks beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import (
    LowRankCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    compress_model,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.errors import CallbackOrderError, CheckpointError, ModelError
from pquant_lightning.core.schedule import scheduled
from tests.integration._helpers import assert_equal, tensors
from tests.models import BATCHES, MLP, ConvNet, Inputs, SmallModule, Transformer, built, fit, quiet_trainer

EPOCHS = 4
LAST = EPOCHS * BATCHES - 1
FINE = {"round_to": 1}


class WideConvNet(SmallModule):
    """Convolutions with batch norms, a residual connection, a depthwise layer and a linear head."""

    draw = ConvNet.draw

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.stem, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = x + F.relu(self.bn2(self.conv(x)))
        return self.head(F.relu(self.wide(self.depthwise(x))).flatten(1))


class Momentum(WideConvNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)


def dead_rows(layer: Any) -> int:
    return int((layer.weight.detach().flatten(1) == 0).all(1).sum())


class Watch(Callback):
    """Counts the zero rows of each layer when a batch starts and when it ends."""

    def __init__(self) -> None:
        self.starts: list[dict[str, int]] = []
        self.ends: list[dict[str, int]] = []

    @staticmethod
    def look(model: nn.Module) -> dict[str, int]:
        return {n: dead_rows(m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(self.look(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(self.look(pl_module))


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape[:2]) for n, p in model.named_parameters() if p.dim() > 1}


def images(model: type[SmallModule] = WideConvNet) -> Tensor:
    return model.inputs()[0]


def out(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(*inputs)
    return found


# -- while training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}], ids=str)
def test_units_are_zero_after_every_step_and_go_at_the_end(options: dict[str, Any], tmp_path: Path) -> None:
    watch, callback = Watch(), StructuredPruningCallback(sparsity=0.5, **FINE)
    trainer = quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS, **options)
    model: Any = fit(trainer, built(Momentum))
    assert watch.starts == watch.ends
    assert watch.starts[0] == dict.fromkeys(watch.starts[0], 0)
    assert widths(model) == widths(built(Momentum))
    gone = sum(watch.ends[-1][name] for name in ("stem", "wide"))
    assert gone == 24  # of 16 channels of the residual stream and 32 behind it
    final = finalize(model)
    assert final.stem.weight.shape[0] + final.wide.weight.shape[0] == 24
    assert final.depthwise.groups == final.bn1.num_features == final.stem.out_channels == final.conv.in_channels
    torch.testing.assert_close(out(final, images()), out(model, images()))
    torch.testing.assert_close(out(load_compressed(Momentum, callback.artifact), images()), out(final, images()))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cubic", "cosine", "exponential", "steps"])
def test_the_share_of_units_is_that_of_the_schedule(schedule: str, tmp_path: Path) -> None:
    watch = Watch()
    callback = StructuredPruningCallback(sparsity=0.5, schedule=schedule, start=0.2, end=0.6, **FINE)
    model: Any = fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS), built(MLP))
    removes = model.fc1.spec["group"]["removes"]
    assert sum(removes) == 28
    for index, found in enumerate(watch.starts):
        progress = index / LAST
        if 0.2 < progress < 0.6:  # chosen twenty times on the way
            progress = 0.2 + int((progress - 0.2) / 0.02) * 0.02
        level = scheduled(schedule, progress, 1.0, start=0.2, end=0.6)
        assert found["fc1"] == pytest.approx(level * removes[0], abs=1), index
        assert found["fc2"] == pytest.approx(level * removes[1], abs=1), index
    assert model.trainer.callback_metrics["pquant/channel_sparsity"] == pytest.approx(28 / 56)


def test_taylor_removes_what_the_loss_misses_least(tmp_path: Path) -> None:
    model: Any = built(MLP)
    model.fc2.requires_grad_(False)
    with torch.no_grad():
        model.fc1.weight[:16] *= 10  # large, but hardly read
        model.fc2.weight[:, :16] *= 1e-6
    options = {"criterion": "taylor", "schedule": "constant", "start": 0.5, "exclude": ["head"], **FINE}
    fit(quiet_trainer(tmp_path, [StructuredPruningCallback(sparsity=0.5, **options)], max_epochs=EPOCHS), model)
    assert dead_rows(model.fc1) == 16
    assert bool((model.fc1.weight[:16] == 0).all())


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"criterion": "taylor"}, {"remove": "during"}], ids=str)
def test_a_resumed_fit_equals_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    def run(place: str, **resume: Any) -> Any:
        keep = ModelCheckpoint(tmp_path / place, filename="{epoch}", save_top_k=-1)
        callbacks = [StructuredPruningCallback(sparsity=0.5, end=0.8, **FINE, **options), keep]
        return fit(quiet_trainer(tmp_path / place, callbacks, max_epochs=EPOCHS), built(Momentum), **resume)

    whole = run("whole")
    for epoch in range(EPOCHS - 1):
        resumed = run(f"from{epoch}", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_equal(tensors(resumed), tensors(whole))


def test_the_best_checkpoint_is_at_the_target(tmp_path: Path) -> None:
    class Worse(MLP):
        def validation_step(self, batch: Inputs, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    callback = StructuredPruningCallback(sparsity=0.5, end=0.5)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    fit(quiet_trainer(tmp_path, [callback, best], max_epochs=EPOCHS), Worse())
    loaded = load_compressed(Worse, best.best_model_path)
    assert dead_rows(loaded.fc1) + dead_rows(loaded.fc2) == 56 - sum(
        load_compressed(Worse, callback.artifact).get_parameter(f"{name}.weight").shape[0] for name in ("fc1", "fc2")
    )


def test_a_file_without_the_callback_is_not_resumed(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="was written without StructuredPruningCallback"):
        fit(quiet_trainer(tmp_path, [StructuredPruningCallback()]), MLP(), ckpt_path=tmp_path / "plain.ckpt")


def test_a_second_fit_keeps_the_units(tmp_path: Path) -> None:
    model: Any = fit(quiet_trainer(tmp_path, [StructuredPruningCallback()], max_epochs=EPOCHS), built(MLP))
    removed = model.fc1.spec["group"]["removed"]
    fit(quiet_trainer(tmp_path, [StructuredPruningCallback()], max_epochs=EPOCHS), model)
    assert model.fc1.spec["group"]["removed"] == removed
    assert dead_rows(model.fc1) == len(removed[0])


def test_a_callback_of_another_fit_takes_the_model_as_it_is(tmp_path: Path) -> None:
    fits = [StructuredPruningCallback(criterion=criterion) for criterion in ("l2", "random")]
    models: list[Any] = [
        fit(quiet_trainer(tmp_path, [callback], max_epochs=EPOCHS), built(MLP, seed))
        for seed, callback in enumerate(fits)
    ]
    removed = models[1].fc1.spec["group"]["removed"]
    assert models[0].fc1.spec["group"]["removed"] != removed
    fit(quiet_trainer(tmp_path, [fits[0]], max_epochs=1), models[1])
    assert models[1].fc1.spec["group"]["removed"] == removed


def test_a_finalized_model_trains_on(tmp_path: Path) -> None:
    small: Any = compress_model(built(MLP), "structured_pruning", train_loader=MLP.loader())
    fit(quiet_trainer(tmp_path, [], max_epochs=2), small)
    save_compressed(small, tmp_path / "small.safetensors")
    again = load_compressed(MLP, tmp_path / "small.safetensors")
    assert widths(again) == widths(small) == {"fc1.weight": (16, 16), "fc2.weight": (16, 16), "head.weight": (4, 16)}
    torch.testing.assert_close(out(again, *MLP.inputs()), out(small, *MLP.inputs()))


# -- removal while training --------------------------------------------------------------------------------------------


class Sizes(Callback):
    """Keeps the number of parameters at each batch, and checks that the optimizer holds these and no others."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        alive = {id(p): p for p in pl_module.parameters()}
        (optimizer,) = trainer.optimizers
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(alive)
        assert all(id(p) in alive for p in optimizer.state)
        for p, state in optimizer.state.items():
            assert state["momentum_buffer"].shape == p.shape
        self.counts.append(sum(p.numel() for p in alive.values()))


def test_removal_during_training_shrinks_parameters_and_their_momentum(tmp_path: Path) -> None:
    sizes, callback = Sizes(), StructuredPruningCallback(sparsity=0.5, end=0.8, remove="during", **FINE)
    model: Any = fit(quiet_trainer(tmp_path, [callback, sizes], max_epochs=EPOCHS), built(Momentum))
    assert sizes.counts == sorted(sizes.counts, reverse=True)
    assert len(set(sizes.counts)) > 5
    assert model.stem.weight.shape[0] + model.wide.weight.shape[0] == 24
    torch.testing.assert_close(out(load_compressed(Momentum, callback.artifact), images()), out(model, images()))


def test_removal_during_training_equals_removal_at_the_end(tmp_path: Path) -> None:
    """Zero units get no gradient that matters: both ways train the same network."""

    class Plain(MLP):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    options: dict[str, Any] = {"sparsity": 0.5, "schedule": "constant", "start": 0.3, **FINE}
    found = [
        finalize(
            fit(
                quiet_trainer(tmp_path, [StructuredPruningCallback(remove=remove, **options)], max_epochs=EPOCHS),
                built(Plain),
            )
        )
        for remove in ("end", "during")
    ]
    torch.testing.assert_close(out(found[0], *MLP.inputs()), out(found[1], *MLP.inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other", [PruningCallback(sparsity=0.5, include=["*"]), EMAWeightAveraging()], ids=["masks", "ema"]
)
def test_removal_during_training_refuses_what_keeps_old_shapes(other: Callback, tmp_path: Path) -> None:
    with pytest.raises(CallbackOrderError, match="keeps copies or masks of their first shapes"):
        fit(quiet_trainer(tmp_path, [StructuredPruningCallback(remove="during"), other]), built(MLP))


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_optimizers_whose_state_cannot_follow_are_refused(optimizer: Any, tmp_path: Path) -> None:
    class Other(MLP):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters())

    with pytest.raises(ModelError, match=f"{optimizer.__name__} keeps a state of other shapes"):
        fit(quiet_trainer(tmp_path, [StructuredPruningCallback(remove="during", **FINE)], max_epochs=2), Other())


def test_low_rank_goes_with_removal_during_training(tmp_path: Path) -> None:
    callbacks: list[Any] = [LowRankCallback(rank=4, min_saving=0.0), StructuredPruningCallback(remove="during", **FINE)]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    assert model.fc1.second.weight.shape[0] < 32
    torch.testing.assert_close(
        out(load_compressed(MLP, callbacks[1].artifact), *MLP.inputs()), out(model, *MLP.inputs())
    )


# -- with other callbacks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["ste", "lsq"])
@pytest.mark.parametrize("remove", ["end", "during"])
def test_prune_and_quantize_in_one_run(quantizer: str, remove: str, tmp_path: Path) -> None:
    callback = QATCallback(quantizer=quantizer, min_saving=0.0)
    callbacks: list[Any] = [StructuredPruningCallback(sparsity=0.5, remove=remove, **FINE), callback]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(WideConvNet))
    final: Any = finalize(model)
    assert {layer.kind for layer in (final.stem, final.wide, final.head)} == {"int_conv2d", "int_linear"}
    assert final.stem.codes.shape[0] + final.wide.codes.shape[0] == 24
    torch.testing.assert_close(out(final, images()), out(model, images()), rtol=1e-3, atol=1e-3)
    artefact = load_compressed(WideConvNet, callback.artifact)
    torch.testing.assert_close(out(artefact, images()), out(final, images()))
    assert callback.report.params[0] == sum(p.numel() for p in WideConvNet().parameters())


def test_prune_then_quantize_after_training(tmp_path: Path) -> None:
    callback: Any = PTQCallback(min_saving=0.0)
    model: Any = fit(
        quiet_trainer(tmp_path, [StructuredPruningCallback(**FINE), callback], max_epochs=EPOCHS), built(WideConvNet)
    )
    loaded = load_compressed(WideConvNet, callback.artifact)
    assert loaded.stem.codes.shape[0] + loaded.wide.codes.shape[0] == 24
    difference = (out(loaded, images()) - out(model, images())).abs().max()
    assert difference < 0.1 * out(model, images()).abs().max()


@pytest.mark.parametrize("grouped", [None, 8], ids=["channels", "groups"])
def test_prune_then_round_by_data(grouped: int | None) -> None:
    """The codes that calibration has found go with the channels; in groups of inputs they are found anew."""
    model, batches = built(WideConvNet), [images()]
    ptq = {"bits": 4, "scheme": "weight_only", "group_size": grouped}
    config = {"methods": ["structured_pruning", "ptq"], "structured_pruning": {"sparsity": 0.5, **FINE}, "ptq": ptq}
    both = compress_model(model, {"compression": config}, train_loader=batches)
    thin = compress_model(model, "structured_pruning", train_loader=batches, sparsity=0.5, **FINE)
    assert {name: layer.codes.shape[0] for name, layer in both.named_modules() if hasattr(layer, "codes")}
    assert both.head.in_features == thin.head.in_features < model.head.in_features
    error = (out(both, batches[0]) - out(thin, batches[0])).norm() / out(thin, batches[0]).norm()
    assert error < (0.2 if grouped is None else 0.4)


def test_low_rank_factors_lose_channels(tmp_path: Path) -> None:
    callback: Any = StructuredPruningCallback(sparsity=0.5, **FINE)
    callbacks = [LowRankCallback(rank=4, min_saving=0.0), callback]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    final: Any = finalize(model)
    assert final.fc1.first.weight.shape == (4, 16)
    hidden = final.fc1.second.weight.shape[0]
    assert hidden == final.fc2.first.weight.shape[1] < 32
    assert final.fc1.spec["original"]["out_features"] == 32
    torch.testing.assert_close(out(final, *MLP.inputs()), out(model, *MLP.inputs()))
    loaded = load_compressed(MLP, callback.artifact)
    torch.testing.assert_close(out(loaded, *MLP.inputs()), out(final, *MLP.inputs()))
    assert callback.report.params[0] == sum(p.numel() for p in MLP().parameters())


def test_three_methods_in_one_run(tmp_path: Path) -> None:
    last: Any = QATCallback(min_saving=0.0)
    callbacks = [LowRankCallback(rank=4, min_saving=0.0), StructuredPruningCallback(**FINE), last]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    loaded = load_compressed(MLP, last.artifact)
    assert loaded.fc1.second.codes.shape[0] == loaded.fc2.first.codes.shape[1] < 32
    torch.testing.assert_close(out(loaded, *MLP.inputs()), out(model, *MLP.inputs()), rtol=1e-3, atol=1e-3)


def test_masks_and_channels_in_one_run(tmp_path: Path) -> None:
    callbacks: list[Any] = [
        PruningCallback(sparsity=0.8, include=["*"], min_saving=0.0),
        StructuredPruningCallback(**FINE),
    ]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    final: Any = finalize(model)
    assert final.fc1.weight.shape[0] < 32
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert zeros == pytest.approx(0.8 * (16 * 32 + 32 * 24 + 24 * 4), abs=1)
    assert int((final.fc1.weight == 0).sum()) > 0
    torch.testing.assert_close(out(final, *MLP.inputs()), out(model, *MLP.inputs()))


class Average(EMAWeightAveraging):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.seen = [*getattr(self, "seen", []), Watch.look(self._average_model.module)]


def test_the_averaged_model_has_the_same_zero_units(tmp_path: Path) -> None:
    average = Average(decay=0.9, use_buffers=False)
    callback: Any = StructuredPruningCallback(sparsity=0.5, end=0.5, **FINE)
    model: Any = fit(quiet_trainer(tmp_path, [callback, average], max_epochs=EPOCHS), built(MLP))
    assert average.seen[-1] == Watch.look(model)
    assert sum(len(units) for units in model.fc1.spec["group"]["removed"]) == 28
    assert load_compressed(MLP, callback.artifact).fc1.weight.shape[0] < 32


@pytest.mark.parametrize("quantize", [False, True])
def test_a_transformer_loses_heads_and_feed_forward_width(quantize: bool, tmp_path: Path) -> None:
    class Heads(Transformer):
        def __init__(self, lr: float = 0.01) -> None:
            super().__init__(lr)
            layer = nn.TransformerEncoderLayer(16, nhead=4, dim_feedforward=32, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, num_layers=2)

    callback: Any = StructuredPruningCallback(sparsity=0.5, criterion="l1")
    last: Any = QATCallback(min_saving=0.0) if quantize else callback
    model: Any = fit(quiet_trainer(tmp_path, list(dict.fromkeys([callback, last])), max_epochs=EPOCHS), built(Heads))
    final: Any = finalize(model)
    heads = [layer.self_attn.num_heads for layer in final.encoder.layers]
    assert sum(heads) < 8
    assert [layer.linear1.out_features for layer in final.encoder.layers] == [16, 16]
    assert [layer.self_attn.q_proj.out_features for layer in final.encoder.layers] == [4 * count for count in heads]
    inputs = Transformer.inputs()
    tolerance = 1e-3 if quantize else 1e-5
    torch.testing.assert_close(out(final, *inputs), out(model, *inputs), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out(load_compressed(Heads, last.artifact), *inputs), out(final, *inputs))
    assert quantize or any("mean and variance over all" in skip.reason for skip in last.report.skipped)
    assert last.report.params[0] == sum(p.numel() for p in Heads().parameters())


# -- what only looks like channels -------------------------------------------------------------------------------------


class Placed(SmallModule):
    """Tokens with a table of positions, rotary tables in buffers, and a window as long as the heads are wide."""

    cos: Tensor
    sin: Tensor

    def __init__(self, lr: float = 0.01, size: int = 16, window: int = 16) -> None:
        super().__init__(lr)
        self.size, self.window = size, window
        self.pos, self.scale = nn.Parameter(torch.zeros(1, 40, size)), nn.Parameter(torch.ones(size))
        self.embed, self.q, self.k = nn.Linear(3, size), nn.Linear(size, 8), nn.Linear(size, 8)
        self.v, self.head = nn.Linear(size, size), nn.Linear(size, 4)
        angles = torch.arange(40)[:, None] / 10 ** torch.arange(4)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randn(count, 9, 3, generator=generator),)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        h = (self.embed(x) + self.pos[:, :n]) * self.scale
        q, k = (
            t * self.cos[:n] + torch.cat([-t[..., 4:], t[..., :4]], -1) * self.sin[:n] for t in (self.q(h), self.k(h))
        )
        far = torch.tril(torch.ones(n, n, dtype=torch.bool), -self.window)
        h = h + (q @ k.mT).masked_fill(far, float("-inf")).softmax(-1) @ self.v(h)
        return self.head(h.reshape(len(x), n, self.size).mean(1))


@pytest.mark.parametrize("remove", ["end", "during"])
def test_positions_and_buffers_are_those_of_the_whole_model_in_every_file(remove: str, tmp_path: Path) -> None:
    def run(place: str, **resume: Any) -> Any:
        keep = ModelCheckpoint(tmp_path / place, filename="{epoch}", save_top_k=-1)
        callback: Any = StructuredPruningCallback(sparsity=0.5, end=0.8, remove=remove, **FINE)
        return fit(
            quiet_trainer(tmp_path / place, [callback, keep], max_epochs=EPOCHS), built(Placed), **resume
        ), callback

    whole, callback = run("whole")
    for epoch in range(EPOCHS - 1):
        resumed, _ = run(f"from{epoch}", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_equal(tensors(resumed), tensors(whole))
    small: Any = load_compressed(Placed, callback.artifact)
    left = small.embed.out_features
    assert (small.size, small.window, tuple(small.pos.shape)) == (left, 16, (1, 40, left))
    assert left < 16
    assert small.cos.shape == small.sin.shape == (40, 8)
    last: Any = load_compressed(Placed, tmp_path / "whole" / f"epoch={EPOCHS - 1}.ckpt")
    for shape in ((2, 9, 3), (1, 40, 3), (5, 21, 3)):
        expected = out(whole, x := torch.randn(shape))
        for found in (small, last, finalize(whole)):
            torch.testing.assert_close(out(found, x), expected, rtol=1e-4, atol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_run_names_the_module_and_shapes(tmp_path: Path) -> None:
    class Odd(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :3])

    with pytest.raises(ValueError, match=r"float32 \(2, 16\).* in 'fc1': mat1"):
        fit(quiet_trainer(tmp_path, [StructuredPruningCallback()]), built(Odd))


def test_a_finalized_model_is_not_pruned_again(tmp_path: Path) -> None:
    small = compress_model(built(MLP), "structured_pruning", train_loader=MLP.loader())
    with pytest.raises(ModelError, match="compressed already .*channels are removed before that"):
        fit(quiet_trainer(tmp_path, [StructuredPruningCallback()]), small)

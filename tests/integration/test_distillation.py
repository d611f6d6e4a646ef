"""DistillationCallback: the loss by hand, the life of the teacher, every method beside it, and what goes wrong."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn import functional as F

from pquant_lightning import (
    DistillationCallback,
    LowRankCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
)
from pquant_lightning.callbacks.distillation import distillation_loss, fingerprint, relative_square
from pquant_lightning.core.errors import CheckpointError, ModelError, OptionError
from pquant_lightning.core.partial import HINT
from tests.contract.table import TABLE, same_state
from tests.models import MLP, MODELS, built, fit, quiet_trainer


def trained(tmp_path: Any, callbacks: list[Any], model: Any = None, epochs: int = 2, **options: Any) -> Any:
    model = built(MLP) if model is None else model
    fit(quiet_trainer(tmp_path, callbacks, max_epochs=epochs, **options), model)
    return model


class Spy(MLP):
    """Keeps the batches and outputs that it is trained with."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept = (batch, self(batch[0]))
        return F.cross_entropy(self.kept[1], batch[1])


@pytest.mark.parametrize("loss", ["kl", "mse", "cosine"])
def test_the_loss_is_that_of_the_paper(loss: str) -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    found = distillation_loss(student, teacher, loss, temperature=3.0)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = {
        "kl": 9 * (p * (p.log() - q.log())).sum(-1).mean(),
        "mse": ((student - teacher) ** 2).mean(),
        "cosine": (1 - (student * teacher).sum(-1) / student.norm(dim=-1) / teacher.norm(dim=-1)).mean(),
    }[loss]
    torch.testing.assert_close(found, expected)


def test_classes_along_another_dimension() -> None:
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    found = distillation_loss(student, teacher, "kl", dim=1)
    moved = distillation_loss(student.transpose(1, 2), teacher.transpose(1, 2), "kl")
    torch.testing.assert_close(found, moved)


def test_one_step_has_the_gradient_written_out(tmp_path: Any) -> None:
    model = built(Spy)
    teacher = built(Spy)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    callback = DistillationCallback(weight=0.3, temperature=3.0, teacher=teacher, features=["fc1"])
    expected = built(Spy)

    class Gradients(LowRankCallback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters()}

    keep = Gradients(rank=10_000, min_saving=0.0, include=["head"])
    fit(quiet_trainer(tmp_path, [callback, keep], max_steps=1), model)
    batch = next(iter(Spy.loader(0)))
    own = F.cross_entropy(expected(batch[0]), batch[1])
    hidden, wanted = expected.fc1(batch[0]), teacher.fc1(batch[0]).detach()
    far = distillation_loss(expected(batch[0]), teacher(batch[0]).detach(), "kl", 3.0) + relative_square(hidden, wanted)
    (0.7 * own + 0.3 * far).backward()
    for name in ("fc1.weight", "fc2.weight"):
        torch.testing.assert_close(keep.found[name], expected.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_without_weight_nothing_changes(tmp_path: Any) -> None:
    plain = trained(tmp_path, [LowRankCallback(rank=4)])
    beside = trained(tmp_path, [DistillationCallback(weight=0.0), LowRankCallback(rank=4)])
    assert same_state(plain, beside)


@pytest.mark.parametrize("place", [0, 1])
def test_the_teacher_is_the_model_before_compression_wherever_the_callback_stands(place: int, tmp_path: Any) -> None:
    seen: list[Any] = []

    class Look(DistillationCallback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            seen.append((fingerprint(self._teacher), dict(self._teacher.named_modules()), self._teacher.training))
            ids = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert not ids & {id(p) for p in self._teacher.parameters()}
            assert not {id(m) for m in self._teacher.modules()} & {id(m) for m in pl_module.modules()}

    callbacks: list[Any] = [LowRankCallback(rank=4)]
    callbacks.insert(place, Look())
    trained(tmp_path, callbacks)
    assert seen[0][0] == fingerprint(built(MLP))
    assert type(seen[0][1]["fc1"]) is nn.Linear
    assert not seen[0][2]


def test_distillation_brings_the_student_nearer(tmp_path: Any) -> None:
    def distance(weight: float) -> float:
        teacher = built(MLP)
        student = trained(
            tmp_path, [DistillationCallback(weight=weight, loss="mse"), LowRankCallback(rank=4)], epochs=10
        )
        x = MLP.inputs(64, seed=5)[0]
        with torch.no_grad():
            return float((student(x) - teacher(x)).norm())

    assert distance(1.0) < 0.5 * distance(0.0)


@pytest.mark.parametrize("model", ["mlp", "conv_net", "transformer"])
@pytest.mark.parametrize(
    "make",
    [
        *(partial(rows.callback, **rows.rows[0]) for rows in TABLE.values()),
        partial(PruningCallback, sparsity=0.5, include=["*"]),
        partial(StructuredPruningCallback, sparsity=0.5, round_to=1),
        partial(StructuredPruningCallback, sparsity=0.5, round_to=1, remove="during"),
    ],
    ids=lambda make: f"{make.func.__name__}{','.join(make.keywords)}",
)
def test_beside_every_method(make: Any, model: str, tmp_path: Any) -> None:
    callback = make()
    if callback.method.name in TABLE and not TABLE[callback.method.name].takes(model):
        pytest.skip("the method has no layers there")
    module = built(MODELS[model])
    distil = DistillationCallback()
    trainer = quiet_trainer(tmp_path, [callback, distil], max_epochs=2)
    fit(trainer, module)
    assert float(trainer.callback_metrics["pquant/distillation_loss"]) > 0
    assert "training_step" not in module.__dict__
    assert not any("teacher" in name for name in module.state_dict())


def run(tmp_path: Any, seed: int = 0, ckpt: Any = None, **options: Any) -> Any:
    callbacks = [DistillationCallback(**options), LowRankCallback(rank=4), QATCallback(bits=4)]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    return fit(quiet_trainer(tmp_path, [*callbacks, saver], max_epochs=3), built(MLP, seed), ckpt_path=ckpt)


def test_resume_is_bitwise_and_the_checkpoint_holds_no_teacher(tmp_path: Any) -> None:
    whole = run(tmp_path / "a")
    path = tmp_path / "a" / "epoch=0.ckpt"
    resumed = run(tmp_path / "b", ckpt=path)
    assert same_state(whole, resumed)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"]["DistillationCallback"] == {"version": 1, "teacher": fingerprint(built(MLP))}
    assert set(checkpoint["state_dict"]) - {HINT} == set(whole.state_dict())


def test_another_teacher_is_refused_and_a_named_one_taken(tmp_path: Any) -> None:
    whole = run(tmp_path / "a")
    path = tmp_path / "a" / "epoch=0.ckpt"
    with pytest.raises(CheckpointError, match=r"another teacher.*DistillationCallback\(teacher='dense.ckpt'\)"):
        run(tmp_path / "b", seed=1, ckpt=path)
    torch.save({"state_dict": built(MLP).state_dict()}, tmp_path / "dense.ckpt")
    resumed = run(tmp_path / "c", seed=1, ckpt=path, teacher=str(tmp_path / "dense.ckpt"))
    assert same_state(whole, resumed)


def test_weights_are_averaged_and_precision_lowered_beside_it(tmp_path: Any) -> None:
    callbacks = [DistillationCallback(), QATCallback(bits=8), WeightAveraging(use_buffers=False)]
    model = trained(tmp_path, callbacks, precision="bf16-mixed", accumulate_grad_batches=2)
    assert all(p.isfinite().all() for p in model.parameters())
    half = trained(tmp_path, [DistillationCallback(), LowRankCallback(rank=4)], precision="bf16-true")
    assert half.fc1.first.weight.dtype == torch.bfloat16


def test_without_any_method_it_distils_too(tmp_path: Any) -> None:
    trainer = quiet_trainer(tmp_path, [DistillationCallback(weight=1.0, teacher=built(MLP, 1))], max_epochs=1)
    fit(trainer, built(MLP))
    assert float(trainer.callback_metrics["pquant/distillation_loss"]) > 0


class Inner(MLP):
    """Calls submodules, never itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self.head(F.relu(self.fc2(F.relu(self.fc1(batch[0]))))), batch[1])}


def test_a_submodule_is_compared_where_forward_is_not_called(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="never called it.*Known: 'fc1', 'fc2', 'head'"):
        trained(tmp_path, [DistillationCallback(), PTQCallback(scheme="dynamic")], built(Inner))
    model = trained(tmp_path, [DistillationCallback(outputs="head"), PTQCallback(scheme="dynamic")], built(Inner))
    assert "training_step" not in model.__dict__


class Manual(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DistillationCallback(weight=1.5), OptionError, "a share in"),
        (lambda: DistillationCallback(temperature=0.0), OptionError, "temperature > 0"),
        (lambda: DistillationCallback(loss="kll"), OptionError, "Did you mean 'kl'"),
    ],
)
def test_options(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("callback", "model", "error", "message"),
    [
        (DistillationCallback(), Manual, ModelError, "manual optimization"),
        (DistillationCallback(outputs="haed"), MLP, OptionError, "Did you mean 'head'"),
        (DistillationCallback(features=["fd*"]), MLP, OptionError, "features pattern 'fd\\*' matches no module"),
    ],
)
def test_models_it_cannot_serve(callback: Any, model: Any, error: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(error, match=message):
        trained(tmp_path, [callback, LowRankCallback(rank=4)], built(model))


def test_a_compressed_model_is_no_teacher(tmp_path: Any) -> None:
    model = trained(tmp_path, [LowRankCallback(rank=4)])
    with pytest.raises(ModelError, match="is compressed already"):
        trained(tmp_path, [DistillationCallback(), LowRankCallback(rank=4)], model)

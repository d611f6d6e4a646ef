"""Hyperparameters of every type, in artefacts and in checkpoints: the same model again, or an error that says why."""

import argparse
import enum
import html
import re
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from pquant_lightning import (
    CompressionReportCallback,
    LowRankCallback,
    PQuantError,
    QATCallback,
    compress_model,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.hyperparameters import Arguments, arguments_of, decode, encode
from tests.models import SmallModule, fit, quiet_trainer


class Mode(enum.Enum):
    SLOW = "slow"
    FAST = "fast"


class TextMode(str, enum.Enum):  # noqa: UP042 (json takes it for a str)
    SLOW = "slow"


class Net(SmallModule):
    """Its layers have the sizes of its arguments, and a factor that no size shows."""

    def __init__(self, hidden: int = 32, gain: float = 1.0, extra: Any = None, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.fc1 = nn.Linear(16, hidden)
        self.head = nn.Linear(hidden, 4)
        self.factor = gain
        self.extra = extra if isinstance(extra, nn.Module) else None

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(count, 16, generator=generator),)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.head(torch.relu(self.fc1(x)))


class Configured(SmallModule):
    """Takes all its options as one object, as argparse's users do."""

    def __init__(self, config: Any) -> None:
        super(SmallModule, self).__init__()
        self.save_hyperparameters(config)
        self.hparams.setdefault("lr", 0.01)
        self.fc1 = nn.Linear(16, self.hparams.hidden)
        self.head = nn.Linear(self.hparams.hidden, 4)

    draw = staticmethod(Net.draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.hparams.gain * self.head(torch.relu(self.fc1(x)))


class Forgetful(SmallModule):
    """Keeps none of its arguments; of one, there is a trace."""

    def __init__(self, hidden: int = 48, gain: float = 1.0, bias: bool = True) -> None:
        super(SmallModule, self).__init__()
        self.hparams["lr"] = 0.01
        self.gain = gain
        self.fc1 = nn.Linear(16, hidden, bias=bias)
        self.head = nn.Linear(hidden, 4)

    draw = staticmethod(Net.draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.head(torch.relu(self.fc1(x)))


PLAIN = [  # what comes back as it was
    Path("some/where"),
    numpy.float32(0.1),
    numpy.int64(3),
    numpy.bool_(True),
    (1, (2.5, "x")),
    {1: "a", (2, 3): [None]},
    {"pquant": "tuple", "value": [1]},
    {"nested": {"path": Path("x"), "t": (1,)}},
    {1, 2},
    frozenset({"a"}),
    1 + 2j,
    b"\x00\xff",
    argparse.Namespace(a=1, b=(2,)),
    types.SimpleNamespace(c=[1]),
    torch.bfloat16,
    torch.device("cpu"),
    torch.Size([2, 3]),
    float("inf"),
    numpy.arange(6, dtype=numpy.int16).reshape(2, 3),
    torch.tensor([[0.1, 1e-30]]),
    torch.tensor(2.0, dtype=torch.bfloat16),
    torch.zeros(0, 3),
]
OBJECTS = [  # what a file does not hold, and what the message calls it
    (nn.CrossEntropyLoss(), "a torch.nn.modules.loss.CrossEntropyLoss"),
    (nn.ReLU, "the class torch.nn.modules.activation.ReLU"),
    (torch.nn.functional.gelu, "gelu"),
    (Mode.FAST, "the tests.integration.test_hyperparameters.Mode.FAST"),
    (TextMode.SLOW, "TextMode.SLOW"),
    ([1, nn.Tanh()], "a list"),
    (slice(1, 2), "a slice"),
]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, numpy.ndarray):
        return first.dtype == second.dtype and numpy.array_equal(first, second)
    if isinstance(first, numpy.generic):
        return bool(first == second) and type(second) in (bool, int, float)
    return type(first) is type(second) and first == second


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_come_back(value: Any, tmp_path: Path) -> None:
    assert equal(value, decode(encode(value)))
    model = Net(48, 3.0, value)
    line = save_compressed(compress_model(model, "low_rank", rank=4), tmp_path / "net.safetensors")
    again = load_compressed(Net, line)
    assert equal(value, again.hparams.extra)
    assert again.hparams.hidden == 48
    assert again.factor == 3.0


@pytest.mark.parametrize(("value", "called"), OBJECTS, ids=lambda value: str(value)[:20])
def test_objects_are_asked_for(value: Any, called: str, tmp_path: Path) -> None:
    small = compress_model(Net(48, 3.0, value), "low_rank", rank=4)
    path = save_compressed(small, tmp_path / "net.safetensors")
    for given in ({}, {"extra": ...}):  # what the log's line says, word for word
        with pytest.raises(PQuantError, match=r"Pass extra=\.\.\. to load_compressed") as raised:
            load_compressed(Net, path, **given)
        assert called in str(raised.value)
    again = load_compressed(Net, path, extra=value)
    (inputs,) = Net.inputs()
    assert torch.equal(again(inputs), load_compressed(Net(48, 3.0, value), path)(inputs))
    assert again.factor == 3.0


def test_a_default_is_not_asked_for(tmp_path: Path) -> None:
    class Activated(Net):
        def __init__(self, hidden: int = 32, act: Any = nn.ReLU) -> None:
            super().__init__(hidden)
            self.act = act()

    path = save_compressed(compress_model(Activated(48), "low_rank", rank=4), tmp_path / "net.safetensors")
    assert load_compressed(Activated, path).hparams.hidden == 48
    path = save_compressed(compress_model(Activated(48, nn.Tanh), "low_rank", rank=4), tmp_path / "net.safetensors")
    with pytest.raises(PQuantError, match=r"Pass act=\.\.\."):
        load_compressed(Activated, path)


@pytest.mark.parametrize("make", [argparse.Namespace, dict], ids=["namespace", "dict"])
def test_all_options_in_one_object(make: Any, tmp_path: Path) -> None:
    model = Configured(make(hidden=48, gain=3.0, root=Path("x")))
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4)])
    fit(trainer, model)
    again = load_compressed(Configured, trainer.callbacks[0].artifact)
    assert again.hparams.hidden == 48
    assert again.hparams.gain == 3.0
    with pytest.raises(PQuantError, match=r"Pass config=\.\.\."):
        load_compressed(Configured, save_compressed(nn.Sequential(model.fc1), tmp_path / "x"))


class TestWhatIsNotKept:
    def test_another_value_than_the_default_is_asked_for(self, tmp_path: Path) -> None:
        path = save_compressed(compress_model(Forgetful(gain=3.0), "low_rank", rank=4), tmp_path / "net.safetensors")
        with pytest.raises(PQuantError, match=r"gain \(its attribute is 3\.0\)"):
            load_compressed(Forgetful, path)
        assert load_compressed(Forgetful, path, gain=3.0).gain == 3.0

    def test_otherwise_the_log_says_what_is_taken(self, tmp_path: Path, package_log: Any) -> None:
        path = save_compressed(compress_model(Forgetful(), "low_rank", rank=4), tmp_path / "net.safetensors")
        load_compressed(Forgetful, path)
        assert "does not hold the arguments hidden, gain, bias of Forgetful" in package_log.text
        package_log.clear()
        load_compressed(Forgetful, path, hidden=48, gain=1.0, bias=True)
        assert "does not hold" not in package_log.text

    def test_a_model_made_with_others_is_named(self, tmp_path: Path, package_log: Any) -> None:
        path = save_compressed(compress_model(Net(48, 3.0), "low_rank", rank=4), tmp_path / "net.safetensors")
        load_compressed(Net(48, 2.0), path)
        assert "gain=3.0, here 2.0" in package_log.text


def test_the_header_of_an_older_release(tmp_path: Path) -> None:
    assert Arguments.from_metadata({"hparams": '{"lr": 0.1, "widths": [1, 2]}'}).known == {"lr": 0.1, "widths": [1, 2]}
    assert Arguments.from_metadata({}) == Arguments()


@pytest.mark.parametrize("data", [{"pquant": "os.system", "value": "x"}, {"pquant": "dtype", "value": "load"}])
def test_a_header_names_nothing_to_import(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(data)


@pytest.mark.parametrize("value", [Path("x"), numpy.float32(2), nn.CrossEntropyLoss(), nn.ReLU, Mode.FAST], ids=repr)
def test_the_line_in_the_log_works(value: Any, tmp_path: Path, package_log: Any) -> None:
    """With objects in the checkpoints: the artefact is the best model's, and the line of the log loads it."""
    model = Net(48, 3.0, value)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best", save_last=True)
    page = CompressionReportCallback()
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4), QATCallback(), page, checkpoint], max_epochs=2)
    fit(trainer, model)
    line = re.findall(r"Load it with\n +(load_compressed.*)", package_log.text)[0]
    (inputs,) = Net.inputs()
    given = line.replace("extra=...", "extra=value")
    assert ("extra=..." in line) == ("extra" in arguments_of(model).missing)
    loaded = eval(given, {"load_compressed": load_compressed, "Net": Net, "value": value})
    best = Net(48, 3.0, value)
    best = load_compressed(best, checkpoint.best_model_path, weights_only=False)
    state = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    assert {n: t for n, t in best.state_dict().items() if "_extra" not in n}.keys() <= state.keys()
    torch.testing.assert_close(loaded(inputs), finalize(best)(inputs))
    assert page.path is not None
    assert line in html.unescape(page.path.read_text(encoding="utf-8"))

    again = Net(48, 3.0, value)
    further = quiet_trainer(tmp_path / "more", [LowRankCallback(rank=4), QATCallback(), page], max_epochs=3)
    fit(further, again, ckpt_path=checkpoint.last_model_path, weights_only=False)
    assert further.current_epoch == 3
    assert further.callbacks[1].artifact is not None


def test_a_checkpoint_with_objects_is_refused_whole_names_and_no_escape_codes(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4)])
    fit(trainer, Net(48, 3.0, [Mode.FAST, nn.CrossEntropyLoss()]))
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = quiet_trainer(tmp_path, [LowRankCallback(rank=4)])
    for load in (
        lambda: load_compressed(Net, tmp_path / "net.ckpt"),
        lambda: load_compressed(Net(48), tmp_path / "net.ckpt"),
        lambda: fit(again, Net(48, 3.0), ckpt_path=tmp_path / "net.ckpt"),
    ):
        with pytest.raises(PQuantError, match="weights_only=False") as raised:
            load()
        assert "\x1b" not in str(raised.value)
        assert "tests.integration.test_hyperparameters.Mode" in str(raised.value)
        assert "torch.nn.modules.loss.CrossEntropyLoss" in str(raised.value)
    loaded = load_compressed(Net, tmp_path / "net.ckpt", weights_only=False)
    assert loaded.hparams.extra[0] is Mode.FAST
    assert loaded.factor == 3.0


def test_a_file_that_the_run_has_not_written_is_not_trusted(tmp_path: Path) -> None:
    """A checkpoint may name any file as the best so far."""
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4)])
    fit(trainer, Net(48, 3.0, Mode.FAST))
    trainer.save_checkpoint(tmp_path / "foreign.ckpt")

    class Foreign(ModelCheckpoint):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.best_model_path = str(tmp_path / "foreign.ckpt")

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            pass

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pass

    ours = LowRankCallback(rank=4)
    checkpoint = Foreign(tmp_path / "c", monitor="val_loss")
    checkpoint.best_model_path = str(tmp_path / "foreign.ckpt")
    fit(quiet_trainer(tmp_path, [ours, checkpoint]), Net(48, 3.0, "plain"))
    assert ours.artifact is None


class ReversedIO(TorchCheckpointIO):
    """Stores checkpoints in a way that only it can read."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        Path(path).write_bytes(Path(path).read_bytes()[::-1])

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        plain = Path(path).with_suffix(".plain")
        plain.write_bytes(Path(path).read_bytes()[::-1])
        return super().load_checkpoint(plain, map_location, weights_only)


def test_checkpoints_of_a_plugin(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best", save_last=True)
    ours = LowRankCallback(rank=4)
    fit(quiet_trainer(tmp_path, [ours, checkpoint], plugins=[ReversedIO()], max_epochs=2), Net(48))
    assert ours.artifact is not None
    more = quiet_trainer(tmp_path, [LowRankCallback(rank=4)], plugins=[ReversedIO()], max_epochs=3)
    fit(more, Net(48), ckpt_path=checkpoint.last_model_path)
    assert more.current_epoch == 3

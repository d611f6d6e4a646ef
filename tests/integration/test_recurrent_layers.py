"""Recurrent layers as products: what torch's layers compute, and every method that changes a part of them."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pquant_lightning as pq
from pquant_lightning import LowRankCallback, PruningCallback, PTQCallback, QATCallback, load_compressed
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.recurrent import UnfusedRecurrent
from pquant_lightning.core.splitting import split_view
from tests.models import CLASSES, Inputs, SmallModule, built, fit, quiet_trainer

IN, HIDDEN, STEPS, BATCH = 5, 7, 6, 4


class Forecaster(SmallModule):
    """An LSTM of two layers, and a head."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.rnn = nn.LSTM(16, 64, 2, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randn(count, 6, 16, generator=generator),)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        start = x.new_zeros(self.rnn.num_layers, x.shape[0], self.rnn.hidden_size)
        out: Tensor = self.head(self.rnn(x, (start, start))[0][:, -1])
        return out


class GRUForecaster(Forecaster):
    """Two directions, the last states are read."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.rnn = nn.GRU(16, 64, batch_first=True, bidirectional=True)  # type: ignore[assignment]
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[1].transpose(0, 1).flatten(1))
        return out


def _opened(layer: nn.Module) -> UnfusedRecurrent:
    """The layer taken apart; it shares the memory of the parameters."""
    opened = split_view(nn.ModuleList([layer]))[0]  # type: ignore[index]
    assert isinstance(opened, UnfusedRecurrent)
    return opened


def _layers() -> list[nn.RNNBase]:
    flags = itertools.product((False, True), repeat=3)
    made: list[nn.RNNBase] = []
    for bidirectional, batch_first, bias in flags:
        options: dict[str, Any] = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
        made += [
            nn.LSTM(IN, HIDDEN, 2, dropout=0.3, **options),
            nn.LSTM(IN, HIDDEN, 2, proj_size=3, **options),
            nn.GRU(IN, HIDDEN, 2, dropout=0.3, **options),
            nn.RNN(IN, HIDDEN, 2, nonlinearity="relu" if bias else "tanh", **options),
        ]
    return made


def _state(layer: nn.RNNBase, *batch: int) -> Any:
    count = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(count, *batch, layer.proj_size or HIDDEN)
    return (h, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else h


def _given(layer: nn.RNNBase) -> list[tuple[Any, Any]]:
    x = torch.randn(BATCH, STEPS, IN) if layer.batch_first else torch.randn(STEPS, BATCH, IN)
    lengths = torch.tensor([3, 6, 1, 5])
    packed = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False)
    ordered = pack_padded_sequence(x, lengths.sort(descending=True)[0], layer.batch_first)
    one = torch.randn(STEPS, IN)
    states = (_state(layer, BATCH), _state(layer))
    return [(x, None), (x, states[0]), (packed, None), (packed, states[0]), (ordered, states[0]), (one, states[1])]


def _flat(result: Any) -> list[Tensor]:
    output, last = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(last if isinstance(last, tuple) else (last,))]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_outputs_states_and_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    for layer in _layers():
        opened = _opened(layer).train()
        for x, state in _given(layer):
            found = []
            for module in (layer, opened):
                torch.manual_seed(1)  # of the dropout between the layers
                values = _flat(module(x, state))
                weights = module._flat_weights
                loss = sum((value * torch.linspace(1, 2, value.shape[-1])).sin().sum() for value in values)
                found.append([*values, *torch.autograd.grad(loss, weights)])  # type: ignore[arg-type]
            assert len(found[0]) == len(found[1])
            for expected, value in zip(*found, strict=True):
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_it_is_read_like_the_ordinary_layer_and_becomes_one_again() -> None:
    for layer in _layers():
        opened = _opened(layer)
        names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        assert all(getattr(opened, name) == getattr(layer, name) for name in (*names, "proj_size"))
        assert [len(each) for each in opened.all_weights] == [len(each) for each in layer.all_weights]
        assert all(torch.equal(getattr(opened, name), value) for name, value in layer.named_parameters())
        assert not hasattr(opened, "weight_ih_l7")
        whole = opened.finalized()
        assert type(whole) is type(layer)
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in layer.state_dict().items())


def test_wrong_shapes_are_errors_that_name_the_right_ones() -> None:
    opened = _opened(nn.LSTM(IN, HIDDEN))
    with pytest.raises(ModelError, match="last of size 5"):
        opened(torch.randn(3, 2, IN + 1))
    with pytest.raises(ModelError, match=r"must be \[\(1, 2, 7\), \(1, 2, 7\)\]"):
        opened(torch.randn(3, 2, IN), (torch.zeros(1, 1, HIDDEN), torch.zeros(1, 1, HIDDEN)))


METHODS: dict[str, tuple[dict[str, Any], float, float]] = {  # options, share of the bytes, error of the output
    "ptq": ({}, 0.3, 0.03),
    "ptq dynamic": ({"scheme": "dynamic"}, 0.3, 0.1),
    "ptq weights": ({"scheme": "weight_only"}, 0.3, 0.03),
    "qat": ({}, 0.3, 0.1),
    "low_rank": ({"param_ratio": 0.5}, 0.55, 0.9),
}


@pytest.mark.parametrize("model_class", [Forecaster, GRUForecaster])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_the_parts_and_the_file_loads(
    method: str, model_class: type[Forecaster], tmp_path: Path
) -> None:
    options, share, most = METHODS[method]
    model, (x,) = built(model_class).eval(), model_class.inputs()
    small: Any = pq.compress_model(model, method.split()[0], train_loader=model_class.loader(), **options)
    assert isinstance(small.rnn, UnfusedRecurrent)
    final = pq.finalize(small).eval()
    assert stored_bytes(final) <= share * stored_bytes(model)
    loaded = load_compressed(model_class, pq.save_compressed(small, tmp_path / "small.pt"))
    with torch.no_grad():
        assert torch.equal(loaded(x), final(x))
        assert (final(x) - model(x)).norm() <= most * model(x).norm()


def test_what_is_merged_is_torch_s_own_layer_again(tmp_path: Path) -> None:
    model, (x,) = built(Forecaster).eval(), Forecaster.inputs()
    adapted: Any = pq.compress_model(model, "lora", r=2)
    assert isinstance(adapted.rnn, UnfusedRecurrent)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.add_(0.02)
        final = pq.finalize(adapted).eval()
        assert type(final.rnn) is nn.LSTM
        torch.testing.assert_close(final(x), adapted.eval()(x), atol=1e-5, rtol=1e-4)
    model.load_state_dict(final.state_dict())


def test_methods_that_leave_it_whole_say_so() -> None:
    model: Any = built(Forecaster)
    plan = pq.TensorTrainCompression(param_ratio=0.5).plan(model)
    assert {skip.name: skip.reason for skip in plan.skipped}["rnn"] == "this method leaves recurrent layers whole"
    pruned: Any = pq.compress_model(model, "structured_pruning", sparsity=0.3, train_loader=Forecaster.loader())
    assert type(pruned.rnn) is nn.LSTM
    assert pruned.rnn.hidden_size < 64


def test_masks_go_with_the_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [PruningCallback(sparsity=0.5, schedule="constant"), PTQCallback(bits=8)]
    with caplog.at_level(logging.INFO, "pquant_lightning"):
        fit(quiet_trainer(tmp_path, callbacks), built(Forecaster))
    assert sum("taken apart into ordinary products" in message for message in caplog.messages) == 1
    loaded: Any = load_compressed(Forecaster, callbacks[1].artifact)
    assert isinstance(loaded.rnn, UnfusedRecurrent)
    weights = [loaded.rnn.weight_ih_l0, loaded.rnn.weight_hh_l1]
    assert 0.3 < sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights) < 0.8


@pytest.mark.parametrize("make", [QATCallback, lambda: LowRankCallback(param_ratio=0.5)])
def test_a_resumed_training_ends_bit_for_bit_where_the_whole_one_does(make: Any, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(quiet_trainer(tmp_path, [make(), keep], max_epochs=2), built(Forecaster))
    trainer = quiet_trainer(tmp_path, [make()], max_epochs=2)
    resumed = fit(trainer, built(Forecaster, seed=3), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert isinstance(resumed.rnn, UnfusedRecurrent)
    found, expected = resumed.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


class Alone(nn.Module):
    """One LSTM, sequences or steps first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 32, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


def test_its_export_computes_the_same_and_fixes_the_steps(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16)
    for batch_first in (True, False):
        model = Alone(batch_first).eval()
        small = pq.finalize(pq.compress_model(model, "low_rank", param_ratio=0.5, include=["rnn*"])).eval()
        if not batch_first:  # the first size is that of the steps, which are written one after the other
            with pytest.raises(ModelError, match="fixes the size 'batch' to 2"):
                pq.export_model(small, (x,), tmp_path / "other.pt2")
            continue
        pq.export_model(small, (x,), tmp_path / "small.pt2")
        program: Any = torch.export.load(tmp_path / "small.pt2").module()
        with torch.no_grad():
            for batch in (x, torch.randn(5, 3, 16)):
                torch.testing.assert_close(program(batch), small(batch))

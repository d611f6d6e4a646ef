"""Calibration: samples of the user's data, how a batch becomes the arguments of a forward, and what layers receive."""

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import compress_model
from pquant_lightning.callbacks.distillation import distillation_loss
from pquant_lightning.core.calibration import (
    MAX_VALUES,
    MOVING_AVERAGE,
    Samples,
    batch_size,
    bind_batch,
    collect_inputs,
    run_samples,
)
from pquant_lightning.core.errors import CalibrationError, ModelError
from pquant_lightning.methods.pruning._reconstruction import recalibrate
from pquant_lightning.methods.pruning._second_order import squared_input_norms

VALUES = torch.arange(20.0).reshape(20, 1)


def loader(batch: int = 8, **options: Any) -> DataLoader[Any]:
    """20 samples that are their own numbers, each with a target."""
    return DataLoader(TensorDataset(VALUES, VALUES.flatten().long()), batch, **options)


def drawn(samples: Samples) -> list[float]:
    return torch.cat([batch[0] for batch in samples.batches]).flatten().tolist()


class TestTake:
    @pytest.mark.parametrize(
        ("count", "sizes"), [(1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (20, [8, 8, 4])]
    )
    def test_the_last_batch_is_cut(self, count: int, sizes: list[int], package_log: pytest.LogCaptureFixture) -> None:
        samples = Samples.take(loader(), count)
        assert [len(batch[0]) for batch in samples.batches] == sizes
        assert [len(batch[1]) for batch in samples.batches] == sizes
        assert samples.count == count
        assert drawn(samples) == list(range(count))
        assert package_log.text == ""

    def test_it_draws_no_batch_more_than_it_needs(self) -> None:
        seen = []

        def batches() -> Any:
            for step in range(10):
                seen.append(step)
                yield torch.zeros(8, 1)

        assert Samples.take(batches(), 16).count == 16
        assert seen == [0, 1]

    def test_a_batch_of_a_dict_is_cut_in_all_its_tensors(self) -> None:
        batch = {"x": torch.zeros(6, 3), "pair": (torch.ones(6), [torch.ones(6, 2)]), "table": torch.ones(5), "id": "a"}
        (cut,) = Samples.take([batch], 4).batches
        assert cut["x"].shape == (4, 3)
        assert cut["pair"][0].shape == (4,)
        assert cut["pair"][1][0].shape == (4, 2)
        assert cut["table"].shape == (5,)  # not one entry per sample
        assert cut["id"] == "a"

    def test_a_named_tuple_stays_one(self) -> None:
        pair = namedtuple("pair", "image label")
        (cut,) = Samples.take([pair(torch.zeros(6, 3), torch.ones(6))], 2).batches
        assert type(cut) is pair
        assert cut.label.tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("batch", "size"),
        [
            (torch.zeros(5, 2), 5),
            (torch.zeros(()), 1),
            ({"name": "a", "x": torch.zeros(3)}, 3),
            ([{"x": torch.zeros(4)}, torch.zeros(9)], 4),
            ("text", 1),
        ],
    )
    def test_the_size_of_a_batch(self, batch: Any, size: int) -> None:
        assert batch_size(batch) == size

    @pytest.mark.parametrize("source", [[], DataLoader(TensorDataset(torch.zeros(0, 1)), 4), [torch.zeros(0, 1)]])
    def test_an_empty_source(self, source: Any) -> None:
        with pytest.raises(CalibrationError, match=rf"{type(source).__name__}.* hold 0 samples"):
            Samples.take(source, 4)

    def test_too_few_samples_are_used_with_a_warning(self, package_log: pytest.LogCaptureFixture) -> None:
        samples = Samples.take(loader(), 50)
        assert samples.count == 20
        (record,) = package_log.records
        assert record.levelname == "WARNING"
        assert "20 samples" in record.getMessage()
        assert "50 were asked for" in record.getMessage()

    def test_the_training_loader_of_a_datamodule(self) -> None:
        calls = []

        class Data(LightningDataModule):
            def prepare_data(self) -> None:
                calls.append("prepare_data")

            def setup(self, stage: str) -> None:
                calls.append(f"setup {stage}")

            def train_dataloader(self) -> Any:
                calls.append("train_dataloader")
                return loader()

            def val_dataloader(self) -> Any:
                raise AssertionError("not for calibration")

        assert drawn(Samples.take(Data(), 3)) == [0, 1, 2]
        assert calls == ["prepare_data", "setup fit", "train_dataloader"]

    @pytest.mark.parametrize("source", [5, torch.zeros(3, 3), {"x": torch.zeros(3)}, "data.pt", nn.Linear(2, 2)])
    def test_what_is_no_loader(self, source: Any) -> None:
        with pytest.raises(CalibrationError, match=rf"a list of batches or a datamodule, got {type(source).__name__}"):
            Samples.take(source, 4)

    def test_the_random_state_is_as_before(self) -> None:
        before = torch.get_rng_state()
        first = drawn(Samples.take(loader(shuffle=True), 20))
        assert torch.equal(torch.get_rng_state(), before)
        assert first != sorted(first)  # it has shuffled

    def test_the_generator_of_the_loader_is_as_before(self) -> None:
        generator = torch.Generator().manual_seed(7)
        shuffled, before = loader(shuffle=True, generator=generator), generator.get_state()
        first = drawn(Samples.take(shuffled, 20))
        assert torch.equal(generator.get_state(), before)
        assert torch.cat([x for x, _ in shuffled]).flatten().tolist() == first  # the epoch is what it would have been

    def test_the_generator_is_as_before_where_the_loader_fails(self) -> None:
        generator = torch.Generator().manual_seed(7)
        before = generator.get_state()

        def fail(items: Any) -> Any:
            raise RuntimeError("damaged")

        with pytest.raises(RuntimeError, match="damaged"):
            Samples.take(loader(shuffle=True, generator=generator, collate_fn=fail), 20)
        assert torch.equal(generator.get_state(), before)

    def test_the_seed_decides_what_a_shuffling_loader_gives(self) -> None:
        first, again, other = (drawn(Samples.take(loader(shuffle=True), 8, seed=seed)) for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_the_global_seed_does_not_matter(self) -> None:
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(drawn(Samples.take(loader(shuffle=True), 8)))
        assert found[0] == found[1]


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + mask


class WithDefault(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x + mask


class Any_(nn.Module):  # noqa: N801
    def forward(self, *args: Any) -> Tensor:
        return torch.stack(args).sum(0)


class Named(nn.Module):
    def forward(self, **entries: Any) -> Tensor:
        return entries["x"]


class KeywordOnly(nn.Module):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return x


A, B, C, Y = (torch.full((2,), float(value)) for value in range(4))


class TestBindBatch:
    @pytest.mark.parametrize(
        ("model", "batch", "args", "kwargs"),
        [
            (One(), A, (A,), {}),
            (One(), (A,), (A,), {}),
            (One(), (A, Y), (A,), {}),
            (One(), [A, Y], (A,), {}),
            (One(), (A, B, Y), (A,), {}),
            (Two(), (A, B, Y), (A, B), {}),
            (Two(), (A, B), (A, B), {}),  # no target: forward requires both
            (WithDefault(), A, (A,), {}),
            (WithDefault(), (A, Y), (A,), {}),  # the target is no mask
            (WithDefault(), (A, B, Y), (A, B), {}),
            (WithDefault(), (A, B, C, Y), (A, B), {}),
            (Any_(), (A, B, C, Y), (A, B, C), {}),
            (One(), {"x": A, "label": Y}, (), {"x": A}),
            (Two(), {"label": Y, "mask": B, "x": A}, (), {"x": A, "mask": B}),
            (WithDefault(), {"x": A, "label": Y}, (), {"x": A}),
            (Named(), {"x": A, "label": Y}, (), {"x": A, "label": Y}),
            (KeywordOnly(), {"x": A, "mask": B, "label": Y}, (), {"x": A, "mask": B}),
            (Two(), ({"x": A, "mask": B}, Y), (), {"x": A, "mask": B}),
            (Two(), ((A, B), Y), (A, B), {}),
            (Two(), [[A, B], Y], (A, B), {}),
            (One(), ((A,), Y), (A,), {}),
            (Two(), (({"x": A, "mask": B},), Y), (), {"x": A, "mask": B}),
            (WithDefault(), ((A, B), Y), (A, B), {}),
            (WithDefault(), ({"x": A, "mask": B}, Y), (), {"x": A, "mask": B}),
        ],
    )
    def test_arguments(self, model: nn.Module, batch: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found_args, found_kwargs = bind_batch(model, batch)
        assert [id(tensor) for tensor in found_args] == [id(tensor) for tensor in args]
        assert {name: id(tensor) for name, tensor in found_kwargs.items()} == {n: id(t) for n, t in kwargs.items()}
        model(*found_args, **found_kwargs)

    @pytest.mark.parametrize("labelled", [True, False])
    def test_a_dict_without_names_of_arguments_is_the_first_one(self, labelled: bool) -> None:
        batch = {"image": A, "label": Y}
        found, kwargs = bind_batch(One(), (batch, Y) if labelled else batch)
        assert len(found) == 1
        assert found[0] is batch
        assert kwargs == {}

    def test_a_tuple_with_too_few_tensors(self) -> None:
        with pytest.raises(CalibrationError, match=r"Two.forward requires x, mask, and .* batches hold 1 input"):
            bind_batch(Two(), (A,))

    def test_a_dict_without_a_required_name(self) -> None:
        with pytest.raises(CalibrationError, match=r"Two.forward requires mask, and .* dicts with 'x', 'label'"):
            bind_batch(Two(), {"x": A, "label": Y})


class Modes(nn.Module):
    """Notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(1, 1), nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(1).eval()
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, self.drop.training, torch.is_grad_enabled()))
        if len(self.seen) == 3:
            raise IndexError("no third batch")
        return self.drop(self.frozen(self.fc(x)))


class TestRunSamples:
    def test_in_eval_mode_without_gradients(self) -> None:
        model = Modes().train()
        model.frozen.eval()
        outputs = list(run_samples(model, Samples.take(loader(), 16)))
        assert model.seen == [(False, False, False)] * 2
        assert not any(output.requires_grad for output in outputs)
        assert (model.training, model.fc.training, model.drop.training, model.frozen.training) == (
            True,
            True,
            True,
            False,
        )
        assert torch.is_grad_enabled()

    def test_an_error_says_shapes_and_restores_the_modes(self) -> None:
        model = Modes().train()
        model.frozen.eval()
        with pytest.raises(
            CalibrationError, match=r"(?s)Modes cannot be run .*float32 \(4, 1\), int64 \(4,\).*third"
        ) as e:
            list(run_samples(model, Samples.take(loader(), 20)))
        assert isinstance(e.value.__cause__, IndexError)
        assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)

    @pytest.mark.parametrize(
        ("batch", "text"),
        [
            (torch.zeros(3, 2), r"\(float32 \(3, 2\)\)"),
            ((torch.zeros(3, 2), torch.zeros(3)), r"a tuple of float32 \(3, 2\), float32 \(3,\)"),
            ({"x": torch.zeros(3, 2, dtype=torch.int32)}, r"a dict of x: int32 \(3, 2\)"),
            (([torch.zeros(3, 2)], "a"), r"a tuple of a list of float32 \(3, 2\), str"),
        ],
    )
    def test_the_batch_is_described(self, batch: Any, text: str) -> None:
        with pytest.raises(CalibrationError, match=f"{text}.*RuntimeError"):
            list(run_samples(nn.Sequential(nn.Linear(5, 5)), Samples((batch,), lambda m, b: m(torch.zeros(3, 2)))))

    def test_a_consumer_that_stops_early_leaves_the_modes(self) -> None:
        model = Modes().train()
        run = run_samples(model, Samples.take(loader(), 16))
        next(run)
        assert not model.training
        run.close()
        assert model.training

    def test_another_way_to_run(self) -> None:
        def half(model: Any, batch: Any) -> Any:
            return batch[0] * 0.5

        samples = Samples.take(loader(), 4, run=half)
        assert next(iter(run_samples(Modes(), samples))).flatten().tolist() == [0, 0.5, 1, 1.5]


class Counting(nn.Module):
    """A convolution, a linear layer, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)
        self.unused = nn.Linear(5, 5)
        self.embed = nn.Embedding(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(self.conv(x).mean((2, 3)) + self.embed(torch.zeros(len(x), dtype=torch.long)))


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 6, 5, generator=generator) * size + 1 for size in (4, 7, 2)]


class TestCollectInputs:
    def test_against_numpy(self, images: list[Tensor]) -> None:
        model = Counting()
        found = collect_inputs(model, ["conv", "fc"], Samples.take(images, 13), bins=16)
        with torch.no_grad():
            received = {"conv": images, "fc": [model.conv(x).mean((2, 3)) + model.embed.weight[0] for x in images]}
        for name, batches in received.items():
            arrays = [batch.numpy().astype(np.float64) for batch in batches]
            every = np.concatenate(arrays)
            assert (found[name].minimum, found[name].maximum) == (every.min(), every.max())
            other_axes = tuple(axis for axis in range(every.ndim) if axis != 1)
            np.testing.assert_allclose(found[name].mean, every.mean(other_axes), rtol=1e-5, atol=1e-6)
            moving = np.array([arrays[0].min(), arrays[0].max()])
            for array in arrays[1:]:
                moving += MOVING_AVERAGE * (np.array([array.min(), array.max()]) - moving)
            np.testing.assert_allclose(found[name].moving, moving, rtol=1e-5)
            expected, _ = np.histogram(every.astype(np.float32), 16, (found[name].minimum, found[name].maximum))
            assert found[name].histogram.sum() == every.size
            assert np.abs(found[name].histogram.numpy() - expected).sum() <= 2  # a value on an edge may go either way

    def test_a_sequence_and_a_convolution_with_one_dimension(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(4, 4, 3))  # the rows of the sequence are the channels
        x = torch.randn(10, 4, 6)
        found = collect_inputs(model, ["0", "1"], Samples.take([x], 10))
        torch.testing.assert_close(found["0"].mean, x.mean((0, 1)))
        torch.testing.assert_close(found["1"].mean, model[0](x).detach().mean((0, 2)))

    def test_without_a_batch_dimension(self) -> None:
        x = torch.randn(3, 6, 5)
        found = collect_inputs(nn.Sequential(nn.Conv2d(3, 4, 3)), ["0"], Samples((x,), lambda m, b: m(b)))
        torch.testing.assert_close(found["0"].mean, x.mean((1, 2)))

    def test_a_layer_called_twice_sees_both(self) -> None:
        layer = nn.Linear(3, 3)
        model = nn.Sequential(layer, layer)
        x = torch.full((2, 3), 5.0)
        found = collect_inputs(model, ["0"], Samples.take([x], 2))
        both = torch.cat([x, layer(x).detach()])
        assert (found["0"].minimum, found["0"].maximum) == (float(both.min()), float(both.max()))
        torch.testing.assert_close(found["0"].mean, both.mean(0))

    def test_a_large_input_is_sampled_evenly(self) -> None:
        x = torch.rand(4 * MAX_VALUES // 64, 64)
        (found,) = collect_inputs(nn.Sequential(nn.Linear(64, 1)), ["0"], Samples.take([x], len(x)), bins=8).values()
        kept = float(found.histogram.sum())
        assert MAX_VALUES / 2 < kept <= MAX_VALUES
        torch.testing.assert_close(found.histogram / kept, torch.full((8,), 1 / 8), rtol=0, atol=0.005)
        assert found.maximum == float(x.max())

    def test_a_constant_input(self) -> None:
        (found,) = collect_inputs(nn.Sequential(nn.Linear(3, 1)), ["0"], Samples.take([torch.ones(2, 3)], 2)).values()
        assert (found.minimum, found.maximum, found.moving) == (1, 1, (1, 1))
        assert found.mean.tolist() == [1, 1, 1]

    def test_half_precision_is_summed_in_more(self) -> None:
        x = torch.full((3000, 4), 100.0, dtype=torch.float16)
        model = nn.Sequential(nn.Linear(4, 2)).half()
        (found,) = collect_inputs(model, ["0"], Samples.take([x], 3000)).values()
        assert found.mean.tolist() == [100.0] * 4
        assert found.mean.dtype == torch.float32

    def test_layers_never_reached_and_indices_are_absent(self, images: list[Tensor]) -> None:
        found = collect_inputs(Counting(), ["conv", "unused", "embed", "fc"], Samples.take(images, 13))
        assert list(found) == ["conv", "fc"]

    def test_an_empty_input_counts_as_none(self) -> None:
        model = nn.Sequential(nn.Linear(4, 2))
        found = collect_inputs(model, ["0"], Samples((torch.zeros(3, 4),), lambda m, b: m(b[:0])))
        assert found == {}

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_not_finite_name_the_layer(self, value: float) -> None:
        class Bad(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.full_like(self.first(x), value))

        model = Bad()
        with pytest.raises(CalibrationError, match="inputs of layer 'second' hold NaN or infinite"):
            collect_inputs(model, ["first", "second"], Samples.take([torch.ones(3, 2)], 3))
        assert model.training
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_one_forward_per_batch_and_no_hook_stays(self, images: list[Tensor]) -> None:
        model = Counting()
        collect_inputs(model, ["conv", "fc", "unused"], Samples.take(images, 13))
        assert model.calls == 3
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_an_input_given_by_name(self) -> None:
        class ByName(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(input=x)

        found = collect_inputs(ByName(), ["fc"], Samples.take([torch.tensor([[1.0, -3.0]])], 1))
        assert (found["fc"].minimum, found["fc"].maximum) == (-3, 1)


class FrozenNorm(nn.Module):
    """A norm that the user keeps in eval, its statistics far from those of the data, between two layers."""

    def __init__(self, by_train: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.other, self.head = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 2),
        )
        self.by_train = by_train
        self.norm.running_var.fill_(1e-4)
        self.train()
        self.norm.eval()

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        if self.by_train:
            self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x))) + self.other(x).sum()


@pytest.mark.parametrize(("by_train", "in_eval"), [(False, False), (True, False), (True, True)])
def test_each_norm_is_calibrated_in_the_mode_in_which_it_trains(by_train: bool, in_eval: bool) -> None:
    model, batches = FrozenNorm(by_train), [torch.randn(16, 4) for _ in range(3)]
    if in_eval:
        model.eval()
    flags = [module.training for module in model.modules()]
    found = collect_inputs(model, ["head"], Samples.take(batches, 48), batch_norms=True)["head"]
    seen = torch.cat([model.fc(x) for x in batches]) / (1e-4 + 1e-5) ** 0.5
    assert found.maximum == pytest.approx(float(seen.max()), rel=1e-4)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("size", [1, 3])
def test_norms_in_training_see_batches_of_one_sample(size: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )
    found = collect_inputs(model, ["3", "5"], Samples.take([torch.randn(size, 1, 2, 2)], 3), batch_norms=True)
    assert set(found) == {"3", "5"}
    assert found["3"].mean.abs().max() < 2


@pytest.mark.parametrize("method", ["ptq", "low_rank", "mixed_precision"])
def test_models_in_double_precision(method: str) -> None:
    options: dict[str, Any] = {"ptq": {"bits": 4}, "low_rank": {"rank": 2}, "mixed_precision": {"average_bits": 5}}[
        method
    ]
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    x = torch.randn(64, 16)
    small = compress_model(model, method, train_loader=[x], min_saving=0.0, **options)
    assert type(small[2]) is not nn.Linear
    assert small(x.double()).isfinite().all()


@pytest.mark.parametrize("loss", ["kl", "cosine"])
def test_distillation_along_a_single_entry_says_so(loss: Any) -> None:
    student, teacher = torch.randn(8, 1), torch.randn(8, 1)
    with pytest.raises(ModelError, match=r"shape \(8, 1\) has one: .* loss='mse'"):
        distillation_loss(student, teacher, loss)
    assert distillation_loss(student, teacher, "mse") > 0
    assert distillation_loss(student.T, teacher.T, loss) > 0


def test_recalibration_takes_a_last_batch_of_one_sample() -> None:
    norm = nn.BatchNorm1d(3)
    model, x = nn.Sequential(norm).eval(), torch.randn(9, 3) * 4 + 2
    recalibrate(model, Samples((x[:8], x[8:]), lambda m, b: m(b)))
    torch.testing.assert_close(norm.running_mean, x[:8].mean(0))
    torch.testing.assert_close(norm.running_var, x[:8].var(0))
    recalibrate(model, Samples((x[8:],), lambda m, b: m(b)))  # nothing to learn from: as before
    torch.testing.assert_close(norm.running_mean, x[:8].mean(0))
    assert not norm.training


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (1, 4)),
        (nn.Conv1d(4, 6, 3), (1, 4, 3)),
        (nn.Conv1d(4, 6, 3, groups=2), (6, 2, 3)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 1, 3)),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_the_shape_of_input_norms_does_not_depend_on_the_batch(layer: Any, shape: Any, constant: bool) -> None:
    x = torch.ones(2, 4, 9) if constant else torch.randn(2, 4, 9)
    x = x[..., 0] if isinstance(layer, nn.Linear) else x
    norms = squared_input_norms(nn.Sequential(layer), ["0"], Samples((x,), lambda m, b: m(b)))["0"]
    assert norms.shape == shape
    weight = torch.zeros_like(layer.weight, requires_grad=True)
    total = torch.func.functional_call(layer, {"weight": weight}, (x.square(),)).sum()
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(norms.expand_as(expected), expected)

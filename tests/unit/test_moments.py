"""Moments of layer inputs: equal to what the weight is really multiplied with, whatever the layer and the memory."""

import copy

import pytest
import torch
from torch import nn

from pquant_lightning.core import moments
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.moments import MomentSource, collect_moments, has_moments, input_rows, moment_size
from pquant_lightning.core.surgery import replace_layer


def test_rows_times_the_weight_are_the_output(case):
    layer, transposed = case.layer, "Transpose" in type(case.layer).__name__
    if not has_moments(layer) or transposed:
        pytest.skip("the weight is not multiplied with one vector per output")
    rows = input_rows(layer, case.inputs)
    weight = layer.weight.reshape(len(rows), -1, rows.shape[-1])
    outputs = rows @ weight.mT  # (groups, positions, outputs)
    expected = layer(case.inputs) - (0 if layer.bias is None else layer(torch.zeros_like(case.inputs)))
    channels = -1 if isinstance(layer, nn.Linear) else 1
    expected = expected.movedim(channels, -1).reshape(outputs.shape[1], len(rows), -1).transpose(0, 1)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert moment_size(layer) == (rows.shape[0], rows.shape[2])


def test_a_transposed_convolution_reads_one_position_at_a_time():
    layer, x = nn.ConvTranspose2d(6, 4, 3, groups=2), torch.randn(5, 6, 3, 2)
    rows = input_rows(layer, x)
    assert rows.shape == (2, 30, 3)
    torch.testing.assert_close(rows[1, 7], x[1, 3:, 0, 1])  # position 7 is (1, 0, 1)
    assert moment_size(layer) == (2, 3)


class Twice(nn.Module):
    """A convolution, and a linear layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.unused = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(self.conv(x).mean((2, 3)))))


def _batches(sizes=(4, 3)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 5, 6, generator=generator) + 0.5 for size in sizes]


def test_moments_against_float64():
    model, batches = Twice(), _batches()
    found = collect_moments(model, ["conv", "fc", "unused"], Samples.take(batches, 7))
    assert set(found) == {"conv", "fc"}
    rows = torch.cat([input_rows(model.conv, x) for x in batches], dim=1).double()
    assert found["conv"].count == rows.shape[1] == 7 * 30
    torch.testing.assert_close(found["conv"].second.double(), rows.mT @ rows / rows.shape[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["conv"].mean.double(), rows.mean(1), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        first = torch.cat([model.conv(x).mean((2, 3)) for x in batches])
        both = torch.cat([first, torch.relu(model.fc(first))])[None]
    assert found["fc"].count == 14
    torch.testing.assert_close(found["fc"].second, both.mT @ both / 14, rtol=1e-5, atol=1e-6)


def test_a_large_convolution_input_is_unfolded_in_parts(monkeypatch):
    model, samples = Twice(), Samples.take(_batches(), 7)
    whole = collect_moments(model, ["conv"], samples)["conv"]
    monkeypatch.setattr("pquant_lightning.core.moments._MAX_ROWS", 1)
    parts = collect_moments(model, ["conv"], samples)["conv"]
    assert parts.count == whole.count
    torch.testing.assert_close(parts.second, whole.second, rtol=1e-5, atol=1e-6)


def test_an_input_without_a_batch_dimension():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(3, 6, 5)
    alone = collect_moments(model, ["0"], Samples((x,), lambda m, b: m(b)))["0"]
    batched = collect_moments(model, ["0"], Samples((x[None],), lambda m, b: m(b)))["0"]
    assert alone.count == batched.count == 12
    torch.testing.assert_close(alone.second, batched.second)


def test_a_reference_gives_the_moments_of_the_difference():
    model, batches = Twice(), _batches()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.conv.weight.mul_(0.5)
    found = collect_moments(model, ["fc"], Samples.take(batches, 7), reference=reference)["fc"]

    def inputs(m):
        first = torch.cat([m.conv(x).mean((2, 3)) for x in batches])
        return torch.cat([first, torch.relu(m.fc(first))])

    with torch.no_grad():
        x, wanted = inputs(model), inputs(reference)
    torch.testing.assert_close(found.cross[0], (wanted - x).T @ x / 14, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.reference_mean[0], wanted.mean(0), rtol=1e-4, atol=1e-6)
    assert found.cross.abs().max() > 1e-3


def test_values_that_are_not_finite_name_the_layer():
    with pytest.raises(CalibrationError, match="inputs of layer 'conv' hold NaN"):
        collect_moments(Twice(), ["conv"], Samples.take([torch.full((2, 3, 5, 6), torch.nan)], 2))


def test_double_precision_stays():
    model = nn.Sequential(nn.Linear(4, 2)).double()
    assert collect_moments(model, ["0"], Samples.take([torch.randn(5, 4)], 5))["0"].second.dtype == torch.float64


class Shared(nn.Module):
    """Two layers read one tensor, and a third reads it after it was changed in place."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.after = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        x = x.clone()
        summed = self.q(x) + self.k(x)
        return summed + self.after(x.relu_())


def test_what_several_layers_read_is_multiplied_once(monkeypatch):
    model, x = Shared(), torch.randn(20, 6)
    made = []
    products = moments._Products

    class Counted(products):
        def __call__(self, rows, shift):
            found = super().__call__(rows, shift)
            made.append(found[-1])  # kept, so that an id is not used again
            return found

    monkeypatch.setattr(moments, "_Products", Counted)
    found = collect_moments(model, ["q", "k", "after"], Samples.take([x[:12], x[12:]], 20))
    assert len(made) == 6
    assert len({id(product) for product in made}) == 4
    for name, seen in (("q", x), ("k", x), ("after", x.relu())):
        torch.testing.assert_close(found[name].second[0], seen.T @ seen / 20)
        torch.testing.assert_close(found[name].covariance[0], torch.cov(seen.T, correction=0), rtol=1e-4, atol=1e-5)


class TestMomentSource:
    @pytest.mark.parametrize(("max_bytes", "passes"), [(10**6, 1), (1, 2)])
    def test_one_pass_where_the_moments_fit(self, max_bytes, passes):
        source = MomentSource(Twice(), ["conv", "fc", "unused"], Samples.take(_batches(), 7), max_bytes)
        assert source.passes == 0
        found = [source.get(name) for name in ("conv", "fc", "conv")[: 1 + passes]]
        assert source.passes == min(passes, 2) + (passes == 2)
        assert all(one is not None for one in found)
        assert source.get("other") is None
        assert source.counts["conv"] == 210

    def test_collect_first_comes_before_a_change(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        expected = collect_moments(model, ["1"], Samples.take([torch.ones(2, 3)], 2))["1"]
        source = MomentSource(model, ["0", "1"], Samples.take([torch.ones(2, 3)], 2), 10**6)
        source.collect_first()
        replace_layer(model, "0", nn.Linear(3, 3))
        torch.testing.assert_close(source.get("1").second, expected.second)

    def test_what_a_layer_takes_is_counted(self):
        model = nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 3))
        size = 4 * 10 * 11 + 4 * 3 * 4
        samples = Samples.take([torch.ones(2, 10)], 2)
        assert len(MomentSource(model, ["0", "1"], samples, size).parts) == 1
        assert len(MomentSource(model, ["0", "1"], samples, size - 1).parts) == 2


def test_a_stock_transformer_is_visited_in_eval_mode_with_padding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=2)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    samples = Samples(((torch.randn(2, 3, 8), mask),), lambda m, b: m(b[0], src_key_padding_mask=b[1]))
    found = collect_moments(encoder, ["layers.0.linear1", "layers.1.linear2"], samples)
    assert {one.count for one in found.values()} == {6}
    assert encoder.use_nested_tensor is True


class Far(nn.Module):
    """Two layers; the second gets what the first gives, far from zero."""

    def __init__(self, mean):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.mean = nn.Linear(6, 3), mean

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("mean", [1000.0, 10000.0])
def test_a_mean_far_above_the_deviations_costs_no_digits(mean):
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(50, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + mean for _ in range(4)
    ]
    found = collect_moments(Far(mean), ["fc"], Samples.take(batches, 200))["fc"]
    exact = torch.cov(torch.cat(batches).double().T, correction=0)
    assert (found.covariance[0].double() - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_batch_that_is_not_finite_is_named(value):
    batches = [*_batches((4, 4)), torch.full((2, 3, 5, 6), value)]
    with pytest.raises(CalibrationError, match=r"inputs of layer 'conv' hold NaN .* \(batch 3\)"):
        collect_moments(Twice(), ["conv"], Samples.take(batches, 10), reference=Twice())


def test_moments_that_would_take_gigabytes_are_left_out_before_they_are_made(caplog):
    wide = nn.Sequential(nn.Conv1d(128, 2, 512, padding=256), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 4))  # 17 GB
    samples = Samples.take([torch.randn(2, 128, 8)], 2)
    source = MomentSource(wide, ["0", "2"], samples, 2**20)
    assert source.too_large == {"0": 4 * 65536 * 65537}
    assert source.get("0") is None
    assert source.get("2") is not None
    assert "layer '0' are not measured" in caplog.text
    assert "17,180,131,328 bytes" in caplog.text
    assert set(collect_moments(wide, ["0", "2"], samples)) == {"2"}

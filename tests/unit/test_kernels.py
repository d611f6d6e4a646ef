"""The kernels of deployed layers: exact against int64 on the worst codes, chosen by time, never a second time."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pquant_lightning import compress_model, save_compressed
from pquant_lightning.methods.quantization import _convolutions, _kernels, _products
from pquant_lightning.methods.quantization._kernels import KERNELS, choose, prepared

WORST = ("random", "largest", "smallest", "opposed")


def worst_codes(kind, *shape):
    """int8 codes over the whole range, or pairs that exceed 16 bits beside inputs of 255."""
    if kind == "random":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    if kind == "opposed":
        return (torch.randint(0, 2, shape) * 254 - 127).to(torch.int8)
    return torch.full(shape, 127 if kind == "largest" else -127, dtype=torch.int8)


def products():
    found = {}
    if _products.has_fbgemm():
        found["fbgemm"] = (_products.prepare_fbgemm, _products.fbgemm_product)
    if _products.has_onednn():
        found["oneDNN"] = (_products.prepare_onednn, _products.onednn_product)
    return found


@pytest.mark.parametrize("name", products())
@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (3, 2, 5), (7, 33, 4), (2, 515, 16), (5, 2048, 3)])
def test_products_are_exact(name, kind, rows, inputs, outputs):
    prepare, product = products()[name]
    codes, x = worst_codes(kind, outputs, inputs), torch.randint(0, 256, (rows, inputs))
    x[0] = 255
    for zero_point in (0, 128, 77):
        levels = (x - zero_point).float()
        exact = (levels.long() @ codes.long().t()).float()
        assert torch.equal(product(levels, zero_point, prepare(codes)), exact)


@pytest.mark.skipif(not _convolutions.HAS_CONV, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize("channels", [(1, 4, 1), (2, 3, 1), (3, 8, 1), (8, 8, 8), (6, 6, 2), (33, 17, 1), (64, 64, 4)])
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (1, 5)])
def test_convolutions_are_exact(kind, channels, window):
    inputs, outputs, groups = channels
    codes = worst_codes(kind, outputs, inputs // groups, *window)
    x = torch.full((2, inputs, 7, 8), 255, dtype=torch.uint8)
    x[1] = torch.randint(0, 256, x[1].shape)
    padding = [size // 2 for size in window]
    x = x.contiguous(memory_format=torch.channels_last)
    found = _convolutions.qconv2d(
        x, codes, torch.ones(outputs), torch.zeros(outputs), 1.0, 0, [1, 2], padding, [1, 1], groups
    )
    exact = F.conv2d(x.double(), codes.double(), None, (1, 2), padding, 1, groups)
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)


def layer_with(codes, **options):
    """A deployed Linear with those codes, on inputs between 0 and 1."""
    outputs, inputs = codes.shape
    net = nn.Sequential(nn.Linear(inputs, outputs))
    x = torch.rand(16, inputs)
    layer = compress_model(net, "ptq", train_loader=[x], min_saving=0.0, **options).eval()[0]
    layer.set_values(codes, layer.scale, layer.zero, layer.bias, None)
    layer._forget()
    return layer, x


def fitting(layer, x):
    return [kernel for kernel in KERNELS if kernel.fits(layer, x)]


SCHEMES = {
    "static": {},
    "static, inputs of 6 bits": {"act_bits": 6},
    "dynamic": {"scheme": "dynamic"},
    "weights alone": {"scheme": "weight_only"},
    "weights alone, 4 bits": {"scheme": "weight_only", "bits": 4, "group_size": 32, "rounding": "nearest"},
    "weights alone, 5 bits": {"scheme": "weight_only", "bits": 5, "rounding": "nearest", "first_last_bits": 5},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_computes_the_layer(scheme, dtype):
    bits = SCHEMES[scheme].get("bits", 8)
    codes = worst_codes("random", 32, 256).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    layer, x = layer_with(codes, **SCHEMES[scheme])
    x = x.to(dtype)
    kernels = fitting(layer, x)
    assert len(kernels) >= 2
    outputs = [kernel.run(layer, x, prepared(layer, kernel)) for kernel in kernels if kernel.integer]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    inputs = layer.quantized_input(x.float()).double()
    expected = F.linear(inputs, layer.dense_weight().double(), layer.bias.double())
    for kernel in kernels:
        found = kernel.run(layer, x, prepared(layer, kernel)).double()
        error = float((found - expected).norm() / expected.norm())
        least = 1e-6 if dtype is torch.float32 else 4e-3
        assert error <= max(kernel.error, least), (kernel.name, error)


@pytest.mark.parametrize("largest", [1.0, 1e4])
@pytest.mark.parametrize("scheme", ["weights alone", "weights alone, 4 bits", "weights alone, 5 bits"])
def test_three_digits_hold_inputs_with_outliers(scheme, largest):
    bits = SCHEMES[scheme].get("bits", 8)
    codes = worst_codes("random", 32, 256).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    layer, x = layer_with(codes, **SCHEMES[scheme])
    x = torch.randn(4, 256)
    x[:, 3] *= largest
    digits = next(kernel for kernel in fitting(layer, x) if kernel.error)
    found = digits.run(layer, x, prepared(layer, digits)).double()
    exact = F.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
    assert float((found - exact).norm() / exact.norm()) < (1e-4 if scheme == "weights alone, 4 bits" else 1e-5)


def test_a_shape_is_timed_once(monkeypatch):
    monkeypatch.setattr(_kernels, "_CHOICES", {})
    timed = []
    monkeypatch.setattr(_kernels, "_measured", lambda *given: timed.append(given) or _kernels.Choice(KERNELS[-1], {}))
    first, x = layer_with(worst_codes("random", 24, 48))
    second, _ = layer_with(worst_codes("random", 24, 48))
    for layer in (first, second, first):
        layer(x)
        layer(x[:15])  # to the next power of two: fifteen rows are timed as eight are
        layer(x[:9])
    assert len(timed) == 2
    other, y = layer_with(worst_codes("random", 25, 48))
    other(y)
    assert len(timed) == 3


def test_deterministic_programs_time_nothing(monkeypatch):
    layer, x = layer_with(worst_codes("random", 16, 64), scheme="weight_only", bits=4, group_size=32)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose(layer, x).seconds == {}
    assert choose(layer, x).kernel.error == 0


def test_without_a_fast_kernel_the_layer_computes_the_same(monkeypatch):
    layer, x = layer_with(worst_codes("largest", 16, 64))
    expected = layer(x)
    for name in ("has_fbgemm", "has_onednn"):
        monkeypatch.setattr(_kernels, name, lambda: False)
    monkeypatch.setattr(_kernels, "_CHOICES", {})
    layer._forget()
    assert choose(layer, x).kernel.name in ("torch._int_mm", "weights in floating point")
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_awkward_inputs(scheme):
    layer, x = layer_with(worst_codes("random", 32, 256).clamp(-8, 7), **SCHEMES[scheme])
    expected = layer(x)
    assert torch.equal(layer(x.t().contiguous().t()), expected)
    assert layer(x[:0]).shape == (0, 32)
    assert torch.equal(layer(x.view(2, 8, 256)).view(16, 32), expected)
    assert layer(x[0]).shape == (32,)
    assert layer(x.half()).shape == (16, 32)


def test_equal_layers_share_their_choice_in_whatever_order_their_specs_are(monkeypatch):
    layer, x = layer_with(worst_codes("random", 32, 64), scheme="weight_only")
    chosen = choose(layer, x)
    layer.spec = {**layer.spec, "layer": dict(reversed(layer.spec["layer"].items()))}
    layer._forget()
    assert choose(layer, x) is chosen


def test_a_kernel_that_adds_an_error_must_be_clearly_faster(monkeypatch):
    layer, x = layer_with(worst_codes("random", 32, 256).clamp(-8, 7), **SCHEMES["weights alone, 4 bits"])
    monkeypatch.setattr(_kernels, "_CHOICES", {})
    clock = iter(range(10**6))
    monkeypatch.setattr(_kernels.time, "perf_counter", lambda: float(next(clock)))  # all take the same time
    assert choose(layer, x).kernel.error == 0


def test_an_older_processor_computes_the_same(tmp_path):
    """A file with codes over the whole range, run by a process without the instructions of AVX-512."""
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32))
    x = torch.randn(4, 4, 8, 8)
    model = compress_model(net, "ptq", train_loader=[x], min_saving=0.0, reduce_range=False)
    save_compressed(model, tmp_path / "net.safetensors")
    save_file({"x": x, "y": model.eval()(x)}, tmp_path / "data.safetensors")
    code = """
import sys
import torch
from safetensors.torch import load_file
from torch import nn
from pquant_lightning import load_compressed
net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32))
model, data = load_compressed(net, f"{sys.argv[1]}/net.safetensors"), load_file(f"{sys.argv[1]}/data.safetensors")
print(torch.backends.cpu.get_cpu_capability(), float((model(data["x"]) - data["y"]).abs().max()))
"""
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, **older}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    capability, difference = result.stdout.split()
    assert capability in ("AVX2", "DEFAULT")
    assert float(difference) < 1e-5


def test_two_parts_are_said_once(package_log, monkeypatch):
    monkeypatch.setattr(_products, "fbgemm_saturates", lambda: True)
    _products.say_two_parts.cache_clear()
    for _ in range(2):
        _products.prepare_fbgemm(worst_codes("largest", 8, 8))
    _products.prepare_fbgemm(worst_codes("largest", 8, 8) // 2)
    assert package_log.text.count("multiplied in two parts") == 1

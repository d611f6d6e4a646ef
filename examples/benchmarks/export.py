"""What exported files take and how fast they run: sizes by format, and int8 in onnxruntime against its own quantizers.

    python examples/benchmarks/export.py [--only sizes speed few_bits runtimes] [--rounds 9] [--quick]

sizes: bytes of a 4 x 1024 MLP in each format relative to its float32 parameters, and the largest error that
`export_model` has measured. speed: our ONNX files of `compress_model(model, "ptq", ...)` in onnxruntime, one thread,
against fp32 and against onnxruntime's `quantize_dynamic` and `quantize_static` (QDQ, a scale per channel, as ours) of
the same model; medians of ratios, contenders in turns. few_bits: four layers of 2048 x 2048 of which only the weights
are quantized, in onnxruntime. runtimes: times faster than fp32 in each format's own runtime, where below 1 is slower.
The times are of the processor, all threads together; the first line says which processor it is.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import linear_encoder, machine, mlp, print_table, relative_times, resnet18
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from pquant_lightning import compress_model, export_model
from pquant_lightning.backends.lowering.trace import trace
from pquant_lightning.exporters.export import EXPORTERS

SCHEMES: dict[str, dict[str, Any]] = {
    "8 bit": {"scheme": "dynamic"},
    "8 bit, static": {"scheme": "static"},
    "4 bit in groups of 32": {"bits": 4, "scheme": "weight_only", "group_size": 32},
}
FORMATS = ("onnx", "pt2", "safetensors", "tensorflow", "tflite", "jax")
MODELS = {
    "MLP 784-1024-1024-10": (mlp, (784,)),
    "MLP 4 x 1024": (lambda: wide(), (1024,)),
    "encoder": (linear_encoder, (128, 384)),
    "ResNet-18": (resnet18, (3, 32, 32)),
    "MobileNet-V2": (lambda: mobilenet(nn.ReLU6), (3, 96, 96)),
    "MobileNet-V2, SiLU": (lambda: mobilenet(nn.SiLU), (3, 96, 96)),
}


def wide(width: int = 1024) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Inverted(nn.Module):
    """MobileNet-V2's block: to more channels, a depthwise convolution, and back."""

    def __init__(self, in_: int, out: int, stride: int, wider: int, activation: type[nn.Module]) -> None:
        super().__init__()
        inner = in_ * wider
        widen = [nn.Conv2d(in_, inner, 1, bias=False), nn.BatchNorm2d(inner), activation()] if wider > 1 else []
        depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        narrow = [nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.body = nn.Sequential(*widen, depthwise, nn.BatchNorm2d(inner), activation(), *narrow)
        self.adds = stride == 1 and in_ == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet(activation: type[nn.Module]) -> nn.Module:
    """MobileNet-V2 with 10 classes: 2.2 million parameters."""
    channels = 32
    layers = [nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), activation()]
    for wider, out, count, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for place in range(count):
            layers.append(Inverted(channels, out, stride if place == 0 else 1, wider, activation))
            channels = out
    layers += [nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 10))


def sizes(folder: Path) -> Iterator[list[str]]:
    """One row per scheme: share of the bytes in each format, and the largest error."""
    torch.manual_seed(0)
    model, x = wide().eval(), torch.randn(64, 1024)
    yield ["weights", *FORMATS]
    for name, options in {"float32": None, **SCHEMES}.items():
        small = model if options is None else compress_model(model, "ptq", train_loader=[x], **options)
        figures = []
        for kind in FORMATS:
            if kind == "tflite" and options is not None and options.get("bits") == 4:
                figures.append("no such type")
                continue
            result = export_model(small, x[:2], folder / f"{name}.{kind}", kind)
            figures.append(f"{result.ratio:.3f} ({result.max_error:.0e})")
        yield [name, *figures]


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Batches(CalibrationDataReader):
    """The calibration data as onnxruntime's quantizer reads them."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.left = iter([{name: x.numpy()}])

    def get_next(self) -> Any:
        return next(self.left, None)


def quantized_by_onnxruntime(folder: Path, x: Tensor) -> dict[str, Path]:
    """The fp32 file of a model quantized by onnxruntime's own tools."""

    clean, dynamic, static = (folder / f"{name}.onnx" for name in ("clean", "ort_dynamic", "ort_static"))
    quant_pre_process(folder / "float.onnx", clean, skip_symbolic_shape=True)
    quantize_dynamic(clean, dynamic, weight_type=QuantType.QInt8, per_channel=True)
    name = session(clean).get_inputs()[0].name
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(clean, static, Batches(name, x), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    return {"onnxruntime dynamic": dynamic, "onnxruntime static": static}


def speed(folder: Path, rounds: int, quick: bool) -> Iterator[list[str]]:
    """One row per model and batch: times faster than fp32, and our time / onnxruntime's."""
    yield ["model", "batch", "dynamic: x fp32", "/ onnxruntime's", "static: x fp32", "/ onnxruntime's"]
    for title, (build, shape) in list(MODELS.items())[: 1 if quick else None]:
        torch.manual_seed(0)
        model = build()
        x = torch.randn(64, *shape)
        with torch.no_grad():
            for _ in range(12):
                model.train()(x)  # batch norms see data
        model.eval()
        export_model(model, x[:2], folder / "float.onnx", overwrite=True)
        paths = {"float": folder / "float.onnx"}
        for name in ("dynamic", "static"):
            small = compress_model(model, "ptq", train_loader=[x], scheme=name)
            paths[name] = export_model(small, x[:2], folder / f"{name}.onnx", overwrite=True).path
        sessions = {k: session(path) for k, path in (paths | quantized_by_onnxruntime(folder, x)).items()}
        for batch in (1, 16):
            runs = {k: partial(s.run, None, {s.get_inputs()[0].name: x[:batch].numpy()}) for k, s in sessions.items()}
            times = relative_times(runs, rounds)
            figures = []
            for name in ("dynamic", "static"):
                figures += [f"{1 / times[name]:.1f}", f"{times[name] / times[f'onnxruntime {name}']:.2f}"]
            yield [title, str(batch), *figures]


def few_bits(folder: Path, rounds: int, quick: bool) -> Iterator[list[str]]:
    """One row per width: times faster than fp32 in onnxruntime by rows of inputs, bytes, and what rounding costs."""
    yield ["weights", "M = 1", "M = 8", "M = 64", "bytes / float32", "rounding of inputs, rms"]
    torch.manual_seed(0)
    model, x = wide(2048).eval(), torch.randn(64, 2048)
    plain = session(export_model(model, x[:2], folder / "wide.onnx", overwrite=True).path)
    for bits in (4,) if quick else (8, 4, 3, 2):
        given: dict[str, Any] = {"scheme": "weight_only", "bits": bits, "first_last_bits": bits, "group_size": 32}
        small = compress_model(model, "ptq", **given)
        result = export_model(small, x[:2], folder / f"{bits}.onnx", overwrite=True)
        sessions, figures = {"float": plain, "few": session(result.path)}, []
        for batch in (1, 8, 64):
            runs = {k: partial(s.run, None, {s.get_inputs()[0].name: x[:batch].numpy()}) for k, s in sessions.items()}
            figures.append(f"{1 / relative_times(runs, rounds)['few']:.2f}")
        yield [f"{bits} bit, groups of 32", *figures, f"{result.ratio:.3f}", f"{result.rounding_error:.1e}"]


def runtimes(folder: Path, rounds: int, quick: bool) -> Iterator[list[str]]:
    """One row per runtime: times faster than the fp32 file of the same runtime."""
    names = ["8 bit", "8 bit, static"]
    yield ["runtime", *(f"{name}, batch {batch}" for batch in (1, 16) for name in names)]
    torch.manual_seed(0)
    model, x = wide().eval(), torch.randn(64, 1024)
    small = {name: compress_model(model, "ptq", train_loader=[x], **SCHEMES[name]) for name in names}
    for kind in ("tflite",) if quick else ("onnx", "tflite", "tensorflow", "jax"):
        exporter, opened = EXPORTERS[kind], {}
        for place, (name, net) in enumerate({"float": model, **small}.items()):
            path = export_model(net, x[:2], folder / f"runtime{place}.{kind}", kind, verify=False).path
            opened[name] = exporter.open(path, trace(net, x[:2], None, exporter.twin, exporter.finalizes))
        figures = []
        for batch in (1, 16):
            times = relative_times({name: partial(run, [x[:batch]]) for name, run in opened.items()}, rounds)
            figures += [f"{1 / times[name]:.2f}" for name in names]
        yield [kind, *figures]


TABLES = {
    "speed": ("int8 in onnxruntime", speed),
    "few_bits": ("Weights of few bits in onnxruntime, 4 x 2048 x 2048, times faster than fp32", few_bits),
    "runtimes": ("8 bits in each runtime, MLP 4 x 1024, times faster than its fp32", runtimes),
}


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["sizes", *TABLES], default=["sizes", *TABLES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first row of each table of times only, for CI")
    options = parser.parse_args()
    for logger in ("pquant_lightning", "root"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{machine()}, onnxruntime {onnxruntime.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        if "sizes" in options.only:
            print_table("Bytes / float32 parameters (largest error)", sizes(Path(folder)))
        for name in (name for name in TABLES if name in options.only):
            title, rows = TABLES[name]
            print_table(title, rows(Path(folder), options.rounds, options.quick))


if __name__ == "__main__":
    main()
